"""Whether routing is healthy, in plain words with numbers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lightning_moe.analysis.results import Analysis, LayerAnalysis
from lightning_moe.analysis.studies import RANDOM

Status = Literal["good", "watch", "bad", "note"]

# An expert below this fraction of its fair share sees too few tokens to learn from; Automodel's limit too.
_STARVED = 0.05
# of the largest MaxVio that is possible
_UNEVEN, _COLLAPSED = 0.5, 0.8
# of the loss: below, it hardly matters which experts a token gets
_WORTH = 0.01
_COPIES = 0.995
_FLAT = 0.98
# tokens of a fair share: the busiest of 8 experts is then rarely above 1.3 times it by accident
_ENOUGH = 64
_HOW_MUCH = "how much text"


@dataclass(frozen=True)
class Finding:
    """One answer.

    Args:
        status: good, watch (worth a look), bad, or note where there is no good and bad.
        title: what was asked.
        text: the answer.
    """

    status: Status
    title: str
    text: str


def findings(analysis: Analysis) -> list[Finding]:
    """All answers that the numbers give."""
    checks: tuple[Callable[[Analysis], Finding | None], ...] = (
        _balance,
        _starved,
        _worth,
        _domains,
        _likeness,
        _certainty,
        _change,
    )
    found = [finding for check in checks if (finding := check(analysis)) is not None]
    return found if (few := _too_few(analysis)) is None else [few, *(replace(one, status="note") for one in found)]


def verdict(found: Sequence[Finding]) -> str:
    """All answers in one sentence."""
    if any(one.title == _HOW_MUCH for one in found):
        return "There is too little text to tell whether routing is healthy."
    problems = {status: [one.title for one in found if one.status == status] for status in ("bad", "watch")}
    if problems["bad"]:
        return f"Routing is not healthy. Look at: {_listed([*problems['bad'], *problems['watch']])}."
    if problems["watch"]:
        return f"Routing works, and something is worth a look: {_listed(problems['watch'])}."
    return "Routing is healthy: the experts are used evenly, and nothing stands out."


def _too_few(analysis: Analysis) -> Finding | None:
    tokens = sum(analysis.tokens.values())
    share = min(tokens * layer.experts_per_token / layer.num_experts for layer in analysis.layers)
    if share >= _ENOUGH:
        return None
    text = f"{tokens:,} tokens make {share:.3g} for each expert, and uneven counts by accident; give {_ENOUGH} or more."
    return Finding("watch", _HOW_MUCH, text)


def summary(analysis: Analysis) -> str:
    """The verdict and all answers, for a terminal."""
    found = findings(analysis)
    return "\n".join([verdict(found), *(f"  {one.status:<6} {one.title}: {one.text}" for one in found)])


def short_names(names: Sequence[str]) -> list[str]:
    """The parts of dotted names in which they differ.

    Example:
        >>> short_names(["model.layers.2.mlp", "model.layers.11.mlp"])
        ['2', '11']
    """
    parts = [name.split(".") for name in names]
    if len(names) < 2 or len({len(part) for part in parts}) > 1:
        return list(names)
    places = [place for place, column in enumerate(zip(*parts, strict=True)) if len(set(column)) > 1]
    return [".".join(part[place] for place in places) for part in parts]


def _balance(analysis: Analysis) -> Finding:
    worst = max(analysis.layers, key=_unevenness)
    mean = _mean([layer.max_violation for layer in analysis.layers])
    status: Status = "good"
    if any(layer.max_violation > min(1.0, _UNEVEN * layer.largest_violation) for layer in analysis.layers):
        status = "watch"
    if _unevenness(worst) >= _COLLAPSED:
        status = "bad"
    return Finding(
        status,
        "balance",
        f"In the most uneven layer, {worst.name}, the busiest expert gets {1 + worst.max_violation:.2f} times its fair "
        f"share (MaxVio {worst.max_violation:.2f}, of at most {worst.largest_violation:.2f}); the mean MaxVio of the "
        f"{len(analysis.layers)} layers is {mean:.2f}. 0 is even.",
    )


def _unevenness(layer: LayerAnalysis) -> float:
    return layer.max_violation / layer.largest_violation if layer.largest_violation else 0.0


def _starved(analysis: Analysis) -> Finding:
    total = sum(layer.num_experts for layer in analysis.layers)
    dead = sum(layer.dead_experts for layer in analysis.layers)
    starved = sum(load < _STARVED for layer in analysis.layers for load in layer.relative_load) - dead
    tokens = sum(analysis.tokens.values())
    if dead:
        text = f"{dead} of {total} experts got no token at all in {tokens:,} tokens"
        text += f", {starved} more less than a twentieth of the fair share." if starved else "."
    elif starved:
        text = f"{starved} of {total} experts got less than a twentieth of their fair share of {tokens:,} tokens; "
        text += "none is dead."
    else:
        text = f"All {total} experts got tokens of the {tokens:,}, each at least a twentieth of its fair share."
    return Finding("bad" if dead else "watch" if starved else "good", "dead experts", text)


def _worth(analysis: Analysis) -> Finding | None:
    random = next((study for study in analysis.studies if study.name == RANDOM), None)
    if random is None:
        return None
    base = analysis.studies[0]
    rise = random.mean_loss - base.mean_loss
    matters = rise > _WORTH * base.mean_loss
    return Finding(
        "good" if matters else "watch",
        "what routing is worth",
        f"With random experts the loss goes from {base.mean_loss:.3f} to {random.mean_loss:.3f} ({rise:+.3f} nats). "
        + (
            "So it matters which experts a token gets."
            if matters
            else "So it hardly matters yet which experts a token gets, as is usual soon after upcycling."
        ),
    )


def _domains(analysis: Analysis) -> Finding | None:
    measured = [one.domain_total_variation for one in analysis.layers if one.domain_total_variation is not None]
    if not measured:
        return None
    above = sum(one.is_above for one in measured)
    return Finding(
        "note",
        "specialisation by domain",
        f"In {above} of {len(measured)} layers {_listed(analysis.domains)} use the experts more differently than "
        f"chance explains. The total variation is {_mean([one.value for one in measured]):.3f} on average, where 0 is "
        f"the same use and 1 no expert in common; chance gives {_mean([one.mean for one in measured]):.3f}.",
    )


def _likeness(analysis: Analysis) -> Finding | None:
    cosines = [layer.weight_cosine for layer in analysis.layers if layer.weight_cosine is not None]
    if not cosines:
        return None
    mean = _mean(cosines)
    text = f"The weights of two experts of a layer have a cosine of {mean:.3f} on average, where 1 are copies."
    outputs = [layer.output_cosine for layer in analysis.layers if layer.output_cosine is not None]
    if outputs:
        text += f" What they compute for the same token has one of {_mean(outputs):.3f}."
    return Finding("watch" if mean > _COPIES else "good", "whether experts differ", text)


def _certainty(analysis: Analysis) -> Finding:
    entropy = _mean([layer.routing_entropy for layer in analysis.layers])
    margin = _mean([layer.router_margin for layer in analysis.layers])
    mood = "hardly prefers any expert" if entropy > _FLAT else "has preferences"
    return Finding(
        "note",
        "how sure the router is",
        f"The router {mood}: the entropy of a token's scores is {entropy:.3f} of the most that is possible, and "
        f"{margin:.3f} in the logits separate the last expert chosen from the first that is not.",
    )


def _change(analysis: Analysis) -> Finding | None:
    if len(analysis.checkpoints) < 2:
        return None
    first, last = analysis.checkpoints[0], analysis.checkpoints[-1]
    assert last.change is not None
    return Finding(
        "note",
        "change over training",
        f"{_mean(first.saturation):.0%} of the experts that {last.name} chooses were chosen by {first.name} already; "
        f"since {analysis.checkpoints[-2].name}, {_mean(last.change):.0%} changed.",
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
