"""Explanations of a classifier's answer: one call, many methods, one frame."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nearfar.core.errors import UserError
from nearfar.core.finite import is_finite
from nearfar.vision.explain.attention import attention_maps
from nearfar.vision.explain.context_aware import ContextAware, salient_relevance
from nearfar.vision.explain.gradients import (
    Pass,
    Point,
    Score,
    Target,
    Weights,
    as_images,
    call,
    candidate_layers,
    choose_layers,
    classes_of,
    contrast,
    evaluating,
    gradients,
    logit,
    logits_of,
    on_grid,
    prefix_tokens,
    resize,
    smooth,
    weights_of,
)
from nearfar.vision.explain.normgrad import METHODS as IDENTITIES
from nearfar.vision.explain.normgrad import combine, layer_maps, stepped_weights
from nearfar.vision.explain.relevance import relevance


def grad_cam(found: Pass, model: nn.Module, layer: str) -> Tensor:
    """(sum_c x_c mean_u g_c)+ at a layer's output x with gradient g: Grad-CAM (Selvaraju et al. 2017), (B, 1, h, w)."""
    size, prefix = found.images.output.shape[2:], prefix_tokens(model)
    point = found.layers[layer]
    gradient = torch.zeros_like(point.output) if point.gradient is None else point.gradient
    x, g = (on_grid(t, size, prefix) for t in (point.output, gradient))
    return (x * g.flatten(2).mean(2).reshape(*g.shape[:2], *(1,) * len(size))).sum(1, keepdim=True).clamp(min=0)


