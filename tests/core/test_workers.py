"""Batches in worker processes: order, errors, what ends a worker, limits."""

import os
import signal
import time
from pathlib import Path

import pytest

from nearfar.core.cli.batch import run_batch
from nearfar.core.cli.console import console
from nearfar.core.errors import UserError
from nearfar.core.workers import spread


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

    results, failures = run_batch(range(10), action, "counting", lambda item: f"item {item}", processes=2)
    assert results == [100, 101, 104, 105, 106, 108, 109]
    assert failures == [
        "item 2: damaged",
        "item 3: RuntimeError: its process ended (SIGKILL; the system kills what runs out of memory)",
        "item 7: RuntimeError: its process ended (exit status 3)",
    ]


def test_item_that_takes_too_long_is_named():
    found = {i: (value, str(error)) for i, value, error in spread(range(3), lambda i: time.sleep(99 * i) or i, 2, 3)}
    assert found[0] == (0, "None")
    assert [found[i] for i in (1, 2)] == [(None, "took more than 3 seconds")] * 2


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
        run_batch(range(3), lambda item: (item, torn), "trying", processes=2)
