"""Measures of routing: functions of the expert load, and torchmetrics over `Routing`.

The functions take a load of any shape (..., E), so that one call serves all layers.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric

from lightning_moe.routing import Routing, expert_load


def max_violation(load: Float[Tensor, "*L E"]) -> Float[Tensor, "*L"]:
    """MaxVio: ``max_e load_e / mean(load) - 1``. 0 is perfect balance, E - 1 all tokens on one expert.

    Reference: Wang et al., *Auxiliary-Loss-Free Load Balancing*, 2024, equation 4, https://arxiv.org/abs/2408.15664.

    Example:
        >>> max_violation(torch.tensor([4.0, 2.0, 1.0, 1.0]))
        tensor(1.)
    """
    return load.amax(-1) / _mean(load) - 1


def num_dead_experts(load: Float[Tensor, "*L E"], threshold: float = 0.0) -> Float[Tensor, "*L"]:
    """Experts with a load of at most ``threshold`` times the mean load.

    Args:
        load: tokens per expert.
        threshold: fraction of the mean load; 0 counts the experts that got no token at all.

    Example:
        >>> num_dead_experts(torch.tensor([4.0, 0.0, 1.0]))
        tensor(1.)
    """
    return (load <= threshold * _mean(load).unsqueeze(-1)).sum(-1).to(load.dtype)


def load_entropy(load: Float[Tensor, "*L E"]) -> Float[Tensor, "*L"]:
    """Entropy of the load as a fraction of its maximum: ``-sum_e f_e log f_e / log E``. 1 is perfect balance.

    Example:
        >>> load_entropy(torch.tensor([2.0, 2.0, 0.0, 0.0]))
        tensor(0.5000)
    """
    fraction = load / load.sum(-1, keepdim=True).clamp(min=torch.finfo(load.dtype).tiny)
    entropy = -torch.xlogy(fraction, fraction).sum(-1)
    return entropy / torch.log(torch.tensor(float(max(load.shape[-1], 2)), device=load.device))


def _mean(load: Tensor) -> Tensor:
    return load.mean(-1).clamp(min=torch.finfo(load.dtype).tiny)


class ExpertLoad(Metric):
    """Tokens per expert over all updates and ranks, padding left out.

    Args:
        num_experts: number of experts E.

    Example:
        >>> metric = ExpertLoad(num_experts=3)
        >>> metric.update(Routing(torch.arange(2), torch.tensor([2, 2]), torch.ones(2), *torch.zeros(2, 2, 3)))
        >>> metric.compute()
        tensor([0., 0., 2.])
    """

    full_state_update = False
    measure: ClassVar[Callable[..., Tensor] | None] = None
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
        measure = type(self).measure
        return (self.load if measure is None else measure(self.load)).to(torch.float32)


class MaxViolation(ExpertLoad):
    """`max_violation` of the load over all updates and ranks.

    Example:
        >>> metric = MaxViolation(num_experts=2)
        >>> metric.update(Routing(torch.arange(2), torch.tensor([1, 1]), torch.ones(2), *torch.zeros(2, 2, 2)))
        >>> metric.compute()
        tensor(1.)
    """

    measure = staticmethod(max_violation)


class DeadExperts(ExpertLoad):
    """`num_dead_experts` of the load over all updates and ranks.

    Example:
        >>> metric = DeadExperts(num_experts=2)
        >>> metric.update(Routing(torch.arange(2), torch.tensor([1, 1]), torch.ones(2), *torch.zeros(2, 2, 2)))
        >>> metric.compute()
        tensor(1.)
    """

    measure = staticmethod(num_dead_experts)


class LoadEntropy(ExpertLoad):
    """`load_entropy` of the load over all updates and ranks.

    Example:
        >>> metric = LoadEntropy(num_experts=2)
        >>> metric.update(Routing(torch.arange(2), torch.tensor([0, 1]), torch.ones(2), *torch.zeros(2, 2, 2)))
        >>> metric.compute()
        tensor(1.)
    """

    measure = staticmethod(load_entropy)


class RoutingEntropy(Metric):
    """Mean entropy of the tokens' normalised scores as a fraction of log E: 0 is a sure router, 1 an undecided one.

    Example:
        >>> metric = RoutingEntropy()
        >>> metric.update(Routing(torch.arange(2), torch.tensor([0, 1]), torch.ones(2), *torch.full((2, 2, 2), 0.5)))
        >>> metric.compute()
        tensor(1.)
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, routing: Routing) -> None:
        """Adds the tokens of one forward of one layer."""
        total, count = token_entropy(routing)
        self.total += total
        self.count += count

    def compute(self) -> Tensor:
        """Returns the mean over all tokens seen, in float32."""
        return (self.total / self.count.clamp(min=1)).to(torch.float32)


@torch.no_grad()
def token_entropy(routing: Routing) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Sums ``H(scores of a token) / log E`` over the tokens of a routing.

    Args:
        routing: the routing of one layer.

    Returns:
        The sum, and the number of tokens in it; padding left out.
    """
    entropy = load_entropy(routing.scores)
    if routing.token_mask is None:
        return entropy.sum(), torch.full_like(entropy.sum(), entropy.numel())
    return (entropy * routing.token_mask).sum(), routing.token_mask.sum().to(entropy.dtype)


ROUTING_METRICS: tuple[type[Metric], ...] = (ExpertLoad, MaxViolation, DeadExperts, LoadEntropy, RoutingEntropy)
