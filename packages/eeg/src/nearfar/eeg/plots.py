"""Pictures of results and of what decoders use. Each function returns a `matplotlib.figure.Figure` of its own.

None uses pyplot, so any number can be made without a display; colours can be told apart by colour-blind people.
"""

from collections.abc import Sequence

import mne
import numpy as np
import pandas as pd
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from nearfar.core.errors import UserError
from nearfar.core.plots import COLORS, new_figure, style
from nearfar.eeg import metrics
from nearfar.eeg.live.stream import Decisions

MARKERS = "osD^vP*X"


def subject_accuracies(rows: pd.DataFrame, level: float = 0.95) -> Figure:
    """Accuracy of each model for each subject, with intervals and the chance bound.

    The bars are Wilson intervals for the subject's number of test trials; the accuracy is the mean over sessions and
    repeats. The grey line is chance, the dashes above it the accuracy from which a subject is above chance at 95 %.
    A hollow mark is a failed fit, which counts as chance.

    Args:
        rows: `Results.rows`.
    """
    subjects, models = list(dict.fromkeys(rows["subject"])), list(dict.fromkeys(rows["model"]))
    with style():
        figure = new_figure(min(max(6.0, 1.5 + 0.22 * len(subjects) * len(models)), 24.0), 4.5)
        axes = figure.subplots()
        width = 0.8 / len(models)
        axes.axhline(rows["chance"].iloc[0], color="0.5", linewidth=1, label="chance")
        for index, model in enumerate(models):
            color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
            label: str | None = model
            for place, subject in enumerate(subjects):
                own = rows[(rows["model"] == model) & (rows["subject"] == subject)]
                share, failed = own["accuracy"].mean(), bool((own["failure"] != "").any())
                trials = int(own.drop_duplicates("session")["n_test"].sum())
                x = place + (index - (len(models) - 1) / 2) * width
                low, high = metrics.proportion_interval(share, trials, level) if trials else (share, share)
                axes.errorbar(
                    x,
                    share,
                    [[max(0.0, share - low)], [max(0.0, high - share)]],
                    color=color,
                    marker=marker,
                    markersize=5,
                    markerfacecolor="white" if failed else color,
                    linewidth=1,
                    label=label,
                )
                label = None
        for place, subject in enumerate(subjects):
            own = rows[(rows["subject"] == subject) & (rows["model"] == models[0])].drop_duplicates("session")
            if own["n_test"].sum():
                bound = metrics.chance_bound(int(own["n_test"].sum()), 2, chance=own["chance"].mean())
                name = "chance bound (95 %)" if place == 0 else ""
                axes.hlines(bound, place - 0.45, place + 0.45, color="0.3", linestyle="--", linewidth=1, label=name)
        axes.set_xticks(range(len(subjects)), [str(subject) for subject in subjects])
        if len(subjects) > 30:
            axes.tick_params("x", labelrotation=90, labelsize=7)
        axes.set(xlabel="subject", ylabel="accuracy", ylim=(0, 1.02), title=" / ".join(rows["protocol"].unique()))
        axes.grid(axis="x", visible=False)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def confusion(matrix: np.ndarray, classes: Sequence[str], title: str = "") -> Figure:
    """A confusion matrix (see `nearfar.eeg.metrics.confusion_matrix`): shares of each true class, and counts.

    The last column, trials without a decision, is shown only if there are any.
    """
    matrix = np.asarray(matrix)
    names = [*classes, "no decision"]
    if matrix.shape != (len(classes), len(classes) + 1):
        raise ValueError(
            f"need ({len(classes)}, {len(classes) + 1}) counts for {len(classes)} classes, got {matrix.shape}"
        )
    if not matrix[:, -1].any():
        matrix, names = matrix[:, :-1], names[:-1]
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    with style():
        figure = new_figure(2.2 + 0.9 * len(names), 1.6 + 0.8 * len(classes))
        axes = figure.subplots()
        image = axes.imshow(shares, vmin=0, vmax=1, cmap="cividis")
        for (row, column), share in np.ndenumerate(shares):
            color = "black" if share > 0.55 else "white"
            text = f"{share:.0%}\n{matrix[row, column]}"
            axes.text(column, row, text, ha="center", va="center", color=color, fontsize=9)
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
        axes.set_yticks(range(len(classes)), classes)
        axes.set(xlabel="predicted", ylabel="true", title=title)
        axes.grid(visible=False)
        figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    return figure


