"""The plots of a suite: losses, differences to the baselines, zero-shot scores, and the load of the experts."""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from cells import Record, Results, final_loss, load_by_rank
from contrasts import Contrast, loss_contrasts, score_contrasts
from panels import OTHERS, CurvePanel, Dot, DotPanel, Key, curve_panels, dot_plot
from typeset import MINUS, signed

from lightning_moe.canvas import FAINT, INK, SERIES, Canvas, Point
from lightning_moe.heatmap import RELATIVE, heatmap

_PLAIN, _REFERENCE = SERIES[0], SERIES[1]
_BETTER, _WORSE = SERIES[0], SERIES[4]
_TESTED = [
    Key("better, resolved", "dot", _BETTER),
    Key("worse, resolved", "dot", _WORSE),
    Key("not resolved", "ring", FAINT),
    Key("95 % interval, of the row alone", "line", FAINT),
]


def pictures(results: Results) -> dict[str, Canvas]:
    """All plots by the names of their files."""
    drawn = {
        "final_loss": final_losses(results),
        "differences": loss_differences(results),
        "scores": score_differences(results),
    }
    for model in results.models:
        drawn[f"losses_{model}"] = loss_curves(results, model)
        drawn[f"scores_{model}"] = score_differences(results, model)
        drawn[f"load_{model}"] = load_map(results, model)
    return {f"{name}.png": canvas for name, canvas in drawn.items() if canvas is not None}


def final_losses(results: Results) -> Canvas | None:
    """A panel for each model: mean, standard deviation and single seeds of each algorithm, the lowest first."""
    panels = []
    for model in results.models:
        found = {name: results.values(model, name, final_loss) for name in results.ranked}
        means = {name: float(np.mean(list(values.values()))) for name, values in found.items() if values}
        dots = []
        for name in sorted(means, key=means.__getitem__):
            values = list(found[name].values())
            reach = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
            colour = _REFERENCE if name == results.suite.settings.get("reference") else _PLAIN
            ends = (means[name] - reach, means[name] + reach)
            dots.append(Dot(results.title(name), means[name], *ends, f"{means[name]:.4f}", colour, points=values))
        rules = [results.summary(model, name, final_loss).mean for name in results.baselines.values()]
        seeds = len(results.suite.seeds(model))
        title = f"{results.model_title(model)} ({seeds} seed{'' if seeds == 1 else 's'})"
        panels.append(DotPanel(title, dots, rules))
    keys = [Key("mean and standard deviation over seeds; small: single seeds", "dot", _PLAIN)]
    if (reference := results.suite.settings.get("reference")) is not None:
        keys.append(Key(f"{results.title(reference)}, the reference", "dot", _REFERENCE))
    keys += _baseline_keys(results, results.baselines.values())
    title = "Final validation loss: left is better"
    return _plot(panels, title=title, axis="nats per token", keys=keys, shared=False)


def loss_differences(results: Results) -> Canvas | None:
    """A panel for each reference: differences over all models."""
    panels = []
    for reference in results.references:
        found = loss_contrasts(results, reference, results.models)
        dots = _tested_dots(results, found, 1.0, 4, lower_is_better=True)
        panels.append(DotPanel(f"against {results.title(reference)}", dots, [0.0]))
    title = f"Final validation loss, {_over(results)}: left is better"
    return _plot(panels, title=title, axis="nats per token", keys=_TESTED, shared=False)


def score_differences(results: Results, model: str | None = None) -> Canvas | None:
    """A panel for each reference: differences of the zero-shot score, on one model or over all."""
    models = results.models if model is None else [model]
    panels = []
    for reference in results.references:
        dots = _tested_dots(results, score_contrasts(results, reference, models), 100.0, 1, lower_is_better=False)
        panels.append(DotPanel(f"against {results.title(reference)}", dots, [0.0]))
    title = f"Zero-shot score, {_over(results) if model is None else results.model_title(model)}: right is better"
    return _plot(panels, title=title, axis="percentage points", keys=_TESTED, shared=True)


