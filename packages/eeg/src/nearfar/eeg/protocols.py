"""Evaluation protocols that do not leak: splits, their check, and the harness that runs estimators through them.

A protocol turns the trials' metadata (columns `subject, session, run, file, onset`; `onset` in seconds from the start
of `file`) and class indices into `Split`s. Each default protocol takes its validation trials from what is trained
on (other subjects, or the latest part of the training sessions) and touches the test trials once, at the very end.
With `published=True` the test trials also choose the epoch, as in the published AGTCNet results; such splits, and
every result row from them, are named `published ... (test-set selection)`.
"""

import copy
import hashlib
import json
import logging
import re
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.model_selection import GroupShuffleSplit, KFold, LeaveOneGroupOut, StratifiedKFold

from nearfar.core.errors import UserError
from nearfar.core.files import atomic_path
from nearfar.eeg import metrics
from nearfar.eeg.alignment import RunningAlignment, inverse_root, mean_covariance
from nearfar.eeg.fingerprint import code_digest

logger = logging.getLogger("nearfar.eeg")

COLUMNS = ("subject", "session", "run", "file", "onset")
PUBLISHED = "published {} (test-set selection)"


class LeakageError(UserError):
    """A split in which something of the test set stands among what is learnt from."""


@dataclass(frozen=True)
class Split:
    """Row numbers of the trials to learn from, to select with, and to test on.

    Args:
        protocol: the protocol's name.
        held_out: what is tested, in words: `subject 3, session 1`.
        train, validation, test: row numbers.
        apart: metadata columns whose combined values may not stand on both sides; empty where only trials must differ.
        unit: metadata columns whose combined values make one row of the results.
        start: for fine-tuning, the split that the model to be tuned is trained on.
    """

    protocol: str
    held_out: str
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    apart: tuple[str, ...]
    unit: tuple[str, ...]
    start: "Split | None" = None

    @property
    def published(self) -> bool:
        """Whether the test trials select the model."""
        return self.protocol.startswith("published ")


# Protocols ------------------------------------------------------------------------------------------------------------


def within_session(
    metadata: pd.DataFrame,
    y: np.ndarray,
    *,
    seed: int = 0,
    folds: int = 5,
    validation: float = 0.2,
    published: bool = False,
) -> Iterator[Split]:
    """Stratified folds, contiguous in time, inside each session; validation is the latest part of the training folds.

    `seed` changes nothing here: contiguous folds leave nothing to draw.
    """
    name = _name("within-session", published)
    for (subject, session), rows in _groups(metadata, "subject", "session"):
        held_out = f"subject {subject}, session {session}"
        if min(np.unique(y[rows], return_counts=True)[1]) < max(folds, 2):
            raise UserError(f"{held_out}: a class has fewer trials than the {folds} folds; use fewer folds")
        rows = _in_time(metadata, rows)
        for fold, (learn, test) in enumerate(StratifiedKFold(folds).split(rows, y[rows])):
            train, chosen = _latest(metadata, y, rows[learn], validation)
            split = (rows[learn], rows[test]) if published else (train, chosen)
            yield Split(name, f"{held_out}, fold {fold + 1}", *split, rows[test], (), ("subject", "session"))


def cross_session(
    metadata: pd.DataFrame,
    y: np.ndarray,
    *,
    seed: int = 0,
    test: Sequence[Any] | None = None,
    validation: float = 0.2,
    published: bool = False,
) -> Iterator[Split]:
    """Each session of a subject is tested by a model of the subject's other sessions.

    Args:
        test: the sessions to test; all of them by default. Those named here are never trained on.
        validation: share of the training trials, the latest of each class.
        seed: changes nothing here.
    """
    name, apart = _name("cross-session", published), ("subject", "session")
    for (subject,), rows in _groups(metadata, "subject"):
        sessions = metadata["session"].to_numpy()[rows]
        for session in sorted(set(sessions), key=_natural) if test is None else test:
            held_out = rows[sessions == session]
            learn = rows[~np.isin(sessions, [session] if test is None else list(test))]
            if len(held_out) and len(learn):
                split = (learn, held_out) if published else _latest(metadata, y, learn, validation)
                yield Split(name, f"subject {subject}, session {session}", *split, held_out, apart, apart)


