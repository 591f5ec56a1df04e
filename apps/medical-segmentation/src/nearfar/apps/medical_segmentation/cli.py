"""`nearfar medical-segmentation`: inspect data, train, predict, evaluate, refine with the CRF, export."""

from collections import Counter
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from nearfar.apps.medical_segmentation import pages
from nearfar.apps.medical_segmentation.common import (
    RECIPES,
    Data,
    Groups,
    Output,
    open_collection,
    say_notes,
    with_intervals,
)
from nearfar.apps.medical_segmentation.compare import compare
from nearfar.apps.medical_segmentation.crf import refine, search
from nearfar.apps.medical_segmentation.data import inspect, mend
from nearfar.apps.medical_segmentation.plans import from_nnunet, from_plan, plan_command
from nearfar.core.cli.batch import Places, raise_failures, run_batch
from nearfar.core.cli.console import console, table, track
from nearfar.core.cli.options import (
    Device,
    Devices,
    Engine,
    Fresh,
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
from nearfar.core.files import write_csv, write_json
from nearfar.core.made_from import MadeFrom, mark_beside, model_digest
from nearfar.core.memory import parse_memory
from nearfar.core.model_folder import TrainedOn, mark
from nearfar.core.reading import read_json
from nearfar.core.recipes import read_recipe
from nearfar.medical import metrics
from nearfar.medical.bundle import write_bundle
from nearfar.medical.data.cases import Case, Collection, case_digest, check_split, make_splits
from nearfar.medical.data.dicom import segment_code
from nearfar.medical.data.layouts import find_cases, is_series, read_splits, stem
from nearfar.medical.data.scans import read_about, read_labels, write_dicom_seg, write_labels
from nearfar.medical.folds import FoldEnsemble, train_folds
from nearfar.medical.folds import load as load_model
from nearfar.medical.recipe import Recipe
from nearfar.medical.segmenter import Segmenter
from nearfar.medical.training import train_segmenter
from nearfar.ops.graph.dense_crf import DenseCRF

app = typer.Typer(
    help="Segment medical scans and pictures. Start with `inspect FOLDER`; make a model with `train`, use it with "
    "`predict`, score it with `evaluate`.\n\nReads NIfTI, DICOM series (folders), NRRD, PNG, JPEG, TIFF; knows the "
    "layouts of nnU-Net, the Decathlon, ACDC, Synapse, BTCV, BraTS, CHAOS, VOC, CHASE_DB1, DRIVE, ISIC, BUSI, Kvasir "
    "and CVC.",
    no_args_is_help=True,
)
app.command()(inspect)
app.command()(mend)
app.command("plan")(plan_command)
app.command()(from_nnunet)
app.command()(from_plan)
app.command()(compare)
app.command()(search)
app.command()(refine)

ENDINGS = (".nii.gz", ".nii", ".nrrd", ".png")
"""Of label maps."""


class Convention(StrEnum):
    nearfar = "nearfar"
    synapse_legacy = "synapse_legacy"
    brats = "brats"
    brats_lesions = "brats_lesions"
    segmamba = "segmamba"
    monai = "monai"


CRF: Mapping[str, Any] = {
    "iterations": 5, "spatial_weight": 1.0, "spatial_std": 2.0,
    "bilateral_weight": 1.0, "bilateral_std": 10.0, "color_std": 20.0,
}  # fmt: skip
"""Settings for a model whose CRF was not searched."""


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
    collection = open_collection(data, groups)
    if regions:
        collection = collection.trained_on_regions(regions)
    labelled = [case for case in collection.cases if case.label is not None and case.part != "test"]
    chosen = read_recipe(Recipe, recipe, settings or (), RECIPES)
    if not labelled:
        raise UserError(f"{data}: no labelled cases to train on")
    say_notes(collection.notes)
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
        splits = read_splits(given, [*labelled, *apart], [case.name for case in apart])
        if apart:
            say_notes([f"{len(apart)} cases set the quality flag, and are taken out of the folds of {given}"])
        named = {name for split in splits[fold : fold + 1] for side in split.values() for name in side}
        left = len({case.name for case in labelled} - named)
        say_notes([f"split by {given}" + (f", which leaves out {left} of {len(labelled)} cases" if left else "")])
        write_json(output / "splits.json", splits)
    else:
        number = min(5 if every else int(folds), len({case.group or case.name for case in labelled}))
        splits = make_splits(labelled, number, chosen.seed, output / "splits.json")
    options: dict[str, Any] = {"show_progress": console.is_terminal, "device": device, "fresh": fresh}
    options |= {"say": lambda text: say_notes([text]), "precision": precision}
    if every:
        for split in splits:
            check_split(labelled, split["train"], split["validation"])
        ensemble, summary = train_folds(collection, chosen, output, splits, calibration=apart, bad=bad, **options)
        console.print(table(with_intervals(summary), "every case, by the fold that has not seen it"))
        if quality := ensemble.quality:
            caught = "-" if quality["caught"] is None else f"{quality['caught']:.0%}"
            console.print(
                f"quality flag: of {quality['cases']} cases that no fold saw, and {quality['copies']} blurred or noisy "
                f"copies, {quality['bad_cases']} are bad (Dice to {quality['bad']:.3f}); {caught} of them are caught, "
                f"with {quality['false_alarms']} false alarms; the Dice is off by {quality['error']:.3f} in the mean",
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
    console.print(table(with_intervals(summary), "held-out cases"))
    console.print(f"model: {output}", soft_wrap=True, highlight=False)


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
    say_notes(notes)
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
    collection = open_collection(data, groups)
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
        page = pages.evaluation_page(
            output / "index.html", with_intervals(summary), rows, shown, said, collection.labels
        )
        console.print(table(with_intervals(summary), f"convention {said}"))
        console.print(f"page: {page}", soft_wrap=True, highlight=False)
    raise_failures(failures, len(labelled))


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
