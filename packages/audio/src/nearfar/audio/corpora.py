"""Finding utterances and their speakers in the usual layouts of speech corpora."""

import json
import math
import re
import shlex
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nearfar.audio.sound import SUFFIXES, Recording
from nearfar.audio.tables import read_lines, read_table
from nearfar.core.errors import UserError
from nearfar.core.fingerprint import content_digest
from nearfar.core.reading import reading

LAYOUTS = {
    "voxceleb": r"(?:.*/)?(?P<name>(?P<speaker>id\d{5})/(?P<session>[^/]+)/[^/]+)",
    "librispeech": r"(?:.*/)?(?P<speaker>\d+)/(?P<session>\d+)/(?P=speaker)-(?P=session)-\d+\.\w+",
    "vctk": r"(?:.*/)?(?P<speaker>[ps]\d+)/(?P=speaker)_(?P<number>\d{3})(?P<microphone>_mic\d)?\.\w+",
    "folder": r"(?P<speaker>[^/]+)/(?:(?P<session>[^/]+)/)?.+",
}
"""How paths below the root tell speaker and session, by the name of the layout."""


@dataclass(frozen=True)
class Utterance:
    """A recording by the name that lists use for it, with its speaker and session where they are known.

    start, seconds: the stretch of the file that it is, to the end where `seconds` is None. channel: 1, 2 ... where one
    of several is meant. content: a digest of what it holds where that is not a file's.
    """

    name: str
    path: Path
    speaker: str | None = None
    session: str | None = None
    start: float = 0.0
    seconds: float | None = None
    channel: int | None = None
    content: str | None = None

    @property
    def digest(self) -> str:
        """Of its content: that of the file, and which part of it."""
        if self.content is not None:
            return self.content
        part = (self.start, self.seconds, self.channel)
        whole = content_digest(self.path)
        return whole if part == (0.0, None, None) else f"{whole} {part}"


def find_utterances(source: str | Path, layout: str = "auto") -> list[Utterance]:
    """The recordings below a folder, in order of their names.

    `layout`: "voxceleb" (`id1xxxx/<video>/<utterance>`, names begin at the speaker), "librispeech"
    (`<speaker>/<chapter>/...`), "vctk" (without p280, p315, the utterances 000 to 024 and second microphones), "folder"
    (`<speaker>/[<session>/]...`), "kaldi" (a folder with `wav.scp` and, if any, `segments`, `reco2file_and_channel`,
    `utt2spk` or `spk2utt`), "audiofolder" (a folder with
    `metadata.csv` or `metadata.jsonl` that names `file_name` and a speaker column), or a regular expression for the
    path below the root with a group `speaker` and, if wanted, `session` and `name`. "auto" looks at the files.

    Raises UserError where nothing is there, a path does not fit the layout, or a list names a file twice.
    """
    root = Path(source)
    if root.is_file() and root.name == "wav.scp":
        root = root.parent
    if not root.is_dir():
        raise UserError(f"{source}: no such folder of recordings")
    if layout == "kaldi" or (layout == "auto" and (root / "wav.scp").is_file()):
        return _kaldi(root)
    tables = [path for name in ("metadata.csv", "metadata.jsonl") if (path := root / name).is_file()]
    if layout == "audiofolder" or (layout == "auto" and tables):
        if not tables:
            raise UserError(f"{root}: an audiofolder has a metadata.csv or metadata.jsonl")
        return _audiofolder(root, tables[0])
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        raise UserError(f"{root}: holds no recordings ({', '.join(SUFFIXES)})")
    below = [unicodedata.normalize("NFC", path.relative_to(root).as_posix()) for path in paths]
    if layout == "auto":
        fits = {name: sum(bool(re.fullmatch(LAYOUTS[name], path)) for path in below) for name in LAYOUTS}
        layout = next((name for name in ("voxceleb", "librispeech", "vctk") if 2 * fits[name] > len(below)), "folder")
    try:
        pattern = re.compile(LAYOUTS.get(layout, layout))
    except re.error as error:
        raise UserError(
            f"layout {layout!r}: is neither {', '.join(LAYOUTS)} nor a regular expression ({error})"
        ) from error
    if "speaker" not in pattern.groupindex:
        raise UserError(f"layout {layout!r}: the expression needs a group (?P<speaker>...)")
    found = []
    for path, name in zip(paths, below):
        match = pattern.fullmatch(name)
        if match is None:
            if layout == "vctk" or (layout == "folder" and "/" not in name):
                if layout == "folder":  # a flat folder: recordings of nobody in particular
                    found.append(Utterance(name, path))
                continue
            raise UserError(f"{path}: does not fit the layout {layout!r}; name another one")
        groups = match.groupdict()
        if layout == "vctk" and (
            groups["speaker"] in ("p280", "p315") or int(groups["number"]) < 25 or groups["microphone"] == "_mic2"
        ):
            continue
        found.append(Utterance(groups.get("name") or name, path, groups["speaker"], groups.get("session")))
    if not found:
        raise UserError(f"{root}: no recording is left under the rules of the layout {layout!r}")
    return found


