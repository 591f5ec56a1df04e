"""The tile-classification app from its command line, on dark and light tiles and on slides made of both."""

import csv
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from typer.testing import CliRunner

from nearfar.apps.tile_classification.cli import app
from nearfar.core.cli.batch import BatchError
from nearfar.core.errors import UserError
from nearfar.medical.histology.classifier import TileClassifier, TileRecipe, create_tile_network
from nearfar.medical.samples import write_texture_slide

SMALL = ["size=32", "network=test_resnet", "epochs=4", "batch_size=8", "learning_rate=0.003", "jitter=0", "stains=0"]


def call(*words: object) -> str:
    """Standard output of the command; errors as they are."""
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.stdout


def tissue(kind: str, draw: np.random.Generator, side: int = 32) -> np.ndarray:
    """Pink, with dark stripes down or across."""
    pixels = np.full((side, side, 3), (220, 120, 190), np.uint8)
    stripes = np.arange(side) // 4 % 2 == 0
    pixels[stripes if kind == "across" else slice(None), slice(None) if kind == "across" else stripes] -= 90
    return pixels + draw.integers(0, 30, pixels.shape, dtype=np.uint8)


def write_slide(path: Path, pixels: np.ndarray, levels: int = 2, **about: object) -> Path:
    with tifffile.TiffWriter(path) as file:
        options = {"tile": (32, 32), "photometric": "rgb", "compression": "zlib", "metadata": None}
        file.write(pixels, subifds=levels - 1, **options, **about)
        for level in range(1, levels):
            file.write(pixels[:: 2**level, :: 2**level], subfiletype=1, **options)
    return path


