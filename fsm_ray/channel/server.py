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
import ssl
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, cast

from fsm_ray.channel import handshake, tls
from fsm_ray.channel.frames import FrameProtocol
from fsm_ray.channel.handshake import HANDSHAKE_TIMEOUT_S, MAX_HANDSHAKE_BYTES, HandshakeFailed
from fsm_ray.channel.intake import Intake
from fsm_ray.channel.keepalive import keep_alive
from fsm_ray.channel.outflow import Outflow
from fsm_ray.channel.pacing import PacedTransport
from fsm_ray.errors import ConfigurationError
from fsm_ray.logs import Seldom
from fsm_ray.namespace import Answer, NotServing, RequestRefused
from fsm_ray.protocol import MAX_FRAME_BYTES, frame
from fsm_ray.tally import ShardTally

logger = logging.getLogger(__name__)

MAX_UNIX_PATH_BYTES = 107
"""What `sun_path` of unix(7) holds, its closing zero byte left out."""

_SUFFIX_BYTES = 3
"""Of a socket's name; each is two letters of the path."""

MAX_UNPROVED = 256
"""Connections that have proved nothing yet; past it, the oldest gives way: an honest one proves at once."""

MAX_CONNECTIONS = 8_192
"""Those that have proved the secret; past it, others are closed, and their operations go over Ray calls."""

_ACCEPT_PAUSE_S = 1.0
"""After a failure, as asyncio's listeners pause."""


class Crowded(Exception):
    """Told when there are too many connections."""


class NoTls(Exception):
    """Told when a peer does not come by TLS, or has no certificate of the authority."""


class Unproved(Protocol):
    """A connection that has proved nothing yet."""

    def close(self) -> None: ...