def leave_one_subject_out(
    metadata: pd.DataFrame, y: np.ndarray, *, seed: int = 0, validation: float = 0.2, published: bool = False
) -> Iterator[Split]:
    """Each subject, with all sessions, is tested by a model of the others; a share of these, drawn, is validation."""
    name, subjects = _name("leave-one-subject-out", published), metadata["subject"].to_numpy()
    _need_subjects(subjects, 2)
    for learn, test in LeaveOneGroupOut().split(y, y, subjects):
        split = (learn, test) if published else validation_split(metadata, y, learn, validation, seed)
        yield Split(name, f"subject {subjects[test][0]}", *split, test, ("subject",), ("subject",))


def subject_folds(
    metadata: pd.DataFrame,
    y: np.ndarray,
    *,
    seed: int = 0,
    folds: int = 5,
    subjects: Iterable[Any] | None = None,
    exclude: Iterable[Any] = (),
    validation: float = 0.2,
    published: bool = False,
) -> Iterator[Split]:
    """Contiguous folds of subjects, each tested by a model of the other folds; validation subjects drawn by `seed`.

    Args:
        subjects: the numbering that the folds are cut from, in order (`range(1, 110)` for EEGMMIDB); the subjects
            found in the metadata by default. Numbers without trials leave their fold smaller.
        exclude: subjects dropped after the folds are cut, so that the folds of the others stay as they are.
    """
    name, of_trial = _name("subject-folds", published), metadata["subject"].to_numpy()
    numbering = np.asarray(sorted(set(of_trial), key=_natural) if subjects is None else list(subjects))
    unknown = set(of_trial) - set(numbering)
    if unknown:
        raise UserError(f"subjects {sorted(unknown, key=_natural)} have trials but are not among those to fold")
    present = ~np.isin(of_trial, list(exclude))
    _need_subjects(numbering, max(folds, 2))
    for fold, (_, members) in enumerate(KFold(folds).split(numbering)):
        inside = np.isin(of_trial, numbering[members])
        learn, test = np.flatnonzero(present & ~inside), np.flatnonzero(present & inside)
        if len(learn) and len(test):
            split = (learn, test) if published else validation_split(metadata, y, learn, validation, seed)
            yield Split(name, f"fold {fold + 1}", *split, test, ("subject",), ("subject",))


def fine_tuned(
    metadata: pd.DataFrame,
    y: np.ndarray,
    *,
    seed: int = 0,
    folds: int | None = None,
    subjects: Iterable[Any] | None = None,
    exclude: Iterable[Any] = (),
    calibration: int | None = None,
    validation: float = 0.2,
    published: bool = False,
) -> Iterator[Split]:
    """A model of other subjects, tuned on the subject's other sessions, tested on each session in turn.

    Args:
        folds: train the starting models on `subject_folds` (with `subjects`, `exclude`); by default each subject
            has its own starting model, of all others (`leave_one_subject_out`).
        calibration: tune on the first `calibration` trials of each class only; on all by default.

    The published runs also choose which of several starting models is tuned by its accuracy on the test subject;
    here every repeat tunes its own.
    """
    name, apart = _name("fine-tuned", published), ("subject", "session")
    options: dict[str, Any] = {"seed": seed, "validation": validation, "published": published}
    if folds is not None:
        starts = subject_folds(metadata, y, folds=folds, subjects=subjects, exclude=exclude, **options)
    else:
        kept = np.flatnonzero(~metadata["subject"].isin(list(exclude)))
        starts = (_take(kept, start) for start in leave_one_subject_out(metadata.iloc[kept], y[kept], **options))
    for start in starts:
        for own in cross_session(metadata.iloc[start.test], y[start.test], validation=validation, published=published):
            own = _take(start.test, own)
            if calibration is not None:
                learn = own.train if published else np.concatenate([own.train, own.validation])
                learn = _earliest(metadata, y, learn, calibration)
                parts = (learn, own.test) if published else _latest(metadata, y, learn, validation)
                own = Split(own.protocol, own.held_out, *parts, own.test, apart, apart)
            yield Split(name, own.held_out, own.train, own.validation, own.test, apart, apart, start)


