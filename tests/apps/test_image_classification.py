"""The image-classification app from its command line, on handwritten digits."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from typer.testing import CliRunner

from nearfar.apps.image_classification.cli import app
from nearfar.apps.image_classification.tour import MODELS, chapter, digits
from nearfar.core.cli.batch import BatchError
from nearfar.core.errors import UserError
from nearfar.core.report import Report
from nearfar.vision.classification.classifier import LINEAR, Classifier, create_model, evaluate_scores
from nearfar.vision.classification.comparison import compare
from nearfar.vision.classification.training import Recipe, train_classifier
from nearfar.vision.data.images import split_pictures
from nearfar.vision.data.sources import open_pictures


def call(*words: object) -> str:
    """Standard output of the command; errors as they are."""
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.stdout


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two digits as an image folder with train and test."""
    root = tmp_path_factory.mktemp("digits")
    every = digits()
    for i, label in enumerate(every.labels):
        if label in (0, 1):
            folder = root / ("test" if i % 4 == 0 else "train") / f"digit{label}"
            folder.mkdir(parents=True, exist_ok=True)
            every[i][0].save(folder / f"{i}.png")
    return root


SHORT = [
    "--set",
    "size=32",
    "--set",
    "epochs=3",
    "--set",
    "warmup_epochs=0.5",
    "--set",
    "smoothing=0",
    "--set",
    "batch_size=16",
]


