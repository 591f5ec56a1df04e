"""`nearfar medical-segmentation`: inspect data, train, predict, evaluate, refine with the CRF, export."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
import yaml

from nearfar.apps.medical_segmentation import pages
from nearfar.core.cli.batch import BatchError, Places, raise_failures, run_batch
from nearfar.core.cli.console import console, say, show_json, table, track
from nearfar.core.cli.options import (
    Device,
    Devices,
    Engine,
    Fresh,
    Json,
    Memory,
    Nodes,
    Precision,
    RunFolder,
    Settings,
    Strategy,
    Timeout,
    Workers,
    anywhere,
    recipe_option,
    whole,
)
from nearfar.core.errors import UserError
from nearfar.core.files import atomic_path, write_csv, write_json
from nearfar.core.made_from import MadeFrom, mark_beside, model_digest
from nearfar.core.memory import parse_memory
from nearfar.core.model_folder import TrainedOn, mark
from nearfar.core.reading import read_json
from nearfar.core.recipes import read_recipe, shipped_recipes
from nearfar.core.report import Report
from nearfar.medical import doctor, metrics
from nearfar.medical.bundle import write_bundle
from nearfar.medical.comparison import compare_networks, verdict, with_ablations
from nearfar.medical.data.cases import Case, Collection, case_digest, check_split, make_splits
from nearfar.medical.data.dicom import segment_code
from nearfar.medical.data.layouts import find_cases, grouped, is_series, read_splits, stem
from nearfar.medical.data.mending import mend_nifti
from nearfar.medical.data.scans import read_about, read_labels, read_scan, write_dicom_seg, write_labels
from nearfar.medical.folds import FoldEnsemble, train_folds
from nearfar.medical.folds import load as load_model
from nearfar.medical.models.umamba import PLACEMENTS, plan_recipe
from nearfar.medical.nnunet import read_plan_file, read_results
from nearfar.medical.planning import KINDS, plan, write_plan
from nearfar.medical.recipe import Recipe
from nearfar.medical.refinement import refine as refine_probabilities
from nearfar.medical.refinement import to_bytes
from nearfar.medical.segmenter import Segmenter
from nearfar.medical.training import train_segmenter, tune_crf
from nearfar.ops.graph.dense_crf import DenseCRF

RECIPES = Path(__file__).parent / "recipes"

app = typer.Typer(
    help="Segment medical scans and pictures. Start with `inspect FOLDER`; make a model with `train`, use it with "
    "`predict`, score it with `evaluate`.\n\nReads NIfTI, DICOM series (folders), NRRD, PNG, JPEG, TIFF; knows the "
    "layouts of nnU-Net, the Decathlon, ACDC, Synapse, BTCV, BraTS, CHAOS, VOC, CHASE_DB1, DRIVE, ISIC, BUSI, Kvasir "
    "and CVC.",
    no_args_is_help=True,
)


ENDINGS = (".nii.gz", ".nii", ".nrrd", ".png")
"""Of label maps."""


class Convention(StrEnum):
    nearfar = "nearfar"
    synapse_legacy = "synapse_legacy"
    brats = "brats"
    brats_lesions = "brats_lesions"
    segmamba = "segmamba"
    monai = "monai"


Data = Annotated[Path, typer.Argument(help="Folder of a data set.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")]
Groups = Annotated[
    str | None,
    typer.Option(
        help="Patients: a CSV file of case,patient, or a pattern on the cases' names whose one group is the patient. "
        "(default: by the layout, else by the names)"
    ),
]
CRF: Mapping[str, Any] = {
    "iterations": 5, "spatial_weight": 1.0, "spatial_std": 2.0,
    "bilateral_weight": 1.0, "bilateral_std": 10.0, "color_std": 20.0,
}  # fmt: skip
"""Settings for a model whose CRF was not searched."""

SpatialWeight = Annotated[float, typer.Option(help="Weight of the CRF's spatial kernel.")]
SpatialStd = Annotated[float, typer.Option(help="Its deviation, in mm (pixels for pictures).")]
BilateralWeight = Annotated[float, typer.Option(help="Weight of the kernel over position and intensity.")]
BilateralStd = Annotated[float, typer.Option(help="Its deviation in position.")]
ColorStd = Annotated[float, typer.Option(help="Its deviation in intensity, of 0..255.")]


@app.command()
def inspect(
    data: Data,
    groups: Groups = None,
    html: Annotated[
        Path | None,
        typer.Option("--html", help="Look at every voxel, too, and write a page of findings, each with what mends it."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what a data folder holds: layout, shapes, spacings, labels, problems. Exit status 1 if there are any.

    Shapes and places come from the images' headers, of which nothing else is read; label maps are read.
    Below the table stand notes on what a rule had to decide, such as which of two affines of a file counts.
    """
    collection = _collection(data, groups)
    notes = list(collection.notes)
    if html is not None:
        seen, findings = doctor.examine(collection)
        pages.doctor_page(html, str(data), collection, seen, findings)
        errors = sum(finding.grade == "error" for finding in findings)
        console.print(f"page: {html} ({len(findings)} findings)", soft_wrap=True, highlight=False)
        if errors:
            raise BatchError(f"{errors} findings are errors, see {html}")
        return

    def look(case: Case) -> dict[str, Any]:
        scan, labels = collection.read(case, data=False)
        found = [] if labels is None else sorted(set(np.unique(labels).tolist()) - {0})
        if labels is not None and not found:
            raise UserError(f"{case.label}: has no foreground at all")
        notes.extend(f"{case.name}: {note}" for note in scan.notes)
        return {
            "case": case.name,
            "shape": "x".join(map(str, scan.shape)),
            "channels": len(scan.image),
            "spacing": "x".join(f"{s:.3g}" for s in scan.spacing),
            "axes": scan.orientation,
            "part": case.part,
            "labels": "none" if labels is None else " ".join(map(str, found)),
        }

    rows, failures = run_batch(collection.cases, look, "reading", lambda case: case.name)
    names = {str(k): v for k, v in collection.labels.items()}
    if as_json:
        content = {"layout": collection.layout, "labels": names, "cases": rows, "problems": failures, "notes": notes}
        show_json(content)
    else:
        console.print(f"{collection.layout}, {len(collection.cases)} cases", highlight=False)
        if names:
            console.print("labels: " + ", ".join(f"{k} {v}" for k, v in names.items()), highlight=False)
        if collection.regions:
            regions = (f"{name} ({', '.join(map(str, v))})" for name, v in collection.regions.items())
            console.print("regions: " + ", ".join(regions), highlight=False)
        console.print(table(rows))
        _note(notes)
    raise_failures(failures, len(collection.cases))


