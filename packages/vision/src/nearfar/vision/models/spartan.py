"""SpaRTAN: a light convolutional network of two-branch spatial mixers and channel mixers that multiply like waves.

"SpaRTAN: Spatial Reinforcement Token-based Aggregation Network for Visual Recognition" (IJCNN 2025, arXiv 2507.10999).
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nearfar.core.cards import Card
from nearfar.core.checkpoints import rename
from nearfar.ops.common.conv_norm_act import ConvNormAct
from nearfar.ops.common.layers import DropPath
from nearfar.ops.convolution.reinforced import ReinforcedMixer
from nearfar.ops.tokens.wave_mixer import WaveMixer
from nearfar.vision.models.pyramid import Backbone, Head, Stage
from nearfar.vision.models.registry import Variant, Weights, register

BARE = [(r"l_conv\.0\.conv\.", "l_conv.0.")]
"""The published name of a convolution that has neither norm nor activation."""


class SpaRTANBlock(nn.Module):
    """x + DP(s1 * S(N1(x))), then x + DP(s2 * C(N2(x))), with N a group norm of one group.

    S is the `ReinforcedMixer`, C the `WaveMixer`. An `early` block has dense 3x3 convolutions in S and depthwise ones
    in C, a late one depthwise ones in S and groups of `expand_ratio` channels in C.
    """

    def __init__(
        self,
        dim: int,
        expand_ratio: int,
        early: bool,
        *,
        eps: float = 1e-6,
        layer_scale: float = 1e-5,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.GroupNorm(1, dim, eps=1e-6), nn.GroupNorm(1, dim, eps=1e-6)
        self.smixer = ReinforcedMixer(dim, dense=early, eps=eps)
        self.cmixer = WaveMixer(dim, expand_ratio, grouped=not early, eps=eps)
        self.scale_1, self.scale_2 = (nn.Parameter(torch.full((dim, 1, 1), layer_scale)) for _ in range(2))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.scale_1 * self.smixer(self.norm_1(x)))
        return x + self.drop_path(self.scale_2 * self.cmixer(self.norm_2(x)))


_SMALL = {"depths": (1, 1, 2, 1), "dims": (16, 32, 48, 64)}


class SpaRTAN(Backbone):
    """Two strided convolutions, stages of `SpaRTANBlock` with 2x2 convolutions of stride 2 between them, classifier.

    Input (B, in_chans, H, W) with H, W >= 32; other sizes are rounded up by the stem and down between stages. The
    first half of the stages has early blocks. Every channel mixer takes the largest of its input channels at each
    position, so rounding may change single positions of the output.

    Args:
        depths, dims, expand_ratios: blocks, channels and expansion of the channel mixer of each stage.
        early_stages: stages of early blocks; None for half of them.
        eps: of the batch norms.
        layer_scale: initial s1 and s2; 1 for short runs on small data.
        drop_path_rate: block i of n drops with i / n times this.
        num_classes, in_chans, drop_rate, global_pool: as in `ConvNeXt`.

    Raises:
        ValueError: lists of different lengths, a width that 8 does not divide, a ratio below 2.
    """

    CARD = Card(
        title="SpaRTAN",
        paper="2507.10999",
        what="near and dilated convolutions; channel pairs turned like complex numbers",
        error=4.5e-07,
        weights="the author's on the hub (a file of your own)",
        small={"spartan_tiny": _SMALL},
        plain={"spartan_tiny": ("convnext_atto", {**_SMALL, "ls_init_value": None})},
    )

    FIRST_CONV = "stem.0.conv"

    def __init__(
        self,
        depths: Sequence[int] = (3, 3, 12, 2),
        dims: Sequence[int] = (32, 64, 128, 256),
        expand_ratios: Sequence[int] = (4, 4, 2, 2),
        num_classes: int = 1000,
        in_chans: int = 3,
        *,
        early_stages: int | None = None,
        eps: float = 1e-6,
        layer_scale: float = 1e-5,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        if not len(depths) == len(dims) == len(expand_ratios):
            raise ValueError(f"depths {depths}, dims {dims} and expand_ratios {expand_ratios} differ in length")
        early = len(depths) // 2 if early_stages is None else early_stages
        unit = partial(ConvNormAct, stride=2, eps=eps)
        self.stem = nn.Sequential(
            unit(in_chans, dims[0] // 2, 3, activation=nn.GELU), unit(dims[0] // 2, dims[0], 3, activation=nn.GELU)
        )
        self.stages, total, done = nn.ModuleList(), sum(depths), 0
        for i, (depth, dim, ratio) in enumerate(zip(depths, dims, expand_ratios, strict=True)):
            # the size of a 2 x 2 kernel without padding: (2 - 1) // 2 = 0
            down = unit(dims[i - 1], dim, 2, activation=nn.SiLU) if i else nn.Identity()
            rates = [drop_path_rate * (done + j) / total for j in range(depth)]
            scales = {"eps": eps, "layer_scale": layer_scale}
            blocks = [SpaRTANBlock(dim, ratio, i < early, drop_path=rate, **scales) for rate in rates]
            self.stages.append(Stage(down, blocks))
            done += depth
        self.head = Head(dims[-1], num_classes, nn.Identity(), global_pool=global_pool, drop_rate=drop_rate)
        self.finish(num_classes, in_chans, dims, [4 * 2**i for i in range(len(dims))])
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.out_channels * module.weight[0, 0].numel() / module.groups
                nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if "norm" in name or "gamma" in name}

    @classmethod
    def published_state(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One flat list `layers` of blocks and downsampling convolutions becomes stages."""
        rules = [(r"conv\.(\d)\.", r"stem.\1."), (r"linear\.(weight|bias)$", r"head.fc.\1")]
        layers = sorted({int(name.split(".")[1]) for name in state if name.startswith("layers.")})
        stage, block = 0, 0
        for layer in layers:
            if f"layers.{layer}.conv.weight" in state:
                stage, block, place = stage + 1, 0, f"stages.{stage + 1}.downsample."
            else:
                place, block = f"stages.{stage}.blocks.{block}.", block + 1
            rules.append((rf"layers\.{layer}\.", place))
        return rename(rename(state, rules), BARE, anywhere=True)

    @classmethod
    def published_settings(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        places = sorted({tuple(name.split(".")[1:4:2]) for name in state if ".blocks." in name})
        stages = max(int(stage) for stage, _ in places) + 1
        mixers = [f"stages.{i}.blocks.0." for i in range(stages)]
        dense = [state[f"{m}smixer.h_conv.conv.weight"].shape[1] > 1 for m in mixers]
        early = dense.index(False) if False in dense else stages
        thetas = [state[f"{m}cmixer.theta.weight"].shape for m in mixers]
        return {
            "depths": [sum(stage == str(i) for stage, _ in places) for i in range(stages)],
            "dims": [theta[1] for theta in thetas],
            "expand_ratios": [theta[0] // theta[1] for theta in thetas],
            "early_stages": None if early == stages // 2 else early,
            "num_classes": len(state.get("head.fc.bias", ())),
            "in_chans": state["stem.0.conv.weight"].shape[1],
        }


SPARTANS = {
    "spartan_tiny": Variant(
        {"depths": (3, 3, 12, 2), "dims": (32, 64, 128, 256), "expand_ratios": (4, 4, 2, 2)},
        3.8,
        1.04,
        (Weights("in1k", 77.7, size=256, crop_pct=1.0),),
    ),
}
"""A second set of weights, `henry-pay/SpaRTAN-S` on the hub, has no configuration; shapes tell."""

register(SpaRTAN, SPARTANS)
