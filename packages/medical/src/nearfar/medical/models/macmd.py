"""MACMD: a decoder with multi-dilated contextual attention and channel mixing on a pyramid encoder.

"MACMD: Multi-dilated Contextual Attention and Channel Mixer Decoding for Medical Image Segmentation", arXiv 2511.05803.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nearfar.core.cards import Card
from nearfar.core.checkpoints import Checkpoint, count, loaded, read, rename
from nearfar.core.errors import CheckpointError
from nearfar.ops.aggregation.attention_pooling import AttentionPooledModulation
from nearfar.ops.common.conv_norm_act import ConvNormAct
from nearfar.ops.convolution.multi_dilated import ChannelGate, ContextGate, EfficientAttention, SpatialGate
from nearfar.ops.tokens.channel_mixer import CrossScaleMix

DILATIONS = (1, 2, 3, 5)


class UpBlock(nn.Module):
    """1x1 conv-BN-ReLU, depthwise 9x9 conv-BN-SiLU, 1x1 conv-BN-ReLU to the new width, bilinear enlargement by 2."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 9) -> None:
        super().__init__()
        layer = partial(ConvNormAct, eps=1e-6)
        self.conv = layer(in_channels, in_channels)
        self.local = layer(in_channels, in_channels, kernel_size, groups=in_channels, activation=nn.SiLU)
        self.project = layer(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.project(self.local(self.conv(x)))
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


class FeatureFusion(nn.Module):
    """1x1(gates(BN(1x1(concatenation)))): `parts` maps of C channels to one of 2 C; channel gate, then spatial gate."""

    def __init__(self, dim: int, out_channels: int | None = None, parts: int = 3, reduction: int = 16) -> None:
        super().__init__()
        out = 2 * dim if out_channels is None else out_channels
        self.fusion = ConvNormAct(parts * dim, out, activation=None)
        self.channel = ChannelGate(out, reduction)
        self.spatial = SpatialGate()
        self.out = nn.Conv2d(out, out, 1, bias=False)

    def forward(self, *maps: Tensor) -> Tensor:
        return self.out(self.spatial(self.channel(self.fusion(torch.cat(maps, 1)))))


class Decoder(nn.Module):
    """Four maps x1 .. x4 (finest first, each half the size of the one before) to (d0, d1, d2) at 1/2, 1, 2 times x1.

    g_i = gate_i(x_i); z = bottleneck(g4); A = pool(g1, g2, g3, z); e3, e2, e1 = mix(x3, x2, x1);
    d3 = up(z); d2 = up([d3, e3]); d1 = up([d2, e2]); d0 = up(fuse(d1, e1, A)). So d0 is the finest.
    """

    def __init__(
        self,
        in_channels: Sequence[int] = (64, 128, 320, 512),
        out_channels: int = 32,
        *,
        kernel_size: int = 9,
        dilations: Sequence[int] = DILATIONS,
        hidden_rate: int = 2,
    ) -> None:
        super().__init__()
        c1, c2, c3, c4 = in_channels
        self.gates = nn.ModuleList(ContextGate(c, dilations=dilations) for c in in_channels)
        self.bottleneck = EfficientAttention(c4, dilations=dilations)
        self.pool = AttentionPooledModulation(in_channels, c1)
        self.mix = CrossScaleMix((c3, c2, c1), c1, hidden_rate)
        widths = ((c4, c3), (2 * c3, c2), (2 * c2, c1), (2 * c1, out_channels))
        self.ups = nn.ModuleList(UpBlock(i, o, kernel_size) for i, o in widths)
        self.fuse = FeatureFusion(c1)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        gated = [gate(x) for gate, x in zip(self.gates, maps)]
        z = self.bottleneck(gated[3])
        pooled = self.pool([*gated[:3], z])
        e3, e2, e1 = self.mix([maps[2], maps[1], maps[0]])
        d3 = self.ups[0](z)
        d2 = self.ups[1](torch.cat([d3, e3], 1))
        d1 = self.ups[2](torch.cat([d2, e2], 1))
        return self.ups[3](self.fuse(d1, e1, pooled)), d1, d2


class MACMD(nn.Module):
    """Pyramid encoder, decoder, three supervised 1x1 heads. 2-D: the channel mix shifts in four directions of a plane.

    Args:
        num_classes: classes, background included; 1 for a binary mask.
        in_channels: 3 go in as they are; any other count goes through a 1x1 convolution, BN and ReLU to 3. A network
            of one channel takes colour pictures too, as the published one does, which passes them by that layer.
        encoder: any timm network whose features come at 1/4, 1/8, 1/16, 1/32 with channels that 4 divides.
        pretrained: load timm's ImageNet weights of the encoder (from the network or timm's cache).
        out_channels: width of the finest decoder map.
        drop_path: of the encoder, where it takes one.
        kernel_size, dilations, hidden_rate: of the decoder's blocks.

    `forward(x)`: (B, C, H, W) to logits (B, K, H, W); in training the list of logits of the three heads, finest
    first, all at input size. H and W must be multiples of 32. (The published network puts sigmoids on its outputs,
    also before its softmax losses: `losses.SegmentationLoss(squash=True)` does that.)
    With PVT-v2-B2 and 9 classes 34,617,576 parameters for the published network's 1-channel input, of which 3,072 in
    layers that nothing reads are left out here.
    """

    CARD = Card(
        "MACMD",
        "2511.05803",
        "multi-dilated gated convolution, attention pooling and a channel mix in the decoder of a PVT v2",
        7.3e-7,
        weights="released layout",
        networks={"macmd": {}},
        dims=(2,),
    )

    size_multiple = 32

    def __init__(
        self,
        num_classes: int = 9,
        in_channels: int = 1,
        encoder: str = "pvt_v2_b2",
        *,
        pretrained: bool = False,
        out_channels: int = 32,
        drop_path: float | None = 0.1,
        kernel_size: int = 9,
        dilations: Sequence[int] = DILATIONS,
        hidden_rate: int = 2,
    ) -> None:
        super().__init__()
        self.encoder_name, self.in_channels = encoder, in_channels
        self.adapter = nn.Identity() if in_channels == 3 else ConvNormAct(in_channels, 3, bias=True)
        options = {} if drop_path is None else {"drop_path_rate": drop_path}
        # timm's own function where there is one: in timm's registry another package may hold the same name
        build = vars(timm.models).get(encoder, partial(timm.create_model, encoder))
        self.encoder = build(pretrained=pretrained, features_only=True, **options)
        info = self.encoder.feature_info
        self.keep = [i for i, r in enumerate(info.reduction()) if r >= 4]
        if [info.reduction()[i] for i in self.keep] != [4, 8, 16, 32]:
            raise ValueError(f"encoder {encoder!r} has features at 1/{info.reduction()}; they must be 1/4 to 1/32")
        channels = [info.channels()[i] for i in self.keep]
        self.decoder = Decoder(
            channels, out_channels, kernel_size=kernel_size, dilations=dilations, hidden_rate=hidden_rate
        )
        self.heads = nn.ModuleList(nn.Conv2d(c, num_classes, 1) for c in (out_channels, channels[0], channels[1]))

    def every(self, x: Tensor) -> list[Tensor]:
        """Logits of the three heads at input size, finest first."""
        if x.shape[-1] % 32 or x.shape[-2] % 32:
            raise ValueError(f"the image is {tuple(x.shape[-2:])}; height and width must be multiples of 32")
        if x.shape[1] not in (self.in_channels, *((3,) if self.in_channels == 1 else ())):
            raise ValueError(f"the image has {x.shape[1]} channels; the network was built for {self.in_channels}")
        maps = self.encoder(x if x.shape[1] == 3 else self.adapter(x))
        decoded = self.decoder([maps[i] for i in self.keep])
        return [
            F.interpolate(head(d), x.shape[2:], mode="bilinear", align_corners=False)
            for head, d in zip(self.heads, decoded)
        ]

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        logits = self.every(x)
        return logits if self.training else logits[0]

    @classmethod
    def from_published(cls, source: Checkpoint, legacy_up_seed: int | None = None, **settings: Any) -> "MACMD":
        """The network of a published state dict, in eval mode; classes, channels and encoder are read from it.

        Published files hold the layer for grey pictures whether they were trained on colour or not: `in_channels=3`
        leaves it out.
        The published code makes the enlarging layers of the attention pool anew in each forward pass, so its
        checkpoint has no weights for them. `legacy_up_seed` imitates that: layers drawn once with this seed, with
        batch statistics in their batch norms. Scores are then only near the published ones. Without a seed such a
        checkpoint is refused.
        """
        state = read(source)
        legacy = not any(".apm.up_blocks." in name for name in state)
        if legacy and legacy_up_seed is None:
            raise CheckpointError(
                "the checkpoint has no weights for the enlarging layers of the attention pool (its code draws them "
                "anew in each forward pass); give legacy_up_seed=0 to draw them once"
            )
        state = published_state(state)
        try:
            adapter = state.get("adapter.conv.weight")
            if settings.get("in_channels") == 3:
                state = {name: value for name, value in state.items() if not name.startswith("adapter.")}
            encoder, dims = recognize_encoder(state)
            found = {
                "num_classes": len(state["heads.0.bias"]),
                "in_channels": 3 if adapter is None else adapter.shape[1],
                "encoder": encoder,
                "out_channels": state["heads.0.weight"].shape[1],
                "kernel_size": state["decoder.ups.0.local.conv.weight"].shape[-1],
                "hidden_rate": len(state["decoder.mix.mix.key_norm.bias"]) // len(state["decoder.mix.norm.bias"]),
            }
        except KeyError as error:
            raise CheckpointError(f"no MACMD on a PVT-v2 or ResNet encoder: {error} is missing or unknown") from error
        model = cls(**(found | settings))
        if not legacy:
            return loaded(model, state)
        warnings.warn(
            "the attention pool's enlarging layers are random: results only come near the published", stacklevel=2
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(legacy_up_seed)
            fresh = AttentionPooledModulation(dims, dims[0]).enlarge
        for layer in fresh:
            layer.norm.track_running_stats = False
            layer.norm.running_mean = layer.norm.running_var = layer.norm.num_batches_tracked = None
        model.decoder.pool.enlarge = fresh
        own = {f"decoder.pool.enlarge.{name}": value for name, value in fresh.state_dict().items()}
        return loaded(model, state | own)


_PVT = {
    "pvt_v2_b0": ((32, 64, 160, 256), (2, 2, 2, 2)),
    "pvt_v2_b1": ((64, 128, 320, 512), (2, 2, 2, 2)),
    "pvt_v2_b2": ((64, 128, 320, 512), (3, 4, 6, 3)),
    "pvt_v2_b3": ((64, 128, 320, 512), (3, 4, 18, 3)),
    "pvt_v2_b4": ((64, 128, 320, 512), (3, 8, 27, 3)),
    "pvt_v2_b5": ((64, 128, 320, 512), (3, 6, 40, 3)),
}

_RESNET = {
    "resnet18": ((64, 128, 256, 512), (2, 2, 2, 2)),
    "resnet34": ((64, 128, 256, 512), (3, 4, 6, 3)),
    "resnet50": ((256, 512, 1024, 2048), (3, 4, 6, 3)),
    "resnet101": ((256, 512, 1024, 2048), (3, 4, 23, 3)),
    "resnet152": ((256, 512, 1024, 2048), (3, 8, 36, 3)),
}

ENCODERS = {(name.partition("_")[0], *shape): name for name, shape in _PVT.items()} | {
    ("resnet", *shape): name for name, shape in _RESNET.items()
}
"""timm encoder by kind, channels and blocks of the stages."""


def recognize_encoder(state: Mapping[str, Tensor]) -> tuple[str, tuple[int, ...]]:
    """The encoder's timm name and the channels of its four maps, from a state dict under our names.

    Raises KeyError where it is none that was published.
    """
    resnet = "encoder.layer1.0.conv1.weight" in state
    place = r"encoder\.layer{}\.(\d+)\." if resnet else r"encoder\.stages_{}\.blocks\.(\d+)\."
    depths = tuple(count(state, place.format(i + resnet)) for i in range(4))
    if resnet:
        last = 3 if "encoder.layer1.0.conv3.weight" in state else 2
        dims = tuple(len(state[f"encoder.layer{i}.0.conv{last}.weight"]) for i in range(1, 5))
    else:
        dims = tuple(len(state[f"encoder.stages_{i}.norm.bias"]) for i in range(4))
    return ENCODERS["resnet" if resnet else "pvt", dims, depths], dims


_DILATED = ((r"dilation_(\d)\.", lambda m: f"convs.{int(m[1]) - 1}."),)

_GATE = (
    (r"\bW_g\.0\.", "context."),
    (r"\bW_g\.1\.", "context_norm."),
    (r"\bpsi\.0\.", "gate."),
    (r"\bpsi\.1\.", "gate_norm."),
    *_DILATED,
)

_BOTTLENECK = (
    (r"\bconv\.conv\.0\.", "convs.0."),
    (r"\bconv\.conv\.3\.", "convs.1."),
    (r"\bconv\.conv\.1\.", "norms.0."),
    (r"\bconv\.conv\.4\.", "norms.1."),
    (r"\bca\.fc\.0\.", "channel.reduce."),
    (r"\bca\.fc\.2\.", "channel.expand."),
    (r"\bsa\.conv\.", "spatial.conv."),
    *_DILATED,
)

_POOL = (
    (r"\bchannel_proj\.(\d)\.0\.", r"project.\1.conv."),
    (r"\bchannel_proj\.(\d)\.1\.", r"project.\1.norm."),
    (r"\bup_blocks\.(\d)\.block\.(\d)\.", lambda m: f"enlarge.{int(m[1]) - 1}.{_ENLARGE[m[2]]}."),
    (r"\battention_proj\.", "score."),
    (r"\bmodulation_proj\.0\.", "modulate.conv."),
    (r"\bmodulation_proj\.1\.", "modulate.norm."),
)

_ENLARGE = {"0": "depthwise", "1": "norm", "3": "pointwise"}

_MIX = (
    (r"\bfinal_projections\.", "widen."),
    (r"\bprojections\.", "project."),
    (r"\bln1\.", "norm."),
    (r"\bchannel\.spatial_mix_([kr])$", r"mix.mix_\1"),
    (r"\bchannel\.", "mix."),
)

_FUSION = (
    (r"\bfusion_conv\.", "fusion.conv."),
    (r"\bbn\.", "fusion.norm."),
    (r"\bchannel_attention\.fc\.0\.", "channel.reduce."),
    (r"\bchannel_attention\.fc\.2\.", "channel.expand."),
    (r"\bspatial_attention\.conv\.", "spatial.conv."),
    (r"\boutput_conv\.", "out."),
)

_UP = ((r"\bconv_local\.", "local."), (r"\bproj\.(conv|norm)\.", r"project.\1."))

_ENCODER = (
    (r"^backbone\.patch_embed1\.", "encoder.patch_embed."),
    (r"^backbone\.patch_embed([234])\.", lambda m: f"encoder.stages_{int(m[1]) - 1}.downsample."),
    (r"^backbone\.block(\d)\.", lambda m: f"encoder.stages_{int(m[1]) - 1}.blocks."),
    (r"^backbone\.norm(\d)\.", lambda m: f"encoder.stages_{int(m[1]) - 1}.norm."),
    (r"\.dwconv\.dwconv\.", ".dwconv."),
    (r"^backbone\.(conv1|bn1|layer\d)\.", r"encoder.\1."),
)

_PARTS = (
    (r"^decoder\.ag([1-4])\.", lambda m: f"decoder.gates.{int(m[1]) - 1}.", _GATE),
    (r"^decoder\.acb\.", "decoder.bottleneck.", _BOTTLENECK),
    (r"^decoder\.apm\.", "decoder.pool.", _POOL),
    (r"^decoder\.ccm\.", "decoder.mix.", _MIX),
    (r"^decoder\.ffb\.", "decoder.fuse.", _FUSION),
    (r"^decoder\.decoder([1-4])\.", lambda m: f"decoder.ups.{int(m[1]) - 1}.", _UP),
    (r"^backbone\.", "backbone.", _ENCODER),
    (r"^conv\.0\.", "adapter.conv.", ()),
    (r"^conv\.1\.", "adapter.norm.", ()),
    (r"^out_head\.", "heads.0.", ()),
    (r"^out_head3\.", "heads.1.", ()),
    (r"^out_head2\.", "heads.2.", ()),
)


def published_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names for the tensors of the published state dict, without what nothing in it reads."""
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        if (name.startswith("decoder.decoder") and ".ln1." in name) or name.startswith("backbone.fc."):
            continue  # nothing reads them
        part = next((part for part in _PARTS if re.match(part[0], name)), None)
        rules = () if part is None else (part[:2], *part[2])
        result |= rename({name: value.flatten() if "spatial_mix" in name else value}, rules, anywhere=True)
    return result
