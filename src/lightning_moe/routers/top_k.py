"""Top-k softmax routing: the plain sparse MoE."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_moe.routers.base import Router, check_top_k, gate_logits, top_k_assignment
from lightning_moe.routing import Routing, Tokens


class TopKRouter(Router):
    """Sends each token to the k experts with the highest softmax score.

    ``logits = gate x``, ``scores = softmax(logits)``, ``chosen = top_k(scores)``; the weights are
    ``scores[chosen] / sum(scores[chosen])`` with ``normalize``, else ``scores[chosen]``. The gate runs in float32.

    Reference: Shazeer et al., *Outrageously Large Neural Networks*, 2017, https://arxiv.org/abs/1701.06538, in the form
    of Mixtral (https://arxiv.org/abs/2401.04088); with ``top_k=1, normalize=False`` the Switch Transformer
    (https://arxiv.org/abs/2101.03961), whose input jitter is ``jitter``. Differs from the first: its noise is learnt
    per expert, ``noise_std`` here is one number.

    Args:
        hidden_size: width D of the incoming hidden states.
        num_experts: number of experts E.
        top_k: experts per token K, 1 <= K <= E.
        normalize: whether a token's weights sum to one. Then identical experts compute exactly the dense FFN.
        jitter: in training, the gate's input is multiplied by uniform numbers from [1 - jitter, 1 + jitter]; 0 is off,
            1e-2 in Switch.
        noise_std: in training, normal noise of this standard deviation, in logit units, is added to what the choice
            goes by; 0 is off. The weights come from the scores without it.
        init_std: standard deviation of the gate's initial weights.

    Raises:
        ValueError: if ``top_k`` exceeds ``num_experts``, if ``top_k=1`` with ``normalize`` (the only weight is then
            always 1 and the router gets no gradient from the task), or if a number is negative.

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
        normalize: bool = True,
        jitter: float = 0.0,
        noise_std: float = 0.0,
        init_std: float = 0.02,
    ) -> None:
        super().__init__(hidden_size, num_experts)
        check_top_k(top_k, num_experts)
        if top_k == 1 and normalize:
            raise ValueError(
                "top_k=1 with normalize=True: the one weight is always 1, so the router would get no gradient from the "
                "task and never train. Set normalize=False (Switch Transformer) or top_k=2."
            )
        for name, value in {"jitter": jitter, "noise_std": noise_std, "init_std": init_std}.items():
            if value < 0:
                raise ValueError(f"{name}={value}: wanted a number >= 0; 0 is off.")
        self.top_k = top_k
        self.normalize = normalize
        self.jitter = jitter
        self.noise_std = noise_std
        self.init_std = init_std
        # a bare Parameter: plugins that replace every nn.Linear (bitsandbytes) must not quantise the gate
        self.gate = nn.Parameter(torch.randn(num_experts, hidden_size) * init_std)

    @property
    def weights_sum_to_one(self) -> bool:
        """True with ``normalize``."""
        return self.normalize

    @property
    def experts_per_token(self) -> float:
        """K."""
        return float(self.top_k)

    def forward(self, x: Float[Tensor, "T D"], tokens: Tokens | None = None) -> Routing:
        """Routes each token to its K best experts; N = T·K, in token order."""
        if self.training and self.jitter:
            x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
        logits = gate_logits(x, self.gate)
        scores = F.softmax(logits, dim=-1)
        chooser = logits
        if self.training and self.noise_std:
            chooser = logits + torch.randn_like(logits) * self.noise_std
        token_ids, expert_ids = top_k_assignment(chooser, self.top_k)
        weights = scores.gather(1, expert_ids.view(-1, self.top_k))  # (T, K)
        if self.normalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return Routing(
            token_ids=token_ids,
            expert_ids=expert_ids,
            weights=weights.reshape(-1),
            logits=logits,
            scores=scores,
            token_mask=None if tokens is None else tokens.mask,
            top_k=self.top_k,
        )
