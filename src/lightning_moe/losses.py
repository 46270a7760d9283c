"""Balance losses: a `Routing` to a scalar, each a function and a thin module around it.

Each takes one layer by itself, leaves padding out, and counts every chosen slot. The scope is the micro-batch: the
tokens of one forward on one rank.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lightning_moe.routing import Routing, expert_load


def load_balancing_loss(routing: Routing) -> Float[Tensor, ""]:
    """How far the load is from even, with a gradient to the router: ``E * sum_e f_e * P_e``.

    ``f_e`` is the fraction of the assignments that go to expert e, all K slots counted; ``P_e`` is the mean over the
    tokens of the score of e, scores scaled to sum to one per token. 1 when routing is uniform, up to E / K when it has
    collapsed on K experts.

    Reference: Fedus et al., *Switch Transformers*, 2021, equations 4 to 6, https://arxiv.org/abs/2101.03961. Differs
    from it: ``f`` counts all K slots and is divided by K, so that the balanced value is 1 for every K.

    Args:
        routing: the routing of one layer.

    Example:
        >>> logits = torch.zeros(4, 4)
        >>> even = Routing(torch.arange(4), torch.arange(4), torch.ones(4), logits, logits.softmax(-1), top_k=1)
        >>> load_balancing_loss(even)
        tensor(1.)
    """
    load = expert_load(routing)
    fraction = load / load.sum().clamp(min=1)
    scores = _without_padding(routing.scores, routing.token_mask)
    scores = scores / scores.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return routing.num_experts * (fraction * _masked_mean(scores, routing.token_mask)).sum()


def z_loss(routing: Routing) -> Float[Tensor, ""]:
    """Keeps the router's logits small: the mean over the tokens of ``logsumexp(logits)^2``.

    Reference: Zoph et al., *ST-MoE*, 2022, equation 5, https://arxiv.org/abs/2202.08906. It is no balance measure: its
    value with zero logits is ``log(E)^2``.

    Args:
        routing: the routing of one layer.

    Example:
        >>> logits = torch.zeros(4, 1)
        >>> z_loss(Routing(torch.arange(4), torch.zeros(4, dtype=torch.int64), torch.ones(4), logits, logits + 1))
        tensor(0.)
    """
    logits = _without_padding(routing.logits, routing.token_mask)
    return _masked_mean(logits.logsumexp(dim=-1).square().unsqueeze(-1), routing.token_mask).squeeze()


def _without_padding(values: Float[Tensor, "T E"], mask: Bool[Tensor, " T"] | None) -> Float[Tensor, "T E"]:
    # before any function of them: behind it the gradient of a padding row of inf or nan is 0 * nan
    return values if mask is None else values.masked_fill(~mask.unsqueeze(-1), 0)


def _masked_mean(values: Float[Tensor, "T X"], mask: Bool[Tensor, " T"] | None) -> Float[Tensor, " X"]:
    if mask is None:
        return values.sum(0) / max(values.shape[0], 1)
    # where and not a product: a padding row may hold inf or nan
    kept = torch.where(mask.unsqueeze(-1), values, torch.zeros((), dtype=values.dtype, device=values.device))
    return kept.sum(0) / mask.sum().clamp(min=1)


class BalanceLoss(nn.Module, ABC):
    """A loss on the routing of one layer, with the coefficient by which it enters training.

    Args:
        coefficient: factor before the loss in the total, per layer: the total has the sum over the layers.
    """

    name: ClassVar[str]
    """The name it is logged under."""

    def __init__(self, coefficient: float) -> None:
        super().__init__()
        if coefficient < 0:
            raise ValueError(
                f"{type(self).__name__}: coefficient={coefficient}, wanted >= 0. Leave the loss out to turn it off."
            )
        self.coefficient = coefficient

    @abstractmethod
    def forward(self, routing: Routing) -> Float[Tensor, ""]:
        """Computes the loss of one layer, without the coefficient."""

    def extra_repr(self) -> str:
        """The coefficient, for ``print(model)``."""
        return f"coefficient={self.coefficient}"


class LoadBalancingLoss(BalanceLoss):
    """`load_balancing_loss` with a coefficient.

    Args:
        coefficient: factor before the loss; 1e-2 in Switch and OLMoE.
    """

    name = "load_balancing_loss"

    def __init__(self, coefficient: float = 0.01) -> None:
        super().__init__(coefficient)

    def forward(self, routing: Routing) -> Float[Tensor, ""]:
        """See `load_balancing_loss`."""
        return load_balancing_loss(routing)


class ZLoss(BalanceLoss):
    """`z_loss` with a coefficient.

    Args:
        coefficient: factor before the loss; 1e-3 in ST-MoE.
    """

    name = "z_loss"

    def __init__(self, coefficient: float = 0.001) -> None:
        super().__init__(coefficient)

    def forward(self, routing: Routing) -> Float[Tensor, ""]:
        """See `z_loss`."""
        return z_loss(routing)


BALANCE_LOSSES: tuple[type[BalanceLoss], ...] = (LoadBalancingLoss, ZLoss)
