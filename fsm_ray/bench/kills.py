"""What kill -9 of an actor costs, and that no write is lost by it or applied twice.

The bot has one shard. Writers are at work when its actor is killed, at a moment drawn at random. Beside it,
and as often, a Ray actor that does nothing at all is killed: Ray's own part in the way back.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any, Protocol

import ray

from fsm_ray import AsyncStorage
from fsm_ray.bench.contender import Surroundings
from fsm_ray.bench.crash import PATIENCE_S, only_shard, seconds_to_answer
from fsm_ray.bench.disk import disk_directory
from fsm_ray.bench.figures import Figure
from fsm_ray.bench.ours import drop_and_close, make_bot_name
from fsm_ray.bench.results import Kills
from fsm_ray.bench.rounds import Progress
from fsm_ray.errors import NamespaceUnavailable, OutcomeUnknown

_WRITERS = 16
_KEYS = 4
_FIELDS = 8
"""Of each writer; it writes to them in turn, so this many of its last numbers can be looked at."""

_WRITING_S = (0.05, 0.3)
"""For how long the writers are at work before the actor is killed: from, to."""

_BARE_FIRST = 0.5
"""How often the bare actor is the first of the two to be killed."""


class Updating(Protocol):
    """What a writer needs of a storage."""

    async def update_data(self, bot_name: str, key: int, changes: dict[str, int], /) -> dict[str, Any]: ...


class Writer:
    """Writes a fresh number each time, and finds each that was acknowledged in the answers to later ones.

    An acknowledged write that is gone is seen so. One that was applied twice is not, for it leaves the same
    data: those are found by the versions that the shard gave out, one for each write that it applied.
    """

    def __init__(self, storage: Updating, bot: str, number: int) -> None:
        self._storage = storage
        self._bot = bot
        self.key = number % _KEYS
        self._name = f"writer {number}"
        self._written = 0
        self._expected: dict[str, int] = {}
        self._in_doubt: dict[str, int] = {}
        self.acknowledged = 0
        self.unknown = 0
        self.unknown_applied = 0
        """How many of the writes of unknown outcome turned out to have taken effect."""
        self.lost = 0

    async def write_until(self, stop: asyncio.Event) -> None:
        """Write until told to stop, and then until a write is acknowledged."""
        is_settled = False
        while not (is_settled and stop.is_set()):
            is_settled = await self.write()

    async def write(self) -> bool:
        """Write the next number; tell if it was acknowledged."""
        self._written += 1
        field = f"{self._name}, {self._written % _FIELDS}"
        try:
            data = await self._storage.update_data(self._bot, self.key, {field: self._written})
        except OutcomeUnknown:
            self.unknown += 1
            self._in_doubt[field] = self._written
            return False
        except NamespaceUnavailable:
            return False  # nothing was changed
        self.acknowledged += 1
        self._settle(data)
        self._expected[field] = self._written
        self.check(data)
        return True

    def check(self, data: Mapping[str, Any]) -> None:
        """Count what was acknowledged and is not in the data."""
        gone = [field for field, number in self._expected.items() if data.get(field) != number]
        self.lost += len(gone)
        for field in gone:
            del self._expected[field]

    def _settle(self, data: Mapping[str, Any]) -> None:
        """Find out what became of the writes in doubt: none comes to effect after one that followed it."""
        applied = {field: number for field, number in self._in_doubt.items() if data.get(field) == number}
        self.unknown_applied += len(applied)
        self._expected |= applied
        self._in_doubt.clear()


def time_kills(surroundings: Surroundings, kills: int, progress: Progress) -> Kills:
    """Kill the actor of a bot on a rocksdb store so often, and a bare actor as often."""
    with disk_directory() as directory:
        return surroundings.run(_time_kills(f"rocksdb://{directory}", kills, progress))


async def _time_kills(store: str, kills: int, progress: Progress) -> Kills:
    storage, bot = AsyncStorage(timeout_s=PATIENCE_S), make_bot_name("kills")
    await storage.init(bot, store=store)
    bare = _start_bare_actor(make_bot_name("bare"))
    try:
        return await _kill_again_and_again(storage, bot, bare, kills, progress)
    finally:
        ray.kill(bare)
        await drop_and_close(storage, bot)


async def _kill_again_and_again(
    storage: AsyncStorage, bot: str, bare: Any, kills: int, progress: Progress
) -> Kills:
    random = Random(kills)
    writers = [Writer(storage, bot, number) for number in range(_WRITERS)]
    first_version = (await only_shard(storage, bot)).statistics.version
    answered_s: list[float] = []
    recovery_s: list[float] = []
    bare_s: list[float] = []
    for number in range(1, kills + 1):
        progress(f"kill {number} of {kills}")
        if random.random() < _BARE_FIRST:
            bare_s.append(await _kill_bare(bare))
        answered_s.append(await _kill_in_mid_write(storage, bot, writers, random.uniform(*_WRITING_S)))
        recovery_s.append((await only_shard(storage, bot)).recovery_s)
        if len(bare_s) < number:
            bare_s.append(await _kill_bare(bare))
    for writer in writers:
        writer.check(await storage.get_data(bot, writer.key) or {})
    versions = (await only_shard(storage, bot)).statistics.version - first_version
    return account(writers, versions, *(Figure(tuple(each)) for each in (answered_s, recovery_s, bare_s)))


async def _kill_in_mid_write(storage: AsyncStorage, bot: str, writers: list[Writer], after_s: float) -> float:
    """From the kill to the answer to a read."""
    pid = (await only_shard(storage, bot)).pid
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        for writer in writers:
            group.create_task(writer.write_until(stop))
        await asyncio.sleep(after_s)
        seconds = await seconds_to_answer(pid, lambda: storage.get_data(bot, writers[0].key))
        stop.set()
    return seconds


async def _kill_bare(bare: Any) -> float:
    # Nobody writes meanwhile, as nobody can while the other actor is away.
    return await seconds_to_answer(await bare.pid.remote(), bare.pid.remote)


def account(
    writers: Sequence[Writer], versions: int, answered_s: Figure, recovery_s: Figure, bare_s: Figure
) -> Kills:
    """Sum up what the writers saw; `versions` were given out, one for each write that was applied."""
    acknowledged = sum(writer.acknowledged for writer in writers)
    surplus = versions - acknowledged - sum(writer.unknown_applied for writer in writers)
    return Kills(
        answered_s=answered_s,
        recovery_s=recovery_s,
        bare_s=bare_s,
        acknowledged=acknowledged,
        unknown=sum(writer.unknown for writer in writers),
        lost=max(sum(writer.lost for writer in writers), -surplus),
        applied_twice=max(surplus, 0),
    )


def _start_bare_actor(name: str) -> Any:
    # Defined here, for then Ray carries the class itself to the worker, which imports nothing of ours.
    class Bare:
        def pid(self) -> int:
            return os.getpid()

    return (
        ray.remote(Bare)
        .options(name=name, lifetime="detached", num_cpus=0, max_restarts=-1, max_task_retries=-1)
        .remote()
    )
