"""Reading EEG recordings: find them, open them with sane names and units, and load their trials.

```python
from nearfar.eeg.preprocessing import Preprocessing
from nearfar.eeg.recordings import find_recordings, load_trials, trials_array

recordings = find_recordings("eegmmidb/S001")
epochs = load_trials(recordings, preprocessing=Preprocessing.preset("eegmmidb"))
X, y, classes = trials_array(epochs)
```
"""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import mne
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from nearfar.core.errors import UserError
from nearfar.eeg import conventions
from nearfar.eeg.preprocessing import (
    Events,
    Preprocessing,
    annotate,
    annotations,
    event_classes,
    event_counts,
    quiet,
    source_name,
)

logger = logging.getLogger("nearfar.eeg")

FORMATS = (".edf", ".bdf", ".gdf", ".vhdr", ".set", ".fif", ".fif.gz", ".cnt", ".mff", ".nxe", ".mat")
"""Endings that count as recordings in a folder; a file named outright may be anything that `mne.io.read_raw` opens."""

SAMPLE = "finger-movements"
"""Stands for the real EEG of `nearfar.eeg.samples` wherever a path is asked for."""

UNITS = {"V": 1.0, "mV": 1e-3, "uV": 1e-6, "µV": 1e-6, "nV": 1e-9}

_TYPES = {"eog": r"eog", "ecg": r"ecg|ekg", "emg": r"emg", "stim": r"^(sti ?\d+|status|stim|trigger|trig|marker)$"}


@dataclass(frozen=True)
class Recording:
    """A recording, whose it is, and what its events mean.

    run: "" where one file holds several runs with a mark at the start of each (BCI Competition IV 2a).
    events: class -> annotation name(s) where the set is known; None where `load_trials` is to look.
    labels: `.mat` file with the classes of cues that the recording leaves unknown.
    raw: the recording itself where it comes from memory and not from `path`.
    trials: its trials where these are all there is, as in the sample; `Preprocessing.apply_trials` treats them.
    """

    path: Path
    subject: str
    session: str = "1"
    run: str = ""
    events: Events | None = field(default=None, compare=False)
    labels: Path | None = None
    raw: mne.io.BaseRaw | None = field(default=None, compare=False, repr=False)
    trials: mne.BaseEpochs | None = field(default=None, compare=False, repr=False)

    def read(self, *, rename: Mapping[str, str] | None = None, unit: str | None = None) -> mne.io.BaseRaw:
        """The recording as `read_recording` gives it; `UserError` where there are only trials cut from it."""
        if self.trials is not None:
            raise UserError(f"{self.path}: holds {len(self.trials)} trials and no continuous recording")
        return read_recording(self.path if self.raw is None else self.raw, rename=rename, unit=unit, labels=self.labels)


def find_recordings(paths: str | Path | Iterable[str | Path]) -> list[Recording]:
    """Recordings among files and folders (searched to the bottom), in natural order.

    The name `finger-movements` stands for the installed sample (`nearfar.eeg.samples`), one recording a session.
    Subject, session and run come from customary names (`S001R04.edf`, `A01T.gdf`, BIDS entities), else from the folders
    (`conventions.identity`). In a BIDS dataset derivatives and source data are passed over. Raises `UserError` for a
    path that does not exist, a file of a kind that holds no recording and a folder without any.
    """
    found: dict[tuple[Path, str], Recording] = {}
    for path in [Path(paths)] if isinstance(paths, str | Path) else map(Path, paths):
        if str(path) == SAMPLE and not path.exists():
            found |= {(path, each.session): each for each in _sample()}
            continue
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        single = path.is_file() or path.suffix in FORMATS  # an .mff recording is a folder
        files = [path] if single else sorted(_inside(path), key=_natural)
        if not files:
            raise UserError(f"{path}: no recordings in this folder; known endings are {', '.join(FORMATS)}")
        for file in files:
            if file.suffix.lower() == ".mat" and not conventions.is_bnci(file):
                raise UserError(f"{file}: holds labels or something else, not a recording; give the recording itself")
            subject, session, run = conventions.identity(file, None if single else path)
            labels = conventions.find_labels(file) if file.suffix.lower() == ".gdf" else None
            found[file.absolute(), ""] = Recording(file, subject, session, run, conventions.known_events(file), labels)
    return list(found.values())


