"""The smallest job of every app that trains: its data, how it is trained, and how what it made is used."""

import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

RATE = 8000


@dataclass(frozen=True)
class Job:
    """`train` with `settings` on what `make` writes; `use` are commands on the result."""

    app: str
    make: Callable[[Path], list[str]]
    settings: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    use: Callable[[Path, Path], list[list[str]]] = lambda data, out: []
    run: str = ""
    """Where in the output folder the run is."""
    command: tuple[str, ...] = ("train",)

    def train(self, data: list[str], out: Path, epochs: int, *more: str) -> list[str]:
        """The command."""
        settings = [word for setting in (*self.settings, self.length(epochs)) for word in ("--set", setting)]
        return [
            self.app,
            *self.command,
            *data,
            "--output",
            str(out),
            "--device",
            "cpu",
            *self.options,
            *settings,
            *more,
        ]

    def length(self, epochs: int) -> str:
        return f"steps={epochs * 3}" if self.command[0] == "lra" else f"epochs={epochs}"


def pictures(folder: Path) -> list[str]:
    from PIL import Image

    rng = np.random.default_rng(0)
    for name, level in (("dark", 40), ("light", 200)):
        (folder / name).mkdir(parents=True)
        for i in range(10):
            pixels = (level + rng.integers(0, 40, (32, 32, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return [str(folder)]


def scans(folder: Path) -> list[str]:
    from PIL import Image

    rng = np.random.default_rng(0)
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    for i in range(4):
        mask = np.zeros((32, 32), np.uint8)
        mask[8 : 16 + i, 10:20] = 1
        image = np.clip(100 + 80 * mask + rng.normal(0, 10, (32, 32)), 0, 255).astype(np.uint8)
        Image.fromarray(image).save(folder / "images" / f"p{i}.png")
        Image.fromarray(mask).save(folder / "labels" / f"p{i}.png")
    (folder / "labels.json").write_text('{"1": "blob"}')
    return [str(folder)]


def regions(folder: Path) -> list[str]:
    from PIL import Image

    rng = np.random.default_rng(0)
    for name in ("pictures", "masks"):
        (folder / name).mkdir(parents=True)
    for i in range(6):
        numbers = np.zeros((32, 32), np.uint8)
        numbers[8:16, 4:12], numbers[8:16, 20:28] = 1, 2
        pixels = rng.integers(0, 60, (32, 32, 3), dtype=np.uint8)
        pixels[numbers == 1, 0] = pixels[numbers == 2, 2] = 220
        Image.fromarray(pixels).save(folder / "pictures" / f"{i}.png")
        Image.fromarray(numbers).save(folder / "masks" / f"{i}.png")
    (folder / "names.json").write_text('{"1": "red", "2": "blue"}')
    return [str(folder / "pictures"), str(folder / "masks"), "--names", str(folder / "names.json")]


def tiles(folder: Path) -> list[str]:
    from PIL import Image

    rng = np.random.default_rng(0)
    for name, level in (("across", 40), ("down", 160)):
        (folder / name).mkdir(parents=True)
        for i in range(12):
            pixels = (level + rng.integers(0, 40, (32, 32, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{name}{i // 2}_{i}.png")
    return [str(folder)]


def photographs(folder: Path) -> list[str]:
    from PIL import Image

    rng = np.random.default_rng(0)
    for name, number in (("learn", 2), ("held", 1)):
        (folder / name).mkdir(parents=True)
        for i in range(number):
            small = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
            small.resize((48, 48), Image.Resampling.BICUBIC).save(folder / name / f"{i}.png")
    return [str(folder / "learn"), "--held", str(folder / "held")]


def text(folder: Path) -> list[str]:
    folder.mkdir()
    lines = [f"{i} is {'odd' if i % 2 else 'even'}. " for i in range(600)]
    (folder / "text.txt").write_text("".join(lines))
    (folder / "table.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines[:50]) + "\n")
    return [str(folder / "text.txt")]


def lists(folder: Path) -> list[str]:
    place = folder / "listops-1000"
    place.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, count in (("train", 24), ("val", 8), ("test", 8)):
        digits = rng.integers(0, 10, (count, 2))
        lines = [f"[MAX {a} {b} ]\t{max(a, b)}" for a, b in digits]
        (place / f"basic_{part}.tsv").write_text("\n".join(["Source\tTarget", *lines]) + "\n")
    return [str(folder)]


def recall_recipe(folder: Path) -> list[str]:
    folder.mkdir()
    (folder / "tiny.yaml").write_text(
        "vocab_size: 64\ndata:\n  16x2:\n"
        "    train: [{num_examples: 128, input_seq_len: 16, num_kv_pairs: 2, random_non_queries: false}]\n"
        "    test: [{num_examples: 64, input_seq_len: 16, num_kv_pairs: 2, random_non_queries: false}]\n"
        "models:\n  base-conv: {mixers: [base-conv, base-conv]}\ndims: [16]\nlearning_rates: [1.0e-3]\n"
    )
    return [str(folder / "tiny.yaml")]


def fields(folder: Path) -> list[str]:
    from nearfar.vision.forecasting.simulation import shallow_water

    folder.mkdir()
    shallow_water(40, (8, 16), seed=0).to_netcdf(folder / "fields.nc", engine="h5netcdf")
    return [str(folder / "fields.nc")]


def voice(pitch: float, seconds: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    t = np.arange(int(seconds * RATE)) / RATE
    syllables = np.clip(np.sin(2 * np.pi * 3 * t + rng.uniform(0, 6)), 0, None)
    buzz = sum(np.sin(2 * np.pi * k * pitch * t) / k for k in range(1, 8))
    return (0.1 * buzz * syllables + 0.005 * rng.standard_normal(len(t))).astype(np.float32)


def voices(folder: Path) -> list[str]:
    import soundfile

    for speaker in range(4):
        for number in range(12):
            path = folder / f"s{speaker}" / f"{number}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, voice(90 + 40 * speaker + number, 1.0, 100 * speaker + number), RATE)
    return [str(folder)]


def brain_waves(folder: Path) -> list[str]:
    import mne

    names, rate = ["FC3", "FC4", "C3", "Cz", "C4", "CP3", "CP4", "Pz"], 64.0
    rng = np.random.default_rng(0)
    cues = 3.0 + 4.0 * np.arange(12)
    data = 10e-6 * rng.standard_normal((len(names), round(54 * rate)))
    times = np.arange(round(2 * rate)) / rate
    for index, cue in enumerate(cues):
        start = round(cue * rate)
        data[2 + 2 * (index % 2), start : start + len(times)] += 30e-6 * np.sin(2 * np.pi * 10 * times)
    raw = mne.io.RawArray(data, mne.create_info(names, rate, "eeg"), verbose="ERROR")
    raw.set_annotations(mne.Annotations(cues, 2.0, ["left_hand", "right_hand"] * 6))
    folder.mkdir()
    raw.save(folder / "one_raw.fif", verbose="ERROR")
    return [str(folder)]


JOBS = {
    "image-classification": Job(
        "image-classification", pictures, ("size=32", "batch_size=8", "warmup_epochs=0", "ema=0.9"),
        ("--model", "test_resnet"),
        lambda data, out: [
            ["image-classification", "predict", str(out), str(data / "dark"), "-o", str(out / "p.csv")],
            ["image-classification", "evaluate", str(out), str(data)],
        ],
    ),
    "motor-imagery": Job(
        "motor-imagery", brain_waves, ("network=EEGNet", "batch_size=8"), ("--window", "0", "2"),
        lambda data, out: [
            ["motor-imagery", "predict", str(out), str(data), "-o", str(out / "predictions")],
            ["motor-imagery", "evaluate", str(data), "-o", str(out / "scores"), "--protocol", "within-session",
             "--models", "CSP+LDA", "--window", "0", "2"],
        ],
        run="training",
    ),
    "language-model": Job(
        "language-model", text, ("hidden_size=16", "num_hidden_layers=1", "context=64", "mixers=[base-conv]"), (),
        lambda data, out: [
            ["language-model", "evaluate", str(out), str(data / "text.txt"), "--max-tokens", "500"],
            ["language-model", "evaluate", str(out), str(data / "table.jsonl")],
            ["language-model", "generate", str(out), "1 is", "--max-new-tokens", "4"],
        ],
        run="run",
    ),
    "lra": Job(
        "language-model", lists, ("batch_size=8", "model={num_hidden_layers: 1, hidden_size: 16}"), (),
        lambda data, out: [["language-model", "lra", "evaluate", str(out), str(data)]],
        run="run", command=("lra", "train"),
    ),
    "recall": Job(
        "recall", recall_recipe, (), (), lambda data, out: [["recall", "show", str(out)]], run="runs",
        command=("sweep",),
    ),
    "grid-forecast": Job(
        "grid-forecast", fields, ("dim=8", "depth=1", "num_blocks=2"), (),
        lambda data, out: [
            ["grid-forecast", "rollout", str(out), str(data / "fields.nc"), "-o", str(out / "ahead.nc")],
        ],
    ),
    "medical-segmentation": Job(
        "medical-segmentation", scans,
        ("roi=[32,32]", "patches_per_epoch=8", "batch_size=4", "network=monai.BasicUNet",
         "settings={features: [4, 4, 8, 8, 8, 4]}"),
        ("--folds", "2"),
        lambda data, out: [
            ["medical-segmentation", "predict", str(data / "images"), "--model", str(out), "-o", str(out / "labels")],
            ["medical-segmentation", "evaluate", str(out / "labels"), str(data), "--held-out", "-o",
             str(out / "scores")],
        ],
    ),
    "region-classification": Job(
        "region-classification", regions, ("roi=test_resnet", "extra=none", "size=32", "batch_size=6"), (),
        lambda data, out: [
            ["region-classification", command, str(out), str(data / "pictures"), str(data / "masks"), "--names",
             str(data / "names.json"), "-o", str(out / file)]
            for command, file in (("evaluate", "scores.json"), ("predict", "regions.csv"))
        ],
    ),
    "tile-classification": Job(
        "tile-classification", tiles, ("network=test_resnet", "size=32", "batch_size=8"), ("--folds", "2"),
        lambda data, out: [
            ["tile-classification", "predict", str(out), str(data / "across"), "-o", str(out / "answers")],
            ["tile-classification", "evaluate", str(out), str(data), "--held-out"],
        ],
    ),
    "super-resolution": Job(
        "super-resolution", photographs,
        ("patch_size=12", "batch_size=2", "steps=2",
         "network={dim: 8, qk_dim: 8, hidden: 16, num_heads: 2, patch_sizes: [8], num_centres: [4], "
         "group_sizes: [32]}"),
        (),
        lambda data, out: [
            ["super-resolution", "upscale", str(data / "held"), "--model", str(out), "-o", str(out / "large")],
            ["super-resolution", "evaluate", str(data / "held"), "--model", str(out)],
        ],
    ),
    "speaker-verification": Job(
        "speaker-verification", voices,
        ("channels=16", "num_mels=24", "sample_rate=8000", "embedding_dim=8", "crop_seconds=0.5", "batch_size=16",
         "speeds=[1.0]", "validation=0.5", "margin_epochs=0"),
        (),
        lambda data, out: [
            ["speaker-verification", "verify", str(data / "s0/0.wav"), str(data / "s1/0.wav"), "-m", str(out),
             "--no-gate"],
        ],
        run="training",
    ),
    "speech-separation": Job(
        "speech-separation", voices,
        ("model={num_filters: 16, dim: 12, depth: 1, group_size: 32, query_key_dim: 8}", "variant=mossformer-s",
         "mixtures_per_epoch=8", "batch_size=4", "seconds=0.5", "accumulate=1"),
        (),
        lambda data, out: [
            ["speech-separation", "separate", str(data / "s0/0.wav"), "-o", str(out / "voices"), "--model",
             str(out / "model"), "--speakers", "2"],
        ],
    ),
}  # fmt: skip


def call(arguments: list[str], messages: str) -> None:
    """Run a command in this process with its output in a file, and end with its status."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background come with it ignored
    handle = os.open(messages, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    from nearfar.core.cli.root import run

    status = run(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
