"""Broken patches on small pictures: Patch Mixing against none, of a small transformer and a small CNN, over seeds.

    uv run python benchmarks/broken_patches.py cifar10.zip OUTPUT [--seeds 0 1 2] [--epochs 3]

Every command of the app that it runs is printed: for each seed four trainings (a small DeiT and a small ResNet, each
with and without `patch_mixing`) and one `robustness` of the four on the test pictures. Then, over the seeds: accuracy
and what 30 % of replaced patches cost, with and without Patch Mixing; fooling rates of adversarial patches, made for
each model and tried on all; and the transformers' attention at several temperatures. Called again, finished work is not
repeated. About half an hour of one core's processor time.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from nearfar.core.cli.console import console, table
from nearfar.core.files import write_json

MODELS = {"DeiT": ("small-evit_deit_tiny", ["keep_rate=1"]), "ResNet": ("test_resnet", [])}
CORRUPTIONS = ("gaussian_noise", "defocus_blur", "fog", "jpeg_compression")
"""One of each family."""
SHARE = 0.3
TEMPERATURES = (1, 1.3, 2)


def nearfar(*words: object, where: Path) -> None:
    line = ["nearfar", *map(str, words)]
    print("$", shlex.join(line), flush=True)
    command = [Path(sys.executable).with_name("nearfar"), *line[1:]]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=where)


def one_seed(data: Path, folder: Path, seed: int, epochs: int) -> dict[str, Any]:
    """What `robustness` found of the four models of a seed."""
    names = []
    for name, (model, own) in MODELS.items():
        for mixed in (False, True):
            names.append(name + mixed * ", mixed")
            if (folder / names[-1] / "classifier.json").exists():
                continue
            settings = ["size=32", f"epochs={epochs}", "warmup_epochs=1", f"seed={seed}", *own]
            settings += ["patch_mixing=0.5"] * mixed
            words = [word for setting in settings for word in ("--set", setting)]
            nearfar(
                *("image-classification", "train", data, "-o", names[-1], "--model", model),
                *("--recipe", "small_pictures", "--device", "cpu", *words),
                where=folder,
            )
    nearfar(
        *("image-classification", "robustness", *names, data, "-o", "broken", "--split", "test", "--patch", 8),
        *("--device", "cpu", "--steps", 20, "--attacked", 60, "--seeds", 2),
        *(word for kind in CORRUPTIONS for word in ("--corruption", kind)),
        *(word for share in (0, SHARE) for word in ("--share", share)),
        *(word for temperature in TEMPERATURES for word in ("--temperature", temperature)),
        where=folder,
    )
    return json.loads((folder / "broken" / "results.json").read_text(encoding="utf-8"))


def spread(values: Iterable[float], digits: int = 1) -> str:
    """Mean and standard deviation over the seeds."""
    found = list(values)
    deviation = f" +- {statistics.stdev(found):.{digits}f}" if len(found) > 1 else ""
    return f"{statistics.mean(found):.{digits}f}{deviation}"


def clean(found: dict[str, Any], name: str) -> float:
    return next(100 * row["accuracy"] for row in found["clean"] if row["model"] == name)


def lost(found: dict[str, Any], name: str) -> float:
    """Points of accuracy that replacement of `SHARE` takes."""
    rows = [row for row in found["occlusion"] if row["model"] == name and row["attack"] == "replacement"]
    accuracy = {row["share"]: 100 * row["accuracy"] for row in rows}
    return accuracy[0.0] - accuracy[SHARE]


def corrupted(found: dict[str, Any], name: str) -> float:
    return next(row["corrupted patch, fooled (%)"] for row in found["summary"] if row["model"] == name)


FIGURES: dict[str, Callable[[dict[str, Any], str], float]] = {
    "accuracy (%)": clean,
    f"lost, {100 * SHARE:.0f} % replaced": lost,
    "a corrupted patch fools (%)": corrupted,
}


def mixing_table(seeds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each kind of model: its figures without and with Patch Mixing, and their differences seed by seed."""
    rows = []
    for name in MODELS:
        for label, figure in FIGURES.items():
            without, mixed = ([figure(found, name + end) for found in seeds] for end in ("", ", mixed"))
            differences = [b - a for a, b in zip(without, mixed, strict=True)]
            row = {"model": name, "figure": label, "plain": spread(without), "mixed": spread(mixed)}
            rows.append(row | {"difference": spread(differences)})
    return rows


def attack_table(seeds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Fooling rates: a row for what a patch was made for, a column for what it was tried on."""
    names = [row["model"] for row in seeds[0]["clean"]]
    rate = {
        (row["patch made for"], row["model"], i): row["fooling rate (%)"]
        for i, found in enumerate(seeds)
        for row in found["adversarial"]
    }
    return [
        {"patch made for": a, **{b: spread(rate[a, b, i] for i in range(len(seeds))) for b in names}} for a in names
    ]


def temperature_table(seeds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for first in seeds[0]["temperature"]:
        key = first["model"], first["T"]
        same = [row for found in seeds for row in found["temperature"] if (row["model"], row["T"]) == key]
        row = {"model": key[0], "T": key[1], "accuracy (%)": spread(100 * r["accuracy"] for r in same)}
        row |= {name: spread(r[name] for r in same) for name in ("adaptive (%)", "transferred (%)", "either (%)")}
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    found = []
    for seed in args.seeds:
        folder = args.output / str(seed)
        folder.mkdir(parents=True, exist_ok=True)
        found.append(one_seed(args.data.resolve(), folder, seed, args.epochs))
    tables = {
        "patch mixing": mixing_table(found),
        "adversarial patches, fooled (%)": attack_table(found),
        "temperature": temperature_table(found),
    }
    write_json(args.output / "broken_patches.json", {"seeds": args.seeds, "epochs": args.epochs, **tables})
    for title, rows in tables.items():
        console.print(f"{title}, mean and standard deviation over seeds {args.seeds}", soft_wrap=True)
        console.print(table(rows))


if __name__ == "__main__":
    main()
