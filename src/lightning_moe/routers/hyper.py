"""HyperRouter: the gate is made by a fixed network from what is learnt."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_moe.checks import check_not_negative, check_positive
from lightning_moe.routers.base import Normalize, TokenChoiceRouter, gate_logits, softmax_top_k
from lightning_moe.routing import Routing
from lightning_moe.tokens import Tokens


class HyperRouter(TokenChoiceRouter):
    """A gate made by a fixed random network from a trained embedding; then as `TopKRouter`.

    ``gate = H(r)`` with ``H(r) = B relu(A r)``, A and B random and never trained, r trained; ``logits = gate x``,
    ``scores = softmax(logits)``. A router that is random throughout cannot improve, one that is trained throughout may
    collapse: this one lies between them.

    Reference: Do et al., *HyperRouter: Towards Efficient Training and Inference of Sparse Mixture of Experts*, 2023,
    https://arxiv.org/abs/2312.07035. Differs from it: neither network nor gate has biases, and the fixed weights are
    scaled so that the gate starts with ``init_std``, as other routers' gates do. A and B are buffers: they are
    saved with the model.

    Args:
        hidden_size: width D of the incoming hidden states.
        num_experts: number of experts E.
        top_k: experts per token K, 1 <= K <= E.
        normalize: whether a token's weights sum to one; see `TopKRouter`.
        embedding_size: length of r.
        network_size: width of the fixed network, 256 or 64 in the authors' code; it holds about
            ``E * D * network_size`` numbers.
        init_std: standard deviation of the initial gate.

    Raises:
        ValueError: if ``top_k`` exceeds ``num_experts``, if ``top_k=1`` with ``normalize=True``, or if a number is out
            of its range.

    Example:
        >>> router = HyperRouter(hidden_size=8, num_experts=4)
        >>> [name for name, _ in router.named_parameters()], sorted(router.state_dict())
        (['embedding'], ['embedding', 'input_weight', 'output_weight'])
    """

    input_weight: Tensor
    output_weight: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        top_k: int = 2,
        normalize: Normalize = True,
        embedding_size: int = 64,
        network_size: int = 64,
        init_std: float = 0.02,
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, normalize)
        check_positive(embedding_size=embedding_size, network_size=network_size)
        check_not_negative(init_std=init_std)
        self.embedding_size = embedding_size
        self.network_size = network_size
        self.init_std = init_std
        self.embedding = nn.Parameter(torch.randn(embedding_size))
        # half of the hidden units are off: the factor 2 keeps their mean square at 1
        self.register_buffer("input_weight", torch.randn(network_size, embedding_size) * math.sqrt(2 / embedding_size))
        std = init_std / math.sqrt(network_size)
        self.register_buffer("output_weight", torch.randn(num_experts * hidden_size, network_size) * std)

    def gate_rows(self) -> Float[Tensor, "E D"]:
        """The gate that the fixed network makes."""
        with torch.autocast(self.embedding.device.type, enabled=False):
            hidden = F.relu(self.input_weight @ self.embedding.to(self.input_weight.dtype))
            return (self.output_weight @ hidden).view(self.num_experts, self.hidden_size)

    def forward(self, x: Float[Tensor, "T D"], tokens: Tokens | None = None) -> Routing:
        """Routes each token to its K best experts; N = T·K, in token order."""
        return softmax_top_k(gate_logits(x, self.gate_rows()), self.top_k, self.normalize, tokens)
