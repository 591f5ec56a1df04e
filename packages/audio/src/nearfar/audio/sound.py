"""Recordings on disk: any length read in pieces as one channel, and several files written together or not at all."""

import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from math import gcd
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import soundfile
from numpy.typing import NDArray
from scipy.signal import resample_poly

from nearfar.core.errors import UserError
from nearfar.core.files import atomic_path
from nearfar.core.reading import reading

Samples = NDArray[np.float32]


def read_samples(
    path: str | Path, rate: int, start: float = 0.0, seconds: float | None = None, mix_channels: bool = False
) -> Samples:
    """Samples of a recording, or of a stretch of it, resampled to `rate`.

    Raises UserError for what `Recording` refuses, more than one channel (two channels are often two speakers) unless
    `mix_channels` averages them, a rate below 4 kHz, and digital silence.
    """
    with Recording(path) as recording:
        if recording.channels > 1 and not mix_channels:
            raise UserError(
                f"{path}: has {recording.channels} channels, which may be different speakers; "
                "split them, or mix them with --mix-channels"
            )
        if recording.rate < 4000:
            raise UserError(f"{path}: {recording.rate} Hz is too low for speech")
        first = min(int(start * recording.rate), recording.frames - 1)
        last = recording.frames if seconds is None else min(first + round(seconds * recording.rate), recording.frames)
        samples = recording.read(first, last)
        old = recording.rate
    if not samples.any():
        raise UserError(f"{path}: is silent, every sample is 0")
    if old != rate:
        common = int(np.gcd(old, rate))
        samples = resample_poly(samples, rate // common, old // common).astype(np.float32)
    return samples


SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".m4a", ".aac", ".mp4", ".webm", ".wma", ".amr")
"""Endings of the files that are looked for in a folder."""


HIGHEST_RATE = 1_000_000
"""Hz that a header may say."""

PIECE = 1 << 20
"""Numbers that are decoded at once."""