def _kaldi(root: Path) -> list[Utterance]:
    if not (root / "wav.scp").is_file():
        raise UserError(f"{root}: a Kaldi folder has a wav.scp")
    speakers = _speakers(root)
    places: dict[str, Utterance] = {}
    for name, place in _two_columns(root / "wav.scp").items():
        channel = None
        if place.endswith("|"):
            place, channel = _decoded_file(root / "wav.scp", name, place)
        path = Path(place)
        path = existing(path if path.is_absolute() else root / path) or (root / path)
        places[name] = Utterance(name, path, channel=channel)
    if (root / "reco2file_and_channel").is_file():
        for name, rest in _two_columns(root / "reco2file_and_channel").items():
            side = rest.split()[-1]
            if name in places and side in ("A", "B", "1", "2") and channel_count(places[name].path) > 1:
                places[name] = replace(places[name], channel=1 if side in "A1" else 2)
    if (root / "segments").is_file():
        segments = _segments(root / "segments", places)
        places = {segment.name: segment for segment in segments}
    found = [replace(utterance, speaker=speakers.get(name)) for name, utterance in places.items()]
    if speakers and (lost := [utterance.name for utterance in found if utterance.speaker is None]):
        where = "segments" if (root / "segments").is_file() else "wav.scp"
        raise UserError(f"{root / 'utt2spk'}: lacks {len(lost)} utterances of {where}, {lost[0]} first")
    return found


def channel_count(path: Path) -> int:
    """Channels of a recording; 1 where there is none."""
    if not path.is_file():
        return 1
    with Recording(path) as recording:
        return recording.channels


def chosen_channel(utterance: Utterance, option: int | None) -> int | None:
    """The channel to read: the utterance's own, else `option` where its file has several."""
    if utterance.channel is not None or option is None:
        return utterance.channel
    return option if channel_count(utterance.path) > 1 else None


def _speakers(root: Path) -> dict[str, str]:
    """Speaker of each utterance by `utt2spk`, else `spk2utt`."""
    if (root / "utt2spk").is_file():
        return _two_columns(root / "utt2spk")
    if not (root / "spk2utt").is_file():
        return {}
    listed = _two_columns(root / "spk2utt")
    return {utterance: speaker for speaker, utterances in listed.items() for utterance in utterances.split()}


def _segments(path: Path, recordings: Mapping[str, Utterance]) -> list[Utterance]:
    """Kaldi's `segments`: lines `utterance recording start end [channel]`, in seconds, an end of -1 is the file's."""
    found: dict[str, Utterance] = {}
    for number, line in read_lines(path):
        words = line.split()
        if len(words) not in (4, 5):
            raise UserError(f"{path}, line {number}: {len(words)} columns; `utterance recording start end` are needed")
        name, recording = words[:2]
        try:
            start, end = float(words[2]), float(words[3])
        except ValueError:
            raise UserError(f"{path}, line {number}: {words[2]} and {words[3]} are no times in seconds") from None
        if recording not in recordings:
            raise UserError(f"{path}, line {number}: {recording} is not in wav.scp")
        if name in found:
            raise UserError(f"{path}, line {number}: {name} is there twice")
        if not (0 <= start < end < math.inf or (end == -1 and 0 <= start < math.inf)):
            raise UserError(f"{path}, line {number}: from {words[2]} to {words[3]} s; a segment ends after its start")
        whole = recordings[recording]
        channel = {"A": 1, "B": 2, "1": 1, "2": 2}.get(words[4].upper()) if len(words) == 5 else whole.channel
        seconds = None if end == -1 else end - start
        found[name] = replace(whole, name=name, start=start, seconds=seconds, channel=channel)
    if not found:
        raise UserError(f"{path}: is empty")
    return list(found.values())


