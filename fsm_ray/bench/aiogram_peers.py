"""aiogram's own storages, used as its users use them: with default settings."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import redis
from aiogram.fsm.storage.base import BaseStorage, DefaultKeyBuilder, StorageKey
from aiogram.fsm.storage.memory import MemoryStorage
from aiogram.fsm.storage.redis import RedisStorage

from fsm_ray.bench.contender import Contender
from fsm_ray.bench.workload import DATA, FLOW, STATE

_BOT_ID = 42
_USERS_PER_PIPELINE = 1_000


class AiogramPeer(Contender[StorageKey]):
    """Either storage: `update_data` is aiogram's own, a get and a set, which is not atomic."""

    storage: BaseStorage

    def close(self) -> None:
        self.surroundings.run(self.storage.close())

    def make_key(self, user: int) -> StorageKey:
        return make_key(user)

    def get_data(self, key: StorageKey) -> Any:
        return self.storage.get_data(key)

    def update_data(self, key: StorageKey, changes: Mapping[str, Any]) -> Any:
        return self.storage.update_data(key, changes)


class AiogramRedis(AiogramPeer):
    name = "aiogram-redis"
    label = "aiogram RedisStorage, default settings (update not atomic)"

    def open(self) -> None:
        self.storage = RedisStorage.from_url(f"unix://{self.valkey_socket}")

    def load(self, users: Iterable[int]) -> None:
        load_aiogram_records(self.valkey_socket, users)

    @property
    def valkey_socket(self) -> str:
        return self.surroundings.valkey_socket


class AiogramMemory(AiogramPeer):
    name = "aiogram-memory"
    label = "aiogram MemoryStorage: in process, shared with nobody"

    def open(self) -> None:
        self.storage = MemoryStorage()

    def load(self, users: Iterable[int]) -> None:
        self.surroundings.run(self._load(users))

    async def _load(self, users: Iterable[int]) -> None:
        for user in users:
            await self.storage.set_state(make_key(user), f"{FLOW}:{STATE}")
            await self.storage.set_data(make_key(user), DATA)


def make_key(user: int) -> StorageKey:
    return StorageKey(bot_id=_BOT_ID, chat_id=user, user_id=user)


def load_aiogram_records(valkey_socket: str, users: Iterable[int]) -> None:
    """Write the very keys and values that aiogram's RedisStorage writes, in pipelines."""
    builder, state, data = DefaultKeyBuilder(), f"{FLOW}:{STATE}", json.dumps(DATA)
    with redis.Redis(unix_socket_path=valkey_socket) as client:
        pipeline = client.pipeline(transaction=False)
        for user in users:
            pipeline.set(builder.build(make_key(user), "state"), state)
            pipeline.set(builder.build(make_key(user), "data"), data)
            if len(pipeline) >= _USERS_PER_PIPELINE:
                pipeline.execute()
        pipeline.execute()
