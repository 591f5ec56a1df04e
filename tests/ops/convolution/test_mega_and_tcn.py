"""Mega's average and gated attention, and dilated convolution networks, against their obvious forms in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from nearfar.ops.attention.gated import (
    ATTENTIONS,
    ChunkAttention,
    MegaLayer,
    NormedFeedForward,
    RotaryBias,
    SimpleBias,
    make_norm,
    toeplitz,
)
from nearfar.ops.convolution.tcn import (
    DilatedStack,
    TCNMixer,
    TemporalConvNet,
    choose_dilations,
    receptive_field,
)
from nearfar.ops.recurrence.ema import DampedEMA, chunked_average

D, N = 6, 45


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def same(ours, theirs, wanted):
    """Outputs and the gradients of `wanted` agree to 1e-9."""
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    weight = torch.randn_like(ours)
    a = torch.autograd.grad((ours * weight).sum(), wanted, allow_unused=True)
    b = torch.autograd.grad((theirs * weight).sum(), wanted, allow_unused=True)
    for one, two in zip(a, b):
        assert (one is None) == (two is None)
        if one is not None:
            torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-9 * float(1 + two.abs().max()))


def shaken(module):
    """So that no initial zero or constant hides a term."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return module


def slow_average(m, x, mask=None):
    """The double sum of the definition."""
    real = x if mask is None else x * mask[..., None]
    p = torch.sigmoid(m.delta)
    q = 1 - p * torch.sigmoid(m.alpha)
    longest = min(x.shape[1], m.truncation or x.shape[1])
    k = [(m.gamma / math.sqrt(m.order) * p * m.beta * q**lag).sum(-1) for lag in range(longest)]
    rows = []
    for t in range(x.shape[1]):
        y = sum(k[lag][: m.dim] * real[:, t - lag] for lag in range(min(t + 1, longest)))
        if m.bidirectional:
            y = y + sum(k[lag][m.dim :] * real[:, t + lag] for lag in range(min(x.shape[1] - t, longest)))
        rows.append(F.silu(y + m.omega * x[:, t]))
    return torch.stack(rows, 1)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("how", [{}, {"form": "scan"}, {"truncation": 7}, {"truncation": 500}])
@pytest.mark.parametrize("length", [1, 40])
def test_average(bidirectional, how, length):
    ema = shaken(DampedEMA(3, 4, bidirectional, **how))
    x = torch.randn(2, length, 3, requires_grad=True)
    same(ema(x), slow_average(ema, x), [x, *ema.parameters()])


def test_padding_does_not_reach_real_positions():
    x, mask = torch.randn(2, 9, 3), torch.arange(9) < torch.tensor([[9], [5]])
    for form in ("fft", "scan"):
        ema = DampedEMA(3, 4, True, form=form)
        torch.testing.assert_close(ema(x, mask), slow_average(ema, x, mask), rtol=1e-9, atol=1e-9)


def test_changed_weights_change_a_kernel_that_is_kept():
    ema, x = DampedEMA(3, 4), torch.randn(1, 9, 3)
    with torch.no_grad():
        before = ema(x)
        assert torch.equal(ema(x), before)
        for parameter in (ema.delta, ema.alpha, ema.beta, ema.gamma):
            parameter += 0.5
            torch.testing.assert_close(ema(x), slow_average(ema, x), rtol=1e-9, atol=1e-9)
            assert not torch.allclose(ema(x), before)


@pytest.mark.parametrize("n", [1, 3, 8, 21])
def test_chunked_average_carries_a_state(n):
    log_q, write, read = -torch.rand(2, 3), torch.randn(2, 3), torch.randn(2, 3)
    u, state = torch.randn(4, 2, n), torch.randn(4, 2, 3)
    h, rows = state, []
    for t in range(n):
        h = torch.exp(log_q) * h + write * u[:, :, t, None]
        rows.append((read * h).sum(-1))
    y, last = chunked_average(u, log_q, write, read, state, chunk=8)
    torch.testing.assert_close(y, torch.stack(rows, -1), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(last, h, rtol=1e-9, atol=1e-9)


def test_relative_biases():
    rotary, simple = RotaryBias(6), SimpleBias(20)
    ours = toeplitz(rotary(9))
    for i in range(9):
        for j in range(9):
            turned = []
            for vector, p in ((rotary.alpha, i), (rotary.beta, j)):
                angle = p * 10000.0 ** (-torch.arange(3) / 3)
                a, b = vector[:3], vector[3:]
                turned.append(torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()]))
            torch.testing.assert_close(ours[i, j], turned[0] @ turned[1], rtol=1e-9, atol=1e-12)
            assert toeplitz(simple(9))[i, j] == simple.bias[19 + j - i]
    with pytest.raises(ValueError, match="max_length=20"):
        simple(21)


