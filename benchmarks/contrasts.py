"""Which differences between the algorithms of a suite are resolved: paired tests, corrected, and ranks.

Losses are paired by model and seed, and tested with the t-test on the differences: few pairs are too few for a test
that assumes nothing (`least_sign_flip`). Zero-shot scores are paired by document, after the mean over seeds and models.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from cells import Documents, Results, documents_of, final_loss
from numpy.typing import NDArray
from scipy import stats

from lightning_moe.comparison import PairedDifference, holm, paired_difference

ALPHA = 0.05
Pairs = tuple[NDArray[np.float64], NDArray[np.float64]]

# fewer blocks are too few for the chi-square approximation
_LEAST_BLOCKS = 5


@dataclass(frozen=True)
class Contrast:
    """An algorithm held against another.

    Args:
        found: the algorithm's mean less the other's, with an interval that is not corrected.
        p_value: corrected over all algorithms held against the same one; nan if there was only one pair.
    """

    found: PairedDifference
    p_value: float

    @property
    def is_resolved(self) -> bool:
        """Whether the corrected p value is below 0.05."""
        return self.p_value < ALPHA


@dataclass(frozen=True)
class Friedman:
    """Whether the algorithms differ at all.

    Args:
        statistic: chi-square, with ``algorithms - 1`` degrees of freedom; nan if it was not computed.
        p_value: nan if it was not computed.
        algorithms: how many.
        blocks: pairs of a model and a seed with which all of them finished.
    """

    statistic: float
    p_value: float
    algorithms: int
    blocks: int


def loss_contrasts(results: Results, reference: str, models: Sequence[str]) -> dict[str, Contrast]:
    """The final losses of all algorithms against those of one; algorithms without a pair are left out."""
    pairs = {name: loss_pairs(results, reference, name, models) for name in results.algorithms if name != reference}
    found = {name: paired_difference(*pair) for name, pair in pairs.items() if len(pair[0])}
    return _corrected(found, {name: t_test(*pairs[name]) for name in found})


def score_contrasts(results: Results, reference: str, models: Sequence[str]) -> dict[str, Contrast]:
    """The zero-shot scores of all algorithms against those of one, document by document."""
    found = {}
    for name in results.algorithms:
        first, second = document_pairs(results, reference, name, models)
        if name != reference and len(first):
            found[name] = paired_difference(first, second)
    return _corrected(found, {name: each.p_value if each.count > 1 else math.nan for name, each in found.items()})


def loss_pairs(results: Results, first: str, second: str, models: Sequence[str]) -> Pairs:
    """The final losses of two algorithms, of each model and seed with which both finished."""
    rows = []
    for model in models:
        one, other = (results.values(model, name, final_loss) for name in (first, second))
        rows += [(one[seed], other[seed]) for seed in one if seed in other]
    table = np.array(rows, dtype=float).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def document_pairs(results: Results, first: str, second: str, models: Sequence[str]) -> Pairs:
    """The main metric of two algorithms on each document: mean over the seeds both have, then over the models.

    Documents are weighted so that their mean is the mean over tasks, of which each counts the same.
    """
    found: list[tuple[Documents, Documents]] = []
    for model in models:
        one, other = (results.runs(model, name) for name in (first, second))
        seeds = [seed for seed in one if seed in other]
        found.append((documents_of(results, model, first, seeds), documents_of(results, model, second, seeds)))
    tasks = sorted({task for one, other in found for task in one if task in other})
    parts: list[list[NDArray[np.float64]]] = [[], []]
    for task in tasks:
        rows = [
            (one[task], other[task])
            for one, other in found
            if task in one and task in other and one[task].shape == other[task].shape
        ]
        for side in range(2):
            parts[side].append(_mean_of_ragged([row[side] for row in rows]))
    total = sum(map(len, parts[0]))
    weighted = [[part * (total / (len(tasks) * len(part))) for part in side if len(part)] for side in parts]
    return (np.concatenate(weighted[0]), np.concatenate(weighted[1])) if total else (np.empty(0), np.empty(0))


def t_test(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """P value of Student's test on paired differences; nan of one pair."""
    if len(first) < 2:
        return math.nan
    # without any spread the test would divide by it
    if np.ptp(second - first) == 0:
        return paired_difference(first, second).p_value
    return float(stats.ttest_rel(second, first).pvalue)


def least_sign_flip(pairs: int, comparisons: int) -> float:
    """The smallest p value that a test by signs alone can give, of so many pairs, corrected for so many comparisons.

    Example:
        >>> least_sign_flip(3, 1)
        0.25
    """
    return min(1.0, comparisons * 2.0 ** (1 - pairs))


