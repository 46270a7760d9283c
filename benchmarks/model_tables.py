"""The tables of one model of a suite: losses, zero-shot scores, the experts and the cost."""

import math
from collections.abc import Sequence

from cells import (
    Measure,
    Results,
    Summary,
    chances_of,
    documents_of,
    final_loss,
    mean_score,
    number,
    routing,
    start_loss,
    summarize,
    task_score,
    tasks_of,
)
from contrasts import Contrast, loss_contrasts, loss_ranks, rank_ranges, score_contrasts, sole_best
from typeset import MINUS, NOTHING, Bold, Table, p_text, signed

_PRETRAINED = "pretrained, as it was"
_SEEDS = "runs that finished, of those planned."
_BRIEF = (
    "Against another: the difference and, in brackets, its p after Holm's correction over the column; n.r.: the "
    "difference is not resolved; one pair: it cannot be tested."
)


def losses(results: Results, model: str) -> Table:
    """Final loss, rank and differences of each algorithm on one model."""
    rank = loss_ranks(results, model)
    against = {name: loss_contrasts(results, name, [model]) for name in results.references}
    ranges = rank_ranges(results, [model])
    start = _before_training(results, model, [start_loss], 4, 1.0)
    rows = [[_PRETRAINED, NOTHING, *start, *[NOTHING] * (2 + len(against))]]
    for name in results.algorithms:
        title = results.title(name)
        rows.append(
            [
                Bold(title) if ranges.get(name) == (1, 1) else title,
                _seeds(results, model, name),
                _spread(results.summary(model, name, start_loss), 4, with_deviation=False),
                _spread(results.summary(model, name, final_loss), 4),
                f"{rank[name]:g}" if name in rank else NOTHING,
                *(_brief(found.get(name), 1.0, 4) for found in against.values()),
            ]
        )
    columns = {
        "algorithm": "bold if its loss is resolved to be the lowest of all that are ranked.",
        "seeds": _SEEDS,
        "at the start": "validation loss before the first step, mean over seeds.",
        "at the end": "validation loss after the last step, in nats per token: mean ± standard deviation over seeds.",
        "rank": "by the mean; 1 is the lowest, the dense baselines are not ranked.",
        **{f"against {results.title(name)}": "" for name in against},
    }
    return Table(f"loss-{model}", f"{results.model_title(model)}: validation loss.", columns, rows, _BRIEF)


def scores(results: Results, model: str) -> Table:
    """Mean zero-shot score of each algorithm on one model."""
    tasks, chances = tasks_of(results, model), chances_of(results, model)
    guessed = [task for task in tasks if task in chances]
    against = {name: score_contrasts(results, name, [model]) for name in results.references}
    at_start = [mean_score(tasks, "start"), mean_score(guessed, "start", chances)]
    start = _before_training(results, model, at_start, 1, 100.0)
    rows = [[_PRETRAINED, NOTHING, *start, *[NOTHING] * len(against)]]
    for name in results.algorithms:
        rows.append(
            [
                results.title(name),
                _seeds(results, model, name),
                _spread(results.summary(model, name, mean_score(tasks)), 1, 100.0),
                _spread(results.summary(model, name, mean_score(guessed, chances=chances)), 1, 100.0),
                *(_brief(found.get(name), 100.0, 1) for found in against.values()),
            ]
        )
    columns = {
        "algorithm": "",
        "seeds": _SEEDS,
        "score": "mean over tasks of each task's main metric, in percent: mean ± standard deviation over seeds.",
        "above chance": f"the same less what guessing gets, over {_tasks(len(guessed))} for which that is known.",
        **{f"against {results.title(name)}": "" for name in against},
    }
    return Table(f"score-{model}", f"{results.model_title(model)}: zero-shot score.", columns, rows, _BRIEF)


def tasks(results: Results, model: str) -> Table:
    """Main metric of each algorithm in each task."""
    names, chances = tasks_of(results, model), chances_of(results, model)
    best = {task: _best_in_task(results, model, task) for task in names}
    rows = [["chance", *(f"{100 * chances[task]:.1f}" if task in chances else NOTHING for task in names)]]
    for algorithm in _that_ran(results, model):
        cells = [_spread(results.summary(model, algorithm, task_score(task)), 1, 100.0) for task in names]
        chosen = [Bold(cell) if best[task] == algorithm else cell for task, cell in zip(names, cells, strict=True)]
        rows.append([results.title(algorithm), *chosen])
    documents, metrics = _task_facts(results, model)
    columns = {"algorithm": "the first row is what guessing gets.", **dict.fromkeys(names, "")}
    told = ", ".join(f"{task} {metrics[task]} ({documents.get(task, 'unknown')})" for task in names)
    note = (
        "In percent, mean ± standard deviation over seeds. Bold is the best where it is resolved to be better than "
        f"every other. Metric and number of documents: {told}."
    )
    return Table(f"tasks-{model}", f"{results.model_title(model)}: each task.", columns, rows, note)


def experts(results: Results, model: str) -> Table:
    """How the experts are used, and how alike they are."""
    rows = []
    for name in _that_ran(results, model):
        start, end = (results.summary(model, name, number(f"expert_similarity{when}")) for when in ("_start", ""))
        if not any(record.get("expert_load") for record in results.runs(model, name).values()):
            continue
        similar = [_spread(each, 3, with_deviation=False) for each in (start, end)]
        measures = [_spread(results.summary(model, name, routing(key)), 2) for key in ("max_violation", "load_entropy")]
        dead = _spread(results.summary(model, name, routing("dead_experts")), 1, with_deviation=False)
        rows.append([results.title(name), *measures, dead, " → ".join(similar)])
    columns = {
        "algorithm": "",
        "max violation": "load of the busiest expert over the fair share, less 1; 0 is balance. Mean over layers, and "
        "mean ± standard deviation over seeds.",
        "load entropy": "entropy of the load over that of a fair load; 1 is balance.",
        "dead experts": "without any token, all layers together, mean over seeds.",
        "similarity": "mean cosine of two experts' weights before the first step and after the last; 1 is the same.",
    }
    return Table(f"experts-{model}", f"{results.model_title(model)}: the experts at the end.", columns, rows)


def cost(results: Results, model: str) -> Table:
    """Size, training and speed."""
    measures: list[tuple[Measure, float, int]] = [
        (number("parameters"), 1e-6, 1),
        (number("active_parameters"), 1e-6, 1),
        (number("steps"), 1.0, 0),
        (number("tokens"), 1e-3, 0),
        (number("training_flops"), 1e-12, 2),
        (number("tokens_per_cpu_second"), 1.0, 0),
        (number("peak_memory_bytes"), 1e-6, 0),
    ]
    rows = []
    for name in _that_ran(results, model):
        found = [
            _spread(results.summary(model, name, measure), digits, factor, with_deviation=False)
            for measure, factor, digits in measures
        ]
        rows.append([results.title(name), *found])
    columns = {
        "algorithm": "means over seeds.",
        "M parameters": "in millions.",
        "M active": "parameters that compute for a token, in millions.",
        "steps": "of the optimizer.",
        "k tokens": "trained on, in thousands.",
        "TFLOPs": "operations of the whole training, forward and backward, in trillions.",
        "tokens/CPU s": "tokens of training per second of one core.",
        "peak MB": "most memory that the process held, from its start to its end.",
    }
    return Table(f"cost-{model}", f"{results.model_title(model)}: size and cost.", columns, rows)


def _brief(contrast: Contrast | None, factor: float, digits: int) -> str:
    if contrast is None:
        return NOTHING
    difference = signed(factor * contrast.found.difference, digits)
    if math.isnan(contrast.p_value):
        return f"{difference} (one pair)"
    return f"{difference} ({p_text(contrast.p_value)}){'' if contrast.is_resolved else ' n.r.'}"


def _spread(summary: Summary, digits: int, factor: float = 1.0, *, with_deviation: bool = True) -> str:
    if summary.count == 0:
        return NOTHING
    mean = f"{factor * summary.mean:.{digits}f}".replace("-", MINUS)
    has_one = with_deviation and summary.count > 1
    return f"{mean} ± {factor * summary.deviation:.{digits}f}" if has_one else mean


def _that_ran(results: Results, model: str) -> list[str]:
    return [name for name in results.algorithms if results.runs(model, name)]


def _seeds(results: Results, model: str, algorithm: str) -> str:
    return f"{len(results.runs(model, algorithm))} of {len(results.suite.seeds(model))}"


def _before_training(
    results: Results, model: str, measures: Sequence[Measure], digits: int, factor: float
) -> list[str]:
    # every run of a baseline begins with the pretrained model
    runs = [record for name in results.baselines.values() for record in results.runs(model, name).values()]
    found = [[value for record in runs if (value := measure(record)) is not None] for measure in measures]
    return [_spread(summarize(values), digits, factor, with_deviation=False) for values in found]


def _best_in_task(results: Results, model: str, task: str) -> str | None:
    found = {name: documents_of(results, model, name, list(results.runs(model, name))) for name in results.algorithms}
    return sole_best({name: documents[task] for name, documents in found.items() if task in documents})


def _task_facts(results: Results, model: str) -> tuple[dict[str, str], dict[str, str]]:
    counts: dict[str, set[int]] = {}
    metrics: dict[str, str] = {}
    for (of_model, _, _), record in results.cells.items():
        if of_model == model:
            metrics |= record.get("main_metric") or {}
            for task, answers in (record.get("documents") or {}).items():
                counts.setdefault(task, set()).add(len(answers))
    return {task: " or ".join(map(str, sorted(found))) for task, found in counts.items()}, metrics


def _tasks(count: int) -> str:
    return f"{count} task{'' if count == 1 else 's'}"
