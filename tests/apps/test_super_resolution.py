"""The super-resolution app from its command line, on pictures of scikit-image."""

import json
import shutil
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from typer.testing import CliRunner

from nearfar.apps.super_resolution.cli import app
from nearfar.apps.super_resolution.page import before_and_after
from nearfar.apps.super_resolution.tour import chapter
from nearfar.core.cli.batch import BatchError
from nearfar.core.errors import UserError
from nearfar.core.report import Report
from nearfar.vision.restoration.catanet import CATANet
from nearfar.vision.restoration.drct import DRCT
from tests.vision.restoration.test_upscaling import TINY

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def call(*words: object) -> str:
    """Standard output of the command; errors as they are."""
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.stdout


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("net")
    CATANet(2, **TINY).save_pretrained(folder)
    return folder


def test_a_folder_and_a_zip_file_with_a_bad_picture(net: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "in"
    (pictures / "more").mkdir(parents=True)
    Image.fromarray(data.coffee()[:30, :40]).save(pictures / "coffee.jpg")
    Image.fromarray(data.camera()[:20, :20]).save(pictures / "more" / "camera.png")
    (pictures / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    with zipfile.ZipFile(tmp_path / "more.zip", "w") as archive:
        archive.write(pictures / "coffee.jpg", "coffee.jpg")
    words = ("upscale", pictures, tmp_path / "more.zip", "--model", net, "-o", tmp_path / "out", "--json")
    with pytest.raises(BatchError, match=r"1 of 4 failed:\n.*bad\.png"):
        call(*words)
    for name, size in (("coffee.jpg", (80, 60)), ("more/camera.png", (40, 40)), ("more/coffee.jpg", (80, 60))):
        with Image.open(tmp_path / "out" / name) as picture:
            assert picture.size == size
            assert picture.mode == ("L" if "camera" in name else "RGB")
    (pictures / "bad.png").unlink()
    rows = json.loads(call(*words))
    assert [row["size"] for row in rows] == ["done before"] * 3
    changed = json.loads(call(*words, "--tile", "16", "--overlap", "8", "--check", "--page"))
    assert [row["tiles"] for row in changed] == ["16"] * 3
    assert all("from the whole picture" in row["notes"] for row in changed)
    assert 'type="range"' in (tmp_path / "out" / "coffee.html").read_text()
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.write(pictures / "coffee.jpg", "../coffee.jpg")
    with pytest.raises(UserError, match=r"holds \.\./coffee\.jpg, which lies outside"):
        call("upscale", tmp_path / "evil.zip", "--model", net, "-o", tmp_path / "out2")
    with pytest.raises(UserError, match="would be overwritten"):
        call("upscale", pictures, "--model", net, "-o", pictures)
    with pytest.raises(UserError, match="leave nothing for the model's work"):
        call("upscale", pictures / "coffee.jpg", "--model", net, "-o", tmp_path / "small", "--memory", "1M")


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_the_page_opens_without_a_server(tmp_path: Path) -> None:
    pictures = [tmp_path / "before.png", tmp_path / "after.png"]
    for path, size in zip(pictures, (16, 32), strict=True):
        Image.fromarray(data.coffee()[:size, :size]).save(path)
    before_and_after(*pictures, tmp_path / "page.html")
    moved = "document.querySelector('input').value=80;document.querySelector('input').oninput()"
    page = (tmp_path / "page.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    shown = "document.images.length+':'+[...document.images].every(i=>i.complete&&i.naturalWidth==32)"
    script = f"<script>onload=()=>{{{moved};document.title={shown}}}</script>"
    (tmp_path / "page.html").write_text(page.replace("</body>", f"{script}</body>"))
    words = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=10000", "--dump-dom"]
    words.append((tmp_path / "page.html").as_uri())
    found = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120).stdout
    assert "<title>2:true</title>" in found
    assert "inset(0px 20% 0px 0px)" in found


def test_train_evaluate_and_compare(tmp_path: Path) -> None:
    for name, picture in (("learn/a", data.coffee()[:200, :200]), ("held/b", data.chelsea()[:96, :96])):
        (tmp_path / name).parent.mkdir()
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
    settings = [
        "model=catanet_x2",
        f"network={json.dumps(TINY)}",
        "patch_size=12",
        "batch_size=2",
        "steps=3",
        "epochs=2",
    ]
    words = [word for setting in settings for word in ("--set", setting)]
    run = tmp_path / "run"
    (row,) = json.loads(call("train", tmp_path / "learn", "--held", tmp_path / "held", "-o", run, "--json", *words))
    assert row["pictures"] == 1
    assert np.isfinite(row["PSNR of the held"])
    (scores,) = json.loads(call("evaluate", tmp_path / "held", "--model", run, "--json"))
    rows = json.loads(call("compare", tmp_path / "held", "--model", run, "-o", tmp_path / "page", "--json"))
    assert [row["model"] for row in rows] == ["bicubic", str(run)]
    assert {key: rows[1][key] for key in ("PSNR", "SSIM")} == {key: scores[key] for key in ("PSNR", "SSIM")}
    assert (tmp_path / "page" / "page.html").is_file()
    with pytest.raises(UserError, match="enlarges 2 times, not 3"):
        call("evaluate", tmp_path / "held", "--model", run, "--scale", "3")
    with pytest.raises(UserError, match="bicubic: say --scale"):
        call("evaluate", tmp_path / "held", "--model", "bicubic")
    with pytest.raises(UserError, match="--colour lab"):
        call("evaluate", tmp_path / "held", "--model", run, "--colour", "lab")


def test_tiles_that_a_network_cannot_take(tmp_path: Path) -> None:
    DRCT(2, groups=1, dim=16, growth=8, num_heads=2, window_size=8, features=8).save_pretrained(tmp_path / "net")
    Image.fromarray(data.coffee()[:40, :40]).save(tmp_path / "a.png")
    for command in (["upscale", tmp_path / "a.png", "-o", tmp_path / "out"], ["evaluate", tmp_path / "a.png"]):
        with pytest.raises(UserError, match="tile 50 and overlap 32 must be multiples of 16"):
            call(*command, "--model", tmp_path / "net", "--tile", 50)


def test_models_lists_every_published_network() -> None:
    names = [row["model"] for row in json.loads(call("models", "--json"))]
    assert {"catanet_x2", "catanet_x3", "catanet_x4", "drct_x4", "drct_l_x4"} <= set(names)


@pytest.mark.parametrize(("scale", "gain"), [(2, 2.0), (4, 1.5)])
def test_the_network_that_comes_along_beats_bicubic_resizing(scale: int, gain: float, shared_data) -> None:
    folder = shared_data("sr/Set5")
    (ours,) = json.loads(call("evaluate", folder, "--scale", scale, "--json"))
    (bicubic,) = json.loads(call("evaluate", folder, "--scale", scale, "--model", "bicubic", "--json"))
    assert ours["PSNR"] - bicubic["PSNR"] > gain
    assert ours["SSIM"] > bicubic["SSIM"]


def test_it_is_used_where_no_model_is_named(tmp_path: Path) -> None:
    Image.fromarray(data.coffee()[:24, :32]).save(tmp_path / "a.png")
    for words, size in (((), (64, 48)), (("--scale", 4), (128, 96))):
        call("upscale", tmp_path / "a.png", "-o", tmp_path / f"out{size[0]}", *words)
        with Image.open(tmp_path / f"out{size[0]}" / "a.png") as picture:
            assert picture.size == size
    with pytest.raises(UserError, match="enlarge 2 and 4 times"):
        call("upscale", tmp_path / "a.png", "-o", tmp_path / "out3", "--scale", 3)


def test_tour_chapter(tmp_path: Path) -> None:
    report = Report("tour")
    chapter(report, tmp_path)
    page = report.write(tmp_path / "page.html").read_text()
    assert "CATANet, small" in page


def test_workers_share_the_pictures_out(net: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(3):
        Image.fromarray(data.coffee()[30 * i : 30 * i + 24, :32]).save(tmp_path / "in" / f"{i}.png")
    (tmp_path / "in" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    for count in (1, 2):
        out = tmp_path / f"out-{count}"
        with pytest.raises(BatchError, match=r"1 of 4 failed:\n.*bad\.png"):
            call("upscale", tmp_path / "in", "--model", net, "-o", out, "--workers", count)
    for i in range(3):
        assert (tmp_path / "out-2" / f"{i}.png").read_bytes() == (tmp_path / "out-1" / f"{i}.png").read_bytes()
