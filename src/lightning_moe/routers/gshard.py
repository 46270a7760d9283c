"""GShard routing: the second expert is taken by chance."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_moe.checks import check_not_negative, check_positive
from lightning_moe.routers.base import Router, gate_logits, token_choice
from lightning_moe.routing import Routing
from lightning_moe.tokens import Tokens


class GShardRouter(Router):
    """Sends each token to its best expert, and to its second best with a probability that grows with its weight.

    ``scores = softmax(gate x)``, weights ``g1, g2 = scores[best two] / sum(scores[best two])``. In training the second
    is kept with probability ``min(1, g2 / second_threshold)``; what is not kept is not chosen: it does not count and
    costs nothing, and g1 stays as it is. In evaluation both are taken.

    In training a token's weights sum to one only where its second expert is kept, so an upcycled model does not quite
    start as the dense one.

    Reference: Lepikhin et al., *GShard*, 2020, algorithm 1, https://arxiv.org/abs/2006.16668, where the probability is
    ``2 * g2``; ``second_threshold=0.2`` is ST-MoE's (https://arxiv.org/abs/2202.08906). Differs from both:
    `LoadBalancingLoss` counts all chosen slots, not the first only.

    Args:
        hidden_size: width D of the incoming hidden states.
        num_experts: number of experts E, 2 or more.
        second_threshold: weight from which the second expert is kept for sure; 0.5 in GShard, 0.2 in ST-MoE.
        init_std: standard deviation of the gate's initial weights.

    Raises:
        ValueError: if there is no second expert, or a number is out of its range.

    Example:
        >>> router = GShardRouter(hidden_size=8, num_experts=4, second_threshold=1e-9)
        >>> router(torch.randn(6, 8)).expert_ids.shape
        torch.Size([12])
    """

    static_shapes = False
    weights_sum_to_one = False

    def __init__(
        self, hidden_size: int, num_experts: int, *, second_threshold: float = 0.5, init_std: float = 0.02
    ) -> None:
        super().__init__(hidden_size, num_experts)
        if num_experts < 2:
            raise ValueError(f"num_experts={num_experts}: GShardRouter chooses two, wanted 2 or more.")
        check_positive(second_threshold=second_threshold)
        check_not_negative(init_std=init_std)
        self.second_threshold = second_threshold
        self.init_std = init_std
        self.gate = nn.Parameter(torch.randn(num_experts, hidden_size) * init_std)

    @property
    def experts_per_token(self) -> float:
        """2, as in evaluation; a little less in training."""
        return 2.0

    def forward(self, x: Float[Tensor, "T D"], tokens: Tokens | None = None) -> Routing:
        """Routes each token to one or two experts; in token order."""
        logits = gate_logits(x, self.gate)
        scores = F.softmax(logits, dim=-1)
        best, expert_ids = scores.topk(2, dim=-1)
        weights = best / best.sum(-1, keepdim=True)
        routing = token_choice(logits, scores, expert_ids, weights, tokens)
        if not self.training:
            return routing
        kept = torch.rand_like(weights) * self.second_threshold < weights
        kept[:, 0] = True
        rows = kept.view(-1).nonzero().squeeze(1)
        return replace(
            routing,
            token_ids=routing.token_ids.index_select(0, rows),
            expert_ids=routing.expert_ids.index_select(0, rows),
            weights=routing.weights.index_select(0, rows),
            top_k=None,
        )
