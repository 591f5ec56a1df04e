"""Separate recordings of any length: window by window, one track per voice through the whole file, in flat memory.

    samples -> windows -> separator -> which output is which voice (`tracking`) -> crossfade -> tracks

`separate_recording` goes twice over a recording: first it separates every window, puts the outputs into a scratch file
and keeps a few numbers of each; then it orders all windows at once and writes the tracks. It takes any function
(n,) -> (K, n) as separator. For samples as they arrive see `nearfar.audio.separation.live`.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from math import gcd
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import nnls
from torch import nn

from nearfar.audio.separation.tracking import Embedder, VoicePrint, Window, describe, track_speakers
from nearfar.audio.sound import Samples, resample
from nearfar.core.errors import UserError
from nearfar.core.files import temporary_folder
from nearfar.core.finite import check_finite

Separator = Callable[[Samples], Samples]
"""(n,) samples of a mixture to (K, n) samples of voices, in any order."""

WINDOW, HOP = 10.0, 0.6
"""Seconds of a window, and the fraction of it by which the next one begins."""

CLIPPED, FAINT = 0.9999, 0.003
"""Level of full scale; part of the loudest window's level below which everything is silence."""

SAME_TRACK, SILENT_TRACK = 0.9, -30.0
"""Correlation from which two tracks are one signal; dB of a track below the loudest from which it is silent."""

LEAST_SECONDS = 0.1
"""Shorter recordings are refused: no voice can be told in them."""

UNSURE = 0.1
"""Confidence below which a window is reported as uncertain."""


class Source(Protocol):
    """What is separated: `Recording` and `ArraySource` are such."""

    rate: int

    @property
    def frames(self) -> int: ...

    def read(self, start: int, stop: int) -> Samples: ...


@dataclass
class ArraySource:
    """One-channel samples in memory. Raises UserError for another shape or values that are no numbers."""

    samples: Samples
    rate: int

    def __post_init__(self) -> None:
        self.samples = np.asarray(self.samples, dtype=np.float32)
        if self.samples.ndim != 1 or not len(self.samples):
            raise UserError(f"the samples have shape {self.samples.shape}; one channel (n,) with n > 0 is needed")
        if not np.isfinite(self.samples).all():
            raise UserError("the samples hold values that are no numbers (NaN or infinite)")

    @property
    def frames(self) -> int:
        return len(self.samples)

    def read(self, start: int, stop: int) -> Samples:
        return self.samples[start:stop]


def model_separator(
    model: nn.Module, device: str | torch.device = "cpu", frames_at_once: int | None = None
) -> Separator:
    """A separation model (B, T) -> (B, K, T) as a function of NumPy samples. Shorter input than a frame is padded."""
    model = model.to(device).eval()
    least = int(getattr(model, "kernel_size", 1))
    options = {} if frames_at_once is None else {"frames_at_once": frames_at_once}

    def separate(samples: Samples) -> Samples:
        padded = np.pad(samples, (0, max(0, least - len(samples))))
        with torch.inference_mode():
            voices = model(torch.from_numpy(padded)[None].to(device), **options)[0]
        return voices[:, : len(samples)].float().cpu().numpy()

    return separate