def slow_attention(m, q, k, v, mask=None):
    """Row by row."""
    n = q.shape[1]
    size = min(m.chunk or n, n)
    bias = toeplitz(m.bias(size))
    out = torch.zeros_like(v)
    for b in range(len(q)):
        rows = []
        for i in range(n):
            start = i // size * size
            keys = range(start, i + 1 if m.causal else min(start + size, n))
            if mask is not None and mask[b, start : start + size].any():
                keys = [j for j in keys if mask[b, j]]
            scores = torch.stack([q[b, i] @ k[b, j] for j in keys]) if len(keys) else q.new_zeros(0)
            offsets = bias[i - start, [j - start for j in keys]]
            if m.kind == "softmax":
                weights = (scores / math.sqrt(q.shape[-1]) + offsets).softmax(0)
            else:
                w = scores / max(len(keys), 1) + offsets
                erf = 0.5 * (1 + torch.erf((w - 0.707107) / (0.282095 * math.sqrt(2))))
                weights = erf if m.kind == "laplace" else torch.relu(w) ** 2
            rows.append(weights @ v[b, keys])
        out = torch.cat([out[:b], torch.stack(rows)[None], out[b + 1 :]])
    return out


@pytest.mark.parametrize("kind", ATTENTIONS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("chunk", "bias"), [(None, "simple"), (1, "rotary"), (7, "simple"), (7, "rotary"), (9, "simple"), (60, "rotary")]
)
def test_attention(kind, causal, chunk, bias):
    attention = shaken(ChunkAttention(4, chunk, kind, bias, max_length=60, causal=causal))
    q, k, v = (torch.randn(2, 18, c, requires_grad=True) for c in (4, 4, 3))
    same(attention(q, k, v), slow_attention(attention, q, k, v), [q, k, v, *attention.parameters()])


@pytest.mark.parametrize("kind", ATTENTIONS)
@pytest.mark.parametrize("chunk", [None, 7])
def test_attention_does_not_see_padding(kind, chunk):
    attention = shaken(ChunkAttention(4, chunk, kind, causal=False))
    q, k, v = (torch.randn(3, 18, c) for c in (4, 4, 3))
    mask = torch.arange(18) < torch.tensor([[18], [9], [2]])
    ours, theirs = attention(q, k, v, mask), slow_attention(attention, q, k, v, mask)
    assert ours.isfinite().all()
    torch.testing.assert_close(ours[mask], theirs[mask], rtol=1e-9, atol=1e-9)


def silu(x):
    return x * torch.sigmoid(x)


def slow_layer(m, x):
    d, z, v = m.dim, m.attention_dim, m.value_dim
    normed = m.norm(x) if m.prenorm else x
    value = silu(normed @ m.v_proj.weight.T + m.v_proj.bias)
    both = m.memory(normed) @ m.m_proj.weight.T + m.m_proj.bias
    u, zr, hx = both[..., :d], silu(both[..., d : d + z + v]), both[..., d + z + v :]
    q, k = (zr[..., :z] * m.gamma[i] + m.beta[i] for i in (0, 1))
    attended = slow_attention(m.attention, q, k, value) * zr[..., z:]
    h = silu(hx + attended @ m.h_proj.weight.T + m.h_proj.bias)
    out = (1 - torch.sigmoid(u)) * x + torch.sigmoid(u) * h
    return out if m.prenorm else m.norm(out)


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm", "scalenorm", "batchnorm"])
@pytest.mark.parametrize("prenorm", [True, False])
def test_layer(norm, prenorm):
    memory = DampedEMA(D, 4, bidirectional=True)
    layer = shaken(MegaLayer(D, memory, 4, 10, 8, "laplace", "simple", causal=False, norm=norm, prenorm=prenorm))
    x = torch.randn(2, 21, D, requires_grad=True)
    same(layer(x), slow_layer(layer, x), [x, *(p for p in layer.parameters())])


