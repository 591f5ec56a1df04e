"""The contracts that ship with the packages hold, and every setting counts."""

import functools
import re
from contextlib import suppress
from importlib.metadata import entry_points
from typing import Any

import pytest

from nearfar.core import contracts
from nearfar.core.contracts import Contract, first_that_builds, shipped
from nearfar.core.errors import UserError

POINTS = entry_points(group="nearfar.contracts")
BUILDERS = {
    name: functools.partial(first_that_builds, [point.load() for point in POINTS if point.name == name])
    for name in {point.name for point in POINTS}
}


LARGE = 1e6


def each(*, mutated: bool) -> list[Any]:
    """The shipped contracts. CI runs those of `LARGE` and more; whole networks mutated again and again are slow."""
    found = []
    for path in shipped():
        contract = Contract.load(path)
        operator = contract.variant.startswith("op-")
        large = contract.content.get("parameters", 0) >= LARGE
        marks = [pytest.mark.slow] if mutated and (large or not operator) else [pytest.mark.ci] if large else []
        found.append(pytest.param(path, id=path.stem, marks=marks))
    return found


@pytest.mark.parametrize("path", each(mutated=False))
def test_it_holds(path):
    contract = Contract.load(path)
    for output, error in contracts.verify(contract, BUILDERS[contract.system]).items():
        exact = contract.variant.startswith("data-")
        assert error == 0 if exact else error < (contract.tolerance or 1e-4), (output, error)


def mutants(value: Any) -> list[Any]:
    """Other values than `value`, of its kind."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [1 if value == -1 else 2 * value + 1]
    if isinstance(value, list):
        ends = {0, len(value) - 1} if value else ()
        # 1, since a dilation beyond the map is as good as another
        least = lambda inner: [1] if isinstance(inner, int) and inner > 1 else mutants(inner)[:1]  # noqa: E731
        swapped = [[*value[:i], other, *value[i + 1 :]] for i in ends for other in least(value[i])]
        return [*swapped, *([value[:-1]] if value else [])]
    if isinstance(value, dict):
        return [{**value, name: other} for name, inner in value.items() for other in mutants(inner)[:1]]
    if isinstance(value, str):  # another text, and another eps in it; sentences may stand
        prose, eps = len(value.split()) >= 4, re.sub(r"\beps \S+", "eps 0.1", value)
        return [*([] if prose else ["mutated"]), *([eps] if eps != value else [])]
    return [1]


@pytest.mark.parametrize("path", each(mutated=True))
def test_every_setting_counts(path, monkeypatch):
    """The output changes, or the contract is refused; what is documentation stands on the system's list."""
    monkeypatch.setattr(contracts, "fill", functools.lru_cache(contracts.fill))
    contract = Contract.load(path)
    build = BUILDERS[contract.system]
    right = contracts.verify(contract, build)
    for name, value in contract.content["settings"].items():
        if name in contract.settings.documentation:
            continue
        for other in mutants(value):
            altered = Contract(path, contract.content | {"settings": contract.content["settings"] | {name: other}})
            with suppress(UserError, ValueError, TypeError, RuntimeError, IndexError):  # refused
                assert contracts.verify(altered, build) != right, f"{name}={other!r} is as good as {value!r}"


@pytest.mark.parametrize("system", sorted(BUILDERS))
def test_an_unknown_setting_is_refused(system):
    contract = min(map(Contract.load, shipped(system)), key=lambda c: c.content.get("parameters", 0))
    path = contract.path
    altered = Contract(path, contract.content | {"settings": contract.content["settings"] | {"wings": 2}})
    with pytest.raises(UserError, match="wings"):
        contracts.verify(altered, BUILDERS[system])