def read_recording(
    recording: str | Path | mne.io.BaseRaw,
    *,
    rename: Mapping[str, str] | None = None,
    unit: str | None = None,
    labels: str | Path | None = None,
) -> mne.io.BaseRaw:
    """Open a recording: EEG in volts, electrodes in the 10-05 spelling with positions, events as annotations.

    - Anything that `mne.io.read_raw` opens, a BNCI `.mat`, or a Raw object. A file of a BIDS dataset is read by
      mne-bids, with the events, channel types and positions of the dataset.
    - rename: names in the file -> names to use, before the names are brought into the standard spelling. GDF files of
      BCI Competition IV 2a get their electrodes' names by position.
    - Channels named like EOG, ECG, EMG or a trigger get that type. Positions are the recording's own, else those of the
      10-05 system; electrodes of unknown name have none.
    - Triggers of a stim channel become annotations, named by their numbers, where the file has no others.
    - Stretches of a GDF file in which all channels stand at their lowest value, between joined runs, become NaN, which
      `Preprocessing.apply` fills.
    - labels: `.mat` file with `classlabel` for cues of unknown class (783).
    - unit: what the file's numbers are ("uV", "mV", ...) where it does not say so and MNE took them for volts.

    Raises `UserError` for a missing, truncated or foreign file, for names that occur twice, and where the amplitudes
    cannot be volts.
    """
    raw = recording.copy() if isinstance(recording, mne.io.BaseRaw) else _open(Path(recording))
    with quiet():
        raw.load_data()
        _name_channels(raw, rename)
        if unit is not None:
            if unit not in UNITS:
                raise UserError(f"unit must be one of {', '.join(UNITS)}, not {unit!r}")
            raw.apply_function(
                lambda x: x * UNITS[unit], picks=mne.pick_types(raw.info, eeg=True, eog=True, exclude=())
            )
        if source_name(raw).lower().endswith(".gdf"):
            _open_gaps(raw)
        _check_amplitude(raw)
        if not event_counts(raw):
            _annotate_triggers(raw)
        if labels is not None:
            conventions.label_cues(raw, Path(labels))
    return raw


def bad_channels(raw: mne.io.BaseRaw) -> dict[str, str]:
    """EEG channels that cannot be used -> why: "NaN", "flat" or "marked bad" (in the file)."""
    picks = mne.pick_types(raw.info, eeg=True, exclude=())
    data = raw.get_data(picks, verbose="ERROR")
    empty = np.isnan(data)
    gap = empty.all(axis=0) & (not empty.all())  # between joined runs
    reasons = {}
    for name, values in zip([raw.ch_names[pick] for pick in picks], data[:, ~gap]):
        if np.isnan(values).any():
            reasons[name] = "NaN"
        elif np.ptp(values) == 0:
            reasons[name] = "flat"
        elif name in raw.info["bads"]:
            reasons[name] = "marked bad"
    return reasons


def select_channels(
    raw: mne.io.BaseRaw, channels: Sequence[str] | None = None, interpolate: bool = False
) -> mne.io.BaseRaw:
    """A copy with exactly these EEG channels in this order (None: all it has), none of them bad.

    With `interpolate`, channels that are missing or bad are computed from the others by spherical splines (MNE's
    `interpolate_bads`), for which the others need positions and must be at least half of all. Without, they are a
    `UserError`, as is a channel that is bad.
    """
    with quiet():
        raw = raw.copy().load_data().pick("eeg", exclude=())
        wanted = list(raw.ch_names if channels is None else channels)
        missing = [name for name in wanted if name not in raw.ch_names]
        bad = {name: why for name, why in bad_channels(raw).items() if name in wanted}
        if missing and not interpolate:
            raise UserError(
                f"{source_name(raw)}: no channel {', '.join(missing)}; it has {', '.join(raw.ch_names)}; "
                "name other channels or allow interpolation"
            )
        if bad and not interpolate:
            raise UserError(
                f"{source_name(raw)}: channel {', '.join(f'{name} is {why}' for name, why in bad.items())}; "
                "leave it out by naming the channels, or allow interpolation"
            )
        if missing or bad:
            _interpolate(raw, missing, list(bad), len(wanted))
        raw.info["bads"] = []
        return raw.pick(wanted)


