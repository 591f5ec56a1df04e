"""Which of our models a released checkpoint holds."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nearfar.audio.separation.mossformer import MossFormer, MossFormer2, detect, published_state, read_published
from nearfar.audio.speakers.ltdnn import LTDNN
from nearfar.core.checkpoints import CheckpointError, identify, unwrap


def load_published(source: str | Path | Mapping[str, Tensor], **settings: Any) -> nn.Module:
    """The model of a released checkpoint, a file, folder or state dict, with its weights, in evaluation mode.

    Exactly one class has to account for every tensor. settings: what names and shapes of a separator do not show, see
    `MossFormer.from_published`. Raises CheckpointError with the reason of each class where none or several fit,
    UserError where a setting is missing.
    """
    is_path = isinstance(source, str | Path)
    state = read_published(source) if is_path else unwrap(source, ())  # type: ignore[arg-type]
    attempts: dict[str, Callable[[], nn.Module]] = {"LTDNN": partial(LTDNN.from_published, state)}
    for kind in (MossFormer, MossFormer2):
        attempts[kind.__name__] = partial(_separator, kind, source, state, settings)
    return identify(attempts, str(source) if is_path else "the state dict")[1]


def _separator(
    kind: type[MossFormer],
    source: str | Path | Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    settings: Mapping[str, Any],
) -> nn.Module:
    found = detect(published_state(state))[0]
    if found is not kind:
        raise CheckpointError(f"its tensors are those of {found.__name__}")
    return kind.from_published(source, **settings)
