"""What the field's tools do with every vision system: `python benchmarks/vision_tools.py [--slow] [SYSTEM ...]`.

Writes the table between `<!-- tools -->` and `<!-- end tools -->` of packages/vision/README.md. Each cell is a run of
the system's reduced form, or of its first variant, on pictures of 64 x 96 and other sizes. --slow adds export,
compilation and 8 bits, which take minutes a system. Lines are kept in --results as they are done; those that stand
there are not run again, and the table holds what stands there.
"""

import argparse
import contextlib
import io
import json
import logging
import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from textwrap import shorten
from typing import Any

import segmentation_models_pytorch as smp
import timm
import torch
from timm.models._manipulate import reparameterize_model
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FeaturePyramidNetwork

from nearfar.core.contracts import fill
from nearfar.vision.classification.classifier import Classifier, card_of
from nearfar.vision.classification.exporting import export_classifier
from nearfar.vision.data.images import Pictures
from nearfar.vision.models.pyramid import Backbone
from nearfar.vision.models.registry import MODELS

README = Path(__file__).parents[1] / "packages/vision/README.md"
DECODERS = ("Unet", "UnetPlusPlus", "FPN", "MAnet", "Linknet", "PSPNet", "PAN", "DeepLabV3", "DeepLabV3Plus", "UPerNet")
SIZE = (64, 96)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slow", action="store_true")
    parser.add_argument("--results", type=Path, default=Path("runs/vision_tools.jsonl"))
    parser.add_argument("systems", nargs="*")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    results: Path = arguments.results
    results.parent.mkdir(parents=True, exist_ok=True)
    lines = results.read_text().splitlines() if results.is_file() else []
    rows = {done["model"]: done for done in map(json.loads, lines)}
    for kind in sorted(set(MODELS.values()), key=lambda kind: card_of(kind).title.lower()):
        name, form = next(
            iter(card_of(kind).small.items()), (next(name for name, model in MODELS.items() if model is kind), {})
        )
        wanted = not arguments.systems or kind.__name__ in arguments.systems
        if wanted and (name not in rows or (arguments.slow and "ONNX" not in rows[name])):
            rows[name] = row(kind, name, dict(form), arguments.slow)
            with results.open("a") as file:
                file.write(json.dumps(rows[name]) + "\n")
            print(rows[name], flush=True)
    write(sorted(rows.values(), key=lambda done: done["system"].lower()))


def row(kind: type, name: str, form: dict[str, Any], slow: bool) -> dict[str, str]:
    """One line of the table."""
    x = torch.randn(2, 3, *SIZE)
    sized = {"img_size": SIZE} if "img_size" in kind.__init__.__annotations__ else {}

    def make(**more: Any) -> nn.Module:
        """With weights that let every branch count, as fresh ones may not."""
        model = timm.create_model(name, **{"num_classes": 3, **form, **sized, **more})
        with torch.no_grad():
            for tensor_name, tensor in model.state_dict().items():
                if tensor.is_floating_point():
                    tensor.copy_(fill(tensor_name, tuple(tensor.shape)))
        return model.eval()

    model = make()
    tried: dict[str, Callable[[], Any]] = {
        "forward": lambda: (model(x), "yes")[1],
        "backward": lambda: backward(make(), x),
        "features": lambda: str(len(make(features_only=True)(x))),
        "intermediates": lambda: str(len(model.forward_intermediates(x)[1])),
        "FX": lambda: traced(make(), x),
        "reparameterize": lambda: agree(reparameterize_model(model)(x), model(x)),
        "SMP decoders": lambda: decoders(name, {**form, **sized}, issubclass(kind, Backbone)),
        "detection FPN": lambda: detection(make, x) if issubclass(kind, Backbone) else "no: one stride",
    }
    if slow:
        onnx = cache(lambda: exported(make, kind, "model.onnx", calibrate=True))  # checked before it is put into 8 bits
        tried |= {
            "compile, free size": lambda: compiled(make()),
            "torch.export": lambda: exported(make, kind, "model.pt2")[0],
            "ONNX": lambda: onnx()[0],
            "ONNX in 8 bits, error": lambda: onnx()[1],
        }
    return {"system": card_of(kind).title, "model": name, **{what: attempt(run) for what, run in tried.items()}}


