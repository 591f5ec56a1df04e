"""Where samples come from: LSL streams, files at any speed, BrainFlow boards; and what is wrong with their times.

A source has `name`, `ch_names`, `rate` (Hz), `unit`, `about` (plain values that tell where it was), `read()`, which
gives the next `Chunk`, or None at the end, `clock()` and `close()`. LSL needs nearfar-eeg[live], boards need
nearfar-eeg[boards].
"""

import functools
import os
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, Unpack

import numpy as np

from nearfar.core.errors import UserError
from nearfar.eeg.annotations import annotations, is_edge
from nearfar.eeg.conventions import standard_name
from nearfar.eeg.recordings import UNITS, Reading, Recording

LOOPBACK = """[ports]
IPv6 = disable
[multicast]
ResolveScope = machine
ListenAddress = 127.0.0.1
[lab]
KnownPeers = {127.0.0.1}
[log]
level = -2
"""
"""Settings of liblsl: this machine and no other, unless a file of the user's own (LSLAPICFG) says otherwise."""

LSL_UNITS = {
    "microvolts": "uV", "microvolt": "uV", "µv": "uV", "uv": "uV", "-6": "uV", "volts": "V", "volt": "V", "v": "V",
    "0": "V", "millivolts": "mV", "millivolt": "mV", "mv": "mV", "-3": "mV", "nanovolts": "nV", "nv": "nV", "-9": "nV",
}  # fmt: skip


@dataclass(frozen=True)
class Chunk:
    """What came in.

    samples: (channels, times), maybe none.
    times: of each sample, in seconds of this machine's clock (`clock` of the source).
    arrived: when they came, by that clock.
    markers: time and text of each.
    notes: what happened before the samples, each with `event` (lost, returned, order, edge ...).
    lost: samples that are known to be lost before these: the device says so, or a connection that broke held them.
    """

    samples: np.ndarray
    times: np.ndarray
    arrived: float
    markers: tuple[tuple[float, str], ...] = ()
    notes: tuple[dict[str, Any], ...] = ()
    lost: int = 0


class Source(Protocol):
    """See the module."""

    name: str
    ch_names: list[str]
    rate: float
    unit: str
    about: dict[str, Any]

    def read(self) -> Chunk | None: ...

    def clock(self) -> float: ...

    def close(self) -> None: ...


@functools.cache
def lsl() -> Any:
    """The module `mne_lsl.lsl`, kept to this machine. Raises UserError where it is not installed."""
    if find_spec("mne_lsl") is None:
        raise UserError("LSL streams need mne-lsl: pip install 'nearfar-eeg[live]'")
    import mne_lsl.lsl as library

    if "LSLAPICFG" not in os.environ:
        library.set_config_content(LOOPBACK)
    return library


def find_streams(seconds: float = 1.0) -> list[dict[str, Any]]:
    """The LSL streams that answer within `seconds`."""
    found = lsl().resolve_streams(timeout=seconds)
    keys = ("name", "stype", "source_id", "n_channels", "sfreq", "hostname")
    rows = [{key: getattr(info, key) for key in keys} for info in found]
    return sorted(rows, key=lambda row: (row["name"], row["source_id"]))


