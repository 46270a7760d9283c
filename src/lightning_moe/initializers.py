"""Dense FFN weights to expert weights."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch

from lightning_moe.experts import Experts
from lightning_moe.ffn import FFNWeights


class ExpertInit(ABC):
    """Fills the experts of one layer from the dense FFN that they replace.

    Every argument of ``__init__`` is kept unchanged under its own name.
    """

    copies_dense: ClassVar[bool]
    """Every expert computes exactly what the dense FFN does."""

    @abstractmethod
    def __call__(self, experts: Experts, dense: FFNWeights, generator: torch.Generator) -> None:
        """Writes the experts' parameters in place.

        Args:
            experts: uninitialised experts of the dense FFN's width.
            dense: the weights of the FFN that they replace.
            generator: the layer's own source of random numbers, on the CPU.
        """


class CopyInit(ExpertInit):
    """Makes every expert a copy of the dense FFN: plain sparse upcycling.

    The experts then differ only by the tokens they see. Step 0 is exactly the dense model where the router's weights
    sum to one.

    Reference: Komatsuzaki et al., *Sparse Upcycling*, 2022, https://arxiv.org/abs/2212.05055.

    Example:
        >>> CopyInit().copies_dense
        True
    """

    copies_dense = True

    @torch.no_grad()
    def __call__(self, experts: Experts, dense: FFNWeights, generator: torch.Generator) -> None:
        """Copies the dense weights into every expert; nothing is random."""
        # slice by slice into the stacked tensor: no stack of copies ever exists beside it
        first = [dense.up] if dense.gate is None else [dense.gate, dense.up]
        for expert in experts.first_proj.unbind(0):
            for part, source in zip(expert.split(dense.expert_size), first, strict=True):
                part.copy_(source)
        for expert in experts.down_proj.unbind(0):
            expert.copy_(dense.down)
        if experts.first_proj_bias is not None:
            biases = [dense.up_bias] if dense.gate is None else [dense.gate_bias, dense.up_bias]
            experts.first_proj_bias.copy_(torch.cat([b for b in biases if b is not None]))
        if experts.down_proj_bias is not None and dense.down_bias is not None:
            experts.down_proj_bias.copy_(dense.down_bias)


INITIALIZERS: tuple[type[ExpertInit], ...] = (CopyInit,)
