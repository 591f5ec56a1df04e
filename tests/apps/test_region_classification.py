"""The region-classification app from its command line, on coloured discs beside squares."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
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
    with pytest.raises(UserError, match="holds no trained region classifier"):
        call("evaluate", tmp_path / "m", pictures, masks, "--names", names)
