"""Reading EEG recordings: find them, open them with sane names and units, and load their trials.

```python
from nearfar.eeg.preprocessing import Preprocessing
from nearfar.eeg.recordings import find_recordings, load_trials, trials_array

recordings = find_recordings("eegmmidb/S001")
epochs = load_trials(recordings, preprocessing=Preprocessing.preset("eegmmidb"))
X, y, classes = trials_array(epochs)
```
"""

import gzip
import logging
import math
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict, Unpack

import h5py
import mne
import numpy as np
from scipy.io import loadmat, whosmat

from nearfar.core.errors import UserError
from nearfar.core.reading import check_announced, reading
from nearfar.eeg import conventions
from nearfar.eeg.annotations import Events, event_counts, quiet, source_name
from nearfar.eeg.channels import type_channels
from nearfar.eeg.formats import check_matlab, is_openbci, read_brainflow, read_openbci, read_xdf
from nearfar.eeg.triggers import annotate_triggers

logger = logging.getLogger("nearfar.eeg")

FORMATS = (".edf", ".bdf", ".gdf", ".vhdr", ".set", ".fif", ".fif.gz", ".cnt", ".mff", ".nxe", ".mat", ".xdf")
"""Endings that count as recordings in a folder, beside OpenBCI's text files; a file named outright may be anything that
`mne.io.read_raw` opens, or a table of BrainFlow (`.csv`)."""

SAMPLE = conventions.SAMPLE
"""Stands for the real EEG of `nearfar.eeg.samples` wherever a path is asked for."""

_FIF = (".fif", ".fif.gz")

DAMAGED = "the file may be damaged, incomplete or of another type"

UNITS = {"V": 1.0, "mV": 1e-3, "uV": 1e-6, "µV": 1e-6, "nV": 1e-9}


class Reading(TypedDict, total=False):
    """How files are read, see `read_recording`."""

    rename: Mapping[str, str] | None
    unit: str | None
    types: Mapping[str, str] | None
    encoding: str | None


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

    def read(self, *, notes: list[str] | None = None, **options: Unpack[Reading]) -> mne.io.BaseRaw:
        """The recording as `read_recording` gives it; `UserError` where there are only trials cut from it."""
        if (trials := self.epochs(**options)) is not None:
            raise UserError(f"{self.path}: holds {len(trials)} trials and no continuous recording")
        given = self.path if self.raw is None else self.raw
        return read_recording(given, labels=self.labels, notes=notes, **options)

    def epochs(self, *, notes: list[str] | None = None, **options: Unpack[Reading]) -> mne.BaseEpochs | None:
        """The trials where these are all that the file holds, None for a continuous recording."""
        if self.trials is not None or self.raw is not None or not _is_epoched(self.path):
            return self.trials
        return _read_epochs(self.path, [] if notes is None else notes, **options)


