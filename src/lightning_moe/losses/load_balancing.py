"""Load balancing: every expert gets its share of the tokens."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_moe.losses.base import BalanceLoss, sum_over_ranks, token_scores
from lightning_moe.routing import Routing, choice_load, expert_load, is_recomputing

Scope = Literal["sequence", "micro_batch", "global_batch"]
_SCOPES = ("sequence", "micro_batch", "global_batch")


def load_balancing_loss(
    routing: Routing,
    load: Float[Tensor, " balanced"] | None = None,
    num_tokens: Float[Tensor, ""] | None = None,
) -> Float[Tensor, ""]:
    """How far the load is from even, with a gradient to the router: ``E * sum_e f_e * P_e``.

    ``f_e`` is the fraction of the assignments that go to expert e, all K slots counted; ``P_e`` is the mean over the
    tokens of the score of e, scores scaled to sum to one per token. 1 when routing is uniform, up to E / K when it has
    collapsed on K experts. Choices that compute nothing (null, zero, copy and constant experts) are interchangeable:
    each counts with their mean load. Several choices for one expert count together, and then only those for experts.

    Reference: Fedus et al., *Switch Transformers*, 2021, equations 4 to 6, https://arxiv.org/abs/2101.03961; the mean
    over null experts is that of AdaMoE, https://arxiv.org/abs/2406.13233. Differs from the first: ``f`` counts all K
    slots and is divided by K, so that the balanced value is 1 for every K.

    Args:
        routing: the routing of one layer.
        load: counts to take for f, of a larger batch than this one; None counts the routing's own.
        num_tokens: number of tokens to take for the mean in P; None counts the routing's own.

    Example:
        >>> logits = torch.zeros(4, 4)
        >>> even = Routing(torch.arange(4), torch.arange(4), torch.ones(4), logits, logits.softmax(-1), top_k=1)
        >>> load_balancing_loss(even)
        tensor(1.)
    """
    fraction = _fraction(_load(routing) if load is None else load, routing)
    if num_tokens is None:
        num_tokens = _num_tokens(routing)
    mean_scores = _scores(routing).sum(0) / num_tokens.clamp(min=1)
    return len(fraction) * (fraction * mean_scores).sum()


def sequence_load_balancing_loss(routing: Routing) -> Float[Tensor, ""]:
    """The mean over the sequences of `load_balancing_loss` of each by itself.

    Reference: DeepSeek-AI, *DeepSeek-V3 Technical Report*, 2024, equations 17 to 20, https://arxiv.org/abs/2412.19437.

    Args:
        routing: the routing of one layer, with its ``sequence_length``.

    Raises:
        ValueError: if the routing does not tell where its sequences end.
    """
    length = routing.sequence_length
    if not length or routing.num_tokens % length:
        raise ValueError(
            f"scope='sequence': {routing.num_tokens} tokens with sequence_length={length} are no whole sequences. Give "
            "the layer hidden states of shape (B, S, D), or take scope='micro_batch'."
        )
    num_sequences, scores = routing.num_tokens // length, _scores(routing)
    choices = scores.shape[1]
    # what is not balanced (null choices beside signed ones) counts in a place of its own
    ids = routing.expert_ids.clamp(max=choices)
    load = scores.new_zeros(num_sequences * (choices + 1))
    load = load.index_add_(0, routing.token_ids // length * (choices + 1) + ids, routing.counted().to(load.dtype))
    load = load.view(num_sequences, choices + 1)[:, :-1]
    mask = routing.token_mask
    lengths = torch.full((num_sequences,), float(length), device=load.device, dtype=torch.float32)
    if mask is not None:
        lengths = mask.view(num_sequences, length).sum(1).to(load.dtype)
    mean_scores = scores.view(num_sequences, length, choices).sum(1) / lengths.clamp(min=1).unsqueeze(1)
    per_sequence = choices * (_fraction(load, routing) * mean_scores).sum(1)
    return per_sequence.sum() / (lengths > 0).sum().clamp(min=1)


def _load(routing: Routing) -> Float[Tensor, " balanced"]:
    return choice_load(routing) if routing.choice_experts is None else expert_load(routing)


def _scores(routing: Routing) -> Float[Tensor, "T balanced"]:
    scores = token_scores(routing)
    if routing.choice_experts is None:
        return scores
    experts = routing.choice_experts.clamp(max=routing.num_experts)
    summed = scores.new_zeros(len(scores), routing.num_experts + 1).index_add(1, experts, scores)[:, :-1]
    return summed / summed.sum(-1, keepdim=True).clamp(min=torch.finfo(summed.dtype).tiny)


def _fraction(load: Float[Tensor, "*B balanced"], routing: Routing) -> Float[Tensor, "*B balanced"]:
    if routing.num_ffn_experts is not None and routing.choice_experts is None:
        ffn, free = load.split([routing.num_experts, routing.num_choices - routing.num_experts], dim=-1)
        load = torch.cat([ffn, free.mean(-1, keepdim=True).expand_as(free)], dim=-1)
    return load / load.sum(-1, keepdim=True).clamp(min=1)


def _num_tokens(routing: Routing) -> Float[Tensor, ""]:
    if routing.token_mask is None:
        return torch.tensor(float(routing.num_tokens), device=routing.logits.device, dtype=torch.float32)
    return routing.token_mask.sum().to(torch.float32)


class LoadBalancingLoss(BalanceLoss):
    """`load_balancing_loss` with a coefficient and a scope: over which tokens the load is to be even.

    ``sequence``: each sequence by itself, as DeepSeek-V3. ``micro_batch``: the tokens of one forward on one rank, as
    most. ``global_batch``: those of an optimizer step, over all ranks and accumulated micro-batches, so that a
    micro-batch of one domain may use the experts of that domain.

    With ``global_batch`` the counts f are summed over the ranks, which is exact: the gradient is that of one rank with
    the whole batch. Under accumulation they are those of the last ``window`` micro-batches: the ones still to come in
    this step are not known yet, and those of the step before stand for them. The callback sets ``window`` to the
    number of accumulated micro-batches.

    Reference: Qiu et al., *Demons in the Detail: On Implementing Load Balancing Loss for Training Specialized
    Mixture-of-Experts Models*, 2025, https://arxiv.org/abs/2501.11873. Differs from it: there, the counts begin anew
    with each step, so that its first micro-batch is still balanced by itself.

    Args:
        coefficient: factor before the loss; 1e-2 in Switch and OLMoE, 1e-4 for sequences in DeepSeek-V3.
        scope: ``"sequence"``, ``"micro_batch"`` or ``"global_batch"``.

    Raises:
        ValueError: if the scope is none of these; at a forward, if the sequences are not known for ``"sequence"``.

    Example:
        >>> loss = LoadBalancingLoss(0.001, scope="global_batch")
        >>> all_on_one = torch.eye(4)[:1].expand(3, 4)
        >>> loss(Routing(torch.arange(3), torch.zeros(3).long(), torch.ones(3), all_on_one, all_on_one))
        tensor(4.)
    """

    name = "load_balancing_loss"
    measures_balance = True
    window: int = 1

    def __init__(self, coefficient: float = 0.01, scope: Scope = "micro_batch") -> None:
        super().__init__(coefficient)
        if scope not in _SCOPES:
            raise ValueError(f"LoadBalancingLoss: scope={scope!r}, wanted one of {', '.join(_SCOPES)}.")
        self.scope = scope
        self._recent: Tensor | None = None  # (window, choices + 1): load and number of tokens of each micro-batch

    def forward(self, routing: Routing) -> Float[Tensor, ""]:
        """See `load_balancing_loss`."""
        if self.scope == "sequence":
            return sequence_load_balancing_loss(routing)
        # in validation the ranks may run different numbers of batches, and would wait for each other for ever
        if not (self.counts and self.in_training):
            return load_balancing_loss(routing)
        counts = self._global_counts(routing)
        return load_balancing_loss(routing, counts[:-1], counts[-1])

    @property
    def counts(self) -> bool:
        """With the global scope."""
        return self.scope == "global_batch"

    @torch.compiler.disable
    @torch.no_grad()
    def _global_counts(self, routing: Routing) -> Float[Tensor, " counts"]:
        # load over ranks and window; and the mean number of tokens of one rank's micro-batch
        if self._recent is None or not is_recomputing():
            counts = torch.cat([_load(routing), _num_tokens(routing).view(1)])
            num_ranks = sum_over_ranks(counts)
            counts[-1] /= num_ranks
            earlier = counts.new_zeros(0, len(counts)) if self._recent is None else self._recent.to(counts.device)
            self._recent = torch.cat([earlier, counts.unsqueeze(0)])[-self.window :]
        return torch.cat([self._recent[:, :-1].sum(0), self._recent[:, -1:].mean(0)])

    def training_state(self) -> dict[str, Tensor]:
        """The counts of the last micro-batches."""
        return {} if self._recent is None else {"recent": self._recent}

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        """Takes up the counts of the last micro-batches."""
        self._recent = state.get("recent")


class HeterogeneousLoadBalancingLoss(BalanceLoss):
    """Load balancing over FFNs and experts that compute nothing, which may take more tokens than the FFNs do.

    ``sum_c eta_c * f_c * P_c``, with ``eta = 1`` for an FFN and ``zero_computation_weight`` for the others, scaled so
    that it is 1 at its balance, where ``f_c`` goes as ``1 / eta_c``.

    Reference: Jin et al., *MoE++*, 2024, equation 7, https://arxiv.org/abs/2410.07348. Differs from it by the scale.

    Args:
        coefficient: factor before the loss; 1e-2 in the paper.
        zero_computation_weight: tau of the paper, in (0, 1]: the smaller, the more tokens go to the experts that
            compute nothing; 0.75 in the paper.

    Raises:
        ValueError: if ``zero_computation_weight`` is not in (0, 1].

    Example:
        >>> scores = torch.full((3, 2), 0.5)  # one FFN, and one expert that computes nothing and takes two of three
        >>> ids = torch.tensor([0, 1, 1])
        >>> routing = Routing(torch.arange(3), ids, torch.ones(3), scores, scores, num_ffn_experts=1)
        >>> HeterogeneousLoadBalancingLoss(zero_computation_weight=0.5)(routing)
        tensor(1.)
    """

    name = "heterogeneous_load_balancing_loss"

    def __init__(self, coefficient: float = 0.01, zero_computation_weight: float = 0.75) -> None:
        super().__init__(coefficient)
        if not 0 < zero_computation_weight <= 1:
            raise ValueError(
                f"HeterogeneousLoadBalancingLoss: zero_computation_weight={zero_computation_weight}, wanted a number "
                "above 0 and up to 1."
            )
        self.zero_computation_weight = zero_computation_weight

    def forward(self, routing: Routing) -> Float[Tensor, ""]:
        """Computes the loss of one layer."""
        load = choice_load(routing)
        eta = torch.ones_like(load)
        eta[routing.num_experts :] = self.zero_computation_weight
        fraction = load / load.sum().clamp(min=1)
        mean_scores = token_scores(routing).sum(0) / _num_tokens(routing).clamp(min=1)
        return (1 / eta).sum() * (eta * fraction * mean_scores).sum()
