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
SMALL_MIXERS = {
    32: ("gmm_vit_32", "dhvt_tiny_cifar_patch4", "afno_256_patch4", "ninformer_cifar10", "convsharevit_cifar"),
    48: ("tic_like_tiny", "affnet_et", "spartan_tiny"),
}
"""Pixels -> systems: networks of patches on pictures as they are, pyramids of stride 32 on enlarged ones."""
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


def small_mixers(data: Path, output: Path, seed: int) -> dict[str, float]:
    zipped, figures = data / "cifar10" / "cifar10-12k-imagefolder.zip", {}
    for size, systems in SMALL_MIXERS.items():
        folder, settings = output / f"{seed}-{size}", ("epochs=1", "warmup_epochs=0.1", "batch_size=32")
        words = [word for name in systems for form in ("small", "plain") for word in ("--model", f"{form}-{name}")]
        for setting in (f"size={size}", f"seed={seed}", *settings):
            words += ["--set", setting]
        nearfar("image-classification", "compare", zipped, "-o", folder, "--recipe", "small_pictures", *words)
        found = pd.read_csv(folder / "table.csv").set_index("model")["accuracy"]
        for name in systems:
            for form in ("small", "plain"):
                figures[f"accuracy, {form}-{name}"] = found[f"{form}-{name}"]
            figures[f"accuracy, {name}, small less plain"] = found[f"small-{name}"] - found[f"plain-{name}"]
    return figures


def forecast(data: Path, output: Path, seed: int) -> dict[str, float]:
    past, later, run = output / f"past-{seed}.nc", output / f"later-{seed}.nc", output / str(seed)
    nearfar("grid-forecast", "simulate", past, "--later", later, "--seed", seed)
    nearfar("grid-forecast", "train", past, "-o", run, "--set", "epochs=40", "--set", f"seed={seed}", "--device", "cpu")
    nearfar("grid-forecast", "evaluate", run, later, "--leads", "1,4,8", "--csv", output / f"{seed}.csv")
    table = pd.read_csv(output / f"{seed}.csv")
    groups = table.groupby(["lead", "forecast"])[["RMSE", "ACC"]].mean()  # the three variables are of one size
    return {
        f"{measure}, lead {lead}, {name}": row[measure]
        for measure in ("RMSE", "ACC")
        for (lead, name), row in groups.iterrows()
    }


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
    "small-mixers": small_mixers,
    "forecast": forecast,
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
