"""What generic code knows of a mixer: its card."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from nearfar.core.checkpoints import Rule
from nearfar.core.errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]
"""Name -> shape of published tensors."""


@dataclass(frozen=True)
class Told:
    """What a checkpoint's user or a contract says of one layer, for what shapes cannot tell.

    `settings` may describe a mixer in words under "mixer", "2 heads" or "window 8", for each layer or for all.
    """

    settings: Mapping[str, Any]
    layer: int = 0

    @cached_property
    def described(self) -> str:
        return str(self.settings.get("mixer", "")).lower()

    @cached_property
    def own(self) -> str | None:
        """What is said of this layer alone."""
        found = re.search(rf"\blayers? {self.layer}\b(.*?)(?=\blayers? \d|$)", self.described, re.DOTALL)
        return found and found[1]

    @cached_property
    def text(self) -> str:
        return f"{self.described if self.own is None else self.own} {self.settings.get('op', '')}".lower()

    def number(self, pattern: str, default: int) -> int:
        """The number that the words give where they match `pattern`."""
        found = re.search(pattern, self.text)
        return int(found[1]) if found else default

    @property
    def heads(self) -> int:
        usual = self.number(r"(\d+)[\s-]*heads?\b", 1)
        return int(self.settings.get("heads", self.settings.get("num_heads", usual)))

    @property
    def window(self) -> int:
        """Of sliding attention; 0 where the attention is said to see everything."""
        given = [n for name in ("block_size", "window") if isinstance(n := self.settings.get(name), int)]
        if not ("sliding" in self.text or "window" in self.text or (given and not self.own)):
            return 0
        return given[0] if given else self.number(r"(?:sliding|window|block)\D{0,24}(\d+)(?![\d\s-]*head)", 0)


@dataclass(frozen=True)
class Published:
    """How a mixer's tensors look in a published state dict."""

    marks: tuple[str, ...]
    """Tensors that no state of this mixer lacks."""
    settings: Callable[[Shapes, Told], dict[str, Any]] = lambda shapes, told: {}
    """The mixer's settings, from its tensors; raises CheckpointError with the reason where they are another's."""
    rules: tuple[Rule, ...] = ()
    """How published names become ours; `nearfar.core.checkpoints.rename`."""
    computed: str = r"$^"
    """Pattern of the tables that our module computes itself."""
    names: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = dict
    """What renaming cannot do, before `rules`."""

    def read(self, shapes: Shapes, told: Told) -> dict[str, Any]:
        """`settings`, where every mark is there."""
        if missing := [name for name in self.marks if name not in shapes]:
            raise CheckpointError(f"has no {', '.join(missing)}")
        return self.settings(shapes, told)


@dataclass(frozen=True)
class Mixer:
    """A sequence mixer or state mixer."""

    operator: Callable[..., nn.Module]
    state: str = ""
    """Numbers that a text of N tokens leaves behind at width d with h heads, as the literature counts them."""
    growth: str = "constant"
    """What a long text costs to go on with."""
    required: Mapping[str, Any] = field(default_factory=dict)
    """Settings that it cannot do without, with an example of each."""
    published: Mapping[str, Published] = field(default_factory=dict)
    """Layout, a module of `nearfar.language.layouts` -> how the mixer looks there."""
