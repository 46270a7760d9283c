"""Splitting: the dense FFN's neurons are shared out, nothing is added."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from lightning_moe.experts import Experts
from lightning_moe.ffn import FFNWeights
from lightning_moe.initializers.base import ExpertInit, copy_neurons
from lightning_moe.routers import Router
from lightning_moe.routers.base_layer import assign_evenly

_METHODS = ("random", "kmeans", "activation")


class SplitInit(ExpertInit):
    """Shares the dense FFN's neurons out among the experts: each is an E-th as wide, and the parameters stay as many.

    ``"random"`` deals the neurons out. ``"kmeans"`` puts neurons with similar input weights together, by k-means with
    clusters of equal size. ``"activation"`` puts neurons together that are active on the same tokens of a calibration
    batch, by the same k-means on their activations.

    The experts of a token are multiplied by E / K, which keeps the size of the output. What the token's other neurons
    would have computed is missing: step 0 is not the dense model unless K = E.

    Reference: Zhu et al., *LLaMA-MoE*, 2024, https://arxiv.org/abs/2406.16554, where the random split is reported best
    after training; Zhang et al., *MoEfication*, 2021, https://arxiv.org/abs/2110.01786, for clusters of neurons and of
    activations.

    Args:
        method: how neurons are put together.
        num_iterations: iterations of k-means.

    Raises:
        ValueError: if the method is not known; at `upcycle`, if the number of experts does not divide the FFN's width.

    Example:
        >>> SplitInit().expert_size(1536, num_experts=8)
        192
    """

    def __init__(self, method: Literal["random", "kmeans", "activation"] = "random", num_iterations: int = 10) -> None:
        if method not in _METHODS:
            raise ValueError(f"method={method!r}: wanted one of {', '.join(_METHODS)}.")
        self.method = method
        self.num_iterations = num_iterations

    @property
    def needs_inputs(self) -> bool:  # type: ignore[override]
        """Only by activation."""
        return self.method == "activation"

    def expert_size(self, dense_size: int, num_experts: int) -> int:
        """An E-th of the dense width."""
        if dense_size % num_experts:
            raise ValueError(f"num_experts={num_experts} does not divide the FFN's width, {dense_size}.")
        return dense_size // num_experts

    def output_scale(self, weights_sum: float, num_experts: int, experts_per_token: float) -> float:
        """``E / weights_sum``: with equal weights, E / K of a token's experts summed."""
        return num_experts / weights_sum

    def step_zero(self, router: Router) -> tuple[bool, str]:
        """Every expert has neurons of its own, so all of them are needed."""
        return False, "each expert has a part of the dense FFN's neurons, and a token has not all experts"

    @torch.no_grad()
    def __call__(
        self,
        experts: Experts,
        dense: FFNWeights,
        generator: torch.Generator,
        inputs: Float[Tensor, "T D"] | None = None,
    ) -> None:
        """Puts the neurons into groups of equal size and each group into an expert."""
        groups = torch.randperm(dense.expert_size, generator=generator)
        if self.method != "random":
            features = self._features(dense, inputs)
            groups = balanced_kmeans(features, experts.num_experts, self.num_iterations, generator).argsort(stable=True)
        for expert, neurons in enumerate(groups.to(dense.up.device).split(experts.expert_size)):
            copy_neurons(experts, expert, dense, neurons)
        if experts.down_proj_bias is not None:
            experts.down_proj_bias.data.div_(experts.num_experts)

    def _features(self, dense: FFNWeights, inputs: Float[Tensor, "T D"] | None) -> Float[Tensor, "F X"]:
        if self.method == "kmeans":
            return F.normalize((dense.up if dense.gate is None else dense.gate).float(), dim=1)
        assert inputs is not None
        return F.normalize(dense.hidden(inputs.to(dense.up.dtype)).float().t(), dim=1)


def balanced_kmeans(
    points: Float[Tensor, "R X"], num_clusters: int, num_iterations: int, generator: torch.Generator
) -> Int[Tensor, " R"]:
    """Clusters points into clusters of equal size.

    Each iteration assigns the points to the centres by the best balanced assignment (of the distances squared), then
    moves the centres to the means.

    Args:
        points: as many as a multiple of ``num_clusters``.
        num_clusters: number of clusters.
        num_iterations: iterations.
        generator: draws the first centres from the points.

    Returns:
        The cluster of each point.
    """
    first = torch.randperm(len(points), generator=generator)[:num_clusters].to(points.device)
    centres = points[first]
    clusters = torch.zeros(len(points), dtype=torch.int64, device=points.device)
    for _ in range(num_iterations):
        clusters = assign_evenly(-torch.cdist(points, centres).square(), tolerance=1e-3)
        sums = torch.zeros_like(centres).index_add_(0, clusters, points)
        centres = sums / (len(points) / num_clusters)
    return clusters
