"""A dense FFN that is shared, beside experts that add nothing yet."""

import torch

from lightning_moe.experts import Experts
from lightning_moe.ffn import FFNWeights
from lightning_moe.initializers.base import ExpertInit, FFNStates, copy_neurons
from lightning_moe.routers import Router


class ZeroOutputInit(ExpertInit):
    """Leaves the dense FFN's work to the shared experts; the others are copies whose down projection is zero.

    Step 0 is exactly the dense model, whatever the router does: also with weights that do not sum to one, and with
    experts that choose their tokens. In the first step only the down projections get a gradient, as the B of a LoRA.
    It wants shared experts; of several, each has its share of the output.

    Reference: the layout is that of Granite's shared MoE, where it is exact,
    https://huggingface.co/docs/transformers/model_doc/granitemoeshared; the zero is that of Hu et al., *LoRA*, 2021,
    https://arxiv.org/abs/2106.09685.

    Raises:
        ValueError: at `upcycle`, if ``num_shared_experts`` is 0.

    Example:
        >>> ZeroOutputInit().scales(1.0, num_experts=8, num_shared=2)
        (1.0, 0.5)
    """

    routes_nothing = True

    def expert_size(self, dense_size: int, num_experts: int, num_shared: int = 0) -> int:
        """The dense width."""
        if num_shared < 1:
            raise ValueError(
                "ZeroOutputInit leaves the work to shared experts, and there are none; set num_shared_experts=1."
            )
        return dense_size

    def scales(self, weights_sum: float, num_experts: int, num_shared: int) -> tuple[float, float]:
        """The shared experts alone are the dense FFN."""
        return 1.0, 1 / num_shared

    def step_zero(self, router: Router) -> tuple[bool, str]:
        """The others add zero."""
        return True, "the shared experts are the dense FFN and the others add zero"

    @torch.no_grad()
    def __call__(
        self,
        experts: Experts,
        dense: FFNWeights,
        generator: torch.Generator,
        states: FFNStates | None = None,
    ) -> None:
        """Copies the dense weights, but for the down projection."""
        for expert in range(experts.num_experts):
            copy_neurons(experts, expert, dense, slice(None))
        experts.down_proj.zero_()
        if experts.down_proj_bias is not None:
            experts.down_proj_bias.zero_()
