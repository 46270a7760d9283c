"""What the router makes of a token: how sure it is, how large its logits are, how much is computed."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torchmetrics import Metric

from lightning_moe.metrics.balance import load_entropy
from lightning_moe.metrics.base import RoutingRatio
from lightning_moe.metrics.selection import chosen_choices, real_tokens
from lightning_moe.routing import Routing


@torch.no_grad()
def token_entropy(routing: Routing) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Sums ``H(scores of a token) / log E`` over the tokens of a routing.

    Args:
        routing: the routing of one layer.

    Returns:
        The sum, and the number of tokens in it; padding left out.
    """
    entropy, real = _of_real_tokens(routing, load_entropy(routing.scores))
    return entropy.sum(), real.sum().to(entropy.dtype)


class RoutingEntropy(RoutingRatio):
    """Mean entropy of the tokens' normalised scores as a fraction of log E: 0 is a sure router, 1 an undecided one.

    Example:
        >>> metric = RoutingEntropy()
        >>> metric.update(Routing(torch.arange(2), torch.tensor([0, 1]), torch.ones(2), *torch.full((2, 2, 2), 0.5)))
        >>> metric.compute()
        tensor(1.)
    """

    def _parts(self, routing: Routing) -> tuple[Tensor, Tensor]:
        return _of_real_tokens(routing, load_entropy(routing.scores))


class RoutingConfidence(RoutingRatio):
    """Mean share of a token's scores that its chosen columns have: ``sum_{chosen} s_e / sum_e s_e``.

    K / E is an undecided router, 1 a sure one. The scores are normalised here, so that sigmoid scores compare with
    softmax; a column counts once, however often its token has it.

    Example:
        >>> scores = torch.tensor([[0.6, 0.3, 0.1]])
        >>> metric = RoutingConfidence()
        >>> metric(Routing(torch.tensor([0, 0]), torch.tensor([0, 1]), torch.ones(2), scores.log(), scores, top_k=2))
        tensor(0.9000)
    """

    def _parts(self, routing: Routing) -> tuple[Tensor, Tensor]:
        scores = routing.scores
        chosen = torch.where(chosen_choices(routing), scores, 0).sum(-1)
        return _of_real_tokens(routing, chosen / scores.sum(-1).clamp(min=torch.finfo(scores.dtype).tiny))


@torch.no_grad()
def router_margin(routing: Routing) -> tuple[Float[Tensor, " T"], Bool[Tensor, " T"]]:
    """Each token's gap between its last logit that is in and the first that is out, see `RouterMargin`.

    Args:
        routing: the routing of one layer.

    Returns:
        The gaps, 0 where there is none; and which tokens have one: padding, and tokens that chose nothing or all, have
        none.
    """
    num_chosen = chosen_choices(routing).sum(-1, keepdim=True)
    counts = ((num_chosen > 0) & (num_chosen < routing.num_choices)).squeeze(-1)
    # no token has chosen more columns than it has rows
    most = routing.num_choices if routing.top_k is None else min(routing.top_k + 1, routing.num_choices)
    ranked = routing.logits.topk(most, dim=-1).values
    last_in, first_out = (num_chosen - 1).clamp(min=0), num_chosen.clamp(max=most - 1)
    margin = (ranked.gather(1, last_in) - ranked.gather(1, first_out)).squeeze(-1)
    return torch.where(counts, margin, 0), counts


class RouterMargin(RoutingRatio):
    """Mean gap between the last logit that is in and the first that is out: ``z_(k) - z_(k+1)``, sorted descending.

    k is the number of the token's own chosen columns, so that it may differ from token to token (top-p, expert choice).
    A token that chose none, or all, has no such gap and is left out. The gap is one of the logits, also where a bias,
    noise or a capacity had its say in the selection: it tells how near the bare router is to deciding otherwise, and is
    never negative.

    Reference: Nguyen et al., *LibMoE*, 2024, https://arxiv.org/abs/2411.00918.

    Example:
        >>> logits = torch.tensor([[3.0, 1.0, 0.5]])
        >>> metric = RouterMargin()
        >>> metric(Routing(torch.tensor([0]), torch.tensor([0]), torch.ones(1), logits, logits.softmax(-1), top_k=1))
        tensor(2.)
    """

    def _parts(self, routing: Routing) -> tuple[Tensor, Tensor]:
        return router_margin(routing)


