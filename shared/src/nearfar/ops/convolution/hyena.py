"""Hyena: gates around a long convolution whose filter a sine network writes."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.ops.common.streaming import State, StreamingMixer, in_pieces
from nearfar.ops.common.tables import cached_table
from nearfar.ops.convolution.causal import LongConv, ShortConv, position_features


@cached_table
def fading(
    length: int, dim: int, slow: float, fast: float, shift: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """`exp(-t |delta|) + shift`, `(length, dim)`."""
    t = torch.linspace(0, 1, length, dtype=dtype, device=device)[:, None]
    delta = torch.linspace(slow, fast, dim, dtype=dtype, device=device)
    return torch.exp(-t * delta.abs()) + shift


class HyenaFilter(LongConv):
    """Long convolution with taps `h(n) = MLP(p(n)) (exp(-t(n) |delta|) + shift)` and a skip: `y = h * x + bias x`.

    MLP: features to `order`, sine, `inner` times order to order with sine, then to d without bias; the sine is
    sin(f a) with one frequency f per unit, shared by all layers. delta runs evenly over the channels from
    log(target) / slow to log(target) / fast with `decay` = (slow, fast), t from 0 to 1 over max_length; `shift` is
    added to the exponential. `positions` (p) is learned too; the published recipe gives it its own learning rate,
    1e-5.
    """

    def __init__(
        self,
        dim: int,
        max_length: int,
        features: int = 3,
        order: int = 64,
        inner: int = 2,
        decay: Sequence[float] = (1.5, 0.3),
        target: float = 0.01,
        shift: float = 0.0,
    ):
        super().__init__(dim, max_length)
        self.target, self.decay, self.shift = target, decay, shift
        self.bias = nn.Parameter(torch.empty(dim))
        self.positions = nn.Parameter(torch.empty(max_length, features))
        self.frequency = nn.Parameter(torch.empty(order))
        self.layers = nn.ModuleList(nn.Linear(i, order) for i in (features, *[order] * inner))
        self.last = nn.Linear(order, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The skip from N(0, 1), frequencies 1, the table of positions; the linear maps reset themselves."""
        nn.init.normal_(self.bias)
        nn.init.ones_(self.frequency)
        with torch.no_grad():
            self.positions.copy_(position_features(*self.positions.shape))

    def taps(self, length: int) -> Tensor:
        h = self.positions[:length]
        for layer in self.layers:
            h = torch.sin(self.frequency * layer(h))
        slow, fast = (math.log(self.target) / part for part in self.decay)
        window = fading(self.max_length, self.dim, slow, fast, self.shift, h.dtype, h.device)
        return (self.last(h) * window[:length]).t()

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return self.with_skip(x, self.bias[:, None])

    def extend(self, x: Tensor, state: State | None = None, lengths: Tensor | None = None) -> tuple[Tensor, State]:
        y, state = super().extend(x, state, lengths)
        return y + self.bias * x, state


class Hyena(StreamingMixer):
    """Hyena of order 2 (Poli et al. 2023, arXiv 2302.10866), as Zoology uses it.

    (x1, x2, v) = short convolution of a linear map of x; then `y = W_o (x2 * filter(v * x1))`.

    Cost O(N d log N). State: the inputs of the long convolution, `d N` (and `3 d (K - 1)` of the short one, which
    the literature does not count). The published code also takes heads and blocks, which it computes wrongly for
    more than one; they are left out.

    Args:
        dim: channels d.
        max_length: longest sequence.
        order: width of the filter network.
        features: position features of the filter network; odd.
        kernel_size: taps of the short convolution.
        inner: layers of the filter network between its first and its last.
        decay, target, shift: how the filter fades, see `HyenaFilter`.
    """

    def __init__(
        self,
        dim: int,
        max_length: int,
        order: int = 64,
        features: int = 3,
        kernel_size: int = 3,
        inner: int = 2,
        decay: Sequence[float] = (1.5, 0.3),
        target: float = 0.01,
        shift: float = 0.0,
    ):
        super().__init__()
        self.in_proj = nn.Linear(dim, 3 * dim)
        self.short = ShortConv(3 * dim, kernel_size)
        self.filter = HyenaFilter(dim, max_length, features, order, inner, decay, target, shift)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        x2, gated = in_pieces(self.gates, x)
        return self.out_proj(x2 * self.filter(gated))

    def extend(self, x: Tensor, state: State | None = None, lengths: Tensor | None = None) -> tuple[Tensor, State]:
        short, long = (None, None) if state is None else (state[:1], state[1:])
        (x2, gated), short = self.gates(x, short, lengths)
        y, long = self.filter.extend(gated, long, lengths)
        return self.out_proj(y * x2), (*short, *long)

    def gates(
        self, x: Tensor, state: State | None = None, lengths: Tensor | None = None
    ) -> tuple[tuple[Tensor, Tensor], State]:
        """x2 and v * x1, and the state of the short convolution."""
        y, state = self.short.extend(self.in_proj(x), state, lengths)
        x1, x2, v = y.chunk(3, -1)
        return (x2, v * x1), state

    def state_size(self, length: int) -> int:
        return self.filter.state_size(length)
