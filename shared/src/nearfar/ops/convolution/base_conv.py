"""BaseConv: a gate and a convolution, the smallest gated-convolution mixer."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.ops.common.streaming import State, StreamingMixer, in_pieces
from nearfar.ops.convolution.causal import ExplicitLongConv, ImplicitLongConv, LongConv, ShortConv


class BaseConv(StreamingMixer):
    """`y = a(conv(u)) * a(W u + b) + u`, a the identity or SiLU (Zoology, arXiv 2312.04927).

    conv is a depthwise causal convolution with `kernel_size` taps, or, with `kernel_size=-1`, one as long as the
    sequence plus its own input (conv(u) + u); its taps are parameters or, with `implicit=True`, come from a small
    network. Published models give each layer its own kernel size, for example 3, -1, 3, -1.

    Cost: O(N d K), long O(N d log N). State: d K, long d N.

    Args:
        dim: channels d.
        kernel_size: taps, or -1 for a long convolution.
        max_length: longest sequence; needed by the long convolution only.
        implicit: where the long convolution's taps come from.
        activation: SiLU on both factors.
        wrap: of the long convolution with explicit taps, see `ExplicitLongConv`.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 3,
        max_length: int | None = None,
        implicit: bool = True,
        activation: bool = False,
        wrap: bool = False,
    ):
        super().__init__()
        if kernel_size == 0 or kernel_size < -1:
            raise ValueError(f"kernel_size={kernel_size} must be at least 1, or -1 for a long convolution")
        if kernel_size == -1 and max_length is None:
            raise ValueError("a long convolution (kernel_size=-1) needs max_length")
        self.activation = activation
        self.projection = nn.Linear(dim, dim)
        self.conv: ShortConv | LongConv
        if kernel_size > 0:
            self.conv = ShortConv(dim, kernel_size)
        elif implicit:
            self.conv = ImplicitLongConv(dim, max_length)
        else:
            self.conv = ExplicitLongConv(dim, max_length, wrap)

    def gate(self, x: Tensor, convolved: Tensor) -> Tensor:
        """The formula, given the convolution of x and its skip."""
        gate = self.projection(x)
        if self.activation:
            convolved, gate = F.silu(convolved), F.silu(gate)
        return convolved * gate + x

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        if isinstance(self.conv, LongConv):
            return self.gate(x, self.conv.with_skip(x, 1.0))
        return in_pieces(self.extend, x)

    def extend(self, x: Tensor, state: State | None = None, lengths: Tensor | None = None) -> tuple[Tensor, State]:
        convolved, state = self.conv.extend(x, state, lengths)
        return self.gate(x, convolved + x if isinstance(self.conv, LongConv) else convolved), state

    def state_size(self, length: int) -> int:
        return self.conv.state_size(length)