def test_train_evaluate_predict(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (row,) = json.loads(call("train", data, "-o", run, "--model", "resnet10t", *SHORT, "--json"))
    assert row["classes"] == 2
    assert {"model.safetensors", "classifier.json", "metrics.csv", "run.json"} <= {p.name for p in run.iterdir()}
    (scores,) = json.loads(call("evaluate", run, data, "--split", "test", "-o", tmp_path / "scores", "--json"))
    assert scores["accuracy"] > 0.8  # half would be chance
    assert scores["low"] <= scores["accuracy"] <= scores["high"]
    assert (tmp_path / "scores/page.html").is_file()
    # a damaged picture in the folder counts as wrong, the others are done, exit status 1
    spoilt = data / "test/digit0/broken.png"
    spoilt.write_bytes(b"not a picture")
    try:
        with pytest.raises(BatchError, match=r"broken\.png"):
            call("evaluate", run, data, "--split", "test", "-o", tmp_path / "scores")
        again = json.loads((tmp_path / "scores/scores.json").read_text())
        assert again["unreadable"] == 1
        assert again["accuracy"] == pytest.approx(scores["accuracy"] * scores["pictures"] / (scores["pictures"] + 1))
        with pytest.raises(BatchError, match=r"1 of \d+ failed"):
            call("predict", run, data / "test", "-o", tmp_path / "table.csv")
        (failed,) = json.loads((tmp_path / "table.csv.failures.json").read_text())
        assert failed["item"] == str(spoilt)
    finally:
        spoilt.unlink()
    lines = (tmp_path / "table.csv").read_text().splitlines()
    # what is known is not done again: rows that were changed by hand come back
    kept = tmp_path / ".table.csv.rows.jsonl"
    kept.write_text(kept.read_text().replace('"row": [', '"row": [7.0, '))
    again = json.loads(call("predict", run, data / "test", "-o", tmp_path / "table.csv", "--json"))
    assert {row["probability"] for row in again} == {7.0}
    assert not (tmp_path / "table.csv.failures.json").exists()
    assert lines[0] == "file,rank,class,probability"
    assert len(lines) == 1 + scores["pictures"]
    (data.parent / "other").mkdir(exist_ok=True)
    for name in ("x", "y", "z"):
        (tmp_path / "other" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "other" / name / "p.png")
    with pytest.raises(UserError, match=r"has 3 classes, of which .* does not know x, y, z; it knows 2"):
        call("evaluate", run, tmp_path / "other")


def test_a_published_checkpoint_on_some_of_its_classes(tmp_path: Path) -> None:
    file = tmp_path / "convnext.pth"
    torch.save(timm.create_model("nearfar_convnext_tiny").state_dict(), file)
    for name in ("n01440764", "n02102040"):
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.new("RGB", (40, 30), "green").save(tmp_path / "val" / name / "p.png")
    weights = ["--model", "nearfar_convnext_tiny.fb_in22k_ft_in1k_384"]
    (scores,) = json.loads(call("evaluate", file, tmp_path, "--split", "val", *weights, "--json"))
    assert (scores["pixels"], scores["crop"], scores["pictures"]) == (384, 1.0, 2)
    assert scores["accuracy"] <= 0.5  # both pictures are the same
    row = json.loads(call("predict", file, tmp_path / "val", "-o", tmp_path / "p.csv", "--top", 2, "--json"))[1]
    assert row["rank"] == 2
    assert row["class"][0] == "n"
    assert row["description"]


def test_models_are_listed() -> None:
    rows = json.loads(call("models", "overlock", "--json"))
    assert [row["model"] for row in rows] == ["overlock_xt", "overlock_t", "overlock_s", "overlock_b"]
    assert rows[0]["top-1 (published)"] == 82.7
    with pytest.raises(UserError, match="no model of this name"):
        call("models", "nothing-like-this")


@pytest.mark.slow
def test_tour_chapter_learns(tmp_path: Path) -> None:
    report = Report("tour")
    chapter(report, tmp_path)
    report.write(tmp_path / "index.html")
    rows = (tmp_path / "table.csv").read_text().splitlines()[1:]
    assert [row.split(",")[0] for row in rows] == MODELS
    for row in rows:
        assert float(row.split(",")[1]) > 0.7, row  # a tenth would be chance
    # what was saved gives the same predictions
    every = digits()
    held = every.subset(split_pictures(every, 0.3, 0)[1][:40])
    loaded = Classifier.load(tmp_path / "small-attnet_xxs")
    assert evaluate_scores(loaded.scores(held), held.labels)["accuracy"] > 0.7


def test_bad_input(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such model"):
        call("train", data, "-o", tmp_path / "run", "--model", "resnet_of_dreams")
    with pytest.raises(UserError, match="unknown setting speed"):
        call("train", data, "-o", tmp_path / "run", "--set", "speed=9")
    with pytest.raises(UserError, match="--device tpu: not here; this machine has cpu"):
        call("train", data, "-o", tmp_path / "run", "--device", "tpu")
    with pytest.raises(UserError, match="holds no trained classifier"):
        call("predict", tmp_path, data)
    # an empty class folder is no reason to take the splits for classes
    (data / "train/digit7").mkdir()
    try:
        with pytest.raises(UserError, match="no pictures in the class folder digit7"):
            call("train", data, "-o", tmp_path / "run", "--set", "size=32")
    finally:
        (data / "train/digit7").rmdir()
    with pytest.raises(UserError, match=r"lsnet_t: takes pictures of at least 64 pixels, .* size is 32"):
        call("train", data, "-o", tmp_path / "run", "--model", "lsnet_t", "--set", "size=32")
    with pytest.raises(BatchError, match="small-lsnet_t: takes pictures of at least 64"):  # the linear model is done
        call("compare", data, "-o", tmp_path / "both", "--model", "small-lsnet_t", "--model", "linear",
             "--set", "size=32", "--set", "epochs=1")  # fmt: skip
    assert (tmp_path / "both/table.csv").read_text().count("linear") == 1
    every = digits()
    with pytest.raises(UserError, match="training and in the validation"):
        train_classifier("resnet10t", every, every, Recipe(size=32))


def test_compare_under_a_time_budget(data: Path, tmp_path: Path) -> None:
    settings = ("size=32", "batch_size=16", "epochs=4", "smoothing=0", "learning_rate=3e-3", "warmup_epochs=0.5")
    shared = ["--json", *(word for setting in settings for word in ("--set", setting))]
    models = ["--model", "linear", "--model", "small-attnet_xxs"]
    rows = json.loads(call("compare", data, "-o", tmp_path, "--seconds", 60, *models, *shared))
    assert [row["model"] for row in rows] == ["linear", "small-attnet_xxs"]
    for row in rows:
        assert row["accuracy"] > 0.8  # half would be chance
        assert row["epochs"] == 4
        assert row["memory (MiB)"] * 2**20 > 4e6 * row["params (M)"]
    assert {"table.csv", "plot.png", "page.html"} <= {p.name for p in tmp_path.iterdir()}
    # called again it finds what is done, whatever the budget would now allow
    again = json.loads(call("compare", data, "-o", tmp_path, "--seconds", 0.01, *models[:2], *shared))
    assert again[0]["accuracy"] == rows[0]["accuracy"]
    assert again[0]["epochs"] == rows[0]["epochs"]


def test_recipes_by_name_and_corrupt_training_pictures(data: Path, tmp_path: Path) -> None:
    spoilt = data / "train/digit0/broken.jpg"
    spoilt.write_bytes(b"\xff\xd8 no more")
    try:
        with pytest.raises(BatchError, match=r"broken\.jpg"):
            call("train", data, "-o", tmp_path, "--model", "test_resnet", "--recipe", "convnext_1k", "--set", "size=32",
                 "--set", "epochs=1", "--set", "batch_size=16", "--set", "warmup_epochs=0")  # fmt: skip
    finally:
        spoilt.unlink()
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["finished"]
    assert record["settings"]["cutmix"] == 1.0
    with pytest.raises(UserError, match=r"none that comes along; those are .*hornet_1k"):
        call("train", data, "-o", tmp_path, "--recipe", "hornet_2k")


@pytest.mark.slow
def test_small_network_beats_the_pixels_on_photographs(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    source = shared_data("cifar10/cifar10-12k-imagefolder.zip")
    recipe = Recipe(size=32, epochs=5, batch_size=32, learning_rate=3e-3, warmup_epochs=0.5, crop_scale=0.7)
    every, held = (open_pictures(source, split) for split in ("train", "test"))
    two = [name in ("airplane", "frog") for name in every.classes]
    learn, hold = (
        pictures.subset([i for i, label in enumerate(pictures.labels) if two[label]][::step])
        for pictures, step in ((every, 4), (held, 2))
    )
    rows = compare(["linear", "small-attnet_xxs"], learn, hold, recipe, tmp_path)
    assert rows[1]["accuracy"] > 0.75  # half would be chance
    assert rows[1]["accuracy"] >= rows[0]["accuracy"]


def masks_of(pictures: list[Path], folder: Path) -> Path:
    """A folder of masks with a square object in the middle."""
    (folder / "masks").mkdir()
    for path in pictures:
        with Image.open(path) as picture:
            mask = np.zeros(picture.size[::-1], np.uint8)
        mask[4:-4, 4:-4] = 1
        Image.fromarray(mask).save(folder / "masks" / f"{path.stem}.png")
    return folder / "masks"


def test_explain(data: Path, tmp_path: Path) -> None:
    """A table with a verdict on each map, a page, and what cannot be explained."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=2)
    Classifier(model.eval(), "test_resnet", ["digit0", "digit1"], 32, 1.0).save(tmp_path / "run")
    pictures = sorted((data / "test").rglob("*.png"))[:2]
    words = ["explain", tmp_path / "run", *pictures, "-o", tmp_path / "maps", "--steps", 8, "--check"]
    rows = json.loads(call(*words, "--method", "normgrad", "--method", "relevance", "--json"))
    assert [(row["method"], row["file"]) for row in rows] == [
        (method, str(picture)) for picture in pictures for method in ("normgrad", "relevance")
    ]
    for row in rows:
        assert row["beats noise"] == (row["score"] > row["noise"])
        assert -1 <= row["when shuffled"] <= 1
    assert all(row["unaccounted"] < 0.01 for row in rows if row["method"] == "relevance")
    assert (tmp_path / "maps" / "page.html").stat().st_size > 10_000
    assert len((tmp_path / "maps" / "maps.csv").read_text().splitlines()) == 5
    ranking = json.loads((tmp_path / "maps" / "ranks.json").read_text())
    assert {row["method"] for row in ranking} == {"normgrad", "relevance"}
    text = call("explain", tmp_path / "run", pictures[0], "-o", tmp_path / "one", "--target", "digit1", "--steps", 4)
    assert "normgrad: beats noise and edges on" in text
    for option, message in (
        (["--target", "digit7"], "is none of the 2 classes"),
        (["--method", "magic"], "no such method"),
        (["--layer", "nowhere"], "has no nowhere"),
    ):
        with pytest.raises(UserError, match=message):
            call("explain", tmp_path / "run", pictures[0], "-o", tmp_path / "bad", *option)
    boxes = tmp_path / "boxes.csv"
    boxes.write_text("picture,left,top,right,bottom\n" + "".join(f"{p.name},1,1,31,31\n" for p in pictures))
    for place in (boxes, masks_of(pictures, tmp_path)):
        given = ["--method", "gradient", "--steps", 4, "-o", tmp_path / "pointed", "--masks", place, "--tolerance", 0]
        rows = json.loads(call("explain", tmp_path / "run", *pictures, *given, "--json"))
        assert all(0 < row["inside"] <= 1 and 0 < row["by chance"] <= 1 for row in rows)
        assert rows[0]["insertion"] - rows[0]["deletion"] == pytest.approx(rows[0]["score"])
    boxes.write_text("picture,left,top,right,bottom\nother.png,1,1,9,9\n")
    with pytest.raises(UserError, match=r"boxes\.csv: .*is empty; there is no object to point at"):
        call("explain", tmp_path / "run", pictures[0], "-o", tmp_path / "bad", "--masks", boxes)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    with pytest.raises(BatchError, match=r"broken\.png"):
        call("explain", tmp_path / "run", pictures[0], broken, "-o", tmp_path / "two", "--method", "gradient")


@pytest.mark.parametrize(
    ("name", "layers", "heads"),
    [
        ("small-cvt_13", {"stages.0.blocks.0.attn": (1, 256, 64), "stages.2.blocks.1.attn": (4, 17, 5)}, {}),
        ("small-nearfar_tnt_s_patch16_224", {"blocks.3.outer.attn": (4, 17, 17)}, {}),
        (
            "small-nearfar_volo_d1_224",
            {"stages.0.0.attn": (2, 16, 9, 9), "stages.1.0.attn": (4, 16, 16), "class_blocks.0.attn": (4, 1, 17)},
            {},
        ),
        ("small-nearfar_convit_tiny", {"blocks.0.attn": (4, 64, 64), "blocks.3.attn": (4, 65, 65)}, {"gate": 12}),
        ("small-nearfar_halonet26t", {"stages.1.blocks.0.self_attn": (4, 64, 64)}, {}),
        ("small-biformer_tiny", {"stages.0.blocks.0.attn": (1, 16, 16), "stages.3.blocks.0.attn": (4, 4, 4)}, {}),
        ("small-rmt_t", {"stages.0.blocks.0.attn": (2, 256, 256), "stages.3.blocks.0.attn": (4, 4, 4)}, {"range": 16}),
    ],
)
def test_attention(
    data: Path, tmp_path: Path, name: str, layers: dict[str, tuple[int, ...]], heads: dict[str, int]
) -> None:
    """Every attention backbone's maps as arrays whose rows are shares, as pictures, and what its heads have."""
    torch.manual_seed(0)
    run, output = tmp_path / "run", tmp_path / "attention"
    Classifier(create_model(name, 2, 64).eval(), name, ["digit0", "digit1"], 64, 1.0).save(run)
    pictures = sorted((data / "test").rglob("*.png"))[:2]
    rows = json.loads(call("attention", run, *pictures, "-o", output, "--at", "0.2,0.7", "--json"))
    assert [row["file"] for row in rows] == [str(picture) for picture in pictures]
    for row in rows:
        with Image.open(row["picture"]) as drawn:
            assert drawn.width > 200
        with np.load(row["maps"]) as maps:
            assert len(maps.files) == row["layers"]
            for layer, shape in layers.items():
                assert maps[layer].shape == shape
                np.testing.assert_allclose(maps[layer].sum(-1), 1, atol=1e-5)
    assert (output / "page.html").stat().st_size > 10_000
    table = (output / "heads.csv").read_text().splitlines() if heads else []
    assert {kind: len(table) - 1 for kind in heads} == heads
    assert all(kind in table[0] for kind in heads)


def test_attention_refuses(data: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    picture = next((data / "test").rglob("*.png"))
    Classifier(timm.create_model("test_resnet", num_classes=2).eval(), "test_resnet", ["a", "b"], 32, 1.0).save(
        tmp_path / "run"
    )
    with pytest.raises(UserError, match="has attention or selection maps"):
        call("attention", tmp_path / "run", picture, "-o", tmp_path / "maps")
    for place in ("0.5", "0.5,2", "here,there"):
        with pytest.raises(UserError, match=f"--at {place}: is not ROW,COLUMN"):
            call("attention", tmp_path / "run", picture, "-o", tmp_path / "maps", "--at", place)


@pytest.fixture(scope="module")
def two_models(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small transformer and a small CNN that know two digits."""
    root = tmp_path_factory.mktemp("models")
    for name in ("small-evit_deit_tiny", "test_resnet"):
        words = ["--model", name, *SHORT, "--set", "epochs=6"]
        call("train", data, "-o", root / name, *words, "--json")
    return root / "small-evit_deit_tiny", root / "test_resnet"


def test_prune(data: Path, two_models: tuple[Path, Path], tmp_path: Path) -> None:
    words = [
        "prune",
        two_models[0],
        data,
        "--split",
        "test",
        "-o",
        tmp_path,
        "--keep",
        0.5,
        "--write",
        tmp_path / "few",
    ]
    rows = json.loads(call(*words, "--loss", 1, "--json"))
    assert [row["keep rate"] for row in rows] == [1, 0.5]
    assert rows[1]["MMACs"] < rows[0]["MMACs"]
    assert {"table.csv", "table.json", "plot.png", "page.html"} <= {p.name for p in tmp_path.iterdir()}
    written = Classifier.load(tmp_path / "few")
    fastest = max(rows, key=lambda row: row["pictures/s"])["keep rate"]
    assert written.model.keep_rate == fastest
    assert json.loads(call(*words, "--loss", 1, "--json")) == rows, "what is done is not measured again"
    with pytest.raises(UserError, match="holds results of other model"):
        call("prune", tmp_path / "few", data, "--split", "train", "-o", tmp_path)
    with pytest.raises(UserError, match="keeps no tokens"):
        call("prune", two_models[1], data, "-o", tmp_path / "cnn", "--split", "test")
    with pytest.raises(UserError, match=r"--keep 1.5: is a share of the tokens in \(0, 1\]"):
        call("prune", two_models[0], data, "-o", tmp_path / "x", "--keep", 1.5)
    with pytest.raises(UserError, match=r"no such file or folder; to take a model .* write hub:deit_of_dreams"):
        call("prune", "deit_of_dreams", data, "-o", tmp_path / "x")
    with pytest.raises(UserError, match="hub:deit_of_dreams: timm has no model of this name"):
        call("prune", "hub:deit_of_dreams", data, "-o", tmp_path / "x")


@pytest.mark.slow
def test_robustness(data: Path, two_models: tuple[Path, Path], tmp_path: Path) -> None:
    words = ["robustness", *two_models, data, "--split", "test", "-o", tmp_path, "--patch", 8, "--steps", 5]
    words += ["--attacked", 4, "--seeds", 2, "--corruption", "contrast", "--corruption", "fog", "--temperature", 1]
    words += ["--temperature", 1.5, "--json"]
    none = json.loads(call(*words, "--seconds", 0))
    assert [row["accuracy"] > 0.8 for row in none] == [True, True]
    spoilt = data / "test/digit0/broken.png"
    spoilt.write_bytes(b"not a picture")
    try:
        with pytest.raises(BatchError, match=r"broken\.png"):
            call(*words)
    finally:
        spoilt.unlink()
    result = json.loads((tmp_path / "results.json").read_text())
    assert {row["corruption"] for row in result["corruptions"]} == {"contrast", "fog"}
    assert len(result["adversarial"]) == 4
    assert [row["T"] for row in result["temperature"]] == [1, 1.5]
    for row in result["temperature"]:
        assert row["either (%)"] >= max(row["adaptive (%)"], row["transferred (%)"])
        if row["T"] == 1:
            assert row["adaptive (%)"] == row["transferred (%)"], "at 1 both are the same attack"
    assert len(result["places"]) == 2
    assert {row["attack"] for row in result["occlusion"]} == {"replacement", "drop", "permutation"}
    for row in result["adversarial"]:
        assert row["pictures"] <= 4
    with pytest.raises(UserError, match="32 x 32 are smaller than a patch of 64"):
        call("robustness", two_models[1], data, "--split", "test", "-o", tmp_path / "y", "--patch", 64)
    with pytest.raises(UserError, match="17 patches were asked for; pictures have 16"):
        call("robustness", two_models[1], data, "--split", "test", "-o", tmp_path / "y", "--patch", 8, "--count", 17)
    with pytest.raises(UserError, match="offset is -1"):
        call("robustness", two_models[1], data, "-o", tmp_path / "y", "--offset", -1)
    with pytest.raises(UserError, match=r"share 1\.5 is outside"):
        call("robustness", two_models[1], data, "-o", tmp_path / "y", "--share", 1.5)
    with pytest.raises(UserError, match="corruption 'rain' is unknown"):
        call("robustness", two_models[1], data, "-o", tmp_path / "y", "--corruption", "rain")


def test_several_classes_from_a_table(tmp_path: Path) -> None:
    """From training to a table of predictions; what is missing counts as wrong, and is said."""
    every = digits()
    rows = ["file,label"]
    for n in range(48):  # two digits side by side
        i, j = (next(k for k in range(37 * n + s, 1797) if every.labels[k] in (0, 1)) for s in (0, 500 % (n + 3)))
        picture = Image.new("RGB", (64, 32))
        picture.paste(every[i][0], (0, 0))
        picture.paste(every[j][0], (32, 0))
        picture.save(tmp_path / f"{n}.png")
        rows.append(f"{n}.png,{';'.join(sorted({f'digit{every.labels[k]}' for k in (i, j)}))}")
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    run = tmp_path / "run"
    settings = [*SHORT, "--set", "views=flip", "--set", "crop_mode=squash"]
    (row,) = json.loads(
        call("train", tmp_path / "labels.csv", "-o", run, "--model", "test_resnet", *settings, "--json")
    )
    assert 0 <= row["validation mAP"] <= 1
    (tmp_path / "0.png").unlink()
    with pytest.raises(BatchError, match=r"0\.png: no such file"):
        call("evaluate", run, tmp_path, "-o", tmp_path / "scores")
    scores = json.loads((tmp_path / "scores/scores.json").read_text())
    assert (scores["pictures"], scores["unreadable"], scores["views"]) == (48, 1, "flip")
    assert [entry["class"] for entry in scores["by class"]] == ["digit0", "digit1"]
    assert scores["low"] <= scores["mAP"] <= scores["high"]
    words = ["predict", run, tmp_path / "1.png", tmp_path / "2.png", "-o", tmp_path / "p.csv", "--json"]
    found = json.loads(call(*words, "--threshold", 0))
    assert [entry["rank"] for entry in found] == [1, 2, 1, 2]
    none = json.loads(call(*words, "--threshold", 1))
    assert [(entry["rank"], entry["class"]) for entry in none] == [(0, "")] * 2
    with pytest.raises(UserError, match="robustness: is for classifiers of one class a picture"):
        call("robustness", run, tmp_path, "-o", tmp_path / "r")


def test_answers_that_are_not_finite_are_failures_and_not_kept(tmp_path: Path) -> None:
    model = create_model(LINEAR, 2, 32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(3e38)
    Classifier(model, LINEAR, ["a", "b"], 32, 0.9).save(tmp_path / "run")
    for name in ("x.png", "y.png"):
        Image.new("RGB", (40, 40), "white").save(tmp_path / name)
    words = ["predict", tmp_path / "run", tmp_path / "x.png", tmp_path / "y.png", "-o", tmp_path / "t.csv"]
    for _ in range(2):
        with pytest.raises(BatchError, match=r"2 of 2 failed:\n.*x\.png: the model's scores are not finite"):
            call(*words)
    assert not (tmp_path / "t.csv").exists()
    assert len(json.loads((tmp_path / "t.csv.failures.json").read_text())) == 2
