"""NormGrad: where a picture would change the weights that its class score depends on.

Rebuffi et al., "There and Back Again: Revisiting Backpropagation Saliency Methods" (CVPR 2020). A saliency map in two
phases. First, what position u contributes to the gradient of a layer: of a virtual one that is the identity, put in
at a layer's output x, or of the layer that is there. Second, those numbers to one: their sum, norm, the norm of their
positive part, or their maximum.
"""

import copy
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, pad_same
from torch import Tensor, nn
from torch.func import functional_call

from nearfar.core.cards import Card
from nearfar.vision.explain.gradients import (
    Pass,
    Target,
    Weights,
    as_images,
    call,
    classes_of,
    evaluating,
    gradients,
    logits_of,
    on_grid,
    prefix_tokens,
    resize,
    scaled,
    weights_of,
)

CARD = Card(
    "NormGrad",
    "2004.02866",
    "explains a classifier: where the picture would change its weights, in one gradient pass",
    1e-6,
    weights="any classifier's",
)

AGGREGATIONS = ("sum", "norm", "filter_norm", "max")

METHODS: dict[str, Any] = {
    "normgrad": {"identity": "conv1x1", "aggregation": "norm"},
    "selective_normgrad": {"identity": "scaling", "aggregation": "filter_norm"},
    "linear_approximation": {"identity": "scaling", "aggregation": "sum"},
}
"""Name -> virtual identity and aggregation of what the paper compares."""


