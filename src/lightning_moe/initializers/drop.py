"""Drop-upcycling: each expert forgets some neurons."""

from typing import Literal

import torch

from lightning_moe.experts import Experts
from lightning_moe.ffn import FFNWeights
from lightning_moe.initializers.base import ExpertInit, FFNStates, copy_neurons, randn
from lightning_moe.routers import Router


class DropInit(ExpertInit):
    """Makes every expert a copy of the dense FFN in which a fraction of the neurons is drawn anew.

    For each expert ``floor(ratio * F)`` neurons are chosen; their rows of the gate and up projections and their columns
    of the down projection become ``N(mean, std^2)``, with the mean and standard deviation of what they replace, each
    projection for itself. Two experts then have about ``(1 - ratio)^2`` in common: the cosine of their weights.

    Reference: Nakamura et al., *Drop-Upcycling: Training Sparse Mixture of Experts with Partial Re-initialization*,
    2025, equations 6 and 7, https://arxiv.org/abs/2502.19261.

    Args:
        ratio: fraction of the neurons, from 0 (copies) to 1; 0.5 is best in the paper.
        variant: ``"paper"`` chooses neurons, the same in all projections, and takes the statistics of the whole
            projection. ``"repo"`` does as the authors' code: it chooses for each projection anew, so that seven in
            eight neurons lose something at ``ratio=0.5``, and takes the statistics of the chosen rows.

    Raises:
        ValueError: if ``ratio`` is not from 0 to 1, or the variant is not known.

    Example:
        >>> DropInit(ratio=0.25).variant
        'paper'
    """

    def __init__(self, ratio: float = 0.5, variant: Literal["paper", "repo"] = "paper") -> None:
        if not 0 <= ratio <= 1:
            raise ValueError(f"ratio={ratio}: wanted a number from 0 to 1.")
        if variant not in ("paper", "repo"):
            raise ValueError(f"variant={variant!r}: wanted 'paper' or 'repo'.")
        self.ratio = ratio
        self.variant = variant

    def step_zero(self, router: Router) -> tuple[bool, str]:
        """Not the dense FFN, unless nothing is dropped."""
        return (True, "every expert is a copy") if self.ratio == 0 else super().step_zero(router)

    @torch.no_grad()
    def __call__(
        self,
        experts: Experts,
        dense: FFNWeights,
        generator: torch.Generator,
        states: FFNStates | None = None,
    ) -> None:
        """Copies the dense weights and draws the chosen neurons anew."""
        size = experts.expert_size
        num_dropped = int(self.ratio * size)
        for expert in range(experts.num_experts):
            copy_neurons(experts, expert, dense, slice(None))
            # views whose rows are neurons
            projections = (*experts.first_proj[expert].split(size), experts.down_proj[expert].t())
            chosen = torch.randperm(size, generator=generator)[:num_dropped]
            for weight in projections:
                if self.variant == "repo":
                    chosen = torch.randperm(size, generator=generator)[:num_dropped]
                rows = chosen.to(weight.device)
                source = (weight if self.variant == "paper" else weight[rows]).float()
                if num_dropped:
                    drawn = randn((num_dropped, weight.shape[1]), generator, source)
                    weight[rows] = (drawn * source.std() + source.mean()).to(weight.dtype)
