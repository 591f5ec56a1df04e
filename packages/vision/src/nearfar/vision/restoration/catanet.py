"""CATANet: pixels grouped by their content, and overlapping patches (Liu et al., CVPR 2025)."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nearfar.core.cards import Card
from nearfar.core.checkpoints import Checkpoint, Rule, count, read
from nearfar.core.errors import CheckpointError
from nearfar.ops.attention.patch_overlap import OverlappingPatchAttention
from nearfar.ops.common.layers import ChannelNorm, DepthwiseConv
from nearfar.ops.tokens.content_groups import ContentGroupAttention
from nearfar.vision.restoration.restorer import Restorer, RestorerVariant, Upsampler, pad_to

AT_ONCE = 2**16
"""Pixels that a feed-forward layer works on together, without gradients."""


class ConvFFN(nn.Module):
    """x + W2 (h + gelu(depthwise(h))) with h = gelu(W1 norm(x)), a 5 x 5 depthwise convolution, on (B, C, H, W)."""

    def __init__(self, dim: int, hidden: int, kernel_size: int = 5) -> None:
        super().__init__()
        self.norm = ChannelNorm(dim, eps=1e-5)
        self.fc1 = nn.Linear(dim, hidden)
        self.depthwise = DepthwiseConv(hidden, kernel_size)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        rows = max(1, AT_ONCE // width)
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or rows >= height:
            return self.rows(x, 0, height)
        out = torch.empty_like(x, memory_format=torch.channels_last)
        for top in range(0, height, rows):
            bottom = min(top + rows, height)
            out[:, :, top:bottom] = self.rows(x, top, bottom)
        return out

    def rows(self, x: Tensor, top: int, bottom: int) -> Tensor:
        """Rows of the output, from these and those that the convolution reaches."""
        reach = self.depthwise.weight.shape[-1] // 2
        begin = max(0, top - reach)
        inside = (..., slice(top - begin, bottom - begin), slice(None))
        h = F.gelu(self.fc1(self.norm(x[:, :, begin : bottom + reach]).movedim(1, -1))).movedim(-1, 1)
        h = h[inside] + F.gelu(self.depthwise(h)[inside])
        return x[:, :, top:bottom] + self.fc2(h.movedim(1, -1)).movedim(-1, 1)


class TokenAggregationBlock(nn.Module):
    """x + W attention(norm(x)) over groups of like pixels anywhere in the picture, then a ConvFFN."""

    def __init__(
        self, dim: int, qk_dim: int, hidden: int, num_heads: int, num_centres: int, group_size: int, stable: bool
    ) -> None:
        super().__init__()
        self.norm = ChannelNorm(dim, eps=1e-5)
        self.attention = ContentGroupAttention(dim, qk_dim, num_heads, num_centres, group_size, stable=stable)
        self.mix = nn.Linear(dim, dim, bias=False)
        self.ffn = ConvFFN(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).movedim(1, -1)
        y = self.mix(self.attention(tokens.flatten(1, 2))).unflatten(1, tokens.shape[1:3])
        return self.ffn(x + y.movedim(-1, 1))


class LocalRegionBlock(nn.Module):
    """Attention inside overlapping patches, then a ConvFFN."""

    def __init__(
        self, dim: int, qk_dim: int, hidden: int, num_heads: int, patch_size: int, overlap: int, averaging: str
    ) -> None:
        super().__init__()
        self.attention = OverlappingPatchAttention(dim, qk_dim, num_heads, patch_size, overlap, averaging=averaging)
        self.ffn = ConvFFN(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(self.attention(x))


class CATANet(Restorer):
    """Content-aware token aggregation network for lightweight super-resolution.

    Every output depends on all of the picture, since pixels are sorted by their content: a picture in tiles differs
    from the whole one everywhere.

    Args:
        scale: 2, 3, 4 or another power of two.
        dim: channels. qk_dim, num_heads: of all attentions. hidden: of the feed-forward layers.
        patch_sizes: side of the local patches of each stage; smaller pictures are padded to the largest by reflection.
        num_centres, group_sizes: of the token groups of each stage. overlap: of neighbouring patches.
        averaging: "mean" where patches overlap, or "published", which darkens rows and columns that three patches
            share to 3/4 (sides such as 31 and 45).
        stable: keep the raster order of pixels that are nearest to one centre. The released code leaves it to torch's
            unstable sort, whose order is another on a GPU (outputs then differ by a tenth, with random weights).
        in_chans: of the pictures.

    Source: Liu et al., CATANet: Efficient Content-Aware Token Aggregation for Lightweight Image Super-Resolution.
    """

    RULES: ClassVar[tuple[Rule, ...]] = (
        (r"first_conv\.", "stem."),
        (r"blocks\.(\d+)\.0\.mlp\.norm\.", r"stages.\1.0.ffn.norm."),
        (r"blocks\.(\d+)\.0\.mlp\.fn\.dwconv\.depthwise_conv\.0\.", r"stages.\1.0.ffn.depthwise."),
        (r"blocks\.(\d+)\.0\.mlp\.fn\.", r"stages.\1.0.ffn."),
        (r"blocks\.(\d+)\.0\.irca_attn\.to_([kv])\.", r"stages.\1.0.attention.centre_\2."),
        (r"blocks\.(\d+)\.0\.iasa_attn\.to_([qkv])\.", r"stages.\1.0.attention.\2."),
        (r"blocks\.(\d+)\.0\.iasa_attn\.proj\.", r"stages.\1.0.attention.out."),
        (r"blocks\.(\d+)\.0\.means$", r"stages.\1.0.attention.centres"),
        (r"blocks\.(\d+)\.0\.initted$", r"stages.\1.0.attention.initialized"),
        (r"blocks\.(\d+)\.0\.conv1x1\.", r"stages.\1.0.mix."),
        (r"blocks\.(\d+)\.0\.", r"stages.\1.0."),
        (r"blocks\.(\d+)\.1\.layer\.0\.norm\.", r"stages.\1.1.attention.norm."),
        (r"blocks\.(\d+)\.1\.layer\.0\.fn\.to_([qkv])\.", r"stages.\1.1.attention.\2."),
        (r"blocks\.(\d+)\.1\.layer\.0\.fn\.proj\.", r"stages.\1.1.attention.out."),
        (r"blocks\.(\d+)\.1\.layer\.1\.norm\.", r"stages.\1.1.ffn.norm."),
        (r"blocks\.(\d+)\.1\.layer\.1\.fn\.dwconv\.depthwise_conv\.0\.", r"stages.\1.1.ffn.depthwise."),
        (r"blocks\.(\d+)\.1\.layer\.1\.fn\.", r"stages.\1.1.ffn."),
        (r"mid_convs\.(\d+)\.", r"stages.\1.2."),
        (r"upconv(\d)?\.", lambda m: f"enlarge.{3 * (int(m[1] or 1) - 1)}."),
        (r"last_conv\.", "last."),
    )
    tiled = "its groups are of pixels of one tile, not of the whole picture, which changes the output everywhere"
    CARD = Card(
        "CATANet",
        "2503.06896",
        "attention inside groups of like pixels anywhere, and inside overlapping patches; enlarges pictures",
        1.4e-6,
        weights="official",
    )

    def __init__(
        self,
        scale: int = 4,
        dim: int = 40,
        qk_dim: int = 36,
        hidden: int = 96,
        num_heads: int = 4,
        patch_sizes: Sequence[int] = (16, 20, 24, 28, 16, 20, 24, 28),
        num_centres: Sequence[int] = (16, 32, 64, 128, 16, 32, 64, 128),
        group_sizes: Sequence[int] = (256, 128, 64, 32, 256, 128, 64, 32),
        overlap: int = 2,
        averaging: Literal["mean", "published"] = "mean",
        stable: bool = True,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        if not len(patch_sizes) == len(num_centres) == len(group_sizes) > 0:
            raise ValueError(
                f"patch_sizes, num_centres and group_sizes have {len(patch_sizes)}, {len(num_centres)} and "
                f"{len(group_sizes)} entries; each needs one per stage"
            )
        self.scale, self.in_chans, self.smallest = scale, in_chans, max(patch_sizes)
        self.stem = nn.Conv2d(in_chans, dim, 3, padding=1)
        self.stages = nn.ModuleList(
            nn.Sequential(
                TokenAggregationBlock(dim, qk_dim, hidden, num_heads, centres, group, stable),
                LocalRegionBlock(dim, qk_dim, hidden, num_heads, patch, overlap, averaging),
                nn.Conv2d(dim, dim, 3, padding=1),
            )
            for patch, centres, group in zip(patch_sizes, num_centres, group_sizes)
        )
        self.enlarge = Upsampler(dim, scale, lambda: nn.LeakyReLU(0.1))
        self.last = nn.Conv2d(dim, in_chans, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        height, width = x.shape[2:]
        picture = x
        x = first = self.stem(pad_to(x, max(height, self.smallest), max(width, self.smallest)))
        for stage in self.stages:
            x = x + stage(x)
        x = self.last(self.enlarge(x + first))[..., : self.scale * height, : self.scale * width]
        return x + F.interpolate(picture, scale_factor=self.scale, mode="bilinear", align_corners=False)

    @classmethod
    def published_state(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Under our names; centres without the flag that says so are taken as learned."""
        ours = super().published_state(state)
        flags = [name.replace(".centres", ".initialized") for name in ours if name.endswith(".attention.centres")]
        return {name: torch.tensor(True) for name in flags} | ours

    @classmethod
    def from_published(cls, source: Checkpoint, **settings: Any) -> Self:
        """As in `Restorer`; shapes tell the sizes of patches and groups for the published stages alone."""
        state = cls.published_state(read(source))
        stages = [len(value) for name, value in state.items() if name.endswith(".attention.centres")]
        if stages != [16, 32, 64, 128] * 2 and not {"patch_sizes", "group_sizes"} <= set(settings):
            raise CheckpointError("CATANet: the shapes do not tell patch_sizes and group_sizes; give them too")
        return super().from_published(state, **settings)

    @classmethod
    def published_settings(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        dim, in_chans = state["stem.weight"].shape[:2]
        stages = count(state, r"stages\.(\d+)\.")
        shuffles = count(state, r"enlarge\.(\d+)\.") // 3 + 1
        centres = [len(state[f"stages.{i}.0.attention.centres"]) for i in range(stages)]
        return {
            "scale": 3 if len(state["enlarge.0.bias"]) == 9 * dim else 2**shuffles,
            "dim": dim,
            "qk_dim": len(state["stages.0.0.attention.q.weight"]),
            "hidden": len(state["stages.0.0.ffn.fc1.bias"]),
            "num_centres": centres,
            "in_chans": in_chans,
        }


CATANet.VARIANTS = {
    f"catanet_x{scale}": RestorerVariant({"scale": scale}, params)
    for scale, params in ((2, 477_000), (3, 550_000), (4, 535_000))
}
