"""Recursive gated convolution and the global-local filter against their formulas."""

import pytest
import torch
import torch.nn.functional as F

from nearfar.ops.convolution.gnconv import GnConv
from nearfar.ops.spectral.global_filter import GlobalLocalFilter


def agree(fast: torch.Tensor, slow: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    torch.testing.assert_close(fast, slow, atol=1e-9, rtol=0)
    probe = torch.randn_like(fast)
    for a, b in zip(
        torch.autograd.grad((fast * probe).sum(), inputs),
        torch.autograd.grad((slow * probe).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def pointwise(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return torch.einsum("oc,bcn->bon", layer.weight.flatten(1), x) + layer.bias[:, None]


@pytest.mark.parametrize("size", [(9,), (5, 6), (3, 4, 5)])
@pytest.mark.parametrize("order", [1, 2, 4])
def test_gnconv_is_its_recursion(size: tuple[int, ...], order: int) -> None:
    torch.manual_seed(0)
    dim, dims = 8, len(size)
    operator = GnConv(dim, order, 3, scale=0.4, dims=dims, in_dim=5, out_dim=6).double()
    x = torch.randn(2, 5, *size, dtype=torch.float64, requires_grad=True)
    widths = [dim // 2 ** (order - 1 - k) for k in range(order)]
    z = pointwise(operator.proj_in, x.flatten(2))
    p, q = z[:, : widths[0]], z[:, widths[0] :].unflatten(2, size)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    q = 0.4 * convolve(q, operator.dwconv.weight, operator.dwconv.bias, padding=1, groups=q.shape[1]).flatten(2)
    start = 0
    for k, width in enumerate(widths):
        if k:
            p = pointwise(operator.pws[k - 1], p)
        p = p * q[:, start : start + width]
        start += width
    slow = pointwise(operator.proj_out, p).unflatten(2, size)
    agree(operator(x), slow, [x, *operator.parameters()])


def test_causal_gnconv_does_not_see_the_future() -> None:
    operator = GnConv(8, 3, dims=1, causal=True)
    x = torch.randn(1, 8, 20)
    later = x.clone()
    later[..., 12:] = 1
    torch.testing.assert_close(operator(x)[..., :12], operator(later)[..., :12])


@pytest.mark.parametrize("filter", [None, lambda channels: GlobalLocalFilter(channels, 6, 4)])
def test_fused_scale(filter) -> None:
    operator = GnConv(8, 3, scale=1 / 3, filter=filter)
    x = torch.randn(1, 8, 6, 6)
    before = operator(x)
    operator.fuse()
    torch.testing.assert_close(operator(x), before, atol=1e-6, rtol=1e-5)
    assert operator.scale == 1


@pytest.mark.parametrize(("height", "width"), [(6, 4), (5, 4), (4, 9)])
def test_filter_is_a_circular_convolution(height: int, width: int) -> None:
    """The global half, by its definition: the sum over the torus with the inverse transform of K as kernel."""
    torch.manual_seed(0)
    h, w = 5, 7
    operator = GlobalLocalFilter(4, height, width).double()
    x = torch.randn(2, 4, h, w, dtype=torch.float64, requires_grad=True)
    normed = F.layer_norm(x.movedim(1, -1), (4,), operator.pre_norm.weight, operator.pre_norm.bias, 1e-6).movedim(-1, 1)
    local = F.conv2d(normed[:, :2], operator.dw.weight, padding=1, groups=2)
    table = operator.complex_weight
    if (height, width) != (h, w // 2 + 1):
        table = torch.stack(
            [
                F.interpolate(part[None], (h, w // 2 + 1), mode="bilinear", align_corners=True)[0]
                for part in table.unbind(-1)
            ],
            -1,
        )
    kernel = torch.fft.irfft2(torch.view_as_complex(table.contiguous()), s=(h, w))
    spread = torch.zeros_like(local)
    for i in range(h):
        for j in range(w):
            spread = spread + kernel[:, i, j, None, None] * torch.roll(normed[:, 2:], (i, j), (2, 3))
    mixed = torch.stack([local[:, 0], spread[:, 0], local[:, 1], spread[:, 1]], 1)
    slow = F.layer_norm(mixed.movedim(1, -1), (4,), operator.post_norm.weight, operator.post_norm.bias, 1e-6).movedim(
        -1, 1
    )
    agree(operator(x), slow, [x, *operator.parameters()])


def test_resized_filter_follows_its_weights() -> None:
    operator = GlobalLocalFilter(4, 6, 4).eval()
    x = torch.randn(1, 4, 9, 9)
    with torch.no_grad():
        before = operator(x)
        torch.testing.assert_close(operator(x), before)
        operator.complex_weight.mul_(50)
        assert not torch.allclose(operator(x), before)
        operator.load_state_dict({**operator.state_dict(), "complex_weight": operator.complex_weight / 50})
        torch.testing.assert_close(operator(x), before)
        torch.testing.assert_close(operator.double()(x.double()).float(), before, atol=1e-5, rtol=1e-5)
    assert operator(x.double()).requires_grad


def test_filter_under_autocast() -> None:
    operator = GlobalLocalFilter(8, 7, 4)
    x = torch.randn(1, 8, 7, 7)
    with torch.autocast("cpu", torch.bfloat16):
        low = operator(x)
    torch.testing.assert_close(low.float(), operator(x), atol=0.1, rtol=0.1)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="allowed orders are 1 to 4"):
        GnConv(24, 5)
    with pytest.raises(ValueError, match="order is 0"):
        GnConv(8, 0)
    with pytest.raises(ValueError, match="causal"):
        GnConv(8, 2, dims=1, causal=True, filter=lambda channels: GlobalLocalFilter(channels))
    with pytest.raises(ValueError, match="dim is 5"):
        GlobalLocalFilter(5)
    with pytest.raises(ValueError, match="at least 1"):
        GlobalLocalFilter(4, 0, 3)
