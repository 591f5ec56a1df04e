"""Augmentation of speech for training speaker models: noise, reverberation, speed, and what devices and lines do."""

import io
from pathlib import Path

import numpy as np
import soundfile
import torch
from scipy.signal import fftconvolve, resample_poly

from nearfar.audio.sound import SUFFIXES, Recording, Samples, read_samples, resample
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


def room_response(rate: int, rng: np.random.Generator, reverberation: float, distance: float = 0.0) -> Samples:
    """The response of a simulated room: the direct sound, then Gaussian noise that decays exponentially.

    reverberation: seconds until it has decayed by 60 dB. distance: level of what is reflected over the direct sound, in
    dB. Polack, "La transmission de l'energie sonore dans les salles" (1988).
    """
    seconds = np.arange(1, max(2, round(reverberation * rate))) / rate
    tail = rng.standard_normal(len(seconds)) * 10 ** (-3 * seconds / reverberation)
    tail *= 10 ** (distance / 20) / np.sqrt(np.square(tail).sum())
    return np.r_[1, tail].astype(np.float32)


CODECS = {
    "mu-law": ("WAV", "ULAW"),
    "A-law": ("WAV", "ALAW"),
    "GSM": ("WAV", "GSM610"),
    "ADPCM": ("WAV", "IMA_ADPCM"),
    "Vorbis": ("OGG", "VORBIS"),
    "MP3": ("MP3", "MPEG_LAYER_III"),
}
"""What `through_codec` knows, in libsndfile's words."""


def through_codec(samples: Samples, rate: int, codec: str) -> Samples:
    """Code and decode, at the rate of the samples. Raises ValueError for a codec that is none of `CODECS`."""
    if codec not in CODECS:
        raise ValueError(f"codec must be one of {', '.join(CODECS)}, got {codec!r}")
    form, subtype = CODECS[codec]
    coded = io.BytesIO()
    soundfile.write(coded, np.clip(samples, -1, 1), rate, subtype, format=form)
    coded.seek(0)
    decoded = soundfile.read(coded, dtype="float32")[0]
    return np.pad(decoded, (0, max(0, len(samples) - len(decoded))))[: len(samples)]


def apply_gain(samples: Samples, decibel: float) -> Samples:
    """Louder or softer; what leaves full scale is clipped, as a converter does."""
    return np.clip(samples * np.float32(10 ** (decibel / 20)), -1, 1)


def quantize(samples: Samples, rng: np.random.Generator, bits: int = 16) -> Samples:
    """Round to `bits` with triangular dither."""
    steps = 2.0 ** (bits - 1)
    dither = rng.random(len(samples)) - rng.random(len(samples))
    return (np.round(samples * steps + dither) / steps).astype(np.float32)


def add_white_noise(samples: Samples, rng: np.random.Generator, snr: float) -> Samples:
    """White noise at a signal-to-noise ratio in dB of mean powers."""
    return add_noise(samples, rng.standard_normal(len(samples)).astype(np.float32), snr)


def colored_noise(size: int, rng: np.random.Generator, slope: float) -> Samples:
    """Gaussian noise whose power falls as frequency to the power of `slope`: 0 is white, 1 pink, 2 brown."""
    spectrum = np.fft.rfft(rng.standard_normal(size))
    noise = np.fft.irfft(spectrum * np.maximum(np.arange(len(spectrum)), 1.0) ** (-slope / 2), size)
    return noise.astype(np.float32)


def gate(samples: Samples, below: float) -> Samples:
    """Digital silence wherever a sample is more than `below` dB under the peak."""
    level = np.abs(samples)
    return np.where(level < level.max(initial=0.0) * 10 ** (-below / 20), 0, samples).astype(np.float32)