@app.command()
def mend(
    scan: Annotated[Path, typer.Argument(help="A NIfTI file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")],
    form: Annotated[str | None, typer.Option(help="sform or qform: the one that holds; both are set to it.")] = None,
    unit: Annotated[str | None, typer.Option(help="mm, meter or micron: what its lengths are in.")] = None,
    shift: Annotated[str | None, typer.Option(help="Voxels right, front, up to move a label map by: 0,2,0.")] = None,
    mirror: Annotated[bool, typer.Option("--mirror", help="Turn left and right round.")] = False,
    resample: Annotated[bool, typer.Option("--resample", help="A label map onto the grid of --like.")] = False,
    like: Annotated[Path | None, typer.Option(help="The image whose grid it is to have.")] = None,
    fill_nan: Annotated[bool, typer.Option("--fill-nan", help="0 in the place of NaN and infinite voxels.")] = False,
) -> None:
    """Write a scan or label map with one fault mended, as `inspect --html` advises; the file itself stays."""
    chosen = [form is not None, unit is not None, shift is not None, mirror, resample, fill_nan]
    if sum(chosen) != 1:
        raise UserError("give one of --form, --unit, --shift, --mirror, --resample, --fill-nan")
    if output.resolve() == scan.resolve():
        raise UserError(f"{output}: is the file itself; name another")
    if resample and like is None:
        raise UserError("--resample needs --like, the image whose grid it is to have")
    steps = None if shift is None else tuple(int(part) for part in shift.split(","))
    mend_nifti(scan, output, form=form, unit=unit, shift=steps, mirror=mirror, like=like, fill_nan=fill_nan)
    console.print(f"wrote {output}", soft_wrap=True, highlight=False)


