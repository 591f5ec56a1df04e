"""Sound in containers that libsndfile does not know, decoded by PyAV."""

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from nearfar.core.errors import UserError
from nearfar.core.reading import reading, reason


class Container:
    """The part of `soundfile.SoundFile` that `Recording` uses, for a file that PyAV decodes.

    Coded audio cannot be entered just anywhere: a decoder's state reaches back. So it decodes forwards only, and gives
    the same samples however they are asked for. The file is decoded once at the start to count its samples, because
    headers are estimates.
    """

    KEPT = 30
    """Seconds of what is passed that stay at hand."""

    def __init__(self, path: Path):
        self._path, self.frames = path, 0
        rates, channels = {0}, {0}
        try:
            with self._open() as container:
                stream: Any = container.streams.audio[0]
                self.subtype = stream.codec_context.name
                self._skipped = 0  # what an encoder puts before the sound, by the file's own times
                for frame in container.decode(stream):
                    rates.add(frame.sample_rate)
                    channels.add(frame.layout.nb_channels)
                    if frame.pts is not None and frame.time_base and frame.pts < 0:
                        early = round(-float(frame.pts * frame.time_base) * frame.sample_rate)
                        self._skipped += min(early, frame.samples)
                    self.frames += frame.samples
                told = "mp4" in container.format.name and stream.duration and stream.time_base
                promised = float(stream.duration * stream.time_base) if told else 0.0
        except IndexError:
            raise UserError(f"{path}: holds no sound") from None
        except av.FFmpegError as error:
            where = f"damaged at {self.frames / max(rates):.1f} s" if self.frames else "cannot be read as sound"
            raise UserError(f"{path}: {where} ({reason(error)}); copy it again, or leave it out") from error
        if len(rates) > 2 or len(channels) > 2:
            raise UserError(f"{path}: changes its sample rate or channels on the way; convert it to flac")
        self.samplerate, self.channels = max(rates), max(channels)
        if self.frames < (promised - 0.5) * self.samplerate:
            raise UserError(
                f"{path}: truncated, {self.frames / self.samplerate:.1f} of {promised:.1f} s of sound are there"
            )
        self.frames -= self._skipped
        if told:  # and what it adds at the end
            self.frames = min(self.frames, round(promised * self.samplerate))
        self._start()

    def _open(self) -> av.container.InputContainer:
        # a playlist must not reach the network; tags may be in any coding
        return av.open(str(self._path), options={"protocol_whitelist": "file"}, metadata_errors="ignore")

    def _start(self) -> None:
        self._container = self._open()
        self._pieces: deque[NDArray[np.float32]] = deque()  # (n, channels) each, from sample _first on
        self._first = self._end = self._position = 0
        self._decoded = self._decode()

    def _decode(self) -> Iterator[NDArray[np.float32]]:
        to_float, skip = av.AudioResampler(format="fltp"), self._skipped
        for frame in self._container.decode(audio=0):
            for piece in to_float.resample(frame):
                samples = piece.to_ndarray().T.astype(np.float32, copy=False)
                yield samples[skip:]
                skip = max(0, skip - len(samples))

    def seek(self, position: int) -> None:
        if position < self._first:
            self.close()
            self._start()
        self._position = position

    def read(self, count: int, dtype: str, always_2d: bool) -> NDArray[np.float32]:
        stop = min(self._position + count, self.frames)
        while self._end < stop and (piece := self._next()) is not None:
            self._pieces.append(piece)
            self._end += len(piece)
            while self._pieces and self._first + len(self._pieces[0]) < self._position - self.KEPT * self.samplerate:
                self._first += len(self._pieces.popleft())
        if not self._pieces:
            return np.empty((0, self.channels), np.float32)
        found = np.concatenate(self._pieces)[self._position - self._first : stop - self._first]
        self._position += len(found)
        return found

    def _next(self) -> NDArray[np.float32] | None:
        with reading(self._path, f"damaged at {self._end / self.samplerate:.1f} s"):
            return next(self._decoded, None)

    def close(self) -> None:
        self._container.close()
