"""ReMoE: the ReLU of the logits decides and weighs at once."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_moe.checks import check_choice, check_not_negative
from lightning_moe.losses import AdaptiveL1Loss, BalanceLoss
from lightning_moe.routers.base import (
    Normalize,
    Router,
    check_top_k,
    gate_logits,
    unit_sum,
    variable_choice,
)
from lightning_moe.routing import Routing
from lightning_moe.tokens import Tokens


class ReMoERouter(Router):
    """Sends each token to every expert whose logit is positive, with the logit as its weight.

    ``scores = weights = relu(gate x)``, ``chosen = scores > 0``. Choice and weight are one continuous function, so
    nothing jumps when an expert comes or goes; how many experts a token has is up to the token. `AdaptiveL1Loss`, which
    this router brings along, steers the mean to ``top_k``.

    At the start about half of all experts are on for each token, and the weights sum to anything: an upcycled model
    does not start as the dense one. ``normalize="straight_through"`` brings it close to that: a token's weights then
    sum to one, unless no logit of it is positive.

    Reference: Wang et al., *ReMoE: Fully Differentiable Mixture-of-Experts with ReLU Routing*, 2024, equation 6,
    https://arxiv.org/abs/2412.14711.

    Args:
        hidden_size: width D of the incoming hidden states.
        num_experts: number of experts E.
        top_k: experts per token on average that the L1 loss aims at, 1 <= K <= E.
        normalize: whether a token's weights are divided by their sum, see `unit_sum`; False in the paper.
        init_std: standard deviation of the gate's initial weights; 0.01 in the authors' scripts.

    Raises:
        ValueError: if ``top_k`` exceeds ``num_experts``, or ``init_std`` is negative.

    Example:
        >>> router = ReMoERouter(hidden_size=2, num_experts=3)
        >>> router.gate.data = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0]])
        >>> routing = router(torch.tensor([[1.0, 3.0]]))
        >>> routing.expert_ids.tolist(), routing.weights.tolist()
        ([0, 2], [1.0, 6.0])
    """

    static_shapes = False
    weights_sum_to_one = False

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        top_k: int = 2,
        normalize: Normalize = False,
        init_std: float = 0.02,
    ) -> None:
        super().__init__(hidden_size, num_experts)
        check_top_k(top_k, num_experts)
        check_choice("normalize", normalize, (True, False, "straight_through"))
        check_not_negative(init_std=init_std)
        self.top_k = top_k
        self.normalize = normalize
        self.init_std = init_std
        self.gate = nn.Parameter(torch.randn(num_experts, hidden_size) * init_std)

    @property
    def experts_per_token(self) -> float:
        """K, which training aims at."""
        return float(self.top_k)

    def balance_losses(self) -> list[BalanceLoss]:
        """The L1 loss that steers the number of experts per token."""
        return [AdaptiveL1Loss(top_k=self.top_k)]

    def forward(self, x: Float[Tensor, "T D"], tokens: Tokens | None = None) -> Routing:
        """Routes each token to all experts of positive logit; in token order."""
        logits = gate_logits(x, self.gate)
        scores = F.relu(logits)
        return variable_choice(logits, scores, unit_sum(scores, self.normalize), scores > 0, tokens)