@app.command()
def train(
    data: Data,
    output: RunFolder,
    recipe: Annotated[str, recipe_option(RECIPES)] = "small",
    settings: Settings = None,
    groups: Groups = None,
    splits_file: Annotated[
        Path | None,
        typer.Option("--splits", help="Splits as nnU-Net's splits_final.json has them. (default: that of DATA if any)"),
    ] = None,
    folds: Annotated[
        str, typer.Option(help="Folds of the cross-validation split, by patient; `all`: train each of (5) folds.")
    ] = "5",
    fold: Annotated[int, typer.Option(help="The fold that is held out.")] = 0,
    regions: Annotated[
        list[str] | None,
        typer.Option(
            help="Region to train on, a union of labels as `inspect` lists them, or a label; they may overlap. Repeat. "
            "(default: those of nnU-Net's dataset.json, else labels)"
        ),
    ] = None,
    calibrate: Annotated[
        float,
        typer.Option(help="With --folds all, share of the patients that no fold sees and the quality flag is set by."),
    ] = 0.0,
    bad: Annotated[
        float | None, typer.Option(help="Dice below which a result is bad. (default: the calibration's lowest quarter)")
    ] = None,
    device: Device = "auto",
    devices: Devices = 1,
    nodes: Nodes = 1,
    strategy: Strategy = "ddp",
    precision: Precision = "32-true",
    fresh: Fresh = False,
) -> None:
    """Train a network on the labelled cases of a folder; one fold is held out and scored, or each in turn.

    Writes the model, the split (splits.json), the record of the run and validation.json. An interrupted run goes on.
    With --folds all a model for each fold (fold_0 ...), scores of every case by the model that has not seen it
    (cross_validation.json), which labels keep their largest part alone, and what sets the quality flag.
    """
    collection = _collection(data, groups)
    if regions:
        collection = collection.trained_on_regions(regions)
    labelled = [case for case in collection.cases if case.label is not None and case.part != "test"]
    chosen = read_recipe(Recipe, recipe, settings or (), RECIPES)
    if not labelled:
        raise UserError(f"{data}: no labelled cases to train on")
    _note(collection.notes)
    every = folds == "all"
    if not every and not folds.isdigit():
        raise UserError(f"--folds {folds}: must be a number or all")
    if not 0 <= calibrate < 1 or (calibrate and not every):
        raise UserError(f"--calibrate {calibrate}: is a share below 1, for --folds all")
    patients = sorted({case.group or case.name for case in labelled})
    order = np.random.default_rng([chosen.seed, 1]).permutation(len(patients))
    chosen_patients = {patients[i] for i in order[: round(calibrate * len(patients))]}
    apart = [case for case in labelled if (case.group or case.name) in chosen_patients]
    labelled = [case for case in labelled if case not in apart]
    given = splits_file or (data / "splits_final.json" if (data / "splits_final.json").is_file() else None)
    if given is not None:
        splits = read_splits(given, labelled)
        named = {name for split in splits[fold : fold + 1] for side in split.values() for name in side}
        left = len({case.name for case in labelled} - named)
        _note([f"split by {given}" + (f", which leaves out {left} of {len(labelled)} cases" if left else "")])
        write_json(output / "splits.json", splits)
    else:
        number = min(5 if every else int(folds), len({case.group or case.name for case in labelled}))
        splits = make_splits(labelled, number, chosen.seed, output / "splits.json")
    options: dict[str, Any] = {"show_progress": console.is_terminal, "device": device, "fresh": fresh}
    options |= {"say": lambda text: _note([text]), "precision": precision}
    if every:
        for split in splits:
            check_split(labelled, split["train"], split["validation"])
        ensemble, summary = train_folds(collection, chosen, output, splits, calibration=apart, bad=bad, **options)
        console.print(table(_short(summary), "every case, by the fold that has not seen it"))
        if quality := ensemble.quality:
            caught = "-" if quality["caught"] is None else f"{quality['caught']:.0%}"
            console.print(
                f"quality flag: of {quality['cases']} cases that no fold saw {quality['bad_cases']} are bad (Dice to "
                f"{quality['bad']:.3f}); {caught} of them are caught, with {quality['false_alarms']} false alarms",
                soft_wrap=True, highlight=False,
            )  # fmt: skip
        console.print(f"model: {output}", soft_wrap=True, highlight=False)
        return
    if not 0 <= fold < len(splits):
        raise UserError(f"--fold {fold}: must be one of 0 to {len(splits) - 1}")
    split = splits[fold]
    check_split(labelled, split["train"], split["validation"])
    _, summary = train_segmenter(
        collection,
        chosen,
        output,
        train_cases=[c for c in labelled if c.name in split["train"]],
        validation_cases=[c for c in labelled if c.name in split["validation"]],
        **options,
    )
    console.print(table(_short(summary), "held-out cases"))
    console.print(f"model: {output}", soft_wrap=True, highlight=False)


