"""A bare server that sends every frame back: run as a script, `python -P echo_server.py SOCKET_PATH`.

It imports nothing of fsm_ray, so it starts at once, and ends by itself when its client is gone.
"""

from __future__ import annotations

import asyncio
import sys
from typing import cast

import uvloop


class Echo(asyncio.Protocol):
    """Writes back what it reads: a frame's length in front makes no difference to that."""

    def __init__(self, gone: asyncio.Event) -> None:
        self._gone = gone
        self._served = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)

    def data_received(self, data: bytes) -> None:
        self._served = True
        self._transport.write(data)

    def connection_lost(self, _error: Exception | None) -> None:
        if self._served:  # and not somebody who only looked whether we listen
            self._gone.set()


async def serve(socket_path: str) -> None:
    """Serve the socket until a client that sent something is gone."""
    gone = asyncio.Event()
    server = await asyncio.get_running_loop().create_unix_server(lambda: Echo(gone), socket_path)
    await gone.wait()
    server.close()


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1]))