PROTOCOLS: dict[str, Callable[..., Iterator[Split]]] = {
    "within-session": within_session,
    "cross-session": cross_session,
    "leave-one-subject-out": leave_one_subject_out,
    "subject-folds": subject_folds,
    "fine-tuned": fine_tuned,
}


def validation_split(
    metadata: pd.DataFrame, y: np.ndarray, rows: np.ndarray, share: float = 0.2, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """`rows` to train on and to select with: of several subjects whole ones, drawn; of one its latest trials.

    Args:
        share: of the subjects, or of the trials of each class, to select with.
        seed: of the draw.
    """
    subjects = metadata["subject"].to_numpy()[rows]
    if len(set(subjects)) < 2:
        return _latest(metadata, y, rows, share)
    train, chosen = next(GroupShuffleSplit(1, test_size=share, random_state=seed).split(rows, groups=subjects))
    return rows[train], rows[chosen]


def _name(protocol: str, published: bool) -> str:
    return PUBLISHED.format(protocol) if published else protocol


def _take(rows: np.ndarray, split: Split) -> Split:
    parts = (rows[split.train], rows[split.validation], rows[split.test])
    return Split(split.protocol, split.held_out, *parts, split.apart, split.unit)


def _need_subjects(subjects: np.ndarray, fewest: int) -> None:
    found = len(set(subjects))
    if found < fewest:
        raise UserError(
            f"this protocol needs at least {fewest} subjects, the data have {found}; "
            "add subjects or use the within-session or cross-session protocol"
        )


def _natural(value: Any) -> tuple[Any, ...]:
    """A sorting key in which run 10 comes after run 9, also in strings."""
    return tuple((not part.isdigit(), int(part) if part.isdigit() else part) for part in re.split(r"(\d+)", str(value)))


def _groups(metadata: pd.DataFrame, *columns: str) -> Iterator[tuple[tuple[Any, ...], np.ndarray]]:
    for values, rows in sorted(metadata.groupby(list(columns)).indices.items(), key=lambda item: _natural(item[0])):
        yield values if isinstance(values, tuple) else (values,), rows


def _in_time(metadata: pd.DataFrame, rows: np.ndarray) -> np.ndarray:
    """`rows` in the order of recording: by session, run and onset."""
    trials = metadata.iloc[rows]
    ranks = [pd.Index(sorted(trials[c].unique(), key=_natural)).get_indexer(trials[c]) for c in ("run", "session")]
    return np.asarray(rows)[np.lexsort([trials["onset"].to_numpy(float), *ranks])]


def _latest(metadata: pd.DataFrame, y: np.ndarray, rows: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """`rows` without, and the rows of, the latest `share` of each class (at least one trial each, if there are two)."""
    rows = _in_time(metadata, rows)
    late = np.zeros(len(rows), bool)
    for label in np.unique(y[rows]):
        of_class = np.flatnonzero(y[rows] == label)
        count = min(max(round(share * len(of_class)), 1), len(of_class) - 1)
        late[of_class[len(of_class) - count :]] = True
    return rows[~late], rows[late]


def _earliest(metadata: pd.DataFrame, y: np.ndarray, rows: np.ndarray, count: int) -> np.ndarray:
    rows = _in_time(metadata, rows)
    return np.sort(np.concatenate([rows[y[rows] == label][:count] for label in np.unique(y[rows])]))


# The check ------------------------------------------------------------------------------------------------------------


def trial_ids(metadata: pd.DataFrame) -> np.ndarray:
    """One string per trial to record what a statistic was fitted on (`fitted_on_`): file and onset, or index label."""
    rows = zip(metadata["file"], metadata["onset"], metadata.index)
    return np.array([f"{f} @ {index if np.isnan(onset) else onset}" for f, onset, index in rows], dtype=object)


def check_metadata(metadata: pd.DataFrame, n_trials: int) -> None:
    """Raises `UserError` unless the metadata have a row for each trial, the needed columns and no trial twice.

    An unknown onset (NaN) is let through with a warning: the rows must then be in the order of time, and overlaps in
    time cannot be seen.
    """
    missing = [column for column in COLUMNS if column not in metadata]
    if missing:
        raise UserError(f"the trials' metadata lack the columns {missing}; needed are {list(COLUMNS)}")
    if len(metadata) != n_trials:
        raise UserError(f"{n_trials} trials but {len(metadata)} rows of metadata")
    gaps = metadata[list(COLUMNS[:-1])].isna().any()
    if gaps.any():
        raise UserError(f"the trials' metadata have gaps in {list(gaps[gaps].index)}; every trial needs a value")
    twice = metadata.duplicated(["file", "onset"]) & metadata["onset"].notna()
    if twice.any():
        raise UserError(f"trial {trial_ids(metadata[twice])[0]} stands twice in the data; remove one of them")
    unknown = int(metadata["onset"].isna().sum())
    if unknown:
        logger.warning("%d of %d trials have no onset: whether they overlap in time is not checked", unknown, n_trials)


def check_split(
    split: Split,
    metadata: pd.DataFrame,
    *,
    trial_seconds: float,
    digests: Sequence[bytes] | None = None,
    treated: Iterable[tuple[str, np.ndarray]] = (),
    fitted: Iterable[Any] = (),
) -> None:
    """Raises `LeakageError`, naming what leaks, if anything of the test set stands among what is learnt from.

    Refused are: the same trial on both sides; the same subject or session where `split.apart` says it must not be;
    trials of one file whose times overlap; the same signal under two names (with `digests`, one per trial, from
    `trial_digests`); statistics fitted on test trials; and a validation set with test trials unless the protocol is a
    published one. What is learnt from includes the validation trials and, for fine-tuning, the starting model's.

    Args:
        metadata: one row per trial.
        trial_seconds: length of a trial.
        treated: groups of trials that statistics were applied to, from `treatments`; refused if test trials are there.
        fitted: whatever was fitted before the split, and applied to the trials: each must carry `fitted_on_`, the
            `trial_ids` that it saw; one without is refused, for nothing shows that it is clean.
    """
    where = f"{split.protocol}, {split.held_out}"
    if split.start is not None:
        check_split(split.start, metadata, trial_seconds=trial_seconds, digests=digests)  # the rest is checked below
    for name in ("train", "test") if split.published else ("train", "validation", "test"):
        rows = getattr(split, name)
        if len(rows) == 0:
            raise UserError(f"{where}: no {name} trials; use another protocol or more data")
        if len(np.unique(rows)) < len(rows):
            raise UserError(f"{where}: a trial stands twice in the {name} set")

    stages = [stage for stage in (split, split.start) if stage is not None]
    learnt = [("training" if stage is split else "pretraining", stage.train) for stage in stages]
    if not split.published:
        learnt += [("validation" if stage is split else "pretraining", stage.validation) for stage in stages]

    def trial(row: int) -> str:
        return f"trial {trial_ids(metadata.iloc[[row]])[0]}"

    for side, rows in learnt:
        both = f"{where}: {{}} stands in both {side} and test"
        shared = np.intersect1d(rows, split.test)
        if len(shared):
            raise LeakageError(both.format(trial(shared[0])))
        if split.apart:
            columns = list(split.apart)
            tables = [metadata[columns].iloc[part].drop_duplicates() for part in (rows, split.test)]
            values = [set(found.itertuples(index=False, name=None)) for found in tables]
            shared_values = values[0] & values[1]
            if shared_values:
                value = min(shared_values, key=_natural)
                raise LeakageError(both.format(", ".join(f"{c} {v}" for c, v in zip(columns, value))))
        overlap = _overlap(metadata, rows, split.test, trial_seconds)
        if overlap is not None:
            raise LeakageError(
                f"{where}: {trial(overlap[0])} of {side} and {trial(overlap[1])} of test overlap in time "
                f"(each lasts {trial_seconds:g} s); cut trials that do not overlap or hold out whole sessions"
            )
        if digests is not None:
            known = {digests[row]: row for row in rows}
            twin = next((row for row in split.test if digests[row] in known), None)
            if twin is not None:
                names = f"{trial(known[digests[twin]])} of {side} and {trial(twin)} of test"
                raise LeakageError(f"{where}: {names} hold the same signal; remove the copy")
    if not split.published:
        shared = np.intersect1d(split.train, split.validation)
        if len(shared):
            raise LeakageError(f"{where}: {trial(shared[0])} stands in both training and validation")

    for how, rows in treated:
        if np.isin(split.test, rows).any():
            raise LeakageError(f"{where}: the data were {how}, test trials included; fit that on training trials alone")
    for statistic in fitted:
        name = type(statistic).__name__
        if not hasattr(statistic, "fitted_on_"):
            raise LeakageError(f"{where}: {name} does not record the trials it was fitted on (fitted_on_)")
        shared_ids = sorted(set(trial_ids(metadata.iloc[split.test])).intersection(statistic.fitted_on_))
        if shared_ids:
            raise LeakageError(
                f"{where}: {name} was fitted on {len(shared_ids)} test trials (first: {shared_ids[0]}); "
                "fit it on the training trials alone"
            )


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


def trial_digests(X: np.ndarray) -> list[bytes]:
    """A digest of each trial's bytes."""
    head = f"{X.dtype}{X.shape[1:]}".encode()
    return [hashlib.blake2b(head + np.ascontiguousarray(trial).tobytes(), digest_size=16).digest() for trial in X]


def treatments(X: np.ndarray, metadata: pd.DataFrame) -> list[tuple[str, np.ndarray]]:
    """Groups of trials that bear the marks of statistics taken over the whole group, for `check_split`.

    Standardising by the mean and deviation of a group of trials leaves that group with mean 0 and one and the same
    variance in every channel; whitening (Euclidean alignment) leaves it with one and the same variance in every
    direction. Neither happens by chance. Looked at are all trials, each subject's and each session's. Trials that were
    each standardised by themselves are innocent. Unseen stay statistics with shrinkage or of other groups: declare
    these by `fitted`.

    Returns:
        For each such group what was done, in words, and the group's row numbers.
    """
    groups = [("all trials", np.arange(len(X)))]
    groups += [(f"subject {subject}", rows) for (subject,), rows in _groups(metadata, "subject")]
    groups += [(f"subject {a}, session {b}", rows) for (a, b), rows in _groups(metadata, "subject", "session")]
    means = X.mean(-1, dtype=float)
    products = np.stack([trial @ trial.T / trial.shape[-1] for trial in X]).astype(float)

    def treatment(rows: np.ndarray, tolerance: float = 1e-4) -> str:
        product, mean = products[rows].mean(0), means[rows].mean(0)
        variance = np.diag(product)
        scale = variance.mean()
        if len(variance) < 3 or scale == 0:
            return ""
        strengths = np.linalg.eigvalsh(product)
        strengths = strengths[strengths > 1e-6 * strengths[-1]]
        if len(strengths) > 2 and np.ptp(strengths) < tolerance * strengths[-1]:
            return "whitened"
        level = np.abs(mean).max() < tolerance * np.sqrt(scale)
        return "standardised" if level and np.ptp(variance) < tolerance * scale else ""

    found = ((treatment(rows), name, rows) for name, rows in groups)
    return [(f"{how} over {name}", rows) for how, name, rows in found if how and not treatment(rows[:1])]


def _overlap(metadata: pd.DataFrame, a: np.ndarray, b: np.ndarray, seconds: float) -> tuple[int, int] | None:
    """The first trial of `a` and of `b` that lie less than `seconds` apart in one file.

    In the order of file and onset it is enough to look at neighbours that stand on different sides.
    """
    rows = np.concatenate([a, b])
    trials = metadata[["file", "onset"]].iloc[rows].assign(row=rows, side=np.repeat([0, 1], [len(a), len(b)]))
    trials = trials[trials["file"].isin(trials["file"][trials["side"] == 1].unique())]
    trials["file"] = pd.factorize(trials["file"])[0]
    trials = trials.sort_values(["file", "onset"], ignore_index=True)
    step = trials[["side", "file", "onset"]].diff()
    near = (step["side"] != 0) & (step["file"] == 0) & (step["onset"] < seconds - 1e-9)
    if not near.any():
        return None
    pair = trials.iloc[[near.idxmax() - 1, near.idxmax()]].sort_values("side")["row"]
    return int(pair.iloc[0]), int(pair.iloc[1])


# The harness ----------------------------------------------------------------------------------------------------------


@dataclass
class Results:
    """What `evaluate` found.

    Attributes:
        rows: one row per model, repeat and tested unit (a subject, or a subject's session): `protocol, alignment,
            model, subject, session` (`all` where the unit is the subject), `repeat, seed, n_train, n_validation,
            n_test, accuracy, kappa, chance, chance_bound` (95 %), `sma20` (published protocols of networks only),
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
    with `fine_tune`, called like `fit`, is first fitted on the other subjects; one without sees the subject's own
    trials only.

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
        raise UserError("the protocol finds nothing to test: every subject has one session only")
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
        self.started: dict[str, tuple[Any, Any]] = {}  # of each model, the last starting model of fine-tuning
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
        digest = hashlib.blake2b(f"{self.codes[name]} {seed} {split.published}".encode(), digest_size=16)
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
        estimator, method = self.estimators[name](seed), "fit"
        if split.start is not None and hasattr(estimator, "fine_tune"):
            key = (seed, split.start.train.tobytes(), split.start.validation.tobytes())
            if self.started.get(name, (None, None))[0] != key:
                self.started.pop(name, None)  # free the one that is no longer needed
                self.learn(estimator, "fit", split.start, X)
                self.started[name] = (key, estimator)
            estimator, method = copy.deepcopy(self.started[name][1]), "fine_tune"
        self.learn(estimator, method, split, X)
        given = np.asarray(estimator.predict_proba(X[split.test]), float)
        known = np.asarray(getattr(estimator, "classes_", np.arange(self.n_classes)), int)
        if given.shape != (len(split.test), len(known)):
            raise ValueError(f"predict_proba gave {given.shape} for {len(split.test)} trials and {len(known)} classes")
        probabilities = np.zeros((len(split.test), self.n_classes))
        probabilities[:, known] = given
        curve = [dict(epoch) for epoch in getattr(estimator, "history_", [])]
        return {"probabilities": probabilities, "seconds": time.perf_counter() - begin, "history": curve}

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
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {"probabilities": stored["probabilities"], **json.loads(str(stored["about"]))}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
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
        rows.append(
            dict(zip(unit, values))
            | {name: round(own[name].mean()) for name in ("n_train", "n_validation")}
            | {"n_test": len(tested), "accuracy": share * right + (1 - share) / n_classes, "kappa": share * agreement}
            | {"chance": 1 / n_classes, "chance_bound": metrics.chance_bound(len(tested), n_classes)}
            | {"sma20": own["sma20"].mean(), "seconds": own["seconds"].sum()}
            | {"failure": "; ".join(own["failure"][own["failure"] != ""].unique())}
        )
    return pd.DataFrame(rows)


def _missed_rows(rows: pd.DataFrame, subjects: Sequence[Any], n_classes: int) -> pd.DataFrame:
    models = rows[["protocol", "model", "repeat", "seed"]].drop_duplicates()
    blank = {"session": "all", "n_train": 0, "n_validation": 0, "n_test": 0, "accuracy": 1 / n_classes, "kappa": 0.0}
    blank |= {"chance": 1 / n_classes, "chance_bound": float("nan"), "sma20": float("nan"), "seconds": 0.0}
    blank |= {"failure": "not tested: the protocol needs another session of this subject"}
    return models.merge(pd.DataFrame({"subject": list(subjects)}), how="cross").assign(**blank)[rows.columns]
