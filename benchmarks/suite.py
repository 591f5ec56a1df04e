"""Every system's time and memory in one command, beside a peer with the same weights where there is one.

    python benchmarks/suite.py OUTPUT [--only hyena attnet] [--threads 1 2] [--compile] [--repeats 7]
    python benchmarks/suite.py OUTPUT --tables      # the tables in the READMEs from OUTPUT/suite.json, nothing is run

Peers are other packages' models (timm, transformers, pydensecrf2) where they hold the same one, else the published
formulation in plain PyTorch (`plain.py`); speechbrain and MONAI hold none of them. Outputs are compared before
anything is timed. The two take turns, changing who is first; processor time counts, so that other work on the
machine disturbs little. "factor" is the median of peer / ours over the pairs (above 1: ours is faster), in brackets
the range from the first to the last decile. Memory is what a call adds at most, in tensors alive at once. OUTPUT gets
`suite.html` and `suite.json`, in which a run replaces the rows that it measures: those of `--compile` (inference alone;
to compile a row takes minutes) and of other numbers of threads stand beside the others. pydensecrf2 is left out where
it is not installed.
"""

import argparse
import importlib.util
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import transformers
from crf import problem as photograph
from plain import plain
from torch import Tensor, nn
from transformers.models.rwkv.modeling_rwkv import RwkvSelfAttention

from nearfar.audio.separation.mossformer import create_model as create_mossformer
from nearfar.audio.speakers.ltdnn import LAP, LTDNN
from nearfar.core.plots import new_figure, style
from nearfar.core.report import Report
from nearfar.medical.networks import create_network
from nearfar.ops.attention.causal import CausalAttention
from nearfar.ops.attention.position_channel import ChannelAttention, PositionAttention
from nearfar.ops.convolution.base_conv import BaseConv
from nearfar.ops.convolution.hyena import Hyena
from nearfar.ops.graph.dense_crf import DenseCRF
from nearfar.ops.recurrence.based import Based
from nearfar.ops.recurrence.h3 import H3
from nearfar.ops.recurrence.mamba import Mamba
from nearfar.ops.recurrence.retnet import Retention
from nearfar.ops.recurrence.rwkv4 import RWKV4TimeMix
from nearfar.vision.cost import peak_memory
from nearfar.vision.generation.sit import SiT
from nearfar.vision.models.convnext import ConvNeXt
from nearfar.vision.models.registry import MODELS

DIM = 256


class Logits(nn.Module):
    """A transformers model that returns one of its outputs."""

    def __init__(self, model: nn.Module, name: str = "logits") -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self.model(x), self.name)


class First(nn.Module):
    """A model that returns the first of its outputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)[0]


class PyDenseCRF(nn.Module):
    """pydensecrf2 with the weights and deviations that are our defaults."""

    def forward(self, unary: Tensor, image: Tensor) -> Tensor:
        import pydensecrf.densecrf as reference

        _, labels, height, width = unary.shape
        crf = reference.DenseCRF2D(width, height, labels)
        crf.setUnaryEnergy(unary[0].flatten(1).contiguous().numpy())
        crf.addPairwiseGaussian(sxy=1, compat=3)
        picture = image[0].permute(1, 2, 0).byte().contiguous().numpy()
        crf.addPairwiseBilateral(sxy=67, srgb=3, rgbim=picture, compat=4)
        return torch.from_numpy(np.array(crf.inference(10))).view(unary.shape)


Pair = tuple[nn.Module, nn.Module | None]


def beside_plain(make: Callable[[], nn.Module]) -> Callable[[], Pair]:
    def pair() -> Pair:
        ours = make()
        return ours, plain(ours)

    return pair


def convnext(fused: bool) -> Pair:
    peer = timm.create_model("convnext_tiny", ls_init_value=1.0)
    ours = ConvNeXt.from_published(peer.state_dict())
    return (ours.eval().fuse() if fused else ours), peer


def of_timm(name: str, peer: str) -> Callable[[], Pair]:
    def pair() -> Pair:
        theirs = timm.create_model(peer)
        return MODELS[name].from_published(theirs.state_dict()), theirs

    return pair


def cvt() -> Pair:
    theirs = transformers.CvtForImageClassification(transformers.CvtConfig(num_labels=1000))
    return MODELS["cvt_13"].from_published(theirs.state_dict(), activation="gelu"), Logits(theirs)


def mamba() -> Pair:
    config = transformers.MambaConfig(hidden_size=DIM, num_hidden_layers=1, vocab_size=8)
    theirs = transformers.MambaModel(config).layers[0].mixer
    ours = Mamba(DIM)
    ours.load_state_dict({name.replace("conv1d", "conv"): value for name, value in theirs.state_dict().items()})
    return ours, theirs


def rwkv() -> Pair:
    config = transformers.RwkvConfig(hidden_size=DIM, attention_hidden_size=DIM, num_hidden_layers=2, vocab_size=8)
    theirs = RwkvSelfAttention(config)
    ours = RWKV4TimeMix(DIM)
    names = {"mix_k": "time_mix_key", "mix_v": "time_mix_value", "mix_r": "time_mix_receptance"}
    state = {names.get(name, name): value for name, value in ours.state_dict().items()}
    theirs.load_state_dict({name: state[name].view_as(value) for name, value in theirs.state_dict().items()})
    return ours, First(theirs)


def sit() -> nn.Module:
    """SiT-ATConv-S/2 with blocks that count: fresh ones are the identity, and the network's velocity is zero."""
    model = SiT(depth=12, dim=384, num_heads=6)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model


