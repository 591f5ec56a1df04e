"""Position tables."""

import math

import pytest
import torch

from nearfar.ops.attention.positions import ScaledPositions


def test_table_is_sines_then_cosines():
    torch.set_default_dtype(torch.float64)
    try:
        model = ScaledPositions(6, 10)
    finally:
        torch.set_default_dtype(torch.float32)
    x = torch.randn(2, 5, 10, dtype=torch.float64)
    with torch.no_grad():
        model.scale.fill_(0.7)
    angles = [[t / 10000 ** (2 * (c // 2) / 10) for c in range(10)] for t in range(5)]
    table = [[math.sin(a) for a in row[0::2]] + [math.cos(a) for a in row[1::2]] for row in angles]
    expected = x + 0.7 * torch.tensor(table, dtype=torch.float64)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("scale", "expected"), [(-0.5, 0.0), (0.4, 0.4), (3.0, 1.0)])
def test_scale_starts_at_zero_and_is_clipped_on_demand(scale, expected):
    model = ScaledPositions(4, 6)
    assert model.scale == 0
    x = torch.zeros(1, 4, 6)
    with torch.no_grad():
        model.scale.fill_(scale)
    torch.testing.assert_close(model(x)[0, 0, 3:], torch.full((3,), scale))
    model.constrain()
    assert model.scale.item() == pytest.approx(expected)


@pytest.mark.parametrize("arguments", [(4, 5), (0, 4), (4, 0)])
def test_bad_arguments(arguments):
    with pytest.raises(ValueError):
        ScaledPositions(*arguments)