def find_recordings(paths: str | Path | Iterable[str | Path], subject_pattern: str | None = None) -> list[Recording]:
    """Recordings among files and folders (searched to the bottom), in natural order.

    The name `finger-movements` stands for the installed sample (`nearfar.eeg.samples`), one recording a session.
    Subject, session and run come from customary names (`S001R04.edf`, `A01T.gdf`, BIDS entities), else from the folders
    (`conventions.identity`). A table `participants.tsv` in a folder tells people apart in the names of its files.
    In a BIDS dataset derivatives and source data are passed over. Raises `UserError` for a path that does not exist, a
    file of a kind that holds no recording and a folder without any.

    subject_pattern: regular expression that is searched for in each path (below the folder given), whose group is the
        subject, or whose groups `subject`, `session`, `run` are these. A path without a match is a `UserError`.
    """
    pattern = conventions.subject_pattern(subject_pattern) if subject_pattern is not None else None
    found: dict[tuple[Path, str], Recording] = {}
    for path in [Path(paths)] if isinstance(paths, str | Path) else map(Path, paths):
        if str(path) == SAMPLE and not path.exists():
            found |= {(path, each.session): each for each in _sample()}
            continue
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        single = path.is_file() or path.suffix in FORMATS  # an .mff recording is a folder
        files = [path] if single else sorted(_inside(path), key=_natural)
        people = None if single else conventions.participants(path)
        folded = 0
        if not files:
            raise UserError(f"{path}: no recordings in this folder; known endings are {', '.join(FORMATS)}")
        for file in files:
            if file.suffix.lower() == ".mat" and not conventions.is_bnci(file):
                raise UserError(f"{file}: holds labels or something else, not a recording; give the recording itself")
            known = conventions.identity(file, None if single else path)
            if pattern is not None:
                known = conventions.identity_by(pattern, file, None if single else path, known)
            elif people is not None:
                known = conventions.identity_of(people, file, path, known)
            subject, session, run = known
            folded += conventions.by_folder_alone(file) and not single and people is None and pattern is None
            labels = conventions.find_labels(file) if file.suffix.lower() == ".gdf" else None
            found[file.absolute(), ""] = Recording(file, subject, session, run, conventions.known_events(file), labels)
        if folded > 1 and all(file.parent == path for file in files):
            logger.warning(
                "%s: its %d recordings count as one subject, %s, by their folder; a subject pattern or "
                "participants.tsv tells people apart",
                *(path, folded, path.absolute().name),
            )
    return list(found.values())


def read_recording(
    recording: str | Path | mne.io.BaseRaw,
    *,
    rename: Mapping[str, str] | None = None,
    unit: str | None = None,
    types: Mapping[str, str] | None = None,
    encoding: str | None = None,
    labels: str | Path | None = None,
    notes: list[str] | None = None,
) -> mne.io.BaseRaw:
    """Open a recording: EEG in volts, electrodes in the 10-05 spelling with positions, events as annotations.

    - Anything that `mne.io.read_raw` opens, a BNCI `.mat`, what `nearfar.eeg.formats` reads, or a Raw object. A file
      of a BIDS dataset is read by mne-bids, with the events, channel types and positions of the dataset.
    - rename: names in the file -> names to use, before the names are brought into the standard spelling. GDF files of
      BCI Competition IV 2a get their electrodes' names by position.
    - types: names (renamed) -> types, where the file's are wrong. Of the others, channels that are no EEG by their name
      or signal are set aside (`nearfar.eeg.channels`). Positions are the recording's own, else those of the
      10-05 system; electrodes of unknown name have none.
    - Triggers of stim channels become annotations (`nearfar.eeg.triggers`), where the file has no others.
    - encoding: of the annotations' texts, such as "latin1"; without, UTF-8, else Latin-1.
    - notes: a list that hears what was set aside, taken for something else or left out, and what MNE warned of.
    - Stretches of a GDF file in which all channels stand at their lowest value, between joined runs, become NaN, which
      `Preprocessing.apply` fills.
    - labels: `.mat` file with `classlabel` for cues of unknown class (783).
    - unit: what the file's numbers are ("uV", "mV", ...) where it does not say so and MNE took them for volts.

    Raises `UserError` for a missing, truncated or foreign file, for names that occur twice, and where the amplitudes
    cannot be volts.
    """
    if unit is not None and unit not in UNITS:
        raise UserError(f"unit must be one of {', '.join(UNITS)}, not {unit!r}")
    notes = [] if notes is None else notes
    raw = recording.copy() if isinstance(recording, mne.io.BaseRaw) else _open(Path(recording), encoding, notes)
    with quiet(notes), reading(source_name(raw), "its header and its samples do not go together", DAMAGED):
        raw.load_data()
        _name_channels(raw, rename, types, notes)
        if unit is not None:
            raw.apply_function(
                lambda x: x * UNITS[unit], picks=mne.pick_types(raw.info, eeg=True, eog=True, exclude=())
            )
        if source_name(raw).lower().endswith(".gdf"):
            _open_gaps(raw)
        _check_amplitude(raw)
        stims = [raw.ch_names[pick] for pick in mne.pick_types(raw.info, meg=False, stim=True, exclude=())]
        if not event_counts(raw):
            annotate_triggers(raw, notes)
        elif stims:
            notes.append(f"trigger channels {', '.join(stims)} are not read: the file has annotations")
        if labels is not None:
            conventions.label_cues(raw, Path(labels))
    return raw