def window_ranges(total: int, window: int, hop: int, unit: int = 1) -> list[tuple[int, int]]:
    """First and last+1 sample of windows that cover `total` samples, beginning at multiples of `unit`.

    The last window ends where the recording ends and is `window` long, up to `unit - 1` samples more, or shorter where
    the recording is.
    """
    window, hop = max(window // unit, 2) * unit, max(hop // unit, 1) * unit
    if total <= window:
        return [(0, total)]
    last = (total - window) // unit * unit
    return [*((start, start + window) for start in range(0, last, hop)), (last, total)]


class Stitcher:
    """Joins overlapping windows: linear crossfades whose weights sum to 1 over the whole overlap.

    `add` takes a window's tracks (M, n) and its first sample and returns what is settled before it; `settle` gives out
    what lies before a sample at which the next window will begin; `rest` the end.
    """

    def __init__(self) -> None:
        self.tail: Samples | None = None
        self.start = 0

    def add(self, tracks: Samples, start: int) -> Samples:
        if self.tail is None:
            self.tail, self.start = tracks, start
            return tracks[:, :0]
        cut = start - self.start
        settled, old = self.tail[:, :cut], self.tail[:, cut:]
        shared = min(old.shape[1], tracks.shape[1])
        ramp = (np.arange(shared, dtype=np.float32) + 0.5) / max(shared, 1)
        joined = tracks.copy()
        joined[:, :shared] = ramp * tracks[:, :shared] + (1 - ramp) * old[:, :shared]
        self.tail, self.start = joined, start
        return settled

    def settle(self, until: int) -> Samples:
        if self.tail is None:
            raise ValueError("no window was added")
        settled, self.tail = self.tail[:, : until - self.start], self.tail[:, until - self.start :]
        self.start = until
        return settled

    def rest(self) -> Samples:
        if self.tail is None:
            raise ValueError("no window was added")
        tail, self.tail = self.tail, None
        return tail


def route(outputs: Samples, labels: NDArray[np.intp], count: int) -> Samples:
    """(K, n) outputs to (count, n) tracks; outputs with the same label are summed."""
    tracks = np.zeros((count, outputs.shape[1]), dtype=np.float32)
    np.add.at(tracks, labels, outputs)
    return tracks


def share_residual(tracks: Samples, mix: Samples) -> Samples:
    """Mixture consistency: s_k + (mix - sum s) / M, after which the tracks sum to the mixture exactly."""
    return tracks + (mix - tracks.sum(0)) / len(tracks)


@dataclass
class Report:
    """How a separation went.

    seconds, rate, speakers: of the recording and what came out. windows: number of them. model_outputs: voices that
    the model gives per window. sum_back_db: energy of the mixture over that of mixture minus sum of the tracks, in dB
    (100 and more: equal). sum_back_fitted_db: the same after multiplying each track by its `fitted_gains`, those that
    make it best: a model trained on SI-SDR leaves levels open. levels_db: root mean square of each track relative to
    the mixture's, in dB.
    correlation: greatest between two tracks, 0 to 1 (0 for one track): near 1 the model gave one signal twice.
    collapsed: two tracks are the same (`SAME_TRACK`), or one of several is silent, so a voice is lost.
    confidence: the least of all windows, 0 to 1. uncertain: times in s at which a window's order was not clear.
    clipped: part of the mixture's samples at full scale. peak: of each track.
    """

    seconds: float
    rate: int
    speakers: int
    windows: int
    model_outputs: int
    sum_back_db: float
    sum_back_fitted_db: float
    fitted_gains: list[float]
    levels_db: list[float]
    peak: list[float]
    correlation: float
    collapsed: bool
    confidence: float
    uncertain: list[float]
    clipped: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Separation:
    """Tracks that are about to be made: `count` of them; `blocks()` makes them, each time anew, and fills `report`."""

    count: int
    blocks: Callable[[], Iterator[Samples]]
    report: Report | None = None


def separate_recording(
    source: Source,
    separate: Separator,
    model_rate: int,
    scratch: str | Path,
    *,
    window: float = WINDOW,
    hop: float = HOP,
    speakers: int | None = None,
    most: int | None = None,
    embed: Embedder | None = None,
    consistency: bool = False,
    progress: Callable[[float], None] | None = None,
) -> Separation:
    """Separate a recording of any length into one track per voice, in memory that does not depend on its length.

    source: gives `rate`, `frames` and `read(start, stop)`. separate: the model, at `model_rate` Hz. scratch: an
        existing folder for the windows' outputs (float32 at model_rate: about 4 K / hop bytes per sample).
    window: seconds (at least 1; 4 and more are wise). hop: 0.5 to 0.75 of the window.
    speakers: number of voices; None: estimated, up to `most` (default: what the model gives per window).
    embed: tells voices apart that were silent in an overlap; default `VoicePrint()`.
    consistency: let the tracks sum to the mixture exactly. Levels are otherwise those that the model gives.
    progress: called with seconds of sound as they are separated.

    The outputs of `separate` are taken as they come; the order of its voices may differ from window to window.
    Returns a `Separation` whose tracks have the source's rate and length.

    Raises UserError for a silent or too short recording, ValueError for settings outside these bounds.
    """
    if window < 1:
        raise ValueError(f"window is {window} s; it must be at least 1 s")
    if not 0.5 <= hop <= 0.75:
        raise ValueError(f"hop is {hop}; it must be 0.5 to 0.75 of the window")
    embed = VoicePrint() if embed is None else embed
    rate, total = source.rate, source.frames
    if total < LEAST_SECONDS * rate:
        raise UserError(
            f"{getattr(source, 'path', 'the recording')}: {total} samples ({total / rate:.3g} s) are too few to "
            f"separate, {LEAST_SECONDS:g} s are needed"
        )
    size = round(window * rate)
    unit = rate // gcd(rate, model_rate)  # windows begin on samples of both rates
    ranges = window_ranges(total, size, round(hop * size), unit)
    windows: list[Window] = []
    scratch_file = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115 - lives as long as what blocks() needs
    shapes: list[tuple[int, ...]] = []  # of each window's outputs in the scratch file
    before: Samples | None = None
    last, done, loudest, clipped = 0, 0, 0.0, 0
    for start, stop in ranges:
        mix = source.read(start, stop)
        loudest = max(loudest, float(np.sqrt(np.mean(mix.astype(np.float64) ** 2))))
        clipped += int((np.abs(mix[done - start :]) >= CLIPPED).sum())
        outputs = run_separator(separate, resample(mix, rate, model_rate))
        shared = None
        if before is not None:
            overlap = min((done - start) * model_rate // rate, before.shape[1], outputs.shape[1])
            shared = before[:, (start - last) * model_rate // rate :][:, :overlap]
        windows.append(describe(outputs, model_rate, embed, shared, floor=max(1e-6, FAINT * loudest)))
        try:
            scratch_file.write(outputs.tobytes())
        except OSError as error:
            raise UserError(
                f"{scratch}: the windows' outputs cannot be kept there ({error}); free some space"
            ) from error
        shapes.append(outputs.shape)
        if progress is not None:
            progress((stop - done) / rate)
        before, last, done = outputs, start, stop
    if loudest == 0:
        scratch_file.close()
        raise UserError(f"{getattr(source, 'path', 'the recording')}: silent from beginning to end")
    tracks = track_speakers(windows, speakers, getattr(embed, "threshold", None), most)
    separation = Separation(tracks.count, lambda: iter(()))

    def blocks() -> Iterator[Samples]:
        stitcher, meter, done = Stitcher(), Meter(tracks.count), 0
        scratch_file.seek(0)
        for labels, (start, stop), shape in zip(tracks.labels, ranges, shapes):
            outputs = np.frombuffer(scratch_file.read(4 * shape[0] * shape[1]), np.float32).reshape(shape)
            routed = resample(route(outputs, labels, tracks.count), model_rate, rate, stop - start)
            settled = [stitcher.add(routed, start)]
            if stop == total:
                settled.append(stitcher.rest())
            for block in settled:
                if block.shape[1]:
                    mix = source.read(done, done + block.shape[1])
                    done += block.shape[1]
                    block = share_residual(block, mix) if consistency else block
                    meter.add(block, mix)
                    yield block
        separation.report = Report(
            seconds=round(total / rate, 3),
            rate=rate,
            speakers=tracks.count,
            windows=len(ranges),
            model_outputs=shapes[0][0],
            **meter.as_dict(),
            confidence=round(float(tracks.confidence.min()), 3),
            uncertain=[round(ranges[w][0] / rate, 2) for w in np.flatnonzero(tracks.confidence < UNSURE)],
            clipped=clipped / total,
        )

    separation.blocks = blocks
    return separation


def separate_samples(
    samples: Samples, rate: int, separate: Separator, model_rate: int, **options: Any
) -> tuple[Samples, Report]:
    """`separate_recording` on samples in memory: (n,) to (voices, n), with the report."""
    with temporary_folder() as scratch:
        separation = separate_recording(ArraySource(samples, rate), separate, model_rate, scratch, **options)
        tracks = np.concatenate(list(separation.blocks()), axis=1)
    assert separation.report is not None
    return tracks, separation.report


class Meter:
    """Levels of `count` tracks and how well they sum back to the mixture, gathered block by block."""

    def __init__(self, count: int):
        self.mix, self.products, self.with_mix = 0.0, np.zeros((count, count)), np.zeros(count)
        self.peak = np.zeros(count)

    def add(self, tracks: Samples, mix: Samples) -> None:
        exact, whole = tracks.astype(np.float64), mix.astype(np.float64)
        self.mix += float(whole @ whole)
        self.products += exact @ exact.T
        self.with_mix += exact @ whole
        self.peak = np.maximum(self.peak, np.abs(tracks).max(axis=1))

    def gains(self) -> NDArray[np.floating]:
        """(count,) factors with which the tracks sum back to the mixture best, none below 0."""
        root = np.linalg.cholesky(self.products + 1e-9 * (np.trace(self.products) + 1e-20) * np.eye(len(self.peak)))
        return nnls(root.T, np.linalg.solve(root, self.with_mix))[0]

    def sum_back(self, gains: NDArray[np.floating] | float = 1.0) -> float:
        """Energy of the mixture over that of mixture minus sum of gains * tracks, in dB; 100 and more: equal."""
        gains = np.broadcast_to(gains, self.peak.shape)
        residual = self.mix - 2 * gains @ self.with_mix + gains @ self.products @ gains
        return round(10 * float(np.log10(max(self.mix, 1e-20) / max(float(residual), 1e-12 * self.mix, 1e-30))), 2)

    def levels(self) -> list[float]:
        """Root mean square of each track relative to the mixture's, in dB."""
        ratio = (np.diag(self.products) + 1e-20) / (self.mix + 1e-20)
        return [round(float(db), 2) for db in 10 * np.log10(ratio)]

    def correlation(self) -> float:
        """Greatest correlation between two tracks, whatever their signs, 0 to 1; 0 for one track or silence."""
        norm = np.sqrt(np.diag(self.products))
        alike = np.abs(self.products) / np.maximum(np.outer(norm, norm), 1e-20)
        return round(float(np.triu(alike, 1).max(initial=0.0)), 4)

    def collapsed(self) -> bool:
        """Whether a voice is lost: two tracks are one signal, or one of several is silent."""
        power = np.diag(self.products)
        silent = power < power.max() * 10 ** (SILENT_TRACK / 10)
        return len(power) > 1 and (self.correlation() >= SAME_TRACK or bool(silent.any()))

    def as_dict(self) -> dict[str, Any]:
        """What `Report` holds of it."""
        gains = self.gains()
        return {
            "sum_back_db": self.sum_back(),
            "sum_back_fitted_db": self.sum_back(gains),
            "fitted_gains": [round(float(g), 5) for g in gains],
            "levels_db": self.levels(),
            "peak": [round(float(p), 6) for p in self.peak],
            "correlation": self.correlation(),
            "collapsed": self.collapsed(),
        }


def run_separator(separate: Separator, mix: Samples) -> Samples:
    """`separate(mix)`, its shape and values checked."""
    outputs = np.asarray(separate(mix), dtype=np.float32)
    if outputs.ndim != 2 or outputs.shape[1] != len(mix):
        raise ValueError(f"the separator made {outputs.shape} of {len(mix)} samples; it must return (voices, samples)")
    return check_finite(outputs, "the separator's output")
