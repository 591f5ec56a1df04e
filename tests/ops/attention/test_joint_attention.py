"""Joint attention, rotary positions and MossFormer's block against the obvious slow forms."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nearfar.ops.attention.joint import GatedAttentionBlock, JointAttention
from nearfar.ops.attention.rotary import rotary_table, rotate

LENGTHS = [1, 7, 8, 9, 21, 32]


def naive_rotation(x, dim=4, theta=10000.0):
    out = x.clone()
    for p in range(x.shape[1]):
        for i in range(dim // 2):
            angle = torch.tensor(p * theta ** (-2 * i / dim), dtype=x.dtype)
            a, b = x[:, p, 2 * i], x[:, p, 2 * i + 1]
            out[:, p, 2 * i] = a * angle.cos() - b * angle.sin()
            out[:, p, 2 * i + 1] = b * angle.cos() + a * angle.sin()
    return out


def naive_joint(quad_q, lin_q, quad_k, lin_k, values, size, causal=False, prefix_mean=False):
    quad_q, lin_q, quad_k, lin_k = map(naive_rotation, (quad_q, lin_q, quad_k, lin_k))
    frames = values.shape[1]
    rows = []
    for t in range(frames):
        row = torch.zeros_like(values[:, 0])
        for s in range(frames):
            same = s // size == t // size
            if same and (s <= t or not causal):
                weight = ((quad_q[:, t] * quad_k[:, s]).sum(-1) / size).relu().square()
                row = row + weight[:, None] * values[:, s]
            near = (lin_q[:, t] * lin_k[:, s]).sum(-1)[:, None] * values[:, s]
            if not causal:
                row = row + near / frames
            elif s // size < t // size:
                row = row + near / size / (t // size if prefix_mean else 1)
        rows.append(row)
    return torch.stack(rows, dim=1)


def inputs(frames, batch=2, width=6, channels=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    make = lambda c: torch.randn(batch, frames, c, generator=generator, dtype=torch.float64, requires_grad=True)  # noqa: E731
    return [make(width), make(width), make(width), make(width), make(channels)]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("frames", LENGTHS)
@pytest.mark.parametrize(("causal", "prefix_mean"), [(False, False), (True, False), (True, True)])
def test_joint_attention_equals_the_sums_written_out(frames, causal, prefix_mean):
    op = JointAttention(8, rotary_dim=4, causal=causal, prefix_mean=prefix_mean).double()
    xs = inputs(frames)
    ours, slow = op(*xs), naive_joint(*xs, 8, causal, prefix_mean)
    close(ours, slow)
    weight = torch.randn_like(slow)
    for a, b in zip(
        torch.autograd.grad((ours * weight).sum(), xs, materialize_grads=True),
        torch.autograd.grad((slow * weight).sum(), xs, materialize_grads=True),
    ):
        close(a, b)


def test_rotation_depends_on_distance_alone_and_keeps_the_other_channels():
    cos, sin = rotary_table(50, 4, dtype=torch.float64)
    q, k = torch.randn(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    q, k = (rotate(x.expand(50, 6), cos, sin) for x in (q, k))
    close(q[30] @ k[21], q[9] @ k[0])
    close(q[:, 4:], q[:1, 4:].expand(50, 2))


def test_rotary_table_continues_and_stays_exact_far_into_a_stream():
    whole = rotary_table(40, 8)
    for part, rest in zip(whole, rotary_table(15, 8, offset=25)):
        torch.testing.assert_close(part[25:], rest, rtol=0, atol=0)
    far = rotary_table(1, 8, offset=36_000_000)[0]
    assert far[0, 0].item() == pytest.approx(torch.tensor(36_000_000.0, dtype=torch.float64).cos().item(), abs=1e-6)


@pytest.mark.parametrize("frames_at_once", [8, 16, 17])
def test_two_sweeps_give_the_same_numbers(frames_at_once):
    op = JointAttention(8, rotary_dim=4).double()
    xs = inputs(45)
    mask = torch.arange(45) < torch.tensor([45, 30])[:, None]
    close(op(*xs, frames_at_once=frames_at_once), op(*xs))
    close(op(*xs, mask, frames_at_once=frames_at_once), op(*xs, mask))


def test_padding_does_not_reach_the_real_frames():
    op = JointAttention(8, rotary_dim=4).double()
    xs = inputs(21)
    mask = torch.arange(21) < torch.tensor([21, 10])[:, None]
    alone = op(*(x[1:, :10] for x in xs))
    close(op(*xs, mask)[1:, :10], alone)


@pytest.mark.parametrize("chunk", [1, 3, 8, 11])
@pytest.mark.parametrize("prefix_mean", [False, True])
def test_a_stream_in_any_chunks_equals_the_whole(chunk, prefix_mean):
    op = JointAttention(8, rotary_dim=4, causal=True, prefix_mean=prefix_mean).double()
    xs, state = inputs(30), {}
    pieces = [op(*(x[:, a : a + chunk] for x in xs), state=state) for a in range(0, 30, chunk)]
    close(torch.cat(pieces, dim=1), op(*xs))


def test_prefix_mean_stays_level_where_the_released_sum_grows():
    ones = [torch.ones(1, 64, 6)] * 4 + [torch.ones(1, 64, 3)]
    still = JointAttention(8, rotary_dim=2, theta=1e30, causal=True, prefix_mean=True)
    growing = JointAttention(8, rotary_dim=2, theta=1e30, causal=True)
    assert still(*ones)[0, 60:].abs().max() < 1.5 * still(*ones)[0, 8:24].abs().max()
    assert growing(*ones)[0, 60:].abs().max() > 2 * growing(*ones)[0, 8:24].abs().max()


class LargestTensor(TorchDispatchMode):
    """Numbers in the largest tensor that is made, outputs of the given shape apart."""

    def __init__(self, output):
        super().__init__()
        self.output, self.numel = output, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, torch.Tensor) and value._base is None and tuple(value.shape) != self.output:
                self.numel = max(self.numel, value.numel())
        return out


def largest(module, frames, dim=16, **kwargs):
    with torch.no_grad(), LargestTensor((1, frames, dim)) as mode:
        module(torch.randn(1, frames, dim), **kwargs)
    return mode.numel


def test_memory_of_the_two_sweeps_does_not_grow_with_the_length():
    block = GatedAttentionBlock(16, 32, 16).eval()
    short, long = (largest(block, n, frames_at_once=64) for n in (256, 4096))
    assert long == short
    assert largest(block, 4096) > 8 * long


@pytest.mark.parametrize("size", [4, 8, 32])
@pytest.mark.parametrize("frames", [9, 40, 75])
def test_block_in_two_sweeps_equals_the_block(size, frames):
    torch.manual_seed(1)
    block = GatedAttentionBlock(6, size, 4, rotary_dim=4).double().eval()
    with torch.no_grad():
        block.gamma.mul_(50)
    x = torch.randn(2, frames, 6, dtype=torch.float64)
    mask = torch.arange(frames) < torch.tensor([frames, frames - 5])[:, None]
    close(block(x, frames_at_once=size), block(x))
    swept = block(x, mask, frames_at_once=size)
    close(swept[1, : frames - 5], block(x[1:, : frames - 5])[0])


def naive_block(block, x):
    """The block's formula with full-size tensors and a plain convolution."""

    def projection(module, y):
        h = torch.nn.functional.silu(module.linear(module.norm(y)))
        taps = module.depthwise.unsqueeze(1)
        return h + torch.nn.functional.conv1d(h.mT, taps, padding=8, groups=len(taps)).mT

    half = x.shape[-1] // 2
    shifted = x.clone()
    shifted[:, 1:, :half], shifted[:, :1, :half] = x[:, :-1, :half], 0
    hidden, z = projection(block.to_hidden, shifted), projection(block.to_qk, shifted)
    v, u = hidden.chunk(2, -1)
    heads = [z * block.gamma[h] + block.beta[h] for h in range(4)]
    a_v, a_u = (naive_joint(*heads, values, block.attention.group_size) for values in (v, u))
    return x + projection(block.to_out, (a_u * v) * torch.sigmoid(a_v * u))


