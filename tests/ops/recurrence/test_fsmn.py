"""Sequence convolutions, time norms and memory blocks against the obvious slow forms."""

import pytest
import torch
import torch.nn.functional as F

from nearfar.ops.common.sequence_norms import ScaleNorm, TimeNorm
from nearfar.ops.convolution.sequence import ConvProjection, depthwise_sequence, token_shift
from nearfar.ops.recurrence.fsmn import FSMN, DilatedDenseFSMN, GatedFSMN


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def randn(*shape, seed=0, grad=False):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=grad)


@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize(("left", "right"), [(0, 0), (6, 0), (3, 4)])
@pytest.mark.parametrize("frames", [7, 12])
def test_depthwise_sequence_equals_the_sum_written_out(frames, left, right, dilation):
    x, weight = randn(2, frames, 3, grad=True), randn(3, 3, seed=1, grad=True)
    padded = F.pad(x, (0, 0, left, right))
    out = padded.shape[1] - 2 * dilation
    slow = torch.stack([sum(weight[:, j] * padded[:, t + j * dilation] for j in range(3)) for t in range(out)], dim=1)
    ours = depthwise_sequence(x, weight, left, right, dilation)
    close(ours, slow)
    for a, b in zip(
        torch.autograd.grad(ours.pow(2).sum(), [x, weight]), torch.autograd.grad(slow.pow(2).sum(), [x, weight])
    ):
        close(a, b)
    with torch.no_grad():  # the channels-last form
        close(depthwise_sequence(x, weight, left, right, dilation), slow)


def test_token_shift_delays_half_the_channels():
    x = randn(2, 5, 4)
    y = token_shift(x)
    close(y[..., 2:], x[..., 2:])
    close(y[:, 1:, :2], x[:, :-1, :2])
    assert (y[:, 0, :2] == 0).all()


def test_scale_norm_divides_by_the_clamped_root_mean_square():
    norm = ScaleNorm(4).double()
    x = randn(3, 4)
    close(norm(x), x / x.square().mean(-1, keepdim=True).sqrt())
    close(norm(torch.full((1, 4), 1e-7, dtype=torch.float64)), torch.full((1, 4), 1e-2, dtype=torch.float64))


@pytest.mark.parametrize("per_channel", [False, True])
def test_time_norm_is_group_or_instance_norm_and_ignores_padding(per_channel):
    norm = TimeNorm(4, per_channel, eps=1e-5).double()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = randn(2, 9, 4, seed=2)
    slow = F.instance_norm(x.mT) if per_channel else F.group_norm(x.mT, 1)
    close(norm(x), slow.mT * norm.weight + norm.bias)
    mask = torch.arange(9) < torch.tensor([9, 5])[:, None]
    close(norm(x, mask)[0], norm(x)[0])
    close(norm(x, mask)[1, :5], norm(x[1:, :5])[0])


@pytest.mark.parametrize("per_channel", [False, True])
def test_cumulative_norm_uses_the_past_alone_and_streams(per_channel):
    norm = TimeNorm(4, per_channel, causal=True, eps=1e-5).double()
    x = randn(2, 20, 4)
    axes = (1,) if per_channel else (1, 2)
    slow = []
    for t in range(20):
        past = x[:, : t + 1]
        var, mean = torch.var_mean(past, axes, keepdim=True, correction=0)
        slow.append((x[:, t : t + 1] - mean) / (var + 1e-5).sqrt())
    close(norm(x), torch.cat(slow, 1))
    state = {}
    close(torch.cat([norm(x[:, a : a + 7], state=state) for a in (0, 7, 14)], 1), norm(x))


def naive_dense(net, x):
    """The published form: padded 2-D convolutions over (B, C, T, 1)."""
    stack = out = x.mT.unsqueeze(-1)
    for i, (weight, norm, slope) in enumerate(zip(net.convs, net.norms, net.slopes)):
        pad = (weight.shape[-1] - 1) // 2 * 2**i
        out = F.conv2d(stack, weight.unsqueeze(-1), padding=(pad, 0), dilation=(2**i, 1), groups=len(weight))
        out = F.prelu(F.instance_norm(out, weight=norm.weight, bias=norm.bias, eps=1e-5), slope)
        stack = torch.cat([out, stack], dim=1)
    return out.squeeze(-1).mT


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_dilated_dense_net_equals_the_picture_form(depth):
    torch.manual_seed(0)
    net = DilatedDenseFSMN(4, order=3, depth=depth).double()
    x = randn(2, 11, 4, grad=True)
    ours, slow = net(x), naive_dense(net, x)
    close(ours, slow)
    parameters = [x, *net.parameters()]
    for a, b in zip(
        torch.autograd.grad(ours.pow(2).sum(), parameters), torch.autograd.grad(slow.pow(2).sum(), parameters)
    ):
        close(a, b)
    with torch.no_grad():
        close(net(x), slow)


def test_at_depth_two_the_halves_see_different_stages():
    net = DilatedDenseFSMN(4, order=3, depth=2).double().eval()
    x = randn(1, 11, 4)
    with torch.no_grad():
        before = net(x)
        net.convs[0].zero_()
        after = net(x)
    close(before[..., 2:], after[..., 2:])
    assert (before[..., :2] - after[..., :2]).abs().max() > 1e-3


@pytest.mark.parametrize("make", [lambda c: FSMN(6, order=3, causal=c), lambda c: GatedFSMN(6, 4, order=3, causal=c)])
def test_memory_blocks_ignore_padding_stream_when_causal_and_take_one_frame(make):
    torch.manual_seed(4)
    block, causal = make(False).double().eval(), make(True).double().eval()
    x = randn(2, 20, 6)
    mask = torch.arange(20) < torch.tensor([20, 12])[:, None]
    close(block(x, mask)[1, :12], block(x[1:, :12])[0])
    state = {}
    close(torch.cat([causal(x[:, a : a + 6], state=state) for a in range(0, 20, 6)], 1), causal(x))
    changed = x.clone()
    changed[:, 15:] += 1
    close(causal(changed)[:, :15], causal(x)[:, :15])
    assert (causal(changed)[:, 15] - causal(x)[:, 15]).abs().max() > 1e-9
    assert block(x[:, :1]).isfinite().all()


def test_conv_projection_ignores_padding():
    torch.manual_seed(5)
    project = ConvProjection(4, 6, torch.nn.LayerNorm(4), kernel_size=5).double().eval()
    x = randn(2, 12, 4)
    mask = torch.arange(12) < torch.tensor([12, 6])[:, None]
    close(project(x, mask)[1, :6], project(x[1:, :6])[0])
    h = F.silu(project.linear(project.norm(x)))
    close(project(x), h + F.conv1d(h.mT, project.depthwise.unsqueeze(1), padding=2, groups=6).mT)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DilatedDenseFSMN(4, order=0), "at least 1"),
        (lambda: ScaleNorm(0), "dim is 0"),
        (lambda: TimeNorm(0), "dim is 0"),
        (lambda: TimeNorm(2)(torch.zeros(1, 3, 2), state={}), "causal=True"),
    ],
)
def test_bad_arguments_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()
