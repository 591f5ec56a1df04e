"""AFNO: a vision transformer whose tokens are mixed by an adaptive filter in the Fourier domain.

Guibas et al., "Adaptive Fourier Neural Operators: Efficient Token Mixers for Transformers" (ICLR 2022).
"""

from typing import Any

from torch import Tensor, nn

from nearfar.ops.common.layers import DropPath
from nearfar.ops.spectral.adaptive import AFNO


class MLP(nn.Module):
    """W2 GELU(W1 x), exact GELU, dropout behind both."""

    def __init__(self, dim: int, hidden: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class AFNOBlock(nn.Module):
    """y = AFNO(LN1(x)); y + x, then + DP(MLP(LN2(.))); on (B, H, W, C).

    With `double_skip` the residual is taken twice, round the filter and round the MLP; without it once, round both:
    x + DP(MLP(LN2(AFNO(LN1(x))))). The filter adds its own input in either case.
    """

    def __init__(
        self,
        dim: int,
        num_blocks: int = 8,
        *,
        mlp_ratio: float = 4.0,
        double_skip: bool = True,
        drop_rate: float = 0.0,
        drop_path: float = 0.0,
        **filter_settings: Any,
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.filter = AFNO(dim, num_blocks, **filter_settings)
        self.mlp = MLP(dim, int(mlp_ratio * dim), drop_rate)
        self.double_skip, self.drop_path = double_skip, DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        y = self.filter(self.norm1(x).movedim(-1, 1)).movedim(1, -1)
        if self.double_skip:
            x = y = x + y
        return x + self.drop_path(self.mlp(self.norm2(y)))