@app.command("plan")
def plan_command(
    data: Data,
    output: Annotated[Path, typer.Option("--output", "-o", help="Recipe to write (YAML), for train --recipe.")],
    network: Annotated[str, typer.Option(help="plain or resenc: nnU-Net's U-Nets.")] = "plain",
    axes: Annotated[int | None, typer.Option(help="2 for slices. (default: 3 for volumes)")] = None,
    memory: Memory = "8G",
    minutes: Annotated[
        float | None, typer.Option(help="Of a training on this machine, for each fold. (default: nnU-Net's length)")
    ] = None,
    groups: Groups = None,
) -> None:
    """Look at the labelled cases and decide how to train: a recipe in which each setting has its reason.

    By nnU-Net's rules: spacing, patch and batch for --memory (of the GPU), stages, resampling, intensities, sampling.
    --minutes times a step here and bounds patch, batch, width and length, too. `plans.json` of nnU-Net: `from-plan`.
    """
    if network not in KINDS:
        raise UserError(f"--network {network}: must be one of {', '.join(KINDS)}")
    collection = _collection(data, groups)
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


@app.command()
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


@app.command()
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


@app.command()
def search(
    data: Data,
    model: Annotated[Path, typer.Option(help="Folder that `train` wrote; the settings found go into it.")],
    fold: Annotated[int, typer.Option(help="The fold of its splits.json that was held out.")] = 0,
    device: Device = "auto",
) -> None:
    """Search the CRF's settings on the held-out fold of a model; `predict --crf` then uses them.

    Goes over 48 settings and keeps the best mean Dice, which is that of no CRF where none helps. Scores of the same
    cases are optimistic afterwards: report those of others.
    """
    segmenter, collection = Segmenter.load(model), find_cases(data)
    try:
        held_out = json.loads((model / "splits.json").read_text(encoding="utf-8"))[fold]["validation"]
    except (OSError, ValueError, LookupError) as error:
        raise UserError(f"{model}: has no fold {fold} in its splits.json ({error})") from error
    cases = track([case for case in collection.cases if case.name in held_out], "segmenting")
    try:
        rows, number = tune_crf(segmenter, collection, cases, device, lambda grid: track(grid, "searching", len(grid)))
    except UserError as error:
        raise UserError(f"{data}: {error}; it needs those of fold {fold} of {model}/splits.json") from error
    segmenter.save(model)
    rows = [{"Dice": r["dice"], **(r["settings"] or {"iterations": "no CRF"})} for r in rows]
    write_csv(model / "crf.csv", rows)
    best = sorted(rows[1:], key=lambda row: -row["Dice"])[:5]
    console.print(table([{**dict.fromkeys(best[0], "-"), **row} for row in (rows[0], *best)], f"{number} cases"))
    console.print(f"best: {segmenter.crf or 'no CRF'}", soft_wrap=True, highlight=False)


