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
    does not count: its voxels are left out of every sum and mean. `GuidedOutputs` have their own loss and ignore the
    name.

    With `regions`, a table (labels, K) of which label belongs to which of K regions that may overlap, each output is
    the logit of one region: binary cross-entropy takes the place of the cross-entropy, and Dice counts every region.

    Raises:
        ValueError: for an unknown name, or regions with a loss for one label.
    """

    regions: Tensor | None

    def __init__(
        self, name: str = "dice_ce", *, squash: bool = False, ignore: int | None = None, regions: Tensor | None = None
    ) -> None:
        super().__init__()
        if name not in LOSSES:
            raise ValueError(f"loss is {name!r}; allowed are {', '.join(LOSSES)}")
        if regions is not None and (name in ("binary", "structure") or squash):
            raise ValueError(f"loss {name!r} (squash {squash}) takes no regions; use dice_ce or nnunet")
        self.name, self.squash, self.ignore = name, squash, ignore
        self.register_buffer("regions", regions)
        every: dict[str, dict[str, Any]] = {
            "dice_ce": {"include_background": False},
            "nnunet": {"include_background": False, "batch": True},
            "transunet": {"squared_pred": True, "batch": True, "lambda_ce": 0.4, "lambda_dice": 0.6},
        }
        options = every.get(name)
        self.dice_ce = DiceCELoss(softmax=True, to_onehot_y=True, **options) if options is not None else None

    def forward(self, outputs: Tensor | Sequence[Tensor] | GuidedOutputs, labels: Tensor) -> Tensor:
        if isinstance(outputs, GuidedOutputs):
            if self.ignore is not None or self.regions is not None:
                raise ValueError("guided attention's own loss takes neither a label to ignore nor regions")
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
        if self.dice_ce is not None and self.ignore is None and self.regions is None:
            return self.dice_ce(logits, labels[:, None])
        keep = torch.ones_like(labels, dtype=torch.bool) if self.ignore is None else labels != self.ignore
        labels, counted = torch.where(keep, labels, 0), keep[:, None].to(logits.dtype)
        if self.name not in ("binary", "structure"):
            return self._of_what_counts(logits, labels, counted)
        target = labels[:, None].to(logits.dtype) * counted
        axes = tuple(range(1, logits.ndim))
        p = logits.sigmoid() * counted
        if self.name == "binary":
            overlap = 2 * (p * target).sum(axes) + 1
            dice = 1 - overlap / (p.sum(axes) + target.sum(axes) + 1)
            bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
            return (bce * counted).sum() / counted.sum().clamp_min(1) + dice.mean()
        weight = (1 + 5 * (F.avg_pool2d(target, 31, 1, 15) - target).abs()) * counted
        bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        bce = (weight * bce).sum(axes) / weight.sum(axes).clamp_min(1e-6)
        inter = (weight * p * target).sum(axes)
        union = (weight * (p + target)).sum(axes)
        return (bce + 1 - (inter + 1) / (union - inter + 1)).mean()

    def _of_what_counts(self, logits: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
        """Cross-entropy and Dice over the voxels that count, of classes or of regions."""
        if self.regions is None:
            target = F.one_hot(labels, logits.shape[1]).movedim(-1, 1).to(logits.dtype)
            ce = (F.cross_entropy(logits, labels, reduction="none")[:, None] * counted).sum()
            ce, p = ce / counted.sum().clamp_min(1), logits.softmax(1)
        else:
            target = self.regions[labels].movedim(-1, 1).to(logits.dtype)
            bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
            ce, p = (bce * counted).sum() / (counted.sum() * logits.shape[1]).clamp_min(1), logits.sigmoid()
        if self.name == "cross_entropy":
            return ce
        transunet = self.name == "transunet"
        if self.regions is None and not transunet:
            p, target = p[:, 1:], target[:, 1:]
        p, target = p * counted, target * counted
        axes = (*(() if self.name == "dice_ce" else (0,)), *range(2, logits.ndim))
        sizes = (p**2 + target**2 if transunet else p + target).sum(axes)
        dice = (1 - (2 * (p * target).sum(axes) + 1e-5) / (sizes + 1e-5)).mean()
        return 0.4 * ce + 0.6 * dice if transunet else ce + dice
