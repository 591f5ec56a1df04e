"""Losses of the recipes, for one output or several."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from monai.losses import DiceCELoss
from torch import Tensor, nn

from nearfar.medical.models.guided_attention import GuidedOutputs, guided_loss

LOSSES = ("dice_ce", "nnunet", "transunet", "binary", "structure", "cross_entropy")


class SegmentationLoss(nn.Module):
    """A loss between logits (B, K, *S) and labels (B, *S), summed over the outputs of networks that have several.

    - `dice_ce`: cross-entropy + Dice over the foreground classes, per image.
    - `nnunet`: the same with sums over the batch, smoothing 1e-5; coarser outputs weigh 1/2^i, normalized.
    - `transunet`: 0.4 CE + 0.6 Dice with squared denominators, over the batch, background included.
    - `binary`: BCE + Dice of one sigmoid output, Dice per image with smoothing 1.
    - `structure`: BCE and IoU of one sigmoid output weighted by 1 + 5 |mean of 31 x 31 (mask) - mask| (2-D).
    - `cross_entropy`: sum over outputs, labels shrunk to each output's grid by nearest neighbour (DeepLab).

    `squash` puts a sigmoid on the outputs first, as the released MACMD does even before its softmax: scores are then
    confined to 0..1 and the cross-entropy of K classes cannot fall below log(1 + (K - 1) / e). `ignore` is a label that
    does not count (cross_entropy only). `GuidedOutputs` have their own loss and ignore the name.

    Raises:
        ValueError: for an unknown name, or `ignore` with another loss than cross_entropy.
    """

    def __init__(self, name: str = "dice_ce", *, squash: bool = False, ignore: int | None = None) -> None:
        super().__init__()
        if name not in LOSSES:
            raise ValueError(f"loss is {name!r}; allowed are {', '.join(LOSSES)}")
        if ignore is not None and name != "cross_entropy":
            raise ValueError(f"loss {name!r} cannot leave out a label; use cross_entropy")
        self.name, self.squash, self.ignore = name, squash, ignore
        every: dict[str, dict[str, Any]] = {
            "dice_ce": {"include_background": False},
            "nnunet": {"include_background": False, "batch": True},
            "transunet": {"squared_pred": True, "batch": True, "lambda_ce": 0.4, "lambda_dice": 0.6},
        }
        options = every.get(name)
        self.dice_ce = DiceCELoss(softmax=True, to_onehot_y=True, **options) if options is not None else None

    def forward(self, outputs: Tensor | Sequence[Tensor] | GuidedOutputs, labels: Tensor) -> Tensor:
        if isinstance(outputs, GuidedOutputs):
            return guided_loss(outputs, labels)
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        weights = [1.0] * len(outputs)
        if self.name == "nnunet":
            weights = [0.5**i / (2 - 0.5 ** (len(outputs) - 1)) for i in range(len(outputs))]
        terms = [w * self.one(torch.sigmoid(o) if self.squash else o, labels) for w, o in zip(weights, outputs)]
        return torch.stack(terms).sum()

    def one(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of one output."""
        logits = logits.float()
        if labels.shape[1:] != logits.shape[2:]:
            small = F.interpolate(labels[:, None].float(), logits.shape[2:], mode="nearest-exact")
            labels = small[:, 0].long()
        if self.name == "cross_entropy":
            return F.cross_entropy(logits, labels, ignore_index=-100 if self.ignore is None else self.ignore)
        if self.dice_ce is not None:
            return self.dice_ce(logits, labels[:, None])
        target = labels[:, None].to(logits.dtype)
        axes = tuple(range(1, logits.ndim))
        p = logits.sigmoid()
        if self.name == "binary":
            overlap = 2 * (p * target).sum(axes) + 1
            dice = 1 - overlap / (p.sum(axes) + target.sum(axes) + 1)
            return F.binary_cross_entropy_with_logits(logits, target) + dice.mean()
        weight = 1 + 5 * (F.avg_pool2d(target, 31, 1, 15) - target).abs()
        bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        bce = (weight * bce).sum(axes) / weight.sum(axes)
        inter = (weight * p * target).sum(axes)
        union = (weight * (p + target)).sum(axes)
        return (bce + 1 - (inter + 1) / (union - inter + 1)).mean()
