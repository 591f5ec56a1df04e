"""What a published system is, said once, on its model."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules
from typing import Any


@dataclass(frozen=True)
class Card:
    """A published system: attribute `CARD` of its model class, or of the module where it has no such class."""

    title: str
    paper: str
    """arXiv number."""
    what: str
    """What mixes positions, or what it does, in a few words."""
    error: float
    """Largest relative error of its contracts in float32 on the CPU, as `nearfar verify` prints it; NaN for none."""
    weights: str = ""
    """Which published weights it reads."""
    small: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Published variant -> settings of a form of it for small data and minutes on a CPU."""
    plain: Mapping[str, tuple[str, Mapping[str, Any]]] = field(default_factory=dict)
    """Published variant -> a model of the domain and settings that are its small form without what the system adds."""
    networks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Names under which the domain builds it -> settings."""
    dims: tuple[int, ...] = ()
    """Numbers of axes that its inputs may have."""


def cards() -> dict[str, list[tuple[type | None, Card]]]:
    """Domain -> model class, where it is one, and card of the systems of every installed package.

    A system is found where its contracts' module, the one in the entry-point group `nearfar.contracts`, imports it.
    """
    found: dict[str, list[tuple[type | None, Card]]] = {}
    for point in sorted(entry_points(group="nearfar.contracts"), key=lambda point: (point.module, point.name)):
        listed = found.setdefault(point.module.split(".")[1], [])
        for value in vars(import_module(point.module)).values():
            kind = value if isinstance(value, type) and isinstance(vars(value).get("CARD"), Card) else None
            card = value if isinstance(value, Card) else vars(kind)["CARD"] if kind else None
            if card is not None and all(card is not other for _, other in listed):
                listed.append((kind, card))
    return {domain: sorted(listed, key=lambda item: item[1].title) for domain, listed in sorted(found.items())}


def models(package: str) -> list[type]:
    """The classes with a card of their own in the modules of `package`."""
    classes = []
    for module in iter_modules(import_module(package).__path__):
        name = f"{package}.{module.name}"
        import_module(name)
        classes += [c for c in vars(sys.modules[name]).values() if isinstance(c, type) and c.__module__ == name]
    return [c for c in classes if isinstance(vars(c).get("CARD"), Card)]
