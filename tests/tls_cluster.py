"""A real Ray of two nodes that runs with TLS: what goes from node to node by the channel is TLS as well.

A script: `python -m tests.tls_cluster`, with Ray's variables for TLS set, which its processes inherit.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket

from fsm_ray import AsyncStorage, BotOptions, State, Storage
from fsm_ray.channel.client import BlockingTlsConnection, ClientConnection

from .chaos_node import BOT, KEY, connection_of, make_bot_on, two_nodes
from .conftest import DEADLINE_S


def main() -> None:
    """Say that all is as it must be, or raise."""
    with two_nodes() as node, Storage(timeout_s=DEADLINE_S) as storage:
        make_bot_on(node, storage, BotOptions(listen_host="127.0.0.1"))
        storage.set_state(BOT, KEY, State(state="by TLS"))
        assert isinstance(connection_of(storage), BlockingTlsConnection)
        assert asyncio.run(read_by_tls()) == State(state="by TLS", version=1)
        endpoint = storage._directory.known_endpoint(BOT, 0)
        assert endpoint.tcp_address is not None
        assert greeting(endpoint.tcp_address) == b""
        storage.drop(BOT)
    print("all as it must be")  # noqa: T201


async def read_by_tls() -> State | None:
    """What an event loop reads, over a connection of which TLS is sure."""
    async with AsyncStorage(timeout_s=DEADLINE_S) as storage:
        state = await storage.get_state(BOT, KEY)
        connection = (await storage._bot(BOT)).shards[0]._connection
        assert isinstance(connection, ClientConnection)
        assert connection._transport is not None
        assert connection._transport.get_extra_info("ssl_object").version() == "TLSv1.3"
        return state


def greeting(address: tuple[str, int]) -> bytes:
    """What the shard says to a client without TLS."""
    with socket.create_connection(address, DEADLINE_S) as plain, contextlib.suppress(ConnectionError):
        plain.sendall(b"\x00" * 100)
        return plain.recv(100).replace(b"\x15\x03\x01\x00\x02\x02\x46", b"")  # an alert of TLS
    return b""


if __name__ == "__main__":
    main()
