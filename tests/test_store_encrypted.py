"""The encrypted store: the kits over several others."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fsm_ray.stores.base import OwnedStore, Place, lease_clock
from fsm_ray.stores.encrypted import EncryptedStore
from fsm_ray.stores.keyring import make_key_file
from fsm_ray.testing import (
    ExclusiveStoreConformance,
    MakeStore,
    SharedStoreConformance,
    StoreConformance,
)
from fsm_ray.bench.servers import ValkeyServer, temporary_directory
from dataclasses import replace
from fsm_ray.stores.rocksdb import RocksDBStore
from fsm_ray.stores.redis import RedisStore


def make_encrypted(kind: type[OwnedStore], where: str, place: Place, **clocks: Any) -> EncryptedStore:
    inner = kind(replace(place, is_encrypted=True), **clocks)
    return EncryptedStore(inner, where, clock=clocks.get("clock", lease_clock))


@pytest.fixture
def where(tmp_path: Path) -> str:
    path = tmp_path / "keys.json"
    make_key_file(path, "first")
    return f"file://{path}"


class TestOverRocksDB(ExclusiveStoreConformance, StoreConformance):
    @pytest.fixture
    def make_store(self, where: str) -> MakeStore:
        return partial(make_encrypted, RocksDBStore, where)

    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"rocksdb://{tmp_path}/store"


@pytest.fixture(scope="module")
def server() -> Iterator[ValkeyServer]:
    with temporary_directory() as directory, ValkeyServer(directory, fsync="always") as server:
        yield server


class TestOverRedis(SharedStoreConformance, StoreConformance):
    @pytest.fixture
    def make_store(self, where: str) -> MakeStore:
        return partial(make_encrypted, RedisStore, where)

    @pytest.fixture
    def url(self, server: ValkeyServer) -> str:
        return server.url
