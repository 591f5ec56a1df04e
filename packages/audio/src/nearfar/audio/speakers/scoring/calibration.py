"""Calibration: scores and quality measures to log-likelihood ratios."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.special import expit, logit

from nearfar.audio.speakers.scoring.rates import bootstrap_weights, checked
from nearfar.audio.speakers.scoring.trials import Array
from nearfar.core.files import write_json
from nearfar.core.reading import read_json, reading


@dataclass(frozen=True)
class Calibration:
    """A linear map from scores (and quality measures) to natural log-likelihood ratios: `features @ weights + bias`.

    `replicates (R, k + 1)`: the maps (weights, bias) of bootstrap draws, for intervals.
    """

    weights: Array
    bias: float
    names: tuple[str, ...] = ("score",)
    replicates: Array = field(default_factory=lambda: np.empty((0, 0)))
    notes: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def fit(
        cls,
        features: Array,
        labels: Array,
        names: Sequence[str] | None = None,
        prior: float = 0.5,
        smoothing: bool = True,
        enroll_speakers: Sequence[Any] | None = None,
        test_speakers: Sequence[Any] | None = None,
        replicates: int = 0,
        seed: int = 0,
        notes: Mapping[str, Any] | None = None,
    ) -> "Calibration":
        """Fit by logistic regression whose trials weigh as if `prior` of them were targets; prior 0.5 minimizes Cllr.

        Newton's method on the convex objective, to convergence. With `smoothing` the labels are Platt's, (n+1)/(n+2)
        and 1/(n+2): few trials then never claim certainty, and many are not affected. Without, it is the plain maximum
        likelihood, which does not exist where a score separates the classes.

        `replicates` bootstrap fits are kept for intervals; they draw speakers where both sides' are given, else trials.

        Raises ValueError where the scores of targets are not the higher ones, or nothing converges.
        """
        x = np.asarray(features, np.float64)
        x = x[:, None] if x.ndim == 1 else x
        _, labels, _ = checked(x[:, 0], labels, None)
        if not np.isfinite(x).all():
            raise ValueError(
                f"{int((~np.isfinite(x)).any(1).sum())} of {len(x)} trials have features that are not finite"
            )
        names = ("score", *(f"feature {i}" for i in range(1, x.shape[1]))) if names is None else tuple(names)
        if len(names) != x.shape[1]:
            raise ValueError(f"{x.shape[1]} features, {len(names)} names")
        if not 0 < prior < 1:
            raise ValueError(f"prior must be between 0 and 1, got {prior}")
        best = _fit_logistic(x, labels, np.ones(len(x)), prior, smoothing)
        if x.shape[1] == 1 and best[0] <= 0:
            raise ValueError("targets do not score higher than non-targets: these scores cannot be calibrated")
        draws = []
        for weights in bootstrap_weights(labels, enroll_speakers, test_speakers, replicates, seed):
            try:
                draws.append(_fit_logistic(x, labels, weights, prior, smoothing))
            except ValueError:  # a draw may separate the classes; it has no fit
                continue
        kept = np.array(draws) if draws else np.empty((0, len(best)))
        about = {"prior": prior, "targets": int(labels.sum()), "nontargets": int((1 - labels).sum()), **(notes or {})}
        return cls(best[:-1], float(best[-1]), names, kept, about)

    def __call__(self, features: Array) -> Array:
        """Log-likelihood ratios `(n,)` of features `(n, k)`, or of scores `(n,)` where there is one."""
        return self._features(features) @ self.weights + self.bias

    def interval(self, features: Array, level: float = 0.95, chunk: int = 65536) -> tuple[Array, Array]:
        """Lower and upper bound of each ratio: what the calibration's own trials leave open."""
        if len(self.replicates) < 20:
            raise ValueError("the calibration was fitted without bootstrap replicates (at least 20)")
        x = self._features(features)
        bounds = np.empty((2, len(x)))
        for start in range(0, len(x), chunk):
            part = slice(start, start + chunk)
            llr = x[part] @ self.replicates[:, :-1].T + self.replicates[:, -1]
            bounds[:, part] = np.quantile(llr, [(1 - level) / 2, (1 + level) / 2], axis=1)
        return bounds[0], bounds[1]

    def save(self, path: str | Path) -> Path:
        """Write as JSON."""
        content = {
            "weights": self.weights,
            "bias": self.bias,
            "names": list(self.names),
            "replicates": self.replicates,
            "notes": dict(self.notes),
        }
        return write_json(path, content)

    @classmethod
    def load(cls, path: str | Path) -> "Calibration":
        """Read what `save` wrote. Raises UserError where it is something else."""
        with reading(path, "is no calibration", "run `calibrate` again"):
            content = read_json(path, "a calibration")
            weights = np.array(content["weights"], np.float64)
            replicates = np.array(content["replicates"], np.float64).reshape(-1, len(weights) + 1)
            names, bias, notes = tuple(content["names"]), float(content["bias"]), dict(content["notes"])
            if weights.ndim != 1 or len(names) != len(weights) or not all(isinstance(name, str) for name in names):
                raise ValueError(f"{len(names)} names for {weights.shape} weights")
            if not all(np.isfinite(values).all() for values in (weights, replicates, bias)):
                raise ValueError("its numbers are not finite")
        return cls(weights, bias, names, replicates, notes)

    def _features(self, features: Array) -> Array:
        x = np.asarray(features, np.float64)
        x = x[:, None] if x.ndim == 1 else x
        if x.shape[1] != len(self.weights):
            raise ValueError(
                f"this calibration takes {len(self.weights)} features ({', '.join(self.names)}), got {x.shape[1]}"
            )
        return x


