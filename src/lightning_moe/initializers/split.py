"""Splitting: the dense FFN's neurons are shared out, nothing is added."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from lightning_moe.checks import check_whole
from lightning_moe.experts import Experts
from lightning_moe.ffn import FFNWeights
from lightning_moe.initializers.base import ExpertInit, FFNStates, copy_neurons, weighs_groups_evenly
from lightning_moe.routers import Router
from lightning_moe.routers.base_layer import assign_evenly

_METHODS = ("random", "kmeans", "activation", "gradient")


class SplitInit(ExpertInit):
    """Shares the dense FFN's neurons out among the experts, equally wide each, and the parameters stay as many.

    ``"random"`` deals the neurons out. ``"kmeans"`` puts neurons with similar input weights together, by k-means with
    clusters of equal size. ``"activation"`` puts neurons together that are active on the same tokens of a calibration
    batch, by the same k-means on their activations h. ``"gradient"`` puts neurons together that matter for the same
    tokens: k-means on ``h * dL/dh``, the change of the loss to first order if the neuron were silent.

    Shared experts get the neurons that matter most: with the largest mean ``|h|`` times the length of their column of
    the down projection (``"activation"``), or the largest mean ``|h * dL/dh|`` (``"gradient"``); else they are drawn.
    All E + S experts are then equally wide.

    The experts of a token are multiplied by E / K, which keeps the size of the output. What the token's other neurons
    would have computed is missing: step 0 is not the dense model, unless a token has all experts, with equal weights.

    Reference: Zhu et al., *LLaMA-MoE*, 2024, https://arxiv.org/abs/2406.16554, where the random split is reported best
    after training, and whose "sharing inter" keeps the most important neurons in a residual expert; Zhang et al.,
    *MoEfication*, 2021, https://arxiv.org/abs/2110.01786, for clusters of neurons and of activations. Differs from
    LLaMA-MoE: there, importance is summed over clusters of texts; here, a neuron is compared token by token.

    Args:
        method: how neurons are put together.
        num_iterations: iterations of k-means.

    Raises:
        ValueError: if the method is not known, or ``num_iterations`` is below 1; at `upcycle`, if the number of
            experts, shared ones included, does not divide the FFN's width, or if the loss on the calibration batches
            is no finite number.

    Example:
        >>> SplitInit().expert_size(1536, num_experts=8)
        192
    """

    def __init__(
        self, method: Literal["random", "kmeans", "activation", "gradient"] = "random", num_iterations: int = 10
    ) -> None:
        if method not in _METHODS:
            raise ValueError(f"method={method!r}: wanted one of {', '.join(_METHODS)}.")
        check_whole(num_iterations=num_iterations)
        self.method = method
        self.num_iterations = num_iterations

    @property
    def needs_inputs(self) -> bool:  # type: ignore[override]
        """Only by activation."""
        return self.method == "activation"

    @property
    def needs_saliency(self) -> bool:  # type: ignore[override]
        """Only by gradient."""
        return self.method == "gradient"

    def expert_size(self, dense_size: int, num_experts: int, num_shared: int = 0) -> int:
        """The dense width, shared out."""
        if dense_size % (num_experts + num_shared):
            what = f"num_experts={num_experts}" + (f" and {num_shared} shared, together," if num_shared else "")
            raise ValueError(
                f"{what} does not divide the FFN's width, {dense_size}; take numbers whose sum does, or DropInit, "
                "which shares nothing out."
            )
        return dense_size // (num_experts + num_shared)

    def shared_size(self, dense_size: int, num_experts: int, num_shared: int) -> int:
        """As of the others."""
        return self.expert_size(dense_size, num_experts, num_shared)

    def scales(self, weights_sum: float, num_experts: int, num_shared: int) -> tuple[float, float]:
        """``E / weights_sum``: with equal weights, E / K of a token's experts summed; shared ones as they are."""
        return num_experts / weights_sum, 1.0

    def step_zero(self, router: Router) -> tuple[bool, str]:
        """Every expert has neurons of its own: all of them are needed, with equal weights."""
        parts = "each expert has a part of the dense FFN's neurons"
        if router.experts_per_token < router.num_experts or router.uses_token_ids:
            return False, f"{parts}, and a token has not all experts"
        if not weighs_groups_evenly(router, router.num_experts):
            return False, f"{parts}, and {type(router).__name__} does not weigh them equally"
        return True, f"{parts}, a token has all of them with equal weights"

    @torch.no_grad()
    def __call__(
        self,
        experts: Experts,
        dense: FFNWeights,
        generator: torch.Generator,
        states: FFNStates | None = None,
    ) -> None:
        """Puts the neurons into groups of equal size and each group into an expert."""
        num_shared = dense.expert_size // experts.expert_size - experts.num_experts
        shared = self._shared_neurons(dense, num_shared * experts.expert_size, generator, states)
        taken = torch.zeros(dense.expert_size, dtype=torch.bool, device=shared.device)
        rest = taken.index_fill(0, shared, True).logical_not().nonzero().squeeze(1)
        if self.method == "random":
            order = torch.randperm(len(rest), generator=generator)
        else:
            features = self._features(dense, states)[rest.to(dense.up.device)]
            order = balanced_kmeans(features, experts.num_experts, self.num_iterations, generator).argsort(stable=True)
        neurons = rest[order.to(rest.device)].to(dense.up.device)
        for expert, group in enumerate(neurons.split(experts.expert_size)):
            copy_neurons(experts, expert, dense, group)
        if experts.down_proj_bias is not None:
            # of the weighted sum, scaled, this leaves the whole bias
            experts.down_proj_bias.data.div_(experts.num_experts)

    @torch.no_grad()
    def fill_shared(
        self, shared: Experts, dense: FFNWeights, generator: torch.Generator, states: FFNStates | None
    ) -> None:
        """Gives the shared experts the neurons that the others have not got; the bias is with the others."""
        neurons = self._shared_neurons(dense, shared.num_experts * shared.expert_size, generator, states)
        for expert, group in enumerate(neurons.to(dense.up.device).split(shared.expert_size)):
            copy_neurons(shared, expert, dense, group)
        if shared.down_proj_bias is not None:
            shared.down_proj_bias.zero_()

    def _shared_neurons(
        self, dense: FFNWeights, count: int, generator: torch.Generator, states: FFNStates | None
    ) -> Int[Tensor, " count"]:
        if count and self.method in ("activation", "gradient"):
            importance = self._effects(dense, states).abs().mean(0)
            if self.method == "activation":
                importance = importance * dense.down.float().norm(dim=0)
            return importance.topk(count).indices
        # the same for the shared and for the other experts, whatever has been drawn between
        own = torch.Generator().manual_seed(generator.initial_seed())
        return torch.randperm(dense.expert_size, generator=own)[:count]

    def _features(self, dense: FFNWeights, states: FFNStates | None) -> Float[Tensor, "F X"]:
        if self.method == "kmeans":
            return F.normalize((dense.up if dense.gate is None else dense.gate).float(), dim=1)
        return F.normalize(self._effects(dense, states).t(), dim=1)

    def _effects(self, dense: FFNWeights, states: FFNStates | None) -> Float[Tensor, "T F"]:
        # what each neuron does on each token
        assert states is not None
        if self.method == "activation":
            return dense.hidden(states.inputs.to(dense.up.dtype)).float()
        assert states.saliency is not None
        return states.saliency.float()


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
