"""Batches in worker processes: order, errors, what ends a worker, limits."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nearfar.core.cli.batch import Places, run_batch
from nearfar.core.cli.console import console
from nearfar.core.errors import UserError
from nearfar.core.made_from import KeptRows, MadeFrom
from nearfar.core.workers import Once, spread


@pytest.mark.ci
def test_what_ends_a_worker_costs_one_item():
    shift = 100

    def action(item: int) -> int:
        if item == 2:
            raise UserError("item 2: damaged")
        if item == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if item == 7:
            os._exit(3)
        console.print("")  # a console of the worker's own
        return item + shift

    results, failures = run_batch(range(10), action, "counting", lambda item: f"item {item}", places=Places(2))
    assert results == [100, 101, 104, 105, 106, 108, 109]
    assert failures == [
        "item 2: damaged",
        "item 3: RuntimeError: its process ended (SIGKILL; the system kills what runs out of memory)",
        "item 7: RuntimeError: its process ended (exit status 3)",
    ]


@pytest.mark.ci
def test_item_that_takes_too_long_is_named():
    found = {i: (value, str(error)) for i, value, error in spread(range(3), lambda i: time.sleep(99 * i) or i, 2, 3)}
    assert found[0] == (0, "None")
    assert [found[i] for i in (1, 2)] == [(None, "took more than 3 seconds")] * 2


@pytest.mark.ci
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is looked at on Linux")
def test_item_that_takes_too_much_memory_is_named():
    def action(item: int) -> int:
        hold = bytearray(2**31) if item == 1 else bytearray(1)
        for place in range(0, len(hold), 4096):
            hold[place] = 1
        time.sleep(2 if item == 1 else 0)
        return len(hold)

    found = {i: (value, str(error)) for i, value, error in spread(range(3), action, 2, memory=3 << 29)}
    assert found == {0: (1, "None"), 1: (None, "took more than 1536 MB of memory"), 2: (1, "None")}


def test_work_that_cannot_be_sent_is_said():
    class Torn:
        def __reduce__(self):
            return int, ("no number",)

    torn = Torn()
    with pytest.raises(RuntimeError, match="the work cannot be sent"):
        run_batch(range(3), lambda item: (item, torn), "trying", places=Places(2))


def test_without_a_cluster_or_a_url_nothing_of_them_is_imported():
    code = (
        "import sys; from nearfar.core.cli.batch import run_batch; assert run_batch([1], str, 'trying') == (['1'], []);"
        "assert not {'ray', 'fsspec'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_model_is_made_once_in_each_process():
    made = Once(lambda: (os.getpid(), lambda item: item))  # a lambda cannot be sent by pickle
    made()
    results, failures = run_batch(range(6), lambda item: (made()[0], made()[1](item)), "using", places=Places(2))
    assert not failures
    assert [item for _, item in results] == list(range(6))
    assert os.getpid() not in {process for process, _ in results}


def test_what_can_be_done_together_is_and_the_bad_one_is_found(tmp_path: Path):
    calls, seen = [], []

    def together(items):
        calls.append(len(items))
        return [one(item) for item in items]

    def one(item: int) -> int:
        if item == 70:
            raise UserError("item 70: damaged")
        return -item

    failed = tmp_path / "failures.json"
    given = {"name": lambda item: f"item {item}", "failed": failed, "together": together}
    results, failures = run_batch(range(150), one, "trying", each=lambda *done: seen.append(done), **given)
    assert results == [-item for item in range(150) if item != 70]
    assert seen == [(item, -item) for item in range(150) if item != 70]
    assert calls == [64, 64, 22]
    assert failures == ["item 70: damaged"]
    assert json.loads(failed.read_text()) == [{"item": "item 70", "kind": "UserError", "error": "item 70: damaged"}]
    run_batch(range(3), one, "trying", **given)
    assert not failed.exists()  # it tells of the last call


def test_rows_are_kept_by_content_model_and_options(tmp_path: Path):
    table, a, b = (tmp_path / name for name in ("table.csv", "a", "b"))
    a.write_bytes(b"one")
    b.write_bytes(b"two")
    KeptRows(table, "model", views=1).add(a, [1.5])
    with (tmp_path / ".table.csv.rows.jsonl").open("a") as file:
        file.write('{"input": "cut o')
    KeptRows(table, "model", views=1).add(b, [2.5])
    found = KeptRows(table, "model", views=1)
    assert (found.find(a), found.find(b), found.find(tmp_path / "c")) == ([1.5], [2.5], None)
    assert KeptRows(table, "model", views=2).find(a) is None
    assert KeptRows(table, "other", views=1).find(a) is None
    a.write_bytes(b"changed")
    assert found.find(a) is None


@pytest.mark.parametrize(
    "engine", [pytest.param("local", marks=pytest.mark.slow), pytest.param("ray", marks=pytest.mark.ci)]
)
def test_a_thousand_files_of_which_some_are_bad(engine: str, tmp_path: Path):
    """One in twenty is broken, one takes all memory, one hangs; a worker is killed midway."""
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    out.mkdir()
    for i in range(1000):
        (data / f"{i:04}").write_text({77: "memory", 500: "hangs", 300: "killed"}.get(i, "" if i % 20 == 3 else str(i)))

    def action(path: Path) -> str:
        target = out / path.name
        made = MadeFrom(target, [path], "model")
        if made.done():
            return "before"
        content = path.read_text()
        if content == "memory":
            hold = bytearray(20 << 30)
            for place in range(0, len(hold), 4096):
                hold[place] = 1
        if content == "hangs":
            time.sleep(999)
        if content == "killed" and not (out / "killed").exists():
            (out / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        target.write_text(str(2 * int(content or "broken", 10)) if content.isdigit() or not content else content)
        made.write()
        return "now"

    places, failed = Places(2, engine, 10), tmp_path / "failures.json"
    results, _ = run_batch(sorted(data.iterdir()), action, "counting", places=places, failed=failed)
    bad = {int(Path(row["item"]).name) for row in json.loads(failed.read_text())}
    broken = {i for i in range(1000) if i % 20 == 3}
    # a killed process of this machine costs its item, which may be its fault; on a cluster it is tried once more
    assert bad == broken | {77, 500} | ({300} if engine == "local" else set())
    assert len(results) == 1000 - len(bad)
    (data / "0077").write_text("77")
    again, _ = run_batch(sorted(data.iterdir()), action, "counting", places=places, failed=failed)
    assert again.count("now") == 1 + (engine == "local")
    assert {int(Path(row["item"]).name) for row in json.loads(failed.read_text())} == broken | {500}


@pytest.mark.ci  # a Ray cluster takes half a minute to start
def test_ray_does_the_same_and_an_item_survives_its_actor(tmp_path: Path):
    where = str(tmp_path)

    def action(item: int) -> int:
        tried = Path(where, str(item))
        if item == 1 and not tried.exists():  # killed from outside
            tried.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if item == 2:
            os._exit(3)
        if item == 3:
            raise UserError("item 3: damaged")
        if item == 4:
            time.sleep(99)
        return item + 100

    places = Places(2, "ray", 8)
    results, failures = run_batch(range(7), action, "counting", lambda item: f"item {item}", places)
    assert results == [100, 101, 105, 106]
    assert failures == [
        "item 2: RuntimeError: its process ended, twice",
        "item 3: damaged",
        "item 4: RuntimeError: took more than 8 seconds",
    ]


@pytest.fixture
def two_machines(monkeypatch):
    """A Ray cluster of two nodes of one core each, on this machine, at an address of its own."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1)
    monkeypatch.setenv("RAY_ADDRESS", made.address)
    yield made
    made.shutdown()


