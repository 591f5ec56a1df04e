"""Decoding all along a recording, as a live stream would be: windows, causal preprocessing, commands and their scores.

`decode` takes a whole recording at once, `StreamDecoder` takes it chunk by chunk as it arrives; both give the same
windows to the sample, hence the same commands. A decision uses samples up to the end of its window and none later,
provided that what was done before (a zero-phase filter is not) kept to that as well.

Preprocessing steps have one method, `push(chunk)`: (channels, times) in, (channels, times) out, the state carried on.
Here are filters, decimation and the average reference; `nearfar.eeg.alignment.ExponentialMovingStandardizer` (causal
with `init_block_size=None`) is another.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import mne
import numpy as np
import pandas as pd
from numpy.lib.stride_tricks import sliding_window_view
from scipy import signal

from nearfar.core.errors import UserError
from nearfar.eeg import metrics
from nearfar.eeg.preprocessing import annotations, source_name


class Step(Protocol):
    """A causal preprocessing step."""

    def push(self, chunk: np.ndarray) -> np.ndarray:
        """Take the next samples (channels, times), at least one, and give what has become of them, maybe none."""
        ...


class CausalFilter:
    """An IIR filter of second-order sections whose state goes on from chunk to chunk, for any number of channels.

    It starts as if the first sample had been there for ever, so that a constant offset makes no transient.
    """

    def __init__(self, sos: np.ndarray) -> None:
        self.sos = np.asarray(sos, float)
        self._state: np.ndarray | None = None  # (sections, channels, 2)

    @classmethod
    def band(cls, sfreq: float, low: float | None, high: float | None, order: int = 4) -> Self:
        """Butterworth band-pass from `low` to `high` Hz; None leaves that side open (a high- or low-pass)."""
        edges = [edge for edge in (low, high) if edge is not None]
        if not edges or not 0 < edges[0] <= edges[-1] < sfreq / 2 or (len(edges) == 2 and low == high):
            raise ValueError(f"need 0 < low < high < {sfreq / 2:g} Hz, at least one of them, got {low} and {high}")
        kind = "bandpass" if len(edges) == 2 else "highpass" if high is None else "lowpass"
        wanted = edges if len(edges) == 2 else edges[0]
        return cls(signal.butter(order, wanted, kind, fs=sfreq, output="sos"))

    def push(self, chunk: np.ndarray) -> np.ndarray:
        """The filtered samples, as many as came."""
        if self._state is None:
            self._state = signal.sosfilt_zi(self.sos)[:, None, :] * chunk[None, :, :1]
        filtered, self._state = signal.sosfilt(self.sos, chunk, axis=1, zi=self._state)
        return filtered


class CausalDecimator:
    """Every `factor`-th sample from the first, after a Chebyshev low-pass of order 8 to 0.8 of the new Nyquist rate."""

    def __init__(self, factor: int) -> None:
        if factor < 1:
            raise ValueError(f"factor must be a positive integer, got {factor}")
        self.factor = factor
        self._filter = CausalFilter(signal.cheby1(8, 0.05, 0.8 / factor, output="sos")) if factor > 1 else None
        self._skip = 0

    def push(self, chunk: np.ndarray) -> np.ndarray:
        """The samples that are kept."""
        filtered = chunk if self._filter is None else self._filter.push(chunk)
        kept = filtered[:, self._skip :: self.factor]
        self._skip = (self._skip - chunk.shape[1]) % self.factor
        return kept


class AverageReference:
    """Subtracts the mean over channels from every sample."""

    def push(self, chunk: np.ndarray) -> np.ndarray:
        """The referenced samples; channels are added one after the other, so that chunks do not alter the rounding."""
        return chunk - np.cumsum(chunk, axis=0)[-1:] / len(chunk)


@dataclass(frozen=True)
class Rule:
    """From the windows' probabilities to decisions and commands.

    Args:
        threshold: a window decides for its most probable class only if that has at least this probability.
        smoothing: probabilities are averaged over so many windows, the present and those before.
        dwell: so many decisions in a row for one class make a command, once, until the row is broken.
        refractory: seconds after a command in which no other is given.
        idle: the class that means to do nothing, if the decoder has one; deciding for it is no decision.
    """

    threshold: float = 0.0
    smoothing: int = 1
    dwell: int = 1
    refractory: float = 0.0
    idle: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must be in [0, 1], got {self.threshold}")
        if self.smoothing < 1 or self.dwell < 1:
            raise ValueError(f"smoothing and dwell must be at least 1, got {self.smoothing} and {self.dwell}")
        if self.refractory < 0:
            raise ValueError(f"refractory must not be negative, got {self.refractory}")

    @property
    def memory(self) -> int:
        """Windows before the present one that a command depends on, besides the time of the last command."""
        return self.smoothing + self.dwell - 1

    def apply(
        self, probabilities: np.ndarray, times: np.ndarray, past: int = 0, last_command: float = -np.inf
    ) -> "Decisions":
        """Decisions of successive windows (n, classes) that end at `times`, in seconds.

        The first `past` windows are there for the others' sake: they have given their commands, the last one at
        `last_command`.
        """
        n, classes = probabilities.shape
        padded = np.concatenate([np.zeros((self.smoothing - 1, classes)), probabilities])
        total = np.zeros((n, classes))
        for back in range(self.smoothing):
            total += padded[self.smoothing - 1 - back : len(padded) - back]
        smooth = total / np.minimum(np.arange(1, n + 1), self.smoothing)[:, None]

        best = smooth.argmax(1)
        sure = np.isfinite(smooth).all(1) & (smooth[np.arange(n), best] >= self.threshold)
        decisions = np.where(sure & (best != (-1 if self.idle is None else self.idle)), best, metrics.NO_DECISION)

        # before the first window there was no decision, so a row cannot begin earlier
        before = np.concatenate([np.full(self.dwell, metrics.NO_DECISION), decisions])
        rows = sliding_window_view(before, self.dwell)  # rows[i] are the decisions before window i
        held = np.where((rows == rows[:, -1:]).all(1), rows[:, -1], metrics.NO_DECISION)
        begins = (held[1:] != metrics.NO_DECISION) & (held[1:] != held[:-1])
        commands = np.full(n, metrics.NO_DECISION)
        for window in past + np.flatnonzero(begins[past:]):
            if times[window] - last_command >= self.refractory:
                commands[window], last_command = held[window + 1], times[window]
        return Decisions(times, smooth, decisions, commands)


@dataclass(frozen=True)
class Decisions:
    """What a decoder made of successive windows.

    Attributes:
        times: end of each window, seconds from the recording's start.
        probabilities: (windows, classes), smoothed.
        decisions: class of each window, or -1.
        commands: class of the command that is given at the end of the window, or -1.
    """

    times: np.ndarray
    probabilities: np.ndarray
    decisions: np.ndarray
    commands: np.ndarray

    def __len__(self) -> int:
        return len(self.times)

    def __getitem__(self, part: slice) -> "Decisions":
        return Decisions(*(values[part] for values in vars(self).values()))


def windows(data: np.ndarray, n_times: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """All windows of `n_times` samples of data (channels, times), `step` samples apart.

    Returns:
        The first sample of each, and the windows (n, channels, n_times) as a view that takes no memory.
    """
    if n_times < 1 or step < 1:
        raise ValueError(f"n_times and step must be at least 1, got {n_times} and {step}")
    if data.shape[1] < n_times:
        return np.zeros(0, int), np.zeros((0, len(data), n_times), data.dtype)
    view = sliding_window_view(data, n_times, axis=1)[:, ::step].swapaxes(0, 1)
    return np.arange(len(view)) * step, view


def decode(
    estimator: Any,
    data: np.ndarray,
    n_times: int,
    step: int,
    sfreq: float,
    *,
    steps: Sequence[Step] = (),
    rule: Rule = Rule(),
    batch_size: int = 256,
) -> Decisions:
    """Decode a whole recording, window after window.

    Args:
        estimator: anything with `predict_proba(X)`, X (windows, channels, n_times) in float32.
        data: (channels, times) in microvolts.
        n_times, step: samples of a window, and from one to the next, after the preprocessing.
        sfreq: sampling rate after the preprocessing, Hz.
        steps: causal preprocessing, in order; copies are used, so fresh ones stay fresh.
        rule: from probabilities to commands.
        batch_size: windows that are decoded at a time.
    """
    data = _finite(data)
    for one in copy.deepcopy(list(steps)):
        data = one.push(data) if data.shape[1] else data
    starts, view = windows(data, n_times, step)
    parts = [_predict(estimator, view[at : at + batch_size]) for at in range(0, len(view), batch_size)]
    if not parts:
        raise UserError(f"the recording has {data.shape[1]} samples, the decoder's window needs {n_times}")
    return rule.apply(np.concatenate(parts), (starts + n_times) / sfreq)


class StreamDecoder:
    """Decodes a stream as it arrives. Memory holds one window, whatever the length of the stream.

    The arguments are those of `decode`. A decision comes with the push that completes its window.
    """

    def __init__(
        self,
        estimator: Any,
        n_times: int,
        step: int,
        sfreq: float,
        *,
        steps: Sequence[Step] = (),
        rule: Rule = Rule(),
    ) -> None:
        if n_times < 1 or step < 1:
            raise ValueError(f"n_times and step must be at least 1, got {n_times} and {step}")
        self.estimator, self.n_times, self.step, self.sfreq, self.rule = estimator, n_times, step, sfreq, rule
        self._steps = copy.deepcopy(list(steps))
        self._channels: int | None = None
        self._buffer: np.ndarray | None = None  # from the start of the next window on
        self._gap = 0  # samples that may still be dropped, where `step` is longer than a window
        self._start = 0  # number of the buffer's first sample in the stream
        self._recent: np.ndarray | None = None  # probabilities that the rule still needs
        self._last_command = -np.inf

    def push(self, chunk: np.ndarray) -> Decisions:
        """Take the next samples (channels, times), any number, in microvolts; give the decisions that they complete.

        Raises `UserError` for samples that are not finite, or for another number of channels than before; the state
        then is as if the chunk had not come.
        """
        chunk = _finite(chunk)
        if self._channels not in (None, len(chunk)):
            raise UserError(f"the stream had {self._channels} channels, the new chunk has {len(chunk)}")
        self._channels = len(chunk)
        for one in self._steps:
            chunk = one.push(chunk) if chunk.shape[1] else chunk
        dropped = min(self._gap, chunk.shape[1])
        self._gap -= dropped
        chunk = chunk[:, dropped:]
        buffer = chunk if self._buffer is None else np.concatenate([self._buffer, chunk], axis=1)
        starts, view = windows(buffer, self.n_times, self.step)
        new = _predict(self.estimator, view) if len(view) else None
        times = (self._start + starts + self.n_times) / self.sfreq
        used = len(view) * self.step
        self._gap += max(0, used - buffer.shape[1])
        self._start += used
        self._buffer = buffer[:, used:].copy()
        return self._decide(new, times)

    def _decide(self, new: np.ndarray | None, times: np.ndarray) -> Decisions:
        if new is None:
            classes = 0 if self._recent is None else self._recent.shape[1]
            none = np.zeros(0, int)
            return Decisions(np.zeros(0), np.zeros((0, classes)), none, none)
        recent = new[:0] if self._recent is None else self._recent
        past = len(recent)
        both, ends = np.concatenate([recent, new]), np.concatenate([np.zeros(past), times])
        decided = self.rule.apply(both, ends, past, self._last_command)[past:]
        given = decided.times[decided.commands != metrics.NO_DECISION]
        self._last_command = given[-1] if len(given) else self._last_command
        self._recent = both[-self.rule.memory :]
        return decided


def stream_error(
    estimator: Any,
    data: np.ndarray,
    n_times: int,
    step: int,
    sfreq: float,
    *,
    steps: Sequence[Step] = (),
    rule: Rule = Rule(),
    seed: int = 0,
) -> float:
    """Largest difference of a probability between `decode` and `StreamDecoder` on chunks of random size.

    The windows are the same to the last bit; what may differ is the rounding of a network for another batch size, and
    a decision only where two classes are that close. Infinite if the windows' times differ. `seed` draws the sizes.
    """
    whole = decode(estimator, data, n_times, step, sfreq, steps=steps, rule=rule)
    stream = StreamDecoder(estimator, n_times, step, sfreq, steps=steps, rule=rule)
    cuts = np.cumsum(np.random.default_rng(seed).integers(1, max(2, n_times // 2), size=data.shape[1]))
    parts = [stream.push(chunk) for chunk in np.split(data, cuts[cuts < data.shape[1]], axis=1)]
    parts = [part for part in parts if len(part)]
    if not np.array_equal(np.concatenate([np.zeros(0), *(part.times for part in parts)]), whole.times):
        return float("inf")
    return float(np.abs(np.concatenate([part.probabilities for part in parts]) - whole.probabilities).max())


def score_events(
    decisions: Decisions,
    onsets: np.ndarray,
    labels: np.ndarray,
    *,
    duration: float,
    total: float,
    n_classes: int,
) -> dict[str, float]:
    """Commands against events that begin at `onsets` and last `duration` seconds (or until the next begins).

    The first command within an event answers it: a hit if its class is the event's. A command outside all events is a
    false activation. Windows that begin before an event and end within it count for the event.

    Args:
        onsets, labels: in seconds, ascending; class indices.
        total: length of the recording in seconds.
        n_classes: number of commands to choose from.

    Returns:
        `events, hits, wrong, missed, repeats` (further commands within an event), `false` (activations),
        `false_per_minute` (of the time outside events), `hit_rate` (hits per event: a missed one counts as not hit),
        `latency` (median seconds from onset to hit, NaN without any), and `bits_per_minute`: Wolpaw's information of a
        selection, its accuracy being hits / (hits + wrong + false), times such selections per minute of `total`.
    """
    onsets, labels = np.asarray(onsets, float), np.asarray(labels, int)
    if len(onsets) != len(labels) or (np.diff(onsets) <= 0).any():
        raise ValueError("onsets must ascend and have one label each")
    given = decisions.commands != metrics.NO_DECISION
    times, commands = decisions.times[given], decisions.commands[given]
    event = np.searchsorted(onsets, times) - 1
    inside = (event >= 0) & (times <= onsets[np.maximum(event, 0)] + duration) if len(onsets) else event >= 0
    answered, first = np.unique(event[inside], return_index=True)
    right = commands[inside][first] == labels[answered]
    hits, wrong, false = int(right.sum()), int((~right).sum()), int((~inside).sum())
    lengths = np.minimum(duration, np.diff(np.append(onsets, total)))
    idle_minutes = float(total - lengths.sum()) / 60
    selections = hits + wrong + false
    latencies = (times[inside][first] - onsets[answered])[right]
    bits = metrics.bits_per_selection(hits / selections, n_classes) if selections else 0.0
    return {
        "events": len(onsets),
        "hits": hits,
        "wrong": wrong,
        "missed": len(onsets) - hits - wrong,
        "repeats": int(inside.sum()) - hits - wrong,
        "false": false,
        "false_per_minute": false / idle_minutes if idle_minutes > 0 else float("nan"),
        "hit_rate": hits / len(onsets) if len(onsets) else float("nan"),
        "latency": float(np.median(latencies)) if hits else float("nan"),
        "bits_per_minute": bits * selections / (total / 60),
    }


def pseudo_online(
    estimator: Any,
    raw: mne.io.BaseRaw,
    events: Mapping[str, int],
    n_times: int,
    step: int,
    *,
    duration: float,
    n_classes: int,
    steps: Sequence[Step] = (),
    sfreq: float | None = None,
    rule: Rule = Rule(),
) -> tuple[Decisions, dict[str, float], pd.DataFrame]:
    """Decode a recording as if it came live, and score the commands by its events.

    Args:
        raw: its EEG channels, in their order, are what the estimator was trained on.
        events: annotation name -> class index.
        duration: seconds from its onset within which an event can be answered.
        n_classes: number of commands to choose from.
        sfreq: rate after `steps`, if they change it.

    Returns:
        The decisions, the scores (see `score_events`) and the events: `onset`, `duration`, `label`.

    Raises:
        UserError: none of the events is in the recording.
    """
    onsets, _, names = annotations(raw)
    chosen = np.isin(names, list(events))
    if not chosen.any():
        found = ", ".join(sorted(set(names))) or "no events at all"
        raise UserError(f"{source_name(raw)}: none of the events {', '.join(events)}; it has {found}")
    labels = np.array([events[name] for name in names[chosen]])
    table = pd.DataFrame({"onset": onsets[chosen], "duration": duration, "label": labels}).sort_values("onset")
    data = raw.get_data("eeg", verbose="ERROR") * 1e6
    rate = raw.info["sfreq"]
    decisions = decode(estimator, data, n_times, step, sfreq or rate, steps=steps, rule=rule)
    scores = score_events(
        decisions,
        table["onset"].to_numpy(),
        table["label"].to_numpy(),
        duration=duration,
        total=data.shape[1] / rate,
        n_classes=n_classes,
    )
    return decisions, scores, table.reset_index(drop=True)


def _predict(estimator: Any, view: np.ndarray) -> np.ndarray:
    return np.asarray(estimator.predict_proba(np.ascontiguousarray(view, dtype=np.float32)), float)


def _finite(data: np.ndarray) -> np.ndarray:
    data = np.asarray(data, float)
    if data.ndim != 2:
        raise ValueError(f"samples must have the shape (channels, times), not {data.shape}")
    bad = np.flatnonzero(~np.isfinite(data).all(1))
    if len(bad):
        raise UserError(
            f"channel {bad[0] + 1} of {len(data)} has samples that are not finite; fill gaps before decoding"
        )
    return data
