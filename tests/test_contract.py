"""The storage contract, over both facades and both transports, and bots of one and of three shards."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fsm_ray import AsyncStorage, Storage
from fsm_ray.storage import Transport
from fsm_ray.testing import AnyStorage, Blocking, ClosedStorageContract, StorageContract

pytestmark = pytest.mark.ray

KINDS: dict[str, tuple[type[Storage | AsyncStorage], Transport]] = {
    "blocking-socket": (Storage, "auto"),
    "blocking-ray-call": (Storage, "ray"),
    "async-socket": (AsyncStorage, "auto"),
    "async-ray-call": (AsyncStorage, "ray"),
}


@pytest.fixture(params=list(KINDS))
def made(request: pytest.FixtureRequest, cluster: object) -> Iterator[AnyStorage]:
    facade, transport = KINDS[request.param]
    storage = facade(transport=transport)
    if isinstance(storage, Storage):
        yield storage
        storage.close()
    else:
        blocking = Blocking(storage)
        yield blocking
        blocking.stop()


SHARDS = {"blocking-socket": 1, "blocking-ray-call": 3, "async-socket": 3, "async-ray-call": 1}
"""Each facade, and each transport, meets both kinds of bots."""


@pytest.fixture(scope="module")
def bots_of_all_tests(cluster: object) -> Iterator[dict[int, str]]:
    """Bots of so many shards for all tests of the contract: an actor takes half a second to come up."""
    names = {shards: f"contract-{shards}" for shards in SHARDS.values()}
    with Storage() as storage:
        for shards, name in names.items():
            storage.init(name, shards=shards)
        yield names
        for name in names.values():
            storage.drop(name)


class TestContract(StorageContract):
    @pytest.fixture
    def storage(self, made: AnyStorage) -> AnyStorage:
        return made

    @pytest.fixture
    def bot(self, request: pytest.FixtureRequest, bots_of_all_tests: dict[int, str]) -> str:
        return bots_of_all_tests[SHARDS[request.node.callspec.params["made"]]]


class TestClosed(ClosedStorageContract):
    @pytest.fixture
    def storage(self, made: AnyStorage) -> AnyStorage:
        made.close()
        return made
