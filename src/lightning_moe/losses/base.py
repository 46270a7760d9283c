"""What a balance loss is, and the functions that losses share."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lightning_moe.routing import Routing


class BalanceLoss(nn.Module, ABC):
    """A loss on the routing of one layer, with the coefficient by which it enters training.

    Each takes one layer by itself and leaves padding out. Its flags are promises that the contract tests hold it to.
    Every argument of ``__init__`` is kept unchanged under its own name.

    Args:
        coefficient: factor before the loss in the total, per layer: the total has the sum over the layers.
    """

    name: ClassVar[str]
    """The name it is logged under."""

    measures_balance: ClassVar[bool] = False
    """It is 1 when routing is uniform, and more when it is not."""

    needs_outputs: ClassVar[bool] = False
    """It looks at the experts' outputs: the layer fills ``routing.outputs``."""

    needs_gate: ClassVar[bool] = False
    """It looks at the router's rows: the layer fills ``routing.gate``."""

    shared: ClassVar[bool] = False
    """One object serves all layers; else each layer has its own, with its own state."""

    def __init__(self, coefficient: float) -> None:
        super().__init__()
        if coefficient < 0:
            raise ValueError(
                f"{type(self).__name__}: coefficient={coefficient}, wanted >= 0. Leave the loss out to turn it off."
            )
        self.coefficient = coefficient

    @property
    def counts(self) -> bool:
        """Counts something over the forwards of training: it is to see each of them, whoever looks."""
        return False

    @property
    def in_training(self) -> bool:
        """Whether this forward is one of training, and not of validation.

        Gradients alone do not tell: reentrant activation checkpointing runs the first forward without.
        """
        return torch.is_grad_enabled() or self.training

    @abstractmethod
    def forward(self, routing: Routing) -> Float[Tensor, ""]:
        """Computes the loss of one layer, without the coefficient."""

    def step(self) -> None:
        """Adapts what the loss adapts. Called once after each optimizer step."""

    def training_state(self) -> dict[str, Tensor]:
        """What the loss has learnt in training, for a checkpoint; empty for most."""
        return {}

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        """Takes up what `training_state` returned."""

    def extra_repr(self) -> str:
        """The coefficient, for ``print(model)``."""
        return f"coefficient={self.coefficient}"


def token_scores(routing: Routing) -> Float[Tensor, "T choices"]:
    """The scores scaled to sum to one per token; zeros for padding."""
    scores = without_padding(routing.scores, routing.token_mask)
    return scores / scores.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)


def without_padding(values: Float[Tensor, "T X"], mask: Bool[Tensor, " T"] | None) -> Float[Tensor, "T X"]:
    """Puts zeros in the place of padding, before any function of it.

    Behind a function the gradient of a padding row of inf or nan would be 0 * nan.
    """
    return values if mask is None else values.masked_fill(~mask.unsqueeze(-1), 0)


def masked_mean(values: Float[Tensor, "T X"], mask: Bool[Tensor, " T"] | None) -> Float[Tensor, " X"]:
    """The mean over the real tokens; zeros if there are none."""
    if mask is None:
        return values.sum(0) / max(values.shape[0], 1)
    return without_padding(values, mask).sum(0) / mask.sum().clamp(min=1)


def sum_over_ranks(counts: Tensor) -> int:
    """Sums a tensor over all ranks, in place; returns their number, 1 where nothing is distributed."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 1
    torch.distributed.all_reduce(counts)
    return torch.distributed.get_world_size()
