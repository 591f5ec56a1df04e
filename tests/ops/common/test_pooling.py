"""Adaptive pooling against torch's."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nearfar.ops.common.pooling import pool_to

TORCHS = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
LAYOUTS = {
    "channels first": lambda x: x,
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "half of the channels": lambda x: torch.cat((x, x), 1).movedim(1, -1).contiguous().movedim(-1, 1).chunk(2, 1)[0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("size", "bins"),
    [((9,), (4,)), ((3,), (7,)), ((8, 8), (7, 7)), ((5, 9), (7, 3)), ((6, 4), (1, 1)), ((5, 4, 6), (3, 5, 2))],
    ids=str,
)
def test_is_adaptive_pooling(size: tuple[int, ...], bins: tuple[int, ...], layout: str) -> None:
    x = torch.randn(2, 6, *size, dtype=torch.float64, requires_grad=True)

    def run(pool: Callable[[Tensor, tuple[int, ...]], Tensor]) -> tuple[Tensor, ...]:
        y = pool(LAYOUTS[layout](x), bins)
        return y, *torch.autograd.grad(y.square().sum(), x)

    torch.testing.assert_close(run(pool_to), run(TORCHS[len(size) - 1]))
