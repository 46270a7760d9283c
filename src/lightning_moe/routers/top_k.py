"""Top-k softmax routing: the plain sparse MoE."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_moe.checks import check_not_negative, check_positive
from lightning_moe.routers.base import Normalize, TokenChoiceRouter, gate_logits, token_choice, unit_sum
from lightning_moe.routing import Routing
from lightning_moe.tokens import Tokens


class TopKRouter(TokenChoiceRouter):
    """Sends each token to the k experts with the highest softmax score.

    ``logits = gate x / temperature``, ``scores = softmax(logits)``, ``chosen = top_k(scores)``; the weights are
    ``scores[chosen] / sum(scores[chosen])`` with ``normalize``, else ``scores[chosen]``. The gate runs in float32.

    With ``normalize=True`` the router of a freshly upcycled model gets no gradient from the task: the experts are
    equal, and how the weights are shared out among them changes nothing. With ``"straight_through"`` the weights are
    the same and the gradient is that of ``normalize=False``.

    Reference: Shazeer et al., *Outrageously Large Neural Networks*, 2017, https://arxiv.org/abs/1701.06538, in the form
    of Mixtral (https://arxiv.org/abs/2401.04088); with ``top_k=1, normalize=False`` the Switch Transformer
    (https://arxiv.org/abs/2101.03961), whose input jitter is ``jitter``. Differs from the first: its noise is learnt
    per expert, ``noise_std`` here is one number.

    Args:
        hidden_size: width D of the incoming hidden states.
        num_experts: number of experts E.
        top_k: experts per token K, 1 <= K <= E.
        normalize: whether a token's weights sum to one. Then identical experts compute exactly the dense FFN.
            ``"straight_through"`` normalises in the forward only, so that the router learns from the first step.
        temperature: what the logits are divided by: above 1 the scores are more even, below 1 less. The choice is the
            same, the weights and the losses are not; `RouterScheduleCallback` can change it by the step.
        jitter: in training, the gate's input is multiplied by uniform numbers from [1 - jitter, 1 + jitter]; 0 is off,
            1e-2 in Switch.
        noise_std: in training, normal noise of this standard deviation, in logit units, is added to what the choice
            goes by; 0 is off. The weights come from the scores without it.
        init_std: standard deviation of the gate's initial weights.

    Raises:
        ValueError: if ``top_k`` exceeds ``num_experts``, if ``top_k=1`` with ``normalize=True`` (the only weight is
            then always 1 and the router gets no gradient from the task), if a number is negative, or ``temperature`` 0.

    Example:
        >>> router = TopKRouter(hidden_size=8, num_experts=4, top_k=2)
        >>> routing = router(torch.randn(6, 8))
        >>> routing.expert_ids.shape
        torch.Size([12])
        >>> bool(routing.weights.view(6, 2).sum(1).allclose(torch.ones(6)))
        True
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        top_k: int = 2,
        normalize: Normalize = True,
        temperature: float = 1.0,
        jitter: float = 0.0,
        noise_std: float = 0.0,
        init_std: float = 0.02,
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, normalize)
        check_positive(temperature=temperature)
        check_not_negative(jitter=jitter, noise_std=noise_std, init_std=init_std)
        self.temperature = temperature
        self.jitter = jitter
        self.noise_std = noise_std
        self.init_std = init_std
        # a bare Parameter: plugins that replace every nn.Linear (bitsandbytes) must not quantise the gate
        self.gate = nn.Parameter(torch.randn(num_experts, hidden_size) * init_std)

    def forward(self, x: Float[Tensor, "T D"], tokens: Tokens | None = None) -> Routing:
        """Routes each token to its K best experts; N = T·K, in token order."""
        if self.training and self.jitter:
            x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
        logits = gate_logits(x, self.gate) / self.temperature
        scores = F.softmax(logits, dim=-1)
        chooser = logits
        if self.training and self.noise_std:
            chooser = logits + torch.randn_like(logits) * self.noise_std
        expert_ids = chooser.topk(self.top_k, dim=-1).indices
        weights = unit_sum(scores.gather(1, expert_ids), self.normalize)
        return token_choice(logits, scores, expert_ids, weights, tokens)
