"""Parts of a language model that no operator is: state mixers, and mixers made of several operators."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from nearfar.ops.attention.gated import MegaLayer, MemoryAttention
from nearfar.ops.convolution.tcn import TCNMixer
from nearfar.ops.recurrence.ema import DampedEMA


class Identity(nn.Module):
    """The state mixer that changes nothing; its block still adds the normed residual."""

    def __init__(self, dim: int):
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x


class MLP(nn.Module):
    """`W2 gelu(W1 x)`, exact GELU, hidden width `hidden` or else mult * dim."""

    def __init__(self, dim: int, mult: int = 4, hidden: int | None = None, bias: bool = True):
        super().__init__()
        hidden = hidden or mult * dim
        self.fc1 = nn.Linear(dim, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class GLU(nn.Module):
    """`W3 ((W1 x) a(W2 x))`, a the exact GELU or SiLU ("silu"), hidden width `hidden` or else mult * dim."""

    def __init__(
        self, dim: int, mult: int = 4, hidden: int | None = None, bias: bool = False, activation: str = "gelu"
    ):
        super().__init__()
        if activation not in ("gelu", "silu"):
            raise ValueError(f"activation={activation!r} must be gelu or silu")
        hidden = hidden or mult * dim
        self.activation = F.gelu if activation == "gelu" else F.silu
        self.fc1 = nn.Linear(dim, 2 * hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.fc1(x).chunk(2, -1)
        return self.fc2(value * self.activation(gate))


class PlainLayerNorm(nn.LayerNorm):
    """LayerNorm without weights."""

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__(dim, eps, elementwise_affine=False)


def mega(
    dim: int,
    order: int = 16,
    truncation: int | None = None,
    bidirectional: bool = False,
    max_length: int | None = None,
    **settings: Any,
) -> MegaLayer:
    """Mega's layer: `MegaLayer` (whose settings are taken too) with `DampedEMA` as its long memory."""
    memory = DampedEMA(dim, order, bidirectional, truncation)
    return MegaLayer(dim, memory, causal=not bidirectional, **bias_length(max_length, settings))


def tcnca(
    dim: int,
    kernel_size: int = 17,
    dilation_factor: int = 17,
    depth: int = 3,
    layers_per_block: int = 1,
    groups: int | None = None,
    direction: str = "causal",
    dilations: list[int] | None = None,
    max_length: int | None = None,
    **settings: Any,
) -> MegaLayer:
    """TCNCA's layer: `MegaLayer` (whose settings are taken too) with `TCNMixer` as its long memory."""
    memory = TCNMixer(dim, kernel_size, dilation_factor, depth, layers_per_block, groups, direction, dilations)
    return MegaLayer(dim, memory, causal=direction == "causal", **bias_length(max_length, settings))


def tcnca_simple(
    dim: int,
    kernel_size: int = 17,
    dilation_factor: int = 17,
    depth: int = 3,
    dilations: list[int] | None = None,
    max_length: int | None = None,
    **settings: Any,
) -> MemoryAttention:
    """`MemoryAttention` (whose settings are taken too) with `TCNMixer` as its long memory."""
    memory = TCNMixer(dim, kernel_size, dilation_factor, depth, dilations=dilations)
    return MemoryAttention(dim, memory, **bias_length(max_length, settings))


def bias_length(max_length: int | None, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings, with the simple bias as long as the chunk, or where there is none as the longest sequence."""
    if settings.get("bias") == "simple" and settings.get("chunk") is None:
        return settings | {"max_length": max_length}
    return settings


mega.accepts = tcnca.accepts = MegaLayer
tcnca_simple.accepts = MemoryAttention
