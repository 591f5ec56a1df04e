"""What `separate` does to one recording, or to a pipe: voices, report and page in a folder."""

import select
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nearfar.apps.speech_separation import pages
from nearfar.audio.separation.checks import check_equivalence
from nearfar.audio.separation.live import LiveSeparator
from nearfar.audio.separation.mossformer import MossFormer
from nearfar.audio.separation.tracking import Embedder
from nearfar.audio.separation.windows import CLIPPED, Meter, Separator, separate_recording
from nearfar.audio.sound import Recording, measure_channels, resample, writing
from nearfar.core.errors import UserError
from nearfar.core.files import atomic_path, write_json

CHECKED = 20.0
"""Seconds of a recording that `--check` takes."""


class Sink(Protocol):
    """Where blocks of voices (K, n) go."""

    def write(self, block: np.ndarray) -> None: ...


class Pipe:
    """A pipe that ends where it ends, or at Ctrl-C once it is empty, so that what came until then is kept.

    A second Ctrl-C interrupts as usual.
    """

    def __init__(self, file: RawIOBase):
        self.file, self.ended = file, False
        self.before = signal.signal(signal.SIGINT, self._end)

    def _end(self, *_: Any) -> None:
        self.ended = True
        signal.signal(signal.SIGINT, self.before)

    def read(self, size: int) -> bytes:
        found = b""
        while not found and not self.ended:
            if select.select([self.file], [], [], 0.2)[0]:
                found = self.file.read(size) or b""
                if not found:
                    self._end()
        if not found and select.select([self.file], [], [], 0)[0]:
            found = self.file.read(size) or b""
        return found


@dataclass
class Job:
    """A model with what the command line said about separating."""

    model: MossFormer
    separator: Separator
    device: str
    window: float
    hop: float
    embed: Embedder | None
    speakers: int | None
    most: int | None
    stream: bool
    consistency: bool
    level: str
    ending: str
    channel: str | None = None


def separate_file(job: Job, path: Path, folder: Path, advance: Callable[[str, float, float], None]) -> dict[str, Any]:
    """Separate a recording into `folder`, which appears when all of it is done."""
    started = time.monotonic()
    chosen, said = (Recording(path), "each") if job.channel == EACH else open_channel(path, job.channel)
    with chosen as recording, _appearing(folder) as place:
        seconds = recording.frames / recording.rate
        tell = lambda done: advance(path.name, done, seconds)  # noqa: E731
        if job.channel == EACH:
            result = _each(job, recording, place, tell)
        elif job.stream:
            paths = [place / f"voice{k + 1}.{job.ending}" for k in range(job.model.num_speakers)]
            with writing(paths, recording.rate) as out:
                result = stream(job, recording.blocks(0.5), recording.rate, out, tell, str(path))
            result["clipped_out"] = sum(out.clipped)
        else:
            result = _whole(job, recording, place, tell)
        result["real_time_factor"] = round((time.monotonic() - started) / result["seconds"], 3)
        return _finish(job, place, {path.name: path}, {"file": str(path), "channel": said, **result})


def separate_pipe(
    job: Job, blocks: Iterable[np.ndarray], rate: int, folder: Path, advance: Callable[[str, float, float], None]
) -> dict[str, Any]:
    """Separate what a pipe brings into `folder` as it comes."""
    with _appearing(folder) as place:
        paths = [place / f"voice{k + 1}.{job.ending}" for k in range(job.model.num_speakers)]
        mixture = place / f"mixture.{job.ending}"
        with writing(paths, rate) as out, writing([mixture], rate) as kept:

            def both() -> Iterable[np.ndarray]:
                for block in blocks:
                    kept.write(block[None])
                    yield block

            tell = lambda done: advance("standard input", done, 0)  # noqa: E731
            result = stream(job, both(), rate, out, tell, "standard input")
        result["clipped_out"] = sum(out.clipped)
        return _finish(job, place, {mixture.name: mixture}, {"file": "standard input", **result})


def stream(
    job: Job, blocks: Iterable[np.ndarray], rate: int, out: Sink, tell: Callable[[float], None], name: str
) -> dict[str, Any]:
    """Blocks (n,) of sound through the model and into `out` as the voices are settled; returns what was found."""
    live = LiveSeparator(job.model, rate, job.window, job.hop, job.embed, job.device, job.separator)
    meter, held, busy, clipped = Meter(job.model.num_speakers), np.zeros(0, np.float32), 0.0, 0

    def settle(voices: np.ndarray) -> None:
        nonlocal held
        if voices.shape[1]:
            out.write(voices)
            meter.add(voices, held[: voices.shape[1]])
            held = held[voices.shape[1] :]

    for block in blocks:
        started = time.monotonic()
        clipped += int((np.abs(block) >= CLIPPED).sum())
        held = np.concatenate([held, block])
        settle(live.push(block))
        busy += time.monotonic() - started
        tell(len(block) / rate)
    settle(live.finish())
    if meter.mix == 0:
        raise UserError(f"{name}: silent from beginning to end")
    return {
        "seconds": live.taken / rate,
        "rate": rate,
        "model_rate": job.model.sample_rate,
        "speakers": job.model.num_speakers,
        **meter.as_dict(),
        "confidence": round(live.confidence, 3),
        "uncertain": live.uncertain,
        "clipped": clipped / live.taken,
        "delay": round(live.delay, 4),
        "real_time_factor": round(busy * rate / live.taken, 3),
    }