@pytest.mark.slow
def test_a_cluster_of_two_machines_of_which_one_ends_midway(two_machines, tmp_path: Path):
    where = str(tmp_path)

    def action(item: int) -> str:
        import ray

        Path(where, str(item)).touch()
        time.sleep(1)
        return ray.get_runtime_context().get_node_id()

    seen = []

    def each(item: int, node: str) -> None:
        seen.append(node)
        if len(set(seen)) == 2 and len(two_machines.worker_nodes) == 1:
            two_machines.remove_node(next(iter(two_machines.worker_nodes)), allow_graceful=False)

    results, failures = run_batch(range(12), action, "counting", places=Places(2, "ray"), each=each)
    assert not failures
    assert len(results) == 12
    assert len(set(results)) == 2


@pytest.mark.slow
def test_a_cluster_without_free_cores_is_said(two_machines, monkeypatch, caplog):
    import ray

    from nearfar.core import cluster

    class Hog:
        def there(self) -> bool:
            return True

    monkeypatch.setattr(cluster, "PATIENCE", 2.0)
    ray.init(two_machines.address, log_to_driver=False)
    try:
        hogs = [ray.remote(num_cpus=1)(Hog).remote() for _ in range(2)]
        assert ray.get([hog.there.remote() for hog in hogs]) == [True, True]
        threading.Timer(8, lambda: [ray.kill(hog) for hog in hogs]).start()
        results, failures = run_batch(range(3), str, "counting", places=Places(2, "ray"))
    finally:
        ray.shutdown()
    assert (results, failures) == (["0", "1", "2"], [])
    assert "no process has started on the Ray cluster for 2 seconds; 0 of its 2 cores are free" in caplog.text
