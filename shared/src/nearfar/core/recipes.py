"""Recipes: dataclasses read from YAML and `name=value` overrides, every value checked against its annotation."""

import dataclasses
import math
import re
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml

from nearfar.core.errors import UserError

Settings = TypeVar("Settings")
Key = tuple[str | int, ...]
"""Where a value stands: names of settings and places in lists, from the outside in."""

MOST_BYTES, MOST_VALUES, MOST_DEPTH = 1 << 18, 20_000, 40
"""What a recipe may have, aliases followed: the reader's time and memory are bounded by it."""


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number; YAML 1.1 takes only 1.0e-3 for one."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def shipped_recipes(folder: Path) -> list[str]:
    """The names of the recipes in a folder of them."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def find_recipe(recipe: str | Path | None, folder: Path | None = None) -> Path | None:
    """The file of a recipe: one of those in `folder` by its name, else a path; None for None.

    A recipe's name comes before a file of that name, which is called `./NAME`.
    """
    if recipe is None:
        return None
    known = [] if folder is None else shipped_recipes(folder)
    if folder is not None and str(recipe) in known:
        return folder / f"{recipe}.yaml"
    if not Path(recipe).is_file():
        what = "is a folder, not a recipe" if Path(recipe).is_dir() else "no such recipe file"
        close = get_close_matches(str(recipe), known, 1)
        along = f", and none that comes along; those are {', '.join(known)}" if known else "; name a YAML file"
        raise UserError(f"{recipe}: {what}{along}{f' (is {close[0]} meant?)' if close else ''}")
    return Path(recipe)


def read_recipe(
    cls: type[Settings],
    recipe: str | Path | None = None,
    overrides: Iterable[str] = (),
    folder: Path | None = None,
) -> Settings:
    """An instance of the dataclass `cls` from a YAML recipe and `name=value` overrides (values are read as YAML).

    `recipe` is a path, or the name of one in `folder`. Every value must be of the type that the dataclass states for
    it, and every number finite; whole numbers stand for floats, lists for tuples. The last override of a name counts.

    Raises UserError that names file, line and setting, or the override as `--set name=value`: for what is no YAML
    mapping, a name that is unknown (with those that are near) or given twice, a value of another type or one that `cls`
    refuses.
    """
    source = _Source(str(recipe))
    values: dict[str, Any] = {}
    if (path := find_recipe(recipe, folder)) is not None:
        source = _Source(str(path))
        values = source.read_file(path)
    sources = dict.fromkeys(values, source)
    for override in overrides:
        setting = _Source(f"--set {override[:100]}", is_file=False)
        name, sign, text = (part.strip() for part in override.partition("="))
        if not (sign and name):
            raise UserError(f"{setting.name}: an override is written name=value")
        values[name], sources[name] = setting.parse(text, (name,)), setting
    known = [field.name for field in dataclasses.fields(cls) if field.init]  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise sources[name].error((name,), _unknown(name, known))
    hints = typing.get_type_hints(cls)
    checked = {name: _fit(value, hints[name], (name,), sources[name]) for name, value in values.items()}
    if lacking := _lacking(cls, checked):
        raise UserError(f"{source.name if path else cls.__name__}: lacks {', '.join(lacking)}")
    try:
        return cls(**checked)
    except (TypeError, ValueError, OverflowError) as error:
        named = [name for name in reversed(checked) if re.search(rf"\b{re.escape(name)}\b", str(error))]
        if named:
            raise sources[named[0]].error((named[0],), str(error)) from error
        place = source.name if path else ", ".join(dict.fromkeys(s.name for s in sources.values())) or cls.__name__
        raise UserError(f"{place}: {error}") from error


class _Source:
    """A file or an override: reads YAML and knows the line of each value."""

    def __init__(self, name: str, is_file: bool = True) -> None:
        self.name, self.is_file, self.count = name, is_file, 0
        self.lines: dict[Key, int] = {}

    def error(self, key: Key, what: str) -> UserError:
        """`what` is wrong with the value at `key`."""
        if not self.is_file:  # an override shows its setting itself
            inner = _path(key[1:]).lstrip(".")
            return UserError(f"{self.name}: {f'{inner}: ' if inner else ''}{what}")
        line = next((self.lines[key[:n]] for n in range(len(key), 0, -1) if key[:n] in self.lines), None)
        place = self.name if line is None else f"{self.name}, line {line}"
        return UserError(f"{place}, {_path(key)}: {what}" if key else f"{place}: {what}")

    def read_file(self, path: Path) -> dict[str, Any]:
        try:
            with path.open("rb") as stream:
                data = stream.read(MOST_BYTES + 1)
            if len(data) > MOST_BYTES:
                raise UserError(f"{path}: has more than {MOST_BYTES >> 10} kB, which no recipe has")
            text = data.decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read as a YAML recipe ({str(error).splitlines()[0]})") from error
        values = self.parse(text, ())
        if values is None:
            return {}
        if not isinstance(values, dict):
            raise UserError(f"{path}: a recipe is a list of `name: value` lines")
        return values

    def parse(self, text: str, key: Key) -> Any:
        """The value that YAML text stands for."""
        try:
            loader = _Loader(text)
            try:
                node = loader.get_single_node()
                return None if node is None else self.value(node, key, loader)
            finally:
                loader.dispose()
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
            why = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error).splitlines()[0]
            line = "" if mark is None or not self.is_file else f", line {mark.line + 1}"
            what = "cannot be read as a YAML recipe" if self.is_file else "the value cannot be read as YAML"
            raise UserError(f"{self.name}{line}: {what} ({why})") from error
        except RecursionError as error:
            raise UserError(f"{self.name}: is nested too deeply") from error

    def value(self, node: yaml.Node, key: Key, loader: _Loader) -> Any:
        self.lines[key] = node.start_mark.line + 1
        self.count += 1
        if self.count > MOST_VALUES or len(key) > MOST_DEPTH:
            raise UserError(f"{self.name}: has more values, or deeper ones, than any recipe (are there aliases?)")
        if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
            return [self.value(item, (*key, place), loader) for place, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
            found: dict[Any, Any] = {}
            for name_node, value_node in node.value:
                name = self.scalar(name_node, key, loader)
                self.lines[(*key, name)] = name_node.start_mark.line + 1
                if name in found:
                    raise self.error((*key, name), "is there twice; keep one")
                found[name] = self.value(value_node, (*key, name), loader)
            return found
        return self.scalar(node, key, loader)

    def scalar(self, node: yaml.Node, key: Key, loader: _Loader) -> Any:
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if not isinstance(node, yaml.ScalarNode) or kind not in ("str", "int", "float", "bool", "null"):
            shown = f"{node.value}" if isinstance(node, yaml.ScalarNode) else f"a {node.id}"
            raise self.error(key, f"{shown[:50]} ({node.tag.split(':')[-1]}) is no plain value; put text in quotes")
        if kind in ("int", "float") and re.match(r"[-+]?(0\d|.*:)", node.value):
            raise self.error(key, f"{node.value[:50]} is read in another base; write a decimal number or quotes")
        try:
            return loader.construct_object(node)
        except (ValueError, OverflowError) as error:
            raise self.error(key, f"{node.value[:50]} is no number ({error})") from error


def _path(key: Key) -> str:
    """As it is written in Python: model.dims[0]."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).lstrip(".")


