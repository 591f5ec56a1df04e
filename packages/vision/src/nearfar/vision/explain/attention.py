"""What a model attends to: the attention or selection maps of every layer that has them, as numbers and pictures."""

import math
from collections.abc import Callable
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from nearfar.core.errors import UserError
from nearfar.core.plots import new_figure, style
from nearfar.ops.attention.gated_positional import GatedPositionalAttention


@torch.no_grad()
def attention_maps(model: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    """Layer name -> its map, in the order of computation, for one forward pass in eval mode.

    Every module with a method `attention_map`, which takes what `forward` takes, is asked, and so is every attention
    layer of timm's. A map is (B, heads, queries, keys), with rows that sum to one; with windows, as timm's Swin has
    them, each is a sample of its own; of a dynamic convolution the keys are the taps of the window; of outlook
    attention every window has a map: (B, heads, windows, places, taps). The model's training mode is restored. A model
    without such layers gives an empty dict.
    """
    maps: dict[str, Tensor] = {}

    def ask(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
        return lambda module, arguments, named, _output: maps.__setitem__(
            name, module.attention_map(*arguments, **named).cpu()
        )

    def take(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        return lambda _module, _arguments, output: maps.__setitem__(name, output.cpu())

    handles, fused = [], []
    for name, module in model.named_modules():
        if hasattr(module, "attention_map"):
            handles.append(module.register_forward_hook(ask(name), with_kwargs=True))
        elif isinstance(getattr(module, "attn_drop", None), nn.Module) and hasattr(module, "fused_attn"):
            handles.append(module.attn_drop.register_forward_hook(take(name)))  # sees the weights in the plain form
            fused.append((module, module.fused_attn))
    training = model.training
    try:
        for module, _ in fused:
            module.fused_attn = False
        model.eval()(*inputs)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
        for module, was in fused:
            module.fused_attn = was
    return maps


def draw_attention(
    model: nn.Module, *inputs: Tensor, at: tuple[float, float] = (0.5, 0.5), picture: Tensor | None = None
) -> Figure:
    """One panel per layer: where the position `at` looks, its weights averaged over the heads, laid on the picture.

    Args:
        inputs: what the model takes; the first is a batch (B, C, H, W), whose first sample is drawn.
        at: the looking position, as shares of height and width; a cross marks it.
        picture: (3, H, W) in 0..1 to draw on; by default the input's first three channels, stretched to that range.

    Weights are in units of even attention to everything in reach: 1 where a layer looks nowhere in particular. Black is
    0; the brightest colour is the panel's largest weight, which stands above it beside the grid's size, or 3 where it
    is less. Raises UserError for a model without maps that cover the picture.
    """
    maps = attention_maps(model, *inputs)
    batch, _, *size = inputs[0].shape
    drawn = {
        name: place(weights[0].float().mean(0), dict(model.named_modules())[name], model, at, size)
        for name, weights in maps.items()
        if len(weights) == batch
    }
    if not drawn:
        raise UserError(f"{type(model).__name__}: no layer of it has attention or selection maps over the picture")
    if picture is None:
        picture = inputs[0][0, :3].detach().float().cpu()
        picture = (picture - picture.amin()) / (picture.amax() - picture.amin()).clamp(min=1e-6)
    height, width = picture.shape[-2:]
    columns = min(6, math.ceil(math.sqrt(len(drawn) + 1)))
    rows = math.ceil((len(drawn) + 1) / columns)
    with style():
        figure = new_figure(2.2 * columns, (2.2 * height / width + 0.4) * rows)
        panels = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes in panels:
            axes.axis("off")
        panels[0].imshow(picture.movedim(0, -1))
        panels[0].set_title("picture", fontsize=8)
        for axes, (name, weights) in zip(panels[1:], drawn.items(), strict=False):
            axes.imshow(picture.mean(0), cmap="gray", vmin=0, vmax=1)
            even = weights * (weights > 0).sum()
            axes.imshow(
                even,
                cmap="inferno",
                vmin=0,
                vmax=max(3, float(even.max())),
                alpha=0.65 * (weights > 0).float().numpy(),
                extent=(-0.5, width - 0.5, height - 0.5, -0.5),
            )
            axes.set_title(f"{name}\n{len(weights)} x {weights.shape[1]}, up to {even.max():.2g} x even", fontsize=6)
        for axes in panels[: len(drawn) + 1]:
            axes.plot(at[1] * width - 0.5, at[0] * height - 0.5, "+", color="#00ffff", markersize=8)
    return figure


def place(weights: Tensor, layer: nn.Module, model: nn.Module, at: tuple[float, float], size: list[int]) -> Tensor:
    """The weights (queries, keys) of the query at `at`, on the grid of keys that covers the picture.

    Where a layer's queries are not the positions (`leading_queries`: the leading tokens alone), or its keys are not the
    whole grid (`attention_on_grid` lays them there, `window` says where they lie), the layer tells.
    """
    prefix = getattr(model, "num_prefix_tokens", 0)
    if getattr(layer, "leading_queries", False):
        return weights[0, prefix:].reshape(grid(weights.shape[1] - prefix, size))
    prefix = min((prefix, 0), key=lambda p: misfit(len(weights) - p, size))  # it may join after this layer
    height, width = grid(len(weights) - prefix, size)
    row, column = (min(int(share * n), n - 1) for share, n in zip(at, (height, width), strict=True))
    weights = weights[prefix + row * width + column]
    if hasattr(layer, "attention_on_grid"):
        return layer.attention_on_grid(weights, (height, width), (row, column))
    if hasattr(layer, "window"):  # the keys are those of a window, which may reach over the edges
        spread = torch.zeros(height * layer.stride, width * layer.stride)
        rows, columns = layer.window((row, column))
        index = [torch.arange(part.start, part.stop) for part in (rows, columns)]
        inside = [(at >= 0) & (at < n) for at, n in zip(index, spread.shape, strict=True)]
        taps = weights.reshape(len(index[0]), len(index[1]))[inside[0]][:, inside[1]]
        spread[index[0][inside[0]][:, None], index[1][inside[1]]] = taps
        return spread
    weights = weights[prefix:] if prefix else weights
    return weights.reshape(grid(len(weights), size))


def misfit(number: int, size: list[int]) -> float:
    """How far the shape of a grid of `number` cells is from the picture's."""
    height, width = grid(number, size)
    return abs(math.log(height * size[1] / (width * size[0])))


def grid(number: int, size: list[int]) -> tuple[int, int]:
    """The rows and columns of `number` cells that come nearest to the shape of the picture."""
    shapes = [(rows, number // rows) for rows in range(1, number + 1) if number % rows == 0]
    return min(shapes, key=lambda shape: abs(math.log(shape[0] * size[1] / (shape[1] * size[0]))))


def decay_ranges(model: nn.Module, weight: float = 0.5) -> dict[str, Tensor]:
    """Layer name -> for every head the distance, in positions of its map, that alone lowers a weight to `weight`.

    Of every layer with a method `decay_ranges`, as RMT's attention has; empty for a model without.
    """
    return {name: m.decay_ranges(weight) for name, m in model.named_modules() if hasattr(m, "decay_ranges")}


def draw_decay_ranges(model: nn.Module, weight: float = 0.5) -> Figure:
    """A row of points per layer, one for each head: how far it looks before its decay leaves `weight`.

    Raises UserError for a model without decay.
    """
    ranges = decay_ranges(model, weight)
    if not ranges:
        raise UserError(f"{type(model).__name__}: no layer of it has a decay with distance")
    return _draw_heads(ranges, f"distance at which the decay leaves {weight:g} of a weight (positions)", "log")


def locality_gates(model: nn.Module) -> dict[str, Tensor]:
    """Layer name -> for every head the weight of fixed distances against content, between 0 and 1.

    Of every gated positional attention, as ConViT has it; empty for a model without.
    """
    gated = {name: m for name, m in model.named_modules() if isinstance(m, GatedPositionalAttention)}
    return {name: module.gates().detach().cpu() for name, module in gated.items()}


def draw_locality_gates(model: nn.Module) -> Figure:
    """A row of points per layer, one for each head: 1 looks at fixed distances alone, 0 at content alone.

    Raises UserError for a model without gates.
    """
    gates = locality_gates(model)
    if not gates:
        raise UserError(f"{type(model).__name__}: no layer of it has a gate between distances and content")
    return _draw_heads(gates, "weight of fixed distances against content")


def _draw_heads(found: dict[str, Tensor], label: str, scale: str = "linear") -> Figure:
    with style():
        figure = new_figure(5, 0.22 * len(found) + 1.2)
        axes = figure.subplots()
        for row, values in enumerate(found.values()):
            axes.plot(values, [row] * len(values), "o", markersize=4)
        axes.set_yticks(range(len(found)), list(found), fontsize=6)
        axes.invert_yaxis()
        axes.set_xscale(scale)
        axes.set_xlabel(label)
    return figure
