"""`nearfar medical-segmentation plan`, `from-plan` and `from-nnunet`: recipes from data and from nnU-Net's files."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from nearfar.apps.medical_segmentation.common import RECIPES, Data, Groups, Output, open_collection
from nearfar.core.cli.console import console, table
from nearfar.core.cli.options import Memory
from nearfar.core.errors import UserError
from nearfar.core.files import atomic_path
from nearfar.core.memory import parse_memory
from nearfar.medical.models.umamba import PLACEMENTS, plan_recipe
from nearfar.medical.nnunet import read_plan_file, read_results
from nearfar.medical.planning import KINDS, plan, write_plan


def plan_command(
    data: Data,
    output: Annotated[Path, typer.Option("--output", "-o", help="Recipe to write (YAML), for train --recipe.")],
    network: Annotated[str, typer.Option(help="plain or resenc: nnU-Net's U-Nets.")] = "plain",
    axes: Annotated[
        int | None, typer.Option(help="2 for slices. (default: 3 for volumes, 2 where --minutes are few)")
    ] = None,
    memory: Memory = "8G",
    minutes: Annotated[
        float | None, typer.Option(help="Of a training on this machine, for each fold. (default: nnU-Net's length)")
    ] = None,
    groups: Groups = None,
) -> None:
    """Look at the labelled cases and decide how to train: a recipe in which each setting has its reason.

    By nnU-Net's rules: spacing, patch and batch for --memory (of the GPU), stages, resampling, intensities, sampling.
    --minutes times a step here and bounds patch, batch, width and length, too; where they are few, volumes are seen by
    slices and large images coarser. `plans.json` of nnU-Net: `from-plan`.
    """
    if network not in KINDS:
        raise UserError(f"--network {network}: must be one of {', '.join(KINDS)}")
    collection = open_collection(data, groups)
    cases = [case for case in collection.cases if case.label is not None and case.part != "test"]
    if not cases:
        raise UserError(f"{data}: no labelled cases to plan by")
    budget = parse_memory(memory or "8G")
    recipe, reasons, found = plan(collection, cases, memory=budget, minutes=minutes, kind=network, dims=axes)
    write_plan(output, recipe, reasons, found, str(data))
    rows = [{"setting": k, "value": _brief(v), "reason": reasons[k]} for k, v in recipe.items() if k != "settings"]
    console.print(table(rows))
    console.print(f"plan: {output}", soft_wrap=True, highlight=False)


def _brief(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return ", ".join(next(iter(entry)) for entry in value)
    return json.dumps(value)


def from_nnunet(
    results: Annotated[Path, typer.Argument(help="Folder that nnU-Net v2 trained: plans.json, fold_0 ...")],
    output: Output,
    fold: Annotated[str, typer.Option(help="The fold, a number or all.")] = "0",
    checkpoint: Annotated[str, typer.Option(help="File in the fold's folder.")] = "checkpoint_final.pth",
) -> None:
    """Make a model of one that nnU-Net v2 trained; `predict --mirror` with it as nnUNetv2_predict does."""
    segmenter = read_results(results, fold, checkpoint)
    segmenter.save(output)
    sizes = "x".join(map(str, segmenter.recipe.roi))
    console.print(f"model: {output} ({segmenter.recipe.network}, windows of {sizes})", soft_wrap=True, highlight=False)


def from_plan(
    plans: Annotated[Path, typer.Argument(help="nnUNetPlans.json of nnU-Net v2.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Recipe to write (YAML).")],
    configuration: Annotated[str, typer.Option(help="Configuration of the plan, such as 2d.")] = "3d_fullres",
    placement: Annotated[
        str, typer.Option(help="bottleneck or encoder (U-Mamba_Bot, _Enc), or none: nnU-Net's own.")
    ] = "bottleneck",
) -> None:
    """Write a recipe that trains the network of an nnU-Net plan, or its U-Mamba, with nnU-Net's optimizer and loss."""
    if placement not in (*PLACEMENTS, "none"):
        raise UserError(f"--placement {placement}: must be one of {', '.join(PLACEMENTS)} or none")
    template = yaml.safe_load((RECIPES / "umamba.yaml").read_text(encoding="utf-8"))
    if placement == "none":
        recipe = template | read_plan_file(plans, configuration)
    else:
        recipe = template | plan_recipe(plans, configuration, placement)
    if len(recipe["roi"]) == 2:
        recipe["augment"] = None
    with atomic_path(output) as temporary:
        temporary.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    console.print(f"wrote {output}: {recipe['network']}, windows of {'x'.join(map(str, recipe['roi']))}")
