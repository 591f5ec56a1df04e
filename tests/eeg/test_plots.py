import io

import matplotlib as mpl
import matplotlib.pyplot as plt
import mne
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import LineCollection, PathCollection, QuadMesh
from scipy import signal

from nearfar.core.errors import UserError
from nearfar.eeg import metrics, plots
from nearfar.eeg.conventions import standard_montage
from nearfar.eeg.live.stream import Decisions

mpl.use("agg")


@pytest.fixture(autouse=True)
def no_global_state():
    before = mpl.rcParams.copy()
    yield
    assert plt.get_fignums() == []
    assert mpl.rcParams == before


def drawn(figure):
    """The figure's PNG renders, and holds more than one colour."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=50)
    buffer.seek(0)
    assert len(np.unique(plt.imread(buffer).reshape(-1, 4), axis=0)) > 10
    return figure.axes


def rows():
    return pd.DataFrame(
        [
            {
                "protocol": "cross-session",
                "model": model,
                "subject": subject,
                "session": session,
                "repeat": repeat,
                "n_test": 40,
                "accuracy": 0.5 if (subject, model) == (2, "b") else 0.5 + 0.1 * subject - 0.05 * (model == "b"),
                "chance": 0.5,
                "failure": "diverged" if (subject, model) == (2, "b") else "",
            }
            for model in "ab"
            for subject in (1, 2, 3)
            for session in (0, 1)
            for repeat in (0, 1, 2)
        ]
    )


def test_subject_accuracies_show_intervals_bounds_and_failures():
    axes = drawn(plots.subject_accuracies(rows()))[0]
    marks = [container for container in axes.containers if container.has_yerr]
    assert [mark[0].get_ydata()[0] for mark in marks] == pytest.approx([0.6, 0.7, 0.8, 0.55, 0.5, 0.75])
    assert [mark[0].get_markerfacecolor() == "white" for mark in marks] == [False] * 4 + [True, False]
    low, high = marks[0][2][0].get_segments()[0][:, 1]
    assert (low, high) == pytest.approx(metrics.proportion_interval(0.6, 80))  # two sessions, not three repeats
    bounds = [c for c in axes.collections if isinstance(c, LineCollection) and c.get_linestyle()[0][1] is not None]
    assert [c.get_segments()[0][0, 1] for c in bounds] == [metrics.chance_bound(80, 2)] * 3
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["chance", "chance bound (95 %)", "a", "b"]


def test_confusion_shows_shares_and_counts():
    counts = np.array([[8, 2, 0], [3, 6, 1]])
    axes = drawn(plots.confusion(counts, ["left", "right"]))[0]
    assert [t.get_text() for t in axes.texts] == ["80%\n8", "20%\n2", "0%\n0", "30%\n3", "60%\n6", "10%\n1"]
    counts[:, 2] = 0
    axes = drawn(plots.confusion(counts, ["left", "right"]))[0]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["left", "right"]
    assert axes.images[0].get_array()[0, 0] == 0.8
    with pytest.raises(ValueError, match=r"need \(3, 4\)"):
        plots.confusion(counts, ["a", "b", "c"])


def test_training_curves_draw_what_is_there():
    history = pd.DataFrame(
        [
            {
                "model": "m",
                "held_out": f,
                "repeat": 0,
                "epoch": e,
                "train_loss": 1 / (e + 1 + f),
                "val_accuracy": e / 10,
            }
            for f in (0, 1)
            for e in range(10)
        ]
    )
    loss, accuracy = drawn(plots.training_curves(history))
    assert len(loss.lines) == 3  # two fits and their mean
    np.testing.assert_allclose(loss.lines[-1].get_ydata(), (1 / np.arange(1, 11) + 1 / np.arange(2, 12)) / 2)
    assert [t.get_text() for t in accuracy.get_legend().get_texts()] == ["validation"]
    drawn(plots.training_curves(history.loc[history["held_out"] == 0, ["epoch", "train_loss"]]))
    with pytest.raises(UserError, match="no training curve"):
        plots.training_curves(pd.DataFrame())


def test_topographic_maps():
    names = ["C3", "Cz", "C4", "Fz", "Pz", "Oz", "F3", "F4"]
    info = mne.create_info(names, 100, "eeg")
    weights = np.random.default_rng(0).normal(size=(7, 8))
    with pytest.raises(UserError, match="no position for the channels C3, Cz"):
        plots.topographic_maps(weights, info)
    info.set_montage(standard_montage())
    axes = drawn(plots.topographic_maps(weights, info, ["first"]))
    shown = [a for a in axes if a.images]
    assert len(shown) == 7
    assert shown[0].get_title() == "first"
    assert shown[0].images[0].get_clim() == (-np.abs(weights).max(), np.abs(weights).max())
    drawn(plots.topographic_maps(weights[0], info))
    with pytest.raises(ValueError, match="7 weights for 8 channels"):
        plots.topographic_maps(weights[:, :7], info)


def test_desynchronization_finds_the_drop_in_power():
    rng = np.random.default_rng(0)
    sos = signal.butter(4, (10, 14), "bandpass", fs=100, output="sos")
    data = 10 * signal.sosfilt(sos, rng.normal(size=(60, 2, 700)), axis=-1)[..., 100:] + rng.normal(size=(60, 2, 600))
    data[:30, 0, 300:500] *= 0.5  # class 0, C3, 1 to 3 s after the cue: a quarter of the power
    events = np.stack([np.arange(60), np.zeros(60, int), np.arange(60) // 30], axis=1)
    info = mne.create_info(["C3", "C4"], 100.0, "eeg")
    epochs = mne.EpochsArray(1e-6 * data, info, events, tmin=-2.0, event_id={"left": 0, "right": 1}, verbose="ERROR")
    axes = drawn(plots.desynchronization(epochs))
    change = {a.get_title(): next(c for c in a.collections if isinstance(c, QuadMesh)).get_array() for a in axes[:4]}
    assert list(change) == ["C3, left", "C4, left", "C3, right", "C4, right"]
    times = epochs.times[(epochs.times >= -1.75) & (epochs.times <= epochs.times[-1] - 0.25)]
    after = (times > 1.3) & (times < 2.7)
    assert change["C3, left"][8, after].mean() == pytest.approx(-75, abs=8)
    for name in ("C4, left", "C3, right", "C4, right"):
        assert abs(change[name][8, after].mean()) < 30
    with pytest.raises(UserError, match="no channel Cz to draw"):
        plots.desynchronization(epochs, ["Cz"])
    with pytest.raises(UserError, match="leaves no time before it"):
        plots.desynchronization(epochs.copy().crop(0, None))


def test_online_timeline():
    times = np.arange(1, 21) / 2
    p = np.stack([np.linspace(0, 1, 20), np.linspace(1, 0, 20)], axis=1)
    commands = np.where(np.arange(20) == 15, 0, -1)
    events = pd.DataFrame({"onset": [2.0, 7.0], "duration": 2.0, "label": [1, 0]})
    axes = drawn(plots.online_timeline(Decisions(times, p, p.argmax(1), commands), events, ["left", "right"]))[0]
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), p[:, 0])
    np.testing.assert_array_equal(axes.lines[1].get_xdata(), [8.0])
    assert len(axes.lines[3].get_xdata()) == 0
    assert len(axes.patches) == 2
    part = drawn(plots.online_timeline(Decisions(times, p, p.argmax(1), commands), events, ["a", "b"], start=5.0))[0]
    assert len(part.patches) == 1
    assert part.get_xlim() == (5, 10)
    assert not [c for c in part.collections if isinstance(c, PathCollection)]
