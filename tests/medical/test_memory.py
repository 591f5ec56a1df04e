"""What `predict` takes in all, as the system counts it: program, network, scan and the rest within --memory."""

import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from nearfar.core.memory import resident_memory
from nearfar.medical.data.scans import read_scan, write_labels
from nearfar.medical.preparation import Channel
from nearfar.medical.recipe import Recipe
from nearfar.medical.segmenter import Segmenter

LABELS = 30


def ct(path: Path, shape: tuple[int, int, int]) -> None:
    """A body of noise in air, with padding around it, as int16."""
    rng = np.random.default_rng(0)
    rows, columns = (np.linspace(-1, 1, n, dtype=np.float32) for n in shape[:2])
    inside = rows[:, None] ** 2 + (columns[None] / 0.8) ** 2 < 0.8
    data = np.full(shape, -1000, np.int16)
    for k in range(shape[2]):
        data[..., k][inside] = rng.normal(40, 60, int(inside.sum())).astype(np.int16)
    data[rows[:, None] ** 2 + columns[None] ** 2 > 1] = -2048
    image = nib.Nifti1Image(data, np.diag([-0.7, -0.7, 1.0, 1.0]))
    nib.save(image, path)


def unet(side: int) -> Recipe:
    settings = {"features": (4, 4, 4, 4, 4, 4), "norm": ("group", {"num_groups": 2})}
    return Recipe(settings=settings, roi=(side, side, side))


def segmenter(recipe: Recipe, labels: int = LABELS) -> Segmenter:
    found = Segmenter.create(recipe, {k: f"organ {k}" for k in range(1, labels + 1)}, 1)
    found.channels = (Channel("ct", "CT", -100, 200, 40, 60, (-1000, 300), 1000),)
    return found


def peak(folder: Path, shape: tuple[int, int, int], memory: str, model: Segmenter) -> int:
    """Bytes that `nearfar medical-segmentation predict --memory` held at most."""
    ct(folder / "scan.nii.gz", shape)
    model.save(folder / "model")
    words = ["medical-segmentation", "predict", folder / "scan.nii.gz", "--model", folder / "model", "-o"]
    words += [folder / "out", "--memory", memory, "--overlap", "0", "--device", "cpu"]
    process = subprocess.Popen(
        [Path(sys.executable).with_name("nearfar"), *map(str, words)], env=os.environ | {"COLUMNS": "200"}
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert nib.load(folder / "out/scan.nii.gz").shape == shape
    return usage.ru_maxrss * 1024


linux = pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")


@linux
@pytest.mark.slow
def test_a_ct_of_thirty_labels_within_3_gb_in_all(tmp_path: Path) -> None:
    """Program, network, scan, windows and label maps."""
    held = peak(tmp_path, (512, 512, 600), "3G", segmenter(unet(64)))
    print(f"{held / 2**20:.0f} MB held of 3072")
    assert held < 3 * 2**30


@linux
@pytest.mark.slow
def test_a_sixteenth_of_it_takes_a_sixteenth_of_what_the_program_leaves(tmp_path: Path) -> None:
    ct(tmp_path / "scan.nii.gz", (256, 256, 150))
    model = segmenter(unet(32))
    model(read_scan(tmp_path / "scan.nii.gz"), memory=2**30, overlap=0)  # libraries load what they need
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident_memory()
    scan = read_scan(tmp_path / "scan.nii.gz")
    labels = model(scan, memory=120 << 20, overlap=0)
    write_labels(tmp_path / "labels.nii.gz", labels, scan)
    windows = 16 * 4 * 32**3 * (LABELS + 1)
    assert resident_memory(peak=True) - before < (2 * 2**30) // 16 + windows


@linux
@pytest.mark.slow
def test_segmamba_by_windows_within_4_gb_in_all(tmp_path: Path) -> None:
    """The published network over the first 10 of 64 windows of a whole volume of five classes, in the app's program.

    What comes after the windows takes less than they; all of them would take an hour.
    """
    ct(tmp_path / "scan.nii.gz", (512, 512, 400))
    segmenter(Recipe(network="segmamba", roi=(128, 128, 128)), 4).save(tmp_path / "model")
    program = f"""
import nearfar.apps.medical_segmentation.cli
from nearfar.core.memory import resident_memory
from nearfar.medical.data.scans import read_scan
from nearfar.medical.segmenter import Segmenter

def progress(done, windows):
    if done == 10:
        print(windows, resident_memory(peak=True), flush=True)
        raise SystemExit

model, scan = Segmenter.load("{tmp_path}/model"), read_scan("{tmp_path}/scan.nii.gz")
model(scan, overlap=0, memory=4 << 30, progress=progress)
"""
    told = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True).stdout
    windows, held = map(int, told.split()[-2:])
    print(f"{held / 2**20:.0f} MB of 4096")
    assert windows == 64
    assert held < 4 * 2**30
