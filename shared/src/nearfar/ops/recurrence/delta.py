"""Linear attention with decays and the delta rule, in chunks: GLA, DeltaNet, Gated DeltaNet, Kimi delta attention."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.ops.common.streaming import State, StreamingMixer, in_pieces, real_positions, wide
from nearfar.ops.convolution.causal import ShortConv

CHUNK = 64


def decayed_products(q: Tensor, k: Tensor, g: Tensor) -> Tensor:
    """`P[t, s] = sum_c q[t, c] k[s, c] e^(g[s+1, c] + ... + g[t, c])` for s < t, 0 elsewhere.

    q, k `(..., T, c)`, g at most 0, `(..., T, c)`, or `(..., T, 1)` for one decay for all channels; T a power of two.
    The lower triangle is cut into squares, halves by halves; in each of them decays are counted from the middle, so no
    factor is above 1: no decay, however fast, overflows or costs its neighbours their digits.
    """
    n = q.shape[-2]
    if g.shape[-1] == 1:
        lags = g.expand(*g.shape[:-1], n).tril(-1).cumsum(-2)
        return (q @ k.mT * torch.exp(lags)).tril(-1)
    out, size = q.new_zeros(*q.shape[:-1], n), 1
    while size < n:
        later, earlier = (t.unflatten(-2, (-1, 2, size))[..., half, :, :] for t, half in ((q, 1), (k, 0)))
        before, after = g.unflatten(-2, (-1, 2, size)).unbind(-3)
        later, earlier = later * torch.exp(after.cumsum(-2)), earlier * torch.exp(remaining(before))
        blocks = out.view(*out.shape[:-2], n // size // 2, 2, size, n // size // 2, 2, size)
        blocks = blocks[..., 1, :, :, 0, :].diagonal(dim1=-4, dim2=-2)  # (..., size, size, blocks)
        blocks.copy_((later @ earlier.mT).movedim(-3, -1))
        size *= 2
    return out


def remaining(g: Tensor) -> Tensor:
    """The sums over the positions behind each one, `g[t+1] + ... + g[T-1]`, along the last axis but one."""
    return F.pad(g.flip(-2).cumsum(-2)[..., :-1, :], (0, 0, 1, 0)).flip(-2)


def chunked_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    state: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """A matrix-valued state that decays, is corrected by rank one, and is written to:

        D_t = diag(e^g_t) S_{t-1},   S_t = D_t + b_t (a_t^T D_t) + k_t v_t^T,   o_t = S_t^T q_t

    Without a there is no correction (gated linear attention); without b it goes along k, `k_t (v_t + D_t^T a_t)^T`,
    which is the delta rule for k_t = beta_t key_t and a_t = -key_t.

    Inside a chunk everything is a product of matrices: with `u_t = D_t^T a_t`, the pairs' decayed products P and the
    state S before the chunk, `(1 - P_ab) u = P_ak v + (a e^G) S`; the triangular system is solved for all chunks at
    once (the WY form of Yang et al. 2024, arXiv 2406.06484; with decays arXiv 2412.06464), which leaves one product
    of d_k x d_k and d_k x d_v from chunk to chunk. Cost O(N (chunk (d_k + d_v) + d_k d_v)), in the type of v.

    Args:
        q, k, a, b: `(..., N, d_k)`. v: `(..., N, d_v)`.
        g: logarithms of the decays, at most 0, `(..., N, d_k)`, or `(..., N, 1)` for one decay per position.
        state: S before the first position, `(..., d_k, d_v)`; None: zeros.
        chunk: positions per chunk, a power of two.

    Returns:
        o `(..., N, d_v)` and the last state.
    """
    n, d = q.shape[-2:]
    size = min(chunk, 1 << (n - 1).bit_length())
    pad = -n % size
    cut = lambda t: None if t is None else F.pad(t, (0, 0, 0, pad)).unflatten(-2, (-1, size))  # noqa: E731
    q, k, v, g, a, b = (cut(t) for t in (q, k, v, g, a, b))
    grown, left = torch.exp(g.cumsum(-2)), torch.exp(remaining(g))
    whole = grown[..., -1, :, None]  # (..., chunks, d_k or 1, 1)
    inside = decayed_products(q, k, g) + torch.diag_embed((q * k).sum(-1))
    written = (k * left).mT @ v
    if a is not None:
        same = b is None
        b = k if same else b
        pairs = decayed_products(a, b, g)
        right = v if same else decayed_products(a, k, g) @ v
        system = torch.eye(size, dtype=v.dtype, device=v.device) - pairs
        solved = torch.linalg.solve_triangular(
            system, torch.cat([right, a * grown], -1), upper=False, unitriangular=True
        )
        u, through = solved.split([v.shape[-1], d], -1)  # what u is without a state, and what it takes of the state
        across = inside if same else decayed_products(q, b, g) + torch.diag_embed((q * b).sum(-1))
        fading = (b * left).mT
        written = fading @ u if same else written + fading @ u
        carried = fading @ through
    if state is None:
        state = v.new_zeros(*v.shape[:-3], d, v.shape[-1])
    steps = zip(whole.unbind(-3), written.unbind(-3), whole.unbind(-3) if a is None else carried.unbind(-3))
    states = []
    for decay, new, carry in steps:
        states.append(state)
        after = decay * state + new
        state = after if a is None else after + carry @ state
    before = torch.stack(states, -3)
    o = (q * grown) @ before
    if a is None:
        o = o + inside @ v
    else:
        u = u + through @ before
        o = o + across @ u if same else o + inside @ v + across @ u
    return o.flatten(-3, -2)[..., :n, :], state


def step_recurrence(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, a: Tensor | None, b: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """`chunked_recurrence` for one position: q, k, a, b, g `(..., 1, d_k)`, v `(..., 1, d_v)`."""
    state = torch.exp(g).mT * state
    if a is not None:
        u = a @ state
        v, u = (v + u, None) if b is None else (v, u)
        state = state if u is None else state + b.mT * u
    state = state + k.mT * v
    return q @ state, state


def unit(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x divided by `sqrt(sum x^2 + eps)` over the last axis."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


class GatedNorm(nn.Module):
    """`weight * x / rms(x)` times a gate of the caller's, over the last axis, in float32 or better."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        y = F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)
        return y if gate is None else y * gate


