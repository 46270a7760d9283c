"""What each token chose: a routing's rows as sets, in which neither order nor repetition counts."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lightning_moe.routing import Routing


def real_tokens(routing: Routing) -> Bool[Tensor, " T"]:
    """Marks the tokens that are no padding.

    Example:
        >>> real_tokens(Routing(torch.arange(2), torch.arange(2), torch.ones(2), *torch.zeros(2, 2, 3)))
        tensor([True, True])
    """
    if routing.token_mask is None:
        return torch.ones(routing.num_tokens, dtype=torch.bool, device=routing.logits.device)
    return routing.token_mask


def chosen_choices(routing: Routing, top_k: int | None = None) -> Bool[Tensor, "T choices"]:
    """Marks each real token's chosen columns; what is dropped was chosen, what is for a gradient only was not.

    Args:
        routing: the routing of one layer.
        top_k: keeps only so many of a token's columns, those with its highest scores, the first of equals; None
            keeps all.

    Example:
        >>> rows = torch.tensor([0, 0]), torch.tensor([2, 0]), torch.ones(2)
        >>> routing = Routing(*rows, *torch.arange(6.0).view(2, 1, 3))
        >>> chosen_choices(routing), chosen_choices(routing, top_k=1)
        (tensor([[ True, False,  True]]), tensor([[False, False,  True]]))
    """
    chosen = _sets(routing, _choice_ids(routing), routing.num_choices)
    if top_k is None:
        return chosen
    scores = routing.scores.masked_fill(~chosen, -torch.inf)
    # a stable sort, because topk breaks ties as it likes, and a fixed router's scores are all alike
    best = scores.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    return torch.zeros_like(chosen).scatter_(1, best, True) & chosen


def chosen_experts(routing: Routing, top_k: int | None = None) -> Bool[Tensor, "T E"]:
    """Marks each real token's chosen experts, as `chosen_choices` does its columns; what is no FFN is left out.

    Example:
        >>> rows = torch.tensor([0, 0]), torch.tensor([2, 0]), torch.ones(2)
        >>> chosen_experts(Routing(*rows, *torch.zeros(2, 1, 3), num_ffn_experts=2))
        tensor([[ True, False]])
    """
    # one place more, for all that is no FFN
    num_places = routing.num_experts + 1
    kept = None
    if top_k is not None:
        kept = chosen_choices(routing, top_k)[routing.token_ids, _choice_ids(routing)]
    return _sets(routing, routing.expert_ids.clamp(max=routing.num_experts), num_places, kept)[:, :-1]


def _choice_ids(routing: Routing) -> Int[Tensor, " N"]:
    return routing.expert_ids if routing.choice_ids is None else routing.choice_ids


def _sets(
    routing: Routing, columns: Int[Tensor, " N"], num_columns: int, kept: Bool[Tensor, " N"] | None = None
) -> Bool[Tensor, "T _"]:
    counted = routing.counted()
    if kept is not None:
        counted = counted * kept
    # adding, and not writing: of two rows for one place the last written may be one that does not count
    sums = counted.new_zeros(routing.num_tokens * num_columns)
    return sums.index_add_(0, routing.token_ids * num_columns + columns, counted).view(-1, num_columns) > 0
