"""The strongest Redis client that we could write in Python: hiredis in an asyncio protocol, on uvloop.

It does without all that a client library is for: a pool, reconnecting, retries, timeouts. It shows what
Valkey itself can do for Python, next to what its libraries make of that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any, cast

import hiredis

from fsm_ray.bench.batching import Data, Operation
from fsm_ray.bench.contender import Contender
from fsm_ray.bench.hashes import decode_pairs, encode_value, load_hashes, make_hash_key

_MOST_AT_ONCE = 256


class HiredisClient(asyncio.Protocol):
    """Operations that arrive while a pipeline is in flight travel together in the next one."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._reader = hiredis.Reader()
        self._waiting: list[tuple[Operation, asyncio.Future[Data]]] = []
        self._expected: list[asyncio.Future[Data] | None] = []
        """A future for each reply in flight, `None` for that of an HSET."""
        self._arrived = 0

    def submit(self, operation: Operation) -> asyncio.Future[Data]:
        future: asyncio.Future[Data] = self._loop.create_future()
        self._waiting.append((operation, future))
        if not self._expected:
            self._send_pipeline()
        return future

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        while (reply := self._reader.gets()) is not False:
            future = self._expected[self._arrived]
            self._arrived += 1
            if isinstance(reply, hiredis.ReplyError):
                self._transport.abort()
                raise reply
            if future is not None and not future.done():
                future.set_result(decode_pairs(reply))
        if self._arrived == len(self._expected):
            self._expected = []
            if self._waiting:
                self._send_pipeline()

    def connection_lost(self, error: Exception | None) -> None:
        pending = [future for future in self._expected[self._arrived :] if future is not None]
        for future in pending + [future for _, future in self._waiting]:
            if not future.done():
                future.set_exception(error or ConnectionError("the server closed the connection"))

    def close(self) -> None:
        self._transport.close()

    def _send_pipeline(self) -> None:
        batch, self._waiting = self._waiting[:_MOST_AT_ONCE], self._waiting[_MOST_AT_ONCE:]
        commands: list[bytes] = []
        self._arrived = 0
        for (key, changes), future in batch:
            if changes is not None:
                commands.append(_pack_hset(key, changes))
                self._expected.append(None)
            commands.append(_pack("HGETALL", key))
            self._expected.append(future)
        self._transport.write(b"".join(commands))


class Hiredis(Contender[str]):
    name = "hiredis"
    label = "hiredis in a hand-written asyncio protocol, waiting operations in one pipeline"

    def open(self) -> None:
        self._client = self.surroundings.run(_connect(self.surroundings.valkey_socket))

    def close(self) -> None:
        self.surroundings.run(_close(self._client))

    def make_key(self, user: int) -> str:
        return make_hash_key(self.name, user)

    def load(self, users: Iterable[int]) -> None:
        load_hashes(self.surroundings.valkey_socket, self.name, users)

    def get_data(self, key: str) -> Any:
        return self._client.submit((key, None))

    def update_data(self, key: str, changes: Mapping[str, Any]) -> Any:
        return self._client.submit((key, changes))


def _pack_hset(key: str, changes: Mapping[str, Any]) -> bytes:
    command: list[str | bytes] = ["HSET", key]
    for field, value in changes.items():
        command += (field, encode_value(value))
    return _pack(*command)


def _pack(*command: str | bytes) -> bytes:
    packed: bytes = hiredis.pack_command(command)  # type: ignore[arg-type]  # its stub allows one word only
    return packed


async def _connect(socket_path: str) -> HiredisClient:
    _, client = await asyncio.get_running_loop().create_unix_connection(HiredisClient, socket_path)
    return client


async def _close(client: HiredisClient) -> None:
    client.close()
    await asyncio.sleep(0)  # the loop closes the socket in its next turn
