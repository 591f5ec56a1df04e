"""Between levels of a pyramid without convolutions: patch merging and patch expansion."""

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.ops.common.layers import ChannelNorm

ODD = ("pad", "refuse")


class PatchMerge(nn.Module):
    """2x2 cells to one (Liu et al. 2021, Swin, arXiv 2103.14030): W LN([x00, x10, x01, x11]), C to 2 C channels.

    x_rc is the cell in row r, column c of its square. A map of odd size gets zeros at its end (`odd="pad"`) or is
    refused.
    """

    def __init__(self, dim: int, eps: float = 1e-5, odd: str = "pad") -> None:
        super().__init__()
        if odd not in ODD:
            raise ValueError(f"odd is {odd!r}; allowed are {', '.join(ODD)}")
        self.odd = odd
        self.norm = ChannelNorm(4 * dim, eps)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d p q"]:
        height, width = x.shape[2:]
        if height % 2 or width % 2:
            if self.odd == "refuse":
                raise ValueError(f"a map of {height} x {width} cells does not split into squares of 2 x 2")
            x = F.pad(x, (0, width % 2, 0, height % 2))
        x = self.norm(rearrange(x, "b c (h p) (w q) -> b (q p c) h w", p=2, q=2))
        return self.reduction(x.movedim(1, -1)).movedim(-1, 1)


class PatchExpand(nn.Module):
    """One cell to `scale` x `scale` (Cao et al. 2021, Swin-Unet, arXiv 2105.05537): LN(squares(W x)), C to D channels.

    W makes scale^2 D channels, ordered by row of the square, its column, channel.
    """

    def __init__(self, dim: int, out: int, scale: int = 2, eps: float = 1e-5) -> None:
        super().__init__()
        if scale < 1:
            raise ValueError(f"scale is {scale}; it must be at least 1")
        self.scale = scale
        self.expand = nn.Linear(dim, scale**2 * out, bias=False)
        self.norm = ChannelNorm(out, eps)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d p q"]:
        x = self.expand(x.movedim(1, -1))
        return self.norm(rearrange(x, "b h w (p q c) -> b c (h p) (w q)", p=self.scale, q=self.scale))
