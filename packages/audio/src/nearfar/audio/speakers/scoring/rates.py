"""Error rates, detection costs, Cllr, their uncertainty, and reports."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from scipy.special import logit, ndtri
from sklearn.isotonic import isotonic_regression
from sklearn.metrics import roc_curve

from nearfar.audio.speakers.scoring.trials import Array
from nearfar.core.plots import new_figure, style
from nearfar.core.statistics import FEWEST, percentile_interval


class ErrorCurve(NamedTuple):
    """Rates over ascending thresholds, one point per different score and one (-inf) before all.

    `fnr`: share of targets with score <= threshold; `fpr`: share of non-targets with score > threshold.
    """

    threshold: Array
    fnr: Array
    fpr: Array


class Cost(NamedTuple):
    """A detection cost: prior of a target and costs of a miss and of a false accept."""

    p_target: float
    c_miss: float = 1.0
    c_fa: float = 1.0


COSTS: Mapping[str, tuple[Cost, ...]] = {
    "voxceleb": (Cost(0.01),),
    "voxsrc": (Cost(0.05),),
    "sre08": (Cost(0.01, 10.0, 1.0),),
    "sre10": (Cost(0.001),),
    "sre16": (Cost(0.01), Cost(0.005)),
}
"""Named cost conventions; of several costs the mean is taken."""


class Rate(NamedTuple):
    """A figure and the threshold (or thresholds) it belongs to."""

    value: float
    threshold: Any


def error_curve(scores: Array, labels: Array, weights: Array | None = None) -> ErrorCurve:
    """Miss and false-accept rates at every threshold that matters; equal scores are one point. O(n log n).

    `weights`: of the trials. Raises ValueError for scores that are not finite, other labels than 0 and 1, or without
    targets or non-targets.
    """
    scores, labels, weights = checked(scores, labels, weights)
    order = np.argsort(scores, kind="stable")
    scores, labels = scores[order], labels[order]
    last = np.flatnonzero(np.r_[scores[1:] != scores[:-1], True])
    if weights is None:
        below = np.cumsum(labels)[last]
        fnr = below / below[-1]
        fpr = 1 - (last + 1 - below) / (len(labels) - below[-1])
    else:
        weights = weights[order]
        fnr = np.cumsum(weights * labels)[last]
        fpr = np.cumsum(weights * (1 - labels))[last]
        fnr, fpr = fnr / fnr[-1], 1 - fpr / fpr[-1]
    return ErrorCurve(np.r_[-np.inf, scores[last]], np.r_[0.0, fnr], np.r_[1.0, fpr])


EERConvention = Literal["nist", "midpoint", "roc"]


def eer(scores: Array, labels: Array, convention: EERConvention = "nist", weights: Array | None = None) -> Rate:
    """Equal error rate, and its threshold.

    Conventions: "nist" interpolates between the last point with FNR < FPR and the first with FNR >= FPR (wespeaker,
    3D-Speaker; here equal scores are one point); "midpoint" is the mean of both rates where they are nearest
    (speechbrain and L-TDNN); "roc" is the greater of both rates where they are nearest on scikit-learn's ROC curve
    (clovaai, LAP). They differ in the third digit on VoxCeleb.
    """
    if convention == "roc":
        scores, labels, weights = checked(scores, labels, weights)
        fpr, tpr, thresholds = roc_curve(labels, scores, sample_weight=weights)
        at = int(np.argmin(np.abs(1 - tpr - fpr)))
        return Rate(float(max(fpr[at], 1 - tpr[at])), float(thresholds[at]))
    curve = error_curve(scores, labels, weights)
    difference = curve.fnr - curve.fpr
    if convention == "nist":
        after = int(np.argmax(difference >= 0))
        before = after - 1
        step = difference[after] - difference[before]
        share = difference[after] / step
        value = curve.fnr[after] - share * (curve.fnr[after] - curve.fnr[before])
        return Rate(float(value), float(curve.threshold[after]))
    if convention == "midpoint":
        at = 1 + int(np.argmin(np.abs(difference[1:])))
        return Rate(float((curve.fnr[at] + curve.fpr[at]) / 2), float(curve.threshold[at]))
    raise ValueError(f"convention must be nist, midpoint or roc, got {convention!r}")


def min_dcf(
    scores: Array,
    labels: Array,
    cost: str | Cost | Sequence[Cost] = "voxceleb",
    normalize: bool = True,
    weights: Array | None = None,
) -> Rate:
    """Least detection cost over all thresholds: c_miss p FNR + c_fa (1-p) FPR over min(c_miss p, c_fa (1-p)).

    `cost`: a name in `COSTS` or costs. `normalize=False` does not divide (speechbrain and L-TDNN report that; at
    p = 0.01 it is a hundredth). The threshold is a tuple where there are several costs.
    """
    curve, costs = error_curve(scores, labels, weights), _costs(cost)
    values, thresholds = [], []
    for c in costs:
        total = _cost(c, curve.fnr, curve.fpr, normalize)
        at = int(np.argmin(total))
        values.append(float(total[at]))
        thresholds.append(float(curve.threshold[at]))
    return Rate(float(np.mean(values)), thresholds[0] if len(costs) == 1 else tuple(thresholds))


def actual_dcf(
    llr: Array, labels: Array, cost: str | Cost | Sequence[Cost] = "voxceleb", weights: Array | None = None
) -> Rate:
    """Normalized detection cost of calibrated log-likelihood ratios at Bayes' threshold ln(c_fa (1-p) / (c_miss p))."""
    costs, values, thresholds = _costs(cost), [], []
    for c in costs:
        threshold = float(np.log(c.c_fa * (1 - c.p_target) / (c.c_miss * c.p_target)))
        values.append(_cost(c, *error_rates(llr, labels, threshold, weights), True))
        thresholds.append(threshold)
    return Rate(float(np.mean(values)), thresholds[0] if len(costs) == 1 else tuple(thresholds))


