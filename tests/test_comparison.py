"""Paired differences, their intervals and p values against scipy, every sign written out, and a simulation."""

import itertools
import math
import sys

import numpy as np
import pytest
from scipy import stats

from lightning_moe.comparison import PairedDifference, holm, paired_difference, paired_statistic


def pairs(count, seed=0, shift=0.3):
    generator = np.random.default_rng(seed)
    first = generator.normal(size=count)
    return first.tolist(), (first + generator.normal(shift, 0.5, size=count)).tolist()


def answers(count, only_first, only_second):
    """Right and wrong answers: some that only one of the two knows, and of the rest half that both do."""
    first, second = [0] * count, [0] * count
    first[:only_first] = [1] * only_first
    second[only_first : only_first + only_second] = [1] * only_second
    for place in range(only_first + only_second, count, 2):
        first[place] = second[place] = 1
    return first, second


# --- the paired difference ---


@pytest.mark.parametrize("count", [2, 7, 13, 50])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_the_interval_is_that_of_the_paired_t_test(count, confidence):
    first, second = pairs(count)
    found = paired_difference(first, second, confidence)
    truth = stats.ttest_rel(second, first)
    assert found.difference == pytest.approx(np.mean(second) - np.mean(first))
    assert (found.low, found.high) == pytest.approx(tuple(truth.confidence_interval(confidence)))
    assert found.count == count


@pytest.mark.parametrize("count", [13, 50])
def test_of_many_pairs_the_p_value_is_that_of_the_paired_t_test(count):
    first, second = pairs(count)
    assert paired_difference(first, second).p_value == pytest.approx(stats.ttest_rel(second, first).pvalue)


@pytest.mark.parametrize("count", [2, 3, 5, 8, 12])
def test_of_few_pairs_it_is_the_share_of_all_signs(count):
    first, second = pairs(count, seed=count)
    found = paired_difference(first, second).p_value
    differences = [b - a for a, b in zip(first, second, strict=True)]
    sums = [sum(s * d for s, d in zip(signs, differences, strict=True))
            for signs in itertools.product((1, -1), repeat=count)]  # fmt: skip
    assert found == sum(abs(one) >= abs(sums[0]) - 1e-12 for one in sums) / len(sums)
    truth = stats.permutation_test((np.array(differences),), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert found == pytest.approx(truth.pvalue)


@pytest.mark.parametrize(("only_first", "only_second"), [(0, 1), (1, 6), (5, 5), (0, 5), (10, 2)])
def test_of_answers_it_is_mcnemars_exact_test_however_many_both_know(only_first, only_second):
    found = paired_difference(*answers(50, only_first, only_second))
    assert found.difference == pytest.approx((only_second - only_first) / 50)
    assert found.p_value == pytest.approx(stats.binomtest(only_first, only_first + only_second).pvalue)


def test_ties_that_rounding_hides_count():
    # in floating point 0.1 + 0.2 is more than 0.3
    assert paired_difference([0, 0, 0], [0.1, 0.2, -0.3]).p_value == 1


def test_the_other_way_round_only_the_sign_changes():
    for count in (6, 40):
        first, second = pairs(count)
        one, other = paired_difference(first, second), paired_difference(second, first)
        assert (other.difference, other.low, other.high) == pytest.approx((-one.difference, -one.high, -one.low))
        assert other.p_value == pytest.approx(one.p_value)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([3], [5], (2, -math.inf, math.inf, 1)),
        ([1, 0, 1], [1, 0, 1], (0, 0, 0, 1)),
        ([0.5] * 40, [0.5] * 40, (0, 0, 0, 1)),
        # all five the same way: two of 32 ways to choose signs; there is no spread
        ([1] * 5, [3] * 5, (2, 2, 2, 1 / 16)),
        ([1] * 21, [3] * 21, (2, 2, 2, 2**-20)),
        ([1, 2], [1, math.inf], (math.inf, -math.inf, math.inf, 1)),
    ],
)
def test_what_has_no_spread_or_no_value(first, second, expected):
    assert paired_difference(first, second) == PairedDifference(*map(float, expected), len(first))


def test_what_is_not_known_is_told_as_such():
    found = paired_difference([0, math.inf], [1, math.inf])
    assert math.isnan(found.difference)
    assert (found.low, found.high, found.p_value) == (-math.inf, math.inf, 1)


def normal(generator):
    return generator.normal(size=8)


def skewed(generator):
    return generator.exponential(size=60) - 1


def answered(generator):
    # a tenth of 200 documents is answered differently, in both directions alike
    return generator.choice([-1, 0, 1], p=[0.05, 0.9, 0.05], size=200)


@pytest.mark.parametrize("draw", [normal, skewed, answered])
def test_19_of_20_intervals_hold_the_truth_and_one_of_20_p_values_is_small(draw):
    generator, zeros, trials = np.random.default_rng(0), None, 2000
    found = []
    for _ in range(trials):
        differences = draw(generator)
        zeros = np.zeros_like(differences)
        found.append(paired_difference(zeros, differences))
    covered = np.mean([one.low <= 0 <= one.high for one in found])
    # the standard deviation of this mean is 0.005; means of skewed numbers are not quite normal
    assert covered == pytest.approx(0.95, abs=0.015)
    assert np.mean([one.p_value <= 0.05 for one in found]) <= 0.065


