"""What the commands share: options, and how a data set is opened and told of."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from nearfar.core.cli.console import say
from nearfar.medical.data.cases import Collection
from nearfar.medical.data.layouts import find_cases, grouped

RECIPES = Path(__file__).parent / "recipes"

Data = Annotated[Path, typer.Argument(help="Folder of a data set.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")]
Groups = Annotated[
    str | None,
    typer.Option(
        help="Patients: a CSV file of case,patient, or a pattern on the cases' names whose one group is the patient. "
        "(default: by the layout, else by the names)"
    ),
]


def open_collection(data: Path, groups: str | None) -> Collection:
    collection = find_cases(data)
    return collection if groups is None else grouped(collection, groups)


def say_notes(notes: Sequence[str]) -> None:
    for text in notes:
        say("note", text, "yellow")


def with_intervals(summary: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The summary with each interval in one column."""
    rows = []
    for row in summary:
        told: dict[str, Any] = {"label": row["label"], "cases": row["cases"]}
        for name in ("dice", "iou", "hd95", "nsd"):
            if name in row:
                told[name] = row[name]
                low, high = row[f"{name}_low"], row[f"{name}_high"]
                told[f"{name} 95 %"] = "-" if np.isnan(low) else f"{low:.3g} to {high:.3g}"  # of a single case, none
        rows.append(told)
    return rows
