"""What specialisation would come out by chance, of the same text and the same load."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_moe.analysis.results import Chance
from lightning_moe.metrics import VocabularySpecialization, mutual_information, total_variation

_SHUFFLES = 200
_DRAWS = 40


def domain_chance(
    counts: Float[Tensor, "R E"], domains: Int[Tensor, " R"], generator: torch.Generator
) -> tuple[Chance, Chance]:
    """Total variation and mutual information, beside those with the domains dealt to the sequences at random.

    Whole sequences are dealt, because the tokens of one text are alike: dealing tokens would make any difference look
    large.

    Args:
        counts: selections of each expert in each of R sequences.
        domains: the domain of each sequence.
        generator: of the dealing.
    """
    num_domains = int(domains.max()) + 1
    orders = torch.stack([torch.randperm(len(domains), generator=generator) for _ in range(_SHUFFLES)])
    dealt = torch.cat([domains.unsqueeze(0), domains[orders]])  # (P, R), the true domains first
    is_of = (dealt.unsqueeze(1) == torch.arange(num_domains).view(1, -1, 1)).to(counts.dtype)
    routed = is_of @ counts  # (P, domains, E)
    variation, information = _beside(total_variation(routed)), _beside(mutual_information(routed))
    return variation, information


def vocabulary_chance(metric: VocabularySpecialization, generator: torch.Generator) -> Chance | None:
    """Vocabulary specialisation, beside that of tokens that draw their expert by the load; None if no id counts.

    A rare token looks specialised by chance: of 8 tokens more than 1 / E go to some one expert.

    Args:
        metric: with the counts of first choices.
        generator: of the draws.
    """
    seen = metric.tokens >= max(metric.min_count, 1)
    if not bool(seen.any()):
        return None
    sizes = metric.tokens[seen]
    groups = torch.arange(len(sizes)).repeat_interleave(sizes.long())
    shares = metric.routed.sum(0) / metric.tokens.sum()
    # one column more, for the tokens that chose no expert
    shares = torch.cat([shares, (1 - shares.sum()).clamp(min=0).view(1)])
    values = [metric.compute().double()]
    for _ in range(_DRAWS):
        experts = torch.multinomial(shares, len(groups), replacement=True, generator=generator)
        drawn = torch.zeros(len(sizes) * len(shares), dtype=torch.float64)
        drawn.index_add_(0, groups * len(shares) + experts, torch.ones(len(groups), dtype=torch.float64))
        values.append((drawn.view(len(sizes), -1)[:, :-1].amax(1) / sizes).mean())
    return _beside(torch.stack(values))


def _beside(values: Float[Tensor, " P"]) -> Chance:
    # the first is the measured one
    return Chance(float(values[0]), float(values[1:].mean()), float(values[1:].quantile(0.95)))
