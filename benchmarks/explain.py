"""What explanations cost, in gradient passes of the same batch, beside captum's: `python benchmarks/explain.py`.

A gradient pass is one forward and one backward pass to the pixels; processor time counts. The second table says how
much of the logit the pixels and the biases leave unaccounted for in relevance, and in captum's LRP, which knows few
layers.
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

from nearfar.core.cli.console import console, table, track
from nearfar.vision.explain.methods import explain
from nearfar.vision.explain.relevance import relevance

NETWORKS = ("torchvision:alexnet", "torchvision:vgg16", "torchvision:resnet18", "convnext_tiny", "vit_tiny_patch16_224",
            "swin_tiny_patch4_window7_224", "hornet_tiny_7x7", "attnet_xxs", "nearfar_convit_tiny")  # fmt: skip


def build(name: str) -> torch.nn.Module:
    """A network with random weights, biases and scales too, so that there is something for them to take."""
    place, _, own = name.rpartition(":")
    torch.manual_seed(0)
    model = torchvision.models.get_model(own) if place else timm.create_model(own)
    for module in model.modules():  # captum's hooks need activations that are not changed in place
        if hasattr(module, "inplace"):
            module.inplace = False
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.2 * torch.randn_like(p))
    return model.eval()


def seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def costs(name: str, batch: int, size: int, repeats: int) -> dict[str, object]:
    """In gradient passes of the batch."""
    model = build(name)
    x = torch.randn(batch, 3, size, size)
    with torch.no_grad():
        target = model(x).argmax(1)

    def one_pass() -> None:
        leaf = x.clone().requires_grad_()
        torch.autograd.grad(model(leaf).gather(1, target[:, None]).sum(), leaf)

    runs: dict[str, Callable[[], object]] = {
        "normgrad": lambda: explain(model, x, target),
        "selective": lambda: explain(model, x, target, "selective_normgrad"),
        "grad_cam": lambda: explain(model, x, target, "grad_cam"),
        "gradient": lambda: explain(model, x, target, "gradient"),
        "captum Saliency": lambda: Saliency(model).attribute(x.clone(), target),
        "captum InputXGradient": lambda: InputXGradient(model).attribute(x.clone().requires_grad_(), target),
    }
    if hasattr(model, "layer4"):
        runs["captum GradCam"] = lambda: LayerGradCam(model, model.layer4).attribute(x, target)
    if any(isinstance(module, torch.nn.ReLU) for module in model.modules()):
        runs["captum GuidedBackprop"] = lambda: GuidedBackprop(model).attribute(x.clone().requires_grad_(), target)
    row: dict[str, object] = {"network": name}
    for column, run in runs.items():  # each beside a pass of its own, so that a busy machine slows both
        ratios = []
        run()
        for _ in range(repeats):
            unit = seconds(one_pass)
            ratios.append(seconds(run) / unit)
        row[column] = f"{statistics.median(ratios):.2f}"
    return row


def conservation(name: str, size: int) -> dict[str, object]:
    """What relevance, and captum's, leave unaccounted for, as a share of the logit."""
    model = build(name)
    x = torch.randn(1, 3, size, size)
    with torch.no_grad():
        logits = model(x)
    target = int(logits.argmax())
    row: dict[str, object] = {"network": name, "logit": f"{logits[0, target]:.3g}"}
    for rules in ("epsilon", "epsilon_plus"):
        found = relevance(model, x, target, rules)
        row[f"{rules}: pixels"] = f"{found.pixels.sum():.3g}"
        row[f"{rules}: biases"] = f"{found.absorbed.sum():.3g}"
        row[f"{rules}: unaccounted"] = f"{float(found.lost):.1e}"
    try:
        delta = LRP(model).attribute(x, target, return_convergence_delta=True)[1]
        row["captum LRP: unaccounted"] = f"{float(delta.abs() / logits[0, target].abs()):.2g}"
    except Exception as error:
        row["captum LRP: unaccounted"] = f"fails: {type(error).__name__}"
    return row


def main(
    network: Annotated[list[str] | None, typer.Option(help="Repeat. timm's name, or torchvision:NAME.")] = None,
    only: Annotated[str, typer.Option(help="cost, conservation, or both.")] = "both",
    batch: int = 1,
    size: int = 224,
    repeats: int = 3,
    threads: int = 1,
) -> None:
    if only not in ("cost", "conservation", "both"):
        raise typer.BadParameter(f"--only {only}: one of cost, conservation, both")
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore")
    for part, row_of in (
        ("cost", lambda name: costs(name, batch, size, repeats)),
        ("conservation", lambda name: conservation(name, size)),
    ):
        if only in (part, "both"):
            rows = [row_of(name) for name in track(network or NETWORKS, part)]
            keys = list(dict.fromkeys(key for row in rows for key in row))
            console.print(part)
            console.print(table([{key: row.get(key, "") for key in keys} for row in rows]))


if __name__ == "__main__":
    typer.run(main)
