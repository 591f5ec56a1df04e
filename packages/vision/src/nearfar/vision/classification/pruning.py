"""What fewer tokens cost and save: accuracy, latency, throughput and memory at several keep rates."""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from nearfar.core.errors import CheckpointError, UserError
from nearfar.core.plots import COLORS, new_figure, style
from nearfar.vision.classification.classifier import Classifier, evaluate_scores
from nearfar.vision.cost import cost
from nearfar.vision.data.images import Pictures
from nearfar.vision.models.evit import EViT, reorganize_tokens
from nearfar.vision.models.sparsifiner import Sparsifiner
from nearfar.vision.robustness.parts import Parts

Track = Callable[[Iterable[float], str], Iterable[float]]


def keep_switch(model: nn.Module) -> Callable[[float], Any]:
    """A function that sets the keep rate of a model's tokens.

    An `EViT` reduces in its own blocks, a `Sparsifiner` where it prunes, a VisionTransformer of timm after a quarter, a
    half and three quarters of its blocks. Raises UserError for another model.
    """
    inner = getattr(model, "normalized", model)
    if isinstance(inner, EViT):
        return lambda rate: setattr(inner, "keep_rate", rate)
    if isinstance(inner, Sparsifiner):
        return lambda rate: setattr(inner, "token_keep_rate", rate)
    if isinstance(inner, VisionTransformer):
        return lambda rate: reorganize_tokens(inner, rate, quarters(len(inner.blocks)))
    raise UserError(
        f"{type(inner).__name__}: keeps no tokens that could be left out; "
        "this is for EViT, Sparsifiner and timm's VisionTransformer"
    )


def quarters(depth: int) -> list[int]:
    """The blocks after a quarter, a half and three quarters: 3, 6 and 9 of 12."""
    return sorted({depth * part // 4 for part in (1, 2, 3)})


def chosen_classifier(classifier: Classifier, rate: float) -> Classifier:
    """The classifier at a keep rate, to be saved: timm's transformer becomes the `EViT` of the same weights.

    Raises UserError for a transformer that is no DeiT, whose folder could not hold the setting.
    """
    model: Any = getattr(classifier.model, "normalized", classifier.model)
    if isinstance(model, VisionTransformer):
        first: Any = model.blocks[0]
        settings = {"num_heads": first.attn.num_heads, "reduce_at": quarters(len(model.blocks)), "fuse": True}
        outer: Any = classifier.model
        plain = outer is model or bool((outer.scale == 1).all() and (outer.shift == 0).all())
        try:
            if not plain:
                raise CheckpointError("its pictures are normalized otherwise")
            twin = EViT.from_published(model.state_dict(), keep_rate=rate, **settings)
        except CheckpointError as error:
            raise UserError(f"{classifier.name}: no model folder holds it with fewer tokens ({error})") from error
        return replace(classifier, model=twin, name="evit_deit_small", settings=settings | {"keep_rate": rate})
    keep_switch(model)(rate)
    name = "keep_rate" if isinstance(model, EViT) else "token_keep_rate"
    return replace(classifier, settings=classifier.settings | {name: rate})


def latency(model: nn.Module, size: int, device: str, batch: int, repeats: int = 7) -> float:
    """The median time of a forward pass, in milliseconds."""
    x, times = torch.randn(batch, 3, size, size, device=device), []
    with torch.inference_mode():
        for _ in range(repeats + 1):
            start = time.perf_counter()
            model(x)
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[1:])


def prune_sweep(
    classifier: Classifier,
    pictures: Pictures,
    rates: Sequence[float],
    output: Path,
    *,
    model_digest: str,
    device: str = "cpu",
    workers: int = 0,
    seconds: float | None = None,
    fresh: bool = False,
    track: Track = lambda items, what: items,
) -> tuple[list[dict[str, Any]], list[str]]:
    """A row for each keep rate, the plain model first, and the rates that the time did not reach.

    Times are of this device when they were measured; "speed" compares the throughput with that of keep rate 1.
    `output` keeps what is done. Raises UserError for a model without tokens, ValueError for rates outside (0, 1].
    """
    if bad := [rate for rate in rates if not 0 < rate <= 1]:
        raise ValueError(f"keep rate {bad[0]} is outside (0, 1]")
    setter, model = keep_switch(classifier.model), classifier.model.to(device).eval()
    made_from = {"model": model_digest, "pictures": pictures.content_digest(), "device": device}
    parts, rows = Parts(output, made_from, seconds, fresh), []

    def measure(rate: float) -> dict[str, Any]:
        setter(rate)
        scores = classifier.scores(pictures, device=device, num_workers=workers)
        row = {"keep rate": rate, **evaluate_scores(scores, pictures.labels)}
        row["latency, 1 picture (ms)"] = latency(model, classifier.size, device, 1)
        return row | cost(model, classifier.size, device, 8)

    for rate in track(sorted({1.0, *rates}, reverse=True), "keep rates"):
        if (row := parts.get(f"{rate:g}", partial(measure, rate))) is not None:
            rows.append(row)
    for row in rows:
        row["speed"] = row["pictures/s"] / rows[0]["pictures/s"]
    return rows, parts.left


def fastest_within(rows: Sequence[dict[str, Any]], loss: float) -> dict[str, Any]:
    """The row of the highest throughput whose accuracy is at most `loss` below that of keep rate 1."""
    return max((r for r in rows if r["accuracy"] >= rows[0]["accuracy"] - loss), key=lambda r: r["pictures/s"])


def plot_sweep(rows: Sequence[dict[str, Any]]) -> Figure:
    """Accuracy and throughput against the keep rate."""
    rates = [row["keep rate"] for row in rows]
    with style():
        figure = new_figure(9, 3.8)
        right, fast = figure.subplots(1, 2)
        spread = [[r["accuracy"] - r["low"] for r in rows], [r["high"] - r["accuracy"] for r in rows]]
        right.errorbar(rates, [r["accuracy"] for r in rows], spread, marker="o", capsize=3, color=COLORS[0])
        right.set(xlabel="keep rate", ylabel="accuracy")
        fast.plot(rates, [r["pictures/s"] for r in rows], marker="o", color=COLORS[1])
        fast.set(xlabel="keep rate", ylabel="pictures a second, 8 at a time", ylim=(0, None))
    return figure
