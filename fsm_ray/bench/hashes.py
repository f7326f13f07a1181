"""The layout of the hand-written Valkey contenders: a hash per conversation, a field per key of its data.

So an update is one HSET, atomic without a lock, and an HGETALL behind it in the same pipeline returns the
merged data. Values are msgpack. MULTI/EXEC around the two, or a Lua script in their place, was never faster.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
import redis

from fsm_ray.bench.workload import DATA, FLOW, STATE

_USERS_PER_PIPELINE = 1_000

encode_value = msgspec.msgpack.Encoder().encode
decode_value = msgspec.msgpack.Decoder().decode


def make_hash_key(prefix: str, user: int) -> str:
    """The key of a conversation's data, as aiogram would form it; each contender has its own prefix."""
    return f"{prefix}:{user}:{user}:data"


def encode_fields(data: Mapping[str, Any]) -> dict[str, bytes]:
    return {field: encode_value(value) for field, value in data.items()}


def decode_fields(fields: Mapping[bytes, bytes]) -> dict[str, Any]:
    return {field.decode(): decode_value(value) for field, value in fields.items()}


def decode_pairs(reply: list[bytes]) -> dict[str, Any]:
    """Decode a hash as RESP2 has it: field, value, field, value."""
    return {reply[i].decode(): decode_value(reply[i + 1]) for i in range(0, len(reply), 2)}


def load_hashes(valkey_socket: str, prefix: str, users: Iterable[int]) -> None:
    """Store the demo's record for each user: its data as a hash, its state as a string."""
    fields = encode_fields(DATA)
    with redis.Redis(unix_socket_path=valkey_socket) as client:
        pipeline = client.pipeline(transaction=False)
        for user in users:
            pipeline.hset(make_hash_key(prefix, user), mapping=fields)
            pipeline.set(f"{prefix}:{user}:{user}:state", f"{FLOW}:{STATE}")
            if len(pipeline) >= _USERS_PER_PIPELINE:
                pipeline.execute()
        pipeline.execute()
