"""Feeder: batches for workers, so that each conversation is handled in order, by one worker at a time.

The discipline of queues with message groups (Amazon SQS FIFO; sessions of Azure Service Bus): while a worker
has some updates of a conversation, nobody else is given any of it. A batch takes but a few updates of each,
and so the next part of the dialogue mostly goes to another worker.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from fsm_ray.demo.crowd import JSON
from fsm_ray.keys import KeyStrategy

_PER_CONVERSATION = 2


@dataclass(frozen=True)
class Batch:
    """What a worker is given: some conversations' next updates, each in order."""

    updates: dict[Hashable, list[JSON]]

    def __len__(self) -> int:
        return sum(map(len, self.updates.values()))


class Feeder:
    """Hands out batches. What was taken is finished, or put back when its worker is lost."""

    def __init__(self, updates: Iterable[JSON], strategy: KeyStrategy, *, batch_size: int) -> None:
        """Updates of no conversation, as channel posts are, need no order: each goes by itself."""
        self._batch_size = batch_size
        self._waiting: dict[Hashable, deque[JSON]] = {}
        for update in updates:
            key = strategy.extract(update) or ("update", update["update_id"])
            self._waiting.setdefault(key, deque()).append(update)
        self._free = deque(self._waiting)

    def take(self) -> Batch | None:
        """The next batch; None when everything is handled, or in somebody's hands."""
        updates: dict[Hashable, list[JSON]] = {}
        room = self._batch_size
        while self._free and room > 0:
            key = self._free.popleft()
            waiting = self._waiting[key]
            updates[key] = [waiting.popleft() for _ in range(min(_PER_CONVERSATION, room, len(waiting)))]
            room -= len(updates[key])
        return Batch(updates) if updates else None

    def finish(self, batch: Batch) -> None:
        """The batch was handled: its conversations are free again."""
        self._free.extend(key for key in batch.updates if self._waiting[key])

    def put_back(self, batch: Batch) -> None:
        """The batch was not handled, or nobody knows how far: it comes next again."""
        for key, updates in batch.updates.items():
            self._waiting[key].extendleft(reversed(updates))
        self._free.extendleft(batch.updates)
