"""Which of our models a released checkpoint holds."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nearfar.audio.separation.mossformer import MossFormer, MossFormer2, detect, published_state, read_published
from nearfar.audio.speakers.ltdnn import LTDNN
from nearfar.core.checkpoints import CheckpointError, identify, load_state_dict, read_state_dict, unwrap
from nearfar.core.errors import UserError
from nearfar.core.model_folder import AGAIN, KINDS, NEXT, read
from nearfar.core.reading import check_sizes, read_json, reading


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


def load_separator(path: str | Path, sample_rate: int | None = None, masking: bool | None = None) -> MossFormer:
    """A model from a folder that `save_pretrained` or a training wrote, or else from a released checkpoint.

    sample_rate, masking: for released checkpoints, see `MossFormer.from_published`.
    Raises UserError where there is neither.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such model; name a folder made by training, or a downloaded checkpoint")
    if (path / NEXT).exists() or (path / KINDS["separation model"]).exists():
        read(path, "separation model")
    if (path / "config.json").is_file() and (path / "model.safetensors").is_file():
        state = read_state_dict(path / "model.safetensors")
        if "encoder.weight" in state:
            cls = MossFormer2 if any(name.startswith("recurrent.") for name in state) else MossFormer
            config = path / "config.json"
            with reading(config, f"does not describe a {cls.__name__}", AGAIN):
                settings = read_json(config, "settings of a model")
                check_sizes(config, settings, path / "model.safetensors")
                if settings["depth"] > len(state):  # a block has many tensors
                    raise ValueError(f"depth is {settings['depth']}, with {len(state)} tensors")
                model = cls(**settings)
            with reading(path / "model.safetensors", "does not fit its config.json", AGAIN):
                load_state_dict(model, state)
            return model.eval()
    found = load_published(path, sample_rate=sample_rate, masking=masking)
    if not isinstance(found, MossFormer):
        raise CheckpointError(f"{path}: holds the weights of {type(found).__name__}, which separates no voices")
    return found
