"""Whether an operation of fsm_ray costs more when its bot has more conversations.

A bot for each size, all loaded first and then measured in turns, so the machine's drift hits all sizes alike.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from random import Random
from time import perf_counter

from fsm_ray import AsyncStorage
from fsm_ray.bench.config import BenchConfig
from fsm_ray.bench.contender import Surroundings, WrongData
from fsm_ray.bench.figures import Figure
from fsm_ray.bench.measure import quiet_collector
from fsm_ray.bench.ours import load_users, make_bot_name, make_key
from fsm_ray.bench.results import SizeCell
from fsm_ray.bench.rounds import Progress
from fsm_ray.bench.workload import CHANGED_FIELD, DATA, FIRST_USER

_VERIFIED_USERS = 100


def time_sizes(surroundings: Surroundings, config: BenchConfig, progress: Progress) -> tuple[SizeCell, ...]:
    """Measure every size at every number of tasks, with random keys over all of the bot's conversations.

    Raises:
        WrongData: a conversation is not there any more.
    """
    return surroundings.run(_time_sizes(config, progress))


async def _time_sizes(config: BenchConfig, progress: Progress) -> tuple[SizeCell, ...]:
    async with AsyncExitStack() as stack:
        storage = AsyncStorage()
        stack.push_async_callback(storage.close)
        for size in config.sizes:
            progress(f"loading {size:,} conversations")
            await storage.init(_bot(size), shards=config.shards)
            stack.push_async_callback(storage.drop, _bot(size))
            await load_users(storage, _bot(size), range(FIRST_USER, FIRST_USER + size))
        rates: dict[tuple[int, int], list[float]] = {
            (size, tasks): [] for tasks in config.size_tasks for size in config.sizes
        }
        with quiet_collector():
            for number in range(1, config.rounds + 1):
                progress(f"sizes, round {number} of {config.rounds}")
                for (size, tasks), measured in rates.items():
                    measured.append(await _operations_per_s(storage, size, tasks, config.seconds))
        for size in config.sizes:
            await _verify(storage, size)
        return tuple(SizeCell(size, tasks, Figure(tuple(found))) for (size, tasks), found in rates.items())


async def _operations_per_s(storage: AsyncStorage, size: int, tasks: int, seconds: float) -> float:
    started = perf_counter()
    async with asyncio.TaskGroup() as group:
        counts = [
            group.create_task(_count(storage, size, Random(seed), started + seconds)) for seed in range(tasks)
        ]
    return sum(count.result() for count in counts) / (perf_counter() - started)


async def _count(storage: AsyncStorage, size: int, random: Random, deadline: float) -> int:
    bot, draw, operations = _bot(size), random.random, 0
    while perf_counter() < deadline:
        # Drawn anew for every pair: a list made before would be short, and its records in the CPU's caches.
        key = make_key(FIRST_USER + int(draw() * size))
        await storage.get_data(bot, key)
        await storage.update_data(bot, key, {CHANGED_FIELD: operations})
        operations += 2
    return operations


async def _verify(storage: AsyncStorage, size: int) -> None:
    random = Random(size)
    for _ in range(_VERIFIED_USERS):
        key = make_key(FIRST_USER + random.randrange(size))
        data = await storage.get_data(_bot(size), key)
        if data is None or data | {CHANGED_FIELD: DATA[CHANGED_FIELD]} != DATA:
            raise WrongData(f"under {key!r} of {size} conversations is {data!r}")


def _bot(size: int) -> str:
    return make_bot_name(f"size-{size}")
