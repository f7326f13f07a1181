"""Frames: a length of four bytes, little-endian, then that many bytes."""

from __future__ import annotations

import asyncio


class FrameTooLong(Exception):
    """Raised when a peer announces a frame longer than it may send."""


class FrameProtocol(asyncio.Protocol):
    """Cuts what arrives into frames and hands each one to `frame_received`."""

    max_frame_bytes: int
    """The longest frame that the peer may send now."""

    def __init__(self) -> None:
        self._partial = bytearray()

    def frame_received(self, body: memoryview) -> None:
        """Take one frame. The view is of memory that nobody changes later."""
        raise NotImplementedError

    def malformed(self, error: Exception) -> None:
        """Take note that the peer breaks the rules; nothing more of this stream is read."""
        raise NotImplementedError

    def data_received(self, data: bytes) -> None:
        # Nearly always, what arrives is one whole frame.
        if not self._partial and len(data) - 4 == int.from_bytes(data[:4], "little") <= self.max_frame_bytes:
            self.frame_received(memoryview(data)[4:])
            return
        self._partial += data
        try:
            self._cut()
        except FrameTooLong as error:
            self.malformed(error)

    def _cut(self) -> None:
        start, end = 0, len(self._partial)
        while end - start >= 4:  # noqa: PLR2004  # bytes of the length
            length = int.from_bytes(self._partial[start : start + 4], "little")
            if length > self.max_frame_bytes:
                self._partial.clear()
                raise FrameTooLong(f"a frame of {length:,} bytes; at most {self.max_frame_bytes:,} are taken")
            if end - start - 4 < length:
                break
            body = memoryview(bytes(self._partial[start + 4 : start + 4 + length]))
            start += 4 + length
            self.frame_received(body)
        del self._partial[:start]
