"""Figures of the READMEs that come from a training, over several seeds.

    uv run python benchmarks/spread.py DATA OUTPUT [--only speakers,text] [--seeds 0 1 2]

DATA holds `fsdd/recordings`, `voices`, `eegmmidb/S001`, `cifar10/cifar10-12k-imagefolder.zip` and
`text/tinyshakespeare.txt`; the brain comes with nilearn. The commands are those of the apps' READMEs but for the seed,
and, of text and pictures, fewer epochs; they are printed as they run. Called again, finished work is not repeated. An
hour of one core for pictures, half of one for each of speakers, separation and text, minutes for the others.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from nearfar.core.files import write_json

PICTURE_MODELS = [
    *("linear", "test_resnet", "small-nearfar_convnext_atto", "small-hornet_tiny_7x7", "small-attnet_xxs"),
    *("small-overlock_xt", "small-transxnet_t", "small-lsnet_t", "small-cvt_13", "small-nearfar_tnt_s_patch16_224"),
    *("small-nearfar_volo_d1_224", "small-nearfar_convit_tiny", "small-nearfar_halonet26t", "small-biformer_tiny"),
    "small-rmt_t",
]
TISSUE_NETWORKS = [
    *("duoformer_small", "duoformer_small-identity", "resnet10t+vit_small", "resnet10t", "convnext_atto"),
]
VOICES = ["--layout", r"(\d_)?(?P<speaker>[^/_]+)[/_].+", "--same", "en-f=es-f"]


def nearfar(*words: object) -> str:
    """What the command printed."""
    line = ["nearfar", *map(str, words)]
    print("$", shlex.join(line), flush=True)
    command = [Path(sys.executable).with_name("nearfar"), *line[1:]]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def speakers(data: Path, output: Path, seed: int) -> dict[str, float]:
    corpus = output / "corpus"
    if not (corpus / "trials.txt").exists():
        script = Path(__file__).with_name("speakers.py")
        subprocess.run([sys.executable, script, data, corpus], check=True, stdout=subprocess.DEVNULL)
    figures = {}
    for name, settings in (("trained", []), ("untrained", ["--set", "epochs=0"])):
        model, scores = output / f"{name}-{seed}", output / f"{name}-{seed}.txt"
        nearfar(
            *("speaker-verification", "train", corpus / "train", "-o", model, "--recipe", "small"),
            *("--set", f"seed={seed}", *settings),
        )
        nearfar(
            *("speaker-verification", "score", corpus / "trials.txt", "--root", corpus / "test"),
            *("-o", scores, "-m", model),
        )
        nearfar("speaker-verification", "evaluate", scores, "-o", output / f"evaluation-{name}-{seed}")
        found = read_json(output / f"evaluation-{name}-{seed}" / "evaluation.json")
        figures[f"EER (%), {name}"] = 100 * found["eer_nist"]
    return figures


def motor_imagery(data: Path, output: Path, seed: int) -> dict[str, float]:
    folder = output / str(seed)
    nearfar(
        *("motor-imagery", "evaluate", data / "eegmmidb" / "S001", "-o", folder, "--classes", "left_hand,right_hand"),
        *(
            "--test-session",
            3,
            "--models",
            "AGTCNet,CSP+LDA,TangentSpace",
            "--set",
            "epochs=6",
            "--set",
            f"seed={seed}",
        ),
    )
    table = pd.read_csv(folder / "results.csv")
    return {f"accuracy, {name}": rows["accuracy"].mean() for name, rows in table.groupby("model")}


def separation(data: Path, output: Path, seed: int) -> dict[str, float]:
    voices = [data / "voices", data / "fsdd" / "recordings"]
    held, run = output / "held", output / str(seed)
    if not held.exists():
        nearfar(
            *("speech-separation", "mix", *voices, "-o", held, "--part", "test", "--count", 60),
            *("--seconds", 4, "--fill", *VOICES),
        )
    nearfar(
        *("speech-separation", "train", *voices, "-o", run, "--recipe", "quick", *VOICES),
        *("--device", "cpu", "--set", f"seed={seed}"),
    )
    nearfar(
        *("speech-separation", "evaluate", held, "--model", run / "model", "--metrics", "si_sdri"),
        *("-o", output / f"{seed}.csv"),
    )
    return {"SI-SDR over the mixture (dB)": float(pd.read_csv(output / f"{seed}.csv")["si_sdri"].mean())}


def brain(data: Path, output: Path, seed: int) -> dict[str, float]:
    from nearfar.medical.samples import write_brain

    scans, model = output / "brain", output / str(seed)
    if not scans.exists():
        write_brain(scans, resolution=4)
    nearfar(
        *("medical-segmentation", "train", scans, "-o", model, "--recipe", "brain", "--set", "roi=[32,64]"),
        *("--set", "epochs=12", "--device", "cpu", "--set", f"seed={seed}"),
    )
    return {f"Dice, {row['label']}": row["dice"] for row in read_json(model / "validation.json")}


def tiles(data: Path, output: Path, seed: int, tissue: bool = False) -> dict[str, float]:
    sample = output / "sample"
    if not (sample / "tiles").exists():
        nearfar("tile-classification", "sample", "-o", sample, *(["--tissue"] if tissue else []))
    more = ["--set", "fit=resize", "--set", "batch_size=16"] if tissue else []
    for name in TISSUE_NETWORKS if tissue else []:
        more += ["--network", name]
    nearfar(
        *("tile-classification", "compare", sample / "tiles", "-o", output / str(seed), "--set", "epochs=8"),
        *("--folds", 2, "--device", "cpu", "--set", f"seed={seed}", *more),
    )
    rows = read_json(output / str(seed) / "comparison.json")["networks"]
    return {f"balanced accuracy, {row['network']}": row["balanced"] for row in rows}


def tissue(data: Path, output: Path, seed: int) -> dict[str, float]:
    return tiles(data, output, seed, tissue=True)


def scans_compared(scans: Path, output: Path, seed: int, *words: object) -> dict[str, float]:
    nearfar(
        *("medical-segmentation", "compare", scans, "-o", output / str(seed), "--network", "vmunet-small"),
        *("--network", "umamba-small", "--device", "cpu", "--set", f"seed={seed}", *words),
    )
    rows = read_json(output / str(seed) / "comparison.json")["networks"]
    return {f"Dice, {row['network']}": row["Dice"] for row in rows}


def brain_compared(data: Path, output: Path, seed: int) -> dict[str, float]:
    from nearfar.medical.samples import write_brain

    scans = output / "brain"
    if not scans.exists():
        write_brain(scans, resolution=4)
    return scans_compared(
        *(scans, output, seed, "--recipe", "brain", "--set", "roi=[32,64]", "--set", "epochs=8", "--slabs", 12)
    )


def vessels_compared(data: Path, output: Path, seed: int) -> dict[str, float]:
    words = ("--recipe", "vessels", "--set", "roi=[64,64]", "--set", "epochs=8")
    return scans_compared(data / "chasedb1", output, seed, *words)


def pictures(data: Path, output: Path, seed: int) -> dict[str, float]:
    zipped = data / "cifar10" / "cifar10-12k-imagefolder.zip"
    nearfar(
        *("image-classification", "compare", zipped, "-o", output / str(seed), "--recipe", "small_pictures"),
        *(
            "--set",
            "epochs=3",
            "--set",
            f"seed={seed}",
            *(word for name in PICTURE_MODELS for word in ("--model", name)),
        ),
    )
    table = pd.read_csv(output / str(seed) / "table.csv")
    return {f"accuracy, {row['model']}": row["accuracy"] for _, row in table.iterrows()}


def text(data: Path, output: Path, seed: int) -> dict[str, float]:
    whole = (data / "text" / "tinyshakespeare.txt").read_bytes()
    train, test, model = output / "train.txt", output / "test.txt", output / str(seed)
    cut = len(whole) * 9 // 10
    train.write_bytes(whole[:cut])
    test.write_bytes(whole[cut:])
    nearfar(
        *("language-model", "train", train, "--output", model, "--set", "validation_share=0.005", "--set", "epochs=1"),
        *("--set", f"seed={seed}"),
    )
    row = json.loads(nearfar("language-model", "evaluate", model, test, "--ngram", train, "--json"))
    return {name: row[name] for name in ("bits_per_byte", "5-gram_bits_per_byte")}


JOBS: dict[str, Callable[[Path, Path, int], dict[str, float]]] = {
    "speakers": speakers,
    "motor-imagery": motor_imagery,
    "separation": separation,
    "brain": brain,
    "brain-compared": brain_compared,
    "vessels-compared": vessels_compared,
    "tiles": tiles,
    "tissue": tissue,
    "pictures": pictures,
    "text": text,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(JOBS), help="of " + ", ".join(JOBS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    rows = []
    for name in args.only:
        folder = args.output / name
        folder.mkdir(parents=True, exist_ok=True)
        table = pd.DataFrame({seed: JOBS[name](args.data, folder, seed) for seed in args.seeds})
        for figure, values in table.iterrows():
            rows.append({"job": name, "figure": figure, "values": [round(float(value), 4) for value in values]})
    write_json(args.output / "spread.json", {"seeds": args.seeds, "figures": rows})
    for row in rows:
        values = row["values"]
        print(f"{row['job']}: {row['figure']}: mean {sum(values) / len(values):.4g}, "
              f"{min(values):.4g} to {max(values):.4g} over seeds {args.seeds} {values}")  # fmt: skip


if __name__ == "__main__":
    main()
