"""AdaMoE: null experts let a token take fewer true ones."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_moe.checks import check_choice, check_not_negative, check_positive
from lightning_moe.routers.base import Normalize, Router, gate_logits, token_choice, unit_sum
from lightning_moe.routing import Routing
from lightning_moe.tokens import Tokens


class NullExpertsRouter(Router):
    """Puts null experts, which compute nothing, beside the true ones: how many true ones a token takes is up to it.

    ``scores = softmax(gate x)`` over E true and M null experts, ``chosen = top_k(scores)``; the weights are those of
    the chosen true experts divided by their sum. `LoadBalancingLoss` counts each null expert with the mean load of all
    of them, so it keeps the true ones even and the share of the null ones near M / (E + M).

    A token that chooses null experts only gets nothing from the layer; with ``top_k > num_null_experts`` there is none.

    Reference: Zeng et al., *AdaMoE: Token-Adaptive Routing with Null Experts for Mixture-of-Experts Language Models*,
    2024, equations 4 to 7, https://arxiv.org/abs/2406.13233.

    Args:
        hidden_size: width D of the incoming hidden states.
        num_experts: number of true experts E.
        top_k: experts per token K, true or null, 1 <= K <= E + M.
        num_null_experts: number of null experts M.
        normalize: whether the weights of a token's true experts sum to one, see `unit_sum`.
        init_std: standard deviation of the gate's initial weights.

    Raises:
        ValueError: if ``top_k`` exceeds the number of all experts, or a number is out of its range.

    Example:
        >>> router = NullExpertsRouter(hidden_size=1, num_experts=2, top_k=2, num_null_experts=1)
        >>> router.gate.data = torch.tensor([[1.0], [3.0], [2.0]]).log()
        >>> routing = router(torch.ones(1, 1))
        >>> routing.expert_ids.tolist(), routing.weights.tolist(), routing.num_experts
        ([1, 2], [1.0, 0.0], 2)
    """

    static_shapes = False

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        top_k: int = 3,
        num_null_experts: int = 2,
        normalize: Normalize = True,
        init_std: float = 0.02,
    ) -> None:
        super().__init__(hidden_size, num_experts)
        check_positive(num_null_experts=num_null_experts)
        check_choice("normalize", normalize, (True, False, "straight_through"))
        check_not_negative(init_std=init_std)
        if not 1 <= top_k <= num_experts + num_null_experts:
            raise ValueError(
                f"top_k={top_k} with num_experts={num_experts} and num_null_experts={num_null_experts}: a token "
                f"chooses at least 1 and at most all of them. Set top_k between 1 and {num_experts + num_null_experts}."
            )
        self.top_k = top_k
        self.num_null_experts = num_null_experts
        self.normalize = normalize
        self.init_std = init_std
        self.gate = nn.Parameter(torch.randn(num_experts + num_null_experts, hidden_size) * init_std)

    @property
    def weights_sum_to_one(self) -> bool:
        """True with ``normalize``, if every token has a true expert."""
        return bool(self.normalize) and self.top_k > self.num_null_experts

    @property
    def experts_per_token(self) -> float:
        """What an undecided router takes: ``K * E / (E + M)``."""
        return self.top_k * self.num_experts / (self.num_experts + self.num_null_experts)

    def forward(self, x: Float[Tensor, "T D"], tokens: Tokens | None = None) -> Routing:
        """Routes each token to its K best experts, true or null; N = T·K, in token order."""
        logits = gate_logits(x, self.gate)
        scores = F.softmax(logits, dim=-1)
        expert_ids = logits.topk(self.top_k, dim=-1).indices
        chosen = scores.gather(1, expert_ids).masked_fill(expert_ids >= self.num_experts, 0)
        routing = token_choice(logits, scores, expert_ids, unit_sum(chosen, self.normalize), tokens)
        return replace(routing, num_ffn_experts=self.num_experts)