class StreamSource:
    """An LSL stream by its name, type or source id, and optionally one of markers.

    Where it stops, the stream is waited for, for `patience` seconds; it must return with the same channels, in whatever
    order, and the same rate. What has come waits here, however much it is, since liblsl gives nothing more of a
    connection that broke; what came after the last `read` before that is counted as lost.

    Args:
        name, stype, source_id: at least one; they must name one stream.
        markers: name of a stream of markers: texts, or one channel for each event.
        unit: of the samples, where the stream does not tell or tells wrongly.
        timeout: seconds to look for it.
        patience: seconds without any sample after which the stream has ended.

    Raises:
        UserError: no such stream or several, no channel names, an unknown unit; when it returns as another.
    """

    def __init__(
        self,
        name: str | None = None,
        stype: str | None = None,
        source_id: str | None = None,
        *,
        markers: str | None = None,
        unit: str | None = None,
        timeout: float = 3.0,
        patience: float = 30.0,
    ) -> None:
        self._wanted = {"name": name, "stype": stype, "source_id": source_id}
        self._library, self.patience = lsl(), patience
        if not any(self._wanted.values()):
            raise UserError("name a stream: its name, type or source id; `streams` lists what there is")
        info = self._one(self._wanted, timeout)
        self._wanted = {key: getattr(info, key) or None for key in self._wanted}
        self._inlet, sinfo = self._open(info)
        self.name, self.rate = info.name, float(info.sfreq)
        if self.rate <= 0:
            raise UserError(f"stream {self.name}: has no regular rate; EEG is sampled at one")
        self.ch_names = _channel_names(sinfo)
        self.unit = unit or _unit(sinfo)
        if self.unit not in UNITS:
            raise UserError(f"stream {self.name}: unit {self.unit!r} is none of {', '.join(UNITS)}; name one of them")
        self.about = {"kind": "lsl", **self._wanted, "hostname": info.hostname}
        self._order: list[int] | None = None
        self._markers = None if markers is None else self._open(self._one({"name": markers}, timeout))
        self._waiting: deque[Chunk] = deque()
        self._broken = ""  # silent or lost, where the stream is waited for
        self._heard, self._asked, self._ended = self.clock(), False, False
        self._offset_at, self.offset = -np.inf, 0.0

    def clock(self) -> float:
        """LSL's clock, seconds."""
        return float(self._library.local_clock())

    def read(self) -> Chunk | None:
        """The next samples that have come, at most 4096; where there are none, those of the next 10 ms or so."""
        if not self._ended:
            self._take()
        return self._waiting.popleft() if self._waiting else None

    def _take(self) -> None:
        """Let all that has come wait, at least a chunk without samples."""
        notes: list[dict[str, Any]] = []
        if self._broken:
            self._return(notes)
            return
        try:
            self._correct(notes)
            full = True
            while full:
                samples, times = self._inlet.pull_chunk(timeout=0.0 if self._waiting else 0.01, max_samples=4096)
                full = len(times) == 4096
                if len(times):
                    self._heard, self._asked = self.clock(), False
                    samples = np.array(samples.T)  # liblsl's buffer is used again
                    self._put(samples if self._order is None else samples[self._order], times, notes)
            silent = self.clock() - self._heard
            if silent > self.patience:
                self._end(notes, f"no sample for {self.patience:g} s")
            elif silent > min(3.0, self.patience / 2) and not self._asked:
                self._asked, self._broken = True, "silent"  # once: a connection may have died without a word
                notes.append({"event": "lost", "reason": "no sample came for 3 s"})
        except RuntimeError as error:
            if not self._waiting:  # else that first: a connection that is lost stays so
                self._broken = "lost"
                notes.append({"event": "lost", "reason": str(error)})
                self._put_none(notes, _held(self._inlet))
        if notes or not self._waiting:
            self._put_none(notes)

    def _put_none(self, notes: list[dict[str, Any]], lost: int = 0) -> None:
        self._put(np.zeros((len(self.ch_names), 0), np.float32), np.zeros(0), notes, lost)

    def _put(self, samples: np.ndarray, times: np.ndarray, notes: list[dict[str, Any]], lost: int = 0) -> None:
        """Let samples wait, and take the notes."""
        markers = self._read_markers(notes)
        self._waiting.append(Chunk(samples, times + self.offset, self.clock(), markers, tuple(notes), lost))
        notes.clear()

    def _correct(self, notes: list[dict[str, Any]]) -> None:
        """Ask every 5 s how far the sender's clock is from this machine's."""
        if self.clock() - self._offset_at <= 5:
            return
        told = {}
        try:
            self.offset = float(self._inlet.time_correction(timeout=2.0))
        except TimeoutError:
            told = {"reason": "the sender's clock did not answer within 2 s; what was known of it stands"}
        self._offset_at = self.clock()
        notes.append({"event": "offset", "seconds": self.offset} | told)

    def close(self) -> None:
        """Close the stream."""
        self._inlet.close_stream()

    def _one(self, wanted: dict[str, str | None], timeout: float) -> Any:
        told = ", ".join(f"{key} {value}" for key, value in wanted.items() if value)
        until = self.clock() + timeout
        while True:  # all are asked, since a search by name ends with the first that answers
            there = self._library.resolve_streams(timeout=1.0)
            found = [info for info in there if all(not v or getattr(info, k) == v for k, v in wanted.items())]
            if found or self.clock() >= until:
                break
        if len(found) > 1:
            ids = ", ".join(sorted(f"{info.source_id or 'without one'} on {info.hostname}" for info in found))
            raise UserError(f"{len(found)} streams have the {told}; choose one by its source id: {ids}")
        if not found:
            others = ", ".join(sorted(f"{info.name} ({info.stype}, {info.source_id})" for info in there))
            raise UserError(f"no stream has the {told}; there are: {others or 'none at all'}")
        return found[0]

    def _open(self, info: Any) -> tuple[Any, Any]:
        inlet = self._library.StreamInlet(info, recover=False)
        inlet.open_stream(timeout=5.0)
        return inlet, inlet.get_sinfo(timeout=5.0)

    def _return(self, notes: list[dict[str, Any]]) -> None:
        """Wait for the stream."""
        until = self.clock() + self.patience
        while self.clock() < until:
            try:
                info = self._one(self._wanted, 1.0)
                inlet, sinfo = self._open(info)
            except (RuntimeError, TimeoutError):
                continue
            except UserError as error:
                if "choose one" in str(error):
                    raise
                continue
            if self._broken == "silent" and self._inlet.samples_available:  # no more; all that was sent came here
                inlet.close_stream()
                notes.append({"event": "returned", "source_id": info.source_id})
                break
            names = [standard_name(name) for name in _channel_names(sinfo)]
            ours = [standard_name(name) for name in self.ch_names]
            if abs(info.sfreq - self.rate) > 1e-6 * self.rate or sorted(names) != sorted(ours):
                raise UserError(
                    f"stream {self.name}: returned with {len(names)} channels ({', '.join(names[:4])}, ...) at "
                    f"{info.sfreq:g} Hz where it had {len(ours)} ({', '.join(ours[:4])}, ...) at {self.rate:g} Hz; "
                    "begin a new session"
                )
            self._order = None if names == ours else [names.index(name) for name in ours]
            self._inlet, self._heard, self._offset_at = inlet, self.clock(), -np.inf
            notes.append({"event": "returned", "source_id": info.source_id})
            if self._order is not None:
                notes.append({"event": "order", "channels": names})
            break
        else:
            self._end(notes, f"it did not return within {self.patience:g} s")
        self._broken = ""
        self._put_none(notes)

    def _end(self, notes: list[dict[str, Any]], reason: str) -> None:
        notes.append({"event": "ended", "reason": reason})
        self._ended = True

    def _read_markers(self, notes: list[dict[str, Any]]) -> tuple[tuple[float, str], ...]:
        if self._markers is None:
            return ()
        inlet, sinfo = self._markers
        try:
            values, times = inlet.pull_chunk(timeout=0.0)
        except RuntimeError as error:
            reason = f"{error} {_held(inlet)} markers that it held are lost; none will come"
            notes.append({"event": "markers", "reason": reason})
            self._markers = None
            return ()
        if len(times) and isinstance(values, list):
            texts = [row[0] for row in values]
        else:
            names = sinfo.get_channel_names() or []
            rows = np.asarray(values)
            if len(names) == sinfo.n_channels and all(names):
                texts = ["+".join(names[k] for k in np.flatnonzero(row)) for row in rows]
            else:
                texts = [" ".join(f"{value:g}" for value in row) for row in rows]
        return tuple((float(at) + self.offset, text) for at, text in zip(np.array(times), texts))


