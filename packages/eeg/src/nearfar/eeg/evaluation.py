"""Evaluating decoders under a protocol: one fit per split, resumable, with every trial's prediction."""

import copy
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nearfar.core.errors import UserError
from nearfar.core.files import atomic_path
from nearfar.core.fingerprint import code_digest
from nearfar.core.reading import read_arrays, reading
from nearfar.eeg import metrics
from nearfar.eeg.alignment import RunningAlignment, inverse_root, mean_covariance
from nearfar.eeg.leakage import COLUMNS, check_metadata, check_split, treatments, trial_digests
from nearfar.eeg.protocols import PROTOCOLS, Split, _groups, _in_time, _natural


def align(X: np.ndarray, metadata: pd.DataFrame, split: Split, shrinkage: float = 0.1) -> np.ndarray:
    """The trials of a split after Euclidean alignment of each session, with nothing learnt from test trials.

    A session is whitened by the mean covariance of those of its trials that are learnt from. One without any, such as
    that of a new subject, is aligned as it would be online: each trial by the mean covariance of the trials so far,
    itself included. Trials outside the split are zero.
    """
    result, tested = np.zeros_like(X), np.zeros(len(X), bool)
    tested[split.test] = True
    stages = [stage for stage in (split, split.start) if stage is not None]
    learnt = np.zeros(len(X), bool)
    for stage in stages:
        learnt[stage.train] = learnt[stage.validation] = True
    learnt &= ~tested
    for _, rows in _groups(metadata, "subject", "session"):
        known, new = rows[learnt[rows]], rows[tested[rows]]
        if len(known):
            used = rows[learnt[rows] | tested[rows]]
            result[used] = inverse_root(mean_covariance(X[known]), shrinkage) @ X[used]
        else:
            running = RunningAlignment(shrinkage)
            for row in _in_time(metadata, new):
                result[row] = running.push(X[row])
    return result


@dataclass
class Results:
    """What `evaluate` found.

    Attributes:
        rows: one row per model, repeat and tested unit (a subject, or a subject's session): `protocol, alignment,
            model, subject, session` (`all` where the unit is the subject), `repeat, seed, n_train, n_validation,
            n_test, accuracy, kappa, balanced_accuracy, auc, chance` (of the most frequent class), `chance_bound`
            (95 %), `sma20` (published protocols of networks only),
            `seconds` (of all fits that test the unit) and `failure` (empty, or why it counts as chance).
        predictions: one row per model, repeat and tested trial: `trial` is its row number, `p_0 ...` the probabilities;
            `y_pred` is -1 where there is none.
        history: the networks' training curves, one row per epoch.
        classes: names of the classes.
    """

    rows: pd.DataFrame
    predictions: pd.DataFrame
    history: pd.DataFrame
    classes: list[str] = field(default_factory=list)

    @property
    def failures(self) -> pd.DataFrame:
        """The rows that count as chance because a fit failed or the protocol could not test the subject."""
        return self.rows[self.rows["failure"] != ""]

    def summary(self) -> pd.DataFrame:
        """Means and spreads per model: see `nearfar.eeg.metrics.summary`."""
        return metrics.summary(self.rows)

    def comparison(self) -> pd.DataFrame:
        """Paired tests between the models: see `nearfar.eeg.metrics.wilcoxon_holm`."""
        return metrics.wilcoxon_holm(metrics.subject_scores(self.rows))

    def confusion(self, model: str) -> np.ndarray:
        """The model's confusion matrix over all subjects and repeats: see `nearfar.eeg.metrics.confusion_matrix`."""
        chosen = self.predictions[self.predictions["model"] == model]
        return metrics.confusion_matrix(chosen["y_true"], chosen["y_pred"], len(self.classes))

    def write(self, folder: str | Path) -> None:
        """Write `results.csv`, `summary.csv`, `comparison.csv`, `predictions.csv`, `history.csv` to `folder`."""
        tables = {"results": self.rows, "predictions": self.predictions, "history": self.history}
        for name, table in (tables | {"summary": self.summary(), "comparison": self.comparison()}).items():
            with atomic_path(Path(folder) / f"{name}.csv") as path:
                table.to_csv(path, index=False)


