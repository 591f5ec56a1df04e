"""Throughput of batches in worker processes: `uv run python benchmarks/batch.py [--files 400] [--json FILE]`.

`image-classification predict` on pictures of 256 x 256 pixels with an untrained ConvNeXt-T, and `speaker-verification
embed` on four seconds of noise with an untrained ECAPA, as commands: in one process of as many threads as there are
cores, in one of one thread, and in as many processes as there are cores. What a command takes to start is measured with
one file for each process and taken off. Prints files a second, and what a million such files take.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

from nearfar.audio.speakers.frontends import KaldiFbank
from nearfar.audio.speakers.ltdnn import ECAPA, SpeakerEncoder
from nearfar.audio.speakers.system import SpeakerSystem
from nearfar.core.cli.console import console, table
from nearfar.core.files import write_json
from nearfar.vision.classification.classifier import Classifier, create_model

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pictures(folder: Path, count: int) -> list[str]:
    rng, size = np.random.default_rng(0), (256, 256)
    for i in range(count):
        rough = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8))
        rough.resize(size, Image.Resampling.BICUBIC).save(folder / f"{i:06}.jpg")
    model, name = folder.parent / "classifier", "nearfar_convnext_tiny"
    Classifier(create_model(name, 10, 224), name, [f"class {i}" for i in range(10)], 224, 0.875).save(model)
    return ["image-classification", "predict", str(model), "{data}", "-o", "{out}.csv"]


def sounds(folder: Path, count: int) -> list[str]:
    rng = np.random.default_rng(0)
    for i in range(count):
        soundfile.write(folder / f"{i:06}.wav", 0.1 * rng.standard_normal(4 * 16000), 16000)
    model = folder.parent / "speakers"
    SpeakerSystem(SpeakerEncoder(KaldiFbank(), ECAPA())).save(model)
    return ["speaker-verification", "embed", "{data}", "-m", str(model), "-o", "{out}.npz"]


def seconds(command: list[str], data: Path, out: Path, workers: int, threads: int) -> float:
    words = [word.format(data=data, out=out) for word in command]
    variables = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    begun = time.perf_counter()
    line = [Path(sys.executable).with_name("nearfar"), *words, "--device", "cpu", "--workers", str(workers)]
    subprocess.run(line, check=True, env=variables, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


def measure(name: str, make: Callable[[Path, int], list[str]], files: int, folder: Path) -> list[dict[str, object]]:
    data, few = folder / name, folder / f"few {name}"
    data.mkdir()
    few.mkdir()
    command, rows, rates = make(data, files), list[dict[str, object]](), list[float]()
    for i, file in enumerate(sorted(data.iterdir())[:CORES]):
        file.rename(few / f"{i}{file.suffix}")
    for number, (workers, threads) in enumerate([(1, CORES), (1, 1), (CORES, CORES)]):
        start = seconds(command, few, folder / f"few {name} {number}", workers, threads)
        whole = seconds(command, data, folder / f"{name} {number}", workers, threads)
        rates.append((files - CORES) / (whole - start))
        rows.append(
            {
                "command": name,
                "processes": workers,
                "threads": threads,
                "files a second": rates[-1],
                "to one process": rates[-1] / rates[0],
                "start (s)": start,
                "a million files (hours)": 1e6 / rates[-1] / 3600,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=400)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for name, make in {"image-classification predict": pictures, "speaker-verification embed": sounds}.items():
            rows += measure(name, make, arguments.files, Path(place))
    console.print(table(rows, f"{arguments.files} files, {CORES} cores"))
    if arguments.json is not None:
        write_json(arguments.json, rows)


if __name__ == "__main__":
    main()
