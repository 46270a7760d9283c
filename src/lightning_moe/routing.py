"""The record that flows, and the window that collects these records.

A `Routing` says which token goes to which expert with what weight. A window opened by `record_routing` collects the
routings of every MoE layer that runs while it is open.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class MoEWarning(UserWarning):
    """Something in this run has no effect, or not the effect that its name suggests."""


@dataclass(frozen=True)
class Routing:
    """Which token goes to which expert, with what weight: N assignments, one row per (token, expert) pair.

    Rows, and not a T × K table, so that token choice, expert choice, top-p, dropped and null experts share one
    dispatch and one set of metrics. Where every token has the same number of rows, in token order, ``top_k`` says so
    and `combine` uses it.

    The router's columns are its choices. They are the E experts, unless ``num_ffn_experts`` says that fewer of them are
    FFNs: what comes after those computes nothing (null, zero, copy and constant experts), and no row of theirs is
    dispatched. A router with several choices for one expert gives ``choice_ids`` and ``choice_experts`` too.

    Args:
        token_ids: token of each assignment, 0 <= id < T.
        expert_ids: expert of each assignment; one that is no FFN has an id of E or more.
        weights: combine weight of each assignment, differentiable.
        logits: output of the router's gate, one column per choice, float32.
        scores: the logits after softmax, sigmoid, ..., float32.
        token_mask: False marks padding, which enters no loss and no statistic; None means that all tokens are real.
        top_k: K, where row ``t * K + j`` is the j-th assignment of token t; None where rows are irregular.
        num_ffn_experts: E, where that is not the number of columns.
        choice_ids: the column of each assignment, where that is not its expert.
        choice_experts: the expert of each column, where that is not its number.
        dropped: True marks an assignment that was chosen, and counts, but is not computed: it was over capacity.
        gradient_only: True marks a row that was not chosen and does not count: its weight is 0, and it is computed for
            the gradient of that weight.
        expected_load: a differentiable estimate of the tokens per expert, from routers that have one.
        sequence_length: S, where the T tokens are sequences of S tokens each.
        outputs: what each assignment's expert computed, unweighted, where a loss looks at it; zeros for what was not
            computed.
        gate: the router's rows, one per choice, where a loss looks at them.
    """

    token_ids: Int[Tensor, " N"]
    expert_ids: Int[Tensor, " N"]
    weights: Float[Tensor, " N"]
    logits: Float[Tensor, "T choices"]
    scores: Float[Tensor, "T choices"]
    token_mask: Bool[Tensor, " T"] | None = None
    top_k: int | None = None
    num_ffn_experts: int | None = None
    choice_ids: Int[Tensor, " N"] | None = None
    choice_experts: Int[Tensor, " choices"] | None = None
    dropped: Bool[Tensor, " N"] | None = None
    gradient_only: Bool[Tensor, " N"] | None = None
    expected_load: Float[Tensor, " choices"] | None = None
    sequence_length: int | None = None
    outputs: Float[Tensor, "N D"] | None = None
    gate: Float[Tensor, "choices _"] | None = None

    @property
    def num_tokens(self) -> int:
        """T, padding included."""
        return self.logits.shape[0]

    @property
    def num_choices(self) -> int:
        """The number of columns of the logits."""
        return self.logits.shape[1]

    @property
    def num_experts(self) -> int:
        """E, the number of experts that are FFNs."""
        return self.num_choices if self.num_ffn_experts is None else self.num_ffn_experts

    def counted(self) -> Float[Tensor, " N"]:
        """1 for each assignment that counts: chosen, of a real token; else 0."""
        ones = torch.ones_like(self.expert_ids, dtype=torch.float32)
        if self.token_mask is not None:
            ones = self.token_mask.index_select(0, self.token_ids).to(torch.float32)
        return ones if self.gradient_only is None else ones.masked_fill(self.gradient_only, 0)

    def computed(self) -> Bool[Tensor, " N"] | None:
        """Marks the assignments that an FFN computes; None where all are."""
        kept = None if self.dropped is None else ~self.dropped
        if self.num_ffn_experts is None:
            return kept
        is_ffn = self.expert_ids < self.num_ffn_experts
        return is_ffn if kept is None else is_ffn & kept

    def detach(self) -> "Routing":
        """Returns the same routing without its graph, for keeping beyond the step."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        detached: dict[str, Any] = {k: v.detach() if isinstance(v, Tensor) else v for k, v in parts.items()}
        return Routing(**detached)


