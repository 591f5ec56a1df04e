"""The Gaussian mixture mask and its attention against sums over pairs."""

import itertools
import math

import pytest
import torch

from nearfar.ops.attention.gaussian_mask import GaussianMaskAttention, GaussianMixtureMask


def agree(fast: torch.Tensor, slow: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    torch.testing.assert_close(fast, slow, atol=1e-9, rtol=0)
    probe = torch.randn_like(fast)
    for a, b in zip(
        torch.autograd.grad((fast * probe).sum(), inputs),
        torch.autograd.grad((slow * probe).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def narrow(module: torch.nn.Module) -> torch.nn.Module:
    mask = module.mask if isinstance(module, GaussianMaskAttention) else module
    torch.nn.init.normal_(mask.sigma, std=2)
    return module.double()


def pairwise(mask: GaussianMixtureMask, grid: tuple[int, ...]) -> torch.Tensor:
    places = list(itertools.product(*map(range, grid)))
    rows = []
    for here in places:
        for there in places:
            squared = sum((a - b) ** 2 for a, b in zip(here, there, strict=True))
            power = 1 / (mask.sigma**2 + 1e-5)
            if mask.clipped:
                base = torch.tensor(-float(squared)).exp().sqrt().double()
                rows.append((mask.alpha * base**power).sum(0))
            else:
                rows.append((mask.alpha * torch.exp(-0.5 * squared * power)).sum(0))
    return torch.stack(rows, 1).unflatten(1, (len(places), len(places)))


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("grid", [(7,), (3, 4), (5, 1), (2, 3, 2)])
def test_mask_is_its_sum(grid: tuple[int, ...], clipped: bool) -> None:
    mask = narrow(GaussianMixtureMask(3, 4, dims=len(grid), clipped=clipped))
    tokens = math.prod(grid)
    scores = torch.randn(2, 3, tokens, tokens, dtype=torch.float64, requires_grad=True)
    agree(mask(scores, grid), scores * pairwise(mask, grid), [scores, mask.sigma, mask.alpha])


@pytest.mark.parametrize(("causal", "grid", "before"), [(False, (3, 4), 0), (False, (3, 4), 1), (True, (9,), 0)])
def test_attention_is_its_formula(causal: bool, grid: tuple[int, ...], before: int) -> None:
    op = narrow(GaussianMaskAttention(6, 3, 4, dims=len(grid), causal=causal, qkv_bias=True))
    n = math.prod(grid) + before
    x = torch.randn(2, n, 6, dtype=torch.float64, requires_grad=True)
    q, k, v = op.qkv(x).unflatten(-1, (3, 3, 4)).unbind(2)
    factor = torch.ones(3, n, n, dtype=torch.float64)
    factor[:, before:, before:] = pairwise(op.mask, grid)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / 2 * factor
    if causal:
        scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf)
    slow = op.proj(torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).flatten(2))
    agree(op(x, grid), slow, [x, *op.parameters()])
    torch.testing.assert_close(op.attention_map(x, grid), scores.softmax(-1))


def test_causal_attention_does_not_see_the_future() -> None:
    op = GaussianMaskAttention(8, 2, dims=1, causal=True)
    x = torch.randn(1, 12, 8)
    later = x.clone()
    later[:, 7:] = 1
    torch.testing.assert_close(op(x, (12,))[:, :7], op(later, (12,))[:, :7])


@torch.no_grad()
def test_clipped_table_cuts_far_pairs_only() -> None:
    closed, clipped = GaussianMixtureMask(2), GaussianMixtureMask(2, clipped=True)
    clipped.load_state_dict(closed.state_dict())
    torch.testing.assert_close(clipped.mask((6, 6)), closed.mask((6, 6)), atol=1e-5, rtol=1e-4)
    cut, whole = clipped.offsets((1, 16))[:, 0], closed.offsets((1, 16))[:, 0]
    assert (cut[:, 11:] == 0).all()
    assert (whole[:, 11:].abs() > 1e-3).all()


@torch.no_grad()
def test_mask_follows_its_parameters() -> None:
    mask = GaussianMixtureMask(2)
    before = mask.mask((4, 4))
    assert mask.mask((4, 4)) is before
    mask.alpha.mul_(2)
    torch.testing.assert_close(mask.mask((4, 4)), 2 * before)
    mask.sigma.mul_(0.1)
    assert not torch.allclose(mask.mask((4, 4)), 2 * before)
    assert mask.mask((2, 3)).shape == (2, 6, 6)


def test_a_grid_of_one_row_is_a_line() -> None:
    line, plane = GaussianMixtureMask(2, dims=1), GaussianMixtureMask(2, dims=2)
    plane.load_state_dict(line.state_dict())
    torch.testing.assert_close(plane.mask((1, 9)), line.mask((9,)))
    torch.testing.assert_close(plane.mask((9, 1)), line.mask((9,)))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        GaussianMixtureMask(0)
    with pytest.raises(ValueError, match="must divide dim=10"):
        GaussianMaskAttention(10, 4)
    with pytest.raises(ValueError, match="causal=True needs dims=1"):
        GaussianMaskAttention(8, 4, causal=True)
    with pytest.raises(ValueError, match="made for 2 axes"):
        GaussianMixtureMask(2).mask((4,))
    with pytest.raises(ValueError, match="has 16 positions, there are 9"):
        GaussianMaskAttention(8, 4)(torch.zeros(1, 9, 8), (4, 4))
