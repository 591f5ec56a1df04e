"""CvT: stages of tokens that begin with a strided convolution, whose queries, keys and values are convolved too.

Wu et al., "CvT: Introducing Convolutions to Vision Transformers" (2021). transformers has the same models with the same
weights (`microsoft/cvt-13` ...), but with another activation than they were trained with: exact GELU in place of
x sigmoid(1.702 x). Here the latter is the default.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nearfar.core.cards import Card
from nearfar.core.checkpoints import count, ratio
from nearfar.ops.attention.conv_projection import ConvProjectionAttention
from nearfar.ops.common.layers import GELU, DropPath
from nearfar.vision.models.registry import Variant, Weights, register
from nearfar.vision.models.tokens import Mlp, QuickGELU, State, TokenHead, TokenModel, init_linear
from nearfar.vision.tracing import whole

ACTIVATIONS = {"quick_gelu": QuickGELU, "gelu": GELU}


class ConvEmbed(nn.Module):
    """LN of a strided convolution: a map (B, C_in, H, W) to tokens (B, N, C) and their grid."""

    def __init__(self, in_chans: int, dim: int, kernel_size: int, stride: int, padding: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel_size, stride, padding)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x = self.proj(x)
        return self.norm(x.flatten(2).mT), tuple(x.shape[-2:])


class CvTBlock(nn.Module):
    """x + DP(attn(LN(x))), then x + DP(mlp(LN(x))), with convolutional projections of the tokens that form the grid."""

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float, drop_path: float, activation: str, **attention: Any
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = ConvProjectionAttention(dim, num_heads, **attention)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), ACTIVATIONS[activation]())
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), size))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class CvTStage(nn.Module):
    """One resolution: embedding, a class token where it has one, blocks."""

    def __init__(self, embed: ConvEmbed, blocks: Sequence[nn.Module], cls_token: nn.Parameter | None) -> None:
        super().__init__()
        self.patch_embed = embed
        self.cls_token = cls_token
        self.blocks = nn.ModuleList(blocks)


class CvT(TokenModel):
    """Three stages at strides 4, 8 and 16, the class token in the last, a linear classifier of it.

    Input (B, in_chans, H, W) with H and W of at least 32; there are no positions, and strided convolutions floor other
    sizes as in the published code. Features are the last stage's tokens, class token first.

    Args:
        depths, dims, num_heads: blocks, channels and heads of each stage.
        num_classes: classes; 0 for the pooled token.
        kernel_sizes, strides, paddings: of each stage's embedding.
        activation: "quick_gelu", x sigmoid(1.702 x), as trained, or "gelu", as transformers has it.
        class_token: in the last stage; without it the classifier sees the mean of the tokens.
        kernel_size, stride_q, stride_kv: see `ConvProjectionAttention`.
        drop_path_rate: stochastic depth of the last block of the last stage; grows linearly from 0 over that stage, the
            others have none.
        drop_rate: dropout before the classifier.
        global_pool: timm's pooling name, see `TokenHead`; by default the class token, or "avg" without it.
    """

    CARD = Card(
        "CvT",
        "2103.15808",
        "attention of convolved queries, keys and values",
        7.5e-7,
        weights="official, transformers",
        small={"cvt_13": {"depths": (1, 1, 2), "dims": (32, 64, 128), "num_heads": (1, 2, 4)}},
    )

    RULES = (
        (r"stage(\d)\.", r"stages.\1."),
        (r"(?:cvt\.)?encoder\.stages\.(\d)\.", r"stages.\1."),
        (r"(stages\.\d)\.embedding\.convolution_embeddings\.projection\.", r"\1.patch_embed.proj."),
        (r"(stages\.\d)\.embedding\.convolution_embeddings\.normalization\.", r"\1.patch_embed.norm."),
        (r"(stages\.\d)\.layers\.", r"\1.blocks."),
        (r"(stages\.\d\.blocks\.\d+)\.layernorm_before\.", r"\1.norm1."),
        (r"(stages\.\d\.blocks\.\d+)\.layernorm_after\.", r"\1.norm2."),
        (r"(stages\.\d\.blocks\.\d+)\.intermediate\.dense\.", r"\1.mlp.fc1."),
        (r"(stages\.\d\.blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
        (r"(stages\.\d\.blocks\.\d+)\.attention\.output\.dense\.", r"\1.attn.proj."),
        (
            r"(stages\.\d\.blocks\.\d+)\.attention\.attention\.convolution_projection_(query|key|value)"
            r"\.convolution_projection\.(convolution|normalization)\.",
            lambda m: f"{m[1]}.attn.conv_{m[2][0]}.{int(m[3] == 'normalization')}.",
        ),
        (
            r"(stages\.\d\.blocks\.\d+)\.attention\.attention\.projection_(query|key|value)\.",
            lambda m: f"{m[1]}.attn.{m[2][0]}.",
        ),
        (
            r"(stages\.\d\.blocks\.\d+\.attn)\.conv_proj_([qkv])\.(conv|bn)\.",
            lambda m: f"{m[1]}.conv_{m[2]}.{int(m[3] == 'bn')}.",
        ),
        (r"(stages\.\d\.blocks\.\d+\.attn)\.proj_([qkv])\.", r"\1.\2."),
        (r"layernorm\.", "norm."),
        (r"classifier\.", "head.fc."),
        (r"head\.(weight|bias)$", r"head.fc.\1"),
    )
    UNSHAPED = ("num_heads",)
    FIRST_CONV = "stages.0.patch_embed.proj"
    LAYERS = "stages"
    default_indices = (0, 1, 2)
    min_size = 32

    def __init__(
        self,
        depths: Sequence[int] = (1, 2, 10),
        dims: Sequence[int] = (64, 192, 384),
        num_heads: Sequence[int] = (1, 3, 6),
        num_classes: int = 1000,
        in_chans: int = 3,
        *,
        kernel_sizes: Sequence[int] = (7, 3, 3),
        strides: Sequence[int] = (4, 2, 2),
        paddings: Sequence[int] = (2, 1, 1),
        img_size: int | tuple[int, int] = 224,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        activation: str = "quick_gelu",
        class_token: bool = True,
        kernel_size: int = 3,
        stride_q: int = 1,
        stride_kv: int = 2,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        global_pool: str | None = None,
    ) -> None:
        super().__init__()
        if len({len(depths), len(dims), len(num_heads), len(kernel_sizes), len(strides), len(paddings)}) > 1:
            raise ValueError(
                f"depths {depths}, dims {dims}, num_heads {num_heads}, kernel_sizes {kernel_sizes}, strides {strides} "
                f"and paddings {paddings} must be of as many stages"
            )
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}; allowed are {' and '.join(ACTIVATIONS)}")
        attention = {"kernel_size": kernel_size, "stride_q": stride_q, "stride_kv": stride_kv, "qkv_bias": qkv_bias}
        self.stages = nn.ModuleList()
        last = len(depths) - 1
        for i, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
            rates = torch.linspace(0, drop_path_rate if i == last else 0, depth, device="cpu").tolist()
            blocks = [CvTBlock(dim, num_heads[i], mlp_ratio, rate, activation, **attention) for rate in rates]
            embed = ConvEmbed(dims[i - 1] if i else in_chans, dim, kernel_sizes[i], strides[i], paddings[i])
            token = None
            if class_token and i == last:
                token = nn.Parameter(torch.empty(1, 1, dim))
                nn.init.trunc_normal_(token, std=0.02)
            self.stages.append(CvTStage(embed, blocks, token))
        self.norm = nn.LayerNorm(dims[-1])
        prefix = int(class_token)
        pool = global_pool if global_pool is not None else "token" if class_token else "avg"
        self.head = TokenHead(
            dims[-1], num_classes, prefix, global_pool=pool, drop_rate=drop_rate, num_heads=num_heads[-1]
        )
        reductions = [strides[0]]
        for stride in strides[1:]:
            reductions.append(reductions[-1] * stride)
        self.finish(num_classes, in_chans, img_size, 1, dims, reductions, num_prefix_tokens=prefix)
        self.has_class_token = class_token
        self.apply(init_linear)

    @classmethod
    def last_stride(cls, settings: Mapping[str, Any]) -> int:
        return math.prod(settings.get("strides", (4, 2, 2)))

    def embed(self, x: Tensor) -> State:
        return x.flatten(2).mT, x.shape[-2:]

    def apply_block(self, index: int, state: State) -> State:
        tokens, size = state
        stage = self.stages[index]
        tokens, size = whole(stage.patch_embed, tokens.mT.unflatten(2, size))
        if stage.cls_token is not None:
            tokens = torch.cat((stage.cls_token.expand(tokens.shape[0], -1, -1), tokens), dim=1)
        for block in stage.blocks:
            tokens = self.run(block, tokens, size)
        return tokens, size

    def split(self, tokens: Tensor, index: int) -> tuple[Tensor, Tensor]:
        prefix = int(self.stages[index].cls_token is not None)
        return tokens[:, :prefix], tokens[:, prefix:]

    def prefix_at(self, index: int) -> int:
        return int(self.stages[index].cls_token is not None)

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith("cls_token")}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layer groups for layer-wise learning-rate decay: first embedding, every block (or stage), norm and head."""
        if coarse:
            return {"stem": r"^stages\.0\.patch_embed", "blocks": [(r"^stages\.(\d+)", None), (r"^norm", (99999,))]}
        blocks = [
            (r"^stages\.(\d+)\.(?:patch_embed|cls_token)", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^stages\.0\.patch_embed", "blocks": blocks}

    @classmethod
    def published_settings(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        stages = range(count(state, r"stages\.(\d)\."))
        kernels = [state[f"stages.{i}.patch_embed.proj.weight"] for i in stages]
        dims = [len(kernel) for kernel in kernels]
        first = "stages.0.blocks.0"
        heads = {v.settings["dims"]: v.settings["num_heads"] for v in CVTS.values()}
        return {
            "depths": [count(state, rf"stages\.{i}\.blocks\.(\d+)\.") for i in stages],
            "dims": dims,
            "num_heads": heads.get(tuple(dims)),
            "num_classes": len(state.get("head.fc.bias", ())),
            "in_chans": kernels[0].shape[1],
            "kernel_sizes": [kernel.shape[-1] for kernel in kernels],
            "mlp_ratio": ratio(len(state[f"{first}.mlp.fc1.bias"]), dims[0]),
            "qkv_bias": f"{first}.attn.q.bias" in state,
            "class_token": f"stages.{stages[-1]}.cls_token" in state,
            "kernel_size": state[f"{first}.attn.conv_q.0.weight"].shape[-1],
        }


def _size(
    name: str,
    depths: Sequence[int],
    dims: Sequence[int],
    heads: Sequence[int],
    params: float,
    gmacs: float,
    *published: tuple[str, float, int],
) -> Variant:
    """`published`: (tag, top-1, input size) with the file of transformers' layout on the hub."""
    weights = tuple(
        Weights(
            tag,
            top1,
            hf_hub=(f"microsoft/cvt-{name}{'-384' * (size == 384)}{'-22k' * ('22k' in tag)}", "pytorch_model.bin"),
            size=size,
            crop_pct=1.0 if size == 384 else 0.875,
            crop_mode="squash" if size == 384 else "center",
        )
        for tag, top1, size in published
    )
    return Variant({"depths": depths, "dims": dims, "num_heads": heads}, params, gmacs, weights)


_SMALL = ((64, 192, 384), (1, 3, 6))

CVTS = {
    "cvt_13": _size(
        "13", (1, 2, 10), *_SMALL, 20.0, 4.5,
        ("ms_in1k", 81.6, 224), ("ms_in1k_384", 83.0, 384), ("ms_in22k_ft_in1k_384", 83.3, 384),
    ),
    "cvt_21": _size(
        "21", (1, 4, 16), *_SMALL, 31.62, 7.1,
        ("ms_in1k", 82.5, 224), ("ms_in1k_384", 83.3, 384), ("ms_in22k_ft_in1k_384", 84.9, 384),
    ),
    "cvt_w24": _size(
        "w24", (2, 2, 20), (192, 768, 1024), (3, 12, 16), 277.2, 193.2, ("ms_in22k_ft_in1k_384", 87.6, 384)
    ),
}  # fmt: skip

register(CvT, CVTS)