def test_feed_forward():
    for prenorm in (True, False):
        ffn = shaken(NormedFeedForward(D, 9, "scalenorm", prenorm))
        x = torch.randn(2, 5, D, requires_grad=True)
        h = ffn.norm(x) if prenorm else x
        y = x + silu(h @ ffn.fc1.weight.T + ffn.fc1.bias) @ ffn.fc2.weight.T + ffn.fc2.bias
        same(ffn(x), y if prenorm else ffn.norm(y), [x, *ffn.parameters()])


def test_scalar_norm():
    norm, x = shaken(make_norm("scalenorm", D)), torch.randn(2, 3, D)
    expected = x * norm.weight / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-5)
    torch.testing.assert_close(norm(x), expected, rtol=1e-12, atol=1e-12)


def test_dropouts_act_where_they_should():
    layer = MegaLayer(D, DampedEMA(D, 2), 4, 10, dropout=0.5, hidden_dropout=0.5, feature_dropout=True).train()
    x = torch.randn(2, 50, D)
    dropped = layer.dropout(torch.ones_like(x))
    assert ((dropped == 0).all(1) | (dropped == 2).all(1)).all()  # a channel lives or dies as a whole
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


def slow_stack(m, x):
    """(B, C, N), one axis."""
    out, h = x, x
    for i, (dilation, weight, bias) in enumerate(m.layers):
        left = (m.kernel_size - 1) * dilation
        left = left if m.causal else left // 2
        rows = []
        for t in range(x.shape[-1]):
            row = bias
            for tap in range(m.kernel_size):
                s = t + tap * dilation - left
                if 0 <= s < x.shape[-1]:
                    own = h[..., s].unflatten(1, (m.groups, -1))
                    kernel = weight[..., tap].unflatten(0, (m.groups, -1))
                    row = row + torch.einsum("bgi,goi->bgo", own, kernel).flatten(1)
            rows.append(row)
        h = silu(torch.stack(rows, -1))
        if (i + 1) % m.layers_per_block == 0:
            out = h = out + h
    return out


@pytest.mark.parametrize("groups", [None, 1, 2])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("kernel", "dilations", "each"), [(3, (1, 3, 9), 1), (5, (1, 40), 2), (1, (1, 2), 1)])
def test_dilated_stack(groups, causal, kernel, dilations, each):
    stack = shaken(DilatedStack(4, kernel, dilations, each, groups, causal))
    x = torch.randn(2, 4, 23, requires_grad=True)
    same(stack(x), slow_stack(stack, x), [x, *stack.parameters()])