class Recording:
    """A recording read piece by piece; its channels are averaged to one.

        with Recording("meeting.flac") as recording:
            recording.rate, recording.frames, recording.channels
            samples = recording.read(start, stop)          # float32, (stop - start,)

    What libsndfile cannot decode (m4a, aac, webm, ...) is decoded by PyAV where it is installed (the extra
    `containers`), forwards from its beginning; of what it has passed it keeps 30 s, so reading in order, with overlaps,
    decodes once, and only a long jump back starts again.

    Raises UserError for a file that is missing, damaged, empty, shorter than its header says, or holds NaN.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"{self.path}: no such file")
        self._file: Any
        with reading(self.path, "cannot be read as sound"):
            _refuse_truncated(self.path)
            try:
                self._file = soundfile.SoundFile(self.path)
            except soundfile.LibsndfileError as error:
                try:
                    from nearfar.audio.containers import Container
                except ImportError:
                    raise UserError(
                        f"{self.path}: cannot be read as sound ({error}); m4a, aac, webm and the like need "
                        "`pip install nearfar-audio[containers]`"
                    ) from error
                self._file = Container(self.path)
        self.rate, self.channels, self.frames = self._file.samplerate, self._file.channels, self._file.frames
        if self.frames <= 0 or self.channels < 1:
            self.close()
            raise UserError(f"{self.path}: holds no sound")
        if not 0 < self.rate <= HIGHEST_RATE:
            self.close()
            raise UserError(f"{self.path}: its header says {self.rate} Hz, which no recording has; mend or convert it")

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """Samples start .. stop-1 as float32, the channels averaged."""
        pieces: list[NDArray[np.float32]] = []
        there, size = start, max(1, PIECE // self.channels)
        with reading(self.path, f"damaged at {start / self.rate:.1f} s"):
            self._file.seek(start)
            while there < stop:  # a header may announce more than there is: memory is that of what is there
                piece = self._file.read(min(size, stop - there), dtype="float32", always_2d=True)
                pieces.append(piece.mean(axis=1))
                there += len(piece)
                if not len(piece):
                    break
        if there < stop:
            raise UserError(f"{self.path}: ends at {there / self.rate:.1f} s, its header says later")
        samples = np.concatenate(pieces) if pieces else np.empty(0, np.float32)
        if not np.isfinite(samples).all():
            bad = start + int(np.flatnonzero(~np.isfinite(samples))[0])
            raise UserError(
                f"{self.path}: holds a value that is no number (NaN or infinite) at {bad / self.rate:.3f} s"
            )
        return samples

    def blocks(self, seconds: float = 10.0) -> Iterator[NDArray[np.float32]]:
        """The whole recording in pieces."""
        size = max(1, int(seconds * self.rate))
        for start in range(0, self.frames, size):
            yield self.read(start, min(start + size, self.frames))

    @property
    def subtype(self) -> str:
        """How samples are coded, in libsndfile's words, e.g. PCM_16, or in FFmpeg's, e.g. aac."""
        return self._file.subtype

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "Recording":
        return self

    def __exit__(self, kind: type | None, error: Exception | None, trace: TracebackType | None) -> None:
        self.close()


def _refuse_truncated(path: Path) -> None:
    """libsndfile reads a cut-off WAV as a shorter one without a word; the RIFF header knows better."""
    with path.open("rb") as file:
        head = file.read(12)
        if len(head) < 12 or head[:4] != b"RIFF" or head[8:] != b"WAVE":
            return
        end = path.stat().st_size
        while len(chunk := file.read(8)) == 8:
            name, size = struct.unpack("<4sI", chunk)
            if name == b"data":
                there = end - file.tell()
                if size not in (0, 0xFFFFFFFF) and there < size:  # streams leave the length open
                    raise UserError(f"{path}: truncated, {there} of {size} bytes of sound are there")
                return
            file.seek(size + size % 2, 1)


class Writers:
    """Sound files written side by side; `with writing(...)` renames them into place together at its end."""

    def __init__(self, files: list[soundfile.SoundFile], paths: list[Path]):
        self._files, self._paths = files, paths

    def write(self, block: NDArray[np.float32]) -> None:
        """block: (files, n) samples."""
        for file, path, samples in zip(self._files, self._paths, block):
            try:
                file.write(samples)
                file.flush()
            except (soundfile.LibsndfileError, AssertionError, OSError) as error:  # a short write asserts
                raise UserError(f"{path}: cannot be written ({error}); nothing was kept, is the disk full?") from error


@contextmanager
def writing(paths: list[Path], rate: int, subtype: str | None = None) -> Iterator[Writers]:
    """Open one-channel files for writing; on an error or an interruption none of them is left, not even in part.

    subtype: libsndfile's word for the sample format; by default 32-bit float for wav, 24 bit for flac.
    Raises UserError where a file cannot be made or a write fails.
    """
    with ExitStack() as stack:
        temporary = [stack.enter_context(atomic_path(path)) for path in paths]
        files = []
        for path, place in zip(paths, temporary):
            coded = subtype or {".wav": "FLOAT", ".flac": "PCM_24"}.get(path.suffix.lower())
            try:
                files.append(stack.enter_context(soundfile.SoundFile(place, "w", rate, 1, coded)))
            except (soundfile.LibsndfileError, OSError, ValueError) as error:
                raise UserError(f"{path}: cannot be written ({error})") from error
        yield Writers(files, paths)
        for file in files:
            file.close()


def write_samples(target: str | Path | IO[bytes], samples: NDArray, rate: int, subtype: str | None = None) -> None:
    """Write samples (T,) or (T, channels) in [-1, 1] as a sound file; to an open file as WAV.

    `subtype`: of libsndfile, such as "PCM_16"; the format's usual one by default.
    """
    named = isinstance(target, str | Path)
    soundfile.write(target, samples, rate, subtype=subtype, format=None if named else "WAV")


def resample(samples: Samples, rate: int, new_rate: int, length: int | None = None) -> Samples:
    """Change the rate along the last axis; `length` crops or pads with zeros to so many samples."""
    if rate != new_rate:
        common = gcd(rate, new_rate)
        samples = resample_poly(samples, new_rate // common, rate // common, axis=-1).astype(np.float32)
    if length is not None and samples.shape[-1] != length:
        samples = samples[..., :length]
        samples = np.pad(samples, [(0, 0)] * (samples.ndim - 1) + [(0, length - samples.shape[-1])])
    return samples
