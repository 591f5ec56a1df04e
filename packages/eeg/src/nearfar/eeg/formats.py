"""Recordings in formats that MNE does not read: XDF (LSL's LabRecorder), OpenBCI's text files, BrainFlow's tables."""

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import mne
import numpy as np

from nearfar.core.errors import UserError
from nearfar.core.reading import reading

UNITS = {"v": 1.0, "volt": 1.0, "mv": 1e-3, "millivolt": 1e-3, "uv": 1e-6, "µv": 1e-6, "microvolt": 1e-6, "nv": 1e-9}

BOARDS = {15: (4, 200.0), 24: (8, 250.0), 32: (16, 125.0)}
"""Columns of a BrainFlow table, which names none -> what it is taken for: EEG channels and nominal rate of a Ganglion,
a Cyton, a Cyton with Daisy. The packet's number is first, the EEG follows, time and marker are last."""


def read_xdf(path: Path, notes: list[str]) -> mne.io.BaseRaw:
    """The EEG stream of an XDF file, the texts of its marker streams as annotations (the extra nearfar-eeg[xdf]).

    Where samples are lost, an annotation `EDGE gap` stands. Several EEG streams in one file are a `UserError`.
    """
    try:
        import pyxdf
    except ImportError as error:
        raise UserError(f"{path}: XDF needs pyxdf; install nearfar-eeg[xdf]") from error
    with reading(path, "cannot be read as XDF", "it may be damaged or cut off; copy it again"):
        # its own smoothing of the times would spread lost samples over the whole stream
        streams, _ = pyxdf.load_xdf(str(path), dejitter_timestamps=False)
        told = [(_one(s["info"], "name"), _one(s["info"], "type").lower(), s) for s in streams]
    signals = [(name, s) for name, kind, s in told if kind == "eeg"]
    if len(signals) != 1:
        listed = ", ".join(f"{name} ({kind})" for name, kind, _ in told) or "none"
        raise UserError(f"{path}: {len(signals)} EEG streams where one is wanted; its streams: {listed}")
    name, stream = signals[0]
    with reading(path, "its EEG stream cannot be used", "it may be damaged or cut off; copy it again"):
        values = np.asarray(stream["time_series"], float).T
        times = np.maximum.accumulate(np.asarray(stream["time_stamps"], float))
        rate = float(_one(stream["info"], "nominal_srate") or 0.0)
        described = _one(stream["info"], "desc")
        channels = _one(described, "channels") if isinstance(described, dict) else None
        listed_channels = channels.get("channel", []) if isinstance(channels, dict) else []
    if values.ndim != 2 or values.shape[1] < 2:
        raise UserError(f"{path}: its EEG stream {name} has no samples")
    measured = (len(times) - 1) / (times[-1] - times[0]) if times[-1] > times[0] else rate
    steps = np.diff(times)
    if rate <= 0:
        rate = float(np.round(1 / np.median(steps)))
        notes.append(f"the stream {name} tells no rate; {rate:g} Hz by its times")
    gaps, lost = _gaps(times, rate)
    if not len(gaps) and abs(measured / rate - 1) > 0.02:
        notes.append(f"the stream {name} says {rate:g} Hz, its times {measured:.2f} Hz")
    labels = [_one(channel, "label") for channel in listed_channels]
    if len(labels) != len(values) or not all(labels):
        notes.append(f"the stream {name} names {len(labels)} of {len(values)} channels: numbered instead")
        labels, listed_channels = [f"Channel {k + 1}" for k in range(len(values))], []
    units = [_one(channel, "unit").lower().rstrip("s") for channel in listed_channels] or [""] * len(values)
    if not all(unit in UNITS for unit in units):
        notes.append(f"units {', '.join(sorted({u or 'none' for u in units if u not in UNITS}))}: taken for microvolts")
    values *= np.array([UNITS.get(unit, 1e-6) for unit in units])[:, None]
    raw = _raw(path, values, labels, rate)
    if len(gaps):
        notes.append(f"{len(gaps)} gaps in the stream, {lost:.2f} s lost: marked EDGE gap")
        raw.annotations.append(gaps / rate, 0.0, ["EDGE gap"] * len(gaps))
    for other, _, marks in told:
        texts = marks["time_series"]
        if marks is stream or not len(texts) or not isinstance(texts[0], list):
            continue
        at = np.asarray(marks["time_stamps"], float)
        inside = (at >= times[0]) & (at <= times[-1])
        if not inside.all():
            notes.append(f"{(~inside).sum()} of {len(at)} markers of {other} lie outside the EEG: left out")
        names = [" ".join(map(str, text)) for text in texts]
        onsets = np.interp(at, times, np.arange(len(times))) / rate
        raw.annotations.append(onsets[inside], 0.0, [n for n, kept in zip(names, inside, strict=True) if kept])
    return raw


