"""X-MoE routing: cosine routing in a space of few dimensions."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_moe.checks import check_positive
from lightning_moe.routers.base import Normalize, TokenChoiceRouter, cosine_similarity, softmax_top_k
from lightning_moe.routing import Routing
from lightning_moe.tokens import Tokens


class XMoERouter(TokenChoiceRouter):
    """Projects tokens to a few dimensions and compares them there with the experts' embeddings, by cosine.

    ``logits_e = cos(P x, e_e) / tau`` with P x of E / 2 dimensions and a learnable tau, ``scores = softmax(logits)``;
    then as `TopKRouter`. The few dimensions and the norms that are divided away keep the router from drawing all hidden
    states towards the experts' embeddings.

    Reference: Chi et al., *On the Representation Collapse of Sparse Mixture of Experts*, 2022, equations 4 to 6,
    https://arxiv.org/abs/2204.09179. Differs from it: the paper sends each token to one expert with its raw score
    (``top_k=1, normalize=False``), and its code sets the embeddings' norms to 1.5 by writing into the parameter and
    keeps the token's norm; here both are divided away, as in the paper. Its balance loss keeps the initial tau; ours
    follows the learnt one.

    Args:
        hidden_size: width D of the incoming hidden states.
        num_experts: number of experts E.
        top_k: experts per token K, 1 <= K <= E.
        normalize: whether a token's weights sum to one; see `TopKRouter`.
        projection_size: dimensions in which tokens and experts are compared; None takes E / 2 as the paper does, but
            at least 2, as one dimension knows only two directions.
        temperature: initial tau; 0.3 in the paper.

    Raises:
        ValueError: if ``top_k`` exceeds ``num_experts``, if ``top_k=1`` with ``normalize=True``, or if a size or the
            temperature is not above 0.

    Example:
        >>> router = XMoERouter(hidden_size=8, num_experts=4)
        >>> router.projection.shape
        torch.Size([2, 8])
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
        projection_size: int | None = None,
        temperature: float = 0.3,
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, normalize)
        size = max(2, num_experts // 2) if projection_size is None else projection_size
        check_positive(projection_size=size, temperature=temperature)
        self.projection_size = projection_size
        self.temperature = temperature
        self.projection = nn.Parameter(nn.init.xavier_uniform_(torch.empty(size, hidden_size)))
        self.gate = nn.Parameter(nn.init.orthogonal_(torch.empty(num_experts, size), gain=0.32))
        self.tau = nn.Parameter(torch.tensor(temperature))

    def forward(self, x: Float[Tensor, "T D"], tokens: Tokens | None = None) -> Routing:
        """Routes each token to its K best experts; N = T·K, in token order."""
        # a step over 0 would turn the order of the experts round
        tau = self.tau.to(torch.promote_types(x.dtype, torch.float32)).clamp(min=0.01)
        logits = cosine_similarity(x, self.projection, self.gate) / tau
        return softmax_top_k(logits, self.top_k, self.normalize, tokens)
