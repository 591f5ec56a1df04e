"""Scores against slow oracles and MONAI; absent structures; aggregation."""

import math

import numpy as np
import pytest
import torch
from monai.metrics import HausdorffDistanceMetric, compute_hausdorff_distance

from nearfar.medical.metrics import (
    bootstrap_interval,
    dice,
    hausdorff,
    iou,
    lesion_scores,
    micro_scores,
    paired_test,
    score_case,
    summarize,
    surface_dice,
    surface_distances,
)


def masks(seed: int, size: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in size], indexing="ij"))
    blob = lambda: sum((g - rng.integers(n // 3, 2 * n // 3)) ** 2 for g, n in zip(grid, size)) < rng.integers(9, 30)  # noqa: E731
    return blob(), blob()


def slow_distances(p: np.ndarray, g: np.ndarray, spacing: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    def edge(mask: np.ndarray) -> np.ndarray:
        points = []
        for point in np.argwhere(mask):
            for axis in range(mask.ndim):
                for step in (-1, 1):
                    other = point.copy()
                    other[axis] += step
                    outside = not 0 <= other[axis] < mask.shape[axis]
                    if outside or not mask[tuple(other)]:
                        points.append(tuple(point))
        return np.array(sorted(set(points))) * spacing

    a, b = edge(p), edge(g)
    distances = np.sqrt(((a[:, None] - b) ** 2).sum(-1))
    return distances.min(1), distances.min(0)


@pytest.mark.parametrize(("size", "spacing"), [((14, 17), (1.0, 2.5)), ((12, 13, 11), (3.0, 0.8, 1.1))])
def test_surface_distances(size: tuple[int, ...], spacing: tuple[float, ...]) -> None:
    for seed in range(3):
        p, g = masks(seed, size)
        ours, slow = surface_distances(p, g, spacing), slow_distances(p, g, spacing)
        for a, b in zip(ours, slow):
            np.testing.assert_allclose(np.sort(a), np.sort(b), atol=1e-9)
        assert hausdorff(p, g, spacing) == pytest.approx(np.percentile(np.hstack(slow), 95))
        theirs = compute_hausdorff_distance(
            torch.from_numpy(p)[None, None], torch.from_numpy(g)[None, None], True, percentile=95, spacing=spacing
        )
        assert hausdorff(p, g, spacing, convention="monai") == pytest.approx(float(theirs), rel=1e-4)


def test_a_missed_structure_is_the_worst_and_stays_in_the_mean() -> None:
    truth = np.zeros((10, 10, 10), np.uint8)
    truth[2:5, 2:5, 2:5] = 1
    nothing, labels = np.zeros_like(truth), {1: "organ"}
    # MONAI gives NaN and leaves the case out of its mean ...
    metric = HausdorffDistanceMetric(percentile=95, include_background=True, reduction="mean")
    for prediction in (truth, nothing):
        metric(torch.from_numpy(prediction)[None, None].float(), torch.from_numpy(truth)[None, None].float())
    assert float(metric.aggregate()) == 0
    # ... here it counts
    rows = [
        {"case": i, **row}
        for i, prediction in enumerate((truth, nothing))
        for row in score_case(prediction, truth, labels, (1, 1, 2))
    ]
    worst = math.sqrt(100 + 100 + 400)
    summary = summarize(rows)[0]
    assert (summary["cases"], summary["dice"]) == (2, 0.5)
    assert summary["hd95"] == pytest.approx(worst / 2)


@pytest.mark.parametrize(
    ("convention", "missed", "invented", "absent"),
    [
        ("nearfar", (0.0, math.sqrt(48)), (0.0, math.sqrt(48)), (None, None)),
        ("synapse_legacy", (0.0, 0.0), (1.0, 0.0), (0.0, 0.0)),
        ("brats", (0.0, 373.128664), (0.0, 373.128664), (1.0, 0.0)),
        ("segmamba", (0.0, 50.0), (0.0, 50.0), (0.0, 50.0)),
        ("monai", (0.0, None), (None, None), (None, None)),
    ],
)
def test_conventions_for_empty_masks(convention: str, missed, invented, absent) -> None:
    full, empty = np.ones((4, 4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8)
    for (p, g), expected in zip(((empty, full), (full, empty), (empty, empty)), (missed, invented, absent)):
        (row,) = score_case(p, g, {1: "a"}, (1, 1, 1), convention=convention)
        for value, wanted in zip((row["dice"], row["hd95"]), expected):
            assert math.isnan(value) if wanted is None else value == pytest.approx(wanted)


def test_units_of_the_conventions() -> None:
    p, g = np.zeros((12, 12), np.uint8), np.zeros((12, 12), np.uint8)
    p[2:5, 2:5], g[5:8, 2:5] = 1, 1
    score = lambda name: score_case(p, g, {1: "a"}, (4.0, 4.0), convention=name)[0]["hd95"]  # noqa: E731
    assert score("nearfar") == score("brats") == 4 * score("synapse_legacy") == 4 * score("segmamba")


def test_surface_dice() -> None:
    g = np.zeros((20, 20, 20), bool)
    g[5:15, 5:15, 5:15] = True
    p = np.roll(g, 2, 0)
    assert surface_dice(g, g, 0.5) == 1
    assert surface_dice(p, g, 2.1) == pytest.approx(1, abs=0.02)
    assert surface_dice(p, g, 1, (1, 1, 1)) < surface_dice(p, g, 1, (0.4, 1, 1))
    assert surface_dice(~g & False, g, 1) == 0
    assert math.isnan(surface_dice(~g & False, ~g & False, 1))


def test_micro_and_macro_differ_as_they_should() -> None:
    big, small = np.ones((10, 10), np.uint8), np.zeros((10, 10), np.uint8)
    small[0, 0] = 1
    pairs = [(big, big), (np.zeros_like(small), small)]
    (micro,) = micro_scores(pairs, {1: "a"})
    assert micro["dice"] == 200 / 201
    macro = [score_case(p, g, {1: "a"})[0]["dice"] for p, g in pairs]
    assert np.mean(macro) == 0.5
    p, g = masks(0, (14, 14))
    (one,) = micro_scores([(p.astype(int), g.astype(int))], {1: "a"})
    assert (one["dice"], one["iou"]) == (dice(p, g), iou(p, g))


def test_intervals_and_paired_tests() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        low, high = bootstrap_interval(rng.normal(0.8, 0.1, 40), seed=seed)
        covered += low <= 0.8 <= high
    assert 0.88 <= covered / 200 <= 0.99
    base = rng.normal(0.8, 0.1, 30)
    better = paired_test(base + rng.normal(0.03, 0.02, 30), base)
    assert better["p"] < 0.001
    assert 0 < better["low"] < better["difference"] < better["high"]
    assert paired_test(base, base)["p"] == 1


def test_bad_input() -> None:
    a = np.zeros((4, 4), np.uint8)
    with pytest.raises(ValueError, match="differ in shape"):
        score_case(a, a[:2], {1: "a"})
    with pytest.raises(ValueError, match=r"\[7\]"):
        score_case(a + 7, a, {1: "a"})
    with pytest.raises(ValueError, match="synapse_legacy"):
        score_case(a, a, {1: "a"}, convention="mean")
    with pytest.raises(ValueError, match="not empty"):
        surface_distances(a > 0, a > 0)
    with pytest.raises(ValueError, match="paired"):
        paired_test([1, 2], [1])


def test_brats_counts_lesions_of_the_challenge() -> None:
    """Two lesions three voxels apart are one; a missed, an invented and a tiny one count as the challenge says."""
    truth, found = np.zeros((2, 60, 40, 30), bool)
    truth[2:8, 2:8, 2:8] = truth[12:18, 2:8, 2:8] = True  # grown by three, one lesion
    found[2:8, 2:8, 2:8] = True
    one = lesion_scores(found, truth)
    assert one["dice"] == pytest.approx(2 * 216 / (216 + 432))
    assert (one["found"], one["missed"], one["invented"]) == (1, 0, 0)
    truth[40:46, 20:26, 20:26] = True  # missed
    truth[30:32, 30:32, 2:4] = True  # 8 mm3: too small to count, but what touches it is not invented
    found[30:32, 30:32, 2:5] = found[55:58, 2:5, 2:5] = True
    several = lesion_scores(found, truth)
    assert (several["found"], several["missed"], several["invented"]) == (1, 1, 1)
    assert several["dice"] == pytest.approx(one["dice"] / 3)
    assert several["hd95"] == pytest.approx((one["hd95"] + 2 * 374) / 3)
    nothing = np.zeros_like(truth)
    assert lesion_scores(nothing, nothing) == {"dice": 1.0, "hd95": 0.0, "found": 0, "missed": 0, "invented": 0}
    rows = score_case(found.astype(int), truth.astype(int), {1: "tumour"}, (1, 1, 1), convention="brats_lesions")
    assert rows[0]["dice"] == several["dice"]
