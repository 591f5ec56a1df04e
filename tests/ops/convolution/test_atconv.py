"""Attentive convolution and its gated MLP against their formulas, in 1, 2 and 3 dimensions."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.nn.functional import gelu, silu

from nearfar.ops.convolution.atconv import ATConv, ChannelRMSNorm, GatedConvMLP, TokenATConv

ACTIVATIONS = {"gelu": gelu, "gelu_tanh": lambda x: gelu(x, approximate="tanh"), "silu": silu}


def agree(fast: torch.Tensor, slow: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    torch.testing.assert_close(fast, slow, atol=1e-9, rtol=0)
    probe = torch.randn_like(fast)
    for a, b in zip(
        torch.autograd.grad((fast * probe).sum(), inputs),
        torch.autograd.grad((slow * probe).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def slow_atconv(operator: ATConv, x: torch.Tensor, activation: str, pool: str) -> torch.Tensor:
    convolve = (F.conv1d, F.conv2d, F.conv3d)[x.ndim - 3]
    a = convolve(x, operator.kernel_proj.weight, operator.kernel_proj.bias)
    taps, dims = len(operator.kernel_gen.weight), x.ndim - 2
    k = operator.window[0]
    if pool == "runs":
        a = a.flatten(2)
        n = a.shape[2]
        pooled = torch.stack([a[:, :, i * n // taps : -(-(i + 1) * n // taps)].mean(2) for i in range(taps)], 2)
    else:
        cells = []
        for cell in itertools.product(range(k), repeat=dims):
            region = a
            for axis, i in enumerate(cell):
                n = a.shape[2 + axis]
                region = region.narrow(2 + axis, i * n // k, -(-(i + 1) * n // k) - i * n // k)
            cells.append(region.flatten(2).mean(2))
        pooled = torch.stack(cells, 2)
    kernel = ACTIVATIONS[activation](pooled) @ operator.kernel_gen.weight.T + operator.kernel_gen.bias
    kernel = kernel - operator.difference_control.sigmoid()[:, None] * kernel.mean(2, keepdim=True)
    values = convolve(x, operator.x_proj.weight, operator.x_proj.bias)
    mixed = [
        convolve(v[None], w.reshape(-1, 1, *operator.window), padding=k // 2, groups=len(v))
        for v, w in zip(values, kernel, strict=True)
    ]
    return convolve(torch.cat(mixed), operator.proj.weight, operator.proj.bias)


@pytest.mark.parametrize("size", [(13,), (5, 7), (3, 4, 5)])
@pytest.mark.parametrize(("activation", "pool"), [("gelu", "runs"), ("gelu_tanh", "grid"), ("silu", "runs")])
def test_atconv_is_its_formula(size: tuple[int, ...], activation: str, pool: str) -> None:
    torch.manual_seed(0)
    operator = ATConv(6, 3, activation, pool=pool, dims=len(size)).double()
    torch.nn.init.normal_(operator.difference_control)
    x = torch.randn(2, 6, *size, dtype=torch.float64, requires_grad=True)
    agree(operator(x), slow_atconv(operator, x, activation, pool), [x, *operator.parameters()])


def test_tokens_are_a_grid() -> None:
    torch.manual_seed(0)
    grid, tokens = ATConv(8), TokenATConv(8)
    oblong = TokenATConv(8, size=(4, 9))
    for other in (tokens, oblong):
        other.load_state_dict(grid.state_dict())
    x = torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(tokens(x.flatten(2).mT), grid(x).flatten(2).mT)
    x = torch.randn(2, 8, 4, 9)
    torch.testing.assert_close(oblong(x.flatten(2).mT), grid(x).flatten(2).mT)
    with pytest.raises(ValueError, match="37 tokens"):
        tokens(torch.randn(1, 37, 8))


def test_kernels_stay_in_float32_under_autocast() -> None:
    operator, x = ATConv(8), torch.randn(1, 8, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        kernel = operator.kernel(x)
        assert operator(x).dtype == torch.bfloat16
    assert kernel.dtype == torch.float32
    torch.testing.assert_close(kernel, operator.kernel(x))


def test_tables_made_in_inference_mode_serve_training() -> None:
    operator, x = ATConv(4), torch.randn(1, 4, 11, 3)
    with torch.inference_mode():
        operator(x)
    operator(x).sum().backward()
    assert operator.kernel_proj.weight.grad is not None


@pytest.mark.parametrize(("size", "causal"), [((9,), False), ((9,), True), ((5, 4), False), ((3, 4, 3), False)])
def test_gated_mlp_is_its_formula(size: tuple[int, ...], causal: bool) -> None:
    torch.manual_seed(0)
    dims = len(size)
    operator = GatedConvMLP(5, 7, norm=True, dims=dims, causal=causal).double()
    torch.nn.init.normal_(operator.norm_layer.weight)
    x = torch.randn(2, 5, *size, dtype=torch.float64, requires_grad=True)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    y = convolve(x, operator.fc1.weight, operator.fc1.bias)
    gate = F.pad(y[:, :7], (2, 0) if causal else (1, 1) * dims)
    u = gelu(convolve(gate, operator.dwconv.weight, operator.dwconv.bias, groups=7)) * y[:, 7:]
    scale = operator.norm_layer.weight.reshape(-1, *[1] * dims)
    u = u / (u.square().mean(1, keepdim=True) + 1e-6).sqrt() * scale
    agree(operator(x), convolve(u, operator.fc2.weight, operator.fc2.bias), [x, *operator.parameters()])


def test_variance_form_of_the_norm() -> None:
    x = torch.randn(2, 6, 3, 3) + 1
    want = x / (x.var(1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(ChannelRMSNorm(6, variance=True)(x), want)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"kernel_size": 2}, "kernel_size is 2"), ({"activation": "relu"}, "relu"), ({"pool": "max"}, "max")],
)  # fmt: skip
def test_bad_arguments(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ATConv(8, **settings)
