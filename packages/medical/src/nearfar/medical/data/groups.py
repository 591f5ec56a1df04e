"""Which patient or slide a name belongs to, as a pattern or a table says it."""

import csv
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from nearfar.core.errors import UserError, some
from nearfar.core.reading import reading


def teller(text: str, columns: tuple[str, str], what: str) -> Callable[[str], str]:
    """A function from a name to what a pattern (its one group), or a table in a file, says of it.

    Args:
        columns: of the table, see `read_pairs`; the second is what is told.
        what: is named, in messages.

    It raises UserError for a name of which nothing is said, and so does this for a pattern that cannot say anything.
    """
    if Path(text).is_file():
        known = read_pairs(Path(text), columns)

        def look(name: str) -> str:
            if not known.get(name):
                raise UserError(f"{text}: names no {columns[1]} of the {what} {name}; it names {some(known)}")
            return known[name]

        return look
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise UserError(f"{text}: is neither a file nor a regular expression ({error})") from error
    if pattern.groups != 1:
        raise UserError(
            f"{text}: is no file, and as a pattern has {pattern.groups} groups; one is needed, ( ) around what names "
            f"the {columns[1]}"
        )

    def search(name: str) -> str:
        found = pattern.search(name)
        if found is None or not found[1]:
            raise UserError(f"{name}: its name does not tell the {columns[1]} ({text}); give another pattern")
        return found[1]

    return search


def read_table(table: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a table that has at least `columns`, parted by the comma, semicolon or tab of its first line."""
    lines = _lines(table)
    if missing := [name for name in columns if name not in lines[0]]:
        raise UserError(f"{table}: has no column {some(missing)}; it has {some(lines[0])}")
    if wide := next((line for line in lines if len(line) > len(lines[0])), None):
        raise UserError(f"{table}: the line {', '.join(wide)} has {len(wide)} cells for {len(lines[0])} columns")
    return [dict(zip(lines[0], [*line, *[""] * len(lines[0])])) for line in lines[1:]]


def read_pairs(table: Path, columns: tuple[str, str]) -> dict[str, str]:
    """What the second of two columns of a table says of the first, by their names, or by their order if it has no more.

    Raises UserError where it says two things of one.
    """
    lines = _lines(table)
    if set(columns) <= set(lines[0]):
        rows = [(row[columns[0]], row[columns[1]]) for row in read_table(table, columns)]
    elif wrong := next((number for number, line in enumerate(lines, 1) if len(line) != 2), 0):
        raise UserError(
            f"{table}: must have the columns {' and '.join(columns)}, or these two alone; its line {wrong} has "
            f"{len(lines[wrong - 1])} columns"
        )
    else:
        rows = [(first, second) for first, second in lines]
    pairs: dict[str, str] = {}
    for first, second in rows:
        if pairs.setdefault(first, second) != second:
            raise UserError(f"{table}: {columns[0]} {first} has {columns[1]} {pairs[first]} and {second}")
    return pairs


def _lines(table: Path) -> list[list[str]]:
    with reading(table, "cannot be read as a table", "write it as text with commas between the columns"):
        text = table.read_text(encoding="utf-8-sig")
        head = next((line for line in text.splitlines() if line.strip()), "")
        mark = next((mark for mark in ",;\t" if mark in head), ",")
        rows = csv.reader(text.splitlines(), delimiter=mark, skipinitialspace=True, strict=True)
        lines = [[cell.strip() for cell in row] for row in rows if any(cell.strip() for cell in row)]
        if not lines:
            raise ValueError("it is empty")
    return lines
