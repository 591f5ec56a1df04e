"""Long sequences: the convolutions of TCNCA against Mega's average, whole blocks, and attention residuals' overhead.

    uv run python benchmarks/long_sequences.py              # 2k .. 32k on a CPU, .. 131k on a GPU
    uv run python benchmarks/long_sequences.py --short      # fewer lengths and repeats
    uv run python benchmarks/long_sequences.py --only blocks residuals

Paper, on a GPU (TCNCA, arXiv 2312.05605): convolutions up to 7.07 (forward) and 2.86 (backward) times as fast as the
average by FFT, to 131k; the enwik8 model 1.37 and 1.24 times. Times are the best of several, on a CPU the
processor time of one thread; parameter counts are equal to a few percent. Growth is the exponent e of
time ~ L^e fitted over the lengths. glibc gives freed tensors of 32 MB and more back at once, and to fault the
next ones in took half to two thirds of the time at 32k; here it keeps them, as MALLOC_MMAP_MAX_=0 and
MALLOC_TRIM_THRESHOLD_=9000000000000000000 do for any program, at the price of memory that other programs miss.
"""

import argparse
import ctypes
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn

from nearfar.language.cache import MixerCache
from nearfar.language.mixers.tcnca import mega, tcnca
from nearfar.language.modeling import MixerConfig, MixerForCausalLM
from nearfar.ops.convolution.tcn import TCNMixer
from nearfar.ops.recurrence.ema import DampedEMA

DECODED = 4  # tokens a time
DIM, KERNEL = 512, 20  # 20 taps, 3 layers: 512 (3 (20 + 1) + 1) parameters, as the average's 512 (4 * 16 + 1)


def keep_freed_memory() -> None:
    """No block of its own for a large tensor, nothing given back to the system: mallopt(3)."""
    if sys.platform == "linux":
        trim_threshold, mmap_max = -1, -4
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)


def best(run: Callable[[], object], repeats: int, device: str) -> float:
    return min([timed(run, device) for _ in range(repeats + 1)][1:])  # the first one warms up


def forward_and_backward(module: nn.Module, x: Tensor, repeats: int) -> tuple[float, float]:
    """Seconds of a forward pass without gradients, and of the backward pass alone."""
    device = x.device.type
    with torch.no_grad():
        forward = best(lambda: module(x), repeats, device)
    x = x.clone().requires_grad_()
    times = []
    for _ in range(repeats + 1):
        y = module(x).sum()
        times.append(timed(y.backward, device))
    return forward, min(times[1:])


