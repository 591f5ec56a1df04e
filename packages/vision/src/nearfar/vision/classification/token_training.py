"""Training with fewer tokens: EViT's keep-rate schedule, and what EViT and Sparsifiner learn from a dense teacher."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nearfar.core.errors import UserError
from nearfar.ops.attention.predicted_sparsity import Connectivity
from nearfar.vision.explain.attention import attention_maps
from nearfar.vision.models.evit import EViT, scheduled_keep_rate, whole_tokens
from nearfar.vision.models.sparsifiner import Sparsifiner


def set_keep_rate(model: nn.Module, epoch: float, keep_rate: float, warm_up: float, shrink_until: float) -> None:
    """The keep rate of the published schedule at `epoch`, in whole tokens; without epochs it is fixed from the start.

    Raises UserError for a model other than EViT.
    """
    if not isinstance(model, EViT):
        raise UserError(f"{type(model).__name__}: has no keep rate to be trained with; keep_rate is for EViT")
    rate = scheduled_keep_rate(epoch, keep_rate, warm_up, shrink_until) if shrink_until else keep_rate
    height, width = model.grid(model.img_size)
    model.keep_rate = whole_tokens(rate, height * width)


def distillation(logits: Tensor, teacher: Tensor) -> Tensor:
    """KL(student || teacher) of the classes, mean over pictures, as Sparsifiner's code has it."""
    student, wanted = logits.log_softmax(1), teacher.log_softmax(1)
    return F.kl_div(wanted, student, reduction="batchmean", log_target=True)


def token_distillation(tokens: Tensor, teacher: Tensor, active: Tensor | None = None) -> Tensor:
    """Mean squared difference of the features of patches (B, M, C), of those that pruning has left."""
    difference = (tokens - teacher).square().mean(-1)
    return difference.mean() if active is None else difference[active].mean()


def reconstruction(told: list[Connectivity], maps: list[Tensor], weight: float = 0.01) -> Tensor:
    """Sparsifiner's first phase: `weight` times the mean over blocks of the summed squared differences between the
    predicted attention and the teacher's (B, H, N, N), the class token's row left out.

    A sum over the batch too, as published, so it depends on the batch's size.
    """
    if len(told) != len(maps) or told[0].approximate.shape != maps[0][:, :, 1:].shape:
        raise UserError("the teacher's attention differs in blocks, heads or tokens; it must be the same dense model")
    return (
        weight
        * torch.stack(
            [(t.approximate - a[:, :, 1:].to(t.approximate)).square().sum() for t, a in zip(told, maps, strict=True)]
        ).mean()
    )


def train_predictors(model: Sparsifiner, alone: bool) -> None:
    """The first phase trains the predictors alone, with dense attention; the second all else, with hard masks."""
    model.dense = alone
    for name, parameter in model.named_parameters():
        parameter.requires_grad_((".predictor." in name) == alone)


def taught_loss(model: nn.Module, x: Tensor, teacher: Any, weight: float) -> tuple[Tensor, Tensor]:
    """The student's logits, and what it is to learn from a dense `teacher`.

    A Sparsifiner with dense attention (its first phase) learns the teacher's attention; later, and every other model,
    `weight` times the teacher's classes, a Sparsifiner also `weight` times its features.
    """
    if isinstance(model, Sparsifiner):
        features, told, active = model.details(x)
        if model.dense:
            maps = list(attention_maps(teacher, x).values())
            return model.forward_head(features), reconstruction(told, maps)
        with torch.no_grad():
            wanted = teacher.forward_features(x)
            classes = teacher.forward_head(wanted)
        logits = model.forward_head(features)
        tokens = token_distillation(features[:, 1:], wanted[:, 1:], active)
        return logits, weight * (distillation(logits, classes) + tokens)
    with torch.no_grad():
        classes = teacher(x)
    logits = model(x)
    return logits, weight * distillation(logits, classes)