def training_curves(history: pd.DataFrame) -> Figure:
    """Loss and accuracy over the epochs, of one or several fits (thin lines) with their mean (thick).

    Args:
        history: one row per epoch with `epoch` and any of `train_loss, val_loss, train_accuracy, val_accuracy,
            test_accuracy`; fits are told apart by `model`, `held_out` and `repeat`, if there (`Results.history`).
    """
    if "epoch" not in history or history.empty:
        raise UserError("there is no training curve to draw: no network has been trained")
    fit = [column for column in ("model", "held_out", "repeat") if column in history]
    with style():
        figure = new_figure(9.0, 3.6)
        for axes, what in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
            for index, (name, side) in enumerate((("training", "train"), ("validation", "val"), ("test", "test"))):
                column = f"{side}_{what}"
                if column not in history or history[column].isna().all():
                    continue
                curves = [own for _, own in history.groupby(fit)] if fit else [history]
                for own in curves if len(curves) > 1 else []:
                    axes.plot(own["epoch"], own[column], color=COLORS[index], linewidth=0.6, alpha=0.3)
                mean = history.groupby("epoch")[column].mean()
                axes.plot(mean.index, mean, color=COLORS[index], linestyle=("-", "--", ":")[index], label=name)
            axes.set(xlabel="epoch", ylabel=what)
            if axes.lines:
                axes.legend(frameon=False)
    return figure


