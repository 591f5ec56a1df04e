"""RWKV-4's two halves: time mixing (a decayed softmax-like average per channel) and channel mixing."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nearfar.ops.common.kernels import kernel, one_node
from nearfar.ops.common.streaming import State, StreamingMixer, in_pieces, real_positions, shift_in, wide

CHUNK = 16
LOG2_E = math.log2(math.e)  # torch computes powers of 2 three times as fast as powers of e
NEVER = -1e30  # logarithm of a weight that is zero, finite so that differences stay defined

Weighted = tuple[Tensor, Tensor, Tensor]
"""Two weighted sums with their scale apart: (top, bottom, m) stands for top 2^m and bottom 2^m."""


def merge(first: Weighted, second: Weighted) -> Weighted:
    """The sums of both, on the larger of the two scales."""
    scale = torch.maximum(first[2], second[2]).detach()  # no result depends on it
    one, two = torch.exp2(first[2] - scale), torch.exp2(second[2] - scale)
    return torch.addcmul(first[0] * one, second[0], two), torch.addcmul(first[1] * one, second[1], two), scale


def decayed_sums(
    decay: Tensor,
    tensors: Sequence[Tensor],
    item: Callable[..., Weighted],
    see: Callable[..., Sequence[Tensor]],
    start: Weighted,
    reverse: bool = False,
) -> tuple[list[Tensor], Weighted]:
    """Go along positions with the sums of the items before, each decayed by `decay` `(d,)` per step since.

    At each position of the `tensors`, `(..., N, d)`, `see(sums, *rows)` is called once and gives rows of what is
    returned, `(..., N, d)` each; then `item(*rows)` joins the sums. All rows are `(..., d)`, as is `start`, the sums
    before the first position; those after the last are returned too. `reverse`: from the last position to the first.

    Chunks of 16 positions advance side by side, first for their totals alone. These are a sequence of the same kind,
    16 times shorter and 16 times faster decaying, so the function calls itself: log16(N) levels. Each sum keeps its
    own maximum, so keys of any size are exact.
    """
    n, flow = tensors[0].shape[-2], -1 if reverse else 1
    if n <= CHUNK:
        seen = []
        for i in range(n)[::flow]:
            rows = [t[..., i, :] for t in tensors]
            seen.append(see(start, *rows))
            start = merge((*start[:2], start[2] + decay), item(*rows))
        return [torch.stack(t[::flow], -2) for t in zip(*seen)], start
    if rest := n % CHUNK:
        seen = []
        for part in (slice(n - rest), slice(n - rest, n))[::flow]:
            out, start = decayed_sums(decay, [t[..., part, :] for t in tensors], item, see, start, reverse)
            seen.append(out)
        return [torch.cat(t[::flow], -2) for t in zip(*seen)], start
    tensors = [t.unflatten(-2, (-1, CHUNK)) for t in tensors]
    zero = torch.zeros_like(tensors[0][..., 0, :])
    _, totals = decayed_sums(decay, tensors, item, lambda *_: (), (zero, zero, zero + NEVER), reverse)
    starts, last = decayed_sums(decay * CHUNK, totals, lambda *t: t, lambda sums, *_: sums, start, reverse)
    found, _ = decayed_sums(decay, tensors, item, see, tuple(starts), reverse)
    return [t.flatten(-3, -2) for t in found], last


def plain_average(
    decay: Tensor, bonus: Tensor, k: Tensor, v: Tensor, top: Tensor, bottom: Tensor, m: Tensor, logs: bool = False
) -> tuple[Tensor, ...]:
    """wkv of `RWKV4TimeMix`, log2 of its denominators if wanted, and the sums after the last position on scales e^m.

    decay, bonus `(d,)`; k, v `(B, N, d)`; top, bottom, m `(B, d)`, the sums before.
    """
    one = torch.ones_like(decay)

    def see(sums: Weighted, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        above, below, scale = merge(sums, (value, one, (key + bonus) * LOG2_E))
        return above / below, *([scale + torch.log2(below)] if logs else [])

    seen, (top, bottom, m) = decayed_sums(
        decay * LOG2_E, (k, v), lambda key, value: (value, one, key * LOG2_E), see, (top, bottom, m * LOG2_E)
    )
    return *seen, top, bottom, m / LOG2_E


class _WeightedAverage(torch.autograd.Function):
    """`plain_average` that keeps its arguments and results for the backward pass, nothing of the steps between.

    No result depends on a scale as such, so it has no gradient. With B_t the denominator at position t and g_t the
    gradient of its output, the sums from behind

        P_t = sum_{s>t} e^((s-1-t) w) g_s / B_s,   Q_t = the same of g_s wkv_s,

    give the gradients `e^k P + e^(u+k) g / B` of v and `e^k (v P - Q) + e^(u+k) (v - wkv) g / B` of k.
    """

    @staticmethod
    def forward(ctx, decay, bonus, k, v, top, bottom, m):
        wkv, weight, *sums, scale = plain_average(decay, bonus, k, v, top, bottom, m, logs=True)
        ctx.save_for_backward(decay, bonus, k, v, top, bottom, m, wkv, weight, scale)
        ctx.mark_non_differentiable(scale)
        return wkv, *sums, scale

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_top, grad_bottom, _):
        decay, bonus, k, v, top, bottom, m, wkv, weight, scale = ctx.saved_tensors
        rate, bonus, m, one = decay * LOG2_E, bonus * LOG2_E, m * LOG2_E, torch.ones_like(decay)
        before, _ = decayed_sums(
            rate, (k, v), lambda key, value: (value, one, key * LOG2_E), lambda sums, *_: sums, (top, bottom, m)
        )
        grad_decay = grad_bonus = 0

        def item(key: Tensor, value: Tensor, mean: Tensor, weight: Tensor, g: Tensor, *_: Tensor) -> Weighted:
            return g, g * mean, -weight

        def see(
            sums: Weighted, key: Tensor, value: Tensor, mean: Tensor, weight: Tensor, g: Tensor, *before: Tensor
        ) -> tuple[Tensor, Tensor]:
            nonlocal grad_decay, grad_bonus
            (p, q, scale), (above, below, past) = sums, before
            own = torch.exp2(key * LOG2_E + bonus - weight) * g
            later = torch.exp2(key * LOG2_E + scale)
            through = own * (value - mean)
            grad_bonus = grad_bonus + through.sum(tuple(range(through.dim() - 1)))
            passed = torch.exp2(past + rate + scale) * (above * p - below * q)
            grad_decay = grad_decay + passed.sum(tuple(range(passed.dim() - 1)))
            return later * (value * p - q) + through, later * p + own

        (grad_k, grad_v), (p, q, scale) = decayed_sums(
            rate, (k, v, wkv, weight, grad, *before), item, see, (grad_top, -grad_bottom, -LOG2_E * scale), reverse=True
        )
        share = torch.exp2(m + scale)
        grad_top, grad_bottom = share * p, -share * q
        return grad_decay, grad_bonus, grad_k, grad_v, grad_top, grad_bottom, top * grad_top + bottom * grad_bottom


@torch.library.custom_op("nearfar::rwkv4_average", mutates_args=())
def _compiled_average(
    decay: Tensor, bonus: Tensor, k: Tensor, v: Tensor, top: Tensor, bottom: Tensor, m: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same as one node of a graph without gradients for a CPU, where compiling the steps takes minutes."""
    return plain_average(decay, bonus, k, v, top, bottom, m)


