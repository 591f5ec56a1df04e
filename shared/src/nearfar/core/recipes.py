"""Recipes: dataclasses read from YAML and `name=value` overrides."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import yaml

from nearfar.core.errors import UserError

Settings = TypeVar("Settings")


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number; YAML 1.1 takes only 1.0e-3 for one."""


def read_recipe(cls: type[Settings], path: str | Path | None = None, overrides: Iterable[str] = ()) -> Settings:
    """An instance of the dataclass `cls` from a YAML recipe and `name=value` overrides (values are read as YAML).

    Raises UserError for a file that is no mapping, an unknown name (listing the known ones) or a value that `cls`
    refuses.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader) or {}  # a SafeLoader
        except (OSError, yaml.YAMLError) as error:
            raise UserError(f"{path}: cannot be read as a YAML recipe ({str(error).splitlines()[0]})") from error
        if not isinstance(values, dict):
            raise UserError(f"{path}: a recipe is a list of `name: value` lines")
    for override in overrides:
        name, sign, value = override.partition("=")
        if not sign:
            raise UserError(f"{override}: an override is written name=value")
        values[name.strip()] = yaml.load(value, _Loader)
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    if unknown := [name for name in values if name not in known]:
        raise UserError(f"{path or 'recipe'}: unknown setting {', '.join(unknown)}; known are {', '.join(known)}")
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path or 'recipe'}: {error}") from error
