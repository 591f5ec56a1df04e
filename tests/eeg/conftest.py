"""Recordings that the EEG tests make for themselves."""

from datetime import UTC, datetime

import mne
import numpy as np
import pytest
from numpy.typing import NDArray

CHANNELS = ("FC3", "FCz", "FC4", "C3", "Cz", "C4", "CP3", "CPz", "CP4")


@pytest.fixture
def make_raw():
    """`make_raw(channels, sfreq=160, seconds=60, cues={"T1": [5.0, ...]}, seed=0)`: EEG-like noise of 10 microvolts."""

    def make(
        channels: tuple[str, ...] = CHANNELS,
        sfreq: float = 160.0,
        seconds: float = 60.0,
        cues: dict[str, list[float]] | None = None,
        duration: float = 4.1,
        seed: int = 0,
        data: NDArray | None = None,
    ) -> mne.io.RawArray:
        if data is None:
            noise = np.random.default_rng(seed).normal(size=(len(channels), round(seconds * sfreq)))
            data = 1e-5 * noise
        info = mne.create_info(list(channels), sfreq, "eeg")
        info.set_meas_date(datetime(2020, 1, 2, 3, 4, 5, tzinfo=UTC))
        raw = mne.io.RawArray(data, info, verbose="ERROR")
        cues = {"T1": [5.0, 20.0, 35.0], "T2": [12.0, 27.0, 42.0]} if cues is None else cues
        marks = [(onset, name) for name, onsets in cues.items() for onset in onsets]
        raw.set_annotations(
            mne.Annotations(
                [onset for onset, _ in marks], duration, [name for _, name in marks], orig_time=raw.info["meas_date"]
            )
        )
        return raw

    return make
