"""Atrous spatial pyramid pooling: one map seen through parallel convolutions of several dilations."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.ops.common.conv_norm_act import ConvNormAct
from nearfar.ops.common.dims import CONVOLUTIONS, check_dims


def _check_rates(rates: Sequence[int]) -> None:
    if not rates or min(rates) < 1:
        raise ValueError(f"rates are {tuple(rates)}; give at least one, each at least 1")


class SummedASPP(nn.Module):
    """y = sum_r (W_r *_r x + b_r): size-3 convolutions of dilation r, with bias, no norm, no activation.

    The classifier of DeepLab v2 (Chen et al. 2018, figure 7); the paper's wide form has rates 6, 12, 18, 24, its
    small one 2, 4, 8, 12 (the reproduction in PyTorch takes 3, 6, 9, 12). One rate of 12 is the LargeFOV classifier
    of v1. Maps (B, in, *S) to (B, out, *S) for 1 to 3 axes; `causal` (1 axis) looks back 2 r positions instead of r to
    either side. Initialized with normal(0, 0.01) and zero bias. Cost: 3^dims in out len(rates) per position.

    Raises:
        ValueError: for no rates, a rate below 1, or dims and causal that do not go together.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        rates: Sequence[int] = (6, 12, 18, 24),
        *,
        dims: int = 2,
        causal: bool = False,
    ) -> None:
        super().__init__()
        check_dims(dims, causal)
        _check_rates(rates)
        self.rates, self.causal = tuple(rates), causal
        self.branches = nn.ModuleList(
            CONVOLUTIONS[dims](in_channels, out_channels, 3, padding=0 if causal else r, dilation=r) for r in rates
        )
        for branch in self.branches:
            nn.init.normal_(branch.weight, std=0.01)
            nn.init.zeros_(branch.bias)

    def forward(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b d *s"]:
        padded = [F.pad(x, (2 * r, 0)) if self.causal else x for r in self.rates]
        y = self.branches[0](padded[0])
        for branch, x_r in zip(self.branches[1:], padded[1:]):
            y = y + branch(x_r)
        return y


class ASPP(nn.Module):
    """Concatenation of a 1x1 branch, one size-3 branch of each dilation in `rates`, and the image's mean.

    Each branch is convolution (no bias), batch norm, ReLU to `out_channels`; the mean goes through a 1x1 one and is
    spread over the grid (resizing a single position bilinearly does just that). Chen et al., "Rethinking Atrous
    Convolution for Semantic Image Segmentation" (2017), section 3.3: rates 6, 12, 18 at output stride 16, twice that
    at 8. Maps (B, in, *S) to (B, (2 + len(rates)) out, *S) for 1 to 3 axes. In training the pooled branch
    needs at least two images in the batch, since its batch norm sees one value per image.

    Raises:
        ValueError: for no rates, a rate below 1 or other dims.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 256,
        rates: Sequence[int] = (6, 12, 18),
        *,
        momentum: float = 0.1,
        dims: int = 2,
    ) -> None:
        super().__init__()
        check_dims(dims)
        _check_rates(rates)
        self.branches = nn.ModuleList([ConvNormAct(in_channels, out_channels, momentum=momentum, dims=dims)])
        for rate in rates:
            self.branches.append(ConvNormAct(in_channels, out_channels, 3, dilation=rate, momentum=momentum, dims=dims))
        self.pool = ConvNormAct(in_channels, out_channels, momentum=momentum, dims=dims)

    def forward(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b d *s"]:
        maps = [branch(x) for branch in self.branches]
        pooled = self.pool(x.mean(tuple(range(2, x.ndim)), keepdim=True))
        return torch.cat([*maps, pooled.expand_as(maps[0])], 1)
