"""Time and memory of every sequence mixer against length, beside its peers, in one run.

    python benchmarks/mixers.py --lengths 256,512,1024,2048 --json mixers.json

Forward and backward of one mixer at `--dim` over the lengths: milliseconds, microseconds per token, the exponent e of
time ~ length^e fitted over the upper half of the lengths, and memory per token: the peak on CUDA, on a CPU what the
forward pass keeps for the backward one. Peers: torch's
MultiheadAttention, transformers' Mamba and RWKV mixers where they run, and the plain recurrences (one step after the
other) of Based, H3, Mamba and RWKV-4. `--models` compares whole Mamba models (hidden 256, 4 layers) instead.
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

from nearfar.language.modeling import MixerConfig, MixerForCausalLM
from nearfar.ops.attention.causal import CausalAttention
from nearfar.ops.convolution.base_conv import BaseConv
from nearfar.ops.convolution.hyena import Hyena
from nearfar.ops.recurrence.based import Based
from nearfar.ops.recurrence.h3 import H3
from nearfar.ops.recurrence.mamba import Mamba
from nearfar.ops.recurrence.retnet import Retention
from nearfar.ops.recurrence.rwkv4 import RWKV4TimeMix


class StepByStep(nn.Module):
    """A mixer run as a plain recurrence, one position after the other."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor) -> Tensor:
        state, out = None, []
        for token in x.split(1, 1):
            y, state = self.mixer.extend(token, state)
            out.append(y)
        return torch.cat(out, 1)


class MambaLoop(Mamba):
    """Mamba's selective scan as written in the paper: a loop over positions on materialised decays."""

    def forward(self, x: Tensor) -> Tensor:
        u, z = self.in_proj(x).chunk(2, -1)
        u = F.silu(self.conv(u))
        r, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], -1)
        dt = F.softplus(self.dt_proj(r))
        a = torch.exp(dt[..., None] * -torch.exp(self.A_log))
        b = (dt * u)[..., None] * B[:, :, None]
        h, out = torch.zeros_like(a[:, 0]), []
        for t in range(x.shape[1]):
            h = a[:, t] * h + b[:, t]
            out.append((h @ C[:, t, :, None]).squeeze(-1))
        return self.out_proj((torch.stack(out, 1) + self.D * u) * F.silu(z))


class RWKVLoop(RWKV4TimeMix):
    """RWKV-4's time mixing with a loop over positions and a running maximum."""

    def forward(self, x: Tensor) -> Tensor:
        late = F.pad(x[:, :-1], (0, 0, 1, 0))
        mixed = [torch.lerp(late, x, m) for m in (self.mix_k, self.mix_v, self.mix_r)]
        k, v, r = self.key(mixed[0]), self.value(mixed[1]), torch.sigmoid(self.receptance(mixed[2]))
        w, u = -torch.exp(self.time_decay), self.time_first
        top = bottom = torch.zeros_like(k[:, 0])
        largest, out = torch.full_like(top, -1e38), []
        for t in range(x.shape[1]):
            m = torch.maximum(largest, u + k[:, t])
            a, b = torch.exp(largest - m), torch.exp(u + k[:, t] - m)
            out.append((a * top + b * v[:, t]) / (a * bottom + b))
            m = torch.maximum(largest + w, k[:, t])
            a, b = torch.exp(largest + w - m), torch.exp(k[:, t] - m)
            top, bottom, largest = a * top + b * v[:, t], a * bottom + b, m
        return self.output(r * torch.stack(out, 1))


class BasedLinear(Based):
    """Based's linear view: the outer products of all positions, summed up."""

    def forward(self, x: Tensor) -> Tensor:
        from nearfar.ops.recurrence.based import taylor_features

        q, k, v, _ = self.heads(x)
        q, k = taylor_features(q), taylor_features(k)
        sums = (k[..., None, :] * v[..., None]).cumsum(2)
        y = (sums @ q[..., None]).squeeze(-1) / ((q * k.cumsum(2)).sum(-1, keepdim=True) + self.eps)
        return self.output(y, x)


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

    model = RwkvModel(RwkvConfig(hidden_size=dim, num_hidden_layers=1, vocab_size=8, attention_hidden_size=dim))
    return model.blocks[0].attention