def check_file(job: Job, path: Path) -> list[dict[str, Any]]:
    """Measure on the beginning of a recording what ought to be equal."""
    with open_channel(path, None if job.channel == EACH else job.channel)[0] as recording:
        samples = recording.read(0, min(recording.frames, round(CHECKED * recording.rate)))
        at_rate = resample(samples, recording.rate, job.model.sample_rate)
    if len(at_rate) < job.model.kernel_size:
        raise UserError(f"{path}: is too short to check anything on it")
    return check_equivalence(job.model, at_rate, job.window, job.hop, job.embed, job.device)


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A new folder that is there when the block ends well; what cannot be written is said in its name."""
    place = folder
    try:
        with atomic_path(folder) as place:
            place.mkdir()
            yield place
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror}); nothing was kept, is the disk full?"
        ) from error
    except UserError as error:
        raise UserError(str(error).replace(str(place), str(folder))) from error


def _whole(job: Job, recording: Recording, place: Path, tell: Callable[[float], None]) -> dict[str, Any]:
    separation = separate_recording(
        recording, job.separator, job.model.sample_rate, place, window=job.window, hop=job.hop, speakers=job.speakers,
        most=job.most, embed=job.embed, consistency=job.consistency, progress=tell,
    )  # fmt: skip
    gain = np.ones((separation.count, 1), dtype=np.float32)
    lowered = 0.0
    if job.level != "keep" or job.ending == "flac":  # the gain follows from the whole: make the tracks to measure them
        for _ in separation.blocks():
            pass
        report = separation.report
        assert report is not None
        gain[:, 0] = {
            "keep": np.ones(separation.count),
            "mix": np.array(report.fitted_gains),
            "peak": 0.9 / np.maximum(report.peak, 1e-6),
            "rms": 10 ** (-np.array(report.levels_db) / 20),
        }[job.level]
        highest = float((gain[:, 0] * np.array(report.peak)).max())
        if job.ending == "flac" and highest > HIGHEST_PEAK:  # whole numbers end at full scale: all voices lower alike
            gain *= HIGHEST_PEAK / highest
            lowered = round(20 * float(np.log10(highest / HIGHEST_PEAK)), 2)
    paths = [place / f"voice{k + 1}.{job.ending}" for k in range(separation.count)]
    with writing(paths, recording.rate) as out:
        for block in separation.blocks():
            out.write(gain * block)
    assert separation.report is not None
    settings = {"window": round(job.window, 3), "level": job.level, "gain": [round(float(g), 5) for g in gain[:, 0]]}
    settings["model_rate"] = job.model.sample_rate
    return {**separation.report.as_dict(), **settings, "lowered_db": lowered, "clipped_out": sum(out.clipped)}


HIGHEST_PEAK = 0.999
"""Where the loudest voice ends in a format of whole numbers."""

EACH = "each"
"""Channel of `separate` that writes every channel as a voice."""


def open_channel(path: Path, channel: str | None) -> tuple[Recording, str]:
    """A recording whose channel is chosen and whose DC is taken away, and what was chosen, in words.

    channel: 1, 2 ..., "mix", or None: the only one, or the first of those that are alike.
    Raises UserError where several channels differ and none is chosen.
    """
    recording = Recording(path)
    try:
        found = measure_channels(recording)
        count = recording.channels
        if channel is None and count > 1 and not found.alike:
            names = ", ".join(map(str, range(1, count + 1)))
            heard = found.levels > found.levels.max() * 10**-2
            if heard.all() and abs(found.correlation) < 0.3:
                what = f"with a talker a side, it seems (correlation {found.correlation:.2f})"
            else:
                what = f"that differ (correlation {found.correlation:.2f})"
            raise UserError(
                f"{path}: has {count} channels {what}; --channel each writes them as the voices, without a model, "
                f"{names} separates one of them, mix their mean"
            )
        number = None if channel == "mix" else int(channel or 1)
        if number is not None and number > count:
            raise UserError(f"{path}: has {count} channels, there is no channel {number}")
        recording.channel = number
        recording.offset = float(found.means.mean() if number is None else found.means[number - 1])
    except BaseException:
        recording.close()
        raise
    said = "mean" if number is None else str(number)
    return recording, f"{said} of {count}, all alike" if channel is None and count > 1 else f"{said} of {count}"


def _each(job: Job, recording: Recording, place: Path, tell: Callable[[float], None]) -> dict[str, Any]:
    """Every channel as a voice, untouched but for its DC."""
    found, count = measure_channels(recording), recording.channels
    if count < 2:
        raise UserError(f"{recording.path}: has one channel; --channel each is for several")
    meter, clipped, size = Meter(count), 0, 10 * recording.rate
    gain = HIGHEST_PEAK / found.peak if job.ending == "flac" and found.peak > HIGHEST_PEAK else 1.0
    with writing([place / f"voice{k + 1}.{job.ending}" for k in range(count)], recording.rate) as out:
        for start in range(0, recording.frames, size):
            block = recording.read_channels(start, min(start + size, recording.frames))
            clipped += int((np.abs(block) >= CLIPPED).any(1).sum())
            voices = (block - found.means.astype(np.float32)).T
            meter.add(voices, voices.sum(0))
            out.write(np.float32(gain) * voices)
            tell(len(block) / recording.rate)
    return {
        "seconds": recording.frames / recording.rate, "rate": recording.rate, "speakers": count, **meter.as_dict(),
        "confidence": 1.0, "uncertain": [], "clipped": clipped / recording.frames, "level": "keep",
        "gain": [round(gain, 5)] * count, "clipped_out": sum(out.clipped),
    }  # fmt: skip


def _finish(job: Job, place: Path, mixture: dict[str, Path], result: dict[str, Any]) -> dict[str, Any]:
    parts = mixture | {p.stem: p for p in sorted(place.glob(f"voice*.{job.ending}"))}
    pages.listening_page(parts, result, place)
    write_json(place / "separation.json", result)
    return result
