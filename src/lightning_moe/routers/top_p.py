"""Top-p routing: as many experts as it takes to be sure."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_moe.checks import check_choice, check_not_negative
from lightning_moe.losses import BalanceLoss, LoadBalancingLoss, TokenEntropyLoss
from lightning_moe.routers.base import Normalize, Router, gate_logits, unit_sum, variable_choice
from lightning_moe.routing import Routing
from lightning_moe.tokens import Tokens


class TopPRouter(Router):
    """Sends each token to the smallest set of experts whose softmax scores sum to ``top_p`` or more.

    ``scores = softmax(gate x)``; experts are taken in the order of their scores until the sum reaches ``top_p``. A
    token that the router is sure of takes one expert, a hard one many; `TokenEntropyLoss`, which this router brings
    along, keeps it from taking ever more.

    Reference: Huang et al., *Harder Tasks Need More Experts: Dynamic Routing in MoE Models*, 2024, equations 3 to 5,
    https://arxiv.org/abs/2403.07652. Differs from it: the weights are normalised by default, so that step 0 of an
    upcycled model is the dense one; ``normalize=False`` is the paper's.

    Args:
        hidden_size: width D of the incoming hidden states.
        num_experts: number of experts E.
        top_p: what the chosen scores sum to at least, in (0, 1]; 0.4 in the paper.
        normalize: whether a token's weights sum to one, see `unit_sum`.
        init_std: standard deviation of the gate's initial weights.

    Raises:
        ValueError: if ``top_p`` is not in (0, 1], or ``init_std`` is negative.

    Example:
        >>> router = TopPRouter(hidden_size=1, num_experts=3, top_p=0.7, normalize=False)
        >>> router.gate.data = torch.tensor([[1.0], [3.0], [2.0]]).log()
        >>> router(torch.ones(1, 1)).expert_ids
        tensor([1, 2])
    """

    static_shapes = False

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        top_p: float = 0.4,
        normalize: Normalize = True,
        init_std: float = 0.02,
    ) -> None:
        super().__init__(hidden_size, num_experts)
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p={top_p}: wanted a number above 0 and up to 1.")
        check_choice("normalize", normalize, (True, False, "straight_through"))
        check_not_negative(init_std=init_std)
        self.top_p = top_p
        self.normalize = normalize
        self.init_std = init_std
        self.gate = nn.Parameter(torch.randn(num_experts, hidden_size) * init_std)

    @property
    def weights_sum_to_one(self) -> bool:
        """True with ``normalize``."""
        return bool(self.normalize)

    @property
    def experts_per_token(self) -> float:
        """What an undecided router takes; a trained one takes fewer."""
        return float(max(1, math.ceil(self.top_p * self.num_experts)))

    def balance_losses(self) -> list[BalanceLoss]:
        """Load balancing and the entropy loss, with the paper's coefficients."""
        return [LoadBalancingLoss(0.01), TokenEntropyLoss(1e-4)]

    def forward(self, x: Float[Tensor, "T D"], tokens: Tokens | None = None) -> Routing:
        """Routes each token to its smallest sufficient set of experts; in token order."""
        logits = gate_logits(x, self.gate)
        scores = F.softmax(logits, dim=-1)
        ordered, experts = scores.detach().sort(dim=-1, descending=True, stable=True)
        # what the better ones sum to does not suffice yet
        needed = ordered.cumsum(-1) - ordered < self.top_p
        chosen = torch.zeros_like(needed).scatter(1, experts, needed)
        weights = unit_sum(torch.where(chosen, scores, 0), self.normalize)
        return variable_choice(logits, scores, weights, chosen, tokens)
