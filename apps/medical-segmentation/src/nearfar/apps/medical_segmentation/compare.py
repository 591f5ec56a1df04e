"""`nearfar medical-segmentation compare`: networks on the same cases, folds and steps."""

from collections import Counter
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from nearfar.apps.medical_segmentation.common import RECIPES, Data, Groups, open_collection, say_notes
from nearfar.core.cli.console import console, show_json, table, track
from nearfar.core.cli.options import Device, Fresh, Json, Settings, recipe_option
from nearfar.core.errors import UserError
from nearfar.core.recipes import read_recipe, shipped_recipes
from nearfar.core.report import Report
from nearfar.medical.comparison import compare_networks, verdict, with_ablations
from nearfar.medical.recipe import Recipe


def compare(
    data: Data,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the table, the page and the models.")],
    network: Annotated[
        list[str],
        typer.Option(
            help=f"Recipe that lends its network, settings and learning rate: {', '.join(shipped_recipes(RECIPES))}, "
            "or a YAML file. Repeat."
        ),
    ],
    recipe: Annotated[str, recipe_option(RECIPES)] = "small",
    settings: Settings = None,
    groups: Groups = None,
    folds: Annotated[
        int,
        typer.Option(
            help="Parts of the patients; every case is scored by a model that has not seen its patient.", min=2
        ),
    ] = 2,
    slabs: Annotated[
        int,
        typer.Option(
            help="Slabs of each case, along its longest axis, for intervals and tests over them where there are few "
            "patients; they tell nothing of other patients.",
            min=1,
        ),
    ] = 1,
    device: Device = "auto",
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Train networks on the same cases, folds and number of steps, with their ablations, and say who wins.

    The recipe's own network is the one that each is tested against. All else, patches, steps, loss, schedule, is the
    recipe's. A network with scans is trained without them, too (NAME-identity).
    """
    collection = open_collection(data, groups)
    cases = [case for case in collection.cases if case.label is not None and case.part != "test"]
    if not cases:
        raise UserError(f"{data}: no labelled cases to train on")
    say_notes(collection.notes)
    first, names = Path(recipe).stem, [Path(name).stem for name in network]
    if twice := [name for name, number in Counter(names).items() if number > 1]:
        raise UserError(f"--network {', '.join(twice)}: each is compared once")
    others = {own: read_recipe(Recipe, name, folder=RECIPES) for own, name in zip(names, network, strict=True)}
    jobs = with_ablations(first, read_recipe(Recipe, recipe, settings or (), RECIPES), others)
    rows, paired = compare_networks(
        collection, cases, jobs, output, folds=folds, slabs=slabs, device=device, fresh=fresh, track=track,
        say=lambda text: say_notes([text]),
    )  # fmt: skip
    told = verdict(rows, paired, first)
    brief = []
    for row in rows:
        low, high = row["low"], row["high"]
        over = {"by slab": row["by item"]} if slabs > 1 else {}
        interval = "-" if np.isnan(low) else f"{low:.3f} to {high:.3f}"
        brief.append({k: v for k, v in row.items() if k not in ("by item", "low", "high", "items")} | over)
        brief[-1]["95 %"] = interval
    what = f"{rows[0]['items']} {'slabs' if slabs > 1 else 'patients'}"
    about = f"Dice, intervals over {what}; each network against the recipe's, and against itself without scans"
    Report(f"Networks on {data.name}").text(told).table(brief).table(paired, f"{about}; p by Holm.").write(
        output / "index.html"
    )
    if as_json:
        show_json({"networks": rows, "paired": paired, "verdict": told})
        return
    console.print(table(brief, f"every case, by the model that has not seen its patient; intervals over {what}"))
    console.print(table(paired, f"Dice, paired over {what}"))
    console.print(told, soft_wrap=True, highlight=False)
    console.print(f"page: {output / 'index.html'}", soft_wrap=True, highlight=False)
