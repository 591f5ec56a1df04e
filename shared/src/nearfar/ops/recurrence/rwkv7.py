"""RWKV-7's time mixing: a generalized delta rule whose decay, removal and writing rate come from the input."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.ops.common.streaming import State, StreamingMixer, in_pieces, real_positions, shift_in, wide
from nearfar.ops.recurrence.delta import CHUNK, check_heads, chunked_recurrence, step_recurrence

FASTEST = -math.exp(-0.5)  # logarithm of the fastest decay of a step


class RWKV7TimeMix(StreamingMixer):
    """RWKV-7 time mixing ("Goose", Peng et al. 2025, arXiv 2503.14456).

    With x' the position before x (zero at first) and mix(x) = x + (x' - x) mu, each of r, w, k, v, a, g from a mix of
    its own: `r, k, v = W x`; `log decay = -e^(-1/2) sigmoid(w_0 + W_w2 tanh(W_w1 x))`; rate a = sigmoid(a_0 + W_a2
    W_a1 x); gate g = W_g2 sigmoid(W_g1 x). Per head, kappa = k k_k divided by its length, k <- k (1 + (a - 1) k_a):

        S_t = diag(w_t) S_{t-1} - (a_t kappa_t) (kappa_t^T S_{t-1}) + k_t v_t^T
        y_t = W_o (g_t (GroupNorm(S_t^T r_t) + (r_t . r_k k_t) v_t))

    The mixing of v with that of the first layer, which joins the layers of RWKV-7, is no part of this mixer: it is the
    first layer's form. The released code is a CUDA kernel; this is the chunked form of `chunked_recurrence`, in
    float32 or better. Cost O(N d (chunk log chunk + d / h)). State: x, and h matrices, d (d / h + 1) numbers.

    Args:
        dim: channels d. num_heads: heads h; must divide `dim`.
        rank: width inside the maps of w and a; None: 1.8 sqrt(d) in steps of 32, at least 32, as released.
        gate_rank: width inside the map of g; None: 0.6 d^0.8 likewise.
        chunk: positions that are worked on at once, a power of two.
    """

    no_weight_decay = ("mix", "r_k")

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        rank: int | None = None,
        gate_rank: int | None = None,
        chunk: int = CHUNK,
    ):
        super().__init__()
        check_heads(dim, num_heads)
        rank = max(32, round(1.8 * dim**0.5 / 32) * 32) if rank is None else rank
        gate_rank = max(32, round(0.6 * dim**0.8 / 32) * 32) if gate_rank is None else gate_rank
        if min(rank, gate_rank) < 1 or chunk < 1 or chunk & (chunk - 1):
            raise ValueError(f"rank={rank}, gate_rank={gate_rank} must be at least 1 and chunk={chunk} a power of two")
        self.dim, self.num_heads, self.chunk = dim, num_heads, chunk
        self.mix = nn.Parameter(torch.empty(6, dim))  # of r, w, k, v, a, g
        self.r_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.w_down, self.a_down = (nn.Linear(dim, rank, bias=False) for _ in range(2))
        self.w_up, self.a_up = (nn.Linear(rank, dim, bias=False) for _ in range(2))
        self.g_down, self.g_up = nn.Linear(dim, gate_rank, bias=False), nn.Linear(gate_rank, dim, bias=False)
        self.w_0, self.a_0, self.k_k, self.k_a = (nn.Parameter(torch.empty(dim)) for _ in range(4))
        self.r_k = nn.Parameter(torch.empty(num_heads, dim // num_heads))
        self.norm = nn.GroupNorm(num_heads, dim, eps=64e-5)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Decays from slow to fast over the channels, mixing half and half, k_k 0.85, k_a 1, the bonus r_k 0; the
        linear maps and the norm reset themselves."""
        with torch.no_grad():
            ramp = torch.linspace(0, 1, self.dim, device=self.w_0.device)
            self.w_0.copy_(-6.5 + 5 * ramp**0.85)
            for parameter, value in (
                (self.mix, 0.5),
                (self.a_0, 0.0),
                (self.k_k, 0.85),
                (self.k_a, 1.0),
                (self.r_k, 0.0),
            ):
                parameter.fill_(value)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return in_pieces(self.extend, x)

    def extend(self, x: Tensor, state: State | None = None, lengths: Tensor | None = None) -> tuple[Tensor, State]:
        before, memory = (x.new_zeros(len(x), 1, self.dim), None) if state is None else state
        change = torch.cat([before, x[:, :-1]], 1) - x
        of_r, of_w, of_k, of_v, of_a, of_g = (torch.addcmul(x, change, mix) for mix in self.mix.unbind(0))
        r, k, v = self.r_proj(of_r), self.k_proj(of_k), self.v_proj(of_v)
        w, a = self.w_up(torch.tanh(self.w_down(of_w))), self.a_up(self.a_down(of_a))
        gate = self.g_up(torch.sigmoid(self.g_down(of_g)))
        dtype, unchanged = wide(x)
        with unchanged:
            r, k, v, w, a, w_0, a_0, k_k, k_a, r_k = (
                t.to(dtype) for t in (r, k, v, w, a, self.w_0, self.a_0, self.k_k, self.k_a, self.r_k)
            )
            a = torch.sigmoid(a_0 + a)
            g = self.heads(FASTEST * torch.sigmoid(w_0 + w))
            kappa = F.normalize(self.heads(k * k_k), dim=-1)
            r, k, v, rate = (self.heads(t) for t in (r, k * (1 + (a - 1) * k_a), v, a))
            bonus = (r * k * r_k[:, None]).sum(-1, keepdim=True) * v
            removed = rate * kappa
            real = real_positions(x, lengths)
            if real is not None:
                real = real[:, None, :, None]
                k, g, removed = k * real, g * real, removed * real
            if memory is None:
                memory = v.new_zeros(*v.shape[:2], v.shape[-1], v.shape[-1])
            parts = (r, k, v, g, -kappa * torch.exp(-g), removed)  # the recurrence corrects the decayed state
            if x.shape[1] == 1:
                o, memory = step_recurrence(*parts, memory)
            else:
                o, memory = chunked_recurrence(*parts, memory, self.chunk)
            o = F.group_norm(
                rearrange(o, "b h n c -> (b n) (h c)"),
                self.num_heads,
                self.norm.weight.to(dtype),
                self.norm.bias.to(dtype),
                self.norm.eps,
            )
            o = o.view(x.shape) + rearrange(bonus, "b h n c -> b n (h c)")
        return self.out_proj(o.to(x.dtype) * gate), (shift_in(before, x, 1, lengths), memory)

    def heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "b n (h c) -> b h n c", h=self.num_heads)

    def state_size(self, length: int) -> int:
        return self.dim * (self.dim // self.num_heads + 1)
