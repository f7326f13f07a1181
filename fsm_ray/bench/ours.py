"""fsm_ray itself, behind both of its facades, on bots of the run's own."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Mapping
from typing import Any

from fsm_ray import AsyncStorage, State, Storage
from fsm_ray.bench.contender import Contender
from fsm_ray.bench.workload import DATA, FLOW, STATE

Key = tuple[int, int]

_LOADERS = 256
"""Tasks that load records at once."""


class FsmRay(Contender[Key]):
    name = "fsm-ray"
    label = "fsm_ray AsyncStorage"
    needs_ray = True
    store = "memory://"

    def open(self) -> None:
        self._bot = make_bot_name(self.name)
        self._storage = AsyncStorage()
        shards = self.surroundings.shards
        self.surroundings.run(self._storage.init(self._bot, shards=shards, store=self.store))

    def close(self) -> None:
        self.surroundings.run(drop_and_close(self._storage, self._bot))

    def make_key(self, user: int) -> Key:
        return make_key(user)

    def load(self, users: Iterable[int]) -> None:
        self.surroundings.run(load_users(self._storage, self._bot, users))

    def get_data(self, key: Key) -> Any:
        return self._storage.get_data(self._bot, key)

    def update_data(self, key: Key, changes: Mapping[str, Any]) -> Any:
        return self._storage.update_data(self._bot, key, changes)


class FsmRayBlocking(Contender[Key]):
    name = "fsm-ray-blocking"
    label = "fsm_ray Storage, blocking"
    blocking = True
    needs_ray = True

    def open(self) -> None:
        self._bot = make_bot_name("blocking")
        self._storage = Storage()
        self._storage.init(self._bot, shards=self.surroundings.shards)

    def close(self) -> None:
        self._storage.drop(self._bot)
        self._storage.close()

    def make_key(self, user: int) -> Key:
        return make_key(user)

    def load(self, users: Iterable[int]) -> None:
        for user in users:
            self._storage.set_state(self._bot, make_key(user), make_state())

    def get_data(self, key: Key) -> Any:
        return self._storage.get_data(self._bot, key)

    def update_data(self, key: Key, changes: Mapping[str, Any]) -> Any:
        return self._storage.update_data(self._bot, key, changes)


def make_bot_name(part: str) -> str:
    """A bot's name that no other run on the same cluster uses."""
    return f"bench-{part}-{os.getpid()}"


def make_key(user: int) -> Key:
    """The key of a private chat: chat and user have the same id."""
    return (user, user)


def make_state() -> State:
    """The demo's record."""
    return State(flow=FLOW, state=STATE, data=dict(DATA))


async def load_users(storage: AsyncStorage, bot: str, users: Iterable[int]) -> None:
    """Store the demo's record for each user, many at once."""
    remaining = iter(users)

    async def load_some() -> None:
        for user in remaining:
            await storage.set_state(bot, make_key(user), make_state())

    async with asyncio.TaskGroup() as group:
        for _ in range(_LOADERS):
            group.create_task(load_some())


async def drop_and_close(storage: AsyncStorage, bot: str) -> None:
    """Leave nothing behind: neither the bot's actors nor a connection."""
    await storage.drop(bot)
    await storage.close()
