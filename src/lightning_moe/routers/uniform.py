"""Uniform random routing: the baseline that every router must beat."""

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_moe.losses import BalanceLoss
from lightning_moe.routers.base import Router, check_top_k, token_choice
from lightning_moe.routing import Routing
from lightning_moe.tokens import Tokens


class UniformRouter(Router):
    """Sends each token to k experts at random, all alike; nothing is learnt.

    Every weight is 1 / K. In training the experts are drawn anew at every forward; in evaluation they follow from the
    token's place in the batch, so that the same batch gives the same output.

    Reference: Zuo et al., *Taming Sparsely Activated Transformer with Stochastic Experts*, 2021,
    https://arxiv.org/abs/2110.04260, without its consistency loss. Differs from it: each token has experts of its own,
    not each batch.

    Args:
        hidden_size: width D of the incoming hidden states.
        num_experts: number of experts E.
        top_k: experts per token K, 1 <= K <= E.

    Raises:
        ValueError: if ``top_k`` exceeds ``num_experts``.

    Example:
        >>> UniformRouter(hidden_size=8, num_experts=4)(torch.randn(6, 8)).weights[:2]
        tensor([0.5000, 0.5000])
    """

    learned = False
    weights_sum_to_one = True
    keys: Tensor

    def __init__(self, hidden_size: int, num_experts: int, *, top_k: int = 2) -> None:
        super().__init__(hidden_size, num_experts)
        check_top_k(top_k, num_experts)
        self.top_k = top_k
        # in evaluation, each expert's wheel: where it stands, and how far each token turns it
        self.register_buffer("keys", torch.rand(2, num_experts, dtype=torch.float64))

    @property
    def experts_per_token(self) -> float:
        """K."""
        return float(self.top_k)

    def balance_losses(self) -> list[BalanceLoss]:
        """None: nothing is learnt."""
        return []

    def forward(self, x: Float[Tensor, "T D"], tokens: Tokens | None = None) -> Routing:
        """Routes each token to K random experts; N = T·K, in token order."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        if self.training:
            lots = torch.rand(len(x), self.num_experts, dtype=dtype, device=x.device)
        else:
            start, turn = self.keys
            lots = (start + torch.arange(len(x), device=x.device).unsqueeze(1) * turn) % 1
        expert_ids = lots.topk(self.top_k, dim=-1).indices
        weights = torch.full(expert_ids.shape, 1 / self.top_k, dtype=dtype, device=x.device)
        scores = torch.full((len(x), self.num_experts), 1 / self.num_experts, dtype=dtype, device=x.device)
        return token_choice(torch.zeros_like(scores), scores, expert_ids, weights, tokens)
