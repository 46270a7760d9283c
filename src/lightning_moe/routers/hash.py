"""Hash routing: the token's id decides."""

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_moe.losses import BalanceLoss
from lightning_moe.routers.base import Router, check_top_k, token_choice
from lightning_moe.routing import Routing
from lightning_moe.tokens import Tokens

# 2^31 - 1: products of two smaller numbers fit into 63 bits
_PRIME = 2147483647


class HashRouter(Router):
    """Sends each token to the experts that a fixed hash of its id names; nothing is learnt and nothing is balanced.

    ``first = (a * id + b mod p) mod E``, the further ones follow it in a step of their own that is drawn for the id
    too, so that a token's experts differ; every weight is 1 / K. Each layer has its own a and b.

    Reference: Roller et al., *Hash Layers for Large Sparse Models*, 2021, section 3, random hash,
    https://arxiv.org/abs/2106.04426; the hash is that of Carter and Wegman,
    *Universal Classes of Hash Functions*, 1979.

    Args:
        hidden_size: width D of the incoming hidden states.
        num_experts: number of experts E.
        top_k: experts per token K, 1 <= K <= E; 1 in the paper.

    Raises:
        ValueError: if ``top_k`` exceeds ``num_experts``; at the first forward, if the token ids are not known (a model
            that is called with embeddings, or that is no text model).

    Example:
        >>> router = HashRouter(hidden_size=8, num_experts=4)
        >>> routing = router(torch.randn(3, 8), Tokens(ids=torch.tensor([5, 6, 5])))
        >>> bool(routing.expert_ids[0] == routing.expert_ids[2])
        True
    """

    learned = False
    uses_token_ids = True
    weights_sum_to_one = True
    keys: Tensor

    def __init__(self, hidden_size: int, num_experts: int, *, top_k: int = 1) -> None:
        super().__init__(hidden_size, num_experts)
        check_top_k(top_k, num_experts)
        self.top_k = top_k
        self.register_buffer("keys", torch.randint(1, _PRIME, (4,)))

    @property
    def experts_per_token(self) -> float:
        """K."""
        return float(self.top_k)

    def balance_losses(self) -> list[BalanceLoss]:
        """None: nothing is learnt."""
        return []

    def forward(self, x: Float[Tensor, "T D"], tokens: Tokens | None = None) -> Routing:
        """Routes each token by its id; N = T·K, in token order."""
        if tokens is None or tokens.ids is None:
            raise ValueError(
                "HashRouter routes by token ids, and none reached it: call the model with input_ids, not with "
                "inputs_embeds, or take UniformRouter in a model without tokens."
            )
        a, b, c, d = self.keys.unbind()
        first = (a * tokens.ids + b) % _PRIME % self.num_experts  # (T,)
        places = torch.arange(self.top_k, device=x.device)
        # steps are counted among the other experts: the j-th further one is j places on, from an offset of the id's own
        offset = (c * tokens.ids + d) % _PRIME % max(self.num_experts - 1, 1)
        further = (offset.unsqueeze(1) + places - 1) % max(self.num_experts - 1, 1) + 1
        expert_ids = (first.unsqueeze(1) + torch.where(places > 0, further, 0)) % self.num_experts  # (T, K)
        dtype = torch.promote_types(x.dtype, torch.float32)
        weights = torch.full(expert_ids.shape, 1 / self.top_k, dtype=dtype, device=x.device)
        scores = torch.zeros(len(x), self.num_experts, dtype=dtype, device=x.device).scatter(1, expert_ids, weights)
        return token_choice(torch.zeros_like(scores), scores, expert_ids, weights, tokens)
