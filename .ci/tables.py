"""Writes the tables of READMEs that are made from the systems' cards: `python .ci/tables.py`.

A table stands between the lines `<!-- table NAME -->` and `<!-- end -->`.
"""

import re
from collections.abc import Callable
from os.path import commonprefix
from pathlib import Path

from nearfar.core.cards import cards
from nearfar.language.registry import MIXERS
from nearfar.vision.models.registry import MODELS

REPOSITORY = Path(__file__).parents[1]


def systems() -> list[list[str]]:
    rows = [["system", "package", "what it does", "largest contract error", "paper"]]
    for domain, listed in cards().items():
        for _, card in listed:
            link = f"[{card.paper}](https://arxiv.org/abs/{card.paper})"
            rows.append([card.title, domain, card.what, f"{card.error:.1e}", link])
    return rows


def vision() -> list[list[str]]:
    rows = [["system", "names", "what mixes positions"]]
    for kind, card in cards()["vision"]:
        names = [name for name, model in MODELS.items() if model is kind]
        shared = commonprefix(names).rpartition("_")[0] + "_"  # noqa: RUF071 (no paths)
        listed = f"{shared}{{{','.join(name.removeprefix(shared) for name in names)}}}" if names[1:] else "".join(names)
        place = f"{kind.__module__}.{kind.__name__}" if kind else "nearfar.vision.explain"
        rows.append([card.title, f"`{listed or place}`", card.what])
    return rows


def medical() -> list[list[str]]:
    rows = [["network", "class", "names", "axes", "published weights"]]
    for kind, card in cards()["medical"]:
        names = ", ".join(f"`{name}`" for name in card.networks)
        rows.append([card.title, f"`{kind.__name__}`", names, ", ".join(map(str, card.dims)), card.weights])  # type: ignore[union-attr]
    return rows


def mixers() -> list[list[str]]:
    rows = [["mixer", "state per sequence", "long texts"]]
    for name, mixer in MIXERS.items():
        needs = "".join(f" (`{setting}`)" for setting in mixer.required)
        rows.append([f"`{name}`{needs}", mixer.state, mixer.growth])
    return rows


TABLES: dict[str, Callable[[], list[list[str]]]] = {
    "systems": systems,
    "vision": vision,
    "medical": medical,
    "mixers": mixers,
}


def rewritten(text: str) -> str:
    """`text` with every table made anew."""

    def table(match: re.Match[str]) -> str:
        head, *rows = TABLES[match[1]]()
        lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
        lines.insert(1, "|" + "---|" * len(head))
        return "\n".join((f"<!-- table {match[1]} -->", *lines, "<!-- end -->"))

    return re.sub(r"<!-- table (\w+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def readmes() -> list[Path]:
    return [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("packages/*/README.md"), *REPOSITORY.glob("apps/*/README.md")]


if __name__ == "__main__":
    for path in readmes():
        path.write_text(rewritten(path.read_text(encoding="utf-8")), encoding="utf-8")
