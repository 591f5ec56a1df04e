"""Recordings on disk: any length read in pieces as one channel, and several files written together or not at all."""

import struct
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import ceil, gcd
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


SUFFIXES = (
    ".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".mp2", ".aiff", ".aif", ".aifc", ".au", ".snd", ".caf", ".w64",
    ".rf64", ".sph", ".nist", ".voc", ".gsm", ".m4a", ".m4b", ".aac", ".mp4", ".mov", ".3gp", ".mka", ".mkv", ".webm",
    ".wma", ".amr", ".awb", ".ac3", ".wv", ".tta",
)  # fmt: skip
"""Endings, in lower case, of the files that are looked for in a folder."""

HIGHEST_RATE = 1_000_000
"""Hz that a header may say."""

PIECE = 1 << 20
"""Numbers that are decoded at once."""

STILL = 2.0**-20
"""Change from sample to sample, a 32nd of a 16-bit step, up to which a recording stands still."""


def read_samples(path: str | Path, rate: int, *stretch: Any, **channels: Any) -> Samples:
    """Samples of a recording, or of a stretch of it, resampled to `rate`, their mean (DC) taken away.

    The arguments are those of `stream_samples`. Raises UserError for what it refuses, and for digital silence.
    """
    samples = np.concatenate(list(stream_samples(path, rate, *stretch, **channels)))
    if not len(samples) or samples.min() == samples.max():
        raise UserError(f"{path}: is silent, every sample is {samples[0] if len(samples) else 0.0:g}")
    return samples - samples.mean(dtype=np.float64).astype(np.float32)


def stream_samples(
    path: str | Path,
    rate: int,
    start: float = 0.0,
    seconds: float | None = None,
    mix_channels: bool = False,
    channel: int | None = None,
) -> Iterator[Samples]:
    """Blocks of a recording, or of a stretch of it, resampled to `rate`, in memory that does not grow with its length.

    Raises UserError for what `Recording` refuses, more than one channel (two channels are often two speakers) unless
    `channel` chooses one or `mix_channels` averages them, and a rate below 4 kHz.
    """
    with Recording(path, channel) as recording:
        if channel is None and not mix_channels:
            recording.refuse_channels("choose one with --channel, or average them with --mix-channels")
        if recording.rate < 4000:
            raise UserError(f"{path}: {recording.rate} Hz is too low for speech")
        first = min(int(start * recording.rate), recording.frames - 1)
        last = recording.frames if seconds is None else min(first + round(seconds * recording.rate), recording.frames)
        resampler, size = StreamResampler(recording.rate, rate), 10 * recording.rate
        for place in range(first, last, size):
            yield resampler.push(recording.read(place, min(place + size, last))[None])[0]
        yield resampler.finish(1)[0]


