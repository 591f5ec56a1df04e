"""What published recordings leave to convention: channel names, event codes, and labels kept in other files.

Three sets are known by the names of their files:

- EEGMMIDB, `S001R04.edf` (Schalk et al. 2004, PhysioNet eegmmidb 1.0.0): the run number says what T1 and T2 mean;
- BCI Competition IV 2a, `A01T.gdf` (Tangermann et al. 2012): 22 EEG and 3 EOG channels named by position, classes as
  numeric codes, those of the evaluation session in a separate `A01E.mat`;
- the same recordings as BNCI Horizon 2020 gives them, `A01T.mat` (001-2014).
"""

import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import mne
import numpy as np
from scipy.io import loadmat, whosmat

from nearfar.core.errors import UserError
from nearfar.core.reading import reading
from nearfar.eeg.annotations import annotation_names
from nearfar.eeg.formats import check_matlab

SAMPLE = "finger-movements"
"""Name of the recordings that an installed package carries, see `nearfar.eeg.samples`."""

CLASSES = ("left_hand", "right_hand", "hands", "feet", "tongue", "rest")
"""Names of the customary motor-imagery classes (`hands`: both fists), as MOABB has them, in an order in which those of
every published AGTCNet configuration follow each other as its outputs do."""

_BCICIV2A = "Fz FC3 FC1 FCz FC2 FC4 C5 C3 C1 Cz C2 C4 C6 CP3 CP1 CPz CP2 CP4 P1 Pz P2 POz"

BCICIV2A_CHANNELS = (*_BCICIV2A.split(), "EOG-left", "EOG-central", "EOG-right")
"""The 25 channels of BCI Competition IV 2a in the order of its files."""

BCICIV2A_EVENTS = {"left_hand": "769", "right_hand": "770", "feet": "771", "tongue": "772"}
"""Codes of the cues of BCI Competition IV 2a; 783 is a cue whose class another file tells."""

UNKNOWN_CUE, RUN_START = "783", "32766"

EEGMMIDB_FILE = re.compile(r"S(\d{3})R(\d{2})\.edf$", re.IGNORECASE)

EEGMMIDB_RUNS = {
    "left_right": {"imagery": (4, 8, 12), "execution": (3, 7, 11)},
    "fists_feet": {"imagery": (6, 10, 14), "execution": (5, 9, 13)},
}
"""Runs of EEGMMIDB by what is moved and whether it is imagined or done."""

_BCICIV2A_FILE = re.compile(r"(A\d{2})([TE])\.(gdf|mat)$", re.IGNORECASE)

_BCICIV2A_LANDMARKS = {0: "EEG-Fz", 7: "EEG-C3", 9: "EEG-Cz", 11: "EEG-C4", 19: "EEG-Pz", 22: "EOG-left"}

_OLD_NAMES = {"t3": "T7", "t4": "T8", "t5": "P7", "t6": "P8"}

_REFERENCE = re.compile(r"[ -]+(ref|le|re|ar|avg|av|car|a1|a2|a1a2|m1|m2|m1m2)$", re.IGNORECASE)


@lru_cache(maxsize=1)
def standard_montage() -> mne.channels.DigMontage:
    """The 343 electrodes of the 10-05 system (called `standard_1005` before MNE 1.13)."""
    known = mne.channels.get_builtin_montages()
    return mne.channels.make_standard_montage("colin27_1005" if "colin27_1005" in known else "standard_1005")


@lru_cache(maxsize=1)
def _standard_names() -> dict[str, str]:
    return {name.lower(): name for name in standard_montage().ch_names} | _OLD_NAMES


def standard_name(name: str) -> str:
    """The 10-05 spelling of an electrode's name: `Fc5.`, `EEG-FC5`, `EEG FC5-Ref` and `fc5` all give `FC5`.

    T3, T4, T5 and T6 get their present names T7, T8, P7 and P8. A name that is no electrode's comes back stripped of
    spaces only.
    """
    bare = re.sub(r"^EEG[ _:-]+", "", name.strip(), flags=re.IGNORECASE).rstrip(". ")
    for candidate in (bare, _REFERENCE.sub("", bare)):
        if candidate.lower() in _standard_names():
            return _standard_names()[candidate.lower()]
    return name.strip()


