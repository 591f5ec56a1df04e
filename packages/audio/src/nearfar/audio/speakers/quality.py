"""Quality of a recording of speech, and the gate that refuses what is too poor."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nearfar.audio.sound import Samples
from nearfar.core.errors import UserError


@dataclass(frozen=True)
class Quality:
    """What a recording offers a speaker model.

    seconds: its length, digital silence not counted. speech: seconds that are clearly louder than its quiet parts. snr:
    level of those over the quiet parts, in dB, at most 60. clipped: share of samples at full scale. bandwidth: Hz up to
    which it has energy. silence: seconds of digital silence that were dropped.
    """

    seconds: float
    speech: float
    snr: float
    clipped: float
    bandwidth: float
    silence: float = 0.0


class QualityMeter:
    """`measure_quality` block by block: of each frame it keeps the level, and the mean spectrum of each level in dB."""

    def __init__(self, rate: int):
        self.rate, self.size, self.shift = rate, rate // 40, rate // 100
        self.samples, self.full, self.held = 0, 0, np.empty(0)
        self.powers: list[NDArray[np.float64]] = []
        self.spectra, self.frames = np.zeros((91, self.size // 2 + 1)), np.zeros(91)
        self.window = np.hanning(self.size)

    def add(self, samples: Samples) -> None:
        for start in range(0, len(samples), 10 * self.rate):
            self._add(samples[start : start + 10 * self.rate])

    def _add(self, samples: Samples) -> None:
        self.samples += len(samples)
        self.full += int((np.abs(samples) >= 0.999).sum())
        x = np.concatenate([self.held, samples], dtype=np.float64)
        if len(x) < self.size:
            self.held = x
            return
        frames = np.lib.stride_tricks.sliding_window_view(x, self.size)[:: self.shift]
        self.held = x[len(frames) * self.shift :]
        frames = frames - frames.mean(1, keepdims=True)
        power = np.square(frames).mean(1)
        self.powers.append(power)
        level = np.clip(np.floor(_decibel(power)) + 90, 0, 90).astype(int)
        np.add.at(self.spectra, level, np.abs(np.fft.rfft(frames * self.window)) ** 2)
        np.add.at(self.frames, level, 1)

    def result(self, silence: float = 0.0) -> Quality:
        """silence: seconds of it that were dropped before."""
        seconds, clipped = self.samples / self.rate, self.full / max(self.samples, 1)
        if not self.powers:
            return Quality(seconds, 0.0, 0.0, clipped, 0.0, silence)
        power = np.concatenate(self.powers)
        level = _decibel(power)
        quiet, loud = np.percentile(level, [5, 95])
        is_speech = level > (quiet + loud) / 2
        if loud - quiet < 6 or loud < -70:
            return Quality(seconds, 0.0, 0.0, clipped, self._bandwidth(-90.0), silence)
        snr = 10 * np.log10(power[is_speech].mean() / max(power[~is_speech].mean(), 1e-9))
        speech = float(is_speech.sum() * self.shift / self.rate)
        bandwidth = self._bandwidth((quiet + loud) / 2)
        return Quality(seconds, speech, float(np.clip(snr, 0, 60)), clipped, bandwidth, silence)

    def _bandwidth(self, above: float) -> float:
        """Of the frames whose level in dB is `above` that."""
        first = int(np.floor(above)) + 90
        step = self.rate / self.size
        mean = self.spectra[first:].sum(0) / self.frames[first:].sum()
        width = max(1, round(250 / step))
        bands = np.array([mean[i : i + width].mean() for i in range(0, len(mean), width)])
        return float(min(self.rate / 2, (np.flatnonzero(bands >= 1e-6 * bands.max())[-1] + 1) * width * step))


def measure_quality(samples: Samples, rate: int) -> Quality:
    """Judge samples by their levels: frames of 25 ms every 10 ms, split at the middle between quiet and loud.

    The quiet level is the 5th percentile of the frames' levels (at least -90 dB of full scale), the loud one the 95th.
    Where they are less than 6 dB apart (a hum, steady noise) nothing counts as speech. The bandwidth is the highest
    quarter kilohertz whose mean power is within 60 dB of the strongest. These are estimates that need no model: music
    counts as speech too.
    """
    meter = QualityMeter(rate)
    meter.add(np.asarray(samples))
    return meter.result()


def _decibel(power: NDArray[np.float64]) -> NDArray[np.float64]:
    return 10 * np.log10(np.maximum(power, 1e-9))


@dataclass(frozen=True)
class Gate:
    """The least that a recording must offer; what does not pass is refused, never scored.

    speech: seconds. snr: dB. clipped: greatest share. bandwidth: Hz.
    """

    speech: float = 1.0
    snr: float = 5.0
    clipped: float = 0.02
    bandwidth: float = 3000.0

    def reasons(self, quality: Quality) -> list[str]:
        """Why a recording does not pass; empty where it does."""
        found = []
        if quality.speech < self.speech:
            silent = f" and {quality.silence:.1f} s of digital silence" if quality.silence >= 0.05 else ""
            found.append(
                f"{quality.speech:.1f} s of speech in {quality.seconds:.1f} s{silent}, {self.speech:g} s are needed"
            )
        elif quality.snr < self.snr:
            found.append(f"speech is only {quality.snr:.0f} dB above the noise, {self.snr:g} dB are needed")
        if quality.clipped > self.clipped:
            found.append(f"{quality.clipped:.1%} of its samples are clipped, {self.clipped:.0%} are allowed")
        if quality.speech and quality.bandwidth < self.bandwidth:
            found.append(f"has sound up to {quality.bandwidth:.0f} Hz only, {self.bandwidth:.0f} Hz are needed")
        return found

    def check(self, path: str | Path, quality: Quality) -> None:
        """Raise UserError with the reasons, where there are any."""
        if reasons := self.reasons(quality):
            raise UserError(f"{path}: refused by the quality gate: {'; '.join(reasons)}")