def _fit_logistic(x: Array, labels: Array, weights: Array, prior: float, smoothing: bool) -> Array:
    """(weights..., bias) of the log-likelihood ratio that minimizes the prior-weighted cross entropy."""
    targets, others = weights * labels, weights * (1 - labels)
    if targets.sum() == 0 or others.sum() == 0:
        raise ValueError("needs targets and non-targets")
    want = labels.astype(np.float64)
    if smoothing:
        n_tar, n_non = targets.sum(), others.sum()
        want = np.where(labels == 1, (n_tar + 1) / (n_tar + 2), 1 / (n_non + 2))
    weight = prior * targets / targets.sum() + (1 - prior) * others / others.sum()
    center = weight @ x
    scale = np.sqrt(weight @ (x - center) ** 2)
    scale[scale == 0] = 1.0
    z = np.c_[(x - center) / scale, np.ones(len(x))]
    offset, theta = float(logit(prior)), np.zeros(z.shape[1])

    def objective(theta: Array) -> float:
        margin = z @ theta + offset
        return float(weight @ (np.logaddexp(0, margin) - want * margin))

    value = objective(theta)
    for _ in range(100):
        posterior = expit(z @ theta + offset)
        gradient = z.T @ (weight * (posterior - want))
        hessian = (z * (weight * posterior * (1 - posterior))[:, None]).T @ z
        # columns that carry nothing (constant features) get no weight
        step = np.linalg.lstsq(hessian + 1e-12 * np.eye(len(theta)), gradient, rcond=None)[0]
        size = 1.0
        while (trial := objective(theta - size * step)) > value - 1e-4 * size * float(gradient @ step) and size > 1e-8:
            size /= 2
        if size <= 1e-8:
            break
        theta, before, value = theta - size * step, value, trial
        if before - value < 1e-15:
            break
    if not np.isfinite(theta).all() or np.abs(theta).max() > 1e4 or value < 1e-6:
        raise ValueError(
            "the scores separate the classes: there is no maximum-likelihood calibration without smoothing"
        )
    slope = theta[:-1] / scale
    return np.r_[slope, theta[-1] - slope @ center]


QUALITY_NAMES = {
    "wespeaker": (
        "score",
        *(f"{f} {m}" for m in ("duration", "norm", "cohort mean") for f in ("min", "max", "difference", "ratio")),
    ),
    "lap": ("score", *(f"{m} {side}" for m in ("log duration", "L1", "L2", "std") for side in ("enrol", "test"))),
}
"""Columns of `quality_features`."""


