"""Mamba: the selective scan S6, in chunks of plain PyTorch with its own backward pass, and the block around it."""

import itertools
import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nearfar.ops.common.kernels import kernel
from nearfar.ops.common.streaming import State, StreamingMixer, real_positions, wide
from nearfar.ops.convolution.causal import ShortConv

LANE = 8  # on a GPU: neighbours that are scanned one after the other, in all lanes of a block side by side
LOG2_E = math.log2(math.e)


def block_length(h: Tensor) -> int:
    """Positions whose states `h` exist at one time: 64, on a CPU fewer where these would not fit its cache."""
    return 64 if h.device.type != "cpu" else max(LANE, min(64, 2**19 // h.numel()))


def scan_(a: Tensor, x: Tensor, start: Tensor, reverse: bool = False) -> None:
    """In place, `x[t] <- a[t] x[t-1] + x[t]` along axis 1, from `start` before it (`reverse`: from behind).

    a, x: `(B, T, ...)`, T at most LANE or a multiple of it; a is used up. `start`: `(B, ...)`. On a CPU a block is
    small enough for its cache and is scanned row by row: one pass over the numbers, where lanes need three.
    """
    if x.device.type == "cpu":
        rows = zip(a.unbind(1)[::-1], x.unbind(1)[::-1]) if reverse else zip(a.unbind(1), x.unbind(1))
        for decay, row in rows:
            start = row.addcmul_(decay, start)
        return
    lane = min(LANE, x.shape[1])
    a, x = (t.view(t.shape[0], -1, lane, *t.shape[2:]) for t in (a, x))
    order = range(lane - 1, -1, -1) if reverse else range(lane)
    for before, i in itertools.pairwise(order):
        x[:, :, i].addcmul_(a[:, :, i], x[:, :, before])
        a[:, :, i].mul_(a[:, :, before])
    lanes = range(x.shape[1] - 1, -1, -1) if reverse else range(x.shape[1])
    for j in lanes:
        x[:, j].addcmul_(a[:, j], start[:, None])
        start = x[:, j, order[-1]]


class _Softplus(torch.autograd.Function):
    """`log(1 + e^x)` by log and exp, which run on vectors where torch's softplus runs on single numbers.

    z = e^-|x|; the rounding of 1 + z is put back to first order, so small results keep their relative precision.
    """

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        z = x.abs().neg_().exp_()
        one = z + 1
        lost = (z - (one - 1)).div_(one)
        return one.log_().add_(lost).add_(x.clamp(min=0))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * torch.sigmoid(x)


class _SelectiveScan(torch.autograd.Function):
    """`h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t`, `y_t = C_t . h_t`, block by block.

    u, dt `(B, N, G, E)`, A `(G, S, E)`, B, C `(B, N, G, S)`, h0 `(B, G, S, E)`; N a multiple of the lane. Keeps the
    state between blocks only; the backward pass runs each block again. Decays are computed as powers of 2, which
    torch does three times as fast as powers of e.
    """

    @staticmethod
    def forward(ctx, u, dt, A, B, C, h0):
        h, starts, y = h0, [], torch.empty_like(u)
        du, rate, length = dt * u, A * LOG2_E, block_length(h0)
        block = u.new_empty(2, min(length, u.shape[1]) * h0.numel())  # memory that all blocks use in turn
        for t in range(0, u.shape[1], length):
            part = slice(t, t + length)
            starts.append(h)
            shape = (len(h), du[:, part].shape[1], *h.shape[1:])
            a, x = (m[: math.prod(shape)].view(shape) for m in block)
            torch.mul(dt[:, part, :, None], rate, out=a).exp2_()
            torch.mul(du[:, part, :, None], B[:, part, ..., None], out=x)
            scan_(a, x, h)
            y[:, part] = (C[:, part, :, None] @ x).squeeze(-2)
            h = x[:, -1].clone()
        ctx.save_for_backward(u, dt, A, B, C, *starts)
        return y, h

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_h):
        u, dt, A, B, C, *starts = ctx.saved_tensors
        later = F.pad(dt, (0, 0, 0, 0, 0, 1))  # one step of dt = 0 behind the end: exp(0) hands grad_h on
        du, g, rate, length = dt * u, grad_h, A * LOG2_E, block_length(grad_h)
        gu, gdt, gB, gC = (torch.empty_like(t) for t in (u, dt, B, C))
        gA = torch.zeros_like(A)
        block = u.new_empty(4, (min(length, u.shape[1]) + 1) * g.numel())
        for t in reversed(range(0, u.shape[1], length)):
            part, start = slice(t, t + length), starts[t // length]
            step, push, gy = dt[:, part], du[:, part], grad_y[:, part]
            shape = (len(g), step.shape[1], *g.shape[1:])
            scratch, h, w = (m[: math.prod(shape)].view(shape) for m in block[:3])
            a = block[3, : g.numel() * (shape[1] + 1)].view(len(g), shape[1] + 1, *g.shape[1:])
            torch.mul(later[:, t : t + shape[1] + 1, :, None], rate, out=a).exp2_()
            torch.mul(push[..., None, :], B[:, part, ..., None], out=h)
            scan_(scratch.copy_(a[:, :-1]), h, start)
            gC[:, part] = (h @ gy[..., None]).squeeze(-1)
            torch.mul(a[:, 0], start, out=w[:, 0])  # w: a_t h_{t-1}, what the decay of step t multiplied
            torch.mul(a[:, 1:-1], h[:, :-1], out=w[:, 1:])
            torch.mul(C[:, part, ..., None], gy[..., None, :], out=h)
            scan_(scratch.copy_(a[:, 1:]), h, g, reverse=True)
            gB[:, part] = (h @ push[..., None]).squeeze(-1)
            gdu = (B[:, part, :, None] @ h).squeeze(-2)
            gu[:, part] = gdu * step
            w.mul_(h)
            gA += torch.mul(w, step[:, :, :, None], out=scratch).sum((0, 1))
            gdt[:, part] = gdu * u[:, part] + w.mul_(A).sum(-2)
            g = h[:, 0].clone()
        return gu, gdt, gA, gB, gC, g * torch.exp(dt[:, 0, :, None] * A)


def selective_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """S6: `h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t`, `y_t = C_t . h_t` (Gu & Dao 2023, arXiv 2312.00752, eq. 2).

    The states of a block of at most 64 positions exist at one time, forward and backward, so memory is that of u and
    y, plus the state before each block for the backward pass. Nothing is divided by a product of decays, so no
    length and no decay overflows. In float32 or better. Cost O(N E S). On CUDA mamba_ssm's kernel does a text without
    a state before it, where it is installed.

    Args:
        u: `(B, N, E)` input.
        dt: `(B, N, E)` step sizes, after softplus; 0 leaves the state alone.
        A: `(E, S)`, negative.
        B, C: `(B, N, S)`, or `(B, N, G, S)` for G groups of E / G neighbouring channels.
        state: h before the first position `(B, E, S)`; None: zeros.

    Returns:
        y `(B, N, E)` in u's type, and the last state `(B, E, S)`.
    """
    fused = kernel(u, "mamba_ssm.ops.selective_scan_interface", "selective_scan_fn")
    if fused is not None and state is None:  # that kernel always starts from zeros
        swapped = (t.transpose(1, 2).contiguous() for t in (u, dt.to(u.dtype)))
        B, C = (t.movedim(1, -1).contiguous() for t in (B, C))
        y, state = fused(*swapped, A.float(), B, C, return_last_state=True)
        return y.transpose(1, 2), state
    b, n, e = u.shape
    dtype, unchanged = wide(u)
    if B.dim() == 3:
        B, C = B[:, :, None], C[:, :, None]
    groups, s = B.shape[2:]
    if e % groups:
        raise ValueError(f"{groups} groups do not divide {e} channels")
    if state is None:
        state = torch.zeros(b, e, s, dtype=dtype, device=u.device)
    pad = -n % min(LANE, n)
    x, step, B, C = (
        F.pad(t.to(dtype), (0, 0, 0, 0, 0, pad))
        for t in (u.unflatten(-1, (groups, -1)), dt.unflatten(-1, (groups, -1)), B, C)
    )
    split = (groups, e // groups)
    A = A.to(dtype).unflatten(0, split).transpose(-1, -2).contiguous()
    state = state.to(dtype).unflatten(1, split).transpose(-1, -2).contiguous()
    with unchanged:
        y, h = _SelectiveScan.apply(x, step, A, B, C, state)
    return y[:, :n].flatten(2).to(u.dtype), h.transpose(-1, -2).flatten(1, 2)


class Mamba(StreamingMixer):
    """The Mamba block (Gu & Dao 2023, arXiv 2312.00752, section 3.4).

    (x, z) = W_in u, both E = expand d wide; x <- silu(short causal convolution of x); (r, B, C) = W_x x;
    dt = softplus(W_dt r + b); A = -exp(A_log); `y = S6(x, dt, A, B, C) + D x`; out = W_out (y silu(z)).

    Cost O(N d (d + S)). State: h, E S numbers, and the convolution's last inputs, E (K - 1), which the literature
    does not count. The released code needs a CUDA extension for speed; this is plain PyTorch.

    Args:
        dim: channels d.
        d_state: S, states per channel.
        d_conv: K, taps of the convolution.
        expand: E / d.
        dt_rank: width of r; None: ceil(d / 16).
        bias, conv_bias: biases in W_in and W_out, and in the convolution.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        bias: bool = False,
        conv_bias: bool = True,
    ):
        super().__init__()
        if min(d_state, d_conv, expand) < 1 or (dt_rank is not None and dt_rank < 1):
            raise ValueError(
                f"d_state={d_state}, d_conv={d_conv}, expand={expand} and dt_rank={dt_rank} must be at least 1"
            )
        self.inner, self.d_state = expand * dim, d_state
        self.dt_rank = math.ceil(dim / 16) if dt_rank is None else dt_rank
        self.in_proj = nn.Linear(dim, 2 * self.inner, bias=bias)
        self.conv = ShortConv(self.inner, d_conv, conv_bias)
        self.x_proj = nn.Linear(self.inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.inner)
        self.A_log = nn.Parameter(torch.empty(self.inner, d_state))
        self.D = nn.Parameter(torch.empty(self.inner))
        self.out_proj = nn.Linear(self.inner, dim, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A = -1 .. -S, D = 1, dt log-uniform in 0.001 .. 0.1 through the bias of W_dt."""
        bound = self.dt_rank**-0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        nn.init.ones_(self.D)
        with torch.no_grad():
            dt = torch.empty_like(self.D).uniform_(math.log(1e-3), math.log(1e-1)).exp().clamp(min=1e-4)
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus undone
            steps = torch.arange(1, self.d_state + 1, device=self.A_log.device, dtype=self.A_log.dtype)
            self.A_log.copy_(steps.log().expand_as(self.A_log))

    @torch.no_grad()
    def initialise(self, num_layers: int) -> None:
        """Keep torch's initial values for linear maps, the last one's divided by sqrt(layers)."""
        for linear in (self.in_proj, self.x_proj, self.out_proj):
            linear.reset_parameters()
        self.out_proj.weight.mul_(num_layers**-0.5)
        self.reset_parameters()

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return self.extend(x)[0]

    def extend(self, x: Tensor, state: State | None = None, lengths: Tensor | None = None) -> tuple[Tensor, State]:
        conv_state, h = (None, None) if state is None else (state[:1], state[1])
        u, z = self.in_proj(x).chunk(2, -1)
        u, conv_state = self.conv.extend(u, conv_state, lengths)
        u = F.silu(u)
        r, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], -1)
        dt = _Softplus.apply(self.dt_proj(r).to(wide(x)[0]))
        real = real_positions(x, lengths)
        if real is not None:
            dt = dt * real[..., None]
        A = -torch.exp(self.A_log.to(wide(self.A_log)[0]))
        y, h = selective_scan(u, dt, A, B, C, h)
        return self.out_proj((y + self.D * u) * F.silu(z)), (*conv_state, h)

    def state_size(self, length: int) -> int:
        return self.inner * self.d_state