def error_rates(scores: Array, labels: Array, threshold: float, weights: Array | None = None) -> tuple[float, float]:
    """(miss rate, false-accept rate) where scores greater than `threshold` are accepted."""
    scores, labels, weights = checked(scores, labels, weights)
    weights = np.ones(len(scores)) if weights is None else weights
    accepted = scores > threshold
    targets, others = weights * labels, weights * (1 - labels)
    return float(targets[~accepted].sum() / targets.sum()), float(others[accepted].sum() / others.sum())


def threshold_at_far(scores: Array, labels: Array, far: float, comparisons: int = 1) -> Rate:
    """The lowest threshold at which at most `far` of the non-targets are accepted; its value is the miss rate there.

    `comparisons`: for identification against a gallery of that many speakers, `far` is the chance that a stranger is
    taken for any of them; the comparisons are treated as independent, so each is allowed 1 - (1 - far)^(1/n).

    Raises ValueError where the trials are too few to show such a rate.
    """
    if not 0 < far < 1 or comparisons < 1:
        raise ValueError(f"far must be between 0 and 1 and comparisons at least 1, got {far}, {comparisons}")
    each = -np.expm1(np.log1p(-far) / comparisons)
    curve = error_curve(scores, labels)
    count = int((np.asarray(labels) == 0).sum())
    if each * count < 1:
        raise ValueError(
            f"{count} non-target trials cannot show a false-accept rate of {each:.3g}; "
            f"{int(np.ceil(1 / each))} are needed"
        )
    at = int(np.argmax(curve.fpr <= each * (1 + 1e-12)))
    return Rate(float(curve.fnr[at]), float(curve.threshold[at]))


def checked(scores: Array, labels: Array, weights: Array | None) -> tuple[Array, Array, Array | None]:
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels)
    if scores.ndim != 1 or labels.shape != scores.shape:
        raise ValueError(f"scores and labels must be two lists of one length, got {scores.shape} and {labels.shape}")
    if bad := int((~np.isfinite(scores)).sum()):
        raise ValueError(f"{bad} of {len(scores)} scores are not finite")
    labels = labels.astype(np.int8) if labels.dtype == bool else labels
    if not np.isin(labels, (0, 1)).all():
        raise ValueError("labels must be 1 (target) or 0 (non-target)")
    labels = labels.astype(np.int64)
    if weights is not None:
        weights = np.asarray(weights, np.float64)
        if weights.shape != scores.shape or not (weights >= 0).all():
            raise ValueError("weights must be one number >= 0 per trial")
    count = labels if weights is None else weights * labels
    other = 1 - labels if weights is None else weights * (1 - labels)
    if not count.sum() > 0 or not other.sum() > 0:
        raise ValueError(
            f"needs targets and non-targets, got {int(labels.sum())} and {int((1 - labels).sum())} (of any weight)"
        )
    return scores, labels, weights


