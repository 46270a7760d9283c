"""A sum over a sum, which is what every mean is."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_moe.routing import Routing


class Ratio(Metric):
    """One sum divided by another, each taken over all updates and ranks; 0 where nothing was counted."""

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def _add(self, values: Tensor, counts: Tensor) -> None:
        # detached, because `forward`, unlike `update`, runs with gradients
        self.total += values.detach().to(torch.float64).sum()
        self.count += counts.detach().to(torch.float64).sum()

    def compute(self) -> Tensor:
        """Returns the ratio in float32."""
        return (self.total / self.count.clamp(min=1)).to(torch.float32)


class RoutingRatio(Ratio):
    """A `Ratio` whose two sums come from a `Routing` alone."""

    def update(self, routing: Routing) -> None:
        """Adds one forward of one layer."""
        self._add(*self._parts(routing))

    @abstractmethod
    def _parts(self, routing: Routing) -> tuple[Tensor, Tensor]:
        # what is summed above, and below; of any shape
        ...