def evaluate(
    estimators: Mapping[str, Callable[[int], Any]],
    X: np.ndarray,
    y: np.ndarray,
    metadata: pd.DataFrame,
    protocol: str | Callable[..., Iterable[Split]],
    *,
    sfreq: float,
    seeds: Sequence[int] = (0,),
    classes: Sequence[str] | None = None,
    alignment: bool = False,
    fitted: Iterable[Any] = (),
    cache_dir: str | Path | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    **options: Any,
) -> Results:
    """Run each estimator through a protocol, once per seed; nothing is fitted before every split has passed the check.

    An estimator has `fit(X, y)` and `predict_proba(X)`, as in scikit-learn. One with `uses_validation = True` is fitted
    with `fit(X, y, X_val=..., y_val=...)` (and `monitor=(X_test, y_test)` under a published protocol); others do not
    select anything and are fitted on training and validation trials together. In a fine-tuning protocol an estimator
    with `fine_tune`, called like `fit`, is first fitted on the split's start (other subjects, or the subject's first
    runs); one without sees the subject's own trials only, all that the split allows.

    A fit that raises counts as chance (accuracy 1 / classes, kappa 0) and is told in `failure`, as is a subject that
    the protocol cannot test; if an estimator fails everywhere, its last error is raised.

    Args:
        estimators: name -> function that makes the unfitted estimator from a seed.
        X: trials (n, channels, times).
        y: class indices 0 ... K - 1.
        metadata: one row per trial, see the module.
        protocol: a name in `PROTOCOLS`, or a function like those; `options` are handed to it.
        sfreq: sampling rate, Hz.
        alignment: align each split's trials first, see `align`.
        fitted: see `check_split`.
        cache_dir: where finished fits are kept. Each is found again by a digest of the estimator's code (its module
            and all that it imports of ours and the user's, and the versions of the libraries), its settings, the data
            of its split and the seed; so an interrupted run resumes, and a change of any of these computes anew.
        progress: called as `progress(done, total, what)` before each fit, and at the end.
    """
    y, estimators, fitted = np.asarray(y), dict(estimators), list(fitted)
    check_metadata(metadata, len(X))
    if len(y) != len(X):
        raise UserError(f"{len(X)} trials but {len(y)} labels")
    n_classes = int(y.max()) + 1 if classes is None else len(classes)
    if n_classes < 2 or len(np.unique(y)) < 2:
        raise UserError("the trials have one class only; a decoder needs at least two")
    if isinstance(protocol, str):
        if protocol not in PROTOCOLS:
            raise UserError(f"there is no protocol {protocol!r}; choose one of {', '.join(PROTOCOLS)}")
        protocol = PROTOCOLS[protocol]

    splits = [
        (repeat, split) for repeat, seed in enumerate(seeds) for split in protocol(metadata, y, seed=seed, **options)
    ]
    if not splits:
        raise UserError("the protocol finds nothing to test: every subject has one session only, or one run")
    digests, treated, seconds = trial_digests(X), treatments(X, metadata), X.shape[-1] / sfreq
    for _, split in splits:
        check_split(split, metadata, trial_seconds=seconds, digests=digests, treated=treated, fitted=fitted)

    fits = _Fits(estimators, X, y, metadata, n_classes, alignment, cache_dir)
    errors: dict[str, Exception] = {}
    done, about, predictions, history = set(), [], [], []
    steps = [(repeat, split, name) for repeat, split in splits for name in estimators]
    for step, (repeat, split, name) in enumerate(steps):
        if progress is not None:
            progress(step, len(steps), f"{name}, {split.held_out}, repeat {repeat + 1}")
        key = {"protocol": split.protocol, "model": name, "repeat": repeat, "seed": seeds[repeat]}
        key |= {"held_out": split.held_out}
        failure = ""
        try:
            fit = fits(name, split, seeds[repeat])
            done.add(name)
        except Exception as error:
            errors[name], failure = error, f"{type(error).__name__}: {error}".splitlines()[0]
            fit = {"probabilities": np.full((len(split.test), n_classes), np.nan), "seconds": 0.0, "history": []}
        curve = [epoch["test_accuracy"] for epoch in fit["history"] if "test_accuracy" in epoch]
        sma20 = metrics.moving_average_accuracy(curve) if split.published else float("nan")
        sizes = {"n_train": len(split.train), "n_validation": 0 if split.published else len(split.validation)}
        about.append(key | sizes | {"sma20": sma20, "seconds": fit["seconds"], "failure": failure})
        predictions.append(_predictions(key, split, metadata, y, fit["probabilities"]))
        history += [key | {"epoch": epoch} | values for epoch, values in enumerate(fit["history"])]
    for name in estimators:
        if name not in done:
            raise UserError(f"{name}: every fit failed; the last one said: {errors[name]}") from errors[name]
    if progress is not None:
        progress(len(steps), len(steps), "done")

    tested = pd.concat(predictions, ignore_index=True)
    rows = _rows(tested, pd.DataFrame(about), n_classes)
    expected = set(metadata["subject"]) - set(options.get("exclude", ()))
    missed = sorted(expected - set(tested["subject"]), key=_natural)
    if missed:
        rows = pd.concat([rows, _missed_rows(rows, missed, n_classes)], ignore_index=True)
    rows.insert(1, "alignment", "Euclidean" if alignment else "none")
    names = [str(index) for index in range(n_classes)] if classes is None else list(classes)
    return Results(rows, tested, pd.DataFrame(history), names)


