"""`nearfar medical-segmentation inspect` and `mend`: what a data folder holds, and faults of its files."""

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from nearfar.apps.medical_segmentation import pages
from nearfar.apps.medical_segmentation.common import Data, Groups, open_collection, say_notes
from nearfar.core.cli.batch import BatchError, raise_failures, run_batch
from nearfar.core.cli.console import console, show_json, table
from nearfar.core.cli.options import Json
from nearfar.core.errors import UserError
from nearfar.medical import doctor
from nearfar.medical.data.cases import Case
from nearfar.medical.data.mending import mend_nifti


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
    collection = open_collection(data, groups)
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
        say_notes(notes)
    raise_failures(failures, len(collection.cases))


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
