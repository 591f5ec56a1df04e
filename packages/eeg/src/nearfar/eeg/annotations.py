"""Events as MNE annotations."""

import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

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
    return {
        name: counts[name] for name in sorted(counts) if not name.upper().startswith(("BAD", "EDGE", "NEW SEGMENT"))
    }


def source_name(raw: mne.io.BaseRaw) -> str:
    """The file that a recording came from, for messages."""
    files = [str(name) for name in raw.filenames if name]
    return files[0] if files else str(raw.info.get("description") or "recording")


@contextmanager
def quiet() -> Iterator[None]:
    """Send MNE's messages and warnings in this block to the logger `nearfar.eeg`, level DEBUG, not to the screen."""
    with mne.use_log_level("ERROR"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        logger.debug("%s", warning.message)
