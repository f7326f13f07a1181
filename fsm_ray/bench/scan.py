"""Count and scan of a bot with many conversations, and what a scan costs those who write meanwhile.

The bot has one shard. The writers are tasks of this process; another one scans, a Ray actor.
"""

from __future__ import annotations

import asyncio
import statistics
from collections import Counter
from collections.abc import Awaitable
from itertools import islice
from random import Random
from time import perf_counter, perf_counter_ns
from typing import Any, TypeVar

import ray

from fsm_ray import AsyncStorage, State, Storage
from fsm_ray.bench.config import BenchConfig
from fsm_ray.bench.contender import Surroundings, WrongData
from fsm_ray.bench.figures import Figure, percentile
from fsm_ray.bench.measure import quiet_collector
from fsm_ray.bench.ours import drop_and_close, make_bot_name, make_key
from fsm_ray.bench.results import Scan
from fsm_ray.bench.rounds import Progress
from fsm_ray.bench.workload import CHANGED_FIELD, DATA, FIRST_USER, FLOW

T = TypeVar("T")

_WRITERS = 16
_STATES = tuple(f"state {number}" for number in range(10))
_COUNTS_PER_ROUND = 25
_MOST_ROUNDS = 2
"""A round with many conversations takes long, and has samples enough."""

_LOADED_AT_ONCE = 5_000


class Scanner:
    """What scans, in a process of its own."""

    def __init__(self, bot: str) -> None:
        self._storage = Storage()
        self._bot = bot

    def scan(self, limit: int | None = None) -> tuple[int, float]:
        """How many conversations there are, at most so many, and how long it took to scan them."""
        started = perf_counter()
        found = sum(1 for _ in self._storage.scan(self._bot, limit=limit))
        return found, perf_counter() - started


def time_scan(surroundings: Surroundings, config: BenchConfig, progress: Progress) -> Scan:
    """Load so many conversations, count them, and write to them without and with a scan, once a round.

    Raises:
        WrongData: a count is wrong, or a scan has missed a conversation.
    """
    return surroundings.run(_time_scan(config, progress))


async def _time_scan(config: BenchConfig, progress: Progress) -> Scan:
    storage, bot, conversations = AsyncStorage(), make_bot_name("scan"), config.scan_conversations
    await storage.init(bot)
    scanner: Any = ray.remote(Scanner).options(num_cpus=0).remote(bot)
    try:
        progress(f"loading {conversations:,} conversations")
        await _load(storage, bot, conversations)
        await scanner.scan.remote(limit=1)  # it is there, and connected
        with quiet_collector():
            return await _take_rounds(storage, bot, scanner, config, progress)
    finally:
        ray.kill(scanner)
        await drop_and_close(storage, bot)


async def _take_rounds(
    storage: AsyncStorage, bot: str, scanner: Any, config: BenchConfig, progress: Progress
) -> Scan:
    conversations = config.scan_conversations
    measured: list[tuple[float, ...]] = []
    rounds = min(config.rounds, _MOST_ROUNDS)
    for number in range(1, rounds + 1):
        progress(f"scan, round {number} of {rounds}")
        count_ms = await _time_count(storage, bot, conversations)
        _, alone_us = await _write_during(storage, bot, conversations, asyncio.sleep(config.seconds))
        (found, scan_s), beside_us = await _write_during(storage, bot, conversations, scanner.scan.remote())
        _check(found, conversations, "a scan has found")
        measured.append((count_ms, scan_s, alone_us, beside_us))
    return Scan(conversations, *(Figure(rounds) for rounds in zip(*measured, strict=True)))


async def _time_count(storage: AsyncStorage, bot: str, conversations: int) -> float:
    """How long it takes to count by state, in milliseconds: the median."""
    expected = Counter((FLOW, _state_of(number)) for number in range(conversations))
    samples = []
    for _ in range(_COUNTS_PER_ROUND):
        started = perf_counter()
        counts = await storage.count(bot, by="state")
        samples.append((perf_counter() - started) * 1e3)
        _check(counts, dict(expected), "a count by state is")
    return statistics.median(samples)


async def _write_during(
    storage: AsyncStorage, bot: str, conversations: int, going_on: Awaitable[T]
) -> tuple[T, float]:
    """What comes of it, and the p99 of the writes that are made meanwhile, in microseconds."""
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        writers = [
            group.create_task(_write_until(stop, storage, bot, conversations, Random(seed)))
            for seed in range(_WRITERS)
        ]
        result = await going_on
        stop.set()
    samples = [sample for writer in writers for sample in writer.result()]
    return result, percentile(samples, 0.99) / 1e3


async def _write_until(
    stop: asyncio.Event, storage: AsyncStorage, bot: str, conversations: int, random: Random
) -> list[int]:
    draw = random.random
    samples: list[int] = []
    while not stop.is_set():
        key = make_key(FIRST_USER + int(draw() * conversations))
        started = perf_counter_ns()
        await storage.update_data(bot, key, {CHANGED_FIELD: started})
        samples.append(perf_counter_ns() - started)
    return samples


async def _load(storage: AsyncStorage, bot: str, conversations: int) -> None:
    states = (
        (make_key(FIRST_USER + number), State(flow=FLOW, state=_state_of(number), data=DATA))
        for number in range(conversations)
    )
    while some := dict(islice(states, _LOADED_AT_ONCE)):
        await storage.set_many(bot, some)


def _state_of(number: int) -> str:
    return _STATES[number % len(_STATES)]


def _check(found: object, expected: object, what: str) -> None:
    if found != expected:
        raise WrongData(f"{what} {found!r}, not {expected!r}")
