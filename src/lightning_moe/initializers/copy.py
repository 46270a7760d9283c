"""Sparse upcycling: every expert is a copy."""

import torch

from lightning_moe.experts import Experts
from lightning_moe.ffn import FFNWeights
from lightning_moe.initializers.base import ExpertInit, FFNStates, copy_neurons


class CopyInit(ExpertInit):
    """Makes every expert a copy of the dense FFN: plain sparse upcycling.

    The experts then differ only by the tokens they see. Step 0 is exactly the dense model where the router's weights
    sum to the same for every token.

    Reference: Komatsuzaki et al., *Sparse Upcycling*, 2022, https://arxiv.org/abs/2212.05055.

    Example:
        >>> CopyInit().copies_dense
        True
    """

    copies_dense = True

    def __call__(
        self,
        experts: Experts,
        dense: FFNWeights,
        generator: torch.Generator,
        states: FFNStates | None = None,
    ) -> None:
        """Copies the dense weights into every expert; nothing is random."""
        for expert in range(experts.num_experts):
            copy_neurons(experts, expert, dense, slice(None))