def ranks(values: Mapping[str, float]) -> dict[str, float]:
    """Ranks, 1 for the lowest; equal values share the mean of theirs, and nan has none.

    Example:
        >>> ranks({"a": 2.0, "b": 1.0, "c": 2.0})
        {'a': 2.5, 'b': 1.0, 'c': 2.5}
    """
    known = [name for name, value in values.items() if math.isfinite(value)]
    return dict(zip(known, map(float, stats.rankdata([values[name] for name in known])), strict=True)) if known else {}


def loss_ranks(results: Results, model: str) -> dict[str, float]:
    """Ranks on one model by the mean final loss."""
    return ranks({name: results.summary(model, name, final_loss).mean for name in results.ranked})


def mean_ranks(results: Results, models: Sequence[str]) -> dict[str, float]:
    """Mean over models of the rank by the mean final loss; of algorithms that have one in each of the models."""
    rows = [loss_ranks(results, model) for model in models]
    return {
        name: float(np.mean([row[name] for row in rows])) for name in results.ranked if all(name in r for r in rows)
    }


def rank_ranges(results: Results, models: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Between which ranks each algorithm lies: below those that are resolved to be better, above those to be worse.

    All pairs of algorithms are tested and corrected together, so that all ranges hold at once.

    Reference: Klein, Wright and Wieczorek, *A Joint Confidence Region for an Overall Ranking of Populations*, 2020,
    https://doi.org/10.1111/rssc.12402. Differs from it: the intervals of the differences are Holm's, and paired.
    """
    names = [name for name in results.ranked if any(results.runs(model, name) for model in models)]
    couples, differences, p_values = [], [], []
    for one, other in itertools.combinations(names, 2):
        first, second = loss_pairs(results, one, other, models)
        if len(first) > 1:
            couples.append((one, other))
            differences.append(float(np.mean(second - first)))
            p_values.append(t_test(first, second))
    better, worse = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    for (one, other), difference, p_value in zip(couples, differences, holm(p_values), strict=True):
        if p_value < ALPHA:
            low, high = (one, other) if difference > 0 else (other, one)
            worse[low] += 1
            better[high] += 1
    return {name: (1 + better[name], len(names) - worse[name]) for name in names}


def friedman(results: Results, models: Sequence[str]) -> Friedman:
    """Friedman's test over the blocks that are complete; algorithms that never finished are left out."""
    names = [name for name in results.ranked if any(results.runs(model, name) for model in models)]
    blocks = []
    for model in models:
        losses = [results.values(model, name, final_loss) for name in names]
        for seed in results.suite.seeds(model):
            if all(seed in values for values in losses):
                blocks.append([values[seed] for values in losses])
    if len(names) < 3 or len(blocks) < _LEAST_BLOCKS:
        return Friedman(math.nan, math.nan, len(names), len(blocks))
    found = stats.friedmanchisquare(*np.array(blocks).T)
    return Friedman(float(found.statistic), float(found.pvalue), len(names), len(blocks))


def sole_best(rows: Mapping[str, NDArray[np.float64]]) -> str | None:
    """The row with the highest mean, if it is resolved to be higher than every other, or None.

    Which one is highest is seen only in the same numbers, so the p values are multiplied by the number of all pairs.
    """
    order = sorted(rows, key=lambda name: -float(np.mean(rows[name])))
    all_pairs = len(order) * (len(order) - 1) / 2
    # the nearest first, which mostly settles it
    for other in order[1:]:
        if rows[other].shape != rows[order[0]].shape or np.array_equal(rows[other], rows[order[0]]):
            return None
        if paired_difference(rows[other], rows[order[0]]).p_value * all_pairs >= ALPHA:
            return None
    return order[0] if len(order) > 1 else None


def _corrected(found: Mapping[str, PairedDifference], p_values: Mapping[str, float]) -> dict[str, Contrast]:
    tested = [name for name in found if not math.isnan(p_values[name])]
    corrected = dict(zip(tested, holm([p_values[name] for name in tested]), strict=True))
    return {name: Contrast(each, corrected.get(name, math.nan)) for name, each in found.items()}


def _mean_of_ragged(rows: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    # models may be asked different numbers of a task's documents, always the first ones
    whole = np.full((len(rows), max(map(len, rows), default=0)), np.nan)
    for place, row in zip(whole, rows, strict=True):
        place[: len(row)] = row
    mean: NDArray[np.float64] = np.nanmean(whole, axis=0) if rows else np.empty(0)
    return mean
