"""Batches in worker processes: order, errors, what ends a worker, limits."""

import os
import signal
import time
from pathlib import Path

import pytest

from nearfar.core.cli.batch import run_batch
from nearfar.core.cli.console import console
from nearfar.core.errors import UserError


def test_what_ends_a_worker_costs_one_item():
    shift = 100

    def action(item: int) -> int:
        if item == 2:
            raise UserError("item 2: damaged")
        if item == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if item == 5:
            time.sleep(600)
        if item == 7:
            os._exit(3)
        console.print("")  # a console of the worker's own
        return item + shift

    results, failures = run_batch(range(10), action, "counting", lambda item: f"item {item}", workers=2, seconds=5)
    assert results == [100, 101, 104, 106, 108, 109]
    assert failures == [
        "item 2: damaged",
        "item 3: RuntimeError: its process ended (SIGKILL; the system kills what runs out of memory)",
        "item 5: RuntimeError: took more than 5 seconds",
        "item 7: RuntimeError: its process ended (exit status 3)",
    ]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is looked at on Linux")
def test_item_that_takes_too_much_memory_is_named():
    def action(item: int) -> int:
        hold = bytearray(2**31) if item == 1 else bytearray(1)
        for place in range(0, len(hold), 4096):
            hold[place] = 1
        time.sleep(2 if item == 1 else 0)
        return len(hold)

    results, failures = run_batch(range(3), action, "holding", workers=2, memory=3 << 29)
    assert results == [1, 1]
    assert failures == ["1: RuntimeError: took more than 1536 MB of memory"]


def test_work_that_cannot_be_sent_is_said():
    class Torn:
        def __reduce__(self):
            return int, ("no number",)

    torn = Torn()
    with pytest.raises(RuntimeError, match="the work cannot be sent"):
        run_batch(range(3), lambda item: (item, torn), "trying", workers=2)
