"""Tables and tensors derived from others, made once per size, device and weights."""

from collections.abc import Callable, Hashable, Iterable
from functools import lru_cache, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def cached_table(build: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Keep what `build` returns for its (hashable) arguments: index tables, masks and the like, device included.

    Nothing is kept while a graph is traced. Tables serve in inference mode and in training alike, and are built where
    their arguments say whatever the default device is.
    """

    @lru_cache(maxsize=64)
    def kept(*key: Hashable) -> Tensor:
        with torch.inference_mode(False), torch.device("cpu"):
            return build(*key)

    @wraps(build)
    def table(*key: Hashable) -> Tensor:
        return build(*key) if torch.compiler.is_compiling() else kept(*key)

    return table


class Derived:
    """Keeps what was last computed from parameters, while they are unchanged and no gradient is needed."""

    def __init__(self) -> None:
        self.kept: tuple[tuple, Any] | None = None

    def get(self, parameters: Tensor | Iterable[Tensor], key: tuple, compute: Callable[[], T]) -> T:
        """`compute()`, or what it gave before for the same values of one or several parameters and `key`."""
        parameters = [parameters] if isinstance(parameters, Tensor) else [*parameters]
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return compute()
        try:
            state = key, [(p.data_ptr(), p._version, p.dtype, p.device) for p in parameters]
        except RuntimeError:  # tensors of the inference mode count no versions
            return compute()
        if self.kept is None or self.kept[0] != state:
            self.kept = state, compute()
        return self.kept[1]

    def __reduce__(self) -> tuple[type["Derived"], tuple]:
        """A copy starts empty."""
        return Derived, ()
