"""Atomic writing."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from nearfar.core.errors import UserError
from nearfar.core.files import atomic_path, file_digest, locked, sweep, write_csv, write_json


def test_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "folder" / "result.txt"
    with atomic_path(path) as temporary:
        temporary.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_folder_replaces_folder(tmp_path):
    for content in ("one", "two"):
        with atomic_path(tmp_path / "model") as temporary:
            temporary.mkdir()
            (temporary / content).touch()
    assert [p.name for p in (tmp_path / "model").iterdir()] == ["two"]
    assert len(list(tmp_path.iterdir())) == 1


def test_block_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "x"):
        pass


def test_json_takes_numpy_and_paths(tmp_path):
    write_json(tmp_path / "a.json", {"x": np.float32(1.5), "y": np.arange(3), "z": tmp_path})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1.5, "y": [0, 1, 2], "z": str(tmp_path)}


def test_json_holds_what_every_parser_takes(tmp_path):
    odd = {"a": float("nan"), "b": (1.0, np.float32("inf")), "c": np.array([0.5, np.nan])}
    text = write_json(tmp_path / "a.json", odd).read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"a": None, "b": [1.0, None], "c": [0.5, None]}
    back = json.loads(write_json(tmp_path / "b.json", odd, exact=True).read_text())
    assert np.isnan(back["a"])
    assert back["b"][1] == float("inf")


def test_csv_has_the_columns_of_all_rows(tmp_path):
    write_csv(tmp_path / "a.csv", [{"a": 1}, {"a": 2, "b": "x,y"}])
    with (tmp_path / "a.csv").open() as stream:
        assert list(csv.DictReader(stream)) == [{"a": "1", "b": ""}, {"a": "2", "b": "x,y"}]


def test_digest_is_that_of_the_content(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert file_digest(tmp_path / "a").startswith("ba7816bf")


KILLED = """
import os, signal, sys
from pathlib import Path
from nearfar.core.files import atomic_path, locked
with locked(sys.argv[1], "trains"), atomic_path(Path(sys.argv[1]) / "model") as temporary:
    temporary.mkdir()
    (temporary / "patient.npy").write_text("secret")
    print("ready", flush=True)
    if len(sys.argv) > 2:
        os.kill(os.getpid(), signal.SIGKILL)
    sys.stdin.read()
"""


def start(folder, *more):
    return subprocess.Popen(
        [sys.executable, "-c", KILLED, str(folder), *more], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_what_a_killed_process_left_is_swept_and_its_lock_is_gone(tmp_path):
    killed = start(tmp_path, "kill")
    assert killed.wait() == -signal.SIGKILL
    assert list(tmp_path.rglob("patient.npy"))
    with locked(tmp_path):
        write_json(tmp_path / "a.json", {})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_process_that_lives_keeps_its_lock_and_its_files(tmp_path):
    alive = start(tmp_path)
    assert alive.stdout.readline() == "ready\n"
    with pytest.raises(UserError, match="another process trains in this folder"), locked(tmp_path, "trains"):
        pass
    write_json(tmp_path / "a.json", {})
    sweep(tmp_path)
    assert list(tmp_path.rglob("patient.npy"))
    alive.communicate("")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "model"]
    with locked(tmp_path), locked(tmp_path):  # the same thread may come again
        pass


def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    seen, tell = os.pipe()
    with locked(tmp_path):
        child = os.fork()
        if child == 0:
            os.write(tell, b"!")
            time.sleep(30)
            os._exit(0)
        os.read(seen, 1)
    try:
        with locked(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_permissions_are_those_of_the_umask(tmp_path):
    with atomic_path(tmp_path / "private") as temporary:
        os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))
    (tmp_path / "plain").touch()
    assert (tmp_path / "private").stat().st_mode == (tmp_path / "plain").stat().st_mode


STOPPED = """
import os, signal, sys
from pathlib import Path
from nearfar.core.cli.root import interrupted, stop_signals
from nearfar.core.files import atomic_path

number = int(sys.argv[2])
calls = 0

def trace(frame, event, argument):
    global calls
    if "contextlib" in frame.f_code.co_filename or frame.f_code.co_filename.endswith("core/files.py"):
        calls += 1
        if calls == number:
            sys.settrace(None)
            os.kill(os.getpid(), signal.SIGTERM)
        return trace

try:
    with stop_signals():
        sys.settrace(trace)
        with atomic_path(Path(sys.argv[1]) / "result") as temporary:
            temporary.write_text("result")
        sys.settrace(None)
except KeyboardInterrupt as stop:
    os._exit(interrupted(stop))  # whatever the interpreter would do at its end
os._exit(0)
"""


def test_a_signal_at_any_line_leaves_no_temporary_folder(tmp_path):
    """In one process that forks at each line, so that it takes a second."""
    code = STOPPED.replace(
        "number = int(sys.argv[2])",
        "number = 0\n"
        "for line in range(1, 120):\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        number = line\n"
        "        break\n"
        "    os.waitpid(child, 0)\n"
        "    left = [p.name for p in Path(sys.argv[1]).iterdir() if p.name[0] == '.']\n"
        "    assert not left, (line, left)\n"
        "    (Path(sys.argv[1]) / 'result').unlink(missing_ok=True)\n"
        "else:\n"
        "    print('done')\n"
        "    os._exit(0)",
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
