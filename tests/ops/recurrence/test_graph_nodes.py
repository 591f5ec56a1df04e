"""The operators that are one node of a compiled graph."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nearfar.ops.convolution import tcn
from nearfar.ops.recurrence import mamba, rwkv4


def mamba_inputs() -> tuple[Tensor | None, ...]:
    u, dt, B, C = (torch.randn(2, 21, 1, n) for n in (6, 6, 4, 4))
    return u, dt.exp(), -torch.rand(1, 4, 6), B, C, torch.randn(2, 1, 4, 6), None


def rwkv4_inputs() -> tuple[Tensor, ...]:
    k, v = torch.randn(2, 2, 40, 6)
    return -torch.rand(6), torch.randn(6), k, v, *torch.randn(3, 2, 6)


def tcn_inputs(right: int) -> tuple[Tensor | int | None, ...]:
    return torch.randn(2, 21, 6), torch.randn(6, 1, 3), None if right else torch.randn(6), 2, 4 - right, right


@pytest.mark.parametrize(
    ("node", "inputs"),
    [
        (mamba._compiled_scan, mamba_inputs),
        (rwkv4._compiled_average, rwkv4_inputs),
        (tcn._compiled_convolution, lambda: tcn_inputs(0)),
        (tcn._compiled_convolution, lambda: tcn_inputs(2)),
    ],
    ids=["mamba", "rwkv4", "tcn", "tcn on both sides"],
)
def test_a_node_has_the_shapes_and_layouts_that_it_promises(node: object, inputs: Callable[[], tuple]) -> None:
    torch.library.opcheck(node, inputs(), test_utils=("test_schema", "test_faketensor"))
