"""Causal depthwise convolutions on sequences: short ones by shifted sums, long ones by FFT; both can stream."""

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.ops.common.real_fft import rfft
from nearfar.ops.common.streaming import State, StreamingMixer, shift_in
from nearfar.ops.common.tables import Derived


def fft_convolution(x: Tensor, taps: Tensor, skip: Tensor | float = 0.0) -> Tensor:
    """Causal convolution `y[t] = skip x[t] + sum_s taps[s] x[t - s]` over the last axis, by FFT, in float32 or better.

    x: `(..., N)`; taps: `(..., K)` with K <= N, leading axes broadcast; skip: a number or `(..., 1)`. Cost O(N log N).
    The transform is at least N + K - 1 long, so nothing wraps around from the end to the beginning.

    Without gradients on a CPU, the channels (axis 1 of three or more) go in parts of about 2^17 numbers, whose spectra
    stay in the caches: (1, 256, 2048) takes 14 ms in place of 23 (EPYC, Zen 3, one thread).
    """
    axis, parts = 1 - x.ndim, x.numel() >> 17 if x.is_cpu and not torch.compiler.is_compiling() else 0
    if parts < 2 or axis > -2 or x.shape[1] < 2 or torch.is_grad_enabled():
        return _fft_convolution(x, taps, skip)
    cut = [t.chunk(parts, axis) if _spans(t, axis) else itertools.repeat(t) for t in (x, taps, skip)]
    out = torch.empty_like(x)
    for y, *part in zip(out.chunk(parts, axis), *cut):
        y.copy_(_fft_convolution(*part))
    return out


def _spans(t: Tensor | float, axis: int) -> bool:
    """Whether a factor has an entry for each place along `axis`, counted from the end."""
    return isinstance(t, Tensor) and t.ndim >= -axis and t.shape[axis] > 1


def _fft_convolution(x: Tensor, taps: Tensor, skip: Tensor | float) -> Tensor:
    n = x.shape[-1]
    size = fast_length(n + taps.shape[-1] - 1)
    wide = torch.promote_types(x.dtype, torch.float32)
    product = rfft(x.to(wide), size) * (rfft(taps.to(wide), size) + skip)
    return torch.fft.irfft(product, n=size)[..., :n].to(x.dtype)


