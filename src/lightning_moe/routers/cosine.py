"""Cosine routing: tokens and experts are compared by direction."""

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


class CosineRouter(TokenChoiceRouter):
    """Sends each token to the k experts whose embeddings point most in its direction.

    ``logits_e = cos(P x, e_e) / tau`` with a learnable temperature tau, ``scores = softmax(logits)``, one softmax;
    then as `TopKRouter`. Neither the norm of the token nor that of the embedding matters, which keeps large experts
    from growing larger.

    Reference: Chi et al., *On the Representation Collapse of Sparse Mixture of Experts*, 2022,
    https://arxiv.org/abs/2204.09179, in the form of Tutel's cosine router: the projection is wide, and 1 / tau is
    learnt as its logarithm and stays below 100. `XMoERouter` is the paper's own form. Differs from Tutel: the
    projection has no bias.

    Args:
        hidden_size: width D of the incoming hidden states.
        num_experts: number of experts E.
        top_k: experts per token K, 1 <= K <= E.
        normalize: whether a token's weights sum to one; see `TopKRouter`.
        projection_size: width of the space in which tokens and experts are compared; 256 in Tutel.
        temperature: initial tau; 0.5 in Tutel.

    Raises:
        ValueError: if ``top_k`` exceeds ``num_experts``, if ``top_k=1`` with ``normalize=True``, or if a size or the
            temperature is not above 0.

    Example:
        >>> router = CosineRouter(hidden_size=8, num_experts=4, temperature=0.5)
        >>> bool(router(100 * torch.randn(6, 8)).logits.abs().max() <= 2.0)
        True
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
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, normalize)
        check_positive(projection_size=projection_size, temperature=temperature)
        self.projection_size = projection_size
        self.temperature = temperature
        self.projection = nn.Parameter(torch.randn(projection_size, hidden_size) / math.sqrt(hidden_size))
        self.gate = nn.Parameter(torch.randn(num_experts, projection_size) * 0.01)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))

    def forward(self, x: Float[Tensor, "T D"], tokens: Tokens | None = None) -> Routing:
        """Routes each token to its K best experts; N = T·K, in token order."""
        scale = bounded_scale(self.log_scale, x.dtype)
        logits = cosine_similarity(x, self.projection, self.gate) * scale
        return softmax_top_k(logits, self.top_k, self.normalize, tokens)
