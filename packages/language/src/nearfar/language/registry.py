"""The sequence mixers, state mixers and norms by the names that a config uses.

Every module of `nearfar.language.mixers` brings its own in tables `MIXERS` and `STATE_MIXERS`: name -> `Mixer`.
"""

import inspect
from collections.abc import Callable, Mapping
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from torch import nn

from nearfar.core.errors import UserError
from nearfar.language import mixers
from nearfar.language.blocks import PlainLayerNorm
from nearfar.language.cards import Mixer
from nearfar.ops.aggregation.depth_attention import DepthAttention
from nearfar.ops.attention.gated import ScalarNorm, SequenceBatchNorm


def gather(table: str) -> dict[str, Mixer]:
    found: dict[str, Mixer] = {}
    for module in iter_modules(mixers.__path__):
        own = getattr(import_module(f"{mixers.__name__}.{module.name}"), table, {})
        if twice := set(found) & set(own):
            raise ValueError(f"{module.name}: {', '.join(sorted(twice))} is the name of another mixer too")
        found |= own
    return found


MIXERS = gather("MIXERS")
"""Name in a config -> sequence mixer, whose operator is a `StreamingMixer`."""

STATE_MIXERS = gather("STATE_MIXERS")
"""Name in a config -> what follows the sequence mixer at each position ("none": nothing, not even the residual)."""

NORMS: dict[str, Callable[..., nn.Module]] = {
    "layernorm": nn.LayerNorm,
    "plain-layernorm": PlainLayerNorm,
    "rmsnorm": nn.RMSNorm,
    "scalenorm": ScalarNorm,
    "batchnorm": SequenceBatchNorm,
    "none": lambda dim, eps: nn.Identity(),
}

RESIDUALS = {"plain": Mixer(nn.Identity), "attention": Mixer(DepthAttention)}
"""Name in a config -> what makes a sub-layer's input of what came before it."""

Named = str | dict[str, Any]


def build(choice: Named, table: Mapping[str, Mixer], what: str, **given: Any) -> Any:
    """The entry of `table` that `choice` names: a name, or `{"type": name, argument: value, ...}`.

    Arguments in `given` are handed over where the entry takes them and `choice` does not set them.
    """
    arguments = {"type": choice} if isinstance(choice, str) else dict(choice)
    name: Any = arguments.pop("type", None)
    if name not in table:
        raise UserError(f"unknown {what} {name!r}; known are {', '.join(sorted(table))}")
    mixer = table[name]
    allowed = inspect.signature(mixer.operator).parameters
    for argument in arguments:
        if argument not in allowed:
            raise UserError(f"{what} {name!r} has no setting {argument!r}; it has {', '.join(list(allowed)[1:])}")
    for needed, example in mixer.required.items():
        if arguments.get(needed) is None:
            raise UserError(f"{what} {name!r} needs its {needed}, for example {{type: {name}, {needed}: {example}}}")
    try:
        return mixer.operator(**{k: v for k, v in given.items() if k in allowed} | arguments)
    except ValueError as error:
        raise UserError(f"{what} {name!r}: {error}") from error
