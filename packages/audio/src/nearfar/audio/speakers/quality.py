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

    seconds: its length. speech: seconds that are clearly louder than its quiet parts. snr: level of those over the
    quiet parts, in dB, at most 60. clipped: share of samples at full scale. bandwidth: Hz up to which it has energy.
    """

    seconds: float
    speech: float
    snr: float
    clipped: float
    bandwidth: float


def measure_quality(samples: Samples, rate: int) -> Quality:
    """Judge samples by their levels: frames of 25 ms every 10 ms, split at the middle between quiet and loud.

    The quiet level is the 5th percentile of the frames' levels (at least -90 dB of full scale), the loud one the 95th.
    Where they are less than 6 dB apart (a hum, steady noise) nothing counts as speech. The bandwidth is the highest
    quarter kilohertz whose mean power is within 60 dB of the strongest. These are estimates that need no model: music
    counts as speech too.
    """
    size, shift = rate // 40, rate // 100
    x = np.asarray(samples, np.float64)
    seconds, clipped = len(x) / rate, float(np.mean(np.abs(x) >= 0.999))
    if len(x) < size:
        return Quality(seconds, 0.0, 0.0, clipped, 0.0)
    frames = np.lib.stride_tricks.sliding_window_view(x, size)[::shift]
    power = np.square(frames - frames.mean(1, keepdims=True)).mean(1)
    level = 10 * np.log10(np.maximum(power, 1e-9))
    quiet, loud = np.percentile(level, [5, 95])
    is_speech = level > (quiet + loud) / 2
    if loud - quiet < 6 or loud < -70:
        return Quality(seconds, 0.0, 0.0, clipped, _bandwidth(frames, rate))
    snr = 10 * np.log10(power[is_speech].mean() / max(power[~is_speech].mean(), 1e-9))
    speech = float(is_speech.sum() * shift / rate)
    return Quality(seconds, speech, float(np.clip(snr, 0, 60)), clipped, _bandwidth(frames[is_speech], rate))


def _bandwidth(frames: NDArray[np.float64], rate: int) -> float:
    spectrum = np.abs(np.fft.rfft(frames[:: max(1, len(frames) // 500)] * np.hanning(frames.shape[1]))) ** 2
    mean, step = spectrum.mean(0), rate / frames.shape[1]
    width = max(1, round(250 / step))
    bands = np.array([mean[i : i + width].mean() for i in range(0, len(mean), width)])
    return float(min(rate / 2, (np.flatnonzero(bands >= 1e-6 * bands.max())[-1] + 1) * width * step))


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
            found.append(f"{quality.speech:.1f} s of speech in {quality.seconds:.1f} s, {self.speech:g} s are needed")
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