@_compiled_average.register_fake
def _(decay: Tensor, bonus: Tensor, k: Tensor, v: Tensor, top: Tensor, bottom: Tensor, m: Tensor) -> Any:
    return torch.empty_like(v), *(torch.empty_like(t) for t in (top, bottom, m))


def weighted_average(
    time_decay: Tensor, bonus: Tensor, k: Tensor, v: Tensor, state: Weighted
) -> tuple[Tensor, Weighted]:
    """wkv of `RWKV4TimeMix`, `(B, N, d)`, and the sums after the last position; k, v `(B, N, d)`, state `(B, d)`."""
    fused = kernel(k, "fla.ops.rwkv4", "fused_recurrent_rwkv4")
    if fused is not None:
        wkv, after = fused(time_decay, bonus, k, v, torch.stack(state, 1)[:, :, None])
        return wkv, tuple(after[:, :, 0].unbind(1))
    average = _compiled_average if one_node(k) else plain_average
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        average = _WeightedAverage.apply
    wkv, *after = average(-torch.exp(time_decay), bonus, k, v, *state)
    return wkv, tuple(after)


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

    def project(self, x: Tensor, before: Tensor) -> tuple[Tensor, ...]:
        """k, v and r of x with the position before it mixed in."""
        previous = torch.cat([before, x[:, :-1]], 1)
        parts = (self.key, self.mix_k), (self.value, self.mix_v), (self.receptance, self.mix_r)
        return tuple(linear(torch.lerp(previous, x, mix)) for linear, mix in parts)

    def extend(self, x: Tensor, state: State | None = None, lengths: Tensor | None = None) -> tuple[Tensor, State]:
        dtype, _ = wide(x)
        if state is None:
            zero = torch.zeros(x.shape[0], self.dim, dtype=dtype, device=x.device)
            state = (x.new_zeros(x.shape[0], 1, self.dim), zero, zero, zero + NEVER)
        k, v, r = self.project(x, state[0])
        k, v, time_decay, bonus = (t.to(dtype) for t in (k, v, self.time_decay, self.time_first))
        if lengths is not None:
            k = k.masked_fill(~real_positions(x, lengths)[..., None], NEVER)
        wkv, after = weighted_average(time_decay, bonus, k, v, state[1:])
        del k, v  # a text long
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
