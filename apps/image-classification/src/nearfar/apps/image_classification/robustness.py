"""`nearfar image-classification robustness`: how classifiers stand broken patches."""

from pathlib import Path
from typing import Annotated

import typer

from nearfar.apps.image_classification.common import Data, known_pictures, one_class, open_any
from nearfar.core.cli.batch import raise_failures
from nearfar.core.cli.console import console, say, show, track
from nearfar.core.cli.options import Device, Fresh, Json
from nearfar.core.errors import UserError
from nearfar.core.files import write_csv, write_json
from nearfar.core.made_from import model_digest
from nearfar.core.report import Report


def robustness(
    models: Annotated[
        list[str], typer.Argument(help="Folders that `train` wrote, published checkpoints, or hub:NAME of timm.")
    ],
    data: Data,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the results. Run again to go on.")],
    split: Annotated[str | None, typer.Option(help="Folder inside the data, for example test.")] = None,
    patch: Annotated[int, typer.Option(help="Pixels along a side of a patch.")] = 16,
    count: Annotated[int, typer.Option(help="Patches that are corrupted in a picture.")] = 1,
    side: Annotated[int, typer.Option(help="Patches along a side of the adversarial square.")] = 1,
    offset: Annotated[int, typer.Option(help="Pixels that the adversarial square is off the grid.")] = 0,
    scope: Annotated[str, typer.Option(help="Corrupt the whole image, and take over patches, or the patch.")] = "image",
    corruption: Annotated[
        list[str] | None, typer.Option(help="Corruption of ImageNet-C. Repeat. Default: all 15.")
    ] = None,
    severity: Annotated[list[int] | None, typer.Option(help="1 to 5. Repeat. Default: 5.")] = None,
    share: Annotated[
        list[float] | None, typer.Option(help="Share of patches replaced or dropped. Repeat. Default: 0 to 0.9.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of the attack.")] = 100,
    attacked: Annotated[int, typer.Option(help="Pictures that are attacked, at most.")] = 100,
    temperature: Annotated[
        list[float] | None, typer.Option(help="Temperature of attention. Repeat. Default: 1, 1.1, 1.3, 1.5 and 2.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Random places of each picture.")] = 3,
    seconds: Annotated[float | None, typer.Option(help="Time in which measurements may begin.")] = None,
    device: Device = "auto",
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Break patches of pictures: corruptions, adversarial patches, occlusion, temperatures of attention, weak places.

    Fooling rates count the pictures that all models get right. All models see the first one's crop.
    """
    from nearfar.core.fingerprint import data_digest
    from nearfar.vision.robustness.assessment import Assessment, Plan, draw_corruptions
    from nearfar.vision.robustness.parts import Parts

    given = {"kinds": corruption, "severities": severity, "shares": share, "temperatures": temperature}
    options = {name: tuple(values) for name, values in given.items() if values}
    try:
        plan = Plan(
            scope=scope, patch=patch, count=count, side=side, offset=offset, steps=steps, attacked=attacked,
            seeds=seeds, **options,  # type: ignore[arg-type]
        )  # fmt: skip
    except ValueError as error:
        raise UserError(str(error)) from error
    if doubled := {name for name in models if models.count(name) > 1}:
        raise UserError(f"{min(doubled)}: is named twice")
    classifiers = {name: one_class(open_any(name), "robustness") for name in models}
    first = classifiers[models[0]]
    every, pictures, failures = known_pictures(first, models[0], data, split)
    for name, other in classifiers.items():
        if other.classes != first.classes:
            raise UserError(f"{name}: knows other classes than {models[0]}; compare models of the same classes")
    made_from = {
        "models": [model_digest(name) for name in models],
        "pictures": data_digest(pictures.digests(), pictures.labels),
        "options": plan,
    }
    found = Assessment(classifiers, pictures, plan, Parts(output, made_from, seconds, fresh), device)
    found.run(track)
    rows = found.summary()
    report = Report(
        "Broken patches", f"{len(pictures)} pictures; all {len(models)} models get {rows[0]['right by all']} right."
    )
    report.table(rows)
    for name, table in found.tables.items():
        if table:
            write_csv(output / f"{name}.csv", table)
            report.section(name.capitalize()).table(table)
    write_json(output / "results.json", {"summary": rows, **found.tables, "places": found.maps})
    for figure, caption in found.figures():
        report.figure(figure, caption)
    shown = draw_corruptions(found.x[0])
    report.section("The corruptions").figure(shown, "The first picture at severities 1 to 5, from left to right.")
    report.write(output / "page.html")
    show(rows, as_json)
    if not as_json:
        console.print(f"Page: {output / 'page.html'}", soft_wrap=True)
    if found.left:
        say("not done", f"no time for {len(found.left)} parts, {found.left[0]} first; run again to go on", "yellow")
    raise_failures(failures, len(every))
