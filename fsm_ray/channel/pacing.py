"""Pacing: replies over TLS are written piece by piece, so that it is known how much of them waits.

The transports of asyncio and uvloop for TLS hand on whatever is written at once to one below them, and
count none of it: a client that reads nothing could have any number of bytes wait. But they do tell, with the
next piece, when the transport below them is full.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

PIECE_BYTES = 1 << 16


class PacedTransport(asyncio.Transport):
    """A transport for TLS that knows what waits, but for a few pieces.

    Its protocol passes on `pause_writing` and `resume_writing` to `pause` and `resume`; see `begin`.
    """

    def __init__(
        self, secured: asyncio.Transport, on_full: Callable[[], None], on_drained: Callable[[], None]
    ) -> None:
        """`on_full` is called when something waits, `on_drained` when nothing does any more."""
        super().__init__()
        self._secured = secured
        self._on_full = on_full
        self._on_drained = on_drained
        self._waiting: deque[memoryview] = deque()
        self._waiting_bytes = 0
        self._is_paused = False
        self._is_full = False

    def begin(self) -> None:
        """Have the transport for TLS tell as soon as it keeps anything for the one below it.

        After the first write: until then, it keeps the end of its own handshake, and would wait for more.
        """
        self._secured.set_write_buffer_limits(high=1, low=0)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not self._is_paused and not self._waiting and len(data) <= PIECE_BYTES:
            self._secured.write(data)
            return
        self._waiting.append(memoryview(data))
        self._waiting_bytes += len(data)
        self._go_on()

    def pause(self) -> None:
        """Write no more until `resume`."""
        self._is_paused = True

    def resume(self) -> None:
        """Write on."""
        self._is_paused = False
        self._go_on()

    def get_write_buffer_size(self) -> int:
        return self._waiting_bytes + self._secured.get_write_buffer_size()

    def pause_reading(self) -> None:
        self._secured.pause_reading()

    def resume_reading(self) -> None:
        self._secured.resume_reading()

    def abort(self) -> None:
        self._waiting.clear()
        self._waiting_bytes = 0
        self._secured.abort()

    def _go_on(self) -> None:
        while self._waiting and not self._is_paused:
            data = self._waiting.popleft()
            piece, rest = data[:PIECE_BYTES], data[PIECE_BYTES:]
            if rest:
                self._waiting.appendleft(rest)
            self._waiting_bytes -= len(piece)
            self._secured.write(piece)
        if self._is_full != bool(self._waiting):
            self._is_full = not self._is_full
            (self._on_full if self._is_full else self._on_drained)()
