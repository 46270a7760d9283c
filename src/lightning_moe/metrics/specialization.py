"""Which tokens an expert gets: of which domain, with which token id."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric

from lightning_moe.metrics.selection import chosen_experts, real_tokens
from lightning_moe.routing import Routing


def total_variation(routed: Float[Tensor, "*P domains E"]) -> Float[Tensor, "*P"]:
    """How differently domains use the experts: mean over pairs of domains of ``1/2 sum_i |f_i^D - f_i^D'|``.

    ``f_i^D`` is expert i's share of domain D's selections. 0 is the same use, 1 no expert in common. A domain without a
    selection is in no pair.

    Args:
        routed: selections of each expert by the tokens of each domain.

    Example:
        >>> total_variation(torch.tensor([[4.0, 0.0], [1.0, 3.0]]))
        tensor(0.7500)
    """
    selections = routed.sum(-1)
    shares = routed / selections.clamp(min=1).unsqueeze(-1)
    pairs = (selections > 0).to(routed.dtype)
    pairs = (pairs.unsqueeze(-2) * pairs.unsqueeze(-1)).triu(1)
    return (torch.cdist(shares, shares, p=1) / 2 * pairs).sum((-2, -1)) / pairs.sum((-2, -1)).clamp(min=1)


def mutual_information(routed: Float[Tensor, "*P domains E"]) -> Float[Tensor, "*P"]:
    """What a selected expert tells of the token's domain: ``I(expert; domain)`` over all selections, in nats.

    Args:
        routed: selections of each expert by the tokens of each domain.

    Example:
        >>> mutual_information(torch.tensor([[2.0, 0.0], [0.0, 2.0]]))  # log 2
        tensor(0.6931)
    """
    joint = routed / routed.sum((-2, -1), keepdim=True).clamp(min=1)
    independent = joint.sum(-2, keepdim=True) * joint.sum(-1, keepdim=True)
    return (torch.xlogy(joint, joint) - torch.xlogy(joint, independent)).sum((-2, -1))


class GroupedSelections(Metric):
    """Tokens of each group, and how many of them chose each expert, over all updates and ranks.

    Args:
        num_experts: number of experts E.
        num_groups: number of groups.
        top_k: counts a token only for so many of its experts, those with its highest scores; None counts all.
    """

    full_state_update = False
    routed: Tensor
    tokens: Tensor

    def __init__(self, num_experts: int, num_groups: int, top_k: int | None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_experts = num_experts
        self.top_k = top_k
        self.add_state("routed", torch.zeros(num_groups, num_experts, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros(num_groups, dtype=torch.float64), dist_reduce_fx="sum")

    def _add(self, routing: Routing, groups: Tensor) -> None:
        if groups.shape != (routing.num_tokens,):
            raise ValueError(
                f"The routing is of {routing.num_tokens} tokens, got numbers of shape {tuple(groups.shape)}; give one "
                f"for each token, flattened to one dimension."
            )
        # padding may be numbered as it likes; labels number what enters no loss -100
        counts = real_tokens(routing) & (groups >= 0)
        groups = torch.where(counts, groups, 0)
        chosen = chosen_experts(routing, self.top_k) & counts.unsqueeze(1)
        self.routed.index_add_(0, groups, chosen.to(torch.float64))
        self.tokens.index_add_(0, groups, counts.to(torch.float64))

    def _shares(self) -> Tensor:
        return self.routed / self.tokens.clamp(min=1).unsqueeze(1)


class DomainSpecialization(GroupedSelections):
    """Share of each domain's tokens that an expert gets: ``N_{i,D} / N_D``, a (domains, E) matrix.

    K / E everywhere is an unspecialised layer. The row of a domain without a token is 0.

    Reference: Muennighoff et al., *OLMoE*, 2024, section 5.3, https://arxiv.org/abs/2409.02060.

    Args:
        num_experts: number of experts E.
        num_domains: number of domains.
        top_k: counts a token only for so many of its experts, those with its highest scores; None counts all.

    Example:
        >>> metric = DomainSpecialization(num_experts=2, num_domains=2)
        >>> routing = Routing(torch.arange(3), torch.tensor([0, 1, 1]), torch.ones(3), *torch.zeros(2, 3, 2), top_k=1)
        >>> metric(routing, torch.tensor([0, 0, 1]))
        tensor([[0.5000, 0.5000],
                [0.0000, 1.0000]])
    """

    def __init__(self, num_experts: int, num_domains: int, top_k: int | None = None, **kwargs: Any) -> None:
        super().__init__(num_experts, num_domains, top_k, **kwargs)
        self.num_domains = num_domains

    def update(self, routing: Routing, domain: Int[Tensor, " T"] | int) -> None:
        """Adds the selections of one forward of one layer.

        Args:
            routing: the routing of one layer.
            domain: the number of each token's domain, or of all tokens'; below 0 leaves a token out.

        Raises:
            ValueError: if there is not one number for each token.
        """
        if isinstance(domain, int):
            domain = torch.full_like(routing.logits[:, 0], domain, dtype=torch.int64)
        self._add(routing, domain)

    def compute(self) -> Tensor:
        """Returns the matrix, or the measure of the counts that the class stands for, in float32."""
        return self._measure().to(torch.float32)

    def _measure(self) -> Tensor:
        return self._shares()


class DomainTotalVariation(DomainSpecialization):
    """How differently two domains use the experts: mean over pairs of domains of ``1/2 sum_i |f_i^D - f_i^D'|``.

    ``f_i^D`` is expert i's share of domain D's selections. 0 is the same use, 1 no expert in common. A domain without a
    selection is in no pair.

    Args:
        num_experts: number of experts E.
        num_domains: number of domains.
        top_k: counts a token only for so many of its experts, those with its highest scores; None counts all.

    Example:
        >>> metric = DomainTotalVariation(num_experts=2, num_domains=2)
        >>> routing = Routing(torch.arange(2), torch.tensor([0, 1]), torch.ones(2), *torch.zeros(2, 2, 2), top_k=1)
        >>> metric(routing, torch.tensor([0, 1]))
        tensor(1.)
    """

    def _measure(self) -> Tensor:
        return total_variation(self.routed)


class DomainMutualInformation(DomainSpecialization):
    """What a selected expert tells of the token's domain: ``I(expert; domain)`` over all selections, in nats.

    0 is nothing, the smaller of the entropies of the experts and of the domains is everything; so it depends on how
    many tokens each domain has.

    Args:
        num_experts: number of experts E.
        num_domains: number of domains.
        top_k: counts a token only for so many of its experts, those with its highest scores; None counts all.

    Example:
        >>> metric = DomainMutualInformation(num_experts=2, num_domains=2)
        >>> routing = Routing(torch.arange(2), torch.tensor([0, 1]), torch.ones(2), *torch.zeros(2, 2, 2), top_k=1)
        >>> metric(routing, torch.tensor([0, 1]))  # log 2
        tensor(0.6931)
    """

    def _measure(self) -> Tensor:
        return mutual_information(self.routed)


class VocabularySpecialization(GroupedSelections):
    """How surely a token id decides the expert: mean over token ids x of ``max_i N_{i,x} / N_x``.

    1 is a router that looks at nothing but the token id. The ids are those of the input, or those predicted, or those
    to be predicted: three different questions. The whole matrix is `DomainSpecialization` with token ids for domains.

    Reference: Muennighoff et al., *OLMoE*, 2024, section 5.4, https://arxiv.org/abs/2409.02060.

    Args:
        num_experts: number of experts E.
        vocab_size: number of token ids; the counts take 8 * vocab_size * E bytes.
        min_count: tokens of an id below which it is left out, because few tokens look specialised by chance.
        top_k: counts a token only for so many of its experts, those with its highest scores; None counts all. 1 in the
            paper.

    Example:
        >>> metric = VocabularySpecialization(num_experts=2, vocab_size=10)
        >>> routing = Routing(torch.arange(3), torch.tensor([0, 1, 1]), torch.ones(3), *torch.zeros(2, 3, 2), top_k=1)
        >>> metric(routing, torch.tensor([7, 7, 8]))
        tensor(0.7500)
    """

    def __init__(
        self, num_experts: int, vocab_size: int, min_count: int = 1, top_k: int | None = 1, **kwargs: Any
    ) -> None:
        super().__init__(num_experts, vocab_size, top_k, **kwargs)
        self.vocab_size = vocab_size
        self.min_count = min_count

    def update(self, routing: Routing, token_ids: Int[Tensor, " T"]) -> None:
        """Adds the selections of one forward of one layer.

        Args:
            routing: the routing of one layer.
            token_ids: the id of each token; below 0, as labels have it, leaves a token out.

        Raises:
            ValueError: if there is not one id for each token.
        """
        self._add(routing, token_ids)

    def compute(self) -> Tensor:
        """Returns the mean in float32; 0 if no id was seen often enough."""
        seen = self.tokens >= max(self.min_count, 1)
        strongest = torch.where(seen, self._shares().amax(1), 0)
        return (strongest.sum() / seen.sum().clamp(min=1)).to(torch.float32)
