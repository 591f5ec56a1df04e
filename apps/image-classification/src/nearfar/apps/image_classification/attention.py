"""`nearfar image-classification attention`: where the layers of a model look, as arrays and as pictures."""

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from nearfar.apps.image_classification.common import Published, open_any, read_pictures
from nearfar.core.cli.batch import raise_failures
from nearfar.core.cli.console import console, show, track
from nearfar.core.cli.options import Device, Json
from nearfar.core.errors import UserError
from nearfar.core.files import atomic_path, write_csv
from nearfar.core.report import Report
from nearfar.vision.classification.classifier import evaluation_transform
from nearfar.vision.explain.attention import (
    attention_maps,
    decay_ranges,
    draw_attention,
    draw_decay_ranges,
    draw_locality_gates,
    locality_gates,
)

OF_HEADS = {"gate": (locality_gates, draw_locality_gates), "range": (decay_ranges, draw_decay_ranges)}
"""What every head has whatever the picture: ConViT's weight of fixed distances, the reach of RMT's decay."""


def attention(
    classifier: Annotated[
        str, typer.Argument(help="Folder that `train` wrote, a published checkpoint, or hub:NAME of timm.")
    ],
    paths: Annotated[list[Path], typer.Argument(help="Pictures, or folders that are searched for pictures.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for arrays, pictures and page.html.")] = Path(
        "attention"
    ),
    at: Annotated[str, typer.Option(help="The place that looks, as shares of height and width.")] = "0.5,0.5",
    model: Published = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Show where every layer looks from a place of each picture, and write the whole maps.

    NUMBER-NAME.npz holds every layer's map under its name, (heads, queries, keys). Queries and keys of BiFormer's
    routing are regions, keys of dynamic convolutions and of HaloNet are the places of a window, and VOLO's outlook
    attention has (heads, windows, places, taps). NUMBER-NAME.png shows them, averaged over the heads. ConViT's gates
    and the reach of RMT's decay, which no picture changes, are in heads.csv and on the page.
    """
    try:
        row, column = (float(part) for part in at.split(","))
    except ValueError as error:
        raise UserError(f"--at {at}: is not ROW,COLUMN, two numbers from 0 to 1") from error
    if not (0 <= row <= 1 and 0 <= column <= 1):
        raise UserError(f"--at {at}: is not ROW,COLUMN, two numbers from 0 to 1")
    trained = open_any(classifier, model)
    network = trained.model.to(device).eval()
    pictures, failures = read_pictures(paths)
    data = pictures.subset(
        range(len(pictures)), evaluation_transform(trained.size, trained.crop_pct, trained.crop_mode)
    )
    report = Report(
        f"{trained.name}: where its layers look",
        "The cross marks the place that looks. Weights are averaged over the heads, in units of even attention to all "
        "that is in reach; black is none.",
    )
    rows: list[dict[str, Any]] = []
    for i in track(range(len(pictures)), "looking"):
        name, x = pictures.names[i], data[i][0][None].to(device)
        figure = draw_attention(network, x, at=(row, column))
        maps = {layer: weights[0].float().numpy() for layer, weights in attention_maps(network, x).items()}
        arrays, drawn = (output / f"{i}-{Path(name).stem}{ending}" for ending in (".npz", ".png"))
        with atomic_path(arrays) as temporary:
            np.savez(temporary, allow_pickle=False, **maps)
        with atomic_path(drawn) as temporary:
            figure.savefig(temporary, dpi=120)
        report.section(name, 3).figure(drawn, name)
        rows.append({"file": name, "layers": len(maps), "maps": str(arrays), "picture": str(drawn)})
    heads: list[dict[str, Any]] = []
    for kind, (read, draw) in OF_HEADS.items():
        found = read(network)
        for name, values in found.items():
            heads += [{"layer": name, "head": i, kind: value} for i, value in enumerate(values.tolist())]
        if found:
            report.section("Heads").figure(draw(network), f"{kind} of every head")
    if heads:
        write_csv(output / "heads.csv", heads)
    if rows:
        report.write(output / "page.html")
    show(rows, as_json)
    if not as_json:
        console.print(f"Page: {output / 'page.html'}", soft_wrap=True)
    raise_failures(failures, len(pictures) + len(failures))
