"""BASE routing: an optimal assignment of tokens to experts of equal load."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lightning_moe.checks import check_not_negative, check_positive
from lightning_moe.losses import BalanceLoss
from lightning_moe.routers.base import Normalize, TokenChoiceRouter, gate_logits, token_choice, unit_sum
from lightning_moe.routing import Routing
from lightning_moe.tokens import Tokens


class BASERouter(TokenChoiceRouter):
    """Assigns each token to one expert such that the load is even and the sum of the logits is the largest possible.

    In training ``assignment = argmax sum_t logits[t, assignment[t]]`` with at most ``ceil(T / E)`` tokens per expert,
    found by an auction that is off the optimum by at most ``tolerance`` times the spread of the logits, per token; in
    evaluation each token takes its best expert. The weight is ``sigmoid(logit)``.

    Which expert a token gets in training depends on all tokens of the batch, later ones included. In a causal language
    model that lets a little of the future leak; the causal alternative with an even load is `LossFreeRouter`.

    Reference: Lewis et al., *BASE Layers: Simplifying Training of Large, Sparse Models*, 2021, equation 1,
    https://arxiv.org/abs/2103.16716; the auction is that of Bertsekas and Castañon, *The Auction Algorithm for the
    Transportation Problem*, 1989. Differs from the first: the tokens of one rank are assigned, not those of all.

    Args:
        hidden_size: width D of the incoming hidden states.
        num_experts: number of experts E.
        normalize: False weighs with the sigmoid, as the paper; ``"straight_through"`` gives every token a weight of one
            and the sigmoid's gradient, so that step 0 of an upcycled model is the dense one.
        tolerance: how far a token's logit may be from its best, as a fraction of the spread of the logits.
        init_std: standard deviation of the gate's initial weights.

    Raises:
        ValueError: if ``normalize`` is True (the only weight is then always 1), or if a number is out of its range.

    Example:
        >>> router = BASERouter(hidden_size=8, num_experts=4)
        >>> torch.bincount(router(torch.randn(6, 8) + 3).expert_ids, minlength=4).max()
        tensor(2)
    """

    causal = False
    static_shapes = False

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        normalize: Normalize = False,
        tolerance: float = 1e-2,
        init_std: float = 0.02,
    ) -> None:
        if normalize is True:
            raise ValueError(
                "normalize=True: a token has one expert, whose weight would always be 1, and the router would never "
                'train. Set normalize=False, as the paper, or normalize="straight_through".'
            )
        super().__init__(hidden_size, num_experts, 1, normalize)
        check_positive(tolerance=tolerance)
        check_not_negative(init_std=init_std)
        self.tolerance = tolerance
        self.init_std = init_std
        self.gate = nn.Parameter(torch.randn(num_experts, hidden_size) * init_std)

    def balance_losses(self) -> list[BalanceLoss]:
        """None: the load is even by construction."""
        return []

    def forward(self, x: Float[Tensor, "T D"], tokens: Tokens | None = None) -> Routing:
        """Routes each token to one expert; N = T, in token order."""
        logits = gate_logits(x, self.gate)
        scores = logits.sigmoid()
        expert_ids = logits.argmax(-1)
        if self.training:
            mask = None if tokens is None else tokens.mask
            real = torch.arange(len(x), device=x.device) if mask is None else mask.nonzero().squeeze(1)
            assigned = assign_evenly(logits.detach().index_select(0, real), self.tolerance)
            expert_ids = expert_ids.index_copy(0, real, assigned)
        weights = unit_sum(scores.gather(1, expert_ids.unsqueeze(1)), self.normalize)
        return token_choice(logits, scores, expert_ids.unsqueeze(1), weights, tokens)


@torch.no_grad()
def assign_evenly(values: Float[Tensor, "T E"], tolerance: float) -> Int[Tensor, " T"]:
    """Assigns each row to a column such that the sum is the largest possible with ``ceil(T / E)`` rows per column.

    An auction: rows without a column bid for the one that is worth most to them at its price, as much as makes the
    second best equal; a column keeps its highest bids, and the lowest that it keeps is its price. At the end the sum
    falls short of the best by at most T times the least raise.

    Args:
        values: what each column is worth to each row; one that is not finite counts as 0.
        tolerance: the least raise, as a fraction of the spread of the values.

    Example:
        >>> assign_evenly(torch.tensor([[3.0, 0.0], [2.0, 1.0]]), 1e-3)
        tensor([0, 1])
    """
    num_rows, num_columns = values.shape
    if num_rows == 0 or num_columns == 1:
        return torch.zeros(num_rows, dtype=torch.int64, device=values.device)
    places = -(-num_rows // num_columns)
    # a nan would be bid for without end, and so would equal values so large that a least raise is lost beside them
    values = values.double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    values = values - values.min()
    # equal values would otherwise be raised by nothing, for ever
    least_raise = (values.max() * tolerance).clamp(min=1e-9)
    prices = values.new_zeros(num_columns)
    bids = values.new_full((num_columns, num_rows), float("-inf"))
    waiting = torch.arange(num_rows, device=values.device)
    while len(waiting):
        best, columns = (values[waiting] - prices).topk(2, dim=1)
        column = columns[:, 0]
        bids[column, waiting] = prices[column] + best[:, 0] - best[:, 1] + least_raise
        highest = bids.topk(places, dim=1)
        kept = torch.zeros_like(bids, dtype=torch.bool).scatter(1, highest.indices, True)
        bids = bids.masked_fill(~kept, float("-inf"))
        lowest = highest.values[:, -1]
        # a column that is not full costs nothing
        prices = torch.where(lowest.isfinite(), lowest, 0)
        waiting = (~bids.isfinite().any(0)).nonzero().squeeze(1)
    return bids.argmax(0)