def test_block_equals_its_formula_and_both_branches_count():
    torch.manual_seed(2)
    block = GatedAttentionBlock(6, 8, 4, rotary_dim=4).double().eval()
    with torch.no_grad():
        block.gamma.mul_(100)
    x = torch.randn(1, 20, 6, dtype=torch.float64, requires_grad=True)
    ours, slow = block(x), naive_block(block, x)
    close(ours, slow)
    parameters = [x, *block.parameters()]
    for a, b in zip(
        torch.autograd.grad(ours.square().sum(), parameters), torch.autograd.grad(slow.square().sum(), parameters)
    ):
        close(a, b)


@pytest.mark.parametrize("chunk", [1, 5, 13])
def test_causal_block_streams_and_sees_no_later_frame(chunk):
    torch.manual_seed(3)
    block = GatedAttentionBlock(6, 8, 4, rotary_dim=4, causal=True).double().eval()
    x, state = torch.randn(2, 30, 6, dtype=torch.float64), {}
    whole = block(x)
    close(torch.cat([block(x[:, a : a + chunk], state=state) for a in range(0, 30, chunk)], dim=1), whole)
    changed = x.clone()
    changed[:, 20:] += 1
    close(block(changed)[:, :20], whole[:, :20])
    assert (block(changed)[:, 20] - whole[:, 20]).abs().max() > 1e-6


def test_attention_only_causality_looks_ahead_through_the_convolutions():
    block = GatedAttentionBlock(6, 8, 4, rotary_dim=4, causal="attention").double().eval()
    x = torch.randn(1, 30, 6, dtype=torch.float64)
    changed = x.clone()
    changed[:, 29:] += 1
    moved = (block(changed) - block(x)).abs().amax((0, 2)) > 1e-12
    assert not moved[:13].any()
    assert moved[14]  # 15 frames early: two convolutions of 8 frames each to the right, less the shift


def test_half_precision_keeps_small_attention_weights():
    q, _, k, _, values = (x.detach().float() for x in inputs(256))
    q, k, values = 0.3 * q, 0.3 * k, 100 * values
    op = JointAttention(256)
    exact = op.local(q, k, values)
    half = op.local(q.half(), k.half(), values.half())
    assert ((q @ k.mT).relu() / 256).square().max() < 1e-4  # where float16 has few bits left
    assert (half.float() - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: JointAttention(0), "group_size is 0"),
        (lambda: JointAttention(rotary_dim=3), "rotary_dim is 3"),
        (lambda: JointAttention(prefix_mean=True), "causal=True"),
        (lambda: GatedAttentionBlock(3, expansion_factor=1.0), "expansion_factor"),
        (lambda: GatedAttentionBlock(4, causal="yes"), "'yes'"),
        (lambda: GatedAttentionBlock(4, kernel_size=4), "kernel_size is 4"),
        (lambda: rotary_table(3, 5), "dim is 5"),
    ],
)
def test_bad_arguments_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_stream_through_a_non_causal_operator_is_refused():
    with pytest.raises(ValueError, match="causal=True"):
        JointAttention(8)(*inputs(8), state={})
