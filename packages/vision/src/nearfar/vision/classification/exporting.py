"""A classifier as one file for other programs: ONNX, ONNX in 8 bits, or a program of torch.export.

The file takes pictures as they are, RGB values from 0 to 255, and gives class probabilities: normalization and softmax
(sigmoid, of several classes a picture) are inside, names of classes, input size and crop are its metadata. Resizing,
cropping and averaging over views stay outside.
"""

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn

from nearfar.core.errors import UserError
from nearfar.core.files import atomic_path
from nearfar.vision.classification.classifier import Classifier
from nearfar.vision.data.images import Pictures

TOLERANCE = 1e-3
"""Largest difference of log-probabilities, in their own spread, at which a file says the same as its model."""


class Deployed(nn.Module):
    """Pictures (B, 3, H, W), RGB from 0 to 255, to class probabilities (B, classes)."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, multilabel: bool = False) -> None:
        super().__init__()
        self.model, self.multilabel = model, multilabel
        for name, values in (("mean", IMAGENET_DEFAULT_MEAN), ("std", IMAGENET_DEFAULT_STD)):
            self.register_buffer(name, 255 * torch.tensor(values)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        logits = self.model((images - self.mean) / self.std)
        return logits.sigmoid() if self.multilabel else logits.softmax(1)


def metadata(classifier: Classifier, free: bool) -> dict[str, str]:
    """What a program that runs the file needs to know, as text."""
    return {
        "model": classifier.name,
        "classes": json.dumps(classifier.classes, ensure_ascii=False),
        "size": str(classifier.size),
        "crop_pct": str(classifier.crop_pct),
        "crop_mode": classifier.crop_mode,
        "input": "RGB, 0 to 255, (batch, 3, height, width)",
        "output": "probabilities of each class on its own" if classifier.multilabel else "class probabilities",
        "views": classifier.views,
        "free_size": json.dumps(free),
    }


def export_classifier(
    classifier: Classifier, path: Path, *, fixed: bool = False, calibration: Pictures | None = None
) -> list[dict[str, Any]]:
    """Write `classifier` to `path`, `.onnx` or `.pt2`; gives its differences from the model at every size tried.

    In 8 bits the differences are those for the pictures of the calibration.

    Args:
        fixed: height and width are the classifier's own; else they are free, as the batch always is.
        calibration: pictures by which weights and activations are put into 8 bits (ONNX alone).

    Raises UserError, and writes nothing, where the file would not say what the model says at three sizes.
    """
    if path.suffix not in (".onnx", ".pt2"):
        raise UserError(f"{path}: the name must end in .onnx (ONNX) or .pt2 (torch.export)")
    if calibration is not None and path.suffix != ".onnx":
        raise UserError(f"{path}: 8 bits are for .onnx files")
    deployed = Deployed(classifier.model.eval().cpu(), classifier.multilabel).eval()
    sizes = [(classifier.size, classifier.size)] if fixed else trial_sizes(classifier)

    def refuse(reason: str) -> UserError:
        more = "" if fixed else f"; --fixed exports it for pictures of {classifier.size} pixels alone"
        return UserError(f"{classifier.name}: its exported form {reason}{more}")

    axes = {0: torch.export.Dim.DYNAMIC} | ({} if fixed else {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC})
    told = metadata(classifier, not fixed)

    def write(height: int, width: int) -> list[dict[str, Any]]:
        """Trace with pictures of one size, and try the file at all of `sizes`."""
        try:
            with torch.no_grad():
                images = torch.rand(2, 3, height, width) * 255
                program = torch.export.export(deployed, (images,), dynamic_shapes=(axes,), strict=False)
        except Exception as error:  # torch.export raises whatever the model or the tracer does
            raise refuse(f"cannot be traced: {_line(error)}") from error
        with atomic_path(path) as place:
            if path.suffix == ".pt2":
                try:
                    torch.export.save(program, place, extra_files={"classifier.json": json.dumps(told)})
                except Exception as error:  # the serializer's own kinds
                    raise refuse(f"cannot be written: {_line(error)}") from error
            else:
                _write_onnx(program, place, told, refuse)
            rows = [difference(deployed, runner(place), size, refuse) for size in sizes]
            if calibration is not None:
                _quantize(place, calibration, told, pixels_for(classifier.size, classifier))
                rows = check(classifier, place, calibration)
        return rows

    height, width = sizes[0]
    if not fixed:
        # a tracer takes an axis of one cell, or one window, for a constant: a larger picture has more of them
        with contextlib.suppress(UserError):
            return write(height, width)
        height, width = height + 320, width + 320
    return write(height, width)


def trial_sizes(classifier: Classifier) -> list[tuple[int, int]]:
    """Three sizes of pictures, no two alike in shape, which the model takes."""
    step = max(32, int(getattr(classifier.model, "min_size", 32)))
    size = max(classifier.size // step, 1) * step
    return [(size, size + step), (size, size), (size + 2 * step, size + step)]


def difference(
    model: Deployed, run: Callable[[np.ndarray], np.ndarray], size: tuple[int, int], refuse: Callable[[str], UserError]
) -> dict[str, Any]:
    """Largest difference of probabilities between the model and a file for three pictures of noise of `size`."""
    images = torch.rand(3, 3, *size, generator=torch.Generator().manual_seed(0)) * 255
    with torch.no_grad():
        want = model(images).numpy()
    try:
        got = run(images.numpy())
    except Exception as problem:  # onnxruntime and guards of torch.export raise types of their own
        raise refuse(f"fails at {size[0]} x {size[1]} pixels: {_line(problem)}") from problem
    found, true = ((np.log(p) - np.log1p(-p) if model.multilabel else np.log(p)) for p in (got, want))
    away = np.abs(found - true).max() / true.std()
    if not away < TOLERANCE:
        raise refuse(f"differs from the model at {size[0]} x {size[1]} pixels, by {away:.1g} of its answers' spread")
    return {"height": size[0], "width": size[1], "largest error": float(np.abs(got - want).max())}


def runner(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """What runs an exported file on pictures (B, 3, H, W)."""
    if path.suffix == ".pt2":
        program = torch.export.load(path).module()
        return lambda images: program(torch.from_numpy(images)).detach().numpy()
    session = _session(path)
    return lambda images: session.run(None, {session.get_inputs()[0].name: images})[0]


def check(classifier: Classifier, path: Path, pictures: Pictures, sizes: Sequence[int] = ()) -> list[dict[str, Any]]:
    """For every size: the largest error of an exported file's probabilities, and the share of equal answers."""
    run, deployed = runner(path), Deployed(classifier.model.eval().cpu(), classifier.multilabel).eval()
    rows = []
    for size in sizes or (classifier.size,):
        data = pictures.subset(range(len(pictures)), pixels_for(size, classifier))
        errors, equal = [], 0
        for first in range(0, len(data), 16):
            images = _batch(data, first, 16)
            with torch.no_grad():
                want = deployed(images).numpy()
            got = run(images.numpy())
            errors.append(float(np.abs(got - want).max()))
            if classifier.multilabel:
                equal += int(((got >= 0.5) == (want >= 0.5)).all(1).sum())
            else:
                equal += int((got.argmax(1) == want.argmax(1)).sum())
        rows.append(
            {"pixels": size, "pictures": len(data), "largest error": max(errors), "equal answers": equal / len(data)}
        )
    return rows