def is_electrode(name: str) -> bool:
    """Whether a name is that of an electrode of the 10-05 system, or of two with a sign between (`C3-P3`, bipolar)."""
    known = _standard_names()
    return standard_name(name).lower() in known or bipolar_pair(name) is not None


def bipolar_pair(name: str) -> tuple[str, str] | None:
    """The two electrodes of a bipolar channel (`EEG C3-P3`, `Fp1-F7`), None for any other name."""
    bare = re.sub(r"^EEG[ _:-]+", "", name.strip(), flags=re.IGNORECASE)
    parts = [_standard_names().get(part.strip().lower()) for part in re.split(r"[-–]", bare)]
    return (parts[0], parts[1]) if len(parts) == 2 and parts[0] and parts[1] else None


def is_bciciv2a(names: list[str]) -> bool:
    """Whether these are the channel names that MNE gives a GDF file of BCI Competition IV 2a."""
    return len(names) == 25 and all(names[index] == name for index, name in _BCICIV2A_LANDMARKS.items())


def is_bciciv2a_file(path: Path) -> bool:
    """Whether a file is named like one of BCI Competition IV 2a."""
    return bool(_BCICIV2A_FILE.search(path.name))


def known_set(path: Path) -> str | None:
    """The published set that a recording is of, by its file's name: eegmmidb, bciciv2a, or the sample."""
    if str(path) == SAMPLE:
        return SAMPLE
    if EEGMMIDB_FILE.search(path.name):
        return "eegmmidb"
    return "bciciv2a" if is_bciciv2a_file(path) else None


