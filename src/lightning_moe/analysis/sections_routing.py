"""The parts of the report on routing itself: load, the router's certainty, co-activation, change."""

from lightning_moe.analysis.charts import Line, line_chart
from lightning_moe.analysis.definitions import CERTAINTY, CHECKPOINTS, COACTIVATION, LOAD
from lightning_moe.analysis.page import Section, definitions, folded, gallery, paragraph, table
from lightning_moe.analysis.results import Analysis
from lightning_moe.analysis.verdict import short_names
from lightning_moe.heatmap import RELATIVE, SHARE, heatmap


def load_section(analysis: Analysis) -> Section:
    """Who gets how many tokens."""
    section, layers = Section("load", "Load of the experts"), analysis.layers
    names = short_names([layer.name for layer in layers])
    section.add(
        definitions(LOAD),
        section.figure(
            "load.png",
            heatmap(
                [layer.relative_load for layer in layers],
                names,
                title="Load of each expert / mean load of its layer",
                row_title="layer",
                column_title="expert",
                scale=RELATIVE,
            ),
            "Heatmap of the relative load of each expert of each layer",
        ),
        table(
            ["layer", "experts", "per token", "MaxVio", "most possible", "MaxVio per batch", "dead", "load entropy",
             "effective experts"],
            [
                [layer.name, layer.num_experts, layer.experts_per_token, layer.max_violation, layer.largest_violation,
                 layer.batch_max_violation, layer.dead_experts, layer.load_entropy, layer.effective_experts]
                for layer in layers
            ],
        ),
    )  # fmt: skip
    return section


def certainty_section(analysis: Analysis) -> Section:
    """How sure the router is."""
    section, layers = Section("certainty", "How sure the router is"), analysis.layers
    names = short_names([layer.name for layer in layers])
    margins = [layer.router_margin for layer in layers]
    section.add(
        definitions(CERTAINTY),
        gallery(
            [
                section.figure(
                    "routing_entropy.png",
                    line_chart(
                        [Line("token entropy / log E", [layer.routing_entropy for layer in layers])],
                        names,
                        title="Entropy of the tokens' scores",
                        place_title="layer",
                        limits=(0.0, 1.0),
                    ),
                    "Token entropy of each layer",
                ),
                section.figure(
                    "router_margin.png",
                    line_chart([Line("z_(K) - z_(K+1)", margins)], names, title="Router margin", place_title="layer"),
                    "Router margin of each layer",
                ),
            ]
        ),
        folded(
            "The numbers",
            table(
                ["layer", "token entropy", "router margin"],
                [[layer.name, layer.routing_entropy, layer.router_margin] for layer in layers],
            ),
        ),
    )
    return section


def coactivation_section(analysis: Analysis) -> Section:
    """Which experts are chosen together."""
    section = Section("coactivation", "Experts chosen together")
    section.add(definitions(COACTIVATION))
    if all(layer.experts_per_token <= 1 for layer in analysis.layers):
        section.add(paragraph("Left out: every token has one expert at most, so none are chosen together."))
        return section
    names = short_names([layer.name for layer in analysis.layers])
    figures = []
    for place, (name, layer) in enumerate(zip(names, analysis.layers, strict=True)):
        shares = [
            [float("nan") if column == row else share for column, share in enumerate(shares)]
            for row, shares in enumerate(layer.coactivation)
        ]
        chance = max(layer.experts_per_token - 1, 0) / max(layer.num_experts - 1, 1)
        canvas = heatmap(
            shares,
            [str(expert) for expert in range(layer.num_experts)],
            title=f"Layer {name} (chance {chance:.2f})",
            row_title="i",
            column_title="j",
            scale=SHARE,
            largest_cell=40,
        )
        figures.append(section.figure(f"coactivation_{place}.png", canvas, f"Co-activation in {layer.name}"))
    section.add(gallery(figures))
    return section


def checkpoints_section(analysis: Analysis) -> Section:
    """How routing changed over training."""
    section = Section("checkpoints", "Change over the checkpoints")
    section.add(definitions(CHECKPOINTS))
    if section.leave_out(analysis.skipped.get("checkpoints")):
        return section
    series = analysis.checkpoints
    lines = [
        Line("saturation, mean over the layers", [_mean(one.saturation) for one in series]),
        Line("lowest layer", [min(one.saturation) for one in series]),
        Line("highest layer", [max(one.saturation) for one in series]),
        Line("top-1 saturation, mean", [_mean(one.saturation_top1) for one in series]),
        Line("change rate, mean", [None if one.change is None else _mean(one.change) for one in series]),
    ]
    chart = line_chart(
        lines,
        [one.name for one in series],
        title="Routing of the same tokens, compared with the last checkpoint",
        place_title="checkpoint",
        limits=(0.0, 1.0),
    )
    rows = [
        [one.name, _mean(one.saturation), _mean(one.saturation_top1), None if one.change is None else _mean(one.change),
         _mean(one.max_violation), _mean(one.routing_entropy)]
        for one in series
    ]  # fmt: skip
    header = ["checkpoint", "saturation", "top-1 saturation", "change rate", "MaxVio", "token entropy"]
    section.add(
        section.figure("checkpoints.png", chart, "Router saturation and change rate over the checkpoints"),
        table(header, rows),
        paragraph("Means over the layers; each layer's numbers are in checkpoints.csv."),
    )
    return section


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