def convolution_map(
    x: Tensor,
    g: Tensor,
    aggregation: str = "norm",
    kernel_size: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """What each position of a convolution's output contributes to its weights' gradient, aggregated, (B, 1, *S').

    Position u of group q contributes the outer product of the patch a of its input, C / groups channels times the
    kernel's taps with zeros beyond the edge, and its output's gradient b. No product is formed:

        sum          sum_q  (sum a) (sum b)
        norm         sqrt(sum_q |a|^2 |b|^2)
        filter_norm  sqrt(sum_q |a+|^2 |b+|^2 + |a-|^2 |b-|^2),  + and - the positive and negative part
        max          max_q  max of {max a, min a} x {max b, min b}

    and the sums over a patch are a box filter of sums over channels. Cost O(C) at each position, where the product
    takes O(C C' taps).

    Args:
        x: (B, C, *S), the input.
        g: (B, C', *S'), the gradient at the output.
        aggregation: one of `AGGREGATIONS`.
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation is {aggregation!r}; one of {', '.join(AGGREGATIONS)}")
    dims = x.ndim - 2
    if x.shape[1] % groups or g.shape[1] % groups:
        raise ValueError(f"groups is {groups}; must divide the channels {x.shape[1]} and {g.shape[1]}")
    kernel, stride, padding, dilation = (_each(v, dims) for v in (kernel_size, stride, padding, dilation))
    a, b = x.unflatten(1, (groups, -1)), g.unflatten(1, (groups, -1))  # (B, groups, channels, *S)

    def patches(values: Tensor, largest: bool = False) -> Tensor:
        """Sum, or maximum, of (B, groups, *S) over each patch."""
        if math.prod(kernel) == 1 and math.prod(stride) == 1 and not any(padding):
            return values
        values = F.pad(values, [p for n in reversed(padding) for p in (n, n)])
        if largest:
            return getattr(F, f"max_pool{dims}d")(values, kernel, stride, 0, dilation)
        conv = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
        box = values.new_ones(1, 1, *kernel)
        return conv(values.flatten(0, 1)[:, None], box, None, stride, 0, dilation).reshape(*values.shape[:2], *_rest(g))

    square = lambda t: t.square().sum(2)  # noqa: E731
    if aggregation == "sum":
        return (patches(a.sum(2)) * b.sum(2)).sum(1, keepdim=True)
    if aggregation == "norm":
        return (patches(square(a)) * square(b)).sum(1, keepdim=True).sqrt()
    if aggregation == "filter_norm":
        parts = [patches(square((s * a).clamp(min=0))) * square((s * b).clamp(min=0)) for s in (1, -1)]
        return (parts[0] + parts[1]).sum(1, keepdim=True).sqrt()
    ends_a = (patches(a.amax(2), True), -patches(-a.amin(2), True))
    ends_b = (b.amax(2), b.amin(2))
    return torch.stack([p * q for p in ends_a for q in ends_b]).amax(0).amax(1, keepdim=True)


def _each(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value)


def _rest(g: Tensor) -> tuple[int, ...]:
    return tuple(g.shape[2:])


def identity_map(x: Tensor, g: Tensor, identity: str = "conv1x1", aggregation: str = "norm") -> Tensor:
    """The map of a virtual identity at the layer output x with gradient g, both (B, C, *S): (B, 1, *S).

    Args:
        identity: `bias`, `scaling` (one factor for each channel), `convKxK` (dense, K odd), `depthwiseKxK`.
        aggregation: see `convolution_map`.
    """
    if x.shape != g.shape:
        raise ValueError(f"x is {tuple(x.shape)}, its gradient {tuple(g.shape)}; they must agree")
    channels = x.shape[1]
    if identity == "bias":
        return convolution_map(torch.ones_like(x), g, aggregation, groups=channels)
    if identity == "scaling":
        return convolution_map(x, g, aggregation, groups=channels)
    match = re.fullmatch(r"(conv|depthwise)(\d*[13579])x\2", identity)
    if not match:
        raise ValueError(f"identity is {identity!r}; one of bias, scaling, convKxK, depthwiseKxK with odd K")
    k = int(match[2])
    return convolution_map(x, g, aggregation, k, padding=k // 2, groups=channels if match[1] == "depthwise" else 1)


FILLS = {"weight": torch.ones_like, "bias": torch.zeros_like}


def layer_map(layer: nn.Module, x: Tensor, g: Tensor, aggregation: str = "norm") -> Tensor:
    """The map of a layer's own weight from its input x and the gradient g at its output, at the output's grid.

    Convolutions (any kernel, stride, padding, dilation, groups; 1, 2 or 3 axes), nn.Linear on the last axis, and norms
    with a weight for each channel, whose input is the normalized one, timm's kinds with their own padding or with an
    activation inside too. (B, 1, *S'), or (B, 1, N) of tokens.
    """
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        padding: Any = layer.padding
        if padding == "same":
            total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
            x, padding = F.pad(x, [p for n in reversed(total) for p in (n // 2, n - n // 2)]), 0
        elif padding == "valid":
            padding = 0
        elif isinstance(layer, Conv2dSame) or getattr(layer, "same_pad", False):  # timm's, by the picture's size
            x, padding = pad_same(x, list(layer.kernel_size), list(layer.stride), list(layer.dilation)), 0
        elif layer.padding_mode != "zeros":
            x, padding = F.pad(x, [p for n in reversed(padding) for p in (n, n)], mode=layer.padding_mode), 0
        return convolution_map(
            x, g, aggregation, layer.kernel_size, layer.stride, padding, layer.dilation, layer.groups
        )  # fmt: skip
    if isinstance(layer, nn.Linear):
        return convolution_map(x.movedim(-1, 1), g.movedim(-1, 1), aggregation)
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 1:
        raise ValueError(f"{type(layer).__name__}: has no weight that maps are made of; name a layer that has")
    act = getattr(layer, "act", None)
    if isinstance(act, nn.Module):  # timm's norms with an activation: g before that
        layer = copy.copy(layer)
        layer._modules = {name: nn.Identity() for name in layer._modules}
        with torch.enable_grad():
            z = layer(x).detach().requires_grad_()
            (g,) = torch.autograd.grad(act(z.clone()), z, g)
    plain = {name: fill(t) for name, fill in FILLS.items() if isinstance(t := getattr(layer, name, None), Tensor)}
    normalized = functional_call(layer, plain, (x,))
    if isinstance(layer, nn.LayerNorm) and (x.ndim == 3 or x.shape[1] != weight.numel()):
        normalized, g = normalized.movedim(-1, 1), g.movedim(-1, 1)
    return convolution_map(normalized, g, aggregation, groups=normalized.shape[1])


def layer_maps(
    found: Pass, model: nn.Module, layers: Sequence[str], identity: str = "conv1x1", aggregation: str = "norm"
) -> dict[str, Tensor]:
    """Layer -> its map (B, 1, h, w), of a pass in which the layers were watched.

    `identity`: as `identity_map` takes it, or `own` for the layers' own weights.
    """
    size, prefix = found.images.output.shape[2:], prefix_tokens(model)
    maps = {}
    for name in layers:
        point = found.layers[name]
        gradient = torch.zeros_like(point.output) if point.gradient is None else point.gradient
        if identity == "own":
            own = layer_map(model.get_submodule(name), point.input, gradient, aggregation)
            maps[name] = on_grid(own.mT, size, prefix) if own.ndim == 3 and len(size) > 1 else own
        else:
            x, g = (on_grid(t, size, prefix) for t in (point.output, gradient))
            maps[name] = identity_map(x, g, identity, aggregation)
    return maps


COMBINATIONS = ("product", "weighted_product", "weighted_sum")


def combine(
    maps: Mapping[str, Tensor],
    size: Sequence[int],
    combination: str = "product",
    weights: str | Sequence[float] = "uniform",
    features: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """One map (B, 1, *size) of several layers' (B, 1, h, w), each resized and scaled to [0, 1].

    Args:
        combination: `product`; `weighted_product`, of m_l ^ w_l; `weighted_sum`, of w_l m_l.
        weights: one for each layer, which are made to sum to 1; `uniform`; `linear`, from 1 / L at the first to 1 at
            the last; `spread`, the standard deviation of `features`, the layers' outputs, over positions.
    """
    if combination not in COMBINATIONS:
        raise ValueError(f"combination is {combination!r}; one of {', '.join(COMBINATIONS)}")
    stack = torch.stack([scaled(resize(m, size)) for m in maps.values()])
    number = len(stack)
    if combination == "product":
        return stack.prod(0)
    if weights == "uniform":
        shares = stack.new_ones(number, 1)
    elif weights == "linear":
        shares = torch.arange(1, number + 1, dtype=stack.dtype, device=stack.device)[:, None] / number
    elif weights == "spread":
        if features is None:
            raise ValueError("weights is 'spread', which needs features, the layers' outputs")
        shares = torch.stack([features[name].flatten(2).std(2).mean(1) for name in maps])
    elif isinstance(weights, str) or len(weights) != number or min(weights) < 0 or not sum(weights):
        raise ValueError(f"weights is {weights!r}; uniform, linear, spread, or {number} numbers that are not negative")
    else:
        shares = stack.new_tensor(list(weights))[:, None]
    shares = (shares / shares.sum(0)).reshape(number, -1, *(1,) * (stack.ndim - 2))
    return (stack**shares).prod(0) if combination == "weighted_product" else (stack * shares).sum(0)


def stepped_weights(
    model: nn.Module, images: Tensor, target: Target = None, rate: float = 1e-4, *, negate: bool = False
) -> dict[str, Tensor]:
    """The weights after one plain step of gradient descent on the mean cross-entropy of the batch: meta-saliency.

    All parameters move, normalization keeps its running statistics, and the model itself stays as it is.

    Args:
        target: the classes; None for what the model answers.
        rate: learning rate.
        negate: step away from the classes instead.
    """
    if not math.isfinite(rate):
        raise ValueError(f"rate is {rate}; needs a finite number")
    weights = weights_of(model)
    names = [name for name, _ in model.named_parameters()]
    with evaluating(model):
        leaves = {name: weights[name].clone().requires_grad_() for name in names}
        output = logits_of(call(model, as_images(images, weights), {**weights, **leaves}), model)
        loss = F.cross_entropy(output, classes_of(output, target))
        found = torch.autograd.grad(-loss if negate else loss, list(leaves.values()), allow_unused=True)
    moved = {n: weights[n] - rate * g for n, g in zip(names, found, strict=True) if g is not None}
    return {**weights, **moved}


def competitive_gradient(
    model: nn.Module, images: Tensor, layer: str, target: Target = None, weights: Weights | None = None
) -> tuple[Tensor, Tensor]:
    """Output x and gradient g of a layer where the class competes with all others: (B, C, h, w) both.

    A positive x g of the class stays where it is the largest over all classes, a negative one where it is the smallest;
    else g is 0. One backward pass for each class.
    """
    weights = weights_of(model) if weights is None else weights
    own = gradients(model, images, target, [layer], weights=weights)
    point = own.layers[layer]
    size, prefix = own.images.output.shape[2:], prefix_tokens(model)
    x = on_grid(point.output, size, prefix)
    at = lambda p: on_grid(torch.zeros_like(p.output) if p.gradient is None else p.gradient, size, prefix)  # noqa: E731
    g = at(point)
    product, highest, lowest = x * g, x * g, x * g
    for label in range(own.output.shape[1]):
        other = x * at(gradients(model, images, label, [layer], weights=weights).layers[layer])
        highest, lowest = torch.maximum(highest, other), torch.minimum(lowest, other)
    kept = ((product > 0) & (product >= highest)) | ((product < 0) & (product <= lowest))
    return x, torch.where(kept, g, 0.0)
