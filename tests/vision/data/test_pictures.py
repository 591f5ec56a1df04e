"""Reading labelled pictures: every source, every mode of picture, and what is wrong said plainly."""

import io
import json
import pickle
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nearfar.core.errors import UserError
from nearfar.vision.data.images import Pictures, read_picture, split_pictures
from nearfar.vision.data.sources import open_pictures, training_pictures


def folder(root: Path, classes: tuple[str, ...] = ("cat", "dog"), each: int = 3) -> Path:
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(each):
            Image.new("RGB", (8, 6), (40 * c, 20 * i, 7)).save(root / name / f"{i}.png")
    return root


def png() -> bytes:
    shown = io.BytesIO()
    Image.new("RGB", (8, 6)).save(shown, "PNG")
    return shown.getvalue()


PNG = png()


def tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


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
        members = []
        for i, file in enumerate(sorted(root.rglob("*.png"))):
            label = str(["cat", "dog"].index(file.parent.name)) if numbered else file.parent.name
            extra = ("cls", label.encode()) if i % 2 else ("json", json.dumps({"label": label}).encode())
            members += [(f"{i:04d}.{suffix}", data) for suffix, data in (("png", file.read_bytes()), extra)]
        tar(shards / "0000.tar", members)
        if numbered:
            (shards / "classes.txt").write_text("cat\ndog\n")
        assert content(open_pictures(shards)) == want
        assert content(open_pictures(shards / "0000.tar")) == want
        with pytest.raises(UserError, match="without splits"):
            open_pictures(shards / "0000.tar", "test")


def test_lists_of_classes_in_samples(tmp_path: Path) -> None:
    want = [["cat", "dog"], [], ["dog"], ["bird"]]
    numbers = [[1, 2], [], [2], [0]]

    def as_json(name: str, value: Any, file: str = "json") -> tuple[str, bytes]:
        return file, json.dumps({name: value, "id": 7}).encode()

    forms = {
        "names": [as_json("labels", names) for names in want],
        "singular": [as_json("label", names) for names in want],
        "numbers": [as_json("label", found) for found in numbers],
        "text": [as_json("labels", ";".join(names) if names else []) for names in want],
    }
    for form, labels in forms.items():
        (tmp_path / form).mkdir()
        (tmp_path / form / "classes.txt").write_text("bird\ncat\ndog\n")
        members = [(f"{i}.{s}", d) for i, label in enumerate(labels) for s, d in (("png", PNG), label)]
        pictures = open_pictures(tar(tmp_path / form / "0.tar", members))
        assert pictures.multilabel
        assert [[pictures.classes[c] for c in label] for label in pictures.labels] == want
        assert pictures[0][1].tolist() == [0, 1, 1]
    for label, message in (
        ([0, 0, 1], "has a class twice; a list holds classes, not zeros and ones"),
        ({"a": 1}, "neither a number nor a name"),
        ([True], "neither a number nor a name"),
        (1.5, "neither a number nor a name"),
        ("cat;;dog", "neither a number nor a name"),
    ):
        with pytest.raises(UserError, match=message):
            open_pictures(
                tar(tmp_path / "bad.tar", [("0.png", PNG), ("0.json", json.dumps({"label": label}).encode())])
            )
    both = json.dumps({"label": 1, "labels": [1]}).encode()
    with pytest.raises(UserError, match="names its classes 2 times"):
        open_pictures(tar(tmp_path / "bad.tar", [("0.png", PNG), ("0.json", both)]))


