"""What large batches take on paper, from what an item costs here: `uv run python benchmarks/scale.py [--ray]`.

Measures the processor time, of one thread, that reading and computing take for a picture, four seconds of speech, ten
seconds of a conversation and a volume of 96 x 96 x 96 voxels, and what the first process of a batch spends on an item
that others do (with --ray on a Ray cluster too). Prints what a million pictures, a thousand hours and ten thousand
volumes take on some machines, if such cores add up, and what bounds it: processors, the first process, or the network.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import soundfile
import torch
from PIL import Image

from nearfar.audio.corpora import Utterance
from nearfar.audio.separation.mossformer import MossFormer
from nearfar.audio.separation.windows import model_separator
from nearfar.audio.sound import read_samples
from nearfar.audio.speakers.embedding import Embedder
from nearfar.audio.speakers.frontends import KaldiFbank
from nearfar.audio.speakers.ltdnn import ECAPA, SpeakerEncoder
from nearfar.core.cli.batch import Places, run_batch
from nearfar.core.cli.console import console, table
from nearfar.medical.data.scans import read_scan
from nearfar.medical.networks import create_network
from nearfar.medical.recipe import Recipe
from nearfar.medical.segmenter import Segmenter
from nearfar.vision.classification.classifier import Classifier, create_model
from nearfar.vision.data.images import Pictures, read_picture

MACHINES = {"2 cores": (1, 2), "16 cores": (1, 16), "10 machines of 16 cores": (10, 16), "10 of 64": (10, 64)}
"""Name -> how many, cores of each."""

NETWORK = 1.25e9
"""Bytes a second that reach a machine: 10 Gbit/s."""

OVERLAP = 1 / 0.6
"""Windows of a conversation cover each second so many times."""


@dataclass
class Cost:
    """Of one item: bytes that are read, processor seconds of reading and of computing."""

    size: int
    read: float
    compute: float


def seconds(work: Callable[[], Any], times: int) -> float:
    """Processor time of this process, the least of `times`; of several, after one call that warms up."""
    if times > 1:
        work()
    found = []
    for _ in range(times):
        begun = time.process_time()
        work()
        found.append(time.process_time() - begun)
    return min(found)


def picture(folder: Path) -> Cost:
    path, name = folder / "picture.jpg", "nearfar_convnext_tiny"
    rough = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    rough.resize((256, 256), Image.Resampling.BICUBIC).save(path)
    classes = [f"class {i}" for i in range(10)]
    model = Classifier(create_model(name, 10, 224), name, classes, 224, 0.875)
    read = seconds(lambda: read_picture(path), 20)
    pictures = Pictures([str(path)], [-1], classes, lambda i: read_picture(path))
    return Cost(path.stat().st_size, read, seconds(lambda: model.scores(pictures, device="cpu"), 3) - read)


def speech(folder: Path) -> Cost:
    path, rate = folder / "speech.wav", 16000
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(4 * rate), rate)
    embed = Embedder(SpeakerEncoder(KaldiFbank(), ECAPA()))
    read = seconds(lambda: read_samples(path, rate), 20)
    return Cost(path.stat().st_size, read, seconds(lambda: embed(Utterance("a", path)), 3) - read)


def conversation(folder: Path) -> Cost:
    path, rate = folder / "conversation.wav", 8000
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(10 * rate), rate)
    separate = model_separator(MossFormer())
    samples = read_samples(path, rate)
    compute = OVERLAP * seconds(lambda: separate(samples), 1)
    return Cost(path.stat().st_size, seconds(lambda: read_samples(path, rate), 20), compute)


def volume(folder: Path) -> Cost:
    path = folder / "volume.nii.gz"
    values = np.random.default_rng(0).normal(0, 300, (96, 96, 96)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), path)
    recipe = Recipe()
    segmenter = Segmenter(create_network(recipe.network, 3, 1, 3, {}), {0: "background", 1: "a", 2: "b"}, recipe, 1)
    scan = read_scan(path)
    return Cost(path.stat().st_size, seconds(lambda: read_scan(path), 2), seconds(lambda: segmenter(scan), 1))


def dispatch(engine: str, count: int) -> float:
    """What the first process spends on an item that another does."""
    begun = time.process_time()
    _, failures = run_batch(range(count), str, "giving out", places=Places(2, engine))
    if failures:
        raise RuntimeError(failures[0])
    return (time.process_time() - begun) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ray", action="store_true", help="also what a Ray cluster's first process spends on an item")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        costs = {make.__name__: make(Path(place)) for make in (picture, speech, conversation, volume)}
    engines = {"local": dispatch("local", 1000)} | ({"ray": dispatch("ray", 500)} if arguments.ray else {})
    rows = [
        {"item": name, "kB": c.size / 1e3, "reading (ms)": 1e3 * c.read, "computing (s)": c.compute}
        for name, c in costs.items()
    ]
    console.print(table(rows, f"processor time of one thread, of {os.cpu_count()} cores"))
    for engine, cost in engines.items():
        console.print(f"{engine}: the first process spends {1e3 * cost:.2f} ms on an item")
    whole = {
        "a million pictures": (picture, 1e6),
        "a thousand hours, embedded": (speech, 1000 * 3600 / 4),
        "a thousand hours, separated": (conversation, 1000 * 3600 / 10),
        "ten thousand volumes": (volume, 1e4),
    }
    rows = []
    for job, (make, number) in whole.items():
        cost, row = costs[make.__name__], {"job": job}
        for machine, (count, cores) in MACHINES.items():
            spent = engines["ray" if count > 1 and "ray" in engines else "local"]
            bounds = {
                "": number * (cost.read + cost.compute) / (count * cores),
                ", first process": number * spent,
                ", network": number * cost.size / (count * NETWORK),
            }
            worst = max(bounds, key=lambda name: bounds[name])
            row[machine] = f"{bounds[worst] / 3600:.3g} h{worst}"
        row["cores that one first process feeds"] = f"{(cost.read + cost.compute) / max(engines.values()):.0f}"
        rows.append(row)
    console.print(table(rows, "on paper"))


if __name__ == "__main__":
    main()