def load_trials(
    recordings: str | Path | Recording | Iterable[str | Path | Recording],
    *,
    preprocessing: Preprocessing,
    events: Events | None = None,
    channels: Sequence[str] | Literal["common"] | None = None,
    interpolate: bool = False,
    rename: Mapping[str, str] | None = None,
    unit: str | None = None,
    failures: list[tuple[Recording, UserError]] | None = None,
) -> mne.EpochsArray:
    """Trials of all recordings as one Epochs object, with the metadata subject, session, run, file and onset.

    recordings: paths, folders, or what `find_recordings` and `nearfar.eeg.datasets` give.
    events: class -> annotation name(s), for every recording. None: what the known sets mean by theirs; elsewhere every
        event found is a class of its own name (`event_counts` lists them, the log says so).
    channels: names and their order; "common": those that all recordings have; None: all, which must then be the same
        in every recording.
    interpolate, rename, unit: see `select_channels` and `read_recording`.
    failures: a list to go on past recordings that cannot be used: each is added to it with its error.

    The classes keep the order of `events`, else the customary one (`conventions.CLASSES`), else the alphabet's. onset
    is the time of the cue in its file in seconds. Raises `UserError` for whatever makes a recording unusable and for an
    event name that occurs nowhere.
    """
    todo = _recordings(recordings)
    asked = event_classes(events) if events is not None else {}
    errors: list[tuple[Recording, UserError]] = failures if failures is not None else []
    if channels == "common":
        channels = _common_channels(todo, rename, unit, errors if failures is not None else None)
        todo = [recording for recording in todo if all(recording is not failed for failed, _ in errors)]
    parts: list[mne.EpochsArray] = []
    seen: set[str] = set()
    for recording in todo:
        try:
            with quiet():
                if recording.trials is not None:
                    seen |= set(recording.trials.event_id)
                    part = _given_trials(recording.trials, recording, preprocessing, events, channels)
                else:
                    raw = recording.read(rename=rename, unit=unit)
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


def trials_array(epochs: mne.BaseEpochs) -> tuple[NDArray[np.float32], NDArray[np.int64], list[str]]:
    """(X, y, classes): X (trials, channels, times) in microvolts, y the index of each trial's class in `classes`."""
    classes = sorted(epochs.event_id, key=epochs.event_id.__getitem__)
    index = {epochs.event_id[name]: position for position, name in enumerate(classes)}
    X = (epochs.get_data(copy=False) * 1e6).astype(np.float32)
    return X, np.array([index[code] for code in epochs.events[:, 2]], dtype=np.int64), classes


def _sample() -> list[Recording]:
    from nearfar.eeg.samples import finger_movements

    epochs = finger_movements()
    sessions = epochs.metadata["session"]
    return [
        Recording(Path(SAMPLE), "1", session, session, trials=epochs[(sessions == session).to_numpy()])
        for session in sessions.unique()
    ]


def _natural(path: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part.lower()) for part in re.split(r"(\d+)", str(path))]


def _inside(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        name = path.name.lower()
        copies = {"derivatives", "sourcedata"} & set(path.relative_to(folder).parts)
        continued = re.search(r"(-\d+|_split-(?!0*1_)\d+_\w+)\.fif(\.gz)?$", name)  # read with the first part
        if not name.endswith(FORMATS) or name.startswith(".") or copies or continued:
            continue
        try:
            if not name.endswith(".mat") or conventions.is_bnci(path):
                yield path
        except UserError as error:
            logger.warning("passed over %s", error)


def _open(path: Path) -> mne.io.BaseRaw:
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if path.suffix.lower() == ".mat":
        if not conventions.is_bnci(path):
            raise UserError(f"{path}: holds no cell array `data` of runs, so it is no recording in the BNCI layout")
        return conventions.read_bnci(path)
    if path.suffix.lower() in (".edf", ".bdf"):
        _check_edf(path)
    with quiet():
        try:
            if _is_bids(path):
                return _open_bids(path)
            return mne.io.read_raw(path, preload=True)
        except UserError:
            raise
        except Exception as error:  # the readers raise anything on a file that is not what its name says
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"{path}: cannot be read as {path.suffix or 'a recording'} ({reason[:200]}); "
                "the file may be damaged, incomplete or of another type"
            ) from error


