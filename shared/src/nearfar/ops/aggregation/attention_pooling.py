"""Maps of several scales pooled into one by attention over the scales, then used to modulate each of them."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.ops.common.conv_norm_act import ConvNormAct
from nearfar.ops.common.dims import BATCH_NORMS, CONVOLUTIONS, check_dims


class _Enlarge(nn.Module):
    """Nearest upsampling to a size, depthwise size-3 convolution, BN, ReLU, 1x1 convolution (biases throughout)."""

    def __init__(self, dim: int, dims: int) -> None:
        super().__init__()
        self.depthwise = CONVOLUTIONS[dims](dim, dim, 3, padding=1, groups=dim)
        self.norm = BATCH_NORMS[dims](dim)
        self.pointwise = CONVOLUTIONS[dims](dim, dim, 1)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        x = F.interpolate(x, size, mode="nearest")
        return self.pointwise(torch.relu(self.norm(self.depthwise(x))))


class AttentionPooledModulation(nn.Module):
    """Pools maps x_i of several scales and lets the pool modulate each; result on the first (finest) one's grid.

    MACMD (arXiv 2511.05803). X_i = relu(BN(conv1(x_i))), the coarser ones enlarged; weights w = softmax_i of
    conv1(relu(conv1(X_i))), one per position; pool P = sum_i w_i X_i;
    m_i = (sigmoid(X_i) P) (sigmoid(P) X_i); output = mean_i sigmoid(BN(conv1(m_i))) X_i. The score and modulation
    layers are the same for all scales. Cost O(N) in the finest grid per scale.

    The published code makes the enlarging layers anew, with random weights, in every forward pass; here they are
    parameters like the others.

    Args:
        in_channels: channels of each map, finest first.
        dim: channels of the result.
        reduction: dim / reduction hidden channels of the score.
    """

    def __init__(self, in_channels: Sequence[int], dim: int, reduction: int = 8, *, dims: int = 2) -> None:
        super().__init__()
        check_dims(dims)
        if dim < reduction:
            raise ValueError(f"dim is {dim}; it must be at least reduction={reduction}")
        conv = CONVOLUTIONS[dims]
        self.project = nn.ModuleList(ConvNormAct(channels, dim, dims=dims) for channels in in_channels)
        self.enlarge = nn.ModuleList(_Enlarge(dim, dims) for _ in in_channels[1:])
        self.score = nn.Sequential(conv(dim, dim // reduction, 1), nn.ReLU(), conv(dim // reduction, 1, 1))
        self.modulate = ConvNormAct(dim, dim, activation=nn.Sigmoid, dims=dims)

    def forward(self, maps: Sequence[Float[Tensor, "b _ *_"]]) -> Float[Tensor, "b d *t"]:
        first, *others = (layer(x) for layer, x in zip(self.project, maps))
        enlarged = [layer(x, first.shape[2:]) for layer, x in zip(self.enlarge, others)]
        x = torch.stack([first, *enlarged])  # (scales, B, C, *S)
        scales, batch = x.shape[:2]
        flat = x.flatten(0, 1)
        weights = self.score(flat).view(scales, batch, 1, *first.shape[2:]).softmax(0)
        pool = (weights * x).sum(0)
        modulated = (torch.sigmoid(x) * pool) * (torch.sigmoid(pool) * x)
        if self.training:  # batch statistics are those of one scale at a time
            gates = torch.stack([self.modulate(m) for m in modulated])
        else:
            gates = self.modulate(modulated.flatten(0, 1)).view_as(x)
        return (gates * x).mean(0)
