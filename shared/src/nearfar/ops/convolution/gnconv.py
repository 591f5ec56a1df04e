"""Recursive gated convolution (gnConv): high-order spatial interactions from one depthwise filter and gates."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.ops.common.dims import CONVOLUTIONS, check_dims
from nearfar.ops.common.layers import DepthwiseConv
from nearfar.ops.convolution.convnext import scale_output


class GnConv(nn.Module):
    """n-th order gated convolution: p_0 = P(x)_0 * q_0, p_k = W_k p_(k-1) * q_k, out = Wo p_(n-1).

    Rao et al., "HorNet" (2022), equations 3.2-3.6. P is pointwise, C -> 2 D, and gives p_0 (d_0 channels) and q; the
    filter F runs once over q, s F(q) = (q_0, ..., q_(n-1)) of widths d_k = D / 2^(n-1-k), so that d_0 is the smallest
    and d_(n-1) = D; W_k: d_(k-1) -> d_k and Wo: D -> out are pointwise and biased. There is no activation and no norm.
    `forward` maps (B, C, *S) to (B, out, *S). Cost per position: 2 C D + S k^dims + 2/3 D^2 + D out
    multiply-adds with S = sum d_k < 2 D, linear in N for a depthwise F.

    The scale s multiplies after the filter, its bias included; it is no parameter (1/3 in the published models).

    Args:
        dim: D; 2^(order-1) must divide it.
        order: n, the number of gates.
        kernel_size: size of the depthwise filter, odd.
        scale: s.
        filter: makes F from its number of channels, instead of the depthwise convolution
            (for example `lambda c: GlobalLocalFilter(c, 14, 8)`).
        in_dim: C, if not D.
        out_dim: channels after Wo, if not D; 0 leaves Wo out.
        dims: number of grid axes, 1, 2 or 3.
        causal: left-padded depthwise filter (dims=1 and no `filter`).

    Raises:
        ValueError: a `dim` that 2^(order-1) does not divide (the message names the largest order that fits),
            an even kernel, dims outside 1..3, causal with dims > 1 or with `filter`.
    """

    def __init__(
        self,
        dim: int,
        order: int = 5,
        kernel_size: int = 7,
        scale: float | int = 1.0,
        filter: Callable[[int], nn.Module] | None = None,
        *,
        in_dim: int | None = None,
        out_dim: int | None = None,
        dims: int = 2,
        causal: bool = False,
    ) -> None:
        super().__init__()
        check_dims(dims, causal)
        if order < 1 or dim % 2 ** (order - 1):
            largest = (dim & -dim).bit_length()
            raise ValueError(
                f"order is {order}, but 2^(order-1) must divide dim={dim}; allowed orders are 1 to {largest}"
            )
        if causal and filter is not None:
            raise ValueError("causal=True needs the depthwise filter; a filter of your own was given")
        conv = CONVOLUTIONS[dims]
        self.widths = [dim // 2 ** (order - 1 - k) for k in range(order)]
        self.scale = scale
        total = sum(self.widths)
        self.proj_in = conv(in_dim or dim, 2 * dim, 1)
        self.dwconv = filter(total) if filter else DepthwiseConv(total, kernel_size, dims=dims, causal=causal)
        self.proj_out = nn.Identity() if out_dim == 0 else conv(dim, out_dim or dim, 1)
        self.pws = nn.ModuleList(conv(a, b, 1) for a, b in zip(self.widths, self.widths[1:], strict=False))

    def forward(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b d *s"]:
        p, q = self.proj_in(x).split((self.widths[0], sum(self.widths)), dim=1)
        q = self.dwconv(q)
        if self.scale != 1:
            q = q * self.scale
        first, *gates = q.split(self.widths, dim=1)
        p = p * first
        for project, gate in zip(self.pws, gates, strict=True):
            p = project(p) * gate
        return self.proj_out(p)

    @torch.no_grad()
    def fuse(self) -> "GnConv":
        """Fold the scale into the filter's last layer, for inference; the outputs stay the same."""
        scale_output(getattr(self.dwconv, "post_norm", self.dwconv), self.scale)
        self.scale = 1.0
        return self