def guided() -> nn.Module:
    """The network with attention that counts: fresh ones add nothing."""
    model = create_network("guided_attention", 5, 3, 2, {})
    for module in model.modules():
        if isinstance(module, PositionAttention | ChannelAttention):
            nn.init.constant_(module.gamma, 0.1)
    return model


def pictures(size: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda batch: (torch.randn(batch, 3, size, size),)


def sequences(length: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda batch: (torch.randn(batch, length, DIM),)


def states(batch: int) -> tuple[Tensor, ...]:
    """Hidden states of 3 s of speech."""
    return (torch.randn(batch, 13, 150, 768),)


def latents(batch: int) -> tuple[Tensor, ...]:
    """Latent pictures of 256 pixels, times and classes."""
    return torch.randn(batch, 4, 32, 32), torch.rand(batch), torch.randint(1000, (batch,))


def second(batch: int) -> tuple[Tensor, ...]:
    """16,000 samples of sound."""
    return (torch.randn(batch, 16000),)


def crf(labels: int, noise: float = 0.0) -> Callable[[int], tuple[Tensor, ...]]:
    """Energies and a photograph of 321 x 481, with noise if told so: then no two pixels share a lattice cell."""

    def inputs(batch: int) -> tuple[Tensor, ...]:
        unary, picture = photograph(321, 481, labels)
        image = torch.from_numpy(picture).permute(2, 0, 1)[None].float()
        return unary, (image + noise * torch.randn_like(image)).clamp(0, 255).round()

    return inputs


@dataclass
class Row:
    """What is measured of one system: inference of each batch, one training step, growth over `sizes`."""

    peer: str
    make: Callable[[], Pair]
    inputs: Callable[[int], tuple[Tensor, ...]]
    batches: Sequence[int] = (1, 8)
    train: Callable[[int], tuple[Tensor, ...]] | None = None
    train_batch: int = 8
    sizes: dict[int, Callable[[int], tuple[Tensor, ...]]] | None = None


SMALL, LARGE = pictures(64), pictures(224)
AREAS = {n * n: pictures(n) for n in (128, 192, 256)}
LENGTHS = {n: sequences(n) for n in (2048, 4096, 8192, 16384)}


def picture_row(peer: str, make: Callable[[], Pair] | str, **settings: Any) -> Row:
    pair = beside_plain(lambda: timm.create_model(make)) if isinstance(make, str) else make
    return Row(peer, pair, LARGE, **{"train": SMALL, "sizes": AREAS} | settings)


def mixer_row(peer: str, make: Callable[[], Pair], length: int) -> Row:
    train = None if peer == "transformers" and length > 512 else sequences(length)  # their loop takes minutes
    return Row(peer, make, sequences(length), (1,), train, 1, LENGTHS if length == 2048 else None)


MIXERS: dict[str, tuple[str, Callable[[], Pair]]] = {
    "hyena": ("plain", beside_plain(lambda: Hyena(DIM, max_length=16384))),
    "h3": ("plain", beside_plain(lambda: H3(DIM))),
    "base-conv": ("plain", beside_plain(lambda: BaseConv(DIM, 3))),
    "mamba": ("transformers", mamba),
    "based": ("plain", beside_plain(lambda: Based(DIM, num_heads=4, feature_dim=16))),
    "retnet": ("plain", beside_plain(lambda: Retention(DIM, num_heads=4))),
    "rwkv4": ("transformers", rwkv),
    "full attention": ("plain", beside_plain(lambda: CausalAttention(DIM, num_heads=4))),
}

INFERENCE: dict[str, Any] = {"train": None, "sizes": None}

ROWS: dict[str, Row] = {
    "convnext-t": picture_row("timm", lambda: convnext(False)),
    "convnext-t fused": picture_row("timm", lambda: convnext(True), **INFERENCE),
    "attnet-t1": picture_row("plain", "attnet_t1"),
    "hornet-t 7x7": picture_row("plain", "hornet_tiny_7x7"),
    "hornet-t gf": picture_row("plain", "hornet_tiny_gf", sizes=None),
    "lsnet-t": picture_row("plain", "lsnet_t"),
    "transxnet-t": picture_row("plain", "transxnet_t"),
    "overlock-xt": picture_row("plain", "overlock_xt"),
    "rmt-t": picture_row("plain", "rmt_t"),
    "biformer-t": picture_row("plain", "biformer_tiny"),
    "volo-d1": picture_row("timm", of_timm("nearfar_volo_d1_224", "volo_d1_224"), **INFERENCE),
    "convit-tiny": picture_row("timm", of_timm("nearfar_convit_tiny", "convit_tiny"), **INFERENCE),
    "tnt-s": picture_row("timm", of_timm("nearfar_tnt_s_patch16_224", "tnt_s_patch16_224"), **INFERENCE),
    "cvt-13": picture_row("transformers", cvt),
    "halonet26t": Row("timm", of_timm("nearfar_halonet26t", "halonet26t"), pictures(256)),
    "sit-atconv-s/2": Row("plain", beside_plain(sit), latents, train=latents, train_batch=2),
    **{
        f"{name} {length}": mixer_row(peer, make, length)
        for name, (peer, make) in MIXERS.items()
        for length in (512, 2048)
    },
    **{
        f"crf {labels} labels{', noisy' if noise else ''}": Row(
            "pydensecrf2", lambda: (DenseCRF(10), PyDenseCRF()), crf(labels, noise), (1,)
        )
        for labels, noise in ((5, 0), (21, 0), (84, 0), (21, 8))
    },
    "macmd": Row("plain", beside_plain(lambda: create_network("macmd", 9, 3, 2, {})), LARGE, train=SMALL),
    "guided attention": Row("plain", beside_plain(guided), pictures(256), (1,)),
    "l-tdnn": Row("plain", beside_plain(LTDNN), states, train=states, train_batch=2),
    "lap": Row("plain", beside_plain(LAP), states, train=states, train_batch=2),
    "mossformer2": Row("plain", beside_plain(lambda: create_mossformer("mossformer2")), second, (1,)),
}


def timed(run: Callable[[], Any]) -> tuple[float, float]:
    """Milliseconds of a call: of the processor in all its threads, and passed."""
    start = time.process_time(), time.perf_counter()
    run()
    return 1e3 * (time.process_time() - start[0]), 1e3 * (time.perf_counter() - start[1])


def measure(runs: Sequence[Callable[[], Any]], repeats: int) -> dict[str, Any]:
    """Times and memory of one or two calls in turn: ours and the peer's."""
    memory = [peak_memory(run) / 2**20 for run in runs]
    for run in runs:
        run()
    times, passed = [], []
    for i in range(repeats):
        order = range(len(runs)) if i % 2 else reversed(range(len(runs)))
        taken = {k: timed(runs[k]) for k in order}
        times.append([taken[k][0] for k in range(len(runs))])
        passed.append(taken[0][1])
    found = {"ms": statistics.median(t[0] for t in times), "passed ms": min(passed), "MiB": memory[0]}
    if len(runs) == 2:
        factors = sorted(theirs / ours for ours, theirs in times)
        edge = len(factors) // 10
        found |= {"peer ms": statistics.median(t[1] for t in times), "peer MiB": memory[1]}
        found |= {"factor": statistics.median(factors), "low": factors[edge], "high": factors[-1 - edge]}
    return found


def training_step(model: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], None]:
    def step() -> None:
        model.zero_grad()
        y = model(*inputs)
        (y[0] if isinstance(y, list | tuple) else y).square().mean().backward()

    return step


def rows_of(name: str, row: Row, repeats: int, compiled: bool) -> list[dict[str, Any]]:
    """The measurements of one system."""
    torch.manual_seed(0)
    ours, peer = row.make()
    if row.peer == "pydensecrf2" and importlib.util.find_spec("pydensecrf") is None:
        print(f"{name}: pydensecrf2 is not installed, no comparison")
        peer = None
    models = [model.eval() for model in (ours, peer) if model is not None]
    if compiled:
        models = [torch.compile(model) for model in models]
        row = replace(row, train=None, sizes=None)
    if torch.get_num_threads() > 1:
        models, row = models[:1], replace(row, sizes=None)
    found = []

    def add(what: str, runs: Sequence[Callable[[], Any]]) -> dict[str, Any]:
        found.append({"measured": what, "peer": row.peer if len(runs) == 2 else ""} | measure(runs, repeats))
        if row.peer == "pydensecrf2":
            found[-1].pop("peer MiB", None)  # not in tensors
        shown = found[-1]
        beside = (
            f"  {shown['factor']:.2f} ({shown['low']:.2f} to {shown['high']:.2f}) beside {row.peer}"
            if len(runs) == 2
            else ""
        )
        print(f"{name:20} {what:18} {shown['ms']:9.1f} ms {shown['MiB']:8.1f} MiB{beside}", flush=True)
        return shown

    with torch.no_grad():
        if len(models) == 2:
            inputs = row.inputs(1)
            one, two = (model(*inputs) for model in models)
            error = float((one - two).norm() / two.norm())
            if not error < 1e-3:
                raise SystemExit(f"{name}: ours and the {row.peer} form differ by {error:.1e}")
        for batch in row.batches:
            inputs = row.inputs(batch)
            add(f"inference {batch}", [lambda m=m, i=inputs: m(*i) for m in models])
        if row.sizes:
            grown = []
            for n, make in row.sizes.items():
                inputs = make(1)
                grown.append(add(f"size {n}", [lambda i=inputs: models[0](*i)])["ms"])
            x, y = ([math.log(v) for v in values] for values in (row.sizes, grown))
            slope = statistics.linear_regression(x, y).slope
            found[-1]["exponent"] = slope
            print(f"{name:20} grows as N^{slope:.2f}", flush=True)
    if row.train:
        inputs = row.train(row.train_batch)
        add("training", [training_step(model.train(), inputs) for model in models])
    return found


def processor() -> str:
    """The processor's name, and what torch uses of it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown processor")
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def page(rows: list[dict[str, Any]], title: str) -> Report:
    report = Report("Speed", f"{title}\n\n{__doc__.split(chr(10) * 2)[2]}")
    pairs = [row for row in rows if "factor" in row]
    if pairs:
        with style():
            figure = new_figure(height=1 + 0.22 * len(pairs))
            axes = figure.subplots()
            values = [row["factor"] for row in pairs]
            spread = [
                [v - row["low"] for v, row in zip(values, pairs)],
                [row["high"] - v for v, row in zip(values, pairs)],
            ]
            axes.errorbar(values, range(len(pairs)), xerr=spread, fmt="o")
            axes.set_yticks(range(len(pairs)), [f"{r['system']}, {r['measured']}, {r['peer']}" for r in pairs])
            axes.axvline(1, color="black")
            axes.set(xscale="log", xlabel="peer's time / ours (above 1: ours is faster)")
            axes.invert_yaxis()
        report.section("Beside peers").figure(figure, "Median of the paired ratios, first to last decile.")
    report.section("Side by side").table(side_by_side(rows))
    columns = (
        "threads",
        "compiled",
        "system",
        "measured",
        "peer",
        "ms",
        "passed ms",
        "peer ms",
        "factor",
        "low",
        "high",
    )
    columns += ("MiB", "peer MiB", "exponent")
    shown = [{c: f"{row[c]:.3g}" if isinstance(row.get(c), float) else row.get(c, "") for c in columns} for row in rows]
    return report.section("All rows").table(shown)


def side_by_side(rows: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """A line for each system: factors with their ranges, compiled ones, memory, growth, what a second thread brings."""
    systems: dict[str, dict[str, str]] = {}
    passed = {
        (row["system"], row["measured"]): row.get("passed ms")
        for row in rows
        if row["threads"] == 1 and not row["compiled"]
    }
    for row in rows:
        line = systems.setdefault(row["system"], {"system": row["system"], "beside": row["peer"]})
        measured = row["measured"].replace("inference", "batch")
        name = f"{measured}, compiled" if row["compiled"] else measured
        if row["threads"] > 1:
            alone = passed.get((row["system"], row["measured"]))
            if alone and not row["compiled"] and "size" not in measured:
                gain = alone / row["passed ms"]
                line[f"{measured}, {row['threads']} threads"] = f"{gain:.2f}"
            continue
        if "factor" in row:
            line[name] = f"{row['factor']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
        if row.get("peer MiB") and not row["compiled"]:
            line[f"memory, {measured}"] = f"{row['peer MiB'] / row['MiB']:.2f}"
        if "exponent" in row and not row["compiled"]:
            line["grows as N to the"] = f"{row['exponent']:.2f}"
    first = ("system", "beside", "batch 1", "batch 1, compiled", "batch 8", "batch 8, compiled", "training")
    found = {name for line in systems.values() for name in line}
    columns = [name for name in first if name in found] + sorted(found - set(first))
    return [{name: line.get(name, "") for name in columns} for line in systems.values()]


READMES = {
    "README.md": [],
    "packages/vision/README.md": [name for name, row in ROWS.items() if row.inputs is LARGE and name != "macmd"]
    + ["halonet26t", "sit-atconv-s/2"],
    "packages/language/README.md": [f"{name} {length}" for name in MIXERS for length in (512, 2048)],
    "packages/audio/README.md": ["l-tdnn", "lap", "mossformer2"],
    "packages/medical/README.md": [*(n for n in ROWS if n.startswith("crf")), "macmd", "guided attention"],
}
"""README -> the systems of its table; the first has the means alone."""


def means(rows: Sequence[dict[str, Any]], compiled: bool = False) -> list[str]:
    """Geometric means of the factors of one thread, of sequence mixers and of all else."""
    found = []
    for what, inside in (("sequence mixers", True), ("everything else", False)):
        factors = [
            row["factor"]
            for row in rows
            if "factor" in row
            and row["threads"] == 1
            and row["compiled"] is compiled
            and row["system"].startswith(tuple(MIXERS)) is inside
        ]
        if factors:
            found.append(f"{statistics.geometric_mean(factors):.2f} over {len(factors)} rows of {what}")
    return found


def write_tables(rows: Sequence[dict[str, Any]], title: str) -> None:
    """Put the rows in the READMEs, between the lines that mark where they go."""
    for readme, systems in READMES.items():
        path = Path(__file__).parents[1] / readme
        lines = side_by_side([row for row in rows if row["system"] in systems])
        body = f"{title}; geometric means of the factors: {' and '.join(means(rows))}."
        if lines:
            table = [f"| {' | '.join(lines[0])} |", "|---" * len(lines[0]) + "|"]
            table += [f"| {' | '.join(line.values())} |" for line in lines]
            body = "\n".join([f"{title}; `python benchmarks/suite.py OUTPUT`:", "", *table])
        before, rest = path.read_text(encoding="utf-8").split("<!-- suite -->\n")
        after = rest.split("<!-- end suite -->")[1]
        path.write_text(f"{before}<!-- suite -->\n{body}\n<!-- end suite -->{after}", encoding="utf-8")


def known(path: Path, title: str) -> list[dict[str, Any]]:
    """The rows that stand in a file, of the same processor and versions."""
    if not path.exists():
        return []
    content = json.loads(path.read_text(encoding="utf-8"))
    if content["processor"] != title:
        raise SystemExit(f"{path} is of {content['processor']}; take another folder for {title}")
    return content["rows"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for suite.json and suite.html")
    parser.add_argument("--only", nargs="+", default=[""], help="parts of the rows' names")
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="with more than one ours alone is measured")
    parser.add_argument("--compile", action="store_true", help="inference under torch.compile instead")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tables", action="store_true", help="only write the READMEs' tables from suite.json")
    options = parser.parse_args()
    chosen = {name: row for name, row in ROWS.items() if any(part in name for part in options.only)}
    if not chosen:
        parser.error(f"--only {' '.join(options.only)} fits no row; there are {', '.join(ROWS)}")
    options.output.mkdir(parents=True, exist_ok=True)
    if options.tables:
        content = json.loads((options.output / "suite.json").read_text(encoding="utf-8"))
        write_tables(content["rows"], content["processor"])
        return
    title = (
        f"{processor()}, torch {torch.__version__}, timm {timm.__version__}, transformers {transformers.__version__}"
    )
    print(title)
    written = options.output / "suite.json"
    rows, order = known(written, title), {name: place for place, name in enumerate(ROWS)}
    for threads in options.threads:
        torch.set_num_threads(threads)
        for name, row in chosen.items():
            about = {"system": name, "threads": threads, "compiled": options.compile}
            new = [about | one for one in rows_of(name, row, options.repeats, options.compile)]
            rows = [one for one in rows if about.items() - one.items()] + new
            rows.sort(key=lambda one: (order.get(one["system"], len(order)), one["threads"], one["compiled"]))
            written.write_text(json.dumps({"processor": title, "rows": rows}, indent=2), encoding="utf-8")
    for compiled in (False, True):
        for line in means(rows, compiled):
            print(f"geometric mean {line}{', compiled' if compiled else ''}")
    page(rows, title).write(options.output / "suite.html")


if __name__ == "__main__":
    main()
