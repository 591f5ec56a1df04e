"""Window attention and the MSA-Conv layer against sums over neighbours."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from nearfar.ops.attention.window import MSAConv, window_attention, window_products, window_sums


def agree(fast: torch.Tensor, slow: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    torch.testing.assert_close(fast, slow, atol=1e-9, rtol=1e-12)
    probe = torch.randn_like(fast)
    for a, b in zip(
        torch.autograd.grad((fast * probe).sum(), inputs),
        torch.autograd.grad((slow * probe).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def neighbours(place, kernel, dilation: int, causal: bool, size) -> list[tuple[int, ...] | None]:
    """Positions of a window, row-major, None for those outside the grid."""
    found = []
    for offset in itertools.product(*map(range, kernel)):
        start = [dilation * (k - 1) if causal else dilation * (k - 1) // 2 for k in kernel]
        there = tuple(p + dilation * o - s for p, o, s in zip(place, offset, start, strict=True))
        found.append(there if all(0 <= t < n for t, n in zip(there, size, strict=True)) else None)
    return found


def one_by_one(q, k, v, kernel, dilation: int, border: str, causal: bool) -> torch.Tensor:
    columns = []
    size = q.shape[3:]
    for place in itertools.product(*map(range, size)):
        logits, values = [], []
        for there in neighbours(place, kernel, dilation, causal, size):
            if there is None:
                outside = torch.zeros(q.shape[:2], dtype=q.dtype)
                logits.append(outside - math.inf if border == "mask" or causal else outside)
                values.append(torch.zeros_like(v[..., 0].flatten(3)[..., 0] if v.ndim > 4 else v[..., 0]))
            else:
                logits.append((q[(..., *place)] * k[(..., *there)]).sum(2) / math.sqrt(q.shape[2]))
                values.append(v[(..., *there)])
        weights = torch.stack(logits, 2).softmax(2)
        columns.append((weights[..., None] * torch.stack(values, 2)).sum(2))
    return torch.stack(columns, -1).unflatten(-1, size)


@pytest.mark.parametrize(
    ("size", "kernel", "dilation", "border", "causal"),
    [
        ((7,), (3,), 1, "zero", False),
        ((9,), (3,), 2, "mask", False),
        ((9,), (3,), 2, "zero", True),
        ((4, 5), (3, 3), 1, "zero", False),
        ((4, 5), (3, 3), 1, "mask", False),
        ((5, 4), (5, 3), 2, "zero", False),
        ((2, 3, 2), (3, 1, 3), 1, "zero", False),
        ((2, 3, 2), (1, 3, 3), 1, "mask", False),
    ],
)
def test_window_attention_is_its_sum(size, kernel, dilation: int, border: str, causal: bool) -> None:
    q, k = (torch.randn(2, 2, 3, *size, dtype=torch.float64, requires_grad=True) for _ in range(2))
    v = torch.randn(2, 2, 4, *size, dtype=torch.float64, requires_grad=True)
    fast = window_attention(q, k, v, kernel, dilation, border=border, causal=causal)
    agree(fast, one_by_one(q, k, v, kernel, dilation, border, causal), [q, k, v])


def test_products_and_sums_are_adjoint() -> None:
    """<A(q, k), a> = <q, sums of k by a>."""
    q, k = torch.randn(2, 1, 1, 3, 5, 6, dtype=torch.float64)
    a = torch.randn(1, 1, 15, 5, 6, dtype=torch.float64)
    left = (window_products(q, k, (3, 5)) * a).sum()
    torch.testing.assert_close(left, (q * window_sums(a, k, (3, 5))).sum())


@pytest.mark.parametrize("heads", [1, 2])
def test_layer_is_its_formula(heads: int) -> None:
    op = MSAConv(4, 6, 3, stride=2, dilation=2, bias=True, num_heads=heads).double().eval()
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    qkv = torch.einsum("oc,bchw->bohw", op.qkv_conv.weight[..., 0, 0], x) + op.qkv_conv.bias[:, None, None]
    q, k, v = (part.unflatten(1, (heads, -1)) for part in qkv.chunk(3, 1))
    mixed = one_by_one(q, k, v, (3, 3), 2, "zero", False).flatten(1, 2) + x
    agree(op(x), F.conv2d(mixed, op.mlp.weight, op.mlp.bias, 2, 1).clamp(min=0), [x, *op.parameters()])


@torch.no_grad()
def test_causal_layer_does_not_see_the_future() -> None:
    op = MSAConv(4, 4, 5, dilation=2, dims=1, causal=True).eval()
    x = torch.randn(1, 4, 20)
    later = x.clone()
    later[..., 12:] = 3
    torch.testing.assert_close(op(x)[..., :12], op(later)[..., :12])
    assert not torch.allclose(op(x)[..., 12:], op(later)[..., 12:])
    # what is before the start is not there, so a longer past changes only what sees it
    torch.testing.assert_close(op(x[..., 8:])[..., 12:], op(x)[..., 20:])


@torch.no_grad()
def test_borders_differ_only_at_the_border() -> None:
    zero, mask = MSAConv(4, 4).eval(), MSAConv(4, 4, border="mask").eval()
    mask.load_state_dict(zero.state_dict())
    x = torch.randn(1, 4, 9, 9)
    torch.testing.assert_close(zero.attend(x)[..., 1:-1, 1:-1], mask.attend(x)[..., 1:-1, 1:-1])
    assert not torch.allclose(zero.attend(x), mask.attend(x))


@torch.no_grad()
def test_shifts_pass_through_away_from_the_border() -> None:
    op = MSAConv(4, 4, (3, 5)).eval()
    x = torch.randn(1, 4, 14, 15)
    torch.testing.assert_close(op(x.roll((1, 2), (2, 3)))[..., 4:-3, 6:-4], op(x).roll((1, 2), (2, 3))[..., 4:-3, 6:-4])


@torch.no_grad()
def test_a_line_is_a_plane_of_one_row() -> None:
    line, plane = MSAConv(4, 4, 3, dims=1).eval(), MSAConv(4, 4, (1, 3)).eval()
    plane.load_state_dict({name: v.unsqueeze(2) if v.ndim > 1 else v for name, v in line.state_dict().items()})
    x = torch.randn(2, 4, 8)
    torch.testing.assert_close(plane(x[:, :, None])[:, :, 0], line(x))


@torch.no_grad()
def test_dropout_and_half_precision() -> None:
    op, x = MSAConv(8, 8, dropout=0.5), torch.randn(1, 8, 6, 6)
    assert not torch.allclose(op(x), op(x))
    op.eval()
    with torch.autocast("cpu", torch.bfloat16):
        low = op(x)
    torch.testing.assert_close(low.float(), op(x), atol=0.05, rtol=0.05)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="odd and positive"):
        MSAConv(4, 4, 2)
    with pytest.raises(ValueError, match="odd and positive"):
        MSAConv(4, 4, (3, 3, 3))
    with pytest.raises(ValueError, match="must divide in_channels=4"):
        MSAConv(4, 4, num_heads=3)
    with pytest.raises(ValueError, match="allowed are zero, mask"):
        MSAConv(4, 4, border="wrap")
    with pytest.raises(ValueError, match="needs dims=1"):
        MSAConv(4, 4, causal=True)
    with pytest.raises(ValueError, match="leave padding out"):
        MSAConv(4, 4, dims=1, causal=True, padding=1)
