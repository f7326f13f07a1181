"""fsm_ray on each durable store, and the peer that keeps as much: each on a server or directory of its own.

All sync before they acknowledge.
"""

from __future__ import annotations

from abc import abstractmethod
from contextlib import ExitStack
from pathlib import Path

from fsm_ray.bench.aiogram_peers import AiogramRedis
from fsm_ray.bench.disk import disk_directory
from fsm_ray.bench.ours import FsmRay
from fsm_ray.bench.servers import PostgresServer, ValkeyServer


class FsmRayDurable(FsmRay):
    """One whose store is made for it, and removed after it."""

    @abstractmethod
    def make_store(self, directory: Path, stack: ExitStack) -> str:
        """The URL of an empty store; what it needs is in the directory, and ends with the stack."""

    def open(self) -> None:
        with ExitStack() as stack:
            self.store = self.make_store(stack.enter_context(disk_directory()), stack)
            super().open()
            self._stack = stack.pop_all()

    def close(self) -> None:
        with self._stack:
            super().close()


class FsmRayRocksDB(FsmRayDurable):
    name = "fsm-ray-rocksdb"
    label = "fsm_ray AsyncStorage, rocksdb:// store"

    def make_store(self, directory: Path, stack: ExitStack) -> str:  # noqa: ARG002 - there is no server
        return f"rocksdb://{directory}"


class FsmRayRedis(FsmRayDurable):
    name = "fsm-ray-redis"
    label = "fsm_ray AsyncStorage, redis:// store, appendfsync always"

    def make_store(self, directory: Path, stack: ExitStack) -> str:
        return stack.enter_context(ValkeyServer(directory, fsync="always")).url


class FsmRayPostgres(FsmRayDurable):
    name = "fsm-ray-postgres"
    label = "fsm_ray AsyncStorage, postgresql:// store"

    def make_store(self, directory: Path, stack: ExitStack) -> str:
        return stack.enter_context(PostgresServer(directory)).url


class AiogramRedisSynced(AiogramRedis):
    name = "aiogram-redis-synced"
    label = "aiogram RedisStorage, appendfsync always"

    def open(self) -> None:
        with ExitStack() as stack:
            directory = stack.enter_context(disk_directory())
            self._server = stack.enter_context(ValkeyServer(directory, fsync="always"))
            super().open()
            self._stack = stack.pop_all()

    def close(self) -> None:
        with self._stack:
            super().close()

    @property
    def valkey_socket(self) -> str:
        return str(self._server.socket_path)
