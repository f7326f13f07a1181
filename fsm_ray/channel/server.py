"""The actor's half of the channel: a Unix socket for its own node, TCP for others from when one asks.

A peer that breaks the rules loses its connection, with one line in the log; nobody else notices.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import cast

from fsm_ray.channel import handshake
from fsm_ray.channel.frames import FrameProtocol
from fsm_ray.channel.handshake import HANDSHAKE_TIMEOUT_S, MAX_HANDSHAKE_BYTES, HandshakeFailed
from fsm_ray.errors import ConfigurationError
from fsm_ray.logs import Seldom
from fsm_ray.namespace import Answer, NotServing, RequestRefused
from fsm_ray.protocol import MAX_FRAME_BYTES, frame
from fsm_ray.tally import ShardTally

logger = logging.getLogger(__name__)

MAX_UNIX_PATH_BYTES = 107
"""What `sun_path` of unix(7) holds, its closing zero byte left out."""


class ServerConnection(FrameProtocol):
    """One client: first the handshake, then requests, each passed on to `handle`."""

    def __init__(self, server: Server) -> None:
        super().__init__()
        self.max_frame_bytes = MAX_HANDSHAKE_BYTES
        self._is_trusted = False
        self._server = server
        self._handle = server.handle
        self._transport: asyncio.Transport | None = None
        self._challenge = handshake.challenge()
        self._patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._server.connections.add(self)
        loop = asyncio.get_running_loop()
        self._patience = loop.call_later(
            HANDSHAKE_TIMEOUT_S, self.malformed, HandshakeFailed("no proof of the secret came in time")
        )
        self._transport.write(frame(self._challenge))

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  # asyncio's signature
        if self._patience is not None:
            self._patience.cancel()
        self._transport = None
        self._server.connections.discard(self)
        self._server.disconnected(self._answer)

    def frame_received(self, body: bytes) -> None:
        # After the handshake, `_serve` takes the place of this method.
        try:
            self._welcome(body)
        except HandshakeFailed as error:
            self.malformed(error)

    def malformed(self, error: Exception) -> None:
        if self._transport is not None:
            self._server.refused(error)
            self._transport.abort()
            self._transport = None

    def pause_writing(self) -> None:
        # Who does not read replies is not served, and not read from: what waits for it stays bounded.
        self.hold()
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        self.go_on()
        if self._transport is not None and not self._is_held:
            self._transport.resume_reading()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _welcome(self, response: bytes) -> None:
        proof = handshake.verify(self._server.secret, self._challenge, response)
        if self._transport is not None and self._patience is not None:
            self._patience.cancel()
            self.frame_received = self._serve  # type: ignore[method-assign]
            self._is_trusted = True
            self.max_frame_bytes = MAX_FRAME_BYTES
            self._transport.write(frame(proof))

    def data_received(self, data: bytes) -> None:
        # The usual case of FrameProtocol, with `_serve` written out: a call less for every request.
        transport = self._transport
        if (
            len(data) - 4 == int.from_bytes(data[:4], "little") <= self.max_frame_bytes
            and self._is_trusted
            and transport is not None
            and not self._partial
            and not self._is_held
        ):
            try:
                reply = self._handle(data[4:], self._answer)
            except RequestRefused as error:
                self.malformed(error)
            else:
                if reply is not None:
                    transport.write(reply)
        else:
            super().data_received(data)

    def _serve(self, body: bytes) -> None:
        transport = self._transport
        if transport is None:
            return
        try:
            reply = self._handle(body, self._answer)
        except RequestRefused as error:
            self.malformed(error)
        else:
            if reply is not None:
                transport.write(reply)

    def _answer(self, reply: bytes) -> None:
        # The client may have gone while its write was committed; it will ask again, under the same number.
        if self._transport is not None:
            self._transport.write(reply)


def _ignore(_answer: Answer) -> None: ...


class Server:
    """Listens for the clients of one shard. A connection belongs to the loop that `listen_*` ran in."""

    def __init__(
        self,
        handle: Callable[[bytes, Answer], bytes | None],
        disconnected: Callable[[Answer], None] = _ignore,
        *,
        name: str = "",
        tally: ShardTally | None = None,
    ) -> None:
        """Make a server that does not listen yet.

        Args:
            handle: takes a request and returns its reply, or None and calls back with it later.
            disconnected: is told when a connection is gone; what it gets equals what `handle` got with each
                request of that connection.
            name: of what it serves, for the log.
            tally: counts the peers that are refused.
        """
        self._prefix = f"{name}: " if name else ""
        self._tally = tally or ShardTally()
        self._refusals = Seldom()
        self.handle = handle
        self.disconnected = disconnected
        self.secret = secrets.token_bytes(32)
        self.connections: set[ServerConnection] = set()
        self._listeners: list[asyncio.Server] = []
        self._unix_path: Path | None = None

    async def listen_unix(self, name: str) -> str:
        """Listen on a socket that only this user can open; return its path."""
        path = socket_directory() / name
        if len(os.fsencode(path)) > MAX_UNIX_PATH_BYTES:
            raise ConfigurationError(
                f"the socket's path {path} is longer than the {MAX_UNIX_PATH_BYTES} bytes that the system "
                "allows: set TMPDIR to a shorter directory on all nodes"
            )
        path.unlink(missing_ok=True)
        unix_socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # Until it has its mode, the directory keeps others out.
            unix_socket.bind(str(path))
            path.chmod(0o600)
            listener = await asyncio.get_running_loop().create_unix_server(
                lambda: ServerConnection(self), sock=unix_socket
            )
        except BaseException:
            unix_socket.close()
            raise
        self._listeners.append(listener)
        self._unix_path = path
        return str(path)

    async def listen_tcp(self, host: str) -> tuple[str, int]:
        """Listen on a free port of this address; return both."""
        listener = await asyncio.get_running_loop().create_server(lambda: ServerConnection(self), host, 0)
        self._listeners.append(listener)
        port: int = listener.sockets[0].getsockname()[1]
        return host, port

    def refused(self, error: Exception) -> None:
        """Take note that a connection is closed: its peer broke the rules, or nobody serves any more."""
        if isinstance(error, NotServing):
            return  # who stopped, and why, is in the log already
        self._tally.connections_refused += 1
        if self._refusals.passes():
            logger.warning("%sclosing a connection: %s%s", self._prefix, error, self._refusals.more())

    def close(self) -> None:
        """Stop listening, drop every connection, remove the socket."""
        for listener in self._listeners:
            listener.close()
        for connection in tuple(self.connections):
            connection.close()
        if self._unix_path is not None:
            self._unix_path.unlink(missing_ok=True)
            self._unix_path = None


def socket_directory() -> Path:
    """The directory of this user's sockets, made when it is not there.

    Raises:
        ConfigurationError: somebody else owns it, or others may enter.
    """
    directory = Path(tempfile.gettempdir()) / f"fsm_ray-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigurationError(
            f"{directory} must be a directory of this user that nobody else can enter: "
            "remove it, or chmod it 700"
        )
    return directory
