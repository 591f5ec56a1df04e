"""Trials of recordings as arrays: events, windows and channels that all of them have."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, Unpack

import mne
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from nearfar.core.errors import UserError
from nearfar.eeg import conventions
from nearfar.eeg.annotations import Events, annotations, event_classes, event_counts, quiet, source_name
from nearfar.eeg.preprocessing import Preprocessing
from nearfar.eeg.recordings import Reading, Recording, bad_channels, find_recordings, select_channels

logger = logging.getLogger("nearfar.eeg")


def load_trials(
    recordings: str | Path | Recording | Iterable[str | Path | Recording],
    *,
    preprocessing: Preprocessing,
    events: Events | None = None,
    channels: Sequence[str] | Literal["common"] | None = None,
    interpolate: bool = False,
    failures: list[tuple[Recording, UserError]] | None = None,
    **reading: Unpack[Reading],
) -> mne.EpochsArray:
    """Trials of all recordings as one Epochs object, with the metadata subject, session, run, file and onset.

    recordings: paths, folders, or what `find_recordings` and `nearfar.eeg.datasets` give.
    events: class -> annotation name(s), for every recording. None: what the known sets mean by theirs; elsewhere every
        event found is a class of its own name (`event_counts` lists them, the log says so).
    channels: names and their order; "common": those that all recordings have; None: all, which must then be the same
        in every recording.
    interpolate: see `select_channels`.
    failures: a list to go on past recordings that cannot be used: each is added to it with its error.
    reading: `rename`, `unit`, `types`, `encoding`, see `read_recording`.

    The classes keep the order of `events`, else the customary one (`conventions.CLASSES`), else the alphabet's. onset
    is the time of the cue in its file in seconds. Raises `UserError` for whatever makes a recording unusable and for an
    event name that occurs nowhere.
    """
    todo = _recordings(recordings)
    asked = event_classes(events) if events is not None else {}
    errors: list[tuple[Recording, UserError]] = failures if failures is not None else []
    if channels == "common":
        channels = _common_channels(todo, errors if failures is not None else None, **reading)
        todo = [recording for recording in todo if all(recording is not failed for failed, _ in errors)]
    parts: list[mne.EpochsArray] = []
    seen: set[str] = set()
    for recording in todo:
        try:
            with quiet():
                if (given := recording.epochs(**reading)) is not None:
                    seen |= set(given.event_id)
                    part = _given_trials(given, recording, preprocessing, events, channels)
                else:
                    raw = recording.read(**reading)
                    seen |= set(event_counts(raw))
                    part = _trials_of(raw, recording, preprocessing, events, channels, interpolate)
                if parts:
                    _check_alike(part, parts[0])
                    part = part.reorder_channels(parts[0].ch_names)
            parts.append(part)
        except UserError as error:
            if failures is None:
                raise
            errors.append((recording, error))
    unknown = [name for name in asked if name not in seen]
    if unknown and seen:
        raise UserError(
            f"{todo[0].path}{' and others' if len(todo) > 1 else ''}: no event {', '.join(unknown)}; "
            f"there are {', '.join(sorted(seen))}"
        )
    if not parts:
        first = f"; the first: {errors[0][1]}" if errors else ""
        raise UserError(f"none of {max(len(errors), len(todo))} recordings can be used{first}")
    return _join(parts, list(events) if events is not None else None)


def trials_array(
    epochs: mne.BaseEpochs, classes: Sequence[str] | None = None
) -> tuple[NDArray[np.float32], NDArray[np.int64], list[str]]:
    """(X, y, classes): X (trials, channels, times) in microvolts, y the index of each trial's class in `classes`.

    classes: names and order; None takes those of the trials. `UserError` where trials are of another class.
    """
    classes = sorted(epochs.event_id, key=epochs.event_id.__getitem__) if classes is None else list(classes)
    if strange := [name for name in epochs.event_id if name not in classes]:
        raise UserError(f"there are trials of {', '.join(strange)}; the classes are {', '.join(classes)}")
    index = {code: classes.index(name) for name, code in epochs.event_id.items()}
    X = (epochs.get_data(copy=False) * 1e6).astype(np.float32)
    return X, np.array([index[code] for code in epochs.events[:, 2]], dtype=np.int64), classes


def joined(X: NDArray, y: NDArray, classes: Sequence[str], info: mne.Info) -> mne.io.RawArray:
    """Trials (n, channels, times) in microvolts one after the other, each marked by its class."""
    raw = mne.io.RawArray(np.concatenate(list(X), axis=1) * 1e-6, info, verbose="ERROR")
    onsets = np.arange(len(X)) * X.shape[2] / info["sfreq"]
    return raw.set_annotations(mne.Annotations(onsets, 0.0, [classes[label] for label in y]))


def select_classes(epochs: mne.BaseEpochs, classes: Sequence[str]) -> mne.BaseEpochs:
    """The trials of these classes, by their whole names: a class `left` is not one of `left/imagined`, as in MNE."""
    chosen = epochs[np.flatnonzero(np.isin(epochs.events[:, 2], [epochs.event_id[name] for name in classes]))]
    chosen.event_id = {name: epochs.event_id[name] for name in classes}
    return chosen


def _recordings(given: str | Path | Recording | Iterable[str | Path | Recording]) -> list[Recording]:
    items = [given] if isinstance(given, str | Path | Recording) else list(given)
    result: list[Recording] = []
    for item in items:
        result += [item] if isinstance(item, Recording) else find_recordings(item)
    if not result:
        raise UserError("no recordings given")
    return result


def _common_channels(
    recordings: Sequence[Recording],
    failures: list[tuple[Recording, UserError]] | None,
    **reading: Unpack[Reading],
) -> list[str]:
    common: list[str] = []
    first: Recording | None = None
    for recording in recordings:
        try:
            trials = recording.epochs(**reading)
            raw = recording.read(**reading) if trials is None else trials
        except UserError as error:
            if failures is None:
                raise
            failures.append((recording, error))
            continue
        bad = bad_channels(raw) if trials is None else {}
        names = [name for name in raw.copy().pick("eeg", exclude=()).ch_names if name not in bad]
        common = names if first is None else [name for name in common if name in names]
        first = first or recording
        if not common:
            raise UserError(f"{recording.path}: shares no channel with {first.path}; rename the channels")
    return common


def _trials_of(
    raw: mne.io.BaseRaw,
    recording: Recording,
    preprocessing: Preprocessing,
    events: Events | None,
    channels: Sequence[str] | None,
    interpolate: bool,
) -> mne.EpochsArray:
    if events is None:
        if recording.events is not None and conventions.EEGMMIDB_FILE.search(recording.path.name):
            conventions.check_eegmmidb(raw, recording.path)
        events = recording.events if recording.events is not None else _found_events(raw)
        if not events:
            raise UserError(f"{recording.path}: a baseline run, which has no cues; leave it out")
    wanted = list(channels) if channels is not None else None
    references = preprocessing.reference if isinstance(preprocessing.reference, tuple) else ()
    if wanted is not None:
        if set(references) & set(wanted):
            raise UserError(f"{', '.join(references)} cannot be a reference and a channel to keep; drop it from one")
        wanted += references
    if conventions.UNKNOWN_CUE in event_counts(raw) and not set(event_classes(events)) & set(event_counts(raw)):
        raise UserError(
            f"{recording.path}: its cues (783) have no classes; put {recording.path.with_suffix('.mat').name} "
            "with `classlabel` beside it, or name 783 as the event"
        )
    epochs = preprocessing.cut(preprocessing.apply(select_channels(raw, wanted, interpolate)), events)
    onsets, _, names = annotations(raw)
    starts = np.sort(onsets[names == conventions.RUN_START])
    inside = (
        np.searchsorted(starts, epochs.metadata["onset"].to_numpy() + 1e-6)
        if len(starts)
        else np.ones(len(epochs), int)
    )
    epochs.metadata = pd.DataFrame(
        {
            "subject": recording.subject,
            "session": recording.session,
            "run": [recording.run or str(run) for run in inside],
            "file": str(recording.path),
            "onset": epochs.metadata["onset"].to_numpy(),
        }
    )
    return epochs


def _given_trials(
    trials: mne.BaseEpochs,
    recording: Recording,
    preprocessing: Preprocessing,
    events: Events | None,
    channels: Sequence[str] | None,
) -> mne.EpochsArray:
    names = event_classes(events) if events is not None else {name: name for name in trials.event_id}
    chosen = [name for name in names if name in trials.event_id]
    missing = [name for name in channels or () if name not in trials.ch_names]
    if missing:
        raise UserError(
            f"{recording.path}: no channel {', '.join(missing)}; it has {', '.join(trials.ch_names)}; name others"
        )
    if not chosen:
        raise UserError(f"{recording.path}: none of the events {', '.join(names)}; it has {', '.join(trials.event_id)}")
    trials = select_classes(trials, chosen).pick(list(channels) if channels is not None else "eeg")
    classes = list(dict.fromkeys(names.values()))
    given = {code: classes.index(names[name]) + 1 for name, code in trials.event_id.items()}
    trials.events[:, 2] = [given[code] for code in trials.events[:, 2]]
    trials.event_id = {classes[code - 1]: code for code in sorted(set(given.values()))}
    if trials.metadata is None or "file" not in trials.metadata:
        trials.metadata = pd.DataFrame(
            {
                "subject": recording.subject,
                "session": recording.session,
                "run": recording.run,
                "file": str(recording.path),
                "onset": trials.events[:, 0] / trials.info["sfreq"],
            }
        )
    return preprocessing.apply_trials(trials)


def _found_events(raw: mne.io.BaseRaw) -> dict[str, str]:
    counts = event_counts(raw)
    if not counts:
        raise UserError(f"{source_name(raw)}: no events; give a recording with annotations or a trigger channel")
    if len(counts) > 20:
        names = ", ".join(list(counts)[:20])
        raise UserError(f"{source_name(raw)}: {len(counts)} kinds of events ({names}, ...); name those of the classes")
    logger.info("%s: classes by the events found: %s", source_name(raw), ", ".join(counts))
    return {name: name for name in counts}


def _check_alike(part: mne.EpochsArray, first: mne.EpochsArray) -> None:
    file, other = part.metadata["file"].iloc[0], first.metadata["file"].iloc[0]
    lacks = [name for name in first.ch_names if name not in part.ch_names]
    extra = [name for name in part.ch_names if name not in first.ch_names]
    if lacks or extra:
        raise UserError(
            f"{file}: channels differ from those of {other}: it lacks {', '.join(lacks) or 'none'} and has besides "
            f"{', '.join(extra) or 'none'}; give channels='common', name the channels, or allow interpolation"
        )
    if part.info["sfreq"] != first.info["sfreq"]:
        raise UserError(
            f"{file}: {part.info['sfreq']:g} Hz where {other} has {first.info['sfreq']:g} Hz; "
            "give one sfreq to resample to"
        )


def _join(parts: list[mne.EpochsArray], asked: list[str] | None) -> mne.EpochsArray:
    found = {cls for part in parts for cls in part.event_id}
    order = {cls: position for position, cls in enumerate(conventions.CLASSES)}
    classes = asked or sorted(found, key=lambda cls: (order.get(cls, len(order)), cls))
    classes = [cls for cls in classes if cls in found]
    marks = []
    offset = 0
    for part in parts:
        names = {code: cls for cls, code in part.event_id.items()}
        samples = offset + part.events[:, 0]
        marks.append(
            np.stack([samples, part.events[:, 1], [classes.index(names[c]) + 1 for c in part.events[:, 2]]], axis=1)
        )
        offset = int(samples.max()) + part.get_data(copy=False).shape[2]
    return mne.EpochsArray(
        np.concatenate([part.get_data(copy=False) for part in parts]),
        parts[0].info,
        np.concatenate(marks),
        tmin=parts[0].tmin,
        event_id={cls: code for code, cls in enumerate(classes, start=1)},
        metadata=pd.concat([part.metadata for part in parts], ignore_index=True),
        verbose="ERROR",
    )