def expert_load(routing: Routing) -> Float[Tensor, " E"]:
    """Counts the assignments of each expert that is an FFN, padding left out; what is dropped was chosen, and counts.

    Args:
        routing: the routing of one layer.

    Returns:
        Tokens per expert, a float32 count without gradient.

    Example:
        >>> routing = Routing(torch.arange(3), torch.tensor([0, 2, 2]), torch.ones(3), *torch.zeros(2, 3, 4), top_k=1)
        >>> expert_load(routing)
        tensor([1., 0., 2., 0.])
    """
    # one place more, where all that is no FFN is counted
    ids = routing.expert_ids.clamp(max=routing.num_experts)
    counted = routing.counted()
    return counted.new_zeros(routing.num_experts + 1).index_add_(0, ids, counted)[:-1]


def choice_load(routing: Routing) -> Float[Tensor, " choices"]:
    """Counts the assignments of each of the router's choices, padding left out.

    The same as `expert_load` where every choice is an expert.

    Example:
        >>> routing = Routing(torch.arange(2), torch.tensor([0, 2]), torch.ones(2), *torch.zeros(2, 2, 3), None, 1, 2)
        >>> expert_load(routing), choice_load(routing)
        (tensor([1., 0.]), tensor([1., 0., 1.]))
    """
    ids = routing.expert_ids if routing.choice_ids is None else routing.choice_ids
    counted = routing.counted()
    return counted.new_zeros(routing.num_choices).index_add_(0, ids, counted)


def limit_capacity(routing: Routing, capacity_factor: float) -> Routing:
    """Drops the assignments beyond each expert's capacity of ``ceil(capacity_factor * N / E)`` tokens.

    N is the number of assignments of real tokens. The first come are kept, in the order of the rows: of a router that
    gives every token the same number of experts no token depends on a later one. Padding takes no place. A dropped
    assignment adds nothing to its token's output.

    Reference: Fedus et al., *Switch Transformers*, 2021, equation 3, https://arxiv.org/abs/2101.03961. Differs from it
    for top_k > 1 as Megatron does: a token's second choice stands in the queue with the token.

    Args:
        routing: the routing of one layer, its rows in the order of the tokens.
        capacity_factor: 1 gives room for a perfectly even load only; 1.25 in Switch.

    Example:
        >>> routing = Routing(torch.arange(4), torch.tensor([0, 0, 0, 1]), torch.ones(4), *torch.zeros(2, 4, 2))
        >>> limit_capacity(routing, 1.0).dropped
        tensor([False, False,  True, False])
    """
    num_experts, real = routing.num_experts, routing.counted() > 0
    computed = routing.computed()
    queued = real if computed is None else real & computed
    # in float64: 1.2 * 25 is 30 there, and more in float32
    capacity = (capacity_factor * real.sum().double() / num_experts).ceil()
    # those without a place in a queue stand in one of their own, behind the experts'
    queues, order = torch.where(queued, routing.expert_ids, num_experts).sort(stable=True)
    starts = torch.searchsorted(queues, torch.arange(num_experts + 1, device=queues.device))
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device) - starts[queues]
    dropped = queued & (places >= capacity)
    return replace(routing, dropped=dropped if routing.dropped is None else dropped | routing.dropped)


def concatenate(routings: list[Routing]) -> Routing:
    """Joins the routings of several forwards of one layer; the tokens are numbered on."""
    first = routings[0]
    if len(routings) == 1:
        return first
    starts = [0]
    for routing in routings:
        starts.append(starts[-1] + routing.num_tokens)

    def joined(name: str, default: Callable[[Routing], Tensor]) -> Tensor | None:
        parts = [getattr(routing, name) for routing in routings]
        if all(part is None for part in parts):
            return None
        return torch.cat([default(r) if part is None else part for r, part in zip(routings, parts, strict=True)])

    def common(name: str) -> Any:
        values = {getattr(routing, name) for routing in routings}
        return values.pop() if len(values) == 1 else None

    loads = [routing.expected_load for routing in routings if routing.expected_load is not None]
    outputs = [routing.outputs for routing in routings if routing.outputs is not None]
    return Routing(
        torch.cat([r.token_ids + start for r, start in zip(routings, starts, strict=False)]),
        torch.cat([r.expert_ids for r in routings]),
        torch.cat([r.weights for r in routings]),
        torch.cat([r.logits for r in routings]),
        torch.cat([r.scores for r in routings]),
        joined("token_mask", lambda r: r.logits.new_ones(r.num_tokens, dtype=torch.bool)),
        common("top_k"),
        first.num_ffn_experts,
        joined("choice_ids", lambda r: r.expert_ids),
        first.choice_experts,
        joined("dropped", lambda r: torch.zeros_like(r.expert_ids, dtype=torch.bool)),
        joined("gradient_only", lambda r: torch.zeros_like(r.expert_ids, dtype=torch.bool)),
        torch.stack(loads).sum(0) if len(loads) == len(routings) else None,
        common("sequence_length"),
        torch.cat(outputs) if len(outputs) == len(routings) else None,
        first.gate,
    )


