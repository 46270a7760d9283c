"""How much two routings of the same tokens agree: of two checkpoints, two steps, two seeds."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lightning_moe.metrics.base import Ratio
from lightning_moe.metrics.selection import chosen_choices, real_tokens
from lightning_moe.routing import Routing


def routing_overlap(
    routing: Routing, reference: Routing, top_k: int | None = None
) -> tuple[Float[Tensor, " T"], Bool[Tensor, " T"]]:
    """Each token's ``|A & B| / max(|A|, |B|)``, of the sets A and B of columns that it chose in two routings.

    Args:
        routing: the routing of one layer.
        reference: another routing of the same tokens.
        top_k: compares only so many of a token's columns, those with its highest scores; None compares all.

    Returns:
        The overlap of each token, and which tokens have one: padding, and tokens that chose nothing twice, have none.

    Raises:
        ValueError: if the two differ in their tokens or columns.

    Example:
        >>> first, second = (
        ...     Routing(torch.tensor([0, 0]), torch.tensor(ids), torch.ones(2), *torch.zeros(2, 1, 3), top_k=2)
        ...     for ids in ([0, 1], [1, 2])
        ... )
        >>> routing_overlap(first, second)
        (tensor([0.5000]), tensor([True]))
    """
    if routing.logits.shape != reference.logits.shape:
        raise ValueError(
            f"The routing is of {routing.num_tokens} tokens and {routing.num_choices} columns, the reference of "
            f"{reference.num_tokens} and {reference.num_choices}; route the same tokens with both."
        )
    chosen, before = chosen_choices(routing, top_k), chosen_choices(reference, top_k)
    size = torch.maximum(chosen.sum(-1), before.sum(-1))
    counts = (size > 0) & real_tokens(routing) & real_tokens(reference)
    return torch.where(counts, (chosen & before).sum(-1) / size.clamp(min=1), 0), counts


class RouterSaturation(Ratio):
    """Mean share of a token's experts that are those of the reference already: ``|A & B| / k``, of sets.

    The order of a token's experts means nothing. Where tokens have different numbers of experts, k is the larger of the
    two. With several columns for one expert the columns are compared, and what is no FFN counts like any other.

    Reference: Muennighoff et al., *OLMoE*, 2024, section 5.1, https://arxiv.org/abs/2409.02060. The reference is the
    last checkpoint there.

    Args:
        top_k: compares only so many of a token's experts, those with its highest scores; None compares all, 1 is the
            paper's top-1 version.

    Example:
        >>> first, second = (
        ...     Routing(torch.tensor([0, 0]), torch.tensor(ids), torch.ones(2), *torch.zeros(2, 1, 3), top_k=2)
        ...     for ids in ([0, 1], [1, 2])
        ... )
        >>> RouterSaturation()(first, second)
        tensor(0.5000)
    """

    def __init__(self, top_k: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.top_k = top_k

    def update(self, routing: Routing, reference: Routing) -> None:
        """Adds two routings of the same tokens by one layer."""
        self._add(*routing_overlap(routing, reference, self.top_k))


class RoutingChangeRate(RouterSaturation):
    """Mean share of a token's experts that are not those of the reference: ``1 - |A & B| / k``, of sets.

    The reference is the checkpoint or step before; else this is 1 - `RouterSaturation`.

    Reference: Dai et al., *StableMoE*, 2022, https://arxiv.org/abs/2204.08396; Nguyen et al., *LibMoE*, 2024,
    https://arxiv.org/abs/2411.00918.

    Args:
        top_k: compares only so many of a token's experts, those with its highest scores; None compares all.

    Example:
        >>> first, second = (
        ...     Routing(torch.tensor([0, 0]), torch.tensor(ids), torch.ones(2), *torch.zeros(2, 1, 3), top_k=2)
        ...     for ids in ([0, 1], [1, 0])
        ... )
        >>> RoutingChangeRate()(first, second)
        tensor(0.)
    """

    def update(self, routing: Routing, reference: Routing) -> None:
        """Adds two routings of the same tokens by one layer."""
        overlap, counts = routing_overlap(routing, reference, self.top_k)
        self._add(torch.where(counts, 1 - overlap, 0), counts)
