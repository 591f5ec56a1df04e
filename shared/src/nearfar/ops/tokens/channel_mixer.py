"""Channel mixing in the manner of RWKV, with neighbours' values shifted in, across the maps of several scales."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.ops.common.layers import DropPath


def quad_shift(x: Float[Tensor, "b h w c"], share: float = 0.25) -> Float[Tensor, "b h w c"]:
    """Four channel groups of int(share c) each take the left, right, upper, lower neighbour's value, zero outside.

    Duan et al., "Vision-RWKV" (2024). The remaining channels stay. Cost O(N c).
    """
    n = int(x.shape[-1] * share)
    left = F.pad(x[:, :, :-1, :n], (0, 0, 1, 0))
    right = F.pad(x[:, :, 1:, n : 2 * n], (0, 0, 0, 1))
    upper = F.pad(x[:, :-1, :, 2 * n : 3 * n], (0, 0, 0, 0, 1, 0))
    lower = F.pad(x[:, 1:, :, 3 * n : 4 * n], (0, 0, 0, 0, 0, 1))
    return torch.cat([left, right, upper, lower, x[..., 4 * n :]], -1)


class ChannelMix(nn.Module):
    """y = sigmoid(x_r W_r) * (LN(relu(x_k W_k)^2) W_v), x_m = mu_m x + (1 - mu_m) quad_shift(x), m in {k, r}.

    The channel mix of Vision-RWKV with a norm on the keys; no biases, hidden width `hidden_rate` times the channels,
    mu starts at 1/2. (B, H, W, C) to the same; two axes, since the shift has four directions. Cost O(N C^2).
    """

    def __init__(self, dim: int, hidden_rate: int = 2, share: float = 0.25) -> None:
        super().__init__()
        if not 0 <= share <= 0.25:
            raise ValueError(f"share is {share}; it must lie between 0 and 1/4, one group for each direction")
        self.mix_k = nn.Parameter(torch.full((dim,), 0.5))
        self.mix_r = nn.Parameter(torch.full((dim,), 0.5))
        self.key = nn.Linear(dim, hidden_rate * dim, bias=False)
        self.key_norm = nn.LayerNorm(hidden_rate * dim)
        self.value = nn.Linear(hidden_rate * dim, dim, bias=False)
        self.receptance = nn.Linear(dim, dim, bias=False)
        self.share = share

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        shifted = quad_shift(x, self.share)
        k = torch.lerp(shifted, x, self.mix_k)
        r = torch.lerp(shifted, x, self.mix_r)
        return torch.sigmoid(self.receptance(r)) * self.value(self.key_norm(torch.relu(self.key(k)).square()))


class CrossScaleMix(nn.Module):
    """Mixes the channels of several maps on the grid of the last one, and hands each its share back.

    MACMD (arXiv 2511.05803), multi-scale channel mixing. Each map -> 1x1 convolution to `dim` -> linear resize to the
    last map's grid; all side by side are tokens t of width len(in_channels) dim; y = t + DropPath(LN(ChannelMix(t)));
    y is cut up again, each part resized to its map's grid and widened by a 1x1 convolution to its channels. (The
    published code resizes before the first convolution and after the second. The two commute, as linear weights sum
    to 1, and this order is cheaper.) Cost O(N (len(in_channels) dim)^2) for the last map's N positions.

    Args:
        in_channels: channels of each map, in the order in which they are given; the last is the finest.
        dim: channels of each on the common grid.
        hidden_rate, share: of `ChannelMix`.
        drop_path: probability that a sample's mix is left out in training.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        dim: int,
        hidden_rate: int = 2,
        share: float = 0.25,
        drop_path: float = 0.05,
    ) -> None:
        super().__init__()
        self.project = nn.ModuleList(nn.Conv2d(channels, dim, 1) for channels in in_channels)
        self.mix = ChannelMix(len(in_channels) * dim, hidden_rate, share)
        self.norm = nn.LayerNorm(len(in_channels) * dim)
        self.drop_path = DropPath(drop_path)
        self.widen = nn.ModuleList(nn.Conv2d(dim, channels, 1) for channels in in_channels)

    def forward(self, maps: Sequence[Float[Tensor, "b _ _ _"]]) -> list[Tensor]:
        size = maps[-1].shape[2:]
        tokens = torch.cat([_resize(layer(x), size) for layer, x in zip(self.project, maps)], 1).movedim(1, -1)
        mixed = tokens + self.drop_path(self.norm(self.mix(tokens)))
        parts = mixed.movedim(-1, 1).chunk(len(maps), 1)
        return [layer(_resize(part, x.shape[2:])) for layer, part, x in zip(self.widen, parts, maps)]


def _resize(x: Tensor, size: torch.Size) -> Tensor:
    return x if x.shape[2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=False)