def mixers(dim: int, longest: int) -> dict[str, tuple[Callable[[], nn.Module], int]]:
    """Name -> how to make it, and the longest length it is run at (loops take minutes beyond)."""
    ours = {
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
    peers = {
        "torch MultiheadAttention": lambda: TorchAttention(dim, 4),
        "transformers mamba": lambda: transformers_mamba(dim),
        "transformers rwkv": lambda: transformers_rwkv(dim),
        "based, linear view": lambda: BasedLinear(dim, num_heads=4, feature_dim=16),
        "h3, step by step": lambda: StepByStep(H3(dim, d_state=64)),
        "mamba, loop": lambda: MambaLoop(dim),
        "rwkv4, loop": lambda: RWKVLoop(dim),
    }
    limits = {"torch MultiheadAttention": 4096, "based, linear view": 512}
    return {name: (make, longest) for name, make in ours.items()} | {
        name: (make, limits.get(name, 2048)) for name, make in peers.items()
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


def best_ms(run: Callable[[], object], device: str, seconds: float = 1.0) -> float:
    """The shortest of several runs in milliseconds, after one to warm up."""
    sync = torch.cuda.synchronize if device == "cuda" else lambda: None
    run()
    sync()
    times, end = [], time.perf_counter() + seconds
    while not times or (time.perf_counter() < end and len(times) < 20):
        start = time.perf_counter()
        run()
        sync()
        times.append(time.perf_counter() - start)
    return min(times) * 1e3


def measure(module: nn.Module, x: Tensor, device: str) -> dict[str, float]:
    """Forward without gradients, forward and backward with them, and bytes per token (see the top of this file)."""

    def output() -> Tensor:
        y = module(x)
        return y[0] if isinstance(y, tuple) else y

    def forward() -> None:
        with torch.no_grad():
            output()

    def both() -> None:
        module.zero_grad()
        output().square().sum().backward()

    result = {"forward_ms": best_ms(forward, device), "both_ms": best_ms(both, device)}
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


def compare_models(lengths: list[int], device: str) -> list[dict[str, object]]:
    """Whole Mamba models, ours and transformers'."""
    from transformers import MambaConfig, MambaForCausalLM

    ours = MixerForCausalLM(
        MixerConfig(hidden_size=256, num_hidden_layers=4, mixers=["mamba"], state_mixer="none", norm="rmsnorm")
    )
    theirs = MambaForCausalLM(MambaConfig(vocab_size=256, hidden_size=256, num_hidden_layers=4, state_size=16))
    rows = []
    for n in lengths:
        ids = torch.randint(256, (1, n), device=device)
        row: dict[str, object] = {"length": n}
        for name, model in (("ours", ours.to(device)), ("transformers", theirs.to(device))):
            if name == "transformers" and n > 2048:
                continue

            def forward(model: nn.Module = model, ids: Tensor = ids) -> None:
                with torch.no_grad():
                    model(ids, use_cache=False)

            def step(model: nn.Module = model, ids: Tensor = ids) -> None:
                model.zero_grad()
                model(ids, labels=ids, use_cache=False).loss.backward()

            row[f"{name} forward_ms"] = best_ms(forward, device)
            if n <= 512 or name == "ours":
                row[f"{name} step_ms"] = best_ms(step, device)
        for part in ("forward_ms", "step_ms"):
            if f"transformers {part}" in row:
                row[f"{part} ratio"] = row[f"transformers {part}"] / row[f"ours {part}"]  # type: ignore[operator]
        rows.append(row)
        print(row, flush=True)
    if len(lengths) > 1:
        print("ours, exponent of forward:", round(exponent(lengths, [r["ours forward_ms"] for r in rows]), 2))  # type: ignore[misc]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--lengths", default="256,512,1024,2048,4096,8192,16384")
    parser.add_argument("--only", default="", help="part of the names to run")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", action="store_true", help="whole Mamba models instead of single mixers")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    lengths = [int(n) for n in options.lengths.split(",")]
    torch.manual_seed(0)
    if options.models:
        rows = compare_models(lengths, options.device)
    else:
        rows = []
        for name, (make, longest) in mixers(options.dim, max(lengths)).items():
            if options.only not in name:
                continue
            module, found = make().to(options.device), []
            for n in (n for n in lengths if n <= longest):
                x = torch.randn(1, n, options.dim, device=options.device)
                found.append({"mixer": name, "length": n, **measure(module, x, options.device)})
                last = found[-1]
                print(
                    f"{name:26s} {n:6d}  forward {last['forward_ms']:9.2f} ms  both {last['both_ms']:9.2f} ms  "
                    f"{1e3 * last['both_ms'] / n:8.2f} us/token  {last['bytes_per_token'] / 1024:8.1f} KiB/token",
                    flush=True,
                )
            tried = [row["length"] for row in found]
            print(f"{name:26s} exponent  {exponent(tried, [row['both_ms'] for row in found]):.2f}", flush=True)
            rows += found
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
