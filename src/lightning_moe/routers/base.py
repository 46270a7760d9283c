"""What a router is, and the functions that routers share."""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_moe.checks import check_choice
from lightning_moe.losses import BalanceLoss, LoadBalancingLoss, ZLoss
from lightning_moe.routing import Routing
from lightning_moe.tokens import Tokens

Normalize = bool | Literal["straight_through"]


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
    """N depends on the number of tokens only, and nothing waits for the device: ``torch.compile`` makes one graph."""

    learned: ClassVar[bool] = True
    """The task loss trains the router."""

    uses_token_ids: ClassVar[bool] = False
    """Routes by the token ids, which must reach it."""

    uses_previous_logits: ClassVar[bool] = False
    """Builds on the logits of the MoE layer before."""

    only_at_start: ClassVar[tuple[str, ...]] = ("init_std",)
    """Arguments that only say what the router begins with: to change one later has no effect."""

    adapts_to_load: ClassVar[bool] = False
    """Is told the load of each optimizer step, see `adapt`."""

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

    @property
    def weights_sum(self) -> float | None:
        """What each token's weights sum to, where that is the same for all; None where it is not."""
        return 1.0 if self.weights_sum_to_one else None

    def balance_losses(self) -> list[BalanceLoss]:
        """The losses that this router's paper trains it with; `MoEUpcycleCallback` takes them if not told otherwise."""
        return [LoadBalancingLoss(), ZLoss()]

    def adapt(self, load: Float[Tensor, " choices"], scale: int | float = 1.0) -> None:
        """Adapts what no gradient trains. Called once after each optimizer step, where ``adapts_to_load``.

        Args:
            load: assignments per choice, over all ranks and accumulated micro-batches, padding left out.
            scale: factor of the step, where `ExpertBiasCallback` has a schedule.
        """

    def zero_computation(self, x: Float[Tensor, "T D"], routing: Routing) -> Float[Tensor, "T D"] | None:
        """What the choices that are no FFN add to the output; None if they add nothing."""
        return None

    def gate_rows(self) -> Float[Tensor, "choices _"] | None:
        """The vectors that tokens are compared with, one per choice; None if the router has none."""
        gate = getattr(self, "gate", None)
        return gate if isinstance(gate, Tensor) and gate.dim() == 2 else None

    @abstractmethod
    def forward(self, x: Float[Tensor, "T D"], tokens: Tokens | None = None) -> Routing:
        """Routes T tokens.

        Args:
            x: hidden states.
            tokens: their ids and padding mask, where known.

        Returns:
            N assignments; ``token_mask`` is that of ``tokens``.
        """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        # Buffers (expert biases, tables) stay as exact as they were, whatever dtype the model is cast to: a bias in
        # bfloat16 would swallow its own updates.
        exact = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            after = self._buffers[name]
            if after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self


class TokenChoiceRouter(Router):
    """A router whose tokens choose K experts each, with weights that may be normalised: what most are.

    Args:
        hidden_size: width D of the incoming hidden states.
        num_experts: number of experts E.
        top_k: experts per token K, 1 <= K <= E.
        normalize: whether a token's weights sum to one, see `unit_sum`.

    Raises:
        ValueError: if ``top_k`` exceeds ``num_experts``, or if ``top_k=1`` with ``normalize=True`` (the only weight is
            then always 1 and the router gets no gradient from the task).
    """

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, normalize: Normalize) -> None:
        super().__init__(hidden_size, num_experts)
        check_top_k(top_k, num_experts)
        check_choice("normalize", normalize, (True, False, "straight_through"))
        if top_k == 1 and normalize is True:
            raise ValueError(
                "top_k=1 with normalize=True: the one weight is always 1, so the router would get no gradient from the "
                'task and never train. Set normalize="straight_through", normalize=False (Switch Transformer) or '
                "top_k=2."
            )
        self.top_k = top_k
        self.normalize = normalize

    @property
    def weights_sum_to_one(self) -> bool:
        """True with ``normalize``."""
        return bool(self.normalize)

    @property
    def experts_per_token(self) -> float:
        """K."""
        return float(self.top_k)


