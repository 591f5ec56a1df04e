"""Published motor-imagery sets as recordings for `load_trials`: EEGMMIDB, BCI Competition IV 2a, MOABB's, BIDS folders.

Nothing is downloaded by the functions that take a folder; `fetch_eegmmidb` and `moabb_recordings` do, when called.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import mne

from nearfar.core.errors import UserError
from nearfar.eeg import conventions
from nearfar.eeg.annotations import event_counts, quiet
from nearfar.eeg.recordings import Recording, find_recordings

if TYPE_CHECKING:
    import moabb.datasets.base

EEGMMIDB_IRREGULAR = (38, 88, 89, 92, 100, 104)
"""Subjects of EEGMMIDB that AGTCNet's evaluation leaves out. `load_trials` checks rate and trial length by itself."""


def eegmmidb(
    folder: str | Path,
    task: Literal["left_right", "fists_feet", "all"] = "all",
    kind: Literal["imagery", "execution"] = "imagery",
    subjects: Iterable[int] | None = None,
) -> list[Recording]:
    """The runs of one task of EEGMMIDB below a folder of its EDF files (`S001/S001R04.edf`, ...).

    task: "left_right" hand, both "fists_feet", or "all": the four classes of both.
    kind: movements imagined (runs 4, 8, 12 and 6, 10, 14) or done (runs 3, 7, 11 and 5, 9, 13).
    subjects: numbers; None takes all that are there. Raises `UserError` for a subject without such a run.

    The three repetitions of each task count as sessions "1", "2", "3".
    """
    runs = _eegmmidb_runs(task, kind)
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; it should hold the EDF files of EEGMMIDB")
    names = {path: conventions.EEGMMIDB_FILE.search(path.name) for path in folder.rglob("*.edf")}
    chosen = {path: int(match[1]) for path, match in names.items() if match and int(match[2]) in runs}
    wanted = set(chosen.values()) if subjects is None else set(subjects)
    absent = wanted - set(chosen.values())
    if absent or not chosen:
        what = f"of subject {', '.join(map(str, sorted(absent)))}" if absent else "S001R04.edf, ..."
        raise UserError(f"{folder}: none of the runs {', '.join(map(str, runs))} {what}; give the folder of EEGMMIDB")
    return find_recordings(
        sorted((path for path, number in chosen.items() if number in wanted), key=lambda p: Path(p).name)
    )


def fetch_eegmmidb(
    subjects: Iterable[int],
    folder: str | Path,
    task: Literal["left_right", "fists_feet", "all"] = "all",
    kind: Literal["imagery", "execution"] = "imagery",
    base_url: str = "https://physionet.org/files/eegmmidb/1.0.0/",
) -> list[Recording]:
    """The same from PhysioNet by MNE's fetcher, which checks every file; what is below `folder` is not fetched again.

    A run is 2.6 MB. The set has the licence ODC-By 1.0. Raises `UserError` where the server cannot be reached.
    """
    runs = _eegmmidb_runs(task, kind)
    try:
        with quiet():
            paths = mne.datasets.eegbci.load_data(
                sorted(set(subjects)), list(runs), path=str(folder), update_path=False, base_url=base_url
            )
    except (OSError, ValueError) as error:  # no network, or a file whose checksum is wrong
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{base_url}: EEGMMIDB could not be fetched ({reason}); go online, or copy its EDF files into a folder and "
            "give that folder"
        ) from error
    return find_recordings(paths)


