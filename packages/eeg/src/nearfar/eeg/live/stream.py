"""Decisions from a stream: windows, smoothing rules, abstention."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from nearfar.core.errors import UserError
from nearfar.eeg import metrics
from nearfar.eeg.alignment import carry
from nearfar.eeg.conventions import standard_name
from nearfar.eeg.live.steps import Step
from nearfar.eeg.recordings import UNITS


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
        self,
        probabilities: np.ndarray,
        times: np.ndarray,
        past: int = 0,
        last_command: float = -np.inf,
        reasons: np.ndarray | None = None,
    ) -> "Decisions":
        """Decisions of successive windows (n, classes) that end at `times`, in seconds.

        A window whose probabilities are not finite abstains, as do those that are averaged with it; `reasons` say why.

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
        told = np.full(n, "", object) if reasons is None else reasons.astype(object)
        told[(told == "") & ~np.isfinite(smooth).all(1)] = "averaged with a window that abstains"
        return Decisions(times, smooth, decisions, commands, told)


@dataclass(frozen=True)
class Decisions:
    """What a decoder made of successive windows.

    Attributes:
        times: end of each window, seconds from the recording's start.
        probabilities: (windows, classes), smoothed.
        decisions: class of each window, or -1.
        commands: class of the command that is given at the end of the window, or -1.
        reasons: why a window abstains because of its input ("C3 flat"), empty for all others.
    """

    times: np.ndarray
    probabilities: np.ndarray
    decisions: np.ndarray
    commands: np.ndarray
    reasons: np.ndarray = field(default_factory=lambda: np.zeros(0, object))

    def __post_init__(self) -> None:
        if len(self.reasons) != len(self.times):
            object.__setattr__(self, "reasons", np.full(len(self.times), "", object))

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


