"""Model folders: one form, all or nothing, and nothing that is not what it says."""

import json
import os
import signal
import subprocess
import sys

import pytest

from nearfar.core.errors import UserError
from nearfar.core.model_folder import TrainedOn, mark_seen, read, trained_on, writing

KIND, NAME = "segmenter", "model.json"


def save(folder, weights="weights", extra=None, **options):
    with writing(folder, KIND, {"labels": [weights]}, **options) as place:
        (place / "model.safetensors").write_text(weights)
        if extra:
            (place / "extra.json").write_text(extra)


def test_what_is_written_is_read(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    save(tmp_path, extra="{}")
    found = read(tmp_path, KIND)
    assert (found["kind"], found["format"], found["labels"]) == (KIND, 1, ["weights"])
    assert set(found["files"]) == {"model.safetensors", "extra.json"}
    assert {"nearfar", "torch", "python"} <= set(found["environment"])
    save(tmp_path, "new")
    assert read(tmp_path, KIND)["labels"] == ["new"]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"model.safetensors", NAME, "notes.txt"}, "what the model no longer has is gone"
    plain = (tmp_path / "notes.txt").stat().st_mode
    assert all(path.stat().st_mode == plain for path in tmp_path.iterdir())


def test_a_part_can_be_replaced(tmp_path):
    save(tmp_path)
    with writing(tmp_path, KIND, {}, keep=("model.safetensors",)) as place:
        (place / "extra.json").write_text("{}")
    assert {"model.safetensors", "extra.json"} == set(read(tmp_path, KIND)["files"])


def test_files_that_are_not_the_described_ones_are_refused(tmp_path):
    save(tmp_path)
    (tmp_path / "model.safetensors").write_text("other")
    with pytest.raises(UserError, match=r"model\.safetensors: is not the file that model\.json describes"):
        read(tmp_path, KIND)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="is not the file"):
        read(tmp_path, KIND)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"kind": "segmenter", "labels": []}', "an older nearfar wrote it; train again"),
        ('{"kind": "segmenter", "format": 1}', "damaged"),
        ('{"kind": "segmenter", "format": "x", "files": {}}', "damaged"),
        ('{"kind": "segmenter", "format": 2, "files": {}}', "has format 2, this nearfar reads up to 1"),
        ('{"kind": "decoder", "format": 1, "files": {}}', "describes no segmenter"),
        ('{"kind": "segmenter", "format": 1, "files": {"../x": "0"}}', "describes no segmenter"),
    ],
)
def test_bad_descriptions_are_one_line(tmp_path, content, message):
    (tmp_path / NAME).write_text(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path, KIND)


def test_another_kind_is_named(tmp_path):
    save(tmp_path)
    with pytest.raises(UserError, match=r"holds no trained decoder, it lacks decoder\.json; it is one of a segmenter"):
        read(tmp_path, "decoder")
    with pytest.raises(UserError, match=r"it lacks model\.json"):
        read(tmp_path / "nothing", KIND)


CODE = """
import os, signal, sys
real, left = os.replace, [int(sys.argv[2])]
def replace(a, b):
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    real(a, b)
os.replace = replace
from pathlib import Path
from nearfar.core.model_folder import writing
with writing(sys.argv[1], "segmenter", {"labels": ["new"]}) as place:
    (place / "model.safetensors").write_text("new")
"""


def test_a_kill_at_any_moment_leaves_the_old_model_or_the_new(tmp_path):
    for moment in range(5):
        folder = tmp_path / str(moment)
        save(folder, "old")
        done = subprocess.run([sys.executable, "-c", CODE, str(folder), str(moment)])
        found = read(folder, KIND)["labels"][0]
        assert (folder / "model.safetensors").read_text() == found
        assert found == ("new" if moment > 1 else "old"), moment
        assert done.returncode == (-signal.SIGKILL if moment < 4 else 0), moment
        save(folder, "newer")
        assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_what_it_was_trained_on_is_told_by_hashes(tmp_path):
    save(tmp_path, trained_on=TrainedOn.of(["digest a", "digest b"], ["Jane Doe", None]))
    assert "Jane" not in (tmp_path / NAME).read_text()
    seen = trained_on(tmp_path)
    assert seen.seen(["digest a", "digest c", "digest d"], ["x", "Jane Doe", None]) == [True, True, False]
    assert mark_seen(tmp_path, ["digest a", "digest c"]) == "1 of 2 seen in training"
    assert mark_seen(tmp_path, ["digest c"]) == ""
    assert trained_on(tmp_path / "elsewhere") == TrainedOn()
    assert json.loads((tmp_path / NAME).read_text())["trained_on"]["groups"]
    assert os.access(tmp_path / NAME, os.R_OK)
