"""Perturbed cosine routing: cosine routing whose norms have an offset."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_moe.checks import check_positive
from lightning_moe.routers.base import (
    Normalize,
    TokenChoiceRouter,
    bounded_scale,
    cosine_similarity,
    softmax_top_k,
)
from lightning_moe.routing import Routing
from lightning_moe.tokens import Tokens


class PerturbedCosineRouter(TokenChoiceRouter):
    """Cosine routing with an offset added to both norms.

    ``logits_e = <P x, e_e> / ((|P x| + offset) (|e_e| + offset)) / tau``, ``scores = softmax(logits)``; then as
    `TopKRouter`. The perturbation is this offset and no noise: with a plain cosine the experts cannot be told apart
    faster than at a rate of 1 / log(n) in the number n of samples, with the offset the rate is polynomial.

    Reference: Nguyen et al., *Statistical Advantages of Perturbing Cosine Router in Mixture of Experts*, 2024,
    equation 4, https://arxiv.org/abs/2405.14131. Differs from it: one offset serves both norms, and the temperature is
    learnt as in `CosineRouter`.

    Args:
        hidden_size: width D of the incoming hidden states.
        num_experts: number of experts E.
        top_k: experts per token K, 1 <= K <= E.
        normalize: whether a token's weights sum to one; see `TopKRouter`.
        projection_size: width of the space in which tokens and experts are compared.
        temperature: initial tau.
        offset: what is added to the norms, > 0; the paper names no value, the default is ours.

    Raises:
        ValueError: if ``top_k`` exceeds ``num_experts``, if ``top_k=1`` with ``normalize=True``, or if a size, the
            temperature or the offset is not above 0.

    Example:
        >>> router = PerturbedCosineRouter(hidden_size=8, num_experts=4)
        >>> router(torch.randn(6, 8)).expert_ids.shape
        torch.Size([12])
    """

    # tau is learnt
    only_at_start = ("init_std", "temperature")

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        top_k: int = 2,
        normalize: Normalize = True,
        projection_size: int = 256,
        temperature: float = 0.5,
        offset: float = 0.1,
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, normalize)
        check_positive(projection_size=projection_size, temperature=temperature, offset=offset)
        self.projection_size = projection_size
        self.temperature = temperature
        self.offset = offset
        self.projection = nn.Parameter(torch.randn(projection_size, hidden_size) / math.sqrt(hidden_size))
        # of norm 1, beside which the offset is a perturbation
        self.gate = nn.Parameter(torch.randn(num_experts, projection_size) / math.sqrt(projection_size))
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))

    def forward(self, x: Float[Tensor, "T D"], tokens: Tokens | None = None) -> Routing:
        """Routes each token to its K best experts; N = T·K, in token order."""
        scale = bounded_scale(self.log_scale, x.dtype)
        logits = cosine_similarity(x, self.projection, self.gate, self.offset) * scale
        return softmax_top_k(logits, self.top_k, self.normalize, tokens)
