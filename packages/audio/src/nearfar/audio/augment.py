"""Augmentation of speech for training speaker models: noise, reverberation, speed."""

from pathlib import Path

import numpy as np
import torch
from scipy.signal import fftconvolve, resample_poly

from nearfar.audio.sound import SUFFIXES, Samples, read_samples
from nearfar.core.errors import UserError

SNR = {"noise": (0.0, 15.0), "music": (5.0, 15.0), "speech": (13.0, 20.0)}
"""Range of the signal-to-noise ratio in dB by the kind of noise; speech is added as babble of 3 to 7 voices."""


def change_speed(samples: Samples, speed: float) -> Samples:
    """Play `speed` times as fast by resampling: pitch and formants move too, so it counts as another speaker."""
    up, down = 100, round(100 * speed)
    if not 50 <= down <= 200:
        raise ValueError(f"speed must be between 0.5 and 2, got {speed}")
    return resample_poly(samples, up, down).astype(np.float32)


def add_noise(samples: Samples, noise: Samples, snr: float) -> Samples:
    """Add noise, repeated or cut to fit, at a signal-to-noise ratio in dB of mean powers."""
    noise = np.resize(noise, len(samples))
    power, other = float(np.mean(samples**2)), float(np.mean(noise**2))
    if other == 0:
        return samples
    return samples + noise * np.float32(np.sqrt(power / other / 10 ** (snr / 10)))


def add_reverberation(samples: Samples, response: Samples) -> Samples:
    """Convolve with a room's impulse response, keeping length, level and the time of the direct sound."""
    peak = int(np.argmax(np.abs(response)))
    wet = fftconvolve(samples, response)[peak : peak + len(samples)].astype(np.float32)
    level = float(np.sqrt(np.mean(wet**2)))
    return wet * np.float32(np.sqrt(np.mean(samples**2)) / level) if level > 0 else samples


class Augmentation:
    """With `probability` change a crop in one way, chosen evenly among what is there.

    Args:
        noise: MUSAN's folder, or any with sub-folders named noise, music or speech.
        responses: folder of room impulse responses.
        probability: that a crop is changed at all (0.6).

    All randomness comes from torch's generator, so it follows the seed of the epoch.

    Raises UserError where a folder holds no recordings.
    """

    def __init__(
        self, noise: str | Path | None = None, responses: str | Path | None = None, probability: float = 0.6
    ) -> None:
        if not 0 <= probability <= 1:
            raise ValueError(f"probability must be between 0 and 1, got {probability}")
        self.probability = probability
        self.noises: dict[str, list[Path]] = {}
        for path in _recordings(noise):
            kind = next((part for part in reversed(path.parts[:-1]) if part in SNR), "noise")
            self.noises.setdefault(kind, []).append(path)
        self.responses = _recordings(responses)
        self.kinds = [*sorted(self.noises), *(["reverberation"] if self.responses else [])]

    def __call__(self, samples: Samples, rate: int) -> Samples:
        rng = np.random.default_rng(int(torch.randint(2**62, ())))
        if not self.kinds or rng.random() >= self.probability:
            return samples
        kind = self.kinds[rng.integers(len(self.kinds))]
        if kind == "reverberation":
            path = self.responses[rng.integers(len(self.responses))]
            return add_reverberation(samples, read_samples(path, rate, mix_channels=True))
        voices = int(rng.integers(3, 8)) if kind == "speech" else 1
        noise = np.zeros(len(samples), np.float32)
        for _ in range(voices):
            path = self.noises[kind][rng.integers(len(self.noises[kind]))]
            piece = read_samples(path, rate, mix_channels=True)
            noise += np.roll(np.resize(piece, max(len(piece), len(samples))), rng.integers(len(piece)))[: len(samples)]
        return add_noise(samples, noise, float(rng.uniform(*SNR[kind])))


def _recordings(folder: str | Path | None) -> list[Path]:
    if folder is None:
        return []
    found = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in SUFFIXES)
    if not found:
        raise UserError(f"{folder}: holds no recordings to augment with")
    return found
