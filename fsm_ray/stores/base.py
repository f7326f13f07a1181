"""What a store must do for a namespace: give back its records, and commit batches.

A namespace keeps all its records in memory and asks the store only at start and at commits. A store keeps
bytes; it never looks into a record.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import msgspec


class Answered(msgspec.Struct, frozen=True, gc=False):
    """The last write request of a session, and the reply to it."""

    number: int
    reply: bytes
    at_s: float
    """Wall clock of the answer, in seconds since 1970."""


class Batch(msgspec.Struct, frozen=True):
    """What one commit changes. All of it is kept, or nothing."""

    version: int
    """The last version given out; the next owner goes on from it."""
    records: Mapping[bytes, bytes | None]
    """Encoded key -> the record's blob, or None when the record was cleared."""
    sessions: Mapping[bytes, Answered]
    """Session -> its last write, committed with the effect so that a resend is recognised after a restart."""


@dataclass(slots=True)
class Contents:
    """What a store holds when it is opened."""

    version: int
    records: dict[bytes, bytes] = field(default_factory=dict)
    sessions: dict[bytes, Answered] = field(default_factory=dict)


class Store(ABC):
    """Where one shard's records outlive its actor."""

    is_durable: ClassVar[bool]
    """Whether records are still there after the actor's process was killed."""

    @abstractmethod
    async def open(self) -> Contents:
        """Become the owner, and return everything that was ever acknowledged."""

    @abstractmethod
    def commit(self, batch: Batch) -> asyncio.Future[None]:
        """Keep the batch; when the future is done, it is kept. One commit ends before the next begins.

        Never called when the store is not durable.
        """

    @abstractmethod
    async def close(self) -> None:
        """Release what `open` took. Nothing acknowledged is lost by not calling it."""