class RouterLogitNorm(RoutingRatio):
    """Mean over the tokens of ``logsumexp(logits)^2``, what a z-loss of coefficient 1 would be.

    Reference: Zoph et al., *ST-MoE*, 2022, equation 5, https://arxiv.org/abs/2202.08906.

    Example:
        >>> logits = torch.tensor([[2.0, -100.0]])
        >>> metric = RouterLogitNorm()
        >>> metric(Routing(torch.tensor([0]), torch.tensor([0]), torch.ones(1), logits, logits.softmax(-1)))
        tensor(4.)
    """

    def _parts(self, routing: Routing) -> tuple[Tensor, Tensor]:
        return _of_real_tokens(routing, routing.logits.logsumexp(-1).square())


class MaxRouterLogit(Metric):
    """Largest ``|z|`` of all tokens' logits over all updates and ranks; bfloat16 tells apart less the larger it is.

    Reference: Zoph et al., *ST-MoE*, 2022, https://arxiv.org/abs/2202.08906.

    Example:
        >>> logits = torch.tensor([[2.0, -3.0]])
        >>> metric = MaxRouterLogit()
        >>> metric(Routing(torch.tensor([0]), torch.tensor([0]), torch.ones(1), logits, logits.softmax(-1)))
        tensor(3.)
    """

    full_state_update = False
    largest: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("largest", torch.zeros((), dtype=torch.float64), dist_reduce_fx="max")

    def update(self, routing: Routing) -> None:
        """Adds one forward of one layer."""
        logits, _ = _of_real_tokens(routing, routing.logits.detach().abs().amax(-1))
        # joined with what there is, because nothing has no maximum
        self.largest = torch.cat([logits.to(torch.float64), self.largest.view(1)]).amax()

    def compute(self) -> Tensor:
        """Returns the largest magnitude in float32; 0 before any token."""
        return self.largest.to(torch.float32)


class DropRate(RoutingRatio):
    """Share of the chosen assignments that were dropped, for being over capacity: 0 is none.

    Reference: Fedus et al., *Switch Transformers*, 2021, section 2.2, https://arxiv.org/abs/2101.03961.

    Example:
        >>> rows = torch.tensor([0, 1]), torch.tensor([1, 1]), torch.ones(2)
        >>> metric = DropRate()
        >>> metric(Routing(*rows, *torch.zeros(2, 2, 2), dropped=torch.tensor([False, True])))
        tensor(0.5000)
    """

    def _parts(self, routing: Routing) -> tuple[Tensor, Tensor]:
        counted = routing.counted()
        return (torch.zeros_like(counted) if routing.dropped is None else counted * routing.dropped), counted


class ActiveExperts(RoutingRatio):
    """FFNs per token that are chosen and computed: the assignments that do work, over the real tokens.

    K for plain top-k; less with null experts and with drops; whatever comes out for top-p. Rows that are computed for a
    gradient only are not active: they add nothing to the output and are gone at inference.

    Reference: Huang et al., *Harder Tasks Need More Experts*, 2024, https://arxiv.org/abs/2403.07652.

    Example:
        >>> rows = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 2]), torch.ones(3)
        >>> metric = ActiveExperts()
        >>> metric(Routing(*rows, *torch.zeros(2, 2, 3), num_ffn_experts=2))
        tensor(1.)
    """

    def _parts(self, routing: Routing) -> tuple[Tensor, Tensor]:
        counted, computed = routing.counted(), routing.computed()
        return (counted if computed is None else counted * computed), real_tokens(routing)


def _of_real_tokens(routing: Routing, values: Float[Tensor, " T"]) -> tuple[Tensor, Tensor]:
    # where, and not a product: padding may hold inf and nan
    real = real_tokens(routing)
    return torch.where(real, values, 0), real
