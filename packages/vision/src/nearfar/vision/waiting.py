"""The systems of `nearfar.vision.models`, each imported when timm or somebody else asks for a name it may hold.

timm keeps its models in dictionaries of its module `timm.models._registry`. Their place is taken by ones that import
the systems that still wait before they say that they do not know a name. A timm that keeps its models otherwise gets
all systems at once.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from pkgutil import iter_modules
from threading import RLock
from typing import Any

from nearfar.vision import models

WAITING = [module.name for module in iter_modules(models.__path__)]

REGISTRIES = (
    "_model_entrypoints", "_model_to_module", "_module_to_models", "_model_default_cfgs", "_model_pretrained_cfgs",
    "_model_with_tags", "_model_has_pretrained",
)  # fmt: skip

_lock, _busy = RLock(), False


@contextmanager
def as_it_stands() -> Iterator[None]:
    """Meanwhile no system is imported for a name that is not known."""
    global _busy
    with _lock:
        before, _busy = _busy, True
        try:
            yield
        finally:
            _busy = before


def summon(found: Callable[[], bool] = lambda: False, name: Any = "") -> None:
    """Import the systems that wait, those first whose own name is part of `name`, until the name is `found`."""
    with _lock:
        if _busy:
            return
        for system in sorted(WAITING, key=lambda system: system not in str(name)):
            if found():
                return
            if system in WAITING:
                with as_it_stands():
                    import_module(f"{models.__name__}.{system}")
                WAITING.remove(system)


class _Summoning:
    """Mixed into dict or set: what is not known is looked for in the systems that wait, and whole lists hold all."""

    def __contains__(self, key: Any) -> bool:
        known = super().__contains__  # type: ignore[misc]
        if not known(key):
            summon(lambda: known(key), key)
        return known(key)

    def __iter__(self) -> Iterator[Any]:
        summon()
        return super().__iter__()  # type: ignore[misc]

    def __len__(self) -> int:
        summon()
        return super().__len__()  # type: ignore[misc]


class SummoningSet(_Summoning, set):
    def intersection(self, *others: Any) -> set:
        summon()
        return super().intersection(*others)


class SummoningDict(_Summoning, dict):
    """A dictionary of systems' names; `make`, where given, makes what is missing in the end."""

    def __init__(self, known: Any = (), make: Callable[[], Any] | None = None) -> None:
        super().__init__(known)
        self.make = make

    def __missing__(self, key: Any) -> Any:
        summon(lambda: dict.__contains__(self, key), key)
        if dict.__contains__(self, key):
            return dict.__getitem__(self, key)
        if self.make is None:
            raise KeyError(key)
        return self.setdefault(key, self.make())

    def get(self, key: Any, default: Any = None) -> Any:
        return self[key] if key in self else default  # noqa: SIM401

    def keys(self) -> Any:
        summon()
        return super().keys()

    def values(self) -> Any:
        summon()
        return super().values()

    def items(self) -> Any:
        summon()
        return super().items()


def hook() -> None:
    """Put dictionaries that import systems on demand into timm's registry."""
    registry = import_module("timm.models._registry")
    if any(not isinstance(getattr(registry, name, None), dict | set) for name in REGISTRIES):
        summon()
        return
    for name in REGISTRIES:
        known = getattr(registry, name)
        if isinstance(known, set):
            setattr(registry, name, SummoningSet(known))
        else:
            setattr(registry, name, SummoningDict(known, getattr(known, "default_factory", None)))


class _AfterTimm(MetaPathFinder):
    """Calls `hook` when timm has been imported, however often others only ask whether it is there."""

    asking = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "timm" or self.asking:
            return None
        self.asking = True
        try:
            spec = find_spec(name)
        finally:
            self.asking = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                execute(module)
                hook()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Make timm find the systems: now where it is imported already, else as soon as it is."""
    timm = sys.modules.get("timm")
    if timm is None:
        sys.meta_path.insert(0, _AfterTimm())
    else:
        hook()