def topographic_maps(weights: np.ndarray, info: mne.Info, titles: Sequence[str] = (), label: str = "weight") -> Figure:
    """Maps of weights or patterns over the head.

    Args:
        weights: (maps, channels) or (channels,).
        info: the channels, in the weights' order, with positions.
        titles: of each map.
        label: of the colour bar.

    Raises:
        UserError: channels without a position.
    """
    weights = np.atleast_2d(weights)
    if weights.shape[1] != len(info["ch_names"]):
        raise ValueError(f"{weights.shape[1]} weights for {len(info['ch_names'])} channels")
    if len(weights) == 0:
        raise ValueError("there are no weights to draw")
    nowhere = [c["ch_name"] for c in info["chs"] if not np.isfinite(c["loc"][:3]).all() or not c["loc"][:3].any()]
    if nowhere:
        raise UserError(f"no position for the channels {', '.join(nowhere)}; set a montage before drawing maps")
    columns = min(len(weights), 6)
    lines = -(-len(weights) // columns)
    limit = float(np.abs(weights).max()) or 1.0
    with style():
        figure = new_figure(1.2 + 1.9 * columns, 0.5 + 2.1 * lines)
        grid = figure.subplots(lines, columns, squeeze=False)
        for axes in grid.flat[len(weights) :]:
            axes.set_axis_off()
        for index, axes in enumerate(grid.flat[: len(weights)]):
            image, _ = mne.viz.plot_topomap(
                weights[index], info, axes=axes, show=False, cmap="RdBu_r", vlim=(-limit, limit), contours=0
            )
            axes.set_title(titles[index] if index < len(titles) else "", fontsize=9)
        figure.colorbar(image, ax=grid, label=label, shrink=0.7)
    return figure


def desynchronization(
    epochs: mne.BaseEpochs,
    channels: Sequence[str] = ("C3", "C4"),
    baseline: tuple[float, float] | None = None,
    frequencies: np.ndarray | None = None,
) -> Figure:
    """Change of power with time and frequency after the cue, in percent of the time before it, per class and channel.

    100 (P - P_0) / P_0, where P is the mean power over the trials of a class (Morlet wavelets of f / 2 cycles) and P_0
    its mean over `baseline`. Blue is desynchronization. A quarter of a second at both ends, where wavelets leave the
    trial, is not shown.

    Args:
        baseline: seconds; from the start of the trials to the cue by default.
        frequencies: Hz; 4 to 36 by default, as far as the sampling rate goes.

    Raises:
        UserError: a channel is missing, or the trials do not begin at least half a second before the cue.
    """
    missing = [name for name in channels if name not in epochs.ch_names]
    if missing:
        raise UserError(f"no channel {', '.join(missing)} to draw; the recording has {', '.join(epochs.ch_names)}")
    edge, times, sfreq = 0.25, epochs.times, epochs.info["sfreq"]
    if baseline is None:
        baseline = (times[0] + edge, 0.0)
    within = (times >= max(baseline[0], times[0] + edge)) & (times <= baseline[1])
    if within.sum() < 0.2 * sfreq:
        raise UserError(
            f"the trials begin {times[0]:g} s from the cue, which leaves no time before it to compare with; "
            "cut them from at least 0.5 s before the cue"
        )
    if frequencies is None:
        frequencies = np.arange(4.0, min(36.0, 0.45 * sfreq) + 1e-9, 1.0)
    shown = (times >= times[0] + edge) & (times <= times[-1] - edge)
    classes = [name for name in epochs.event_id if len(epochs[name])]
    maps = np.empty((len(classes), len(channels), len(frequencies), int(shown.sum())))
    for index, name in enumerate(classes):
        power = mne.time_frequency.tfr_array_morlet(
            epochs[name].get_data(picks=list(channels)),
            sfreq,
            frequencies,
            n_cycles=frequencies / 2,
            output="avg_power",
            verbose="ERROR",
        )
        reference = power[..., within].mean(-1, keepdims=True)
        maps[index] = (100 * (power - reference) / reference)[..., shown]
    limit = min(100.0, float(np.abs(maps).max()))
    with style():
        figure = new_figure(1.5 + 3.6 * len(channels), 0.8 + 2.4 * len(classes))
        grid = figure.subplots(len(classes), len(channels), squeeze=False, sharex=True, sharey=True)
        for (row, column), axes in np.ndenumerate(grid):
            image = axes.pcolormesh(
                times[shown], frequencies, maps[row, column], cmap="RdBu_r", vmin=-limit, vmax=limit, rasterized=True
            )
            axes.axvline(0, color="black", linewidth=1, linestyle="--")
            axes.grid(visible=False)
            axes.set_title(f"{channels[column]}, {classes[row]}", fontsize=10)
        for axes in grid[-1]:
            axes.set_xlabel("seconds from the cue")
        for axes in grid[:, 0]:
            axes.set_ylabel("Hz")
        figure.colorbar(image, ax=grid, label="power against the time before the cue (%)")
    return figure


def online_timeline(
    decisions: Decisions, events: pd.DataFrame, classes: Sequence[str], start: float = 0.0, stop: float | None = None
) -> Figure:
    """Probabilities along a recording, the events (shaded) and the commands (marks), each class in its colour.

    Args:
        decisions: from `nearfar.eeg.live.stream`.
        events: `onset`, `duration`, `label` (class index), as `pseudo_online` gives them.
        classes: names of the classes.
        start, stop: part to show, in seconds; all by default.
    """
    stop = float(decisions.times[-1]) if stop is None else stop
    with style():
        figure = new_figure(10.0, 3.6)
        axes = figure.subplots()
        for onset, duration, label in events[["onset", "duration", "label"]].itertuples(index=False):
            if onset < stop and onset + duration > start:
                axes.axvspan(
                    onset, onset + duration, color=to_rgba(COLORS[int(label) % len(COLORS)], 0.15), linewidth=0
                )
        for index, name in enumerate(classes):
            color, line = COLORS[index % len(COLORS)], ("-", "--", ":", "-.")[index % 4]
            axes.plot(decisions.times, decisions.probabilities[:, index], line, color=color, linewidth=1, label=name)
            given = decisions.commands == index
            marker = MARKERS[index % len(MARKERS)]
            axes.plot(decisions.times[given], np.full(given.sum(), 1.05), marker, color=color, markersize=7)
        axes.set(xlim=(start, stop), ylim=(0, 1.1), xlabel="seconds", ylabel="probability")
        axes.set_title("shaded: events; marks above: commands", fontsize=9)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure
