"""Evaluations of several models side by side: paired differences on the same documents. Needs the extra ``eval``."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np

from lightning_moe.comparison import PairedDifference, holm, paired_difference, paired_statistic
from lightning_moe.evaluation import Scores, metric_name

__all__ = ["Comparison", "compare_results", "comparison_table", "document_values"]

_LEVEL = 0.05
# Of a bootstrap, and of random swaps, which give no p value below 1 / (samples + 1): what is corrected for many
# comparisons must be able to fall below 0.05. The aggregation of a task may take a second, as BLEU does.
_MANY_SAMPLES, _FEW_SAMPLES = 10_000, 1000
# Log-likelihoods that are nearer than this, absolutely or relatively, are equal but for the rounding of float32: of a
# model with 30 layers and its upcycled copy the most was 1e-5. A t-test would take it for a difference.
_ROUNDING = 2e-5


@dataclass(frozen=True)
class Comparison:
    """One metric of one task: a model against the baseline, on the documents of both."""

    task: str
    metric: str
    model: str
    paired: PairedDifference
    """The model minus the baseline; of perplexities the model over the baseline, and so are the interval's ends."""
    is_ratio: bool
    higher_is_better: bool | None
    """None if the task does not say."""
    corrected_p: float
    """Corrected for all comparisons that were made together."""

    @property
    def verdict(self) -> str:
        """What the comparison tells: "better", "worse", or "not resolved".

        Resolved is what chance would not give: a 95 % interval without "no difference" in it, and a corrected p of at
        most 0.05.
        """
        none = 1.0 if self.is_ratio else 0.0
        if self.corrected_p > _LEVEL or self.paired.low <= none <= self.paired.high:
            return "not resolved"
        is_higher = self.paired.difference > none
        if self.higher_is_better is None:
            return "higher" if is_higher else "lower"
        return "better" if is_higher == self.higher_is_better else "worse"

    def as_dict(self) -> dict[str, Any]:
        """All of it under one another, with the verdict."""
        found = asdict(self)
        paired = found.pop("paired")
        return {**found, **paired, "verdict": self.verdict}


def compare_results(results: Mapping[str, Mapping[str, Any]], tasks: Mapping[str, Any]) -> list[Comparison]:
    """Compares models with the first one, document by document, in every task and metric.

    By what the task makes of the numbers of its documents:

    - a mean, as of ``acc``, ``acc_norm`` or ``exact_match``: `paired_difference` of the numbers;
    - a perplexity, ``exp(-mean(log-likelihood))``: the ratio ``exp(d)``, with ``d`` the `paired_difference` of the
      negative log-likelihoods;
    - a perplexity per word or byte, ``exp(-sum(log-likelihood) / sum(words))``: the ratio, by `paired_statistic` of the
      logarithm with 10,000 samples; bits per byte likewise, as a difference;
    - anything else, as an F1 score: `paired_statistic` of it, with 1,000 samples.

    What is equal but for the rounding of float32 counts as equal. Groups are compared by their tasks. The p values are
    corrected together, with `holm`.

    Args:
        results: by the name of each model what `evaluate_model` returned for it, with ``log_samples``; the first is the
            baseline.
        tasks: what `load_tasks` returned, and all models were evaluated on.

    Returns:
        Of each task, each metric, each model but the first.

    Example:
        >>> results = {name: evaluate_model(lm, tasks, log_samples=True) for name, lm in lms}  # doctest: +SKIP
        >>> print(comparison_table(results, compare_results(results, tasks)))  # doctest: +SKIP
    """
    baseline, *others = results
    found = []
    for task, key in _metrics(results[baseline]):
        metric, _, _ = key.partition(",")
        aggregate = tasks["tasks"][task].aggregation().get(metric)
        better = results[baseline].get("higher_is_better", {}).get(task, {}).get(metric)
        first = _values(results[baseline], task, key)
        for model in others:
            _check_same_documents(results[baseline], results[model], task)
            second = _values(results[model], task, key)
            shared = [document for document in first if document in second]
            pairs = ([one[document] for document in shared] for one in (first, second))
            paired, is_ratio = _compare(aggregate, *pairs)
            found.append(Comparison(task, metric_name(key), model, paired, is_ratio, better, paired.p_value))
    corrected = holm([comparison.corrected_p for comparison in found])
    return [replace(comparison, corrected_p=p) for comparison, p in zip(found, corrected, strict=True)]


def comparison_table(found: Mapping[str, Scores], comparisons: Sequence[Comparison]) -> str:
    """Writes `compare_results` as a table, with the values of all models.

    Args:
        found: the `scores` of each model, by its name; the first is the baseline.
        comparisons: of the others with it.

    Example:
        >>> found = {"dense": {"piqa": {"acc": 0.5, "acc_stderr": 0.25}}, "moe": {"piqa": {"acc": 0.75}}}
        >>> paired = PairedDifference(difference=0.25, low=-0.5, high=1.0, p_value=0.5, count=4)
        >>> comparison = Comparison("piqa", "acc", "moe", paired, False, True, corrected_p=0.5)
        >>> print(comparison_table(found, [comparison]))
        task  metric  model   value  std. error  difference     95 % interval  p (Holm)
        piqa  acc     dense  0.5000      0.2500
        piqa  acc     moe    0.7500                 +0.2500  -0.5000..+1.0000    0.5000  not resolved
        <BLANKLINE>
        Differences from dense, document by document. p is corrected for 1 comparison. Not resolved: p is above 0.05,
        or the interval holds 0.
    """
    baseline = next(iter(found))
    names = _short(list(found))
    rows = [("task", "metric", "model", "value", "std. error", "difference", "95 % interval", "p (Holm)", "")]
    for task, metric in dict.fromkeys((comparison.task, comparison.metric) for comparison in comparisons):
        rows.append((task, metric, names[baseline], *_value(found[baseline], task, metric), "", "", "", ""))
        for comparison in comparisons:
            if (comparison.task, comparison.metric) == (task, metric):
                value = _value(found[comparison.model], task, metric)
                rows.append((task, metric, names[comparison.model], *value, *_judged(comparison)))
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(f"{cell:{'<' if place in (0, 1, 2, 8) else '>'}{wide[place]}}" for place, cell in enumerate(row))
        for row in rows
    ]
    return "\n".join([*(line.rstrip() for line in lines), "", _legend(names[baseline], comparisons)])


