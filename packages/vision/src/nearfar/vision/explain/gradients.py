"""What explanations start from: a classifier's scores, the outputs of its layers and the gradients at them."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from nearfar.core.errors import DivergedError, UserError

Target = int | Sequence[int] | Tensor | None
"""A class for all pictures, one for each, or None: what the model answers."""

Score = Callable[[Any, Any], Tensor]
"""(what the model gives, classes) -> one number for each picture, which is differentiated."""

Weights = Mapping[str, Tensor]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode meanwhile, with gradients; every module's own mode is restored."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters and buffers, cut from any graph; those in half precision in single, where gradients are
    small enough to vanish in it."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    half = (torch.float16, torch.bfloat16)
    return {name: t.detach().float() if t.dtype in half else t.detach() for name, t in named.items()}


def call(model: nn.Module, images: Tensor, weights: Weights) -> Any:
    """What `model` gives with these weights, which may be others than its own."""
    return functional_call(model, dict(weights), (images,))


def as_images(images: Tensor, weights: Weights) -> Tensor:
    """The pictures (B, C, *S) in the weights' precision, free of what they came from."""
    if images.ndim < 3 or not len(images):
        raise ValueError(f"images is {tuple(images.shape)}; needs (B, C, *S) with at least one picture")
    dtype = next((t.dtype for t in weights.values() if t.is_floating_point()), torch.float32)
    with torch.inference_mode(False):
        return images.detach().clone().to(dtype)


def logits_of(output: Any, model: nn.Module) -> Tensor:
    """`output` if it is a classifier's (B, classes) and finite; else UserError."""
    name = type(model).__name__
    if not isinstance(output, Tensor):
        kind = type(output).__name__
        raise UserError(f"{name}: gives a {kind}, so it is no classifier; pass score=, a function of what it gives")
    if output.ndim != 2:
        shape = tuple(output.shape)
        raise UserError(
            f"{name}: gives {shape}, no classifier's (B, classes); pass score=, a function of what it gives"
        )
    if not torch.isfinite(output).all():
        raise DivergedError(f"{name}: its scores of these pictures are not finite, so nothing explains them")
    return output


def classes_of(logits: Tensor, target: Target) -> Tensor:
    """One class for each picture. UserError for one that the model does not have."""
    batch, number = logits.shape
    if target is None:
        return logits.detach().argmax(1)
    chosen = torch.as_tensor(target, device=logits.device)
    if chosen.is_floating_point() or chosen.dtype == torch.bool:
        raise UserError(f"target: is {target!r}; classes are whole numbers")
    chosen = chosen.long().expand(batch) if chosen.ndim == 0 else chosen.long()
    if chosen.shape != (batch,):
        raise UserError(f"target: names {chosen.numel()} classes for {batch} pictures; give one, or one for each")
    if (outside := chosen[(chosen < 0) | (chosen >= number)]).numel():
        raise UserError(f"target: class {int(outside[0])} is outside the model's {number} classes, 0 to {number - 1}")
    return chosen


def logit(output: Tensor, target: Tensor) -> Tensor:
    """The class's logit."""
    return output.gather(1, target[:, None])[:, 0]


def contrast(output: Tensor, target: Tensor) -> Tensor:
    """The class's logit above the largest of the others: what speaks for it rather than for the runner-up."""
    if output.shape[1] < 2:
        raise UserError("contrast: needs at least two classes")
    own = F.one_hot(target, output.shape[1]).bool()
    return logit(output, target) - output.masked_fill(own, -math.inf).amax(1)


@dataclass
class Point:
    """One layer in one pass: what went in, what came out, and the score's gradient at what came out."""

    input: Tensor
    output: Tensor
    gradient: Tensor | None = None


@dataclass
class Pass:
    """A forward and backward pass: the score of every picture, its class, the layers by name, and the pictures."""

    output: Any
    target: Tensor | None
    scores: Tensor
    layers: dict[str, Point]
    images: Point


INPUT = "input"
"""Name of the pictures among the layers."""


