"""Sigmoid routing: each expert scores a token by itself."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_moe.checks import check_not_negative
from lightning_moe.losses import BalanceLoss, LoadBalancingLoss
from lightning_moe.routers.base import Normalize, TokenChoiceRouter, gate_logits, token_choice, unit_sum
from lightning_moe.routing import Routing
from lightning_moe.tokens import Tokens


class SigmoidRouter(TokenChoiceRouter):
    """Sends each token to the k experts with the highest sigmoid score: the experts do not compete for it.

    ``logits = gate x``, ``scores = sigmoid(logits)``, ``chosen = top_k(scores)``; the weights are
    ``scores[chosen] / sum(scores[chosen])`` with ``normalize``, else ``scores[chosen]``. `LoadBalancingLoss` sees the
    same scores, scaled to sum to one per token.

    Reference: Csordás et al., *Approximating Two-Layer Feedforward Networks for Efficient Transformers* (sigma-MoE),
    2023, https://arxiv.org/abs/2310.10837; Nguyen et al., *Sigmoid Gating is More Sample Efficient than Softmax Gating
    in Mixture of Experts*, 2024, https://arxiv.org/abs/2405.13997. sigma-MoE has ``normalize=False``,
    ``expert_dropout=0.05`` and ``MutualInformationLoss(0.001, token_weight=0)`` as its only balance loss. Differs from
    it: its initial gate has rows of equal norm, and its entropy is that of softmax scores.

    Args:
        hidden_size: width D of the incoming hidden states.
        num_experts: number of experts E.
        top_k: experts per token K, 1 <= K <= E.
        normalize: whether a token's weights sum to one; see `TopKRouter`.
        expert_dropout: in training, the probability that a token cannot choose an expert, drawn for each of both; if
            fewer than K experts are left to it, the best of the others take their places. 0 is off.
        init_std: standard deviation of the gate's initial weights.

    Raises:
        ValueError: if ``top_k`` exceeds ``num_experts``, if ``top_k=1`` with ``normalize=True``, or if a number is out
            of its range.

    Example:
        >>> router = SigmoidRouter(hidden_size=8, num_experts=4, normalize=False)
        >>> bool((router(torch.zeros(6, 8)).weights == 0.5).all())
        True
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        top_k: int = 2,
        normalize: Normalize = True,
        expert_dropout: float = 0.0,
        init_std: float = 0.02,
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, normalize)
        check_not_negative(expert_dropout=expert_dropout, init_std=init_std)
        if expert_dropout >= 1:
            raise ValueError(f"expert_dropout={expert_dropout}: wanted a probability below 1.")
        self.expert_dropout = expert_dropout
        self.init_std = init_std
        self.gate = nn.Parameter(torch.randn(num_experts, hidden_size) * init_std)

    def balance_losses(self) -> list[BalanceLoss]:
        """`LoadBalancingLoss`; a z-loss would be that of a softmax."""
        return [LoadBalancingLoss()]

    def forward(self, x: Float[Tensor, "T D"], tokens: Tokens | None = None) -> Routing:
        """Routes each token to its K best experts; N = T·K, in token order."""
        logits = gate_logits(x, self.gate)
        scores = logits.sigmoid()
        chooser = scores
        if self.training and self.expert_dropout:
            # scores are in [0, 1]: one less is behind all others, in the same order
            chooser = scores - (torch.rand_like(scores) < self.expert_dropout).to(scores.dtype)
        expert_ids = chooser.topk(self.top_k, dim=-1).indices
        weights = unit_sum(scores.gather(1, expert_ids), self.normalize)
        return token_choice(logits, scores, expert_ids, weights, tokens)
