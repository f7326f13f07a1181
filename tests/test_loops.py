"""Event loops of one storage that are closed without cancelling their tasks, as `asyncio.run` would have."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fsm_ray import AsyncStorage
from fsm_ray.channel.handshake import Endpoint
from fsm_ray.metrics.client import ClientMetrics
from fsm_ray.namespace import Namespace
from fsm_ray.options import BotOptions
from fsm_ray.stores.base import Contents
from fsm_ray.stores.memory import MemoryStore

from .certificates import Authority
from .test_channel import LOOPS, RunningServer, running, temporary

__all__ = ["running", "temporary"]

HERE, ELSEWHERE = "here", "elsewhere"
ROUNDS = 5

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")]
"""What asyncio and uvloop have to say of such loops themselves."""


class OneShard:
    """A directory of one bot with one shard, which a running server serves."""

    is_remote = False

    def __init__(self, endpoint: Endpoint, node_id: str) -> None:
        self._endpoint = endpoint
        self.node_id = node_id
        self.metrics = ClientMetrics(None)

    def options(self, bot_name: str) -> BotOptions:
        return self._endpoint.options

    def known_endpoint(self, bot_name: str, shard: int) -> Endpoint:
        return self._endpoint


@pytest.fixture(params=["unix", "tcp", "tls"])
def storage(
    request: pytest.FixtureRequest,
    running: RunningServer,
    temporary: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncStorage:
    if request.param == "tls":
        for name, value in Authority(temporary / "authority").environment("node").items():
            monkeypatch.setenv(name, value)
    namespace = Namespace("my_bot", BotOptions(), MemoryStore(), Contents(version=0))
    running.respond = namespace.handle
    unix_path = running.run(running.server.listen_unix("shard"))
    tcp_address = running.run(running.server.listen_tcp("127.0.0.1"))
    storage: Any = AsyncStorage()
    endpoint = Endpoint(BotOptions(), HERE, unix_path, tcp_address, running.secret)
    storage._directory = OneShard(endpoint, HERE if request.param == "unix" else ELSEWHERE)
    return storage  # type: ignore[no-any-return]


def use_and_close(storage: AsyncStorage, make_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    loop = make_loop()
    assert loop.run_until_complete(storage.get_state("my_bot", "ann")) is None
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()


@pytest.mark.parametrize("kind", LOOPS)
def test_they_leave_no_connection_no_descriptor_and_no_word(
    storage: AsyncStorage,
    running: RunningServer,
    kind: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    use_and_close(storage, LOOPS[kind])
    before = descriptors()
    for _ in range(ROUNDS):
        use_and_close(storage, LOOPS[kind])
    running.until(lambda: len(running.server.connections) <= 1)
    gc.collect()

    assert len(storage._loops) == len(storage._keepers) == 1
    assert descriptors() <= before
    asyncio.run(storage.close())
    running.until(lambda: not running.server.connections)
    gc.collect()
    assert not storage._loops
    assert [record.getMessage() for record in caplog.records if record.levelname != "INFO"] == []


@pytest.mark.parametrize("kind", LOOPS)
def test_when_they_are_garbage_together_with_their_storage_they_leave_nothing_either(
    storage: AsyncStorage, running: RunningServer, kind: str
) -> None:
    use_and_close(storage, LOOPS[kind])
    (keeper,) = storage._keepers.values()
    coroutine: Any = keeper.get_coro()
    coroutine.close()  # as the garbage collection does
    running.until(lambda: not running.server.connections)
    gc.collect()


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))
