"""Window attention with a cyclic shift: the oracle goes over windows and pairs of positions."""

import itertools

import pytest
import torch

from nearfar.ops.attention.shifted_window import WindowAttention


def oracle(layer, x):
    """Every position attends to those that share its shifted window and its end of the grid."""
    sides, size, shift = x.shape[2:], layer.window_size, layer.shift
    table = layer.bias_table
    places = list(itertools.product(*(range(side) for side in sides)))

    def cell(place):
        window, end = [], []
        for value, side in zip(place, sides):
            moved = (value - shift) % side
            window.append(moved // size)
            end.append(shift > 0 and moved >= side - shift)
        return tuple(window), tuple(end)

    tokens = x.flatten(2).mT
    q, k, v = layer.qkv(tokens).unflatten(-1, (3, layer.num_heads, -1)).unbind(2)
    out = torch.zeros_like(tokens)
    cells = [cell(place) for place in places]
    for i, place in enumerate(places):
        others = [j for j in range(len(places)) if cells[j] == cells[i]]
        rows = []
        for j in others:
            row = 0
            for a, b, side in zip(place, places[j], sides):
                row = row * (2 * size - 1) + (a - shift) % side - (b - shift) % side + size - 1
            rows.append(row)
        for head in range(layer.num_heads):
            logits = torch.einsum("bd,bnd->bn", q[:, i, head], k[:, others, head]) * layer.scale + table[rows, head]
            y = torch.einsum("bn,bnd->bd", logits.softmax(-1), v[:, others, head])
            width = y.shape[-1]
            out[:, i, head * width : (head + 1) * width] = y
    return layer.out(out).mT.unflatten(2, sides)


@pytest.mark.parametrize(
    ("sides", "window", "shift"), [((6,), 3, 1), ((4, 8), 4, 2), ((4, 4), 4, 2), ((6, 3), 3, 0), ((4, 2, 4), 2, 1)]
)
def test_oracle_forward_and_gradient(sides, window, shift):
    layer = WindowAttention(6, 2, window, shift, dims=len(sides)).double()
    torch.nn.init.normal_(layer.bias_table)
    x = torch.randn(2, 6, *sides, dtype=torch.float64, requires_grad=True)
    y, expected = layer(x), oracle(layer, x)
    assert (y - expected).norm() <= 1e-9 * expected.norm()
    wanted = [x, layer.bias_table, layer.qkv.weight]
    ours = torch.autograd.grad(y.square().sum(), wanted)
    theirs = torch.autograd.grad(expected.square().sum(), wanted)
    for a, b in zip(ours, theirs):
        assert (a - b).norm() <= 1e-9 * b.norm()


def test_a_bias_that_changes_is_seen_without_gradients():
    layer, x = WindowAttention(4, 1, 2), torch.randn(1, 4, 4, 4)
    with torch.no_grad():
        before = layer(x)
        layer.bias_table.normal_(std=3)
        assert not torch.allclose(before, layer(x))


def test_bad_arguments_and_grids_are_named():
    with pytest.raises(ValueError, match="divide dim = 5"):
        WindowAttention(5, 2, 4)
    with pytest.raises(ValueError, match="shift is 4"):
        WindowAttention(4, 2, 4, 4)
    with pytest.raises(ValueError, match="multiples of window_size = 4"):
        WindowAttention(4, 2, 4)(torch.randn(1, 4, 4, 6))
