"""Items of a batch on a Ray cluster (extra `ray`), as `nearfar.core.workers` does them on one machine."""

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import cloudpickle

from nearfar.core.errors import UserError
from nearfar.core.memory import machine_memory, resident_memory
from nearfar.core.workers import POLL, STARTS, attempt

log = logging.getLogger(__name__)

PATIENCE = 30.0
"""Seconds without a process after which the cluster's free cores are said, again and again."""


def spread(
    items: Sequence[Any],
    action: Callable[[Any], Any],
    workers: int,
    seconds: float | None = None,
    memory: int | None = None,
) -> Iterator[tuple[int, Any, Exception | None]]:
    """`(index, result, error)` of each item as it is done; one of the two is None.

    `action` goes to each of the `workers` actors once; an actor has one core. The cluster is that of the environment
    variable RAY_ADDRESS, else one of this machine for the time of the work; where it has no free core, that is said
    every half minute. An item whose actor ends is done once more,
    as its machine may have ended and not it; the second time, or after `seconds`, it gives a RuntimeError that says so.
    An actor that holds more than `memory` bytes, by default its machine's for each core, ends itself. The machines of
    the cluster have nearfar installed, and reach the files under the same paths.

    Raises UserError without Ray, and RuntimeError where the work cannot be sent.
    """
    # under `uv run` Ray would start its processes by `uv run` too, in an environment that has to be built for each
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    try:
        import ray
    except ImportError as error:
        raise UserError("--engine ray: Ray is not installed; pip install 'nearfar-core[ray]'") from error
    try:
        content = cloudpickle.dumps(action)
    except Exception as error:
        raise RuntimeError(f"the work cannot be sent: {type(error).__name__}: {error}") from error
    begun = not ray.is_initialized()
    if begun:
        address = os.environ.get("RAY_ADDRESS")
        cores, dashboard = (None, None) if address else (workers, False)
        ray.init(address, num_cpus=cores, include_dashboard=dashboard, logging_level=logging.ERROR, log_to_driver=False)
    start: Any = ray.remote(num_cpus=1, max_restarts=0)(_Actor).remote
    sent = ray.put(content)
    left, again = deque(range(len(items))), set[int]()
    idle: list[Any] = []
    said = time.monotonic()
    running: dict[Any, tuple[Any, int, float]] = {}
    try:
        while left or any(index != STARTS for _, index, _ in running.values()):
            while left and idle:
                actor, index = idle.pop(), left.popleft()
                running[actor.do.remote(cloudpickle.dumps(items[index]))] = actor, index, time.monotonic()
            starting = sum(index == STARTS for _, index, _ in running.values())
            for _ in range(min(workers - len(running), len(left) - starting)):
                begins = start(sent, memory)
                running[begins.ready.remote()] = begins, STARTS, time.monotonic()
            ready, _ = ray.wait([*running], timeout=POLL)
            if ready or any(index != STARTS for _, index, _ in running.values()):
                said = time.monotonic()
            elif time.monotonic() - said > PATIENCE:
                said = time.monotonic()
                free, there = (found.get("CPU", 0.0) for found in (ray.available_resources(), ray.cluster_resources()))
                log.warning(
                    "no process has started on the Ray cluster for %g seconds; %g of its %g cores are free. Waiting; "
                    "Ctrl-C ends it",
                    *(PATIENCE, free, there),
                )
            for answer in ready:
                actor, index, _ = running.pop(answer)
                try:
                    result, failed = ray.get(answer)
                except ray.exceptions.RayActorError as ended:
                    if index == STARTS:
                        raise RuntimeError(f"no process starts on the Ray cluster: {ended}") from ended
                    if index in again:
                        yield index, None, RuntimeError("its process ended, twice")
                    else:
                        again.add(index)
                        left.append(index)
                    continue
                idle.append(actor)
                if index != STARTS:
                    yield index, result, failed
                elif failed is not None:
                    raise failed
            for answer, (actor, index, since) in [*running.items()]:
                if seconds is not None and index != STARTS and time.monotonic() - since > seconds:
                    ray.kill(actor)
                    del running[answer]
                    yield index, None, RuntimeError(f"took more than {seconds:g} seconds")
    finally:
        for actor in [*idle, *(actor for actor, _, _ in running.values())]:
            ray.kill(actor)
        if begun:
            ray.shutdown()


class _Actor:
    """A process of the cluster that has the action once."""

    def __init__(self, content: bytes, memory: int | None) -> None:
        self.content = content
        limit = memory or machine_memory() // (os.cpu_count() or 1)
        threading.Thread(target=_end_above, args=(limit,), daemon=True).start()

    def ready(self) -> tuple[None, Exception | None]:
        try:
            self.action = cloudpickle.loads(self.content)  # from the process that started the work
        except Exception as error:
            return None, RuntimeError(f"the work cannot be sent: {type(error).__name__}: {error}")
        return None, None

    def do(self, item: bytes) -> tuple[Any, Exception | None]:
        return attempt(self.action, cloudpickle.loads(item))


def _end_above(memory: int) -> None:
    while resident_memory() <= memory:
        time.sleep(POLL)
    os._exit(1)
