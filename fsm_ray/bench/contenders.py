"""All contenders, by name, each with the module that knows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fsm_ray.bench.aiogram_peers import AiogramMemory, AiogramRedis
from fsm_ray.bench.contender import Contender
from fsm_ray.bench.durable import AiogramRedisSynced, FsmRayPostgres, FsmRayRedis, FsmRayRocksDB
from fsm_ray.bench.echo import Echo
from fsm_ray.bench.hiredis_peer import Hiredis
from fsm_ray.bench.ours import FsmRay, FsmRayBlocking
from fsm_ray.bench.ray_calls import RayCall, RayCallBlocking
from fsm_ray.bench.valkey_peers import Glide, GlideBatched, RedisBatched

_KINDS: tuple[type[Contender[Any]], ...] = (
    FsmRay,
    FsmRayBlocking,
    RayCall,
    RayCallBlocking,
    AiogramRedis,
    Glide,
    GlideBatched,
    RedisBatched,
    Hiredis,
    AiogramMemory,
    Echo,
    FsmRayRocksDB,
    FsmRayRedis,
    FsmRayPostgres,
    AiogramRedisSynced,
)


def pick_contenders(names: Sequence[str]) -> list[type[Contender[Any]]]:
    """The contenders with these names, in the order of the report."""
    return [kind for kind in _KINDS if kind.name in names]
