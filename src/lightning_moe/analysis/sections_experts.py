"""The parts of the report on the experts: what they specialise in, how alike they are, what routing is worth."""

from collections.abc import Callable
from typing import Any

from lightning_moe.analysis.charts import Line, bar_chart, line_chart
from lightning_moe.analysis.definitions import DOMAINS, LIKENESS, STUDIES, VOCABULARY
from lightning_moe.analysis.page import Section, definitions, folded, gallery, paragraph, table
from lightning_moe.analysis.results import Analysis, Chance, LayerAnalysis, TokenShare
from lightning_moe.analysis.verdict import short_names
from lightning_moe.heatmap import RELATIVE, heatmap

_CHANCE = "chance, 95 of 100 below"
_TOKENS_SHOWN = 8


def domains_section(analysis: Analysis) -> Section:
    """Which domains use which experts."""
    section, layers = Section("domains", "Specialisation by domain"), analysis.layers
    section.add(definitions(DOMAINS))
    if section.leave_out(analysis.skipped.get("domains")):
        return section
    names = short_names([layer.name for layer in layers])
    figures = []
    for place, domain in enumerate(analysis.domains):
        relative = [[share / (one.uniform_share or 1.0) for share in one.domain_shares[place]] for one in layers]
        canvas = heatmap(
            relative,
            names,
            title=f"{domain}: share of its tokens / uniform share",
            row_title="layer",
            column_title="expert",
            scale=RELATIVE,
        )
        figures.append(section.figure(f"domain_{place}.png", canvas, f"How {domain} uses the experts"))
    section.add(gallery(figures))
    charts = [
        _chance_chart(section, layers, "Total variation", "domain_total_variation"),
        _chance_chart(section, layers, "Mutual information, nats", "domain_mutual_information"),
    ]
    rows = [[one.name, *_cells(one.domain_total_variation), *_cells(one.domain_mutual_information)] for one in layers]
    header = ["layer", "total variation", "chance", _CHANCE, "mutual information", "chance", _CHANCE]
    section.add(gallery(charts), folded("The numbers", table(header, rows)))
    return section


def vocabulary_section(analysis: Analysis) -> Section:
    """Which tokens go to which experts."""
    section, layers = Section("vocabulary", "Specialisation by token"), analysis.layers
    section.add(definitions(VOCABULARY))
    if section.leave_out(analysis.skipped.get("vocabulary")):
        return section
    section.add(_chance_chart(section, layers, "Vocabulary specialisation", "vocabulary_specialization", highest=1.0))
    rows = [[one.name, *_cells(one.vocabulary_specialization)] for one in layers]
    section.add(folded("The numbers", table(["layer", "vocabulary specialisation", "chance", _CHANCE], rows)))
    section.add(
        "<h3>Most specialised tokens of each expert</h3>",
        paragraph("Share of the id's tokens that have the expert for their first choice, and how often the id occurs."),
    )
    for layer in layers:
        told = [[f"expert {e}", _told(tokens)] for e, tokens in enumerate(layer.specialized_tokens)]
        section.add(folded(layer.name, table(["expert", "tokens"], told, of_text=True)))
    return section


def likeness_section(analysis: Analysis) -> Section:
    """How alike the experts are."""
    section, layers = Section("likeness", "How alike the experts are"), analysis.layers
    section.add(definitions(LIKENESS))
    if section.leave_out(analysis.skipped.get("experts")):
        return section
    lines = [
        Line("weight cosine", [one.weight_cosine for one in layers]),
        Line("output cosine", [one.output_cosine for one in layers]),
        Line("output CKA", [one.output_cka for one in layers]),
        Line("router row cosine", [one.router_row_cosine for one in layers]),
        Line("output CKA by chance", [one.output_cka_chance for one in layers], is_reference=True),
    ]
    chart = line_chart(
        [line for line in lines if any(value is not None for value in line.values)],
        short_names([one.name for one in layers]),
        title="Likeness of the experts of a layer",
        place_title="layer",
        limits=(0.0, 1.0),
    )
    rows = [[one.name, *(line.values[place] for line in lines)] for place, one in enumerate(layers)]
    section.add(
        section.figure("likeness.png", chart, "Likeness of the experts of each layer"),
        folded("The numbers", table(["layer", *(line.label for line in lines)], rows)),
    )
    return section


def studies_section(analysis: Analysis) -> Section:
    """What the loss says."""
    section = Section("studies", "What routing is worth")
    section.add(definitions(STUDIES))
    if section.leave_out(analysis.skipped.get("studies")):
        return section
    base, *others = analysis.studies
    rises = {one.label: {name: loss - base.loss[name] for name, loss in one.loss.items()} for one in others}
    rows: list[list[Any]] = [
        [one.label, *one.loss.values(), *(loss - base.loss[n] for n, loss in one.loss.items())]
        for one in analysis.studies
    ]
    header = ["routing", *(f"loss, {name}" for name in base.loss), *(f"rise, {name}" for name in base.loss)]
    if rises:
        chart = bar_chart(rises, title="Rise of the loss over that as trained, nats")
        section.add(section.figure("studies.png", chart, "Rise of the loss in each study and domain"))
    section.add(table(header, rows))
    section.leave_out(analysis.skipped.get("some studies"))
    return section


def _chance_chart(
    section: Section, layers: list[LayerAnalysis], title: str, attribute: str, *, highest: float | None = None
) -> str:
    def part(of: Callable[[Chance], float]) -> list[float | None]:
        found = [getattr(layer, attribute) for layer in layers]
        return [None if chance is None else of(chance) for chance in found]

    lines = [
        Line("measured", part(lambda chance: chance.value)),
        Line(_CHANCE, part(lambda chance: chance.limit), is_reference=True),
    ]
    names = short_names([layer.name for layer in layers])
    chart = line_chart(lines, names, title=title, place_title="layer", limits=(0.0, highest))
    return section.figure(f"{attribute}.png", chart, f"{title} of each layer, beside chance")


def _cells(chance: Chance | None) -> list[float | None]:
    return [None] * 3 if chance is None else [chance.value, chance.mean, chance.limit]


def _told(tokens: list[TokenShare]) -> str:
    told = [f"{one.text!r} {one.share:.0%} of {one.count}" for one in tokens[:_TOKENS_SHOWN]]
    return " · ".join(told) or "none is frequent enough"
