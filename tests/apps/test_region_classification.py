"""The region-classification app from its command line, on coloured discs beside squares."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from nearfar.apps.region_classification.cli import app
from nearfar.core.errors import UserError


def call(*words: object) -> str:
    """Standard output of the command; errors as they are."""
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.stdout


@pytest.fixture
def data(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Eight pictures with a red and a blue region each, their masks and names."""
    generator = np.random.default_rng(0)
    pictures, masks = tmp_path / "pictures", tmp_path / "masks"
    pictures.mkdir()
    masks.mkdir()
    for i in range(8):
        pixels, ids = generator.integers(0, 60, (48, 48, 3), dtype=np.uint8), np.zeros((48, 48), np.uint8)
        row, column = generator.integers(0, 28, 2)
        ids[row : row + 20, column : column + 10], ids[row : row + 20, column + 10 : column + 20] = 1, 2
        pixels[ids == 1, 0], pixels[ids == 2, 2] = 220, 220
        Image.fromarray(pixels).save(pictures / f"{i}.png")
        Image.fromarray(ids).save(masks / f"{i}.png")
    names = tmp_path / "names.json"
    names.write_text(json.dumps({"1": "red", "2": "blue"}))
    return pictures, masks, names


def test_train_evaluate_predict(data: tuple[Path, Path, Path], tmp_path: Path) -> None:
    pictures, masks, names = data
    given = [pictures, masks, "--names", names]
    small = ["roi=test_resnet", "extra=none", "size=32", "epochs=12", "batch_size=8", "learning_rate=0.003"]
    words = [word for setting in small for word in ("--set", setting)]
    (first,) = json.loads(call("train", *given, "-o", tmp_path / "model", *words, "--device", "cpu", "--json"))
    (again,) = json.loads(call("train", *given, "-o", tmp_path / "model", *words, "--device", "cpu", "--json"))
    assert again == first, "a finished run is not trained again"
    (row,) = json.loads(call("evaluate", tmp_path / "model", *given, "--ambiguous", "red", "--json"))
    assert row["regions"] == 16
    assert row["accuracy"] > 0.8
    assert "16 of 16" in row["marked"]
    rows = json.loads(call("predict", tmp_path / "model", *given, "-o", tmp_path / "regions.csv", "--json"))
    assert len(rows) == 32
    assert sum(r["probability"] for r in rows[:2]) == pytest.approx(1, abs=1e-5)
    assert (tmp_path / "regions.csv").is_file()