@pytest.mark.parametrize("dims", [2, 3])
def test_one_pixel_axes_change_nothing(dims):
    stack, line = DilatedStack(4, 3, (1, 2), causal=False, dims=dims), DilatedStack(4, 3, (1, 2), causal=False)
    with torch.no_grad():
        for one, two in zip(line.weights, stack.weights):
            one.copy_(two.reshape(4, 1, *[3] * dims)[(..., *[1] * (dims - 1), slice(None))])
    x = torch.randn(2, 4, *[1] * (dims - 1), 11)
    torch.testing.assert_close(stack(x).reshape(2, 4, 11), line(x.reshape(2, 4, 11)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("direction", ["symmetric", "both"])
def test_two_sided_mixers(direction):
    mixer = shaken(TCNMixer(4, 3, 2, 3, direction=direction))
    x = torch.randn(2, 20, 4, requires_grad=True)
    slow = slow_stack(mixer.stack, x.mT)
    if direction == "both":
        slow = slow + slow_stack(mixer.behind, x.mT.flip(-1)).flip(-1)
    same(mixer(x), silu(slow.mT + mixer.omega * x), [x, *mixer.parameters()])
    mask = torch.arange(20) < torch.tensor([[20], [13]])
    torch.testing.assert_close(mixer(x, mask)[1, :13], mixer(x[1:, :13])[0], rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="cannot stream"):
        mixer.extend(x)


@pytest.mark.parametrize(("kernel", "factor", "depth", "each"), [(3, 2, 3, 1), (4, 3, 2, 2), (17, 17, 2, 1)])
def test_the_field_is_what_the_formula_says(kernel, factor, depth, each):
    mixer = shaken(TCNMixer(2, kernel, factor, depth, each))
    field = mixer.receptive_field
    assert field == receptive_field(kernel, [factor**i for i in range(depth)], each)
    assert field == 1 + each * (kernel - 1) * (factor**depth - 1) // (factor - 1)
    x = torch.randn(1, field + 5, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(mixer(x)[0, -1].sum(), x)
    reached = gradient[0].abs().amax(-1) > 0
    assert reached[5:].all()
    assert not reached[:5].any()


def test_published_field():
    assert TCNMixer(1).receptive_field == 4913


@pytest.mark.parametrize("context", [1, 2, 17, 100, 4913, 5000, 131072])
@pytest.mark.parametrize(("kernel", "each"), [(17, 1), (3, 1), (3, 2)])
def test_chosen_dilations_cover_the_context_without_holes(context, kernel, each):
    dilations = choose_dilations(context, kernel, layers_per_block=each)
    assert receptive_field(kernel, dilations, each) >= context
    field = 1
    for dilation in dilations:
        assert dilation <= field
        field += each * (kernel - 1) * dilation


def test_a_context_out_of_reach_is_refused():
    assert choose_dilations(4913, 17, depth=3) == (1, 17, 289)
    with pytest.raises(ValueError, match="cover at most 289 positions"):
        choose_dilations(300, 17, depth=2)
    with pytest.raises(ValueError, match="kernel_size=1"):
        choose_dilations(2, 1)


def test_classic_network():
    net = shaken(TemporalConvNet(3, [4, 4, 5], kernel_size=3)).eval()
    x = torch.randn(2, 3, 20, requires_grad=True)
    h = x
    for i, block in enumerate(net):
        out = h
        for conv in (block.conv1, block.conv2):
            norm = torch.sqrt((conv.weight_v**2).sum((1, 2), keepdim=True))
            weight = conv.weight_g * conv.weight_v / norm
            padded = F.pad(out, (2 * 2**i, 0))
            taps = [
                torch.einsum("bcn,oc->bon", padded[..., k * 2**i : k * 2**i + 20], weight[..., k]) for k in range(3)
            ]
            out = torch.relu(sum(taps) + conv.bias[:, None])
        h = torch.relu(out + block.downsample(h))
    same(net(x), h, [x, *net.parameters()])


@pytest.mark.parametrize(
    "make",
    [
        lambda: DampedEMA(4, 0),
        lambda: DampedEMA(4, 2, truncation=0),
        lambda: DampedEMA(4, 2, truncation=4, form="scan"),
        lambda: SimpleBias(0),
        lambda: RotaryBias(5),
        lambda: ChunkAttention(4, kind="linear"),
        lambda: ChunkAttention(4, chunk=0),
        lambda: ChunkAttention(4, bias="simple"),
        lambda: ChunkAttention(4, 9, bias="simple", max_length=8),
        lambda: MegaLayer(4, DampedEMA(4), norm="groupnorm"),
        lambda: MegaLayer(4, DampedEMA(4), attention_dim=0),
        lambda: MegaLayer(4, DampedEMA(4), dropout=1.0),
        lambda: NormedFeedForward(4, 0),
        lambda: DilatedStack(4, 3, (1,), groups=3),
        lambda: DilatedStack(4, 3, ()),
        lambda: DilatedStack(4, 4, (1,), causal=False),
        lambda: DilatedStack(4, 3, (1,), causal=True, dims=2),
        lambda: TCNMixer(4, direction="forward"),
        lambda: TCNMixer(4, dilation_factor=0),
        lambda: TemporalConvNet(4, []),
        lambda: choose_dilations(0, 3),
    ],
)
def test_bad_arguments_are_refused(make):
    with pytest.raises(ValueError, match=r"must|needs|longer"):
        make()
