"""What a router is, and the functions that routers share."""

import inspect
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_moe.routing import Routing, Tokens


class Router(nn.Module, ABC):
    """Decides which token goes to which expert, with what weight.

    A router is one file with one class of this kind. Its flags are promises that the contract tests hold it to. Every
    argument of ``__init__`` is kept unchanged under its own name: saving relies on it.

    Args:
        hidden_size: width D of the incoming hidden states.
        num_experts: number of experts E.
    """

    causal: ClassVar[bool] = True
    """Changing token t never changes the routing of a token before t."""

    static_shapes: ClassVar[bool] = True
    """The number of assignments N depends on the number of tokens only."""

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.num_experts = num_experts

    @property
    @abstractmethod
    def weights_sum_to_one(self) -> bool:
        """Whether each token's weights sum to one, so that equal experts compute what the dense FFN does."""

    @property
    @abstractmethod
    def experts_per_token(self) -> float:
        """Experts that compute for one token, on average: what counts as active."""

    @abstractmethod
    def forward(self, x: Float[Tensor, "T D"], tokens: Tokens | None = None) -> Routing:
        """Routes T tokens.

        Args:
            x: hidden states.
            tokens: their ids and padding mask, where known.

        Returns:
            N assignments; ``token_mask`` is that of ``tokens``.
        """


def init_arguments(module: nn.Module, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    """Reads back the arguments of a module's ``__init__`` from its attributes of the same names."""
    # signature and not __code__: it sees through decorators, such as a type checker's
    parameters = list(inspect.signature(type(module).__init__).parameters.values())[1:]
    named = (p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
    return {name: getattr(module, name) for name in named if name not in skip}


def gate_logits(x: Float[Tensor, "T D"], gate: Float[Tensor, "E D"]) -> Float[Tensor, "T E"]:
    """Projects hidden states on the gate's rows in float32 or better, whatever the dtype of either, autocast or not.

    In bfloat16 two close logits become equal and the choice between them arbitrary (ST-MoE, 2202.08906, section 3).
    """
    with torch.autocast(x.device.type, enabled=False):
        dtype = torch.promote_types(x.dtype, torch.float32)
        return F.linear(x.to(dtype), gate.to(dtype))


def check_top_k(top_k: int, num_experts: int) -> None:
    """Raises if a token cannot choose ``top_k`` of ``num_experts``."""
    if not 1 <= top_k <= num_experts:
        raise ValueError(
            f"top_k={top_k} with num_experts={num_experts}: a token chooses at least 1 and at most all of the experts. "
            f"Set top_k between 1 and {num_experts}, or num_experts to {top_k} or more."
        )


def top_k_assignment(scores: Float[Tensor, "T E"], top_k: int) -> tuple[Int[Tensor, " N"], Int[Tensor, " N"]]:
    """Chooses the ``top_k`` experts of highest score for each token.

    Args:
        scores: what the choice goes by.
        top_k: K.

    Returns:
        ``token_ids`` and ``expert_ids`` of the N = T·K assignments, row ``t * K + j`` being the j-th best of token t.
    """
    expert_ids = scores.topk(top_k, dim=-1).indices  # (T, K)
    token_ids = torch.arange(scores.shape[0], device=scores.device).repeat_interleave(top_k)
    return token_ids, expert_ids.reshape(-1)
