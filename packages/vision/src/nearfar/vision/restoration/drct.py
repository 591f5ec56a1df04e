"""DRCT: shifted-window attention in densely connected groups (Hsu, Lee and Chou, CVPR Workshops 2024)."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.core.cards import Card
from nearfar.core.checkpoints import Rule, count
from nearfar.ops.attention.shifted_window import WindowAttention, inverse, window_order
from nearfar.ops.common.fused import FusedLinear
from nearfar.ops.common.layers import ChannelNorm, DropPath
from nearfar.vision.restoration.restorer import Restorer, RestorerVariant, Upsampler, pad_to

RGB_MEAN = (0.4488, 0.4371, 0.4040)
"""Mean colour of DIV2K."""
AT_ONCE = 4096
"""Positions of a map whose windows are worked on together, without gradients."""


class WindowBlock(nn.Module):
    """x += attention(norm(x)), then x += W2 gelu(W1 norm(x)): a Swin transformer block on windows (B, *n, w^2, C)."""

    def __init__(self, dim: int, num_heads: int, window_size: int, shift: int, hidden: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = WindowAttention(dim, num_heads, window_size, shift)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            FusedLinear(nn.Linear(dim, hidden), "gelu"), nn.Identity(), FusedLinear(nn.Linear(hidden, dim))
        )
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b n m w c"], end: bool) -> Float[Tensor, "b n m w c"]:
        x = x + self.drop_path(self.attention.inside(self.norm1(x), end=end))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ResidualDenseGroup(nn.Module):
    """Five window blocks; each reads the input and what all before it have added, and adds `growth` channels.

    x_0 = x, x_j = leaky(W_j block_j([x_0, ..., x_{j-1}])) for j = 1 .. 4 (slope 0.2), x_5 = W_5 block_5([x_0 .. x_4]);
    y = x + 0.2 x_5. Blocks 2 and 4 shift their windows by half; the last two have MLPs of ratio 1.
    """

    def __init__(
        self, dim: int, growth: int, num_heads: Sequence[int], window_size: int, mlp_ratio: float, drop_path: float
    ) -> None:
        super().__init__()
        dims = [dim + i * growth for i in range(5)]
        self.blocks = nn.ModuleList(
            WindowBlock(width, heads, window_size, shift, int(width * ratio), drop_path)
            for width, heads, shift, ratio in zip(
                dims, num_heads, (0, window_size // 2) * 2 + (0,), (mlp_ratio,) * 3 + (1, 1), strict=True
            )
        )
        self.reduce = nn.ModuleList(FusedLinear(nn.Linear(width, growth)) for width in dims[:-1])
        self.reduce.append(FusedLinear(nn.Linear(dims[-1], dim)))
        self.dims, self.window_size = dims, window_size

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        sides, x = x.shape[2:], x.flatten(2).mT
        orders = [window_order(sides, self.window_size, s, x.device) for s in (0, self.window_size // 2)]
        back = [inverse(order) for order in orders]
        # without gradients the parts stand side by side in one tensor, written as they come, some rows of windows at a
        # time
        whole = None if torch.is_grad_enabled() else x.new_empty(*x.shape[:-1], self.dims[-1])
        if whole is not None:
            whole[..., : self.dims[0]] = x
        seen = x if whole is None else whole
        for i, (block, reduce) in enumerate(zip(self.blocks, self.reduce)):
            order, parts = orders[i % 2], []
            rows = len(order) if whole is None else max(1, AT_ONCE // order[0].numel())
            for start in range(0, len(order), rows):
                some = order[start : start + rows]
                # all channels, then those that are there: of a part of a tensor the library copies the whole part first
                windows = seen.index_select(1, some.flatten())[..., : self.dims[i]].unflatten(1, some.shape)
                parts.append(reduce(block(windows, start + rows >= len(order))))
            part = torch.cat(parts, 1).flatten(1, 3).index_select(1, back[i % 2])
            if i == 4:
                return torch.add(x, part, alpha=0.2).mT.unflatten(2, sides)
            part = nn.functional.leaky_relu(part, 0.2)
            if whole is None:
                seen = torch.cat([seen, part], -1)
            else:
                whole[..., self.dims[i] : self.dims[i + 1]] = part
        raise AssertionError("a group has five blocks")


class DRCT(Restorer):
    """Dense-residual-connected transformer for super-resolution.

    Args:
        scale: 2, 3, 4 or another power of two.
        groups: residual dense groups. dim: channels C. growth: channels that each block adds. num_heads: of a group's
            five blocks, or one number h, from which block j of d_j channels has h - (d_j mod h).
        window_size: side of the attention windows; any picture size is padded to its multiple by reflection.
        mlp_ratio: of the first three blocks. features: channels of the upsampler. in_chans: 3, or another without the
            colour mean. drop_path: of the last group; it rises linearly from 0.

    Source: Hsu, Lee and Chou, DRCT: Saving Image Super-resolution away from Information Bottleneck (2024).
    """

    RULES: ClassVar[tuple[Rule, ...]] = (
        (r"conv_first\.", "stem."),
        (r"patch_embed\.norm\.", "stem_norm."),
        (r"layers\.(\d+)\.swin(\d)\.", lambda m: f"groups.{m[1]}.blocks.{int(m[2]) - 1}."),
        (r"layers\.(\d+)\.adjust(\d)\.", lambda m: f"groups.{m[1]}.reduce.{int(m[2]) - 1}."),
        (r"(groups\.\d+\.blocks\.\d\.)attn\.relative_position_bias_table", r"\1attention.bias_table"),
        (r"(groups\.\d+\.blocks\.\d\.)attn\.proj\.", r"\1attention.out."),
        (r"(groups\.\d+\.blocks\.\d\.)attn\.", r"\1attention."),
        (r"(groups\.\d+\.blocks\.\d\.)mlp\.fc1\.", r"\1mlp.0."),
        (r"(groups\.\d+\.blocks\.\d\.)mlp\.fc2\.", r"\1mlp.2."),
        (r"conv_after_body\.", "body."),
        (r"conv_before_upsample\.0\.", "before."),
        (r"upsample\.", "enlarge."),
        (r"conv_last\.", "last."),
    )
    IGNORE = (r".*relative_position_index$", r".*attn_mask$")
    CARD = Card(
        "DRCT",
        "2404.00722",
        "shifted-window attention in densely connected groups; enlarges pictures",
        1.2e-6,
        weights="official and community layouts",
    )

    def __init__(
        self,
        scale: int = 4,
        groups: int = 6,
        dim: int = 180,
        growth: int = 32,
        num_heads: int | Sequence[int] = 6,
        window_size: int = 16,
        mlp_ratio: float = 2.0,
        features: int = 64,
        in_chans: int = 3,
        drop_path: float = 0.1,
    ) -> None:
        super().__init__()
        if groups < 1:
            raise ValueError(f"groups is {groups}; it must be at least 1")
        if isinstance(num_heads, int):
            num_heads = [num_heads - (dim + i * growth) % num_heads for i in range(5)]
        self.scale, self.in_chans, self.window_size = scale, in_chans, window_size
        self.multiple = 2 * window_size
        # a group's five layers of windows in turn reach half a window further four times; then there are convolutions
        self.context = window_size + 2 * window_size * groups + 5
        mean = RGB_MEAN if in_chans == 3 else (0.0,) * in_chans
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.stem = nn.Conv2d(in_chans, dim, 3, padding=1)
        self.stem_norm = ChannelNorm(dim, eps=1e-5)
        # five values per group in the published schedule of six values each; a group uses the first of its own
        rates = torch.linspace(0, drop_path, 6 * groups, device="cpu").tolist()[::6]
        self.groups = nn.ModuleList(
            ResidualDenseGroup(dim, growth, num_heads, window_size, mlp_ratio, rate) for rate in rates
        )
        self.norm = ChannelNorm(dim, eps=1e-5)
        self.body = nn.Conv2d(dim, dim, 3, padding=1)
        self.before = nn.Conv2d(dim, features, 3, padding=1)
        self.enlarge = Upsampler(features, scale)
        self.last = nn.Conv2d(features, in_chans, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        height, width = x.shape[2:]
        x = pad_to(x, *(-(-side // self.window_size) * self.window_size for side in (height, width)))
        x = self.stem(x - self.mean)
        y = self.stem_norm(x)
        for group in self.groups:
            y = group(y)
        x = nn.functional.leaky_relu(self.before(self.body(self.norm(y)) + x), 0.01)
        x = self.last(self.enlarge(x)) + self.mean
        return x[..., : self.scale * height, : self.scale * width]

    @classmethod
    def published_settings(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        dim, in_chans = state["stem.weight"].shape[:2]
        tables = [state[f"groups.0.blocks.{i}.attention.bias_table"].shape for i in range(5)]
        # the first convolution of the upsampler makes 9 maps of each for x3, 4 otherwise
        features = state["before.bias"].shape[0]
        shuffles = count(state, r"enlarge\.(\d+)\.") // 2 + 1
        return {
            "scale": 3 if len(state["enlarge.0.bias"]) == 9 * features else 2**shuffles,
            "groups": count(state, r"groups\.(\d+)\."),
            "dim": dim,
            "growth": len(state["groups.0.reduce.0.bias"]),
            "num_heads": [heads for _, heads in tables],
            "window_size": (round(tables[0][0] ** 0.5) + 1) // 2,
            "mlp_ratio": len(state["groups.0.blocks.0.mlp.0.bias"]) / dim,
            "features": features,
            "in_chans": in_chans,
        }


DRCT.VARIANTS = {
    **{
        f"drct_x{scale}": RestorerVariant({"scale": scale}, params)
        for scale, params in ((2, 13_990_000), (3, 14_180_000), (4, 14_140_000))
    },
    **{f"drct_l_x{scale}": RestorerVariant({"scale": scale, "groups": 12}, 27_580_000) for scale in (2, 3, 4)},
}
