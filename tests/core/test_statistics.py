"""Intervals, paired tests and their smallest number of items."""

import math

import numpy as np
import pytest
from scipy import stats

from nearfar.core.statistics import FEWEST, bootstrap_interval, grouped_intervals, holm, paired_test


def test_interval_covers_the_mean_as_often_as_it_says():
    samples = np.random.default_rng(0).normal(0.7, 0.1, (200, 30))
    hits = [low <= 0.7 <= high for low, high in (bootstrap_interval(s, resamples=400) for s in samples)]
    assert 0.88 < np.mean(hits) < 0.99
    assert bootstrap_interval(samples[0]) == bootstrap_interval(samples[0])


def test_interval_is_that_of_plain_resampling(monkeypatch):
    values = np.random.default_rng(0).random(7)
    drawn = np.random.default_rng(3).integers(7, size=(10_000, 7))
    expected = tuple(np.quantile(values[drawn].mean(1), [0.025, 0.975]))
    assert bootstrap_interval(values, seed=3) == pytest.approx(expected)
    many = np.random.default_rng(0).random(2**21)  # in pieces of two resamples
    low, high = bootstrap_interval(many, resamples=20)
    assert low < many.mean() < high


def test_below_the_smallest_number_of_items_nothing_is_inferred():
    values = np.arange(FEWEST) / 10
    assert all(map(math.isnan, bootstrap_interval(values[1:])))
    assert all(map(math.isfinite, bootstrap_interval(values)))
    few = paired_test(values[1:] + 1, values[1:])
    assert few["difference"] == pytest.approx(1)
    assert all(math.isnan(few[name]) for name in ("low", "high", "p"))


def test_what_is_not_finite_is_no_value():
    with pytest.raises(ValueError, match="1 of 7 values are not finite"):
        bootstrap_interval([0.1] * 6 + [math.nan])


def test_paired_test_is_wilcoxon():
    generator = np.random.default_rng(0)
    base = generator.normal(0.7, 0.1, 30)
    better = paired_test(base + generator.normal(0.03, 0.02, 30), base)
    assert better["low"] > 0
    assert better["p"] < 0.001
    other = generator.normal(0.7, 0.1, 30)
    assert paired_test(base, other)["p"] == pytest.approx(stats.wilcoxon(base, other).pvalue)
    assert paired_test(base, base)["p"] == 1
    with pytest.raises(ValueError, match="got 2 and 1 values"):
        paired_test([1, 2], [1])


def test_holm_multiplies_the_smallest_most_and_stays_in_order():
    np.testing.assert_allclose(holm([0.04, 0.01, math.nan, 0.03]), [0.06, 0.03, math.nan, 0.06])
    np.testing.assert_allclose(holm([0.9, 0.8]), [1, 1])
    assert holm([]).shape == (0,)


def test_groups_are_drawn_whole():
    values, groups = np.repeat(np.random.default_rng(0).random(8), 50), np.repeat(np.arange(8), 50)

    def mean(count):
        return (count * values).sum() / count.sum()

    low, high = grouped_intervals(mean, groups, resamples=2000)
    assert (float(low), float(high)) == pytest.approx(bootstrap_interval(values[::50]), abs=0.02)
    alone = grouped_intervals(mean, np.arange(400), resamples=200)
    assert alone[1] - alone[0] < (high - low) / 3
    assert all(map(math.isnan, grouped_intervals(mean, groups // 2)))


def test_draws_without_a_figure_are_made_again():
    there = np.arange(8) == 0  # a draw of eight lacks it in a third of all

    def share(count):
        return np.array([1.0, np.nan if not count[there].sum() else 2.0])

    low, high = grouped_intervals(share, np.arange(8), resamples=100)
    assert low.tolist() == high.tolist() == [1, 2]
    assert np.isnan(grouped_intervals(lambda count: np.nan, np.arange(8), resamples=20)).all()
