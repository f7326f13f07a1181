"""The load of the soak: clients that do all that a bot can, as fast as they can, until their time is over."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fsm_ray import AsyncStorage, State, Storage
from fsm_ray.errors import ChangesMissed, ScanInterrupted, TurnTimeout, VersionConflict

KEYS = 2_000
"""Conversations that all clients work on; others live for a second and expire."""

TASKS = 24
THREADS = 3

SOME = 20
"""Conversations that are used together."""

MONTH_S = 30 * 86_400.0

NEW_STORAGE_S = 5.0
"""How often a client opens a storage of its own and closes it again."""

DATA = {"name": "Alice", "mail": "alice@example.org", "history": list(range(20))}

_WEIGHTS = {
    "read": 30,
    "update": 30,
    "set": 10,
    "clear": 2,
    "count_up": 6,
    "turn": 8,
    "short_lived": 10,
    "read_many": 1,
    "set_many": 1,
    "contended_turn": 2,
    "made_up": 2,
    "cleared_early": 1,
    "ended_early": 1,
}


@dataclass(slots=True)
class Report:
    """What one process did."""

    pid: int
    done: Counter[str] = field(default_factory=Counter)
    counted: dict[tuple[str, str], int] = field(default_factory=dict)
    """Bot and client -> how often it counted its own conversation up."""
    fds_before: int = 0
    fds_after: int = 0


class Choice:
    """What one client does next, by its seed."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.chance = random.Random(name)
        self._numbers = itertools.count()
        self._coming: list[str] = []

    def method(self) -> str:
        if not self._coming:
            self._coming = self.chance.choices(list(_WEIGHTS), list(_WEIGHTS.values()), k=1_000)
        return self._coming.pop()

    def key(self) -> tuple[str, int]:
        return ("user", self.chance.randrange(KEYS))

    def some_keys(self) -> list[tuple[str, int]]:
        return [self.key() for _ in range(SOME)]

    def new_key(self) -> tuple[str, str, int]:
        return ("once", self.name, next(self._numbers))

    def new_keys(self) -> list[tuple[str, str, int]]:
        return [self.new_key() for _ in range(SOME)]

    def made_up(self) -> dict[Hashable, State]:
        """States that nobody else has. Their names are too long to be kept once for all records.

        Of those that are, a shard keeps 65,535: it would grow until it has as many.
        """
        number = next(self._numbers)
        return {
            key: State(flow="flow", state=f"{self.name} made {number}.{n} up" + "!" * 300, data=dict(DATA))
            for n, key in enumerate(self.some_keys())
        }

    def state(self) -> State:
        return State(flow="flow", state=self.chance.choice(("one", "two", "three")), data=dict(DATA))


_CALLS: dict[str, Callable[[Any, str, Choice], Any]] = {
    "read": lambda storage, bot, choice: storage.get_data(bot, choice.key()),
    "update": lambda storage, bot, choice: storage.update_data(bot, choice.key(), {"name": choice.name}),
    "set": lambda storage, bot, choice: storage.set_state(bot, choice.key(), choice.state()),
    "clear": lambda storage, bot, choice: storage.clear(bot, choice.key()),
    "short_lived": lambda storage, bot, choice: storage.set_data(bot, choice.new_key(), DATA, ttl_s=1.0),
    "read_many": lambda storage, bot, choice: storage.get_many(bot, choice.some_keys()),
    "set_many": lambda storage, bot, choice: storage.set_many(
        bot, {key: choice.state() for key in choice.some_keys()}
    ),
    "made_up": lambda storage, bot, choice: storage.set_many(bot, choice.made_up()),
}
"""Of either facade."""

_END: dict[str, Callable[[Any, str, Hashable], Any]] = {
    "cleared_early": lambda storage, bot, key: storage.clear(bot, key),
    "ended_early": lambda storage, bot, key: storage.update_data(bot, key, {}, ttl_s=1.0),
}
"""What is done to conversations that were to live for a month."""


