"""Outflow: what the clients of a server have not read of their replies, bounded in bytes.

Past the bound, those who take nothing give way, the one with most first. Who reads, however slowly, is never
closed: it would connect, ask for the same again, and so never get it.
"""

from __future__ import annotations

import asyncio
import math
from typing import Protocol

MAX_BYTES = 256 << 20
"""Of replies to clients that do not read them as fast as they are answered, over all connections."""

PATIENCE_S = 5.0
"""How long a client may take nothing at all while others need the room."""


class SlowReader(Exception):
    """Told when a client does not read its replies, and others need the room."""


class Reader(Protocol):
    """A connection, as the outflow sees it."""

    @property
    def unsent_bytes(self) -> int:
        """How much the client has not taken."""

    def malformed(self, error: Exception) -> None:
        """End the connection."""


class Outflow:
    """The clients of one server that are slow to read."""

    def __init__(self) -> None:
        self._slow: dict[Reader, float] = {}
        """Client -> how much waited for it when it was last looked at, and what was added since; infinite: it
        was not looked at yet."""
        self._timer: asyncio.TimerHandle | None = None

    def begun(self, reader: Reader) -> None:
        """Take note that a client does not read as fast as it is answered."""
        self._slow[reader] = math.inf
        self._bound()

    def added(self, reader: Reader, size: int) -> None:
        """Take note that more waits for a client that is slow already."""
        if reader in self._slow:
            self._slow[reader] += size
            self._bound()

    def ended(self, reader: Reader) -> None:
        """Take note that the client has read enough, or is gone."""
        self._slow.pop(reader, None)

    def _bound(self) -> None:
        """If too much waits, see who takes something of it."""
        if self._timer is None and self._is_over():
            self._slow = {each: each.unsent_bytes for each in self._slow}
            self._timer = asyncio.get_running_loop().call_later(PATIENCE_S, self._look)

    def _look(self) -> None:
        """Close those who took nothing, as long as too much waits and others need the room."""
        self._timer = None
        stuck = [each for each, seen in self._slow.items() if each.unsent_bytes >= seen]
        for reader in sorted(stuck, key=lambda each: each.unsent_bytes, reverse=True):
            if len(self._slow) > 1 and self._is_over():
                del self._slow[reader]
                reader.malformed(
                    SlowReader(f"it does not read its replies: {reader.unsent_bytes:,} bytes wait")
                )
        self._bound()

    def _is_over(self) -> bool:
        return sum(each.unsent_bytes for each in self._slow) > MAX_BYTES
