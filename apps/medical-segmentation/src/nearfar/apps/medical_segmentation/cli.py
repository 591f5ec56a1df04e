"""`nearfar medical-segmentation`: inspect data, train, predict, evaluate, refine with the CRF, export."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from nearfar.apps.medical_segmentation import pages
from nearfar.core.cli import console, raise_failures, run_batch, table
from nearfar.core.errors import UserError
from nearfar.core.files import atomic_path, write_csv, write_json
from nearfar.core.training import read_recipe
from nearfar.medical import metrics
from nearfar.medical.datasets import Case, Collection, check_split, find_cases, make_splits
from nearfar.medical.inference import parse_memory
from nearfar.medical.scans import read_labels, read_scan, write_dicom_seg, write_labels
from nearfar.medical.segmenter import RECIPES, Recipe, Segmenter, train_segmenter
from nearfar.ops.graph.dense_crf import DenseCRF, unary_from_softmax

app = typer.Typer(
    help="Segment medical scans and pictures. Start with `inspect FOLDER`; make a model with `train`, use it with "
    "`predict`, score it with `evaluate`.\n\nReads NIfTI, DICOM series (folders), NRRD, PNG, JPEG, TIFF; knows the "
    "layouts of nnU-Net, the Decathlon, ACDC, Synapse, VOC, CHASE_DB1, DRIVE, ISIC, Kvasir and CVC.",
    no_args_is_help=True,
)


class Convention(StrEnum):
    nearfar = "nearfar"
    synapse_legacy = "synapse_legacy"
    brats = "brats"
    monai = "monai"


Data = Annotated[Path, typer.Argument(help="Folder of a data set.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or mps.")]
Memory = Annotated[str | None, typer.Option(help="Bound on the scores held in memory, such as 2G.")]
SpatialWeight = Annotated[float, typer.Option(help="Weight of the CRF's spatial kernel.")]
SpatialStd = Annotated[float, typer.Option(help="Its deviation, in mm (pixels for pictures).")]
BilateralWeight = Annotated[float, typer.Option(help="Weight of the kernel over position and intensity.")]
BilateralStd = Annotated[float, typer.Option(help="Its deviation in position.")]
ColorStd = Annotated[float, typer.Option(help="Its deviation in intensity, of 0..255.")]


@app.command()
def inspect(
    data: Data,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a data folder holds: layout, shapes, spacings, labels, problems. Exit status 1 if there are any."""
    collection = find_cases(data)

    def look(case: Case) -> dict[str, Any]:
        scan, labels = collection.read(case)
        found = [] if labels is None else sorted(set(np.unique(labels).tolist()) - {0})
        if labels is not None and not found:
            raise UserError(f"{case.label}: has no foreground at all")
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
        content = {"layout": collection.layout, "labels": names, "cases": rows, "problems": failures}
        typer.echo(json.dumps(content, indent=2))
    else:
        console.print(f"{collection.layout}, {len(collection.cases)} cases", highlight=False)
        if names:
            console.print("labels: " + ", ".join(f"{k} {v}" for k, v in names.items()), highlight=False)
        console.print(table(rows))
    raise_failures(failures, len(collection.cases))


@app.command()
def train(
    data: Data,
    output: Output,
    recipe: Annotated[str, typer.Option(help=f"Name ({', '.join(RECIPES)}) or YAML file of a recipe.")] = "small",
    setting: Annotated[list[str] | None, typer.Option("--set", help="Override a setting, name=value.")] = None,
    folds: Annotated[int, typer.Option(help="Folds of the cross-validation split, by patient.")] = 5,
    fold: Annotated[int, typer.Option(help="The fold that is held out.")] = 0,
    accelerator: Annotated[str, typer.Option(help="auto, cpu, gpu or mps.")] = "auto",
) -> None:
    """Train a network on the labelled cases of a folder; one fold is held out and scored.

    Writes the model, the split (splits.json), the record of the run and validation.json. An interrupted run goes on.
    """
    collection = find_cases(data)
    labelled = [case for case in collection.cases if case.label is not None and case.part != "test"]
    if recipe in RECIPES:
        overrides = [f"{k}={json.dumps(v)}" for k, v in RECIPES[recipe].items()]
        chosen = read_recipe(Recipe, None, [*overrides, *(setting or [])])
    else:
        chosen = read_recipe(Recipe, recipe, setting or [])
    if not labelled:
        raise UserError(f"{data}: no labelled cases to train on")
    folds = min(folds, len({case.group for case in labelled}))
    splits = make_splits(labelled, folds, chosen.seed, output / "splits.json")
    if not 0 <= fold < folds:
        raise UserError(f"--fold {fold}: must be one of 0 to {folds - 1}")
    split = splits[fold]
    check_split(labelled, split["train"], split["validation"])
    _, summary = train_segmenter(
        collection,
        chosen,
        output,
        train_cases=[c for c in labelled if c.name in split["train"]],
        validation_cases=[c for c in labelled if c.name in split["validation"]],
        show_progress=console.is_terminal,
        accelerator=accelerator,
    )
    console.print(table(_short(summary), "held-out cases"))
    console.print(f"model: {output}", soft_wrap=True, highlight=False)


