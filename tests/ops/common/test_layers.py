"""Layers that take another way on a CPU: the numbers of torch's own, forward and backward."""

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nearfar.ops.common.dims import Conv2d
from nearfar.ops.common.layers import GELU, ChannelNorm, DepthwiseConv, linear_map


def maps(batch: int, channels: int, height: int, width: int, *, last: bool) -> Tensor:
    x = torch.randn(batch, channels, height, width)
    return x.contiguous(memory_format=torch.channels_last) if last else x


@pytest.mark.parametrize("shape", [(1, 6, 5, 7), (3, 64, 16, 16), (2, 5, 1, 1), (2, 1, 4, 4)])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("form", ["pointwise", "part of the channels", "strided", "wide", "many weights"])
def test_convolution_is_torchs(shape: tuple[int, ...], last: bool, form: str) -> None:
    torch.manual_seed(0)
    x = maps(shape[0], 2 * shape[1] if form == "part of the channels" else shape[1], *shape[2:], last=last)
    if form == "part of the channels":
        x = x.chunk(2, dim=1)[1]
    settings = {"strided": {"stride": 2}, "wide": {"padding": 1}, "many weights": {"stride": 2, "padding": 1}}
    sizes = shape[1], 64 if form == "many weights" else 11, 3 if form in ("wide", "many weights") else 1
    ours = Conv2d(*sizes, **settings.get(form, {}))
    theirs = nn.Conv2d(*sizes, **settings.get(form, {}))
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    if form == "many weights" and last and shape == (1, 6, 5, 7):
        assert ours(x).is_contiguous(memory_format=torch.channels_last)
    grads = []
    for layer in (ours, theirs):
        given = x.detach().clone().requires_grad_()
        layer(given).square().sum().backward()
        grads.append([given.grad, layer.weight.grad, layer.bias.grad])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("size", "dilation"), [((2, 9), 1), ((1, 1), 1), ((3, 3), 2), ((8, 4), 2), ((7,), 1), ((2,), 1)]
)
def test_depthwise_convolution_of_a_small_map(size: tuple[int, ...], dilation: int) -> None:
    torch.manual_seed(0)
    layer = DepthwiseConv(4, 7, dims=len(size)).double()
    layer.dilate(dilation)
    x = torch.randn(2, 4, *size, dtype=torch.double, requires_grad=True)
    whole = layer.weight.detach().clone().requires_grad_()
    convolve = (F.conv1d, F.conv2d)[len(size) - 1]
    expected = convolve(x, whole, layer.bias, padding=3 * dilation, dilation=dilation, groups=4)
    y = layer(x)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, whole.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(3, 6, 5, 7), (1, 6, 4, 4), (2, 1, 3, 3), (2, 6, 5), (4, 6)])
@pytest.mark.parametrize("last", [True, False])
def test_gelu_is_torchs_in_every_layout(shape: tuple[int, ...], last: bool) -> None:
    x = torch.randn(shape).movedim(1, -1).contiguous().movedim(-1, 1) if last else torch.randn(shape)
    x.requires_grad_()
    y, want = GELU()(x), F.gelu(x)
    assert y.stride() == want.stride()
    torch.testing.assert_close(y, want)
    weight = torch.randn(shape)
    torch.testing.assert_close(*(torch.autograd.grad((out * weight).sum(), x) for out in (y, want)))
    with torch.no_grad():
        half = torch.cat((x, x), 1).chunk(2, 1)[0]  # of a larger map
        torch.testing.assert_close(GELU()(half), want)
        torch.testing.assert_close(GELU()(x.clone()), want)


@pytest.mark.parametrize("size", [(5,), (4, 3), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_compiled_channel_norm_of_one_sample_is_the_same(
    size: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # checks of shapes cannot be traced
    norm, x = ChannelNorm(6).to(dtype), (3 + torch.randn(1, 6, *size)).to(dtype)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(norm, fullgraph=True, backend="eager")(x), norm(x))


class Adapter(nn.Module):
    """What peft puts in a layer's place: it shows the layer's weight and computes with more."""

    def __init__(self, layer: nn.Module, size: int) -> None:
        super().__init__()
        self.layer, self.in_features = layer, size
        self.delta = nn.Parameter(torch.randn(4, size))

    @property
    def weight(self) -> Tensor:
        return self.layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + torch.einsum("oi,bi...->bo...", self.delta, x)


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), nn.Linear(6, 4, bias=False), nn.Conv2d(6, 4, 1), Conv2d(6, 4, 1)])
def test_the_map_of_a_wrapped_layer_is_the_whole_one(layer: nn.Module) -> None:
    x = torch.randn(3, 6)
    view = (3, 6, *(1,) * (layer.weight.ndim - 2))
    weight, bias = linear_map(layer)
    assert weight.data_ptr() == layer.weight.data_ptr()
    assert bias is layer.bias
    torch.testing.assert_close(F.linear(x, weight, bias), layer(x.view(view)).flatten(1))
    wrapped = Adapter(layer, 6)
    torch.testing.assert_close(F.linear(x, *linear_map(wrapped)), wrapped(x.view(view)).flatten(1))
    F.linear(x, *linear_map(wrapped)).sum().backward()
    assert wrapped.delta.grad is not None
    assert layer.weight.grad is not None


def test_the_map_of_a_quantized_layer() -> None:
    layer, x = nn.Sequential(nn.Linear(6, 4)), torch.randn(3, 6)
    packed = torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}, torch.qint8)[0]
    torch.testing.assert_close(F.linear(x, *linear_map(packed)), layer(x), rtol=0.1, atol=0.05)
