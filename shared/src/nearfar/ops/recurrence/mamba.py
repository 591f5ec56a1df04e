"""Mamba: the selective scan S6, in chunks of plain PyTorch with its own backward pass, and the block around it."""

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nearfar.ops.common.kernels import kernel
from nearfar.ops.common.precision import full_precision
from nearfar.ops.common.streaming import State, StreamingMixer, in_pieces, real_positions, wide
from nearfar.ops.convolution.causal import ShortConv

LANE = 8  # neighbours that are scanned one after the other, in all lanes of a block side by side
LOG2_E = math.log2(math.e)


def block_length(h: Tensor) -> int:
    """Positions whose states `h` exist at one time: 64, on a CPU as many as fit its cache."""
    return 64 if h.device.type != "cpu" else max(LANE, min(256, 2**19 // h.numel()) // LANE * LANE)


def scan_(a: Tensor, x: Tensor, start: Tensor, reverse: bool = False) -> None:
    """In place, `x[t] <- a[t] x[t-1] + x[t]` along axis 1, from `start` before it (`reverse`: from behind).

    a, x: `(B, T, ...)`; a is used up. `start`: `(B, ...)`. On a CPU long rows are scanned one by one: one pass over
    the numbers, where lanes need three. Short rows, whose time is that of the calls, and a GPU take lanes.
    """
    lanes = x.shape[1] // LANE
    if lanes < 2 or (x.device.type == "cpu" and start.numel() > 4096):
        scan_rows_(a, x, start, reverse)
        return
    whole = lanes * LANE  # what is left over at the end goes row by row
    if reverse and whole < x.shape[1]:
        scan_rows_(a[:, whole:], x[:, whole:], start, reverse)
        start = x[:, whole]
    grid_a, grid_x = (t[:, :whole].unflatten(1, (lanes, LANE)) for t in (a, x))
    order = range(LANE - 1, -1, -1) if reverse else range(LANE)
    for before, i in itertools.pairwise(order):
        grid_x[:, :, i].addcmul_(grid_a[:, :, i], grid_x[:, :, before])
        grid_a[:, :, i].mul_(grid_a[:, :, before])
    for j in range(lanes - 1, -1, -1) if reverse else range(lanes):
        grid_x[:, j].addcmul_(grid_a[:, j], start[:, None])
        start = grid_x[:, j, order[-1]]
    if not reverse and whole < x.shape[1]:
        scan_rows_(a[:, whole:], x[:, whole:], start)


def scan_rows_(a: Tensor, x: Tensor, start: Tensor, reverse: bool = False) -> None:
    """`scan_`, one row after the other."""
    rows = zip(a.unbind(1)[::-1], x.unbind(1)[::-1]) if reverse else zip(a.unbind(1), x.unbind(1))
    for decay, row in rows:
        start = row.addcmul_(decay, start)


class _Visits:
    """Reads and writes positions of `(B, N, G, ...)` in the order in which each of G groups visits them.

    order: `(G, N)`; None: from first to last, and every access is a view. A tensor with one group serves all.
    """

    def __init__(self, order: Tensor | None) -> None:
        self.flat = self.shared = None
        if order is not None:
            self.shared = order.T  # (N, G)
            self.flat = self.shared * len(order) + torch.arange(len(order), device=order.device)

    def index(self, t: Tensor, part: slice) -> Tensor:
        return (self.shared if t.shape[2] == 1 else self.flat)[part].reshape(-1)

    def take(self, t: Tensor, part: slice) -> Tensor:
        """`(B, T, G, ...)`: the positions that are visited in `part` of the order."""
        if self.flat is None:
            return t[:, part]
        picked = t.flatten(1, 2).index_select(1, self.index(t, part))
        return picked.unflatten(1, (-1, self.flat.shape[1]))

    def add_(self, t: Tensor, part: slice, value: Tensor) -> None:
        """Add `value` `(B, T, G, ...)` at the positions that are visited in `part` of the order."""
        if self.flat is None:
            t[:, part] += value if t.shape[2] == value.shape[2] else value.sum(2, keepdim=True)
        else:
            t.view(len(t), -1, *t.shape[3:]).index_add_(1, self.index(t, part), value.flatten(1, 2))


def _outer(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """`a (..., S)` times `b (..., E)`."""
    return torch.mul(a[..., None], b[..., None, :], out=out)


def _over_states(c: Tensor, h: Tensor) -> Tensor:
    """`sum_s c_s h_s`: c `(..., S)`, h `(..., S, E)`."""
    return c * h.squeeze(-2) if h.shape[-2] == 1 else (c[..., None, :] @ h).squeeze(-2)


def _over_channels(h: Tensor, e: Tensor) -> Tensor:
    """`sum_e h_e e_e`: h `(..., S, E)`, e `(..., E)`."""
    return (h @ e[..., None]).squeeze(-1)


class _SelectiveScan(torch.autograd.Function):
    """`h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t`, `y_t = C_t . h_t`, block by block.

    u, dt `(B, N, G, E)` (u also `(B, N, 1, E)`), A `(G, S, E)`, B, C `(B, N, G, S)`, h0 `(B, G, S, E)`, order `(G, N)`.
    Keeps the state between blocks only; the backward pass runs each block again. Decays are computed as powers of 2,
    which torch does three times as fast as powers of e.
    """

    @staticmethod
    def forward(ctx, u, dt, A, B, C, h0, order):
        h, starts, y, visits = h0, [], torch.zeros_like(dt), _Visits(order)
        rate, length = A * LOG2_E, block_length(h0)
        block = dt.new_empty(2, min(length, u.shape[1]) * h0.numel())  # memory that all blocks use in turn
        for t in range(0, u.shape[1], length):
            part = slice(t, t + length)
            starts.append(h)
            step = visits.take(dt, part)
            shape = (len(h), step.shape[1], *h.shape[1:])
            a, x = (m[: math.prod(shape)].view(shape) for m in block)
            torch.mul(step[..., None, :], rate, out=a).exp2_()
            _outer(visits.take(B, part), step * visits.take(u, part), out=x)
            scan_(a, x, h)
            visits.add_(y, part, _over_states(visits.take(C, part), x))
            h = x[:, -1].clone()
        ctx.save_for_backward(u, dt, A, B, C, *starts)
        ctx.order = order
        return y, h

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_h):
        u, dt, A, B, C, *starts = ctx.saved_tensors
        g, rate, length, visits = grad_h, A * LOG2_E, block_length(grad_h), _Visits(ctx.order)
        gu, gdt, gB, gC = (torch.zeros_like(t) for t in (u, dt, B, C))
        gA = torch.zeros_like(A)
        block = dt.new_empty(4, min(length, u.shape[1]) * g.numel())
        for t in reversed(range(0, u.shape[1], length)):
            part, start = slice(t, t + length), starts[t // length]
            step, into, row, column, gy = (visits.take(v, part) for v in (dt, u, B, C, grad_y))
            push = step * into
            shape = (len(g), step.shape[1], *g.shape[1:])
            scratch, h, w, a = (m[: math.prod(shape)].view(shape) for m in block)
            torch.mul(step[..., None, :], rate, out=a).exp2_()
            _outer(row, push, out=h)
            scan_(scratch.copy_(a), h, start)
            visits.add_(gC, part, _over_channels(h, gy))
            torch.mul(a[:, 0], start, out=w[:, 0])  # w: a_t h_{t-1}, what the decay of step t multiplied
            torch.mul(a[:, 1:], h[:, :-1], out=w[:, 1:])
            _outer(column, gy, out=h)  # h from here: the gradient of the states; step t hands a_t of it on to t - 1
            scratch[:, :-1] = a[:, 1:]
            scratch[:, -1] = 1
            scan_(scratch, h, g, reverse=True)
            visits.add_(gB, part, _over_channels(h, push))
            gdu = _over_states(row, h)
            visits.add_(gu, part, gdu * step)
            g = h[:, 0] * a[:, 0]
            w.mul_(h)
            gA += torch.mul(w, step[..., None, :], out=scratch).sum((0, 1))
            visits.add_(gdt, part, gdu * into + w.mul_(A).sum(-2))
        return gu, gdt, gA, gB, gC, g, None


def _traced_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h0: Tensor, order: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same for exported graphs and compiled training: log2 N steps that join ever longer runs, all at a time.

    As plain operations it needs no custom operator, but memory O(N E S).
    """
    visits, every = _Visits(order), slice(None)
    u, dt, B, C = (visits.take(t, every) for t in (u, dt, B, C))
    a = torch.exp(dt[..., None, :] * A)
    x = (dt * u)[..., None, :] * B[..., None]
    x = torch.cat([x[:, :1] + a[:, :1] * h0[:, None], x[:, 1:]], 1)
    run = 1
    while run < x.shape[1]:
        x = torch.cat([x[:, :run], x[:, run:] + a[:, run:] * x[:, :-run]], 1)
        a = torch.cat([a[:, :run], a[:, run:] * a[:, :-run]], 1)
        run *= 2
    y = (C[..., None] * x).sum(-2)
    if order is not None:
        there = order.argsort(-1).T * len(order) + torch.arange(len(order), device=order.device)
        y = y.flatten(1, 2).index_select(1, there.reshape(-1)).unflatten(1, order.T.shape)
    return y, x[:, -1]


@torch.library.custom_op("nearfar::selective_scan", mutates_args=())
def _compiled_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h0: Tensor, order: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same as one node of a compiled graph without gradients; the log2 N steps take 13 to 19 times as long."""
    return _SelectiveScan.apply(u, dt, A, B, C, h0, order)


@_compiled_scan.register_fake
def _(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h0: Tensor, order: Tensor | None) -> Any:
    return torch.empty_like(dt), torch.empty_like(h0)


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor | None = None,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    softplus: bool = False,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S6: `h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t`, `y_t = (C_t . h_t + D u_t) silu(z_t)` (Gu & Dao 2023,
    arXiv 2312.00752, eq. 2).

    The states of a block of at most 256 positions (64 on a GPU) exist at one time, forward and backward, so memory is
    that of u and y, plus the state before each block for the backward pass. Nothing is divided by a product of
    decays, so no length and no decay overflows. In float32 or better. Cost O(N E S). On CUDA mamba_ssm's kernel does
    a sequence without a state before it, where it is installed.

    Args:
        u: `(B, N, E)` input; `(B, N, E / G)` where all groups read the same.
        dt: `(B, N, E)` step sizes; 0 leaves the state alone.
        A: `(E, S)`, negative.
        B, C: `(B, N, S)`, or `(B, N, G, S)` for G groups of E / G neighbouring channels.
        state: h before the first position `(B, E, S)`; None: zeros.
        D: `(E,)` weight of the input in the output; None: 0.
        z: `(B, N, E)` gate; None: none.
        dt_bias: `(E,)`, added to dt.
        softplus: whether dt becomes `log(1 + e^(dt + dt_bias))`.
        order: `(G, N)` or `(N,)`, the positions in the order in which each group visits them; None: as they come.

    Returns:
        y `(B, N, E)` in u's type, each row at its position, and the last state `(B, E, S)`.
    """
    dtype = torch.promote_types(u.dtype, torch.float32)
    if B.dim() == 3:
        B, C = B[:, :, None], C[:, :, None]
    groups, s = B.shape[2:]
    b, n, e = dt.shape
    if e % groups:
        raise ValueError(f"{groups} groups do not divide {e} channels")
    if u.shape[-1] not in (e, e // groups):
        raise ValueError(f"u has {u.shape[-1]} channels; allowed are {e}, or {e // groups} that all groups share")
    if order is not None:
        if order.shape not in ((n,), (1, n), (groups, n)):
            raise ValueError(f"order has shape {tuple(order.shape)}; it must be ({groups}, {n}): groups, positions")
        order = order.expand(groups, n)
    if dt_bias is not None:
        dt = dt + dt_bias
    if softplus:
        dt = F.softplus(dt.to(dtype))
    fused = kernel(u, "mamba_ssm.ops.selective_scan_interface", "selective_scan_fn")
    with full_precision(u):
        if fused is not None and state is None:  # that kernel always starts from zeros
            y, h = _fused(fused, u, dt, A, B, C, order)
        else:
            x, step, B, C = (
                t.to(dtype) for t in (u.unflatten(-1, (-1, e // groups)), dt.unflatten(-1, (groups, -1)), B, C)
            )
            A = A.to(dtype).unflatten(0, (groups, -1)).transpose(-1, -2).contiguous()
            if state is None:
                state = torch.zeros(b, e, s, dtype=dtype, device=u.device)
            state = state.to(dtype).unflatten(1, (groups, -1)).transpose(-1, -2).contiguous()
            scan = _SelectiveScan.apply
            if torch.compiler.is_compiling() or u.is_meta:  # of a meta tensor shapes alone: the fewest calls
                graph = torch.is_grad_enabled() or torch.compiler.is_exporting() or u.is_meta
                scan = _traced_scan if graph else _compiled_scan
            y, h = scan(x, step, A, B, C, state, order)
            y, h = y.flatten(2), h.transpose(-1, -2).flatten(1, 2)
    if D is not None:
        y = torch.addcmul(y, D, u if u.shape[-1] == e else u.repeat(1, 1, groups))
    if z is not None:
        y = y * F.silu(z)
    return y.to(u.dtype), h


def _fused(kernel, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, order: Tensor | None):
    """The scan by mamba_ssm's kernel, which takes `(B, E, N)` from first to last."""
    groups, visits, every = B.shape[2], _Visits(order), slice(None)
    if u.shape[-1] < dt.shape[-1]:
        u = u.repeat(1, 1, groups)
    if order is not None:
        u, dt = (visits.take(t.unflatten(-1, (groups, -1)), every).flatten(2) for t in (u, dt))
        B, C = visits.take(B, every), visits.take(C, every)
    swapped = (t.transpose(1, 2).contiguous() for t in (u, dt.to(u.dtype)))
    B, C = (t.squeeze(2).movedim(1, -1).contiguous() if groups == 1 else t.movedim(1, -1).contiguous() for t in (B, C))
    y, h = kernel(*swapped, A.float(), B, C, return_last_state=True)
    y = y.transpose(1, 2)
    if order is None:
        return y, h
    there = torch.zeros_like(y).unflatten(-1, (groups, -1))
    visits.add_(there, every, y.unflatten(-1, (groups, -1)))
    return there.flatten(2), h


def init_steps_(weight: Tensor, bias: Tensor) -> None:
    """In place: W_dt `(..., E, R)` uniform within R^-0.5; its bias such that dt is log-uniform in 0.001 .. 0.1."""
    bound = weight.shape[-1] ** -0.5
    nn.init.uniform_(weight, -bound, bound)
    with torch.no_grad():
        dt = torch.empty_like(bias).uniform_(math.log(1e-3), math.log(1e-1)).exp().clamp(min=1e-4)
        bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus undone


def init_decay_(A_log: Tensor) -> None:
    """In place: A = -exp(A_log) is -1 .. -S in every channel."""
    with torch.no_grad():
        steps = torch.arange(1, A_log.shape[-1] + 1, device=A_log.device, dtype=A_log.dtype)
        A_log.copy_(steps.log().expand_as(A_log))


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
        init_steps_(self.dt_proj.weight, self.dt_proj.bias)
        init_decay_(self.A_log)
        nn.init.ones_(self.D)

    def reset_linear(self, num_layers: int) -> None:
        """torch's usual values, the map to the residual smaller by sqrt(num_layers)."""
        for linear in (self.in_proj, self.x_proj, self.out_proj):
            linear.reset_parameters()
        with torch.no_grad():
            self.out_proj.weight.mul_(num_layers**-0.5)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return in_pieces(self.extend, x)

    def extend(self, x: Tensor, state: State | None = None, lengths: Tensor | None = None) -> tuple[Tensor, State]:
        conv_state, h = (None, None) if state is None else (state[:1], state[1])
        u, z = self.in_proj(x).chunk(2, -1)
        u, conv_state = self.conv.extend(u, conv_state, lengths)
        u = F.silu(u)
        r, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], -1)
        dt = F.softplus(self.dt_proj(r).to(wide(x)[0]))
        real = real_positions(x, lengths)
        if real is not None:
            dt = dt * real[..., None]
        A = -torch.exp(self.A_log.to(wide(self.A_log)[0]))
        y, h = selective_scan(u, dt, A, B, C, h, D=self.D, z=z)
        return self.out_proj(y), (*conv_state, h)

    def state_size(self, length: int) -> int:
        return self.inner * self.d_state
