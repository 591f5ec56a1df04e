"""Evaluation protocols that do not leak: splits, their check, and the harness that runs estimators through them.

A protocol turns the trials' metadata (columns `subject, session, run, file, onset`; `onset` in seconds from the start
of `file`) and class indices into `Split`s. Each default protocol takes its validation trials from what is trained
on (other subjects, or the latest part of the training sessions) and touches the test trials once, at the very end.
With `published=True` the test trials also choose the epoch, as in the published AGTCNet results; such splits, and
every result row from them, are named `published ... (test-set selection)`.
"""

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from sklearn.model_selection import GroupShuffleSplit, KFold, LeaveOneGroupOut, StratifiedKFold

from nearfar.core.errors import UserError

logger = logging.getLogger("nearfar.eeg")

PUBLISHED = "published {} (test-set selection)"


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
        continues: `start` holds the subject's own earlier trials: what cannot be tuned is fitted on both.
    """

    protocol: str
    held_out: str
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    apart: tuple[str, ...]
    unit: tuple[str, ...]
    start: "Split | None" = None
    continues: bool = False

    def joined(self) -> "Split":
        """Its start and itself as one split, for an estimator that cannot be tuned."""
        if self.start is None:
            return self
        train = np.concatenate([self.start.train, self.train])
        validation = self.validation if self.published else np.concatenate([self.start.validation, self.validation])
        return replace(self, train=train, validation=validation, start=None, continues=False)

    @property
    def published(self) -> bool:
        """Whether the test trials select the model."""
        return self.protocol.startswith("published ")


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
            yield Split(
                name, f"{held_out}, fold {fold + 1}", split[0], split[1], rows[test], (), ("subject", "session")
            )


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
                yield Split(name, f"subject {subject}, session {session}", split[0], split[1], held_out, apart, apart)


def leave_one_subject_out(
    metadata: pd.DataFrame, y: np.ndarray, *, seed: int = 0, validation: float = 0.2, published: bool = False
) -> Iterator[Split]:
    """Each subject, with all sessions, is tested by a model of the others; a share of these, drawn, is validation."""
    name, subjects = _name("leave-one-subject-out", published), metadata["subject"].to_numpy()
    _need_subjects(subjects, 2)
    for learn, test in LeaveOneGroupOut().split(y, y, subjects):
        split = (learn, test) if published else validation_split(metadata, y, learn, validation, seed)
        yield Split(name, f"subject {subjects[test][0]}", split[0], split[1], test, ("subject",), ("subject",))


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
            yield Split(name, f"fold {fold + 1}", split[0], split[1], test, ("subject",), ("subject",))


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


def successive_runs(
    metadata: pd.DataFrame,
    y: np.ndarray,
    *,
    seed: int = 0,
    calibration: int = 1,
    adapt: bool = True,
    validation: float = 0.2,
    published: bool = False,
) -> Iterator[Split]:
    """Each run of a subject by a model of the runs before it, as a laboratory goes on from run to run.

    The model of the first runs decodes the next one; before each later run it is adapted to those that were decoded
    since, whose classes are known by then. A model that cannot be tuned is fitted anew on all runs so far.

    Args:
        calibration: so many first runs train the model and are not tested.
        adapt: without it, the model of the first runs decodes all later ones.
        validation: share of the trials of each class, the latest.
        seed: changes nothing here.
    """
    if calibration < 1:
        raise ValueError(f"calibration is {calibration}; at least one run must train the model")
    name = _name("successive-runs" if adapt else "first-run", published)
    apart, unit = ("subject", "session", "run"), ("subject", "session")

    def parts(learn: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return (learn, test) if published else _latest(metadata, y, learn, validation)

    for (subject,), rows in _groups(metadata, "subject"):
        rows = _in_time(metadata, rows)
        keys = metadata[["session", "run"]].iloc[rows]
        order = keys.groupby(["session", "run"], sort=False).ngroup().to_numpy()
        runs = [rows[order == number] for number in range(order.max() + 1)]
        first = np.concatenate(runs[:calibration])
        for number in range(calibration, len(runs)):
            test, since = runs[number], runs[calibration:number] if adapt else []
            session, run = metadata[["session", "run"]].iloc[test[0]]
            held_out = f"subject {subject}, session {session}, run {run}"
            train, chosen = parts(first, test)
            split = Split(name, held_out, train, chosen, test, apart, unit)
            if since:
                train, chosen = parts(np.concatenate(since), test)
                split = Split(name, held_out, train, chosen, test, apart, unit, split, continues=True)
            yield split


PROTOCOLS: dict[str, Callable[..., Iterator[Split]]] = {
    "within-session": within_session,
    "cross-session": cross_session,
    "leave-one-subject-out": leave_one_subject_out,
    "subject-folds": subject_folds,
    "fine-tuned": fine_tuned,
    "successive-runs": successive_runs,
    "first-run": partial(successive_runs, adapt=False),
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
