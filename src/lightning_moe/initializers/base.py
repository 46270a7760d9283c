"""What an initialiser is, and the functions that initialisers share."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lightning_moe.experts import Experts
from lightning_moe.ffn import FFNWeights
from lightning_moe.routers import Router


class ExpertInit(ABC):
    """Fills the experts of one layer from the dense FFN that they replace.

    Every argument of ``__init__`` is kept unchanged under its own name.
    """

    copies_dense: ClassVar[bool] = False
    """Every expert computes exactly what the dense FFN does."""

    needs_inputs: ClassVar[bool] = False
    """Looks at hidden states of a calibration batch, see `upcycle`."""

    def for_layer(self, name: str) -> "ExpertInit":
        """The initialiser of one layer, by its name in the model; most are the same for all."""
        return self

    def expert_size(self, dense_size: int, num_experts: int) -> int:
        """The width of one expert, for a dense FFN of width ``dense_size``.

        Raises:
            ValueError: if the FFN cannot be shared out so.
        """
        return dense_size

    def output_scale(self, weights_sum: float, num_experts: int, experts_per_token: float) -> float:
        """What the sum of a token's experts is to be multiplied by, to be the output of one dense FFN.

        Args:
            weights_sum: what a token's combine weights sum to.
            num_experts: E.
            experts_per_token: K.
        """
        return 1 / weights_sum

    def init_router(self, router: Router, generator: torch.Generator) -> None:
        """Changes the router to what the experts need of it; most need nothing."""
        return

    def step_zero(self, router: Router) -> tuple[bool, str]:
        """Whether the experts together compute the dense FFN at step 0, and why, or why not.

        What the router's weights sum to is not the question here: `upcycle` asks the router.
        """
        name = type(self).__name__
        return (True, "every expert is a copy") if self.copies_dense else (False, f"{name} changes the experts")

    @abstractmethod
    def __call__(
        self, experts: Experts, dense: FFNWeights, generator: torch.Generator, inputs: Float[Tensor, "T D"] | None
    ) -> None:
        """Writes the experts' parameters in place.

        Args:
            experts: uninitialised experts of the width that `expert_size` gave.
            dense: the weights of the FFN that they replace.
            generator: the layer's own source of random numbers, on the CPU.
            inputs: hidden states that reached the FFN, for initialisers that need them.
        """


@torch.no_grad()
def copy_neurons(experts: Experts, expert: int, dense: FFNWeights, neurons: Int[Tensor, " F"] | slice) -> None:
    """Makes one expert of some of the dense FFN's neurons; the down projection's bias goes along whole.

    Args:
        experts: whose weights are written.
        expert: which one.
        dense: the FFN.
        neurons: rows of the up projection, as many as the expert is wide.
    """
    up, gate = dense.up[neurons], None if dense.gate is None else dense.gate[neurons]
    write(experts.first_proj[expert], [up] if gate is None else [gate, up])
    experts.down_proj[expert].copy_(dense.down[:, neurons])
    if experts.first_proj_bias is not None:
        biases = [dense.up_bias] if dense.gate is None else [dense.gate_bias, dense.up_bias]
        write(experts.first_proj_bias[expert], [bias[neurons] for bias in biases if bias is not None])
    if experts.down_proj_bias is not None and dense.down_bias is not None:
        experts.down_proj_bias[expert].copy_(dense.down_bias)


@torch.no_grad()
def write(target: Tensor, parts: Iterable[Tensor]) -> None:
    """Copies tensors one after the other into the rows of another, without a copy of them all in between."""
    start = 0
    for part in parts:
        target[start : start + len(part)].copy_(part)
        start += len(part)


def randn(shape: Iterable[int], generator: torch.Generator, like: Tensor) -> Tensor:
    """Standard normal numbers that are the same on every device and dtype."""
    return torch.randn(tuple(shape), generator=generator).to(like.device, like.dtype)


def gate_parameter(router: Router, num_experts: int) -> nn.Parameter | None:
    """The router's parameter with one row per expert; None if it has none."""
    gate = getattr(router, "gate", None)
    return gate if isinstance(gate, nn.Parameter) and gate.shape[0] == num_experts else None