def _held(inlet: Any) -> int:
    """The samples that went with an inlet's lost connection; liblsl puts an empty one behind them."""
    return max(0, inlet.samples_available - 1)


def _channel_names(sinfo: Any) -> list[str]:
    names = sinfo.get_channel_names()
    if names is None or not all(names) or len(names) != sinfo.n_channels:
        raise UserError(f"stream {sinfo.name}: does not name its channels; let the sender name them")
    return list(names)


def _unit(sinfo: Any) -> str:
    units = {str(unit).lower() for unit in sinfo.get_channel_units() or ()}
    if len(units) != 1 or (only := units.pop()) not in LSL_UNITS:
        raise UserError(f"stream {sinfo.name}: tells no one unit for all channels; say it: {', '.join(UNITS)}")
    return LSL_UNITS[only]


class FileSource:
    """A recording as if it came now: its EEG channels, its annotations as markers, its edges as gaps.

    speed: times real time; infinity gives it as fast as it is taken. chunk: seconds that come at a time.
    """

    def __init__(
        self,
        recording: Recording | str | Path,
        *,
        speed: float = 1.0,
        chunk: float = 0.04,
        **reading: Unpack[Reading],
    ) -> None:
        if not speed > 0 or not chunk > 0:
            raise UserError(f"speed and chunk must be above 0, got {speed:g} and {chunk:g}")
        recording = recording if isinstance(recording, Recording) else Recording(Path(recording), "")
        raw = recording.read(**reading).pick("eeg", exclude=())
        self.name, self.ch_names, self.rate, self.unit = recording.path.name, raw.ch_names, raw.info["sfreq"], "uV"
        self.about = {"kind": "file", "path": str(recording.path), "speed": speed}
        self.speed, self._size = speed, max(1, round(chunk * self.rate))
        self._data = raw.get_data(verbose="ERROR") * 1e6
        meaning = {n: cls for cls, names in (recording.events or {}).items() for n in np.atleast_1d(names).tolist()}
        onsets, _, names = annotations(raw)
        order = np.argsort(onsets, kind="stable")
        self._markers = [(float(onsets[k]), meaning.get(names[k], str(names[k]))) for k in order]
        self._cuts = sorted({round(at * self.rate) for at, name in self._markers if is_edge(name)})
        self._at, self._begun = 0, time.perf_counter()

    def clock(self) -> float:
        """Seconds of the recording that have passed."""
        if self.speed == np.inf:
            return self._at / self.rate
        return (time.perf_counter() - self._begun) * self.speed

    def read(self) -> Chunk | None:
        """The next samples, when it is time."""
        start = self._at
        if start >= self._data.shape[1]:
            return None
        stop = min(start + self._size, self._data.shape[1], *(cut for cut in self._cuts if cut > start))
        if (wait := stop / self.rate - self.clock()) > 0 and self.speed < np.inf:
            time.sleep(wait / self.speed)
        self._at = stop
        came = [(at, name) for at, name in self._markers if start <= at * self.rate < stop]
        notes = ({"event": "edge"},) if start in self._cuts and start else ()
        times = np.arange(start, stop) / self.rate
        return Chunk(self._data[:, start:stop], times, self.clock(), tuple(came), notes)

    def close(self) -> None:
        """Nothing is open."""


