"""Whether maps point at the evidence that a network was made to use: `python benchmarks/planted.py`.

Small networks learn classes that hang on a cue at a known place among distractors (`nearfar.vision.explain.planted`).
For each method the share of 200 new pictures whose map has its maximum on the cue, mean and range over the seeds: of
the trained networks, of the same with their weights shuffled, and of fresh ones.
"""

import statistics
from typing import Annotated, Any

import torch
import typer

from nearfar.core.cli.console import console, table
from nearfar.vision.explain.planted import planted_evidence

METHODS = (
    "normgrad", "selective_normgrad", "meta_normgrad", "linear_approximation", "contrast", "grad_cam", "gradient",
    "gradient_x_input", "guided_backpropagation", "relevance", "salient_relevance",
)  # fmt: skip


def main(
    seed: Annotated[list[int] | None, typer.Option(help="Repeat.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Repeat.")] = None,
    pictures: int = 200,
    threads: int = 1,
) -> None:
    torch.set_num_threads(threads)
    found: dict[str, list[dict[str, Any]]] = {}
    accuracies = []
    for one in seed or (0, 1, 2):
        accuracy, rows = planted_evidence(one, method or METHODS, pictures)
        accuracies.append(accuracy)
        for row in rows:
            found.setdefault(row["method"], []).append(row)
    console.print(f"accuracy of the networks on new pictures: {', '.join(f'{a:.3f}' for a in accuracies)}")
    kinds = ("trained", "shuffled", "fresh")
    console.print(
        table([{"method": name, **{kind: spread(rows, kind) for kind in kinds}} for name, rows in found.items()])
    )


def spread(rows: list[dict[str, Any]], kind: str) -> str:
    values = [row[kind] for row in rows]
    return f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    typer.run(main)
