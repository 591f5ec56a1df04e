"""Events as MNE annotations."""

import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise

import mne
import numpy as np

from nearfar.core.errors import UserError

logger = logging.getLogger("nearfar.eeg")


def annotation_names(raw: mne.io.BaseRaw) -> np.ndarray:
    """The annotations' descriptions as an array of ordinary strings."""
    return np.array([str(name) for name in raw.annotations.description], dtype=str)


Events = Mapping[str, str | Sequence[str]]
"""Class name -> name(s) of the annotations that mark its cues."""


def event_classes(events: Events) -> dict[str, str]:
    """Annotation name -> class; a name given to two classes is a `UserError`."""
    classes: dict[str, str] = {}
    for cls, given in events.items():
        for name in [given] if isinstance(given, str) else map(str, given):
            if classes.setdefault(name, cls) != cls:
                raise UserError(f"event {name} is given to two classes, {classes[name]} and {cls}")
    return classes


def annotations(raw: mne.io.BaseRaw) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Onsets in seconds from the first sample of the data, durations in seconds, and names of the annotations."""
    noted = raw.annotations
    shift = raw.first_time if noted.orig_time is not None else 0.0
    return noted.onset - shift, noted.duration, annotation_names(raw)


def annotate(raw: mne.io.BaseRaw, onsets: np.ndarray, durations: np.ndarray | float, names: Sequence[str]) -> None:
    """Add annotations at `onsets` in seconds from the first sample of the data, in place."""
    shift = raw.first_time if raw.annotations.orig_time is not None else 0.0
    raw.annotations.append(onsets + shift, np.broadcast_to(durations, len(onsets)), list(names))


def event_counts(raw: mne.io.BaseRaw) -> dict[str, int]:
    """How often each event occurs, by name; bad stretches and the edges of joined files are no events."""
    counts = Counter(annotations(raw)[2].tolist())
    return {name: counts[name] for name in sorted(counts) if not (is_bad(name) or is_edge(name))}


def is_bad(name: str) -> bool:
    """Whether an annotation marks a stretch that is not to be used."""
    return name.upper().startswith("BAD")


def is_edge(name: str) -> bool:
    """Whether an annotation marks where two pieces of signal were joined, as MNE, BrainVision, EEGLAB, ERPLAB do."""
    return name.upper().startswith(EDGES) or name == "-99"


EDGES = ("EDGE", "BOUNDARY", "BAD BOUNDARY", "NEW SEGMENT")


def segments(raw: mne.io.BaseRaw) -> list[tuple[int, int]]:
    """First sample of each piece between edges, and the one after its last.

    An edge is a point: EEGLAB's `boundary` tells as its duration what was cut out there.
    """
    onsets, _, names = annotations(raw)
    times = onsets[np.array([is_edge(name) for name in names], dtype=bool)]
    cuts = np.unique(np.clip(np.rint(times * raw.info["sfreq"]).astype(int), 0, raw.n_times))
    bounds = [0, *(int(cut) for cut in cuts if 0 < cut < raw.n_times), raw.n_times]
    return list(pairwise(bounds))


def source_name(raw: mne.io.BaseRaw | mne.BaseEpochs) -> str:
    """The file that a recording came from, for messages."""
    given = raw.filenames if isinstance(raw, mne.io.BaseRaw) else [raw.filename]
    files = [str(name) for name in given if name]
    return files[0] if files else str(raw.info.get("description") or "recording")


@contextmanager
def quiet(notes: list[str] | None = None) -> Iterator[None]:
    """Send MNE's messages and warnings in this block to the logger `nearfar.eeg`, level DEBUG, not to the screen.

    notes: a list that the warnings are added to, each once.
    """
    said: list[str] = []

    def hear(record: logging.LogRecord) -> bool:
        said.append(record.getMessage())
        return False

    mne_logger = logging.getLogger("mne")
    mne_logger.addFilter(hear)
    level = "ERROR" if notes is None else "WARNING"  # below it MNE makes no warnings
    try:
        with mne.use_log_level(level), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        mne_logger.removeFilter(hear)
    for text in said:
        logger.debug("%s", text)
        if notes is not None and text not in notes:
            notes.append(text)
    for warning in caught:
        logger.debug("%s", warning.message)
        text = " ".join(str(warning.message).split())
        if (
            notes is not None
            and text not in notes
            and not issubclass(warning.category, DeprecationWarning | FutureWarning)
        ):
            notes.append(text)