def bciciv2a(folder: str | Path, subjects: Iterable[int] | None = None) -> list[Recording]:
    """BCI Competition IV 2a below a folder: GDF files (`A01T.gdf`, with `A01E.mat` for the classes of the evaluation
    session), or the `.mat` files of BNCI Horizon 2020. Sessions are "T" and "E".

    subjects: numbers 1 to 9; None takes all that are there. Raises `UserError` for one that is not there and where the
    folder holds both formats, which would count every trial twice.
    """
    found = [recording for recording in find_recordings(folder) if conventions.is_bciciv2a_file(recording.path)]
    names = {f"A{number:02d}" for number in subjects} if subjects is not None else {each.subject for each in found}
    absent = names - {recording.subject for recording in found}
    if absent or not found:
        raise UserError(f"{folder}: no recording of {', '.join(sorted(absent)) or 'A01T.gdf, A01T.mat, ...'}")
    chosen = [recording for recording in found if recording.subject in names]
    if len({(recording.subject, recording.session) for recording in chosen}) < len(chosen):
        raise UserError(f"{folder}: holds sessions in both formats, GDF and BNCI; give a folder with one of them")
    return chosen


def bids_recordings(
    root: str | Path, subjects: Sequence[str] | None = None, tasks: Sequence[str] | None = None
) -> list[Recording]:
    """EEG recordings of a BIDS dataset, read by mne-bids (the extra mne-bids).

    subjects, tasks: labels without `sub-` and `task-`; None takes all.
    """
    try:
        import mne_bids
    except ImportError as error:
        raise UserError(f"{root}: a BIDS dataset needs mne-bids; install mne-bids") from error
    root = Path(root)
    if not (root / "dataset_description.json").is_file():
        raise UserError(f"{root}: no dataset_description.json here; give the root of a BIDS dataset")
    with quiet():
        found = mne_bids.find_matching_paths(
            root, subjects=subjects, tasks=tasks, datatypes="eeg", suffixes="eeg", extensions=_BIDS_ENDINGS
        )
    if not found:
        raise UserError(f"{root}: no EEG recording of subject {subjects or 'any'} and task {tasks or 'any'}")
    return find_recordings([path.fpath for path in found])


def moabb_recordings(dataset: str, subjects: Sequence[int] | None = None) -> list[Recording]:
    """Recordings of a dataset of MOABB by the name of its class, such as "BNCI2014_001" or "PhysionetMI".

    MOABB (the extra nearfar-eeg[moabb]) downloads what is not on the disk. Classes are the dataset's.
    """
    try:
        import moabb.datasets
        from moabb.datasets.base import BaseDataset
    except ImportError as error:
        raise UserError(f"{dataset}: this needs MOABB; install nearfar-eeg[moabb]") from error
    kind = getattr(moabb.datasets, dataset, None)
    if not (isinstance(kind, type) and issubclass(kind, BaseDataset)):
        raise UserError(f"{dataset}: MOABB has no such dataset; see moabb.neurotechx.com for the names")
    return from_moabb(kind(), subjects)


def from_moabb(dataset: "moabb.datasets.base.BaseDataset", subjects: Sequence[int] | None = None) -> list[Recording]:
    """Recordings of a MOABB dataset object; subjects None takes all."""
    with quiet():
        try:
            data = dataset.get_data(subjects=list(subjects) if subjects is not None else None)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{dataset.code}: MOABB cannot give its data ({reason}); go online, or see its page"
            ) from error
    recordings = []
    for subject, sessions in data.items():
        for session, runs in sessions.items():
            for run, raw in runs.items():
                path = Path(dataset.code, str(subject), session, run)
                raw.info["description"] = str(path)
                named = set(event_counts(raw)) & set(dataset.event_id)
                events = {cls: cls if named else str(code) for cls, code in dataset.event_id.items()}
                recordings.append(Recording(path, str(subject), session, run, events, raw=raw))
    return recordings


_BIDS_ENDINGS = [".edf", ".bdf", ".vhdr", ".set"]


def _eegmmidb_runs(task: str, kind: str) -> tuple[int, ...]:
    if task not in (*conventions.EEGMMIDB_RUNS, "all") or kind not in ("imagery", "execution"):
        raise UserError(
            f"EEGMMIDB has the tasks left_right, fists_feet and all, as imagery or execution, not {task!r}, {kind!r}"
        )
    tasks = conventions.EEGMMIDB_RUNS if task == "all" else [task]
    return tuple(sorted(run for name in tasks for run in conventions.EEGMMIDB_RUNS[name][kind]))
