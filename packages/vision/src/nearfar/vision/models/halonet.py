"""HaloNet: a residual network whose spatial convolutions give way to attention of blocks to themselves and a halo.

Vaswani et al., "Scaling Local Self-Attention for Parameter Efficient Visual Backbones" (CVPR 2021). No code or weights
of the paper are out; timm's networks are the accepted reading, and those it trained are here under its names.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import EcaModule, SEModule
from torch import Tensor, nn

from nearfar.core.cards import Card
from nearfar.core.checkpoints import count
from nearfar.ops.attention.halo import HaloAttention
from nearfar.ops.common.layers import DropPath
from nearfar.vision.models.pyramid import Backbone, Head, Stage, drop_path_rates, init_weights
from nearfar.vision.models.registry import Variant, Weights, plain, register

ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU}
STEMS = ("7x7", "tiered", "tiered_strided", "3x3")
CHANNEL_ATTENTION = ("", "se", "eca")
SE_RATIOS = (1 / 16, 1 / 4)
"""Squeezed widths, by share of the channels, that timm's variants have."""


def conv_norm(
    in_chans: int, out_chans: int, kernel_size: int, stride: int = 1, groups: int = 1, act: str = ""
) -> nn.Module:
    """Convolution without bias, batch norm and, if named, activation."""
    conv = nn.Conv2d(in_chans, out_chans, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_chans), *([ACTIVATIONS[act](inplace=True)] if act else []))