def slide_of_both() -> np.ndarray:
    """128 x 256, glass but for two squares of 64: stripes down at the left, stripes across at the right."""
    draw, pixels = np.random.default_rng(1), np.full((128, 256, 3), 243, np.uint8)
    for left, kind in ((32, "down"), (160, "across")):
        pixels[32:96, left : left + 64] = tissue(kind, draw, 64)
    return pixels


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight slides of each class, three tiles of each."""
    folder, draw = tmp_path_factory.mktemp("tiles"), np.random.default_rng(0)
    for kind in ("across", "down"):
        for slide in range(8):
            for place in range(3):
                path = folder / "tiles" / kind / f"{kind}{slide}_{place}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(tissue(kind, draw)).save(path)
    return folder / "tiles"


@pytest.fixture(scope="module")
def model(data: Path) -> Path:
    out = data.parent / "model"
    settings = [word for one in (*SMALL, "rotate=none", "mpp=0.5") for word in ("--set", one)]
    rows = json.loads(call("train", data, "-o", out, *settings, "--folds", 2, "--device", "cpu", "--json"))
    assert [row["of"] for row in rows] == ["tiles", "slides"]
    assert rows[0]["accuracy"] > 0.9
    assert rows[1]["items"] == 8
    again = json.loads(call("train", data, "-o", out, *settings, "--folds", 2, "--device", "cpu", "--json"))
    assert again == rows, "a finished run is not trained again"
    return out


def test_no_slide_is_on_both_sides_and_scores_are_by_slide(data: Path, model: Path, tmp_path: Path) -> None:
    with (model / "splits.csv").open(newline="") as stream:
        parts: dict[str, set[str]] = {}
        for row in csv.DictReader(stream):
            parts.setdefault(row["part"], set()).add(row["slide"])
    assert len(parts["training"]) == len(parts["held out"]) == 8
    assert not parts["training"] & parts["held out"]
    with pytest.raises(UserError, match="trained on 8 of the 16 slides"):
        call("evaluate", model, data)
    marked = json.loads(call("evaluate", model, data, "--training-slides", "--json"))
    assert "24 of 48" in marked[0]["marked"]
    held = json.loads(call("evaluate", model, data, "--held-out", "-o", tmp_path, "--json"))
    assert held == json.loads((model / "held_out.json").read_text())["scores"]
    assert held[0]["balanced_low"] <= held[0]["balanced"] <= held[0]["balanced_high"]
    assert (tmp_path / "index.html").is_file()


def test_slides_and_tiles_go_on_past_what_is_bad(data: Path, model: Path, tmp_path: Path) -> None:
    slides, out, pixels = tmp_path / "slides", tmp_path / "out", slide_of_both()
    slides.mkdir()
    known = {"resolution": (20000, 20000), "resolutionunit": "CENTIMETER"}
    write_slide(slides / "good.tif", pixels, **known)
    write_slide(slides / "glass.tif", np.full_like(pixels, 243), **known)
    write_slide(slides / "scale.tif", pixels)
    cut = write_slide(slides / "cut.tif", pixels, **known).read_bytes()
    with tifffile.TiffFile(slides / "cut.tif") as file:
        end = max(file.pages[0].dataoffsets)  # the directories lie before the last tile's data, or are lost with it
    (slides / "cut.tif").write_bytes(cut[: end - 10])
    broken = write_slide(slides / "broken.tif", pixels, **known)
    with tifffile.TiffFile(broken) as file:
        offset = file.pages[0].dataoffsets[9]  # one of the eight with tissue
    with broken.open("r+b") as stream:
        stream.seek(offset)
        stream.write(b"\xff" * 16)
    Image.fromarray(tissue("down", np.random.default_rng(5))).save(slides / "tile.png")
    (slides / "no.png").write_bytes(b"no picture")
    Image.new("RGB", (300, 300)).save(slides / "large.png")
    command = ("predict", model, slides, "-o", out, "--device", "cpu")
    with pytest.raises(BatchError) as first:
        call(*command)
    said = str(first.value)
    for name, what in (
        ("glass.tif", "holds no tissue"), ("scale.tif", "does not tell its microns"), ("cut.tif", ""),
        ("broken.tif", "1 of 8 tiles cannot be read and are left empty; the first: "),
        ("no.png", "cannot be read as a tile"),
        ("large.png", "is a tile of 300 x 300 pixels, the model was trained on 32"),
    ):  # fmt: skip
        assert f"{slides / name}: {what}" in said
    assert "6 of 8 failed" in said
    assert len(json.loads((out / "failures.json").read_text())) == 6
    with (out / "good_tiles.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {(int(r["x"]), int(r["y"])) for r in rows} == {
        (left + x, 32 + y) for left in (32, 160) for x in (0, 32) for y in (0, 32)
    }
    assert {r["class"] for r in rows if int(r["x"]) < 128} == {"down"}
    assert {r["class"] for r in rows if int(r["x"]) >= 128} == {"across"}
    features = json.loads((out / "good.geojson").read_text())["features"]
    assert [f["properties"]["classification"]["name"] for f in features] == [r["class"] for r in rows]
    assert features[0]["geometry"]["coordinates"][0][0] == [int(rows[0]["x"]), int(rows[0]["y"])]
    assert np.asarray(Image.open(out / "good_heatmap.png")).std() > 10
    with (out / "broken_tiles.csv").open(newline="") as stream:
        assert [r["class"] for r in csv.DictReader(stream)].count("") == 1
    with (out / "slides.csv").open(newline="") as stream:
        assert {Path(r["slide"]).name: r["broken"] for r in csv.DictReader(stream)} == {
            "good.tif": "0",
            "broken.tif": "1",
        }
    with (out / "tiles.csv").open(newline="") as stream:
        assert [(Path(r["file"]).name, r["class"]) for r in csv.DictReader(stream)] == [("tile.png", "down")]
    written = (out / "good_heatmap.png").stat().st_mtime_ns
    with pytest.raises(BatchError, match="6 of 8 failed"):
        call(*command)
    assert (out / "good_heatmap.png").stat().st_mtime_ns == written, "what is done is not done again"
    (slides / "good.tif").write_bytes(cut[: end - 10])
    with pytest.raises(BatchError, match=r"good\.tif: "):
        call("predict", model, slides / "good.tif", slides / "broken.tif", "-o", out, "--device", "cpu")
    with (out / "slides.csv").open(newline="") as stream:
        assert [Path(r["slide"]).name for r in csv.DictReader(stream)] == ["broken.tif"], "no older answer is told"
    write_slide(slides / "good.tif", pixels, **known)
    answers = json.loads(call("predict", model, slides / "scale.tif", "-o", out / "s", "--mpp", 0.5, "--json"))
    assert [answers["slides"][0][k] for k in ("tiles", "broken")] == [8, 0]
    (bounded,) = json.loads(call("predict", model, slides / "good.tif", "-o", out / "m", "--memory", "300M", "--json"))[
        "slides"
    ]
    assert bounded["p(down)"] == pytest.approx(json.loads((out / "good.json").read_text())["p(down)"], abs=1e-5)
    with pytest.raises(UserError, match="are too few"):
        call("predict", model, slides / "good.tif", "-o", out / "m", "--memory", "100M")


def test_whole_slides_with_labels_are_scored(model: Path, tmp_path: Path) -> None:
    lines = ["file,class,slide"]
    for number in range(7):
        kind, pixels = ("across", "down")[number % 2], np.full((64, 128, 3), 243, np.uint8)
        pixels[:, 32:96] = tissue(kind, np.random.default_rng(number), 64)
        write_slide(tmp_path / f"w{number}.tif", pixels, resolution=(20000, 20000), resolutionunit="CENTIMETER")
        lines.append(f"w{number}.tif,{kind},w{number}")
    (tmp_path / "slides.csv").write_text("\n".join(lines))
    (row,) = json.loads(call("evaluate", model, tmp_path / "slides.csv", "--memory", "400M", "--json"))
    assert (row["of"], row["items"], row["accuracy"], row["AUC"]) == ("slides", 7, 1, 1)
    (tmp_path / "labels.csv").write_text("slide,class\nw0,across\n")
    with pytest.raises(UserError, match="--slide-labels: the files of"):
        call("evaluate", model, tmp_path / "slides.csv", "--slide-labels", tmp_path / "labels.csv")
    Image.fromarray(np.full((64, 128, 3), 243, np.uint8)).save(tmp_path / "w6.tif")
    with pytest.raises(UserError, match="names 6 slides and 1 tiles"):
        call("evaluate", model, tmp_path / "slides.csv")
    write_slide(tmp_path / "w6.tif", np.full((64, 128, 3), 243, np.uint8))
    with pytest.raises(BatchError, match=r"1 of 7 failed:\s+.*w6\.tif: does not tell its microns"):
        call("evaluate", model, tmp_path / "slides.csv", "-o", tmp_path / "scores")
    assert json.loads((tmp_path / "scores" / "scores.json").read_text())["scores"][0]["accuracy"] == pytest.approx(
        6 / 7
    )


def test_what_is_refused(data: Path, model: Path, tmp_path: Path) -> None:
    new = ("-o", tmp_path / "m")
    with pytest.raises(UserError, match="no such folder"):
        call("train", tmp_path / "nowhere", *new)
    with pytest.raises(UserError, match=r"the patient \(nothing\(\.\)\)"):
        call("train", data, *new, "--patients", "nothing(.)")
    with pytest.raises(UserError, match="has 0 groups"):
        call("train", data, *new, "--slides", "across")
    with pytest.raises(UserError, match="network dofrmer"):
        call("train", data, *new, "--set", "network=dofrmer", "--set", "size=32")
    with pytest.raises(UserError, match="it must be a multiple of 32"):
        call("train", data, *new, "--set", "network=duoformer_small", "--set", "size=24")
    with pytest.raises(UserError, match="the network sees 64"):
        call("train", data, *new)
    with pytest.raises(UserError, match="slides on both sides of the split: across0"):
        call("train", data, *new, "--held", data, "--set", "size=32")
    with pytest.raises(UserError, match="would fetch weights"):
        call("train", data, *new, "--set", "size=32", "--set", "settings={pretrained: true}")
    with pytest.raises(UserError, match="holds neither tiles nor slides"):
        call("predict", model, tmp_path, *new)
    with pytest.raises(UserError, match="holds no trained tile classifier"):
        call("evaluate", tmp_path, data)
    with pytest.raises(UserError, match="give one"):
        call("evaluate", model, data, "--held-out", "--training-slides")


def test_tables_patients_and_unreadable_tiles(data: Path, model: Path, tmp_path: Path) -> None:
    """Two slides a patient, told by a table; a tile that cannot be read is a wrong answer."""
    other = tmp_path / "other.csv"
    draw = np.random.default_rng(9)
    lines = ["file,class,slide,patient"]
    for number in range(12):
        kind = ("across", "down")[number % 2]
        Image.fromarray(tissue(kind, draw)).save(tmp_path / f"{number}.png")
        lines.append(f"{number}.png,{kind},new{number},p{number // 2}")
    other.write_text("\n".join(lines) + "\n")
    rows = json.loads(call("evaluate", model, other, "--json"))
    assert rows[0]["accuracy"] == 1
    twice = tmp_path / "twice.csv"
    twice.write_text("slide,class\nnew0,across\nnew0,down\n")
    with pytest.raises(UserError, match=r"twice\.csv: slide new0 has class across and down"):
        call("evaluate", model, other, "--slide-labels", twice)
    with pytest.raises(UserError, match="are for whole slides"):
        call("evaluate", model, other, "--mpp", 0.5)
    twice.write_text("slide,patient\nnew0,a\nnew0,b\n")
    with pytest.raises(UserError, match=r"twice\.csv: slide new0 has patient a and b"):
        call("evaluate", model, data, "--patients", twice)
    (tmp_path / "0.png").write_bytes(b"")
    with pytest.raises(BatchError, match=r"1 of 12 failed:\s+.*0\.png: cannot be read as a tile"):
        call("evaluate", model, other, "-o", tmp_path / "scores")
    tiles, slides = json.loads((tmp_path / "scores" / "scores.json").read_text())["scores"]
    assert tiles["accuracy"] == slides["accuracy"] == pytest.approx(11 / 12)
    assert tiles["AUC"] == pytest.approx(1 - 1 / 6)
    chosen = [w for s in (*SMALL, "validation=0.5", "class_weights=true", "rotate=any") for w in ("--set", s)]
    with pytest.raises(BatchError, match="1 of 12 failed"):
        call("train", other, "-o", tmp_path / "m", *chosen, "--folds", 3)
    history = json.loads((tmp_path / "m" / "run.json").read_text())["history"]
    assert all(0 <= row["balanced"] <= 1 for row in history), "slides of their own choose the epoch"
    with (tmp_path / "m" / "splits.csv").open(newline="") as stream:
        found = list(csv.DictReader(stream))
    assert len(found) == 11
    learnt, held = ({r["patient"] for r in found if (r["part"] == "training") == want} for want in (True, False))
    assert not learnt & held


@pytest.mark.ci
def test_comparison_says_who_wins(data: Path, tmp_path: Path) -> None:
    small = [w for s in SMALL[2:] for w in ("--set", s)]
    settings = "settings={backbone: test_resnet, scales: 2, depth: 1, dim: 16, num_heads: 2}"
    call(
        "compare", data, "-o", tmp_path, "--network", "duoformer", "--network", "test_resnet", "--folds", 2,
        "--set", "network=duoformer", "--set", settings, "--set", "size=32", *small,
    )  # fmt: skip
    found = json.loads((tmp_path / "comparison.json").read_text())
    assert {row["network"] for row in found["networks"]} == {"duoformer", "test_resnet"}
    best, other = found["networks"]
    assert best["balanced"] >= other["balanced"]
    assert best["items"] == other["items"] == 48
    assert found["paired"][0]["items"] == 16
    assert best["network"] in (tmp_path / "index.html").read_text()
    with pytest.raises(UserError, match="settings are for network=duoformer, which is not among"):
        call(
            *("compare", data, "-o", tmp_path / "no", "--network", "resnet10t", "--network", "test_resnet"),
            *("--set", "network=duoformer", "--set", settings),
        )


@pytest.mark.slow
def test_a_slide_of_20000_pixels_within_2_gigabytes(tmp_path: Path) -> None:
    """The process and all it holds, with a network that has not been trained: what it answers does not matter here."""
    slide = write_texture_slide(tmp_path / "large.tif", 20_000)
    recipe, kinds = TileRecipe(size=224, mpp=0.5), ["brick", "grass", "gravel"]
    network = create_tile_network(recipe.network, 3, recipe.size)
    TileClassifier(network, recipe, kinds, (224, 224)).save(tmp_path / "model")
    words = ["tile-classification", "predict", tmp_path / "model", slide, "-o", tmp_path / "out", "--memory", "1G"]
    code = (
        "import sys, resource; from nearfar.core.cli.root import run; status = run(sys.argv[1:]); "
        "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(status)"
    )
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words), "--device", "cpu"], capture_output=True, text=True, timeout=3000
    )
    assert done.returncode == 0, done.stderr
    peak = int(re.search(r"peak (\d+)", done.stdout)[1]) << 10
    about = json.loads((tmp_path / "out" / "large.json").read_text())
    print(f"{about['tiles']} tiles, {time.monotonic() - started:.0f} s, peak {peak / 2**20:.0f} MB")
    assert peak < 2 << 30
    assert about["tiles"] > 2500
    with (tmp_path / "out" / "large_tiles.csv").open() as stream:
        assert sum(1 for _ in stream) == about["tiles"] + 1
