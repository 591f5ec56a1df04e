"""Position tables that are added to a sequence."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class ScaledPositions(nn.Module):
    """y[t] = x[t] + scale P[t], with P[t] = [sin(t w_0) ... sin(t w_{C/2-1}), cos(t w_0) ... cos(t w_{C/2-1})].

    w_i = 10000^(-2i / C). (B, N, C) -> (B, N, C). Sines fill the first half of the channels and cosines the second;
    they are not interleaved. `scale` is one learnt number, from 0; `constrain()` clips it to [0, 1] and belongs after
    each optimizer step, it is not part of the forward. Source: Vaswani et al. 2017 (arXiv 1706.03762), section 3.5,
    in the form of AGTCNet's code. Cost O(N C).

    Args:
        max_length: longest N. dim: C, even.

    Raises ValueError for an odd dim or a max_length below 1.
    """

    table: Tensor

    def __init__(self, max_length: int, dim: int) -> None:
        super().__init__()
        if dim < 2 or dim % 2 or max_length < 1:
            raise ValueError(f"dim is {dim} and max_length {max_length}; dim must be even, max_length at least 1")
        frequency = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angle = torch.arange(max_length, dtype=torch.float64)[:, None] * frequency
        table = torch.cat([angle.sin(), angle.cos()], dim=1).to(torch.get_default_dtype())
        self.register_buffer("table", table, persistent=False)
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        return x + self.scale * self.table[: x.shape[1]]

    @torch.no_grad()
    def constrain(self) -> None:
        """Clip the scale to [0, 1], in place."""
        self.scale.clamp_(0, 1)
