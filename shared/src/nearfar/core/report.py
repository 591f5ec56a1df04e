"""One HTML page of results that opens without a server: pictures and sound are inlined."""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from nearfar.core.files import write_text

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1b1b1b }
h1, h2, h3 { line-height: 1.2 } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums;
  display: block; overflow-x: auto }
th, td { padding: .25rem .8rem; border-bottom: 1px solid #ddd; text-align: left } td.n, th.n { text-align: right }
figure { margin: 1rem 0 } figure img { max-width: 100% } figcaption, footer { color: #555; font-size: .9rem }
pre { background: #f4f4f4; padding: .8rem; overflow-x: auto }
@media (prefers-color-scheme: dark) { body { background: #16181a; color: #ddd } pre { background: #222 }
  figure img { background: #fff } figcaption, footer { color: #aaa } th, td, h2 { border-color: #444 } }
"""


class Report:
    """A page that apps add to, from top to bottom; `write` makes one self-contained file.

    From three chapters on, links to them stand below the title.

    Every method that adds something returns the report, so calls can be chained.
    """

    def __init__(self, title: str, introduction: str = "") -> None:
        self.title = title
        self.parts: list[str] = []
        self.chapters: list[str] = []
        if introduction:
            self.text(introduction)

    def section(self, heading: str, level: int = 2) -> "Report":
        """Start a section; `level` 2 is a chapter, 3 a part of one."""
        self.parts.append(f'<h{level} id="part{len(self.parts)}">{escape(heading)}</h{level}>')
        if level == 2:
            self.chapters.append(f'<a href="#part{len(self.parts) - 1}">{escape(heading)}</a>')
        return self

    def text(self, text: str) -> "Report":
        """Add plain paragraphs (separated by an empty line)."""
        self.parts += [f"<p>{escape(paragraph)}</p>" for paragraph in text.strip().split("\n\n")]
        return self

    def code(self, text: str) -> "Report":
        """Add text as it is, in a fixed-width face: commands, settings."""
        self.parts.append(f"<pre>{escape(text)}</pre>")
        return self

    def html(self, markup: str) -> "Report":
        """Add markup as it is; the caller answers for escaping."""
        self.parts.append(markup)
        return self

    def table(self, rows: Sequence[Mapping[str, Any]], caption: str = "") -> "Report":
        """Add a table; the columns are the first row's keys, numbers are set to the right."""
        columns = list(rows[0]) if rows else []
        head = "".join(f"<th{_numeric(rows[0][c])}>{escape(str(c))}</th>" for c in columns)
        body = "".join(
            "<tr>" + "".join(f"<td{_numeric(row.get(c))}>{escape(_text(row.get(c)))}</td>" for c in columns) + "</tr>"
            for row in rows
        )
        self.parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")
        if caption:
            self.parts.append(f"<figcaption>{escape(caption)}</figcaption>")
        return self

    def figure(self, picture: Figure | bytes | str | Path, caption: str = "") -> "Report":
        """Add a matplotlib figure, the bytes of a PNG, or a PNG file. `caption` is also its text for screen readers."""
        if isinstance(picture, Figure):
            buffer = io.BytesIO()
            picture.savefig(buffer, format="png", dpi=120, bbox_inches="tight")
            picture = buffer.getvalue()
        elif not isinstance(picture, bytes):
            picture = Path(picture).read_bytes()
        source = "data:image/png;base64," + base64.b64encode(picture).decode()
        self.parts.append(
            f'<figure><img src="{source}" alt="{escape(caption, quote=True)}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )
        return self

    def audio(self, wav: bytes, caption: str = "") -> "Report":
        """Add a player for the bytes of a WAV file."""
        source = "data:audio/wav;base64," + base64.b64encode(wav).decode()
        self.parts.append(
            f'<figure><audio controls src="{source}"></audio><figcaption>{escape(caption)}</figcaption></figure>'
        )
        return self

    def write(self, path: str | Path) -> Path:
        """Write the page to `path` atomically and return `path`."""
        page = (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(self.title)}</title>'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<style>{STYLE}</style></head><body><h1>{escape(self.title)}</h1>"
            + (f"<nav>{' · '.join(self.chapters)}</nav>" if len(self.chapters) > 2 else "")
            + "\n".join(self.parts)
            + f"<footer><p>Made by nearfar {version('nearfar-core')}.</p></footer></body></html>\n"
        )
        return write_text(path, page)


def _text(value: Any) -> str:
    if isinstance(value, float | np.floating):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def _numeric(value: Any) -> str:
    return ' class="n"' if isinstance(value, int | float | np.number) and not isinstance(value, bool) else ""
