"""Squeeze-and-excite blocks of time-delay networks: SE-Res2 and SE-D2, over time or over (layer, time).

Every module takes and returns `(B, C, *S)`, S = (T,) for `dims=1` and (L, T) for `dims=2`; time is the last axis.
An optional mask `(B, T)` is true at the frames that an item really has. With it, a padded item gives at its real
frames exactly what it gives alone: what lies behind the end is zeroed before each convolution that reaches over
frames, as its own zero padding would be, and kept out of every mean. What comes out behind the end means nothing.
In training mode the statistics of batch normalization count the padded frames too.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nearfar.ops.common.dims import BATCH_NORMS, CONVOLUTIONS


def frame_mask(mask: Bool[Tensor, "b t"], like: Float[Tensor, "b c *s"]) -> Tensor:
    """`mask` in the dtype of `like`, `(B, 1, ..., T)`, to be multiplied with it."""
    return mask.to(like.dtype).view(mask.shape[0], *[1] * (like.dim() - 2), mask.shape[1])


def masked_mean(x: Float[Tensor, "b c *s"], mask: Bool[Tensor, "b t"] | None) -> Float[Tensor, "b c *one"]:
    """Mean over all axes behind the channels, over the real frames only; these axes stay with length 1."""
    axes = tuple(range(2, x.dim()))
    if mask is None:
        return x.mean(axes, keepdim=True)
    weight = frame_mask(mask, x)
    rows = x.shape[2:-1].numel()
    return (x * weight).sum(axes, keepdim=True) / (weight.sum(axes, keepdim=True) * rows)


class ConvReLUNorm(nn.Module):
    """`BN(relu(conv(x)))`: the normalization comes last. Zero padding that keeps the size ("same").

    Args:
        in_channels, out_channels: widths.
        kernel_size: odd, one number for all axes or one per axis.
        dilation: on all axes.
        dims: 1 for `(B, C, T)`, 2 for `(B, C, L, T)`.

    Raises:
        ValueError: for an even kernel or another number of axes.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int] = 3,
        dilation: int = 1,
        dims: int = 2,
    ) -> None:
        super().__init__()
        if dims not in (1, 2):
            raise ValueError(f"dims must be 1 or 2, got {dims}")
        kernel = (kernel_size,) * dims if isinstance(kernel_size, int) else tuple(kernel_size)
        if len(kernel) != dims or any(k < 1 or k % 2 == 0 for k in kernel):
            raise ValueError(f"kernel_size must be {dims} odd numbers, got {kernel_size}")
        padding = tuple(dilation * (k - 1) // 2 for k in kernel)
        self.reaches_over_time = kernel[-1] > 1
        self.conv = CONVOLUTIONS[dims](in_channels, out_channels, kernel, padding=padding, dilation=dilation)
        self.norm = BATCH_NORMS[dims](out_channels)

    def forward(self, x: Float[Tensor, "b c *s"], mask: Bool[Tensor, "b t"] | None = None) -> Float[Tensor, "b d *s"]:
        if mask is not None and self.reaches_over_time:
            x = x * frame_mask(mask, x)
        return self.norm(torch.relu(self.conv(x)))


class SqueezeExcite(nn.Module):
    """`x * sigmoid(W2 relu(W1 mean(x) + b1) + b2)`, the mean over all positions (of real frames).

    Hu et al. 2018, section 3. `hidden` is a width of its own (128), not a fraction of the channels.
    The mean looks at the whole utterance, so nothing that holds this block is causal.
    """

    def __init__(self, channels: int, hidden: int = 128) -> None:
        super().__init__()
        self.reduce = nn.Linear(channels, hidden)
        self.expand = nn.Linear(hidden, channels)

    def forward(self, x: Float[Tensor, "b c *s"], mask: Bool[Tensor, "b t"] | None = None) -> Float[Tensor, "b c *s"]:
        mean = masked_mean(x, mask).flatten(1)
        gate = torch.sigmoid(self.expand(torch.relu(self.reduce(mean))))
        return x * gate.view(*gate.shape, *[1] * (x.dim() - 2))


class SERes2Block(nn.Module):
    """SE-Res2 block (Desplanques et al. 2020, ECAPA-TDNN, figure 2), over time or over (layer, time).

    `x + SE(CRB1(Res2(CRB1(x))))` with CRB1 a `ConvReLUNorm` of kernel 1. Res2 (Gao et al. 2019) splits the channels
    into `scale` groups x_1 ... x_s: y_1 = K_1(x_1), y_i = K_i(x_i + y_{i-1}) for 1 < i < s, y_s = x_s; the K are
    `ConvReLUNorm`s of `kernel_size` and `dilation`. (ECAPA-TDNN lets the first group pass and convolves the last;
    the layer-aware TDNN, arXiv 2409.07770, does it as written here.) The chained convolutions reach
    `(scale - 1) * dilation` positions to each side. Cost is linear in the number of positions.

    Args:
        channels: width, a multiple of `scale`.
        kernel_size, dilation: of the convolutions in Res2, on all axes.
        scale: number of groups, at least 2.
        se_channels: hidden width of the squeeze-and-excite.
        dims: 1 for `(B, C, T)`, 2 for `(B, C, L, T)`.

    Raises:
        ValueError: where `channels` cannot be split into `scale` groups.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int | Sequence[int] = 3,
        dilation: int = 1,
        scale: int = 8,
        se_channels: int = 128,
        dims: int = 2,
    ) -> None:
        super().__init__()
        if scale < 2 or channels % scale:
            raise ValueError(f"channels ({channels}) must be a multiple of scale ({scale}), and scale at least 2")
        width = channels // scale
        self.scale = scale
        self.conv_in = ConvReLUNorm(channels, channels, 1, dims=dims)
        self.convs = nn.ModuleList(ConvReLUNorm(width, width, kernel_size, dilation, dims) for _ in range(scale - 1))
        self.conv_out = ConvReLUNorm(channels, channels, 1, dims=dims)
        self.se = SqueezeExcite(channels, se_channels)

    def forward(self, x: Float[Tensor, "b c *s"], mask: Bool[Tensor, "b t"] | None = None) -> Float[Tensor, "b c *s"]:
        *groups, last = self.conv_in(x).chunk(self.scale, 1)
        outputs: list[Tensor] = []
        for group, conv in zip(groups, self.convs):
            outputs.append(conv(group + outputs[-1] if outputs else group, mask))
        return x + self.se(self.conv_out(torch.cat([*outputs, last], 1)), mask)


class SED2Block(nn.Module):
    """SE-D2 block: a multi-dilated block with shrinking width, over time or over (layer, time).

    Stages i = 0 ... depth-1 with dilation 2^i on the widths C (depth - i) / depth: x <- x + CRB_i(x), CRB a
    `ConvReLUNorm`; each but the last stage keeps the first channels of x and emits the last C / depth, the last emits
    what it has. The emitted parts, in order, go through a squeeze-and-excite. There is no residual around the block.
    Layer-aware TDNN (arXiv 2409.07770), after D3Net (Takahashi and Mitsufuji 2021). Cost is linear in the positions.

    Args:
        channels: width C, a multiple of `depth`.
        depth: number of stages.
        kernel_size: of all stages.
        se_channels: hidden width of the squeeze-and-excite.
        dims: 1 for `(B, C, T)`, 2 for `(B, C, L, T)`.

    Raises:
        ValueError: where `channels` is no multiple of `depth`.
    """

    def __init__(
        self,
        channels: int,
        depth: int = 4,
        kernel_size: int | Sequence[int] = 3,
        se_channels: int = 128,
        dims: int = 2,
    ) -> None:
        super().__init__()
        if depth < 1 or channels % depth:
            raise ValueError(f"channels ({channels}) must be a multiple of depth ({depth})")
        self.width = channels // depth
        self.stages = nn.ModuleList(
            ConvReLUNorm(width, width, kernel_size, 2**i, dims)
            for i, width in enumerate(range(channels, 0, -self.width))
        )
        self.se = SqueezeExcite(channels, se_channels)

    def forward(self, x: Float[Tensor, "b c *s"], mask: Bool[Tensor, "b t"] | None = None) -> Float[Tensor, "b c *s"]:
        emitted: list[Tensor] = []
        for stage in self.stages:
            x = x + stage(x, mask)
            if len(emitted) < len(self.stages) - 1:
                x, part = x.split([x.shape[1] - self.width, self.width], 1)
                emitted.append(part)
        return self.se(torch.cat([*emitted, x], 1), mask)