class Bottleneck(nn.Module):
    """act(shortcut(x) + DP(N W3 M(act(N W1 x)))), W 1x1 convolutions, N batch norms.

    M is a 3x3 convolution, batch norm, activation and channel attention, if any; or halo attention, batch norm and
    activation. The stride is M's. Where the shape changes the shortcut is a (strided) 1x1 convolution and batch norm,
    or, `inverted`, there is none.
    """

    def __init__(
        self,
        in_chans: int,
        mid_chans: int,
        dim: int,
        stride: int,
        act: str,
        attention: HaloAttention | None,
        *,
        group_size: int = 0,
        channel_attention: str = "",
        se_ratio: float = 1 / 16,
        inverted: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.shortcut: nn.Module | None = nn.Identity()
        if in_chans != dim or stride != 1:
            self.shortcut = None if inverted else conv_norm(in_chans, dim, 1, stride)
        self.conv1 = conv_norm(in_chans, mid_chans, 1, act=act)
        self.self_attn, out_chans = attention, mid_chans
        if attention is None:
            groups = mid_chans // group_size if group_size else 1
            self.conv2 = conv_norm(mid_chans, mid_chans, 3, stride, groups, act)
            squeeze = {"se": lambda: SEModule(mid_chans, rd_ratio=se_ratio), "eca": lambda: EcaModule(mid_chans)}
            self.attn = squeeze[channel_attention]() if channel_attention else nn.Identity()
        else:
            out_chans = attention.num_heads * attention.value_dim
            self.post_attn = nn.Sequential(nn.BatchNorm2d(out_chans), ACTIVATIONS[act](inplace=True))
        self.conv3 = conv_norm(out_chans, dim, 1)
        self.drop_path = DropPath(drop_path)
        self.act = nn.Identity() if inverted else ACTIVATIONS[act](inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        y = self.attn(self.conv2(y)) if self.self_attn is None else self.post_attn(self.self_attn(y))
        y = self.drop_path(self.conv3(y))
        return self.act(y if self.shortcut is None else y + self.shortcut(x))


class HaloNet(Backbone):
    """Convolutional stem, four stages of `Bottleneck` with or without halo attention, pooled linear classifier.

    Input (B, in_chans, H, W) with H, W >= 32. Where the blocks of attention do not divide a map, its last blocks are
    filled up with zeros that take part as those around the map do, which changes nothing inside; the published networks
    refuse such sizes (with blocks of 8 and attention in the last stage, all but multiples of 256), as does `pad=False`.

    Args:
        depths, dims, mids: blocks, channels and bottleneck channels of each stage.
        attention: of each stage, the blocks that have attention, from 0.
        num_heads: of each stage's attention.
        block_size, halo_size: of attention.
        head_dim: channels of a query, for all blocks; by default `qk_ratio` of the bottleneck's over the heads.
        value_ratio: width of the values over the bottleneck's.
        stem: "7x7" (and max pool), "tiered" (three 3x3, and max pool), "tiered_strided" (the last strided instead),
            "3x3" (strided; then the first stage is strided too).
        stem_dim: its channels.
        act: "relu" or "silu".
        channel_attention: "", "se" or "eca", in blocks without halo attention; se_ratio: of "se".
        group_size: channels of a group of their 3x3 convolution, 0 for one group.
        inverted: as in RegNetZ, bottlenecks as many times as wide as a block's input, no activation after the sum, no
            shortcut where the shape changes.
        final_dim: channels of a 1x1 convolution before pooling, 0 for none.
        pad: take maps that blocks do not divide.
        Others as in `ConvNeXt`.
    """

    CARD = Card(
        "HaloNet",
        "2103.12731",
        "attention of blocks to themselves and a halo around them, among convolutions",
        3.1e-7,
        weights="timm's",
        small={
            "nearfar_halonet26t": {
                "depths": (1, 1, 2, 1),
                "dims": (64, 128, 192, 256),
                "mids": (16, 32, 48, 64),
                "attention": ((), (0,), (0, 1), (0,)),
                "num_heads": (4, 4, 4, 4),
                "block_size": 4,
                "stem_dim": 32,
            },
        },
    )

    RULES = (
        (r"stem\.conv(\d)\.conv\.", lambda m: f"stem.{int(m[1]) - 1}.0."),
        (r"stem\.conv(\d)\.bn\.", lambda m: f"stem.{int(m[1]) - 1}.1."),
        (r"stem\.conv\.", "stem.0.0."),
        (r"stem\.bn\.", "stem.0.1."),
        (r"stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
        (r"(stages\.\d+\.blocks\.\d+)\.conv(\d)_(?:1x1|kxk)\.conv\.", r"\1.conv\2.0."),
        (r"(stages\.\d+\.blocks\.\d+)\.conv(\d)_(?:1x1|kxk)\.bn\.", r"\1.conv\2.1."),
        (r"(stages\.\d+\.blocks\.\d+)\.shortcut\.conv\.", r"\1.shortcut.0."),
        (r"(stages\.\d+\.blocks\.\d+)\.shortcut\.bn\.", r"\1.shortcut.1."),
        (r"(stages\.\d+\.blocks\.\d+)\.post_attn\.(?!0\.)", r"\1.post_attn.0."),
        (r"(stages\.\d+\.blocks\.\d+\.self_attn)\.pos_embed\.height_rel$", r"\1.relative.0"),
        (r"(stages\.\d+\.blocks\.\d+\.self_attn)\.pos_embed\.width_rel$", r"\1.relative.1"),
        (r"final_conv\.conv\.", "head.norm.0."),
        (r"final_conv\.bn\.", "head.norm.1."),
    )
    FIRST_CONV = "stem.0.0"
    UNSHAPED = ("block_size", "halo_size", "act")

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 2, 2),
        dims: Sequence[int] = (256, 512, 1024, 2048),
        mids: Sequence[int] = (64, 128, 256, 512),
        attention: Sequence[Sequence[int]] = ((), (), (1,), (0, 1)),
        num_heads: Sequence[int] = (8, 8, 8, 8),
        block_size: int = 8,
        halo_size: int = 2,
        num_classes: int = 1000,
        in_chans: int = 3,
        *,
        head_dim: int | None = None,
        qk_ratio: float = 1.0,
        value_ratio: float = 1.0,
        stem: str = "tiered",
        stem_dim: int = 64,
        act: str = "relu",
        channel_attention: str = "",
        se_ratio: float = 1 / 16,
        group_size: int = 0,
        inverted: bool = False,
        final_dim: int = 0,
        pad: bool = True,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        per_stage = (depths, dims, mids, attention, num_heads)
        per_stage = tuple(tuple(values)[: len(depths)] for values in per_stage)
        if len({len(values) for values in per_stage}) > 1:
            raise ValueError(f"settings of the stages differ in number: {per_stage}")
        for name, value, allowed in (
            ("stem", stem, STEMS),
            ("act", act, tuple(ACTIVATIONS)),
            ("channel_attention", channel_attention, CHANNEL_ATTENTION),
        ):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; allowed are {', '.join(map(repr, allowed))}")
        self.stem = _stem(stem, in_chans, stem_dim, act)
        self.stages = nn.ModuleList()
        before = stem_dim
        for i, rates in enumerate(drop_path_rates(drop_path_rate, depths)):
            blocks = []
            for j, rate in enumerate(rates):
                stride = 2 if j == 0 and (i or stem == "3x3") else 1
                mid = before * mids[i] // dims[i] if inverted else mids[i]
                halo = None
                if j in attention[i]:
                    halo = HaloAttention(
                        mid,
                        round(mid * value_ratio),
                        num_heads[i],
                        head_dim or _divisible(mid * qk_ratio) // num_heads[i],
                        block_size,
                        halo_size,
                        stride=stride,
                        pad=pad,
                    )
                blocks.append(
                    Bottleneck(
                        before,
                        mid,
                        dims[i],
                        stride,
                        act,
                        halo,
                        group_size=group_size,
                        channel_attention=channel_attention,
                        se_ratio=se_ratio,
                        inverted=inverted,
                        drop_path=rate,
                    )
                )
                before = dims[i]
            self.stages.append(Stage(nn.Identity(), blocks))
        final = conv_norm(dims[-1], final_dim, 1, act=act) if final_dim else nn.Identity()
        width = final_dim or dims[-1]
        self.head = Head(width, num_classes, final, norm_first=True, global_pool=global_pool, drop_rate=drop_rate)
        self.finish(num_classes, in_chans, dims, [4 * 2**i for i in range(len(dims))])
        self.head_hidden_size = width
        # what names and shapes do not tell: block and halo, the activation, and how the stem ends
        form = [block_size, halo_size, list(ACTIVATIONS).index(act), STEMS.index(stem)]
        self.register_buffer("form", torch.tensor(form))
        self.apply(_init_weights)
        for module in self.modules():
            if isinstance(module, HaloAttention):
                module.reset_parameters()
            elif isinstance(module, Bottleneck):
                nn.init.zeros_(module.conv3[1].weight)

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if ".relative." in name}

    @classmethod
    def published_settings(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        stages = range(count(state, r"stages\.(\d+)\."))
        depths = [count(state, rf"stages\.{i}\.blocks\.(\d+)\.") for i in stages]
        names = [[f"stages.{i}.blocks.{j}" for j in range(depth)] for i, depth in zip(stages, depths, strict=True)]
        width = lambda name: len(state[f"{name}.weight"])  # noqa: E731
        inner = [name for stage in names for name in stage if f"{name}.self_attn.q.weight" in state]
        outer = [name for stage in names for name in stage if f"{name}.self_attn.q.weight" not in state]
        convs = count(state, r"stem\.(\d+)\.")
        changes = width(f"stem.{convs - 1}.0") != width(f"{names[0][0]}.conv3.0")
        inverted = changes and "stages.0.blocks.0.shortcut.0.weight" not in state
        stem = {7: "7x7", 3: "3x3"}[state["stem.0.0.weight"].shape[-1]]
        if convs == 3:
            stem = "tiered"
        settings = {
            "depths": depths,
            "dims": [width(f"{stage[0]}.conv3.0") for stage in names],
            "mids": [width(f"{stage[-1]}.conv1.0") for stage in names],
            "attention": [[j for j, name in enumerate(stage) if name in inner] for stage in names],
            "num_heads": [next((_heads(state, name) for name in stage if name in inner), 8) for stage in names],
            **_query_settings(state, inner),
            "stem": stem,
            "stem_dim": width(f"stem.{convs - 1}.0"),
            **_channel_settings(state, outer),
            "inverted": inverted,
            "final_dim": width("head.norm.0") if "head.norm.0.weight" in state else 0,
            "num_classes": len(state.get("head.fc.bias", ())),
            "in_chans": state["stem.0.0.weight"].shape[1],
        }
        if inverted and depths[0] == 1:
            raise ValueError("stages.0.blocks.1: one block does not tell how wide an inverted bottleneck is")
        return settings | cls._form(state, settings, inner)

    @classmethod
    def _form(cls, state: Mapping[str, Tensor], settings: Mapping[str, Any], inner: Sequence[str]) -> dict[str, Any]:
        """Block, halo, activation and end of the stem: from the state, else from the variant of this shape."""
        form = state.get("form")
        if form is not None and not form.is_meta:
            block, halo, act, stem = form.tolist()
            found = {"block_size": block, "halo_size": halo, "act": list(ACTIVATIONS)[act]}
            return found | {"stem": STEMS[stem]}
        keys = ("depths", "dims", "attention", "channel_attention", "inverted")
        for variant in HALONETS.values():
            if all(plain(variant.settings[key]) == plain(settings[key]) for key in keys):
                return {key: variant.settings[key] for key in ("block_size", "halo_size", "act", "stem")}
        return dict.fromkeys(("block_size", "halo_size", "act"))

    def fit_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As in `Backbone`; what the settings say beside names and shapes is the model's own."""
        return super().fit_state(state) | {"form": self.form}


def _stem(kind: str, in_chans: int, dim: int, act: str) -> nn.Sequential:
    if kind in ("7x7", "3x3"):
        convs = [conv_norm(in_chans, dim, int(kind[0]), 2, act=act)]
    else:
        widths = (in_chans, 3 * dim // 8, dim // 2, dim)
        strides = (2, 1, 2 if kind == "tiered_strided" else 1)
        convs = [conv_norm(widths[k], widths[k + 1], 3, strides[k], act=act) for k in range(3)]
    layers = [*convs, *([nn.MaxPool2d(3, 2, 1)] if kind in ("7x7", "tiered") else [])]
    return nn.Sequential(*layers)


def _divisible(width: float) -> int:
    """The multiple of 8 next to a width, at most a tenth below it: how timm rounds."""
    rounded = max(8, int(width + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * width else rounded


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        init_weights(module)


def _heads(state: Mapping[str, Tensor], name: str) -> int:
    return len(state[f"{name}.self_attn.q.weight"]) // state[f"{name}.self_attn.relative.0"].shape[1]


def _query_settings(state: Mapping[str, Tensor], inner: Sequence[str]) -> dict[str, Any]:
    """head_dim, qk_ratio and value_ratio that give the widths of queries and values in the blocks with attention."""
    found: dict[str, Any] = {"head_dim": None, "qk_ratio": 1.0, "value_ratio": 1.0}
    if not inner:
        return found
    queries = [len(state[f"{name}.self_attn.q.weight"]) for name in inner]
    mids = [len(state[f"{name}.conv1.0.weight"]) for name in inner]
    heads = [_heads(state, name) for name in inner]
    values = [len(state[f"{n}.self_attn.kv.weight"]) - q for n, q in zip(inner, queries, strict=True)]
    found["value_ratio"] = values[0] / mids[0]
    dims = {q // h for q, h in zip(queries, heads, strict=True)}
    for ratio in (1.0, 0.33):
        if all(_divisible(mid * ratio) // h * h == q for mid, h, q in zip(mids, heads, queries, strict=True)):
            return found | {"qk_ratio": ratio}
    if len(dims) > 1:
        raise ValueError(f"self_attn.q: {queries} channels in bottlenecks of {mids} follow from no setting")
    return found | {"head_dim": dims.pop()}


def _channel_settings(state: Mapping[str, Tensor], outer: Sequence[str]) -> dict[str, Any]:
    """Channel attention and groups of the blocks with 3x3 convolutions."""
    found: dict[str, Any] = {"channel_attention": "", "se_ratio": 1 / 16, "group_size": 0}
    if not outer:
        return found
    mid, group = state[f"{outer[0]}.conv2.0.weight"].shape[:2]
    found["group_size"] = group if group != mid else 0
    if f"{outer[0]}.attn.conv.weight" in state:
        return found | {"channel_attention": "eca"}
    if f"{outer[0]}.attn.fc1.weight" not in state:
        return found
    squeezed = {len(state[f"{name}.conv2.0.weight"]): len(state[f"{name}.attn.fc1.weight"]) for name in outer}
    for ratio in SE_RATIOS:
        if all(max(8, int(mid * ratio + 4) // 8 * 8) == width for mid, width in squeezed.items()):
            return found | {"channel_attention": "se", "se_ratio": ratio}
    raise ValueError(f"attn.fc1: squeezed widths {squeezed} follow from no ratio of {SE_RATIOS}")


def _paper(block: int, halo: int, values: float, expansion: float, depth: int, size: int, final: int, params: float,
           top1: float) -> Variant:  # fmt: skip
    """A network of the paper: bottlenecks of 64 to 512, expanded, attention in every block."""
    mids = (64, 128, 256, 512)
    settings = {
        "depths": (3, 3, depth, 3),
        "dims": tuple(int(mid * expansion) for mid in mids),
        "mids": mids,
        "attention": tuple(tuple(range(n)) for n in (3, 3, depth, 3)),
        "num_heads": (8, 8, 8, 8),
        "block_size": block,
        "halo_size": halo,
        "value_ratio": values,
        "stem": "7x7",
        "act": "relu",
        "channel_attention": "",
        "inverted": False,
        "final_dim": final,
    }
    return Variant(settings, params, None, (Weights("untrained", top1, size=size),))


def _timm(tag: str, top1: float, params: float, gmacs: float | None, crop: float = 0.95, size: int = 256,
          file: str = "", **settings: Any) -> Variant:  # fmt: skip
    base = {
        "depths": (2, 2, 2, 2),
        "dims": (256, 512, 1024, 2048),
        "mids": (64, 128, 256, 512),
        "attention": ((), (), (1,), (0, 1)),
        "num_heads": (8, 8, 8, 8),
        "block_size": 8,
        "halo_size": 3,
        "head_dim": None,
        "qk_ratio": 1.0,
        "value_ratio": 1.0,
        "stem": "tiered",
        "stem_dim": 64,
        "act": "silu",
        "channel_attention": "",
        "se_ratio": 1 / 16,
        "group_size": 0,
        "inverted": False,
        "final_dim": 0,
    }
    url = f"https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-attn-weights/{file}.pth"
    return Variant(base | settings, params, gmacs, (Weights(tag, top1, url, size=size, crop_pct=crop),))


HALONETS = {
    # block, halo, value and output expansion, depth of stage 3, picture, final channels, parameters, recalled accuracy
    "nearfar_halonet_h0": _paper(8, 3, 1.0, 0.5, 7, 256, 0, 5.5, 77.9),
    "nearfar_halonet_h1": _paper(8, 3, 1.0, 1, 10, 256, 0, 8.1, 79.9),
    "nearfar_halonet_h2": _paper(8, 3, 1.0, 1.25, 11, 256, 0, 9.4, 80.4),
    "nearfar_halonet_h3": _paper(10, 3, 1.0, 1.5, 12, 320, 1024, 11.8, 81.9),
    "nearfar_halonet_h4": _paper(12, 2, 1.0, 3, 12, 384, 1280, 19.1, 83.3),
    "nearfar_halonet_h5": _paper(14, 2, 2.5, 2, 23, 448, 1536, 30.7, 84.0),
    "nearfar_halonet_h6": _paper(8, 4, 3.0, 2.75, 24, 512, 1536, 43.4, 84.4),
    "nearfar_halonet_h7": _paper(10, 3, 4.0, 3.5, 26, 600, 2048, 67.4, 84.9),
    "nearfar_halonet26t": _timm(
        "a1h_in1k", 79.13, 12.48, 3.19, file="halonet26t_a1h_256-3083328c", act="relu", halo_size=2
    ),
    "nearfar_sehalonet33ts": _timm(
        "ra2_in1k", 80.98, 13.69, None, 0.94, file="sehalonet33ts_256-87e053f9", depths=(2, 3, 3, 2),
        dims=(256, 512, 1024, 1536), attention=((), (2,), (2,), (0, 1)), stem="tiered_strided", channel_attention="se",
        final_dim=1280,
    ),
    "nearfar_halonet50ts": _timm(
        "a1h_in1k", 81.64, 22.73, 5.30, 0.94, file="halonet50ts_a1h2_256-f3a3daee", depths=(3, 4, 6, 3),
        attention=((), (3,), (1, 3, 5), (1,)), num_heads=(8, 4, 8, 8),
    ),
    "nearfar_eca_halonext26ts": _timm(
        "c1_in1k", 79.52, 10.76, None, 0.94, file="eca_halonext26ts_c_256-06906299", halo_size=2, head_dim=16,
        channel_attention="eca", group_size=16,
    ),
    "nearfar_haloregnetz_b": _timm(
        "ra3_in1k", 81.06, 11.68, None, 0.94, 224, file="haloregnetz_c_raa_256-c8ad7616", depths=(2, 6, 12, 2),
        dims=(48, 96, 192, 288), mids=(144, 288, 576, 864), attention=((), (), (3, 7, 11), (0, 1)), block_size=7,
        halo_size=2, qk_ratio=0.33, stem="3x3", stem_dim=32, channel_attention="se", se_ratio=1 / 4, group_size=16,
        inverted=True, final_dim=1536,
    ),
}  # fmt: skip

register(HaloNet, HALONETS)
