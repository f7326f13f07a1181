"""Valkey used by hand, through the clients that its users have: valkey-glide, and redis-py with hiredis."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import redis.asyncio
from glide import Batch, GlideClient, GlideClientConfiguration, NodeAddress

from fsm_ray.bench.batching import Batcher, Data, Operation
from fsm_ray.bench.contender import Contender
from fsm_ray.bench.hashes import decode_fields, encode_fields, load_hashes, make_hash_key

_REQUEST_TIMEOUT_MS = 10_000  # glide's own 250 ms would make a busy machine's hiccup a failure


class ValkeyPeer(Contender[str]):
    """Keys and records of one contender, under a prefix of its own on the one server."""

    def make_key(self, user: int) -> str:
        return make_hash_key(self.name, user)

    def load(self, users: Iterable[int]) -> None:
        load_hashes(self.surroundings.valkey_socket, self.name, users)


class Glide(ValkeyPeer):
    name = "glide"
    label = "valkey-glide, a hash per conversation, a pipeline per update"

    def open(self) -> None:
        self._client = self.surroundings.run(connect_glide(self.surroundings.valkey_socket))

    def close(self) -> None:
        self.surroundings.run(self._client.close())

    async def get_data(self, key: str) -> Data:
        return decode_fields(await self._client.hgetall(key))

    async def update_data(self, key: str, changes: Mapping[str, Any]) -> Data:
        # Not MULTI/EXEC: the HSET is atomic alone, and data read after it holds the changes all the same.
        batch = Batch(is_atomic=False)
        batch.hset(key, cast(Any, encode_fields(changes)))
        batch.hgetall(key)
        replies = cast(list[Any], await self._client.exec(batch, raise_on_error=True))
        return decode_fields(replies[1])


class BatchedPeer(ValkeyPeer):
    """One whose operations travel together."""

    _batcher: Batcher

    def get_data(self, key: str) -> Any:
        return self._batcher.call((key, None))

    def update_data(self, key: str, changes: Mapping[str, Any]) -> Any:
        return self._batcher.call((key, changes))


class GlideBatched(BatchedPeer):
    name = "glide-batched"
    label = "valkey-glide, waiting operations of all tasks in one batch"

    def open(self) -> None:
        self._client = self.surroundings.run(connect_glide(self.surroundings.valkey_socket))
        self._batcher = GlideBatcher(self._client)

    def close(self) -> None:
        self.surroundings.run(self._client.close())


class GlideBatcher(Batcher):
    def __init__(self, client: GlideClient) -> None:
        super().__init__()
        self._client = client

    async def exchange(self, operations: Sequence[Operation]) -> list[Data]:
        batch = Batch(is_atomic=False)
        for key, changes in operations:
            if changes is not None:
                batch.hset(key, cast(Any, encode_fields(changes)))
            batch.hgetall(key)
        return pick_data(operations, cast(list[Any], await self._client.exec(batch, raise_on_error=True)))


class RedisBatched(BatchedPeer):
    name = "redis-batched"
    label = "redis-py and hiredis, waiting operations of all tasks in one pipeline"

    def open(self) -> None:
        self._client = redis.asyncio.Redis(unix_socket_path=self.surroundings.valkey_socket)
        self._batcher = RedisBatcher(self._client)

    def close(self) -> None:
        self.surroundings.run(self._client.aclose())


class RedisBatcher(Batcher):
    def __init__(self, client: redis.asyncio.Redis) -> None:
        super().__init__()
        self._client = client

    async def exchange(self, operations: Sequence[Operation]) -> list[Data]:
        pipeline = self._client.pipeline(transaction=False)
        for key, changes in operations:
            if changes is not None:
                pipeline.hset(key, mapping=cast(Any, encode_fields(changes)))
            pipeline.hgetall(key)
        return pick_data(operations, await pipeline.execute())


async def connect_glide(valkey_socket: str) -> GlideClient:
    """A client on the Unix socket, its fastest way in."""
    address = NodeAddress(unix_socket_path=valkey_socket)
    return await GlideClient.create(GlideClientConfiguration([address], request_timeout=_REQUEST_TIMEOUT_MS))


def pick_data(operations: Sequence[Operation], replies: Sequence[Any]) -> list[Data]:
    """Decode each operation's HGETALL, passing over the replies to the HSETs before."""
    remaining = iter(replies)
    found: list[Data] = []
    for _, changes in operations:
        if changes is not None:
            next(remaining)
        found.append(decode_fields(next(remaining)))
    return found
