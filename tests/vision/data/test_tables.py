"""Pictures whose classes stand in a table."""

from pathlib import Path

import pytest
from PIL import Image

from nearfar.core.errors import UserError
from nearfar.vision.data.images import Pictures, split_pictures
from nearfar.vision.data.sources import open_pictures, training_pictures


def table(root: Path, text: str, name: str = "labels.csv", pictures: int = 6) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for i in range(pictures):
        Image.new("RGB", (8, 6), (30 * i, 7, 7)).save(root / f"{i}.png")
    (root / name).write_text(text, encoding="utf-8")
    return root / name


def named(pictures: Pictures) -> dict[str, list[str]]:
    """Classes by file."""
    labels = [label if pictures.multilabel else (label,) for label in pictures.labels]
    return {
        Path(name).name: [pictures.classes[i] for i in label]
        for name, label in zip(pictures.names, labels, strict=True)
    }


def test_one_class_a_row(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = "label,id,filename\ncat,7,0.png\ndog,8,1.png\ncat,9,2.png\n,10,3.png\ndog,11,gone.png\ncat,9,2.png\n"
    pictures = open_pictures(table(tmp_path / "a", rows))
    assert named(pictures) == {"0.png": ["cat"], "1.png": ["dog"], "2.png": ["cat"], "gone.png": ["dog"]}
    assert not pictures.multilabel
    told = "\n".join(caplog.messages)
    for part in (
        "1 columns are not used: id",
        "1 rows repeat another and are not used: 2.png",
        "1 pictures have no label and are not used: 3.png",
        "1 pictures are not there: gone.png",
        "2 pictures beside those listed are in no row and are not used: 4.png, 5.png",
    ):
        assert part in told
    good, failures = pictures.readable()
    assert len(good) == 3
    assert failures[0].endswith("gone.png: no such file")
    assert named(open_pictures(tmp_path / "a")) == named(pictures)  # a folder that holds labels.csv
    excel = table(tmp_path / "b", "\ufefffile;label\n0.png;x\n1.png;y\n")
    assert named(open_pictures(excel)) == {"0.png": ["x"], "1.png": ["y"]}
    tabs = table(tmp_path / "c", "file\tlabel\n0.png\tx, of two\n1.png\ty\n", "some.tsv")
    assert named(open_pictures(tabs)) == {"0.png": ["x, of two"], "1.png": ["y"]}


def test_several_classes_a_row(tmp_path: Path) -> None:
    want = {"0.png": ["cat", "dog"], "1.png": [], "2.png": ["dog"], "3.png": ["bird"]}
    joined = "file,label\n0.png,dog;cat\n1.png,\n2.png,dog\n3.png, bird\n"
    marked = "path,dog,cat,bird\n0.png,1,1,0\n1.png,0,0,0\n2.png,1,0,0\n3.png,0,0,1\n"
    for name, text in {"a": joined, "b": joined.replace(";", "|"), "c": marked}.items():
        pictures = open_pictures(table(tmp_path / name, text))
        assert pictures.multilabel
        assert pictures.classes == ["bird", "cat", "dog"]
        assert named(pictures) == want
        assert pictures[0][1].tolist() == [0, 1, 1]
        assert pictures.targets().sum(0).tolist() == [1, 1, 2]
    plural = open_pictures(table(tmp_path / "d", "file,labels\n0.png,dog\n1.png,cat\n"))
    assert plural.labels == [(1,), (0,)]


def test_splits_of_a_table(tmp_path: Path) -> None:
    rows = "".join(f"{i}.png,{'cat' if i % 2 else 'dog'},{'val' if i < 2 else 'train'}\n" for i in range(6))
    path = table(tmp_path / "a", "file,label,split\n" + rows)
    learn, hold, failures = training_pictures(path, 0.1, 0)
    assert (len(learn), len(hold), failures) == (4, 2, [])
    with pytest.raises(UserError, match="holds the splits train, val; name one"):
        open_pictures(path)
    with pytest.raises(UserError, match="no rows of the split test; it has train, val"):
        open_pictures(path, "test")
    table(tmp_path / "b", "file,label\n0.png,cat;dog\n1.png,dog\n", "train.csv")
    table(tmp_path / "b", "file,label\n2.png,cat\n3.png,dog\n", "val.csv")
    learn, hold, _ = training_pictures(tmp_path / "b", 0.1, 0)
    assert hold.multilabel  # as those to learn from
    assert hold.labels == [(0,), (1,)]


def test_shares_hold_every_class_of_several() -> None:
    labels = [(0,), (0, 1), (0, 2), (0,), (0, 2), (0, 1), (), (0,), ()]
    pictures = Pictures(
        [str(i) for i in range(9)],
        labels,
        ["common", "rare", "other"],
        lambda i: Image.new("RGB", (1, 1), (i, 0, 0)),
        multilabel=True,
    )
    rest, held = split_pictures(pictures, 0.3, 0)
    assert sorted(rest + held) == list(range(9))
    for part in (rest, held):
        assert (pictures.subset(part).targets().sum(0) > 0).all()


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    for text, message in (
        ("", "is empty"),
        ("name,label\n0.png,cat\n", "needs one column of pictures, called file"),
        ("file,path,label\n0.png,1.png,cat\n", "needs one column of pictures"),
        ("file,label,class\n0.png,cat,dog\n", "has 2 columns of classes, label, class"),
        ("file,label,label\n0.png,cat,dog\n", "two columns of its header have one name"),
        ("file,label\n0.png\n", "line 2 has not the 2 columns"),
        ("file,label\n0.png,cat;;dog\n", "line 2 has an empty class"),
        ("file,label\n0.png,cat\n1.png,cat\n", "has 1 classes"),
        ("file,cat,dog\n0.png,1,2\n", "line 2: dog is '2'"),
        ("file,label\n0.png,cat\n1.png,dog\n0.png,dog\n", r"lines 2 and 4 give 0\.png other classes"),
        ("file,label\n,cat\n1.png,dog\n", "line 2 names no picture"),
        ("file,label\nx.png,cat\ny.png,dog\n", "none of its 2 pictures is there"),
    ):
        with pytest.raises(UserError, match=message):
            open_pictures(table(tmp_path, text))
    (tmp_path / "labels.csv").write_bytes(b"file,label\n\xff\xfe,cat\n")
    with pytest.raises(UserError, match="cannot be read as a table"):
        open_pictures(tmp_path / "labels.csv")
