"""RWKV-4's two halves: time mixing (a decayed softmax-like average per channel) and channel mixing."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.ops.common.kernels import kernel
from nearfar.ops.common.streaming import State, StreamingMixer, in_pieces, real_positions, shift_in, wide

CHUNK = 16
BLOCK = 512  # positions that are worked on at a time, so that a CPU's cache holds them
LOG2_E = math.log2(math.e)  # torch computes powers of 2 three times as fast as powers of e
NEVER = -1e30  # logarithm of a weight that is zero, finite so that differences stay defined

Weighted = tuple[Tensor, Tensor, Tensor]
"""A weighted sum with its scale apart: (top, bottom, m) stands for top e^m and bottom e^m."""


def merge(first: Weighted, second: Weighted) -> Weighted:
    """The sum of two weighted sums, on the larger of the two scales; no result depends on the scale's gradient."""
    scale = torch.maximum(first[2], second[2]).detach()
    one, two = (torch.exp2((part[2] - scale) * LOG2_E) for part in (first, second))
    return first[0] * one + second[0] * two, first[1] * one + second[1] * two, scale


def decayed_sums(decay: Tensor, items: Weighted, start: Weighted) -> tuple[Weighted, Weighted]:
    """Before each position, the sum of the items so far, each decayed by `decay` (negative) per step since.

    items: three tensors `(B, N, d)`; start: `(B, d)`, the sum before position 0. Returns the sums before each
    position `(B, N, d)` and the one after the last `(B, d)`.

    All chunks of 16 positions advance side by side; the chunks' totals are a sequence of the same kind, 16 times
    shorter and 16 times faster decaying, so the function calls itself: log16(N) levels, nothing in them grows with N
    but the tensors. Each sum keeps its own maximum, so keys of any size are exact.
    """
    b, n, d = items[0].shape
    if n <= CHUNK:
        before = []
        for item in zip(*(t.unbind(1) for t in items)):
            before.append(start)
            start = merge((start[0], start[1], start[2] + decay), item)
        return tuple(torch.stack(t, 1) for t in zip(*before)), start
    pad = -n % CHUNK
    folded = [F.pad(t, (0, 0, 0, pad), value=fill).reshape(-1, CHUNK, d) for t, fill in zip(items, (0.0, 0.0, NEVER))]
    nothing = folded[0].new_zeros(len(folded[0]), d)
    inside, total = decayed_sums(decay, tuple(folded), (nothing, nothing, nothing + NEVER))
    chunks, last = decayed_sums(decay * CHUNK, tuple(t.view(b, -1, d) for t in total), start)
    step = torch.arange(CHUNK, device=decay.device, dtype=decay.dtype)[:, None] * decay
    top, bottom, scale = (t[:, :, None] for t in chunks)
    merged = merge(tuple(t.view(b, -1, CHUNK, d) for t in inside), (top, bottom, scale + step))
    before = tuple(t.flatten(1, 2)[:, :n] for t in merged)
    return before, (last[0], last[1], last[2] - pad * decay)


def weighted_average(
    time_decay: Tensor, bonus: Tensor, k: Tensor, v: Tensor, state: Weighted
) -> tuple[Tensor, Weighted]:
    """wkv of `RWKV4TimeMix`, `(B, N, d)`, and the sums after the last position; k, v `(B, N, d)`, state `(B, d)`."""
    fused = kernel(k, "fla.ops.rwkv4", "fused_recurrent_rwkv4")
    if fused is not None:
        wkv, after = fused(time_decay, bonus, k, v, torch.stack(state, 1)[:, :, None])
        return wkv, tuple(after[:, :, 0].unbind(1))
    decay, out = -torch.exp(time_decay), []
    for key, value in zip(k.split(BLOCK, 1), v.split(BLOCK, 1)):
        one = torch.ones_like(value)
        before, state = decayed_sums(decay, (value, one, key), state)
        top, bottom, _ = merge(before, (value, one, key + bonus))
        out.append(top / bottom)
    return torch.cat(out, 1), state


