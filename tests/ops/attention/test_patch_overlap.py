"""Attention inside overlapping patches: the oracle goes over patches."""

import pytest
import torch

from nearfar.ops.attention.patch_overlap import OverlappingPatchAttention, attend, patch_starts


def oracle(layer, x):
    size, step = layer.patch_size, layer.patch_size - layer.overlap
    total, count = torch.zeros_like(x), torch.zeros(x.shape[2:], dtype=x.dtype)
    share = torch.ones_like(count)
    starts = [patch_starts(side, size, layer.overlap) for side in x.shape[2:]]
    for top in starts[0]:
        for left in starts[1]:
            patch = x[:, :, top : top + size, left : left + size]
            z = layer.norm(patch).flatten(2).mT
            q, k, v = (m(z).unflatten(-1, (layer.num_heads, -1)).transpose(1, 2) for m in (layer.q, layer.k, layer.v))
            y = ((q @ k.mT * layer.scale).softmax(-1) @ v).transpose(1, 2).flatten(2)
            total[:, :, top : top + size, left : left + size] += patch + layer.out(y).mT.unflatten(2, (size, size))
            count[top : top + size, left : left + size] += 1
    if layer.averaging == "mean":
        return total / count
    for i, top in enumerate(starts[0][1:], 1):
        share[top : i * step + layer.overlap] /= 2
    for i, left in enumerate(starts[1][1:], 1):
        share[:, left : i * step + layer.overlap] /= 2
    return total * share


@pytest.mark.parametrize("averaging", ["mean", "published"])
@pytest.mark.parametrize("sides", [(6, 6), (11, 7), (9, 14), (10, 13)])
def test_oracle_forward_and_gradient(sides, averaging):
    layer = OverlappingPatchAttention(6, 4, 2, 6, averaging=averaging).double()
    x = torch.randn(2, 6, *sides, dtype=torch.float64, requires_grad=True)
    y, expected = layer(x), oracle(layer, x)
    assert (y - expected).norm() <= 1e-9 * expected.norm()
    wanted = [x, layer.q.weight, layer.v.weight]
    for a, b in zip(
        torch.autograd.grad(y.square().sum(), wanted), torch.autograd.grad(expected.square().sum(), wanted)
    ):
        assert (a - b).norm() <= 1e-9 * b.norm()


def test_where_three_patches_meet_the_published_average_is_dark():
    layer = OverlappingPatchAttention(4, 4, 1, 16)
    torch.nn.init.zeros_(layer.out.weight)
    x = torch.ones(1, 4, 31, 16)
    assert torch.allclose(layer(x), x)
    layer.averaging = "published"
    rows = layer(x)[0, 0, :, 0]
    assert rows[15] == 0.75
    assert (rows != 1).sum() == 1


def test_attention_of_different_widths():
    q, k, v = torch.randn(2, 3, 5, 4), torch.randn(1, 3, 7, 4), torch.randn(1, 3, 7, 6)
    expected = (q @ k.mT * 0.5).softmax(-1) @ v
    torch.testing.assert_close(attend(q, k, v, 0.5), expected)
    torch.testing.assert_close(attend(q, k, v[..., :2], 0.5), expected[..., :2])


def test_bad_arguments_and_maps_are_named():
    with pytest.raises(ValueError, match="num_heads is 4"):
        OverlappingPatchAttention(6, 4, 4, 6)
    with pytest.raises(ValueError, match="overlap is 4"):
        OverlappingPatchAttention(4, 4, 1, 6, overlap=4)
    with pytest.raises(ValueError, match="'median'"):
        OverlappingPatchAttention(4, 4, 1, 6, averaging="median")
    with pytest.raises(ValueError, match="at least patch_size = 6"):
        OverlappingPatchAttention(4, 4, 1, 6)(torch.randn(1, 4, 5, 9))
