"""Sinkhorn routing: the scores are balanced before tokens choose."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_moe.checks import check_not_negative, check_positive
from lightning_moe.losses import BalanceLoss, ZLoss
from lightning_moe.routers.base import Normalize, TokenChoiceRouter, gate_logits, token_choice, unit_sum
from lightning_moe.routing import Routing
from lightning_moe.tokens import Tokens


class SinkhornRouter(TokenChoiceRouter):
    """Chooses, in training, by scores that Sinkhorn's iteration has balanced over the batch; no loss is needed.

    ``plan = diag(u) exp(logits) diag(v)`` with u and v such that every token gives 1 / T and every expert gets 1 / E;
    ``chosen = top_k(plan)``. The weights come from the logits without it: the chosen ``softmax(logits)``, for one
    expert per token ``sigmoid(logits)``. In evaluation a token chooses by its own logits.

    Which expert a token gets in training depends on all tokens of the batch, later ones included. In a causal language
    model that lets a little of the future leak; the causal alternative with an even load is `LossFreeRouter`.

    Reference: Clark et al., *Unified Scaling Laws for Routed Language Models* (S-BASE), 2022,
    https://arxiv.org/abs/2202.01169, in the form of Megatron-LM. Differs from both: the number of iterations is fixed,
    as looking at the error would wait for the device.

    Args:
        hidden_size: width D of the incoming hidden states.
        num_experts: number of experts E.
        top_k: experts per token K, 1 <= K <= E.
        normalize: whether a token's weights sum to one, see `TopKRouter`; False in Megatron-LM.
        num_iterations: iterations of Sinkhorn's algorithm.
        init_std: standard deviation of the gate's initial weights.

    Raises:
        ValueError: if ``top_k`` exceeds ``num_experts``, if ``top_k=1`` with ``normalize=True``, or if a number is out
            of its range.

    Example:
        >>> router = SinkhornRouter(hidden_size=8, num_experts=4, init_std=1.0)
        >>> load = torch.bincount(router(torch.randn(400, 8) + 1).expert_ids)
        >>> bool(load.max() < 2 * load.min())
        True
    """

    causal = False

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        top_k: int = 2,
        normalize: Normalize = True,
        num_iterations: int = 20,
        init_std: float = 0.02,
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, normalize)
        check_positive(num_iterations=num_iterations)
        check_not_negative(init_std=init_std)
        self.num_iterations = num_iterations
        self.init_std = init_std
        self.gate = nn.Parameter(torch.randn(num_experts, hidden_size) * init_std)

    def balance_losses(self) -> list[BalanceLoss]:
        """`ZLoss`: the choice is balanced already."""
        return [ZLoss()]

    def forward(self, x: Float[Tensor, "T D"], tokens: Tokens | None = None) -> Routing:
        """Routes each token to K experts; N = T·K, in token order."""
        logits = gate_logits(x, self.gate)
        scores = logits.sigmoid() if self.top_k == 1 else F.softmax(logits, dim=-1)
        chooser = logits
        if self.training:
            # a token's own factor u does not change the order of its experts
            chooser = logits.detach() + log_prices(logits.detach(), self.num_iterations, tokens)
        expert_ids = chooser.topk(self.top_k, dim=-1).indices
        weights = unit_sum(scores.gather(1, expert_ids), self.normalize)
        return token_choice(logits, scores, expert_ids, weights, tokens)


@torch.no_grad()
def log_prices(logits: Float[Tensor, "T E"], num_iterations: int, tokens: Tokens | None = None) -> Float[Tensor, " E"]:
    """Computes ``log v`` of Sinkhorn's algorithm: what makes every expert's share of ``exp(logits)`` equal.

    Args:
        logits: the matrix to balance, as logarithms.
        num_iterations: iterations.
        tokens: whose padding takes no part.
    """
    mask = None if tokens is None else tokens.mask
    num_tokens, num_experts = logits.shape
    log_v = logits.new_zeros(num_experts)
    if num_tokens == 0:
        return log_v
    for _ in range(num_iterations):
        log_u = -(logits + log_v).logsumexp(1, keepdim=True)  # (T, 1), of a token's share up to a constant
        if mask is not None:
            log_u = log_u.masked_fill(~mask.unsqueeze(1), float("-inf"))
        shares = (logits + log_u).logsumexp(0)
        # all padding: nothing to balance
        log_v = torch.where(shares.isfinite(), -shares, 0)
    return log_v
