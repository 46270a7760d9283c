"""DenseMixer: sparse forward, a router gradient from all experts."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_moe.checks import check_not_negative
from lightning_moe.routers.base import (
    Normalize,
    TokenChoiceRouter,
    gate_logits,
    straight_through,
    token_choice,
    unit_sum,
)
from lightning_moe.routing import Routing
from lightning_moe.tokens import Tokens


class DenseMixerRouter(TokenChoiceRouter):
    """Top-k softmax routing whose router learns from the outputs of all experts, the unchosen ones included.

    The forward is that of `TopKRouter`. In the backward the choice is passed through as if it were none: the gradient
    of the output with respect to the scores is that of ``sum_e w_e * expert_e(x)`` over all E experts, with
    ``w_e = scores_e`` or, with ``normalize=True``, ``w_e = scores_e / sum(scores[chosen])``, where that sum counts as a
    constant for the experts that were not chosen. For that, training computes every expert for every token; the experts
    themselves learn from the tokens that chose them.

    Right after upcycling, when all experts are equal, the sum over all of them depends on the plain scores in nothing:
    the router then learns with ``normalize=True`` only.

    In training the layer costs E / K times the FLOPs of its experts, in evaluation nothing more.

    Reference: Yao et al., *DenseMixer: Improving MoE Post-Training with Precise Router Gradient*, 2025,
    https://fengyao.notion.site/moe-posttraining; the estimator is the straight-through one of Bengio et al., 2013,
    https://arxiv.org/abs/1308.3432.

    Args:
        hidden_size: width D of the incoming hidden states.
        num_experts: number of experts E.
        top_k: experts per token K, 1 <= K <= E.
        normalize: whether a token's weights sum to one; ``"straight_through"`` has the gradient of the plain scores.
        init_std: standard deviation of the gate's initial weights.

    Raises:
        ValueError: if ``top_k`` exceeds ``num_experts``, or ``init_std`` is negative.

    Example:
        >>> router = DenseMixerRouter(hidden_size=8, num_experts=4, top_k=2)
        >>> routing = router(torch.randn(6, 8))
        >>> len(routing.expert_ids), int(routing.counted().sum())
        (24, 12)
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        top_k: int = 2,
        normalize: Normalize = True,
        init_std: float = 0.02,
    ) -> None:
        # a weight that is always 1 has a gradient here all the same
        super().__init__(hidden_size, num_experts, top_k, "straight_through" if normalize is True else normalize)
        check_not_negative(init_std=init_std)
        self.normalize = normalize
        self.init_std = init_std
        self.gate = nn.Parameter(torch.randn(num_experts, hidden_size) * init_std)

    def forward(self, x: Float[Tensor, "T D"], tokens: Tokens | None = None) -> Routing:
        """Routes each token to its K best experts; in training the others follow, for the gradient only."""
        logits = gate_logits(x, self.gate)
        scores = F.softmax(logits, dim=-1)
        if not self.training:
            expert_ids = logits.topk(self.top_k, dim=-1).indices
            return token_choice(
                logits, scores, expert_ids, unit_sum(scores.gather(1, expert_ids), self.normalize), tokens
            )
        expert_ids = logits.argsort(dim=-1, descending=True)  # (T, E)
        all_scores = scores.gather(1, expert_ids)
        gradient_only = torch.arange(self.num_experts, device=x.device).expand_as(expert_ids) >= self.top_k
        chosen_scores = all_scores.masked_fill(gradient_only, 0)
        surrogate = all_scores
        if self.normalize is True:
            total = chosen_scores.sum(-1, keepdim=True)
            surrogate = all_scores / torch.where(gradient_only, total.detach(), total)
        weights = straight_through(unit_sum(chosen_scores.detach(), bool(self.normalize)), surrogate)
        routing = token_choice(logits, scores, expert_ids, weights, tokens)
        return replace(routing, gradient_only=gradient_only.reshape(-1))