@app.command()
def predict(
    inputs: Annotated[list[Path], typer.Argument(help="Scans, DICOM folders, or trees of them.")],
    model: Annotated[Path, typer.Option(help="Folder that `train` wrote.")],
    output: Output,
    crf: Annotated[bool, typer.Option("--crf", help="Refine with the CRF (holds all classes in memory).")] = False,
    mirror: Annotated[bool, typer.Option("--mirror", help="Average over the mirror images along all axes.")] = False,
    overlap: Annotated[float, typer.Option(help="Share of a window that the next covers again.")] = 0.5,
    memory: Memory = None,
    device: Device = "cpu",
    dicom_seg: Annotated[bool, typer.Option("--dicom-seg", help="Also write DICOM-SEG for DICOM input.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Compare a bounded with an unbounded run; print it.")] = False,
) -> None:
    """Segment scans: label maps on the input's exact grid, and overlay pictures. What is there is not done again."""
    segmenter = Segmenter.load(model)
    budget = None if memory is None else parse_memory(memory)
    refine_with = DenseCRF(5, 1.0, 2.0, 1.0, 10.0, 20.0) if crf else None
    cases: list[tuple[str, Path]] = []
    for path in inputs:
        if path.is_dir() and not any(p.suffix == ".dcm" for p in path.iterdir()):
            cases += [(case.name, case.images[0]) for case in find_cases(path).cases]
        else:
            cases.append((path.name.split(".")[0], path))

    def one(case: tuple[str, Path]) -> dict[str, Any]:
        name, path = case
        scan = read_scan(path)
        target = output / (f"{name}.nii.gz" if scan.affine is not None else f"{name}.png")
        if target.exists():
            return {"case": name, "labels": "done before", "file": str(target)}
        options = {"overlap": overlap, "mirror": mirror, "device": device, "crf": refine_with}
        labels = segmenter(scan, memory=budget, **options)
        if check:
            same = float((segmenter(scan, memory=1, **options) == segmenter(scan, **options)).mean())
            console.print(f"{name}: bounded and unbounded agree on {same:.6%} of the voxels", highlight=False)
        pages.write_overlay(output / f"{name}_overlay.png", scan, labels)
        if dicom_seg:
            write_dicom_seg(output / f"{name}.dcm", labels, scan, segmenter.labels)
        write_labels(target, labels, scan)
        volume = float(np.prod(scan.spacing))
        sizes = {v: f"{(labels == k).sum() * volume / 1000:.1f} ml" for k, v in segmenter.labels.items() if k}
        return {"case": name, "labels": ", ".join(f"{k} {v}" for k, v in sizes.items()), "file": str(target)}

    rows, failures = run_batch(cases, one, "segmenting", lambda case: str(case[1]))
    console.print(table(rows))
    raise_failures(failures, len(cases))


