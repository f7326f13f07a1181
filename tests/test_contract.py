"""The storage contract, over both facades and both transports."""

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


@pytest.fixture(scope="module", params=[1, 3], ids=["one-shard", "three-shards"])
def bot_of_all_tests(request: pytest.FixtureRequest, cluster: object) -> Iterator[str]:
    """One bot for all tests of the contract: an actor takes half a second to come up."""
    name = f"contract-{request.param}"
    with Storage() as storage:
        storage.init(name, shards=request.param)
        yield name
        storage.drop(name)


class TestContract(StorageContract):
    @pytest.fixture
    def storage(self, made: AnyStorage) -> AnyStorage:
        return made

    @pytest.fixture
    def bot(self, bot_of_all_tests: str) -> str:
        return bot_of_all_tests


class TestClosed(ClosedStorageContract):
    @pytest.fixture
    def storage(self, made: AnyStorage) -> AnyStorage:
        made.close()
        return made