def without_silence(blocks: Iterable[Samples], rate: int) -> Iterator[Samples]:
    """Blocks of samples without their digital silence: stretches of 10 ms and more that stand still (`STILL`).

    A gate, a lost packet or an editor leaves such stretches; no microphone does.
    """
    least, held = max(2, rate // 100), np.empty(0, np.float32)
    for block in blocks:
        samples = np.concatenate([held, block])
        moves = np.flatnonzero(np.abs(np.diff(samples)) > STILL)
        cut = int(moves[-1]) + 1 if len(moves) else 0  # where the last stretch that may go on begins
        yield _drop(samples[:cut], least)
        held = samples[cut:][:least]  # the whole of it is dropped once it is that long
    yield _drop(held, least)


def _drop(samples: Samples, least: int) -> Samples:
    still = np.r_[False, np.abs(np.diff(samples)) <= STILL, False]
    edges = np.flatnonzero(still[1:] != still[:-1]).reshape(-1, 2)  # each row: first and last sample of a stretch
    keep = np.ones(len(samples), bool)
    for first, last in edges[edges[:, 1] - edges[:, 0] + 1 >= least]:
        keep[first : last + 1] = False
    return samples[keep]


class Recording:
    """A recording read piece by piece, as one channel.

        with Recording("meeting.flac") as recording:
            recording.rate, recording.frames, recording.channels
            samples = recording.read(start, stop)          # float32, (stop - start,)
            both = recording.read_channels(start, stop)    # (stop - start, channels)

    channel: 1, 2 ... is what `read` gives; None: the mean of all channels. Whoever opens what a user named asks first
    (`stream_samples`, `one_channel`), for two channels are often two speakers.

    What libsndfile cannot decode (m4a, aac, webm, ...) is decoded by PyAV where it is installed (the extra
    `containers`), forwards from its beginning; of what it has passed it keeps 30 s, so reading in order, with overlaps,
    decodes once, and only a long jump back starts again.

    A WAV or AU whose header leaves its length open, says 0, or says less than what follows, as pipes and interrupted
    recorders write it, is read to its end; block codes (GSM, ADPCM) to the sample that the header counts.

    Raises UserError for a file that is missing, damaged, empty, shorter than its header says, or holds NaN, and for a
    channel that it does not have.
    """

    offset: float = 0.0
    """What `read` takes away from every sample: see `one_channel`."""

    def __init__(self, path: str | Path, channel: int | None = None):
        self.path, self.channel = Path(path), channel
        if not self.path.is_file():
            raise UserError(f"{self.path}: no such file")
        self._file: Any
        with reading(self.path, "cannot be read as sound"):
            patch, counted = _true_length(self.path)
            try:
                self._patched = None if patch is None else _Patched(self.path, *patch)
                self._file = soundfile.SoundFile(self._patched or self.path)
                if not self._file.seekable():
                    self._file = _Forwards(self.path, self._file)
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
        if counted is not None and self.frames - BLOCK < counted <= self.frames:
            self.frames = counted
        with reading(self.path, "cannot be read as sound"):
            if isinstance(self._file, soundfile.SoundFile) and self._file.format in ("FLAC", "MP3", "OGG", "MPEG"):
                self.frames = _decodable(self._file)
        if self.frames <= 0 or self.channels < 1:
            self.close()
            raise UserError(f"{self.path}: holds no sound")
        if not 0 < self.rate <= HIGHEST_RATE:
            self.close()
            raise UserError(f"{self.path}: its header says {self.rate} Hz, which no recording has; mend or convert it")
        if channel is not None and not 1 <= channel <= self.channels:
            self.close()
            raise UserError(f"{self.path}: has {self.channels} channels, there is no channel {channel}")

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """Samples start .. stop-1 of the channel, or of the mean of all, as float32."""
        samples = self._read(start, stop, self.channel)[:, 0]
        return samples - np.float32(self.offset) if self.offset else samples

    def read_channels(self, start: int, stop: int) -> NDArray[np.float32]:
        """Samples start .. stop-1 of all channels, (stop - start, channels)."""
        return self._read(start, stop, 0)

    def _read(self, start: int, stop: int, channel: int | None) -> NDArray[np.float32]:
        """channel: 1, 2 ..., None for the mean, 0 for all."""
        pieces: list[NDArray[np.float32]] = []
        there, size = start, max(1, PIECE // self.channels)
        with reading(self.path, f"damaged at {start / self.rate:.1f} s"):
            self._file.seek(start)
            while there < stop:  # a header may announce more than there is: memory is that of what is there
                piece = self._file.read(min(size, stop - there), dtype="float32", always_2d=True)
                if channel is None:
                    piece = piece.mean(axis=1, keepdims=True)
                pieces.append(piece[:, channel - 1 : channel] if channel else piece)
                there += len(piece)
                if not len(piece):
                    break
        if there < stop:
            raise UserError(f"{self.path}: ends at {there / self.rate:.1f} s, its header says later")
        samples = np.concatenate(pieces) if pieces else np.empty((0, self.channels if channel == 0 else 1), np.float32)
        if not np.isfinite(samples).all():
            bad = start + int(np.flatnonzero(~np.isfinite(samples).all(1))[0])
            raise UserError(
                f"{self.path}: holds a value that is no number (NaN or infinite) at {bad / self.rate:.3f} s"
            )
        return samples

    def refuse_channels(self, mend: str) -> None:
        """Raise UserError where there are several channels, saying what to do: two are often two speakers."""
        if self.channels > 1:
            raise UserError(f"{self.path}: has {self.channels} channels, which may be different speakers; {mend}")

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
        if self._patched is not None:
            self._patched.close()

    def __enter__(self) -> "Recording":
        return self

    def __exit__(self, kind: type | None, error: Exception | None, trace: TracebackType | None) -> None:
        self.close()


PIPED = 0x7F000000
"""Bytes of sound from which on a header means "to the end": what sox, arecord, eSpeak and FFmpeg write to a pipe."""

BLOCK = 1 << 13
"""Samples that a block code may add at a recording's end."""


def _true_length(path: Path) -> tuple[tuple[int, bytes] | None, int | None]:
    """What to write into a header that says too little, (place, bytes), and the samples that it counts; None: nothing.

    libsndfile reads a cut-off WAV as a shorter one without a word; the RIFF header knows better. It also believes a
    header that says less than what is there.
    """
    end = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(12)
        if head[:4] == b".snd" and len(head) == 12:
            start, size = struct.unpack(">II", head[4:])
            return ((8, b"\xff\xff\xff\xff") if 0 <= size < end - start and size != 0xFFFFFFFF else None), None
        if len(head) < 12 or head[:4] not in (b"RIFF", b"RIFX") or head[8:] != b"WAVE":
            return None, None
        order = "<" if head[:4] == b"RIFF" else ">"
        counted = None
        while len(chunk := file.read(8)) == 8:
            name, size = struct.unpack(f"{order}4sI", chunk)
            place = file.tell()
            if name == b"fact" and size >= 4:
                counted = struct.unpack(f"{order}I", file.read(4))[0]
            if name == b"data":
                there = end - place
                if there < size < PIPED:
                    raise UserError(f"{path}: truncated, {there} of {size} bytes of sound are there")
                file.seek(place + size + size % 2)
                if there <= size or _is_chunk(file.read(8), order, there - size):
                    return None, counted
                return (place - 4, struct.pack(f"{order}I", min(there, 0xFFFFFFFF))), None
            file.seek(place + size + size % 2)
    return None, None


def _is_chunk(head: bytes, order: str, left: int) -> bool:
    """Whether `left` bytes that begin with `head` are chunks, or too few to matter, rather than more sound."""
    if left < 512:
        return True
    name, size = struct.unpack(f"{order}4sI", head)
    return all(32 <= letter < 127 for letter in name) and size <= left


def _decodable(file: soundfile.SoundFile) -> int:
    """Frames that a compressed file gives: those of its header, counted where it is silent on them or wrong."""
    try:
        file.seek(file.frames - 1)
        count = file.frames if len(file.read(1)) else 0
    except (soundfile.LibsndfileError, OverflowError):
        count = 0
    file.seek(0)
    if not count:
        while piece := len(file.read(1 << 16, dtype="float32", always_2d=True)):
            count += piece
        file.seek(0)
    return count


class _Forwards:
    """A sound file whose code can only be read forwards (GSM, G.721): going back begins again."""

    def __init__(self, path: Path, file: soundfile.SoundFile):
        self._path, self._file, self._place = path, file, 0
        self.samplerate, self.channels, self.frames, self.subtype = (
            file.samplerate, file.channels, file.frames, file.subtype,
        )  # fmt: skip

    def seek(self, position: int) -> None:
        if position < self._place:
            self._file.close()
            self._file, self._place = soundfile.SoundFile(self._path), 0
        while self._place < position and len(self.read(min(PIECE, position - self._place), "float32", True)):
            pass

    def read(self, count: int, dtype: str, always_2d: bool) -> NDArray[np.float32]:
        found = self._file.read(count, dtype=dtype, always_2d=always_2d)
        self._place += len(found)
        return found

    def close(self) -> None:
        self._file.close()


class _Patched:
    """A file with some bytes changed, for libsndfile to read."""

    def __init__(self, path: Path, place: int, new: bytes):
        self._file, self._place, self._new = path.open("rb"), place, new

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def read(self, size: int = -1) -> bytes:
        start = self._file.tell()
        found = bytearray(self._file.read(size))
        for at, byte in enumerate(self._new, self._place - start):
            if 0 <= at < len(found):
                found[at] = byte
        return bytes(found)

    def close(self) -> None:
        self._file.close()


class StreamResampler:
    """`resample` on a stream: pieces (C, n) in, pieces (C, m) out, which together equal the whole resampled at once.

    delay: samples of the input by which it answers late at the most (0 where the rates are equal).
    """

    def __init__(self, rate: int, new_rate: int):
        self.rate, self.new_rate = rate, new_rate
        self.up, self.down = new_rate // gcd(rate, new_rate), rate // gcd(rate, new_rate)
        reach = 10 * max(self.up, self.down) / self.up  # half the length of resample_poly's filter
        self.margin = 0 if rate == new_rate else ceil(reach / self.down + 1) * self.down
        self.delay = self.margin and self.margin + self.down
        self.held: Samples | None = None  # from `past` input samples before the first whose output is still to come
        self.past = 0

    def push(self, samples: Samples) -> Samples:
        held = samples if self.held is None else np.concatenate([self.held, samples], axis=1)
        steps = max(held.shape[1] - self.past - self.margin, 0) // self.down
        return self._give(held, self.past + steps * self.down, steps * self.up)

    def finish(self, channels: int) -> Samples:
        """The rest; `channels` gives the shape where nothing came."""
        held = np.zeros((channels, 0), np.float32) if self.held is None else self.held
        return self._give(held, held.shape[1], None)

    def _give(self, held: Samples, until: int, count: int | None) -> Samples:
        if count == 0 or held.shape[1] == 0:
            self.held = held
            return held[:, :0]
        first = self.past // self.down * self.up
        out = resample(held, self.rate, self.new_rate)[:, first : None if count is None else first + count]
        start = max(until - self.margin, 0)
        self.held, self.past = held[:, start:], until - start
        return out


@dataclass(frozen=True)
class Channels:
    """What the channels of a recording hold, measured on all of it.

    means: DC of each. levels: root mean square of each without it. peak: greatest sample of all. correlation: of the
    pair of channels that is least alike, -1 to 1 (1 for one channel). alike: every sample is the same on all.
    """

    means: NDArray[np.float64]
    levels: NDArray[np.float64]
    peak: float
    correlation: float
    alike: bool


def measure_channels(recording: Recording) -> Channels:
    """Go once over a recording, block by block."""
    count, size = recording.channels, 10 * recording.rate
    total, products, peak, alike = np.zeros(count), np.zeros((count, count)), 0.0, True
    for start in range(0, recording.frames, size):
        block = recording.read_channels(start, min(start + size, recording.frames)).astype(np.float64)
        total += block.sum(0)
        products += block.T @ block
        peak = max(peak, float(np.abs(block).max(initial=0.0)))
        alike = alike and bool((np.abs(block - block[:, :1]) <= 2.0**-15).all())
    means = total / recording.frames
    covariance = products / recording.frames - np.outer(means, means)
    levels = np.sqrt(np.maximum(np.diag(covariance), 0.0))
    apart = covariance / np.maximum(np.outer(levels, levels), 1e-20)
    pairs = apart[np.triu_indices(count, 1)]
    return Channels(means, levels, peak, float(pairs.min()) if len(pairs) else 1.0, alike)


class Writers:
    """Sound files written side by side; `with writing(...)` renames them into place together at its end.

    `clipped` counts the samples of each that a format of whole numbers had to cut at full scale.
    """

    def __init__(self, files: list[soundfile.SoundFile], paths: list[Path]):
        self._files, self._paths = files, paths
        self.clipped = [0] * len(files)

    def write(self, block: NDArray[np.float32]) -> None:
        """block: (files, n) samples."""
        for place, (file, path, samples) in enumerate(zip(self._files, self._paths, block)):
            if file.subtype not in ("FLOAT", "DOUBLE"):
                self.clipped[place] += int((np.abs(samples) > 1).sum())
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
