"""Finding utterances and their speakers in the usual layouts of speech corpora."""

import csv
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nearfar.audio.sound import SUFFIXES
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
    of several is meant.
    """

    name: str
    path: Path
    speaker: str | None = None
    session: str | None = None
    start: float = 0.0
    seconds: float | None = None
    channel: int | None = None

    @property
    def digest(self) -> str:
        """Of its content: that of the file, and which part of it."""
        part = (self.start, self.seconds, self.channel)
        whole = content_digest(self.path)
        return whole if part == (0.0, None, None) else f"{whole} {part}"


def find_utterances(source: str | Path, layout: str = "auto") -> list[Utterance]:
    """The recordings below a folder, in order of their names.

    `layout`: "voxceleb" (`id1xxxx/<video>/<utterance>`, names begin at the speaker), "librispeech"
    (`<speaker>/<chapter>/...`), "vctk" (without p280, p315, the utterances 000 to 024 and second microphones), "folder"
    (`<speaker>/[<session>/]...`), "kaldi" (a folder with `wav.scp` and `utt2spk`), "audiofolder" (a folder with
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
    below = [path.relative_to(root).as_posix() for path in paths]
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
    speakers = _two_columns(root / "utt2spk") if (root / "utt2spk").is_file() else {}
    found = []
    for name, place in _two_columns(root / "wav.scp").items():
        if place.endswith("|"):
            raise UserError(f"{root / 'wav.scp'}: {name} is a command, which is never run; decode it to a file")
        path = Path(place)
        found.append(Utterance(name, path if path.is_absolute() else root / path, speakers.get(name)))
    if speakers and (lost := [utterance.name for utterance in found if utterance.speaker is None]):
        raise UserError(f"{root / 'utt2spk'}: lacks {len(lost)} utterances of wav.scp, {lost[0]} first")
    return found


def _two_columns(path: Path) -> dict[str, str]:
    rows: dict[str, str] = {}
    with reading(path, "cannot be read as UTF-8 text", "save it as UTF-8"):
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, *rest = line.split(maxsplit=1)
        if not rest:
            raise UserError(f"{path}, line {number}: one column, two are needed")
        if name in rows:
            raise UserError(f"{path}, line {number}: {name} is there twice")
        rows[name] = rest[0].strip()
    if not rows:
        raise UserError(f"{path}: is empty")
    return rows


def _audiofolder(root: Path, table: Path) -> list[Utterance]:
    with reading(table, "cannot be read as a table of recordings", "mend it, or leave it out"):
        text = table.read_text(encoding="utf-8-sig")
        if table.suffix == ".csv":
            rows = list(csv.DictReader(text.splitlines()))
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    if not rows or not isinstance(rows[0], dict) or "file_name" not in rows[0]:
        raise UserError(f"{table}: needs rows with a column file_name")
    column = next((name for name in ("speaker", "speaker_id", "client_id", "label") if name in rows[0]), None)
    for number, row in enumerate(rows, 1):
        for name in ("file_name", column):
            value = row.get(name) if isinstance(row, dict) else None
            if name is not None and not (isinstance(value, str | int) and str(value).strip()):
                raise UserError(f"{table}, row {number}: has no {name}; every row needs one")
    names = [str(row["file_name"]) for row in rows]
    if len(set(names)) != len(names):
        raise UserError(f"{table}: names a file twice")
    return [Utterance(n, root / n, None if column is None else str(row[column])) for n, row in zip(names, rows)]


def locate(
    names: Iterable[str], root: str | Path, known: Sequence[Utterance] = ()
) -> tuple[dict[str, Path], list[str]]:
    """Files of the names in a list: from `known`, else below `root`, with or without their ending.

    Returns the files by name and the names without a file.
    """
    table: dict[str, Any] = {utterance.name: utterance.path for utterance in known}
    found, missing = {}, []
    for name in dict.fromkeys(names):
        options = [table.get(name), Path(root) / name, *(Path(root) / f"{name}{suffix}" for suffix in SUFFIXES)]
        place = next((path for path in options if path is not None and path.is_file()), None)
        if place is None:
            missing.append(name)
        else:
            found[name] = place
    return found, missing
