"""What is not finite is never saved, loaded or shown as a result."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nearfar.core.errors import DivergedError, some


def is_finite(values: Any) -> bool:
    """Whether all numbers of a tensor, an array or a plain number are finite."""
    if isinstance(values, Tensor):
        if values.is_meta:  # shapes alone
            return True
        return not (values.is_floating_point() or values.is_complex()) or bool(torch.isfinite(values).all())
    return bool(np.isfinite(values).all())


def check_finite(values: Any, what: str) -> Any:
    """`values` (tensor, array or number), if all of it is finite. Raises DivergedError that begins with `what`."""
    if not is_finite(values):
        raise DivergedError(f"{what}: not finite (NaN or infinite), so no result; is the input sound, or the training?")
    return values


def check_weights(state: Mapping[str, Tensor], where: object) -> None:
    """Raises DivergedError that names the tensors of a state dict that are not finite; `where` begins the message."""
    if bad := [name for name, value in state.items() if isinstance(value, Tensor) and not is_finite(value)]:
        raise DivergedError(
            f"{where}: {len(bad)} of {len(state)} tensors hold numbers that are not finite ({some(bad, 3)}); "
            "the training diverged or the file is damaged"
        )
