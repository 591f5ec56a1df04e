"""Time and memory of MossFormer against peers, the two operator forms, and speaker swaps over ten minutes.

    uv run --group bench python benchmarks/separation.py [--threads 1] [--only operators,models,swaps,memory]

Peers: speechbrain's SepFormer, torchaudio's ConvTasNet, and asteroid's DPRNN and LambdaOverlapAdd. asteroid needs an
older torch, hence an environment of its own, whose interpreter `--asteroid` names:

    uv venv asteroid --python 3.11
    uv pip install --python asteroid/bin/python asteroid==0.7.0 torch==2.5.1 torchaudio==2.5.1 "setuptools<70" requests
    uv run --group bench python benchmarks/separation.py --asteroid asteroid/bin/python

Ratios to our figure are what to read: absolute times are the machine's.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

RATE = 8000


def resident(peak: bool = False) -> float:
    """MB that this process holds, or has held at most (Linux; `getrusage` would begin with the parent's peak)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM" if peak else "VmRSS")) / 1024


def milliseconds(run: Callable[[], Any], repeats: int = 5) -> float:
    """Median time of `run`, after one call to warm up."""
    run()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - started))
    return float(np.median(times))


def operators() -> None:
    """Our sequence forms against the released code's: Conv2d with a (39, 1) kernel, and transposed depthwise Conv1d."""
    from nearfar.ops.convolution.sequence import depthwise_sequence
    from nearfar.ops.recurrence.fsmn import DilatedDenseFSMN

    frames = 599
    net = DilatedDenseFSMN(256).eval()
    x = torch.randn(1, frames, 256)

    def naive_dense() -> Tensor:
        stack = out = x.mT.unsqueeze(-1)
        for i, (weight, norm, slope) in enumerate(zip(net.convs, net.norms, net.slopes)):
            stack_in = F.pad(stack, (0, 0, 19 * 2**i, 19 * 2**i))
            out = F.conv2d(stack_in, weight.unsqueeze(-1), dilation=(2**i, 1), groups=256)
            out = F.prelu(F.instance_norm(out, weight=norm.weight, bias=norm.bias, eps=1e-5), slope)
            stack = torch.cat([out, stack], dim=1)
        return out.squeeze(-1).mT

    wide, taps = torch.randn(1, frames, 2048), torch.randn(2048, 17)

    def naive_depthwise() -> Tensor:
        return F.conv1d(wide.mT, taps.unsqueeze(1), padding=8, groups=2048).mT.contiguous()

    print(f"\noperators, {frames} frames, inference")
    with torch.no_grad():
        for name, ours, theirs in (
            ("dilated dense FSMN, 256 channels", lambda: net(x), naive_dense),
            ("depthwise 17, 2048 channels", lambda: depthwise_sequence(wide, taps, 8, 8), naive_depthwise),
        ):
            torch.testing.assert_close(ours(), theirs(), rtol=1e-3, atol=1e-3)
            a, b = milliseconds(ours, 15), milliseconds(theirs, 15)
            print(f"  {name}: ours {a:.2f} ms, released form {b:.2f} ms, ratio {b / a:.1f}")


def build(name: str) -> Callable[[Tensor], Any]:
    """A model by name, as a function of (1, T) samples. Raises ImportError where a peer is not installed."""
    if name in ("mossformer-s", "mossformer2"):
        from nearfar.audio.separation.mossformer import create_model

        return create_model(name).eval()
    if name == "sepformer":
        from speechbrain.lobes.models.dual_path import (
            Decoder,
            Dual_Path_Model,
            Encoder,
            SBTransformerBlock,
        )

        def block() -> Any:
            return SBTransformerBlock(
                num_layers=8, d_model=256, nhead=8, d_ffn=1024, use_positional_encoding=True, norm_before=True
            )

        encoder, decoder = Encoder(kernel_size=16, out_channels=256), Decoder(256, 1, 16, stride=8, bias=False)
        published = {"num_layers": 2, "K": 250, "norm": "ln", "linear_layer_after_inter_intra": False}
        net = Dual_Path_Model(256, 256, block(), block(), num_spks=2, skip_around_intra=True, **published)
        modules = torch.nn.ModuleList([encoder, decoder, net]).eval()

        def forward(mix: Tensor) -> Any:
            encoder, decoder, net = modules
            frames = encoder(mix)
            masks = net(frames)
            return [decoder(frames * mask) for mask in masks]

        return forward
    if name == "convtasnet":
        from torchaudio.models import ConvTasNet

        net = ConvTasNet(num_sources=2).eval()
        return lambda mix: net(mix.unsqueeze(1))
    from asteroid.models import DPRNNTasNet

    return DPRNNTasNet(n_src=2).eval()


