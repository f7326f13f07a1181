"""A shard that is hosted by the test's own process: what happens when its namespace stops at a bad moment."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import types
from collections.abc import Iterator
from typing import Any

import pytest

from fsm_ray import hosting, protocol
from fsm_ray.channel.client import open_blocking
from fsm_ray.channel.server import Server, socket_directory
from fsm_ray.codec import encode_key
from fsm_ray.errors import NamespaceUnavailable, StoreUnavailable
from fsm_ray.hosting import ShardHost
from fsm_ray.options import BotOptions

from .test_channel import DEADLINE_S
from .test_lanes import settle

HERE, ELSEWHERE = "", "another node"
READ = protocol.read_request(protocol.READ_RECORD, 1, [protocol.read(encode_key("ann"))])


@pytest.fixture
def host(no_ray: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[ShardHost]:
    context = types.SimpleNamespace(gcs_address="127.0.0.1:1")
    monkeypatch.setattr("ray.get_runtime_context", lambda: context)
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr(hosting, "ShardMetrics", _no_metrics)
    with tempfile.TemporaryDirectory(prefix="fsm") as path:
        monkeypatch.setattr(tempfile, "tempdir", path)
        yield ShardHost("my_bot", 0, BotOptions())


def _no_metrics(*_: Any) -> Any:
    return types.SimpleNamespace(publish=lambda: None, publish_state=lambda *_, **__: None)


class Gate:
    """Stands before a method of the server: who calls it waits until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
        self.entered = asyncio.Event()
        self.opened = asyncio.Event()
        listen = getattr(Server, method)

        async def wait_and_listen(server: Server, where: str) -> Any:
            self.entered.set()
            await self.opened.wait()
            return await listen(server, where)

        monkeypatch.setattr(Server, method, wait_and_listen)


def sockets() -> list[str]:
    return [str(each) for each in socket_directory().iterdir()]


@pytest.mark.parametrize("method", ["listen_unix", "listen_tcp"])
async def test_a_shard_that_stops_while_it_begins_to_listen_serves_what_comes_after_it(
    host: ShardHost, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch, method)
    await host.open()
    calls = [asyncio.create_task(host.endpoint(ELSEWHERE)), asyncio.create_task(host.endpoint(HERE))]
    async with asyncio.timeout(DEADLINE_S):
        await gate.entered.wait()
    await settle()
    assert host._namespace is not None
    host._namespace._stop(StoreUnavailable("a commit failed"))
    gate.opened.set()
    answers = await asyncio.gather(*calls, return_exceptions=True)

    assert [type(answer) for answer in answers] == [NamespaceUnavailable] * 2
    assert sockets() == []
    endpoint = await host.endpoint(ELSEWHERE)
    assert sockets() == [endpoint.unix_path]
    for address in (endpoint.unix_path, endpoint.tcp_address):
        assert address is not None
        assert await asyncio.to_thread(ask, address, endpoint.secret) == protocol.NIL
    await host.stop()


async def test_who_waited_for_a_shard_that_stopped_and_opened_again_does_not_close_what_is_new(
    host: ShardHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    await host.open()
    async with host._listening:
        call = asyncio.create_task(host.endpoint(HERE))
        await settle()
        assert host._namespace is not None
        host._namespace._stop(StoreUnavailable("a commit failed"))
        await host.open()
    with pytest.raises(NamespaceUnavailable, match="just stopped"):
        await call
    endpoint = await host.endpoint(HERE)

    assert await asyncio.to_thread(ask, endpoint.unix_path, endpoint.secret) == protocol.NIL
    await host.stop()


def ask(address: str | tuple[str, int], secret: bytes) -> bytes:
    """What the shard answers to a read of what is not there."""
    with contextlib.closing(open_blocking(address, secret, DEADLINE_S)) as connection:
        return bytes(connection.exchange(READ))[-1:]
