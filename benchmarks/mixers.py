"""Time and memory of every sequence mixer against its length, and beside other implementations, in one run each.

    python benchmarks/mixers.py mixers       # our mixers, L = 256 ... 16384
    python benchmarks/mixers.py references   # plain forms, fla's naive forms, torch and transformers, L = 256 ... 2048
    python benchmarks/mixers.py models       # Mamba with a head: hidden 256, 4 layers, state 16
    python benchmarks/mixers.py streaming    # one token after a state that has read L tokens

One sequence of width `--dim` at a time; the shortest of several runs counts; on a CPU one thread's processor time, so
that other work on the machine disturbs little. "forward" is without gradients, "both" a forward and a backward pass.
Memory is the peak on CUDA, on a CPU what the forward pass keeps for the backward one. The exponent e of
time ~ length^e is fitted over the upper half of the lengths.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nearfar.language.configuration import MixerConfig
from nearfar.language.modeling import MixerForCausalLM
from nearfar.ops.attention.causal import CausalAttention
from nearfar.ops.convolution.base_conv import BaseConv
from nearfar.ops.convolution.hyena import Hyena
from nearfar.ops.recurrence.based import Based, taylor_features
from nearfar.ops.recurrence.h3 import H3
from nearfar.ops.recurrence.mamba import Mamba
from nearfar.ops.recurrence.retnet import Retention
from nearfar.ops.recurrence.rwkv4 import RWKV4TimeMix


class MambaLoop(Mamba):
    """The selective scan as a loop over positions on materialized decays."""

    def forward(self, x: Tensor) -> Tensor:
        u, z = self.in_proj(x).chunk(2, -1)
        u = F.silu(self.conv(u))
        r, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], -1)
        dt = F.softplus(self.dt_proj(r))
        a = torch.exp(dt[..., None] * -torch.exp(self.A_log))
        b = (dt * u)[..., None] * B[:, :, None]
        h, states = torch.zeros_like(a[:, 0]), []
        for decay, push in zip(a.unbind(1), b.unbind(1)):
            h = decay * h + push
            states.append(h)
        y = (torch.stack(states, 1) @ C[..., None]).squeeze(-1)
        return self.out_proj((y + self.D * u) * F.silu(z))


class RWKVLoop(RWKV4TimeMix):
    """Time mixing as a loop over positions with a running maximum."""

    def forward(self, x: Tensor) -> Tensor:
        late = F.pad(x[:, :-1], (0, 0, 1, 0))
        mixed = [torch.lerp(late, x, m) for m in (self.mix_k, self.mix_v, self.mix_r)]
        k, v, r = self.key(mixed[0]), self.value(mixed[1]), torch.sigmoid(self.receptance(mixed[2]))
        w, u = -torch.exp(self.time_decay), self.time_first
        top = bottom = torch.zeros_like(k[:, 0])
        largest, out = torch.full_like(top, -1e38), []
        for key, value in zip(k.unbind(1), v.unbind(1)):
            m = torch.maximum(largest, u + key)
            a, b = torch.exp(largest - m), torch.exp(u + key - m)
            out.append((a * top + b * value) / (a * bottom + b))
            m = torch.maximum(largest + w, key)
            a, b = torch.exp(largest + w - m), torch.exp(key - m)
            top, bottom, largest = a * top + b * value, a * bottom + b, m
        return self.output(r * torch.stack(out, 1))


class BasedLinear(Based):
    """The linear view: the outer products of all positions, summed up."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, _ = self.heads(x)
        q, k = taylor_features(q), taylor_features(k)
        sums = (k[..., None, :] * v[..., None]).cumsum(2)
        y = (sums @ q[..., None]).squeeze(-1) / ((q * k.cumsum(2)).sum(-1, keepdim=True) + self.eps)
        return self.output(y, x)


class H3Plain(H3):
    """The kernel from all powers of all modes, and transforms of 2 N."""

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        log_A, C = self.diagonal.discrete()
        taps = 2 * (C[..., None] * torch.exp(log_A[..., None] * torch.arange(n))).sum(1).real
        k = self.k_proj(x)
        shift = F.pad(self.shift.taps()[:, :n], (0, max(0, n - self.d_state)))
        k = self.D_k * k + self.convolve(k.transpose(1, 2), shift).transpose(1, 2)
        kv = self.products(k, x)
        y = self.convolve(kv, taps[:, None, None]) + self.D[:, None, None, None] * kv
        return self.output(x, y)

    @staticmethod
    def convolve(x: Tensor, taps: Tensor) -> Tensor:
        n = x.shape[-1]
        return torch.fft.irfft(torch.fft.rfft(x, n=2 * n) * torch.fft.rfft(taps, n=2 * n), n=2 * n)[..., :n]


class NaiveBased(Based):
    """fla's naive quadratic form between our maps."""

    def forward(self, x: Tensor) -> Tensor:
        from fla.ops.based.naive import naive_parallel_based

        return self.output(naive_parallel_based(*self.heads(x)[:3]), x)