class BoardSource:
    """A board of BrainFlow (nearfar-eeg[boards]).

    Args:
        board: BrainFlow's name of it, such as CYTON_BOARD, or its number; SYNTHETIC_BOARD is made up.
        ch_names: names of its EEG channels, where BrainFlow has none.
        parameters: of BrainFlowInputParams, such as serial_port.
    """

    def __init__(
        self, board: str | int = "SYNTHETIC_BOARD", ch_names: Sequence[str] | None = None, **parameters: str | int
    ) -> None:
        if find_spec("brainflow") is None:
            raise UserError("boards need BrainFlow: pip install 'nearfar-eeg[boards]'")
        from brainflow.board_shim import BoardIds, BoardShim, BrainFlowError, BrainFlowInputParams

        BoardShim.disable_board_logger()
        known = {each.name: each.value for each in BoardIds}
        number = known.get(str(board), board)
        if isinstance(number, str) and not number.lstrip("-").isdigit():
            raise UserError(f"BrainFlow has no board {board!r}; it has {', '.join(known)}")
        given = BrainFlowInputParams()
        for key, value in parameters.items():
            if not hasattr(given, key):
                raise UserError(f"BrainFlow's boards have no parameter {key!r}")
            setattr(given, key, value)
        try:
            self._board = BoardShim(int(number), given)
            self._rows = BoardShim.get_eeg_channels(int(number))
            self._clock_row = BoardShim.get_timestamp_channel(int(number))
            self._number_row = BoardShim.get_package_num_channel(int(number))
            self.rate = float(BoardShim.get_sampling_rate(int(number)))
            self.ch_names = list(ch_names or BoardShim.get_eeg_names(int(number)))
            self._board.prepare_session()
            self._board.start_stream(450_000)
        except BrainFlowError as error:
            raise UserError(f"board {board}: {error}; see BrainFlow's list of boards and their parameters") from error
        self._errors: type[Exception] = BrainFlowError
        if len(self.ch_names) != len(self._rows):
            self.close()
            raise UserError(f"board {board}: has {len(self._rows)} EEG channels, {len(self.ch_names)} names are given")
        self.name, self.unit, self.about = str(board), "uV", {"kind": "board", "board": str(board)}
        self._number: int | None = None

    def clock(self) -> float:
        """Seconds since the epoch, as BrainFlow stamps samples."""
        return time.time()

    def read(self) -> Chunk | None:
        """The samples of the last 10 ms or so; packages that are missing by their numbers are counted."""
        time.sleep(0.01)
        try:
            data = self._board.get_board_data()
        except self._errors as error:
            raise UserError(f"board {self.name}: {error}; check its connection and begin a new session") from error
        lost, numbers = 0, data[self._number_row].astype(int)
        if len(numbers):
            before = numbers if self._number is None else np.array([self._number, *numbers])
            steps = np.diff(before) % 256
            lost = int((steps - 1)[steps > 1].sum())
            self._number = int(numbers[-1])
        return Chunk(data[self._rows], data[self._clock_row], self.clock(), lost=lost)

    def close(self) -> None:
        """End the board's session."""
        if self._board.is_prepared():
            self._board.release_session()


