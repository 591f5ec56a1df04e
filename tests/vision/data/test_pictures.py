"""Reading labelled pictures: every source, every mode of picture, and what is wrong said plainly."""

import io
import json
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nearfar.core.errors import UserError
from nearfar.vision.data.images import Pictures, open_pictures, read_picture, split_pictures, training_pictures


def folder(root: Path, classes: tuple[str, ...] = ("cat", "dog"), each: int = 3) -> Path:
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(each):
            Image.new("RGB", (8, 6), (40 * c, 20 * i, 7)).save(root / name / f"{i}.png")
    return root


def content(pictures: Pictures) -> list[tuple[tuple[int, ...], str]]:
    """First pixel and class of every picture, read as in a worker process: from a pickled copy."""
    pictures = pickle.loads(pickle.dumps(pictures))
    return [(pictures[i][0].getpixel((0, 0)), pictures.classes[pictures[i][1]]) for i in range(len(pictures))]


def test_every_source_gives_the_same_pictures(tmp_path: Path) -> None:
    root = folder(tmp_path / "pictures")
    want = content(open_pictures(root))
    assert want[1] == ((0, 20, 7), "cat")
    assert len(want) == 6
    assert content(open_pictures(folder(tmp_path / "splits/train").parent, "train")) == want
    with zipfile.ZipFile(tmp_path / "some.zip", "w") as archive:
        for file in sorted(root.rglob("*.png")):
            archive.write(file, Path("data/train") / file.relative_to(root))
    assert content(open_pictures(tmp_path / "some.zip", "train")) == want
    assert content(open_pictures(tmp_path / "some.zip")) == want
    for numbered in (False, True):
        shards = tmp_path / f"shards{numbered}"
        shards.mkdir()
        with tarfile.open(shards / "0000.tar", "w") as archive:
            for i, file in enumerate(sorted(root.rglob("*.png"))):
                label = str(["cat", "dog"].index(file.parent.name)) if numbered else file.parent.name
                extra = ("cls", label.encode()) if i % 2 else ("json", json.dumps({"label": label}).encode())
                for suffix, data in (("png", file.read_bytes()), extra):
                    member = tarfile.TarInfo(f"{i:04d}.{suffix}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
        if numbered:
            (shards / "classes.txt").write_text("cat\ndog\n")
        assert content(open_pictures(shards)) == want
        assert content(open_pictures(shards / "0000.tar")) == want
        with pytest.raises(UserError, match="without splits"):
            open_pictures(shards / "0000.tar", "test")


def test_hugging_face_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    root = folder(tmp_path / "pictures")
    files = sorted(root.rglob("*.png"))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    data = {"image": [str(f) for f in files], "label": [int(f.parent.name == "dog") for f in files]}
    both = datasets.DatasetDict(dict.fromkeys(("train", "val"), datasets.Dataset.from_dict(data, features=features)))
    both.save_to_disk(tmp_path / "hf")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "hub/data").mkdir(parents=True)
    for name, part in both.items():  # as on the hub, under other names
        renamed = part.rename_columns({"image": "img", "label": "fine_label"})
        renamed.to_parquet(tmp_path / f"hub/data/{name}-00000-of-00001.parquet")
    want = content(open_pictures(root))
    for source in (tmp_path / "hf", tmp_path / "hub"):
        learn, hold = (open_pictures(source, split) for split in ("train", "val"))
        assert content(learn) == content(hold) == want
        assert not {*learn.names} & {*hold.names}
        with pytest.raises(UserError, match="has no split test; it has train, val"):
            open_pictures(source, "test")
        with pytest.raises(UserError, match="has splits; name one of train, val"):
            open_pictures(source)
    assert content(open_pictures(tmp_path / "hub/data/train-00000-of-00001.parquet")) == want
    both["train"].rename_columns({"label": "a"}).cast_column("a", datasets.Value("int64")).save_to_disk(tmp_path / "no")
    with pytest.raises(UserError, match="has no column label; it has a, image"):
        open_pictures(tmp_path / "no")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(UserError, match=r"broken\.parquet: cannot be read as a Hugging Face data set"):
        open_pictures(tmp_path / "broken.parquet")


def test_modes_become_rgb(tmp_path: Path) -> None:
    grey16 = np.array([[0, 32896, 65535]], dtype=np.uint16)
    Image.fromarray(grey16).save(tmp_path / "grey16.png")
    assert [read_picture(tmp_path / "grey16.png").getpixel((x, 0)) for x in range(3)] == [
        (0,) * 3,
        (128,) * 3,
        (255,) * 3,
    ]
    Image.new("L", (2, 2), 77).save(tmp_path / "grey.png")
    assert read_picture(tmp_path / "grey.png").getpixel((0, 0)) == (77, 77, 77)
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=100)
    red = read_picture(tmp_path / "cmyk.jpg").getpixel((4, 4))
    assert red[0] > 230
    assert max(red[1:]) < 40
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(tmp_path / "palette.png")
    assert read_picture(tmp_path / "palette.png").getpixel((0, 0)) == (10, 20, 30)
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert read_picture(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)


