"""Batches on URLs: items are fetched and sent one by one, known from their sidecars, and leave nothing here."""

import importlib.util
import json
import os
import tempfile
from pathlib import Path

import fsspec
import pytest

from nearfar.core import remote
from nearfar.core.cli.batch import Places, run_batch
from nearfar.core.errors import UserError
from nearfar.core.files import write_text
from nearfar.core.made_from import KeptRows, MadeFrom
from nearfar.core.reading import reading
from nearfar.core.remote import elsewhere, place, told

HERE = Places()


@pytest.fixture
def memory():
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pipe({f"/in/{i}.txt": f"{i}".encode() for i in range(5)} | {"/in/deep/bad.txt": b"no number"})
    yield system
    system.store.clear()


def double(path: Path) -> int:
    with reading(path, "is no number"):
        return 2 * int(path.read_text())


def doubled(source: str, target: str, places: Places = HERE) -> tuple[list[str], list[str]]:
    """A batch command in small: a file for each file, what is there is passed over."""
    with elsewhere():
        folder, out = place(source), place(target)
        files = sorted(p for p in folder.rglob("*") if p.is_file())

        def one(path: Path) -> str:
            made = MadeFrom(out / path.name, [path], "model")
            if made.done():
                return "before"
            write_text(out / path.name, str(double(path)))
            made.write()
            return "now"

        results, failures = run_batch(files, one, "doubling", places=places, failed=out / "failures.json")
        here = [p for p in out.rglob("*.txt") if p.stat().st_size] + [p for p in files if p.stat().st_size]
        assert not here, "of what is done nothing stays here"
        assert told(str(out)) == target
    assert not folder.exists()
    return results, failures


def test_files_are_fetched_and_sent_one_by_one(memory, monkeypatch):
    results, failures = doubled("memory://in", "memory://out")
    assert results == ["now"] * 5
    assert len(failures) == 1
    assert failures[0].startswith("memory://in/deep/bad.txt: is no number")
    assert [memory.cat(f"/out/{i}.txt") for i in range(5)] == [str(2 * i).encode() for i in range(5)]
    assert json.loads(memory.cat("/out/failures.json"))[0]["item"] == "memory://in/deep/bad.txt"
    assert not [name for name in memory.find("/out") if name.endswith(".part")]
    fetched = []
    plain = type(memory).get_file
    monkeypatch.setattr(
        type(memory), "get_file", lambda self, there, *more: [fetched.append(there), plain(self, there, *more)]
    )
    memory.pipe("/in/3.txt", b"10")
    results, _ = doubled("memory://in", "memory://out")
    assert results == ["before", "before", "before", "now", "before"]
    assert memory.cat("/out/3.txt") == b"20"
    assert [name for name in fetched if not name.rpartition("/")[2].startswith(".")] == [
        "/out/3.txt",  # it is compared before it is written over
        "/in/3.txt",
        "/in/deep/bad.txt",
    ]


def test_what_was_being_sent_when_its_process_ended_is_made_anew(memory):
    doubled("memory://in", "memory://out")
    memory.pipe({"/out/.1.txt.part": b"", "/out/1.txt": b"cut o"})
    assert doubled("memory://in", "memory://out")[0] == ["before", "now", "before", "before", "before"]
    assert memory.cat("/out/1.txt") == b"2"
    assert not memory.exists("/out/.1.txt.part")


def test_rows_of_a_table_are_kept_there(memory):
    for known in (0, 5):
        with elsewhere():
            files, table = sorted(place("memory://in").glob("*.txt")), place("memory://out/table.csv")
            kept = KeptRows(table, "model")
            assert sum(kept.find(file) is not None for file in files) == known
            run_batch(files[known:], double, "doubling", each=kept.add)


def test_what_a_command_needs_whole_is_here_at_once(memory):
    with elsewhere():
        assert (place("memory://in", whole=True) / "3.txt").read_text() == "3"


def test_what_a_killed_command_left_is_swept(memory, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left, young = tmp_path / f"{remote.PREFIX}left", tmp_path / f"{remote.PREFIX}young"
    for folder in (left, young):
        folder.mkdir()
    os.utime(left, (0, 0))
    with elsewhere():
        folder = place("memory://in")
        os.utime(folder.parents[1], (0, 0))
        remote._sweep()
        assert folder.is_dir()  # in use
        assert not left.exists()
        assert young.exists()
    assert not folder.parents[1].exists()


def test_refusals(memory):
    with elsewhere():
        place("memory://in")
        with pytest.raises(UserError, match="memory://in: is in the memory of this process"):
            run_batch([1], str, "trying", places=Places(2))
    with elsewhere(), pytest.raises(UserError, match="nothing here reads nowhere://"):
        place("nowhere://bucket/file")
    if importlib.util.find_spec("s3fs") is None:
        with elsewhere(), pytest.raises(UserError, match="pip install s3fs"):
            place("s3://bucket/file")
    assert place("a/local.file") == Path("a/local.file")
    assert not remote.used()


@pytest.mark.parametrize(
    "engine", [pytest.param("local", marks=pytest.mark.ci), pytest.param("ray", marks=pytest.mark.slow)]
)
def test_other_processes_fetch_and_send_by_themselves(engine, tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for i in range(5):
        (source / f"{i}.txt").write_text(str(i))
    (source / "bad.txt").write_text("no number")
    for done in ("now", "before"):
        results, failures = doubled(f"file://{source}", f"file://{out}", Places(2, engine))
        assert results == [done] * 5
        assert failures[0].startswith(f"file://{source}/bad.txt: is no number")
    assert sorted(p.read_text() for p in out.glob("[0-9].txt")) == sorted(str(2 * i) for i in range(5))