def bad_channels(raw: mne.io.BaseRaw) -> dict[str, str]:
    """EEG channels that cannot be used -> why: "NaN", "infinite", "flat" or "marked bad" (in the file)."""
    picks = mne.pick_types(raw.info, eeg=True, exclude=())
    data = raw.get_data(picks, verbose="ERROR")
    empty = np.isnan(data)
    gap = empty.all(axis=0) & (not empty.all())  # between joined runs
    reasons = {}
    for name, values in zip([raw.ch_names[pick] for pick in picks], data[:, ~gap]):
        if np.isnan(values).any():
            reasons[name] = "NaN"
        elif np.isinf(values).any():
            reasons[name] = "infinite"
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
        if not name.endswith((*FORMATS, ".txt")) or name.startswith(".") or copies or continued:
            continue
        try:
            if name.endswith(".txt") and not is_openbci(path):
                continue
            if not name.endswith(".mat") or conventions.is_bnci(path):
                yield path
        except UserError as error:
            logger.warning("passed over %s", error)


def _open(path: Path, encoding: str | None, notes: list[str]) -> mne.io.BaseRaw:
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if path.suffix.lower() == ".mat":
        if not conventions.is_bnci(path):
            raise UserError(f"{path}: holds no cell array `data` of runs, so it is no recording in the BNCI layout")
        return conventions.read_bnci(path)
    if path.suffix.lower() in _TABLES:
        with reading(path, "cannot be read as a recording", DAMAGED):
            return _TABLES[path.suffix.lower()](path, notes)
    if path.suffix.lower() in (".edf", ".bdf"):
        _check_edf(path)
    with quiet(notes), reading(path, f"cannot be read as {path.suffix or 'a recording'}", DAMAGED):
        if path.name.lower().endswith(_FIF):
            _check_fif(path)
        if _is_bids(path):
            return _open_bids(path)
        if path.suffix.lower() == ".gdf":
            _check_gdf(path)
        if path.suffix.lower() == ".vhdr":
            _check_brainvision(path, notes)
        if path.suffix.lower() in (".edf", ".bdf"):
            return _open_edf(path, encoding, notes)
        if path.suffix.lower() == ".set" and encoding is not None:
            return mne.io.read_raw(path, preload=True, uint16_codec=encoding)
        return mne.io.read_raw(path, preload=True)


_TABLES = {".xdf": read_xdf, ".txt": read_openbci, ".csv": read_brainflow}


def _open_edf(path: Path, encoding: str | None, notes: list[str]) -> mne.io.BaseRaw:
    """EDF or BDF, its annotations in `encoding`; without one UTF-8, else Latin-1, which is told."""
    try:
        return mne.io.read_raw(path, preload=True, encoding=encoding or "utf8")
    except Exception as error:
        if encoding is not None or "encoding=" not in str(error):
            raise
        notes.append("its annotations are no UTF-8: read as Latin-1")
        return mne.io.read_raw(path, preload=True, encoding="latin1")


def _is_epoched(path: Path) -> bool:
    """Whether a file holds trials: FIF by its name, EEGLAB by what it says."""
    name = path.name.lower()
    if re.search(r"[-_]epo(-\d+)?\.fif(\.gz)?$", name):
        return True
    if not name.endswith(".set") or not path.is_file():
        return False
    with reading(path, "cannot be read as an EEGLAB file", DAMAGED):
        check_matlab(path)
        try:
            names = {variable for variable, _, _ in whosmat(path)}
        except NotImplementedError:  # version 7.3
            with h5py.File(path, "r") as file:
                place = file["EEG/trials"] if "EEG" in file else file.get("trials")
                return place is not None and float(np.ravel(place[()])[0]) > 1
        if "trials" in names:
            return int(np.ravel(loadmat(path, variable_names=["trials"])["trials"])[0]) > 1
        told = loadmat(path, variable_names=["EEG"], struct_as_record=False, squeeze_me=True).get("EEG")
        return int(getattr(told, "trials", 1) or 1) > 1


