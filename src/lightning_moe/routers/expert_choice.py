"""Expert choice: experts choose their tokens."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_moe.checks import check_not_negative, check_positive
from lightning_moe.losses import BalanceLoss, ZLoss
from lightning_moe.routers.base import Router, gate_logits
from lightning_moe.routing import Routing
from lightning_moe.tokens import Tokens


class ExpertChoiceRouter(Router):
    """Lets each expert take the tokens that score it highest: the load is even by construction.

    ``scores = softmax(gate x)`` over the experts; each expert takes its ``C = ceil(capacity_factor * T / E)`` tokens of
    highest score, with the score as weight. A token may get many experts, or none: then the layer adds nothing to it.

    Which tokens an expert takes depends on all tokens of the batch, later ones included: a causal language model
    trained so sees its future, and generates token by token without it. Use it in encoders; the causal alternative with
    an even load is `LossFreeRouter`.

    Reference: Zhou et al., *Mixture-of-Experts with Expert Choice Routing*, 2022, equations 1 and 2,
    https://arxiv.org/abs/2202.09368.

    Args:
        hidden_size: width D of the incoming hidden states.
        num_experts: number of experts E.
        capacity_factor: experts per token on average, from above 0 to E; 2 in the paper. T leaves padding out.
        init_std: standard deviation of the gate's initial weights.

    Raises:
        ValueError: if ``capacity_factor`` is not above 0 or exceeds ``num_experts``, or ``init_std`` is negative.

    Example:
        >>> router = ExpertChoiceRouter(hidden_size=8, num_experts=4, capacity_factor=2.0)
        >>> torch.bincount(router(torch.randn(6, 8)).expert_ids)
        tensor([3, 3, 3, 3])
    """

    causal = False
    static_shapes = False
    weights_sum_to_one = False

    def __init__(
        self, hidden_size: int, num_experts: int, *, capacity_factor: float = 2.0, init_std: float = 0.02
    ) -> None:
        super().__init__(hidden_size, num_experts)
        check_positive(capacity_factor=capacity_factor)
        check_not_negative(init_std=init_std)
        if capacity_factor > num_experts:
            raise ValueError(
                f"capacity_factor={capacity_factor} with num_experts={num_experts}: a token has at most all of the "
                f"experts. Set capacity_factor to {num_experts} or less."
            )
        self.capacity_factor = capacity_factor
        self.init_std = init_std
        self.gate = nn.Parameter(torch.randn(num_experts, hidden_size) * init_std)

    @property
    def experts_per_token(self) -> float:
        """The capacity factor."""
        return float(self.capacity_factor)

    def balance_losses(self) -> list[BalanceLoss]:
        """`ZLoss`: there is nothing to balance."""
        return [ZLoss()]

    def forward(self, x: Float[Tensor, "T D"], tokens: Tokens | None = None) -> Routing:
        """Routes tokens as the experts choose them; in the order of the experts."""
        logits = gate_logits(x, self.gate)
        scores = F.softmax(logits, dim=-1)
        mask = None if tokens is None else tokens.mask
        real = torch.arange(len(x), device=x.device) if mask is None else mask.nonzero().squeeze(1)
        capacity = min(len(real), math.ceil(self.capacity_factor * len(real) / self.num_experts))
        weights, chosen = scores.index_select(0, real).t().topk(capacity, dim=-1)  # (E, C)
        expert_ids = torch.arange(self.num_experts, device=x.device).repeat_interleave(capacity)
        return Routing(real[chosen.reshape(-1)], expert_ids, weights.reshape(-1), logits, scores, mask)
