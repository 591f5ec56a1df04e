"""What every causal sequence mixer promises: streaming == parallel, no look into the future, padding by lengths."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nearfar.ops.attention.causal import CausalAttention
from nearfar.ops.attention.gated import MegaLayer, MemoryAttention
from nearfar.ops.common import streaming
from nearfar.ops.common.streaming import shift_in, state_numbers
from nearfar.ops.convolution.base_conv import BaseConv
from nearfar.ops.convolution.causal import ExplicitLongConv, ImplicitLongConv, ShortConv
from nearfar.ops.convolution.hyena import Hyena
from nearfar.ops.convolution.tcn import TCNMixer
from nearfar.ops.recurrence.based import Based
from nearfar.ops.recurrence.delta import DeltaNet, GatedDeltaNet, GatedLinearAttention, KimiDeltaAttention
from nearfar.ops.recurrence.ema import DampedEMA
from nearfar.ops.recurrence.h3 import H3
from nearfar.ops.recurrence.mamba import Mamba
from nearfar.ops.recurrence.mamba2 import Mamba2
from nearfar.ops.recurrence.retnet import Retention
from nearfar.ops.recurrence.rwkv4 import RWKV4ChannelMix, RWKV4TimeMix
from nearfar.ops.recurrence.rwkv7 import RWKV7TimeMix
from nearfar.ops.tokens.selective_lookup import SelectiveLookup

DIM, LENGTH = 12, 83
MIXERS = {
    "attention": lambda: CausalAttention(DIM, num_heads=3),
    "window": lambda: CausalAttention(DIM, num_heads=2, window=5),
    "window-longer-than-text": lambda: CausalAttention(DIM, window=200),
    "short-conv": lambda: ShortConv(DIM, 4),
    "short-conv-1-tap": lambda: ShortConv(DIM, 1),
    "short-conv-12-taps": lambda: ShortConv(DIM, 12),
    "implicit-long-conv": lambda: ImplicitLongConv(DIM, 120, features=5),
    "explicit-long-conv": lambda: ExplicitLongConv(DIM, 120),
    "base-conv": lambda: BaseConv(DIM, 3),
    "base-conv-long": lambda: BaseConv(DIM, -1, max_length=120, activation=True),
    "hyena": lambda: Hyena(DIM, max_length=120, order=8, inner=1),
    "based": lambda: Based(DIM, num_heads=2, feature_dim=4, chunk=16),
    "based-one-chunk": lambda: Based(DIM, feature_dim=3),
    "retention": lambda: Retention(DIM, num_heads=3, chunk=16),
    "rwkv4-time-mix": lambda: RWKV4TimeMix(DIM),
    "rwkv4-channel-mix": lambda: RWKV4ChannelMix(DIM),
    "h3": lambda: H3(DIM, d_state=10, head_dim=3),
    "mamba": lambda: Mamba(DIM, d_state=5),
    "selective-lookup": lambda: SelectiveLookup(DIM, num_heads=2, threshold=0.5),
    "mamba2": lambda: Mamba2(DIM, d_state=5, head_dim=6, groups=2, chunk=16),
    "deltanet": lambda: DeltaNet(DIM, 2, chunk=16),
    "gated-deltanet": lambda: GatedDeltaNet(DIM, 2, chunk=16),
    "kda": lambda: KimiDeltaAttention(DIM, 2, chunk=16),
    "gla": lambda: GatedLinearAttention(DIM, 2, conv_size=3, chunk=16),
    "rwkv7-time-mix": lambda: RWKV7TimeMix(DIM, 2, chunk=16),
    "ema": lambda: DampedEMA(DIM, 4),
    "ema-scan": lambda: DampedEMA(DIM, 4, form="scan"),
    "ema-truncated": lambda: DampedEMA(DIM, 4, truncation=9),
    "tcn": lambda: TCNMixer(DIM, 4, 3, 2, layers_per_block=2),
    "tcn-dense": lambda: TCNMixer(DIM, 3, 5, 2, groups=1),
    "mega": lambda: MegaLayer(DIM, DampedEMA(DIM, 4), 6, 14, chunk=8),
    "mega-chunk-of-30": lambda: MegaLayer(DIM, DampedEMA(DIM, 4), 6, 14, chunk=30, attention="relu2", bias="simple"),
    "mega-whole": lambda: MegaLayer(DIM, DampedEMA(DIM, 4), 6, 14, attention="laplace", prenorm=False),
    "tcnca": lambda: MegaLayer(DIM, TCNMixer(DIM, 3, 3, 2), 6, 14, chunk=16, norm="scalenorm"),
    "tcnca-simple": lambda: MemoryAttention(DIM, TCNMixer(DIM, 3, 3, 2), 6, chunk=16, norm="rmsnorm"),
}
CONSTANT_STATE = {
    "window", "short-conv", "base-conv", "based", "retention", "rwkv4-time-mix", "h3", "mamba", "mamba2", "deltanet",
    "gated-deltanet", "kda", "gla", "rwkv7-time-mix", "ema", "ema-scan", "ema-truncated", "tcn", "tcn-dense",
}  # fmt: skip

CONSTANT_COST = set(MIXERS) - {
    "attention", "implicit-long-conv", "explicit-long-conv", "base-conv-long", "hyena", "selective-lookup",
    "mega-whole",
}  # fmt: skip


@pytest.fixture(params=MIXERS, name="name")
def _name(request):
    return request.param


@pytest.fixture(name="mixer")
def _mixer(name):
    torch.manual_seed(0)
    mixer = MIXERS[name]().double().eval()
    with torch.no_grad():  # so that no initial zero or constant hides a term
        for parameter in mixer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return mixer


def text(batch=3, length=LENGTH, seed=1):
    return torch.randn(batch, length, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("pieces", [[1] * LENGTH, [33, 1, 2, 47]], ids=["singly", "mixed"])
def test_streaming_equals_parallel(mixer, pieces):
    x, state, out = text(), None, []
    for piece in x.split(pieces, 1):
        y, state = mixer.extend(piece, state)
        out.append(y)
    torch.testing.assert_close(torch.cat(out, 1), mixer(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "name",
    ["window", "base-conv", "based", "retention", "rwkv4-time-mix", "rwkv4-channel-mix", "mamba", "mamba2", "deltanet",
     "gated-deltanet", "kda", "gla", "rwkv7-time-mix", "hyena"],
)  # fmt: skip
def test_without_gradients_a_long_text_goes_in_pieces_with_the_same_numbers(name, monkeypatch):
    torch.manual_seed(0)
    mixer = (Hyena(DIM, 700, order=8, inner=1) if name == "hyena" else MIXERS[name]()).double().eval()
    x, sizes = text(length=700), []
    whole = mixer(x)
    monkeypatch.setattr(streaming, "PIECE", 1)
    inner = getattr(mixer, {"hyena": "gates", "window": "attend"}.get(name, "extend"))
    monkeypatch.setattr(mixer, inner.__name__, lambda x, *state: sizes.append(x.shape[1]) or inner(x, *state))
    with torch.no_grad():
        torch.testing.assert_close(mixer(x), whole, rtol=1e-9, atol=1e-9)
    assert sizes == ([256, 261, 193] if name == "window" else [256, 256, 188])  # with the five that a window sees


def test_a_window_as_long_as_a_piece_is_not_computed_twice(monkeypatch):
    mixer, x, sizes = CausalAttention(DIM, window=33).eval(), torch.randn(1, 700, DIM), []
    monkeypatch.setattr(streaming, "PIECE", 1)
    attend = mixer.attend
    monkeypatch.setattr(mixer, "attend", lambda x: sizes.append(x.shape[1]) or attend(x))
    with torch.no_grad():
        mixer(x)
    assert sizes == [700]


def test_streaming_has_the_parallel_gradient(mixer):
    x = text()
    parameters = [p for p in mixer.parameters() if p.requires_grad]
    weight = torch.randn_like(x)
    whole = torch.autograd.grad((mixer(x) * weight).sum(), parameters)
    state, total = None, 0
    for piece, w in zip(x.split([40, 3, 40], 1), weight.split([40, 3, 40], 1)):
        y, state = mixer.extend(piece, state)
        total = total + (y * w).sum()
    for name, a, b in zip(dict(mixer.named_parameters()), torch.autograd.grad(total, parameters), whole):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max() + 1), msg=name)


@torch.no_grad()
def test_the_future_does_not_leak(mixer):
    x = text()
    y = mixer(x)
    for position in (1, 40, LENGTH - 1):
        changed = x.clone()
        changed[:, position:] += 1
        difference = mixer(changed) - y
        assert difference[:, :position].abs().max() < 1e-12
        assert difference[:, position].abs().max() > 1e-4


def test_lengths_make_padding_invisible(mixer):
    """Rows of different lengths, one of them empty, share a batch; each row comes out as if alone, state included."""
    first, second, third = text(), text(seed=2, length=7), text(seed=3, length=5)
    lengths, more = torch.tensor([LENGTH, 20, 0]), torch.tensor([2, 7, 3])
    _, state = mixer.extend(first, None, lengths)
    y2, state = mixer.extend(second, state, more)
    y3, _ = mixer.extend(third, state)
    for row, (a, b) in enumerate(zip(lengths.tolist(), more.tolist())):
        alone = torch.cat([first[row, :a], second[row, :b], third[row]])[None]
        y = mixer(alone)[0]
        torch.testing.assert_close(y2[row, :b], y[a : a + b], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(y3[row], y[a + b :], rtol=1e-9, atol=1e-9)


def test_the_state_is_batch_first_and_constant_where_promised(mixer, name):
    x = text()
    sizes = []
    for length in (20, 40, 80):
        _, state = mixer.extend(x[:, :length])
        assert all(t.shape[0] == 3 for t in state)
        sizes.append(state_numbers(state))
    if name in CONSTANT_STATE:
        assert sizes[0] == sizes[1] == sizes[2]
        assert mixer.state_size(20) == mixer.state_size(80)
    else:
        assert sizes[0] <= sizes[1] <= sizes[2]


class Written(TorchDispatchMode):
    """Counts the numbers that all operations write."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        self.count += sum(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))
        return out


