"""Times and memory of three mixers beside their released forms, on one thread: `python benchmarks/small_mixers.py`.

The released forms are written down here anew, from their descriptions: MSA-Conv with an unfolded neighbourhood (k k
copies of keys and values), AFNO with eight products on strided real and imaginary views and buffers of zeros, SpaRTAN's
wave channel mixer with complex numbers and two separate projections. Outputs are compared before anything is timed.
Memory is what a forward pass adds at most without gradients, and what it keeps for the backward pass with them.
"""

import ctypes
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfar.ops.attention.window import window_attention
from nearfar.ops.spectral.adaptive import AFNO
from nearfar.ops.tokens.wave_mixer import WaveMixer
from nearfar.vision.cost import peak_memory


def unfolded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, channels, height, width = q.shape
    keys, values = (F.unfold(x, 3, padding=1).view(batch, channels, 9, height, width) for x in (k, v))
    weights = ((q[:, :, None] * keys).sum(1) * channels**-0.5).softmax(1)
    return (weights[:, None] * values).sum(2)


def eight_products(op: AFNO, x: Tensor) -> Tensor:
    batch, height, width, channels = x.shape
    blocks = op.num_blocks
    spectrum = torch.fft.rfft2(x, dim=(1, 2), norm="ortho").reshape(batch, height, -1, blocks, channels // blocks)
    product = lambda a, w: torch.einsum("...bi,bio->...bo", a, w)  # noqa: E731
    parts = [torch.zeros(spectrum.shape) for _ in range(4)]
    real, imaginary = spectrum.real, spectrum.imag
    parts[0][:] = F.relu(product(real, op.w1[0]) - product(imaginary, op.w1[1]) + op.b1[0])
    parts[1][:] = F.relu(product(imaginary, op.w1[0]) + product(real, op.w1[1]) + op.b1[1])
    parts[2][:] = product(parts[0], op.w2[0]) - product(parts[1], op.w2[1]) + op.b2[0]
    parts[3][:] = product(parts[1], op.w2[0]) + product(parts[0], op.w2[1]) + op.b2[1]
    mixed = torch.view_as_complex(F.softshrink(torch.stack(parts[2:], -1), op.threshold))
    mixed = mixed.reshape(batch, height, -1, channels)
    return torch.fft.irfft2(mixed, s=(height, width), dim=(1, 2), norm="ortho") + x


def complex_waves(op: WaveMixer, x: Tensor) -> Tensor:
    channel = x.argmax(1, keepdim=True)
    t, p = F.gelu(op.theta(x)), op.proj(x)
    mixed = p * t + p.gather(1, channel) * t.gather(1, channel)
    pairs = torch.view_as_complex(mixed.movedim(1, -1).float().unflatten(-1, (-1, 2)).contiguous())
    turned = torch.view_as_real(pairs * torch.view_as_complex(op.complex)).flatten(-2).movedim(-1, 1)
    return op.proj_out(op.attn(op.conv(turned)))


def milliseconds(run: Callable[[], Tensor], repeats: int = 15) -> float:
    """The median processor time of one thread."""
    times = []
    with torch.no_grad():
        for _ in range(repeats + 2):
            start = time.process_time()
            run()
            times.append(1e3 * (time.process_time() - start))
    return statistics.median(times[2:])


def added(run: Callable[[], Tensor]) -> float:
    """Megabytes that a forward pass without gradients adds at most."""
    with torch.inference_mode():
        run()  # tables are made once
        return peak_memory(run) / 1e6


def kept(run: Callable[[], Tensor]) -> float:
    """Megabytes that the forward pass keeps for the backward one."""
    found: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        alive = run()
    del alive
    return sum(found.values()) / 1e6


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if sys.platform == "linux":  # glibc is to keep freed memory, or large buffers pay for fresh pages now and then
        for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(parameter, 2**30)
    q, k, v = (torch.randn(1, 96, 56, 56, requires_grad=True) for _ in range(3))
    afno, wave = AFNO(256, 4).eval(), WaveMixer(128, 2, grouped=True).eval()
    tokens, picture = (torch.randn(*s, requires_grad=True) for s in ((1, 56, 56, 256), (1, 128, 28, 28)))
    pairs: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
        "window attention, 3 x 3, 96 x 56 x 56": (
            lambda: unfolded(q, k, v),
            lambda: window_attention(q[:, None], k[:, None], v[:, None], (3, 3))[:, 0],
        ),
        "AFNO, 256 x 56 x 56, 4 blocks": (
            lambda: eight_products(afno, tokens),
            lambda: afno(tokens.movedim(-1, 1)).movedim(1, -1),
        ),
        "wave mixer, 128 x 28 x 28, ratio 2": (lambda: complex_waves(wave, picture), lambda: wave(picture)),
    }
    print(f"{'mixer':40} {'ms: released':>12} {'ours':>6} {'factor':>6} {'MB added: released':>18} {'ours':>6} "
          f"{'MB kept: released':>17} {'ours':>6}")  # fmt: skip
    for name, (released, ours) in pairs.items():
        error = ((released() - ours()).norm() / released().norm()).item()
        if error > 1e-5:
            sys.exit(f"{name}: the two forms differ by {error:.1e}")
        a, b = milliseconds(released), milliseconds(ours)
        print(f"{name:40} {a:12.1f} {b:6.1f} {a / b:6.2f} {added(released):18.1f} {added(ours):6.1f} "
              f"{kept(released):17.1f} {kept(ours):6.1f}")  # fmt: skip


if __name__ == "__main__":
    main()
