"""H3: two state space models with gates between them, a shift and a diagonal one."""

import math

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.ops.common.real_fft import rfft
from nearfar.ops.common.streaming import FullPrecision, State, StreamingMixer, shift_in, wide
from nearfar.ops.convolution.causal import fft_convolution


class ShiftSSM(FullPrecision):
    """Convolution with `k[t] = sum_n B[n] C[n + t]`, t < N: a state space model that only shifts. Parameters (d, N).

    B starts as the first unit vector, so that k = C. In half precision the parameters stay in float32.
    """

    def __init__(self, dim: int, d_state: int):
        super().__init__()
        self.B = nn.Parameter(torch.empty(dim, d_state))
        self.C = nn.Parameter(torch.empty(dim, d_state))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.B)
        with torch.no_grad():
            self.B[:, 0] = 1
        nn.init.normal_(self.C)

    def taps(self) -> Tensor:
        """k, `(d, N)`: the correlation of B and C, as a convolution of C with B turned around."""
        n = self.C.shape[-1]
        size = 2 * n
        B, C = (t.to(wide(t)[0]) for t in (self.B, self.C))
        spectrum = rfft(B, size).conj() * rfft(C, size)
        return torch.fft.irfft(spectrum, n=size)[..., :n]


class DiagonalSSM(FullPrecision):
    """S4D: `s_t = Abar s_{t-1} + x_t`, `y_t = 2 Re sum_n Cbar_n s_t[n]`, N/2 complex modes for each of H heads.

    A = -exp(log_real) + i imag, dt = exp(log_dt), bilinear: Abar = (1 + dt A / 2) / (1 - dt A / 2) and
    Cbar = B C dt / (1 - dt A / 2). B and C are kept as pairs of reals. S4D (Gu et al. 2022, arXiv 2206.11893). In half
    precision the parameters stay in float32.
    """

    def __init__(self, heads: int, d_state: int):
        super().__init__()
        if d_state < 2 or d_state % 2:
            raise ValueError(f"d_state={d_state} must be even and at least 2: its modes come in conjugate pairs")
        modes = d_state // 2
        self.log_dt = nn.Parameter(torch.empty(heads))
        self.log_real = nn.Parameter(torch.empty(heads, modes))
        self.imag = nn.Parameter(torch.empty(heads, modes))
        self.B = nn.Parameter(torch.empty(heads, modes, 2))
        self.C = nn.Parameter(torch.empty(heads, modes, 2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A = -1/2 + i pi n, dt log-uniform in 0.001 .. 0.1, B = 1, C from N(0, 1)."""
        nn.init.uniform_(self.log_dt, math.log(1e-3), math.log(1e-1))
        nn.init.constant_(self.log_real, math.log(0.5))
        nn.init.normal_(self.C)
        with torch.no_grad():
            self.imag.copy_(torch.pi * torch.arange(self.imag.shape[1]).expand_as(self.imag))
            self.B.copy_(torch.tensor([1.0, 0.0]).expand_as(self.B))

    def discrete(self) -> tuple[Tensor, Tensor]:
        """log Abar and Cbar, both `(H, N/2)` complex."""
        dtype, _ = wide(self.C)
        A = torch.complex(-torch.exp(self.log_real.to(dtype)), self.imag.to(dtype))
        half = A * torch.exp(self.log_dt.to(dtype))[:, None] / 2
        dt = torch.exp(self.log_dt.to(dtype))[:, None]
        BC = torch.view_as_complex(self.B.to(dtype)) * torch.view_as_complex(self.C.to(dtype))
        return torch.log(1 + half) - torch.log(1 - half), BC * dt / (1 - half)

    def taps(self, length: int) -> Tensor:
        """The model as a convolution, `2 Re sum_n Cbar_n Abar_n^t`, `(H, length)`: one product of small matrices.

        t is split as t1 q + t0 with q = sqrt(length), so 2 q powers are enough.
        """
        log_A, C = self.discrete()
        coarse, fine = split_powers(log_A, length)
        coarse = coarse * C[:, None]
        left, right = torch.cat([coarse.real, -coarse.imag], -1), torch.cat([fine.real, fine.imag], -1)
        return 2 * (left @ right.mT).flatten(1)[:, :length]


def split_powers(log_A: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """`Abar^(q t1)` and `Abar^t0`, `(H, ., modes)`, q = ceil(sqrt(length)): all powers below `length` are products."""
    q = math.isqrt(length - 1) + 1
    step = torch.arange(max(q, -(-length // q)), device=log_A.device)[:, None]
    return torch.exp(log_A[:, None] * (q * step[: -(-length // q)])), torch.exp(log_A[:, None] * step[:q])


def powers(log_A: Tensor, length: int) -> Tensor:
    """`Abar^t`, t < length, `(H, length, modes)`."""
    coarse, fine = split_powers(log_A, length)
    return (coarse[:, :, None] * fine[:, None]).flatten(1, 2)[:, :length]


class H3(StreamingMixer):
    """H3 (Dao et al. 2023, arXiv 2212.14052).

    q, k, v are linear maps of x with bias; k <- shift(k) + D_k k. Channels are groups of m = head_dim; inside each
    group kv[i, j] = k_i v_j goes through the group's diagonal model, kv <- S4D(kv) + D kv, and o_j = sum_i q_i
    kv[i, j]. The result is laid out with j outside and the group inside, as the released code does, before the
    output map (bias).

    Parallel: FFT, O(N log N d m). Streaming: the last N_s - 1 keys, and N_s / 2 complex modes of each of the d m
    products, d (N_s - 1) + d m N_s numbers; the literature counts d N_s.

    Args:
        dim: channels d.
        d_state: N_s, taps of the shift and twice the modes of the diagonal model.
        head_dim: m; must divide `dim`.
    """

    def __init__(self, dim: int, d_state: int = 64, head_dim: int = 1):
        super().__init__()
        if head_dim < 1 or dim % head_dim:
            raise ValueError(f"head_dim={head_dim} must divide dim={dim}")
        self.dim, self.d_state, self.head_dim = dim, d_state, head_dim
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(dim, dim) for _ in range(4))
        self.shift = ShiftSSM(dim, d_state)
        self.diagonal = DiagonalSSM(dim // head_dim, d_state)
        self.D_k = nn.Parameter(torch.empty(dim))
        self.D = nn.Parameter(torch.empty(dim // head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Both skips from N(0, 1); the parts reset themselves."""
        nn.init.normal_(self.D_k)
        nn.init.normal_(self.D)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        k = self.k_proj(x)
        taps = self.shift.taps()[:, : x.shape[1]]
        kv = self.products(fft_convolution(k.transpose(1, 2), taps, self.D_k[:, None]).transpose(1, 2), x)
        taps = self.diagonal.taps(x.shape[1])[:, None, None]
        return self.output(x, fft_convolution(kv, taps, self.D[:, None, None, None]))

    def extend(self, x: Tensor, state: State | None = None, lengths: Tensor | None = None) -> tuple[Tensor, State]:
        b, n, d = x.shape
        log_A, C = self.diagonal.discrete()
        if state is None:
            m = self.head_dim
            state = (
                x.new_zeros(b, self.d_state - 1, d),
                torch.zeros(b, d // m, m, m, self.d_state // 2, dtype=C.dtype, device=x.device),
            )
        keys, modes = state
        raw = self.k_proj(x)
        both = torch.cat([keys, raw], 1)
        if n == 1:
            shifted = torch.einsum("bnd,dn->bd", both, self.shift.taps().flip(-1).to(x.dtype))[:, None]
        else:
            shifted = fft_convolution(both.transpose(1, 2), self.shift.taps()).transpose(1, 2)[:, -n:]
        kv = self.products(self.D_k * raw + shifted, x)
        table = powers(log_A, n)
        first = C * torch.exp(log_A)  # after t more steps the modes show with Cbar Abar^(t + 1)
        y = 2 * torch.einsum("bgijs,gns->bgijn", modes, first[:, None] * table).real
        recent = kv.to(y.dtype)
        y = (y + fft_convolution(recent, self.diagonal.taps(n)[:, None, None])).to(x.dtype)
        y = y + self.D[:, None, None, None] * kv
        end = torch.full((b,), n, device=x.device) if lengths is None else lengths
        if lengths is not None:  # the real positions to the end of the piece, so that all rows share one table
            empty = recent.new_zeros(b, 0, *recent.shape[1:4])
            recent = shift_in(empty, recent.movedim(-1, 1), n, lengths).movedim(1, -1)
        written = torch.einsum("bgijn,gns->bgijs", recent.to(C.dtype), table.flip(1))
        kept = modes * torch.exp(log_A * end[:, None, None])[:, :, None, None]
        return self.output(x, y), (shift_in(keys, raw, self.d_state - 1, lengths), kept + written)

    def products(self, k: Tensor, x: Tensor) -> Tensor:
        """k_i v_j of each group, `(B, g, m, m, N)`."""
        k, v = (rearrange(t, "b n (g m) -> b g m n", m=self.head_dim) for t in (k, self.v_proj(x)))
        return k[:, :, :, None] * v[:, :, None]

    def output(self, x: Tensor, kv: Tensor) -> Tensor:
        """`o_j = sum_i q_i kv[i, j]`, laid out (j, g), and the output map."""
        q = rearrange(self.q_proj(x), "b n (g m) -> b g m n", m=self.head_dim)
        o = (q[:, :, :, None] * kv).sum(2)
        return self.out_proj(rearrange(o, "b g j n -> b n (j g)"))

    def state_size(self, length: int) -> int:
        return self.dim * self.d_state