@app.command()
def evaluate(
    predictions: Annotated[Path, typer.Argument(help="Folder of label maps, named as the cases.")],
    data: Annotated[Path, typer.Argument(help="Folder of the data set with the truth.")],
    output: Output,
    convention: Annotated[Convention, typer.Option(help="How empty structures count, and units.")] = Convention.nearfar,
    tolerance: Annotated[float | None, typer.Option(help="Also the normalised surface Dice at this many mm.")] = None,
    worst: Annotated[int, typer.Option(help="Worst cases to show on the page.")] = 3,
) -> None:
    """Score label maps: cases.csv, summary.json with bootstrap intervals, and index.html with the worst cases.

    A labelled case without a prediction is an error, not a case less. Conventions: nearfar (a missed structure counts
    as worst), synapse_legacy, brats, monai.
    """
    collection = find_cases(data)
    labelled = [case for case in collection.cases if case.label is not None]
    files = {p.name.split(".")[0]: p for p in sorted(predictions.rglob("*")) if not p.stem.endswith("_overlay")}
    labelled = [c for c in labelled if c.part != "train"] if any(c.part == "test" for c in labelled) else labelled

    def one(case: Case) -> list[dict[str, Any]]:
        if case.name.split("/")[-1] not in files:
            raise UserError(f"{case.name}: has no prediction in {predictions}")
        scan, truth = collection.read(case)
        found = read_labels(files[case.name.split("/")[-1]], scan)
        try:
            scores = metrics.score_case(
                found, truth, _declared(collection, truth), scan.spacing, convention=convention, tolerance=tolerance
            )
        except ValueError as error:
            raise UserError(f"{case.name}: {error}") from error
        return [{"case": case.name, **row} for row in scores]

    results, failures = run_batch(labelled, one, "scoring", lambda case: case.name)
    rows = [row for result in results for row in result]
    if rows:
        summary = metrics.summarise(rows)
        write_csv(output / "cases.csv", rows)
        write_json(output / "summary.json", {"convention": str(convention), "summary": summary, "failures": failures})
        by_case = {r[0]["case"]: float(np.nanmean([row["dice"] for row in r] or [1.0])) for r in results if r}
        chosen = sorted(by_case, key=by_case.__getitem__)[:worst]
        shown = []
        for case in labelled:
            if case.name in chosen:
                scan, truth = collection.read(case)
                shown.append((case.name, scan, read_labels(files[case.name.split("/")[-1]], scan), truth))
        page = pages.evaluation_page(output / "index.html", _short(summary), rows, shown, str(convention))
        console.print(table(_short(summary), f"convention {convention}"))
        console.print(f"page: {page}", soft_wrap=True, highlight=False)
    raise_failures(failures, len(labelled))


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
    device: Device = "cpu",
) -> None:
    """Run the fully connected CRF on anybody's probabilities and write the label map on the image's grid.

    Pictures are used as they are (0..255); volumes are stretched to 0..255 first.
    """
    scan = read_scan(image)
    try:
        p = torch.from_numpy(np.load(probabilities, allow_pickle=False)).float()
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{probabilities}: cannot be read as an array of numbers ({error})") from error
    if p.ndim != len(scan.shape) + 1 or tuple(p.shape[1:]) != scan.shape:
        raise UserError(f"{probabilities}: shape {tuple(p.shape)} is not (classes, {', '.join(map(str, scan.shape))})")
    if not torch.isfinite(p).all() or float(p.min()) < 0 or float((p.sum(0) - 1).abs().max()) > 1e-2:
        raise UserError(f"{probabilities}: holds no probabilities (they must be positive and sum to 1 at each voxel)")
    pixels = torch.from_numpy(np.ascontiguousarray(scan.image))
    if scan.affine is not None:
        pixels = 255 * (pixels - pixels.min()) / (pixels.max() - pixels.min()).clamp_min(1e-6)
    try:
        crf = DenseCRF(
            iterations, spatial_weight, spatial_std, bilateral_weight, bilateral_std, color_std,
            mode="exact" if exact else "lattice",
        ).to(device)  # fmt: skip
        q = crf(unary_from_softmax(p[None]).to(device), pixels[None].to(device), scan.spacing)[0].cpu()
    except ValueError as error:
        raise UserError(f"refine: {error}") from error
    labels = q.argmax(0).numpy()
    write_labels(output, labels, scan)
    changed = float((labels != p.argmax(0).numpy()).mean())
    console.print(f"{output}: {changed:.2%} of the voxels changed their label", soft_wrap=True, highlight=False)


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="Folder that `train` wrote.")],
    output: Output,
) -> None:
    """Write the model as a MONAI bundle: configs/metadata.json, configs/inference.json, models/model.pt."""
    segmenter = Segmenter.load(model)
    recipe, dims = segmenter.recipe, len(segmenter.recipe.roi)
    classes = len(segmenter.values)
    network = {
        "_target_": "nearfar.medical.segmenter.create_network",
        "name": recipe.network,
        "num_classes": classes,
        "in_channels": segmenter.in_channels,
        "dims": dims,
        "settings": recipe.settings,
    }
    inferer = {"_target_": "SlidingWindowInferer", "roi_size": list(recipe.roi), "overlap": 0.5, "mode": "gaussian"}
    inference = {"imports": ["$import nearfar.medical.segmenter"], "network_def": network, "inferer": inferer}
    shape = {"num_channels": segmenter.in_channels, "spatial_shape": list(recipe.roi), "dtype": "float32"}
    names = {str(i): segmenter.labels.get(v, "background") for i, v in enumerate(segmenter.values)}
    metadata = {
        "version": "0.1.0",
        "task": "segmentation",
        "network_data_format": {
            "inputs": {"image": {"type": "image", "format": "magnitude", **shape}},
            "outputs": {
                "pred": {
                    "type": "image",
                    "format": "segmentation",
                    "num_channels": classes,
                    "spatial_shape": list(recipe.roi),
                    "dtype": "float32",
                    "channel_def": names,
                }
            },
        },
    }
    write_json(output / "configs" / "metadata.json", metadata)
    write_json(output / "configs" / "inference.json", inference)
    with atomic_path(output / "models" / "model.pt") as temporary:
        torch.save(segmenter.network.state_dict(), temporary)
    console.print(f"MONAI bundle: {output}", soft_wrap=True, highlight=False)


def _declared(collection: Collection, truth: np.ndarray) -> dict[int, str]:
    return collection.labels or {int(v): str(v) for v in np.unique(truth) if v}


def _short(summary: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The summary with each interval in one column."""
    rows = []
    for row in summary:
        short: dict[str, Any] = {"label": row["label"], "cases": row["cases"]}
        for name in ("dice", "iou", "hd95", "nsd"):
            if name in row:
                short[name] = row[name]
                short[f"{name} 95 %"] = f"{row[f'{name}_low']:.3g} to {row[f'{name}_high']:.3g}"
        rows.append(short)
    return rows