class MatrixMemory(StreamingMixer):
    """What the mixers of this file share: heads, short convolutions, the recurrence and its state.

    A subclass gives `write(x, q, k)`, the recurrence's q, k, g and a, and `gate(x)`, what the normed output is
    multiplied with. The state is the matrix of each head, h d_k d_v numbers, and the convolutions' last inputs.
    """

    def __init__(self, dim: int, num_heads: int, key_dim: int, value_dim: int, conv_size: int, eps: float, chunk: int):
        super().__init__()
        if min(dim, num_heads, key_dim, value_dim) < 1:
            raise ValueError(
                f"dim={dim}, num_heads={num_heads} and the heads' widths {key_dim} and {value_dim} must be at least 1"
            )
        if conv_size < 0 or chunk < 1 or chunk & (chunk - 1):
            raise ValueError(f"conv_size={conv_size} must be 0 (none) or more and chunk={chunk} a power of two")
        self.dim, self.num_heads, self.key_dim, self.value_dim, self.chunk = dim, num_heads, key_dim, value_dim, chunk
        self.q_proj = nn.Linear(dim, num_heads * key_dim, bias=False)
        self.k_proj = nn.Linear(dim, num_heads * key_dim, bias=False)
        self.v_proj = nn.Linear(dim, num_heads * value_dim, bias=False)
        channels = num_heads * (2 * key_dim + value_dim)
        self.conv = ShortConv(channels, conv_size, bias=False) if conv_size else None
        self.norm = GatedNorm(value_dim, eps)
        self.out_proj = nn.Linear(num_heads * value_dim, dim, bias=False)

    def write(self, x: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q, k, g, a of `chunked_recurrence`, from x and the convolved q and k `(B, h, N, d_k)`."""
        raise NotImplementedError

    def gate(self, x: Tensor) -> Tensor | None:
        """`(B, N, h d_v)` or None."""
        return None

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return in_pieces(self.extend, x)

    def extend(self, x: Tensor, state: State | None = None, lengths: Tensor | None = None) -> tuple[Tensor, State]:
        qkv = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)
        memory, past = (None, ()) if state is None else (state[0], state[1:])
        if self.conv is not None:
            qkv, past = self.conv.extend(qkv, past or None, lengths)
            qkv = F.silu(qkv)
        dtype, unchanged = wide(x)
        keys = self.num_heads * self.key_dim
        q, k, v = (self.heads(t).to(dtype) for t in qkv.split([keys, keys, self.num_heads * self.value_dim], -1))
        q, k, g, a = self.write(x, q, k)
        with unchanged:
            real = real_positions(x, lengths)
            if real is not None:  # padding neither decays the state nor writes to it
                real = real[:, None, :, None]
                k, g = k * real, g * real
            if memory is None:
                memory = v.new_zeros(len(x), self.num_heads, self.key_dim, self.value_dim)
            if x.shape[1] == 1:
                o, memory = step_recurrence(q, k, v, g, a, None, memory)
            else:
                o, memory = chunked_recurrence(q, k, v, g, a, None, memory, self.chunk)
            gate = self.gate(x)
            o = self.norm(o, None if gate is None else self.heads(gate).to(dtype))
        return self.out_proj(rearrange(o, "b h n c -> b n (h c)").to(x.dtype)), (memory, *past)

    def heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "b n (h c) -> b h n c", h=self.num_heads)

    def state_size(self, length: int) -> int:
        return self.num_heads * self.key_dim * self.value_dim


class DeltaNet(MatrixMemory):
    """DeltaNet: `S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T`, `o_t = S_t^T q_t / sqrt(d_k)`, one S per head.

    The value that the state holds under the key k_t is replaced by v_t, as far as beta_t says. q, k, v: linear maps,
    causal depthwise convolution, SiLU; q and k of length 1; beta = sigmoid(W_b x). Each head's output is divided by
    its root mean square and weighted. No biases. Yang et al. 2024 (arXiv 2406.06484), in the form that
    flash-linear-attention gives it. Cost O(N d (chunk + d / h)).

    Args:
        dim: channels d. num_heads: heads h; must divide `dim`.
        conv_size: taps of the convolution, 0 for none.
        negative: beta in 0..2, so that the state's eigenvalues reach -1 (Grazzi et al. 2024, arXiv 2411.12537).
        eps: of the norm. chunk: positions that are worked on at once, a power of two.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        conv_size: int = 4,
        negative: bool = False,
        eps: float = 1e-5,
        chunk: int = CHUNK,
    ):
        check_heads(dim, num_heads)
        super().__init__(dim, num_heads, dim // num_heads, dim // num_heads, conv_size, eps, chunk)
        self.negative = negative
        self.b_proj = nn.Linear(dim, num_heads, bias=False)

    def write(self, x: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        q, k = unit(q) * self.key_dim**-0.5, unit(k)
        return q, self.beta(x, k) * k, self.decay(x, k), -k

    def beta(self, x: Tensor, k: Tensor) -> Tensor:
        return (torch.sigmoid(self.b_proj(x).to(k.dtype)) * (1 + self.negative)).mT[..., None]

    def decay(self, x: Tensor, k: Tensor) -> Tensor:
        """Logarithms of the decays, `(B, h, N, 1)` or `(B, h, N, d_k)`."""
        return torch.zeros_like(k[..., :1])


class GatedDeltaNet(DeltaNet):
    """Gated DeltaNet: DeltaNet whose state first decays, `D_t = e^g_t S_{t-1}`, by one number per head and position.

    g = -exp(A_log) softplus(W_a x + dt_bias); heads of their own width, values `expand` times as wide as keys; the
    normed output is gated by silu(W_g x). Yang, Kautz and Hatamizadeh 2024 (arXiv 2412.06464), in the form that
    flash-linear-attention gives it. Cost O(N h (chunk d_k + d_k d_v)).

    Args:
        dim: channels d. num_heads, head_dim: heads h and the width d_k of a key; None: 3/4 d / h.
        expand: d_v / d_k.
        conv_size, negative, eps, chunk: as in DeltaNet.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        head_dim: int | None = None,
        expand: int = 2,
        conv_size: int = 4,
        negative: bool = False,
        eps: float = 1e-5,
        chunk: int = CHUNK,
    ):
        if num_heads < 1 or expand < 1:
            raise ValueError(f"num_heads={num_heads} and expand={expand} must be at least 1")
        head_dim = max(1, 3 * dim // (4 * num_heads)) if head_dim is None else head_dim
        MatrixMemory.__init__(self, dim, num_heads, head_dim, expand * head_dim, conv_size, eps, chunk)
        self.negative = negative
        self.b_proj = nn.Linear(dim, num_heads, bias=False)
        self.a_proj = nn.Linear(dim, num_heads, bias=False)
        self.g_proj = nn.Linear(dim, num_heads * self.value_dim, bias=False)
        self.A_log, self.dt_bias = (nn.Parameter(torch.empty(num_heads)) for _ in range(2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """exp(A_log) uniform in 0..16, softplus(dt_bias) log-uniform in 0.001..0.1; the rest resets itself."""
        decay_parameters_(self.A_log, self.dt_bias)

    def decay(self, x: Tensor, k: Tensor) -> Tensor:
        rate = torch.exp(self.A_log.to(k.dtype)) * F.softplus(self.a_proj(x).to(k.dtype) + self.dt_bias.to(k.dtype))
        return -rate.mT[..., None]

    def gate(self, x: Tensor) -> Tensor:
        return F.silu(self.g_proj(x))


class KimiDeltaAttention(DeltaNet):
    """Kimi delta attention: the gated delta rule with a decay for each channel of the key.

    `D_t = diag(e^g_t) S_{t-1}`, then DeltaNet's step. g = -exp(A_log) softplus(F_b F_a x + dt_bias), A_log per head,
    F_a from d to the heads' width; with `lower_bound` l < 0 instead g = l sigmoid(exp(A_log) (F_b F_a x + dt_bias)).
    The normed output is gated by sigmoid(G_b G_a x). Kimi Linear (arXiv 2510.26692); transformers' code has no bias
    in G_b, flash-linear-attention's has one. Cost O(N h (chunk d_k log chunk + d_k d_v)), in float32 or better.

    Args:
        dim: channels d. num_heads, head_dim: heads h and their width; None: d / h.
        conv_size, negative, eps, chunk: as in DeltaNet.
        lower_bound: see above; None: unbounded.
        gate_bias: a bias in G_b.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        head_dim: int | None = None,
        conv_size: int = 4,
        negative: bool = False,
        lower_bound: float | None = None,
        gate_bias: bool = False,
        eps: float = 1e-5,
        chunk: int = CHUNK,
    ):
        if head_dim is None:
            check_heads(dim, num_heads)
            head_dim = dim // num_heads
        if lower_bound is not None and lower_bound >= 0:
            raise ValueError(f"lower_bound={lower_bound} must be below 0: it bounds the logarithm of a decay")
        MatrixMemory.__init__(self, dim, num_heads, head_dim, head_dim, conv_size, eps, chunk)
        self.negative, self.lower_bound = negative, lower_bound
        inner = num_heads * head_dim
        self.b_proj = nn.Linear(dim, num_heads, bias=False)
        self.f_a_proj, self.g_a_proj = (nn.Linear(dim, head_dim, bias=False) for _ in range(2))
        self.f_b_proj = nn.Linear(head_dim, inner, bias=False)
        self.g_b_proj = nn.Linear(head_dim, inner, bias=gate_bias)
        self.A_log, self.dt_bias = nn.Parameter(torch.empty(num_heads)), nn.Parameter(torch.empty(inner))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """exp(A_log) uniform in 1..16, softplus(dt_bias) log-uniform in 0.001..0.1; the rest resets itself."""
        decay_parameters_(self.A_log, self.dt_bias, slowest=1.0)

    def decay(self, x: Tensor, k: Tensor) -> Tensor:
        step = self.heads(self.f_b_proj(self.f_a_proj(x)).to(k.dtype) + self.dt_bias.to(k.dtype))
        rate = torch.exp(self.A_log.to(k.dtype))[:, None, None]
        if self.lower_bound is not None:
            return self.lower_bound * torch.sigmoid(rate * step)
        return -rate * F.softplus(step)

    def gate(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.g_b_proj(self.g_a_proj(x)))


class GatedLinearAttention(MatrixMemory):
    """GLA: `S_t = diag(e^g_t) S_{t-1} + k_t v_t^T`, `o_t = S_t^T q_t / sqrt(d_k)`, a decay for each channel of the key.

    g = log sigmoid(W_2 W_1 x + b) / `normalizer`; each head's output is divided by its root mean square, weighted and
    gated by silu(W_g x). Yang et al. 2023 (arXiv 2312.06635), in the form that flash-linear-attention gives it.
    Cost O(N d (chunk log chunk + d_k)).

    Args:
        dim: channels d. num_heads: heads h; must divide `dim`.
        expand_k: width of all keys over d, so d_k = expand_k d / h.
        rank: width between W_1 and W_2. normalizer: slows the decays down.
        conv_size: taps of a convolution on q, k and v, 0 for none. eps, chunk: as in DeltaNet.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        expand_k: float = 0.5,
        rank: int = 16,
        normalizer: float = 16.0,
        conv_size: int = 0,
        eps: float = 1e-5,
        chunk: int = CHUNK,
    ):
        check_heads(dim, num_heads)
        if rank < 1 or normalizer <= 0 or expand_k <= 0 or int(expand_k * dim) % num_heads:
            raise ValueError(
                f"rank={rank} must be at least 1, normalizer={normalizer} above 0, and expand_k * dim = "
                f"{expand_k * dim:g} a positive multiple of num_heads={num_heads}"
            )
        super().__init__(dim, num_heads, int(expand_k * dim) // num_heads, dim // num_heads, conv_size, eps, chunk)
        self.normalizer = normalizer
        self.gk_proj = nn.Sequential(
            nn.Linear(dim, rank, bias=False), nn.Linear(rank, num_heads * self.key_dim, bias=True)
        )
        self.g_proj = nn.Linear(dim, dim, bias=False)

    def write(self, x: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        g = F.logsigmoid(self.heads(self.gk_proj(x)).to(k.dtype)) / self.normalizer
        return q * self.key_dim**-0.5, k, g, None

    def gate(self, x: Tensor) -> Tensor:
        return F.silu(self.g_proj(x))


def check_heads(dim: int, num_heads: int) -> None:
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"num_heads={num_heads} must divide dim={dim}")


@torch.no_grad()
def decay_parameters_(A_log: Tensor, dt_bias: Tensor, slowest: float = 0.0) -> None:
    """exp(A_log) uniform in `slowest`..16, softplus(dt_bias) log-uniform in 0.001..0.1, in place."""
    A_log.uniform_(slowest, 16).clamp_(min=1e-4).log_()
    dt = torch.empty_like(dt_bias).uniform_(math.log(1e-3), math.log(1e-1)).exp_()
    dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus undone