@app.command()
def predict(
    inputs: Annotated[list[Path], typer.Argument(help="Scans, DICOM folders, or trees of them.", parser=anywhere)],
    model: Annotated[Path, typer.Option(help="Folder that `train` wrote.", parser=whole)],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Folder for the results. (default: beside each scan, _seg)", parser=anywhere
        ),
    ] = None,
    crf: Annotated[bool, typer.Option("--crf", help="Refine with the CRF, as `search` set it.")] = False,
    mirror: Annotated[bool, typer.Option("--mirror", help="Average over the mirror images along all axes.")] = False,
    overlap: Annotated[float, typer.Option(help="Share of a window that the next covers again.")] = 0.5,
    part: Annotated[str | None, typer.Option(help="Of a data set, only the cases of `train` or `test`.")] = None,
    memory: Memory = None,
    device: Device = "auto",
    workers: Workers = 0,
    engine: Engine = "local",
    timeout: Timeout = None,
    dicom_seg: Annotated[bool, typer.Option("--dicom-seg", help="Also write DICOM-SEG for DICOM input.")] = False,
    codes: Annotated[
        Path | None,
        typer.Option(
            help="For DICOM-SEG, codes and colours by label: JSON of {name: {code, scheme, meaning, color: #rrggbb}}.",
            parser=whole,
        ),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Compare a bounded with an unbounded run; print it.")] = False,
    page: Annotated[
        Path | None,
        typer.Option("--page", help="Also write a page to look through them (the least sure 8).", parser=anywhere),
    ] = None,
    save_probabilities: Annotated[
        bool, typer.Option("--save-probabilities", help="Also write NAME_probabilities.npy (classes first).")
    ] = False,
) -> None:
    """Segment scans: label maps on the input's exact grid, and overlay pictures.

    What is there is not done again, unless scan, model or options were others. --memory counts the scan, its prepared
    image, label maps and windows, not the program and the network; a scan that does not fit is refused. Without it the
    windows have 384M and the rest no bound. Below the table stand notes on what a rule had to decide.
    """
    segmenter, of_model = load_model(model), model_digest(model)
    budget = None if memory is None else parse_memory(memory)
    if crf and segmenter.crf is None:
        console.print("no CRF settings in the model (run `search`): general ones are used", highlight=False)
    options = {"overlap": overlap, "mirror": mirror, "device": device}
    options["crf"] = DenseCRF(**(segmenter.crf or CRF)) if crf else None
    jobs = _jobs(inputs, output, part)
    coded = None if codes is None else read_json(codes, "codes of labels")
    about = {"model": of_model, "trained_on": sorted(segmenter.trained_on.items)}
    about["patients"] = sorted(segmenter.trained_on.groups)
    notes: list[str] = []
    if dicom_seg and (
        strange := [n for v, n in segmenter.labels.items() if v and n not in (coded or {}) and not segment_code(n)]
    ):
        notes.append(f"no code is known for {', '.join(strange)}: Tissue stands in DICOM-SEG; give --codes")

    def one(job: tuple[Collection, Case, Path]) -> tuple[dict[str, Any], list[str]]:
        collection, case, base = job
        scan = collection.scan(case)
        target = base.with_name(f"{base.name}.nii.gz" if scan.affine is not None else f"{base.name}.png")
        if target.resolve() == case.images[0].resolve():
            raise UserError(f"{target}: is the scan itself; give another output folder")
        made, segmentation = MadeFrom(target, case.images, of_model, overlap=overlap, mirror=mirror, crf=crf), None
        if dicom_seg:
            segmentation = base.with_name(f"{base.name}.dcm")
            if scan.kind != "dicom":
                raise UserError(f"{scan.path}: is no DICOM series, so --dicom-seg has nothing to refer to")
        saved = base.with_name(f"{base.name}_probabilities.npy") if save_probabilities else None
        if made.done():
            if saved is not None and not saved.exists():
                segmenter(scan, memory=budget, probabilities=saved, **options)
            if segmentation is not None and not segmentation.exists():
                write_dicom_seg(segmentation, read_labels(target, scan), scan, segmenter.labels, coded)
            row = {"case": case.name, "labels": "done before", "file": str(target), "marked": mark_beside(target)}
            known = base.with_name(f"{base.name}_quality.json")
            return row | (_expected(read_json(known, "a quality")) if known.is_file() else {}), []
        quality: dict[str, Any] = {}
        if isinstance(segmenter, FoldEnsemble):
            labels, quality = segmenter.with_quality(scan, memory=budget, probabilities=saved, **options)
        else:
            labels = segmenter(scan, memory=budget, probabilities=saved, **options)
        if check:
            small, large = budget or 2**20, 2**40
            same = float((segmenter(scan, memory=small, **options) == segmenter(scan, memory=large, **options)).mean())
            message = f"{case.name}: within {small / 2**20:.0f} MB and unbounded agree on {same:.4%} of the voxels"
            console.print(message, highlight=False, soft_wrap=True)
        pages.write_overlay(base.with_name(f"{base.name}_overlay.png"), scan, labels)
        write_labels(target, labels, scan, about)
        marked = mark(segmenter.trained_on.seen([case_digest(case)]))
        made.write(marked)
        if segmentation is not None:
            write_dicom_seg(segmentation, labels, scan, segmenter.labels, coded)
        voxels = {v: int((labels == k).sum()) for k, v in segmenter.labels.items() if k}
        if scan.kind in ("picture", "array"):
            sizes = [f"{name} {count / labels.size:.2%}" for name, count in voxels.items()]
        else:
            volume = float(np.prod(scan.spacing))
            sizes = [f"{name} {count * volume / 1000:.1f} ml" for name, count in voxels.items()]
        row = {"case": case.name, "labels": ", ".join(sizes), "file": str(target), "marked": marked}
        if quality:
            write_json(base.with_name(f"{base.name}_quality.json"), quality)
            row |= _expected(quality)
        return row, [f"{case.name}: {note}" for note in scan.notes]

    places, failed = Places(workers, engine, timeout), None if output is None else output / "failures.json"
    done, failures = run_batch(jobs, one, "segmenting", lambda job: str(job[1].images[0]), places, failed)
    rows = [row for row, _ in done]
    notes += [note for _, more in done for note in more]
    told = dict.fromkeys(key for row in rows for key in row)
    console.print(table([{**dict.fromkeys(told, ""), **row} for row in rows]))
    _note(notes)
    if page is not None and rows:
        good = {row["file"]: row.get("expected Dice", "") for row in rows}
        shown = []
        for file in sorted(good, key=lambda file: good[file] or "1")[:8]:
            collection, case, _ = next(job for job in jobs if str(_target(job[2], file)) == file)
            scan = collection.scan(case)
            title = case.name + (f": expected Dice {good[file]}" if good[file] else "")
            shown.append((title, scan, read_labels(file, scan)))
        pages.cases_page(page, shown, segmenter.labels)
        console.print(f"page: {page}", soft_wrap=True, highlight=False)
    raise_failures(failures, len(jobs))


