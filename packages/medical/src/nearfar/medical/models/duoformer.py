"""DuoFormer: a transformer inside and between the patches of a CNN's feature pyramid, for histology tiles.

"DuoFormer: Leveraging Hierarchical Visual Representations by Local and Global Attention" (Tang et al. 2024, arXiv
2407.13920) and "... Hierarchical Representations by Local and Global Attention Vision Transformer" (2025, 2506.12982).
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import timm
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from nearfar.core.cards import Card
from nearfar.core.checkpoints import Checkpoint, count, loaded, read, rename
from nearfar.core.errors import CheckpointError
from nearfar.ops.common.layers import linear_map

SCALE_TOKENS = ("random", "channel", "first", "mean")
GRID, EPS = 7, 1e-6


class Attention(nn.Module):
    """Multi-head attention over `(B, N, C)`; with `first` only the first position asks."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads is {num_heads}; it must divide {dim} channels")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, first: bool = False) -> Tensor:
        c = x.shape[-1]
        if first:
            weight, bias = linear_map(self.qkv)
            q, (k, v) = F.linear(x[:, :1], weight[:c], bias[:c]), F.linear(x, weight[c:], bias[c:]).chunk(2, -1)
        else:
            q, k, v = self.qkv(x).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class ScaleBlock(nn.Module):
    """x + MHA(LN(x)), then x + MLP(LN(x)), over the tokens of one patch; with `first` for its first token alone."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, EPS)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, EPS)
        hidden = int(mlp_ratio * dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor, first: bool = False) -> Tensor:
        y = self.attn(self.norm1(x), first)
        x = (x[:, :1] if first else x) + y
        return x + self.mlp(self.norm2(x))


class MultiScaleTokens(nn.Module):
    """Maps of stages to tokens per patch: a 1x1 convolution each, then the k x k cells of each patch, coarse to fine.

    The stages' maps are g, 2g, 4g and 8g positions a side (coarsest last in the list, as a backbone gives them). Result
    `(B, g^2, S, D)`. In the 2 x 2 scale the tokens run down the columns, in the others along the rows, as published:
    the position table depends on it.
    """

    def __init__(self, channels: Sequence[int], dim: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Conv2d(c, dim, 1) for c in channels)
        for head in self.heads:
            nn.init.kaiming_normal_(head.weight)
            nn.init.normal_(head.bias, std=1e-6)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        tokens = []
        size = maps[-1].shape[2:]
        for i, (head, x) in enumerate(zip(reversed(self.heads), reversed(maps))):
            k = 2**i
            if x.shape[2:] != (k * size[0], k * size[1]):
                raise ValueError(
                    f"the stages' maps are {[tuple(m.shape[2:]) for m in maps]}; each must be twice the next, so the "
                    "image's sides multiples of 32"
                )
            order = "b c (h p) (w q) -> b (h w) (q p) c" if k == 2 else "b c (h p) (w q) -> b (h w) (p q) c"
            tokens.append(rearrange(head(x), order, p=k, q=k))
        return torch.cat(tokens, 2)


class ChannelToken(nn.Module):
    """A token per patch from all stages: each brought to the coarsest grid, joined, `depth` convolutions to D."""

    def __init__(self, channels: Sequence[int], dim: int, depth: int = 4) -> None:
        super().__init__()
        n = len(channels)
        # the finest of four stages is halved by two convolutions, the second finest by one; the rest by pooling
        strided = [max(0, n - 2 - i) for i in range(n)]
        self.downs = nn.ModuleList(
            nn.Sequential(*(nn.Conv2d(c, c, 3, 2, 1) for _ in range(k))) for c, k in zip(channels, strided)
        )
        for module in self.downs.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        widths = [sum(channels)] + [dim] * depth
        self.fusion = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(a, b, 3, 1, 1), nn.BatchNorm2d(b), nn.ReLU()) for a, b in pairwise(widths))
        )

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        small = [F.max_pool2d(down(x), 2) for down, x in zip(self.downs, maps[:-1])]
        return self.fusion(torch.cat([*small, maps[-1]], 1)).flatten(2).mT[:, :, None]


class PatchAttention(nn.Module):
    """A class token and the patches' vectors through attention layers without residual, norm or MLP.

    With `first` the last layer computes the class token's row alone, the only one that is read.
    """

    def __init__(self, dim: int, num_heads: int, depth: int, grid: int = GRID) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim).normal_(std=0.036))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + grid**2, dim))
        nn.init.trunc_normal_(self.pos_embed, std=0.036)
        self.layers = nn.ModuleList(Attention(dim, num_heads) for _ in range(depth))

    def table(self, size: tuple[int, int]) -> Tensor:
        """The position table for a grid of `size`, resized bicubically where it is another."""
        side = round((self.pos_embed.shape[1] - 1) ** 0.5)
        if size == (side, side):
            return self.pos_embed
        grid = self.pos_embed[:, 1:].mT.unflatten(2, (side, side))
        grid = F.interpolate(grid, size, mode="bicubic", align_corners=False).flatten(2).mT
        return torch.cat([self.pos_embed[:, :1], grid], 1)

    def forward(self, x: Tensor, size: tuple[int, int], first: bool = True) -> Tensor:
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.table(size)
        for layer in self.layers[:-1]:
            x = layer(x)
        return self.layers[-1](x, first)


class DuoFormer(nn.Module):
    """DuoFormer for tiles `(B, C, H, W)` to logits `(B, K)`; H and W multiples of 32 (224 as published).

    Backbone; its last `scales` stages cut into the coarsest stage's grid; per patch a scale token and the 1 + 4 + 16 +
    64 cells through `depth` scale blocks; then the patches' vectors through `patch_depth` attention layers with a class
    token, and a linear head. The last scale block and the last patch layer compute only what is read; the numbers stay.

    Args:
        num_classes: classes.
        in_channels: of the tile.
        backbone: a timm network with features at 1/4, 1/8, 1/16, 1/32 ("resnet18", "resnet50", or any other).
        scales: stages used, 2 to 4, from the coarsest.
        scale_token: "random" (a learned vector), "channel" (convolutions over all used stages), or none: "first" reads
            the coarsest token, "mean" averages all.
        depth, patch_depth: scale blocks and patch layers; patch_depth None: as many as scale blocks.
        num_heads, dim, mlp_ratio: of the transformer.
        patch_attention: False replaces it by a linear map over the mean tokens of the patches, as in the ablation; this
            fixes the grid at 7 x 7.
        pretrained: load timm's weights of the backbone (from its cache or the network).
        frozen: no gradients for the backbone, and its batch norms stay in eval mode. The published training let their
            statistics move: `freeze_statistics=False` does.
        identity: leaves both stacks out, so that the head reads the mean of all tokens: for ablation.
    """

    CARD = Card(
        "DuoFormer",
        "2506.12982",
        "attention over the scales inside each patch, then over the patches, on a CNN; classifies tiles",
        2.2e-6,
        weights="experiment code's layout",
        dims=(2,),
    )

    size_multiple = 32

    def __init__(
        self,
        num_classes: int = 3,
        in_channels: int = 3,
        *,
        backbone: str = "resnet50",
        scales: int = 4,
        scale_token: str = "random",
        depth: int = 8,
        patch_depth: int | None = None,
        num_heads: int = 8,
        dim: int = 768,
        mlp_ratio: float = 4.0,
        patch_attention: bool = True,
        pretrained: bool = False,
        frozen: bool = False,
        freeze_statistics: bool = True,
        identity: bool = False,
    ) -> None:
        super().__init__()
        if scales not in (2, 3, 4):
            raise ValueError(f"scales is {scales}; allowed are 2, 3 and 4")
        if scale_token not in SCALE_TOKENS:
            raise ValueError(f"scale_token is {scale_token!r}; allowed are {', '.join(SCALE_TOKENS)}")
        if depth < 1 or (patch_depth is not None and patch_depth < 1):
            raise ValueError(f"depth is {depth}, patch_depth {patch_depth}; both must be at least 1")
        self.backbone = timm.create_model(backbone, pretrained, in_chans=in_channels, features_only=True)
        info = self.backbone.feature_info
        keep = [i for i, r in enumerate(info.reduction()) if r in (4, 8, 16, 32)]
        if [info.reduction()[i] for i in keep] != [4, 8, 16, 32]:
            raise ValueError(f"backbone {backbone!r} has features at 1/{info.reduction()}; they must be 1/4 to 1/32")
        self.keep = keep[-scales:]
        channels = [info.channels()[i] for i in self.keep]
        self.tokens = MultiScaleTokens(channels, dim)
        self.scale_token, self.patch_attention = scale_token, patch_attention
        extra = scale_token in ("random", "channel")
        self.token = nn.Parameter(torch.empty(1, 1, 1, dim).normal_(std=0.036)) if scale_token == "random" else None
        self.channel_token = ChannelToken(channels, dim) if scale_token == "channel" else None
        length = sum(4**i for i in range(scales)) + extra
        self.scale_pos = nn.Parameter(torch.empty(1, 1, length, dim))
        nn.init.trunc_normal_(self.scale_pos, std=0.036)
        self.identity = identity
        self.blocks = nn.ModuleList(ScaleBlock(dim, num_heads, mlp_ratio) for _ in range(0 if identity else depth))
        self.patches = self.across = None
        if patch_attention and not identity:
            self.patches = PatchAttention(dim, num_heads, depth if patch_depth is None else patch_depth)
        elif not identity:
            self.across = nn.Linear(GRID**2, 1)
        self.head = nn.Linear(dim, num_classes)
        self.frozen, self.freeze_statistics = frozen, freeze_statistics
        if frozen:
            self.backbone.requires_grad_(False)
            self.train()

    def train(self, mode: bool = True) -> "DuoFormer":
        super().train(mode)
        if self.frozen and self.freeze_statistics:
            self.backbone.eval()
        return self

    def patch_tokens(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens of every patch, (B, P, S, D), scale token first, with positions; and the grid."""
        if any(n % 32 for n in x.shape[2:]):
            raise ValueError(f"the tile is {tuple(x.shape[2:])}; height and width must be multiples of 32")
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features = self.backbone(x)
        maps = [features[i] for i in self.keep]
        tokens = self.tokens(maps)
        if self.token is not None:
            tokens = torch.cat([self.token.expand(*tokens.shape[:2], -1, -1), tokens], 2)
        elif self.channel_token is not None:
            tokens = torch.cat([self.channel_token(maps), tokens], 2)
        return tokens + self.scale_pos, tuple(maps[-1].shape[2:])

    def forward_features(self, x: Tensor) -> Tensor:
        """What the head reads, (B, D)."""
        tokens, size = self.patch_tokens(x)
        b, p = tokens.shape[:2]
        averages = self.scale_token == "mean" or not self.patch_attention or self.identity
        y = tokens.flatten(0, 1)
        for i, block in enumerate(self.blocks):
            y = block(y, first=i == len(self.blocks) - 1 and not averages)
        y = y.mean(1) if averages else y[:, 0]
        y = y.unflatten(0, (b, p))
        if self.identity:
            return y.mean(1)
        if self.patches is not None:
            return self.patches(y, size)[:, 0]
        if size != (GRID, GRID):
            raise ValueError(f"the grid is {size}; without patch attention it must be {GRID} x {GRID}: tiles of 224")
        return self.across(y.mT)[..., 0]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x))

    @classmethod
    def from_published(cls, source: Checkpoint, num_heads: int = 8, **settings: Any) -> "DuoFormer":
        """The network of the authors' experiment code, in eval mode; all but the heads is read from the state dict.

        Its last norm `fc_norm`, which newer states hold and nothing reads, is left out.
        """
        state = published_state(read(source))
        try:
            dim = state["head.weight"].shape[1]
            scales = count(state, r"tokens\.heads\.(\d+)\.")
            length = state["scale_pos"].shape[2]
            blocks_of = [count(state, rf"backbone\.layer{i}\.(\d+)\.") for i in (1, 2, 3, 4)]
            deep = "backbone.layer1.0.conv3.weight" in state
            token = "random" if "token" in state else "channel" if "channel_token.fusion.0.0.weight" in state else None
            found = {
                "num_classes": len(state["head.bias"]),
                "in_channels": state["backbone.conv1.weight"].shape[1],
                "backbone": BACKBONES[deep, tuple(blocks_of)],
                "scales": scales,
                "scale_token": token or settings.pop("scale_token", "first"),
                "depth": count(state, r"blocks\.(\d+)\."),
                "patch_depth": count(state, r"patches\.layers\.(\d+)\.") or None,
                "num_heads": num_heads,
                "dim": dim,
                "mlp_ratio": len(state["blocks.0.mlp.0.bias"]) / dim,
                "patch_attention": "patches.pos_embed" in state,
            }
        except KeyError as error:
            raise CheckpointError(f"no DuoFormer: {error} is missing or unknown") from error
        if length != sum(4**i for i in range(scales)) + (token is not None):
            raise CheckpointError(f"no DuoFormer: its position table has {length} rows for {scales} scales")
        return loaded(cls(**(found | settings)), state)


