"""The expert load of many forwards, and what it comes to."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_moe.metrics.balance import (
    average_violation,
    coefficient_of_variation,
    effective_experts,
    gini_coefficient,
    load_entropy,
    load_imbalance,
    max_violation,
    min_violation,
    num_dead_experts,
    utilization_quantiles,
)
from lightning_moe.metrics.base import RoutingRatio
from lightning_moe.routing import Routing, expert_load


class ExpertLoad(Metric):
    """Tokens per expert over all updates and ranks, padding left out.

    What counts is the selection: a token that was dropped afterwards was chosen, and counts.

    Args:
        num_experts: number of experts E.

    Example:
        >>> metric = ExpertLoad(num_experts=3)
        >>> metric.update(Routing(torch.arange(2), torch.tensor([2, 2]), torch.ones(2), *torch.zeros(2, 2, 3)))
        >>> metric.compute()
        tensor([0., 0., 2.])
    """

    full_state_update = False
    load: Tensor

    def __init__(self, num_experts: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_experts = num_experts
        # float64 counts exactly up to 2^53 tokens, float32 only up to 2^24
        self.add_state("load", torch.zeros(num_experts, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, routing: Routing) -> None:
        """Adds the selections of one forward of one layer."""
        self.load += expert_load(routing)

    def compute(self) -> Tensor:
        """Returns the load (E,), or the measure of it that the class stands for, in float32."""
        return self._measure(self.load).to(torch.float32)

    def _measure(self, load: Tensor) -> Tensor:
        return load


class MaxViolation(ExpertLoad):
    """MaxVio_global: `max_violation` of the load over all updates and ranks.

    Example:
        >>> metric = MaxViolation(num_experts=2)
        >>> metric(Routing(torch.arange(2), torch.tensor([1, 1]), torch.ones(2), *torch.zeros(2, 2, 2)))
        tensor(1.)
    """

    def _measure(self, load: Tensor) -> Tensor:
        return max_violation(load)


class MinViolation(ExpertLoad):
    """`min_violation` of the load over all updates and ranks.

    Example:
        >>> metric = MinViolation(num_experts=2)
        >>> metric(Routing(torch.arange(2), torch.tensor([1, 1]), torch.ones(2), *torch.zeros(2, 2, 2)))
        tensor(1.)
    """

    def _measure(self, load: Tensor) -> Tensor:
        return min_violation(load)


class AverageViolation(ExpertLoad):
    """`average_violation` of the load over all updates and ranks.

    Example:
        >>> metric = AverageViolation(num_experts=2)
        >>> metric(Routing(torch.arange(2), torch.tensor([1, 1]), torch.ones(2), *torch.zeros(2, 2, 2)))
        tensor(1.)
    """

    def _measure(self, load: Tensor) -> Tensor:
        return average_violation(load)


class LoadImbalance(ExpertLoad):
    """`load_imbalance` of the load over all updates and ranks.

    Example:
        >>> metric = LoadImbalance(num_experts=2)
        >>> metric(Routing(torch.arange(2), torch.tensor([1, 1]), torch.ones(2), *torch.zeros(2, 2, 2)))
        tensor(2.)
    """

    def _measure(self, load: Tensor) -> Tensor:
        return load_imbalance(load)


class UtilizationQuantiles(ExpertLoad):
    """`utilization_quantiles` of the load over all updates and ranks.

    Args:
        num_experts: number of experts E.
        quantiles: fractions between 0 and 1, one number of the result for each.

    Example:
        >>> metric = UtilizationQuantiles(num_experts=2)
        >>> metric(Routing(torch.arange(2), torch.tensor([1, 1]), torch.ones(2), *torch.zeros(2, 2, 2)))
        tensor([0.5000, 1.0000, 1.5000])
    """

    def __init__(self, num_experts: int, quantiles: Sequence[float] = (0.25, 0.5, 0.75), **kwargs: Any) -> None:
        super().__init__(num_experts, **kwargs)
        self.quantiles = quantiles

    def _measure(self, load: Tensor) -> Tensor:
        return utilization_quantiles(load, self.quantiles)


class CoefficientOfVariation(ExpertLoad):
    """`coefficient_of_variation` of the load over all updates and ranks.

    Example:
        >>> metric = CoefficientOfVariation(num_experts=2)
        >>> metric(Routing(torch.arange(2), torch.tensor([1, 1]), torch.ones(2), *torch.zeros(2, 2, 2)))
        tensor(1.)
    """

    def _measure(self, load: Tensor) -> Tensor:
        return coefficient_of_variation(load)


class SquaredCoefficientOfVariation(ExpertLoad):
    """Square of the `coefficient_of_variation` of the load over all updates and ranks.

    Example:
        >>> metric = SquaredCoefficientOfVariation(num_experts=3)
        >>> metric(Routing(torch.arange(2), torch.tensor([1, 1]), torch.ones(2), *torch.zeros(2, 2, 3)))
        tensor(2.)
    """

    def _measure(self, load: Tensor) -> Tensor:
        return coefficient_of_variation(load).square()


class GiniCoefficient(ExpertLoad):
    """`gini_coefficient` of the load over all updates and ranks.

    Example:
        >>> metric = GiniCoefficient(num_experts=2)
        >>> metric(Routing(torch.arange(2), torch.tensor([1, 1]), torch.ones(2), *torch.zeros(2, 2, 2)))
        tensor(0.5000)
    """

    def _measure(self, load: Tensor) -> Tensor:
        return gini_coefficient(load)


class DeadExperts(ExpertLoad):
    """`num_dead_experts` of the load over all updates and ranks.

    Args:
        num_experts: number of experts E.
        threshold: fraction of the mean load up to which an expert is dead; 0 is no token at all.

    Example:
        >>> metric = DeadExperts(num_experts=2)
        >>> metric(Routing(torch.arange(2), torch.tensor([1, 1]), torch.ones(2), *torch.zeros(2, 2, 2)))
        tensor(1.)
    """

    def __init__(self, num_experts: int, threshold: float = 0.0, **kwargs: Any) -> None:
        super().__init__(num_experts, **kwargs)
        self.threshold = threshold

    def _measure(self, load: Tensor) -> Tensor:
        return num_dead_experts(load, self.threshold)


class LoadEntropy(ExpertLoad):
    """`load_entropy` of the load over all updates and ranks.

    Example:
        >>> metric = LoadEntropy(num_experts=2)
        >>> metric(Routing(torch.arange(2), torch.tensor([0, 1]), torch.ones(2), *torch.zeros(2, 2, 2)))
        tensor(1.)
    """

    def _measure(self, load: Tensor) -> Tensor:
        return load_entropy(load)


class EffectiveExperts(ExpertLoad):
    """`effective_experts` of the load over all updates and ranks.

    Example:
        >>> metric = EffectiveExperts(num_experts=3)
        >>> metric(Routing(torch.arange(2), torch.tensor([0, 1]), torch.ones(2), *torch.zeros(2, 2, 3)))
        tensor(2.)
    """

    def _measure(self, load: Tensor) -> Tensor:
        return effective_experts(load)


class BatchMaxViolation(RoutingRatio):
    """MaxVio_batch: the mean over the updates of each update's own `max_violation`.

    Each update on each rank is a batch of its own. Under data parallelism that is the rank's part of the global batch,
    whose load is never pooled here; small batches are uneven by chance alone, so compare equal batch sizes only. An
    update without a real token is no batch.

    Reference: Wang et al., *Auxiliary-Loss-Free Load Balancing*, 2024, https://arxiv.org/abs/2408.15664.

    Example:
        >>> metric = BatchMaxViolation()
        >>> for expert in (0, 1):
        ...     metric.update(Routing(torch.tensor([0]), torch.tensor([expert]), torch.ones(1), *torch.zeros(2, 1, 2)))
        >>> metric.compute()
        tensor(1.)
    """

    def _parts(self, routing: Routing) -> tuple[Tensor, Tensor]:
        load = expert_load(routing)
        counts = load.sum() > 0
        return torch.where(counts, max_violation(load), 0), counts