def _decoded_file(table: Path, name: str, command: str) -> tuple[str, int | None]:
    """The file, and its channel, that a command in wav.scp only decodes; it is read here, the command is never run.

    Known are `cat`, `flac -c -d`, `sph2pipe`, and an `ffmpeg` that does no more than change the container.
    """
    refusal = f"{table}: {name} is a command, which is never run; decode it to a file"
    try:
        words = shlex.split(command.removesuffix("|"))
    except ValueError:
        raise UserError(refusal) from None
    files, channel = [], None
    harmless = {
        "cat": (set(), set()),
        "flac": ({"-c", "-d", "-s", "-cd", "-dc", "-cds", "-dcs", "--decode", "--stdout", "--silent"}, set()),
        "sph2pipe": ({"-p"}, {"-f", "-c"}),
        "ffmpeg": ({"-", "-y", "-nostdin", "pipe:1"}, {"-v", "-loglevel", "-i", "-f", "-acodec", "-c:a"}),
    }
    program = Path(words[0]).name if words else ""
    if program not in harmless or any(letter in command[:-1] for letter in "|;&<>$`"):
        raise UserError(refusal)
    alone, valued = harmless[program]
    rest = iter(words[1:])
    for word in rest:
        if word in valued:
            value = next(rest, "")
            if word == "-i":
                files.append(value)
            if word == "-c" and program == "sph2pipe":
                channel = {"1": 1, "2": 2}.get(value)
        elif word not in alone:
            if word.startswith("-"):
                raise UserError(f"{refusal} ({word} changes it)")
            files.append(word)
    if len(files) != 1:
        raise UserError(refusal)
    return files[0], channel


def _two_columns(path: Path) -> dict[str, str]:
    rows: dict[str, str] = {}
    for number, line in read_lines(path):
        name, *rest = line.split(maxsplit=1)
        if not rest:
            raise UserError(f"{path}, line {number}: one column, two are needed")
        if name in rows:
            raise UserError(f"{path}, line {number}: {name} is there twice")
        rows[name] = rest[0].strip()
    if not rows:
        raise UserError(f"{path}: is empty")
    return rows


FOLDER_ROLES = {
    "file": ("filename", "file", "path", "wav", "audio"),
    "speaker": ("speaker", "speakerid", "spk", "spkid", "clientid", "label"),
}
"""Names of the columns of an audiofolder's table."""


def _audiofolder(root: Path, table: Path) -> list[Utterance]:
    with reading(table, "cannot be read as a table of recordings", "mend it, or leave it out"):
        if table.suffix == ".csv":
            listed = read_table(table, FOLDER_ROLES, ("file",))
            listed.check()
            rows = [dict(zip(listed.header, row, strict=True)) for _, row in listed.rows]
        else:
            rows = [json.loads(line) for _, line in read_lines(table)]
    if not rows or not isinstance(rows[0], dict) or "file_name" not in rows[0]:
        raise UserError(f"{table}: needs rows with a column file_name")
    column = next((name for name in ("speaker", "speaker_id", "client_id", "label") if name in rows[0]), None)
    for number, row in enumerate(rows, 1):
        for name in ("file_name", column):
            value = row.get(name) if isinstance(row, dict) and name is not None else None
            if name is not None and not (isinstance(value, str | int) and str(value).strip()):
                raise UserError(f"{table}, row {number}: has no {name}; every row needs one")
    names = [str(row["file_name"]) for row in rows]
    if len(set(names)) != len(names):
        raise UserError(f"{table}: names a file twice")
    return [Utterance(n, root / n, None if column is None else str(row[column])) for n, row in zip(names, rows)]


def existing(path: Path) -> Path | None:
    """`path` if it is a file, whatever form of Unicode and whichever slash its name is written with; else None."""
    text = str(path)
    for name in (text, unicodedata.normalize("NFC", text), unicodedata.normalize("NFD", text)):
        for there in (Path(name), Path(name.replace("\\", "/"))):
            if there.is_file():
                return there
    return None


def locate(
    names: Iterable[str], root: str | Path, known: Sequence[Utterance] = ()
) -> tuple[dict[str, Utterance], list[str]]:
    """Utterances of the names in a list: from `known`, else files below `root`, with or without their ending.

    A name that ends in `:a` or `:b` is the first or second channel of its file (NIST's sides), where it has two.
    Returns the utterances by name and the names without a file.
    """
    table = {unicodedata.normalize("NFC", utterance.name): utterance for utterance in known}
    found, missing = {}, []
    for name in dict.fromkeys(names):
        utterance = _locate(name, Path(root), table)
        if utterance is None and (side := re.fullmatch(r"(.+):([ab])", name, re.DOTALL)):
            utterance = _locate(side[1], Path(root), table)
            if utterance is not None and utterance.channel is None and channel_count(utterance.path) > 1:
                utterance = replace(utterance, channel=1 if side[2] == "a" else 2)
        if utterance is None:
            missing.append(name)
        else:
            found[name] = replace(utterance, name=name)
    return found, missing


def _locate(name: str, root: Path, table: Mapping[str, Utterance]) -> Utterance | None:
    listed = table.get(unicodedata.normalize("NFC", name))
    if listed is not None and listed.path.is_file():
        return listed
    for ending in ("", *SUFFIXES, *(suffix.upper() for suffix in SUFFIXES)):
        if (path := existing(root / f"{name}{ending}")) is not None:
            return Utterance(name, path)
    return None