class NaiveRetention(Retention):
    """fla's naive quadratic form between our maps."""

    def retain(self, q: Tensor, k: Tensor, v: Tensor, memory: Tensor, rate: Tensor) -> Tensor:
        from fla.ops.retention.naive import naive_retention

        return naive_retention(q * q.shape[-1] ** 0.5, k, v)


class TorchAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        return self.attention(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]


def transformers_mamba(dim: int) -> nn.Module:
    from transformers import MambaConfig, MambaModel

    return MambaModel(MambaConfig(hidden_size=dim, num_hidden_layers=1, vocab_size=8)).layers[0].mixer


def transformers_rwkv(dim: int) -> nn.Module:
    from transformers import RwkvConfig, RwkvModel

    model = RwkvModel(RwkvConfig(hidden_size=dim, num_hidden_layers=2, vocab_size=8, attention_hidden_size=dim))
    return model.blocks[0].attention


def our_mixers(dim: int, longest: int) -> dict[str, Callable[[], nn.Module]]:
    return {
        "attention": lambda: CausalAttention(dim, num_heads=4),
        "sliding-attention 64": lambda: CausalAttention(dim, num_heads=4, window=64),
        "base-conv 3": lambda: BaseConv(dim, 3),
        "base-conv long": lambda: BaseConv(dim, -1, max_length=longest),
        "based": lambda: Based(dim, num_heads=4, feature_dim=16),
        "hyena": lambda: Hyena(dim, max_length=longest),
        "h3": lambda: H3(dim, d_state=64),
        "mamba": lambda: Mamba(dim),
        "retnet": lambda: Retention(dim, num_heads=4),
        "rwkv4": lambda: RWKV4TimeMix(dim),
    }


def references(dim: int) -> dict[str, dict[str, Callable[[], nn.Module]]]:
    """Our mixer -> other implementations of it."""
    return {
        "attention": {"torch MultiheadAttention": lambda: TorchAttention(dim, 4)},
        "based": {
            "linear view": lambda: BasedLinear(dim, num_heads=4, feature_dim=16),
            "fla naive": lambda: NaiveBased(dim, num_heads=4, feature_dim=16),
        },
        "h3": {"plain": lambda: H3Plain(dim, d_state=64)},
        "mamba": {"loop": lambda: MambaLoop(dim), "transformers": lambda: transformers_mamba(dim)},
        "retnet": {"fla naive": lambda: NaiveRetention(dim, num_heads=4)},
        "rwkv4": {"loop": lambda: RWKVLoop(dim), "transformers": lambda: transformers_rwkv(dim)},
    }


def kept_bytes(module: nn.Module, x: Tensor) -> int:
    """Bytes that the forward pass keeps for the backward one, parameters and input left out."""
    known = {t.untyped_storage().data_ptr() for t in (x, *module.parameters(), *module.buffers())}
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = module(x)  # noqa: F841 - holds the graph, so that no storage is used twice
    return sum(sizes.values())


def best_ms(run: Callable[[], object], device: str, seconds: float = 0.4, least: int = 2) -> float:
    """The shortest of several runs in milliseconds, after one to warm up."""
    sync = torch.cuda.synchronize if device == "cuda" else lambda: None
    clock = time.perf_counter if device == "cuda" else time.process_time
    run()
    sync()
    times, end = [], clock() + seconds
    while len(times) < least or (clock() < end and len(times) < 100):
        start = clock()
        run()
        sync()
        times.append(clock() - start)
    return min(times) * 1e3


