"""What explanations cost, in gradient passes of the same batch, beside captum's: `python benchmarks/explain.py`.

A gradient pass is one forward and one backward pass to the pixels. Relevance is also asked of captum's LRP, which knows
few layers; how much of the logit the pixels and the biases leave unaccounted for stands beside.
"""

import statistics
import time
import warnings
from collections.abc import Callable
from typing import Annotated

import timm
import torch
import torchvision
import typer
from captum.attr import LRP, GuidedBackprop, InputXGradient, LayerGradCam, Saliency

from nearfar.core.cli.console import console, table
from nearfar.vision.explain.methods import explain
from nearfar.vision.explain.relevance import relevance

NETWORKS = ("torchvision:alexnet", "torchvision:vgg16", "torchvision:resnet18", "convnext_tiny", "vit_tiny_patch16_224",
            "swin_tiny_patch4_window7_224", "hornet_tiny_7x7", "attnet_xxs", "nearfar_convit_tiny")  # fmt: skip


def build(name: str) -> torch.nn.Module:
    place, _, own = name.rpartition(":")
    torch.manual_seed(0)
    model = torchvision.models.get_model(own) if place else timm.create_model(own)
    for module in model.modules():  # captum's hooks need activations that are not changed in place
        if hasattr(module, "inplace"):
            module.inplace = False
    return model.eval()


def seconds(run: Callable[[], object], repeats: int) -> float:
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measured(name: str, batch: int, size: int, repeats: int) -> dict[str, object]:
    """Costs in gradient passes, and what relevance leaves unaccounted for."""
    model = build(name)
    x = torch.randn(batch, 3, size, size)
    target = model(x).argmax(1)

    def one_pass() -> None:
        leaf = x.clone().requires_grad_()
        torch.autograd.grad(model(leaf).gather(1, target[:, None]).sum(), leaf)

    unit = seconds(one_pass, repeats)
    row: dict[str, object] = {"network": name, "gradient pass (s)": unit}

    def take(column: str, run: Callable[[], object]) -> None:
        row[column] = seconds(run, repeats) / unit

    take("normgrad", lambda: explain(model, x, target))
    take("grad_cam", lambda: explain(model, x, target, "grad_cam"))
    take("gradient", lambda: explain(model, x, target, "gradient"))
    take("captum Saliency", lambda: Saliency(model).attribute(x, target))
    take("captum InputXGradient", lambda: InputXGradient(model).attribute(x.clone().requires_grad_(), target))
    if hasattr(model, "layer4"):
        take("captum GradCam", lambda: LayerGradCam(model, model.layer4).attribute(x, target))
        take("captum GuidedBackprop", lambda: GuidedBackprop(model).attribute(x.clone().requires_grad_(), target))
    x = x.detach()
    row["relevance: unaccounted"] = float(relevance(model, x[:1], target[:1]).lost)
    try:
        delta = LRP(model).attribute(x[:1], target[:1], return_convergence_delta=True)[1]
        row["captum LRP: unaccounted"] = float(delta.abs() / model(x[:1])[0, target[0]].abs())
    except Exception as error:
        row["captum LRP: unaccounted"] = f"fails: {type(error).__name__}"
    return {key: f"{v:.3g}" if isinstance(v, float) else v for key, v in row.items()}


def main(
    network: Annotated[list[str] | None, typer.Option(help="Repeat. timm's name, or torchvision:NAME.")] = None,
    batch: int = 4,
    size: int = 224,
    repeats: int = 3,
    threads: int = 1,
) -> None:
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore")
    rows = [measured(name, batch, size, repeats) for name in network or NETWORKS]
    keys = list(dict.fromkeys(key for row in rows for key in row))
    console.print(table([{key: row.get(key, "") for key in keys} for row in rows]))


if __name__ == "__main__":
    typer.run(main)
