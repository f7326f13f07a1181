"""The storage contract, over both facades and both transports, and bots of one and of three shards."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fsm_ray import AsyncStorage, Storage
from fsm_ray.storage import Transport
from fsm_ray.testing import AnyStorage, Blocking, BotsContract, ClosedStorageContract, StorageContract
from tests.conftest import Bots

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
def bots_of_all_tests(bots: Bots) -> dict[int, str]:
    """Bots of so many shards for all tests of the contract."""
    return {shards: bots.emptied(shards=shards) for shards in SHARDS.values()}


class TestContract(StorageContract):
    @pytest.fixture
    def storage(self, made: AnyStorage) -> AnyStorage:
        return made

    @pytest.fixture
    def bot(self, request: pytest.FixtureRequest, bots_of_all_tests: dict[int, str]) -> str:
        return bots_of_all_tests[SHARDS[request.node.callspec.params["made"]]]


@pytest.mark.parametrize("made", ["blocking-socket", "async-ray-call"], indirect=True)
class TestBots(BotsContract):
    @pytest.fixture
    def storage(self, made: AnyStorage) -> AnyStorage:
        return made

    @pytest.fixture
    def bot(self, bots_of_all_tests: dict[int, str]) -> str:
        return bots_of_all_tests[1]


class TestClosed(ClosedStorageContract):
    @pytest.fixture
    def storage(self, made: AnyStorage) -> AnyStorage:
        made.close()
        return made
