"""`nearfar image-classification prune`: what fewer tokens cost and save."""

from pathlib import Path
from typing import Annotated

import typer

from nearfar.apps.image_classification.common import Data, known_pictures, one_class, open_any
from nearfar.core.cli.batch import raise_failures
from nearfar.core.cli.console import console, say, show, track
from nearfar.core.cli.options import Device, Fresh, Json, Workers
from nearfar.core.errors import UserError
from nearfar.core.files import atomic_path, write_csv, write_json
from nearfar.core.made_from import model_digest
from nearfar.core.report import Report


def prune(
    model: Annotated[
        str, typer.Argument(help="Folder that `train` wrote, a published checkpoint, or hub:NAME of timm.")
    ],
    data: Data,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the results. Run again to go on.")],
    keep: Annotated[
        list[float] | None, typer.Option(help="Share of the tokens that each reduction keeps, in (0, 1]. Repeat.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Folder inside the data, for example test.")] = None,
    loss: Annotated[float, typer.Option(help="Accuracy that may be lost for speed.", min=0, max=1)] = 0.01,
    write: Annotated[
        Path | None, typer.Option("--write", help="Folder for the model at the fastest setting within --loss.")
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="Time in which measurements may begin.")] = None,
    device: Device = "auto",
    workers: Workers = 0,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Measure a transformer with fewer tokens: accuracy, latency, throughput and memory at several keep rates."""
    from nearfar.vision.classification.pruning import (
        chosen_classifier,
        fastest_within,
        keep_switch,
        plot_sweep,
        prune_sweep,
    )

    rates = keep or [0.9, 0.8, 0.7, 0.6, 0.5]
    if bad := [rate for rate in rates if not 0 < rate <= 1]:
        raise UserError(f"--keep {bad[0]:g}: is a share of the tokens in (0, 1]")
    classifier = one_class(open_any(model), "prune")
    keep_switch(classifier.model)
    every, pictures, failures = known_pictures(classifier, model, data, split)
    rows, left = prune_sweep(
        classifier, pictures, rates, output, model_digest=model_digest(model), device=device, workers=workers,
        seconds=seconds, fresh=fresh, track=track,
    )  # fmt: skip
    if not rows:
        raise UserError(f"--seconds {seconds:g}: no time for a single keep rate")
    write_csv(output / "table.csv", rows)
    write_json(output / "table.json", rows)
    figure = plot_sweep(rows)
    with atomic_path(output / "plot.png") as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    best = fastest_within(rows, loss) if rows[0]["keep rate"] == 1 else rows[0]
    chosen = f"Fastest within {loss:g} of the plain accuracy: keep rate {best['keep rate']:g}."
    note = f"{len(pictures)} pictures, {device}. {chosen} Chosen by the same pictures that it is scored on."
    caption = "Accuracy, with its 95 % bootstrap interval, and throughput, against the keep rate."
    Report(f"{classifier.name} with fewer tokens", note).table(rows).figure(figure, caption).write(output / "page.html")
    if write is not None:
        chosen_classifier(classifier, best["keep rate"]).save(write)
    show(rows, as_json)
    if not as_json:
        console.print(f"{chosen} Page: {output / 'page.html'}", soft_wrap=True)
    if left:
        say("not done", f"no time for keep rates {', '.join(left)}; run again to go on", "yellow")
    raise_failures(failures, len(every))
