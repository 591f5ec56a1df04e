"""Feed-forward sequential memory: recurrence replaced by long depthwise filters over time."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nearfar.ops.common.sequence_norms import TimeNorm
from nearfar.ops.convolution.sequence import ConvProjection, depthwise_sequence, prepend_history


class DilatedDenseFSMN(nn.Module):
    """Densely connected memory filters of growing dilation.

        stack = x;   for i in 0..depth-1:   out = PReLU(InstanceNorm(conv_i(stack)));   stack = [out | stack]

    and the last `out` is returned. conv_i has 2 * order - 1 taps, dilation 2^i, C groups, C * (i + 1) channels in, C
    out, no bias. A group takes i + 1 *consecutive* channels of the stack, so at depth 2 the first half of the
    channels sees only the first stage and the second half only x, as in the released weights.
    x: (B, N, C) -> (B, N, C). Cost O(N * C * order * depth^2). Source: Zhao et al., MossFormer2 (ICASSP 2024),
    section 2.3.

    Args:
        channels: C. order: one-sided number of taps. depth: number of stages.
        causal: look only back, 2 (order - 1) 2^i frames per stage, and normalize by the frames so far.

    Raises ValueError where one of the numbers is below 1.
    """

    def __init__(self, channels: int, order: int = 20, depth: int = 2, causal: bool = False):
        super().__init__()
        if min(channels, order, depth) < 1:
            raise ValueError(f"channels, order and depth are {channels}, {order}, {depth}; each must be at least 1")
        taps = 2 * order - 1
        self.convs = nn.ParameterList(torch.empty(channels, i + 1, taps) for i in range(depth))
        self.norms = nn.ModuleList(TimeNorm(channels, per_channel=True, causal=causal, eps=1e-5) for _ in range(depth))
        self.slopes = nn.ParameterList(torch.full((channels,), 0.25) for _ in range(depth))
        self.causal = causal
        for i, weight in enumerate(self.convs):
            bound = ((i + 1) * taps) ** -0.5
            nn.init.uniform_(weight, -bound, bound)

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        mask: Bool[Tensor, "b n"] | None = None,
        state: dict | None = None,
    ) -> Float[Tensor, "b n c"]:
        if mask is not None:
            x = x * mask.unsqueeze(-1)
        stack = out = x
        for i, (weight, norm, slope) in enumerate(zip(self.convs, self.norms, self.slopes)):
            reach = (weight.shape[2] - 1) * 2**i
            left, right = (reach, 0) if self.causal else (reach // 2, reach // 2)
            padded = stack
            if state is not None:
                padded, left = prepend_history(stack, reach, state, (self, i)), 0
            members = padded.unflatten(-1, (-1, i + 1)).unbind(-1)
            taps = weight.to(x.dtype).unbind(1)
            parts = [depthwise_sequence(m.contiguous(), t, left, right, 2**i) for m, t in zip(members, taps)]
            out = torch.stack(parts).sum(0) if i else parts[0]
            out = norm(out, mask, state)
            out = out.clamp(min=0) + slope * out.clamp(max=0)
            if mask is not None:
                out = out * mask.unsqueeze(-1)
            stack = torch.cat([out, stack], dim=-1)
        return out.to(x.dtype)


class FSMN(nn.Module):
    """y = x + DilatedDenseFSMN(W2 ReLU(W1 x + b1)): one memory unit. x: (B, N, dim) -> (B, N, dim).

    Args: dim; hidden: width of W1's output; order, depth, causal: see `DilatedDenseFSMN`.
    """

    def __init__(self, dim: int, hidden: int | None = None, order: int = 20, depth: int = 2, causal: bool = False):
        super().__init__()
        self.linear = nn.Linear(dim, hidden or dim)
        self.project = nn.Linear(hidden or dim, dim, bias=False)
        self.memory = DilatedDenseFSMN(dim, order, depth, causal)

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        mask: Bool[Tensor, "b n"] | None = None,
        state: dict | None = None,
    ) -> Float[Tensor, "b n c"]:
        return x + self.memory(self.project(F.relu(self.linear(x))), mask, state)


class GatedFSMN(nn.Module):
    """The recurrent block of MossFormer2: a gated memory unit in a narrow channel space.

        h = LayerNorm(PReLU(W_in x));   h = LayerNorm(V(h) * FSMN(U(h)) + h);   y = x + W_out h

    U and V are `ConvProjection`s with LayerNorm. x: (B, N, dim) -> (B, N, dim). Cost O(N * inner * (dim + inner)).
    Source: Zhao et al., MossFormer2 (ICASSP 2024), figure 3; the released code keeps the inner width at 256.

    Args:
        dim: channels of x. inner: channels inside. order, depth: memory filters, see `DilatedDenseFSMN`.
        hidden: width between W1 and W2 of the memory unit, `inner` by default. kernel_size: of U and V.
        causal: no frame sees a later one. dropout: rate in U and V.
    """

    def __init__(
        self,
        dim: int,
        inner: int = 256,
        order: int = 20,
        depth: int = 2,
        hidden: int | None = None,
        kernel_size: int = 17,
        causal: bool = False,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.reduce = nn.Linear(dim, inner)
        self.prelu = nn.PReLU()
        self.norm_in = nn.LayerNorm(inner)
        self.u = ConvProjection(inner, inner, nn.LayerNorm(inner), kernel_size, causal, dropout)
        self.v = ConvProjection(inner, inner, nn.LayerNorm(inner), kernel_size, causal, dropout)
        self.fsmn = FSMN(inner, hidden, order, depth, causal)
        self.norm_out = nn.LayerNorm(inner)
        self.expand = nn.Linear(inner, dim)

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        mask: Bool[Tensor, "b n"] | None = None,
        state: dict | None = None,
    ) -> Float[Tensor, "b n c"]:
        h = self.norm_in(self.prelu(self.reduce(x)))
        h = self.v(h, mask, state) * self.fsmn(self.u(h, mask, state), mask, state) + h
        return x + self.expand(self.norm_out(h))
