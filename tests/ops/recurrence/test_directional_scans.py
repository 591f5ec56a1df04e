"""Scans in several directions, scan orders and SSD against their obvious slow forms, in float64."""

import pytest
import torch
import torch.nn.functional as F

from nearfar.ops.convolution.gated_spatial import GatedSpatialConv
from nearfar.ops.recurrence.directional_mamba import SS2D, DirectionalMamba
from nearfar.ops.recurrence.mamba import Mamba, _compiled_scan, _SelectiveScan, _traced_scan, selective_scan
from nearfar.ops.recurrence.scan_orders import ORDERS, SETS, invert, scan_order
from nearfar.ops.recurrence.ssd import ssd


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def agree(ours, theirs, inputs):
    """Outputs and gradients agree to 1e-9."""
    weights = [torch.randn_like(t) for t in theirs]
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    one = torch.autograd.grad(sum((t * w).sum() for t, w in zip(ours, weights)), inputs)
    two = torch.autograd.grad(sum((t * w).sum() for t, w in zip(theirs, weights)), inputs)
    for a, b in zip(one, two):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def slow_scan(u, dt, A, B, C, D, z, bias, state):
    """One position, one channel group at a time: u, dt, z (B, N, E), B, C (B, N, G, S)."""
    groups, dt, rows = B.shape[2], F.softplus(dt + bias), []
    for t in range(u.shape[1]):
        b, c = (v[:, t].repeat_interleave(u.shape[2] // groups, 1) for v in (B, C))
        state = torch.exp(dt[:, t, :, None] * A) * state + (dt[:, t] * u[:, t])[..., None] * b
        rows.append(((state * c).sum(-1) + D * u[:, t]) * F.silu(z[:, t]))
    return torch.stack(rows, 1), state


@pytest.mark.parametrize(("n", "states", "width"), [(1, 3, 6), (7, 1, 6), (75, 1, 6), (130, 2, 6), (300, 1, 4400)])
def test_selective_scan_with_groups_gate_skip_and_bias(n, states, width):
    b = 2 if width < 100 else 1
    u, dt, z = (torch.randn(b, n, width) for _ in range(3))
    A, D, bias = -torch.rand(width, states), torch.randn(width), torch.randn(width)
    B, C, h = torch.randn(b, n, 2, states), torch.randn(b, n, 2, states), torch.randn(b, width, states)
    given = [t.requires_grad_() for t in (u, dt, A, B, C, D, z, bias, h)]
    ours = selective_scan(u, dt, A, B, C, h, D=D, z=z, dt_bias=bias, softplus=True)
    agree(ours, slow_scan(u, dt, A, B, C, D, z, bias, h), given)


@pytest.mark.parametrize("shared", [False, True])
def test_scan_in_an_order_is_the_scan_of_the_reordered_sequence(shared):
    n, groups, width = 70, 3, 2
    order = torch.stack([torch.randperm(n) for _ in range(groups)])
    u = torch.randn(2, n, width if shared else groups * width)
    dt, A = torch.rand(2, n, groups * width), -torch.rand(groups * width, 4)
    B, C, D = torch.randn(2, n, groups, 4), torch.randn(2, n, groups, 4), torch.randn(groups * width)
    given = [t.requires_grad_() for t in (u, dt, A, B, C, D)]
    ours = selective_scan(u, dt, A, B, C, D=D, order=order)
    rows, states = [], []
    for g, visit in enumerate(order):
        part = slice(g * width, g * width + width)
        ug = u if shared else u[..., part]
        got, h = selective_scan(ug[:, visit], dt[:, visit, part], A[part], B[:, visit, g], C[:, visit, g], D=D[part])
        rows.append(got[:, invert(visit)])
        states.append(h)
    agree(ours, (torch.cat(rows, 2), torch.cat(states, 1)), given)
    with pytest.raises(ValueError, match="order has shape"):
        selective_scan(u, dt, A, B, C, order=order[:2])


@pytest.mark.parametrize(("n", "ordered"), [(1, False), (13, False), (32, True), (45, True)])
def test_the_traced_form_is_the_same_scan(n, ordered):
    order = torch.stack([torch.randperm(n) for _ in range(3)]) if ordered else None
    shapes = [(2, n, 3, 4), (2, n, 3, 4), (3, 2, 4), (2, n, 3, 2), (2, n, 3, 2), (2, 3, 2, 4)]
    u, dt, A, B, C, h = (torch.randn(s) for s in shapes)
    given = [t.requires_grad_() for t in (u, dt.abs(), -A.abs(), B, C, h)]
    agree(_traced_scan(*given, order), _SelectiveScan.apply(*given, order), given)
    plain = [t.detach() for t in given]
    for one, two in zip(_compiled_scan(*plain, order), _SelectiveScan.apply(*plain, order)):
        torch.testing.assert_close(one, two, rtol=0, atol=0)
    with torch.no_grad():
        compiled = torch.compile(selective_scan, backend="eager", fullgraph=True, dynamic=False)
        mine = [torch.rand(2, n, 4), torch.rand(2, n, 4), -torch.rand(4, 2), torch.rand(2, n, 2), torch.rand(2, n, 2)]
        for one, two in zip(compiled(*mine), selective_scan(*mine)):  # the very numbers of blocks, not of joined runs
            torch.testing.assert_close(one, two, rtol=0, atol=0)
    torch.library.opcheck(_compiled_scan, (*plain, order), test_utils=("test_schema", "test_faketensor"))


def test_in_pieces_equals_whole():
    u, dt, A = torch.randn(1, 90, 4), torch.rand(1, 90, 4), -torch.rand(4, 3)
    B, C = torch.randn(1, 90, 3), torch.randn(1, 90, 3)
    whole, last = selective_scan(u, dt, A, B, C)
    h, pieces = None, []
    for part in (slice(0, 1), slice(1, 40), slice(40, 90)):
        y, h = selective_scan(u[:, part], dt[:, part], A, B[:, part], C[:, part], h)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    torch.testing.assert_close(h, last)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_scans_in_float32_over_64k_positions(dtype):
    n = 65536
    u, dt = torch.ones(1, n, 1, dtype=dtype), torch.full((1, n, 1), 8.0, dtype=dtype)
    A, one = torch.full((1, 1), -1e-6, dtype=torch.float32), torch.ones(1, n, 1, dtype=dtype)
    y, h = selective_scan(u, dt, A, one, one)
    assert y.dtype == dtype
    assert h.dtype == torch.float32
    want = 8 * (1 - torch.exp(torch.tensor(-8e-6 * n))) / (1 - torch.exp(torch.tensor(-8e-6)))
    torch.testing.assert_close(h.double().squeeze(), want.double(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("size", [(7,), (4, 6), (5, 3), (3, 4, 5), (1, 6)])
@pytest.mark.parametrize("kind", list(ORDERS))
def test_every_order_visits_every_position_once(kind, size):
    n = torch.Size(size).numel()
    both = scan_order((kind, kind + "-reversed"), size, window=2, step=2, slices=n)
    assert (both.sort(-1).values == torch.arange(n)).all()
    torch.testing.assert_close(invert(both).gather(1, both), torch.arange(n).expand(2, -1))
    if kind != "slices":
        torch.testing.assert_close(both[1], both[0].flip(0))


def test_orders_are_the_published_ones():
    grid = torch.arange(24).view(4, 6)
    row, column, row_back, column_back = scan_order("cross", (4, 6))
    torch.testing.assert_close(row, grid.flatten())
    torch.testing.assert_close(column, grid.T.flatten())
    torch.testing.assert_close(row_back, grid.flatten().flip(0))
    torch.testing.assert_close(column_back, grid.T.flatten().flip(0))
    windows = grid.unflatten(1, (3, 2)).unflatten(0, (2, 2)).permute(0, 2, 1, 3).flatten()
    torch.testing.assert_close(scan_order("windowed", (4, 6), window=2)[0], windows)
    every_second = torch.cat([grid[i::2, j::2].flatten() for i in range(2) for j in range(2)])
    torch.testing.assert_close(scan_order("atrous", (4, 6), step=2)[0], every_second)
    torch.testing.assert_close(scan_order("snake", (2, 3))[0], torch.tensor([0, 1, 2, 5, 4, 3]))
    cube = torch.arange(24).view(2, 3, 4)
    torch.testing.assert_close(scan_order("middle", (2, 3, 4))[0], cube.permute(0, 2, 1).flatten())
    torch.testing.assert_close(scan_order("column", (2, 3, 4))[0], cube.permute(1, 2, 0).flatten())
    slices = [s * 6 + j for j in range(6) for s in range(4)]
    assert scan_order("slices", (24,), slices=4)[0].tolist() == slices
    assert scan_order("axes", (2, 3, 4)).shape == (6, 24)
    assert set(SETS) == {"bidirectional", "cross", "tri", "axes"}


def test_snake_goes_to_neighbours():
    position = torch.stack(torch.meshgrid(*map(torch.arange, (3, 4, 5)), indexing="ij"), -1).view(-1, 3)
    walk = position[scan_order("snake", (3, 4, 5))[0]]
    assert ((walk[1:] - walk[:-1]).abs().sum(-1) == 1).all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"names": "diagonal", "size": (3,)}, "no scan order 'diagonal'"),
        ({"names": "row-backwards", "size": (3,)}, "no scan order"),
        ({"names": "windowed", "size": (3,)}, "needs window"),
        ({"names": "slices", "size": (5, 2), "slices": 3}, "slices=3 must divide the 10"),
        ({"names": "row", "size": (2, 2, 2, 2)}, "1, 2 or 3 axes"),
    ],
)
def test_orders_refuse(given, message):
    with pytest.raises(ValueError, match=message):
        scan_order(**given)