def _costs(cost: str | Cost | Sequence[Cost]) -> Sequence[Cost]:
    if isinstance(cost, str):
        if cost not in COSTS:
            raise ValueError(f"cost must be one of {', '.join(COSTS)}, got {cost!r}")
        return COSTS[cost]
    costs = [cost] if isinstance(cost, Cost) else list(cost)
    for c in costs:
        if not 0 < c.p_target < 1 or c.c_miss <= 0 or c.c_fa <= 0:
            raise ValueError(f"a cost needs 0 < p_target < 1 and positive costs, got {c}")
    return costs


def _cost(cost: Cost, fnr: Any, fpr: Any, normalize: bool) -> Any:
    total = cost.c_miss * cost.p_target * fnr + cost.c_fa * (1 - cost.p_target) * fpr
    return total / min(cost.c_miss * cost.p_target, cost.c_fa * (1 - cost.p_target)) if normalize else total


def cllr(llr: Array, labels: Array, weights: Array | None = None) -> float:
    """Cost of log-likelihood ratios in bits: 1/2 [mean over targets log2(1 + e^-l) + mean over others log2(1 + e^l)].

    0 is perfect, 1 is what saying nothing (l = 0) costs.
    """
    llr, labels, weights = checked(llr, labels, weights)
    weights = np.ones(len(llr)) if weights is None else weights
    return _cllr(llr, labels, weights)


def min_cllr(scores: Array, labels: Array, weights: Array | None = None) -> float:
    """Cllr after the best monotone map of the scores (pool adjacent violators; equal scores stay equal)."""
    scores, labels, weights = checked(scores, labels, weights)
    weights = np.ones(len(scores)) if weights is None else weights
    _, group = np.unique(scores, return_inverse=True)
    targets, others = np.bincount(group, weights * labels), np.bincount(group, weights * (1 - labels))
    used = targets + others > 0
    targets, others = targets[used], others[used]
    posterior = isotonic_regression(targets / (targets + others), sample_weight=targets + others)
    with np.errstate(divide="ignore"):
        llr = logit(posterior) - np.log(targets.sum() / others.sum())
    with np.errstate(invalid="ignore"):  # 0 targets at -inf cost nothing
        miss = np.where(targets > 0, targets * np.logaddexp(0, -llr), 0.0).sum() / targets.sum()
        false = np.where(others > 0, others * np.logaddexp(0, llr), 0.0).sum() / others.sum()
    return float((miss + false) / (2 * np.log(2)))


def _cllr(llr: Array, labels: Array, weights: Array) -> float:
    targets, others = weights * labels, weights * (1 - labels)
    miss = (targets * np.logaddexp(0, -llr)).sum() / targets.sum()
    false = (others * np.logaddexp(0, llr)).sum() / others.sum()
    return float((miss + false) / (2 * np.log(2)))


class Interval(NamedTuple):
    """A figure, the bounds of its confidence interval, and how many bootstrap draws they rest on."""

    value: float
    low: float
    high: float
    draws: int


Metric = Callable[..., float]