def _gaps(times: np.ndarray, rate: float) -> tuple[np.ndarray, float]:
    """Samples before which others are lost, and seconds lost: where the times step ahead and do not come back."""
    ahead = times - np.arange(len(times)) / rate
    around = max(2, round(rate))
    gaps, lost = [], 0.0
    for k in np.flatnonzero(np.diff(times) > max(0.1, 4 / rate)) + 1:
        step = float(np.median(ahead[k : k + around]) - np.median(ahead[max(0, k - around) : k]))
        if step > max(0.05, 2 / rate):
            gaps.append(int(k))
            lost += step
    return np.array(gaps, dtype=int), lost


def is_openbci(path: Path) -> bool:
    """Whether a text file begins like one of OpenBCI's."""
    with path.open("rb") as stream:
        return stream.read(64).lstrip().startswith(b"%OpenBCI")


def read_openbci(path: Path, notes: list[str]) -> mne.io.BaseRaw:
    """A text file of OpenBCI's GUI: EEG in microvolts, all else (accelerometer, digital pins, ...) as type misc.

    Rows that are not whole, as the last one of an interrupted recording, are left out and told.
    """
    with reading(path, "cannot be read as an OpenBCI text file"):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        head = [line for line in lines if line.startswith("%")]
        rate = _setting(head, "Sample Rate", path)
        body = [line for line in lines if line.strip() and not line.startswith("%")]
        titles = [text.strip() for text in body[0].split(",")] if body and body[0][:1].isalpha() else []
        rows = [line.split(",") for line in body[1 if titles else 0 :]]
        width = len(titles) or len(rows[0])
        count = round(_setting(head, "Number of channels", path))
    if not titles:
        titles = ["Sample Index", *(f"EXG Channel {k}" for k in range(count))]
        titles += [f"Other {k}" for k in range(width - len(titles))]
    wanted = [k for k, title in enumerate(titles) if title.upper().startswith("EXG CHANNEL")][:count]
    others = [k for k, title in enumerate(titles) if k not in wanted and "format" not in title.lower()]
    values = np.full((len(rows), len(titles)), np.nan)
    bad = 0
    for index, row in enumerate(rows):
        try:
            values[index, wanted] = [float(row[k]) for k in wanted]
            values[index, others] = [float(row[k]) for k in others]
        except (ValueError, IndexError):
            bad += 1
    values = values[np.isfinite(values[:, wanted]).all(axis=1)]
    if not wanted or len(values) < 2:
        raise UserError(f"{path}: no EXG channels or no samples; give a recording of OpenBCI's GUI")
    if bad:
        notes.append(f"{bad} of {len(rows)} rows are not whole: left out")
    _check_counter(values[:, 0], notes)
    return _table(path, values, titles, wanted, others, rate)


def read_brainflow(path: Path, notes: list[str]) -> mne.io.BaseRaw:
    """A table as BrainFlow writes it, of the boards in `BOARDS`, by its number of columns. EEG in microvolts."""
    with reading(path, "cannot be read as a BrainFlow table"), path.open(encoding="utf-8") as stream:
        first = stream.readline()
        stream.seek(0)
        values = np.loadtxt(stream, delimiter="\t" if "\t" in first else ",", ndmin=2)
    columns = values.shape[1]
    if columns not in BOARDS or len(values) < 2:
        known = ", ".join(f"{width} (of {count} channels)" for width, (count, _) in BOARDS.items())
        raise UserError(f"{path}: {columns} columns, known are {known}; save the recording as EDF or FIF")
    count, rate = BOARDS[columns]
    notes.append(f"{columns} columns: taken for a board of {count} EEG channels at {rate:g} Hz, time and marker last")
    times = values[:, -2]
    measured = (len(times) - 1) / (times[-1] - times[0]) if times[-1] > times[0] else rate
    if abs(measured / rate - 1) > 0.1:
        near = min((125.0, 200.0, 250.0, 256.0, 500.0, 1000.0), key=lambda known: abs(known - measured))
        notes.append(f"times tell {measured:.1f} Hz where the board has {rate:g} Hz: {near:g} Hz taken")
        rate = near
    _check_counter(values[:, 0], notes)
    wanted = list(range(1, count + 1))
    titles = ["Package", *(f"EXG Channel {k}" for k in range(count))]
    titles += [f"Other {k}" for k in range(columns - count - 3)] + ["Timestamp", "Marker"]
    others = [k for k in range(columns) if k not in wanted]
    return _table(path, values, titles, wanted, others, rate)


