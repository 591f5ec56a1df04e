"""A pyramid of MSA-Conv layers, after TiC; its sizes are nearfar's own.

The layer is that of "TiC: Exploring Vision Transformer in Convolution" (arXiv 2310.04134). The paper's network, with
its cyclic shifts in several directions and its pooling between layers, was never published; `tic_like_*` is not that
network, and no figure of the paper holds for it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nearfar.core.cards import Card
from nearfar.core.checkpoints import count, ratio
from nearfar.ops.attention.window import MSAConv
from nearfar.ops.common.layers import GELU, ChannelNorm, DropPath
from nearfar.vision.models.pyramid import Backbone, Head, Stage, drop_path_rates, init_weights
from nearfar.vision.models.registry import Variant, register


class EverywhereConv(MSAConv):
    """`MSAConv` with attention to all positions in place of the windows, to compare with."""

    def attend(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv_conv(x).flatten(2).unflatten(1, (3, self.num_heads, -1)).mT.unbind(1)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return mixed.mT.flatten(1, 2).unflatten(2, x.shape[2:])


class TiCBlock(nn.Module):
    """x + DP(MSAConv(LN(x))), then x + DP(W2 GELU(W1 LN(x))) on (B, C, H, W).

    With `shift` the channels are rolled by so many positions before the layer, a quarter of them in each of four
    directions, and back after it: a reading of the paper's cyclic shift, inferred from its name.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int = 3,
        mlp_ratio: float = 4.0,
        *,
        shift: int = 0,
        border: str = "zero",
        local: bool = True,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = ChannelNorm(dim), ChannelNorm(dim)
        self.mixer = (MSAConv if local else EverywhereConv)(
            dim, dim, kernel_size, num_heads=num_heads, border=border, dropout=0.0
        )
        hidden = int(mlp_ratio * dim)
        self.mlp = nn.Sequential(nn.Conv2d(dim, hidden, 1), GELU(), nn.Conv2d(hidden, dim, 1))
        self.shift, self.drop_path = shift, DropPath(drop_path)

    def rolled(self, x: Tensor, steps: int) -> Tensor:
        if not steps:
            return x
        parts = x.chunk(4, dim=1)
        moves = ((steps, 2), (-steps, 2), (steps, 3), (-steps, 3))
        return torch.cat([part.roll(step, axis) for part, (step, axis) in zip(parts, moves, strict=False)], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.rolled(self.mixer(self.rolled(self.norm1(x), self.shift)), -self.shift)
        x = x + self.drop_path(y)
        return x + self.drop_path(self.mlp(self.norm2(x)))


_SMALL = {"depths": (1, 1, 2, 1), "dims": (16, 32, 64, 96), "num_heads": (1, 1, 2, 3)}


class TiCLike(Backbone):
    """Two strided convolutions, four stages of `TiCBlock` with strided MSA-Conv layers between them, classifier.

    Input (B, in_chans, H, W) with H, W >= 32, other sizes than multiples of 32 are rounded up in every halving.

    Args:
        depths, dims, num_heads: blocks, channels and heads of each stage.
        kernel_size, border: of the attention windows.
        local: attention within windows; False for all positions, which is what the windows are compared with.
        shift: every second block rolls its channels by so many positions.
        mlp_ratio, num_classes, in_chans, drop_path_rate, drop_rate, global_pool: as in `ConvNeXt`.
    """

    CARD = Card(
        title="MSA-Conv (sizes of our own)",
        paper="2310.04134",
        what="attention within windows, by shifted maps",
        error=3.7e-07,
        small={"tic_like_tiny": _SMALL},
        plain={"tic_like_tiny": ("tic_like_tiny", {**_SMALL, "local": False})},
    )

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 6, 2),
        dims: Sequence[int] = (64, 128, 256, 512),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        num_classes: int = 1000,
        in_chans: int = 3,
        *,
        kernel_size: int = 3,
        border: str = "zero",
        local: bool = True,
        shift: int = 0,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        if not len(depths) == len(dims) == len(num_heads):
            raise ValueError(f"depths {depths}, dims {dims} and num_heads {num_heads} differ in length")
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, dims[0] // 2, 3, 2, 1), GELU(), nn.Conv2d(dims[0] // 2, dims[0], 3, 2, 1)
        )
        rates = drop_path_rates(drop_path_rate, depths)
        self.stages = nn.ModuleList()
        for i, (dim, heads) in enumerate(zip(dims, num_heads, strict=True)):
            layer = MSAConv if local else EverywhereConv
            down = layer(dims[i - 1], dim, 3, stride=2, bias=True, dropout=0.0) if i else nn.Identity()
            block = {"border": border, "local": local}
            blocks = [
                TiCBlock(dim, heads, kernel_size, mlp_ratio, shift=shift if j % 2 else 0, drop_path=rate, **block)
                for j, rate in enumerate(rates[i])
            ]
            self.stages.append(Stage(down, blocks))
        self.head = Head(dims[-1], num_classes, ChannelNorm(dims[-1]), norm_first=True, global_pool=global_pool,
                         drop_rate=drop_rate)  # fmt: skip
        self.finish(num_classes, in_chans, dims, [4 * 2**i for i in range(len(dims))])
        self.apply(init_weights)

    @classmethod
    def published_settings(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        stages = range(count(state, r"stages\.(\d+)\."))
        dims = [len(state[f"stages.{i}.blocks.0.norm1.weight"]) for i in stages]
        return {
            "depths": [count(state, rf"stages\.{i}\.blocks\.(\d+)\.") for i in stages],
            "dims": dims,
            "num_heads": [max(dim // 32, 1) for dim in dims],
            "kernel_size": state["stages.0.blocks.0.mixer.mlp.weight"].shape[-1],
            "num_classes": len(state.get("head.fc.bias", ())),
            "in_chans": state["stem.0.weight"].shape[1],
            "mlp_ratio": ratio(len(state["stages.0.blocks.0.mlp.0.bias"]), dims[0]),
        }


def _size(dim: int, params: float) -> Variant:
    dims, heads = tuple(dim * 2**i for i in range(4)), tuple(dim // 32 * 2**i for i in range(4))
    return Variant({"depths": (2, 2, 6, 2), "dims": dims, "num_heads": heads}, params, None)


TICS = {"tic_like_tiny": _size(32, 5.53), "tic_like_small": _size(64, 21.55)}

register(TiCLike, TICS)