@contextmanager
def watching(model: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, Point]]:
    """The layers' inputs and outputs while the model runs, safe from operations in place. Of a module that is used
    several times the last use counts."""
    named, points = dict(model.named_modules()), {}
    if unknown := [name for name in layers if name not in named]:
        raise ValueError(
            f"layers: {type(model).__name__} has no {', '.join(unknown)}; names are those of named_modules"
        )

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], Tensor]:
        def keep(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Tensor:
            if not isinstance(output, Tensor) or not arguments or not isinstance(arguments[0], Tensor):
                raise ValueError(f"layers: {name} ({type(module).__name__}) gives {type(output).__name__}, no tensor")
            points[name] = Point(arguments[0], output)
            return output.clone()  # what follows may work in place

        return keep

    handles = [named[name].register_forward_hook(watch(name)) for name in layers]
    if not handles:
        yield points
        return
    # a layer's input may be overwritten by the layer itself
    handles += [named[name].register_forward_pre_hook(lambda _, a: tuple(_cloned(x) for x in a)) for name in layers]
    try:
        yield points
    finally:
        for handle in handles:
            handle.remove()


def _cloned(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) and x.requires_grad else x


def gradients(
    model: nn.Module,
    images: Tensor,
    target: Target = None,
    layers: Sequence[str] = (),
    *,
    score: Score = logit,
    weights: Weights | None = None,
    free: bool = False,
) -> Pass:
    """One forward and one backward pass of the batch, of the sum of the pictures' scores.

    In evaluation mode no picture sees another, so the gradients are those of each alone. Memory is that of the passes
    and of the named layers' outputs, held three times. Nothing of the model changes.

    Args:
        layers: names of modules. `INPUT` is always there, as `images`.
        score: what is differentiated.
        weights: others than the model's own.
        free: `score` takes what any model gives, and classes are not checked.
    """
    weights = weights_of(model) if weights is None else weights
    with evaluating(model):
        x = as_images(images, weights).requires_grad_()
        with watching(model, layers) as points:
            output = call(model, x, weights)
        chosen = None if free else classes_of(logits_of(output, model), target)
        scores = score(output, chosen)
        if scores.shape != (len(x),):
            raise ValueError(f"score: gives {tuple(scores.shape)}; needs one number for each of {len(x)} pictures")
        if missing := [name for name in layers if name not in points]:
            raise ValueError(f"layers: {', '.join(missing)} took no part in this pass")
        wanted = [x, *(points[name].output for name in layers)]
        if not scores.requires_grad:
            raise UserError(f"{type(model).__name__}: its scores have no gradient; it computes without autograd")
        live = [t for t in wanted if t.requires_grad]
        found = iter(torch.autograd.grad(scores.sum(), live, allow_unused=True))
        grads = [next(found) if t.requires_grad else None for t in wanted]
        for name, gradient in zip(layers, grads[1:], strict=True):
            points[name] = Point(points[name].input.detach(), points[name].output.detach(), gradient)
        first = Point(x.detach(), x.detach(), torch.zeros_like(x) if grads[0] is None else grads[0])
        return Pass(_detached(output), chosen, scores.detach(), points, first)


def _detached(output: Any) -> Any:
    return output.detach() if isinstance(output, Tensor) else output


def grid_of(x: Any, size: Sequence[int], prefix: int = 0) -> tuple[int, ...] | None:
    """The grid that `x` holds of pictures of `size` pixels, or None.

    (B, C, h, w) or (B, h, w, C), whichever has the pictures' proportions (the first if both); (B, N, C) of h w tokens
    after `prefix` or a few more that are no patches. Exact for pictures of other dimensions, as (B, C, *S).
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return None
    if x.ndim == len(size) + 2:
        for cells in (x.shape[2:], x.shape[1:-1]):
            if math.prod(cells) > 1 and _covers(cells, size):
                return tuple(cells)
    elif x.ndim == 3:
        for extra in dict.fromkeys((prefix, *range(9))):
            if (tokens := x.shape[1] - extra) > 1:
                side = (math.prod(size) / tokens) ** (1 / len(size))
                shape = tuple(round(s / side) for s in size)
                if math.prod(shape) == tokens and _covers(shape, size):
                    return shape
    return None


def _covers(shape: Sequence[int], size: Sequence[int]) -> bool:
    """Whether cells of one stride along all axes, up to a padded edge, give `shape`."""
    strides = [s / n for n, s in zip(shape, size, strict=True)]
    return min(strides) >= 1 and all(abs(s / max(strides) - n) < 1.01 for n, s in zip(shape, size, strict=True))


def on_grid(x: Tensor, size: Sequence[int], prefix: int = 0) -> Tensor:
    """`x` as (B, C, *grid): see `grid_of`. ValueError where it holds no grid."""
    shape = grid_of(x, size, prefix)
    if shape is None:
        raise ValueError(f"a layer gives {tuple(x.shape)}, no grid over pictures of {tuple(size)} pixels")
    if x.ndim == len(size) + 2:
        return x if tuple(x.shape[2:]) == shape else x.movedim(-1, 1)
    return x[:, x.shape[1] - math.prod(shape) :].mT.unflatten(2, shape)


def prefix_tokens(model: nn.Module) -> int:
    """Tokens before the patches, as far as the model says."""
    return int(getattr(model, "num_prefix_tokens", 0) or 0)


@torch.no_grad()
def candidate_layers(model: nn.Module, image: Tensor, weights: Weights) -> dict[str, tuple[int, ...]]:
    """Name -> grid of the layers that a map may be taken at, in the order of computation.

    Stages and blocks, not what is inside a block; of a module that changes the grid, what is on its new one. Found by
    one forward pass of one picture (1, C, *S).
    """
    size, prefix = image.shape[2:], prefix_tokens(model)
    seen: dict[str, tuple[tuple[int, ...] | None, tuple[int, ...], Any]] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def keep(_: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            seen.pop(name, None)  # of several uses the last counts
            shape = grid_of(output, size, prefix)
            if shape and len(output) == 1 and arguments and isinstance(arguments[0], Tensor):
                seen[name] = (grid_of(arguments[0], size, prefix), shape, output)

        return keep

    handles = [module.register_forward_hook(note(name)) for name, module in model.named_modules() if name]
    try:
        with evaluating(model), torch.no_grad():
            call(model, image, weights)
    finally:
        for handle in handles:
            handle.remove()
    found: set[str] = set()

    def descend(module: nn.Module, name: str, only: tuple[int, ...] | None) -> None:
        for child_name, child in module.named_children():
            full = f"{name}.{child_name}" if name else child_name
            before, after, _ = seen.get(full, (None, None, None))
            if after and (only is None or after == only):
                found.add(full)
            lists = isinstance(child, nn.Sequential | nn.ModuleList | nn.ModuleDict)
            shrinks = bool(before and after and before[0] > 4 * after[0])
            if lists or after is None or shrinks:
                descend(child, full, only)
            elif any(_repeats(part) for part in child.children()):
                descend(child, full, after)

    descend(model, "", None)
    kept: dict[str, tuple[int, ...]] = {}
    outputs: dict[int, str] = {}
    for name, (_, shape, output) in seen.items():
        if name in found:
            kept.pop(outputs.get(id(output), ""), None)  # a stage gives what its last block gives
            kept[name] = shape
            outputs[id(output)] = name
    return kept


def _repeats(module: nn.Module) -> bool:
    """Whether this is a list of blocks of one kind."""
    kinds = [type(child) for child in module.children() if any(True for _ in child.children())]
    return isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict) and len(kinds) > len(set(kinds))


def informative(point: Point, size: Sequence[int], prefix: int) -> bool:
    """Whether the score depends on what the layer holds of the pictures, beyond its class token."""
    return point.gradient is not None and bool(on_grid(point.gradient, size, prefix).any())


def choose_layers(points: Mapping[str, Point], size: Sequence[int], prefix: int, number: int) -> list[str]:
    """`number` of the layers, or fewer: the last one on each of the coarsest grids that are still at least 4 cells
    wide (or the finest there is); of a network with one grid, evenly through its depth. Those without gradient, such
    as the last block's patches where the class token alone answers, do not count.
    """
    grids = {name: grid for name, p in points.items() if (grid := grid_of(p.output, size, prefix))}
    alive = {name: shape for name, shape in grids.items() if informative(points[name], size, prefix)}
    if not alive:
        raise UserError(
            "explain: no layer with a grid over the picture has a gradient; name one with layers= (nothing has where "
            "the last layer is zero, as in some fresh networks)"
        )
    last = {shape: name for name, shape in alive.items()}
    if len(last) == 1:
        names = list(alive)
        return (
            [names[round((i + 1) * len(names) / number) - 1] for i in range(number)] if number < len(names) else names
        )
    wide = [shape for shape in last if min(shape) >= 4] or [max(last, key=lambda shape: math.prod(shape))]
    chosen = set(sorted(wide, key=lambda shape: math.prod(shape))[:number])
    return [name for shape, name in last.items() if shape in chosen]


def resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps (B, 1, *s) to the pictures' `size`, linear along every axis, corners not aligned."""
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(size)]
    return F.interpolate(maps, tuple(size), mode=mode, align_corners=False)


