"""Mamba-2's block: a selective scan with one decay per head, in chunks of matrix products."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.ops.common.streaming import State, StreamingMixer, in_pieces, real_positions, wide
from nearfar.ops.convolution.causal import ShortConv
from nearfar.ops.recurrence.ssd import ssd


class Mamba2(StreamingMixer):
    """The Mamba-2 block (Dao and Gu 2024, arXiv 2405.21060, section 7).

    (z, xBC, dt) = W_in u; (x, B, C) = silu(short causal convolution of xBC); dt = softplus(dt + b), A = -exp(A_log),
    one number per head; `y = SSD(x, dt, A, B, C) + D x`; out = W_out RMSNorm(y silu(z)), the norm weighted and over all
    channels. Cost O(N d (d + S + chunk)). State: h heads of head_dim x S numbers, E S in all, and the last inputs of
    the convolution, which the literature does not count.

    Args:
        dim: channels d. d_state: S. d_conv: taps of the convolution. expand: E / d.
        head_dim: channels of a head; must divide E. groups: of heads that share B and C; must divide the heads.
        chunk: positions that are worked on at once. eps: of the norm.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 64,
        d_conv: int = 4,
        expand: int = 2,
        head_dim: int = 64,
        groups: int = 1,
        chunk: int = 64,
        eps: float = 1e-5,
    ):
        super().__init__()
        if min(dim, d_state, d_conv, expand, head_dim, groups, chunk) < 1:
            raise ValueError(
                f"dim={dim}, d_state={d_state}, d_conv={d_conv}, expand={expand}, head_dim={head_dim}, groups={groups} "
                f"and chunk={chunk} must be at least 1"
            )
        self.inner, self.d_state, self.head_dim, self.groups, self.chunk = (
            expand * dim,
            d_state,
            head_dim,
            groups,
            chunk,
        )
        if self.inner % head_dim or (self.inner // head_dim) % groups:
            raise ValueError(
                f"head_dim={head_dim} must divide expand * dim = {self.inner}, and groups={groups} the number of heads"
            )
        self.heads = self.inner // head_dim
        self.in_proj = nn.Linear(dim, 2 * self.inner + 2 * groups * d_state + self.heads, bias=False)
        self.conv = ShortConv(self.inner + 2 * groups * d_state, d_conv)
        self.dt_bias, self.A_log, self.D = (nn.Parameter(torch.empty(self.heads)) for _ in range(3))
        self.norm = nn.RMSNorm(self.inner, eps=eps)
        self.out_proj = nn.Linear(self.inner, dim, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A uniform in -16..-1, D = 1, dt log-uniform in 0.001..0.1 through its bias; the rest resets itself."""
        self.A_log.uniform_(1, 16).log_()
        self.D.fill_(1)
        dt = torch.empty_like(self.dt_bias).uniform_(math.log(1e-3), math.log(1e-1)).exp_()
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus undone

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return in_pieces(self.extend, x)

    def extend(self, x: Tensor, state: State | None = None, lengths: Tensor | None = None) -> tuple[Tensor, State]:
        past, h = (None, None) if state is None else (state[:1], state[1])
        shared = self.groups * self.d_state
        z, xbc, dt = self.in_proj(x).split([self.inner, self.inner + 2 * shared, self.heads], -1)
        xbc, past = self.conv.extend(xbc, past, lengths)
        u, B, C = F.silu(xbc).split([self.inner, shared, shared], -1)
        dtype, _ = wide(x)
        dt = F.softplus(dt.to(dtype) + self.dt_bias.to(dtype))
        real = real_positions(x, lengths)
        if real is not None:
            dt = dt * real[..., None]
        u = u.unflatten(-1, (self.heads, -1))
        B, C = (t.unflatten(-1, (self.groups, -1)) for t in (B, C))
        y, h = ssd(u, dt, -torch.exp(self.A_log.to(dtype)), B, C, h, self.chunk)
        y = (y + self.D.to(u.dtype)[:, None] * u).flatten(-2)
        return self.out_proj(self.norm(y * F.silu(z)).to(x.dtype)), (*past, h)

    def state_size(self, length: int) -> int:
        return self.inner * self.d_state