def loss_curves(results: Results, model: str) -> Canvas:
    """A panel for each algorithm: its mean validation loss over the tokens trained on, before all others."""
    curves = {name: _curve(results, model, name) for name in results.algorithms}
    curves = {name: curve for name, curve in curves.items() if curve}
    baselines = {name: curves[name] for name in results.baselines.values() if name in curves}
    shown = {name: curve for name, curve in curves.items() if name not in baselines} or curves
    panels = [CurvePanel(results.title(name), f"{curve[-1][1]:.4f}", curve) for name, curve in shown.items()]
    keys = [
        Key("this algorithm, mean over seeds; its end is written above", "line", _PLAIN),
        Key("the other algorithms", "line", OTHERS),
        *_baseline_keys(results, baselines),
    ]
    return curve_panels(
        panels,
        list(shown.values()),
        list(baselines.values()),
        title=f"{results.model_title(model)}: validation loss",
        axes=("k tokens", "nats per token"),
        keys=keys,
        colour=_PLAIN,
    )


def load_map(results: Results, model: str) -> Canvas | None:
    """How the tokens are shared out: a row for each algorithm, its experts sorted by their load."""
    rows = {}
    for name in results.algorithms:
        loads = [load for record in results.runs(model, name).values() if (load := load_by_rank(record)) is not None]
        if loads:
            rows[results.title(name)] = [float(value) for value in np.mean(loads, axis=0)]
    if not rows:
        return None
    return heatmap(
        list(rows.values()),
        list(rows),
        title=f"{results.model_title(model)}: load over the fair share, mean over layers and seeds",
        row_title="algorithm",
        column_title="experts, busiest first",
        scale=RELATIVE,
    )


def _plot(panels: Sequence[DotPanel], *, title: str, axis: str, keys: Sequence[Key], shared: bool) -> Canvas | None:
    drawn = [panel for panel in panels if panel.dots]
    return dot_plot(drawn, title=title, axis=axis, keys=keys, columns=2, shared=shared) if drawn else None


def _tested_dots(
    results: Results, found: Mapping[str, Contrast], factor: float, digits: int, *, lower_is_better: bool
) -> list[Dot]:
    order = sorted(found, key=lambda name: found[name].found.difference * (1 if lower_is_better else -1))
    dots = []
    for name in order:
        each = found[name].found
        is_better = (each.difference < 0) == lower_is_better
        colour = FAINT if not found[name].is_resolved else _BETTER if is_better else _WORSE
        ends = [factor * end if math.isfinite(end) else math.nan for end in (each.low, each.high)]
        # the font of the pictures has no true minus
        text = signed(factor * each.difference, digits).replace(MINUS, "-")
        value = factor * each.difference
        dots.append(Dot(results.title(name), value, ends[0], ends[1], text, colour, found[name].is_resolved))
    return dots


def _baseline_keys(results: Results, names: Iterable[str]) -> list[Key]:
    return [Key(results.title(name), "dashes" if number else "line", INK) for number, name in enumerate(names)]


def _curve(results: Results, model: str, algorithm: str) -> list[Point]:
    records = list(results.runs(model, algorithm).values())
    rows = [_validation(record) for record in records]
    steps = sorted(set.intersection(*map(set, rows))) if rows else []
    return [(step * _tokens_per_step(records[0]) / 1e3, float(np.mean([row[step] for row in rows]))) for step in steps]


def _validation(record: Record) -> dict[int, float]:
    return {row["step"]: row["mean"] for row in record["losses"]["validation"] if row.get("mean") is not None}


def _tokens_per_step(record: Record) -> float:
    tokens: float = record["tokens"] / max(record["steps"], 1)
    return tokens


def _over(results: Results) -> str:
    count = len(results.models)
    return "one model" if count == 1 else f"{count} models together"
