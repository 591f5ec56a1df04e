"""Refusing a trial, or a treatment of it, on both sides of a split."""

import hashlib
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from nearfar.core.errors import UserError
from nearfar.core.leakage import LeakageError, Side, twin
from nearfar.eeg.protocols import Split, _groups, _natural

logger = logging.getLogger("nearfar.eeg")

COLUMNS = ("subject", "session", "run", "file", "onset")


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
            sides = ((side, rows), ("test", split.test))
            parts = (Side(name, [str(row) for row in part], [digests[row] for row in part]) for name, part in sides)
            if (places := twin(*parts)) is not None:
                names = f"{trial(rows[places[0]])} of {side} and {trial(split.test[places[1]])} of test"
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


def trial_digests(X: np.ndarray) -> list[bytes]:
    """A digest of each trial's bytes."""
    head = f"{X.dtype}{X.shape[1:]}".encode()
    return [hashlib.blake2b(head + np.ascontiguousarray(trial).tobytes(), digest_size=16).digest() for trial in X]


def treatments(X: np.ndarray, metadata: pd.DataFrame) -> list[tuple[str, np.ndarray]]:
    """Groups of trials that bear the marks of statistics taken over the whole group, for `check_split`.

    Standardizing by the mean and deviation of a group of trials leaves that group with mean 0 and one and the same
    variance in every channel; whitening (Euclidean alignment) leaves it with one and the same variance in every
    direction. Neither happens by chance. Looked at are all trials, each subject's and each session's. Trials that were
    each standardized by themselves are innocent. Unseen stay statistics with shrinkage or of other groups: declare
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
        return "standardized" if level and np.ptp(variance) < tolerance * scale else ""

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