BACKBONES = {
    (False, (2, 2, 2, 2)): "resnet18",
    (False, (3, 4, 6, 3)): "resnet34",
    (True, (3, 4, 6, 3)): "resnet50",
    (True, (3, 4, 23, 3)): "resnet101",
}
"""timm's name by the kind of block (bottleneck or not) and blocks per stage."""

VARIANTS: dict[str, dict[str, Any]] = {
    "duoformer_r50_channel": {
        "backbone": "resnet50",
        "scales": 4,
        "scale_token": "channel",
        "depth": 8,
        "frozen": True,
    },
    "duoformer_r50_random": {"backbone": "resnet50", "scales": 4, "depth": 8, "frozen": True},
    "duoformer_r50_deep": {"backbone": "resnet50", "scales": 4, "depth": 12, "num_heads": 12, "frozen": True},
    "duoformer_r18_3scales": {"backbone": "resnet18", "scales": 3, "depth": 8},
    "duoformer_r50_2scales": {"backbone": "resnet50", "scales": 2, "depth": 8},
}
"""The sizes in the authors' experiments. On TCGA kidney tiles (3 classes) the repository's logs give a balanced test
accuracy of 86.5 for a frozen SwAV ResNet-50, L = 8; runs of one setting differ by 3 to 10 points, and a ResNet-50 with
a plain 12-layer ViT reaches 86.9 in the same logs. The authors' repository has no licence file."""


