"""Collects the routing of a model that runs, batch by batch: counts are kept, logits are not."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lightning_moe.analysis.chance import domain_chance, vocabulary_chance
from lightning_moe.analysis.results import LayerAnalysis, TokenShare
from lightning_moe.analysis.texts import Batch
from lightning_moe.metrics import (
    BatchMaxViolation,
    DomainSpecialization,
    ExpertCoactivation,
    ExpertLoad,
    RouterMargin,
    RoutingEntropy,
    VocabularySpecialization,
    chosen_choices,
    chosen_experts,
    effective_experts,
    load_entropy,
    max_violation,
    num_dead_experts,
)
from lightning_moe.routing import Routing, observe_routing

_SPECIALIZED_TOKENS = 10


@dataclass(frozen=True)
class Selection:
    """Which columns the tokens of a batch chose, without the logits.

    Args:
        chosen: marks them.
        first: the column of highest score of each token.
    """

    chosen: Bool[Tensor, "T choices"]
    first: Int[Tensor, " T"]

    @classmethod
    def of(cls, routing: Routing) -> "Selection":
        """What is kept of a routing: a byte for each column, and two."""
        first = chosen_choices(routing, top_k=1).to(torch.uint8).argmax(-1).to(torch.int16)
        return cls(chosen_choices(routing).cpu(), first.cpu())

    def routing(self) -> Routing:
        """A routing of the same choices, whose scores tell the first choice only."""
        token_ids, columns = self.chosen.nonzero(as_tuple=True)
        scores = self.chosen.float().scatter_add_(1, self.first.long().unsqueeze(1), torch.ones(len(self.first), 1))
        return Routing(token_ids, columns, torch.ones(len(columns)), torch.zeros(self.chosen.shape), scores)


@dataclass
class LayerCounts:
    """What one layer did with the tokens seen so far.

    Args:
        num_experts: number of experts E.
        num_domains: number of domains.
        num_ids: number of token ids that occur in the texts.
        min_count: tokens of an id below which its specialisation does not count.
    """

    num_experts: int
    num_domains: int
    num_ids: int
    min_count: int
    sequences: list[Float[Tensor, "B E"]] = field(default_factory=list)
    sequence_domains: list[int] = field(default_factory=list)
    selections: list[Selection] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.load = ExpertLoad(self.num_experts)
        self.batch_max_violation = BatchMaxViolation()
        self.entropy = RoutingEntropy()
        self.margin = RouterMargin()
        self.coactivation = ExpertCoactivation(self.num_experts)
        self.domains = DomainSpecialization(self.num_experts, self.num_domains)
        self.vocabulary = VocabularySpecialization(self.num_experts, self.num_ids, self.min_count)

    def add(self, routing: Routing, batch: Batch, ids: Int[Tensor, " T"]) -> None:
        """Adds one forward of one batch."""
        for metric in (self.load, self.batch_max_violation, self.entropy, self.margin, self.coactivation):
            metric.to(routing.logits.device).update(routing)
        self.domains.to(routing.logits.device).update(routing, batch.domain)
        self.vocabulary.to(routing.logits.device).update(routing, ids.to(routing.logits.device))
        chosen = chosen_experts(routing).view(*batch.input_ids.shape, self.num_experts)
        self.sequences.append(chosen.sum(1).double().cpu())
        self.sequence_domains += [batch.domain] * len(chosen)

    def analysis(self, name: str, vocabulary: Sequence[tuple[int, str]], generator: torch.Generator) -> LayerAnalysis:
        """Sums up.

        Args:
            name: of the layer.
            vocabulary: id and text of each token id that occurs.
            generator: of what chance is compared with.
        """
        for metric in (self.domains, self.vocabulary):
            metric.cpu()
        load = self.load.compute().double().cpu()
        variation = information = None
        if self.num_domains > 1:
            domains = torch.tensor(self.sequence_domains)
            variation, information = domain_chance(torch.cat(self.sequences), domains, generator)
        return LayerAnalysis(
            name=name,
            num_experts=self.num_experts,
            experts_per_token=float(load.sum() / self.domains.tokens.sum()),
            load=load.tolist(),
            max_violation=float(max_violation(load)),
            batch_max_violation=float(self.batch_max_violation.compute()),
            dead_experts=int(num_dead_experts(load)),
            load_entropy=float(load_entropy(load)),
            effective_experts=float(effective_experts(load)),
            routing_entropy=float(self.entropy.compute()),
            router_margin=float(self.margin.compute()),
            domain_shares=self.domains.compute().tolist(),
            domain_total_variation=variation,
            domain_mutual_information=information,
            vocabulary_specialization=vocabulary_chance(self.vocabulary, generator),
            specialized_tokens=[self._specialized(expert, vocabulary) for expert in range(self.num_experts)],
            coactivation=self.coactivation.compute().tolist(),
        )

    def _specialized(self, expert: int, vocabulary: Sequence[tuple[int, str]]) -> list[TokenShare]:
        counts = self.vocabulary.tokens
        shares = self.vocabulary.routed[:, expert] / counts.clamp(min=1)
        seen = ((counts >= self.min_count) & (shares > 0)).nonzero().squeeze(1).tolist()
        # of equal shares the more frequent id says more
        best = sorted(seen, key=lambda place: (-float(shares[place]), -float(counts[place]), place))
        return [
            TokenShare(vocabulary[p][0], vocabulary[p][1], int(counts[p]), float(shares[p]))
            for p in best[:_SPECIALIZED_TOKENS]
        ]


class RoutingCollector:
    """Watches every MoE layer that runs, and counts.

    Args:
        batches: all batches that will be run; ``batch`` must be the one that runs.
        num_domains: number of domains.
        min_count: tokens of an id below which its specialisation does not count.
        keeps_selections: whether to keep each token's choices, to compare checkpoints.
    """

    def __init__(
        self, batches: Sequence[Batch], *, num_domains: int, min_count: int, keeps_selections: bool = False
    ) -> None:
        self.num_domains = num_domains
        self.min_count = min_count
        self.keeps_selections = keeps_selections
        # counts for the ids that occur, and not for the whole vocabulary
        self.token_ids = torch.cat([batch.input_ids.flatten() for batch in batches]).unique()
        self.layers: dict[str, LayerCounts] = {}
        self.batch: Batch | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Counts what runs inside the ``with`` block."""
        stop = observe_routing(self._observe)
        try:
            yield
        finally:
            stop()

    def _observe(self, name: str, routing: Routing, losses: Mapping[str, Tensor]) -> None:
        assert self.batch is not None
        ids = self.batch.input_ids.flatten()
        if routing.num_tokens != len(ids):
            raise ValueError(
                f"{name}: routed {routing.num_tokens} tokens of a batch of {len(ids)}. An analysis needs a text model "
                "whose MoE layers see every token of the batch once."
            )
        if name not in self.layers:
            counts = LayerCounts(routing.num_experts, self.num_domains, len(self.token_ids), self.min_count)
            self.layers[name] = counts
        self.layers[name].add(routing.detach(), self.batch, torch.searchsorted(self.token_ids, ids))
        if self.keeps_selections:
            self.layers[name].selections.append(Selection.of(routing))
