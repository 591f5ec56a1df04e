"""VOLO: a first stage whose cells predict how their neighbours mix, then a vision transformer with class attention.

Yuan et al., "VOLO: Vision Outlooker for Visual Recognition" (2021). Trained with token labels: a second classifier
says what is at every patch. timm holds the same models with the same weights (`volo_*`) for the size they were built
for, and cannot train them so; here any size works and training gives both classifiers' logits.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nearfar.core.cards import Card
from nearfar.core.checkpoints import count, ratio
from nearfar.ops.attention.outlook import OutlookAttention
from nearfar.ops.attention.self_attention import ClassAttention, SelfAttention
from nearfar.vision.models.pyramid import drop_path_rates, linear
from nearfar.vision.models.registry import Variant, Weights, register
from nearfar.vision.models.token_mixing import Box, random_box, swap
from nearfar.vision.models.tokens import Block, Mlp, Positions, State, TokenHead, TokenModel, init_linear, pair
from nearfar.vision.tracing import whole


class Stem(nn.Module):
    """Three convolutions with batch norm and ReLU, the first of stride 2, then patches: stride `patch_size` in all."""

    def __init__(self, in_chans: int, hidden: int, dim: int, patch_size: int = 8) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(3):
            kernel, stride, width = (3, 1, hidden) if i else (7, 2, in_chans)
            conv = nn.Conv2d(width, hidden, kernel, stride, kernel // 2, bias=False)
            layers += [conv, nn.BatchNorm2d(hidden), nn.ReLU(inplace=True)]
        self.conv = nn.Sequential(*layers)
        self.proj = nn.Conv2d(hidden, dim, patch_size // 2, stride=patch_size // 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.conv(x))


class ClassBlock(nn.Module):
    """The class token c becomes c + attn(LN(x)), then c + mlp(LN(c)); the other tokens pass by."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 3.0, qkv_bias: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = ClassAttention(dim, num_heads, qkv_bias=qkv_bias)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        token = x[:, :1] + self.attn(self.norm1(x))
        return torch.cat((token + self.mlp(self.norm2(token)), x[:, 1:]), dim=1)


