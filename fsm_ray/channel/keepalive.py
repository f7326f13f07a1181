"""Keepalive: the system asks after a silent peer, and ends the connection to one that does not answer.

A node that loses power ends no connection. Without this, those to it would stay, and count, for ever.
"""

from __future__ import annotations

import socket
from asyncio.trsock import TransportSocket

IDLE_S = 30
"""How long a peer may be silent before it is asked after."""

INTERVAL_S = 10
PROBES = 3
"""Times that it is asked after, so often, until the connection ends: about a minute after the last word."""


def keep_alive(connection: socket.socket | TransportSocket) -> None:
    """Do so for a connection by TCP; or for all that come to this listening socket, which inherit it."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, IDLE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, INTERVAL_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, PROBES)
