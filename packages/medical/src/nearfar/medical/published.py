"""Reading published checkpoints: one function for the models of this package."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor, nn

from nearfar.core.checkpoints import load_state_dict, read_state_dict, unwrap

Rules = Iterable[tuple[str, str]]
"""Regular expressions and what takes their place, applied to a name one after the other."""

Checkpoint = str | Path | Mapping[str, Tensor]
"""A checkpoint file or what it holds."""


def open_checkpoint(source: Checkpoint) -> dict[str, Tensor]:
    """The tensors of a file or of a loaded mapping, without the wrappers that training scripts put around them."""
    return unwrap(source) if isinstance(source, Mapping) else read_state_dict(source)


def rename(state: Mapping[str, Tensor], rules: Rules) -> dict[str, Tensor]:
    """`state` with every name put through `rules`."""
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def loaded(model: nn.Module, state: Mapping[str, Tensor], ignore: Iterable[str] = ()) -> nn.Module:
    """`model` in eval mode with `state` in it, every key accounted for (CheckpointError otherwise)."""
    load_state_dict(model, state, ignore=ignore)
    return model.eval()


def count(state: Mapping[str, Tensor], pattern: str) -> int:
    """1 + the largest number that the one group of `pattern` captures at the start of a name; 0 without any."""
    found = [int(match.group(1)) for name in state if (match := re.match(pattern, name))]
    return max(found, default=-1) + 1