def bootstrap(
    metric: Metric,
    scores: Array,
    labels: Array,
    enroll_speakers: Sequence[Any] | None = None,
    test_speakers: Sequence[Any] | None = None,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """A metric with its percentile interval from resampling speakers (or single trials where none are given).

    Trials of one speaker are not independent, so speakers are drawn, with replacement: one that is drawn k times
    gives its target trials the weight k, and a non-target trial weighs the product of its two speakers' counts.
    Intervals from trials alone are far too narrow.

    `metric(scores, labels, weights=w)` returns a number, such as ``lambda *a, **k: eer(*a, **k).value``; it is called
    with trials in ascending order of score.

    The bounds are NaN for fewer than `nearfar.core.statistics.FEWEST` speakers (or trials). Raises ValueError where
    fewer than half of the draws hold targets and non-targets.
    """
    (interval,) = _bootstrap([(scores, metric)], labels, enroll_speakers, test_speakers, draws, level, seed)
    return interval


def bootstrap_difference(
    metric: Metric,
    scores_a: Array,
    scores_b: Array,
    labels: Array,
    enroll_speakers: Sequence[Any] | None = None,
    test_speakers: Sequence[Any] | None = None,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """`metric` of system a minus that of system b on the same trials, both seen by the same draws.

    The difference is significant at `1 - level` where the interval does not hold 0.
    """
    pairs = [(scores_a, metric), (scores_b, metric)]
    return _bootstrap(pairs, labels, enroll_speakers, test_speakers, draws, level, seed)[-1]


def _bootstrap(
    systems: Sequence[tuple[Array, Metric]],
    labels: Array,
    enroll_speakers: Sequence[Any] | None,
    test_speakers: Sequence[Any] | None,
    draws: int,
    level: float,
    seed: int,
) -> list[Interval]:
    """One interval per system, and a last one for the first minus the second where there are two."""
    if not 0 < level < 1 or draws < 20:
        raise ValueError(f"needs 0 < level < 1 and at least 20 draws, got {level}, {draws}")
    labels = checked(systems[0][0], labels, None)[1]
    ordered = []
    for scores, metric in systems:
        order = np.argsort(scores, kind="stable")
        ordered.append((np.asarray(scores, np.float64)[order], labels[order], order, metric))
    value = np.array([metric(s, y, weights=None) for s, y, _, metric in ordered])
    found = []
    for weights in bootstrap_weights(labels, enroll_speakers, test_speakers, draws, seed):
        if (weights * labels).sum() > 0 and (weights * (1 - labels)).sum() > 0:
            found.append([metric(s, y, weights=weights[order]) for s, y, order, metric in ordered])
    if 2 * len(found) < draws:
        raise ValueError(f"only {len(found)} of {draws} draws hold targets and non-targets: too few speakers")
    replicates = np.array(found)
    if len(systems) == 2:
        value = np.r_[value, value[0] - value[1]]
        replicates = np.c_[replicates, replicates[:, 0] - replicates[:, 1]]
    low, high = percentile_interval(replicates, level)
    drawn = labels if enroll_speakers is None or test_speakers is None else {*enroll_speakers, *test_speakers}
    if len(drawn) < FEWEST:
        low = high = np.full(len(value), np.nan)
    return [Interval(float(v), float(lo), float(hi), len(found)) for v, lo, hi in zip(value, low, high)]


def bootstrap_weights(
    labels: Array, enroll_speakers: Sequence[Any] | None, test_speakers: Sequence[Any] | None, draws: int, seed: int
) -> Iterable[Array]:
    """Weights `(n,)` of the trials for each draw."""
    rng = np.random.default_rng(seed)
    if (enroll_speakers is None) != (test_speakers is None):
        raise ValueError("speakers are needed for both sides or for none")
    if enroll_speakers is None or test_speakers is None:
        for _ in range(draws):
            yield rng.multinomial(len(labels), np.full(len(labels), 1 / len(labels))).astype(np.float64)
        return
    names, code = np.unique(np.r_[np.asarray(enroll_speakers), np.asarray(test_speakers)], return_inverse=True)
    if len(code) != 2 * len(labels):
        raise ValueError(f"{len(labels)} trials need the speaker of both sides")
    left, right = code[: len(labels)], code[len(labels) :]
    wrong = int(((left == right) != (labels == 1)).sum())
    if wrong:
        raise ValueError(f"the labels of {wrong} trials contradict their speakers")
    for _ in range(draws):
        counts = rng.multinomial(len(names), np.full(len(names), 1 / len(names))).astype(np.float64)
        yield np.where(labels == 1, counts[left], counts[left] * counts[right])


INTERVAL_METRICS: Mapping[str, Metric] = {
    "eer_nist": lambda *a, **k: eer(*a, **k).value,
    "min_dcf_voxceleb": lambda *a, **k: min_dcf(*a, **k).value,
}
"""The figures of `evaluate` that get intervals."""


def evaluate(
    scores: Array,
    labels: Array,
    calibrated: bool = False,
    enroll_speakers: Sequence[Any] | None = None,
    test_speakers: Sequence[Any] | None = None,
    draws: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """All figures of a list of scores, each under a name that says its convention. Rates are fractions, not percent.

    `calibrated`: the scores are natural log-likelihood ratios; adds Cllr and the actual costs. With `draws` the EER and
    the VoxCeleb minDCF get intervals (over speakers where both sides' are given, else over trials, which is said).
    """
    found: dict[str, Any] = {
        "trials": len(scores),
        "targets": int(np.sum(labels)),
        "nontargets": int(len(labels) - np.sum(labels)),
        "eer_nist": eer(scores, labels).value,
        "eer_nist_threshold": eer(scores, labels).threshold,
        "eer_midpoint": eer(scores, labels, "midpoint").value,
        "eer_roc": eer(scores, labels, "roc").value,
        **{f"min_dcf_{name}": min_dcf(scores, labels, name).value for name in COSTS},
        "min_cllr": min_cllr(scores, labels),
    }
    if calibrated:
        found["cllr"] = cllr(scores, labels)
        found |= {f"actual_dcf_{name}": actual_dcf(scores, labels, name).value for name in COSTS}
    if draws:
        found["interval_resamples"] = "trials" if enroll_speakers is None else "speakers"
        for name, metric in INTERVAL_METRICS.items():
            interval = bootstrap(metric, scores, labels, enroll_speakers, test_speakers, draws, seed=seed)
            found[f"{name}_low"], found[f"{name}_high"] = interval.low, interval.high
    return found


def by_condition(scores: Array, labels: Array, conditions: Sequence[Any], minimum: int = 1) -> list[dict[str, Any]]:
    """EER and minDCF of each value of a condition (gender, language, same video ...), one row each.

    A value without `minimum` targets and non-targets is listed with its counts and without figures.
    """
    scores, labels = np.asarray(scores), np.asarray(labels)
    values, group = np.unique(np.asarray(conditions), return_inverse=True)
    if len(group) != len(scores):
        raise ValueError(f"{len(scores)} trials, {len(group)} conditions")
    rows = []
    for code, value in enumerate(values.tolist()):
        s, y = scores[group == code], labels[group == code]
        row: dict[str, Any] = {"condition": value, "targets": int(y.sum()), "nontargets": int(len(y) - y.sum())}
        enough = min(row["targets"], row["nontargets"]) >= max(1, minimum)
        row["eer_nist"] = eer(s, y).value if enough else None
        row["min_dcf_voxceleb"] = min_dcf(s, y).value if enough else None
        rows.append(row)
    return rows


def duration_condition(seconds: Array, edges: Sequence[float] = (2.0, 4.0, 8.0)) -> Array:
    """Names of duration classes for `by_condition`: of the shorter side, say."""
    names = [f"under {edges[0]:g} s", *(f"{a:g} to {b:g} s" for a, b in pairwise(edges)), f"from {edges[-1]:g} s"]
    return np.array(names)[np.searchsorted(edges, seconds, side="right")]


def det_points(scores: Array, labels: Array) -> tuple[Array, Array]:
    """DET curve `(FPR, FNR)` by falling FPR, corners only: the points between which both rates change."""
    curve = error_curve(scores, labels)
    fpr, fnr = curve.fpr, curve.fnr
    straight = np.r_[False, (fpr[2:] == fpr[1:-1]) & (fpr[1:-1] == fpr[:-2]), False]
    straight |= np.r_[False, (fnr[2:] == fnr[1:-1]) & (fnr[1:-1] == fnr[:-2]), False]
    return fpr[~straight], fnr[~straight]


def plot_det(systems: Mapping[str, tuple[Array, Array]], limits: tuple[float, float] = (0.00051, 0.5)) -> Figure:
    """DET curves on probit axes with a dot at each EER, as a matplotlib figure. `systems`: name to (scores, labels)."""
    low, high = ndtri(limits[0]), ndtri(limits[1])
    ticks = np.array([0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4])
    ticks = ticks[(ticks >= limits[0]) & (ticks <= limits[1])]
    with style():
        figure = new_figure(5, 5)
        axes = figure.add_subplot()
        for name, (scores, labels) in systems.items():
            fpr, fnr = (ndtri(rates).clip(low - 1, high + 1) for rates in det_points(scores, labels))
            rate = eer(scores, labels).value
            (line,) = axes.plot(fpr, fnr, label=f"{name}: EER {rate:.2%}")
            if rate > 0:
                axes.plot(ndtri(rate), ndtri(rate), "o", color=line.get_color())
        axes.set_xticks(ndtri(ticks), [f"{100 * t:g}" for t in ticks])
        axes.set_yticks(ndtri(ticks), [f"{100 * t:g}" for t in ticks])
        axes.set(xlim=(low, high), ylim=(low, high), xlabel="false accepts (%)", ylabel="misses (%)")
        axes.set_aspect("equal")
        axes.legend()
    return figure


def plot_scores(scores: Array, labels: Array, threshold: float | None = None, name: str = "score") -> Figure:
    """Histograms of target and non-target scores, as a matplotlib figure."""
    scores, labels = np.asarray(scores), np.asarray(labels)
    edges = np.histogram_bin_edges(scores, 60)
    with style():
        figure = new_figure(6, 3.5)
        axes = figure.add_subplot()
        for label, title in ((0, "different speakers"), (1, "same speaker")):
            axes.hist(scores[labels == label], edges.tolist(), density=True, alpha=0.6, label=title)
        if threshold is not None:
            axes.axvline(threshold, color="black", linewidth=1, label=f"threshold {threshold:.3g}")
        axes.set(xlabel=name, ylabel="density")
        axes.legend()
    return figure