class ServerConnection(FrameProtocol):
    """One client: first the handshake, then requests, each passed on to `handle`."""

    def __init__(self, server: Server, transport_name: bytes) -> None:
        super().__init__()
        self.max_frame_bytes = MAX_HANDSHAKE_BYTES
        self.is_trusted = False
        self._server = server
        self._handle = server.handle
        self._transport: asyncio.Transport | None = None
        self._transport_name = transport_name
        self._challenge = handshake.challenge()
        self._patience: asyncio.TimerHandle | None = None
        self._has_unfinished = False
        self._waits_for_room = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._server.connections.add(self)
        self._server.greet(self)
        loop = asyncio.get_running_loop()
        self._patience = loop.call_later(
            HANDSHAKE_TIMEOUT_S, self.malformed, HandshakeFailed("no proof of the secret came in time")
        )
        self._transport.write(frame(self._challenge))

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  # asyncio's signature
        if self._patience is not None:
            self._patience.cancel()
        self._transport = None
        self._server.forget(self)
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
            self.close()

    def pause_writing(self) -> None:
        # Who does not read replies is not served, and not read from: what waits for it stays bounded.
        self.hold()
        if self._transport is not None:
            self._transport.pause_reading()
        self._server.outflow.begun(self)

    def resume_writing(self) -> None:
        self._server.outflow.ended(self)
        self.go_on()
        self._read_on()

    def left_over(self, length: int, *, is_next: bool) -> None:
        if not self.is_trusted:
            return  # the handshake has bounds of its own
        if self._has_unfinished and (is_next or not length):
            self._has_unfinished = False
            self._server.intake.ended(self)
        if length and not self._has_unfinished:
            self._has_unfinished = True
            self._server.intake.begun(self, length)

    def wait_for_room(self) -> None:
        self._waits_for_room = True
        if self._transport is not None:
            self._transport.pause_reading()

    def has_room(self) -> None:
        self._waits_for_room = False
        self._read_on()

    @property
    def unsent_bytes(self) -> int:
        """How much the client has not taken."""
        return 0 if self._transport is None else self._transport.get_write_buffer_size()

    def close(self) -> None:
        if self._transport is not None:
            self.end()
            self._transport.abort()
            self._transport = None

    def _read_on(self) -> None:
        if self._transport is not None and not self._is_held and not self._waits_for_room:
            self._transport.resume_reading()

    def _welcome(self, response: bytes) -> None:
        proof = handshake.verify(self._server.secret, self._challenge, response, self._transport_name)
        if self._transport is not None and self._patience is not None:
            self._patience.cancel()
            if not self._server.welcome(self):
                self.close()
                return
            self.frame_received = self._serve  # type: ignore[method-assign]
            self.is_trusted = True
            self.max_frame_bytes = MAX_FRAME_BYTES
            self._transport.write(frame(proof))

    def data_received(self, data: bytes) -> None:
        # The usual case of FrameProtocol, with `_serve` written out: a call less for every request.
        transport = self._transport
        if (
            len(data) - 4 == int.from_bytes(data[:4], "little") <= self.max_frame_bytes
            and self.is_trusted
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
            if self._is_held:
                self._server.outflow.added(self, len(reply))


class SecuredConnection(ServerConnection):
    """The same over TLS."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        secured = cast("asyncio.Transport", transport)
        self._paced = PacedTransport(secured, super().pause_writing, super().resume_writing)
        super().connection_made(self._paced)
        self._paced.begin()

    def pause_writing(self) -> None:
        self._paced.pause()

    def resume_writing(self) -> None:
        self._paced.resume()


class TlsGreeting:
    """A connection until TLS stands: asyncio's own listeners tell of it too late for it to be counted."""

    def __init__(
        self, server: Server, accepted: socket.socket, context: ssl.SSLContext, transport_name: bytes
    ) -> None:
        self._server = server
        self._accepted = accepted
        self._is_closed = False
        self._task = asyncio.get_running_loop().create_task(self._secure(context, transport_name))

    def close(self) -> None:
        """End the connection: then there will be no TLS."""
        self._is_closed = True
        with contextlib.suppress(OSError):
            self._accepted.shutdown(socket.SHUT_RDWR)

    async def _secure(self, context: ssl.SSLContext, transport_name: bytes) -> None:
        connection = SecuredConnection(self._server, transport_name)
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: connection, self._accepted, ssl=context, ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S
            )
        except OSError as error:
            if not self._is_closed:
                self._server.refused(NoTls(f"no TLS: {error}"))
        finally:
            self._server.forget(self)


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
        self.intake = Intake()
        self.outflow = Outflow()
        self._unproved: dict[Unproved, None] = {}
        """The oldest first."""
        self._clients = 0
        """Connections that proved the secret."""
        self._listeners: list[asyncio.Server] = []
        self._accepting: list[asyncio.Task[None]] = []
        self._unix_path: Path | None = None

    async def listen_unix(self, name: str) -> str:
        """Listen on a socket that only this user can open; return its path: the name and something random.

        What killed servers of this name left behind is removed.
        """
        directory = socket_directory()
        # Who knew a server before this one finds nobody, and asks for the new secret: at the same path it
        # would present the old one, as an attacker does.
        path = directory / f"{name}-{secrets.token_hex(_SUFFIX_BYTES)}"
        if len(os.fsencode(path)) > MAX_UNIX_PATH_BYTES:
            raise ConfigurationError(
                f"the socket's path {path} is longer than the {MAX_UNIX_PATH_BYTES} bytes that the system "
                "allows: set TMPDIR to a shorter directory on all nodes"
            )
        for left in directory.glob(f"{name}-*"):
            left.unlink(missing_ok=True)
        unix_socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # Until it has its mode, the directory keeps others out.
            unix_socket.bind(str(path))
            path.chmod(0o600)
            listener = await asyncio.get_running_loop().create_unix_server(
                lambda: ServerConnection(self, handshake.UNIX), sock=unix_socket
            )
        except BaseException:
            unix_socket.close()
            raise
        self._listeners.append(listener)
        self._unix_path = path
        return str(path)

    async def listen_tcp(self, host: str) -> tuple[str, int]:
        """Listen on a free port of this address, by TLS if Ray does; return both.

        Raises:
            ConfigurationError: TLS cannot be set up.
        """
        if tls.is_wanted():
            return host, self._listen_tls(host, *tls.server_context())
        listener = await asyncio.get_running_loop().create_server(
            lambda: ServerConnection(self, handshake.TCP), host, 0
        )
        self._listeners.append(listener)
        for listening in listener.sockets:
            keep_alive(listening)
        port: int = listener.sockets[0].getsockname()[1]
        return host, port

    def refused(self, error: Exception) -> None:
        """Take note that a connection is closed: its peer broke the rules, or nobody serves any more."""
        if isinstance(error, NotServing):
            return  # who stopped, and why, is in the log already
        self._tally.connections_refused += 1
        if self._refusals.passes():
            logger.warning("%sclosing a connection: %s%s", self._prefix, error, self._refusals.more())

    def _listen_tls(self, host: str, context: ssl.SSLContext, transport_name: bytes) -> int:
        """Listen on a free port of this address; return it."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, 0), family=family)
        listening.settimeout(0)
        keep_alive(listening)
        port: int = listening.getsockname()[1]
        accepting = asyncio.get_running_loop().create_task(self._accept(listening, context, transport_name))
        self._accepting.append(accepting)
        return port

    async def _accept(self, listening: socket.socket, context: ssl.SSLContext, transport_name: bytes) -> None:
        """Greet those that connect."""
        with listening:
            while True:
                try:
                    accepted, _ = await asyncio.get_running_loop().sock_accept(listening)
                except OSError as error:
                    # No file descriptors are left, say: those that leave make room.
                    self.refused(Crowded(f"no further one can be accepted: {error}"))
                    await asyncio.sleep(_ACCEPT_PAUSE_S)
                else:
                    self.greet(TlsGreeting(self, accepted, context, transport_name))

    def close(self) -> None:
        """Stop listening, drop every connection, remove the socket."""
        for listener in self._listeners:
            listener.close()
        for accepting in self._accepting:
            accepting.cancel()
        for connection in (*self._unproved, *self.connections):
            connection.close()
        if self._unix_path is not None:
            self._unix_path.unlink(missing_ok=True)
            self._unix_path = None

    def greet(self, connection: Unproved) -> None:
        """Take note of a connection that has proved nothing yet."""
        self._unproved[connection] = None
        if len(self._unproved) > MAX_UNPROVED:
            oldest = next(iter(self._unproved))
            del self._unproved[oldest]
            oldest.close()
            self.refused(Crowded(f"over {MAX_UNPROVED} have proved nothing yet; it was the oldest"))

    def welcome(self, connection: ServerConnection) -> bool:
        """Take note that the connection has proved the secret; tell whether there is room for it."""
        self._unproved.pop(connection, None)
        if self._clients < MAX_CONNECTIONS:
            self._clients += 1
            return True
        self.refused(Crowded(f"{MAX_CONNECTIONS} clients are connected already"))
        return False

    def forget(self, connection: ServerConnection | TlsGreeting) -> None:
        """Take note that a connection is gone."""
        self._unproved.pop(connection, None)
        if isinstance(connection, ServerConnection):
            self._clients -= connection.is_trusted
            self.connections.discard(connection)
            self.intake.ended(connection)
            self.outflow.ended(connection)


def socket_directory() -> Path:
    """The directory of this user's sockets, made when it is not there.

    Raises:
        ConfigurationError: it cannot be made, somebody else owns it, others may enter, or its owner may not.
    """
    directory = Path(tempfile.gettempdir()) / f"fsm_ray-{os.getuid()}"
    try:
        directory.mkdir(mode=0o700)
        # An umask may have taken rights from the owner, too.
        directory.chmod(0o700)
    except FileExistsError:
        pass  # what it is, is looked at below
    except OSError as error:
        raise ConfigurationError(
            f"the directory of this user's sockets, {directory}, cannot be made ({error.strerror}): "
            "set TMPDIR to a directory in which it can, on all nodes"
        ) from error
    found = directory.lstat()
    is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    if not is_own or found.st_mode & 0o777 != stat.S_IRWXU:
        raise ConfigurationError(
            f"{directory} must be a directory of this user that nobody else can enter: "
            "remove it, or chmod it 700; if somebody else made it, "
            "set TMPDIR to a directory of your own on all nodes"
        )
    return directory
