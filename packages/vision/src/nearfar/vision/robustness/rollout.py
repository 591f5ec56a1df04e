"""Attention rollout: how much of every patch reaches the class token, through all layers."""

from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from nearfar.core.errors import UserError
from nearfar.core.plots import new_figure, style
from nearfar.vision.explain.attention import attention_maps, grid


def rollout(model: nn.Module, x: Tensor) -> Tensor:
    """(B, patches): the class token's row of the product over blocks, last to first, of (mean_h A_h + I) / 2.

    Abnar and Zuidema, "Quantifying Attention Flow in Transformers" (2020). Rows sum to one before the class token's own
    share is left out. Of a model without a class token it is the mean row. Raises UserError for a model whose attention
    is not over one fixed set of tokens.
    """
    maps = [weights for weights in attention_maps(model, x).values() if len(weights) == len(x)]
    tokens = {tuple(weights.shape[-2:]) for weights in maps}
    if len(tokens) != 1 or len(set(next(iter(tokens)))) != 1:
        raise UserError(f"{type(model).__name__}: its layers do not all attend over the same tokens, so none roll out")
    joint = None
    for weights in maps:
        step = weights.mean(1) + torch.eye(weights.shape[-1])
        step = step / step.sum(-1, keepdim=True)
        joint = step if joint is None else step @ joint
    assert joint is not None
    prefix = getattr(model, "num_prefix_tokens", 0)
    return joint[:, 0, prefix:] if prefix else joint.mean(1)


@torch.no_grad()
def feature_attention(model: Any, x: Tensor) -> Tensor:
    """(B, h, w): the mean absolute value of the last feature map of a convolutional model, its counterpart."""
    features = model.forward_features(x)
    if features.ndim != 4:
        raise UserError(f"{type(model).__name__}: its features are no map (B, C, h, w)")
    return features.abs().mean(1)


def attention_picture(model: nn.Module, x: Tensor) -> Tensor:
    """(B, h, w), each summing to one: the rollout of a transformer, or the feature map of a convolutional model."""
    try:
        found = rollout(model, x)
        found = found.unflatten(1, grid(found.shape[1], list(x.shape[-2:])))
    except (UserError, StopIteration):
        found = feature_attention(model, x).cpu()
    return found / found.sum((1, 2), keepdim=True).clamp(min=1e-12)


def draw_rollout(model: nn.Module, x: Tensor, pictures: Tensor, titles: list[str]) -> Figure:
    """Each of `pictures` (B, 3, H, W) in [0, 1], and below it what the model looks at when it gets `x`."""
    maps = attention_picture(model, x)
    with style():
        figure = new_figure(2.2 * len(x), 4.6)
        panels = figure.subplots(2, len(x), squeeze=False)
        for column, (picture, seen, title) in enumerate(zip(pictures, maps, titles, strict=True)):
            panels[0, column].imshow(picture.movedim(0, -1))
            panels[0, column].set_title(title, fontsize=8)
            panels[1, column].imshow(seen * seen.numel(), cmap="inferno", vmin=0)
        for axes in panels.flatten():
            axes.axis("off")
    return figure
