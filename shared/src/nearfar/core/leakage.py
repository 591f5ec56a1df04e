"""Refusing an item, by its content, or a group (patient, speaker, subject) on both sides of a split."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from nearfar.core.errors import UserError


class LeakageError(UserError):
    """A split in which something of one side stands on the other."""


@dataclass
class Side:
    """One side of a split: names for messages, digests of the content of each item, and groups where there are any."""

    name: str
    names: Sequence[str]
    digests: Sequence[Any]
    groups: Sequence[Any] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        if len(self.names) != len(self.digests) or (self.groups and len(self.groups) != len(self.names)):
            raise ValueError(f"{self.name}: names, digests and groups must be of one length")


def twin(first: Side, second: Side) -> tuple[int, int] | None:
    """Places of the first item of `second` whose content stands in `first` too, there and here; None without one."""
    known = {digest: place for place, digest in reversed(list(enumerate(first.digests)))}
    return next(((known[d], place) for place, d in enumerate(second.digests) if d in known), None)


def check_apart(first: Side, second: Side, group: str = "group") -> None:
    """Raise LeakageError that names what stands on both sides: a `group`, or the same item under whatever name."""
    if both := {g for g in first.groups if g is not None} & {g for g in second.groups if g is not None}:
        listed = ", ".join(sorted(map(str, both))[:5])
        raise LeakageError(f"{group} {listed}: on both sides, in {first.name} and in {second.name}; split by {group}")
    if found := twin(first, second):
        mine, other = first.names[found[0]], second.names[found[1]]
        same = f"{mine}: lies" if mine == other else f"{mine} and {other}: hold the same and lie"
        raise LeakageError(f"{same} in {first.name} and in {second.name}; remove the copy")


def keep_twins_together(held: Iterable[int], digests: Sequence[Any]) -> set[int]:
    """The places `held` and all whose content is that of one of them."""
    chosen = set(held)
    contents = {digests[place] for place in chosen}
    return {place for place, digest in enumerate(digests) if digest in contents}
