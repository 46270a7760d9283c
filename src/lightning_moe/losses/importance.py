"""Shazeer's pair: the experts' importance and their load, both with a gradient."""

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_moe.losses.base import BalanceLoss
from lightning_moe.routing import Routing


def _one_plus_squared_variation(values: Float[Tensor, " choices"]) -> Float[Tensor, ""]:
    # 1 + (std / mean)^2 = n * sum of squares / square of the sum
    tiny = torch.finfo(values.dtype).tiny
    return len(values) * values.square().sum() / values.sum().square().clamp(min=tiny)


class ImportanceLoss(BalanceLoss):
    """How unevenly the combine weights are shared out: ``1 + CV(importance)^2``.

    ``importance_e`` is the sum of the combine weights that expert e gets, CV the standard deviation over the mean.

    Reference: Shazeer et al., *Outrageously Large Neural Networks*, 2017, equations 6 and 7,
    https://arxiv.org/abs/1701.06538. Differs from it by the 1, which makes the balanced value that of all our losses.

    Args:
        coefficient: factor before the loss; 0.1 in the paper.

    Example:
        >>> scores = torch.eye(2)
        >>> ImportanceLoss()(Routing(torch.arange(2), torch.tensor([0, 0]), torch.ones(2), scores, scores))
        tensor(2.)
    """

    name = "importance_loss"
    measures_balance = True

    def __init__(self, coefficient: float = 0.1) -> None:
        super().__init__(coefficient)

    def forward(self, routing: Routing) -> Float[Tensor, ""]:
        """Computes the loss of one layer."""
        ids = routing.expert_ids if routing.choice_ids is None else routing.choice_ids
        weights = torch.where(routing.counted() > 0, routing.weights, 0)
        return _one_plus_squared_variation(weights.new_zeros(routing.num_choices).index_add_(0, ids, weights))


class LoadLoss(BalanceLoss):
    """How unevenly the expected load is shared out: ``1 + CV(expected_load)^2``.

    The expected load is `NoisyTopKRouter`'s: for each expert, the sum over the tokens of the probability that it would
    be chosen if the token's noise on this expert were drawn anew. Unlike the load itself it has a gradient.

    Reference: Shazeer et al., *Outrageously Large Neural Networks*, 2017, appendix A,
    https://arxiv.org/abs/1701.06538. Differs from it by the 1, which makes the balanced value that of all our losses.

    Args:
        coefficient: factor before the loss; 0.1 in the paper.

    Raises:
        ValueError: at the first forward, if the router estimates no load.

    Example:
        >>> none = torch.zeros(0).long()
        >>> routing = Routing(none, none, torch.zeros(0), *torch.zeros(2, 0, 2), expected_load=torch.tensor([3.0, 1.0]))
        >>> LoadLoss()(routing)  # standard deviation 1, mean 2
        tensor(1.2500)
    """

    name = "load_loss"
    measures_balance = True

    def __init__(self, coefficient: float = 0.1) -> None:
        super().__init__(coefficient)

    def forward(self, routing: Routing) -> Float[Tensor, ""]:
        """Computes the loss of one layer."""
        if routing.expected_load is None:
            raise ValueError(
                "LoadLoss needs a router that estimates its load from its noise, as NoisyTopKRouter does. Take that "
                "router, or ImportanceLoss or LoadBalancingLoss."
            )
        return _one_plus_squared_variation(routing.expected_load)
