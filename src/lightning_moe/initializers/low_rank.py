"""Low-rank upcycling: one frozen dense FFN, and small changes of it."""

from functools import partial

import torch

from lightning_moe.experts import Experts
from lightning_moe.ffn import FFNWeights
from lightning_moe.initializers.base import ExpertInit, FFNStates, copy_neurons, experts_like
from lightning_moe.low_rank import LowRankExperts, check_rank


class LowRankInit(ExpertInit):
    """Lets all experts share the dense FFN, frozen, and gives each a low-rank change of it: ``W + (alpha / rank) B A``.

    A is drawn, B is zero, so step 0 is exactly the dense model where that of copies is. A layer is larger by the
    changes only, and one token costs little more than the dense FFN: what is shared is computed once a token, not once
    an expert. See `LowRankExperts`.

    Only A, B and the router train, also where the dense FFN was frozen before. Shared experts are ordinary copies.

    Reference: Li et al., *MixLoRA*, 2024, https://arxiv.org/abs/2404.15159; Hu et al., *LoRA*, 2021,
    https://arxiv.org/abs/2106.09685.

    Args:
        rank: of the changes, 1 or more; a multiple of 8 suits the kernels.
        alpha: the changes are multiplied by ``alpha / rank``; None is ``rank``, a factor of one.

    Raises:
        ValueError: if one of them is not above 0.

    Example:
        >>> LowRankInit(rank=16).copies_dense
        True
    """

    copies_dense = True

    def __init__(self, rank: int = 8, alpha: float | None = None) -> None:
        check_rank(rank, alpha)
        self.rank = rank
        self.alpha = alpha

    def new_experts(self, num_experts: int, expert_size: int, dense: FFNWeights) -> Experts:
        """Makes experts that share one FFN."""
        kind = partial(LowRankExperts, rank=self.rank, alpha=self.alpha)
        return experts_like(dense, num_experts, expert_size, kind)

    @torch.no_grad()
    def __call__(
        self,
        experts: Experts,
        dense: FFNWeights,
        generator: torch.Generator,
        states: FFNStates | None = None,
    ) -> None:
        """Copies the dense FFN once and draws the experts' A."""
        assert isinstance(experts, LowRankExperts)
        copy_neurons(experts, 0, dense, slice(None))
        experts.reset_low_rank(generator)