def _expected(quality: Mapping[str, Any]) -> dict[str, str]:
    return {"expected Dice": f"{quality['mean']:.3f}" + (" - LOOK AT IT" if quality["flag"] else "")}


def _target(base: Path, file: str) -> Path:
    """Where the label map of a job lies, by the ending of `file`."""
    return base.with_name(f"{base.name}{'.nii.gz' if file.endswith('.nii.gz') else '.png'}")


def _collection(data: Path, groups: str | None) -> Collection:
    collection = find_cases(data)
    return collection if groups is None else grouped(collection, groups)


def _note(notes: Sequence[str]) -> None:
    for note in notes:
        say("note", note, "yellow")


def _jobs(inputs: list[Path], output: Path | None, part: str | None) -> list[tuple[Collection, Case, Path]]:
    """(collection, case, where its results go but for the ending) of every scan in `inputs`."""
    jobs = []
    for path in inputs:
        if path.is_dir() and not is_series(path):
            collection = find_cases(path)
            cases = [c for c in collection.cases if not stem(c.images[0]).endswith(("_seg", "_overlay"))]
        else:
            collection = Collection("scan", [])
            cases = [Case(stem(path) if path.is_file() else path.name, (path,))]
        for case in cases:
            if part in (None, case.part):
                beside = case.images[0].with_name(f"{case.name.split('/')[-1]}_seg")
                jobs.append((collection, case, beside if output is None else output / case.name))
    if twice := [str(base) for base, count in Counter(base for _, _, base in jobs).items() if count > 1]:
        raise UserError(
            f"several scans would be written to {', '.join(twice[:3])}; give each input an output of its own"
        )
    return jobs


