"""Small language models of equal size trained on the same text: mixers, and residuals at depth 12.

    uv run python benchmarks/text.py mixers ../shared/data/text/tinyshakespeare.txt OUTPUT
    uv run python benchmarks/text.py depth ../shared/data/text/tinyshakespeare.txt OUTPUT

One pass over the first `--size` bytes, 512 bytes a step by one recipe for all (Muon, rate 0.01, tuned for none of
them), and bits per byte of the last 50,000 bytes of TEXT, over seeds; `help` as TEXT takes Python's help pages. Called
again, finished trainings are not repeated. About twenty minutes of one core each.
"""

import argparse
import math
from pathlib import Path
from pydoc_data.topics import topics
from statistics import mean

import numpy as np
import torch

from nearfar.language import texts
from nearfar.language.evaluation import ngram_bits, score
from nearfar.language.training import Recipe, train_language_model

TEST = 50_000
ROTARY = {"mixers": [{"type": "rotary-attention", "num_heads": 4}], "norm": "rmsnorm"}
CHUNKS = {"attention_dim": 16, "chunk": 128}
WIDE = {"hidden_size": 64, "num_hidden_layers": 4, "context": 512, "batch_size": 1}
DEEP = {"hidden_size": 64, "num_hidden_layers": 12, "context": 256, "batch_size": 2}
GLU = {"type": "glu", "activation": "silu"}
JOBS = {
    "mixers": {
        "TCNCA": WIDE
        | {
            "mixers": [{"type": "tcnca", "kernel_size": 17, "dilation_factor": 5, "depth": 3, **CHUNKS}],
            "state_mixer": "nffn",
        },
        "Mega": WIDE | {"mixers": [{"type": "mega", **CHUNKS}], "state_mixer": "nffn"},
        "BaseConv and Mamba": WIDE | {"mixers": ["base-conv", "mamba"], "state_mixer": {"type": "mlp", "hidden": 272}},
        "attention": WIDE | ROTARY | {"state_mixer": GLU | {"hidden": 200}},
    },
    "depth": {
        "plain": DEEP | ROTARY | {"state_mixer": GLU | {"hidden": 168}},
        "attention over blocks of 6": DEEP
        | ROTARY
        | {"state_mixer": GLU | {"hidden": 168}, "residual": {"type": "attention", "block_size": 6}},
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=JOBS)
    parser.add_argument("text")
    parser.add_argument("output", type=Path)
    parser.add_argument("--size", type=int, default=500_000, help="bytes to train on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = texts.byte_tokenizer()
    data = "\n".join(topics.values()).encode() if args.text == "help" else Path(args.text).read_bytes()
    if len(data) < args.size + TEST:
        parser.error(f"the text has {len(data)} bytes, fewer than {args.size} to train on and {TEST} to test")
    parts = data[: args.size], data[-TEST:]
    train, test = (torch.from_numpy(texts.encode(part, tokenizer)) for part in parts)
    counted, scored = (np.frombuffer(part, np.uint8).astype(np.int64) for part in parts)
    print(f"byte 5-gram (Kneser-Ney) {ngram_bits(counted, scored, 256):.3f}", flush=True)
    found: dict[tuple[str, str], list[float]] = {}
    for seed in args.seeds:
        for name, settings in JOBS[args.job].items():
            recipe = Recipe(epochs=1, validation_share=0.005, dropout=0.0, seed=seed, **settings)
            folder = args.output / args.job / f"{name}-{seed}"
            model, _ = train_language_model(recipe, train, tokenizer, folder, device="cpu")
            bits = {f"pieces of {recipe.context}": score(model.eval(), test, tokenizer, recipe.context, False)}
            if recipe.mixers != ROTARY["mixers"]:  # whose state would grow with the text
                bits["state carried"] = score(model, test, tokenizer)
            for how, row in bits.items():
                found.setdefault((name, how), []).append(row["bits_per_byte"])
                print(f"{name}, {model.num_parameters():,} parameters, seed {seed}, {how}: {row['bits_per_byte']:.3f}",
                      flush=True)  # fmt: skip
    print(f"\nbits per byte after {args.size:,} bytes: mean, least and greatest over seeds {args.seeds}")
    for (name, how), values in found.items():
        print(f"{name:28}{how:18}{mean(values):7.3f}{min(values):9.3f}{max(values):7.3f}")
    first = next(iter(found.values()))
    for (name, how), values in list(found.items())[1:]:
        less = [b - a for a, b in zip(first, values)]
        if how == next(iter(found))[1]:
            error = math.sqrt(sum((x - mean(less)) ** 2 for x in less) / max(1, len(less) - 1) / len(less))
            print(f"{name} less {next(iter(found))[0]}: {mean(less):+.3f}, standard error {error:.3f}")


if __name__ == "__main__":
    main()
