"""A classifier in one file says what the model says, or is not written."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from nearfar.core.errors import UserError
from nearfar.vision.classification.classifier import Classifier, create_model
from nearfar.vision.classification.exporting import check, export_classifier, pixels_for, runner
from nearfar.vision.data.images import Pictures


def classifier(model: nn.Module | None = None, name: str = "small-nearfar_convnext_atto") -> Classifier:
    torch.manual_seed(0)
    return Classifier((model or create_model(name, 3, 64, layer_scale=1.0)).eval(), name, ["a", "é", "c"], 64, 0.875)


def noise(number: int = 6) -> Pictures:
    values = np.random.default_rng(0).integers(0, 256, (number, 70, 80, 3), dtype=np.uint8)
    return Pictures([str(i) for i in range(number)], [-1] * number, [], lambda i: Image.fromarray(values[i]))


class OneSize(nn.Module):
    """Right at the size of its first pictures alone, as a mask computed beforehand is."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.mean((2, 3))) * (1 + x.shape[3] // 100)


class Mean(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(2)


def test_onnx_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.vision.base import without_shape_checks

    without_shape_checks(monkeypatch)
    trained, path = classifier(), tmp_path / "model.onnx"
    rows = export_classifier(trained, path)
    assert len({(row["height"], row["width"]) for row in rows}) == 3
    told = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert json.loads(told["classes"]) == ["a", "é", "c"]
    assert told["size"] == "64"
    for row in check(trained, path, noise(), (64, 96)):
        assert row["equal answers"] == 1
        assert row["largest error"] < 1e-5
    # what the app computes, resizing and normalization of its own
    want = trained.scores(noise())
    data = noise().subset(range(6), pixels_for(64, trained))
    raw = torch.stack([data[i][0] for i in range(6)])
    assert 1 < raw.max() <= 255
    assert np.allclose(runner(path)(raw.numpy()), want.numpy(), atol=1e-3)


def test_program_of_torch_export_and_refusals(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    export_classifier(classifier(nn.Sequential(nn.Conv2d(3, 3, 5), nn.AdaptiveAvgPool2d(1), nn.Flatten())), path)
    extra = {"classifier.json": ""}
    torch.export.load(path, extra_files=extra)
    assert json.loads(json.loads(extra["classifier.json"])["classes"]) == ["a", "é", "c"]
    with pytest.raises(UserError, match=r"\.onnx .*or \.pt2"):
        export_classifier(classifier(), tmp_path / "model.tflite")
    with pytest.raises(UserError, match="8 bits"):
        export_classifier(classifier(), path, calibration=noise())


@pytest.mark.ci
def test_a_map_of_one_cell_does_not_fix_the_size(tmp_path: Path) -> None:
    """64 x 96 pixels make one cell of 64, which a tracer takes for a constant."""
    coarse = nn.Sequential(nn.AvgPool2d(64), nn.Conv2d(3, 3, 1), nn.Flatten(2), Mean())
    rows = export_classifier(classifier(coarse), tmp_path / "model.onnx")
    assert {row["height"] for row in rows} == {64, 128}
    with pytest.raises(UserError, match=r"64 x 96 pixels.*--fixed"):
        export_classifier(classifier(coarse), tmp_path / "model.pt2")


def test_a_file_that_would_differ_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "nearfar.vision.classification.exporting.runner", lambda path: lambda images: np.full((3, 3), 1 / 3, np.float32)
    )
    with pytest.raises(UserError, match=r"differs from the model at .*--fixed"):
        export_classifier(classifier(OneSize()), tmp_path / "model.pt2")
    assert not list(tmp_path.glob("*.pt2"))


@pytest.mark.ci
def test_8_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.vision.base import without_shape_checks

    without_shape_checks(monkeypatch)
    (row,) = export_classifier(classifier(), tmp_path / "model.onnx", calibration=noise(16))
    assert row["pictures"] == 16
    assert row["largest error"] < 0.1


def test_a_run_folder_is_a_local_dir_of_timm(tmp_path: Path) -> None:
    trained = classifier()
    trained.save(tmp_path / "run")
    model = timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True).eval()
    assert model.num_classes == 3
    assert model.pretrained_cfg["label_names"] == ["a", "é", "c"]
    assert model.pretrained_cfg["input_size"] == (3, 64, 64)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(x), trained.model(x))


SCRIPT = """
import argparse
import timm
from helper_of_the_script import ask

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--num-classes", type=int)
    args = parser.parse_args()
    model = timm.create_model(args.model, num_classes=args.num_classes, **ask())
    print(type(model).__name__, sum(p.numel() for p in model.get_classifier().parameters()))

if __name__ == "__main__":
    main()
"""


@pytest.mark.ci
def test_scripts_as_timm_writes_them_know_our_models(tmp_path: Path) -> None:
    """With arguments of their own, modules beside them, and what they do under `__main__` alone."""
    (tmp_path / "validate.py").write_text(SCRIPT)
    (tmp_path / "helper_of_the_script.py").write_text("def ask():\n    return {'drop_rate': 0.1}\n")
    words = [sys.executable, "-m", "nearfar.vision.timm", tmp_path / "validate.py", "--model", "hornet_tiny_7x7"]
    done = subprocess.run([*map(str, words), "--num-classes", "3"], capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["HorNet", "1539"], done.stderr[-2000:]
    no = subprocess.run([sys.executable, "-m", "nearfar.vision.timm", "nowhere.py"], capture_output=True, text=True)
    assert no.returncode
    assert no.stderr.startswith("usage: ")