def document_values(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What each document gave each model.

    Args:
        results: as for `compare_results`.

    Returns:
        Of each task ``doc_id`` and ``doc_hash``, as lm-eval tells them, and under ``values`` by metric and model the
        numbers in this order; None where a document has none. Of a perplexity they are log-likelihoods.
    """
    first = next(iter(results.values()))
    found: dict[str, Any] = {}
    for task, key in _metrics(first):
        hashes = _hashes(first, task)
        entry = found.setdefault(task, {"doc_id": list(hashes), "doc_hash": list(hashes.values()), "values": {}})
        by_model = {model: _values(one, task, key) for model, one in results.items()}
        entry["values"][metric_name(key)] = {model: [one.get(i) for i in hashes] for model, one in by_model.items()}
    return found


def _metrics(results: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    # each task with lm-eval's keys of its metrics; groups have no samples
    for task in results["samples"]:
        for key in results["results"][task]:
            if "," in key and not key.partition(",")[0].endswith("_stderr"):
                yield task, key


def _values(results: Mapping[str, Any], task: str, key: str) -> dict[int, Any]:
    # by the number of the document
    metric, _, kind = key.partition(",")
    samples = (sample for sample in results["samples"][task] if sample["filter"] == kind and metric in sample)
    return {sample["doc_id"]: sample[metric] for sample in sorted(samples, key=lambda sample: sample["doc_id"])}


def _hashes(results: Mapping[str, Any], task: str) -> dict[int, str]:
    return dict(sorted((sample["doc_id"], sample["doc_hash"]) for sample in results["samples"][task]))


def _check_same_documents(first: Mapping[str, Any], second: Mapping[str, Any], task: str) -> None:
    assert _hashes(first, task) == _hashes(second, task), f"{task}: the models were not given the same documents"


def _compare(
    aggregate: Callable[[list[Any]], float] | None, first: list[Any], second: list[Any]
) -> tuple[PairedDifference, bool]:
    # and whether it is a ratio
    from lm_eval.api.metrics import bits_per_byte, mean, perplexity, weighted_mean, weighted_perplexity

    if aggregate in (None, mean, perplexity, weighted_perplexity, bits_per_byte):
        second = [a if np.allclose(a, b, _ROUNDING, _ROUNDING) else b for a, b in zip(first, second, strict=True)]
    if aggregate is perplexity:
        return _ratio(paired_difference([-value for value in first], [-value for value in second])), True
    if aggregate is weighted_perplexity:
        log = paired_statistic(lambda items: -weighted_mean(items), first, second, num_samples=_MANY_SAMPLES)
        return _ratio(log), True
    # lm-eval takes the mean where a task says nothing
    if aggregate is None or aggregate is mean:
        return paired_difference([float(value) for value in first], [float(value) for value in second]), False
    num_samples = _MANY_SAMPLES if aggregate is bits_per_byte else _FEW_SAMPLES
    return paired_statistic(aggregate, first, second, num_samples=num_samples), False


def _ratio(log: PairedDifference) -> PairedDifference:
    with np.errstate(over="ignore"):
        difference, low, high = (float(np.exp(value)) for value in (log.difference, log.low, log.high))
    return replace(log, difference=difference, low=low, high=high)


def _value(found: Scores, task: str, metric: str) -> tuple[str, str]:
    value, error = found[task].get(metric, math.nan), found[task].get(f"{metric}_stderr", math.nan)
    return f"{value:.4f}", "" if math.isnan(error) else f"{error:.4f}"


def _judged(comparison: Comparison) -> tuple[str, str, str, str]:
    paired, sign = comparison.paired, "" if comparison.is_ratio else "+"
    difference = f"{'x' if comparison.is_ratio else ''}{paired.difference:{sign}.4f}"
    interval = f"{paired.low:{sign}.4f}..{paired.high:{sign}.4f}"
    p = "<0.0001" if comparison.corrected_p < 0.0001 else f"{comparison.corrected_p:.4f}"
    return difference, interval, p, comparison.verdict


def _short(models: Sequence[str]) -> dict[str, str]:
    # the last part of a path tells, unless two have the same
    last = [Path(model).expanduser().resolve().name for model in models]
    return dict(zip(models, last if len(set(last)) == len(last) else models, strict=True))


def _legend(baseline: str, comparisons: Sequence[Comparison]) -> str:
    some_are_ratios = any(comparison.is_ratio for comparison in comparisons)
    ratio, or_one = (", x a ratio of perplexities", " (of a ratio, 1)") if some_are_ratios else ("", "")
    number = f"{len(comparisons)} comparison{'s' if len(comparisons) > 1 else ''}"
    text = (
        f"Differences from {baseline}, document by document{ratio}. p is corrected for {number}. "
        f"Not resolved: p is above 0.05, or the interval holds 0{or_one}."
    )
    return fill(text, width=112)