@dataclass
class Continuity:
    """Finds where the times of samples do not go on as the rate says.

    A step of more than `tolerance` seconds is a gap where as long has passed on this machine's clock, else a jump of
    the sender's clock, at which no sample is missing. The time of samples that are `lost` is no part of a step.
    """

    rate: float
    tolerance: float = 0.5
    _last: float | None = None
    _arrived: float = field(default=0.0)
    _lost: int = field(default=0)

    def push(self, times: np.ndarray, arrived: float, lost: int = 0) -> list[dict[str, Any]]:
        """The breaks before samples of this chunk: `at` (index), `event` (gap or clock), `seconds`, `lost` samples."""
        self._lost += lost
        if not len(times):
            return []
        before = np.concatenate([[times[0] - 1 / self.rate if self._last is None else self._last], times[:-1]])
        extra = times - before - 1 / self.rate
        extra[0] -= 0.0 if self._last is None else self._lost / self.rate
        self._lost = 0
        passed = arrived - self._arrived
        found = []
        for at in np.flatnonzero(np.abs(extra) > self.tolerance):
            seconds = float(extra[at])
            gap = seconds > 0 and passed > seconds / 2
            lost = round(seconds * self.rate) if gap else 0
            found.append({"at": int(at), "event": "gap" if gap else "clock", "seconds": seconds, "lost": lost})
        self._last, self._arrived = float(times[-1]), arrived
        return found
