"""How long a bot with many conversations takes to come back from a crash, and Valkey with the same ones.

Every round begins with the files as the crash left them. Valkey is measured twice: on its append-only file as
its commands wrote it, and on the one that BGREWRITEAOF makes of it. All files are in the page cache.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

import redis

from fsm_ray import AsyncStorage
from fsm_ray.bench.aiogram_peers import load_aiogram_records
from fsm_ray.bench.config import BenchConfig
from fsm_ray.bench.contender import Surroundings, WrongData
from fsm_ray.bench.crash import PATIENCE_S, crash_for_good, only_shard, seconds_to_answer
from fsm_ray.bench.disk import disk_directory
from fsm_ray.bench.figures import Figure
from fsm_ray.bench.ours import drop_and_close, load_users, make_bot_name, make_key
from fsm_ray.bench.results import Recovery
from fsm_ray.bench.rounds import Progress
from fsm_ray.bench.servers import ValkeyServer
from fsm_ray.bench.workload import FIRST_USER

_REWRITE_TIMEOUT_S = 120.0
_REWRITE_STEP_S = 0.05

_NO_REWRITES = ("--auto-aof-rewrite-percentage", "0")
"""Or Valkey begins to rewrite a file of this size by itself, and again at each start."""

_KEYS_EACH = 2
"""In aiogram's layout: a state and data."""

_STORE = "rocksdb store is open and loaded"
_ACTOR = "its actor answers after kill -9"
_WRITTEN = "Valkey answers, AOF as written"
_REWRITTEN = "Valkey answers, AOF rewritten"


def time_recovery(
    surroundings: Surroundings, config: BenchConfig, progress: Progress
) -> tuple[Recovery, ...]:
    """Load so many conversations into both, crash them, and bring them back, once a round.

    Raises:
        WrongData: one of them came back with less.
    """
    users = range(FIRST_USER, FIRST_USER + config.recovery_conversations)
    with disk_directory() as directory:
        progress(f"loading {len(users):,} conversations")
        surroundings.run(_leave_crashed(directory / "crashed", users))
        servers = _make_servers(directory, users)
        seconds: dict[str, list[float]] = {name: [] for name in (_STORE, _ACTOR, *servers)}
        for number in range(1, config.rounds + 1):
            progress(f"recovery, round {number} of {config.rounds}")
            copy = directory / "copy"
            shutil.copytree(directory / "crashed", copy)
            os.sync()  # or the store's first sync has to write the copy too
            loaded_s, answered_s = surroundings.run(_recover(copy, users))
            shutil.rmtree(copy)
            seconds[_STORE].append(loaded_s)
            seconds[_ACTOR].append(answered_s)
            for name, server in servers.items():
                seconds[name].append(_seconds_to_start(server, len(users)))
    return tuple(
        Recovery(name, len(users), Figure(tuple(found)), is_peer=name in servers)
        for name, found in seconds.items()
    )


async def _leave_crashed(directory: Path, users: Sequence[int]) -> None:
    """Load a bot whose store is the directory, and end its actor as a crash does."""
    storage, bot = AsyncStorage(timeout_s=PATIENCE_S), make_bot_name("recovery")
    await storage.init(bot, store=f"rocksdb://{directory}")
    try:
        await load_users(storage, bot, users)
    finally:
        await crash_for_good(storage, bot)
        await storage.close()


async def _recover(directory: Path, users: Sequence[int]) -> tuple[float, float]:
    """How long the first opening took; and from a kill after that to the first answer."""
    storage, bot = AsyncStorage(timeout_s=PATIENCE_S), make_bot_name("recovery")
    await storage.init(bot, store=f"rocksdb://{directory}")
    try:
        shard = await only_shard(storage, bot)
        _check(shard.statistics.records, len(users), "the rocksdb store")
        key = make_key(users[-1])
        return shard.recovery_s, await seconds_to_answer(shard.pid, lambda: storage.get_data(bot, key))
    finally:
        await drop_and_close(storage, bot)


def _make_servers(directory: Path, users: Sequence[int]) -> dict[str, ValkeyServer]:
    """Two servers with the same records, both killed."""
    written, rewritten = directory / "written", directory / "rewritten"
    written.mkdir()
    servers = {
        _WRITTEN: ValkeyServer(written, fsync="always", settings=_NO_REWRITES),
        _REWRITTEN: ValkeyServer(rewritten, fsync="always", settings=_NO_REWRITES),
    }
    with servers[_WRITTEN] as server:
        load_aiogram_records(str(server.socket_path), users)
        server.kill()
    shutil.copytree(written, rewritten, ignore=shutil.ignore_patterns("*.sock"))
    with servers[_REWRITTEN] as server:
        _rewrite(str(server.socket_path))
        server.kill()
    return servers


def _rewrite(valkey_socket: str) -> None:
    with redis.Redis(unix_socket_path=valkey_socket) as client:
        client.bgrewriteaof()
        deadline = time.monotonic() + _REWRITE_TIMEOUT_S
        while client.info("persistence")["aof_rewrite_in_progress"]:
            if time.monotonic() > deadline:
                raise TimeoutError(f"BGREWRITEAOF is not done after {_REWRITE_TIMEOUT_S:.0f} s")
            time.sleep(_REWRITE_STEP_S)


def _seconds_to_start(server: ValkeyServer, conversations: int) -> float:
    """Until it answers PING, which it does when it has loaded everything."""
    started = perf_counter()
    with server:
        seconds = perf_counter() - started
        with redis.Redis(unix_socket_path=str(server.socket_path)) as client:
            _check(client.dbsize(), _KEYS_EACH * conversations, "valkey")
        server.kill()
    return seconds


def _check(found: object, expected: int, where: str) -> None:
    if found != expected:
        raise WrongData(f"{where} came back with {found} records, not {expected}")
