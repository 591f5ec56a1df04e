"""SegMamba: a U-Net for volumes whose encoder scans in three orders (Xing et al. 2024, arXiv 2401.13560)."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from monai.networks.blocks import UnetOutBlock, UnetrBasicBlock, UnetResBlock, UnetrUpBlock
from torch import Tensor, nn

from nearfar.core.cards import Card
from nearfar.core.checkpoints import Checkpoint, count, loaded, read, rename
from nearfar.core.errors import CheckpointError
from nearfar.ops.common.dims import CONVOLUTIONS, check_dims
from nearfar.ops.convolution.gated_spatial import GatedSpatialConv
from nearfar.ops.recurrence.directional_mamba import DirectionalMamba, released_mamba

PUBLISHED_SLICES = (64, 32, 16, 8)


class TriMambaBlock(nn.Module):
    """x + tri-orientated Mamba of LN(x), over the positions of a map in row-major order."""

    def __init__(self, dim: int, **mamba: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.mamba = DirectionalMamba(dim, "tri", "sum", **mamba)

    def forward(self, x: Tensor, slices: int) -> Tensor:
        y = self.mamba(self.norm(x.flatten(2).mT), slices=slices)
        return x + y.mT.reshape(x.shape)


SLAB = 8
"""Planes that `slabs` convolves at a time."""


def residual(block: UnetResBlock, *parts: Tensor) -> Tensor:
    """MONAI's residual block of maps side by side, which lets go of what it has read: 48 x 128^3 numbers are 400 MB.

    Without gradients the first map is used up where there are several.
    """
    y = slabs(block.conv1.conv, parts)
    side = slabs(block.conv3.conv, parts, parts[0]) if hasattr(block, "conv3") else parts[0]
    del parts
    side = block.norm3(side) if hasattr(block, "norm3") else side
    y = block.lrelu(block.norm1(y))
    y = slabs(block.conv2.conv, (y,))
    y = block.norm2(y)
    y += side
    return block.lrelu(y)


def slabs(conv: Any, parts: Sequence[Tensor], into: Tensor | None = None) -> Tensor:
    """`conv(cat(parts))`; on a CPU without gradients slab by slab, as the library copies what it reads and writes.

    `conv` keeps the size, or is transposed with a stride as large as its kernel; what wraps one (an adapter) reads all
    at once. `into`: may then take the result where it has as many channels, also one of `parts` if the kernel is 1.
    """
    x = parts[0]
    whole = torch.jit.is_tracing() or torch.compiler.is_compiling() or not isinstance(conv, nn.modules.conv._ConvNd)
    if torch.is_grad_enabled() or whole or x.device.type != "cpu" or x.shape[2] <= 2 * SLAB:
        return conv(torch.cat(parts, 1) if len(parts) > 1 else x)
    scale, edge = (conv.stride[0], 0) if conv.transposed else (1, conv.kernel_size[0] // 2)
    fits = into is not None and into.shape[1] == conv.out_channels
    out = into if fits else x.new_empty(len(x), conv.out_channels, *(scale * n for n in x.shape[2:]))
    for a in range(0, x.shape[2], SLAB):
        first = max(0, a - edge)
        piece = torch.cat([part[:, :, first : a + SLAB + edge] for part in parts], 1)
        out[:, :, scale * a : scale * (a + SLAB)] = conv(piece)[:, :, scale * (a - first) :][:, :, : scale * SLAB]
    return out


class SegMamba(nn.Module):
    """SegMamba, 3-D (and 2-D).

    Encoder: 7-wide convolution with stride 2, then four stages of gated spatial convolution and tri-orientated Mamba
    blocks, halved between stages; an instance norm and an MLP on what each hands on. Decoder: MONAI's residual blocks.

    Args:
        num_classes: classes, background included.
        in_channels: of the image.
        dims: axes of the image.
        features: channels per stage.
        depths: Mamba blocks per stage.
        hidden: channels of the deepest decoder block.
        slices: runs that the third scan interleaves, per stage: the published code's are (64, 32, 16, 8), whatever the
            size of the image; None takes the length of the map's first axis, which are these for volumes of 128.
        d_state, d_conv, expand: of the Mamba blocks.
        scan: False puts the identity in the scans' place, for ablation.

    `forward(x)`: (B, C, *S) to logits (B, K, *S). Axes must be multiples of 16; with fixed `slices` these must also
    divide the positions of each stage (the published code mixes up the positions otherwise).
    """

    CARD = Card(
        "SegMamba",
        "2401.13560",
        "Mamba forwards, backwards and between slices in the encoder of a U-Net",
        7.2e-6,
        weights="released layout",
        networks={"segmamba": {}},
        dims=(2, 3),
    )

    def __init__(
        self,
        num_classes: int = 4,
        in_channels: int = 4,
        dims: int = 3,
        *,
        features: Sequence[int] = (48, 96, 192, 384),
        depths: Sequence[int] = (2, 2, 2, 2),
        hidden: int = 768,
        slices: Sequence[int] | None = None,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        scan: bool = True,
    ) -> None:
        super().__init__()
        check_dims(dims)
        if not len(features) == len(depths) == 4:
            raise ValueError(f"features and depths have {len(features)} and {len(depths)} stages; SegMamba has 4")
        if slices is not None and len(slices) != 4:
            raise ValueError(f"slices is {list(slices)}; there are 4 stages")
        conv, f = CONVOLUTIONS[dims], list(features)
        self.slices = None if slices is None else tuple(slices)
        self.size_multiple = 16
        self.downs = nn.ModuleList([conv(in_channels, f[0], 7, 2, 3)])
        self.downs.extend(conv(a, b, 2, 2) for a, b in pairwise(f))
        self.gates = nn.ModuleList(GatedSpatialConv(d, dims=dims) for d in f)
        options = {"d_state": d_state, "d_conv": d_conv, "expand": expand, "scan": scan}
        self.stages = nn.ModuleList(
            nn.ModuleList(TriMambaBlock(d, **options) for _ in range(n)) for d, n in zip(f, depths)
        )
        self.mlps = nn.ModuleList(nn.Sequential(conv(d, 2 * d, 1), nn.GELU(), conv(2 * d, d, 1)) for d in f)
        widths = [in_channels, *f, hidden]
        outs = [f[0], *f[1:], hidden]
        block = {"spatial_dims": dims, "kernel_size": 3, "norm_name": "instance", "res_block": True}
        self.encoder = nn.ModuleList(
            UnetrBasicBlock(in_channels=a, out_channels=b, stride=1, **block) for a, b in zip(widths, outs)
        )
        self.decoder = nn.ModuleList(
            UnetrUpBlock(in_channels=b, out_channels=a, upsample_kernel_size=2, **block)
            for a, b in zip(outs[-2::-1], outs[::-1])
        )
        self.last = UnetrBasicBlock(in_channels=f[0], out_channels=f[0], stride=1, **block)
        self.head = UnetOutBlock(spatial_dims=dims, in_channels=f[0], out_channels=num_classes)

    def features(self, x: Tensor) -> list[Tensor]:
        """The four stages' maps, at 1/2 to 1/16."""
        maps = []
        for i, (down, gate, stage, mlp) in enumerate(zip(self.downs, self.gates, self.stages, self.mlps)):
            x = gate(down(x if i == 0 else F.instance_norm(x, eps=1e-5)))
            slices = x.shape[2] if self.slices is None else self.slices[i]
            if x[0, 0].numel() % slices:
                raise ValueError(
                    f"stage {i} has a map of {tuple(x.shape[2:])}, which {slices} slices do not divide; "
                    "slices=None derives them from the size"
                )
            for block in stage:
                x = block(x, slices)
            maps.append(mlp(F.instance_norm(x, eps=1e-5)))
        return maps

    def forward(self, x: Tensor) -> Tensor:
        if any(n % self.size_multiple for n in x.shape[2:]):
            raise ValueError(f"the image is {tuple(x.shape[2:])}; its axes must be multiples of {self.size_multiple}")
        if max(x.shape[2:]) < 32:
            raise ValueError(f"the image is {tuple(x.shape[2:])}; one axis must be at least 32 for the instance norms")
        skips = [residual(encode.layer, m) for encode, m in zip(self.encoder, [x, *self.features(x)])]
        y = skips.pop()
        for up in self.decoder:
            y = residual(up.conv_block, slabs(up.transp_conv.conv, (y,)), skips.pop())
        return self.head(residual(self.last.layer, y))

    @classmethod
    def from_published(cls, source: Checkpoint, **settings: Any) -> "SegMamba":
        """The network of a released state dict, in eval mode; its sizes are read from it.

        `slices` stays None, which equals the released network's on volumes of 128 positions a side.
        """
        state = published_state(read(source))
        try:
            widths = [len(state[f"gates.{i}.conv1.bias"]) for i in range(4)]
            a_log = state["stages.0.0.mamba.scan.A_log"]
            found = {
                "num_classes": len(state["head.conv.conv.bias"]),
                "in_channels": state["downs.0.weight"].shape[1],
                "dims": state["downs.0.weight"].dim() - 2,
                "features": widths,
                "depths": [count(state, rf"stages\.{i}\.(\d+)\.") for i in range(4)],
                "hidden": len(state["encoder.4.layer.conv1.conv.weight"]),
                "d_state": a_log.shape[-1],
                "d_conv": state["stages.0.0.mamba.conv.weight"].shape[-1],
                "expand": a_log.shape[1] // widths[0],
            }
        except KeyError as error:
            raise CheckpointError(f"no SegMamba: {error} is missing") from error
        return loaded(cls(**(found | settings)), state)


