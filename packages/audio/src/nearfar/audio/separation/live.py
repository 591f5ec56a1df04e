"""Separate sound as it arrives: blocks of samples in, blocks of voices out, in constant memory, at any rate.

    pipe -> blocks -> model's rate -> CausalSeparator or OnlineSeparator -> pipe's rate -> voices

A model that was built and trained with `causal=True` carries its state from block to block and answers one frame late.
Any other works on windows and answers one window late. `LiveSeparator` chooses and brings the rates together.
"""

import struct
from collections.abc import Iterator
from typing import Any, BinaryIO, Protocol

import av
import numpy as np
import torch

from nearfar.audio.separation.mossformer import MossFormer
from nearfar.audio.separation.tracking import Embedder, OnlineTracker, VoicePrint, describe
from nearfar.audio.separation.windows import FAINT, UNSURE, Separator, Stitcher, model_separator, route, run_separator
from nearfar.audio.sound import Samples, StreamResampler, resample
from nearfar.core.errors import UserError
from nearfar.core.reading import reading


class LiveSeparator:
    """A model on a live input: (n,) samples in at `rate`, (K, m) samples of voices out, m = what is settled by now.

        live = LiveSeparator(model, rate=44100)
        for block in microphone:
            voices = live.push(block)
        voices = live.finish()                      # the rest: as many samples have come out as went in

    `delay` is the most by which it answers late, in s.

    Args:
        model: with causal=True it is streamed, else it works on windows. window, hop, embed: of `OnlineSeparator`,
            not used by a causal model. separate: the model as a function; default `model_separator(model, device)`.
    """

    def __init__(
        self,
        model: MossFormer,
        rate: int,
        window: float = 4.0,
        hop: float = 0.5,
        embed: Embedder | None = None,
        device: str | torch.device = "cpu",
        separate: Separator | None = None,
    ):
        self.voices, self.taken, self.given = model.num_speakers, 0, 0
        self.inner: CausalSeparator | OnlineSeparator
        if model.causal is True:
            self.inner = CausalSeparator(model, device)
            self.delay = model.kernel_size / model.sample_rate
        else:
            separate = separate or model_separator(model, device)
            self.inner = OnlineSeparator(separate, model.sample_rate, window, hop, embed)
            self.delay = window
        self.before = StreamResampler(rate, model.sample_rate)
        self.behind = StreamResampler(model.sample_rate, rate)
        self.delay += self.before.delay / rate + self.behind.delay / model.sample_rate

    @property
    def confidence(self) -> float:
        """How clearly the least clear window was ordered, 0 to 1; 1 with a causal model, which orders by itself."""
        return self.inner.confidence if isinstance(self.inner, OnlineSeparator) else 1.0

    @property
    def uncertain(self) -> list[float]:
        """Times in s of the windows that were not clear, the latest 1000."""
        return self.inner.uncertain if isinstance(self.inner, OnlineSeparator) else []

    def push(self, samples: Samples) -> Samples:
        """Take (n,) samples, return (K, m). Raises UserError for another shape or values that are no numbers."""
        samples = np.asarray(samples, dtype=np.float32)
        if samples.ndim != 1 or not np.isfinite(samples).all():
            raise UserError("a live block must be one channel of finite samples")
        self.taken += len(samples)
        out = self._behind(self.inner.push(self.before.push(samples[None])[0]))
        self.given += out.shape[1]
        return out

    def finish(self) -> Samples:
        """The rest of the voices."""
        last = [self._behind(self.inner.push(self.before.finish(1)[0])), self._behind(self.inner.finish())]
        out = np.concatenate([*last, self.behind.finish(self.voices)], axis=1)
        return resample(out, 1, 1, length=self.taken - self.given)

    def _behind(self, voices: Samples) -> Samples:
        return self.behind.push(voices if voices.shape[1] else np.zeros((self.voices, 0), np.float32))


class CausalSeparator:
    """`model.stream` on NumPy samples at the model's rate: (n,) in, (K, m) out. For models with causal=True."""

    def __init__(self, model: MossFormer, device: str | torch.device = "cpu"):
        self.model, self.device = model.to(device).eval(), device
        self.state: dict[Any, Any] = {}

    def push(self, samples: Samples) -> Samples:
        return self._stream(samples, False)

    def finish(self) -> Samples:
        return self._stream(np.zeros(0, np.float32), True)

    def _stream(self, samples: Samples, final: bool) -> Samples:
        with torch.inference_mode():
            piece = torch.from_numpy(np.ascontiguousarray(samples))[None].to(self.device)
            return self.model.stream(piece, self.state, final)[0].float().cpu().numpy()


