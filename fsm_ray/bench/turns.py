"""Whole updates: what a bot does with a conversation for one message, through a turn and through aiogram.

Lock, load, two writes of data, a transition, commit, unlock. Each update counts up what it has loaded, so a
lost one is found in the end. No two tasks share a conversation.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from itertools import pairwise
from time import perf_counter
from typing import Any, ClassVar, TypeVar

from aiogram.fsm.storage.base import StorageKey
from aiogram.fsm.storage.redis import RedisStorage

from fsm_ray.bench.aiogram_peers import AiogramRedis
from fsm_ray.bench.config import BenchConfig
from fsm_ray.bench.contender import Contender, Surroundings, WrongData
from fsm_ray.bench.measure import together
from fsm_ray.bench.ours import FsmRay, Key
from fsm_ray.bench.results import TURNS, Cell
from fsm_ray.bench.rounds import Progress, Trial, take_rounds
from fsm_ray.bench.workload import CHANGED_FIELD, DATA, FLOW, STATE, Share, Workload
from fsm_ray.flows import Flow

K = TypeVar("K")

_STATES = (STATE, "get_city", "get_phone")
_NEXT: dict[str | None, str] = dict(pairwise((*_STATES, STATE)))
"""In a circle, so there is always one."""

_COUNT = "updates"
"""The field that each update counts up, beside the one that it changes."""


class Registration(Flow):
    """The demo's flow, without an end."""

    name = FLOW
    default_state = STATE
    transitions: ClassVar = {state: [_NEXT[state]] for state in _STATES}


class Handling(Contender[K]):
    """A contender that handles whole updates."""

    @abstractmethod
    async def handle(self, key: K) -> None:
        """Count one up, write the count into each of two fields, and go to the next state."""

    @abstractmethod
    async def state_of(self, key: K) -> str | None:
        """The state within the flow."""

    def expected(self, updates: int) -> tuple[str | None, dict[str, Any]]:
        """The state and the data that so many updates lead to."""
        return _STATES[updates % len(_STATES)], DATA | {_COUNT: updates, CHANGED_FIELD: updates}

    def verify(self, workload: Workload[K]) -> int:
        """Count the keys that were updated; every one holds what so many updates lead to."""
        return self.surroundings.run(self._verify(workload))

    async def _verify(self, workload: Workload[K]) -> int:
        verified = 0
        for share in workload.shares:
            for key, updates in zip(share.keys, share.written, strict=True):
                if updates is None:
                    continue
                found = await self.state_of(key), await self.get_data(key)
                expected = self.expected(updates)
                if found != expected:
                    raise WrongData(f"under {key!r} is {found!r}, not {expected!r}")
                verified += 1
        return verified


class FsmRayTurns(FsmRay, Handling[Key]):
    name = TURNS
    label = "fsm_ray AsyncStorage.turn"

    def open(self) -> None:
        super().open()
        self._storage.register_flows(self._bot, Registration)

    async def handle(self, key: Key) -> None:
        async with self._storage.turn(self._bot, key) as turn:
            count = turn.data.get(_COUNT, 0) + 1
            turn.update_data({_COUNT: count})
            turn.update_data({CHANGED_FIELD: count})
            turn.transition(_NEXT[turn.state])

    async def state_of(self, key: Key) -> str | None:
        state = await self._storage.get_state(self._bot, key)
        return None if state is None else state.state


class AiogramRedisIsolated(AiogramRedis, Handling[StorageKey]):
    name = "aiogram-redis-isolated"
    label = "aiogram RedisStorage within RedisEventIsolation.lock, default settings"

    def open(self) -> None:
        storage = RedisStorage.from_url(f"unix://{self.valkey_socket}")
        self.storage, self._isolation = storage, storage.create_isolation()

    async def handle(self, key: StorageKey) -> None:
        async with self._isolation.lock(key):
            state = await self.state_of(key)
            data = await self.storage.get_data(key)
            count = data.get(_COUNT, 0) + 1
            await self.storage.update_data(key, {_COUNT: count})
            await self.storage.update_data(key, {CHANGED_FIELD: count})
            await self.storage.set_state(key, f"{FLOW}:{_NEXT[state]}")

    async def state_of(self, key: StorageKey) -> str | None:
        state = await self.storage.get_state(key)
        return state and state.removeprefix(f"{FLOW}:")


def time_turns(surroundings: Surroundings, config: BenchConfig, progress: Progress) -> tuple[Cell, ...]:
    """Measure both at every number of tasks; the operations of the cells are whole updates."""
    contenders: list[Handling[Any]] = [FsmRayTurns(surroundings), AiogramRedisIsolated(surroundings)]
    return take_rounds(
        contenders, dataclasses.replace(config, tasks=config.turn_tasks), progress, measure_updates
    )


def measure_updates(trial: Trial[Handling[Any]], seconds: float) -> None:
    """A pass: whole updates a second."""
    trial.rates.append(updates_per_s(trial.contender, trial.workload, seconds))


def updates_per_s(contender: Handling[K], workload: Workload[K], seconds: float) -> float:
    """Count updates a second, of all tasks together; whatever the contender raises comes through."""
    started = perf_counter()
    tasks = [_count(contender, share, started + seconds) for share in workload.shares]
    return sum(contender.surroundings.run(together(tasks, seconds))) / (perf_counter() - started)


async def _count(contender: Handling[K], share: Share[K], deadline: float) -> int:
    handle, updates = contender.handle, 0
    while True:
        for index, key in enumerate(share.keys):
            if perf_counter() >= deadline:
                return updates
            await handle(key)
            share.written[index] = (share.written[index] or 0) + 1
            updates += 1
