"""LSNet: a light network of LS convolutions, which look at a wide area and aggregate a small one.

Wang et al., "LSNet: See Large, Focus Small" (CVPR 2025). The published code aggregates in a CUDA kernel; here plain
tensor operations do it, on any device.
"""

import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import SEModule
from torch import Tensor, nn

from nearfar.core.cards import Card
from nearfar.core.checkpoints import count
from nearfar.ops.attention.offset_bias import OffsetBiasAttention
from nearfar.ops.common.fused import FusedConv2d
from nearfar.ops.common.layers import linear_map
from nearfar.ops.convolution.lsconv import ConvNorm, LSConv, RepVGGDepthwise
from nearfar.vision.models.pyramid import Backbone, BatchNorm, Head, Stage
from nearfar.vision.models.registry import Variant, Weights, register
from nearfar.vision.tracing import whole


class SqueezeExcite(SEModule):
    """x * sigmoid(W2 ReLU(W1 mean(x))), as matrix products: convolutions of a single position start slowly on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x.mean((2, 3)), *linear_map(self.fc1)).relu()
        y = F.linear(y, *linear_map(self.fc2)).sigmoid()
        return x * y[:, :, None, None]


class FeedForward(nn.Module):
    """x + BN W2 ReLU(BN W1 x), W1: C -> r C and W2: r C -> C 1x1 convolutions; the second norm's weight starts at 0."""

    def __init__(self, dim: int, ratio: float = 2.0) -> None:
        super().__init__()
        self.pw1 = ConvNorm(dim, int(dim * ratio), relu=True)
        self.pw2 = ConvNorm(int(dim * ratio), dim, norm_weight=0.0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.pw1(x)
        return self.pw2(y, add=x) if isinstance(self.pw2, FusedConv2d) else x + self.pw2(y)


class LSBlock(nn.Module):
    """Block `index` of a stage: even, SE(RepVGGDepthwise(x)); odd, LSConv(x), or x + attention(x) in the last stage.

    Then FeedForward(x).
    """

    def __init__(self, dim: int, index: int, attention: OffsetBiasAttention | None = None, **kernels: int) -> None:
        super().__init__()
        self.se = SqueezeExcite(dim, 0.25) if index % 2 == 0 else nn.Identity()
        self.residual = index % 2 == 1 and attention is not None
        self.mixer = RepVGGDepthwise(dim) if index % 2 == 0 else attention or LSConv(dim, **kernels)
        self.ffn = FeedForward(dim)

    def forward(self, x: Tensor) -> Tensor:
        y = self.se(self.mixer(x))
        return self.ffn(x + y if self.residual else y)


class LSNet(Backbone):
    """Three strided stem convolutions, four stages of `LSBlock` at strides 8 to 64, pooled linear classifier.

    Input (B, in_chans, H, W) with H, W >= 64; strided layers round other sizes up. The pyramid has six levels,
    strides 2 to 64: two inside the stem, then the stages.

    Args:
        depths, dims: blocks (0 allowed) and channels of each stage.
        num_classes: classes; 0 for pooled features.
        num_heads, key_dim: of the last stage's attention.
        resolution: side of the grid for which the attention's tables are made: 4 at 224 and 256 pixels, 5 at 288.
            They are resized for other inputs.
        large_kernel, small_kernel, share: see `LSConv`.
        distillation: a second head for a teacher's labels; training then returns both heads' logits, eval the mean.
        drop_rate, global_pool: as in `ConvNeXt`. The published code drops no paths.
    """

    CARD = Card(
        "LSNet",
        "2503.23135",
        "LS convolution: a wide look predicts small kernels; attention at the top",
        4.0e-6,
        small={"lsnet_t": {"depths": (1, 1, 2, 2), "dims": (32, 64, 96, 128), "resolution": 1}},
    )

    RULES = (
        (r"patch_embed\.", "stem."),
        (r"blocks1\.", "stages.0.blocks."),
        (r"blocks([234])\.([01])\.", lambda m: f"stages.{int(m[1]) - 1}.downsample.{m[2]}."),
        (r"blocks([234])\.(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.{int(m[2]) - 2}."),
        (r"(stages\.\d+\.blocks\.\d+\.(?:mixer|ffn))\.m\.", r"\1."),
        (r"(head|head_dist)\.bn\.", r"\1.norm."),
        (r"(head|head_dist)\.l\.", r"\1.fc."),
    )
    IGNORE = (r".*\.attention_bias_idxs$",)
    CLASSIFIERS = ("head.fc", "head_dist.fc")
    FIRST_CONV = "stem.0.c"
    min_size = 64

    def __init__(
        self,
        depths: Sequence[int] = (0, 2, 8, 10),
        dims: Sequence[int] = (64, 128, 256, 384),
        num_classes: int = 1000,
        in_chans: int = 3,
        *,
        num_heads: int = 4,
        key_dim: int = 16,
        resolution: int = 4,
        large_kernel: int = 7,
        small_kernel: int = 3,
        share: int = 8,
        distillation: bool = False,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        if len(depths) != len(dims):
            raise ValueError(f"depths {tuple(depths)} and dims {tuple(dims)} differ in length")
        widths = (in_chans, dims[0] // 4, dims[0] // 2, dims[0])
        convs = [ConvNorm(a, b, 3, stride=2, relu=i < 2) for i, (a, b) in enumerate(pairwise(widths))]
        self.stem = nn.Sequential(convs[0], nn.Identity(), convs[1], nn.Identity(), convs[2])
        self.stages = nn.ModuleList()
        kernels = {"large_kernel": large_kernel, "small_kernel": small_kernel, "share": share}
        for i, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
            down = nn.Identity()
            if i:
                before = dims[i - 1]
                down = nn.Sequential(ConvNorm(before, before, 3, stride=2, depthwise=True), ConvNorm(before, dim))
            last = i == len(dims) - 1
            attention = lambda: OffsetBiasAttention(dim, num_heads, key_dim, resolution)  # noqa: E731, B023
            blocks = [LSBlock(dim, j, attention() if last and j % 2 else None, **kernels) for j in range(depth)]
            self.stages.append(Stage(down, blocks))
        head = lambda: Head(  # noqa: E731
            dims[-1], num_classes, BatchNorm(dims[-1]), global_pool=global_pool, drop_rate=drop_rate
        )
        self.head = head()
        self.head_dist = head() if distillation else None
        strides = [2 * 2**i for i in range(len(dims) + 2)]
        self.finish(num_classes, in_chans, (*widths[1:3], *dims), strides)
        for i, info in enumerate(self.feature_info):
            info["module"] = f"stages.{i - 2}" if i > 1 else f"stem.{2 * i + 1}"

    @classmethod
    def levels(cls, settings: Mapping[str, Any]) -> int:
        return len(settings["depths"]) + 2

    @classmethod
    def last_stride(cls, settings: Mapping[str, Any]) -> int:
        return 2 ** (len(settings["depths"]) + 2)

    @classmethod
    def classifiers(cls, settings: Mapping[str, Any]) -> tuple[str, ...]:
        return cls.CLASSIFIERS if settings.get("distillation") else cls.CLASSIFIERS[:1]

    def forward_pyramid(self, x: Tensor, last: int | None = None) -> list[Tensor]:
        half = whole(self.stem[1], whole(self.stem[0], x))
        if len(self.stem) == 2:
            return [half]
        quarter = whole(self.stem[3], whole(self.stem[2], half))
        if len(self.stem) == 4:
            return [half, quarter]
        levels, x = [half, quarter], whole(self.stem[4], quarter)
        for stage in self.stages[: None if last is None else max(last - 1, 0)]:
            x = stage(x)
            levels.append(x)
        return levels

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        stages = self.stages
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        self.stages = stages[: max(max(take) - 1, 0)]
        self.stem = self.stem[: 2 * max(take) + 2]
        if prune_head:
            self.head_dist = None
        return take

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Logits of a feature map; with distillation, in training, those of both heads."""
        y = whole(self.head, x, pre_logits)
        if self.head_dist is None:
            return y
        other = whole(self.head_dist, x, pre_logits)
        return (y, other) if self.training and not pre_logits else (y + other) / 2

    def reset_heads(self, num_classes: int, global_pool: str | None) -> None:
        super().reset_heads(num_classes, global_pool)
        if self.head_dist is not None:
            self.head_dist.reset(num_classes, global_pool)

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith("attention_biases")}

    @classmethod
    def published_state(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        renamed = super().published_state(state)
        return unfused(renamed) if "stem.0.weight" in renamed else renamed

    @classmethod
    def published_settings(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        stages = range(count(state, r"stages\.(\d+)\."))
        dims = [len(state["stem.4.c.weight"])]
        dims += [len(state[f"stages.{i}.downsample.1.c.weight"]) for i in stages[1:]]
        settings: dict[str, Any] = {
            "depths": [count(state, rf"stages\.{i}\.blocks\.(\d+)\.") for i in stages],
            "dims": dims,
            "num_classes": len(state.get("head.fc.bias", ())),
            "in_chans": state["stem.0.c.weight"].shape[1],
            "distillation": any(name.startswith("head_dist.") for name in state),
        }
        for name, value in state.items():
            if name.endswith("mixer.attention_biases"):
                heads, offsets = value.shape
                projected = len(state[name.replace("attention_biases", "qkv.c.weight")])
                settings |= {"num_heads": heads, "resolution": math.isqrt(offsets)}
                settings["key_dim"] = (projected - dims[-1]) // (2 * heads)
            if name.endswith("lkp.cv2.c.weight"):
                dim = 2 * len(value)
                kernel = _kernel_shape(state, re.sub(r"cv2\.c\.weight$", "", name), dim)
                settings |= {"large_kernel": value.shape[-1], **kernel}
        return settings


def unfused(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state (under our names) whose norms were folded for inference, in the form with norms, which do nothing."""
    layer = (
        r"(stem\.\d|.*\.downsample\.\d|.*\.cv[123]|.*\.pw[12]|.*\.(qkv|dw|proj\.1|mixer)|head|head_dist)\.(weight|bias)"
    )
    split: dict[str, Tensor] = {}
    for name, value in state.items():
        if not re.fullmatch(layer, name):
            split[name] = value
            continue
        place, kind = name.rsplit(".", 1)
        if place.startswith("head"):
            split[f"{place}.fc.{kind}"] = value
            if kind == "weight":
                split |= _neutral_norm(f"{place}.norm", torch.zeros(value.shape[1]))
        elif kind == "bias":
            place += ".conv" * place.endswith("mixer")
            split |= _neutral_norm(f"{place}.bn", value)
        elif place.endswith("mixer"):  # three branches in one, of which the shortcut is no weight
            kernel = value.clone()
            kernel[:, 0, 1, 1] -= 1
            split |= {f"{place}.conv.c.weight": kernel, f"{place}.conv1.c.weight": torch.zeros(len(value), 1, 1, 1)}
            split |= _neutral_norm(f"{place}.conv1.bn", torch.zeros(len(value)))
        else:
            split[f"{place}.c.weight"] = value
    return split


def _neutral_norm(name: str, bias: Tensor) -> dict[str, Tensor]:
    """A batch norm (eps 1e-5) that adds `bias`."""
    ones = torch.ones(len(bias))
    values = {"weight": ones, "bias": bias, "running_mean": 0 * ones, "running_var": ones - 1e-5}
    return {f"{name}.{kind}": value for kind, value in values.items()}


def _kernel_shape(state: Mapping[str, Tensor], prefix: str, dim: int) -> dict[str, int]:
    """Taps and sharing of a kernel predictor, from its shapes; the fewest taps where several would fit."""
    total = len(state[f"{prefix}cv4.bias"])
    for small_kernel in (3, 5, 7):
        kernels, rest = divmod(total, small_kernel**2)
        if not rest and dim % kernels == 0:
            return {"small_kernel": small_kernel, "share": dim // kernels}
    raise ValueError(f"{prefix}cv4.bias of {total}: fits no kernel of 3, 5 or 7")


def _variant(
    dims: Sequence[int], depths: Sequence[int], params: float, gmacs: float, name: str, top1: float, distill: bool
) -> Variant:
    settings = {"depths": depths, "dims": dims, "distillation": distill}
    weights = Weights("in1k", top1, hf_hub=("jameslahm/lsnet", f"{name}.pth"))
    return Variant(settings, params, gmacs, (weights,))


LSNETS = {
    f"{name}{'_distill' if distill else ''}": _variant(
        dims, depths, params[distill], gmacs, f"{name}{'_distill' if distill else ''}", top1[distill], distill
    )
    for name, dims, depths, params, gmacs, top1 in (
        ("lsnet_t", (64, 128, 256, 384), (0, 2, 8, 10), (11.41, 11.80), 0.315, (74.9, 76.1)),
        ("lsnet_s", (96, 192, 320, 448), (1, 2, 8, 10), (16.15, 16.60), 0.5, (77.8, 79.0)),
        ("lsnet_b", (128, 256, 384, 512), (4, 6, 8, 10), (23.31, 23.83), 1.24, (80.3, 81.6)),
    )
    for distill in (False, True)
}

register(LSNet, LSNETS)
