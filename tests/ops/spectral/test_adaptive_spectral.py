"""AFNO and the adaptive frequency filter against sums over waves, their mode selections, and real matrices."""

import math

import pytest
import torch
from torch import nn

from nearfar.ops.spectral.adaptive import AFNO, AdaptiveFrequencyFilter, kept_frequencies
from nearfar.ops.spectral.fourier import all_frequencies, analyse, low_frequencies, synthesize

SIZES = [(9,), (8,), (5, 6), (6, 7), (3, 4, 5)]


def agree(fast: torch.Tensor, slow: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    torch.testing.assert_close(fast, slow, atol=1e-9, rtol=0)
    probe = torch.randn_like(fast)
    for a, b in zip(
        torch.autograd.grad((fast * probe).sum(), inputs),
        torch.autograd.grad((slow * probe).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def complex_mlp(op: nn.Module, spectrum: torch.Tensor, act) -> torch.Tensor:
    """Step by step on a spectrum (B, C, ...): einsums over the blocks, parts apart."""
    k = op.w1.shape[1]
    x = spectrum.unflatten(1, (k, -1))
    product = lambda x, w: torch.einsum("bki...,kio->bko...", x, w)  # noqa: E731
    across = lambda b: b.reshape(1, k, -1, *(1,) * (spectrum.ndim - 2))  # noqa: E731
    (w1r, w1i), (b1r, b1i), (w2r, w2i), (b2r, b2i) = op.w1, op.b1, op.w2, op.b2
    r = act(product(x.real, w1r) - product(x.imag, w1i) + across(b1r))
    i = act(product(x.imag, w1r) + product(x.real, w1i) + across(b1i))
    out_r = product(r, w2r) - product(i, w2i) + across(b2r)
    out_i = product(i, w2r) + product(r, w2i) + across(b2i)
    shrink = lambda v: v.sign() * (v.abs() - op.threshold).clamp(min=0)  # noqa: E731
    return torch.complex(shrink(out_r), shrink(out_i)).flatten(1, 2)


def large(op: nn.Module) -> nn.Module:
    """Weights at which every part shows."""
    for parameter in op.parameters():
        nn.init.normal_(parameter, std=0.5)
    return op.double()


def axes(x: torch.Tensor) -> tuple[int, ...]:
    return tuple(range(2, x.ndim))


@pytest.mark.parametrize("matrices", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_afno_is_its_formula(size: tuple[int, ...], matrices: bool) -> None:
    op = large(AFNO(8, 2, hidden_factor=2, threshold=0.1, dims=len(size), matrices=matrices))
    x = torch.randn(2, 8, *size, dtype=torch.float64, requires_grad=True)
    mixed = complex_mlp(op, torch.fft.rfftn(x, dim=axes(x), norm="ortho"), torch.relu)
    slow = torch.fft.irfftn(mixed, s=size, dim=axes(x), norm="ortho") + x
    agree(op(x), slow, [x, *op.parameters()])


@pytest.mark.parametrize("matrices", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_adaptive_filter_is_its_formula(size: tuple[int, ...], matrices: bool) -> None:
    op = large(AdaptiveFrequencyFilter(8, 4, dims=len(size), matrices=matrices))
    x = torch.randn(2, 8, *size, dtype=torch.float64, requires_grad=True)
    spectrum = torch.fft.rfftn(x, dim=axes(x), norm="ortho")
    masked = complex_mlp(op, spectrum, nn.functional.silu) * spectrum
    slow = torch.fft.irfftn(masked, s=size, dim=axes(x), norm="ortho") + x
    agree(op(x), slow, [x, *op.parameters()])


@pytest.mark.parametrize("matrices", [False, True])
@pytest.mark.parametrize("fraction", [0.3, 0.5, 1.0])
@pytest.mark.parametrize(
    ("modes", "size"),
    [("afno", (9,)), ("lowpass", (9,)), ("lowpass", (8,)), ("lowpass", (3, 4, 6))]
    + [(modes, size) for modes in ("afno", "fourcastnet", "lowpass") for size in ((6, 12), (7, 5))],
)
def test_modes_that_are_not_kept_are_zero(modes: str, size: tuple[int, ...], fraction: float, matrices: bool) -> None:
    """The mask by its published slices (or, for lowpass, by |f|), against the form that computes only kept modes."""
    op = large(AFNO(4, 2, modes=modes, fraction=fraction, dims=len(size), matrices=matrices))
    x = torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True)
    spectrum = torch.fft.rfftn(x, dim=axes(x), norm="ortho")
    mask = torch.zeros(spectrum.shape[2:], dtype=torch.float64)
    if modes == "afno":
        mask[..., : int((math.prod(size) // 2 + 1) * fraction)] = 1
    elif modes == "fourcastnet":
        total = size[0] // 2 + 1
        m = int(total * fraction)
        mask[total - m : total + m, :m] = 1
    else:
        mask += 1
        for axis, n in enumerate(size):
            f = torch.fft.rfftfreq(n) if axis == len(size) - 1 else torch.fft.fftfreq(n)
            near = ((f * n).round().abs() < max(1, int((n // 2 + 1) * fraction))).double()
            mask *= near.reshape(-1, *(1,) * (len(size) - 1 - axis))
    mixed = complex_mlp(op, spectrum, torch.relu) * mask
    slow = torch.fft.irfftn(mixed, s=size, dim=axes(x), norm="ortho") + x
    agree(op(x), slow, [x, *op.parameters()])


@pytest.mark.parametrize("n", [1, 2, 7, 8])
def test_low_frequencies(n: int) -> None:
    everything = [int(f) for f in (torch.fft.fftfreq(n) * n).round()]
    assert low_frequencies(n, n, half=False) == tuple(everything)
    for m in range(1, n // 2 + 2):
        assert low_frequencies(n, m, half=False) == tuple(f for f in everything if abs(f) < m)


@pytest.mark.parametrize("matrices", [False, True])
@pytest.mark.parametrize("size", [*SIZES, (1, 6), (6, 1), (1,)])
def test_synthesis_undoes_analysis(size: tuple[int, ...], matrices: bool) -> None:
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    kept = all_frequencies(size)
    torch.testing.assert_close(synthesize(*analyse(x, kept, matrices=matrices), kept, size, matrices=matrices), x)


def wave(size: tuple[int, int], rows: int, columns: int) -> torch.Tensor:
    y, x = (torch.arange(n, dtype=torch.float64) / n for n in size)
    return torch.cos(2 * math.pi * (rows * y[:, None] + columns * x) + 0.3)


def test_lowpass_keeps_the_waves_that_it_names() -> None:
    size = (12, 16)
    op = AFNO(1, 1, modes="lowpass", fraction=0.5).double()
    for parameter in op.parameters():
        nn.init.zeros_(parameter)
    op.w1.data[0] = op.w2.data[0] = 1  # without biases the mix answers a wave with waves of the same frequency
    op.threshold = 0.0
    for rows in range(-5, 6):
        for columns in range(8):
            x = wave(size, rows, columns)[None, None]
            changed = (op(x) - x).norm() > 1e-9
            assert bool(changed) == (abs(rows) < int(7 * 0.5) and columns < int(9 * 0.5)), (rows, columns)


def test_lowpass_does_not_depend_on_the_resolution() -> None:
    op = large(AFNO(3, 1, modes="lowpass", fraction=0.6, grid=(8, 12)))
    weights = torch.randn(3, 5, 5, dtype=torch.float64)

    def field(size: tuple[int, int]) -> torch.Tensor:
        parts = [weights[:, i, j, None, None] * wave(size, i - 2, j - 2) for i in range(5) for j in range(5)]
        return torch.stack(parts).sum(0)[None]

    coarse, fine = op(field((8, 12))), op(field((16, 24)))
    assert (coarse - field((8, 12))).norm() > 0.1
    torch.testing.assert_close(fine[..., ::2, ::2], coarse, atol=1e-9, rtol=0)


def test_the_published_selections_do() -> None:
    """What the two published rules really keep, as the reports on them say."""
    rows, columns = kept_frequencies((90, 180), "fourcastnet")
    assert (len(rows), len(columns)) == (90, 46)
    rows, columns = kept_frequencies((90, 180), "fourcastnet", 0.5)
    assert 0 not in rows
    assert min(map(abs, rows)) == 22
    rows, columns = kept_frequencies((14, 14), "afno", 0.1)
    assert (len(rows), len(columns)) == (14, 8)


@pytest.mark.parametrize(
    "op", [AFNO(8, 2), AFNO(8, 2, modes="lowpass", fraction=0.6), AdaptiveFrequencyFilter(8, 2)], ids=repr
)
def test_shifts_pass_through(op: nn.Module) -> None:
    """A cyclic shift multiplies the spectrum by phases, which act on parts does not commute with, unless linear."""
    op = large(op)
    op.act, op.threshold = nn.Identity(), 0.0
    nn.init.zeros_(op.b1)
    nn.init.zeros_(op.b2)
    x = torch.randn(1, 8, 6, 7, dtype=torch.float64)
    if isinstance(op, AdaptiveFrequencyFilter):  # quadratic in the spectrum: the phase comes twice
        shifted = op(x.roll((2, 3), (2, 3))) - x.roll((2, 3), (2, 3))
        torch.testing.assert_close(shifted, (op(x) - x).roll((4, 6), (2, 3)))
    else:
        torch.testing.assert_close(op(x.roll((2, 3), (2, 3))), op(x).roll((2, 3), (2, 3)))


@pytest.mark.parametrize("kind", [AFNO, AdaptiveFrequencyFilter])
def test_one_pixel_axes_are_not_there(kind: type[nn.Module]) -> None:
    line, plane = large(kind(8, 2, dims=1)), large(kind(8, 2, dims=2))
    plane.load_state_dict(line.state_dict())
    x = torch.randn(2, 8, 10, dtype=torch.float64)
    torch.testing.assert_close(plane(x[:, :, None])[:, :, 0], line(x))


@torch.no_grad()
@pytest.mark.parametrize("kind", [AFNO, AdaptiveFrequencyFilter])
def test_low_precision(kind: type[nn.Module]) -> None:
    op = kind(8, 2)
    x = torch.randn(2, 8, 7, 9)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(op(x), op(x.double()).float())
    half = op(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), op(x), atol=0.05, rtol=0.05)
    assert op.double()(x.double()).dtype == torch.float64


@torch.no_grad()
@pytest.mark.parametrize(
    "op", [AFNO(8, 2, modes="fourcastnet", fraction=0.5), AFNO(8, 2, modes="lowpass"), AdaptiveFrequencyFilter(8, 2)]
)
def test_the_exported_form_has_no_complex_numbers(op: nn.Module) -> None:
    x = torch.randn(2, 8, 6, 9)
    program = torch.export.export(op.eval(), (x,))
    values = [node.meta["val"] for node in program.graph.nodes if "val" in node.meta]
    assert not any(isinstance(value, torch.Tensor) and value.is_complex() for value in values)
    torch.testing.assert_close(program.module()(x), op(x), atol=1e-5, rtol=1e-5)


def test_bad_arguments() -> None:
    for kind in (AFNO, AdaptiveFrequencyFilter):
        with pytest.raises(ValueError, match="must divide dim=10"):
            kind(10, 4)
        with pytest.raises(ValueError, match="threshold is -1"):
            kind(8, 4, threshold=-1.0)
        with pytest.raises(ValueError, match="dims is 4"):
            kind(8, 4, dims=4)
    with pytest.raises(ValueError, match="allowed are afno, fourcastnet, lowpass"):
        AFNO(8, modes="low")
    with pytest.raises(ValueError, match="fraction is 0"):
        AFNO(8, fraction=0)
    with pytest.raises(ValueError, match="two axes"):
        AFNO(8, modes="fourcastnet", dims=1)
    with pytest.raises(ValueError, match="takes modes='lowpass'"):
        AFNO(8, grid=(4, 4))
    with pytest.raises(ValueError, match="keep no frequency"):
        AFNO(8, modes="fourcastnet", fraction=0.1)(torch.zeros(1, 8, 4, 4))
    with pytest.raises(ValueError, match="hidden_factor is 0"):
        AFNO(8, hidden_factor=0)