def words_of(settings: list[str]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


@pytest.mark.ci
def test_students_of_a_teacher(data: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """A teacher of another kind that has the categories the other way round is followed alone, in every way."""
    pictures, masks, names = data
    turned = tmp_path / "turned.json"
    turned.write_text(json.dumps({"1": "blue", "2": "red"}))
    small = ["roi=test_resnet", "epochs=25", "batch_size=8", "learning_rate=0.005"]
    teacher, cpu = tmp_path / "teacher", ["--device", "cpu"]
    alone = words_of([*small, "size=48", "extra=none"])
    call("train", pictures, masks, "--names", turned, "-o", teacher, *alone, *cpu)
    for kind, extra in (("soft", "none"), ("hard", "pooled"), ("deit", "none")):
        student = tmp_path / kind
        taught = words_of(
            [
                *small,
                f"size={64 if extra == 'pooled' else 32}",
                f"extra={extra}",
                f"distillation={kind}",
                "teacher_weight=1",
            ]
        )
        call("train", pictures, masks, "--names", names, "-o", student, "--teacher", teacher, *taught, *cpu)
        (row,) = json.loads(call("evaluate", student, pictures, masks, "--names", turned, "--json"))
        assert row["accuracy"] > 0.8, (kind, row)
    few = tmp_path / "few"
    few.mkdir()
    for i in range(4):
        shutil.copy(pictures / f"{i}.png", few)
    quick = ["--set", "epochs=1", "--set", "distillation=soft", *words_of([*small[:1], "size=32", "extra=none"])]
    call("train", few, masks, "--names", names, "-o", tmp_path / "q", "--teacher", teacher, *quick, *cpu)
    (row,) = json.loads(call("evaluate", tmp_path / "q", pictures, masks, "--names", turned, "--json"))
    assert row["marked"] == "16 of 16 regions seen in training"  # its teacher's are among them
    with pytest.raises(UserError, match="no grid to pool on; take larger pictures"):
        call("train", pictures, masks, "--names", names, "-o", tmp_path / "n", *cpu,
             *words_of([*small, "size=32", "extra=pooled"]))  # fmt: skip
    assert "fc_dist.weight" in load_file(student / "model.safetensors")  # the second classifier of `deit`
    with pytest.raises(UserError, match="teacher"):  # another teacher is another run
        call("train", pictures, masks, "--names", names, "-o", student, "--teacher", tmp_path / "soft", *taught, *cpu)
    with pytest.raises(UserError, match=r"does not know green"):
        names.write_text(json.dumps({"1": "blue", "2": "green"}))
        call("train", pictures, masks, "--names", names, "-o", tmp_path / "m", *taught, *cpu, "--teacher", teacher)


def test_a_table_of_boxes_and_disturbed_views(data: tuple[Path, Path, Path], tmp_path: Path) -> None:
    pictures, masks, names = data
    small = words_of(["roi=test_resnet", "extra=test_resnet", "size=32", "epochs=1", "batch_size=8"])
    call("train", pictures, masks, "--names", names, "-o", tmp_path / "model", *small, "--device", "cpu")
    table = tmp_path / "boxes.csv"
    rows = []
    for i in range(2):
        with Image.open(masks / f"{i}.png") as mask:
            where = np.argwhere(np.asarray(mask) == 1)
        (top, left), (bottom, right) = where.min(0), where.max(0) + 1
        rows.append(f"{i}.png,{left},{top},{right},{bottom}")
    table.write_text("\n".join(["picture,left,top,right,bottom", *rows]))
    named = json.loads(call("predict", tmp_path / "model", pictures, table, "-o", tmp_path / "r.csv", "--json"))
    assert [row["picture"] for row in named[::2]] == ["0", "1"]
    assert {row["region"] for row in named} == {"1"}
    given = [pictures, masks, "--names", names, "--json"]
    scores = [
        json.loads(call("evaluate", tmp_path / "model", *given, *more))[0]
        for more in ([], ["--disturb", "permuted"], ["--disturb", "translocated"])
    ]
    assert [row.get("views") for row in scores] == [None, "permuted", "translocated"]
    assert {row["regions"] for row in scores} == {16}
    for command, more, message in (
        ("evaluate", [*given, "--disturb", "shaken"], "one of permuted, translocated"),
        ("evaluate", [*given, "--sam", tmp_path], "is for a CSV table"),
        ("evaluate", [pictures, table], "has no column category"),
        ("evaluate", [pictures, table, "--names", names], "is for a folder of masks"),
    ):
        with pytest.raises(UserError, match=message):
            call(command, tmp_path / "model", *more)


def test_what_is_refused(data: tuple[Path, Path, Path], tmp_path: Path) -> None:
    pictures, masks, names = data
    with pytest.raises(UserError, match="needs --names"):
        call("train", pictures, masks, "-o", tmp_path / "m")
    with pytest.raises(UserError, match="no such file or folder"):
        call("train", pictures, tmp_path / "nowhere", "-o", tmp_path / "m")
    names.write_text(json.dumps({"1": "red", "2": "red"}))
    with pytest.raises(UserError, match="at least two categories"):
        call("train", pictures, masks, "--names", names, "-o", tmp_path / "m")
    names.write_text(json.dumps({"1": "red"}))
    with pytest.raises(UserError, match="holds 2, which no category has"):
        call("train", pictures, masks, "--names", names, "-o", tmp_path / "m")
    names.write_text(json.dumps({"1": "red", "2": "blue"}))
    for more, message in (
        (["--set", "distillation=soft"], "the one needs the other"),
        (["--teacher", tmp_path], "the one needs the other"),
        (["--set", "distillation=firm"], "distillation is 'firm'"),
        (["--set", "extra=pooled", "--set", "published=true"], "no such network"),
        (["--set", "roi=mnet", "--set", "extra=pooled"], "gives no features that can be pooled"),
        (["--set", "roi=hub:nothing"], "no backbone"),
    ):
        with pytest.raises(UserError, match=message):
            call("train", pictures, masks, "--names", names, "-o", tmp_path / "m", *more)
    Image.fromarray(np.zeros((48, 48), np.uint8)).save(masks / "3.png")
    with pytest.raises(UserError, match=r"3\.png: is empty; leave 3\.png out"):
        call("train", pictures, masks, "--names", names, "-o", tmp_path / "m")
    Image.fromarray(np.zeros((48, 40), np.uint8)).save(masks / "3.png")
    with pytest.raises(UserError, match=r"3\.png: has 40 x 48 pixels, the picture 48 x 48"):
        call("train", pictures, masks, "--names", names, "-o", tmp_path / "m")
    with pytest.raises(UserError, match="holds no trained region classifier"):
        call("evaluate", tmp_path / "m", pictures, masks, "--names", names)
