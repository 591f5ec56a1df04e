"""Intervals and paired tests over independent items: pictures, cases, subjects, speakers."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

FEWEST = 6
"""Items below which nothing is inferred: of n pairs the smallest two-sided p of the signed-rank test is 2 / 2^n, below
0.05 from n = 6 on, and a percentile bootstrap of fewer is far too narrow."""


def percentile_interval(replicates: ArrayLike, level: float = 0.95, axis: int = 0) -> tuple[NDArray, NDArray]:
    """Lower and upper bound of the middle `level` of bootstrap replicates."""
    low, high = np.quantile(np.asarray(replicates, float), [(1 - level) / 2, (1 + level) / 2], axis=axis)
    return low, high


def bootstrap_interval(
    values: ArrayLike, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values`, one per independent item.

    (NaN, NaN) for fewer than `FEWEST` items. Raises ValueError for values that are not finite: what a missing or
    impossible result counts is to be decided before, it does not drop out here.
    """
    values = np.asarray(values, float)
    if not np.isfinite(values).all():
        raise ValueError(f"{int((~np.isfinite(values)).sum())} of {len(values)} values are not finite")
    if not 0 < level < 1 or resamples < 20:
        raise ValueError(f"needs 0 < level < 1 and at least 20 resamples, got {level}, {resamples}")
    if len(values) < FEWEST:
        return float("nan"), float("nan")
    generator, means = np.random.default_rng(seed), np.empty(resamples)
    step = max(1, 2**22 // len(values))  # so that memory does not grow with the number of items
    for start in range(0, resamples, step):
        part = means[start : start + step]
        part[:] = values[generator.integers(len(values), size=(len(part), len(values)))].mean(-1)
    low, high = percentile_interval(means, level)
    return float(low), float(high)


def grouped_intervals(
    statistic: Callable[[NDArray[np.int64]], ArrayLike],
    groups: Sequence[Any],
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[NDArray, NDArray]:
    """Percentile bootstrap intervals of statistics of items that are independent in groups alone: tiles of slides.

    Whole groups are drawn. `statistic` takes how often each item counts, (N,), and gives one number or several; a draw
    for which one of them is not defined, NaN, is made again. NaN for fewer than `FEWEST` groups, or where almost no
    draw has them all.
    """
    named, place = np.unique(np.asarray([str(group) for group in groups]), return_inverse=True)
    nothing = np.full(np.shape(statistic(np.ones(len(place), np.int64))), np.nan)
    if len(named) < FEWEST:
        return nothing, nothing
    generator, found = np.random.default_rng(seed), list[Any]()
    for _ in range(10 * resamples):
        drawn = np.bincount(generator.integers(len(named), size=len(named)), minlength=len(named))
        value = np.asarray(statistic(drawn[place]), float)
        if not np.isnan(value).any():
            found.append(value)
        if len(found) == resamples:
            return percentile_interval(found, level)
    return nothing, nothing


def paired_test(first: Sequence[float], second: Sequence[float], *, seed: int = 0) -> dict[str, float]:
    """Compares two methods on the same items: mean difference, its interval, p of Wilcoxon's signed-rank test.

    Differences below 1e-12 are none. p is NaN where fewer than `FEWEST` items differ, for then no result could be
    significant, and 1 where none of `FEWEST` or more does; the interval is NaN for fewer items than that.

    Raises ValueError for other than the same number of values, at least two, all finite.
    """
    if len(first) != len(second) or len(first) < 2:
        raise ValueError(f"got {len(first)} and {len(second)} values; paired items are needed, at least two")
    difference = np.round(np.asarray(first, float) - np.asarray(second, float), 12)
    low, high = bootstrap_interval(difference, seed=seed)
    differing = np.count_nonzero(difference)
    if differing >= FEWEST:
        p = float(stats.wilcoxon(difference).pvalue)
    else:
        p = 1.0 if differing == 0 and len(difference) >= FEWEST else float("nan")
    return {"difference": float(difference.mean()), "low": low, "high": high, "p": p, "items": len(difference)}


def holm(p: ArrayLike) -> NDArray[np.float64]:
    """Holm's correction of several p values; NaN, of pairs that were not tested, stays and does not count."""
    p = np.asarray(p, float)
    corrected, tested = np.full(p.shape, np.nan), np.flatnonzero(~np.isnan(p))
    order = tested[np.argsort(p[tested], kind="stable")]
    steps = p[order] * np.arange(len(order), 0, -1)
    corrected[order] = np.maximum.accumulate(steps).clip(max=1.0) if len(order) else steps
    return corrected
