"""Dynamic depthwise convolution, LS convolution and offset-bias attention against their formulas."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from nearfar.ops.attention.offset_bias import OffsetBiasAttention
from nearfar.ops.convolution.dynamic import position_depthwise, sample_depthwise
from nearfar.ops.convolution.lsconv import ConvNorm, LargeKernelPerception, LSConv, RepVGGDepthwise


def agree(fast: torch.Tensor, slow: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    torch.testing.assert_close(fast, slow, atol=1e-9, rtol=0)
    probe = torch.randn_like(fast)
    for a, b in zip(
        torch.autograd.grad((fast * probe).sum(), inputs),
        torch.autograd.grad((slow * probe).sum(), inputs, retain_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def settle(module: torch.nn.Module) -> torch.nn.Module:
    """Eval mode with running statistics and weights that are nowhere neutral, in double."""
    torch.manual_seed(3)
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif tensor.is_floating_point() and tensor.ndim < 2:
            tensor.uniform_(-1, 1)
    return module.double().eval()


@pytest.mark.parametrize(("size", "causal"), [((9,), False), ((9,), True), ((5, 4), False), ((3, 4, 3), False)])
def test_position_depthwise_is_its_sum(size: tuple[int, ...], causal: bool) -> None:
    torch.manual_seed(0)
    dims, k, n = len(size), 3, 2
    x = torch.randn(2, 6, *size, dtype=torch.float64, requires_grad=True)
    kernel = torch.randn(2, n, k**dims, *size, dtype=torch.float64, requires_grad=True)
    rows = []
    for channel in range(6):
        for position in itertools.product(*map(range, size)):
            total = torch.zeros(2, dtype=torch.float64)
            for tap, offsets in enumerate(itertools.product(range(k), repeat=dims)):
                there = [p + o - (k - 1 if causal else k // 2) for p, o in zip(position, offsets, strict=True)]
                if all(0 <= t < limit for t, limit in zip(there, size, strict=True)):
                    total = (
                        total + x[(slice(None), channel, *there)] * kernel[(slice(None), channel % n, tap, *position)]
                    )
            rows.append(total)
    slow = torch.stack(rows, 1).reshape(x.shape)
    agree(position_depthwise(x, kernel, causal=causal), slow, [x, kernel])


@pytest.mark.parametrize("size", [(9,), (5, 6), (3, 4, 3)])
@pytest.mark.parametrize("biased", [False, True])
def test_sample_depthwise_is_one_convolution_a_sample(size: tuple[int, ...], biased: bool, monkeypatch) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True)
    kernel = torch.randn(2, 4, *[3] * len(size), dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, 4, dtype=torch.float64, requires_grad=True) if biased else None
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(size) - 1]
    slow = torch.cat(
        [
            convolve(x[b : b + 1], kernel[b, :, None], None if bias is None else bias[b], padding=1, groups=4)
            for b in range(2)
        ]
    )
    inputs = [x, kernel] + ([bias] if biased else [])
    agree(sample_depthwise(x, kernel, bias), slow, inputs)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    agree(sample_depthwise(x, kernel, bias), slow, inputs)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_lsconv_is_its_parts(dims: int) -> None:
    operator = settle(LSConv(16, 5, 3, 4, dims=dims))
    x = torch.randn(2, 16, *[6, 5, 4][:dims], dtype=torch.float64, requires_grad=True)
    lkp = operator.lkp
    convolve = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]

    def norm(y: torch.Tensor, bn: torch.nn.Module) -> torch.Tensor:
        shape = (1, -1, *[1] * dims)
        y = (y - bn.running_mean.reshape(shape)) / (bn.running_var.reshape(shape) + 1e-5).sqrt()
        return y * bn.weight.reshape(shape) + bn.bias.reshape(shape)

    y = norm(convolve(x, lkp.cv1.c.weight), lkp.cv1.bn).relu()
    y = norm(convolve(y, lkp.cv2.c.weight, padding=2, groups=8), lkp.cv2.bn)
    y = norm(convolve(y, lkp.cv3.c.weight), lkp.cv3.bn).relu()
    y = convolve(y, lkp.cv4.weight, lkp.cv4.bias).unflatten(1, (4, 3**dims))
    flat = y.flatten(2)
    y = (y - flat.mean(2).reshape(2, 4, *[1] * (dims + 1))) / (
        flat.var(2, unbiased=False).reshape(2, 4, *[1] * (dims + 1)) + 1e-5
    ).sqrt()
    affine = lambda v: v.reshape(1, 4, 3**dims, *[1] * dims)  # noqa: E731
    kernel = y * affine(lkp.norm.weight) + affine(lkp.norm.bias)
    mixed = torch.zeros_like(x)
    padded = F.pad(x, [1] * 2 * dims)
    for tap, offsets in enumerate(itertools.product(range(3), repeat=dims)):
        window = padded[(..., *[slice(o, o + n) for o, n in zip(offsets, x.shape[2:], strict=True)])]
        mixed = mixed + window * kernel[:, torch.arange(16) % 4, tap]
    agree(operator(x), norm(mixed, operator.bn) + x, [x, *operator.parameters()])


def test_causal_lsconv_does_not_see_the_future() -> None:
    operator = settle(LSConv(16, dims=1, causal=True))
    x = torch.randn(1, 16, 20, dtype=torch.float64)
    later = x.clone()
    later[..., 12:] = 1
    torch.testing.assert_close(operator(x)[..., :12], operator(later)[..., :12])
    assert not torch.allclose(operator(x)[..., 12:], operator(later)[..., 12:])


@pytest.mark.parametrize(("dims", "causal"), [(1, False), (1, True), (2, False), (3, False)])
def test_fused_depthwise_block(dims: int, causal: bool) -> None:
    operator = settle(RepVGGDepthwise(6, dims=dims, causal=causal))
    x = torch.randn(2, 6, *[5] * dims, dtype=torch.float64)
    before = operator(x)
    operator.fuse()
    operator.fuse()
    torch.testing.assert_close(operator(x), before)
    assert sum(p.numel() for p in operator.parameters()) == 6 * 3**dims + 6


def test_fused_convolution() -> None:
    for layer in (ConvNorm(3, 8, 3, stride=2), ConvNorm(8, 8, 3, stride=2, depthwise=True)):
        settle(layer)
        x = torch.randn(1, layer.c.in_channels, 9, 9, dtype=torch.float64)
        before = layer(x)
        layer.fuse()
        torch.testing.assert_close(layer(x), before)


@pytest.mark.parametrize("size", [(5, 5), (3, 4)])
def test_attention_is_its_softmax(size: tuple[int, int]) -> None:
    operator = settle(OffsetBiasAttention(12, 3, 4, 5))
    x = torch.randn(2, 12, *size, dtype=torch.float64, requires_grad=True)
    projected = operator.qkv(x)
    query, key, value = operator.dw(projected[:, :12]), projected[:, 12:24], projected[:, 24:]
    table = operator.attention_biases.reshape(1, 3, 5, 5)
    if size != (5, 5):
        table = F.interpolate(table, size, mode="bicubic")
    positions = list(itertools.product(range(size[0]), range(size[1])))
    out = []
    for head in range(3):
        q, k, v = (t[:, 4 * head : 4 * head + 4].flatten(2).mT for t in (query, key, value))
        logits = q @ k.mT / math.sqrt(4)
        offsets = [table[0, head, abs(a[0] - b[0]), abs(a[1] - b[1])] for a in positions for b in positions]
        weights = (logits + torch.stack(offsets).reshape(len(positions), -1)).softmax(-1)
        torch.testing.assert_close(operator.attention_map(x)[:, head], weights)
        out.append((weights @ v).mT)
    slow = operator.proj(torch.cat(out, 1).reshape(x.shape))
    agree(operator(x), slow, [x, *operator.parameters()])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LSConv(12), "multiple of share=8"),
        (lambda: LSConv(16, small_kernel=2), "small_kernel is 2"),
        (lambda: LSConv(16, dims=2, causal=True), "causal"),
        (lambda: LargeKernelPerception(16, 6), "large_kernel is 6"),
        (lambda: OffsetBiasAttention(10, 4), "num_heads=4"),
        (lambda: OffsetBiasAttention(8, 4, resolution=0), "resolution is 0"),
        (lambda: position_depthwise(torch.zeros(1, 4, 5, 5), torch.zeros(1, 3, 9, 5, 5)), "3 kernels"),
        (lambda: position_depthwise(torch.zeros(1, 4, 5, 5), torch.zeros(1, 4, 8, 5, 5)), "8 taps"),
        (lambda: position_depthwise(torch.zeros(1, 4, 5, 5), torch.zeros(1, 4, 9, 5, 5), causal=True), "one axis"),
        (lambda: sample_depthwise(torch.zeros(1, 4, 5, 5), torch.zeros(1, 4, 2, 2)), "kernel_size is 2"),
        (lambda: sample_depthwise(torch.zeros(1, 4, 5, 5), torch.zeros(1, 4, 3)), "axes"),
    ],
)
def test_bad_arguments(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