# --- the window ---

Observer = Callable[[str, Routing, Mapping[str, Tensor]], None]


class RoutingWindow(Mapping[str, Routing]):
    """What the MoE layers decided while the window was open: layer name to `Routing`, in the order of the forward.

    A layer that ran several times gives one `Routing` with all of its tokens, in order.
    """

    def __init__(self) -> None:
        self._records: dict[str, list[Routing]] = {}

    def add(self, name: str, routing: Routing, losses: Mapping[str, Tensor]) -> None:
        """Keeps one forward of one layer; an `Observer` like any other."""
        self._records.setdefault(name, []).append(routing)

    def __getitem__(self, name: str) -> Routing:
        return concatenate(self._records[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)


_observers: list[Observer] = []


@contextmanager
def record_routing() -> Iterator[RoutingWindow]:
    """Collects the routing of every MoE layer that runs inside the ``with`` block.

    Windows may be nested; each sees everything. A forward that activation checkpointing repeats during the backward
    leaves no second record.

    Yields:
        A mapping of layer name to `Routing`, filled as the layers run.

    Example:
        >>> from lightning_moe import Experts, MoELayer, TopKRouter
        >>> layer = MoELayer(TopKRouter(8, 4, top_k=2), Experts(4, 8, 16), name="mlp")
        >>> with record_routing() as window:
        ...     _ = layer(torch.randn(1, 5, 8))
        >>> window["mlp"].expert_ids.shape
        torch.Size([10])
    """
    window = RoutingWindow()
    stop = observe_routing(window.add)
    try:
        yield window
    finally:
        stop()


def observe_routing(observer: Observer) -> Callable[[], None]:
    """Calls ``observer(layer_name, routing, balance_losses)`` for every forward of every MoE layer from now on.

    Args:
        observer: called once per forward; sees tensors that are part of the graph and must not keep them.

    Returns:
        A function that ends the observation; calling it twice does no harm.
    """
    _observers.append(observer)

    def stop() -> None:
        if observer in _observers:
            _observers.remove(observer)

    return stop


@contextmanager
def unobserved() -> Iterator[None]:
    """Hides what runs inside the ``with`` block from every window that is open outside of it.

    Example:
        >>> from lightning_moe import Experts, MoELayer, TopKRouter
        >>> layer = MoELayer(TopKRouter(8, 4, top_k=2), Experts(4, 8, 16))
        >>> with record_routing() as window, unobserved():
        ...     _ = layer(torch.randn(1, 5, 8))
        >>> len(window)
        0
    """
    hidden = _observers[:]
    _observers.clear()
    try:
        yield
    finally:
        _observers[:0] = hidden


def is_recomputing() -> bool:
    """Whether this forward is one that activation checkpointing repeats during a backward."""
    # Inside any backward the engine has a current graph task; -1 outside. True for both kinds of checkpointing, where
    # torch.is_grad_enabled() tells only the reentrant one.
    return bool(torch._C._current_graph_task_id() != -1)


@torch.compiler.disable
def notify(name: str, routing: Routing, losses: Mapping[str, Tensor]) -> None:
    """Hands one layer's routing to every open window, once per forward."""
    if not is_recomputing():
        for observer in list(_observers):
            observer(name, routing, losses)


def is_observed() -> bool:
    """Whether any window is open, so that a layer can skip `notify` (a graph break under ``torch.compile``)."""
    return bool(_observers)
