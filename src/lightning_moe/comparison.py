"""Paired comparisons: of two models on the same documents, or of two algorithms with the same seeds.

What both did on one document, or with one seed, is a pair; what the pairs share, such as how hard a document is, leaves
no trace in their differences. Needs scipy, which the extra ``eval`` brings.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

__all__ = ["PairedDifference", "holm", "paired_difference", "paired_statistic"]

Numbers = Sequence[int | float] | np.ndarray

# Pairs that differ, up to which all 2^n signs are tried: 4096 of them. With fewer the t-test is too sure of itself: of
# 50 answers, 5 of which only the second model gets right, it says p = 0.02; the signs say 0.06.
_MAX_EXACT = 12


@dataclass(frozen=True)
class PairedDifference:
    """A mean difference over pairs, second minus first."""

    difference: float
    low: float
    """Lower end of the confidence interval."""
    high: float
    """Upper end."""
    p_value: float
    """How often chance alone would make a difference as large, in either direction; not corrected."""
    count: int
    """Number of pairs."""


def paired_difference(first: Numbers, second: Numbers, confidence: float = 0.95) -> PairedDifference:
    """Compares two rows of numbers that belong together one by one: how much larger the second is on average.

    With ``d = second - first``, of n pairs:

    - ``difference = mean(d)``, in the interval ``mean(d) ± t(n - 1) * s / sqrt(n)``, with ``s`` the standard deviation
      of ``d`` and ``t`` the quantile of Student's distribution; unbounded if there is only one pair.
    - ``p_value``: if at most 12 pairs differ, the share of all ways to flip the signs of ``d`` in which the mean is at
      least as far from 0 (Fisher's sign-flip test; for right and wrong answers it is McNemar's exact test). It needs no
      normal distribution, but n differing pairs never give less than ``2 / 2^n``: of five or fewer, none below 0.05.
      With more that differ, the t-test.

    Without a pair that differs, the difference is 0, its interval only 0, and p 1: these pairs cannot tell how others
    would differ. With a number that is not finite, the interval is unbounded, and p 1.

    Reference: Fisher, *The Design of Experiments*, 1935, section 21; McNemar, *Note on the sampling error of the
    difference between correlated proportions*, 1947, https://doi.org/10.1007/BF02295996.

    Args:
        first: numbers of the baseline, such as 1 for a right answer and 0 for a wrong one, or one loss per seed.
        second: numbers of what is compared, in the same order.
        confidence: of the interval, between 0 and 1.

    Raises:
        ValueError: if there is no pair, if the rows are not equally long, or if the confidence is out of range.
        ModuleNotFoundError: if scipy is not installed.

    Example:
        >>> found = paired_difference([0, 0, 1, 0], [1, 1, 1, 0])
        >>> found.difference, found.p_value, found.count
        (0.5, 0.5, 4)
    """
    _check_rows(first, second)
    _check_confidence(confidence)
    # the difference of two infinities is told by its value
    with np.errstate(invalid="ignore"):
        differences = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
        count, mean = len(differences), float(differences.mean())
    if count == 1 or not np.isfinite(differences).all():
        return PairedDifference(mean, -math.inf, math.inf, 1.0, count)
    if np.ptp(differences) == 0:
        # no spread: the t-test would divide by it
        return PairedDifference(mean, mean, mean, 2.0 ** (1 - count) if mean else 1.0, count)
    quantile, probability = _student()
    error = float(differences.std(ddof=1)) / math.sqrt(count)
    reach = error * float(quantile(count - 1, (1 + confidence) / 2))
    moved = differences[differences != 0]
    p_value = _sign_flip(moved) if len(moved) <= _MAX_EXACT else float(2 * probability(count - 1, -abs(mean) / error))
    return PairedDifference(mean, mean - reach, mean + reach, p_value, count)


def paired_statistic(
    statistic: Callable[[list[Any]], float],
    first: Sequence[Any],
    second: Sequence[Any],
    confidence: float = 0.95,
    *,
    num_samples: int = 1000,
    seed: int = 0,
) -> PairedDifference:
    """Compares two rows by a statistic of a whole row that is no mean, such as an F1 score.

    The interval holds the middle of the differences over ``num_samples`` bootstrap samples, each of the same pairs of
    both rows. With few pairs it is too narrow; the p value is not: it is the share of the ways to swap the two members
    of pairs in which the difference is at least as large, of all ``2^n`` ways, or, if these are more than
    ``num_samples``, of as many random ones and the one there is.

    Reference: Koehn, *Statistical Significance Tests for Machine Translation Evaluation*, 2004,
    https://aclanthology.org/W04-3250; Riezler and Maxwell, *On Some Pitfalls in Automatic Evaluation and Significance
    Testing for MT*, 2005, https://aclanthology.org/W05-0908.

    Args:
        statistic: of a list of items.
        first: items of the baseline.
        second: items of what is compared, in the same order.
        confidence: of the interval, between 0 and 1.
        num_samples: bootstrap samples, and random swaps.
        seed: of both.

    Raises:
        ValueError: if there is no pair, if the rows are not equally long, or if the confidence is out of range.

    Example:
        >>> paired_statistic(max, [1, 2, 3], [2, 3, 4]).difference
        1.0
    """
    _check_rows(first, second)
    _check_confidence(confidence)
    count, generator = len(first), np.random.default_rng(seed)
    # the partner of an item is as far behind it as there are pairs
    items, own = [*first, *second], np.arange(count)
    drawn = (generator.integers(count, size=count) for _ in range(num_samples))
    resampled = _differences(statistic, items, ((row, row + count) for row in drawn))
    all_ways = 2**count <= num_samples
    swaps = _all_ways(count) if all_ways else (generator.integers(2, size=count) for _ in range(num_samples))
    swapped = _differences(statistic, items, ((own + count * swap, own + count * (1 - swap)) for swap in swaps))
    difference = float(statistic(list(second))) - float(statistic(list(first)))
    if not (math.isfinite(difference) and np.isfinite(resampled).all() and np.isfinite(swapped).all()):
        return PairedDifference(difference, -math.inf, math.inf, 1.0, count)
    low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    as_large = int((np.abs(swapped) >= abs(difference) * (1 - 1e-9)).sum())
    p_value = as_large / len(swapped) if all_ways else (as_large + 1) / (len(swapped) + 1)
    return PairedDifference(difference, float(low), float(high), p_value, count)


def holm(p_values: Sequence[int | float]) -> list[float]:
    """Corrects p values for their number: that one of m true hypotheses falls below 0.05 has a chance of at most 5 %.

    ``corrected_(i) = max over j <= i of min(1, (m - j + 1) * p_(j))``, the p values in rising order.

    Reference: Holm, *A Simple Sequentially Rejective Multiple Test Procedure*, 1979,
    https://www.jstor.org/stable/4615733.

    Args:
        p_values: of all comparisons that are looked at together.

    Returns:
        The corrected ones, in the order given.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    corrected, highest = [1.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = highest
    return corrected


def _check_rows(first: Sequence[Any] | np.ndarray, second: Sequence[Any] | np.ndarray) -> None:
    if len(first) != len(second) or not len(first):
        raise ValueError(f"first, second: {len(first)} and {len(second)} values; give equally many, at least one each.")


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: wanted a number between 0 and 1, such as 0.95.")


def _student() -> tuple[Callable[[int, float], Any], Callable[[int, float], Any]]:
    # both by the degrees of freedom
    try:
        from scipy.special import stdtr, stdtrit
    except ImportError as error:
        raise ModuleNotFoundError(
            "Comparisons need scipy, for Student's distribution. Install it: pip install 'lightning-moe[eval]'"
        ) from error
    return stdtrit, stdtr


def _all_ways(count: int) -> Int[np.ndarray, "ways n"]:
    # to swap pairs or not, with 1 and 0
    return np.arange(2**count)[:, None] >> np.arange(count) & 1


def _sign_flip(differences: Float[np.ndarray, " n"]) -> float:
    sums = np.abs((1 - 2 * _all_ways(len(differences))) @ differences)
    # what is equal but for rounding is as large
    least = abs(differences.sum()) - 1e-9 * np.abs(differences).sum()
    return float((sums >= least).mean())


def _differences(
    statistic: Callable[[list[Any]], float], items: list[Any], rows: Iterable[tuple[np.ndarray, np.ndarray]]
) -> Float[np.ndarray, " rows"]:
    # row by row: with thousands of documents, all of them at once would take gigabytes
    values = [[float(statistic([items[i] for i in row.tolist()])) for row in pair] for pair in rows]
    return np.array([other - one for one, other in values])