@app.command()
def evaluate(
    predictions: Annotated[Path, typer.Argument(help="Folder of label maps, named as the cases.")],
    data: Annotated[Path, typer.Argument(help="Folder of the data set with the truth.")],
    output: Output,
    convention: Annotated[Convention, typer.Option(help="How empty structures count, and units.")] = Convention.nearfar,
    tolerance: Annotated[float | None, typer.Option(help="Also the normalized surface Dice at this many mm.")] = None,
    worst: Annotated[int, typer.Option(help="Worst cases to show on the page.")] = 3,
    held_out: Annotated[
        bool, typer.Option("--held-out", help="Leave out the cases and patients that the model was trained on.")
    ] = False,
    training_cases: Annotated[
        bool, typer.Option("--training-cases", help="Score also cases that the model was trained on, and mark them.")
    ] = False,
    groups: Groups = None,
    against: Annotated[Path | None, typer.Option(help="Label maps of another method: paired tests.")] = None,
) -> None:
    """Score label maps: cases.csv, summary.json with bootstrap intervals, and index.html with the worst cases.

    A labelled case without a prediction is an error, not a case less. A case, or another of the same patient, that the
    model of `predict` was trained on is refused, by what the prediction says of its model: --held-out leaves such cases
    out, --training-cases scores them. Conventions: nearfar (a missed structure counts as worst), synapse_legacy, brats
    (the challenge until 2022), brats_lesions (since then, for gliomas), segmamba (its paper's script for BraTS), monai.
    """
    if held_out and training_cases:
        raise UserError("--held-out and --training-cases: give one")
    collection = _collection(data, groups)
    labelled = [case for case in collection.cases if case.label is not None]
    labelled = [c for c in labelled if c.part != "train"] if any(c.part == "test" for c in labelled) else labelled

    def prediction(case: Case, folder: Path) -> Path:
        names = (case.name, case.name.split("/")[-1])
        files = [p for name in names for ending in ENDINGS if (p := folder / f"{name}{ending}").is_file()]
        if not files:
            raise UserError(f"{case.name}: has no prediction in {folder}")
        return files[0]

    def trained(case: Case) -> bool:
        """Whether the prediction's model has seen the case or another of its patient."""
        try:
            path = prediction(case, predictions)
        except UserError:
            return False  # told when it is scored
        about = read_about(path)
        seen = TrainedOn(frozenset(about.get("trained_on", ())), frozenset(about.get("patients", ())))
        patient = case.group if case.group != case.name else None  # a name alone may stand in another data set too
        return seen.seen([case_digest(case)], [patient or None])[0] or bool(mark_beside(path))

    seen_before = {case.name for case in track(labelled, "looking for training cases") if trained(case)}
    if seen_before and not training_cases:
        if not held_out or len(seen_before) == len(labelled):
            raise UserError(
                f"{', '.join(sorted(seen_before)[:5])}: the model was trained on {len(seen_before)} of the "
                f"{len(labelled)} cases, or on others of their patients; leave them out with --held-out, or score "
                "them with --training-cases"
            )
        console.print(f"{len(seen_before)} training cases are left out", highlight=False)
        labelled = [case for case in labelled if case.name not in seen_before]

    def load(case: Case, folder: Path) -> tuple[Any, np.ndarray, np.ndarray]:
        scan, truth = collection.read(case)
        assert truth is not None
        return scan, read_labels(prediction(case, folder), scan), truth

    def one(case: Case, folder: Path = predictions) -> list[dict[str, Any]]:
        scan, found, truth = load(case, folder)
        try:
            scores = collection.score(found, truth, scan.spacing, convention=convention, tolerance=tolerance)
        except ValueError as error:
            raise UserError(f"{case.name}: {error}") from error
        return [{"case": case.name, **row, "seen_in_training": case.name in seen_before} for row in scores]

    results, failures = run_batch(labelled, one, "scoring", lambda case: case.name)
    rows = [row for result in results for row in result]
    if rows:
        summary = metrics.summarize(rows)
        marked = mark([result[0]["seen_in_training"] for result in results if result])
        content = {"convention": str(convention), "summary": summary, "failures": failures, "marked": marked}
        said = f"{convention}; {marked}: too good" if marked else str(convention)
        if against is not None:
            scored = {row["case"] for row in rows}
            others = [row for c in labelled if c.name in scored for row in one(c, against)]
            content["against"] = paired = metrics.compare(rows, others)
            console.print(table(paired, f"difference to {against}, paired"))
        write_csv(output / "cases.csv", rows)
        write_json(output / "summary.json", content)
        by_case = {r[0]["case"]: float(np.nanmean([row["dice"] for row in r] or [1.0])) for r in results if r}
        chosen = sorted(by_case, key=by_case.__getitem__)[:worst]
        shown = []
        found = {case.name: case for case in labelled}
        for name in chosen:  # the worst first
            shown.append((name, *load(found[name], predictions)))
        page = pages.evaluation_page(output / "index.html", _short(summary), rows, shown, said, collection.labels)
        console.print(table(_short(summary), f"convention {said}"))
        console.print(f"page: {page}", soft_wrap=True, highlight=False)
    raise_failures(failures, len(labelled))


