"""The worker: a Ray task that has the bot handle one batch of updates, over RayStorage.

Nothing is carried from one batch to the next but what is in the storage.
"""

from __future__ import annotations

import asyncio
import os
from typing import NamedTuple

import ray

from fsm_ray.adapters.aiogram import RayStorage
from fsm_ray.demo.crowd import JSON
from fsm_ray.demo.dialogue import handle_in_order, make_bot, make_dispatcher
from fsm_ray.demo.feeder import Batch
from fsm_ray.demo.reference import reference_records


class Process(NamedTuple):
    """One process of the cluster."""

    node_id: str
    pid: int


class Done(NamedTuple):
    """What a worker says of its batch."""

    process: Process
    failed: int
    """How many updates the bot's handlers failed over."""


def handle(bot_name: str, batch: Batch) -> Done:
    """Handle the batch, its conversations side by side and each in order."""
    return Done(_this_process(), asyncio.run(_handle(bot_name, batch)))


def prepare(updates: list[JSON]) -> None:
    """Have this process load and compile what it needs, by handling some updates to no effect."""
    asyncio.run(reference_records(updates, lambda _: None))


def _this_process() -> Process:
    return Process(ray.get_runtime_context().get_node_id(), os.getpid())


async def _handle(bot_name: str, batch: Batch) -> int:
    storage = RayStorage(bot_name)
    bot, dispatcher = make_bot(), make_dispatcher(storage)
    try:
        conversations = [handle_in_order(dispatcher, bot, updates) for updates in batch.updates.values()]
        return sum(await asyncio.gather(*conversations))
    finally:
        await storage.close()
