"""Virtual-group upcycling: many small experts that together are the dense FFN."""

import torch

from lightning_moe.checks import check_whole
from lightning_moe.experts import Experts
from lightning_moe.ffn import FFNWeights
from lightning_moe.initializers.base import ExpertInit, FFNStates, copy_neurons, gate_parameter, weighs_groups_evenly
from lightning_moe.routers import Router


class GranularInit(ExpertInit):
    """Cuts the dense FFN into ``granularity`` shards and makes C = E / granularity copies of each.

    Expert ``c * G + g`` is shard g of copy c, a G-th as wide as the dense FFN. The router's rows are equal within a
    copy, so a token chooses whole copies at step 0: with ``top_k`` a multiple of G it computes the dense FFN, exactly,
    as the whole factor that the shares of the weights make necessary goes into the down projection. In training the
    rows of a copy drift apart, and the shards become experts of their own.

    Reference: He et al., *Upcycling Large Language Models into Mixture of Experts*, 2024, section 3,
    https://arxiv.org/abs/2410.07524. Differs from it: there, the factor is spread over all projections by its root,
    which is exact for ReLU and squared ReLU only; for a SwiGLU it is off by 7 to 18 percent.

    Args:
        granularity: number of shards G; it must divide the number of experts and the FFN's width.

    Raises:
        ValueError: if ``granularity`` is below 1; at `upcycle`, if it divides one of these not, or if the router has no
            rows that could be made equal.

    Example:
        >>> GranularInit(granularity=2).expert_size(1536, num_experts=8)
        768
    """

    def __init__(self, granularity: int = 2) -> None:
        check_whole(granularity=granularity)
        self.granularity = granularity

    def expert_size(self, dense_size: int, num_experts: int, num_shared: int = 0) -> int:
        """A G-th of the dense width."""
        for what, number in (("the FFN's width", dense_size), ("num_experts", num_experts)):
            if number % self.granularity:
                raise ValueError(
                    f"granularity={self.granularity} does not divide {what}, {number}; choose a divisor of both."
                )
        return dense_size // self.granularity

    def scales(self, weights_sum: float, num_experts: int, num_shared: int) -> tuple[float, float]:
        """G times that of copies: a token's weights are shared out over the shards of a copy."""
        routed, shared = super().scales(weights_sum, num_experts, num_shared)
        return self.granularity * routed, shared

    @torch.no_grad()
    def init_router(self, router: Router, generator: torch.Generator) -> None:
        """Gives the rows of each copy the values of its first."""
        gate = gate_parameter(router, router.num_experts)
        if gate is None:
            raise ValueError(
                f"GranularInit ties the router's rows, and {type(router).__name__} has not one row per expert. Take "
                "TopKRouter, SigmoidRouter, LossFreeRouter or a cosine router."
            )
        gate.copy_(gate[:: self.granularity].repeat_interleave(self.granularity, dim=0))

    def step_zero(self, router: Router) -> tuple[bool, str]:
        """Asks the router, on random tokens, whether whole copies are chosen, with equal weights."""
        G, top_k = self.granularity, getattr(router, "top_k", None)
        if top_k is None or top_k % G:
            return False, f"a token's top_k={top_k} experts are not whole copies of granularity={G} shards"
        if not weighs_groups_evenly(router, G):
            return False, f"{type(router).__name__} does not choose the {G} shards of a copy together"
        return True, f"a token chooses whole copies of {G} shards"

    def __call__(
        self,
        experts: Experts,
        dense: FFNWeights,
        generator: torch.Generator,
        states: FFNStates | None = None,
    ) -> None:
        """Copies each shard to its places; of the down projection's bias each shard has its part."""
        size, G = experts.expert_size, self.granularity
        for expert in range(experts.num_experts):
            shard = expert % G
            copy_neurons(experts, expert, dense, slice(shard * size, (shard + 1) * size))
        if experts.down_proj_bias is not None:
            experts.down_proj_bias.data.div_(G)