def smooth(maps: Tensor, sigma: float) -> Tensor:
    """Gaussian smoothing of (B, 1, H, W), half-width ceil(4 sigma), edges repeated.

    Args:
        sigma: as a share of the longer side.
    """
    if not 0 <= sigma < 1:
        raise ValueError(f"sigma is {sigma}; needs a share of the longer side, 0 to below 1")
    width = sigma * max(maps.shape[2:])
    if not width:
        return maps
    half = math.ceil(4 * width)
    at = torch.arange(-half, half + 1, device=maps.device, dtype=maps.dtype)
    kernel = torch.exp(-(at**2) / (2 * width**2))
    kernel = kernel / kernel.sum()
    maps = F.pad(maps, (half,) * 4, mode="replicate")
    maps = F.conv2d(maps, kernel.reshape(1, 1, -1, 1))
    return F.conv2d(maps, kernel.reshape(1, 1, 1, -1))


def scaled(maps: Tensor) -> Tensor:
    """Every map to [0, 1]; a constant one, which says nothing, to 0."""
    flat = maps.flatten(1)
    low, high = flat.amin(1), flat.amax(1)
    shape = (-1, *(1,) * (maps.ndim - 1))
    width = (high - low).reshape(shape)
    return torch.where(width > 0, (maps - low.reshape(shape)) / width.clamp(min=torch.finfo(maps.dtype).tiny), 0.0)