def slow_ss2d(m, x):
    """Four copies of the map, each scanned as a sequence, flipped and transposed back."""
    b, _, h, w = x.shape
    x = m.in_proj(x.permute(0, 2, 3, 1))
    x, z = x.chunk(2, -1) if m.gate else (x, None)
    x = F.silu(m.conv(x.permute(0, 3, 1, 2)))
    rows, columns = x.flatten(2), x.transpose(2, 3).flatten(2)
    total = 0
    for k, u in enumerate([rows, columns, rows.flip(-1), columns.flip(-1)]):
        u = u.mT
        r, B, C = (u @ m.scan.x_proj[k].T).split(m.scan.widths, -1)
        dt = F.softplus(r @ m.scan.dt_proj[k].T + m.scan.dt_bias[k])
        y, _ = selective_scan(u, dt, -torch.exp(m.scan.A_log[k]), B, C)
        y = (y + m.scan.D[k] * u).mT
        y = y.flip(-1) if k > 1 else y
        total = total + (y.view(b, -1, h, w) if k % 2 == 0 else y.view(b, -1, w, h).transpose(2, 3))
    y = F.layer_norm(total.permute(0, 2, 3, 1), (total.shape[1],), m.out_norm.weight, m.out_norm.bias, 1e-5)
    return m.out_proj(y if z is None else y * F.silu(z)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("form", [{}, {"gate": False, "conv_bias": False, "d_state": 1, "ratio": 1}])
def test_ss2d(form):
    m, x = SS2D(8, **form), torch.randn(2, 8, 5, 7, requires_grad=True)
    agree([m(x)], [slow_ss2d(m, x)], [x, *m.parameters()])


def test_ss2d_on_other_grids():
    m = SS2D(8, directions=("row", "row-reversed"), dims=1)
    flat = SS2D(8, directions=("row", "row-reversed"))
    with torch.no_grad():
        for name, value in m.named_parameters():
            target = flat.get_parameter(name)
            if name == "conv.weight":
                target.zero_()[:, :, 1] = value
            else:
                target.copy_(value)
    x = torch.randn(2, 8, 9)
    torch.testing.assert_close(flat(x[:, :, None])[:, :, 0], m(x))
    for size in ((3, 1, 5), (2, 4, 3)):
        assert SS2D(8, dims=3)(torch.randn(1, 8, *size)).shape == (1, 8, *size)
    for order in ("snake", "windowed", "atrous"):
        assert (
            SS2D(8, directions=(order, order + "-reversed"), window=2, step=2)(torch.randn(1, 8, 5, 3)).isfinite().all()
        )
    with pytest.raises(ValueError, match="no scan order"):
        SS2D(8, directions=("spiral",))


def test_ss2d_turns_with_the_picture_when_its_directions_share_their_parameters():
    m = SS2D(8)
    with torch.no_grad():
        for p in m.scan.parameters():
            p.copy_(p[:1].expand_as(p))
        m.conv.weight.copy_((m.conv.weight + m.conv.weight.transpose(2, 3) + m.conv.weight.flip(2, 3)) / 3)
        m.conv.weight.copy_((m.conv.weight + m.conv.weight.flip(2)) / 2)
        m.conv.weight.copy_((m.conv.weight + m.conv.weight.transpose(2, 3)) / 2)
        m.conv.weight.copy_((m.conv.weight + m.conv.weight.flip(3)) / 2)
        m.conv.weight.copy_((m.conv.weight + m.conv.weight.flip(2)) / 2)
    x = torch.randn(1, 8, 5, 7)
    torch.testing.assert_close(m(x.transpose(2, 3)), m(x).transpose(2, 3))


def slow_directional(m, x, slices):
    """Every direction as its own Mamba block without the projection out."""
    n, inner = x.shape[1], m.in_proj.out_features // 2
    u, z = m.in_proj(x).chunk(2, -1)
    orders = {
        "row": list(range(n)),
        "row-reversed": list(range(n))[::-1],
        "slices": [s * (n // slices) + j for j in range(n // slices) for s in range(slices)],
    }
    total = 0
    for i, name in enumerate(m.directions):
        visit, part = orders[name], slice(i * inner, i * inner + inner)
        v = F.conv1d(F.pad(u[:, visit].mT, (3, 0)), m.conv.weight[part], m.conv.bias[part], groups=inner).mT
        v = F.silu(v)
        r, B, C = (v @ m.scan.x_proj[i].T).split(m.scan.widths, -1)
        dt = F.softplus(r @ m.scan.dt_proj[i].T + m.scan.dt_bias[i])
        y, _ = selective_scan(v, dt, -torch.exp(m.scan.A_log[i]), B, C)
        y = (y + m.scan.D[i] * v) * F.silu(z[:, visit])
        total = total + y[:, [visit.index(j) for j in range(n)]]
    return m.out_proj(total * m.weight)


@pytest.mark.parametrize(("directions", "merge"), [("bidirectional", "mean"), ("tri", "sum")])
def test_directional_mamba(directions, merge):
    m, x = DirectionalMamba(8, directions, merge), torch.randn(2, 12, 8, requires_grad=True)
    slices = 4 if directions == "tri" else None
    agree([m(x, slices=slices)], [slow_directional(m, x, 4)], [x, *m.parameters()])
    with pytest.raises(ValueError, match="merge"):
        DirectionalMamba(8, merge="max")


def test_one_direction_is_mamba():
    m, one = Mamba(8), DirectionalMamba(8, ("row",))
    with torch.no_grad():
        one.in_proj.weight.copy_(m.in_proj.weight)
        one.out_proj.weight.copy_(m.out_proj.weight)
        one.conv.load_state_dict(m.conv.state_dict())
        names = {"x_proj": m.x_proj.weight, "dt_proj": m.dt_proj.weight, "dt_bias": m.dt_proj.bias}
        for name, value in {**names, "A_log": m.A_log, "D": m.D}.items():
            one.scan.get_parameter(name).copy_(value[None])
    x = torch.randn(2, 33, 8)
    torch.testing.assert_close(one(x), m(x))


def test_reversing_the_sequence_swaps_the_directions():
    m, swapped = DirectionalMamba(8), DirectionalMamba(8)
    swapped.load_state_dict(m.state_dict())
    with torch.no_grad():
        for p in swapped.scan.parameters():
            p.copy_(p.flip(0))
        for p in swapped.conv.parameters():
            p.copy_(p.roll(len(p) // 2, 0))
    x = torch.randn(2, 21, 8)
    torch.testing.assert_close(swapped(x.flip(1)), m(x).flip(1))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_gated_spatial_conv(dims):
    m, x = GatedSpatialConv(4, dims=dims), torch.randn(2, 4, *(5, 4, 3)[:dims], requires_grad=True)

    def f(conv, t):
        t = conv(t)
        axes = tuple(range(2, t.dim()))
        mean = t.mean(axes, keepdim=True)
        return ((t - mean) / (((t - mean) ** 2).mean(axes, keepdim=True) + 1e-5).sqrt()).clamp(min=0)

    slow = x + f(m.join, f(m.conv2, f(m.conv1, x)) + f(m.side, x))
    agree([m(x)], [slow], [x, *(p for n, p in m.named_parameters() if "bias" not in n)])


def slow_ssd(x, dt, A, B, C, h):
    rows = []
    for t in range(x.shape[1]):
        b, c = (v[:, t].repeat_interleave(x.shape[2] // B.shape[2], 1) for v in (B, C))
        h = torch.exp(dt[:, t] * A)[..., None, None] * h + (dt[:, t, :, None] * x[:, t])[..., None] * b[:, :, None]
        rows.append((h * c[:, :, None]).sum(-1))
    return torch.stack(rows, 1), h


@pytest.mark.parametrize(("n", "chunk"), [(1, 64), (33, 8), (33, 64), (20, 1)])
def test_ssd(n, chunk):
    x, dt, A = torch.randn(2, n, 4, 3), torch.rand(2, n, 4), -torch.rand(4)
    B, C, h = torch.randn(2, n, 2, 5), torch.randn(2, n, 2, 5), torch.randn(2, 4, 3, 5)
    given = [t.requires_grad_() for t in (x, dt, A, B, C, h)]
    agree(ssd(*given, chunk=chunk), slow_ssd(*given), given)


def test_ssd_is_a_selective_scan_with_one_decay_per_head():
    x, dt, A = torch.randn(1, 40, 2, 3), torch.rand(1, 40, 2), -torch.rand(2)
    B, C = torch.randn(1, 40, 1, 4), torch.randn(1, 40, 1, 4)
    y, h = ssd(x, dt, A, B, C)
    each = lambda t: t.repeat_interleave(3, -1)  # noqa: E731
    want, last = selective_scan(x.flatten(2), each(dt), each(A)[:, None].expand(-1, 4), B[:, :, 0], C[:, :, 0])
    torch.testing.assert_close(y.flatten(2), want)
    torch.testing.assert_close(h.flatten(1, 2), last)


def test_ssd_does_not_overflow():
    n = 4096
    x, dt = torch.ones(1, n, 1, 1, dtype=torch.float32), torch.full((1, n, 1), 50.0, dtype=torch.float32)
    one = torch.ones(1, n, 1, 2, dtype=torch.float32)
    y, h = ssd(x, dt, torch.tensor([-16.0]), one, one)
    assert y.isfinite().all()
    assert h.isfinite().all()
    with pytest.raises(ValueError, match="chunk"):
        ssd(x, dt, torch.tensor([-16.0]), one, one, chunk=0)
    with pytest.raises(ValueError, match="groups"):
        ssd(x, dt, torch.tensor([-16.0]), one.expand(-1, -1, 2, -1), one.expand(-1, -1, 2, -1))