VARIANTS: dict[str, dict[str, Any]] = {"segmamba": {}}
"""The published network: 67,416,196 parameters with 4 channels and 4 classes. BraTS 2023 Dice 93.61 (whole tumour),
92.65 (core), 87.71 (enhancing), recalled and not verified. No licence file of its own was seen."""


# ---------------------------------------------------------------------------------------------------------------------
# Published layout

_GSC = (("^proj\\.", "conv1."), ("^proj2\\.", "conv2."), ("^proj3\\.", "side."), ("^proj4\\.", "join."))

RULES = (
    (r"^vit\.downsample_layers\.(\d)\.[01]\.", r"downs.\1."),
    (r"^vit\.stages\.", "stages."),
    (r"^vit\.gscs\.(\d)\.proj\.", r"gates.\1.conv1."),
    (r"^vit\.gscs\.(\d)\.proj2\.", r"gates.\1.conv2."),
    (r"^vit\.gscs\.(\d)\.proj3\.", r"gates.\1.side."),
    (r"^vit\.gscs\.(\d)\.proj4\.", r"gates.\1.join."),
    (r"^vit\.mlps\.(\d)\.fc1\.", r"mlps.\1.0."),
    (r"^vit\.mlps\.(\d)\.fc2\.", r"mlps.\1.2."),
    (r"^encoder(\d)\.", lambda m: f"encoder.{int(m[1]) - 1}."),
    (r"^decoder([2-5])\.", lambda m: f"decoder.{5 - int(m[1])}."),
    (r"^decoder1\.", "last."),
    (r"^out\.", "head."),
)


def published_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names for a released SegMamba."""
    return released_mamba(rename(state, RULES))  # type: ignore[arg-type]


def published_gsc(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names for a released gated spatial convolution."""
    return rename(state, _GSC)
