"""A router of one's own, in a file of one's own: the package knows nothing of it."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_moe import Router, Routing
from lightning_moe.tokens import Tokens


class RMSNormRouter(Router):
    """Top-k softmax routing that looks at the direction of a token alone: its hidden state is brought to RMS 1 first.

    Args:
        hidden_size: width D of the incoming hidden states.
        num_experts: number of experts E.
        top_k: experts per token K.
    """

    weights_sum_to_one = True

    def __init__(self, hidden_size: int, num_experts: int, *, top_k: int = 2) -> None:
        super().__init__(hidden_size, num_experts)
        self.top_k = top_k
        self.gate = nn.Parameter(torch.randn(num_experts, hidden_size) * 0.02)

    @property
    def experts_per_token(self) -> float:
        """K."""
        return float(self.top_k)

    def forward(self, x: Float[Tensor, "T D"], tokens: Tokens | None = None) -> Routing:
        """Routes each token to its K best experts."""
        x = x.float()
        direction = x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt()
        logits = direction @ self.gate.float().T
        scores = logits.softmax(-1)
        best, expert_ids = scores.topk(self.top_k)
        return Routing(
            token_ids=torch.arange(len(x), device=x.device).repeat_interleave(self.top_k),
            expert_ids=expert_ids.flatten(),
            weights=(best / best.sum(-1, keepdim=True)).flatten(),
            logits=logits,
            scores=scores,
            token_mask=None if tokens is None else tokens.mask,
            top_k=self.top_k,
        )