def fds() -> int:
    """How many file descriptors this process has open."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def run_process(name: str, bots: Sequence[str], end_s: float, directory: Path) -> Report:
    """Clients of both facades at these bots until `time.monotonic()` is `end_s`.

    The file `<pid>.worker` in the directory tells that they are at work.
    """
    report = Report(os.getpid())
    # What Ray opens when it is first used stays open.
    with Storage() as storage, ThreadPoolExecutor(THREADS) as pool:
        for bot in bots:
            storage.count(bot)
        list(pool.map(lambda _: time.sleep(0), range(THREADS)))
        asyncio.run(_warm_up(bots))
    report.fds_before = fds()
    (directory / f"{os.getpid()}.worker").touch()
    with ThreadPoolExecutor(THREADS + 1) as pool:
        running = [
            pool.submit(_run_thread, Choice(f"{name}.thread-{i}"), bots, end_s) for i in range(THREADS)
        ]
        running.append(pool.submit(lambda: asyncio.run(_run_loop(name, bots, end_s))))
        for each in running:
            done, counted = each.result()
            report.done += done
            report.counted |= counted
    report.fds_after = fds()
    return report


def suppress_races() -> contextlib.suppress:
    """For turns: others may have the conversation for too long, or write to it without a turn."""
    return contextlib.suppress(TurnTimeout, VersionConflict)


Done = tuple[Counter[str], Counter[tuple[str, str]]]
"""How often a client did what; and bot and client -> how often it counted its own conversation up."""


async def _warm_up(bots: Sequence[str]) -> None:
    async with AsyncStorage() as storage:
        for bot in bots:
            await storage.count(bot)


def _run_thread(choice: Choice, bots: Sequence[str], end_s: float) -> Done:
    done: Counter[str] = Counter()
    counted: Counter[tuple[str, str]] = Counter()
    own = ("count", choice.name)
    while time.monotonic() < end_s:
        renew_s = min(end_s, time.monotonic() + NEW_STORAGE_S)
        with Storage(timeout_s=60) as storage:
            while time.monotonic() < renew_s:
                bot, method = choice.chance.choice(bots), choice.method()
                done[method] += 1
                if method in _CALLS:
                    _CALLS[method](storage, bot, choice)
                elif method == "count_up":
                    storage.patch(bot, own, increment={"n": 1}, ttl_s=math.inf)
                    counted[bot, choice.name] += 1
                elif method in _END:
                    for new_key in choice.new_keys():
                        storage.set_data(bot, new_key, DATA, ttl_s=MONTH_S)
                        _END[method](storage, bot, new_key)
                else:
                    key = "contended" if method == "contended_turn" else choice.key()
                    with suppress_races(), storage.turn(bot, key, timeout_s=60) as turn:
                        turn.data["turns"] = turn.data.get("turns", 0) + 1
            done["scan"] += 1
            with contextlib.suppress(ScanInterrupted):
                done["found"] += sum(1 for _ in itertools.islice(storage.scan(bots[0]), KEYS))
    return done, counted


async def _run_loop(name: str, bots: Sequence[str], end_s: float) -> Done:
    done: Counter[str] = Counter()
    counted: Counter[tuple[str, str]] = Counter()
    async with AsyncStorage(timeout_s=60) as storage:
        watching = [asyncio.create_task(_watch(storage, bot, done)) for bot in bots]
        async with asyncio.TaskGroup() as tasks:
            for i in range(TASKS):
                choice = Choice(f"{name}.task-{i}")
                tasks.create_task(_run_task(storage, choice, bots, end_s, (done, counted)))
            for bot in bots:
                tasks.create_task(_scan(storage, bot, end_s, done))
                tasks.create_task(_come_and_go(bot, end_s, done))
        for watch in watching:
            watch.cancel()
        await asyncio.gather(*watching, return_exceptions=True)
        for watch in watching:
            if not watch.cancelled():
                watch.result()
    return done, counted


async def _run_task(
    storage: AsyncStorage, choice: Choice, bots: Sequence[str], end_s: float, totals: Done
) -> None:
    done, counted = totals
    own = ("count", choice.name)
    while time.monotonic() < end_s:
        bot, method = choice.chance.choice(bots), choice.method()
        done[method] += 1
        if method in _CALLS:
            await _CALLS[method](storage, bot, choice)
        elif method == "count_up":
            await storage.patch(bot, own, increment={"n": 1}, ttl_s=math.inf)
            counted[bot, choice.name] += 1
        elif method in _END:
            new = choice.new_keys()
            await asyncio.gather(*(storage.set_data(bot, new_key, DATA, ttl_s=MONTH_S) for new_key in new))
            await asyncio.gather(*(_END[method](storage, bot, new_key) for new_key in new))
        else:
            key = "contended" if method == "contended_turn" else choice.key()
            with suppress_races():
                async with storage.turn(bot, key, timeout_s=60) as turn:
                    turn.data["turns"] = turn.data.get("turns", 0) + 1


async def _watch(storage: AsyncStorage, bot: str, done: Counter[str]) -> None:
    since = None
    while True:
        try:
            async for _ in storage.watch(bot, state="two", since=since):
                done["changes"] += 1
        except ChangesMissed as error:
            done["missed"] += 1
            since = error.position


async def _scan(storage: AsyncStorage, bot: str, end_s: float, done: Counter[str]) -> None:
    while time.monotonic() < end_s:
        done["scan"] += 1
        with contextlib.suppress(ScanInterrupted):
            async for _ in storage.scan(bot, flow="flow"):
                done["found"] += 1
                if time.monotonic() >= end_s:
                    break


async def _come_and_go(bot: str, end_s: float, done: Counter[str]) -> None:
    while time.monotonic() < end_s:
        async with AsyncStorage(timeout_s=60) as storage:
            await storage.update_data(bot, ("user", 0), {"name": "passer-by"})
        done["came and went"] += 1
        await asyncio.sleep(min(NEW_STORAGE_S, max(0.0, end_s - time.monotonic())))


def lines(counts: Counter[str]) -> Iterator[str]:
    """What was done, for people to read."""
    return (f"{count:,} {what}" for what, count in counts.most_common())