def _read_epochs(path: Path, notes: list[str], **options: Unpack[Reading]) -> mne.BaseEpochs:
    with quiet(notes), reading(path, "cannot be read as trials", DAMAGED):
        if path.name.lower().endswith(_FIF):
            _check_fif(path)
        read = mne.io.read_epochs_eeglab if path.suffix.lower() == ".set" else mne.read_epochs
        epochs = read(path)
        epochs.load_data()
        _name_channels(epochs, options.get("rename"), options.get("types"), notes)
        if unit := options.get("unit"):
            epochs.apply_function(lambda x: x * UNITS[unit], picks="eeg")
        _check_amplitude(epochs)
        return epochs


def _check_edf(path: Path) -> None:
    """Compare the size that the header of an EDF or BDF file announces with the file's."""
    size = path.stat().st_size
    try:
        with path.open("rb") as stream:
            head = stream.read(256)
            header, records, signals = int(head[184:192]), int(head[236:244]), int(head[252:256])
            columns = stream.read(256 * signals)[216 * signals :]
        samples = [int(value) for value in np.frombuffer(columns, "S8")[:signals]]
        seconds = float(head[244:252])
    except ValueError as error:
        raise UserError(
            f"{path}: not an {path.suffix[1:].upper()} file; give the recording in its own format"
        ) from error
    whole = len(samples) == signals and min(signals, *samples, 1) > 0 and header >= 256 * (signals + 1)
    if not whole or not 0 <= seconds < math.inf:
        raise UserError(f"{path}: its header is damaged ({signals} signals, records of {seconds:g} s); copy it again")
    if signals * max(samples) > 1000 * sum(samples):
        raise UserError(f"{path}: has {max(samples):,} samples in one of {signals} signals and few in the others")
    expected = header + records * sum(samples) * (3 if path.suffix.lower() == ".bdf" else 2)
    if size < expected:
        raise UserError(f"{path}: truncated, {size} of {expected} bytes; copy or download it again")
    if head[192:197] in (b"EDF+D", b"BDF+D"):
        raise UserError(
            f"{path}: has interruptions (EDF+D), which MNE joins without a mark; convert it to parts without"
        )


def _check_gdf(path: Path) -> None:
    """Compare the size that the header of a GDF file announces with the file's."""
    with path.open("rb") as stream:
        head = stream.read(256)
        if not head.startswith(b"GDF 2") or len(head) < 256:
            return  # of 1.x, mne tells
        (records,), (signals,) = struct.unpack("<q", head[236:244]), struct.unpack("<H", head[252:254])
        rest = stream.read(256 * signals)
    samples, kinds = (np.frombuffer(rest[n * signals : (n + 4) * signals], "<u4") for n in (216, 220))
    if len(kinds) != signals:
        raise UserError(f"{path}: truncated, the header of {signals} channels is not whole; copy it again")
    widths = {1: 1, 2: 1, 3: 2, 4: 2, 5: 4, 6: 4, 7: 8, 8: 8, 16: 4, 17: 8}
    if records >= 0:
        each = sum(int(n) * widths.get(int(kind), 3) for n, kind in zip(samples, kinds, strict=True))
        check_announced(path, records * each)


def _check_fif(path: Path) -> None:
    """Refuse tags that lead back to earlier ones: MNE would follow them for ever."""
    seen, place = set(), 0
    with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as stream:
        while len(head := stream.read(16)) == 16:
            size, following = struct.unpack(">8xii", head)
            seen.add(place)
            place = following or place + 16 + size
            if place in seen:
                raise UserError(f"{path}: its tags lead in a circle; {DAMAGED}")
            if place < 0:
                return
            stream.seek(place)


