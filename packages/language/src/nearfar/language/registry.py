"""The sequence mixers, state mixers and norms by the names that a config uses."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from nearfar.core.errors import UserError
from nearfar.language.blocks import GLU, MLP, Identity, PlainLayerNorm, mega, tcnca, tcnca_simple
from nearfar.ops.aggregation.depth_attention import DepthAttention
from nearfar.ops.attention.causal import CausalAttention
from nearfar.ops.attention.gated import NormedFeedForward
from nearfar.ops.attention.grouped import LatentAttention, RotaryAttention
from nearfar.ops.common.streaming import StreamingMixer
from nearfar.ops.convolution.base_conv import BaseConv
from nearfar.ops.convolution.hyena import Hyena
from nearfar.ops.recurrence.based import Based
from nearfar.ops.recurrence.delta import DeltaNet, GatedDeltaNet, GatedLinearAttention, KimiDeltaAttention
from nearfar.ops.recurrence.h3 import H3
from nearfar.ops.recurrence.mamba import Mamba
from nearfar.ops.recurrence.retnet import Retention
from nearfar.ops.recurrence.rwkv4 import RWKV4ChannelMix, RWKV4TimeMix
from nearfar.ops.recurrence.rwkv7 import RWKV7TimeMix
from nearfar.ops.tokens.experts import ExpertMixture
from nearfar.ops.tokens.selective_lookup import SelectiveLookup

MIXERS: dict[str, Callable[..., StreamingMixer]] = {
    "attention": CausalAttention,
    "sliding-attention": CausalAttention,
    "base-conv": BaseConv,
    "based": Based,
    "deltanet": DeltaNet,
    "gated-deltanet": GatedDeltaNet,
    "gla": GatedLinearAttention,
    "hyena": Hyena,
    "h3": H3,
    "kda": KimiDeltaAttention,
    "latent-attention": LatentAttention,
    "mamba": Mamba,
    "mega": mega,
    "retnet": Retention,
    "rotary-attention": RotaryAttention,
    "rwkv4": RWKV4TimeMix,
    "rwkv7": RWKV7TimeMix,
    "selective-lookup": SelectiveLookup,
    "tcnca": tcnca,
    "tcnca-simple": tcnca_simple,
}
"""Name in a config -> sequence mixer. To add one, derive from `StreamingMixer` and enter it here."""

STATE_MIXERS: dict[str, Callable[..., nn.Module]] = {
    "identity": Identity,
    "mlp": MLP,
    "glu": GLU,
    "experts": ExpertMixture,
    "nffn": NormedFeedForward,
    "rwkv4-channel-mix": RWKV4ChannelMix,
}
"""Name in a config -> what follows the sequence mixer at each position ("none": nothing, not even the residual)."""

NORMS: dict[str, Callable[..., nn.Module]] = {
    "layernorm": nn.LayerNorm,
    "plain-layernorm": PlainLayerNorm,
    "rmsnorm": nn.RMSNorm,
    "none": lambda dim, eps: nn.Identity(),
}

RESIDUALS = {"plain": None, "attention": DepthAttention}
"""Name in a config -> what makes a sub-layer's input of what came before it."""

Named = str | dict[str, Any]


def build(choice: Named, table: dict[str, Callable[..., Any]], what: str, **given: Any) -> Any:
    """The entry of `table` that `choice` names: a name, or `{"type": name, argument: value, ...}`.

    Arguments in `given` are handed over where the entry takes them and `choice` does not set them.
    """
    arguments = {"type": choice} if isinstance(choice, str) else dict(choice)
    name = arguments.pop("type", None)
    if name not in table:
        raise UserError(f"unknown {what} {name!r}; known are {', '.join(sorted(table))}")
    allowed = list(settings_of(table[name]))
    for argument in arguments:
        if argument not in allowed:
            raise UserError(f"{what} {name!r} has no setting {argument!r}; it has {', '.join(allowed[1:])}")
    if name == "sliding-attention" and arguments.get("window") is None:
        raise UserError("mixer 'sliding-attention' needs its window, for example {type: sliding-attention, window: 64}")
    try:
        return table[name](**{k: v for k, v in given.items() if k in allowed} | arguments)
    except ValueError as error:
        raise UserError(f"{what} {name!r}: {error}") from error


def settings_of(make: Callable[..., Any]) -> list[str]:
    """The names of what `make` takes, and of what it hands on to the class that it `accepts` the settings of."""
    names = [n for n, p in inspect.signature(make).parameters.items() if p.kind is not p.VAR_KEYWORD]
    handed_on = getattr(make, "accepts", None)
    if handed_on is None:
        return names
    more = [n for n in inspect.signature(handed_on).parameters if n not in (*names, "memory", "causal")]
    return names + more