class VOLO(TokenModel):
    """Outlookers at stride 8, transformer blocks at stride 16, class attention, a classifier of image and of patches.

    Input (B, in_chans, H, W) with sides that are multiples of 16. Logits are those of the class token plus half the
    largest of any patch, class by class. The class token joins after the last block; features give it as it will join.

    Args:
        depths, dims, num_heads: blocks of the four groups, and channels and heads of stride 8 and of stride 16.
        num_classes: classes; 0 for the pooled token.
        img_size: size of the pictures that the position table is made for.
        mlp_ratio: expansion everywhere.
        stem_dim: channels of the stem.
        class_layers: class-attention blocks.
        aux_head: a classifier of every patch (the published `return_dense`).
        token_labels: training gives (class logits, patch logits (B, N, classes), box) for `TokenLabelLoss`, where two
            pictures of the batch change places inside the box; without it training gives logits as in eval mode.
        outlook_kernel, outlook_stride: of outlook attention.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0 over all, but outlookers have none.
        Others as in `ConViT`.
    """

    CARD = Card(
        "VOLO",
        "2106.13112",
        "outlook attention: a cell predicts how its neighbours mix",
        6.4e-7,
        weights="official, timm",
        small={
            "nearfar_volo_d1_224": {"depths": (1, 2, 1), "dims": (48, 96), "num_heads": (2, 4), "stem_dim": 24},
        },
    )

    RULES = (
        (r"network\.0\.", "stages.0."),
        (r"network\.1\.proj\.", "downsample."),
        (r"network\.(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}."),
        (r"post_network\.", "class_blocks."),
        (r"head\.(weight|bias)$", r"head.fc.\1"),
        (r"pos_embed$", "pos_embed.grid"),
    )
    UNSHAPED = ("num_heads",)
    CLASSIFIERS = ("head.fc", "aux_head")
    FIRST_CONV = "patch_embed.conv.0"
    LAYERS = "stages"
    default_indices = (0, -1)

    def __init__(
        self,
        depths: Sequence[int] = (4, 4, 8, 2),
        dims: Sequence[int] = (192, 384),
        num_heads: Sequence[int] = (6, 12),
        num_classes: int = 1000,
        in_chans: int = 3,
        *,
        img_size: int | tuple[int, int] = 224,
        mlp_ratio: float = 3.0,
        stem_dim: int = 64,
        class_layers: int = 2,
        aux_head: bool = True,
        token_labels: bool = False,
        outlook_kernel: int = 3,
        outlook_stride: int = 2,
        qkv_bias: bool = False,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        global_pool: str = "token",
        dynamic_img_pad: bool = False,
    ) -> None:
        super().__init__()
        if len(depths) < 2 or len(dims) != 2 or len(num_heads) != 2:
            raise ValueError(
                f"depths {tuple(depths)} must be of two groups or more, dims {tuple(dims)} and num_heads "
                f"{tuple(num_heads)} of the two strides"
            )
        if token_labels and not aux_head:
            raise ValueError("token_labels=True needs aux_head=True, the classifier of patches")
        self.patch_embed = Stem(in_chans, stem_dim, dims[0])
        self.downsample = nn.Conv2d(dims[0], dims[1], 2, stride=2)
        self.pos_embed = Positions(dims[1], tuple(n // 16 for n in pair(img_size)), antialias=False)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dims[1]))
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.stages = nn.ModuleList()
        for i, rates in enumerate(drop_path_rates(drop_path_rate, depths)):
            dim, heads = dims[i > 0], num_heads[i > 0]
            blocks = nn.ModuleList()
            for rate in rates:
                if i == 0:
                    attn = OutlookAttention(dim, heads, outlook_kernel, outlook_stride, bias=qkv_bias)
                    blocks.append(Block(dim, attn, mlp_ratio, eps=1e-5, on_grid=True))
                else:
                    attn = SelfAttention(dim, heads, qkv_bias=qkv_bias)
                    blocks.append(Block(dim, attn, mlp_ratio, rate, eps=1e-5))
            self.stages.append(blocks)
        self.class_blocks = nn.ModuleList(
            ClassBlock(dims[1], num_heads[1], mlp_ratio, qkv_bias) for _ in range(class_layers)
        )
        self.norm = nn.LayerNorm(dims[1])
        self.head = TokenHead(
            dims[1], num_classes, global_pool=global_pool, drop_rate=drop_rate, num_heads=num_heads[1]
        )
        self.aux_head = linear(dims[1], num_classes) if aux_head else None
        self.token_labels, self.dynamic_img_pad = token_labels, dynamic_img_pad
        levels = len(depths)
        self.finish(
            num_classes, in_chans, img_size, 16, [dims[i > 0] for i in range(levels)], [8, *[16] * (levels - 1)]
        )
        self.apply(init_linear)

    @classmethod
    def last_stride(cls, settings: Mapping[str, Any]) -> int:
        return 16

    @classmethod
    def classifiers(cls, settings: Mapping[str, Any]) -> tuple[str, ...]:
        return cls.CLASSIFIERS if settings.get("aux_head", True) else cls.CLASSIFIERS[:1]

    def embed(self, x: Tensor) -> State:
        return self.flat(whole(self.patch_embed, x))

    def flat(self, x: Tensor) -> State:
        return x.flatten(2).mT, x.shape[-2:]

    def apply_block(self, index: int, state: State) -> State:
        tokens, size = state
        if index == 1:
            tokens, size = self.flat(self.downsample(tokens.mT.unflatten(2, size)))
            tokens = whole(self.pos_embed, tokens, size)
        for block in self.stages[index]:
            tokens = self.run(block, tokens, size)
        return tokens, size

    def split(self, tokens: Tensor, index: int) -> tuple[Tensor, Tensor]:
        width = tokens.shape[2]
        token = self.cls_token
        if token is None or width != self.num_features:
            token = tokens.new_zeros(1, 0, width)
        return token.expand(tokens.shape[0], -1, -1), tokens

    def prefix_at(self, index: int) -> int:
        return 0

    def conclude(self, tokens: Tensor) -> Tensor:
        """The class token before the patches, after class attention and the final norm."""
        tokens = self.with_prefix(tokens)
        for block in self.class_blocks:
            tokens = self.run(block, tokens)
        return self.norm(tokens)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        hidden = whole(self.head, x, True)
        if pre_logits:
            return hidden
        logits = self.head.fc(hidden)
        if self.aux_head is None or not self.num_classes or not self.head.global_pool:
            return logits
        return logits + 0.5 * self.aux_head(x[:, 1:]).amax(1)

    def forward_dense(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the features' class token, and of every patch in row-major order."""
        return self.head(x), self.aux_head(x[:, 1:])

    def forward(self, x: Tensor) -> Any:
        """Logits; in training with `token_labels`, what `forward_train` gives."""
        return self.forward_train(x) if self.training and self.token_labels else super().forward(x)

    def forward_train(self, x: Tensor, box: Box | None = None) -> tuple[Tensor, Tensor, Box]:
        """Logits of the class, (B, K), and of every patch, (B, N, K), and the box in which pictures changed places.

        The box counts in patches of stride 16; by default it is random. Inside it every picture has, from the stem on,
        what the picture at the other end of the batch has there; the patches' logits are put back.
        """
        tokens, size = self.embed(self.prepare(x))
        grid = (size[0] // 2, size[1] // 2)
        box = random_box(*grid) if box is None else box
        mixed = swap(tokens.unflatten(1, size), [2 * n for n in box]).flatten(1, 2)
        features = self.conclude(self.forward_blocks((mixed, size))[0])
        logits, dense = self.forward_dense(features)
        return logits, swap(dense.unflatten(1, grid), box).flatten(1, 2), box

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_head:
            self.class_blocks, self.aux_head = nn.ModuleList(), None
        if len(self.stages) == 1:
            self.downsample, self.pos_embed = None, None
        return take

    def reset_heads(self, num_classes: int, global_pool: str | None) -> None:
        super().reset_heads(num_classes, global_pool)
        if self.aux_head is not None:
            self.aux_head = linear(self.num_features, num_classes).to(self.cls_token)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups for layer decay: stem, every block (or group), class blocks, norm and heads."""
        blocks = [(r"^stages\.(\d+)", None)] if coarse else [(r"^stages\.(\d+)\.(\d+)", None)]
        down = (r"^(?:downsample|pos_embed)", (0,) if coarse else (0, 99999))
        last = [(r"^class_blocks\.(\d+)", (99998,)), (r"^cls_token", (99998,)), (r"^norm", (99999,))]
        return {"stem": r"^patch_embed", "blocks": [*blocks, down, *last]}

    @classmethod
    def published_settings(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        depths = [count(state, rf"stages\.{i}\.(\d+)\.") for i in range(count(state, r"stages\.(\d+)\."))]
        hidden, in_chans, *_ = state["patch_embed.conv.0.weight"].shape
        dims = [len(state[f"stages.{i}.0.norm1.weight"]) for i in (0, 1)]
        _, height, width, _ = state["pos_embed.grid"].shape
        heads = {v.settings["dims"]: v.settings["num_heads"] for v in VOLOS.values()}
        return {
            "depths": depths,
            "dims": dims,
            "num_heads": heads.get(tuple(dims)),
            "num_classes": len(state.get("head.fc.bias", ())),
            "in_chans": in_chans,
            "img_size": 16 * height if height == width else (16 * height, 16 * width),
            "mlp_ratio": ratio(len(state["stages.0.0.mlp.fc1.bias"]), dims[0]),
            "stem_dim": hidden,
            "class_layers": count(state, r"class_blocks\.(\d+)\."),
            "aux_head": "aux_head.weight" in state,
            "qkv_bias": "stages.0.0.attn.v.bias" in state,
        }


def _size(
    number: int, size: int, top1: float, file: str, params: float, gmacs: float | None, crop: float
) -> tuple[str, Variant]:
    depths, dims, heads = {
        1: ((4, 4, 8, 2), (192, 384), (6, 12)),
        2: ((6, 4, 10, 4), (256, 512), (8, 16)),
        3: ((8, 8, 16, 4), (256, 512), (8, 16)),
        4: ((8, 8, 16, 4), (384, 768), (12, 16)),
        5: ((12, 12, 20, 4), (384, 768), (12, 16)),
    }[number]
    five = number == 5
    settings = {
        "depths": depths,
        "dims": dims,
        "num_heads": heads,
        "img_size": size,
        "mlp_ratio": 4.0 if five else 3.0,
        "stem_dim": 128 if five else 64,
    }
    weights = Weights(
        "sail_in1k",
        top1,
        f"https://github.com/sail-sg/volo/releases/download/volo_1/d{number}_{size}_{file}.pth.tar",
        (f"timm/volo_d{number}_{size}.sail_in1k", "model.safetensors"),
        size=size,
        crop_pct=crop,
    )
    return f"nearfar_volo_d{number}_{size}", Variant(settings, params, gmacs, (weights,))


# timm has models of the plain names, with the same weights
VOLOS = dict(
    (
        _size(1, 224, 84.2, "84.2", 26.63, 6.8, 0.96),
        _size(1, 384, 85.2, "85.2", 26.78, None, 1.0),
        _size(2, 224, 85.2, "85.2", 58.68, 14.1, 0.96),
        _size(2, 384, 86.0, "86.0", 58.87, None, 1.0),
        _size(3, 224, 85.4, "85.4", 86.33, 20.6, 0.96),
        _size(3, 448, 86.3, "86.3", 86.63, None, 1.0),
        _size(4, 224, 85.7, "85.7", 192.96, 43.8, 0.96),
        _size(4, 448, 86.8, "86.79", 193.41, None, 1.15),
        _size(5, 224, 86.1, "86.10", 295.46, 69.0, 0.96),
        _size(5, 448, 87.0, "87.0", 295.91, None, 1.15),
        _size(5, 512, 87.1, "87.07", 296.09, 412, 1.15),
    )
)

register(VOLO, VOLOS)
