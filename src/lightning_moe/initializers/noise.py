"""Copies with noise: experts that differ a little from the first step."""

import torch

from lightning_moe.checks import check_not_negative
from lightning_moe.experts import Experts
from lightning_moe.ffn import FFNWeights
from lightning_moe.initializers.base import ExpertInit, FFNStates, copy_neurons, randn
from lightning_moe.routers import Router


class NoiseInit(ExpertInit):
    """Makes every expert a copy of the dense FFN with noise on its projections; biases stay as they are.

    Additive: ``W + e`` with ``e ~ N(0, (std * s)^2)``, s being the standard deviation of W, on a ``fraction`` of the
    entries drawn for each expert. With ``replace`` these entries become noise altogether: ``e ~ N(0, std^2)`` in place
    of W.

    Reference: Komatsuzaki et al., *Sparse Upcycling*, 2022, section 4.2.2, https://arxiv.org/abs/2212.05055, for added
    noise; Muennighoff et al., *OLMoE*, 2024, https://arxiv.org/abs/2409.02060, for replaced entries, with
    ``fraction=0.5, std=0.02``. Both report no gain, or a small one.

    Args:
        std: standard deviation of the noise; relative to that of the weight, with ``replace`` absolute.
        fraction: fraction of the entries that get it, in (0, 1].
        replace: whether the noise takes the place of an entry or is added to it.

    Raises:
        ValueError: if ``std`` is negative or not finite, or ``fraction`` not in (0, 1].

    Example:
        >>> NoiseInit(std=0.02, fraction=0.5, replace=True).fraction
        0.5
    """

    def __init__(self, std: float = 0.1, fraction: float = 1.0, replace: bool = False) -> None:
        check_not_negative(std=std)
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction={fraction}: wanted a number above 0 and up to 1.")
        self.std = std
        self.fraction = fraction
        self.replace = replace

    def step_zero(self, router: Router) -> tuple[bool, str]:
        """Not the dense FFN, unless the noise is none."""
        return (True, "every expert is a copy") if self.std == 0 and not self.replace else super().step_zero(router)

    @torch.no_grad()
    def __call__(
        self,
        experts: Experts,
        dense: FFNWeights,
        generator: torch.Generator,
        states: FFNStates | None = None,
    ) -> None:
        """Copies the dense weights and disturbs them, one expert and one projection after the other."""
        for expert in range(experts.num_experts):
            copy_neurons(experts, expert, dense, slice(None))
            for weight in (*experts.first_proj[expert].split(dense.expert_size), experts.down_proj[expert]):
                noise = randn(weight.shape, generator, weight)
                hit = torch.rand(weight.shape, generator=generator).to(weight.device) < self.fraction
                if self.replace:
                    weight.copy_(torch.where(hit, noise * self.std, weight))
                else:
                    weight.add_(torch.where(hit, noise * (self.std * weight.float().std().to(weight.dtype)), 0))
