"""MACMD's operators against their formulas."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nearfar.ops.aggregation.attention_pooling import AttentionPooledModulation
from nearfar.ops.convolution.multi_dilated import ContextGate, EfficientAttention, MultiDilatedConv
from nearfar.ops.tokens.channel_mixer import ChannelMix, CrossScaleMix, quad_shift

SIZES = {1: (15,), 2: (9, 7), 3: (5, 6, 4)}


def randomize(module: nn.Module) -> nn.Module:
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(layer.running_mean, std=0.1)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
    return module.double().eval()


def same(ours: Tensor, slow: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(ours, slow, rtol=0, atol=1e-9)
    direction = torch.randn_like(ours)
    a, b = (torch.autograd.grad((y * direction).sum(), inputs) for y in (ours, slow))
    for left, right in zip(a, b):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_multi_dilated_convolution(dims: int) -> None:
    module = randomize(MultiDilatedConv(8, dims=dims))
    x = torch.randn(2, 8, *SIZES[dims], dtype=torch.float64, requires_grad=True)
    results = [conv(x).chunk(4, 1) for conv in module.convs]
    slow = torch.cat([sum(results[a][(a + m) % 4] for a in range(4)) for m in range(4)], 1)
    same(module(x), slow, [x])


def test_causal_form_does_not_look_ahead() -> None:
    module = MultiDilatedConv(4, dims=1, causal=True)
    x = torch.randn(1, 4, 30)
    changed = x.clone()
    changed[..., 15:] += 1
    assert module(x).shape == x.shape
    torch.testing.assert_close(module(x)[..., :15], module(changed)[..., :15])


def test_every_output_sees_every_input() -> None:
    module = MultiDilatedConv(8, dims=1)
    x = torch.randn(1, 8, 31, requires_grad=True)
    for channel in range(8):
        (grad,) = torch.autograd.grad(module(x)[0, channel, 15], x)
        assert (grad.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_gates(dims: int) -> None:
    x = torch.randn(2, 32, *SIZES[dims], dtype=torch.float64, requires_grad=True)
    gate = randomize(ContextGate(32, dims=dims))
    r = gate.context_norm(gate.context(x)).clamp(min=0)
    same(gate(x), r * torch.sigmoid(gate.gate_norm(gate.gate(r))), [x])
    block = randomize(EfficientAttention(32, dims=dims))
    y = x
    for conv, norm in zip(block.convs, block.norms):
        y = norm(conv(y)).clamp(min=0)
    mean = y.flatten(2).mean(-1)
    y = y * torch.sigmoid(block.channel.expand(block.channel.reduce(mean).relu())).view(2, 32, *[1] * dims)
    stats = torch.stack([y.mean(1), y.max(1).values], 1)
    same(block(x), y * torch.sigmoid(block.spatial.conv(stats)), [x])


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_attention_pooled_modulation(dims: int) -> None:
    module = randomize(AttentionPooledModulation((8, 6, 4), 8, dims=dims))
    maps = [
        torch.randn(2, c, *(n,) * dims, dtype=torch.float64, requires_grad=True) for c, n in ((8, 8), (6, 4), (4, 2))
    ]
    xs = [layer(x) for layer, x in zip(module.project, maps)]
    for i, layer in enumerate(module.enlarge, 1):
        up = F.interpolate(xs[i], scale_factor=float(2**i), mode="nearest")
        xs[i] = layer.pointwise(layer.norm(layer.depthwise(up)).relu())
    scores = [module.score(x).exp() for x in xs]
    pool = sum(s / sum(scores) * x for s, x in zip(scores, xs))
    gated = [module.modulate(torch.sigmoid(x) * pool * torch.sigmoid(pool) * x) * x for x in xs]
    same(module(maps), sum(gated) / 3, maps)
    module.train()(maps)  # in training each scale has batch statistics of its own
    stepped = module.modulate.norm.num_batches_tracked
    assert stepped == 3


def test_quad_shift() -> None:
    x = torch.arange(1, 13.0).view(1, 3, 4, 1).expand(1, 3, 4, 9)
    y = quad_shift(x)[0]
    grid = x[0, ..., 0]
    torch.testing.assert_close(y[:, 1:, 0], grid[:, :-1])
    torch.testing.assert_close(y[:, :-1, 2], grid[:, 1:])
    torch.testing.assert_close(y[1:, :, 4], grid[:-1])
    torch.testing.assert_close(y[:-1, :, 6], grid[1:])
    torch.testing.assert_close(y[..., 8], grid)
    assert (y[:, 0, 0] == 0).all()
    assert (y[:, -1, 2] == 0).all()
    assert (y[0, :, 4] == 0).all()
    assert (y[-1, :, 6] == 0).all()


def test_cross_scale_mix_in_the_published_order() -> None:
    module = CrossScaleMix((12, 8, 4), 4).double().eval()
    maps = [torch.randn(2, c, n, n + 1, dtype=torch.float64, requires_grad=True) for c, n in ((12, 3), (8, 6), (4, 12))]
    size = maps[-1].shape[2:]
    resize = lambda v, s: F.interpolate(v, s, mode="bilinear", align_corners=False)  # noqa: E731
    tokens = torch.cat([layer(resize(x, size)) for layer, x in zip(module.project, maps)], 1).movedim(1, -1)
    mix = module.mix
    shifted = quad_shift(tokens)
    k = (tokens * mix.mix_k + shifted * (1 - mix.mix_k)) @ mix.key.weight.mT
    r = (tokens * mix.mix_r + shifted * (1 - mix.mix_r)) @ mix.receptance.weight.mT
    mixed = torch.sigmoid(r) * (mix.key_norm(k.relu() ** 2) @ mix.value.weight.mT)
    parts = (tokens + module.norm(mixed)).movedim(-1, 1).chunk(3, 1)
    slow = [resize(layer(p), x.shape[2:]) for layer, p, x in zip(module.widen, parts, maps)]
    join = lambda values: torch.cat([v.flatten() for v in values])  # noqa: E731
    same(join(module(maps)), join(slow), maps)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="multiple of the number of dilations"):
        MultiDilatedConv(6)
    with pytest.raises(ValueError, match="odd"):
        MultiDilatedConv(8, 2)
    with pytest.raises(ValueError, match="share"):
        ChannelMix(8, share=0.5)
    with pytest.raises(ValueError, match="reduction"):
        AttentionPooledModulation((4,), 4)
