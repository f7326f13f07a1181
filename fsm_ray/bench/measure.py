"""One measurement of one contender: throughput, or latency, which has a pass of its own.

The work is the same everywhere: `get_data`, then `update_data` of one field, over the task's keys in turn.
No timer runs around an operation while throughput is counted.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from time import perf_counter, perf_counter_ns
from typing import Any, TypeVar

from fsm_ray.bench.contender import Contender
from fsm_ray.bench.workload import CHANGED_FIELD, Share, Workload

K = TypeVar("K")
T = TypeVar("T")

_GRACE_S = 60.0
"""How much a measurement may overrun before its contender counts as hung."""


@contextmanager
def quiet_collector() -> Iterator[None]:
    """Put what is there already out of the collector's sight: its passes cost no contender anything then."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def operations_per_s(contender: Contender[K], workload: Workload[K], seconds: float) -> float:
    """Count operations a second, of all tasks together; whatever the contender raises comes through."""
    started = perf_counter()
    deadline = started + seconds
    if contender.blocking:
        operations = _count_blocking(contender, workload, deadline)
    else:
        tasks = [_count(contender, workload, share, deadline) for share in workload.shares]
        operations = sum(contender.surroundings.run(together(tasks, seconds)))
    return operations / (perf_counter() - started)


def latencies_ns(contender: Contender[K], workload: Workload[K], seconds: float) -> list[int]:
    """Time each operation, of all tasks, in nanoseconds; whatever the contender raises comes through."""
    deadline = perf_counter() + seconds
    if contender.blocking:
        return _time_blocking(contender, workload, deadline)
    tasks = [_time(contender, workload, share, deadline) for share in workload.shares]
    return [sample for samples in contender.surroundings.run(together(tasks, seconds)) for sample in samples]


async def together(coroutines: list[Coroutine[Any, Any, T]], seconds: float) -> list[T]:
    """What the tasks return, which are to end after so many seconds.

    Raises:
        ExceptionGroup: some failed; all have ended.
        TimeoutError: they hang.
    """
    async with asyncio.timeout(seconds + _GRACE_S), asyncio.TaskGroup() as group:
        tasks = [group.create_task(coroutine) for coroutine in coroutines]
    return [task.result() for task in tasks]


# The four loops below are one loop, with and without await, with and without timers. They are written out
# because a call more per operation would weigh on the fastest contenders most.


async def _count(contender: Contender[K], workload: Workload[K], share: Share[K], deadline: float) -> int:
    get, update, numbers = contender.get_data, contender.update_data, workload.numbers
    operations = 0
    while True:
        for index, key in enumerate(share.keys):
            if perf_counter() >= deadline:
                return operations
            number = next(numbers)
            await get(key)
            await update(key, {CHANGED_FIELD: number})
            share.written[index] = number
            operations += 2


async def _time(
    contender: Contender[K], workload: Workload[K], share: Share[K], deadline: float
) -> list[int]:
    get, update, numbers = contender.get_data, contender.update_data, workload.numbers
    samples: list[int] = []
    while True:
        for index, key in enumerate(share.keys):
            if perf_counter() >= deadline:
                return samples
            number = next(numbers)
            started = perf_counter_ns()
            await get(key)
            between = perf_counter_ns()
            await update(key, {CHANGED_FIELD: number})
            ended = perf_counter_ns()
            share.written[index] = number
            samples.append(between - started)
            samples.append(ended - between)


def _count_blocking(contender: Contender[K], workload: Workload[K], deadline: float) -> int:
    get, update, numbers, share = (
        contender.get_data,
        contender.update_data,
        workload.numbers,
        workload.shares[0],
    )
    operations = 0
    while True:
        for index, key in enumerate(share.keys):
            if perf_counter() >= deadline:
                return operations
            number = next(numbers)
            get(key)
            update(key, {CHANGED_FIELD: number})
            share.written[index] = number
            operations += 2


def _time_blocking(contender: Contender[K], workload: Workload[K], deadline: float) -> list[int]:
    get, update, numbers, share = (
        contender.get_data,
        contender.update_data,
        workload.numbers,
        workload.shares[0],
    )
    samples: list[int] = []
    while True:
        for index, key in enumerate(share.keys):
            if perf_counter() >= deadline:
                return samples
            number = next(numbers)
            started = perf_counter_ns()
            get(key)
            between = perf_counter_ns()
            update(key, {CHANGED_FIELD: number})
            ended = perf_counter_ns()
            share.written[index] = number
            samples.append(between - started)
            samples.append(ended - between)
