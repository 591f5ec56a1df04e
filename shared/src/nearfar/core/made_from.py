"""Results that are there already: they count as done only where they were made from the same."""

import json
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nearfar.core.errors import UserError
from nearfar.core.files import file_digest, write_json
from nearfar.core.fingerprint import content_digest, data_digest
from nearfar.core.model_folder import KINDS
from nearfar.core.remote import fetch, version_of, written


class MadeFrom:
    """What a result is made from: digests of the content of its input and model, and of the options.

    They stand in a hidden file beside the result, `.NAME.made-from.json`, with the digest of the result itself.
    """

    def __init__(self, target: Path, inputs: Iterable[Path], model: str, **options: Any) -> None:
        self.target = target
        self.record = record_of(target)
        self.sources = {
            "input": data_digest([_content(path) for path in inputs]),
            "model": model,
            "options": data_digest(options),
            "nearfar": version("nearfar-core"),
        }

    def done(self) -> bool:
        """Whether the result is there and was made from the same.

        Raises UserError, so that no work of others is overwritten, where what is there was made by something else or
        was changed since.
        """
        if not self.target.exists():
            return False
        try:
            fetch(self.record)
            found = json.loads(self.record.read_text(encoding="utf-8"))
            sources, result = dict(found["sources"]), found["result"]
        except Exception:  # not there, or damaged in whatever way
            raise UserError(
                f"{self.target}: is there, and nothing tells what it was made from; move it away or name another output"
            ) from None
        if sources == self.sources:
            return True
        if result != content_digest(self.target):
            other = ", ".join(name for name in self.sources if sources.get(name) != self.sources[name])
            raise UserError(
                f"{self.target}: was made from other {other} and changed by hand since; move it away to make it anew"
            )
        return False

    def write(self, marked: str = "") -> None:
        """Note that the result is there, and a mark for every figure on it, see `model_folder.mark`."""
        record = {"sources": self.sources, "result": content_digest(self.target)}
        write_json(self.record, record | ({"marked": marked} if marked else {}))


class KeptRows:
    """Rows of a table, each kept as it is done, in the hidden file `.NAME.rows.jsonl` beside the table.

    What is found again was made from the same content, by the same model, with the same options.
    """

    def __init__(self, target: Path, model: str, **options: Any) -> None:
        self.path = target.with_name(f".{target.name}.rows.jsonl")
        self.made_from = data_digest([model, options, version("nearfar-core")])
        self.rows: dict[str, Any] = {}
        fetch(self.path)
        if self.path.is_file():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                with suppress(ValueError, TypeError, KeyError):  # a line that was being written when its process ended
                    kept = json.loads(line)
                    if kept["made from"] == self.made_from:
                        self.rows[kept["input"]] = kept["row"]

    def find(self, path: Path) -> Any:
        """The row of the file at `path`; None where it is to be made, or where there is no such file."""
        return self.rows.get(_content(path)) if path.is_file() else None

    def add(self, path: Path, row: Any) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            line = json.dumps({"input": _content(path), "made from": self.made_from, "row": row})
            file.write(f"\n{line}\n")  # ends what an ended process may have left
        written(self.path, now=False)


def _content(path: Path) -> str:
    """A digest of a file's content; of one elsewhere, its version, for which it is not read."""
    return version_of(path) or content_digest(path)


def mark_beside(target: Path) -> str:
    """The mark that was noted with a result, "" where there is none."""
    try:
        fetch(record_of(target))
        record = json.loads(record_of(target).read_text(encoding="utf-8"))
        return str(record.get("marked", ""))
    except (OSError, ValueError, AttributeError, UserError):
        return ""


def record_of(target: Path) -> Path:
    """The hidden file that tells what a result was made from."""
    return target.with_name(f".{target.name}.made-from.json")


def model_digest(path: str | Path) -> str:
    """A digest of a model: of its folder's weights and descriptions, or of its file."""
    path = Path(path)
    if path.is_file():
        return file_digest(path)
    if not path.is_dir():
        return str(path)
    if named := [path / name for name in KINDS.values() if (path / name).is_file()]:
        return data_digest([content_digest(description) for description in named])  # they hold the files' digests
    parts = sorted(p for p in path.iterdir() if p.is_file() and p.suffix in (".safetensors", ".json", ".npz", ".bin"))
    return data_digest([(part.name, content_digest(part)) for part in parts])
