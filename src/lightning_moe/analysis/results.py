"""What an analysis found: plain numbers."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Chance:
    """A number beside what it would be by chance.

    Args:
        value: the number.
        mean: what chance gives on average.
        limit: what chance stays below 95 times of 100.
    """

    value: float
    mean: float
    limit: float

    @property
    def is_above(self) -> bool:
        """Whether the number is larger than chance explains."""
        return self.value > self.limit


@dataclass(frozen=True)
class TokenShare:
    """How often one expert was the first choice of one token id.

    Args:
        token_id: the id.
        text: what the id stands for.
        count: how often the id was seen.
        share: which part of that the expert was first choice for.
    """

    token_id: int
    text: str
    count: int
    share: float


@dataclass(frozen=True)
class LayerAnalysis:
    """One MoE layer. Lists over experts are in the order of the experts, those over domains in that of the domains.

    What could not be measured is None; `Analysis.skipped` says why.
    """

    name: str
    num_experts: int
    experts_per_token: float
    load: list[float]
    max_violation: float
    batch_max_violation: float
    dead_experts: int
    load_entropy: float
    effective_experts: float
    routing_entropy: float
    router_margin: float
    domain_shares: list[list[float]]
    domain_total_variation: Chance | None
    domain_mutual_information: Chance | None
    vocabulary_specialization: Chance | None
    specialized_tokens: list[list[TokenShare]]
    coactivation: list[list[float]]
    weight_cosine: float | None = None
    router_row_cosine: float | None = None
    output_cosine: float | None = None
    output_cka: float | None = None
    output_cka_chance: float | None = None

    @property
    def relative_load(self) -> list[float]:
        """Each expert's load over the mean load of the layer."""
        mean = sum(self.load) / len(self.load)
        return [load / mean if mean else 0.0 for load in self.load]

    @property
    def uniform_share(self) -> float:
        """The share of a domain's tokens that each expert of an unspecialised, balanced layer gets: K / E."""
        return self.experts_per_token / self.num_experts

    @property
    def largest_violation(self) -> float:
        """The MaxVio of a layer whose tokens all take the same experts: E / K - 1."""
        return max(self.num_experts / self.experts_per_token - 1, 0.0) if self.experts_per_token else 0.0


@dataclass(frozen=True)
class Study:
    """The loss when routing is interfered with.

    Args:
        name: what was done.
        setting: its number, as the factor of the logits; None where it has none.
        loss: mean next-token loss of each domain, in nats.
    """

    name: str
    setting: float | None
    loss: dict[str, float]

    @property
    def label(self) -> str:
        """Name and setting."""
        return self.name if self.setting is None else f"{self.name} {self.setting:g}"

    @property
    def mean_loss(self) -> float:
        """Mean over the domains, each counting alike."""
        return math.fsum(self.loss.values()) / len(self.loss)


@dataclass(frozen=True)
class CheckpointAnalysis:
    """One checkpoint of a series; lists have a number for each layer.

    Args:
        name: of the checkpoint.
        saturation: share of a token's experts that are those of the last checkpoint already.
        saturation_top1: the same for the first choice alone.
        change: share of a token's experts that are not those of the checkpoint before; None for the first.
        max_violation: MaxVio.
        routing_entropy: of the tokens' scores, from 0 to 1.
    """

    name: str
    saturation: list[float]
    saturation_top1: list[float]
    change: list[float] | None
    max_violation: list[float]
    routing_entropy: list[float]


@dataclass(frozen=True)
class Analysis:
    """What `analyze` found.

    Args:
        model: what the model is called.
        tokens: number of tokens looked at, by domain.
        sequence_length: tokens per sequence, at most.
        layers: each MoE layer, in the order of the forward.
        studies: the loss, undisturbed first, then with routing interfered with.
        checkpoints: the series, the last one being the model itself; empty where there is none.
        skipped: what was left out, and why, by the name of the part.
    """

    model: str
    tokens: dict[str, int]
    sequence_length: int
    layers: list[LayerAnalysis]
    studies: list[Study] = field(default_factory=list)
    checkpoints: list[CheckpointAnalysis] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def domains(self) -> list[str]:
        """The names of the domains."""
        return list(self.tokens)

    def to_dict(self) -> dict[str, Any]:
        """The same as dictionaries, lists and numbers."""
        return asdict(self)
