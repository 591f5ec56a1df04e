"""Mega's and TCNCA's layers, whole layers with norm and residual.

Mega (Ma et al., ICLR 2023, arXiv 2209.10655); TCNCA (Terzic et al. 2023, arXiv 2312.05605).
"""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from nearfar.core.cards import Card
from nearfar.language.cards import Mixer
from nearfar.ops.attention.gated import MegaLayer, MemoryAttention, NormedFeedForward
from nearfar.ops.convolution.tcn import TCNMixer
from nearfar.ops.recurrence.ema import DampedEMA

CARD = Card(
    "TCNCA",
    "2312.05605",
    "dilated convolutions or Mega's moving average, then gated attention inside chunks; TCNCA's sizes are inferred",
    3.7e-7,
    "none of TCNCA; Mega's enwik8 and Long Range Arena models",
)


def handing_on(layer: type[nn.Module]) -> Callable[[Callable[..., nn.Module]], Callable[..., nn.Module]]:
    """A maker that takes its own settings and, as `**settings`, those of `layer` but the ones it sets itself."""

    def sign(make: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        own = {n: p for n, p in inspect.signature(make).parameters.items() if p.kind is not p.VAR_KEYWORD}
        more = {n: p for n, p in inspect.signature(layer).parameters.items() if n not in (*own, "memory", "causal")}
        parameters = [p.replace(kind=p.KEYWORD_ONLY) if n in more else p for n, p in (own | more).items()]
        make.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return make

    return sign


@handing_on(MegaLayer)
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


@handing_on(MegaLayer)
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


@handing_on(MemoryAttention)
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


MIXERS = {
    "mega": Mixer(mega, "d n + c (z + v)"),
    "tcnca": Mixer(tcnca, "d R + c (z + v), R the field of the convolutions"),
    "tcnca-simple": Mixer(tcnca_simple, "d R + c (z + d), R the field of the convolutions"),
}

STATE_MIXERS = {"nffn": Mixer(NormedFeedForward)}
