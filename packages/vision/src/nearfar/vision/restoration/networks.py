"""Super-resolution networks by name, and by the checkpoint that holds one."""

import json
from functools import cache, partial
from inspect import signature
from pathlib import Path

from nearfar.core.cards import models
from nearfar.core.checkpoints import identify, read
from nearfar.core.errors import UserError
from nearfar.vision.restoration.restorer import Restorer, RestorerVariant


@cache
def restorers() -> dict[str, tuple[type[Restorer], RestorerVariant]]:
    """Every published super-resolution network by name: its class and variant."""
    classes = [model for model in models("nearfar.vision.restoration") if issubclass(model, Restorer)]
    return {name: (model, variant) for model in classes for name, variant in model.VARIANTS.items()}


def create_restorer(name: str, **settings: object) -> Restorer:
    """A published network with fresh weights; `settings` are constructor arguments that take precedence.

    Raises UserError for an unknown name.
    """
    if name not in restorers():
        raise UserError(f"{name}: no such model; known are {', '.join(sorted(restorers()))}")
    model, variant = restorers()[name]
    return model(**(variant.settings | settings))


def load_restorer(source: str | Path) -> Restorer:
    """The network in a checkpoint file of any registered system, in eval mode, or in a folder of `save_pretrained`.

    Raises CheckpointError where no system, or more than one, accounts for every tensor; each one's reason is listed.
    """
    path, config = Path(source), {}
    if path.is_dir():
        try:
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
            known = {name for model, _ in restorers().values() for name in signature(model).parameters}
            if not set(config) <= known:
                raise ValueError(f"unknown setting {', '.join(sorted(set(config) - known))}")
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path}: holds no network of `save_pretrained` ({error})") from error
        path = path / "model.safetensors"
    state = read(path)
    classes = {model.__name__: model for model, _ in restorers().values()}
    tries = {
        name: partial(model.from_published, state, **config)
        for name, model in classes.items()
        if set(config) <= set(signature(model).parameters)
    }
    return identify(tries, str(path))[1]
