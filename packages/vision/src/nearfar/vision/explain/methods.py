"""Explanations of a classifier's answer: one call, many methods, one frame."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nearfar.core.errors import UserError
from nearfar.vision.explain.gradients import (
    Pass,
    Score,
    Target,
    Weights,
    as_images,
    call,
    candidate_layers,
    choose_layers,
    contrast,
    evaluating,
    grid_of,
    gradients,
    logit,
    on_grid,
    prefix_tokens,
    resize,
    smooth,
    weights_of,
)
from nearfar.vision.explain.normgrad import METHODS as IDENTITIES
from nearfar.vision.explain.normgrad import combine, layer_maps, stepped_weights


def grad_cam(found: Pass, model: nn.Module, layer: str) -> Tensor:
    """(sum_c x_c mean_u g_c)+ at a layer's output x with gradient g: Grad-CAM (Selvaraju et al. 2017), (B, 1, h, w)."""
    size, prefix = found.images.output.shape[2:], prefix_tokens(model)
    point = found.layers[layer]
    x, g = (on_grid(t, size, prefix) for t in (point.output, point.gradient))
    return (x * g.flatten(2).mean(2).reshape(*g.shape[:2], *(1,) * len(size))).sum(1, keepdim=True).clamp(min=0)
