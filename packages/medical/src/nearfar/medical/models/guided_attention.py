"""Multi-scale self-guided attention for medical image segmentation.

Sinha and Dolz, "Multi-scale self-guided attention for medical image segmentation" (IEEE JBHI 2020): the four maps of a
ResNeXt-101 are brought to 64 channels at 1/4 of the input, fused, and refined twice by position and channel attention
that auto-encoders guide.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nearfar.core.cards import Card
from nearfar.core.checkpoints import Checkpoint, count, loaded, read, rename
from nearfar.core.errors import CheckpointError
from nearfar.ops.attention.guided import GuidedStack, PyramidFusion
from nearfar.ops.common.conv_norm_act import INTERPOLATION
from nearfar.ops.common.dims import CONVOLUTIONS


class GuidedOutputs(NamedTuple):
    """What the network gives in training: for each of the two stacks a list over the scales, finest first."""

    codes: tuple[list[Tensor], list[Tensor]]
    inputs: tuple[list[Tensor], list[Tensor]]
    reconstructions: tuple[list[Tensor], list[Tensor]]
    logits: tuple[list[Tensor], list[Tensor]]


class GuidedAttention(nn.Module):
    """Encoder, pyramid fusion, two guided stacks, a 1x1 classifier per stack and scale.

    Args:
        num_classes: classes, background included (5 for CHAOS: liver, kidneys, spleen).
        in_channels: image channels.
        encoder: any timm network that gives features (2-D), or a module that maps the input to a list of maps, finest
            first, for example `nearfar.medical.models.deeplab.ResNet` with `dims=3`.
        encoder_channels: channels of these maps; needed with a module only.
        dim: channels after the fusion.
        dims: 2 or 3.

    `forward(x)`: (B, C, *S) to logits (B, K, *S), the mean of the second stack's; in training `GuidedOutputs`.
    Sizes must be multiples of 16 with the timm encoders (the finest map's of 4). Memory grows linearly with the
    pixels, time with their square: a map of 64 x 64 positions is attended 8 times.
    The published network has 103,556,063 used parameters; its state dict holds 955,412 more that nothing reads.
    """

    CARD = Card(
        "Multi-scale self-guided attention",
        "1906.02849",
        "position and channel attention at every scale, guided by an autoencoder's code",
        1.8e-5,
        weights="released layout",
        networks={"guided_attention": {}},
        dims=(2, 3),
    )

    def __init__(
        self,
        num_classes: int = 5,
        in_channels: int = 1,
        encoder: str | nn.Module = "resnext101_32x8d",
        encoder_channels: Sequence[int] | None = None,
        dim: int = 64,
        *,
        dims: int = 2,
    ) -> None:
        super().__init__()
        if isinstance(encoder, str):
            if dims != 2:
                raise ValueError(f"encoder {encoder!r} is 2-D; with dims={dims} give a module and encoder_channels")
            encoder = timm.create_model(encoder, in_chans=in_channels, features_only=True)
            keep = [i for i, r in enumerate(encoder.feature_info.reduction()) if r >= 4]
            encoder_channels = [encoder.feature_info.channels()[i] for i in keep]
            self.keep = keep
        elif encoder_channels is None:
            raise ValueError("an encoder that is a module needs encoder_channels")
        else:
            self.keep = list(range(len(encoder_channels)))
        scales = len(encoder_channels)
        self.fusion = PyramidFusion(encoder_channels, dim, dims=dims)
        self.stacks = nn.ModuleList(GuidedStack(dim, scales, dims=dims) for _ in range(2))
        self.predict = nn.ModuleList(
            nn.ModuleList(CONVOLUTIONS[dims](dim, num_classes, 1) for _ in range(scales)) for _ in range(2)
        )
        self.apply(_initialize)  # before the encoder is attached, which may hold pretrained weights
        self.encoder = encoder
        self.mode = INTERPOLATION[dims]

    def every(self, x: Tensor) -> GuidedOutputs:
        """All that the losses look at."""
        maps = self.encoder(x)
        down, fused = self.fusion([maps[i] for i in self.keep])
        first_inputs = [torch.cat([d, fused], 1) for d in down]
        attended, codes1, reconstructed1 = self.stacks[0](first_inputs)
        second_inputs = [torch.cat([d, a * fused], 1) for d, a in zip(down, attended)]
        refined, codes2, reconstructed2 = self.stacks[1](second_inputs)
        logits = tuple(
            [
                F.interpolate(layer(y), x.shape[2:], mode=self.mode, align_corners=False)
                for layer, y in zip(layers, maps)
            ]
            for layers, maps in zip(self.predict, (down, refined))
        )
        return GuidedOutputs((codes1, codes2), (first_inputs, second_inputs), (reconstructed1, reconstructed2), logits)

    def forward(self, x: Tensor) -> Tensor | GuidedOutputs:
        outputs = self.every(x)
        return outputs if self.training else torch.stack(outputs.logits[1]).mean(0)

    @classmethod
    def from_published(cls, source: Checkpoint, **settings: Any) -> "GuidedAttention":
        """The network of a published state dict, in eval mode; classes, channels and encoder are read from it."""
        state = published_state(read(source))
        try:
            width = state["encoder.layer1.0.conv2.weight"].shape[:2]
            found = {
                "num_classes": len(state["predict.0.0.bias"]),
                "in_channels": state["encoder.conv1.weight"].shape[1],
                "encoder": ENCODERS[width[0] // width[1], width[1], count(state, r"encoder\.layer3\.(\d+)\.")],
                "dim": len(state["fusion.down.0.conv.bias"]),
            }
        except KeyError as error:
            raise CheckpointError(f"no multi-scale self-guided attention network: {error} is missing") from error
        return loaded(cls(**(found | settings)), state)


def guided_loss(
    outputs: GuidedOutputs, target: Tensor, code_weight: float = 0.25, reconstruction_weight: float = 0.1
) -> Tensor:
    """Sum of the 8 cross-entropies + 0.25 sum_s MSE(code1_s, code2_s) + 0.1 times the sum of the 8 MSE(I, R).

    target: (B, *S) class indices. No target is detached, as published.
    """
    segmentation = sum(F.cross_entropy(logits, target) for stack in outputs.logits for logits in stack)
    matching = sum(F.mse_loss(a, b) for a, b in zip(*outputs.codes))
    rebuilt = sum(F.mse_loss(r, i) for s in (0, 1) for i, r in zip(outputs.inputs[s], outputs.reconstructions[s]))
    return segmentation + code_weight * matching + reconstruction_weight * rebuilt


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.modules.conv._ConvNd):
        nn.init.xavier_normal_(module.weight)
    elif isinstance(module, nn.modules.batchnorm._BatchNorm):
        nn.init.normal_(module.weight, 1.0, 0.02)


ENCODERS = {(32, 8, 23): "resnext101_32x8d", (32, 4, 6): "resnext50_32x4d"}
"""timm encoder by groups, channels per group and blocks of the third stage."""

_LAYER = (
    (r"attn\.([012])\.", lambda m: f"before.{['conv', 'norm', 'act'][int(m[1])]}."),
    (r"attn\.([456])\.", lambda m: f"after.{['conv', 'norm', 'act'][int(m[1]) - 4]}."),
    (r"attn\.3\.(query|key|value)_conv\.", r"attention.\1."),
    (r"attn\.3\.", "attention."),
)

_SEMANTIC = (
    (r"(enc|dec)(\d)\.(?:en|de)code\.([0134])\.", lambda m: f"{m[1]}oder{m[2]}.{_CODER[m[3]]}."),
    (r"dec(\d)\.decode\.6\.", r"decoder\1.2."),
)

_CODER = {"0": "0.conv", "1": "0.norm", "3": "1.conv", "4": "1.norm"}

RULES = (
    (r"^resnext\.layer0\.0\.", "encoder.conv1."),
    (r"^resnext\.layer0\.1\.", "encoder.bn1."),
    (r"^resnext\.layer1\.1\.(\d+)\.", r"encoder.layer1.\1."),
    (r"^resnext\.layer(\d)\.", r"encoder.layer\1."),
    (r"^down(\d)\.(\d)\.", lambda m: f"fusion.down.{int(m[1]) - 1}.{['conv', 'norm', 'act'][int(m[2])]}."),
    (r"^fuse1\.fuse_attn\.(\d)\.", lambda m: f"fusion.fuse.{int(m[1]) // 3}.{['conv', 'norm', 'act'][int(m[1]) % 3]}."),
    (r"^conv8_(1?)([1-4])\.", lambda m: f"stacks.{len(m[1])}.out.{4 - int(m[2])}."),
    (r"^conv_sem_(\d)_(\d)\.", lambda m: f"stacks.{int(m[1]) - 1}.guide.{4 - int(m[2])}."),
    (r"^pam_attention_(\d)_(\d)\.", lambda m: f"stacks.{int(m[1]) - 1}.position.{int(m[2]) - 1}."),
    (r"^cam_attention_(\d)_(\d)\.", lambda m: f"stacks.{int(m[1]) - 1}.channel.{int(m[2]) - 1}."),
    (r"^semanticModule_(\d)_1\.", lambda m: f"stacks.{int(m[1]) - 1}.semantic."),
    (r"^predict(\d)_2\.", lambda m: f"predict.1.{int(m[1]) - 1}."),
    (r"^predict(\d)\.", lambda m: f"predict.0.{int(m[1]) - 1}."),
    *_LAYER,
    *_SEMANTIC,
)

UNUSED = ("conv6_", "conv7_", "attention1.", "attention2.", "attention3.", "attention4.", "refine")
"""Prefixes of layers in the published state dict that its forward pass never calls."""


def published_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names for the tensors of the published state dict, without the layers that it never uses."""
    return rename({k: v for k, v in state.items() if not k.startswith(UNUSED)}, RULES, anywhere=True)  # type: ignore[arg-type]
