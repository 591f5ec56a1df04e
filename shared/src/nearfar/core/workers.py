"""Items of a batch in worker processes of this machine: what ends a worker costs one item."""

import multiprocessing
import os
import pickle
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, Generic, TypeVar

import cloudpickle

Made = TypeVar("Made")

POLL = 0.2
"""Seconds between two looks at the workers' time and memory."""

STARTS = -1
"""In the place of an item: the process is not ready yet."""


class Once(Generic[Made]):
    """What `make` gives, made when it is first called for in a process; other processes are sent `make` alone.

    For models that cannot be sent, such as those with parametrized weights.
    """

    def __init__(self, make: Callable[[], Made]) -> None:
        self.make = make
        self.made: list[Made] = []

    def __call__(self) -> Made:
        if not self.made:
            self.made.append(self.make())
        return self.made[0]

    def __reduce__(self) -> Any:
        return Once, (self.make,)


@dataclass
class _Worker:
    """A process that has the action once, and does one item after the other."""

    process: SpawnProcess
    connection: Connection
    item: int | None = STARTS
    since: float = 0.0

    def send(self, index: int, content: bytes) -> None:
        self.item, self.since = index, time.monotonic()
        self.connection.send((index, content))

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def spread(
    items: Sequence[Any],
    action: Callable[[Any], Any],
    workers: int,
    seconds: float | None = None,
    memory: int | None = None,
) -> Iterator[tuple[int, Any, Exception | None]]:
    """`(index, result, error)` of each item as it is done; one of the two is None.

    `action` (cloudpickle takes it, with the model that it holds, see `Once`) goes to each of the `workers` processes
    once; these share the processor's threads out. An item that takes more than `seconds`, whose process holds more than
    `memory` bytes (Linux), or that ends its process in whatever way, gives a RuntimeError that says so; a new process
    takes the place of the one that ended.
    """
    try:
        content = cloudpickle.dumps(action)
    except Exception as error:
        raise RuntimeError(f"the work cannot be sent: {type(error).__name__}: {error}") from error
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    left = deque(range(len(items)))
    running: list[_Worker] = []
    try:
        while left or any(worker.item is not None for worker in running):
            while len(running) < min(workers, len(left) + sum(worker.item not in (None, STARTS) for worker in running)):
                running.append(_start(content, max(1, cores // workers)))
            ready = wait([worker.connection for worker in running if worker.item is not None], POLL)
            for worker in [*running]:
                if worker.connection in ready:
                    try:
                        answer = worker.connection.recv()
                    except (EOFError, OSError):
                        running.remove(worker)
                        worker.process.join()
                        worker.stop()
                        ended = RuntimeError(f"its process ended ({_ending(worker.process.exitcode)})")
                        answer = worker.item, None, ended
                    index, _, failed = answer
                    if index != STARTS:
                        yield answer
                    elif failed is not None:
                        raise failed
                    worker.item = None
                elif worker.item not in (None, STARTS) and (reason := _too_much(worker, seconds, memory)):
                    running.remove(worker)
                    worker.stop()
                    yield worker.item, None, RuntimeError(reason)
                if worker.item is None and left and worker in running:
                    index = left.popleft()
                    worker.send(index, cloudpickle.dumps(items[index]))
    finally:
        for worker in running:
            worker.stop()


def _start(content: bytes, threads: int) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, content, threads), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _work(connection: Connection, content: bytes, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process has it too, and ends this one
    import torch

    torch.set_num_threads(threads)
    try:
        action = cloudpickle.loads(content)  # from the process that started this one, by a pipe; no file's content
    except Exception as error:
        connection.send((STARTS, None, RuntimeError(f"the work cannot be sent: {type(error).__name__}: {error}")))
        return
    connection.send((STARTS, None, None))
    while True:
        try:
            index, item = connection.recv()
        except EOFError:
            return
        connection.send((index, *attempt(action, cloudpickle.loads(item))))


def attempt(action: Callable[[Any], Any], item: Any) -> tuple[Any, Exception | None]:
    """What `action` makes of `item`, or its error; both can be sent to another process."""
    result, error = None, None
    try:
        result = action(item)
    except Exception as failed:
        error = failed
    try:
        pickle.loads(pickle.dumps((result, error)))
    except Exception:
        reason = error if error is not None else TypeError(f"{type(result).__name__} cannot be sent")
        return None, RuntimeError(f"{type(reason).__name__}: {reason}")
    return result, error


def _ending(status: int | None) -> str:
    if status is not None and status < 0:
        name = signal.Signals(-status).name
        return f"{name}; the system kills what runs out of memory" if name == "SIGKILL" else name
    return f"exit status {status}"


def _too_much(worker: _Worker, seconds: float | None, memory: int | None) -> str:
    if seconds is not None and time.monotonic() - worker.since > seconds:
        return f"took more than {seconds:g} seconds"
    if memory is not None:
        try:
            pages = int(Path(f"/proc/{worker.process.pid}/statm").read_text().split()[1])
        except (OSError, IndexError, ValueError):  # it has ended, or this is not Linux
            return ""
        if pages * os.sysconf("SC_PAGE_SIZE") > memory:
            return f"took more than {memory >> 20} MB of memory"
    return ""
