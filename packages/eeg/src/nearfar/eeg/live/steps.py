"""Causal preprocessing steps that keep their state between blocks of samples."""

from collections.abc import Sequence
from typing import Protocol, Self

import numpy as np
from scipy import signal


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

    @classmethod
    def notch(cls, sfreq: float, line: float, quality: float = 30.0) -> Self:
        """Notches at the mains frequency `line` and its harmonics below half of `sfreq`, in Hz."""
        lines = np.arange(line, sfreq / 2, line)
        if not len(lines):
            raise ValueError(f"a notch at {line:g} Hz needs more than {2 * line:g} Hz, got {sfreq:g}")
        return cls(np.concatenate([signal.tf2sos(*signal.iirnotch(each, quality, sfreq)) for each in lines]))

    def push(self, chunk: np.ndarray) -> np.ndarray:
        """The filtered samples, as many as came."""
        if self._state is None:
            self._state = signal.sosfilt_zi(self.sos)[:, None, :] * chunk[None, :, :1]
        filtered, self._state = signal.sosfilt(self.sos, chunk, axis=1, zi=self._state)
        return filtered


class CausalDecimator:
    """Every `factor`-th sample, after a Chebyshev low-pass of order 8 to 0.8 of the new Nyquist rate.

    `first` is the number of the first sample that comes; those whose number is a multiple of `factor` are kept.
    """

    def __init__(self, factor: int, first: int = 0) -> None:
        if factor < 1:
            raise ValueError(f"factor must be a positive integer, got {factor}")
        self.factor = factor
        self._filter = CausalFilter(signal.cheby1(8, 0.05, 0.8 / factor, output="sos")) if factor > 1 else None
        self._skip = -first % factor

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


class ChannelReference:
    """Subtracts the mean of the channels in the rows `reference` from every sample, and drops these."""

    def __init__(self, reference: Sequence[int]) -> None:
        self.reference = list(reference)

    def push(self, chunk: np.ndarray) -> np.ndarray:
        """The other channels, referenced."""
        mean = np.cumsum(chunk[self.reference], axis=0)[-1:] / len(self.reference)
        return np.delete(chunk, self.reference, axis=0) - mean
