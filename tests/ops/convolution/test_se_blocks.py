"""SE-Res2 and SE-D2 blocks against slow forms, and under padding."""

import jaxtyping
import pytest
import torch

from nearfar.ops.convolution.se_blocks import ConvReLUNorm, SED2Block, SERes2Block, SqueezeExcite, masked_mean


@pytest.fixture
def without_shape_checks():
    """torch.compile cannot trace the run-time checks of shapes, which production does not have."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def randomize(module, seed=0):
    """Random parameters and running statistics, so that no normalization is the identity; evaluation mode, float64."""
    generator = torch.Generator().manual_seed(seed)
    module.double().eval()
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            value = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.copy_(1 + 0.3 * value.tanh() if "var" in name else 0.4 * value)
    return module


def slow_conv(x, conv):
    """A "same" 2-D convolution with zero padding as sums over shifted copies."""
    (kh, kw), (dh, dw) = conv.kernel_size, conv.dilation
    height, width = x.shape[2:]
    out = conv.bias.view(1, -1, 1, 1).expand(x.shape[0], -1, height, width).clone()
    for i in range(kh):
        for j in range(kw):
            di, dj = (i - kh // 2) * dh, (j - kw // 2) * dw
            shifted = torch.zeros_like(x)
            for h in range(height):
                for w in range(width):
                    if 0 <= h + di < height and 0 <= w + dj < width:
                        shifted[:, :, h, w] = x[:, :, h + di, w + dj]
            out = out + torch.einsum("oc,bchw->bohw", conv.weight[:, :, i, j], shifted)
    return out


def slow_crb(x, block):
    y = slow_conv(x, block.conv).clamp(min=0)
    n = block.norm
    y = (y - n.running_mean.view(1, -1, 1, 1)) / (n.running_var.view(1, -1, 1, 1) + 1e-5).sqrt()
    return y * n.weight.view(1, -1, 1, 1) + n.bias.view(1, -1, 1, 1)


def slow_se(x, se):
    out = torch.empty_like(x)
    for b in range(x.shape[0]):
        mean = torch.stack([x[b, c].sum() / x[b, c].numel() for c in range(x.shape[1])])
        gate = 1 / (
            1 + (-(se.expand.weight @ (se.reduce.weight @ mean + se.reduce.bias).clamp(min=0) + se.expand.bias)).exp()
        )
        out[b] = x[b] * gate[:, None, None]
    return out


def slow_res2(x, block):
    y = slow_crb(x, block.conv_in)
    width = y.shape[1] // block.scale
    parts = [y[:, i * width : (i + 1) * width] for i in range(block.scale)]
    done = [slow_crb(parts[0], block.convs[0])]
    for i in range(1, block.scale - 1):
        done.append(slow_crb(parts[i] + done[i - 1], block.convs[i]))
    y = slow_crb(torch.cat([*done, parts[-1]], 1), block.conv_out)
    return x + slow_se(y, block.se)


def slow_d2(x, block):
    n, c = len(block.stages), x.shape[1]
    emitted = []
    for i, stage in enumerate(block.stages):
        x = x + slow_crb(x, stage)
        if i < n - 1:
            keep = c * (n - 1 - i) // n
            emitted.append(x[:, keep:])
            x = x[:, :keep]
    return slow_se(torch.cat([*emitted, x], 1), block.se)


CASES = [
    (lambda dims=2: SERes2Block(8, 3, 2, scale=4, se_channels=5, dims=dims), slow_res2),
    (lambda dims=2: SED2Block(8, 4, 3, se_channels=5, dims=dims), slow_d2),
]
IDS = ["res2", "d2"]


@pytest.mark.parametrize(("build", "oracle"), CASES, ids=IDS)
def test_equals_the_slow_form_forward_and_gradient(build, oracle):
    block = randomize(build())
    x = torch.randn(2, 8, 3, 5, dtype=torch.float64, requires_grad=True)
    probe = torch.randn(2, 8, 3, 5, dtype=torch.float64)
    fast, slow = block(x), oracle(x, block)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-9)
    inputs = [x, *block.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad((fast * probe).sum(), inputs, allow_unused=True),
        torch.autograd.grad((slow * probe).sum(), inputs, allow_unused=True),
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("build", "oracle"), CASES, ids=IDS)
@pytest.mark.parametrize("dims", [1, 2])
def test_padded_items_equal_the_items_alone(build, oracle, dims):
    block = randomize(build(dims))
    x = torch.randn(3, 8, *[4] * (dims - 1), 17, dtype=torch.float64)
    lengths = torch.tensor([17, 9, 1])
    mask = torch.arange(17) < lengths[:, None]
    padded = block(x, mask)
    for i, n in enumerate(lengths.tolist()):
        torch.testing.assert_close(padded[i, ..., :n], block(x[i : i + 1, ..., :n])[0], rtol=0, atol=1e-10)
    noisy = torch.where(mask.view(3, *[1] * dims, 17), x, 1e3 * torch.randn_like(x))
    valid = mask.view(3, *[1] * dims, 17).expand_as(padded)
    torch.testing.assert_close(block(noisy, mask)[valid], padded[valid], rtol=0, atol=1e-10)


@pytest.mark.parametrize("build", [case[0] for case in CASES], ids=IDS)
def test_two_axes_with_one_row_equal_one_axis(build):
    flat, square = randomize(build(1)), randomize(build(2))
    state = flat.state_dict()
    for name, tensor in square.state_dict().items():
        if name.endswith("conv.weight"):
            tensor.zero_()
            tensor[:, :, tensor.shape[2] // 2] = state[name]
        else:
            tensor.copy_(state[name])
    x = torch.randn(2, 8, 13, dtype=torch.float64)
    torch.testing.assert_close(square(x[:, :, None])[:, :, 0], flat(x), rtol=0, atol=1e-10)


def test_reach_of_the_chained_convolutions():
    block = randomize(SERes2Block(8, 3, 2, scale=4, dims=1))
    block.se.forward = lambda x, mask=None: x  # the squeeze-and-excite sees everything
    for module in block.modules():
        if isinstance(module, ConvReLUNorm):
            module.conv.bias.data.fill_(100.0)  # every ReLU open
    x = torch.randn(1, 8, 41, dtype=torch.float64, requires_grad=True)
    block(x)[0, :, 20].sum().backward()
    reached = x.grad.abs().sum((0, 1)).nonzero().flatten()
    assert (reached.min().item(), reached.max().item()) == (20 - 6, 20 + 6)


def test_masked_mean_ignores_padding():
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    mask = torch.arange(6) < torch.tensor([6, 2])[:, None]
    mean = masked_mean(x, mask)
    torch.testing.assert_close(mean[1, :, 0, 0], x[1, :, :, :2].mean((1, 2)))
    torch.testing.assert_close(mean[0], masked_mean(x, None)[0])


def test_parameter_counts_of_the_published_widths():
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    assert count(SERes2Block(16, 3, 2, scale=4)) == 5316
    assert count(SED2Block(16, 4)) == 8680
    assert count(SqueezeExcite(256, 128)) == 2 * 256 * 128 + 256 + 128


@pytest.mark.parametrize(
    "build",
    [
        lambda: ConvReLUNorm(4, 4, 2),
        lambda: ConvReLUNorm(4, 4, (3, 3, 3)),
        lambda: ConvReLUNorm(4, 4, 3, dims=3),
        lambda: SERes2Block(10, scale=4),
        lambda: SERes2Block(8, scale=1),
        lambda: SED2Block(10, 4),
    ],
)
def test_bad_arguments_are_refused(build):
    with pytest.raises(ValueError, match=r"must be"):
        build()


def test_compiles_and_runs_in_half_precision(without_shape_checks):
    block = SERes2Block(16, 3, 2, scale=4).eval()
    x = torch.randn(1, 16, 4, 9)
    torch.testing.assert_close(torch.compile(block, fullgraph=True, backend="eager")(x), block(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(block(x)).all()
