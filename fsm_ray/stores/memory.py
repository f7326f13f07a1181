"""The memory store: records live in the actor's memory alone, and go with its process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import ClassVar

from fsm_ray.stores.base import Batch, Contents, Store


class MemoryStore(Store):
    """Keeps nothing: the namespace's own memory is all there is."""

    is_durable: ClassVar[bool] = False
    is_shared: ClassVar[bool] = False

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock

    async def open(self) -> Contents:
        """Start empty.

        Versions start at the clock's microseconds, so that after a restart no record can pass for one of an
        earlier life: a shard would have to write a million times a second, always, to overtake the clock.
        """
        return Contents(version=int(self._clock() * 1_000_000))

    def commit(self, batch: Batch) -> asyncio.Future[None]:
        """Never called: there is nothing to keep."""
        raise NotImplementedError

    async def confirm(self) -> None:
        """Never called: nobody else can own what is in this process."""
        raise NotImplementedError

    async def close(self) -> None:
        """Nothing to release."""