def faults(view: np.ndarray, names: Sequence[str] = ()) -> np.ndarray:
    """Why windows (n, channels, times) as they were recorded cannot be decoded, one text each, empty where they can.

    A channel is not finite; or flat, for a quarter of the window and 8 samples or more; or railed, a tenth of its
    samples or more at the window's highest or lowest value.
    """
    n, channels, times = view.shape
    told = np.full(n, "", object)
    finite = np.isfinite(view).all(2)
    flat, railed = np.zeros((n, channels), bool), np.zeros((n, channels), bool)
    run = max(8, -(-times // 4))
    if times >= run:
        still = view[..., 1:] == view[..., :-1]
        same = np.concatenate([np.zeros((n, channels, 1), np.int32), np.cumsum(still, axis=2, dtype=np.int32)], axis=2)
        flat = (same[..., run - 1 :] - same[..., : times - run + 1] == run - 1).any(2)
    if times >= 20:
        with np.errstate(invalid="ignore"):
            top, bottom = view.max(2, keepdims=True), view.min(2, keepdims=True)
        railed = (((view == top).mean(2) >= 0.1) | ((view == bottom).mean(2) >= 0.1)) & (top > bottom)[..., 0]
    for what, bad in (("railed", railed & finite & ~flat), ("flat", flat & finite), ("not finite", ~finite)):
        for window in np.flatnonzero(bad.any(1)):
            found = np.flatnonzero(bad[window])
            listed = ", ".join(names[c] if len(names) == channels else f"channel {c + 1}" for c in found[:3])
            told[window] = f"{listed}{', ...' if len(found) > 3 else ''} {what}"
    return told


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
    recorded: tuple[np.ndarray, float] | None = None,
) -> Decisions:
    """Decode a whole recording, window after window.

    Args:
        estimator: anything with `predict_proba(X)`, X (windows, channels, n_times) in float32.
        data: (channels, times) in microvolts.
        n_times, step: samples of a window, and from one to the next, after the preprocessing.
        sfreq: sampling rate after the preprocessing, Hz.
        steps: causal preprocessing, in order; copies are used, so fresh ones stay fresh.
        rule: from probabilities to commands.
        batch_size: windows that are decoded at a time; with 1 no rounding depends on how many come together.
        recorded: the channels as recorded and their rate, where `data` has been filtered; by them a window abstains
            (see `faults`).
    """
    stream = StreamDecoder(estimator, n_times, step, sfreq, steps=steps, rule=rule, batch_size=batch_size)
    stream.recorded = recorded
    decisions = stream.push(data)
    if not len(decisions):
        raise UserError(f"the recording has {stream.prepared} samples, the decoder's window needs {n_times}")
    return decisions


class StreamDecoder:
    """Decodes a stream as it arrives. Memory holds one window, whatever the length of the stream.

    The arguments are those of `decode`, and what the stream says of itself. A decision comes with the push that
    completes its window. A window in which a channel is flat, railed or not finite abstains (`faults`): it has no
    probabilities, and `Decisions.reasons` says why. So does one in which a channel, after the steps, swings beyond
    `gate` from lowest to highest, which `live` takes from the decoder. For the steps the last finite sample stands in
    the place of those that are not.

    Args:
        ch_names: names of the stream's channels. Those that the estimator was trained on (`estimator.ch_names`) are
            taken by name, in its order; without names the channels must be as many as it has.
        unit: of the stream's samples.
        rate: of the stream, Hz; after the steps it must be `sfreq`.

    Raises:
        UserError: a channel that the estimator needs is not there, the rates do not fit, or the first window's samples
            cannot be microvolts.
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
        batch_size: int = 256,
        ch_names: Sequence[str] | None = None,
        unit: str = "uV",
        rate: float | None = None,
    ) -> None:
        if n_times < 1 or step < 1:
            raise ValueError(f"n_times and step must be at least 1, got {n_times} and {step}")
        if unit not in UNITS:
            raise UserError(f"unit must be one of {', '.join(UNITS)}, not {unit!r}")
        self.estimator, self.n_times, self.step, self.sfreq, self.rule = estimator, n_times, step, sfreq, rule
        self.batch_size = batch_size
        self.recorded: tuple[np.ndarray, float] | None = None
        self.gate: float | None = None
        self._steps = copy.deepcopy(list(steps))
        self._factor = int(np.prod([getattr(one, "factor", 1) for one in self._steps]))
        self._scale = UNITS[unit] * 1e6
        trained = getattr(estimator, "ch_names", ch_names or ())
        self.ch_names = list(getattr(estimator, "recorded", trained) if self._steps else trained)
        self._order = None if ch_names is None else _places(list(ch_names), self.ch_names)
        self._channels = len(ch_names) if ch_names is not None else len(self.ch_names) or None
        self._check(rate)
        self.prepared = 0  # samples that came out of the steps
        self._buffer: np.ndarray | None = None  # from the start of the next window on
        self._raw: np.ndarray | None = None  # what came in for these samples
        self._raw_start = 0  # number of its first sample in the stream
        self._last: np.ndarray | None = None  # each channel's last finite sample
        self._plausible = False
        self._gap = 0  # samples that may still be dropped, where `step` is longer than a window
        self._start = 0  # number of the buffer's first sample in the stream
        self._recent: np.ndarray | None = None  # probabilities that the rule still needs
        self._last_command = -np.inf

    @classmethod
    def live(
        cls,
        decoder: Any,
        step: int,
        *,
        rate: float,
        ch_names: Sequence[str] | None = None,
        unit: str = "uV",
        rule: Rule = Rule(),
        batch_size: int = 256,
        first: int = 0,
        after: "StreamDecoder | None" = None,
    ) -> "StreamDecoder":
        """A trained `Decoder` on a stream of unfiltered samples, its preprocessing in causal steps.

        first: number of the first sample, where the stream goes on after a gap.
        after: what decoded it before the gap; a running alignment goes on from there, all else begins anew.

        Raises UserError where the preprocessing cannot be causal.
        """
        steps = decoder.preprocessing.causal_steps(rate, decoder.recorded, first)
        if after is not None:
            carry(after._steps, steps)
        made = cls(
            decoder, int(decoder.network.n_times), step, decoder.sfreq, steps=steps, rule=rule, batch_size=batch_size,
            ch_names=ch_names, unit=unit, rate=rate,
        )  # fmt: skip
        made.gate = decoder.metrics.get("gate")
        return made

    def push(self, chunk: np.ndarray) -> Decisions:
        """Take the next samples (channels, times), any number, in the stream's unit; give the decisions that they
        complete.

        Raises `UserError` for another number of channels than before, and for a first window that cannot be
        microvolts; the state then is as if the chunk had not come.
        """
        chunk = np.asarray(chunk, float)
        if chunk.ndim != 2:
            raise ValueError(f"samples must have the shape (channels, times), not {chunk.shape}")
        if self._channels not in (None, len(chunk)):
            raise UserError(f"the stream had {self._channels} channels, the new chunk has {len(chunk)}")
        chunk = chunk if self._order is None else chunk[self._order]
        chunk = chunk if self._scale == 1 else chunk * self._scale
        raw = chunk if self._raw is None else np.concatenate([self._raw, chunk], axis=1)
        self._check_unit(raw)
        self._channels = self._channels or len(chunk)
        chunk = self._held(chunk)
        for one in self._steps:
            chunk = one.push(chunk) if chunk.shape[1] else chunk
        self.prepared += chunk.shape[1]
        dropped = min(self._gap, chunk.shape[1])
        self._gap -= dropped
        chunk = chunk[:, dropped:]
        buffer = chunk if self._buffer is None else np.concatenate([self._buffer, chunk], axis=1)
        starts, view = windows(buffer, self.n_times, self.step)
        reasons = np.full(len(view), "", object)
        new: np.ndarray | None = None
        for at in range(0, len(view), self.batch_size):
            rows = np.arange(at, min(at + self.batch_size, len(view)))
            reasons[rows] = self._faults(raw, starts[rows])
            self._shut(view, rows, reasons)
            sound = rows[reasons[rows] == ""]
            if len(sound):
                given = _predict(self.estimator, view[sound])
                new = np.full((len(view), given.shape[1]), np.nan) if new is None else new
                new[sound] = given
                reasons[sound[~np.isfinite(given).all(1)]] = "the decoder's answer is not finite"
        if new is None and len(view):  # all abstain
            known = getattr(self.estimator, "classes", ())
            new = np.full((len(view), self._classes() or len(known) or 1), np.nan)
        times = (self._start + starts + self.n_times) / self.sfreq
        used = len(view) * self.step
        self._gap += max(0, used - buffer.shape[1])
        self._start += used
        self._buffer = buffer[:, used:].copy()
        passed = min(max(0, self._start * self._factor - self._raw_start), raw.shape[1])
        self._raw, self._raw_start = raw[:, passed:].copy(), self._raw_start + passed
        return self._decide(new, times, reasons)

    def _check(self, rate: float | None) -> None:
        trained = getattr(self.estimator, "sfreq", None)
        if trained is not None and abs(trained - self.sfreq) > 1e-6 * trained:
            raise UserError(f"the decoder's windows are of {trained:g} Hz, not {self.sfreq:g} Hz")
        length = getattr(getattr(self.estimator, "network", None), "n_times", self.n_times)
        if length != self.n_times:
            raise UserError(f"the decoder's windows have {length} samples, not {self.n_times}")
        if rate is not None and abs(rate / self._factor - self.sfreq) > 1e-6 * self.sfreq:
            raise UserError(
                f"the stream has {rate:g} Hz, after the steps {rate / self._factor:g} Hz; the decoder's windows are of "
                f"{self.sfreq:g} Hz: resample the stream, or train a decoder at its rate"
            )

    def _check_unit(self, raw: np.ndarray) -> None:
        """Refuse a first window whose typical deviation is not that of EEG in microvolts."""
        length = (self.n_times - 1) * self._factor + 1
        if self._plausible or length < 20 or raw.shape[1] < length:
            return
        deviations = raw[:, :length].std(1, where=np.isfinite(raw[:, :length]))
        deviations = deviations[np.isfinite(deviations) & (deviations > 0)]
        if deviations.size and not 0.05 <= (typical := float(np.median(deviations))) <= 5e3:
            raise UserError(
                f"the stream's first window varies by {typical:.2g} microvolts, which is no EEG; say the samples' unit "
                f"({', '.join(UNITS)})"
            )
        self._plausible = bool(deviations.size)

    def _held(self, chunk: np.ndarray) -> np.ndarray:
        """The chunk with each channel's last finite sample in the place of those that are not."""
        finite = np.isfinite(chunk)
        if not finite.all():
            start = np.zeros(len(chunk)) if self._last is None else self._last
            joined = np.concatenate([start[:, None], np.where(finite, chunk, 0.0)], axis=1)
            at = np.where(finite, np.arange(1, chunk.shape[1] + 1), 0)
            chunk = np.take_along_axis(joined, np.maximum.accumulate(at, axis=1), axis=1)
        if chunk.shape[1]:
            self._last = chunk[:, -1].copy()
        return chunk

    def _faults(self, raw: np.ndarray, starts: np.ndarray) -> np.ndarray:
        data, ratio, first = raw, float(self._factor), self._raw_start
        if self.recorded is not None:
            data, ratio, first = self.recorded[0], self.recorded[1] / self.sfreq, 0
        length = int((self.n_times - 1) * ratio) + 1
        begins = np.rint((self._start + starts) * ratio).astype(int) - first
        begins = np.clip(begins, 0, max(0, data.shape[1] - length))
        view = sliding_window_view(data, min(length, data.shape[1]), axis=1)[:, begins].swapaxes(0, 1)
        return faults(view, self.ch_names)

    def _shut(self, view: np.ndarray, rows: np.ndarray, reasons: np.ndarray) -> None:
        """Name the channel where a window swings beyond the gate."""
        if self.gate is None:
            return
        swings = np.ptp(view[rows], axis=2)
        for row, worst in zip(rows, swings.argmax(1)):
            if not reasons[row] and (swing := swings[row - rows[0], worst]) > self.gate:
                name = self.ch_names[worst] if self.ch_names else f"channel {worst + 1}"
                reasons[row] = f"artefact: {name} swings {swing:.3g} (gate {self.gate:.3g})"

    def _classes(self) -> int:
        return 0 if self._recent is None else self._recent.shape[1]

    def _decide(self, new: np.ndarray | None, times: np.ndarray, reasons: np.ndarray) -> Decisions:
        if new is None:
            none = np.zeros(0, int)
            return Decisions(np.zeros(0), np.zeros((0, self._classes())), none, none)
        if self._recent is not None and self._recent.shape[1] != new.shape[1]:  # all abstained until now
            self._recent = np.full((len(self._recent), new.shape[1]), np.nan)
        recent = new[:0] if self._recent is None else self._recent
        past = len(recent)
        both, ends = np.concatenate([recent, new]), np.concatenate([np.zeros(past), times])
        told = np.concatenate([np.full(past, "", object), reasons])
        decided = self.rule.apply(both, ends, past, self._last_command, told)[past:]
        given = decided.times[decided.commands != metrics.NO_DECISION]
        self._last_command = given[-1] if len(given) else self._last_command
        self._recent = both[-self.rule.memory :]
        return decided


def _predict(estimator: Any, view: np.ndarray) -> np.ndarray:
    return np.asarray(estimator.predict_proba(np.ascontiguousarray(view, dtype=np.float32)), float)


def _places(given: list[str], wanted: list[str]) -> list[int]:
    """Where each channel that is wanted stands among those of the stream, by name in any spelling."""
    names = [standard_name(name) for name in given]
    missing = [name for name in wanted if names.count(standard_name(name)) != 1]
    if missing:
        raise UserError(
            f"the stream has channel {', '.join(missing)} not exactly once; it has {', '.join(given)}; the decoder "
            f"needs {', '.join(wanted)}"
        )
    return [names.index(standard_name(name)) for name in wanted]