def model_once(name: str, threads: int) -> None:
    """In a process of its own: time on 4 s of 8 kHz, and the peak memory above that with the weights loaded."""
    torch.set_num_threads(threads)
    mix = torch.randn(1, 4 * RATE)
    model = build(name)
    before = resident()
    with torch.no_grad():
        took = milliseconds(lambda: model(mix), 3)
    print(f"{took} {resident(peak=True) - before}")


def models(threads: int, asteroid: str | None) -> None:
    print(f"\nforward on 4 s of 8 kHz, {threads} threads, median of 3")
    found: dict[str, tuple[float, float]] = {}
    for name in ("mossformer-s", "mossformer2", "sepformer", "convtasnet", "dprnn"):
        python = asteroid or sys.executable if name == "dprnn" else sys.executable
        command = [python, __file__, "--one", name, "--threads", str(threads)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"  {name}: not run ({(done.stderr.strip().splitlines() or ['failed'])[-1][:100]})")
            continue
        took, peak = map(float, done.stdout.split()[-2:])
        found[name] = took, peak
        first = found["mossformer-s"]
        ratio = f", time {took / first[0]:.2f} x and memory {peak / first[1]:.2f} x MossFormer-S"
        print(f"  {name}: {took:.0f} ms, real-time factor {took / 4000:.2f}, {peak:.0f} MB above the weights{ratio}")


