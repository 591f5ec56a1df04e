"""A live session: samples are recorded as they come, decoded, and the decisions sent on; replayed, they are the same.

A session's folder holds what is only ever added to, so that a kill loses nothing that had been written:

    session.json    source, channels, rate, unit, decoder and digests, rule: written first
    samples.bin     the samples as they came, (times, channels) in the type that `session.json` names
    times.bin       the time of each, float64
    log.jsonl       one object a line: chunks, decisions, markers, and what happened (gaps, clocks, losses)

`finish` makes a FIF file of it, and `to_bids` BrainVision files in a BIDS dataset.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import mne
import numpy as np
import torch

from nearfar.core.errors import UserError
from nearfar.core.files import atomic_path, locked, write_json
from nearfar.core.fingerprint import data_digest, source_digest
from nearfar.core.made_from import model_digest
from nearfar.core.reading import read_json, reading
from nearfar.eeg import metrics
from nearfar.eeg.annotations import quiet
from nearfar.eeg.conventions import standard_montage
from nearfar.eeg.decoder import Decoder
from nearfar.eeg.live.sinks import Sink
from nearfar.eeg.live.sources import Continuity, Source
from nearfar.eeg.live.stream import Decisions, Rule, StreamDecoder
from nearfar.eeg.recordings import UNITS

FORMAT = 1


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread: the fastest for one window, steady beside other programs, and always the same rounding."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Recorder:
    """Writes a session's files; every call is in the hands of the system when it returns."""

    def __init__(self, folder: str | Path, about: dict[str, Any]) -> None:
        self.folder, self.count = Path(folder), 0
        if (self.folder / "session.json").exists():
            raise UserError(f"{self.folder}: holds a session already; name another folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._about = about
        self._type: np.dtype | None = None
        self._log = (self.folder / "log.jsonl").open("ab", buffering=0)
        self._samples = (self.folder / "samples.bin").open("ab", buffering=0)
        self._times = (self.folder / "times.bin").open("ab", buffering=0)

    def append(self, samples: np.ndarray, times: np.ndarray, arrived: float) -> None:
        """Write samples (channels, times) and that they came."""
        if not len(times):
            return
        if self._type is None:
            self._type = samples.dtype.newbyteorder("<")
            start = {"format": FORMAT, "started": datetime.now(UTC).isoformat(), "dtype": self._type.str}
            write_json(self.folder / "session.json", start | self._about, exact=True)
        self._samples.write(np.ascontiguousarray(samples.T, self._type).tobytes())
        self._times.write(np.ascontiguousarray(times, "<f8").tobytes())
        self.count += len(times)
        self.log(chunk=len(times), arrived=arrived)

    def log(self, **line: Any) -> None:
        """Write a line."""
        self._log.write(json.dumps(line).encode() + b"\n")

    def close(self) -> None:
        """Close the files."""
        for file in (self._log, self._samples, self._times):
            file.close()


@dataclass
class Session:
    """What a session's folder holds, as far as it is whole."""

    folder: Path
    about: dict[str, Any]
    samples: np.ndarray
    times: np.ndarray
    log: list[dict[str, Any]]
    torn: int = 0
    """Bytes at the ends that a kill left without the rest."""

    @classmethod
    def read(cls, folder: str | Path) -> Self:
        """Read a folder, also one of a process that was killed or still runs."""
        folder = Path(folder)
        if not (folder / "session.json").is_file():
            raise UserError(f"{folder}: holds no session; name a folder that `live` or `calibrate` wrote")
        about = read_json(folder / "session.json", "a session")
        with reading(folder, "holds no whole session"):
            if about["format"] > FORMAT:
                raise UserError(f"{folder}: has format {about['format']}, this nearfar reads up to {FORMAT}")
            dtype, channels = np.dtype(about["dtype"]), len(about["ch_names"])
            sizes = [(folder / name).stat().st_size for name in ("samples.bin", "times.bin")]
            text = (folder / "log.jsonl").read_bytes()
            whole = text[: text.rfind(b"\n") + 1]
            log = [json.loads(line) for line in whole.splitlines()]
            told = sum(line.get("chunk", 0) for line in log)
            count = min(sizes[0] // (dtype.itemsize * channels), sizes[1] // 8)
            samples = np.memmap(folder / "samples.bin", dtype, "r", shape=(count, channels)) if count else None
            times = np.fromfile(folder / "times.bin", "<f8", count)
            torn = sizes[0] - told * dtype.itemsize * channels
            if told > count:
                raise ValueError(f"the log tells of {told} samples, {count} are there")
            if count > told:  # came, and the kill was before the line
                log.append({"chunk": count - told, "arrived": float(times[-1])})
        return cls(folder, about, np.zeros((0, channels)) if samples is None else samples, times, log, torn)

    @property
    def rate(self) -> float:
        """Hz."""
        return float(self.about["rate"])

    def decisions(self) -> list[dict[str, Any]]:
        """As they were sent."""
        return [line for line in self.log if "decision" in line]

    def events(self) -> list[dict[str, Any]]:
        """Gaps, clocks, losses, returns: what happened, each at its `sample`."""
        return [line for line in self.log if "event" in line]

    def markers(self) -> list[tuple[float, str]]:
        """(seconds of recorded signal from its start, text) of each marker, by the time of the samples."""
        if not len(self.times):
            return []
        found = [(line["time"], line["marker"]) for line in self.log if "marker" in line]
        places = np.searchsorted(self.times, [at - 0.5 / self.rate for at, _ in found])
        return [(int(place) / self.rate, text) for place, (_, text) in zip(places, found) if place < len(self.times)]

    def parts(self) -> Iterator[tuple[np.ndarray, bool]]:
        """The chunks (channels, times) in their order, and whether a gap is before each."""
        at, gap = 0, False
        for line in self.log:
            gap |= line.get("event") in BREAKS
            if count := line.get("chunk"):
                yield np.asarray(self.samples[at : at + count]).T, gap
                at, gap = at + count, False

    def raw(self) -> mne.io.RawArray:
        """The recording with its markers; `EDGE gap` stands where samples are missing."""
        volts = UNITS[self.about["unit"]]
        info = mne.create_info(list(self.about["ch_names"]), self.rate, "eeg")
        info.set_montage(standard_montage(), on_missing="ignore", match_case=False, verbose="ERROR")
        raw = mne.io.RawArray(np.asarray(self.samples, float).T * volts, info, verbose="ERROR")
        raw.set_meas_date(datetime.fromisoformat(self.about["started"]))
        marks = self.markers()
        marks += [(e["sample"] / self.rate, "EDGE gap") for e in self.events() if e["event"] in BREAKS]
        marks = sorted(set(marks))
        noted = mne.Annotations([at for at, _ in marks], 0.0, [text for _, text in marks], raw.info["meas_date"])
        with quiet():
            return raw.set_annotations(noted)

    def save(self) -> Path:
        """Write `session_raw.fif`."""
        path = self.folder / "session_raw.fif"
        with atomic_path(path) as temporary, quiet():
            self.raw().save(temporary, fmt="double", overwrite=True)
        return path

    def to_bids(self, root: str | Path, subject: str, session: str = "1", task: str = "imagery", run: int = 1) -> Path:
        """Write it into a BIDS dataset as BrainVision files, its markers as events."""
        import mne_bids

        path = mne_bids.BIDSPath(root=root, subject=subject, session=session, task=task, run=run, datatype="eeg")
        header = path.copy().update(suffix="eeg", extension=".vhdr").fpath
        if header.exists():
            raise UserError(f"{header}: is there; name another run")
        raw = self.raw()
        raw.info["line_freq"] = raw.info["line_freq"] or 50
        with quiet():
            mne_bids.write_raw_bids(raw, path, format="BrainVision", allow_preload=True, verbose="ERROR")
        return Path(header)


BREAKS = ("gap", "edge", "returned")
"""Events after which the samples do not go on: everything that has a state but a running alignment begins anew."""


@dataclass
class Live:
    """Decodes a session piece by piece, live or again; decisions are dicts as `sinks` says, without times."""

    decoder: Decoder
    ch_names: Sequence[str]
    rate: float
    unit: str
    step: int
    rule: Rule
    count: int = 0
    _stream: StreamDecoder | None = field(default=None, repr=False)
    _start: int = 0

    def push(self, samples: np.ndarray, gap: bool) -> list[dict[str, Any]]:
        """The decisions that samples (channels, times) complete."""
        if gap or self._stream is None:
            self._start = self.count
            self._stream = StreamDecoder.live(
                self.decoder, self.step, rate=self.rate, ch_names=self.ch_names, unit=self.unit, rule=self.rule,
                batch_size=1, first=self.count, after=self._stream,
            )  # fmt: skip
        self.count += samples.shape[1]
        return self._told(self._stream.push(samples))

    def _told(self, made: Decisions) -> list[dict[str, Any]]:
        names, factor = self.decoder.classes, round(self.rate / self.decoder.sfreq)
        skip = -self._start % factor
        told = []
        for time_, shares, decision, command, reason in zip(*vars(made).values()):
            end = self._start + skip + (round(time_ * self.decoder.sfreq) - 1) * factor
            shares = [float(share) if np.isfinite(share) else None for share in shares]
            shares = shares if len(shares) == len(names) else [None] * len(names)
            told.append(
                {
                    "sample": end,
                    "probabilities": dict(zip(names, shares)),
                    "decision": None if decision == metrics.NO_DECISION else names[decision],
                    "command": None if command == metrics.NO_DECISION else names[command],
                    "abstained": str(reason),
                }
            )
        return told


def digests(decoder_folder: str | Path, rule: Rule, step: int) -> dict[str, str]:
    """Of the decoder, of the code that decodes, and of the settings."""
    return {
        "decoder": model_digest(decoder_folder),
        "code": source_digest(StreamDecoder, Decoder, Live),
        "settings": data_digest(asdict(rule), step),
    }


def decoder_rule(decoder: Decoder, threshold: float | None = None, idle: str | None = None, **rule: Any) -> Rule:
    """A rule for a decoder: its own threshold unless another is given; the class `idle`, or `rest`, does nothing."""
    own = decoder.metrics.get("threshold", {}).get("threshold", 0.0)
    idle = "rest" if idle is None and "rest" in decoder.classes else idle
    if idle is not None and idle not in decoder.classes:
        raise UserError(f"the decoder has no class {idle} to do nothing; it has {', '.join(decoder.classes)}")
    number = None if idle is None else decoder.classes.index(idle)
    return Rule(threshold=own if threshold is None else threshold, idle=number, **rule)


def run(
    source: Source,
    folder: str | Path,
    decoder_folder: str | Path | None = None,
    *,
    every: float = 0.1,
    rule: Rule | None = None,
    sinks: Sequence[Sink] = (),
    seconds: float | None = None,
    markers: Callable[[], list[tuple[float, str]]] = list,
    stop: Callable[[], bool] = lambda: False,
    decoder: Decoder | None = None,
) -> dict[str, Any]:
    """Record a source into `folder` and decode it until it ends, `seconds` of samples have come, or `stop` says so.

    Args:
        decoder_folder: the decoder; None records only.
        every: seconds from one window to the next.
        rule: see `decoder_rule`.
        markers: gives markers of this machine's own, (time of the source's clock, text), each once.
        decoder: the decoder as it is to be used, such as `preprocessed(causal=True)`.

    Returns:
        Counts: `samples, seconds, decisions, commands, abstained, gaps, lost, clocks, overruns` (chunks that came while
        their time had passed before they were decoded), and the decisions' `latency` and `compute`: median, 99th
        percentile and (of the latency) jitter, the spread between its quartiles, in seconds.

    A KeyboardInterrupt ends the session as `stop` does.
    """
    with locked(folder, "records a session"), one_thread():
        return _run(source, folder, decoder_folder, every, rule, sinks, seconds, markers, stop, decoder)


def _run(source, folder, decoder_folder, every, rule, sinks, seconds, markers, stop, decoder) -> dict[str, Any]:  # type: ignore[no-untyped-def]
    about: dict[str, Any] = {
        "source": source.about | {"name": source.name}, "ch_names": source.ch_names, "rate": source.rate,
        "unit": source.unit,
    }  # fmt: skip
    live = None
    if decoder_folder is not None:
        decoder = decoder or Decoder.load(decoder_folder)
        rule, step = rule or decoder_rule(decoder), max(1, round(every * decoder.sfreq))
        live = Live(decoder, source.ch_names, source.rate, source.unit, step, rule)
        live.push(np.zeros((len(source.ch_names), 0)), True)  # refuses what does not fit before anything is recorded
        about |= {"decoder": str(decoder_folder), "classes": decoder.classes, "step": step, "rule": asdict(rule)}
        about |= {"preprocessing": decoder.preprocessing.to_dict(), "gate": decoder.metrics.get("gate")}
        about["digests"] = digests(decoder_folder, rule, step)
        shape = (1, len(decoder.ch_names), int(decoder.network.n_times))
        decoder.predict_proba(np.random.default_rng(0).normal(size=shape).astype(np.float32))  # the first is slow
    recorder, continuity = Recorder(folder, about), Continuity(source.rate)
    counts = dict.fromkeys(("decisions", "commands", "abstained", "gaps", "lost", "clocks", "overruns"), 0)
    latencies, computed = [], []
    file = source.about.get("kind") == "file"
    try:
        while not stop() and (seconds is None or recorder.count < seconds * source.rate):
            chunk = source.read()
            if chunk is None:
                break
            gap = False
            for note in chunk.notes:
                recorder.log(**note, sample=recorder.count, time=chunk.arrived)
                gap |= note["event"] in BREAKS
                counts["gaps"] += note["event"] == "edge"
            if chunk.lost:
                counts["lost"] += chunk.lost
                counts["gaps"] += 1
                gap = True
                recorder.log(event="gap", lost=chunk.lost, seconds=chunk.lost / source.rate, sample=recorder.count)
            for at, text in (*chunk.markers, *markers()):
                recorder.log(marker=text, time=at)
            breaks = [] if file else continuity.push(chunk.times, chunk.arrived, chunk.lost)
            bounds = [0, *(each["at"] for each in breaks), len(chunk.times)]
            for number, (start, end) in enumerate(pairwise(bounds)):
                if number:
                    found = breaks[number - 1]
                    counts["gaps" if found["event"] == "gap" else "clocks"] += 1
                    counts["lost"] += found["lost"]
                    gap |= found["event"] == "gap"
                    recorder.log(**{k: v for k, v in found.items() if k != "at"}, sample=recorder.count)
                if end == start:
                    continue
                samples, times = chunk.samples[:, start:end], chunk.times[start:end]
                recorder.append(samples, times, chunk.arrived)
                if live is None:
                    continue
                begun = time.perf_counter()
                made = live.push(samples.astype(float), gap)
                gap = False
                if not made:
                    continue
                share = (time.perf_counter() - begun) / len(made)
                base = live.count - len(times)
                for decision in made:
                    decision["time"] = float(times[max(0, decision["sample"] - base)])
                    decision["latency"] = (
                        time.perf_counter() - begun + max(0.0, source.clock() - chunk.arrived) * (not file)
                    )
                    decision["compute"] = share
                    latencies.append(decision["latency"])
                    computed.append(share)
                    counts["decisions"] += 1
                    counts["commands"] += decision["command"] is not None
                    counts["abstained"] += decision["abstained"] != ""
                    recorder.log(**decision)
                    for sink in sinks:
                        sink(decision)
            if (
                len(chunk.times)
                and not file
                and source.clock() - chunk.arrived > max(0.1, len(chunk.times) / source.rate)
            ):
                counts["overruns"] += 1
                recorder.log(event="overrun", seconds=source.clock() - chunk.arrived, sample=recorder.count)
    except KeyboardInterrupt:
        recorder.log(event="interrupted", sample=recorder.count)
    except UserError as error:
        recorder.log(event="ended", reason=str(error), sample=recorder.count)
        raise
    finally:
        recorder.close()
        source.close()
    if not recorder.count:
        raise UserError(f"{source.name}: no sample came")
    Session.read(folder).save()
    return {"samples": recorder.count, "seconds": recorder.count / source.rate} | counts | spread(latencies, computed)


def spread(latencies: Sequence[float], computed: Sequence[float]) -> dict[str, Any]:
    """Median, 99th percentile and jitter of latencies, in seconds; empty without any."""
    if not len(latencies):
        return {}
    quarters = np.quantile(latencies, [0.25, 0.5, 0.75, 0.99])
    return {
        "latency": float(quarters[1]),
        "latency_p99": float(quarters[3]),
        "jitter": float(quarters[2] - quarters[0]),
        "compute": float(np.median(computed)),
        "compute_p99": float(np.quantile(computed, 0.99)),
    }


@dataclass(frozen=True)
class Replay:
    """A session decoded again. `differences` tells the first decisions that are others, `changed` which digests are."""

    decisions: list[dict[str, Any]]
    differences: list[str]
    changed: list[str]

    @property
    def same(self) -> bool:
        """Whether each decision is the recorded one to the last bit."""
        return not self.differences


def replay(folder: str | Path, decoder_folder: str | Path | None = None, session: Session | None = None) -> Replay:
    """Decode a session's recorded samples as it was decoded live, and compare.

    decoder_folder: the decoder, where it is no longer where it was. A session without one is a UserError.
    """
    session = session or Session.read(folder)
    if "decoder" not in session.about:
        raise UserError(f"{folder}: was recorded without a decoder, so it has no decisions")
    place = Path(decoder_folder or session.about["decoder"])
    decoder = Decoder.load(place)
    changes = session.about["preprocessing"]
    decoder = decoder.preprocessed(causal=changes["causal"])
    rule, step = Rule(**session.about["rule"]), session.about["step"]
    now = digests(place, rule, step)
    changed = [name for name, digest in session.about["digests"].items() if now[name] != digest]
    live = Live(decoder, session.about["ch_names"], session.rate, session.about["unit"], step, rule)
    with one_thread():
        made = [decision for part, gap in session.parts() for decision in live.push(part.astype(float), gap)]
    given = session.decisions()
    keys = ("sample", "probabilities", "decision", "command", "abstained")
    differences = [
        f"at sample {one['sample']}: {key} {other[key]} live, {one[key]} again"
        for one, other in zip(made, given)
        for key in keys
        if one[key] != other[key]
    ]
    # a kill may come between a window's last sample and its decision
    last = given[-1]["sample"] if given else -1
    late = [one for one in made[len(given) :] if one["sample"] <= last]
    if len(given) > len(made) or late:
        differences.append(f"{len(given)} decisions live, {len(made)} again")
    return Replay(made, differences, changed)