# ---------------------------------------------------------------------------------------------------------------------
# Published layout

_STAGES = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}


def published_state(state: Mapping[str, Tensor], scales: int | None = None) -> dict[str, Tensor]:
    """Our names for the authors' state dict, with a torchvision or a self-supervised trunk.

    `scales`: stages used, where the state has no projections to count.
    """
    if scales is None:
        scales = len({name.split(".")[1] for name in state if name.startswith("projection.proj_heads")})
    finest = 4 - scales
    rules = (
        (r"^resnet_projector\.(\d)\.", lambda m: f"backbone.{_STAGES[m[1]]}."),
        (r"^resnet_projector\.", "backbone."),
        (r"^channel_token$", "token"),
        (r"^projection\.proj_heads(\d)\.", lambda m: f"tokens.heads.{int(m[1]) - finest}."),
        (r"^chann_proj_all\.nConvs\.(\d+)\.conv\.", r"channel_token.fusion.\1.0."),
        (r"^chann_proj_all\.nConvs\.(\d+)\.norm\.", r"channel_token.fusion.\1.1."),
        (
            r"^chann_proj(\d)\.conv(\d)\.",
            lambda m: f"channel_token.downs.{int(m[1]) - 1 - finest}.{int(m[2]) - 1}.",
        ),
        (r"^vision_transformer\.blocks\.(\d+)\.attn\.(qkv|proj)\.", r"patches.layers.\1.\2."),
        (r"^vision_transformer\.scaleBlocks\.", "blocks."),
        (r"\.mlp\.fc1\.", ".mlp.0."),
        (r"\.mlp\.fc2\.", ".mlp.2."),
        (r"^vision_transformer\.pos_embed_for_scale$", "scale_pos"),
        (r"^vision_transformer\.(pos_embed|cls_token)$", r"patches.\1"),
        (r"^vision_transformer\.head\.", "head."),
    )
    # newer states hold a last norm that nothing reads
    return rename({name: t for name, t in state.items() if ".fc_norm." not in name}, rules, anywhere=True)