def voice(pitch: float, formant: float, seconds: float, seed: int) -> np.ndarray:
    """A buzzing voice with a random slow envelope."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(seconds * RATE)) / RATE
    phase = 2 * np.pi * np.cumsum(pitch * (1 + 0.03 * np.sin(2 * np.pi * 3 * t + seed))) / RATE
    harmonics = np.arange(1, int(3600 / pitch))
    weights = 1 / (1 + ((harmonics * pitch - formant) / 400) ** 2) + 0.05
    sound = sum(w * np.sin(h * phase + rng.uniform(0, 6)) for h, w in zip(harmonics, weights))
    knots = np.arange(0, seconds + 1, 0.15)
    sound = sound * np.interp(t, knots, rng.uniform(0.1, 1, len(knots)))
    return (0.1 * sound / np.sqrt(np.mean(sound**2))).astype(np.float32)


def conversation(minutes: float = 10) -> np.ndarray:
    """Two voices in turns of 20 s alone, every third turn overlapped by the other, pauses of 8 s: (2, n)."""
    total = int(minutes * 60 * RATE)
    sources = np.zeros((2, total), dtype=np.float32)
    at, turn = 0, 0
    while at < total:
        for who, length in ((turn % 2, 20), (1 - turn % 2, 6 if turn % 3 == 0 else 0)):
            sound = voice((110, 210)[who], (600, 1500)[who], length, 2 * turn + who) if length else np.zeros(0)
            stop = min(at + len(sound), total)
            sources[who, at:stop] = sound[: stop - at]
        at, turn = at + 28 * RATE, turn + 1
    return sources


class RandomOrder:
    """The true voices of a window of the mixture, the order drawn anew each time."""

    def __init__(self, sources: np.ndarray, seed: int = 0):
        self.sources, self.mix = sources, sources.sum(0)
        self.rng = np.random.default_rng(seed)

    def __call__(self, window: np.ndarray) -> np.ndarray:
        order = self.rng.permutation(2)
        if not window.any():
            return np.zeros((2, len(window)), dtype=np.float32)
        k = int(np.abs(window).argmax())
        for at in np.flatnonzero(self.mix == window[k]) - k:
            a, b = max(at, 0), min(at + len(window), len(self.mix))
            if np.array_equal(self.mix[a:b], window[a - at : b - at]):
                out = np.zeros((2, len(window)), dtype=np.float32)
                out[:, a - at : b - at] = self.sources[:, a:b]
                return out[order]
        raise RuntimeError("a window that is no part of the mixture")


def count_swaps(tracks: np.ndarray, sources: np.ndarray) -> int:
    """Times a voice that speaks changes from one track to the other, on blocks of 2 s."""
    where: dict[int, list[int]] = {0: [], 1: []}
    for a in range(0, sources.shape[1] - 2 * RATE, 2 * RATE):
        for k, piece in enumerate(sources[:, a : a + 2 * RATE]):
            if np.square(piece).mean() > 1e-5:
                where[k].append(int(np.argmin([np.square(t[a : a + 2 * RATE] - piece).sum() for t in tracks])))
    return sum(a != b for homes in where.values() for a, b in pairwise(homes))


def swaps(asteroid: str | None) -> None:
    from nearfar.audio.separation.windows import separate_samples

    sources = conversation()
    print("\nspeaker swaps over 10 minutes with 20 s alone, separator that orders its outputs at random")
    tracks, _ = separate_samples(sources.sum(0), RATE, RandomOrder(sources), RATE)
    print(f"  nearfar: {count_swaps(tracks, sources)}")
    command = [asteroid or sys.executable, __file__, "--one", "overlap-add"]
    done = subprocess.run(command, capture_output=True, text=True)
    answer = (done.stderr.strip().splitlines() or ["failed"])[-1][:100] if done.returncode else done.stdout.strip()
    print(f"  asteroid LambdaOverlapAdd, 10 s windows, half overlapped, reordered: {answer}")


def swaps_of_asteroid() -> None:
    from asteroid.dsp.overlap_add import LambdaOverlapAdd

    sources = conversation()
    oracle = RandomOrder(sources)

    def network(x: Tensor) -> Tensor:
        return torch.from_numpy(np.stack([oracle(item.reshape(-1).numpy()) for item in x]))

    size = 10 * RATE
    added = LambdaOverlapAdd(network, 2, size, size // 2, window="boxcar", reorder_chunks=True, enable_grad=False)
    out = added(torch.from_numpy(sources.sum(0))[None, None])[0].numpy()
    print(count_swaps(out, sources))


def memory_once(minutes: float) -> None:
    """In a process of its own: peak memory of separating so long a recording in windows."""
    import tempfile

    from nearfar.audio.separation.mossformer import MossFormer
    from nearfar.audio.separation.windows import model_separator, separate_recording

    class Noise:
        rate, frames = RATE, int(minutes * 60 * RATE)

        def read(self, start: int, stop: int) -> np.ndarray:
            t = np.arange(start, stop) / RATE
            return (0.1 * np.sin(2 * np.pi * 150 * t) * (1 + np.sin(t)) + 0.05 * np.sin(9 * t)).astype(np.float32)

    torch.manual_seed(0)
    torch.set_num_threads(1)
    separate = model_separator(MossFormer(num_filters=32, dim=32, depth=1, query_key_dim=16))
    with tempfile.TemporaryDirectory() as scratch:
        for _ in separate_recording(Noise(), separate, RATE, scratch).blocks():
            pass
    print(resident(peak=True))


def memory() -> None:
    peaks = []
    for minutes in (1, 10):
        command = [sys.executable, __file__, "--minutes", str(minutes)]
        peaks.append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    print("\npeak memory of separating in windows, everything included")
    print(f"  1 minute {peaks[0]:.0f} MB, 10 minutes {peaks[1]:.0f} MB, ratio {peaks[1] / peaks[0]:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="operators,models,swaps,memory")
    parser.add_argument("--asteroid", help="Python interpreter of an environment with asteroid.")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--minutes", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one == "overlap-add":
        return swaps_of_asteroid()
    if options.one:
        return model_once(options.one, options.threads)
    if options.minutes:
        return memory_once(options.minutes)
    torch.set_num_threads(options.threads)
    parts = {
        "operators": operators,
        "models": lambda: models(options.threads, options.asteroid),
        "swaps": lambda: swaps(options.asteroid),
        "memory": memory,
    }
    for name in options.only.split(","):
        parts[name]()
    return None


if __name__ == "__main__":
    main()
