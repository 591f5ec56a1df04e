"""Token labelling: what is at every patch of a training picture, as a loss, as files, and from any teacher.

Jiang et al., "All Tokens Matter: Token Labeling for Training Better Vision Transformers" (2021), as VOLO is trained.
"""

import torch
from torch import Tensor, nn

Output = tuple[Tensor, Tensor, tuple[int, int, int, int]]
"""Class logits (B, K), patch logits (B, L, K), and the box of patches whose pictures changed places."""


class TokenLabelLoss(nn.Module):
    """cls_weight CE(class logits, t) + dense_weight CE(patch logits, t_patches), soft cross-entropies, means over rows.

    Targets are (B, K, 2 + L): the true class, the picture's soft label t, then that of each patch. Of the share of
    patches inside the box, t comes from the picture at the other end of the batch, as the patches in it do. Targets
    (B, K) serve for picture and patches alike.

    Args:
        ground_truth: blend t with the true class: t keeps a weight of 0.9, and 0.5 where its largest class is the
            true one (fine-tuning at larger sizes).

    Raises ValueError for negative weights, and at a call whose targets have another number of patches.
    """

    def __init__(self, dense_weight: float = 0.5, cls_weight: float = 1.0, ground_truth: bool = False) -> None:
        super().__init__()
        if dense_weight < 0 or cls_weight < 0:
            raise ValueError(f"weights are {cls_weight} and {dense_weight}; they must not be negative")
        self.dense_weight, self.cls_weight, self.ground_truth = dense_weight, cls_weight, ground_truth

    def forward(self, output: Output, target: Tensor) -> Tensor:
        logits, dense, (top, left, bottom, right) = output
        patches = dense.shape[1]
        if target.ndim == 2:
            picture, tokens = target, target[:, None].expand(-1, patches, -1)
        elif target.shape[2] != 2 + patches:
            raise ValueError(f"targets are of {target.shape[2] - 2} patches, the model has {patches}")
        else:
            picture, tokens = target[..., 1], target[..., 2:].mT
            if self.ground_truth:
                truth = target[..., 0]
                agree = truth.argmax(1, keepdim=True) == picture.argmax(1, keepdim=True)
                picture = torch.lerp(truth, picture, torch.where(agree, 0.5, 0.9).to(truth))
        swapped = (bottom - top) * (right - left) / patches
        if swapped:
            picture = torch.lerp(picture, picture.flip(0), swapped)
        loss = self.cls_weight * soft_cross_entropy(logits, picture)
        return loss + self.dense_weight * soft_cross_entropy(dense.flatten(0, 1), tokens.flatten(0, 1))


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over rows of -sum target log softmax(logits)."""
    return -(target * logits.log_softmax(-1)).sum(-1).mean()
