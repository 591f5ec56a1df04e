"""Decisions from a stream: windows, smoothing rules, abstention."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from nearfar.core.errors import UserError
from nearfar.eeg import metrics
from nearfar.eeg.live.steps import Step


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
