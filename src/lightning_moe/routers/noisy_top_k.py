"""Noisy top-k routing: the noise on the choice is learnt for each expert."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_moe.checks import check_not_negative
from lightning_moe.losses import BalanceLoss, ImportanceLoss, LoadLoss
from lightning_moe.routers.base import TokenChoiceRouter, gate_logits, token_choice
from lightning_moe.routing import Routing
from lightning_moe.tokens import Tokens

# the least standard deviation of the noise, from the authors' code: a noise of 0 would stay 0
_NOISE_FLOOR = 1e-2


class NoisyTopKRouter(TokenChoiceRouter):
    """Top-k routing of logits with noise whose size is learnt, and an estimate of the load that has a gradient.

    ``logits = gate x + noise * (softplus(noise_gate x) + 0.01)`` with standard normal noise in training and none in
    evaluation; the weights are the softmax over the k highest logits. ``expected_load_e`` sums over the tokens the
    probability that expert e would be chosen if only its own noise were drawn anew; `LoadLoss` keeps it even.

    Both gates start at 0: in training the noise then spreads the tokens evenly, in evaluation all tokens go to the same
    experts until the gate has learnt something.

    Reference: Shazeer et al., *Outrageously Large Neural Networks*, 2017, equations 3 to 5 and 8 to 10,
    https://arxiv.org/abs/1701.06538. Differs from it: the 0.01, the least standard deviation, is the authors' code's.

    Args:
        hidden_size: width D of the incoming hidden states.
        num_experts: number of experts E.
        top_k: experts per token K, 2 <= K <= E.
        init_std: standard deviation of the gates' initial weights; 0 in the paper.

    Raises:
        ValueError: if ``top_k`` is 1 or exceeds ``num_experts``, or ``init_std`` is negative.

    Example:
        >>> router = NoisyTopKRouter(hidden_size=8, num_experts=4)
        >>> routing = router(torch.randn(600, 8))
        >>> bool((routing.expected_load - 300).abs().max() < 60)
        True
    """

    def __init__(self, hidden_size: int, num_experts: int, *, top_k: int = 2, init_std: float = 0.0) -> None:
        if top_k == 1:
            raise ValueError(
                "top_k=1: the softmax over one logit is always 1, so the router would get no gradient from the task. "
                "Set top_k to 2 or more."
            )
        super().__init__(hidden_size, num_experts, top_k, True)
        check_not_negative(init_std=init_std)
        self.init_std = init_std
        self.gate = nn.Parameter(torch.randn(num_experts, hidden_size) * init_std)
        self.noise_gate = nn.Parameter(torch.randn(num_experts, hidden_size) * init_std)

    def balance_losses(self) -> list[BalanceLoss]:
        """The paper's pair."""
        return [ImportanceLoss(), LoadLoss()]

    def forward(self, x: Float[Tensor, "T D"], tokens: Tokens | None = None) -> Routing:
        """Routes each token to its K best experts; N = T·K, in token order."""
        clean = gate_logits(x, self.gate)
        noise_std = F.softplus(gate_logits(x, self.noise_gate)) + _NOISE_FLOOR
        logits = clean + torch.randn_like(clean) * noise_std if self.training else clean
        chosen, expert_ids = logits.topk(self.top_k, dim=-1)
        routing = token_choice(logits, F.softmax(logits, dim=-1), expert_ids, F.softmax(chosen, dim=-1), tokens)
        return replace(routing, expected_load=self._expected_load(clean, noise_std, logits, tokens))

    def _expected_load(
        self,
        clean: Float[Tensor, "T E"],
        noise_std: Float[Tensor, "T E"],
        logits: Float[Tensor, "T E"],
        tokens: Tokens | None,
    ) -> Float[Tensor, " E"]:
        probabilities = torch.ones_like(clean)
        if self.top_k < self.num_experts:
            # what a logit must exceed to be among the k best: the k-th best of the others
            best = logits.topk(self.top_k + 1, dim=-1).values
            inside, outside = best[:, -1:], best[:, -2:-1]
            threshold = torch.where(logits > inside, inside, outside)
            probabilities = torch.special.ndtr((clean - threshold) / noise_std)
        if tokens is not None and tokens.mask is not None:
            probabilities = probabilities.masked_fill(~tokens.mask.unsqueeze(-1), 0)
        return probabilities.sum(0)