def timed(run: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    clock = time.perf_counter if device == "cuda" else time.process_time  # of one thread, whatever else runs beside it
    start = clock()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def growth(lengths: list[int], seconds: list[float]) -> float:
    x, y = ([math.log(v) for v in values] for values in (lengths, seconds))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / sum((a - mean_x) ** 2 for a in x)


def compare(title: str, modules: dict[str, nn.Module], lengths: list[int], repeats: int, device: str) -> None:
    print(f"\n{title}: milliseconds forward, backward")
    for name, module in modules.items():
        print(f"  {name}: {sum(p.numel() for p in module.parameters()):,} parameters")
    names, taken = list(modules), {name: [] for name in modules}
    print(f"{'length':>8}" + "".join(f"{name:>26}" for name in names) + f"{'ratio':>16}")
    for length in lengths:
        x = torch.randn(1, length, DIM, device=device)
        row = [forward_and_backward(module, x, repeats) for module in modules.values()]
        for name, times in zip(names, row):
            taken[name].append(times)
        cells = "".join(f"{1000 * a:>15.1f}{1000 * b:>11.1f}" for a, b in row)
        print(f"{length:>8}{cells}{row[0][0] / row[1][0]:>9.2f}{row[0][1] / row[1][1]:>7.2f}")
    if len(lengths) > 1:
        for name in names:
            exponents = [growth(lengths, [t[i] for t in taken[name]]) for i in (0, 1)]
            print(f"  {name}: time grows as L^{exponents[0]:.2f} forward, L^{exponents[1]:.2f} backward")


def step(model: nn.Module, ids: Tensor) -> None:
    model(ids, labels=ids).loss.backward()
    model.zero_grad()


def decode(model: nn.Module, ids: Tensor, cache: MixerCache) -> None:
    for _ in range(DECODED):
        model(ids, past_key_values=cache)


def overhead(repeats: int, device: str) -> None:
    """Training step and decoding of 12 layers, d = 512, with and without attention residuals of 6 sub-layers."""
    settings = {
        "vocab_size": 256,
        "hidden_size": DIM,
        "num_hidden_layers": 12,
        "mixers": [{"type": "rotary-attention", "num_heads": 8}],
        "state_mixer": {"type": "glu", "activation": "silu", "hidden": 1536},
        "norm": "rmsnorm",
    }
    ids = torch.randint(256, (2 if device == "cpu" else 16, 256), device=device)
    print("\nattention residuals, 12 layers, d = 512, S = 6")
    residual = {"type": "attention", "block_size": 6}
    models = {
        name: MixerForCausalLM(MixerConfig(**settings, residual=kind)).to(device)
        for name, kind in (("plain", "plain"), ("depth", residual))
    }
    beside("a training step", lambda name: partial(step, models[name].train(), ids), repeats, 1, device)
    for texts, length in ((1, 128), (1, 4096), (32, 128)):
        ids = torch.randint(256, (texts, length), device=device)
        with torch.no_grad():
            read = {name: model.eval()(ids, use_cache=True).past_key_values for name, model in models.items()}
            what = f"a decoded token after {length}{f', {texts} texts at once' if texts > 1 else ''}"
            last = ids[:, :1]
            prepare = lambda name, last=last, read=read: partial(decode, models[name], last, read[name].copy())  # noqa: E731
            beside(what, prepare, 8 * repeats, DECODED, device)


def beside(what: str, prepare: Callable[[str], Callable[[], None]], pairs: int, unit: int, device: str) -> None:
    """Times in turns and in both orders, so that both meet the same machine; the first pair warms up."""
    times: dict[str, list[float]] = {"plain": [], "depth": []}
    for i in range(pairs + 1):
        for name in sorted(times, reverse=i % 2 == 0):
            run = prepare(name)
            times[name].append(timed(run, device) / unit)
    plain, depth = (found[1:] for found in times.values())
    ratios = sorted(100 * (b / a - 1) for a, b in zip(plain, depth))
    quarter = len(ratios) // 4
    print(
        f"  milliseconds of {what}: plain {1000 * min(plain):.1f}, depth {1000 * min(depth):.1f}; overhead, median of "
        f"{pairs} pairs {median(ratios):.1f} %, middle half {ratios[quarter]:.1f} to {ratios[-1 - quarter]:.1f} %"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="two lengths, two repeats")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parts = ("fft", "scan", "blocks", "residuals")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="of these tables")
    chosen = parser.parse_args()
    device, repeats = chosen.device, 2 if chosen.short else chosen.repeats
    lengths = [2048, 8192] if chosen.short else [2048, 4096, 8192, 16384, 32768]
    if device == "cuda" and not chosen.short:
        lengths += [65536, 131072]
    keep_freed_memory()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, float32, d = {DIM}, batch 1")
    tcn = TCNMixer(DIM, KERNEL, KERNEL, 3)
    print(f"the average sees everything; the convolutions see {tcn.receptive_field} positions")
    memories = {"average by FFT": DampedEMA(DIM), "average by scan": DampedEMA(DIM, form="scan"), "convolutions": tcn}
    for part, other in (("fft", "average by FFT"), ("scan", "average by scan")):
        if part not in chosen.only:
            continue
        pair = {other: memories[other].to(device), "convolutions": memories["convolutions"].to(device)}
        compare(f"long memory, {other} against convolutions", pair, lengths, repeats, device)
    sizes = {"attention_dim": 128, "value_dim": 1024, "chunk": 2048}
    blocks = {"mega": mega(DIM, **sizes).to(device), "tcnca": tcnca(DIM, KERNEL, KERNEL, 3, **sizes).to(device)}
    if "blocks" in chosen.only:
        compare("one layer of the enwik8 base model", blocks, lengths[:3], repeats, device)
    if "residuals" in chosen.only:
        overhead(repeats, device)


if __name__ == "__main__":
    main()
