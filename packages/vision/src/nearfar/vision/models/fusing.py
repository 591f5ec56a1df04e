"""Folding norms and activations into the convolutions before them, for inference."""

import torch
from torch import nn

from nearfar.ops.common.folding import fold_batch_norm
from nearfar.ops.common.fused import FusedConv2d
from nearfar.ops.common.layers import GELU, DepthwiseConv

ACTIVATIONS = {nn.GELU: "gelu", GELU: "gelu", nn.ReLU: "relu", nn.SiLU: "swish"}


@torch.no_grad()
def fuse_sequence(sequence: nn.Sequential) -> None:
    """Fold batch norms and activations into the convolutions before them, for inference; the outputs stay the same."""
    for i, conv in enumerate(sequence):
        if not isinstance(conv, nn.Conv2d | DepthwiseConv):
            continue
        if callable(getattr(conv, "fuse", None)):
            conv.fuse()
        after = i + 1
        if after < len(sequence) and isinstance(sequence[after], nn.BatchNorm2d):
            fold_batch_norm(conv, sequence[after])
            sequence[after] = nn.Identity()
            after += 1
        activation = ACTIVATIONS.get(type(sequence[after])) if after < len(sequence) else None
        sequence[i] = FusedConv2d(conv, activation or "none")
        if activation:
            sequence[after] = nn.Identity()