def init_arguments(module: object, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    """Reads back the arguments of an object's ``__init__`` from its attributes of the same names."""
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
    if not isinstance(top_k, int):
        raise ValueError(f"top_k={top_k!r}: wanted a whole number.")
    if not 1 <= top_k <= num_experts:
        more = f", or num_experts to {top_k} or more" if top_k > num_experts else ""
        raise ValueError(
            f"top_k={top_k} with num_experts={num_experts}: a token chooses at least 1 and at most all of the experts. "
            f"Set top_k between 1 and {num_experts}{more}."
        )


def unit_sum(weights: Float[Tensor, "T K"], normalize: Normalize) -> Float[Tensor, "T K"]:
    """Makes each token's weights sum to one, if so wanted.

    With True, ``w / sum(w)``. With ``"straight_through"`` the same numbers, but the gradient goes to ``w`` as if there
    were no division. Identical experts then compute exactly the dense FFN and the router still gets a gradient, where
    that of a true division is zero: as the experts are equal, nothing depends on how the weights are shared out.

    Args:
        weights: not negative.
        normalize: whether, and how.

    Example:
        >>> weights = torch.tensor([[0.1, 0.3]], requires_grad=True)
        >>> unit_sum(weights, "straight_through").sum().backward()
        >>> unit_sum(weights, "straight_through").detach(), weights.grad
        (tensor([[0.2500, 0.7500]]), tensor([[1., 1.]]))
    """
    if not normalize:
        return weights
    # not 0 / 0, where all scores of a sigmoid or a ReLU vanish
    divided = weights / weights.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    return straight_through(divided, weights) if normalize == "straight_through" else divided


def straight_through(value: Float[Tensor, "*S"], surrogate: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """Returns ``value``, exactly, with the gradient of ``surrogate``."""
    return _StraightThrough.apply(value, surrogate)  # type: ignore[no-any-return]


class _StraightThrough(torch.autograd.Function):
    # surrogate + (value - surrogate).detach() is no exact value in floating point
    @staticmethod
    def forward(ctx: Any, value: Tensor, surrogate: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


def top_k_assignment(scores: Float[Tensor, "T E"], top_k: int) -> tuple[Int[Tensor, " N"], Int[Tensor, " N"]]:
    """Chooses the ``top_k`` experts of highest score for each token.

    Args:
        scores: what the choice goes by.
        top_k: K.

    Returns:
        ``token_ids`` and ``expert_ids`` of the N = T·K assignments, row ``t * K + j`` being the j-th best of token t.
    """
    expert_ids = scores.topk(top_k, dim=-1).indices  # (T, K)
    return _regular_token_ids(expert_ids), expert_ids.reshape(-1)


def _regular_token_ids(expert_ids: Int[Tensor, "T K"]) -> Int[Tensor, " N"]:
    return torch.arange(expert_ids.shape[0], device=expert_ids.device).repeat_interleave(expert_ids.shape[1])


def token_choice(
    logits: Float[Tensor, "T choices"],
    scores: Float[Tensor, "T choices"],
    expert_ids: Int[Tensor, "T K"],
    weights: Float[Tensor, "T K"],
    tokens: Tokens | None,
) -> Routing:
    """Makes the `Routing` of tokens that each chose K experts.

    Args:
        logits: output of the gate.
        scores: what became of the logits.
        expert_ids: each token's experts.
        weights: their combine weights.
        tokens: what the router was told of the tokens.
    """
    return Routing(
        token_ids=_regular_token_ids(expert_ids),
        expert_ids=expert_ids.reshape(-1),
        weights=weights.reshape(-1),
        logits=logits,
        scores=scores,
        token_mask=None if tokens is None else tokens.mask,
        top_k=expert_ids.shape[1],
    )


def variable_choice(
    logits: Float[Tensor, "T choices"],
    scores: Float[Tensor, "T choices"],
    weights: Float[Tensor, "T E"],
    chosen: Bool[Tensor, "T E"],
    tokens: Tokens | None,
) -> Routing:
    """Makes the `Routing` of tokens that each chose any number of experts; counting them waits for the device.

    Args:
        logits: output of the gate.
        scores: what became of the logits.
        weights: combine weight of each expert for each token, were it chosen.
        chosen: who was.
        tokens: what the router was told of the tokens.
    """
    token_ids, expert_ids = chosen.nonzero(as_tuple=True)
    flat = weights.reshape(-1).index_select(0, token_ids * weights.shape[1] + expert_ids)
    mask = None if tokens is None else tokens.mask
    return Routing(token_ids, expert_ids, flat, logits, scores, mask)


def softmax_top_k(logits: Float[Tensor, "T E"], top_k: int, normalize: Normalize, tokens: Tokens | None) -> Routing:
    """Sends each token to the ``top_k`` experts of highest logit; weights are the chosen softmax scores.

    Args:
        logits: output of the gate.
        top_k: K.
        normalize: see `unit_sum`.
        tokens: what the router was told of the tokens.
    """
    scores = F.softmax(logits, dim=-1)
    expert_ids = logits.topk(top_k, dim=-1).indices
    return token_choice(logits, scores, expert_ids, unit_sum(scores.gather(1, expert_ids), normalize), tokens)


def cosine_similarity(
    x: Float[Tensor, "T D"],
    projection: Float[Tensor, "P D"],
    embeddings: Float[Tensor, "E P"],
    offset: float = 0.0,
) -> Float[Tensor, "T E"]:
    """Compares projected hidden states with the experts' embeddings, in float32 or better.

    ``<P x, e> / ((|P x| + offset) (|e| + offset))``, from -1 to 1; 0 where a norm is 0.
    """
    projected, directions = gate_logits(x, projection), embeddings.to(torch.promote_types(x.dtype, torch.float32))
    return gate_logits(_scaled(projected, offset), _scaled(directions, offset))


def bounded_scale(log_scale: Float[Tensor, ""], dtype: torch.dtype) -> Float[Tensor, ""]:
    """A learnt 1 / temperature, kept as its logarithm, in float32 or better and at most 100."""
    return log_scale.to(torch.promote_types(dtype, torch.float32)).clamp(max=math.log(100)).exp()


def _scaled(vectors: Float[Tensor, "R P"], offset: float) -> Float[Tensor, "R P"]:
    # without the floor the gradient at a vector of zeros is nan
    norms = vectors.square().sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny).sqrt()
    return vectors / (norms + offset)
