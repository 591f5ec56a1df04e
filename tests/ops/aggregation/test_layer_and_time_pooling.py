"""Pooling over layers and over time against slow forms, and under padding."""

import jaxtyping
import pytest
import torch

from nearfar.ops.aggregation.layer_attention import LayerAttentionPool, LayerGate
from nearfar.ops.aggregation.statistics import AttentiveStatisticsPool, masked_moments


@pytest.fixture
def without_shape_checks():
    """torch.compile cannot trace the run-time checks of shapes, which production does not have."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def randomize(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    module.double().eval()
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            value = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.copy_(1 + 0.3 * value.tanh() if "var" in name else 0.4 * value)
    return module


def norm(x, bn):
    shape = (1, -1, *[1] * (x.dim() - 2))
    x = (x - bn.running_mean.view(shape)) / (bn.running_var.view(shape) + bn.eps).sqrt()
    return x * bn.weight.view(shape) + bn.bias.view(shape)


def slow_layer_pool(x, pool):
    """Frame by frame and head by head, as the formula says."""
    gate = pool.gate
    x = torch.einsum("oc,bclt->bolt", pool.proj_in.weight[:, :, 0, 0], norm(x, pool.norm_in))
    width = x.shape[1] // gate.num_heads
    out = torch.empty(x.shape[0], x.shape[1], x.shape[3], dtype=x.dtype)
    for b in range(x.shape[0]):
        for t in range(x.shape[3]):
            for h in range(gate.num_heads):
                part = x[b, h * width : (h + 1) * width, :, t].T  # (L, k)

                def f(z, h=h):
                    return (z @ gate.w1[h] + gate.b1[h, 0]).clamp(min=0) @ gate.w2[h] + gate.b2[h, 0]

                weight = torch.sigmoid(f(part.mean(1)) + f(part.max(1).values))
                out[b, h * width : (h + 1) * width, t] = (part * weight[:, None]).max(0).values
    return norm(torch.einsum("oc,bct->bot", pool.proj_out.weight[:, :, 0], out), pool.norm_out)


def slow_statistics(x, pool, lengths, correction):
    """Item by item without any padding, the context repeated along time."""
    rows = []
    for item, n in zip(x, lengths):
        item = item[None, :, :n]
        mean = item.mean(2, keepdim=True)
        std = (((item - mean) ** 2).sum(2, keepdim=True) / (n - correction)).sqrt()
        full = torch.cat([item, mean.expand_as(item), std.expand_as(item)], 1)
        hidden = torch.einsum("oc,bct->bot", pool.reduce.weight[:, :, 0], full) + pool.reduce.bias[None, :, None]
        hidden = norm(hidden.clamp(min=0), pool.attention_norm)
        logits = torch.einsum("oc,bct->bot", pool.expand.weight[:, :, 0], hidden) + pool.expand.bias[None, :, None]
        weight = logits.exp() / logits.exp().sum(2, keepdim=True)
        first = (weight * item).sum(2)
        second = ((weight * item**2).sum(2) - first**2).clamp(min=1e-4).sqrt()
        stats = norm(torch.cat([first, second], 1), pool.norm)
        rows.append(norm(stats @ pool.linear.weight.T + pool.linear.bias, pool.out_norm))
    return torch.cat(rows)


def same_gradients(fast, slow, inputs):
    probe = torch.randn_like(fast)
    for ours, theirs in zip(
        torch.autograd.grad((fast * probe).sum(), inputs), torch.autograd.grad((slow * probe).sum(), inputs)
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def test_layer_pool_equals_the_slow_form():
    pool = randomize(LayerAttentionPool(6, 8, 5, num_heads=4))
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64, requires_grad=True)
    fast, slow = pool(x), slow_layer_pool(x, pool)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-9)
    same_gradients(fast, slow, [x, *pool.parameters()])


def test_layer_pool_treats_frames_alone():
    pool = randomize(LayerAttentionPool(6, 8, 5, num_heads=2))
    x = torch.randn(1, 6, 5, 9, dtype=torch.float64)
    order = torch.randperm(9)
    torch.testing.assert_close(pool(x)[..., order], pool(x[..., order]), rtol=0, atol=1e-12)


def test_folded_norm_equals_training_form_with_the_same_statistics():
    pool = randomize(LayerAttentionPool(6, 8, 5, num_heads=2))
    x = torch.randn(2, 6, 5, 9, dtype=torch.float64)
    folded = pool(x)
    pool.training = True  # the unfolded branch, with every child still in evaluation mode
    torch.testing.assert_close(pool(x), folded, rtol=0, atol=1e-12)


def test_gates_lie_between_0_and_1_and_say_which_layers_count():
    gate = LayerGate(5, 2)
    gates = gate.gates(torch.randn(2, 8, 5, 3))
    assert gates.shape == (2, 2, 5, 3)
    assert gates.min() > 0
    assert gates.max() < 1


@pytest.mark.parametrize("correction", [0, 1])
def test_statistics_equal_the_slow_form_with_padding(correction):
    pool = randomize(AttentiveStatisticsPool(6, 5, 4))
    x = torch.randn(3, 6, 11, dtype=torch.float64, requires_grad=True)
    lengths = [11, 7, 2]
    mask = torch.arange(11) < torch.tensor(lengths)[:, None]
    fast, slow = pool(x, mask, correction=correction), slow_statistics(x, pool, lengths, correction)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-9)
    same_gradients(fast, slow, [x, *pool.parameters()])


def test_deviation_follows_the_published_paths():
    pool = randomize(AttentiveStatisticsPool(6, 5))
    x = torch.randn(2, 6, 9, dtype=torch.float64)
    whole = torch.ones(2, 9, dtype=torch.bool)
    torch.testing.assert_close(pool(x), pool(x, whole, correction=1), rtol=0, atol=1e-12)
    torch.testing.assert_close(pool(x, whole), pool(x, correction=0), rtol=0, atol=1e-12)
    assert not torch.allclose(pool(x), pool(x, whole), rtol=0, atol=1e-7)


def test_one_frame_gives_a_finite_embedding_and_gradient():
    pool = AttentiveStatisticsPool(6, 5).eval()
    x = torch.randn(1, 6, 1, requires_grad=True)
    pool(x).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_dropped_frames_leave_the_softmax():
    torch.manual_seed(0)
    pool = AttentiveStatisticsPool(4, 3, dropout=0.9, drop_frames=True)
    for norm_layer in (pool.attention_norm, pool.norm, pool.out_norm):
        norm_layer.eval()
    x = torch.randn(64, 4, 5, requires_grad=True)
    pool(x, torch.arange(5).expand(64, 5) < 4, correction=0).square().sum().backward()
    assert torch.isfinite(x.grad).all()
    assert (x.grad[:, :, 4] == 0).all()  # padding never counts, however many frames are dropped


def test_moments():
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    mean, variance = masked_moments(x, None, 1)
    torch.testing.assert_close(variance[..., 0], x.var(2))
    mean, variance = masked_moments(x, torch.arange(8).expand(2, 8) < 5, 0)
    torch.testing.assert_close(mean[..., 0], x[..., :5].mean(2))
    torch.testing.assert_close(variance[..., 0], x[..., :5].var(2, correction=0))


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="multiple"):
        LayerAttentionPool(6, 9, 5, num_heads=4)
    with pytest.raises(ValueError, match="num_layers"):
        LayerGate(1)
    with pytest.raises(ValueError, match="expected"):
        LayerGate(5, 2)(torch.randn(1, 4, 6, 3))
    with pytest.raises(ValueError, match="dropout"):
        AttentiveStatisticsPool(4, dropout=1.0)


def test_compiles_without_graph_breaks(without_shape_checks):
    layer, time = LayerAttentionPool(6, 8, 5, 2).eval(), AttentiveStatisticsPool(8, 4).eval()
    x = torch.randn(2, 6, 5, 9)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))
    mask = torch.arange(9).expand(2, 9) < 6
    compiled = torch.compile(time, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(layer(x), mask), time(layer(x), mask))