def test_pictures_of_telephones_are_upright(tmp_path: Path) -> None:
    picture = Image.new("RGB", (32, 16), "white")
    picture.paste("black", (0, 0, 8, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees
    picture.save(tmp_path / "turned.jpg", exif=exif)
    upright = read_picture(tmp_path / "turned.jpg")
    assert upright.size == (16, 32)
    assert [upright.getpixel(place)[0] > 128 for place in ((8, 2), (8, 30))] == [False, True]


def test_what_systems_hide_is_no_picture(tmp_path: Path) -> None:
    root = folder(tmp_path / "pictures")
    want = content(open_pictures(root))
    with zipfile.ZipFile(tmp_path / "mac.zip", "w") as archive:
        for file in sorted(root.rglob("*.png")):
            archive.write(file, Path("photos") / file.relative_to(root))
        archive.writestr("__MACOSX/photos/cat/._0.png", b"resource fork")
    assert content(open_pictures(tmp_path / "mac.zip")) == want
    (root / "cat/._0.png").write_bytes(b"resource fork")
    (root / ".cache").mkdir()
    assert content(open_pictures(root)) == want


def test_damaged_pictures_are_listed_and_the_rest_stays(tmp_path: Path) -> None:
    root = folder(tmp_path)
    whole = (root / "cat/1.png").read_bytes()
    (root / "cat/1.png").write_bytes(whole[: len(whole) // 2])
    (root / "dog/0.png").write_bytes(b"no picture")
    good, failures = open_pictures(root).readable()
    assert len(good) == 4
    assert [Path(name).name for name in good.names] == ["0.png", "2.png", "1.png", "2.png"]
    assert len(failures) == 2
    assert "cat/1.png" in failures[0]
    assert failures[1].endswith("dog/0.png: cannot be read as a picture (damaged from its start, or another format)")


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        open_pictures(tmp_path / "nowhere")
    root = folder(tmp_path / "a")
    (root / "bird").mkdir()
    with pytest.raises(UserError, match="no pictures in the class folder bird"):
        open_pictures(root)
    (root / "bird").rmdir()
    with pytest.raises(UserError, match="has no folder train; it has cat, dog"):
        open_pictures(root, "train")
    Image.new("RGB", (2, 2)).save(root / "loose.png")
    with pytest.raises(UserError, match="lie in no class folder"):
        open_pictures(root)
    folder(tmp_path / "split/train")
    folder(tmp_path / "split/test")
    with pytest.raises(UserError, match="holds the splits test, train; name one"):
        open_pictures(tmp_path / "split")
    with pytest.raises(UserError, match="one class folder only"):
        open_pictures(folder(tmp_path / "b", ("cat",)))
    (tmp_path / "c").mkdir()
    with pytest.raises(UserError, match="holds no pictures"):
        open_pictures(tmp_path / "c")
    (tmp_path / "broken.tar").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="cannot be read as a tar"):
        open_pictures(tmp_path / "broken.tar")


def test_splits_hold_every_class() -> None:
    names, labels = [str(i) for i in range(22)], [0] * 20 + [1] * 2
    pictures = Pictures(names, labels, ["a", "b"], lambda i: Image.new("RGB", (1, 1), (i, 0, 0)))
    rest, held = split_pictures(pictures, 0.1, seed=0)
    assert sorted(rest + held) == list(range(22))
    assert sorted(pictures.labels[i] for i in held) == [0, 0, 1]
    assert split_pictures(pictures, 0.1, seed=0) == (rest, held)


def test_every_file_is_used_or_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = folder(tmp_path / "data")
    (root / "cat/notes.txt").write_text("of cats")
    (root / "cat/clip.mov").write_bytes(b"film")
    (root / "dog/.DS_Store").write_bytes(b"x")
    Image.new("RGB", (8, 6)).save(root / "dog/phone.jfif", "JPEG")
    assert len(open_pictures(root)) == 7
    (told,) = caplog.messages
    assert "3 files are not used" in told
    assert "clip.mov" in told
    assert "1 beside the pictures" in told
    assert "1 hidden" in told
    caplog.clear()
    shown = io.BytesIO()
    Image.new("RGB", (8, 6)).save(shown, "PNG")
    with tarfile.open(tmp_path / "dots.tar", "w") as archive:  # keys with dots, and a second picture in every sample
        for i in range(6):
            parts = {"png": shown.getvalue(), "seg.png": shown.getvalue(), "cls": b"cat" if i % 2 else b"dog"}
            for suffix, data in parts.items():
                member = tarfile.TarInfo(f"./v1.{i} a.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    pictures = open_pictures(tmp_path / "dots.tar")
    assert len(pictures) == 6
    assert not any(name.endswith("seg.png") for name in pictures.names)
    assert "6 files are not used" in caplog.messages[0]


def test_classes_of_splits_are_compared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder(tmp_path / "train", ("cat", "dog", "Dog"), 6)
    folder(tmp_path / "val", ("cat", "dog"), 2)
    learn, hold, _ = training_pictures(tmp_path, 0.1, 0)
    assert hold.classes == learn.classes
    assert [hold.classes[label] for label in hold.labels] == ["cat", "cat", "dog", "dog"]
    assert any("differ by case alone" in told and "Dog and dog" in told for told in caplog.messages)
    assert any("none of the class Dog" in told for told in caplog.messages)
    folder(tmp_path / "val", ("bird",), 2)
    with pytest.raises(UserError, match="classes that the training has not: bird"):
        training_pictures(tmp_path, 0.1, 0)


def test_the_test_split_chooses_nothing(tmp_path: Path) -> None:
    folder(tmp_path / "train", each=10)
    folder(tmp_path / "test", each=4)
    learn, hold, _ = training_pictures(tmp_path, 0.2, 0)
    assert len(learn) + len(hold) == 20
    assert not any("/test/" in name for name in (*learn.names, *hold.names))
