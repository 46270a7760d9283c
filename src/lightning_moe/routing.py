"""The record that flows, and the window that collects these records.

A `Routing` says which token goes to which expert with what weight. A window opened by `record_routing` collects the
routings of every MoE layer that runs while it is open. `TokenContext` carries the padding mask and the token ids from
the model's inputs to its layers.
"""

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


class MoEWarning(UserWarning):
    """Something in this run has no effect, or not the effect that its name suggests."""


@dataclass(frozen=True)
class Routing:
    """Which token goes to which expert, with what weight: N assignments, one row per (token, expert) pair.

    Rows, and not a T × K table, so that token choice, expert choice, top-p, dropped and null experts share one
    dispatch and one set of metrics. Where every token has the same number of rows, in token order, ``top_k`` says so
    and `combine` uses it.

    Args:
        token_ids: token of each assignment, 0 <= id < T.
        expert_ids: expert of each assignment, 0 <= id < E.
        weights: combine weight of each assignment, differentiable.
        logits: output of the router's gate, float32.
        scores: the logits after softmax, sigmoid, ..., float32.
        token_mask: False marks padding, which enters no loss and no statistic; None means that all tokens are real.
        top_k: K, where row ``t * K + j`` is the j-th assignment of token t; None where rows are irregular.
    """

    token_ids: Int[Tensor, " N"]
    expert_ids: Int[Tensor, " N"]
    weights: Float[Tensor, " N"]
    logits: Float[Tensor, "T E"]
    scores: Float[Tensor, "T E"]
    token_mask: Bool[Tensor, " T"] | None = None
    top_k: int | None = None

    @property
    def num_tokens(self) -> int:
        """T, padding included."""
        return self.logits.shape[0]

    @property
    def num_experts(self) -> int:
        """E, the number of columns of the logits."""
        return self.logits.shape[1]

    def detach(self) -> "Routing":
        """Returns the same routing without its graph, for keeping beyond the step."""
        return Routing(
            self.token_ids,
            self.expert_ids,
            self.weights.detach(),
            self.logits.detach(),
            self.scores.detach(),
            self.token_mask,
            self.top_k,
        )


def expert_load(routing: Routing) -> Float[Tensor, " E"]:
    """Counts the assignments of each expert, padding left out.

    Args:
        routing: the routing of one layer.

    Returns:
        Tokens per expert, a float32 count without gradient.

    Example:
        >>> routing = Routing(torch.arange(3), torch.tensor([0, 2, 2]), torch.ones(3), *torch.zeros(2, 3, 4), top_k=1)
        >>> expert_load(routing)
        tensor([1., 0., 2., 0.])
    """
    ones = torch.ones_like(routing.expert_ids, dtype=torch.float32)
    if routing.token_mask is not None:
        ones = routing.token_mask.index_select(0, routing.token_ids).to(torch.float32)
    return ones.new_zeros(routing.num_experts).index_add_(0, routing.expert_ids, ones)


def concatenate(routings: list[Routing]) -> Routing:
    """Joins the routings of several forwards of one layer; the tokens are numbered on."""
    if len(routings) == 1:
        return routings[0]
    starts = [0]
    for routing in routings:
        starts.append(starts[-1] + routing.num_tokens)
    masks = None
    if any(r.token_mask is not None for r in routings):
        full = [r.logits.new_ones(r.num_tokens, dtype=torch.bool) for r in routings]
        masks = torch.cat([f if r.token_mask is None else r.token_mask for r, f in zip(routings, full, strict=True)])
    top_ks = {r.top_k for r in routings}
    return Routing(
        torch.cat([r.token_ids + start for r, start in zip(routings, starts, strict=False)]),
        torch.cat([r.expert_ids for r in routings]),
        torch.cat([r.weights for r in routings]),
        torch.cat([r.logits for r in routings]),
        torch.cat([r.scores for r in routings]),
        masks,
        top_ks.pop() if len(top_ks) == 1 else None,
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


# --- what the layers must know of the tokens ---


@dataclass(frozen=True)
class Tokens:
    """What is known of the T tokens that a router sees, beside their hidden states.

    Args:
        ids: token ids, where the model got them.
        mask: False marks padding; None means that all tokens are real.
    """

    ids: Int[Tensor, " T"] | None = None
    mask: Bool[Tensor, " T"] | None = None


@dataclass
class TokenContext:
    """Carries ``input_ids`` and ``attention_mask`` from a model's inputs to the MoE layers inside it.

    One object is shared by the layers of one model. It keeps the inputs of the last forward, and of the last one with
    gradients: activation checkpointing repeats a layer during the backward, when the model's forward has long ended.
    Two forwards with different masks before one backward cannot be told apart then, which gives a warning.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    inputs_with_grad: dict[str, Tensor] = field(default_factory=dict)
    recomputed: bool = True
    ambiguous: bool = False

    def tokens(self, batch_size: int, sequence_length: int) -> Tokens:
        """Returns what is known of a (B, S) batch, flattened to T = B·S tokens.

        With a key-value cache the mask covers the past too; the last S columns belong to the tokens at hand.
        """
        found = {}
        for key, value in self._inputs_of_this_forward().items():
            # some models flatten to (T, D) before their FFNs
            if value.numel() == batch_size * sequence_length:
                found[key] = value.reshape(-1)
            elif value.shape[0] == batch_size and value.shape[1] > sequence_length:
                found[key] = value[:, -sequence_length:].reshape(-1)
        mask = found.get("attention_mask")
        return Tokens(found.get("input_ids"), None if mask is None else mask.bool())

    def watch(self, model: nn.Module) -> None:
        """Notes ``input_ids`` and ``attention_mask`` of each forward of a model, given by name or position."""
        parameters = tuple(inspect.signature(model.forward).parameters)
        # no closure: a deep copy or a pickle of the model takes its own context along
        model.register_forward_pre_hook(partial(self._note_inputs, parameters), with_kwargs=True)

    def _note_inputs(
        self, parameters: tuple[str, ...], model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        given = {**dict(zip(parameters, args, strict=False)), **kwargs}
        self.inputs = {
            key: value
            for key in ("input_ids", "attention_mask")
            if isinstance(value := given.get(key), Tensor) and value.dim() == 2
        }
        if torch.is_grad_enabled():
            masks = self.inputs.get("attention_mask"), self.inputs_with_grad.get("attention_mask")
            self.ambiguous = not self.recomputed and masks[0] is not masks[1]
            self.inputs_with_grad, self.recomputed = self.inputs, False

    def _inputs_of_this_forward(self) -> dict[str, Tensor]:
        if not self.inputs or torch.compiler.is_compiling() or not is_recomputing():
            return self.inputs
        if self.ambiguous:
            warnings.warn(
                "Activation checkpointing recomputes the MoE layers of two forwards with different attention masks "
                "before one backward: the balance losses of the first take the mask of the second. Join the two in one "
                "batch, or turn checkpointing or the balance losses off.",
                MoEWarning,
                stacklevel=2,
            )
            self.ambiguous = False
        self.recomputed = True
        return self.inputs_with_grad


def takes_tokens(module: nn.Module) -> bool:
    """Whether a module is a text model: its forward takes ``input_ids``."""
    return "input_ids" in inspect.signature(module.forward).parameters
