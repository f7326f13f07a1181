"""aiogram's dispatcher with the same handlers over its RedisStorage and over fsm_ray, updates fed to it.

What is measured is `Dispatcher.feed_update`: isolation, filters, handlers and all. The updates are made
before. No two tasks share a conversation, and the updates of each are fed in order.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from aiogram import Dispatcher
from aiogram.fsm.storage.base import StorageKey
from aiogram.fsm.storage.redis import RedisStorage
from aiogram.types import Update

from fsm_ray import AsyncStorage
from fsm_ray.adapters.aiogram import RayFSMMiddleware, RayStorage
from fsm_ray.bench.config import BenchConfig
from fsm_ray.bench.contender import Surroundings
from fsm_ray.bench.dialogue import expected_after, make_bot, make_router, updates_of
from fsm_ray.bench.disk import disk_directory
from fsm_ray.bench.durable import FsmRayDurable, FsmRayPostgres, FsmRayRedis, FsmRayRocksDB
from fsm_ray.bench.ours import drop_and_close, make_bot_name
from fsm_ray.bench.results import ADAPTER_PEER, OURS, TURNS, Cell
from fsm_ray.bench.rounds import Progress, take_rounds
from fsm_ray.bench.turns import Handling, measure_updates

_DURABLE: dict[str, type[FsmRayDurable]] = {
    "rocksdb": FsmRayRocksDB,
    "redis": FsmRayRedis,
    "postgres": FsmRayPostgres,
}


@dataclass(frozen=True)
class Talk:
    """A user's conversation, and what the user sends next."""

    key: StorageKey
    updates: Iterator[Update]


class Dispatching(Handling[Talk]):
    """A contender that handles updates by a dispatcher."""

    dispatcher: Dispatcher

    def __init__(self, surroundings: Surroundings) -> None:
        super().__init__(surroundings)
        self._bot = make_bot()

    def make_key(self, user: int) -> Talk:
        key = StorageKey(bot_id=self._bot.id, chat_id=user, user_id=user)
        return Talk(key, updates_of(user, self._bot))

    def load(self, users: Iterable[int]) -> None:
        """Nothing: each conversation begins with its first update."""

    async def handle(self, key: Talk) -> None:
        await self.dispatcher.feed_update(self._bot, next(key.updates))

    async def state_of(self, key: Talk) -> str | None:
        return await self.dispatcher.storage.get_state(key.key)

    def get_data(self, key: Talk) -> Any:
        return self.dispatcher.storage.get_data(key.key)

    def update_data(self, key: Talk, changes: Mapping[str, Any]) -> Any:
        return self.dispatcher.storage.update_data(key.key, changes)

    def expected(self, updates: int) -> tuple[str | None, dict[str, Any]]:
        return expected_after(updates)

    def serve(self, dispatcher: Dispatcher) -> None:
        """Give the dispatcher the handlers, and the updates from now on."""
        dispatcher.include_router(make_router())
        self.dispatcher = dispatcher


class AiogramRedisDispatcher(Dispatching):
    name = ADAPTER_PEER
    label = "aiogram RedisStorage and RedisEventIsolation, default settings"

    def open(self) -> None:
        storage = RedisStorage.from_url(f"unix://{self.surroundings.valkey_socket}")
        self.serve(Dispatcher(storage=storage, events_isolation=storage.create_isolation()))

    def close(self) -> None:
        self.surroundings.run(self.dispatcher.storage.close())


class OverFsmRay(Dispatching):
    """A dispatcher over a bot of its own; on a store that is made for it and removed after it, or on none."""

    def __init__(self, surroundings: Surroundings, store: str | None = None) -> None:
        super().__init__(surroundings)
        self._store = store

    @abstractmethod
    def make_dispatcher(self, storage: RayStorage) -> Dispatcher: ...

    def open(self) -> None:
        bot, storage, around = make_bot_name(f"aiogram-{self.name}"), AsyncStorage(), self.surroundings
        with ExitStack() as stack:
            around.run(storage.init(bot, shards=around.shards, store=self._make_store(stack)))
            stack.callback(lambda: around.run(drop_and_close(storage, bot)))
            self.serve(self.make_dispatcher(RayStorage(bot, storage)))
            self._stack = stack.pop_all()

    def close(self) -> None:
        self._stack.close()

    def _make_store(self, stack: ExitStack) -> str:
        if self._store is None:
            return "memory://"
        directory = stack.enter_context(disk_directory())
        return _DURABLE[self._store](self.surroundings).make_store(directory, stack)


class FsmRayDispatcher(OverFsmRay):
    name = OURS
    label = "RayStorage and RayEventIsolation"

    def make_dispatcher(self, storage: RayStorage) -> Dispatcher:
        return Dispatcher(storage=storage, events_isolation=storage.create_isolation())


class FsmRayTurnDispatcher(OverFsmRay):
    name = TURNS
    label = "RayStorage and RayFSMMiddleware: each update a turn"

    def make_dispatcher(self, storage: RayStorage) -> Dispatcher:
        dispatcher = Dispatcher(storage=storage, disable_fsm=True)
        dispatcher.update.outer_middleware(RayFSMMiddleware(dispatcher.fsm))
        return dispatcher


def time_dispatchers(surroundings: Surroundings, config: BenchConfig, progress: Progress) -> tuple[Cell, ...]:
    """Measure all at every number of tasks; the operations of the cells are whole updates."""
    store = next(iter(config.stores), None)
    contenders: list[Handling[Any]] = [
        FsmRayDispatcher(surroundings, store),
        FsmRayTurnDispatcher(surroundings, store),
        AiogramRedisDispatcher(surroundings),
    ]
    return take_rounds(contenders, config, progress, measure_updates)