def test_tables_and_folders_in_archives(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = b"file,labels\na/0.png,cat;dog\na/1.png,dog\n./a/2.png,\n"
    members = [*((f"a/{i}.png", PNG) for i in range(4)), ("labels.csv", rows)]
    with zipfile.ZipFile(tmp_path / "some.zip", "w") as archive:
        for name, data in members:
            archive.writestr(f"top/{name}", data)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/labels.csv").write_bytes(rows)
    tar(tmp_path / "shards/0.tar", members[:2])
    tar(tmp_path / "shards/1.tar", members[2:4])
    for source in (tmp_path / "some.zip", tar(tmp_path / "some.tar", members), tmp_path / "shards"):
        caplog.clear()
        pictures = open_pictures(source)
        assert pictures.multilabel
        assert pictures.labels == [(0, 1), (1,), ()]
        assert pictures[2][0].size == (8, 6)
        assert "1 pictures beside those listed are in no row and are not used: a/3.png" in caplog.messages[0]
        assert len(caplog.messages) == 1
    tar(tmp_path / "shards/2.tar", members[:1])
    with pytest.raises(UserError, match=r"a/0\.png stands in two tar files"):
        open_pictures(tmp_path / "shards")
    split = rows.replace(b"labels\n", b"labels,split\n").replace(b"dog\n", b"dog,train\n").replace(b",\n", b",,val\n")
    with zipfile.ZipFile(tmp_path / "parts.zip", "w") as archive:
        for name, data in [*members[:3], ("labels.csv", split)]:
            archive.writestr(name, data)
    assert [len(open_pictures(tmp_path / "parts.zip", name)) for name in ("train", "val")] == [2, 1]
    in_folders = [(f"top/{name}/{i}.png", PNG) for name in ("cat", "dog") for i in range(2)]
    assert open_pictures(tar(tmp_path / "folders.tar", in_folders)).labels == [0, 0, 1, 1]
    with pytest.raises(UserError, match="4 of 5 pictures have neither"):
        open_pictures(tar(tmp_path / "some.tar", [*in_folders, ("5.png", PNG), ("5.cls", b"0")]))


def test_names_of_tar_files_and_folders_say_splits(tmp_path: Path) -> None:
    for number, name in enumerate(("train-0", "train-1", "val-0"), 1):
        samples = [(f"{i}.{s}", d) for i in range(number) for s, d in (("png", PNG), ("cls", b"1"))]
        tar(tmp_path / f"{name}.tar", samples)
    assert [len(open_pictures(tmp_path, split)) for split in ("train", "val")] == [3, 3]
    with pytest.raises(UserError, match="no tar files of the split test; it has train, val"):
        open_pictures(tmp_path, "test")
    with pytest.raises(UserError, match="holds the splits train, val; name one"):
        open_pictures(tmp_path)
    folder(tmp_path / "b/Training")
    folder(tmp_path / "b/Testing")
    assert len(open_pictures(tmp_path / "b", "train")) == 6
    with pytest.raises(UserError, match="holds the splits Testing, Training; name one"):
        open_pictures(tmp_path / "b")
    (tmp_path / "whole.tar.gz").write_bytes(b"x")
    with pytest.raises(UserError, match="is packed as a whole"):
        open_pictures(tmp_path / "whole.tar.gz")


def test_hugging_face_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
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
    several = datasets.Features({"image": datasets.Image(), "labels": datasets.Sequence(features["label"])})
    table = {"image": data["image"], "labels": [[1, 0], [], [1], [0], [0], [1]]}
    named = {"image": data["image"], "label": ["cat;dog", "", "dog", "cat", "cat", "dog"], "id": list(range(6))}
    plain = datasets.Features(
        {"image": datasets.Image(), "label": datasets.Value("string"), "id": datasets.Value("int8")}
    )
    datasets.Dataset.from_dict(table, features=several).to_parquet(tmp_path / "several.parquet")
    datasets.Dataset.from_dict(named, features=plain).save_to_disk(tmp_path / "named")
    for source in (tmp_path / "several.parquet", tmp_path / "named"):
        pictures = open_pictures(source)
        assert pictures.multilabel
        assert pictures.classes == ["cat", "dog"]
        assert pictures.labels[:3] == [(0, 1), (), (1,)]
        assert pictures[0][0].size == (8, 6)
    assert any("1 columns are not used: id" in told for told in caplog.messages)
    (tmp_path / "hub/notes.txt").write_text("of cats")
    (tmp_path / "hub/more").mkdir()
    renamed.to_parquet(tmp_path / "hub/more/val-1.parquet")
    assert len(open_pictures(tmp_path / "hub", "val")) == 12
    assert any("1 files are not used: 1 beside the pictures (notes.txt)" in told for told in caplog.messages)
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
    for kind in ("1 left out (cat/clip.mov)", "1 beside the pictures (cat/notes.txt)", "1 hidden (dog/.DS_Store)"):
        assert kind in told
    caplog.clear()
    samples = [
        (f"./v1.{i} a.{suffix}", data)  # keys with dots, and a second picture in every sample
        for i in range(6)
        for suffix, data in (("png", PNG), ("seg.png", PNG), ("cls", b"cat" if i % 2 else b"dog"))
    ]
    pictures = open_pictures(tar(tmp_path / "dots.tar", samples))
    assert len(pictures) == 6
    assert not any(name.endswith("seg.png") for name in pictures.names)
    assert "6 files are not used" in caplog.messages[0]
    caplog.clear()
    again = open_pictures(tar(tmp_path / "again.tar", [*samples, *samples]))  # every name a second time
    assert len({*again.names}) == 12
    assert "12 files are not used" in caplog.messages[0]
    caplog.clear()
    (tmp_path / "shards/old").mkdir(parents=True)
    tar(tmp_path / "shards/old/1.tar", samples)
    tar(tmp_path / "shards/0.tar", samples[:6])
    (tmp_path / "shards/extra.png").write_bytes(PNG)
    assert len(open_pictures(tmp_path / "shards")) == 2
    assert "4 files are not used" in caplog.messages[0]
    for part in ("old/1.tar", "extra.png", "seg.png"):
        assert part in caplog.messages[0]
    caplog.clear()
    folder(tmp_path / "parts/train")
    folder(tmp_path / "parts/rest")
    assert len(open_pictures(tmp_path / "parts", "train")) == 6
    assert "6 files are not used: 6 left out (rest/cat/0.png" in caplog.messages[0]


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
    learn, hold, _ = training_pictures(tmp_path, 0.2, 0, choose_on="test")  # unless it is asked to
    assert len(learn) == 20
    assert all("/test/" in name for name in hold.names)