def pixels_for(size: int, classifier: Classifier) -> Callable[[Image.Image], Tensor]:
    """The classifier's resizing and crop, without its normalization: values from 0 to 255."""
    steps = create_transform(
        size, crop_pct=classifier.crop_pct, crop_mode=classifier.crop_mode, interpolation="bicubic", normalize=False
    )
    return lambda picture: steps(picture).float()


def _batch(data: Pictures, first: int, number: int) -> Tensor:
    """Pictures from `first` on, transformed to tensors."""
    pictures: list[Any] = [data[i][0] for i in range(first, min(first + number, len(data)))]
    return torch.stack(pictures)


def _write_onnx(program: Any, path: Path, told: dict[str, str], refuse: Callable[[str], UserError]) -> None:
    import onnx

    try:
        torch.onnx.export(
            program, (), path, verbose=False, external_data=False, input_names=["images"],
            output_names=["probabilities"],
        )  # fmt: skip
    except Exception as error:  # the exporter's own kinds; the first cause says which function has no form
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise refuse(f"has no ONNX form: {_line(cause)}") from error
    model = onnx.load(path)
    onnx.helper.set_model_props(model, told)
    onnx.save(model, path)


def _quantize(path: Path, pictures: Pictures, told: dict[str, str], pixels: Callable[[Image.Image], Tensor]) -> None:
    """The ONNX file with weights and activations in 8 bits, whose ranges `pictures` show."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    data = pictures.subset(range(len(pictures)), pixels)

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(range(0, len(data), 8))

        def get_next(self) -> dict[str, np.ndarray] | None:
            first = next(self.batches, None)
            if first is None:
                return None
            return {"images": _batch(data, first, 8).numpy()}

    ready = path.with_name("ready.onnx")
    quant_pre_process(str(path), str(ready), skip_symbolic_shape=True)
    quantize_static(
        str(ready), str(path), Reader(), quant_format=QuantFormat.QDQ, per_channel=True, weight_type=QuantType.QInt8,
        op_types_to_quantize=["Conv", "MatMul", "Gemm"],
    )  # fmt: skip
    model = onnx.load(path)
    onnx.helper.set_model_props(model, told)
    onnx.save(model, path)


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