def attempt(run: Callable[[], Any]) -> str:
    """What `run` says, or that it fails and why, in a few words."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return run()
    except Exception as error:
        return "no: " + (str(error).strip() or type(error).__name__).splitlines()[0].replace("|", "/")[:160]


def backward(model: nn.Module, x: torch.Tensor) -> str:
    out = model.train()(x)
    sum(part.square().mean() for part in (out if isinstance(out, tuple) else (out,))).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    return f"all but {', '.join(without[:2])}" if without else "yes"


def agree(got: torch.Tensor, want: torch.Tensor) -> str:
    good = bool(got.isfinite().all()) and bool((got - want).abs().max() < 1e-3 * want.abs().max())
    return "yes" if good else "no: other numbers"


@torch.no_grad()
def traced(model: nn.Module, x: torch.Tensor) -> str:
    extractor = create_feature_extractor(model, [model.feature_info[-1]["module"], "head"])
    extractor(x)
    return agree(torch.fx.symbolic_trace(model)(x), model(x))


@torch.no_grad()
def compiled(model: nn.Module) -> str:
    torch._dynamo.reset()
    fast = torch.compile(model, dynamic=True, backend="aot_eager")
    return next(
        (found for n in (64, 96) if (found := agree(fast(z := torch.randn(1, 3, n, 96)), model(z))) != "yes"), "yes"
    )


@torch.no_grad()
def decoders(name: str, settings: dict[str, Any], pyramid: bool) -> str:
    x, good, reason = torch.randn(1, 3, 64, 64), [], ""
    settings = {k: v for k, v in settings.items() if k not in ("img_size", "depth")}  # the latter is a decoder's word
    for decoder in DECODERS if pyramid else ("DPT",):
        try:
            net = getattr(smp, decoder)(f"tu-{name}", encoder_weights=None, classes=2, **settings).eval()
            if net(x).shape == (1, 2, 64, 64):
                good.append(decoder)
        except Exception as error:
            reason = str(error).split(": what")[0]
    if pyramid:
        missing = [decoder for decoder in DECODERS if decoder not in good]
        return f"{len(good)} of {len(DECODERS)}" + (
            f": not {', '.join(missing)} ({shorten(reason, 100)})" if missing else ""
        )
    return "DPT" if good else f"no: {shorten(reason, 100)}"


@torch.no_grad()
def detection(make: Callable[..., nn.Module], x: torch.Tensor) -> str:
    body = make(features_only=True)

    class Levels(nn.Module):
        out_channels = 16

        def __init__(self) -> None:
            super().__init__()
            self.body, self.fpn = body, FeaturePyramidNetwork(body.feature_info.channels(), 16)

        def forward(self, x: torch.Tensor) -> OrderedDict[str, torch.Tensor]:
            return self.fpn(OrderedDict((str(i), level) for i, level in enumerate(self.body(x))))

    levels = len(body.feature_info.channels())
    anchors = AnchorGenerator(((16,),) * levels, ((1.0,),) * levels)
    net = FasterRCNN(Levels(), num_classes=3, min_size=96, max_size=128, rpn_anchor_generator=anchors).eval()
    return "yes" if "boxes" in net([torch.rand(3, 90, 110)])[0] else "no"


def exported(make: Callable[..., nn.Module], kind: type, file: str, calibrate: bool = False) -> tuple[str, str]:
    """For which sizes the file serves, and the largest error of its form in 8 bits."""
    size = 64
    model = make(img_size=size) if "img_size" in kind.__init__.__annotations__ else make()
    classifier = Classifier(model.eval(), kind.__name__, ["a", "b", "c"], size, 1.0)
    noise = torch.randint(0, 256, (16, size, size, 3), dtype=torch.uint8).numpy()
    from PIL import Image

    pictures = Pictures([str(i) for i in range(16)], [-1] * 16, [], lambda i: Image.fromarray(noise[i]))
    with tempfile.TemporaryDirectory() as folder:
        place, calibration, sizes = Path(folder) / file, pictures if calibrate else None, "yes"
        try:
            found = export_classifier(classifier, place, calibration=calibration)
        except Exception as error:
            found = export_classifier(classifier, place, fixed=True, calibration=calibration)
            sizes = f"one size: {str(error).partition('exported form ')[2].partition('; --fixed')[0]}"
    return sizes, f"{max(r['largest error'] for r in found):.0e}"


def write(rows: list[dict[str, str]]) -> None:
    """The table, and under it the reason of everything that a system does not do."""
    columns = list(max(rows, key=len))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    reasons = []
    for done in rows:
        cells = [done.get(column, "not measured").partition(":") for column in columns]
        lines.append("| " + " | ".join(cell for cell, _, _ in cells) + " |")
        reasons += [f"- {done['system']}, {column}:{why}" for column, (_, _, why) in zip(columns, cells) if why]
    lines += ["", *dict.fromkeys(reasons)] if reasons else []
    text = README.read_text(encoding="utf-8")
    begin, end = text.index("<!-- tools -->\n") + len("<!-- tools -->\n"), text.index("<!-- end tools -->")
    README.write_text(text[:begin] + "\n".join(lines) + "\n" + text[end:], encoding="utf-8")


if __name__ == "__main__":
    main()