def _one(info: Any, name: str) -> Any:
    """The only entry of a list under a name of an XDF description; "" where there is none."""
    found = (info or {}).get(name) or [""]
    return (found[0] if isinstance(found, list) else found) or ""


def _setting(head: Sequence[str], name: str, path: Path) -> float:
    for line in head:
        if line.lower().startswith(f"%{name}".lower()):
            return float(line.partition("=")[2].split()[0])
    raise UserError(f"{path}: its header tells no {name}; give a recording of OpenBCI's GUI")


def _check_counter(values: np.ndarray, notes: list[str]) -> None:
    """Say how many packets a counter that begins anew (at 255 or so) shows to be lost."""
    steps = np.diff(np.nan_to_num(values).astype(int))
    if len(steps) and (top := int(np.nanmax(values))) > 1:
        forward = steps[steps > 0]
        usual = int(np.median(forward)) if len(forward) else 1
        lost = sum(int(step) // max(usual, 1) - 1 for step in steps % (top + usual) if step > usual)
        if lost:
            notes.append(f"about {lost} packets are lost by the counter")


def _table(
    path: Path, values: np.ndarray, titles: Sequence[str], wanted: list[int], others: list[int], rate: float
) -> mne.io.BaseRaw:
    scale = np.array([1e-6 if k in wanted else 1.0 for k in (*wanted, *others)])
    names = [titles[k] for k in (*wanted, *others)]
    marker = [titles[k] for k in others if titles[k].lower().startswith("marker")]
    data = np.nan_to_num(values[:, [*wanted, *others]]).T * scale[:, None]
    types = ["eeg"] * len(wanted) + ["stim" if titles[k] in marker else "misc" for k in others]
    return _raw(path, data, names, rate, types)


def _raw(
    path: Path, data: np.ndarray, names: Sequence[str], rate: float, types: str | list[str] = "eeg"
) -> mne.io.BaseRaw:
    if not 0 < rate < 1e6:
        raise UserError(f"{path}: its rate of {rate:g} Hz cannot be; give another recording")
    unique = [name if list(names).count(name) == 1 else f"{name}-{k}" for k, name in enumerate(names)]
    raw = mne.io.RawArray(data, mne.create_info(unique, rate, types), verbose="ERROR")
    raw.info["description"] = str(path)
    return raw


def check_matlab(path: Path) -> None:
    """Raise UserError where the parts of a MATLAB file (version 5 to 7) are not what its tags say.

    scipy reads beyond its memory where the type of a part is none, and ends the process.
    """
    with path.open("rb") as file:
        head = file.read(128)
        if len(head) < 128 or head[126:128] not in (b"IM", b"MI"):
            return  # version 4, or 7.3
        order: Literal["little", "big"] = "little" if head[126:128] == b"IM" else "big"
        while len(tag := file.read(8)) == 8:
            kind, size = (int.from_bytes(tag[i : i + 4], order) for i in (0, 4))
            content = file.read(size)
            if len(content) < size:
                raise UserError(f"{path}: truncated; copy it again")
            _check_parts(path, zlib.decompress(content) if kind == 15 else tag + content, order)


def _check_parts(path: Path, content: bytes, order: Literal["little", "big"]) -> None:
    place = 0
    while place + 8 <= len(content):
        kind, size = (int.from_bytes(content[place + i : place + i + 4], order) for i in (0, 4))
        small = kind >> 16  # bytes that stand in the tag itself
        kind, size, begin = (kind & 0xFFFF, small, place + 4) if small else (kind, size, place + 8)
        if not 1 <= kind <= 18 or begin + size > len(content) or small > 4:
            raise UserError(f"{path}: damaged, a part of it is of type {kind} and {size:,} bytes; copy it again")
        if kind == 14:
            _check_parts(path, content[begin : begin + size], order)
        place = place + 8 if small else begin + size + -size % 8
