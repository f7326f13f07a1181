"""How much memory a conversation takes: in fsm_ray's actors, and in Valkey with aiogram's layout.

Of fsm_ray the whole growth of the processes is counted. Of Valkey both its own count (`used_memory`, which is
less than the process takes) and the growth of its process.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import ray
import redis

from fsm_ray import AsyncStorage
from fsm_ray.bench.aiogram_peers import load_aiogram_records
from fsm_ray.bench.contender import Surroundings
from fsm_ray.bench.ours import drop_and_close, load_users, make_bot_name
from fsm_ray.bench.results import Memory
from fsm_ray.bench.servers import ValkeyServer, temporary_directory
from fsm_ray.bench.workload import FIRST_USER

_WARM_UP_USERS = range(FIRST_USER - 5_000, FIRST_USER)
"""Loaded before the first reading: what a process takes once, for its first work, is not a conversation's."""

_SETTLE_TIMEOUT_S = 60.0
_SETTLE_STEP_S = 0.2


def weigh_conversations(surroundings: Surroundings, conversations: int) -> tuple[Memory, ...]:
    """Load so many conversations of distinct users, and divide what memory grew by.

    fsm_ray is left out when one of its actors runs on another node, whose processes cannot be looked at.
    """
    users = range(FIRST_USER, FIRST_USER + conversations)
    grown = surroundings.run(_growth_of_fsm_ray(surroundings.shards, users))
    used, resident = _growth_of_valkey(users)
    found = (
        ("fsm-ray", "resident memory of the actors", grown),
        ("aiogram-redis", "used_memory of Valkey", used),
        ("aiogram-redis", "resident memory of Valkey", resident),
    )
    return tuple(
        Memory(contender, counted_by, conversations, growth / conversations)
        for contender, counted_by, growth in found
        if growth is not None
    )


async def _growth_of_fsm_ray(shards: int, users: Sequence[int]) -> int | None:
    storage, bot = AsyncStorage(), make_bot_name("memory")
    await storage.init(bot, shards=shards)
    try:
        await load_users(storage, bot, _WARM_UP_USERS)
        pids = await _local_actor_pids(storage, bot)
        if pids is None:
            return None
        before = sum(map(resident_bytes, pids))
        await load_users(storage, bot, users)
        return sum(map(resident_bytes, pids)) - before
    finally:
        await drop_and_close(storage, bot)


async def _local_actor_pids(storage: AsyncStorage, bot: str) -> list[int] | None:
    shards = (await storage.describe(bot)).shards
    node_id = ray.get_runtime_context().get_node_id()
    return [shard.pid for shard in shards] if all(shard.node_id == node_id for shard in shards) else None


def _growth_of_valkey(users: Sequence[int]) -> tuple[int, int]:
    # A server of its own, for no other contender's keys may share tables with these.
    with temporary_directory() as directory, ValkeyServer(directory) as valkey:
        path = str(valkey.socket_path)
        load_aiogram_records(path, _WARM_UP_USERS)
        used_before, resident_before = _settled_memory(path)
        load_aiogram_records(path, users)
        used, resident = _settled_memory(path)
        return used - used_before, resident - resident_before


def _settled_memory(valkey_socket: str) -> tuple[int, int]:
    """Valkey's used and resident memory, once it has done growing its tables and freeing buffers."""
    deadline = time.monotonic() + _SETTLE_TIMEOUT_S
    with redis.Redis(unix_socket_path=valkey_socket) as client:
        last, now = None, _used_memory(client)
        while (now != last or now.moving) and time.monotonic() < deadline:
            time.sleep(_SETTLE_STEP_S)
            last, now = now, _used_memory(client)
        return now.used, resident_bytes(int(client.info("server")["process_id"]))


class _Used(NamedTuple):
    used: int
    moving: int
    """What the tables take that keys are just moved out of."""


def _used_memory(client: redis.Redis) -> _Used:
    memory = client.info("memory")
    # Without its connections: what ours takes grows with every look, and would never settle.
    used = int(memory["used_memory"]) - int(memory["mem_clients_normal"])
    return _Used(used, int(memory["mem_overhead_db_hashtable_rehashing"]))


def resident_bytes(pid: int) -> int:
    """Physical memory that the process takes now. Linux only."""
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
