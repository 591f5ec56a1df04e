"""The sequence mixers, state mixers and norms by the names that a config uses.

Every module of `nearfar.language.mixers` brings its own in tables `MIXERS` and `STATE_MIXERS`: name -> `Mixer`. So does
a module that an installed package names as an entry point of the group `nearfar.mixers`, and a file that
`import_mixers` reads.
"""

import hashlib
import inspect
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from torch import nn

from nearfar.core.entry_points import load_entry_point
from nearfar.core.errors import UserError
from nearfar.core.reading import reading
from nearfar.language import mixers
from nearfar.language.blocks import PlainLayerNorm
from nearfar.language.cards import Mixer
from nearfar.ops.aggregation.depth_attention import DepthAttention
from nearfar.ops.attention.gated import ScalarNorm, SequenceBatchNorm

MIXERS: dict[str, Mixer] = {}
"""Name in a config -> sequence mixer, whose operator is a `StreamingMixer`."""

STATE_MIXERS: dict[str, Mixer] = {}
"""Name in a config -> what follows the sequence mixer at each position ("none": nothing, not even the residual)."""

IMPORTED: dict[str, str] = {}
"""File that `import_mixers` read -> digest of what it held: results depend on it."""


def add(module: Any) -> None:
    """Take in the tables of a module."""
    tables = [(MIXERS, getattr(module, "MIXERS", {})), (STATE_MIXERS, getattr(module, "STATE_MIXERS", {}))]
    if not any(own for _, own in tables):
        raise UserError(f"{module.__name__}: has no table MIXERS or STATE_MIXERS, name -> Mixer")
    for known, own in tables:
        if twice := set(known) & set(own):
            raise UserError(f"{module.__name__}: {', '.join(sorted(twice))} is the name of another mixer too")
        if odd := [name for name, mixer in own.items() if not isinstance(mixer, Mixer)]:
            raise UserError(f"{module.__name__}: {odd[0]} is no nearfar.language.cards.Mixer")
        known.update(own)


def import_mixers(path: str | Path) -> None:
    """Run a Python file and take in its tables `MIXERS` and `STATE_MIXERS`. Raises UserError where that fails."""
    path = Path(path)
    with reading(path, "cannot be imported", "it must be Python code with a table MIXERS or STATE_MIXERS"):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if IMPORTED.get(str(path)) == digest:
            return
        spec: Any = spec_from_file_location(path.stem, path)
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        add(module)
        IMPORTED[str(path)] = digest


for _module in iter_modules(mixers.__path__):
    add(import_module(f"{mixers.__name__}.{_module.name}"))
for _point in entry_points(group="nearfar.mixers"):
    add(load_entry_point(_point))

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