@torch.no_grad()
def test_a_step_costs_the_same_at_every_position_where_the_state_is_constant(mixer, name):
    x, costs = text(), []
    for position in (20, 40, 80):
        _, state = mixer.extend(x[:, :position])
        with Written() as written:
            written.count = 0
            mixer.extend(x[:, position : position + 1], state)
        costs.append(written.count)
    assert (costs[0] == costs[1] == costs[2]) == (name in CONSTANT_COST), costs


def test_reordering_the_state_reorders_the_continuation(mixer):
    x, more, order = text(), text(seed=5, length=6), torch.tensor([2, 0, 0])
    _, state = mixer.extend(x)
    y, _ = mixer.extend(more, tuple(t.index_select(0, order) for t in state))
    expected = mixer(torch.cat([x[order], more], 1))[:, LENGTH:]
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)


def test_half_precision_runs_and_stays_close(mixer, name):
    if "long" in name or name == "hyena":
        pytest.skip("a long convolution's parameters stay in float32 or better under autocast")
    x = text().float()
    reference = mixer.float()(x)
    y = mixer.bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert (y.float() - reference).norm() / reference.norm() < 0.1


def test_autocast(mixer):
    x = text().float()
    reference = mixer.float()(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer(x)
    assert (y.float() - reference).norm() / reference.norm() < 0.05


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("attention", 2 * DIM * 83),
        ("window", 2 * DIM * 5),
        ("base-conv", DIM * 3),
        ("base-conv-long", DIM * 83),
        ("hyena", DIM * 83),
        ("h3", DIM * 10),
        ("mamba", 2 * DIM * 5),
        ("based", 2 * (1 + 4 + 10) * (6 + 1)),
    ],
)
def test_state_sizes_as_published(name, size):
    assert MIXERS[name]().state_size(83) == size