def _check_brainvision(path: Path, notes: list[str]) -> None:
    """Compare the files that a BrainVision header names with those that are there."""
    text = path.read_text(encoding="latin1")
    count = re.search(r"^NumberOfChannels=(\d+)", text, re.MULTILINE | re.IGNORECASE)
    if count is not None and int(count[1]) > (told := len(re.findall(r"^Ch\d+=", text, re.MULTILINE | re.IGNORECASE))):
        raise UserError(f"{path}: announces {count[1]} channels and describes {told}; copy it again")
    for key, ending, what in (("DataFile", ".eeg", "signals"), ("MarkerFile", ".vmrk", "markers")):
        match = re.search(rf"^{key}=(.+?)\s*$", text, re.MULTILINE | re.IGNORECASE)
        if match is None or (path.parent / (named := match[1].replace("$b", path.stem))).is_file():
            continue
        renamed = path.with_suffix(ending)
        if renamed.is_file() or key == "DataFile":
            there = f"; {renamed.name} is: write that name into the header" if renamed.is_file() else "; copy it too"
            raise UserError(f"{path}: its header names {named} for the {what}, which is not there{there}")
        notes.append(f"its marker file {named} is not there: no events")


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


def _name_channels(
    raw: mne.io.BaseRaw | mne.BaseEpochs,
    rename: Mapping[str, str] | None,
    kinds: Mapping[str, str] | None,
    notes: list[str],
) -> None:
    """Names, types and positions, in place."""
    name = source_name(raw)
    raw.rename_channels({old: "".join(filter(str.isprintable, old)).strip() for old in raw.ch_names})
    if conventions.is_bciciv2a(raw.ch_names):
        raw.rename_channels(dict(zip(raw.ch_names, conventions.BCICIV2A_CHANNELS)))
    if rename:
        unknown = [old for old in rename if old not in raw.ch_names]
        if unknown:
            raise UserError(f"{name}: no channel {', '.join(unknown)} to rename; it has {', '.join(raw.ch_names)}")
        raw.rename_channels(dict(rename))
    type_channels(raw, kinds, notes)
    types = dict(zip(raw.ch_names, raw.get_channel_types()))
    names = {channel: conventions.standard_name(channel) for channel, kind in types.items() if kind == "eeg"}
    twice = [channel for channel, new in names.items() if list(names.values()).count(new) > 1]
    if twice:
        raise UserError(f"{name}: channels {', '.join(twice)} are one electrode; tell them apart with rename")
    raw.rename_channels(names)
    biosemi = {"A1", "A2", "A3"} <= set(raw.ch_names)  # A1 and A2 of such a cap are no ear lobes
    if not _located(raw) and not biosemi and set(names.values()) & set(conventions.standard_montage().ch_names):
        raw.set_montage(conventions.standard_montage(), on_missing="ignore")


def _located(raw: mne.io.BaseRaw | mne.BaseEpochs) -> set[str]:
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


def _check_amplitude(raw: mne.io.BaseRaw | mne.BaseEpochs) -> None:
    """Refuse EEG whose typical deviation within a second is not between 0.05 microvolts and 5 millivolts."""
    picks = mne.pick_types(raw.info, eeg=True, exclude=())
    if not len(picks):
        held = ", ".join(f"{name} ({kind})" for name, kind in zip(raw.ch_names, raw.get_channel_types()))
        raise UserError(f"{source_name(raw)}: no EEG channel; it has {held}; types= says which are (--types C3=eeg)")
    data = raw.get_data(picks)
    data = data if data.ndim == 2 else np.concatenate(list(data), axis=1)
    if not data.size:
        raise UserError(f"{source_name(raw)}: has no samples; give another recording")
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


def eeg_channels(info: mne.Info) -> list[int]:
    """Places of the EEG channels, bad ones included."""
    return list(mne.pick_types(info, eeg=True, exclude=()))
