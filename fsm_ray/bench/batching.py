"""What a careful user of a Redis client writes for many tasks: waiting operations share a pipeline.

No timer and nothing to tune: a pipeline takes what arrived while the one before was in flight, 256 at most.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

Data = dict[str, Any]
Operation = tuple[str, Mapping[str, Any] | None]
"""A key and the changes to the data under it; without changes, it reads."""

_MOST_AT_ONCE = 256


class Batcher(ABC):
    """Joins the operations of all tasks into batches, one in flight at a time."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Operation, asyncio.Future[Data]]] = []
        self._draining: asyncio.Task[None] | None = None
        self._busy = False

    @abstractmethod
    async def exchange(self, operations: Sequence[Operation]) -> list[Data]:
        """Do the operations in order, and return the data after each."""

    async def call(self, operation: Operation) -> Data:
        """Do one operation: at once when nothing is in flight, else in the next batch."""
        if self._busy:
            future: asyncio.Future[Data] = asyncio.get_running_loop().create_future()
            self._waiting.append((operation, future))
            return await future
        self._busy = True
        try:
            (data,) = await self.exchange((operation,))
        finally:
            self._go_on()
        return data

    def _go_on(self) -> None:
        self._busy = bool(self._waiting)
        if self._busy:
            self._draining = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[:_MOST_AT_ONCE], self._waiting[_MOST_AT_ONCE:]
            try:
                answers = await self.exchange([operation for operation, _ in batch])
            except Exception as error:  # noqa: BLE001 - whatever it is, those who wait must hear of it
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), data in zip(batch, answers, strict=True):
                if not future.done():
                    future.set_result(data)
        self._busy = False