class _Fits:
    """The fits of one evaluation, each made once or found in the cache."""

    def __init__(
        self,
        estimators: Mapping[str, Callable[[int], Any]],
        X: np.ndarray,
        y: np.ndarray,
        metadata: pd.DataFrame,
        n_classes: int,
        alignment: bool,
        cache_dir: str | Path | None,
    ) -> None:
        self.estimators, self.X, self.y, self.metadata = estimators, X, y, metadata
        self.n_classes, self.alignment = n_classes, alignment
        self.folder = None if cache_dir is None else Path(cache_dir)
        self.tunes = {name: hasattr(make(0), "fine_tune") for name, make in estimators.items()}
        self.last: dict[str, tuple[Any, Any]] = {}  # of each model what it learnt from last, and itself
        self.aligned: tuple[Split, np.ndarray] | None = None  # the last split's trials
        if self.folder is not None:
            told = metadata[list(COLUMNS)].itertuples(index=False, name=None)
            self.contents = [
                hashlib.blake2b(trial + repr((values, int(label), alignment)).encode(), digest_size=16).digest()
                for trial, values, label in zip(trial_digests(X), told, y)
            ]
            self.codes = {name: code_digest((make(0), _Fits)) for name, make in estimators.items()}

    def __call__(self, name: str, split: Split, seed: int) -> dict[str, Any]:
        """`probabilities` of the test trials, `seconds`, and the training `history` (may be empty)."""
        if self.folder is None:
            return self.fit(name, split, seed)
        digest = hashlib.blake2b(digest_size=16)
        digest.update(f"{self.codes[name]} {seed} {split.published} {split.continues}".encode())
        for stage in (split, split.start):
            for rows in () if stage is None else (stage.train, stage.validation, stage.test):
                digest.update(f"{len(rows)} ".encode() + b"".join(self.contents[row] for row in rows))
        path = self.folder / f"{digest.hexdigest()}.npz"
        stored = _read(path)
        if stored is None:
            stored = self.fit(name, split, seed)
            about = np.array(json.dumps({"seconds": stored["seconds"], "history": stored["history"]}, default=float))
            with atomic_path(path) as temporary:
                np.savez(temporary, probabilities=stored["probabilities"], about=about)
        return stored

    def fit(self, name: str, split: Split, seed: int) -> dict[str, Any]:
        """Fit on what the split allows, then touch the test trials once."""
        X = self.trials(split)
        begin = time.perf_counter()
        if split.start is not None and self.tunes[name]:
            estimator = copy.deepcopy(self.fitted(name, split.start, seed, X))
            self.learn(estimator, "fine_tune", split, X)
        else:
            estimator = self.fitted(name, split.joined() if split.continues else split, seed, X)
        given = np.asarray(estimator.predict_proba(X[split.test]), float)
        known = np.asarray(getattr(estimator, "classes_", np.arange(self.n_classes)), int)
        if given.shape != (len(split.test), len(known)):
            raise ValueError(f"predict_proba gave {given.shape} for {len(split.test)} trials and {len(known)} classes")
        probabilities = np.zeros((len(split.test), self.n_classes))
        probabilities[:, known] = given
        curve = [dict(epoch) for epoch in getattr(estimator, "history_", [])]
        return {"probabilities": probabilities, "seconds": time.perf_counter() - begin, "history": curve}

    def fitted(self, name: str, split: Split, seed: int, X: np.ndarray) -> Any:
        """An estimator fitted on a split; the last of its name where that learnt from the same, equally aligned."""
        rows = np.concatenate([split.train, split.validation])
        aligned = trial_digests(X[rows]) if self.alignment else ()
        key = (seed, split.train.tobytes(), split.validation.tobytes(), *aligned)
        if self.last.get(name, (None, None))[0] != key:
            self.last.pop(name, None)  # free the one that is no longer needed
            estimator = self.estimators[name](seed)
            self.learn(estimator, "fit", split, X)
            self.last[name] = (key, estimator)
        return self.last[name][1]

    def learn(self, estimator: Any, method: str, split: Split, X: np.ndarray) -> None:
        train, selecting = split.train, dict[str, Any]()
        if getattr(estimator, "uses_validation", False):
            selecting = {"X_val": X[split.validation], "y_val": self.y[split.validation]}
            if split.published:
                selecting["monitor"] = (X[split.test], self.y[split.test])
        elif not split.published:
            train = np.sort(np.concatenate([train, split.validation]))
        getattr(estimator, method)(X[train], self.y[train], **selecting)

    def trials(self, split: Split) -> np.ndarray:
        if not self.alignment:
            return self.X
        if self.aligned is None or self.aligned[0] is not split:
            self.aligned = (split, align(self.X, self.metadata, split))
        return self.aligned[1]


