"""Shared convolutions as linear maps, and the same in a simulated 4f light path."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nearfar.ops.convolution.shared import Optical4f, SharedConv, picture_of


def agree(fast: torch.Tensor, slow: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    torch.testing.assert_close(fast, slow, atol=1e-9, rtol=1e-12)
    probe = torch.randn_like(fast)
    for a, b in zip(
        torch.autograd.grad((fast * probe).sum(), inputs),
        torch.autograd.grad((slow * probe).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


FORMS = [((4, 5), None, "valid"), ((4, 5), (2, 3), "valid"), ((5, 4), (3, 3), "same"), ((4, 4), (1, 1), "same")]


@pytest.mark.parametrize("tokens", [None, 3])
@pytest.mark.parametrize(("picture", "kernel", "padding"), FORMS)
def test_shared_convolution_is_its_sum(picture, kernel, padding: str, tokens: int | None) -> None:
    op = SharedConv(picture, 2, kernel, padding=padding, tokens=tokens).double()
    x = torch.randn(2, 3, picture[0] * picture[1], dtype=torch.float64, requires_grad=True)
    kh, kw = kernel or picture
    pad = (kw // 2, kw // 2, kh // 2, kh // 2) if padding == "same" else (0, 0, 0, 0)
    rows = []
    for n in range(3):
        token = F.pad(x[:, n].reshape(2, *picture), pad)
        h, w = token.shape[1] - kh + 1, token.shape[2] - kw + 1
        for o in range(2):
            index = o if tokens is None else 2 * n + o
            cells = [
                (token[:, i : i + kh, j : j + kw] * op.weight[index, 0]).sum((1, 2)) + op.bias[index]
                for i in range(h)
                for j in range(w)
            ]
            rows.append(torch.stack(cells, 1))
    slow = torch.stack(rows, 1).unflatten(1, (3, 2)).flatten(2)
    agree(op(x), slow, [x, *op.parameters()])
    assert op(x).shape[-1] == op.out_features


@pytest.mark.parametrize(("picture", "kernel", "padding"), FORMS)
def test_it_is_a_linear_layer(picture, kernel, padding: str) -> None:
    op = SharedConv(picture, 3, kernel, padding=padding).double()
    layer = op.to_linear()
    x = torch.randn(2, 6, picture[0] * picture[1], dtype=torch.float64)
    torch.testing.assert_close(layer(x), op(x))
    torch.testing.assert_close(layer.weight, op.matrix())


@pytest.mark.parametrize("bias", [False, True])
def test_linear_to_convolution_and_back(bias: bool) -> None:
    layer = nn.Linear(192, 30, bias=bias)
    conv = SharedConv.from_linear(layer)
    assert conv.picture == (12, 16)
    assert sum(p.numel() for p in conv.parameters()) == sum(p.numel() for p in layer.parameters())
    x = torch.randn(2, 5, 192)
    torch.testing.assert_close(conv(x), layer(x), atol=0, rtol=0)
    as_convolution = F.conv2d(x.reshape(10, 1, 12, 16), conv.weight, conv.bias).reshape(2, 5, 30)
    torch.testing.assert_close(as_convolution, layer(x), atol=1e-5, rtol=1e-5)
    back = conv.to_linear()
    assert torch.equal(back.weight, layer.weight)
    assert bias == (back.bias is not None)


def test_counts_of_the_paper() -> None:
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    assert count(SharedConv((16, 16), 256)) == 256 * 256 + 256
    assert count(SharedConv((16, 16), 1, (3, 3), padding="same")) == 3 * 3 + 1


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize(("picture", "kernel", "padding"), FORMS)
def test_the_light_path_gives_the_electronic_numbers(picture, kernel, padding: str, positive: bool) -> None:
    op = SharedConv(picture, 3, kernel, padding=padding)
    x = torch.randn(2, 3, picture[0] * picture[1])
    x = x.abs() if positive else x
    path = Optical4f(op)
    error = (path(x) - op(x)).norm() / op(x).norm()
    assert error < 1e-4
    assert path.passes(x) == 6 * 3 * 2 * (1 if positive else 2)
    rebuilt = torch.polar(path.amplitude, path.phase)
    torch.testing.assert_close(rebuilt, path.masks, atol=1e-5, rtol=1e-5)


def test_masks_are_transforms_of_flipped_kernels() -> None:
    op = SharedConv((3, 4), 2)
    path = Optical4f(op)
    kernels = torch.fft.ifft2(path.masks).real[..., :3, :4]
    torch.testing.assert_close((kernels[0] - kernels[1]).flip(-2, -1), op.weight[:, 0], atol=1e-6, rtol=1e-5)
    assert (kernels > -1e-6).all()


def test_levels_and_photons_cost_accuracy() -> None:
    op, x = SharedConv((6, 6), 8, (3, 3)), torch.randn(4, 36)
    error = lambda **settings: float((Optical4f(op, **settings)(x) - op(x)).norm() / op(x).norm())  # noqa: E731
    assert error() < error(bits=12) < error(bits=8) < error(bits=4) < 1
    assert error() < error(photons=1e8) < error(photons=1e3)


def test_gradients_reach_the_pictures() -> None:
    op = SharedConv((4, 4), 2, (3, 3)).double()
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    probe = torch.randn_like(op(x))
    exact, optical = (torch.autograd.grad((f(x) * probe).sum(), x)[0] for f in (op, Optical4f(op)))
    torch.testing.assert_close(optical, exact)


def test_pictures_are_nearly_square() -> None:
    assert [picture_of(n) for n in (1, 7, 192, 196, 768)] == [(1, 1), (1, 7), (12, 16), (14, 14), (24, 32)]


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="allowed are valid, same"):
        SharedConv((4, 4), 2, padding="full")
    with pytest.raises(ValueError, match="do not fit"):
        SharedConv((4, 4), 2, (5, 3))
    with pytest.raises(ValueError, match="must be odd"):
        SharedConv((4, 4), 2, (2, 2), padding="same")
    with pytest.raises(ValueError, match="no picture of"):
        SharedConv((4, 4), 2)(torch.zeros(1, 15))
    with pytest.raises(ValueError, match="not the 3 tokens"):
        SharedConv((4, 4), 2, tokens=3)(torch.zeros(1, 2, 16))
    with pytest.raises(ValueError, match="12 features"):
        SharedConv.from_linear(nn.Linear(12, 3), (3, 5))
    with pytest.raises(ValueError, match="one matrix a token"):
        SharedConv((4, 4), 2, tokens=3).to_linear()
    with pytest.raises(ValueError, match="one light path a token"):
        Optical4f(SharedConv((4, 4), 2, tokens=3))
    with pytest.raises(ValueError, match="bits is 0"):
        Optical4f(SharedConv((4, 4), 2), bits=0)
    with pytest.raises(ValueError, match="features is 0"):
        picture_of(0)
