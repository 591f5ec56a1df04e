"""What `inspect --html` finds, and that the command it gives mends it."""

import shlex
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from nearfar.apps.medical_segmentation import cli
from nearfar.medical.data.layouts import find_cases
from nearfar.medical.data.scans import read_labels, read_scan
from nearfar.medical.doctor import examine, label_shift


def run(*words: object) -> None:
    cli.app([str(w) for w in words], standalone_mode=False)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six bodies, no two alike; one label map moved, one scan mirrored, one with forms that differ, one bright."""
    rng, folder = np.random.default_rng(0), tmp_path / "data"
    for i in range(6):
        shape = (40, 36, 20)
        grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij"))
        body = (grid**2).sum(0) < 0.8
        organ = ((grid - np.array([0.35, 0.1 * (i % 2), 0])[:, None, None, None]) ** 2).sum(0) < 0.06 + 0.01 * i
        image = 100.0 * body + 200 * organ + ndimage.gaussian_filter(rng.normal(0, 60, shape), 1)
        labels = organ.astype(np.uint8)
        image = image * (10 if i == 5 else 1)
        if i == 1:
            labels = np.roll(labels, 3, 1)
        if i == 2:
            image, labels = image[::-1], labels[::-1]
        for kind, values in (("images", image.astype(np.float32)), ("labels", labels)):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            file = nib.Nifti1Image(values, np.diag([1.0, 1, 2, 1]))
            if i == 3:
                file.set_qform(np.diag([1.0, 1, 3, 1]), 1)
            nib.save(file, folder / kind / f"case{chr(97 + i)}x.nii.gz")
    (folder / "labels.json").write_text('{"1": "organ"}')
    return folder


def test_faults_are_found_and_mended(data: Path, tmp_path: Path) -> None:
    _, findings = examine(find_cases(data))
    by_case = {case: " | ".join(f.what for f in findings if f.case == case) for case in {f.case for f in findings}}
    assert "moved by (+0, -3, +0)" in by_case["casebx"]
    assert "better mirrored" in by_case["casecx"]
    assert "differ by up to" in by_case["casedx"]
    assert "highest is" in by_case["casefx"]
    assert not any("moved by" in text for case, text in by_case.items() if case != "casebx")
    mends = {f.case: shlex.split(f.mend) for f in findings if f.mend.startswith("nearfar") and f.case != "casefx"}
    for case in ("casebx", "casecx", "casedx"):
        run(*mends[case][2:])
    scan = read_scan(data / "images/casebx.nii.gz")
    moved = read_labels(data / "labels/mended_casebx.nii.gz", scan)
    assert label_shift(scan.image[0], moved) is None
    assert read_scan(data / "images/mended_casedx.nii.gz").notes == []
    mirrored = read_scan(data / "images/mended_casecx.nii.gz").image
    np.testing.assert_array_equal(mirrored[:, ::-1], read_scan(data / "images/casecx.nii.gz").image)


def test_the_page(data: Path, tmp_path: Path, capsys) -> None:
    run("inspect", data, "--html", tmp_path / "doctor.html")
    page = (tmp_path / "doctor.html").read_text()
    assert "nearfar medical-segmentation mend" in page
    assert "Histograms" in page
    assert "http://" not in page.replace("http://www.w3.org", "")


@pytest.mark.parametrize(("side", "unit"), [(0.0008, "meter"), (800.0, "micron")])
def test_sizes_in_another_unit_are_found_and_mended(tmp_path: Path, side: float, unit: str) -> None:
    values = np.random.default_rng(0).normal(100, 20, (12, 12, 12)).astype(np.float32)
    nib.save(nib.Nifti1Image(values, np.diag([side, side, side, 1])), tmp_path / "a.nii.gz")
    (finding,) = examine(find_cases(tmp_path))[1]
    assert f"--unit={unit}" in finding.mend
    run(*shlex.split(finding.mend)[2:])
    assert read_scan(tmp_path / "mended_a.nii.gz").spacing == pytest.approx((0.8,) * 3)