@pytest.mark.parametrize("name", ["attention", "window", "based", "based-one-chunk", "retention", "rwkv4-time-mix"])
def test_reported_state_is_the_held_state(name):
    mixer = MIXERS[name]()
    _, state = mixer.extend(torch.randn(1, LENGTH, DIM))
    assert mixer.state_size(LENGTH) == state_numbers(state)


@pytest.mark.parametrize(
    "make",
    [
        lambda: CausalAttention(12, num_heads=5),
        lambda: CausalAttention(12, window=0),
        lambda: BaseConv(12, 0),
        lambda: BaseConv(12, -1),
        lambda: ImplicitLongConv(12, 8, features=4),
        lambda: Based(12, num_heads=7),
        lambda: Based(12, feature_dim=0),
        lambda: Retention(12, num_heads=4),
        lambda: H3(12, d_state=5),
        lambda: H3(12, head_dim=5),
        lambda: Mamba(12, d_state=0),
        lambda: RWKV4ChannelMix(12, mult=0),
        lambda: SelectiveLookup(12, threshold=2.0),
        lambda: ShortConv(12, 0),
    ],
)
def test_bad_arguments_are_refused(make):
    with pytest.raises(ValueError, match=r"\d"):
        make()


def test_a_text_longer_than_a_filter_is_refused():
    conv = ImplicitLongConv(4, 8)
    with pytest.raises(ValueError, match="longer than max_length=8"):
        conv(torch.randn(1, 9, 4))
    _, state = conv.extend(torch.randn(1, 8, 4))
    with pytest.raises(ValueError, match="longer than max_length=8"):
        conv.extend(torch.randn(1, 1, 4), state)


def test_a_state_holds_no_more_than_its_own_numbers():
    """A view of the last inputs would keep a whole text in memory."""
    x = text(length=5000)
    for kept in (shift_in(x[:, :0], x, 3), ShortConv(DIM, 4).double().extend(x)[1][0]):
        assert kept.untyped_storage().nbytes() == kept.numel() * 8
        torch.testing.assert_close(kept, x[:, -3:])
