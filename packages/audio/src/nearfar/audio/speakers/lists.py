"""Scoring a list of trials with a model, and putting scores and lists together."""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np

from nearfar.audio.corpora import Utterance
from nearfar.audio.speakers import scoring
from nearfar.audio.speakers.gallery import enroll_before_mean
from nearfar.audio.speakers.system import SpeakerSystem
from nearfar.core.errors import UserError, some
from nearfar.core.model_folder import TrainedOn


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
    places = _places(reference)
    rows_in(listed, reference, path)
    own: dict[tuple[str, str], list[float]] = {}
    for pair, value in zip(_pairs(listed), np.asarray(values).tolist(), strict=True):
        own.setdefault(pair, []).append(value)
    for pair, scores in own.items():
        there = places[pair]
        if len(set(scores)) == 1:  # once or several times the same: every copy of the trial has it
            scores = scores[:1] * len(there)
        elif len(scores) != len(there):
            raise UserError(
                f"{path}: the trial {' '.join(pair)} has {len(scores)} different scores and is {len(there)} times in "
                f"{reference.source}; keep one of them"
            )
        filled[there], unscored[there] = scores, False
    return reference, filled, unscored


def rows_in(listed: scoring.Trials, reference: scoring.Trials, path: Path) -> np.ndarray:
    """Where the reference has each trial of `path`, copies of a trial in their order.

    Raises UserError where it lacks one.
    """
    places = _places(reference)
    taken: dict[tuple[str, str], int] = {}
    rows = []
    for pair in _pairs(listed):
        there = places.get(pair)
        count = taken[pair] = taken.get(pair, -1) + 1
        rows.append(-1 if there is None else there[min(count, len(there) - 1)])
    lacking = [pair for pair, row in zip(_pairs(listed), rows, strict=True) if row < 0]
    if lacking:
        turned = sum(pair[::-1] in places for pair in lacking)
        other = f", {turned} of them are there with their sides exchanged" if turned else ""
        raise UserError(
            f"{path}: {len(lacking)} of its trials are not in {reference.source}{other}; the first is "
            f"{' '.join(lacking[0])}"
        )
    return np.array(rows)


def _pairs(trials: scoring.Trials) -> list[tuple[str, str]]:
    """Both names of each trial, whichever of Unicode's forms they are written in."""
    sides = ([unicodedata.normalize("NFC", name) for name in side.tolist()] for side in (trials.enroll, trials.test))
    return list(zip(*sides, strict=True))


def _places(trials: scoring.Trials) -> dict[tuple[str, str], list[int]]:
    found: dict[tuple[str, str], list[int]] = {}
    for row, pair in enumerate(_pairs(trials)):
        found.setdefault(pair, []).append(row)
    return found


def find_leaks(
    listed: scoring.Trials,
    utterances: Mapping[str, Utterance],
    trained_on: TrainedOn,
    members: Mapping[str, Sequence[str]] | None = None,
    speakers: Mapping[str, str | None] = MappingProxyType({}),
) -> list[str]:
    """What makes the scores of a list too good, in words: nothing where it is empty.

    Recordings or speakers that the model was trained on, a recording that is enrolled and its own test, and one content
    under two names. utterances: by name. members: recordings of enrolled models. speakers: by name, where known; else
    the first folder of a name.
    """
    names = list(utterances)
    digests = {name: utterances[name].digest for name in names}
    known = [speakers.get(name) or (name.split("/")[0] if "/" in name else None) for name in names]
    seen = [name for name, flag in zip(names, trained_on.seen(digests.values(), known), strict=True) if flag]
    leaks = [f"the model was trained on {len(seen)} of {len(names)} recordings or on their speakers: {some(seen, 3)}"]
    leaks = leaks if seen else []
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(digests[name], []).append(name)
    own = []
    for enroll, test in zip(listed.enroll.tolist(), listed.test.tolist(), strict=True):
        enrolled = [enroll] if members is None else members.get(enroll, ())
        if test in enrolled or digests.get(test) in {digests[name] for name in enrolled if name in digests}:
            own.append(f"{enroll} {test}")
    if own:
        leaks.append(f"{len(own)} trials test a recording against itself: {some(own, 3)}")
    if twins := [" = ".join(group) for group in groups.values() if len(group) > 1]:
        leaks.append(f"{len(twins)} recordings stand under several names: {some(twins, 3)}")
    return leaks


def unique(names: np.ndarray | Sequence[str]) -> list[str]:
    """Each name once, in order."""
    return list(dict.fromkeys(np.asarray(names).tolist()))
