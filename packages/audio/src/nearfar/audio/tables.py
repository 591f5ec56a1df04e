"""Lists and tables as people keep them: any encoding and line end, tabs, commas or spaces, columns by name."""

import csv
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nearfar.core.errors import UserError

BOMS = {
    b"\x00\x00\xfe\xff": "utf-32-be",
    b"\xff\xfe\x00\x00": "utf-32-le",
    b"\xef\xbb\xbf": "utf-8-sig",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}

LONGEST_NAME = 4096
"""Letters of a recording's name in a list."""


def read_lines(path: str | Path) -> list[tuple[int, str]]:
    """Numbered lines of a text file that are not blank.

    UTF-8, or what a byte order mark says; what is neither is read as Windows-1252, with a warning.
    Raises UserError where it is no text.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    encoding = next((name for mark, name in BOMS.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding != "utf-8" or b"\x00" in content:
            raise UserError(f"{path}: is no text file (byte {error.start} is not {encoding.upper()})") from error
        text = content.decode("cp1252", "replace")
        if "\ufffd" in text:
            raise UserError(f"{path}: is no text file (byte {error.start} is not UTF-8); save it as UTF-8") from error
        guess = f"{path}: is not UTF-8, and is read as Windows-1252; save it as UTF-8 if names look wrong"
        warnings.warn(guess, stacklevel=2)
    pieces = re.split(r"\r\n|\n|\r", text.removeprefix("\ufeff"))
    lines = [(number, line) for number, line in enumerate(pieces, 1) if line.strip()]
    for number, line in lines:  # arrays of names are as wide as the longest
        if len(line) > LONGEST_NAME and max(map(len, re.split(r"[\s,;]", line))) > LONGEST_NAME:
            raise UserError(f"{path}, line {number}: a name of more than {LONGEST_NAME} letters; it is no such list")
    return lines


def plain(name: str) -> str:
    """The name of a column without case, blanks, and marks between words."""
    return re.sub(r"[\s_.\-]", "", name.lower())


@dataclass(frozen=True)
class Table:
    """Rows of a list with their line numbers; `columns` has the place of each role that the header names, if any."""

    path: Path
    rows: list[tuple[int, list[str]]]
    header: list[str]
    columns: Mapping[str, int]

    def check(self, width: int | None = None, form: str = "list") -> None:
        """Raise UserError where a row has another width: the header's, or `width`."""
        want = len(self.header) or width or len(self.rows[0][1])
        for number, row in self.rows:
            if len(row) != want:
                what = f"the header has {want}" if self.header else f"a {form} has {want}"
                raise UserError(
                    f"{self.path}, line {number}: {len(row)} columns, {what}; names with blanks need tabs or commas "
                    "between the columns"
                )

    def column(self, role: str) -> list[str]:
        place = self.columns[role]
        return [row[place] for _, row in self.rows]


def read_table(path: str | Path, roles: Mapping[str, Sequence[str]], needed: Sequence[str]) -> Table:
    """Read a list whose first line may name its columns.

    roles: names, as `plain` gives them, that a column of each role may have. needed: roles by which a first line is
    known as a header.

    Tabs separate where every line has one; commas, or else semicolons, where a header or the number of columns shows
    it; else blanks.
    """
    path = Path(path)
    lines = read_lines(path)
    texts = [line for _, line in lines]
    named = {name: role for role, names in roles.items() for name in names}

    def columns(row: Iterable[str]) -> dict[str, int]:
        found: dict[str, int] = {}
        for place, name in enumerate(row):
            if (role := named.get(plain(name))) is not None:
                found.setdefault(role, place)
        return found

    rows = _split(path, texts, "\t") if texts and all("\t" in text.strip() for text in texts) else None
    for mark in ",;" if rows is None else "":
        if texts and mark in texts[0]:
            split = _split(path, texts, mark)
            known = columns(split[0])
            if set(known) & set(needed) or any(len(text.split()) == 1 for text in texts) or _regular(split, texts):
                rows = split
                break
    if rows is None:
        rows = [text.split() for text in texts]
    numbered = [(number, row) for (number, _), row in zip(lines, rows, strict=True)]
    found = columns(rows[0]) if rows else {}
    if not set(needed) <= set(found):
        marked = rows and any(mark in texts[0] for mark in ",;\t") and len(rows[0]) > 1
        partly = bool(set(found) & set(needed)) and marked
        return Table(path, numbered, rows[0] if partly else [], found if partly else {})
    return Table(path, numbered[1:], rows[0], found)


def _split(path: Path, texts: Sequence[str], mark: str) -> list[list[str]]:
    """Cells of each line; a quoted cell may hold the mark, no line end."""
    quoting: Literal[0, 3] = csv.QUOTE_NONE if mark == "\t" else csv.QUOTE_MINIMAL
    try:
        rows = [next(csv.reader([text], delimiter=mark, quoting=quoting, skipinitialspace=True)) for text in texts]
    except (csv.Error, StopIteration) as error:
        raise UserError(f"{path}: cannot be read as CSV ({error}); mend it") from error
    return [[cell.strip() for cell in row] for row in rows]


def _regular(rows: Sequence[Sequence[str]], texts: Sequence[str]) -> bool:
    """Whether commas make columns of one number and blanks do not."""
    return len({len(row) for row in rows}) == 1 and len({len(text.split()) for text in texts}) > 1


def join(columns: Iterable[Iterable[str]], header: Sequence[str] = ()) -> list[str]:
    """Lines of a table: blanks between the columns, or tabs where a name has a blank or another mark or has a header.

    Raises UserError for a name that holds a tab or a line end.
    """
    rows = [[str(cell) for cell in row] for row in zip(*columns, strict=True)]
    if bad := next((cell for row in rows for cell in row if re.search(r"[\t\r\n]", cell)), None):
        raise UserError(f"the name {bad!r} holds a tab or a line end, no list can hold it; rename the recording")
    marked = any(re.search(r"[\s,;\"]", cell) for row in rows for cell in row)
    mark = "\t" if marked or header else " "
    return [mark.join(row) + "\n" for row in ([list(header), *rows] if header else rows)]