def lose_packets(samples: Samples, rate: int, rng: np.random.Generator, share: float) -> Samples:
    """Digital silence for a `share` of the packets of 20 ms."""
    size = rate // 50
    lost = np.repeat(rng.random(len(samples) // size + 1) < share, size)[: len(samples)]
    return np.where(lost, 0, samples).astype(np.float32)


def narrow(samples: Samples, rate: int, to: int) -> Samples:
    """Through a lower rate and back: what lies above half of it is lost."""
    return resample(resample(samples, rate, to), to, rate, len(samples))


def _narrower(samples: Samples, rate: int, rng: np.random.Generator) -> Samples:
    """Through 0.7 to 0.95 of the rate; of a rate above telephone's 8 kHz every second time through that."""
    if rate > 8000 and rng.random() < 0.5:
        return narrow(samples, rate, 8000)
    return narrow(samples, rate, round(rate * rng.uniform(0.7, 0.95) / 100) * 100)


def degrade(samples: Samples, rate: int, rng: np.random.Generator, surroundings: bool = False) -> Samples:
    """What a device or a line may do to speech: one thing drawn evenly, at a gain of -30 to +6 dB.

    It is a codec, white noise at 10 to 40 dB, a gate, lost packets, a narrow band, or dither. With `surroundings` a
    shorter stretch, repeated (one time in three), a simulated room (one in four), white to brown noise, rather white
    (every second time, at 5 to 35 dB), and a narrow band (two times in five) come first; a codec is then twice as
    likely, and white noise and a narrow band are not drawn again.
    """
    kinds = ["codec", "noise", "gate", "packets", "narrow", "dither"]
    if surroundings:
        kinds = ["codec", "codec", "gate", "packets", "dither", "nothing"]
        if rng.random() < 1 / 3:
            size = max(1, round(len(samples) * rng.uniform(0.35, 0.9)))
            start = int(rng.integers(0, len(samples) - size + 1))
            samples = np.resize(samples[start : start + size], len(samples))
        if rng.random() < 0.25:
            response = room_response(rate, rng, rng.uniform(0.15, 0.7), rng.uniform(-12, 3))
            samples = add_reverberation(samples, response)
        if rng.random() < 0.5:
            noise = colored_noise(len(samples), rng, 2 * rng.random() ** 2)
            samples = add_noise(samples, noise, rng.uniform(5, 35))
        if rng.random() < 0.4:
            samples = _narrower(samples, rate, rng)
    kind = kinds[rng.integers(6)]
    if kind == "codec":
        samples = through_codec(samples, rate, str(rng.choice(list(CODECS))))
    elif kind == "noise":
        samples = add_white_noise(samples, rng, rng.uniform(10, 40))
    elif kind == "gate":
        samples = gate(samples, rng.uniform(30, 60))
    elif kind == "packets":
        samples = lose_packets(samples, rate, rng, rng.uniform(0.01, 0.1))
    elif kind == "narrow":
        samples = _narrower(samples, rate, rng)
    samples = apply_gain(samples, rng.uniform(-30, 6))
    return quantize(samples, rng) if kind == "dither" or rng.random() < 0.5 else samples


class Augmentation:
    """With `probability` change a crop in one way, chosen evenly among what is there, and then perhaps `degrade` it.

    Args:
        noise: MUSAN's folder, or any with sub-folders named noise, music or speech.
        responses: folder of room impulse responses. Of files with several channels, here and there, the first counts.
        probability: that a crop is changed at all (0.6).
        degraded: probability of `degrade`, which needs no recordings (0). surroundings: see there.

    All randomness comes from torch's generator, so it follows the seed of the epoch.

    Raises UserError where a folder holds no recordings.
    """

    def __init__(
        self,
        noise: str | Path | None = None,
        responses: str | Path | None = None,
        probability: float = 0.6,
        degraded: float = 0.0,
        surroundings: bool = False,
    ) -> None:
        for name, value in (("probability", probability), ("degraded", degraded)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {value}")
        self.probability, self.degraded, self.surroundings = probability, degraded, surroundings
        self.noises: dict[str, list[Path]] = {}
        for path in _recordings(noise):
            kind = next((part for part in reversed(path.parts[:-1]) if part in SNR), "noise")
            self.noises.setdefault(kind, []).append(path)
        self.responses = _recordings(responses)
        self.kinds = [*sorted(self.noises), *(["reverberation"] if self.responses else [])]

    def __call__(self, samples: Samples, rate: int) -> Samples:
        rng = np.random.default_rng(int(torch.randint(2**62, ())))
        if self.kinds and rng.random() < self.probability:
            samples = self._add(samples, rate, rng)
        return degrade(samples, rate, rng, self.surroundings) if rng.random() < self.degraded else samples

    def _add(self, samples: Samples, rate: int, rng: np.random.Generator) -> Samples:
        kind = self.kinds[rng.integers(len(self.kinds))]
        if kind == "reverberation":
            path = self.responses[rng.integers(len(self.responses))]
            return add_reverberation(samples, _first_channel(path, rate))
        voices = int(rng.integers(3, 8)) if kind == "speech" else 1
        noise = np.zeros(len(samples), np.float32)
        for _ in range(voices):
            path = self.noises[kind][rng.integers(len(self.noises[kind]))]
            piece = _first_channel(path, rate)
            noise += np.roll(np.resize(piece, max(len(piece), len(samples))), rng.integers(len(piece)))[: len(samples)]
        return add_noise(samples, noise, float(rng.uniform(*SNR[kind])))


def _first_channel(path: Path, rate: int) -> Samples:
    """A mean of channels would be another noise, and of responses another room."""
    with Recording(path) as recording:
        channel = 1 if recording.channels > 1 else None
    return read_samples(path, rate, channel=channel)


def _recordings(folder: str | Path | None) -> list[Path]:
    if folder is None:
        return []
    found = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in SUFFIXES)
    if not found:
        raise UserError(f"{folder}: holds no recordings to augment with")
    return found