class OnlineSeparator:
    """Block-online separation: samples in as they arrive, tracks out `window` seconds late, in constant memory.

        online = OnlineSeparator(separate, rate=8000)
        for block in microphone:
            tracks = online.push(block)             # (K, m), m = what is settled by now
        tracks = online.finish()                    # the rest

    Each window is ordered when it comes, by the overlap with the one before and else by the voices heard so far; what
    was once decided stays. `confidence` is that of the least clear window so far, 0 to 1, and `uncertain` has the times
    in s of those below UNSURE (the latest 1000).

    Args:
        separate: the model, at `rate` Hz. window: seconds, also the latency. hop: 0.5 to 0.75 of it.
        embed: see `tracking.Embedder`; default `VoicePrint()`.
    """

    def __init__(
        self, separate: Separator, rate: int, window: float = 4.0, hop: float = 0.5, embed: Embedder | None = None
    ):
        if window <= 0 or not 0.5 <= hop <= 0.75:
            raise ValueError(f"window {window} s and hop {hop}: the window must be positive, the hop 0.5 to 0.75 of it")
        self.separate, self.rate = separate, rate
        self.embed = VoicePrint() if embed is None else embed
        self.size = max(2, round(window * rate))
        self.hop = max(1, round(hop * self.size))
        self.tracker, self.stitcher = OnlineTracker(getattr(self.embed, "threshold", None)), Stitcher()
        self.held = np.zeros(0, dtype=np.float32)
        self.before: Samples | None = None
        self.start = 0  # of the next window
        self.loudest = 0.0
        self.confidence, self.uncertain = 1.0, list[float]()

    def push(self, samples: Samples) -> Samples:
        """Take (n,) samples, return (K, m) settled ones; m is 0 until a window is full."""
        samples = np.asarray(samples, dtype=np.float32)
        if samples.ndim != 1 or not np.isfinite(samples).all():
            raise UserError("a live block must be one channel of finite samples")
        self.held = np.concatenate([self.held, samples])
        out = []
        while len(self.held) >= self.size:
            out.append(self._window(self.held[: self.size]))
            self.held = self.held[self.hop :]
            self.start += self.hop
            out.append(self.stitcher.settle(self.start))
        if not out:
            return np.zeros((0 if self.before is None else len(self.before), 0), dtype=np.float32)
        return np.concatenate(out, axis=1)

    def finish(self) -> Samples:
        """The rest of the tracks; as many samples have then come out as went in."""
        seen = self.size - self.hop if self.before is not None else 0  # samples of `held` that a window has covered
        out = []
        if len(self.held) > seen:
            out.append(self._window(self.held))
        if self.stitcher.tail is not None:
            out.append(self.stitcher.rest())
        return np.concatenate(out, axis=1) if out else np.zeros((0, 0), dtype=np.float32)

    def _window(self, mix: Samples) -> Samples:
        outputs = run_separator(self.separate, mix)
        self.loudest = max(self.loudest, float(np.sqrt(np.mean(mix.astype(np.float64) ** 2))))
        shared = None if self.before is None else self.before[:, self.hop :][:, : outputs.shape[1]]
        found = describe(outputs, self.rate, self.embed, shared, floor=max(1e-6, FAINT * self.loudest))
        labels, confidence = self.tracker.order(found)
        self.confidence = min(self.confidence, confidence)
        if confidence < UNSURE:
            self.uncertain = [*self.uncertain[-999:], round(self.start / self.rate, 2)]
        self.before = outputs
        return self.stitcher.add(route(outputs, labels, len(outputs)), self.start)


class Readable(Protocol):
    """A file or pipe, of which only `read` is called."""

    def read(self, size: int, /) -> bytes: ...


def read_pipe(file: Readable, raw: str | None = None) -> tuple[int, Iterator[Samples]]:
    """Sound from a pipe as it comes: its rate in Hz, and an iterator over blocks (n,), the channels averaged.

    file: anything that ffmpeg's libraries can decode without going back: wav (of unknown length, too), flac, ogg, mp3.
    Unbuffered, or blocks come in the buffer's size. raw: samples without a header, as `CODING:RATE[:CHANNELS]` with
    ffmpeg's word for the coding: "s16le:16000", "f32le:48000:2".

    Raises UserError where nothing is recognized, and from the iterator for damage or values that are no numbers.
    """
    options = {}
    coding, *numbers = (raw or "").split(":")
    if raw is not None:
        if not 1 <= len(numbers) <= 2 or not all(n.isdecimal() and int(n) for n in numbers):
            raise UserError(f"--raw {raw}: must be CODING:RATE or CODING:RATE:CHANNELS, such as s16le:16000")
        layout = {"1": "mono", "2": "stereo"}.get((*numbers, "1")[1], f"{numbers[-1]}c")
        options = {"sample_rate": numbers[0], "ch_layout": layout}
    with reading("standard input", "cannot be read as sound", "for bare samples say --raw"):
        container: Any = av.open(file, format=coding or None, options=options, buffer_size=4096)
        stream = container.streams.audio[0]

    def blocks() -> Iterator[Samples]:
        floats = av.AudioResampler(format="fltp")
        with reading("standard input", "damaged", "what came before it is whole"):
            for frame in container.decode(stream):
                for converted in floats.resample(frame):
                    samples = converted.to_ndarray().mean(axis=0)
                    if not np.isfinite(samples).all():
                        raise UserError("standard input: holds a value that is no number (NaN or infinite)")
                    yield samples

    return stream.rate, blocks()


class WavPipe:
    """Writes a WAV of unknown length, 32-bit float, to a pipe as samples come: one channel per voice."""

    def __init__(self, file: BinaryIO, rate: int, channels: int):
        self.file, size = file, 4 * channels
        form = struct.pack("<HHIIHH", 3, channels, rate, rate * size, size, 32)
        self.file.write(b"RIFF\xff\xff\xff\xffWAVEfmt " + struct.pack("<I", len(form)) + form + b"data\xff\xff\xff\xff")
        self.file.flush()

    def write(self, block: Samples) -> None:
        """block: (channels, n)."""
        self.file.write(block.T.astype("<f4").tobytes())
        self.file.flush()
