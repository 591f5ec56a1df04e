"""U-Mamba: nnU-Net's residual U-Net with Mamba layers (Ma et al. 2024, arXiv 2401.04722)."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nearfar.core.cards import Card
from nearfar.core.checkpoints import Checkpoint, count, loaded, read, rename
from nearfar.core.errors import CheckpointError, UserError
from nearfar.core.reading import reading
from nearfar.ops.common.dims import CONVOLUTIONS, check_dims
from nearfar.ops.recurrence.directional_mamba import DirectionalMamba, released_mamba

NORMS = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
PLACEMENTS = ("bottleneck", "encoder")
Size = int | Sequence[int]


def _per_axis(value: Size, dims: int, name: str) -> tuple[int, ...]:
    axes = (value,) * dims if isinstance(value, int) else tuple(value)
    if len(axes) != dims:
        raise ValueError(f"{name} {axes} has {len(axes)} axes; the network has {dims}")
    return axes


class ResidualBlock(nn.Module):
    """act(IN(conv(act(IN(conv(x))))) + side(x)); side is a 1x1 convolution with the stride, or the identity."""

    def __init__(self, in_dim: int, dim: int, kernel: tuple[int, ...], stride: Size = 1, *, project: bool) -> None:
        super().__init__()
        dims = len(kernel)
        conv, padding = CONVOLUTIONS[dims], tuple(k // 2 for k in kernel)
        self.conv1 = conv(in_dim, dim, kernel, stride, padding)
        self.norm1 = NORMS[dims](dim, affine=True)
        self.conv2 = conv(dim, dim, kernel, 1, padding)
        self.norm2 = NORMS[dims](dim, affine=True)
        self.side = conv(in_dim, dim, 1, stride) if project else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(self.norm1(self.conv1(x)), 0.01)
        return F.leaky_relu(self.norm2(self.conv2(y)) + self.side(x), 0.01)


def blocks(in_dim: int, dim: int, kernel: tuple[int, ...], stride: Size, number: int) -> nn.Sequential:
    """A projecting block with the stride, then plain ones."""
    plain = (ResidualBlock(dim, dim, kernel, project=False) for _ in range(number - 1))
    return nn.Sequential(ResidualBlock(in_dim, dim, kernel, stride, project=True), *plain)


class MambaLayer(nn.Module):
    """Mamba(LN(tokens)) without a residual; the tokens are the map's positions, row by row, or its channels.

    Computed in float32, as published. With channels as tokens the width is the number of positions, so the layer takes
    maps of one size alone.
    """

    def __init__(self, dim: int, positions: int | None = None, *, scan: bool = True, d_state: int = 16) -> None:
        super().__init__()
        self.positions = positions
        self.norm = nn.LayerNorm(dim if positions is None else positions, eps=1e-5)
        self.mamba = DirectionalMamba(dim if positions is None else positions, ("row",), d_state=d_state, scan=scan)

    def forward(self, x: Tensor) -> Tensor:
        if self.positions is not None and math.prod(x.shape[2:]) != self.positions:
            raise ValueError(
                f"a map of {tuple(x.shape[2:])} positions; this layer takes maps of {self.positions} positions alone"
            )
        with torch.autocast(x.device.type, enabled=False):
            tokens = x.to(self.norm.weight.dtype).flatten(2)
            if self.positions is None:
                y = self.mamba(self.norm(tokens.mT)).mT
            else:
                y = self.mamba(self.norm(tokens))
        return y.reshape(x.shape).to(x.dtype)


class UMamba(nn.Module):
    """U-Mamba, 2-D and 3-D, isotropic or not.

    Residual encoder with strided blocks; decoder: nearest enlargement, 1x1 convolution, concatenation with the skip,
    residual blocks; a 1x1 head per decoder level. As in the released code the second half of the encoder and the finer
    levels of the decoder have one block whatever `blocks_per_stage` says, and in 2-D the finest decoder level gets no
    skip.

    Args:
        num_classes: classes, background included.
        in_channels: of the image.
        dims: 2 or 3.
        placement: "bottleneck" (U-Mamba_Bot: one Mamba layer after the last stage) or "encoder" (U-Mamba_Enc: after
            every stage in 3-D, every second one, the last included, in 2-D).
        features: channels per stage, finest first.
        kernel_sizes, strides: per stage, a number or one per axis.
        blocks_per_stage, decoder_blocks_per_stage: a number, or one per stage.
        patch_size: size of the images. "encoder" needs it: where a map has no more positions than channels, its Mamba
            layer takes the channels as tokens, and so images of this size alone.
        pad: whether smaller images are filled with zeros to `patch_size` and the logits cut again.
        d_state: states per channel.
        scan: False puts the identity in the scans' place, for ablation.

    `forward(x)`: logits (B, K, *S); in training a list of them, finest first, each half as large as the one before.
    """

    CARD = Card(
        "U-Mamba",
        "2401.04722",
        "Mamba over the voxels, or the channels, of a residual U-Net's stages; sizes of nnU-Net plans",
        9.0e-5,
        weights="released layout",
        networks={"umamba_bot": {"placement": "bottleneck"}, "umamba_enc": {"placement": "encoder"}},
        dims=(2, 3),
    )

    def __init__(
        self,
        num_classes: int = 2,
        in_channels: int = 1,
        dims: int = 3,
        *,
        placement: str = "bottleneck",
        features: Sequence[int] = (32, 64, 128, 256),
        kernel_sizes: Sequence[Size] | int = 3,
        strides: Sequence[Size] | None = None,
        blocks_per_stage: Sequence[int] | int = 2,
        decoder_blocks_per_stage: Sequence[int] | int = 2,
        patch_size: Sequence[int] | None = None,
        pad: bool = False,
        d_state: int = 16,
        scan: bool = True,
    ) -> None:
        super().__init__()
        check_dims(dims)
        if dims not in NORMS:
            raise ValueError(f"dims is {dims}; U-Mamba is 2-D or 3-D")
        if placement not in PLACEMENTS:
            raise ValueError(f"placement is {placement!r}; allowed are {', '.join(PLACEMENTS)}")
        n = len(features)
        if n < 2:
            raise ValueError(f"features is {list(features)}; a U-Net has at least 2 stages")
        strides = [1] + [2] * (n - 1) if strides is None else strides
        kernel_sizes = [kernel_sizes] * n if isinstance(kernel_sizes, int) else kernel_sizes
        encoder = [blocks_per_stage] * n if isinstance(blocks_per_stage, int) else list(blocks_per_stage)
        decoder = decoder_blocks_per_stage
        decoder = [decoder] * (n - 1) if isinstance(decoder, int) else list(decoder)
        given = {"kernel_sizes": kernel_sizes, "strides": strides, "blocks_per_stage": encoder}
        for name, values in given.items():
            if len(values) != n:
                raise ValueError(f"{name} has {len(values)} entries; there are {n} stages")
        if len(decoder) != n - 1:
            raise ValueError(f"decoder_blocks_per_stage has {len(decoder)} entries; there are {n - 1} decoder levels")
        kernels = [_per_axis(k, dims, "kernel size") for k in kernel_sizes]
        strides = [_per_axis(s, dims, "stride") for s in strides]
        encoder = [1 if s >= math.ceil(n / 2) else number for s, number in enumerate(encoder)]
        decoder = [1 if s >= math.ceil((n - 1) / 2 + 0.5) else number for s, number in enumerate(decoder)]
        self.dims, self.strides, self.pad = dims, strides, pad
        self.size_multiple = tuple(math.prod(s[axis] for s in strides) for axis in range(dims))
        self.patch_size = None if patch_size is None else _per_axis(patch_size, dims, "patch size")
        self.stem = blocks(in_channels, features[0], kernels[0], 1, encoder[0])
        widths = [features[0], *features]
        self.stages = nn.ModuleList(
            blocks(widths[s], features[s], kernels[s], strides[s], encoder[s]) for s in range(n)
        )
        self.mamba = nn.ModuleDict()
        if placement == "bottleneck":
            self.mamba[str(n - 1)] = MambaLayer(features[-1], scan=scan, d_state=d_state)
        else:
            if self.patch_size is None:
                raise ValueError(
                    "placement 'encoder' needs patch_size: it decides which layers take channels as tokens"
                )
            size = self.patch_size
            for s in range(n):
                size = tuple(a // b for a, b in zip(size, strides[s]))
                if dims == 3 or (s % 2) ^ (n % 2):
                    tokens = math.prod(size) if math.prod(size) <= features[s] else None
                    self.mamba[str(s)] = MambaLayer(features[s], tokens, scan=scan, d_state=d_state)
        self.fixed = any(layer.positions is not None for layer in self.mamba.values())
        conv = CONVOLUTIONS[dims]
        self.ups, self.decoder, self.heads = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for i, number in enumerate(decoder):
            below, width = features[n - 1 - i], features[n - 2 - i]
            self.ups.append(conv(below, width, 1))
            joined = width if self.skipless(i) else 2 * width
            self.decoder.append(blocks(joined, width, kernels[n - 1 - i], 1, number))
            self.heads.append(conv(width, num_classes, 1))

    def skipless(self, level: int) -> bool:
        """Whether decoder level `level` (coarsest first) gets no skip."""
        return self.dims == 2 and level == len(self.stages) - 2

    def every(self, x: Tensor) -> list[Tensor]:
        """Logits of all decoder levels, finest first."""
        if any(n % m for n, m in zip(x.shape[2:], self.size_multiple)):
            raise ValueError(
                f"the image is {tuple(x.shape[2:])}; its axes must be multiples of {self.size_multiple}, the strides"
            )
        x, skips, logits = self.stem(x), [], []
        for s, stage in enumerate(self.stages):
            x = stage(x)
            if str(s) in self.mamba:
                x = self.mamba[str(s)](x)
            skips.append(x)
        skips.pop()
        for i, (up, level, head) in enumerate(zip(self.ups, self.decoder, self.heads)):
            x = up(F.interpolate(x, scale_factor=[float(s) for s in self.strides[-1 - i]], mode="nearest"))
            x = level(x if self.skipless(i) else torch.cat([x, skips.pop()], 1))
            logits.append(head(x))
        return logits[::-1]

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        size = x.shape[2:]
        if self.fixed and tuple(size) != self.patch_size:
            if not self.pad or any(n > p for n, p in zip(size, self.patch_size)):
                smaller = " (or smaller with pad=True)" if not self.pad else ""
                raise ValueError(
                    f"the image is {tuple(size)}; layers of this network take channels as tokens, which fits images of "
                    f"{self.patch_size}{smaller}: cut windows of that size"
                )
            fill = [(0, p - n) for n, p in zip(size, self.patch_size)]
            x = F.pad(x, [a for pair in reversed(fill) for a in pair])
        logits = self.every(x)
        if self.training:
            if x.shape[2:] != size:
                raise ValueError(f"the image is {tuple(size)}; in training give images of {self.patch_size}")
            return logits
        return logits[0][(..., *(slice(n) for n in size))]

    @classmethod
    def from_plans(
        cls,
        plans: str | Path | Mapping[str, Any],
        num_classes: int,
        in_channels: int,
        configuration: str = "3d_fullres",
        **settings: Any,
    ) -> "UMamba":
        """The network that U-Mamba's trainer builds from nnU-Net v2's `nnUNetPlans.json`.

        Raises UserError for a plan of another version, an unknown configuration or a plan that lacks something.
        """
        name = str(plans) if isinstance(plans, (str, Path)) else "plan"
        return cls(num_classes, in_channels, **(read_plans(plans, configuration, name) | settings))

    @classmethod
    def from_published(
        cls,
        source: Checkpoint,
        strides: Sequence[Size] | None = None,
        patch_size: Sequence[int] | None = None,
        **settings: Any,
    ) -> "UMamba":
        """The network of a released state dict, in eval mode; everything but strides and patch size is read from it.

        A state dict does not tell the strides: None is 1, then 2 at every further stage; a plan's are given here.
        """
        state = published_state(read(source))
        try:
            stages = count(state, r"stages\.(\d+)\.")
            firsts = [state[f"stages.{s}.0.conv1.weight"] for s in range(stages)]
            layers = {int(name.split(".")[1]): t for name, t in state.items() if name.endswith("mamba.in_proj.weight")}
            every_layer = len(layers) > 1 or stages - 1 not in layers
            decoder = [count(state, rf"decoder\.{i}\.(\d+)\.") for i in range(stages - 1)]
            dims, features = firsts[0].dim() - 2, [len(f) for f in firsts]
            found = {
                "num_classes": len(state["heads.0.bias"]),
                "in_channels": state["stem.0.conv1.weight"].shape[1],
                "dims": dims,
                "placement": "encoder" if every_layer else "bottleneck",
                "features": features,
                "kernel_sizes": [tuple(f.shape[2:]) for f in firsts],
                "strides": strides,
                "blocks_per_stage": [count(state, rf"stages\.{s}\.(\d+)\.") for s in range(stages)],
                "decoder_blocks_per_stage": decoder,
                "patch_size": patch_size,
                "d_state": next(t.shape[-1] for name, t in state.items() if name.endswith("scan.A_log")),
            }
        except (KeyError, IndexError, StopIteration) as error:
            raise CheckpointError(f"no U-Mamba: {error} is missing") from error
        if every_layer and patch_size is None:
            raise CheckpointError("a U-Mamba_Enc checkpoint needs patch_size, which it does not hold")
        return loaded(cls(**(found | settings)), state)


OLD_PLAN = (
    "patch_size",
    "UNet_base_num_features",
    "unet_max_num_features",
    "conv_kernel_sizes",
    "pool_op_kernel_sizes",
    "n_conv_per_stage_encoder",
    "n_conv_per_stage_decoder",
)
NEW_PLAN = ("features_per_stage", "kernel_sizes", "strides", "n_conv_per_stage_decoder")


def read_plans(plans: str | Path | Mapping[str, Any], configuration: str, name: str = "plan") -> dict[str, Any]:
    """Settings of `UMamba` from nnU-Net v2's plans, of releases before and after 2.4.

    Raises UserError that says what is missing or unknown.
    """
    if not isinstance(plans, Mapping):
        if Path(plans).suffix == ".pkl":
            raise UserError(f"{name}: a plan of nnU-Net v1, a pickle; give nnUNetPlans.json of nnU-Net v2")
        with reading(name, "cannot be read as JSON"):
            plans = json.loads(Path(plans).read_text(encoding="utf-8"))
    if not isinstance(plans, Mapping) or "configurations" not in plans:
        version = "of nnU-Net v1" if isinstance(plans, Mapping) and "plans_per_stage" in plans else "none of nnU-Net v2"
        raise UserError(f"{name}: the plan is {version}; it needs `configurations`, as nnUNetPlans.json has them")
    with reading(name, "is no plan of nnU-Net v2", "give nnUNetPlans.json as nnU-Net wrote it"):
        return _settings(plans, configuration, name)


def _settings(plans: Mapping[str, Any], configuration: str, name: str) -> dict[str, Any]:
    """Those of one configuration."""
    configurations, plan, seen, wanted = plans["configurations"], {}, [], configuration
    while wanted is not None:
        if wanted not in configurations or wanted in seen:
            raise UserError(f"{name}: no configuration {wanted!r}; there are {', '.join(configurations)}")
        seen.append(wanted)
        plan = {**configurations[wanted], **plan}
        wanted = configurations[wanted].get("inherits_from")
    if before := plan.get("previous_stage"):
        raise UserError(
            f"{name}: configuration {configuration} is the second stage of a cascade: its network also sees the label "
            f"map of the first, {before}, and cascades are not run here; take another of {', '.join(configurations)}"
        )
    architecture = plan.get("architecture", {}).get("arch_kwargs")
    missing = [key for key in (OLD_PLAN if architecture is None else ("patch_size",)) if key not in plan]
    missing += [key for key in (NEW_PLAN if architecture is not None else ()) if key not in architecture]
    if missing:
        raise UserError(f"{name}: configuration {configuration} lacks {', '.join(missing)}")
    if architecture is not None:
        encoder = architecture.get("n_conv_per_stage", architecture.get("n_blocks_per_stage"))
        if encoder is None:
            raise UserError(f"{name}: configuration {configuration} lacks n_conv_per_stage")
        features, kernels, strides = (architecture[key] for key in NEW_PLAN[:3])
        decoder = architecture["n_conv_per_stage_decoder"]
    else:
        kernels, strides = plan["conv_kernel_sizes"], plan["pool_op_kernel_sizes"]
        widest = plan["unet_max_num_features"]
        features = [min(plan["UNet_base_num_features"] * 2**i, widest) for i in range(len(strides))]
        encoder, decoder = plan["n_conv_per_stage_encoder"], plan["n_conv_per_stage_decoder"]
    dims = len(plan["patch_size"])
    if any(len(list(each)) != dims for each in (*kernels, *strides)):
        raise UserError(f"{name}: kernel sizes and strides must have the {dims} axes of patch_size")
    return {
        "dims": dims,
        "features": features,
        "kernel_sizes": kernels,
        "strides": strides,
        "blocks_per_stage": encoder,
        "decoder_blocks_per_stage": decoder,
        "patch_size": plan["patch_size"],
    }


def plan_recipe(path: str | Path, configuration: str, placement: str) -> dict[str, Any]:
    """A training recipe of the app from nnU-Net's plans, with the axes as nearfar has them.

    nnU-Net's arrays have the axes (z, y, x), permuted by the plan's `transpose_forward`; nearfar's are (x, y, z), and
    its 2-D networks see planes of x and y. Raises UserError where a 2-D plan slices along another axis.
    """
    settings = read_plans(path, configuration, str(path))
    plans = json.loads(Path(path).read_text(encoding="utf-8"))
    forward, dims = plans.get("transpose_forward", [0, 1, 2]), settings.pop("dims")
    if dims == 2 and forward[0] != 0:
        raise UserError(f"{path}: its 2-D network sees slices across axis {forward[0]} of (z, y, x), not across z")
    order = sorted(range(dims), key=lambda i: -forward[i + 3 - dims])  # network axes in the order x, y, z
    turn = lambda values: [values[i] for i in order]  # noqa: E731
    for name in ("kernel_sizes", "strides"):
        settings[name] = [turn(each) for each in settings[name]]
    roi = turn(settings.pop("patch_size"))
    if placement == "encoder":
        settings["patch_size"] = roi
    recipe = {
        "network": f"umamba_{ {'bottleneck': 'bot', 'encoder': 'enc'}[placement] }",
        "settings": settings,
        "roi": roi,
    }
    spacing = plans["configurations"][configuration].get("spacing")
    if spacing is not None and len(spacing) == dims == 3:
        recipe["spacing"] = turn(spacing)
    return recipe


VARIANTS: dict[str, dict[str, Any]] = {
    "umamba_bot": {"placement": "bottleneck"},
    "umamba_enc": {"placement": "encoder"},
}
"""The two published placements; all sizes come from nnU-Net's plan of a data set. Dice, Bot / Enc / nnU-Net (recalled,
not verified): Abdomen CT 86.83 / 86.38 / 86.15, Abdomen MR 84.53 / 85.01 / 83.09, endoscopy 65.40 / 63.03 / 62.64.
Code Apache-2.0."""


# ---------------------------------------------------------------------------------------------------------------------
# Published layout

RULES = (
    (r"^(encoder|decoder\.encoder)\.(stem|stages)\.", r"\2."),
    (r"^(encoder|decoder\.encoder)\.mamba_layers\.", "mamba."),
    (r"^decoder\.stages\.", "decoder."),
    (r"^decoder\.upsample_layers\.(\d+)\.conv\.", r"ups.\1."),
    (r"^decoder\.seg_layers\.", "heads."),
    (r"\.conv([12])\.(conv|all_modules\.0)\.", r".conv\1."),
    (r"\.conv([12])\.(norm|all_modules\.1)\.", r".norm\1."),
    (r"\.conv3\.", ".side."),
)


def published_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names for a released U-Mamba. It lists shared tensors several times; the last one counts, as in torch."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        renamed |= rename({name: tensor}, RULES, anywhere=True)
    stages = count(renamed, r"stages\.(\d+)\.")
    return released_mamba(rename(renamed, [(r"^mamba_layer\.", f"mamba.{stages - 1}.")]))
