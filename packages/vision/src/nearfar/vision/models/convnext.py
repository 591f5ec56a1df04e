"""ConvNeXt: a plain convolutional network with the layout of a hierarchical transformer.

Liu et al., "A ConvNet for the 2020s" (CVPR 2022). Loads the checkpoints of the official code, timm, transformers and
torchvision, whose numbers are the same under other names; `fuse` gives a faster form of all of them.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from nearfar.core.cards import Card
from nearfar.core.checkpoints import count, ratio, read
from nearfar.ops.common.dims import Conv2d
from nearfar.ops.common.layers import ChannelNorm
from nearfar.ops.convolution.convnext import ConvNeXtBlock
from nearfar.vision.models.pyramid import Backbone, Head, Stage, drop_path_rates, init_weights, twelve_layers
from nearfar.vision.models.registry import Variant, Weights, register


class ConvNeXt(Backbone):
    """Patch stem, stages of `ConvNeXtBlock` with strided convolutions between them, pooled linear classifier.

    Input (B, in_chans, H, W) with H, W >= 32; other sizes than multiples of the stride are floored. One stage and
    `patch_size=16` make the isotropic form.

    Args:
        depths, dims: blocks and channels of each stage.
        num_classes: classes; 0 for pooled features.
        in_chans: input channels.
        patch_size: size and stride of the stem convolution.
        stem_dim: channels between the two strided 3x3 convolutions that take the place of the stem's patches in timm's
            `_ols` variants; None for patches.
        kernel_size, mlp_ratio, layer_scale: see `ConvNeXtBlock`; the kernel may be one for each stage.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0.
        drop_rate: dropout before the classifier.
        global_pool: timm's pooling name; "" for none.
        head_init_scale: factor on the fresh classifier (0.001 in the published fine-tuning).
        head_norm_first: norm before pooling instead of after (timm's `norm_pre`).
        head_norm_eps: eps of the head's norm; transformers' copy uses 1e-12.
        feature_norms: each pyramid level through its own channel norm instead of a norm in the head, as
            dense-prediction checkpoints have it.
    """

    CARD = Card(
        "ConvNeXt",
        "2201.03545",
        "depthwise 7x7 convolution",
        5.1e-7,
        small={"nearfar_convnext_atto": {"depths": (1, 1, 2, 1), "dims": (32, 48, 96, 128)}},
    )

    RULES = (
        # timm, as a feature extractor
        (r"(stem|stages)_(\d+)\.", r"\1.\2."),
        # official, classification and dense prediction
        (r"downsample_layers\.0\.", "stem."),
        (r"downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
        (r"stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
        (r"norm(\d)\.", r"feature_norms.\1."),
        # official, isotropic
        (r"stem\.(weight|bias)$", r"stem.0.\1"),
        (r"blocks\.", "stages.0.blocks."),
        # timm
        (r"(stages\.\d+\.blocks\.\d+)\.conv_dw\.", r"\1.dwconv."),
        (r"(stages\.\d+\.blocks\.\d+)\.mlp\.fc([12])\.", r"\1.pwconv\2."),
        (r"norm_pre\.", "head.norm."),
        # transformers
        (r"(convnext\.)?embeddings\.patch_embeddings\.", "stem.0."),
        (r"(convnext\.)?embeddings\.layernorm\.", "stem.1."),
        (r"(convnext\.)?encoder\.stages\.(\d+)\.downsampling_layer\.", r"stages.\2.downsample."),
        (r"(convnext\.)?encoder\.stages\.(\d+)\.layers\.(\d+)\.", r"stages.\2.blocks.\3."),
        (r"(stages\.\d+\.blocks\.\d+)\.layernorm\.", r"\1.norm."),
        (r"(stages\.\d+\.blocks\.\d+)\.layer_scale_parameter$", r"\1.gamma"),
        (r"convnext\.layernorm\.", "head.norm."),
        (r"layernorm\.", "head.norm."),
        (r"hidden_states_norms\.stage(\d)\.", lambda m: f"feature_norms.{int(m[1]) - 1}."),
        (r"classifier\.(weight|bias)$", r"head.fc.\1"),
        # torchvision
        (r"features\.0\.([01])\.", r"stem.\1."),
        (r"features\.([246])\.([01])\.", lambda m: f"stages.{int(m[1]) // 2}.downsample.{m[2]}."),
        (r"features\.([1357])\.(\d+)\.", lambda m: f"stages.{int(m[1]) // 2}.blocks.{m[2]}."),
        (
            r"(stages\.\d+\.blocks\.\d+)\.block\.([0235])\.",
            lambda m: f"{m[1]}.{ {'0': 'dwconv', '2': 'norm', '3': 'pwconv1', '5': 'pwconv2'}[m[2]] }.",
        ),
        (r"(stages\.\d+\.blocks\.\d+)\.layer_scale$", r"\1.gamma"),
        (r"classifier\.0\.", "head.norm."),
        (r"classifier\.2\.", "head.fc."),
        # official and isotropic heads
        (r"norm\.", "head.norm."),
        (r"head\.(weight|bias)$", r"head.fc.\1"),
    )

    def __init__(
        self,
        depths: Sequence[int] = (3, 3, 9, 3),
        dims: Sequence[int] = (96, 192, 384, 768),
        num_classes: int = 1000,
        in_chans: int = 3,
        *,
        patch_size: int = 4,
        stem_dim: int | None = None,
        kernel_size: int | Sequence[int] = 7,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = 1e-6,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        head_init_scale: float = 1.0,
        head_norm_first: bool = False,
        head_norm_eps: float = 1e-6,
        feature_norms: bool = False,
    ) -> None:
        super().__init__()
        if len(depths) != len(dims):
            raise ValueError(f"depths {tuple(depths)} and dims {tuple(dims)} differ in length")
        if not isinstance(kernel_size, int) and len(kernel_size) != len(dims):
            raise ValueError(f"kernel_size {tuple(kernel_size)} and dims {tuple(dims)} differ in length")
        if stem_dim:
            widths = (in_chans, stem_dim, dims[0])
            patches = [nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(widths)]
        else:
            patches = [nn.Conv2d(in_chans, dims[0], patch_size, stride=patch_size)]
        # the isotropic form has no norm after its stem
        self.stem = nn.Sequential(*patches, *([ChannelNorm(dims[0])] if len(dims) > 1 else ()))
        self.stages = nn.ModuleList()
        rates = drop_path_rates(drop_path_rate, depths)
        kernels = [kernel_size] * len(dims) if isinstance(kernel_size, int) else kernel_size
        for i, (dim, stage_rates) in enumerate(zip(dims, rates, strict=True)):
            down = nn.Sequential(ChannelNorm(dims[i - 1]), Conv2d(dims[i - 1], dim, 2, stride=2)) if i else None
            blocks = [ConvNeXtBlock(dim, kernels[i], mlp_ratio, layer_scale, rate) for rate in stage_rates]
            self.stages.append(Stage(down or nn.Identity(), blocks))
        self.head = Head(
            dims[-1],
            num_classes,
            nn.Identity() if feature_norms else ChannelNorm(dims[-1], eps=head_norm_eps),
            norm_first=head_norm_first,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
        strides = [patch_size * 2**i for i in range(len(dims))]
        self.finish(num_classes, in_chans, dims, strides, [ChannelNorm(dim) for dim in dims] if feature_norms else ())
        self.apply(init_weights)
        for parameter in self.head.fc.parameters():
            parameter.data.mul_(head_init_scale)

    @classmethod
    def last_stride(cls, settings: Mapping[str, Any]) -> int:
        return settings.get("patch_size", 4) * 2 ** (len(settings["depths"]) - 1)

    def dilates(self) -> bool:
        return True

    def group_matcher(self, coarse: bool = False) -> dict[str, Any] | Callable[[str], tuple[int, ...]]:
        """Groups for layer decay; stage 2 of the deep variants three blocks at a time, of others in proportion."""
        if coarse or len(self.stages) != 4:
            return super().group_matcher(coarse)
        depth = len(self.stages[2].blocks)
        return twelve_layers(lambda block: 3 + block * 9 // depth)

    @classmethod
    def from_published(cls, source: str | Path | Mapping[str, Tensor], **settings: Any) -> Self:
        state = read(source)
        if "norm_pre.weight" in state:  # timm, norm before pooling
            settings = {"head_norm_first": True, **settings}
        if {"convnext.layernorm.weight", "layernorm.weight"} & state.keys():  # transformers
            settings = {"head_norm_eps": 1e-12, **settings}
        return super().from_published(state, **settings)

    @classmethod
    def published_settings(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        stages = count(state, r"stages\.(\d+)\.")
        depths = [count(state, rf"stages\.{i}\.blocks\.(\d+)\.") for i in range(stages)]
        first = "stages.0.blocks.0"
        kernels = [state[f"stages.{i}.blocks.0.dwconv.weight"].shape[-1] for i in range(stages)]
        return {
            "depths": depths,
            "dims": [len(state[f"stages.{i}.blocks.0.norm.weight"]) for i in range(stages)],
            "num_classes": len(state.get("head.fc.bias", ())),
            "in_chans": state["stem.0.weight"].shape[1],
            "patch_size": 4 if "stem.2.weight" in state else state["stem.0.weight"].shape[-1],
            "stem_dim": len(state["stem.0.weight"]) if "stem.2.weight" in state else None,
            "kernel_size": kernels if len(set(kernels)) > 1 else kernels[0],
            "mlp_ratio": ratio(len(state[f"{first}.pwconv1.bias"]), len(state[f"{first}.norm.weight"])),
            "layer_scale": 1e-6 if f"{first}.gamma" in state else None,
            "feature_norms": any(name.startswith("feature_norms.") for name in state),
        }


def _official(name: str, *published: tuple[str, float | None, str, int]) -> tuple[Weights, ...]:
    """Weights of the official release: (tag, top-1, file, input size)."""
    return tuple(
        Weights(
            tag,
            top1,
            f"https://dl.fbaipublicfiles.com/convnext/{name}_{file}.pth",
            size=size,
            crop_pct=1.0 if size >= 384 else 0.875,
            crop_mode="squash" if size >= 384 else "center",
            num_classes=21841 if file.startswith("22k_224") else 1000,
        )
        for tag, top1, file, size in published
    )


def _size(
    name: str, depths: Sequence[int], width: int, params: float, gmacs: float, *published: tuple[str, Any, str, int]
) -> Variant:
    settings = {"depths": depths, "dims": tuple(width * 2**i for i in range(4)), "stem_dim": None}
    return Variant(settings, params, gmacs, _official(name, *published))


def _isotropic(depth: int, dim: int, params: float, gmacs: float, top1: float) -> Variant:
    settings = {"depths": (depth,), "dims": (dim,), "patch_size": 16, "layer_scale": None}
    return Variant(settings, params, gmacs, (Weights("fb_in1k", top1),))


def _timm(depths: Sequence[int], width: int, params: float, gmacs: float, stem_dim: int | None = None) -> Variant:
    settings = {"depths": depths, "dims": tuple(width * 2**i for i in range(4)), "stem_dim": stem_dim}
    return Variant(settings, params, gmacs)


# timm has models of the plain names, with the same weights
CONVNEXTS = {
    "nearfar_convnext_tiny": _size(
        "convnext_tiny", (3, 3, 9, 3), 96, 28.59, 4.5,
        ("fb_in1k", 82.1, "1k_224_ema", 224),
        ("fb_in22k", None, "22k_224", 224),
        ("fb_in22k_ft_in1k", 82.9, "22k_1k_224", 224),
        ("fb_in22k_ft_in1k_384", 84.1, "22k_1k_384", 384),
    ),
    "nearfar_convnext_small": _size(
        "convnext_small", (3, 3, 27, 3), 96, 50, 8.7,
        ("fb_in1k", 83.1, "1k_224_ema", 224),
        ("fb_in22k", None, "22k_224", 224),
        ("fb_in22k_ft_in1k", 84.6, "22k_1k_224", 224),
        ("fb_in22k_ft_in1k_384", 85.8, "22k_1k_384", 384),
    ),
    "nearfar_convnext_base": _size(
        "convnext_base", (3, 3, 27, 3), 128, 88.59, 15.4,
        ("fb_in1k", 83.8, "1k_224_ema", 224),
        ("fb_in22k", None, "22k_224", 224),
        ("fb_in22k_ft_in1k", 85.8, "22k_1k_224", 224),
        ("fb_in22k_ft_in1k_384", 86.8, "22k_1k_384", 384),
    ),
    "nearfar_convnext_large": _size(
        "convnext_large", (3, 3, 27, 3), 192, 198, 34.4,
        ("fb_in1k", 84.3, "1k_224_ema", 224),
        ("fb_in22k", None, "22k_224", 224),
        ("fb_in22k_ft_in1k", 86.6, "22k_1k_224", 224),
        ("fb_in22k_ft_in1k_384", 87.5, "22k_1k_384", 384),
    ),
    "nearfar_convnext_xlarge": _size(
        "convnext_xlarge", (3, 3, 27, 3), 256, 350, 60.9,
        ("fb_in22k_ft_in1k", 87.0, "22k_1k_224_ema", 224),
        ("fb_in22k_ft_in1k_384", 87.8, "22k_1k_384_ema", 384),
        ("fb_in22k", None, "22k_224", 224),
    ),
    "nearfar_convnext_isotropic_small": _isotropic(18, 384, 22.3, 4.3, 78.7),
    "nearfar_convnext_isotropic_base": _isotropic(18, 768, 87, 16.9, 82.0),
    "nearfar_convnext_isotropic_large": _isotropic(36, 1024, 306, 59.7, 82.6),
    "nearfar_convnext_atto": _timm((2, 2, 6, 2), 40, 3.7, 0.55),
    "nearfar_convnext_femto": _timm((2, 2, 6, 2), 48, 5.22, 0.79),
    "nearfar_convnext_pico": _timm((2, 2, 6, 2), 64, 9.05, 1.37),
    "nearfar_convnext_nano": _timm((2, 2, 8, 2), 80, 15.59, 2.46),
    "nearfar_convnext_atto_ols": _timm((2, 2, 6, 2), 40, 3.7, 0.58, 24),
    "nearfar_convnext_femto_ols": _timm((2, 2, 6, 2), 48, 5.23, 0.82, 24),
    "nearfar_convnext_pico_ols": _timm((2, 2, 6, 2), 64, 9.06, 1.43, 32),
    "nearfar_convnext_nano_ols": _timm((2, 2, 8, 2), 80, 15.65, 2.65, 80),
}  # fmt: skip

register(ConvNeXt, CONVNEXTS)