def _check_edf(path: Path) -> None:
    """Compare the size that the header of an EDF or BDF file announces with the file's."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        head = stream.read(256)
        try:
            header, records, signals = int(head[184:192]), int(head[236:244]), int(head[252:256])
            samples = [
                int(value) for value in np.frombuffer(stream.read(256 * signals)[216 * signals :], "S8")[:signals]
            ]
        except ValueError as error:
            raise UserError(
                f"{path}: not an {path.suffix[1:].upper()} file; give the recording in its own format"
            ) from error
    expected = header + records * sum(samples) * (3 if path.suffix.lower() == ".bdf" else 2)
    if size < expected:
        raise UserError(f"{path}: truncated, {size} of {expected} bytes; copy or download it again")
    if head[192:197] in (b"EDF+D", b"BDF+D"):
        raise UserError(
            f"{path}: has interruptions (EDF+D), which MNE joins without a mark; convert it to parts without"
        )


def _is_bids(path: Path) -> bool:
    return path.name.startswith("sub-") and any(
        (folder / "dataset_description.json").is_file() for folder in path.absolute().parents[:5]
    )


def _open_bids(path: Path) -> mne.io.BaseRaw:
    try:
        from mne_bids import get_bids_path_from_fname, read_raw_bids
    except ImportError as error:
        raise UserError(f"{path}: a BIDS dataset needs mne-bids; install mne-bids") from error
    return read_raw_bids(get_bids_path_from_fname(path)).load_data()


def _name_channels(raw: mne.io.BaseRaw, rename: Mapping[str, str] | None) -> None:
    """Names, types and positions, in place."""
    name = source_name(raw)
    if conventions.is_bciciv2a(raw.ch_names):
        raw.rename_channels(dict(zip(raw.ch_names, conventions.BCICIV2A_CHANNELS)))
    if rename:
        unknown = [old for old in rename if old not in raw.ch_names]
        if unknown:
            raise UserError(f"{name}: no channel {', '.join(unknown)} to rename; it has {', '.join(raw.ch_names)}")
        raw.rename_channels(dict(rename))
    types = dict(zip(raw.ch_names, raw.get_channel_types()))
    for channel in [channel for channel, kind in types.items() if kind == "eeg"]:
        for kind, pattern in _TYPES.items():
            if re.search(pattern, channel, re.IGNORECASE):
                raw.set_channel_types({channel: kind})
                types[channel] = kind
    names = {channel: conventions.standard_name(channel) for channel, kind in types.items() if kind == "eeg"}
    twice = [channel for channel, new in names.items() if list(names.values()).count(new) > 1]
    if twice:
        raise UserError(f"{name}: channels {', '.join(twice)} are one electrode; tell them apart with rename")
    raw.rename_channels(names)
    biosemi = {"A1", "A2", "A3"} <= set(raw.ch_names)  # A1 and A2 of such a cap are no ear lobes
    if not _located(raw) and not biosemi and set(names.values()) & set(conventions.standard_montage().ch_names):
        raw.set_montage(conventions.standard_montage(), on_missing="ignore")


def _located(raw: mne.io.BaseRaw) -> set[str]:
    """Names of the channels that have a position."""
    places = {channel["ch_name"]: channel["loc"][:3] for channel in raw.info["chs"]}
    return {name for name, place in places.items() if np.isfinite(place).all() and place.any()}


def _open_gaps(raw: mne.io.BaseRaw) -> None:
    """Turn stretches of two samples or more in which every EEG channel has its lowest value into NaN, in place."""
    picks = mne.pick_types(raw.info, eeg=True, eog=True, exclude=())
    data = raw.get_data(picks)
    low = (data == data.min(axis=1, keepdims=True)).all(axis=0)
    low &= np.concatenate([low[1:], [False]]) | np.concatenate([[False], low[:-1]])
    if low.any() and not low.all():
        raw.apply_function(lambda x: np.where(low, np.nan, x), picks=picks)


def _check_amplitude(raw: mne.io.BaseRaw) -> None:
    """Refuse EEG whose typical deviation within a second is not between 0.05 microvolts and 5 millivolts."""
    picks = mne.pick_types(raw.info, eeg=True, exclude=())
    if not len(picks):
        raise UserError(f"{source_name(raw)}: no EEG channel; it has {', '.join(raw.ch_names)}")
    if not raw.n_times:
        raise UserError(f"{source_name(raw)}: has no samples; give another recording")
    data = raw.get_data(picks)
    size = min(round(raw.info["sfreq"]), data.shape[1])
    blocks = data[:, : data.shape[1] // size * size].reshape(len(data), -1, size)
    deviations = blocks.std(axis=2)
    deviations = deviations[deviations > 0]  # neither NaN nor flat
    typical = float(np.median(deviations)) if deviations.size else 1e-5
    if not 5e-8 <= typical <= 5e-3:
        raise UserError(
            f"{source_name(raw)}: EEG of {typical:.2g} V cannot be volts; say what the file's numbers are with "
            f"unit= ({', '.join(UNITS)})"
        )


def _annotate_triggers(raw: mne.io.BaseRaw) -> None:
    stims = [raw.ch_names[pick] for pick in mne.pick_types(raw.info, meg=False, stim=True, exclude=())]
    if not stims:
        return
    main = next((name for name in ("STI101", "STI 014") if name in stims), stims[0])
    mask = {"mask": 0xFFFF, "mask_type": "and"} if main == "Status" else {}  # BioSemi keeps its own bits above 16
    events = mne.find_events(raw, main, shortest_event=1, **mask)
    annotate(raw, (events[:, 0] - raw.first_samp) / raw.info["sfreq"], 0.0, [str(code) for code in events[:, 2]])


def _interpolate(raw: mne.io.BaseRaw, missing: list[str], bad: list[str], total: int) -> None:
    name = source_name(raw)
    positions = conventions.standard_montage().get_positions()["ch_pos"]
    lost = [channel for channel in missing if channel not in positions]
    lost += [channel for channel in raw.ch_names if channel not in _located(raw)]
    if lost:
        raise UserError(f"{name}: no position of {', '.join(lost)}, which interpolation needs; rename to 10-05 names")
    if 2 * (len(missing) + len(bad)) > total:
        raise UserError(
            f"{name}: {len(missing) + len(bad)} of {total} channels are missing or bad, too many to interpolate; "
            "name fewer channels"
        )
    if missing:
        info = mne.create_info(missing, raw.info["sfreq"], "eeg").set_montage(conventions.standard_montage())
        empty = mne.io.RawArray(np.zeros((len(missing), raw.n_times)), info, first_samp=raw.first_samp)
        raw.add_channels([empty], force_update_info=True)
    raw.info["bads"] = missing + bad
    raw.interpolate_bads(reset_bads=True)


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
    rename: Mapping[str, str] | None,
    unit: str | None,
    failures: list[tuple[Recording, UserError]] | None,
) -> list[str]:
    common: list[str] = []
    first: Recording | None = None
    for recording in recordings:
        try:
            raw = recording.trials if recording.trials is not None else recording.read(rename=rename, unit=unit)
        except UserError as error:
            if failures is None:
                raise
            failures.append((recording, error))
            continue
        bad = bad_channels(raw) if recording.trials is None else {}
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
    trials = trials[chosen].pick(list(channels) if channels is not None else "eeg")
    classes = list(dict.fromkeys(names.values()))
    given = {code: classes.index(names[name]) + 1 for name, code in trials.event_id.items()}
    trials.events[:, 2] = [given[code] for code in trials.events[:, 2]]
    trials.event_id = {classes[code - 1]: code for code in sorted(set(given.values()))}
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
