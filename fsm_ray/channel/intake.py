"""Intake: what the clients of a server have begun to send and not finished, bounded in bytes and in time.

A large frame is read on only when there is room for the whole of it; otherwise its connection is not read
from until there is. So those that are read on can be finished, however many clients send at once.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

MAX_BYTES = 256 << 20
"""Of large frames that are being received, over all connections: more than the largest one alone."""

SMALL_BYTES = 1 << 16
"""A frame so small needs no room of these: the number of connections bounds them."""

FRAME_TIMEOUT_S = 30.0
"""How long a frame may take from its first byte to its last, the wait for room left out."""


class FrameTooSlow(Exception):
    """Told when a peer does not finish a frame in time."""


class Sender(Protocol):
    """A connection, as the intake sees it."""

    def wait_for_room(self) -> None:
        """Read no more until `has_room`."""

    def has_room(self) -> None:
        """Read on."""

    def malformed(self, error: Exception) -> None:
        """End the connection."""


class Intake:
    """The unfinished frames of one server, at most one of each connection."""

    def __init__(self) -> None:
        self.bytes = 0
        """Room that is taken."""
        self._begun: dict[Sender, tuple[float, int]] = {}
        """Connection -> since when its frame is received, and the room that it takes; the oldest first."""
        self._waiting: dict[Sender, int] = {}
        """Connection -> the room that it waits for; the first one first."""
        self._timer: asyncio.TimerHandle | None = None

    def begun(self, sender: Sender, length: int) -> None:
        """Take note of an unfinished frame, unless it is known already."""
        if sender in self._begun or sender in self._waiting:
            return
        size = 0 if length <= SMALL_BYTES else length
        if size and (self._waiting or self.bytes + size > MAX_BYTES):
            self._waiting[sender] = size
            sender.wait_for_room()
        else:
            self._admit(sender, size)

    def ended(self, sender: Sender) -> None:
        """Take note that the frame is complete, or its connection gone; let others have its room."""
        if self._waiting.pop(sender, None) is None:
            self.bytes -= self._begun.pop(sender, (0.0, 0))[1]
        while self._waiting:
            first, size = next(iter(self._waiting.items()))
            if self.bytes + size > MAX_BYTES:
                break
            del self._waiting[first]
            self._admit(first, size)
            first.has_room()

    def _admit(self, sender: Sender, size: int) -> None:
        self.bytes += size
        self._begun[sender] = (asyncio.get_running_loop().time(), size)
        self._arm()

    # One timer for all: it looks at the oldest, and comes back when the next may be due.

    def _arm(self) -> None:
        if self._timer is None and self._begun:
            since_s, _ = next(iter(self._begun.values()))
            self._timer = asyncio.get_running_loop().call_at(since_s + FRAME_TIMEOUT_S, self._expire)

    def _expire(self) -> None:
        self._timer = None
        horizon_s = asyncio.get_running_loop().time() - FRAME_TIMEOUT_S
        for sender, (since_s, _) in tuple(self._begun.items()):
            if since_s > horizon_s:
                break
            self.ended(sender)
            sender.malformed(FrameTooSlow(f"a frame was not complete within {FRAME_TIMEOUT_S:.0f} s"))
        self._arm()
