"""SparseMixer-v2: experts are sampled, and the gradient of the sampling is estimated."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_moe.checks import check_not_negative
from lightning_moe.routers.base import Router, check_top_k, gate_logits, straight_through, token_choice
from lightning_moe.routing import Routing
from lightning_moe.tokens import Tokens

# Heun's third-order method evaluates the gradient at the midpoint with this probability
_MIDPOINT = 0.75


class SparseMixerRouter(Router):
    """Samples each of a token's experts among those whose logits come close to the best, one after the other.

    Pick by pick: experts further than ``2 * threshold`` (relative) below the best are left out, the softmax over the
    others gives p, in training one expert is sampled from p (in evaluation it is the best), and is out of the next
    pick. The weight is p of the sampled expert. In training, where that is not the best one, it is with probability
    0.75 divided by three; the gradient is that of p, undivided: together an estimate, of third order, of the gradient
    that the sampling itself has.

    A token's K weights sum to something above 0 and up to K, so an upcycled model does not start as the dense one.

    Reference: Liu et al., *GRIN: GRadient-INformed MoE*, 2024, section 2, https://arxiv.org/abs/2409.12136, as in
    Phi-3.5-MoE.

    Args:
        hidden_size: width D of the incoming hidden states.
        num_experts: number of experts E.
        top_k: experts per token K, 1 <= K <= E; 2 in GRIN.
        threshold: relative distance to the best logit within which experts are sampled; 0.01 in GRIN.
        init_std: standard deviation of the gate's initial weights.

    Raises:
        ValueError: if ``top_k`` exceeds ``num_experts``, or a number is negative.

    Example:
        >>> router = SparseMixerRouter(hidden_size=8, num_experts=4).eval()
        >>> router(torch.randn(6, 8)).expert_ids.shape
        torch.Size([12])
    """

    weights_sum_to_one = False

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        top_k: int = 2,
        threshold: float = 0.01,
        init_std: float = 0.02,
    ) -> None:
        super().__init__(hidden_size, num_experts)
        check_top_k(top_k, num_experts)
        check_not_negative(threshold=threshold, init_std=init_std)
        self.top_k = top_k
        self.threshold = threshold
        self.init_std = init_std
        self.gate = nn.Parameter(torch.randn(num_experts, hidden_size) * init_std)

    @property
    def experts_per_token(self) -> float:
        """K."""
        return float(self.top_k)

    def forward(self, x: Float[Tensor, "T D"], tokens: Tokens | None = None) -> Routing:
        """Routes each token to K experts; N = T·K, in token order."""
        logits = gate_logits(x, self.gate)
        left, picks = logits, []
        for _ in range(self.top_k):
            expert, weight = self._pick(logits, left)
            picks.append((expert, weight))
            left = left.scatter(1, expert, float("-inf"))
        expert_ids, weights = (torch.cat(parts, dim=1) for parts in zip(*picks, strict=True))
        return token_choice(logits, F.softmax(logits, dim=-1), expert_ids, weights, tokens)

    def _pick(
        self, logits: Float[Tensor, "T E"], left: Float[Tensor, "T E"]
    ) -> tuple[Int[Tensor, "T 1"], Float[Tensor, "T 1"]]:
        best, best_expert = left.detach().max(dim=-1, keepdim=True)
        size = torch.maximum(logits.detach().abs(), best)
        candidates = left.masked_fill((best - logits.detach()) / size > 2 * self.threshold, float("-inf"))
        p = F.softmax(candidates, dim=-1)
        if not self.training:
            return best_expert, p.gather(1, best_expert)
        # the largest of logits with Gumbel noise is a sample of their softmax
        gumbel = -torch.empty_like(candidates).exponential_().log()
        expert = (candidates.detach() + gumbel).argmax(dim=-1, keepdim=True)
        weight = p.gather(1, expert)
        whole = (expert == best_expert) | (torch.rand_like(weight) > _MIDPOINT)
        return expert, straight_through(torch.where(whole, weight, weight / 3), weight)
