"""Self-attention guided by auto-encoders: the parts of multi-scale self-guided attention."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.ops.attention.position_channel import ChannelAttention, PositionAttention
from nearfar.ops.common.conv_norm_act import INTERPOLATION, ConvNormAct
from nearfar.ops.common.dims import CONVOLUTIONS, check_dims

POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


class AttentionLayer(nn.Module):
    """conv3-BN-PReLU (in -> dim), an attention on the map, conv3-BN-PReLU (dim -> dim); (B, in, *S) to (B, dim, *S)."""

    def __init__(self, in_channels: int, dim: int, attention: nn.Module, *, dims: int = 2) -> None:
        super().__init__()
        self.before = ConvNormAct(in_channels, dim, 3, bias=True, activation=nn.PReLU, dims=dims)
        self.attention = attention
        self.after = ConvNormAct(dim, dim, 3, bias=True, activation=nn.PReLU, dims=dims)

    def forward(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b d *s"]:
        return self.after(self.attention(self.before(x)))


class SemanticModule(nn.Module):
    """A two-level auto-encoder of a map: returns its code (B, 4 dim, *S/4) and reconstruction (B, dim, *S).

    Sinha and Dolz (2020), section III-B. Down: twice [conv3-BN-ReLU twice, max pool 2], widths 2 dim and 4 dim; up:
    twice [conv3-BN-ReLU twice, transposed convolution of size and stride 2], widths 2 dim and dim. The published code
    flattens the code over the batch too; here the batch axis stays. Cost O(N dim^2).

    Raises:
        ValueError: for a map whose sizes are no multiples of 4 (in `forward`), or dims other than 1, 2, 3.
    """

    def __init__(self, dim: int, *, dims: int = 2) -> None:
        super().__init__()
        check_dims(dims)

        def pair(in_channels: int, out_channels: int) -> list[nn.Module]:
            return [
                ConvNormAct(in_channels, out_channels, 3, bias=True, dims=dims),
                ConvNormAct(out_channels, out_channels, 3, bias=True, dims=dims),
            ]

        def up(channels: int) -> nn.Module:
            return TRANSPOSED[dims](channels, channels, 2, 2)

        self.encoder1 = nn.Sequential(*pair(dim, 2 * dim))
        self.encoder2 = nn.Sequential(*pair(2 * dim, 4 * dim))
        self.decoder2 = nn.Sequential(*pair(4 * dim, 2 * dim), up(2 * dim))
        self.decoder1 = nn.Sequential(*pair(2 * dim, dim), up(dim))
        self.pool = POOLS[dims]

    def forward(self, x: Float[Tensor, "b c *s"]) -> tuple[Float[Tensor, "b e *t"], Float[Tensor, "b c *s"]]:
        if any(n % 4 for n in x.shape[2:]):
            raise ValueError(f"the map is {tuple(x.shape[2:])}; its sizes must be multiples of 4")
        code = self.pool(self.encoder2(self.pool(self.encoder1(x), 2)), 2)
        return code, self.decoder1(self.decoder2(code))


class GuidedStack(nn.Module):
    """One round of guided attention over maps of several scales on one grid.

    For the map I_s of each scale (B, 2 dim, *S): code_s, R_s = semantic(I_s), with one semantic module for all scales;
    y_s = conv1(  (position_s(I_s) + channel_s(I_s)) * conv3_s(R_s)  ), (B, dim, *S). Returns the lists y, codes, R.
    Cost: position attention's O(N^2) per scale.
    """

    def __init__(self, dim: int, scales: int = 4, *, dims: int = 2) -> None:
        super().__init__()
        conv = CONVOLUTIONS[dims]
        self.semantic = SemanticModule(2 * dim, dims=dims)
        self.position = nn.ModuleList(
            AttentionLayer(2 * dim, dim, PositionAttention(dim, dims=dims), dims=dims) for _ in range(scales)
        )
        self.channel = nn.ModuleList(AttentionLayer(2 * dim, dim, ChannelAttention(), dims=dims) for _ in range(scales))
        self.guide = nn.ModuleList(conv(2 * dim, dim, 3, padding=1) for _ in range(scales))
        self.out = nn.ModuleList(conv(dim, dim, 1) for _ in range(scales))

    def forward(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        attended, codes, reconstructions = [], [], []
        for x, position, channel, guide, out in zip(maps, self.position, self.channel, self.guide, self.out):
            code, reconstruction = self.semantic(x)
            attended.append(out((position(x) + channel(x)) * guide(reconstruction)))
            codes.append(code)
            reconstructions.append(reconstruction)
        return attended, codes, reconstructions


class PyramidFusion(nn.Module):
    """Brings maps of several sizes and widths to `dim` channels on the first one's grid, and fuses them.

    D_s = linear resize(PReLU(BN(conv1(x_s)))); F = conv1(conv3(conv3(cat[D_last ... D_first]))), each with BN and
    PReLU. Returns the list D and F. Cost O(N).
    """

    def __init__(self, in_channels: Sequence[int], dim: int, *, dims: int = 2) -> None:
        super().__init__()
        common = {"bias": True, "activation": nn.PReLU, "dims": dims}
        self.down = nn.ModuleList(ConvNormAct(channels, dim, **common) for channels in in_channels)
        self.fuse = nn.Sequential(
            ConvNormAct(len(in_channels) * dim, dim, 3, **common),
            ConvNormAct(dim, dim, 3, **common),
            ConvNormAct(dim, dim, 1, **common),
        )
        self.mode = INTERPOLATION[dims]

    def forward(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        size = maps[0].shape[2:]
        down = [F.interpolate(layer(x), size, mode=self.mode, align_corners=False) for layer, x in zip(self.down, maps)]
        return down, self.fuse(torch.cat(down[::-1], 1))