class RWKV4TimeMix(StreamingMixer):
    """RWKV-4 time mixing (Peng et al. 2023, arXiv 2305.13048).

    With x' the position before x (zero at first): `k = W_k mix_k(x)`, likewise v, r, where mix(x) = x m + x' (1 - m);
    w = -exp(time_decay), u = time_first;

        wkv_t = (e^(u + k_t) v_t + sum_{s<t} e^((t-1-s) w + k_s) v_s) / (the same without v)
        y = W_o (sigmoid(r) * wkv)

    No biases. The released code has a CUDA kernel only, to length 1024 and in bfloat16 by default; here any length,
    in float32 or better. Cost O(N d). State: x, and the two sums with their scale, 4 d numbers. On CUDA fla's kernel
    takes over where it is installed.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim
        self.time_decay = nn.Parameter(torch.empty(dim))
        self.time_first = nn.Parameter(torch.empty(dim))
        self.mix_k, self.mix_v, self.mix_r = (nn.Parameter(torch.empty(dim)) for _ in range(3))
        self.key, self.value, self.receptance, self.output = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Decays from slow to fast over the channels, first-token bonus log 0.3, mixing half and half."""
        with torch.no_grad():
            self.time_decay.copy_(torch.linspace(-5, 3, self.dim))
            self.time_first.fill_(-1.2)
            for mix in (self.mix_k, self.mix_v, self.mix_r):
                mix.fill_(0.5)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return in_pieces(self.extend, x)

    def extend(self, x: Tensor, state: State | None = None, lengths: Tensor | None = None) -> tuple[Tensor, State]:
        dtype, _ = wide(x)
        if state is None:
            zero = torch.zeros(x.shape[0], self.dim, dtype=dtype, device=x.device)
            state = (x.new_zeros(x.shape[0], 1, self.dim), zero, zero, zero + NEVER)
        previous = torch.cat([state[0], x[:, :-1]], 1)
        k, v, r = (
            project(torch.lerp(previous, x, mix))
            for project, mix in (
                (self.key, self.mix_k),
                (self.value, self.mix_v),
                (self.receptance, self.mix_r),
            )
        )
        k, v, time_decay, bonus = (t.to(dtype) for t in (k, v, self.time_decay, self.time_first))
        if lengths is not None:
            k = k.masked_fill(~real_positions(x, lengths)[..., None], NEVER)
        wkv, after = weighted_average(time_decay, bonus, k, v, state[1:])
        if lengths is not None:  # the padding added nothing but its decay
            after = (*after[:2], after[2] + (x.shape[1] - lengths)[:, None] * torch.exp(time_decay))
        y = self.output(torch.sigmoid(r) * wkv.to(r.dtype))
        return y, (shift_in(state[0], x, 1, lengths), *after)

    def state_size(self, length: int) -> int:
        return 4 * self.dim


class RWKV4ChannelMix(StreamingMixer):
    """RWKV-4 channel mixing: `y = sigmoid(W_r mix_r(x)) * W_v relu(W_k mix_k(x))^2`, hidden width `mult d`.

    mix as in the time mixing; no biases. Cost O(N d^2 mult). State: the position before, d numbers.
    """

    def __init__(self, dim: int, mult: int = 4):
        super().__init__()
        if mult < 1:
            raise ValueError(f"mult={mult} must be at least 1")
        self.dim = dim
        self.mix_k, self.mix_r = (nn.Parameter(torch.empty(dim)) for _ in range(2))
        self.key = nn.Linear(dim, mult * dim, bias=False)
        self.receptance = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(mult * dim, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Mixing half and half."""
        for mix in (self.mix_k, self.mix_r):
            nn.init.constant_(mix, 0.5)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return in_pieces(self.extend, x)

    def extend(self, x: Tensor, state: State | None = None, lengths: Tensor | None = None) -> tuple[Tensor, State]:
        before = x.new_zeros(x.shape[0], 1, self.dim) if state is None else state[0]
        previous = torch.cat([before, x[:, :-1]], 1)
        k = F.relu(self.key(torch.lerp(previous, x, self.mix_k))).square()
        r = torch.sigmoid(self.receptance(torch.lerp(previous, x, self.mix_r)))
        return r * self.value(k), (shift_in(before, x, 1, lengths),)

    def state_size(self, length: int) -> int:
        return self.dim