@pytest.mark.parametrize("function", [paired_difference, lambda *rows: paired_statistic(sum, *rows)])
@pytest.mark.parametrize(("first", "second"), [([], []), ([1], [1, 2])])
def test_rows_must_be_pairs(function, first, second):
    with pytest.raises(ValueError, match=rf"first, second: {len(first)} and {len(second)} values; give equally many"):
        function(first, second)


def test_the_confidence_is_checked():
    for function in (paired_difference, lambda *rows: paired_statistic(sum, *rows)):
        with pytest.raises(ValueError, match=r"confidence=95.0: wanted a number between 0 and 1"):
            function([1, 2], [2, 3], 95.0)


def test_without_scipy_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.special", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-moe\[eval\]'"):
        paired_difference([1, 2], [2, 4])


# --- any statistic ---


def test_of_a_mean_the_bootstrap_is_near_the_t_interval():
    first, second = pairs(200)
    found, truth = paired_statistic(np.mean, first, second, num_samples=4000), paired_difference(first, second)
    assert found.difference == pytest.approx(truth.difference)
    # of 4000 samples the 2.5 % quantile is off by 4 % of the width
    reach = truth.high - truth.low
    assert found.low == pytest.approx(truth.low, abs=0.05 * reach)
    assert found.high == pytest.approx(truth.high, abs=0.05 * reach)


def test_the_interval_is_scipys_paired_bootstrap():
    first, second = pairs(40)

    def difference(one, other):
        return np.median(other) - np.median(one)

    truth = stats.bootstrap(
        (first, second), difference, paired=True, vectorized=False, n_resamples=4000, method="percentile", rng=1
    ).confidence_interval
    found = paired_statistic(np.median, first, second, num_samples=4000)
    assert (found.low, found.high) == pytest.approx(tuple(truth), abs=0.1 * (truth.high - truth.low))


def slope(items):
    one, other = zip(*items, strict=True)
    return sum(one) / sum(other)


def test_the_p_value_is_the_share_of_all_swaps():
    generator = np.random.default_rng(3)
    first = [(float(a), b + 1) for b, a in enumerate(generator.normal(2, 1, 8))]
    second = [(a + float(d), b) for (a, b), d in zip(first, generator.normal(0.5, 1, 8), strict=True)]
    found = paired_statistic(slope, first, second)
    observed, as_large = slope(second) - slope(first), 0
    for swaps in itertools.product((False, True), repeat=8):
        one = [b if swap else a for a, b, swap in zip(first, second, swaps, strict=True)]
        other = [a if swap else b for a, b, swap in zip(first, second, swaps, strict=True)]
        as_large += abs(slope(other) - slope(one)) >= abs(observed) - 1e-12
    assert found.p_value == as_large / 256
    assert 2 / 256 < found.p_value < 1
    # random swaps, of 2^14 that there are
    more = [row * 2 for row in (first, second)]
    drawn = paired_statistic(slope, *(row[:14] for row in more), num_samples=4000).p_value
    every = paired_statistic(slope, *(row[:14] for row in more), num_samples=2**14).p_value
    assert drawn == pytest.approx(every, abs=0.03)


def test_random_swaps_never_give_less_than_one_in_their_number():
    first = list(np.arange(30.0))
    assert paired_statistic(np.mean, first, [one + 5 for one in first], num_samples=99).p_value == 1 / 100


def test_equal_rows_and_unknown_values_of_a_statistic():
    assert paired_statistic(max, [1, 2, 3], [1, 2, 3]) == PairedDifference(0.0, 0.0, 0.0, 1.0, 3)
    found = paired_statistic(lambda items: math.nan, [1, 2], [2, 3])
    assert (found.low, found.high, found.p_value) == (-math.inf, math.inf, 1)


def test_the_bootstrap_is_the_same_each_time_and_leaves_the_global_generator_alone():
    state = np.random.get_state()
    one, other = (paired_statistic(np.median, *pairs(20)) for _ in range(2))
    assert one == other
    assert paired_statistic(np.median, *pairs(20), seed=1) != one
    np.testing.assert_equal(np.random.get_state(), state)


# --- the correction ---


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        # by hand: the smallest four times, the next three times, then never less than the one before
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        ([0.01, 0.02, 0.03], [0.03, 0.04, 0.04]),
        ([0.6, 0.001, 0.9], [1, 0.003, 1]),
        ([0.2], [0.2]),
        ([0.02, 0.02], [0.04, 0.04]),
        ([], []),
    ],
)
def test_holms_correction_by_hand(given, expected):
    assert holm(given) == pytest.approx(expected)


def test_it_rejects_what_holms_procedure_does():
    generator = np.random.default_rng(0)
    for _ in range(50):
        given = (generator.uniform(size=6) ** 3).tolist()
        corrected = holm(given)
        for level in (0.01, 0.05, 0.2, 0.5):
            rejected = set()
            for rank, place in enumerate(np.argsort(given)):
                if given[place] > level / (len(given) - rank):
                    break
                rejected.add(int(place))
            assert {place for place, p in enumerate(corrected) if p <= level} == rejected
