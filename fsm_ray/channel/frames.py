"""Frames: a length of four bytes, little-endian, then that many bytes."""

from __future__ import annotations

import asyncio


class FrameTooLong(Exception):
    """Raised, or told, when a peer announces a frame longer than it may send."""


class FrameProtocol(asyncio.Protocol):
    """Cuts what arrives into frames and hands each one to `frame_received`."""

    max_frame_bytes: int
    """The longest frame that the peer may send now."""

    def __init__(self) -> None:
        self._partial = bytearray()
        self._is_held = False
        self._is_ended = False
        self._is_cutting = False

    def frame_received(self, body: bytes) -> None:
        """Take one frame."""
        raise NotImplementedError

    def malformed(self, error: Exception) -> None:
        """Take note that the peer breaks the rules; nothing more of this stream is handed out."""
        raise NotImplementedError

    def left_over(self, length: int, *, is_next: bool) -> None:
        """Take note of the unfinished frame at the end of what came: its length; 0: there is none.

        `is_next`: whether frames before it were handed out now. Not called when one whole frame came.
        """

    def hold(self) -> None:
        """Hand out no more frames until `go_on`; what arrives is kept."""
        self._is_held = True

    def go_on(self) -> None:
        """Hand out what was held back, as far as nobody holds it again."""
        self._is_held = self._is_ended
        self._cut()

    def end(self) -> None:
        """Hand out nothing more, for good: what a peer sent before its end is not to keep anybody busy."""
        self._is_held = self._is_ended = True
        self._partial.clear()

    def data_received(self, data: bytes) -> None:
        # Nearly always, what arrives is one whole frame.
        if (
            len(data) - 4 == int.from_bytes(data[:4], "little") <= self.max_frame_bytes
            and not self._partial
            and not self._is_held
        ):
            self.frame_received(data[4:])
        elif not self._is_ended:
            self._partial += data
            self._cut()

    def _cut(self) -> None:
        if not self._is_cutting:  # else the loop below goes on by itself
            self._is_cutting = True
            try:
                self._hand_out()
            finally:
                self._is_cutting = False

    def _hand_out(self) -> None:
        start, end, unfinished = 0, len(self._partial), 0
        while end - start >= 4 and not self._is_held:  # noqa: PLR2004  # bytes of the length
            length = int.from_bytes(self._partial[start : start + 4], "little")
            if length > self.max_frame_bytes:
                self.end()
                self.malformed(
                    FrameTooLong(f"a frame of {length:,} bytes; at most {self.max_frame_bytes:,} are taken")
                )
                return
            if end - start - 4 < length:
                unfinished = length
                break
            body = bytes(self._partial[start + 4 : start + 4 + length])
            start += 4 + length
            self.frame_received(body)
        if end > start and not (unfinished or self._is_held):
            unfinished = 4  # not even its length is there
        del self._partial[:start]
        self.left_over(unfinished, is_next=start > 0)