@contextmanager
def guided(model: nn.Module) -> Iterator[None]:
    """Meanwhile every nn.ReLU of the model passes positive gradients alone (Springenberg et al. 2015)."""
    relus = [module for module in model.modules() if isinstance(module, nn.ReLU)]
    if not relus:
        raise UserError(f"{type(model).__name__}: guided backpropagation changes nn.ReLU, of which it has none")

    def rectify(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        if output.requires_grad:
            output = output.clone()
            output.register_hook(lambda g: g.clamp(min=0))
        return output

    handles = [relu.register_forward_hook(rectify) for relu in relus]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def attention_rollout(model: nn.Module, images: Tensor) -> Tensor:
    """How much each patch reaches the class token, or the mean of all tokens, through every layer: (B, 1, h, w).

    The product over layers of (A + 1) / 2, A the mean of the heads (Abnar and Zuidema 2020). It does not depend on the
    class. Every layer has to attend from all tokens to all; UserError for models of another kind.
    """
    dtype = next((p.dtype for p in model.parameters()), images.dtype)  # half precision stays: nothing is differentiated
    maps = [weights.float() for weights in attention_maps(model, images.to(dtype)).values()]
    name = type(model).__name__
    square = [m for m in maps if m.ndim == 4 and len(m) == len(images) and m.shape[2] == m.shape[3]]
    if not maps or len(square) != len(maps) or len({m.shape[2] for m in maps}) > 1:
        raise UserError(f"{name}: attention rollout needs layers that all attend from every token to every token")
    rolled = torch.eye(maps[0].shape[2])
    for weights in maps:
        rolled = (weights.mean(1) + torch.eye(weights.shape[2])) / 2 @ rolled
    prefix = prefix_tokens(model)
    row = rolled[:, 0] if prefix else rolled.mean(1)
    return on_grid(row[..., None].to(images.device), images.shape[2:], prefix)


@dataclass
class Explanation:
    """Maps of a batch, (B, H, W), at the pictures' size: the larger, the more the class depends on the place."""

    method: str
    maps: Tensor
    target: Tensor
    """The explained classes, (B,)."""
    scores: Tensor
    """Their logits, (B,)."""
    layers: list[str] = field(default_factory=list)
    """Where the maps were taken, in the order of computation; none for those taken at the pixels."""
    attributions: Tensor | None = None
    """Of methods that share the score out over pixels: the shares, (B, C, H, W)."""
    absorbed: Tensor | None = None
    """Of relevance: what biases took, (B,)."""


Method = Callable[..., tuple[Tensor, dict[str, Any]]]


def answered(model: nn.Module, images: Tensor, target: Target) -> dict[str, Any]:
    """The explained classes and their logits, by one forward pass."""
    weights = weights_of(model)
    with evaluating(model), torch.no_grad():
        logits = logits_of(call(model, as_images(images, weights), weights), model)
    classes = classes_of(logits, target)
    return {"target": classes, "scores": logit(logits, classes)}


def of_pass(found: Pass) -> dict[str, Any]:
    """The same of a pass that was made anyway."""
    assert found.target is not None
    return {"target": found.target, "scores": logit(found.output, found.target)}


def by_layers(
    model: nn.Module, images: Tensor, target: Target, layers: Sequence[str] | None, *, number: int,
    identity: str, aggregation: str = "sum", score: Score = logit, step: float = 0.0, negate: bool = False,
    combination: str = "product", weights: str | Sequence[float] = "uniform",
) -> tuple[Tensor, dict[str, Any]]:  # fmt: skip
    """The combined maps of given or chosen layers; `step` is that of meta-saliency, one for each picture."""
    said: dict[str, Any] = {}
    if step:
        said = answered(model, images, target)
        ones = []
        for i in range(len(images)):
            here, classes = images[i : i + 1], said["target"][i : i + 1]
            moved = stepped_weights(model, here, classes, step, negate=negate)
            ones.append(_at_layers(model, here, classes, layers, number, score, moved))
            layers = ones[0][1]
    else:
        if negate:
            raise ValueError("negate is True, step is 0; it turns meta-saliency's step around")
        ones = [_at_layers(model, images, target, layers, number, score, None)]
    maps = []
    for found, names in ones:
        said = said or of_pass(found)
        if identity == "grad_cam":
            taken = {name: grad_cam(found, model, name) for name in names}
        else:
            taken = layer_maps(found, model, names, identity, aggregation)
        size = images.shape[2:]
        if len(taken) == 1:
            maps.append(resize(next(iter(taken.values())), size))
            continue
        features = {name: on_grid(found.layers[name].output, size, prefix_tokens(model)) for name in names}
        maps.append(combine(taken, size, combination, weights, features))
    return torch.cat(maps), {"layers": list(ones[0][1]), **said}


def _at_layers(
    model: nn.Module, images: Tensor, target: Target, layers: Sequence[str] | None, number: int, score: Score,
    weights: Weights | None,
) -> tuple[Pass, list[str]]:  # fmt: skip
    if layers is not None:
        return gradients(model, images, target, layers, score=score, weights=weights), list(layers)
    own = weights_of(model) if weights is None else weights
    known = candidate_layers(model, as_images(images[:1], own), own)
    if not known:
        answered(model, images[:1], None)  # says what is no classifier
        raise UserError(f"{type(model).__name__}: no layer of it gives a grid over the picture; name one with layers=")
    found = gradients(model, images, target, list(known), score=score, weights=own)
    chosen = choose_layers(found.layers, images.shape[2:], prefix_tokens(model), number)
    found.layers = {name: found.layers[name] for name in chosen}
    return found, chosen


def at_pixels(
    model: nn.Module, images: Tensor, target: Target, layers: Sequence[str] | None, *, kind: str
) -> tuple[Tensor, dict[str, Any]]:
    """Maps of the gradient at the pixels: its largest size over colours; the sum of its product with the picture."""
    _no_layers(layers)
    if kind == "guided_backpropagation":
        with guided(model):
            found = gradients(model, images, target)
    else:
        found = gradients(model, images, target)
    point: Point = found.images
    gradient = point.gradient if point.gradient is not None else torch.zeros_like(point.output)
    if kind == "gradient_x_input":
        parts = gradient * point.output
        return parts.sum(1, keepdim=True), {"attributions": parts, **of_pass(found)}
    return gradient.abs().amax(1, keepdim=True), of_pass(found)


def by_integrated_gradients(
    model: nn.Module, images: Tensor, target: Target, layers: Sequence[str] | None, *, steps: int = 32
) -> tuple[Tensor, dict[str, Any]]:
    """Gradients on the way from zeros (the mean colour) to the picture (Sundararajan et al. 2017), by captum."""
    _no_layers(layers)
    try:
        from captum.attr import IntegratedGradients
    except ImportError as error:
        raise UserError("integrated_gradients: needs captum; pip install 'nearfar-vision[explain]'") from error
    weights, said = weights_of(model), answered(model, images, target)
    with evaluating(model):
        explained = IntegratedGradients(lambda x: call(model, x, weights))
        parts = explained.attribute(
            as_images(images, weights), target=said["target"], n_steps=steps,
            internal_batch_size=max(8, len(images)),
        )  # fmt: skip
    return parts.detach().sum(1, keepdim=True), {"attributions": parts.detach(), **said}


def by_rollout(
    model: nn.Module, images: Tensor, target: Target, layers: Sequence[str] | None
) -> tuple[Tensor, dict[str, Any]]:
    _no_layers(layers)
    said = answered(model, images, target)
    return resize(attention_rollout(model, images), images.shape[2:]), said


def by_relevance(
    model: nn.Module, images: Tensor, target: Target, layers: Sequence[str] | None, *, rules: str = "epsilon_plus"
) -> tuple[Tensor, dict[str, Any]]:
    _no_layers(layers)
    found = relevance(model, images, target, rules)
    extra = {"attributions": found.pixels, "absorbed": found.absorbed, "target": found.target, "scores": found.score}
    return found.pixels.sum(1, keepdim=True), extra


def by_salient_relevance(
    model: nn.Module, images: Tensor, target: Target, layers: Sequence[str] | None, *, rules: str = "epsilon_plus",
    parameters: ContextAware | None = None,
) -> tuple[Tensor, dict[str, Any]]:  # fmt: skip
    _no_layers(layers)
    said = answered(model, images, target)
    return salient_relevance(model, images, said["target"], rules, parameters), said


def _no_layers(layers: Sequence[str] | None) -> None:
    if layers is not None:
        raise ValueError(f"layers is {list(layers)}; this method's maps are taken at the pixels")


METHODS: dict[str, Method] = {
    "normgrad": partial(by_layers, number=3, **IDENTITIES["normgrad"]),
    "selective_normgrad": partial(by_layers, number=3, **IDENTITIES["selective_normgrad"]),
    "meta_normgrad": partial(by_layers, number=3, **IDENTITIES["normgrad"], step=0.0025),
    "linear_approximation": partial(by_layers, number=1, **IDENTITIES["linear_approximation"]),
    "contrast": partial(by_layers, number=1, **IDENTITIES["linear_approximation"], score=contrast),
    "grad_cam": partial(by_layers, number=1, identity="grad_cam"),
    "gradient": partial(at_pixels, kind="gradient"),
    "gradient_x_input": partial(at_pixels, kind="gradient_x_input"),
    "guided_backpropagation": partial(at_pixels, kind="guided_backpropagation"),
    "integrated_gradients": by_integrated_gradients,
    "attention_rollout": by_rollout,
    "relevance": by_relevance,
    "salient_relevance": by_salient_relevance,
}  # fmt: skip
"""Every method by name. `contrast` is the linear approximation of what speaks for the class and not the next one."""

AT_LAYERS = tuple(name for name, method in METHODS.items() if "identity" in getattr(method, "keywords", {}))
"""Those whose maps are taken at layers."""


def explain(
    model: nn.Module,
    images: Tensor,
    target: Target = None,
    method: str = "normgrad",
    *,
    layers: Sequence[str] | None = None,
    sigma: float = 0.0,
    **settings: Any,
) -> Explanation:
    """Where a classifier's score of a class comes from, for a batch of pictures (B, C, H, W).

    Any classifier of nearfar, timm or torchvision, convolutions or transformers; no layer need be named. Without
    `layers` those methods that take maps at layers choose them: the last layer on each of the coarsest grids that are
    still 4 cells wide (three for NormGrad, whose maps are multiplied, else one), of those that the class depends on; of
    a transformer with one grid, evenly through its depth.

    The model is in evaluation mode meanwhile and is not changed; half precision is computed in single. Memory is
    that of one forward and backward pass of the batch and of three copies of the layers in question (for relevance, of
    one picture). NormGrad costs one such pass, and one forward pass of one picture where layers are to be chosen; after
    a step of meta-saliency a second pass and one more forward pass.

    Args:
        target: a class for all, one for each, or None for what the model answers.
        method: one of `METHODS`.
        layers: names of modules to take the maps at.
        sigma: Gaussian smoothing of the maps, as a share of the longer side.
        settings: of the method: `identity` (see `normgrad.identity_map`; `own` for the layers' own weights),
            `aggregation`, `step` and `negate` of meta-saliency, `combination` and `weights` of those at layers; `steps`
            of integrated gradients; `rules` of relevance; `rules` and `parameters` of salient relevance.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; one of {', '.join(METHODS)}")
    if images.ndim != 4:
        raise ValueError(f"images is {tuple(images.shape)}; needs (B, C, H, W)")
    maps, extra = METHODS[method](model, as_images(images, weights_of(model)), target, layers, **settings)
    maps = smooth(maps, sigma)[:, 0]
    if not is_finite(maps):
        raise UserError(f"{method}: the map is not finite; the model's gradients overflow")
    return Explanation(method, maps, **extra)


def methods_for(model: nn.Module, images: Tensor) -> dict[str, str]:
    """Method -> why it does not suit the model, or an empty text."""
    reasons = dict.fromkeys(METHODS, "")
    if not any(isinstance(module, nn.ReLU) for module in model.modules()):
        reasons["guided_backpropagation"] = "has no ReLU"
    try:
        attention_rollout(model, images[:1])
    except (UserError, ValueError) as error:
        reasons["attention_rollout"] = str(error).partition(": ")[2] or str(error)
    return reasons
