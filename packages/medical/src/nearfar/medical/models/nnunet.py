"""The networks of nnU-Net v2: the plain and the residual-encoder U-Net (Isensee et al. 2021, 2024)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nearfar.core.cards import Card
from nearfar.core.checkpoints import Checkpoint, count, loaded, read, rename
from nearfar.core.errors import CheckpointError
from nearfar.ops.common.dims import CONVOLUTIONS, check_dims

NORMS = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
UPS = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
POOLS = {2: F.avg_pool2d, 3: F.avg_pool3d}
Size = int | Sequence[int]


def norm(dims: int, dim: int, groups: int | None) -> nn.Module:
    """Instance norm of maps of `dims` axes, or with `groups` group norm."""
    return NORMS[dims](dim, affine=True) if groups is None else nn.GroupNorm(groups, dim)


class ConvNorm(nn.Module):
    """act(norm(conv(x))); `act` False leaves the activation, a leaky ReLU of slope 0.01, out."""

    def __init__(
        self,
        in_dim: int,
        dim: int,
        kernel: Sequence[int],
        stride: Size = 1,
        *,
        act: bool = True,
        groups: int | None = None,
    ) -> None:
        super().__init__()
        dims = len(kernel)
        self.conv = CONVOLUTIONS[dims](in_dim, dim, tuple(kernel), stride, tuple((k - 1) // 2 for k in kernel))
        self.norm, self.act = norm(dims, dim, groups), act

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return F.leaky_relu(x, 0.01, inplace=True) if self.act else x


class ResidualBlock(nn.Module):
    """act(norm(conv(act(norm(conv(x))))) + side(x)); side pools by the stride, then a 1x1 where widths differ."""

    def __init__(
        self, in_dim: int, dim: int, kernel: Sequence[int], stride: Sequence[int], *, groups: int | None = None
    ) -> None:
        super().__init__()
        self.stride = tuple(stride)
        self.conv1 = ConvNorm(in_dim, dim, kernel, self.stride, groups=groups)
        self.conv2 = ConvNorm(dim, dim, kernel, act=False, groups=groups)
        self.side: nn.Module = nn.Identity()
        if in_dim != dim:
            dims = len(kernel)
            self.side = nn.Sequential(CONVOLUTIONS[dims](in_dim, dim, 1, bias=False), norm(dims, dim, groups))

    def forward(self, x: Tensor) -> Tensor:
        side = POOLS[len(self.stride)](x, self.stride, self.stride) if max(self.stride) > 1 else x
        return F.leaky_relu(self.conv2(self.conv1(x)) + self.side(side), 0.01, inplace=True)


class NNUNet(nn.Module):
    """nnU-Net's U-Net: strided convolutions down, transposed ones up, instance norms, a head per decoder level.

    Args:
        num_classes: outputs, background included.
        in_channels: of the image.
        dims: 2 or 3.
        residual: residual blocks in the encoder, after a convolution of stride 1 (ResEnc), else plain convolutions.
        features: channels per stage, finest first.
        kernel_sizes, strides: per stage, a number or one per axis; None for strides is 1, then 2.
        blocks_per_stage: convolutions, or residual blocks, of each encoder stage.
        decoder_blocks_per_stage: convolutions of each decoder level, coarsest first.
        norm_groups: channels are normed in so many groups (group norm) instead of each alone, as nnU-Net has it.

    `forward(x)`: logits (B, K, *S); in training a list of them, finest first. Any size: maps are padded at their ends
    to multiples of the strides.
    """

    CARD = Card(
        "nnU-Net",
        "1809.10486",
        "3 x 3 x 3 convolutions in a U-Net, plain or with a residual encoder; sizes by nnU-Net's rules",
        1.0e-6,
        weights="nnU-Net v2's checkpoints",
        networks={"nnunet_plain": {"residual": False}, "nnunet_resenc": {"residual": True}},
        dims=(2, 3),
    )

    def __init__(
        self,
        num_classes: int = 2,
        in_channels: int = 1,
        dims: int = 3,
        *,
        residual: bool = False,
        features: Sequence[int] = (32, 64, 128, 256),
        kernel_sizes: Sequence[Size] | int = 3,
        strides: Sequence[Size] | None = None,
        blocks_per_stage: Sequence[int] | int = 2,
        decoder_blocks_per_stage: Sequence[int] | int = 2,
        norm_groups: int | None = None,
    ) -> None:
        super().__init__()
        check_dims(dims)
        n, groups = len(features), norm_groups
        if dims not in NORMS or n < 2:
            raise ValueError(f"dims is {dims}, features {list(features)}; 2 or 3 axes and 2 stages at least are taken")
        every = {
            "kernel_sizes": [kernel_sizes] * n if isinstance(kernel_sizes, int) else list(kernel_sizes),
            "strides": [1] + [2] * (n - 1) if strides is None else list(strides),
        }
        for name, values in every.items():
            every[name] = [(v,) * dims if isinstance(v, int) else tuple(v) for v in values]
            if len(values) != n or any(len(v) != dims for v in every[name]):
                raise ValueError(f"{name} are {values}; each of {n} stages has {dims} axes")
        encoder = [blocks_per_stage] * n if isinstance(blocks_per_stage, int) else list(blocks_per_stage)
        decoder = decoder_blocks_per_stage
        decoder = [decoder] * (n - 1) if isinstance(decoder, int) else list(decoder)
        if len(encoder) != n or len(decoder) != n - 1 or min(*encoder, *decoder) < 1:
            raise ValueError(f"blocks are {encoder} and {decoder}; {n} and {n - 1} positive numbers are needed")
        kernels, steps = every["kernel_sizes"], every["strides"]
        self.in_channels = in_channels
        self.multiple = tuple(math.prod(step[axis] for step in steps) for axis in range(dims))
        self.stem: nn.Module = (
            ConvNorm(in_channels, features[0], kernels[0], groups=groups) if residual else nn.Identity()
        )
        widths, one = [features[0] if residual else in_channels, *features], (1,) * dims
        self.stages = nn.ModuleList()
        for s, number in enumerate(encoder):
            block: Any = ResidualBlock if residual else ConvNorm
            first = block(widths[s], features[s], kernels[s], steps[s], groups=groups)
            more = (block(features[s], features[s], kernels[s], one, groups=groups) for _ in range(number - 1))
            self.stages.append(nn.Sequential(first, *more))
        self.ups, self.decoder, self.heads = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for i, number in enumerate(decoder):
            below, width, kernel = features[n - 1 - i], features[n - 2 - i], kernels[n - 2 - i]
            self.ups.append(UPS[dims](below, width, steps[n - 1 - i], steps[n - 1 - i]))
            blocks = (ConvNorm(width * (2 if j == 0 else 1), width, kernel, groups=groups) for j in range(number))
            self.decoder.append(nn.Sequential(*blocks))
            self.heads.append(CONVOLUTIONS[dims](width, num_classes, 1))

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        size = x.shape[2:]
        fill = [-n % m for n, m in zip(size, self.multiple)]
        if any(fill):
            x = F.pad(x, [a for f in reversed(fill) for a in (0, f)])
        x, skips, logits = self.stem(x), [], []
        for stage in self.stages:
            x = stage(x)
            skips.append(x)
        skips.pop()
        for up, level, head in zip(self.ups, self.decoder, self.heads):
            x = level(torch.cat([up(x), skips.pop()], 1))
            if self.training or not skips:
                logits.append(head(x))
        if self.training:
            return logits[::-1]
        return logits[-1][(..., *(slice(n) for n in size))]

    @classmethod
    def from_published(cls, source: Checkpoint, **settings: Any) -> "NNUNet":
        """The network of a state dict of nnU-Net v2, in eval mode; all of its sizes are read from the tensors."""
        state = published_state(read(source))
        try:
            n, deep = count(state, r"stages\.(\d+)\."), "stages.0.0.conv1.conv.weight" in state
            inner = "conv1.conv" if deep else "conv"
            firsts = [state[f"stages.{s}.0.{inner}.weight"] for s in range(n)]
            dims = firsts[0].dim() - 2
            found = {
                "num_classes": len(state["heads.0.bias"]),
                "in_channels": (state["stem.conv.weight"] if deep else firsts[0]).shape[1],
                "dims": dims,
                "residual": deep,
                "features": [len(weight) for weight in firsts],
                "kernel_sizes": [tuple(weight.shape[2:]) for weight in firsts],
                "strides": [(1,) * dims, *(tuple(state[f"ups.{n - 2 - s}.weight"].shape[2:]) for s in range(n - 1))],
                "blocks_per_stage": [count(state, rf"stages\.{s}\.(\d+)\.") for s in range(n)],
                "decoder_blocks_per_stage": [count(state, rf"decoder\.{i}\.(\d+)\.") for i in range(n - 1)],
            }
        except (KeyError, IndexError) as error:
            raise CheckpointError(f"no U-Net of nnU-Net: {error} is missing") from error
        return loaded(cls(**(found | settings)), state)


RULES = (
    (r"^decoder\.encoder\.", "encoder."),
    (r"\.all_modules\.0\.", ".conv."),
    (r"\.all_modules\.1\.", ".norm."),
    (r"^encoder\.stem\.convs\.0\.", "stem."),
    (r"^encoder\.stages\.(\d+)\.blocks\.", r"stages.\1."),
    (r"^encoder\.stages\.(\d+)\.0\.convs\.", r"stages.\1."),
    (r"\.skip\.\d\.conv\.", ".side.0."),
    (r"\.skip\.\d\.norm\.", ".side.1."),
    (r"^decoder\.stages\.(\d+)\.convs\.", r"decoder.\1."),
    (r"^decoder\.transpconvs\.", "ups."),
    (r"^decoder\.seg_layers\.", "heads."),
)


def published_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names for a state dict of nnU-Net v2, which lists shared tensors several times; the last one counts."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        renamed |= rename({name: tensor}, RULES, anywhere=True)
    return renamed
