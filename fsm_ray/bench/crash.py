"""How actors and their stores are made to crash here, and how the way back is timed. Linux only."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import ray

from fsm_ray import AsyncStorage
from fsm_ray.actor import find_shard
from fsm_ray.errors import ConfigurationError
from fsm_ray.hosting import ShardDescription

_END_TIMEOUT_S = 10.0

PATIENCE_S = 60.0
"""The timeout of clients that wait for an actor to come back: on a busy machine it takes its time."""


async def only_shard(storage: AsyncStorage, bot: str) -> ShardDescription:
    """The bot's one shard, as its actor sees itself now.

    Raises:
        ConfigurationError: it runs on another node, whose processes cannot be killed from here.
    """
    (shard,) = (await storage.describe(bot)).shards
    if shard.node_id != ray.get_runtime_context().get_node_id():
        raise ConfigurationError(
            f"the actor of {bot!r} is on another node: run the benchmark on the head node"
        )
    return shard


async def seconds_to_answer(pid: int, ask: Callable[[], Awaitable[Any]]) -> float:
    """Kill the process as `kill -9` does, then ask; from the kill to the answer."""
    started = perf_counter()
    with _end_of(pid) as descriptor:
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    await ask()
    return perf_counter() - started


async def crash_for_good(storage: AsyncStorage, bot: str) -> None:
    """End the actor at once, without a word to its store, and without a restart."""
    with _end_of((await only_shard(storage, bot)).pid):
        ray.kill(find_shard(bot, 0), no_restart=True)


@contextmanager
def _end_of(pid: int) -> Iterator[int]:
    """A descriptor of the process; waits in the end until that is gone, and answers nobody any more."""
    descriptor = os.pidfd_open(pid)
    try:
        yield descriptor
        if not select.select([descriptor], [], [], _END_TIMEOUT_S)[0]:
            raise TimeoutError(f"process {pid} was killed and lives")
    finally:
        os.close(descriptor)
