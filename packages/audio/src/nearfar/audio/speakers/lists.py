"""Scoring a list of trials with a model, and putting scores and lists together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nearfar.audio.speakers import scoring
from nearfar.audio.speakers.gallery import enroll_before_mean
from nearfar.audio.speakers.system import SpeakerSystem
from nearfar.core.errors import UserError


@dataclass
class ScoredTrials:
    """Scores of those trials of a list whose recordings are there."""

    trials: scoring.Trials
    scores: np.ndarray
    inputs: np.ndarray
    """What the calibration takes: scores, or scores with quality measures."""
    possible: np.ndarray
    """Which trials of the list have a score."""


def score_trials(
    system: SpeakerSystem,
    listed: scoring.Trials,
    names: Sequence[str],
    embeddings: np.ndarray,
    seconds: np.ndarray,
    members: Mapping[str, Sequence[str]] | None = None,
    average: str = "embeddings",
    quality: str | None = None,
) -> ScoredTrials:
    """Scores of `listed` by a model.

    Args:
        names, embeddings, seconds: the recordings that are there, (n, E), and the speech in each.
        members: recordings of each enrolled model; None where the list's first names are recordings.
        average: "embeddings" or "scores" of a model's recordings.
        quality: measures for the calibration, of averaged embeddings; None for none.
    """
    if average not in ("embeddings", "scores"):
        raise ValueError(f"average is {average!r}; allowed are embeddings, scores")
    row = {name: number for number, name in enumerate(names)}
    enrolled = unique(listed.enroll)
    groups = {name: [name] for name in enrolled} if members is None else members
    rows = {name: [row[m] for m in groups[name] if m in row] for name in enrolled}
    possible = np.array([bool(rows[e]) and t in row for e, t in zip(listed.enroll.tolist(), listed.test.tolist())])
    kept = listed.select(possible)
    models, number, lengths = embeddings, row, seconds
    if members is not None:
        enrolled = unique(kept.enroll)
        models = enroll_before_mean(embeddings, [rows[name] for name in enrolled], system.mean)
        number = {name: n for n, name in enumerate(enrolled)}
        lengths = np.array([seconds[rows[name]].sum() for name in enrolled])
    left = np.array([number[name] for name in kept.enroll.tolist()], int)
    right = np.array([row[name] for name in kept.test.tolist()], int)
    if average == "scores":
        sizes = np.array([len(rows[name]) for name in kept.enroll.tolist()], int)
        singles = np.concatenate([rows[name] for name in kept.enroll.tolist()])
        single = system.score(embeddings, embeddings, singles, np.repeat(right, sizes))
        scores = scoring.averaged_scores(single, np.repeat(np.arange(len(kept)), sizes), len(kept))
        return ScoredTrials(kept, scores, scores, possible)
    scores = system.score(models, embeddings, left, right)
    inputs = system.inputs(scores, models, embeddings, left, right, (lengths, seconds), quality)
    return ScoredTrials(kept, scores, inputs, possible)


def count_unscored(
    listed: scoring.Trials, values: np.ndarray, reference: scoring.Trials, path: Path
) -> tuple[scoring.Trials, np.ndarray, np.ndarray]:
    """The reference's trials, their scores and which had none: a target then gets the lowest, others the highest."""
    filled = np.where(np.asarray(reference.labels) == 1, values.min(), values.max())
    unscored = np.ones(len(reference), bool)
    rows = rows_in(listed, reference, path)
    filled[rows], unscored[rows] = values, False
    return reference, filled, unscored


def rows_in(listed: scoring.Trials, reference: scoring.Trials, path: Path) -> np.ndarray:
    """Where the reference has each trial of `path`. Raises UserError where it lacks one."""
    row = {pair: n for n, pair in enumerate(zip(reference.enroll.tolist(), reference.test.tolist()))}
    rows = np.array([row.get(pair, -1) for pair in zip(listed.enroll.tolist(), listed.test.tolist())])
    if (rows < 0).any():
        raise UserError(f"{path}: {int((rows < 0).sum())} of its trials are not in {reference.source}")
    return rows


def unique(names: np.ndarray | Sequence[str]) -> list[str]:
    """Each name once, in order."""
    return list(dict.fromkeys(np.asarray(names).tolist()))