def measure(module: nn.Module, x: Tensor, device: str, train: bool = True) -> dict[str, float]:
    """Milliseconds forward and, with `train`, of both passes, and bytes per token (see the top of this file)."""

    def output() -> Tensor:
        y = module(x)
        return y[0] if isinstance(y, tuple) else y

    def forward() -> None:
        with torch.no_grad():
            output()

    def both() -> None:
        module.zero_grad()
        output().square().sum().backward()

    result = {"forward_ms": best_ms(forward, device)}
    if not train:
        return result
    result["both_ms"] = best_ms(both, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        both()
        size = torch.cuda.max_memory_allocated() - start
    else:
        size = kept_bytes(module, x)
    return result | {"bytes_per_token": size / (x.shape[0] * x.shape[1])}


def exponent(lengths: list[int], times: list[float]) -> float:
    """The slope of log time over log length, over the upper half of the lengths."""
    points = list(zip(lengths, times))[-max(2, (len(lengths) + 1) // 2) :]
    if len(points) < 2:
        return float("nan")
    x, y = [math.log(n) for n, _ in points], [math.log(t) for _, t in points]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / sum((a - mean_x) ** 2 for a in x)


def run_mixers(options: argparse.Namespace) -> list[dict[str, object]]:
    lengths, rows = options.lengths or [256, 512, 1024, 2048, 4096, 8192, 16384], []
    for name, make in our_mixers(options.dim, max(lengths)).items():
        if options.only not in name:
            continue
        module, found = make().to(options.device), []
        for n in lengths:
            x = torch.randn(1, n, options.dim, device=options.device)
            found.append({"mixer": name, "length": n, **measure(module, x, options.device)})
            last = found[-1]
            print(
                f"{name:22s} {n:6d}  forward {last['forward_ms']:9.2f} ms  both {last['both_ms']:9.2f} ms  "
                f"{1e3 * last['both_ms'] / n:8.2f} us/token  {last['bytes_per_token'] / 1024:7.1f} KiB/token",
                flush=True,
            )
        forward, both = (exponent(lengths, [row[part] for row in found]) for part in ("forward_ms", "both_ms"))
        print(f"{name:22s} exponent forward {forward:.2f}, both {both:.2f}", flush=True)
        rows += found
    return rows


def run_references(options: argparse.Namespace) -> list[dict[str, object]]:
    """Both passes only to 512: backward through a loop over 2048 positions takes minutes in transformers' Mamba."""
    lengths, rows = options.lengths or [256, 512, 1024, 2048], []
    for name, others in references(options.dim).items():
        if options.only not in name:
            continue
        modules = {"ours": our_mixers(options.dim, max(lengths))[name]()}
        for other, make in others.items():
            try:
                modules[other] = make()
            except ImportError as error:
                print(f"{name}, {other}: needs {error.name}")
        for n in lengths:
            x = torch.randn(1, n, options.dim, device=options.device)
            for other, module in modules.items():
                found = measure(module.to(options.device), x, options.device, train=n <= 512)
                rows.append({"mixer": name, "form": other, "length": n, **found})
                ours = next(r for r in rows if (r["mixer"], r["form"], r["length"]) == (name, "ours", n))
                shown = "  ".join(
                    f"{part} {found[f'{part}_ms']:8.2f} ms ({found[f'{part}_ms'] / ours[f'{part}_ms']:6.1f}x)"
                    for part in ("forward", "both")
                    if f"{part}_ms" in found
                )
                print(f"{name:10s} {other:25s} {n:5d}  {shown}", flush=True)
    return rows


def run_models(options: argparse.Namespace) -> list[dict[str, object]]:
    """Whole Mamba models; transformers' is run forward to 2048 and trained at 512 only."""
    from transformers import MambaConfig, MambaForCausalLM

    lengths, rows = options.lengths or [512, 1024, 2048, 4096, 8192], []
    ours = MixerForCausalLM(
        MixerConfig(hidden_size=256, num_hidden_layers=4, mixers=["mamba"], state_mixer="none", norm="rmsnorm")
    )
    theirs = MambaForCausalLM(MambaConfig(vocab_size=256, hidden_size=256, num_hidden_layers=4, state_size=16))
    models = {"ours": ours.to(options.device), "transformers": theirs.to(options.device)}
    for n in lengths:
        ids = torch.randint(256, (1, n), device=options.device)
        row: dict[str, object] = {"length": n}
        for name, model in models.items():

            def forward(model: nn.Module = model, ids: Tensor = ids) -> None:
                with torch.no_grad():
                    model(ids, use_cache=False)

            def step(model: nn.Module = model, ids: Tensor = ids) -> None:
                model.zero_grad()
                model(ids, labels=ids, use_cache=False).loss.backward()

            if name == "ours" or n <= 2048:
                row[f"{name} forward"] = best_ms(forward, options.device, 2.0)
            if name == "ours" or n == 512:
                row[f"{name} step"] = best_ms(step, options.device, least=1)
        rows.append(row)
        print(f"{n:6d}  " + "  ".join(f"{k} {v:8.1f} ms" for k, v in row.items() if k != "length"), end="")
        for part in ("forward", "step"):
            if f"transformers {part}" in row:
                ratio = row[f"transformers {part}"] / row[f"ours {part}"]  # type: ignore[operator]
                print(f"  {part} {ratio:.1f}x", end="")
        print(flush=True)
    for part in ("forward", "step"):
        print(f"ours, exponent of {part}: {exponent(lengths, [r[f'ours {part}'] for r in rows]):.2f}")  # type: ignore[misc]
    return rows


def run_streaming(options: argparse.Namespace) -> list[dict[str, object]]:
    lengths, rows = options.lengths or [256, 1024, 4096, 16384], []
    for name, make in our_mixers(options.dim, max(lengths) + 1).items():
        if options.only not in name:
            continue
        mixer, times = make().to(options.device).eval(), []
        for n in lengths:
            with torch.no_grad():
                _, state = mixer.extend(torch.randn(1, n, options.dim, device=options.device))
                token = torch.randn(1, 1, options.dim, device=options.device)
                times.append(best_ms(lambda m=mixer, t=token, s=state: m.extend(t, s), options.device))  # type: ignore[misc]
            rows.append({"mixer": name, "length": n, "step_ms": times[-1]})
        shown = "  ".join(f"{n}: {t:7.3f} ms" for n, t in zip(lengths, times))
        print(f"{name:22s} {shown}  last/first {times[-1] / times[0]:.1f}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"mixers": run_mixers, "references": run_references, "models": run_models, "streaming": run_streaming}
    parser.add_argument("part", choices=list(parts))
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--lengths", type=lambda text: [int(n) for n in text.split(",")], help="such as 256,512")
    parser.add_argument("--only", default="", help="part of the mixers' names")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows = parts[options.part](options)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