def quality_features(
    scores: Array,
    durations: tuple[Array, Array],
    embeddings: tuple[Array, Array],
    cohort_means: tuple[Array, Array] | None = None,
    mean: Array | None = None,
    kind: Literal["wespeaker", "lap"] = "wespeaker",
) -> Array:
    """Inputs `(n, 13)` or `(n, 9)` for a calibration that knows about quality (QMF); names in `QUALITY_NAMES`.

    "wespeaker": the normalized score and, of duration (at most 20 s), embedding norm after mean subtraction and cohort
    mean: least, greatest, difference and greatest over least of the two sides. "lap": the score and, of each side, log
    duration, L1 and L2 norm and standard deviation of the embedding. Each pair is (enrolment, test), one row per trial.
    (The published calibrations stop a gradient method early; `Calibration.fit` goes on to the optimum.)
    """
    if any((np.asarray(d) <= 0).any() for d in durations):
        raise ValueError("durations must be positive")
    center = 0.0 if mean is None else np.asarray(mean)
    sides = [np.asarray(e, np.float64) - center for e in embeddings]
    if kind == "wespeaker":
        if cohort_means is None:
            raise ValueError("the wespeaker measures need the cohort means of both sides")
        measures = [[np.minimum(d, 20.0) for d in durations], [np.linalg.norm(e, axis=1) for e in sides], cohort_means]
        columns = [np.asarray(scores, np.float64)]
        for enroll, test in measures:
            low, high = np.minimum(enroll, test), np.maximum(enroll, test)
            columns += [low, high, high - low, high / np.where(low == 0, np.finfo(float).eps, low)]
        return np.stack(columns, 1)
    if kind == "lap":
        measures = [
            [np.log(np.asarray(d, np.float64)) for d in durations],
            [np.abs(e).sum(1) for e in sides],
            [np.linalg.norm(e, axis=1) for e in sides],
            [e.std(1) for e in sides],
        ]
        return np.stack([np.asarray(scores, np.float64), *(column for pair in measures for column in pair)], 1)
    raise ValueError(f"kind must be wespeaker or lap, got {kind!r}")


def draw_trials(
    speakers: Sequence[Any],
    count: int,
    durations: Array | None = None,
    long: float = 6.0,
    seed: int = 0,
) -> tuple[Array, Array, Array]:
    """Draw calibration trials from labelled utterances: (left, right, labels), half of them targets.

    With `durations` in seconds a third each pairs short with short, short with long and long with long utterances
    (short: below `long`), as the quality calibration of wespeaker does with 30 000 trials. No utterance meets itself.

    Raises ValueError where the speakers or durations do not allow a kind of trial.
    """
    names, code = np.unique(np.asarray(speakers), return_inverse=True)
    if len(names) < 2:
        raise ValueError("non-target trials need two speakers")
    rng = np.random.default_rng(seed)
    everyone = np.arange(len(code))
    if durations is None:
        kinds = [(everyone, everyone)]
    else:
        short = np.flatnonzero(np.asarray(durations) < long)
        longer = np.flatnonzero(np.asarray(durations) >= long)
        kinds = [(short, short), (short, longer), (longer, longer)]
    left, right, labels = [], [], []
    for number, (first, second) in enumerate(kinds):
        size = (number + 1) * count // len(kinds) - number * count // len(kinds)
        for label, wanted in ((1, size - size // 2), (0, size // 2)):
            a, b = _draw_pairs(code, first, second, label, wanted, rng)
            left.append(a)
            right.append(b)
            labels.append(np.full(wanted, label, np.int8))
    return np.concatenate(left), np.concatenate(right), np.concatenate(labels)


def _draw_pairs(
    code: Array, first: Array, second: Array, label: int, wanted: int, rng: np.random.Generator
) -> tuple[Array, Array]:
    """`wanted` pairs from `first` x `second` of the same (label 1) or different speakers, by rejection."""
    by_speaker = second[np.argsort(code[second], kind="stable")]
    starts = np.searchsorted(code[by_speaker], code, "left")
    counts = np.searchsorted(code[by_speaker], code, "right") - starts
    own = np.isin(np.arange(len(code)), second)
    possible = counts - own > 0 if label else len(second) - counts > 0
    pool = first[possible[first]]
    if wanted and not len(pool):
        raise ValueError(f"no {'target' if label else 'non-target'} trial of this kind exists in these utterances")
    a, b = np.empty(0, np.int64), np.empty(0, np.int64)
    while len(a) < wanted:
        left = rng.choice(pool, wanted)
        if label:
            right = by_speaker[starts[left] + (rng.random(wanted) * counts[left]).astype(np.int64)]
            good = right != left
        else:
            right = rng.choice(second, wanted)
            good = code[right] != code[left]
        a, b = np.r_[a, left[good]], np.r_[b, right[good]]
    return a[:wanted], b[:wanted]