def _read(path: Path) -> dict[str, Any] | None:
    """A finished fit, or None where there is none (or a damaged one, which is then made anew)."""
    if not path.is_file():
        return None
    try:
        with reading(path, "is no fit"):
            stored = read_arrays(path, "a fit")
            return {"probabilities": stored["probabilities"], **json.loads(str(stored["about"]))}
    except UserError:
        return None


def _predictions(
    key: dict[str, Any], split: Split, metadata: pd.DataFrame, y: np.ndarray, probabilities: np.ndarray
) -> pd.DataFrame:
    tested = metadata.iloc[split.test]
    sessions = tested["session"].to_numpy() if "session" in split.unit else "all"
    known = np.isfinite(probabilities).all(1)
    y_pred = np.where(known, np.nan_to_num(probabilities).argmax(1), metrics.NO_DECISION)
    truth = {"trial": split.test, "y_true": y[split.test], "y_pred": y_pred}
    shares = {f"p_{index}": probabilities[:, index] for index in range(probabilities.shape[1])}
    return pd.DataFrame(key | {"subject": tested["subject"].to_numpy(), "session": sessions} | truth | shares)


def _rows(predictions: pd.DataFrame, fits: pd.DataFrame, n_classes: int) -> pd.DataFrame:
    fit_key = ["protocol", "model", "repeat", "held_out"]
    fits = fits.set_index(fit_key)
    rows = []
    unit = ["protocol", "model", "subject", "session", "repeat", "seed"]
    for values, tested in predictions.groupby(unit, sort=False):
        own = fits.loc[list(dict.fromkeys(tested[fit_key].itertuples(index=False, name=None)))]
        bad = own.index[own["failure"] != ""]
        scored = tested[~pd.MultiIndex.from_frame(tested[fit_key]).isin(bad)]
        share = len(scored) / len(tested)
        right = metrics.accuracy(scored["y_true"], scored["y_pred"]) if share else 0.0
        agreement = metrics.kappa(scored["y_true"], scored["y_pred"]) if share else 0.0
        chance = metrics.chance_level(tested["y_true"], n_classes)
        even = metrics.balanced_accuracy(scored["y_true"], scored["y_pred"]) if share else 0.0
        area = metrics.auc(tested["y_true"], tested[[f"p_{index}" for index in range(n_classes)]].to_numpy())
        rows.append(
            dict(zip(unit, values))
            | {name: round(own[name].mean()) for name in ("n_train", "n_validation")}
            | {"n_test": len(tested), "accuracy": share * right + (1 - share) / n_classes, "kappa": share * agreement}
            | {"balanced_accuracy": share * even + (1 - share) / n_classes, "auc": area, "chance": chance}
            | {"chance_bound": metrics.chance_bound(len(tested), n_classes, chance=chance)}
            | {"sma20": own["sma20"].mean(), "seconds": own["seconds"].sum()}
            | {"failure": "; ".join(own["failure"][own["failure"] != ""].unique())}
        )
    return pd.DataFrame(rows)


def _missed_rows(rows: pd.DataFrame, subjects: Sequence[Any], n_classes: int) -> pd.DataFrame:
    models = rows[["protocol", "model", "repeat", "seed"]].drop_duplicates()
    blank = {"session": "all", "n_train": 0, "n_validation": 0, "n_test": 0, "accuracy": 1 / n_classes, "kappa": 0.0}
    blank |= {
        "balanced_accuracy": 1 / n_classes,
        "auc": 0.5,
        "chance": 1 / n_classes,
        "chance_bound": float("nan"),
        "sma20": float("nan"),
        "seconds": 0.0,
    }
    blank |= {"failure": "not tested: the protocol needs another session or run of this subject"}
    return models.merge(pd.DataFrame({"subject": list(subjects)}), how="cross").assign(**blank)[rows.columns]
