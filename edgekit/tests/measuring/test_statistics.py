import random
import statistics

import pytest

from edgekit.measuring.statistics import (
    bounds_of_median,
    coefficient_of_variation,
    drift,
    ordinal,
    quantile,
)


def sure_bounds(samples):
    bounds = bounds_of_median(samples)
    assert bounds is not None
    return bounds


@pytest.mark.parametrize(
    ("samples", "rank", "confidence"),
    [
        (5, 5, 0.969), (7, 7, 0.992), (10, 9, 0.989), (15, 12, 0.982), (20, 15, 0.979),
        (30, 20, 0.951),
    ],
)  # fmt: skip
def test_the_bound_is_the_sample_whose_rank_the_binomial_gives(samples, rank, confidence):
    bounds = sure_bounds(range(1, samples + 1))

    assert bounds.rank == bounds.high == rank
    assert bounds.low == samples + 1 - rank
    assert bounds.confidence == pytest.approx(confidence, abs=0.0006)


def test_four_samples_give_no_bound():
    assert bounds_of_median([1, 2, 3, 4]) is None


def test_the_bound_holds_the_true_median_as_often_as_it_says():
    """Skewed samples, as timings are; the true median of this distribution is 1."""
    source = random.Random(1)
    tries = [[source.lognormvariate(0, 1) for _ in range(10)] for _ in range(2000)]

    held = statistics.fmean(sure_bounds(samples).high >= 1 for samples in tries)

    assert 0.98 < held < 0.997  # 98.9 % is promised


def test_a_bound_says_which_sample_it_is():
    bounds = sure_bounds(range(10))

    assert bounds.basis("high").startswith("9th smallest of 10 samples, 98.9%")
    assert bounds.basis("low").startswith("9th largest of 10 samples")
    assert sure_bounds(range(5)).basis("high").startswith("largest of 5")
    assert sure_bounds(range(5)).basis("low").startswith("smallest of 5")


def test_drift_compares_the_halves_and_ignores_the_middle():
    assert drift([10] * 5 + [99] + [11] * 5) == pytest.approx(0.1)
    assert drift([10] * 9) is None


def test_spread_is_a_share_of_the_mean():
    assert coefficient_of_variation([9, 11]) == pytest.approx(2**0.5 / 10)
    assert coefficient_of_variation([5]) == coefficient_of_variation([0, 0]) == 0


def test_a_quantile_is_a_sample():
    assert quantile(range(1, 11), 0.9) == 9
    assert quantile([7], 0.1) == 7
    assert quantile(range(1, 11), 0.91) == 10
    assert quantile([3, 1, 2], 0.5) == 2


def test_ordinals_read_well():
    assert [ordinal(n) for n in (1, 2, 3, 9, 11, 12, 22)] == [
        "1st", "2nd", "3rd", "9th", "11th", "12th", "22nd",
    ]  # fmt: skip
