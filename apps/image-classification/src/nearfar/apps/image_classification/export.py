"""`nearfar image-classification export`: a classifier as one file for other programs."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from nearfar.apps.image_classification.common import Published, open_any, read_pictures
from nearfar.core.cli.console import console, show
from nearfar.core.cli.options import Json
from nearfar.core.errors import UserError
from nearfar.vision.data.images import Pictures


def export(
    classifier: Annotated[
        str, typer.Argument(help="Folder that `train` wrote, a published checkpoint, or hub:NAME of timm.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write: .onnx or .pt2 (torch.export).")],
    model: Published = None,
    fixed: Annotated[bool, typer.Option("--fixed", help="For pictures of the classifier's own size alone.")] = False,
    int8: Annotated[Path | None, typer.Option(help="Pictures by which the file is put into 8 bits (ONNX).")] = None,
    check: Annotated[Path | None, typer.Option(help="Pictures on which the file is compared with the model.")] = None,
    as_json: Json = False,
) -> None:
    """Write a classifier as ONNX or torch.export: free batch, height and width, normalization and softmax inside.

    The file must say what the model says for pictures of three sizes, or nothing is written. It takes RGB values from
    0 to 255; names of classes, size and crop are its metadata. --check prints the largest error and the share of equal
    answers at several sizes.
    """
    from nearfar.vision.classification.exporting import check as compare_with
    from nearfar.vision.classification.exporting import export_classifier

    if find_spec("onnx") is None or find_spec("onnxruntime") is None or find_spec("onnxscript") is None:
        raise UserError("export needs onnx, onnxscript and onnxruntime; install nearfar-image-classification[export]")
    trained = open_any(classifier, model)
    rows = export_classifier(trained, output, fixed=fixed, calibration=readable(int8) if int8 else None)
    if check is not None:
        step = max(32, int(getattr(trained.model, "min_size", 32)))
        size = trained.size
        sizes = (size,) if fixed else (size, size + step, size + 2 * step)
        rows = compare_with(trained, output, readable(check), sizes)
    show(rows, as_json)
    if not as_json:
        console.print(f"{len(trained.classes)} classes: {output}", soft_wrap=True)
        if trained.views != "one":
            console.print(f"The file sees one view; the classifier averages {trained.views}.", soft_wrap=True)


def readable(place: Path) -> Pictures:
    """The pictures of a file or folder. Raises UserError where one cannot be read."""
    pictures, failures = read_pictures([place])
    if failures:
        total = len(pictures) + len(failures)
        raise UserError(f"{len(failures)} of {total} pictures cannot be read; the first: {failures[0]}")
    return pictures