def _unknown(name: Any, known: Sequence[str]) -> str:
    near = get_close_matches(str(name), known, 3, 0.5)
    meant = f"near are {', '.join(near)}; " if near else ""
    return f"unknown setting {name}; {meant}known are {', '.join(known)}"


def _lacking(cls: type, given: Collection[str]) -> list[str]:
    missing = dataclasses.MISSING
    return [
        field.name
        for field in dataclasses.fields(cls)
        if field.init and field.default is missing and field.default_factory is missing and field.name not in given
    ]


def _fit(value: Any, hint: Any, key: Key, source: _Source) -> Any:
    """`value` as the annotation `hint` wants it. Raises UserError."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is typing.Annotated:
        return _fit(value, arguments[0], key, source)
    if origin in (typing.Union, UnionType):
        return _fit_one_of(value, arguments, key, source)
    kind = origin or hint
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        hints, names = typing.get_type_hints(kind), [field.name for field in dataclasses.fields(kind) if field.init]
        for name in value:
            if name not in names:
                raise source.error((*key, name), _unknown(name, names))
        inner = {name: _fit(part, hints[name], (*key, name), source) for name, part in value.items()}
        if lacking := _lacking(kind, inner):  # type: ignore[arg-type]
            raise source.error(key, f"lacks {', '.join(lacking)}")
        try:
            return kind(**inner)  # type: ignore[operator]
        except (TypeError, ValueError, OverflowError) as error:
            raise source.error(key, str(error)) from error
    if isinstance(value, float | int) and not isinstance(value, bool):
        _check_number(value, key, source)
    if kind in (Any, object):
        return _all_finite(value, key, source)
    if kind is Literal and any(value == choice and type(value) is type(choice) for choice in arguments):
        return value
    if isinstance(kind, type) and issubclass(kind, Enum) and value in [member.value for member in kind]:
        return kind(value)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind in (int, str, bool, NoneType) and type(value) is kind:
        return value
    if isinstance(value, list) and kind in (tuple, list, Sequence):
        fixed = kind is tuple and arguments and Ellipsis not in arguments
        if fixed and len(value) != len(arguments):
            raise source.error(key, f"must be {_words(hint)}, got {len(value)} values")
        each = arguments if fixed else [arguments[0] if arguments else Any] * len(value)
        return (tuple if kind is tuple else list)(
            _fit(part, one, (*key, n), source) for n, (part, one) in enumerate(zip(value, each, strict=True))
        )
    if isinstance(value, dict) and kind in (dict, Mapping):
        of_names, of_values = arguments or (Any, Any)
        return {
            _fit(name, of_names, (*key, name), source): _fit(part, of_values, (*key, name), source)
            for name, part in value.items()
        }
    raise source.error(key, f"must be {_words(hint)}, got {_shown(value)}")


def _fit_one_of(value: Any, hints: Sequence[Any], key: Key, source: _Source) -> Any:
    """As the first of `hints` that takes it; where one takes only the outside, what is wrong inside is told."""
    inside: UserError | None = None
    for hint in sorted(hints, key=lambda hint: hint is float):  # a whole number stays one where that is allowed
        try:
            return _fit(value, hint, key, source)
        except UserError as error:
            container = get_origin(hint) or hint
            fits = isinstance(value, list) and container in (tuple, list, Sequence)
            fits |= isinstance(value, dict) and (container in (dict, Mapping) or dataclasses.is_dataclass(container))
            inside = error if fits or "finite" in str(error) else inside
    words = " or ".join(dict.fromkeys(_words(hint) for hint in hints))
    raise inside or source.error(key, f"must be {words}, got {_shown(value)}")


def _all_finite(value: Any, key: Key, source: _Source) -> Any:
    if isinstance(value, dict | list):
        for name, part in value.items() if isinstance(value, dict) else enumerate(value):
            _all_finite(part, (*key, name), source)
    elif isinstance(value, float):
        _check_number(value, key, source)
    return value


def _check_number(value: float, key: Key, source: _Source) -> None:
    try:
        finite = math.isfinite(value)
    except OverflowError:  # a whole number beyond the floats
        finite = False
    if not finite:
        raise source.error(key, f"must be a finite number, got {_shown(value)}")


def _words(hint: Any) -> str:
    """A type in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    kind = origin or hint
    if origin in (typing.Union, UnionType):
        return " or ".join(dict.fromkeys(map(_words, arguments)))
    if kind is Literal:
        return " or ".join(map(str, arguments))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return " or ".join(str(member.value) for member in kind)
    if kind is tuple and arguments and Ellipsis not in arguments:
        return f"a list of {len(arguments)} values ({', '.join(map(_words, arguments))})"
    if kind in (tuple, list, Sequence):
        return f"a list [...], each {_words(arguments[0])}" if arguments else "a list [...]"
    if kind in (dict, Mapping) or dataclasses.is_dataclass(kind):
        return "a mapping {name: value}"
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "null"}
    return names.get(kind, "a value" if kind in (Any, object) else getattr(kind, "__name__", str(kind)))


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return f"a mapping of {', '.join(map(str, value))[:50] or 'nothing'}"
    try:
        text = repr(value)
    except ValueError:  # more digits than Python prints
        return "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}..."