def identity(path: Path, root: Path | None = None) -> tuple[str, str, str]:
    """(subject, session, run) by the customary name of a file, else by its folders.

    - EEGMMIDB `S001R04.edf`: subject S001, run 4. The four tasks come three times over, runs 3-6, 7-10 and 11-14; these
      repetitions count as sessions 1, 2, 3 (all recorded on one day).
    - BCI Competition IV 2a `A01T.gdf`: subject A01, session T; the file holds several runs, marked inside (run "").
    - BIDS entities `sub-01_ses-02_..._run-3`.
    - any other: the folder of the file is the subject; where files lie deeper below `root`, the folder under `root` is
      the subject and the next one the session. The run is the file's name without its ending.
    """
    if match := EEGMMIDB_FILE.search(path.name):
        number = int(match[2])
        return f"S{match[1]}", str(max((number - 3) // 4 + 1, 1)), str(number)
    if match := _BCICIV2A_FILE.search(path.name):
        return match[1].upper(), match[2].upper(), ""
    entities = dict(re.findall(r"(?:^|_)(sub|ses|run)-([^_.]+)", path.name))
    if "sub" in entities:
        return entities["sub"], entities.get("ses", "1"), entities.get("run", "1")
    folders = path.absolute().relative_to(root.absolute()).parts[:-1] if root else ()
    return (
        folders[0] if folders else path.absolute().parent.name,
        folders[1] if len(folders) > 1 else "1",
        path.name.split(".")[0],
    )


def subject_pattern(text: str) -> re.Pattern[str]:
    """The regular expression that tells people apart in paths; `UserError` where it is none or has no group."""
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise UserError(f"subject pattern {text!r}: {error}; write a regular expression such as (P[0-9]+)_") from error
    if not pattern.groups or (pattern.groupindex and "subject" not in pattern.groupindex):
        raise UserError(f"subject pattern {text!r}: put the subject into brackets, or into a group (?P<subject>...)")
    return pattern


def identity_by(
    pattern: re.Pattern[str], path: Path, root: Path | None, known: tuple[str, str, str]
) -> tuple[str, str, str]:
    """`identity` with what `pattern` finds in the path below `root` in place of `known`."""
    text = str(path.relative_to(root) if root else path.name)
    match = pattern.search(text)
    if match is None:
        raise UserError(f"{path}: the subject pattern {pattern.pattern!r} does not match {text}")
    named = match.groupdict() or {"subject": match[1]}
    if not named["subject"]:
        raise UserError(f"{path}: the subject pattern {pattern.pattern!r} finds an empty subject in {text}")
    return (named["subject"], named.get("session") or known[1], named.get("run") or known[2])


def participants(folder: Path) -> list[str] | None:
    """The people in the `participants.tsv` of a folder, without `sub-`; None where there is no such table."""
    path = folder / "participants.tsv"
    if not path.is_file():
        return None
    with reading(path, "is no table of participants"):
        rows = [line.split("\t") for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if not rows or "participant_id" not in rows[0]:
        raise UserError(f"{path}: has no column participant_id; write one, tab-separated")
    column = rows[0].index("participant_id")
    return [row[column].strip().removeprefix("sub-") for row in rows[1:] if len(row) > column]


def identity_of(people: list[str], path: Path, root: Path, known: tuple[str, str, str]) -> tuple[str, str, str]:
    """`identity` with the one of `people` whose name stands in the path below `root`; `UserError` for none or two."""
    text = str(path.relative_to(root))
    found = {one for one in people if re.search(rf"(?<![A-Za-z0-9]){re.escape(one)}(?![A-Za-z0-9])", text)}
    if len(found) != 1:
        raise UserError(
            f"{path}: holds {' and '.join(sorted(found)) or 'the name of none'} of the {len(people)} people of "
            f"{root / 'participants.tsv'}; add the person there, or give a subject pattern"
        )
    return (found.pop(), *known[1:])


def by_folder_alone(path: Path) -> bool:
    """Whether nothing in a file's name says whose it is by a customary scheme."""
    return not (EEGMMIDB_FILE.search(path.name) or is_bciciv2a_file(path) or re.search(r"(?:^|_)sub-", path.name))


def known_events(path: Path) -> dict[str, str] | None:
    """Class -> event name for a file of a known set; None for any other file.

    The runs of EEGMMIDB in which movements are done, not imagined, have classes of their own (`left_hand_execution`),
    so that nobody mixes the two by giving a whole folder. The two baseline runs have none.
    """
    if match := EEGMMIDB_FILE.search(path.name):
        number = int(match[2])
        for task, kinds in EEGMMIDB_RUNS.items():
            for kind, runs in kinds.items():
                if number in runs:
                    first, second = ("left_hand", "right_hand") if task == "left_right" else ("hands", "feet")
                    ending = "" if kind == "imagery" else "_execution"
                    return {first + ending: "T1", second + ending: "T2"}
        return {}
    return dict(BCICIV2A_EVENTS) if is_bciciv2a_file(path) else None


def check_eegmmidb(raw: mne.io.BaseRaw, path: Path) -> None:
    """Refuse a run of EEGMMIDB that is not what the set's description says: 160 Hz, cues that last 4 to 4.5 s.

    The file itself tells, so that no list of irregular subjects is needed.
    """
    rate = raw.info["sfreq"]
    durations = raw.annotations.duration[np.isin(annotation_names(raw), ("T1", "T2"))]
    if not durations.size:
        return
    if rate != 160 or (durations < 4.0 - 1 / rate).any() or (durations > 4.5).any():
        raise UserError(
            f"{path}: {rate:g} Hz and cues of {durations.min():.1f} to {durations.max():.1f} s where EEGMMIDB has "
            "160 Hz and about 4.1 s; leave this subject out, or name the events yourself to use it as it is"
        )


def find_labels(path: Path) -> Path | None:
    """The `.mat` file with the classes of a 2a GDF file: beside it, or in a folder `true_labels` beside it or above."""
    name = path.with_suffix(".mat").name
    folders = (path.parent, path.parent / "true_labels", path.parent.parent / "true_labels")
    for candidate in (folder / name for folder in folders):
        if candidate.is_file() and "classlabel" in _mat_variables(candidate):
            return candidate
    return None


def label_cues(raw: mne.io.BaseRaw, labels: Path) -> None:
    """Give every cue of a 2a recording its class from `classlabel` (1 to 4, in the order of the cues), in place.

    Raises `UserError` where the numbers of cues and labels differ, or where a cue that has a class has another there.
    """
    if "classlabel" not in _mat_variables(labels):
        raise UserError(f"{labels}: holds no variable `classlabel`; give the file of true labels of the competition")
    with reading(labels, "its classes cannot be read"):
        codes = np.asarray(loadmat(labels, variable_names=["classlabel"])["classlabel"]).ravel().astype(int) + 768
    description = annotation_names(raw)
    cues = np.flatnonzero(np.isin(description, (*BCICIV2A_EVENTS.values(), UNKNOWN_CUE)))
    if len(cues) != len(codes):
        raise UserError(f"{labels}: {len(codes)} labels for {len(cues)} cues; give the labels of this very recording")
    told = description[cues] != UNKNOWN_CUE
    if (description[cues][told] != codes[told].astype(str)).any():
        raise UserError(f"{labels}: contradicts the classes in the recording; give the labels of this very recording")
    raw.annotations.description[cues] = codes.astype(str)


def is_bnci(path: Path) -> bool:
    """Whether a `.mat` file has the layout of BNCI Horizon 2020: a cell array `data` of runs."""
    return "data" in _mat_variables(path)


def read_bnci(path: Path) -> mne.io.BaseRaw:
    """BCI Competition IV 2a as BNCI Horizon 2020 gives it (001-2014), as one recording like that of the GDF file.

    `data` is a cell array of runs with the fields `X` (times, 25) in microvolts, `trial` (1-based index of each trial's
    start, 2 s before its cue), `y` (1 to 4), `fs`, `classes`, `artifacts`. The runs are joined with gaps of NaN of 100
    samples, each after an event 32766; cues and rejected trials get the codes of the GDF file (769 to 772, 1023). The
    paper's own code takes `trial` as 0-based and so is one sample late; this is not.
    """
    with reading(path, "not the BNCI layout, a cell array `data` of runs with X, trial, y and fs"):
        return _joined_runs(path)


def _joined_runs(path: Path) -> mne.io.BaseRaw:
    cells = np.atleast_1d(loadmat(path, struct_as_record=False, squeeze_me=True, variable_names=["data"])["data"])
    runs = [{name: np.atleast_1d(getattr(cell, name)) for name in ("X", "trial", "y", "fs")} for cell in cells]
    artifacts = [np.atleast_1d(getattr(cell, "artifacts", ())) for cell in cells]
    rates = {float(run["fs"][0]) for run in runs}
    widths = {run["X"].shape[-1] for run in runs}
    if widths != {25} or len(rates) != 1:
        raise UserError(
            f"{path}: runs of {sorted(widths)} channels at {sorted(rates)} Hz; BNCI 001-2014 has 25 at one rate"
        )
    rate = rates.pop()
    gap = np.full((100, 25), np.nan)
    blocks: list[np.ndarray] = []
    events: list[tuple[float, str]] = []
    start = 0
    for run, marked in zip(runs, artifacts, strict=True):
        if blocks:
            blocks.append(gap)
            start += len(gap)
        events.append((start / rate, RUN_START))
        onsets = (start + run["trial"].astype(int) - 1) / rate
        events += [(onset + 2.0, str(768 + int(y))) for onset, y in zip(onsets, run["y"], strict=True)]
        events += [(onset, "1023") for onset, mark in zip(onsets, marked, strict=False) if mark]
        blocks.append(run["X"])
        start += len(run["X"])
    types = ["eeg"] * 22 + ["eog"] * 3
    raw = mne.io.RawArray(np.concatenate(blocks).T * 1e-6, mne.create_info(list(BCICIV2A_CHANNELS), rate, types))
    onsets_, names = zip(*events, strict=True)
    raw.set_annotations(mne.Annotations(onsets_, 0.0, names))
    raw.info["description"] = str(path)
    return raw


def _mat_variables(path: Path) -> Mapping[str, Any]:
    with reading(path, "not a MATLAB file of version 7 or older", "save it again with -v7"):
        check_matlab(path)
        return {name: shape for name, shape, _ in whosmat(path)}