def fast_length(n: int) -> int:
    """The smallest 2^a, 3 * 2^a or 5 * 2^a that is at least n: lengths that an FFT likes."""
    return min(m << max(0, -(-n // m) - 1).bit_length() for m in (1, 3, 5))


class ShortConv(StreamingMixer):
    """Depthwise causal convolution with few taps: `y[t, c] = b[c] + sum_k w[c, 0, k] x[t - K + 1 + k, c]`.

    Cost O(N d K). State: the last K - 1 inputs, `d (K - 1)` numbers; the literature counts d K.
    The weight has the layout of `nn.Conv1d(d, d, K, groups=d)`.

    Up to 8 taps are summed from shifted inputs. Of 2^15 numbers and more, in float32 on a CPU, oneDNN convolves them
    channels-last instead, and the gradients are one more such convolution and K sums: for (1, 2048, 768), K = 3, this
    is 4.3 times as fast, 2.9 times in training; (4, 512, 128), K = 4: 2.2 and 1.8; (1, 64, 256), K = 4, would lose,
    0.64 and 0.69. (EPYC, Zen 3, one thread; 5.7 and 2.3 for the first with ATEN_CPU_CAPABILITY=default.)
    """

    def __init__(self, dim: int, kernel_size: int, bias: bool = True):
        super().__init__()
        if kernel_size < 1:
            raise ValueError(f"kernel_size={kernel_size} must be at least 1")
        self.dim, self.kernel_size = dim, kernel_size
        self.weight = nn.Parameter(torch.empty(dim, 1, kernel_size))
        self.bias = nn.Parameter(torch.empty(dim)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform within 1 / sqrt(K), torch's default for a depthwise convolution."""
        bound = self.kernel_size**-0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def convolve(self, x: Tensor, before: int) -> Tensor:
        """`(B, M, d)` after `before` zeros to `(B, M + before - K + 1, d)`."""
        if self.kernel_size <= 8 and suits_onednn(x, self.weight):
            return _CausalTaps.apply(x, self.weight, self.bias, before)
        x = F.pad(x, (0, 0, before, 0))
        if self.kernel_size > 8:
            return F.conv1d(x.transpose(1, 2), self.weight, self.bias, groups=self.dim).transpose(1, 2)
        n = x.shape[1] - self.kernel_size + 1
        taps = self.weight[:, 0].unbind(-1)
        y = x[:, :n] * taps[0] if self.bias is None else torch.addcmul(self.bias, x[:, :n], taps[0])
        for k, tap in enumerate(taps[1:], 1):
            y = torch.addcmul(y, x[:, k : k + n], tap)
        return y

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return self.convolve(x, self.kernel_size - 1)

    def extend(self, x: Tensor, state: State | None = None, lengths: Tensor | None = None) -> tuple[Tensor, State]:
        keep = self.kernel_size - 1
        if state is None:
            return self.convolve(x, keep), (shift_in(x.new_zeros(len(x), keep, self.dim), x, keep, lengths),)
        return self.convolve(torch.cat([state[0], x], 1), 0), (shift_in(state[0], x, keep, lengths),)

    def state_size(self, length: int) -> int:
        return self.dim * self.kernel_size


def suits_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN convolves `(B, M, d)` faster than shifted inputs are summed, which a compiler fuses."""
    return (
        x.is_cpu
        and not torch.compiler.is_compiling()
        and x.numel() >= 2**15
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
    )


def _depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
    """The depthwise convolution of `(B, M, d)` between `padding` zeros: `(B, M + 2 padding - K + 1, d)`."""
    grid = x.transpose(1, 2).unsqueeze(2)
    y = F.conv2d(grid, weight.unsqueeze(2), bias, padding=(0, padding), groups=len(weight))
    return y.squeeze(2).transpose(1, 2)


class _CausalTaps(torch.autograd.Function):
    """`y[t] = b + sum_k w[k] x[t - before + k]`; its gradients are written out, and can be differentiated again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, before: int) -> Tensor:
        return _depthwise(x, weight, bias, before)[:, : x.shape[1] + before - weight.shape[-1] + 1]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, int], output: Tensor) -> None:
        x, weight, _, ctx.before = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:  # type: ignore[override]
        (x, weight), n, before = ctx.saved_tensors, grad.shape[1], ctx.before
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _depthwise(grad, weight.flip(-1), None, weight.shape[-1] - 1)[:, before:]
        if ctx.needs_input_grad[1]:
            shifts = [(max(0, before - k), k - before) for k in range(weight.shape[-1])]
            taps = [(grad[:, first:] * x[:, first + shift : n + shift]).sum((0, 1)) for first, shift in shifts]
            grad_weight = torch.stack(taps, -1)[:, None]
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum((0, 1))
        return grad_x, grad_weight, grad_bias, None


class LongConv(StreamingMixer):
    """A causal convolution as long as the sequence; subclasses say in `taps(K)` what its first K taps are, `(d, K)`.

    Parallel: one FFT, O(N d log N). Streaming: the inputs so far are the state, `d N` numbers, and a new position
    costs O(N d): a long convolution has no state of constant size.

    Args:
        dim: channels d.
        max_length: taps that exist; a longer sequence is refused.
    """

    def __init__(self, dim: int, max_length: int):
        super().__init__()
        if max_length < 1:
            raise ValueError(f"max_length={max_length} must be at least 1")
        self.dim, self.max_length = dim, max_length
        self.kept = Derived()

    def taps(self, length: int) -> Tensor:
        raise NotImplementedError

    def known_taps(self, length: int) -> Tensor:
        """`taps`; without gradients they are kept, `d N` numbers, until a parameter changes or more are needed."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.taps(length)
        size = min(fast_length(length), self.max_length)
        weights = [*self.parameters(), *self.buffers()]
        return self.kept.get(weights, (size,), lambda: self.taps(size).contiguous())[:, :length]

    def check_length(self, length: int) -> None:
        if length > self.max_length:
            raise ValueError(f"a sequence of {length} positions is longer than max_length={self.max_length}")

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return self.with_skip(x, 0.0)

    def with_skip(self, x: Tensor, skip: Tensor | float) -> Tensor:
        """The convolution of x, plus `skip` x with a number or `(d, 1)`."""
        self.check_length(x.shape[1])
        return fft_convolution(x.transpose(1, 2), self.known_taps(x.shape[1]), skip).transpose(1, 2)

    def extend(self, x: Tensor, state: State | None = None, lengths: Tensor | None = None) -> tuple[Tensor, State]:
        past = x.new_zeros(x.shape[0], 0, self.dim) if state is None else state[0]
        n, total = x.shape[1], past.shape[1] + x.shape[1]
        self.check_length(total)
        both, taps = torch.cat([past, x], 1), self.known_taps(total)
        if n == 1:
            y = torch.einsum("bnd,dn->bd", both, taps.flip(-1).to(x.dtype))[:, None]
        else:
            y = fft_convolution(both.transpose(1, 2), taps).transpose(1, 2)[:, -n:]
        return y, (shift_in(past, x, total, lengths),)

    def state_size(self, length: int) -> int:
        return self.dim * length


class ExplicitLongConv(LongConv):
    """A long convolution whose taps are parameters, `filter` (d, max_length), drawn from N(0, 1).

    Args:
        wrap: compute as Zoology's code does, with a transform of 2 N that all max_length taps enter. For N <
            max_length - 1 it is too short: the end of the sequence leaks into the outputs at its beginning, so this
            form is not causal there and cannot stream. Only to reproduce published numbers.
    """

    def __init__(self, dim: int, max_length: int, wrap: bool = False):
        super().__init__(dim, max_length)
        self.wrap = wrap
        self.filter = nn.Parameter(torch.empty(dim, max_length))
        self.reset_parameters()

    @property
    def streams(self) -> bool:
        return not self.wrap

    def reset_parameters(self) -> None:
        nn.init.normal_(self.filter)

    def taps(self, length: int) -> Tensor:
        return self.filter[:, :length]

    def with_skip(self, x: Tensor, skip: Tensor | float) -> Tensor:
        n = x.shape[1]
        if not self.wrap or n >= self.max_length - 1:
            return super().with_skip(x, skip)
        product = rfft(x.transpose(1, 2), 2 * n) * (rfft(self.filter, 2 * n) + skip)
        return torch.fft.irfft(product, n=2 * n)[..., :n].transpose(1, 2)

    def extend(self, x: Tensor, state: State | None = None, lengths: Tensor | None = None) -> tuple[Tensor, State]:
        if self.wrap:
            raise ValueError("with wrap=True the beginning depends on the end, so it cannot stream; use wrap=False")
        return super().extend(x, state, lengths)


def position_features(max_length: int, features: int) -> Tensor:
    """`(max_length, features)`: time t in [0, 1], then real and imaginary parts of `exp(-i f w)`.

    w = 2 pi n / max_length and f runs evenly from 1e-4 to bands - 1, with bands = (features - 1) / 2.
    """
    if features < 3 or features % 2 == 0:
        raise ValueError(f"features={features} must be odd and at least 3: time, then pairs of sine and cosine")
    bands = (features - 1) // 2
    with torch.device("cpu"):  # also where the model is being made on "meta"
        n = torch.arange(max_length, dtype=torch.float64)[:, None]
        phase = torch.linspace(1e-4, bands - 1, bands, dtype=torch.float64) * (2 * math.pi * n / max_length)
        t = torch.linspace(0, 1, max_length, dtype=torch.float64)[:, None]
        return torch.cat([t, phase.cos(), -phase.sin()], -1).to(torch.get_default_dtype())


class ImplicitLongConv(LongConv):
    """A long convolution whose taps a small network writes: `taps = W2 relu(W1 p(n) + b1) + b2`.

    p(n) are the `position_features` of the tap. Zoology's LongConvolution (arXiv 2312.04927).
    """

    def __init__(self, dim: int, max_length: int, features: int = 3, hidden: int = 16):
        super().__init__(dim, max_length)
        self.register_buffer("positions", torch.empty(max_length, features))
        self.fc1 = nn.Linear(features, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The table of positions; the linear maps reset themselves."""
        self.positions.copy_(position_features(*self.positions.shape))

    def taps(self, length: int) -> Tensor:
        return self.fc2(F.relu(self.fc1(self.positions[:length]))).t()