@app.command()
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
    collection = _collection(data, groups)
    cases = [case for case in collection.cases if case.label is not None and case.part != "test"]
    if not cases:
        raise UserError(f"{data}: no labelled cases to train on")
    _note(collection.notes)
    first, names = Path(recipe).stem, [Path(name).stem for name in network]
    if twice := [name for name, number in Counter(names).items() if number > 1]:
        raise UserError(f"--network {', '.join(twice)}: each is compared once")
    others = {own: read_recipe(Recipe, name, folder=RECIPES) for own, name in zip(names, network, strict=True)}
    jobs = with_ablations(first, read_recipe(Recipe, recipe, settings or (), RECIPES), others)
    rows, paired = compare_networks(
        collection, cases, jobs, output, folds=folds, slabs=slabs, device=device, fresh=fresh, track=track,
        say=lambda text: _note([text]),
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


@app.command()
def refine(
    probabilities: Annotated[Path, typer.Argument(help=".npy of (classes, *grid) probabilities.")],
    image: Annotated[Path, typer.Argument(help="The image they belong to.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Label map to write.")],
    iterations: Annotated[int, typer.Option(help="Mean-field iterations.")] = 10,
    spatial_weight: SpatialWeight = 3.0,
    spatial_std: SpatialStd = 1.0,
    bilateral_weight: BilateralWeight = 4.0,
    bilateral_std: BilateralStd = 67.0,
    color_std: ColorStd = 3.0,
    exact: Annotated[bool, typer.Option("--exact", help="Exact sums instead of the lattice; small grids.")] = False,
    memory: Memory = None,
    device: Device = "auto",
) -> None:
    """Run the fully connected CRF on anybody's probabilities and write the label map on the image's grid.

    Pictures are used as they are (0..255); volumes are stretched to 0..255 first. --memory counts what grows with
    classes and volume.
    """
    scan = read_scan(image)
    try:
        p = np.load(probabilities, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{probabilities}: cannot be read as an array of numbers ({error})") from error
    if p.ndim != len(scan.shape) + 1 or p.shape[1:] != scan.shape:
        raise UserError(f"{probabilities}: shape {p.shape} is not (classes, {', '.join(map(str, scan.shape))})")
    before = np.zeros(scan.shape, np.int32)
    for i in range(scan.shape[0]):  # plane by plane: the file may be larger than the memory
        plane = np.asarray(p[:, i], np.float32)
        if not np.isfinite(plane).all() or plane.min() < 0 or np.abs(plane.sum(0) - 1).max() > 1e-2:
            raise UserError(
                f"{probabilities}: holds no probabilities (they must be positive and sum to 1 at each voxel)"
            )
        before[i] = plane.argmax(0)
    pixels = torch.from_numpy(np.ascontiguousarray(scan.image))
    pixels = pixels if scan.affine is None else to_bytes(pixels)
    try:
        crf = DenseCRF(
            iterations, spatial_weight, spatial_std, bilateral_weight, bilateral_std, color_std,
            mode="exact" if exact else "lattice",
        )  # fmt: skip
        budget = None if memory is None else parse_memory(memory)
        labels = refine_probabilities(p, pixels, crf, scan.spacing, memory=budget, device=device)
    except ValueError as error:
        raise UserError(f"refine: {error}") from error
    write_labels(output, labels, scan)
    changed = float((labels != before).mean())
    console.print(f"{output}: {changed:.2%} of the voxels changed their label", soft_wrap=True, highlight=False)


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="Folder that `train` wrote.")],
    output: Output,
) -> None:
    """Write the model as a MONAI bundle: configs/metadata.json, configs/inference.json, models/model.pt.

    It runs with `python -m monai.bundle run --config_file OUTPUT/configs/inference.json --bundle_root OUTPUT
    --dataset_dir SCANS --output_dir RESULTS` where nearfar-medical is installed.
    """
    write_bundle(Segmenter.load(model), output)
    console.print(f"MONAI bundle: {output}", soft_wrap=True, highlight=False)


def _short(summary: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The summary with each interval in one column."""
    rows = []
    for row in summary:
        short: dict[str, Any] = {"label": row["label"], "cases": row["cases"]}
        for name in ("dice", "iou", "hd95", "nsd"):
            if name in row:
                short[name] = row[name]
                low, high = row[f"{name}_low"], row[f"{name}_high"]
                short[f"{name} 95 %"] = "-" if np.isnan(low) else f"{low:.3g} to {high:.3g}"  # of a single case, none
        rows.append(short)
    return rows
