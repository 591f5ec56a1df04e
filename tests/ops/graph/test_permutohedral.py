"""The permutohedral lattice against a dictionary-based oracle: values, gradients, batches, limits."""

import math

import pytest
import torch
from torch import Tensor

from nearfar.ops.graph.permutohedral import PermutohedralLattice


def slow_filter(features: Tensor, values: Tensor) -> Tensor:
    """The eight steps one point at a time, vertices in a dictionary: features (N, d), values (N, C)."""
    d = features.shape[1]
    points = []
    for f in features.tolist():
        cf = [f[i] * math.sqrt(2 / 3) * (d + 1) / math.sqrt((i + 1) * (i + 2)) for i in range(d)]
        e = [sum(cf)] + [sum(cf[j:]) - j * cf[j - 1] for j in range(1, d + 1)]
        q = [round(x / (d + 1)) for x in e]
        rem, total = [(d + 1) * k for k in q], sum(q)
        res = [x - y for x, y in zip(e, rem)]
        rank = []
        for i in range(d + 1):
            k = sum(res[j] > res[i] or (res[j] == res[i] and j < i) for j in range(d + 1) if j != i) + total
            if k < 0:
                k, rem[i] = k + d + 1, rem[i] + d + 1
            elif k > d:
                k, rem[i] = k - d - 1, rem[i] - d - 1
            rank.append(k)
        b = [0.0] * (d + 2)
        for i in range(d + 1):
            v = (e[i] - rem[i]) / (d + 1)
            b[d - rank[i]] += v
            b[d + 1 - rank[i]] -= v
        b[0] += 1 + b[d + 1]
        keys = [tuple(rem[i] + (r if rank[i] <= d - r else r - d - 1) for i in range(d)) for r in range(d + 1)]
        points.append((keys, b[: d + 1]))
    table = {}
    for (keys, b), value in zip(points, values):
        for key, weight in zip(keys, b):
            table[key] = table.get(key, 0) + weight * value
    zero = torch.zeros_like(values[0])
    for j in range(d + 1):
        blurred = {}
        for key, value in table.items():
            up = tuple(k - 1 + (d + 1) * (i == j) for i, k in enumerate(key))
            down = tuple(k + 1 - (d + 1) * (i == j) for i, k in enumerate(key))
            blurred[key] = value + 0.5 * (table.get(up, zero) + table.get(down, zero))
        table = blurred
    sliced = [sum(w * table[k] for k, w in zip(keys, b)) for keys, b in points]
    return torch.stack(sliced) / (1 + 2.0**-d)


@pytest.mark.parametrize("d", [1, 2, 3, 5, 7])
def test_equals_the_slow_form(d: int) -> None:
    features = torch.randn(2, 40, d, dtype=torch.float64) * 1.5
    values = torch.randn(2, 40, 3, dtype=torch.float64)
    found = PermutohedralLattice(features).filter(values)
    expected = torch.stack([slow_filter(f, v) for f, v in zip(features, values)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_points_on_lattice_ties() -> None:
    features = torch.tensor([[[0.0, 0.0], [0.0, 0.0], [1.0, 1.0], [-1.0, 0.5]]], dtype=torch.float64)
    values = torch.randn(1, 4, 2, dtype=torch.float64)
    found = PermutohedralLattice(features).filter(values)
    torch.testing.assert_close(found[0], slow_filter(features[0], values[0]), rtol=0, atol=1e-9)


def test_gradient_is_the_transpose() -> None:
    lattice = PermutohedralLattice(torch.randn(1, 12, 2, dtype=torch.float64))
    matrix = lattice.filter(torch.eye(12, dtype=torch.float64)[None])[0]
    assert (matrix - matrix.mT).abs().max() > 1e-4  # blurring axis by axis is not symmetric: the order matters
    x = torch.randn(1, 12, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(1, 12, 2, dtype=torch.float64)
    (grad,) = torch.autograd.grad((lattice.filter(x) * weight).sum(), x)
    torch.testing.assert_close(grad[0], matrix.mT @ weight[0], rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(lattice.filter, x)
    assert torch.autograd.gradgradcheck(lattice.filter, x)


def test_items_of_a_batch_do_not_mix() -> None:
    features = torch.randn(3, 30, 3)
    values = torch.randn(3, 30, 2)
    together = PermutohedralLattice(features).filter(values)
    for i in range(3):
        alone = PermutohedralLattice(features[i : i + 1]).filter(values[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-6)


def test_comes_near_the_gaussian_where_points_are_dense() -> None:
    y, x = torch.meshgrid(torch.arange(40.0), torch.arange(40.0), indexing="ij")
    features = torch.stack([x.flatten(), y.flatten()], -1)[None] / 5
    values = torch.rand(1, 1600, 1)
    lattice = PermutohedralLattice(features)
    smooth = lattice.filter(values) / lattice.filter(torch.ones_like(values))
    kernel = torch.exp(-(torch.cdist(features, features) ** 2) / 2)
    exact = kernel @ values / kernel.sum(-1, keepdim=True)
    assert (smooth - exact).norm() / (exact - exact.mean()).norm() < 0.2


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="NaN"):
        PermutohedralLattice(torch.full((1, 3, 2), float("nan")))
    with pytest.raises(ValueError, match="63-bit"):
        PermutohedralLattice(torch.tensor([[[0.0] * 9, [1e4] * 9]]))
    with pytest.raises(ValueError, match="2 points"):
        PermutohedralLattice(torch.zeros(1, 2, 1)).filter(torch.zeros(1, 3, 1))


def test_many_channels_in_parts():
    lattice = PermutohedralLattice(10 * torch.rand(1, 110_000, 2))
    values = torch.rand(110_000, 80)
    for reverse in (False, True):
        torch.testing.assert_close(lattice._apply(values, reverse), lattice._apply_part(values, reverse))
