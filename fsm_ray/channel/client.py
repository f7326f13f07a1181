"""The client halves of the channel: one for an event loop, one for a blocking thread."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterator
from typing import cast

from fsm_ray.channel import handshake, tls
from fsm_ray.channel.frames import FrameProtocol, FrameTooLong
from fsm_ray.channel.handshake import HANDSHAKE_TIMEOUT_S, MAX_HANDSHAKE_BYTES, Endpoint, HandshakeFailed
from fsm_ray.channel.keepalive import keep_alive
from fsm_ray.protocol import MAX_REPLY_BYTES, frame

CONNECT_TIMEOUT_S = 2.0
"""How long one address may take; unreachable ones must leave time for the next."""

Address = str | tuple[str, int]
"""A Unix socket's path, or host and port."""


def addresses(endpoint: Endpoint, node_id: str) -> Iterator[Address]:
    """Where to try, the quickest first."""
    if endpoint.node_id == node_id:
        yield endpoint.unix_path
    if endpoint.tcp_address is not None:
        yield endpoint.tcp_address


_PEER_CREDENTIALS = struct.Struct("3i")
"""Process, user and group: `ucred` of unix(7)."""


class ClientConnection(FrameProtocol):
    """A connection of the running loop. Replies go to `on_reply`, the end of it to `on_lost`, once."""

    def __init__(
        self,
        secret: bytes,
        transport_name: bytes,
        on_reply: Callable[[bytes], None],
        on_lost: Callable[[], None],
    ) -> None:
        super().__init__()
        self._transport_name = transport_name
        self.max_frame_bytes = MAX_HANDSHAKE_BYTES
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._secret = secret
        self._expected_proof: bytes | None = None
        self._on_reply = on_reply
        self._on_lost = on_lost
        self._transport: asyncio.Transport | None = None

    @property
    def send(self) -> Callable[[bytes], None]:
        """Sends one frame; after the end of the connection it goes nowhere."""
        return _nowhere if self._transport is None else self._transport.write

    def close(self) -> None:
        """End the connection without `on_lost`."""
        self._on_lost = _nothing
        self._abort()

    def abandon(self) -> None:
        """End a connection whose loop was closed; asyncio leaves its socket open then, uvloop does not."""
        with contextlib.suppress(RuntimeError):
            self.close()  # as far as it can without the loop
        connected = None if self._transport is None else self._transport.get_extra_info("socket")
        if connected is not None and connected.fileno() >= 0:
            with contextlib.suppress(OSError):
                connected.shutdown(socket.SHUT_RDWR)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        secured: ssl.SSLObject | None = transport.get_extra_info("ssl_object")
        if secured is not None:
            self._transport_name = tls.transport_of(secured.getpeercert(binary_form=True))

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self.opened.done():
            self._on_lost()
        else:
            self.opened.set_exception(exc or HandshakeFailed("the shard closed the connection"))

    def frame_received(self, body: bytes) -> None:
        # Once the connection is open, this method is replaced by `on_reply` itself.
        try:
            self._shake_hands(body)
        except Exception as error:  # noqa: BLE001  # whatever it is, the caller of open_connection gets it
            if not self.opened.done():
                self.opened.set_exception(error)
            self.close()

    def malformed(self, error: Exception) -> None:
        if not self.opened.done():
            self.opened.set_exception(HandshakeFailed(f"what listens there is no fsm_ray shard: {error}"))
        self._abort()

    def _abort(self) -> None:
        self.end()
        if self._transport is not None:
            self._transport.abort()

    def _shake_hands(self, body: bytes) -> None:
        if self._expected_proof is None:
            response, self._expected_proof = handshake.respond(self._secret, body, self._transport_name)
            self.send(frame(response))
        elif handshake.is_proof(body, self._expected_proof):
            self.max_frame_bytes = MAX_REPLY_BYTES
            self.frame_received = self._on_reply  # type: ignore[method-assign, assignment]
            self.opened.set_result(None)
        else:
            raise HandshakeFailed("the shard does not know its secret")


async def open_connection(
    address: Address, secret: bytes, on_reply: Callable[[bytes], None], on_lost: Callable[[], None]
) -> ClientConnection:
    """Connect and shake hands.

    Raises:
        OSError, TimeoutError, HandshakeFailed: this address is of no use.
        ProtocolMismatch: the shard is of another version.
        ConfigurationError: Ray runs with TLS, and its certificates cannot be used.
    """
    loop = asyncio.get_running_loop()
    name = handshake.UNIX if isinstance(address, str) else handshake.TCP
    connection = ClientConnection(secret, name, on_reply, on_lost)
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            if isinstance(address, str):
                own = await _connect_to_own(loop, address)
                await loop.create_unix_connection(lambda: connection, sock=own)
            else:
                context = tls.client_context() if tls.is_wanted() else None
                transport, _ = await loop.create_connection(lambda: connection, *address, ssl=context)
                keep_alive(transport.get_extra_info("socket"))
            await connection.opened
    except BaseException:
        connection.close()
        raise
    return connection


async def _connect_to_own(loop: asyncio.AbstractEventLoop, path: str) -> socket.socket:
    """A socket that is connected to a listener of this user."""
    own = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        own.settimeout(0)
        await loop.sock_connect(own, path)
        _check_owner(own, path)
    except BaseException:
        own.close()
        raise
    return own


def _check_owner(connected: socket.socket, path: str) -> None:
    """Refuse a socket on which another user listens.

    The system says who does. Files could be looked at before the connection is made, and changed meanwhile.
    """
    told = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
    _, user, _ = _PEER_CREDENTIALS.unpack(told)
    if user != os.getuid():
        raise HandshakeFailed(f"user {user} listens at {path}, and this process is of user {os.getuid()}")


def open_blocking(address: Address, secret: bytes, timeout_s: float) -> BlockingConnection:
    """A connection for this thread, its replies awaited for `timeout_s`.

    Raises:
        OSError, HandshakeFailed: this address is of no use.
        ProtocolMismatch: the shard is of another version.
        ConfigurationError: Ray runs with TLS, and its certificates cannot be used.
    """
    is_tls = not isinstance(address, str) and tls.is_wanted()
    return (BlockingTlsConnection if is_tls else BlockingConnection)(address, secret, timeout_s)


class BlockingConnection:
    """A connection of one thread: a request goes out, its reply comes in."""

    def __init__(self, address: Address, secret: bytes, timeout_s: float) -> None:
        """Connect and shake hands; no step of that, and no reply later on, may take longer than `timeout_s`.

        Raises:
            OSError, HandshakeFailed: this address is of no use.
            ProtocolMismatch: the shard is of another version.
        """
        self._max_frame_bytes = MAX_HANDSHAKE_BYTES
        if isinstance(address, str):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        else:
            self._socket = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            keep_alive(self._socket)
        try:
            self._socket.settimeout(min(CONNECT_TIMEOUT_S, timeout_s))
            self._socket.connect(address)
            name = self._prepare(address)
            self._recv = self._socket.recv
            self._shake_hands(secret, name, min(HANDSHAKE_TIMEOUT_S, timeout_s))
            self._max_frame_bytes = MAX_REPLY_BYTES
            self.set_timeout(timeout_s)
        except BaseException:
            self._socket.close()
            raise

    def set_timeout(self, timeout_s: float) -> None:
        """How long `exchange` waits for its reply.

        By socket options, not `settimeout`, which makes the socket non-blocking and costs a poll(2) a call.
        """
        self._socket.settimeout(None)
        whole = int(timeout_s)
        value = struct.pack("ll", whole, max(1, int((timeout_s - whole) * 1e6)))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)

    def exchange(self, request: bytes) -> bytes:
        """Send one frame and return the next that comes.

        Raises:
            BlockingIOError: no reply within the timeout; it may still come, so close the connection.
            OSError: the connection is gone.
        """
        self._socket.sendall(request)
        return self._receive()

    def close(self) -> None:
        self._socket.close()

    def _receive(self) -> bytes:
        data = self._recv(65_536)
        length = int.from_bytes(data[:4], "little")
        if len(data) - 4 == length:
            return data[4:]
        rest = bytearray(data)
        while len(rest) < 4 or len(rest) - 4 < length:  # noqa: PLR2004  # bytes of the length
            if not data:
                raise ConnectionResetError("the shard closed the connection")
            if length > self._max_frame_bytes:
                raise FrameTooLong(
                    f"a frame of {length:,} bytes; at most {self._max_frame_bytes:,} are taken"
                )
            data = self._recv(1 << 20)
            rest += data
            length = int.from_bytes(rest[:4], "little")
        return bytes(rest[4 : 4 + length])

    def _prepare(self, address: Address) -> bytes:
        """Make what is connected ready for the handshake; return the transport as it is in proofs."""
        if isinstance(address, str):
            _check_owner(self._socket, address)
            return handshake.UNIX
        return handshake.TCP

    def _shake_hands(self, secret: bytes, name: bytes, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        response, expected_proof = handshake.respond(secret, self._receive_by(deadline), name)
        self._socket.sendall(frame(response))
        if not handshake.is_proof(self._receive_by(deadline), expected_proof):
            raise HandshakeFailed("the shard does not know its secret")

    def _receive_by(self, deadline: float) -> bytes:
        """One frame of the handshake; whoever sends byte by byte has no more time than others."""
        length = int.from_bytes(self._receive_bytes(4, deadline), "little")
        if length > MAX_HANDSHAKE_BYTES:
            raise HandshakeFailed(
                f"what listens there is no fsm_ray shard: a frame of {length:,} bytes; at most "
                f"{MAX_HANDSHAKE_BYTES:,} are taken"
            )
        return self._receive_bytes(length, deadline)

    def _receive_bytes(self, count: int, deadline: float) -> bytes:
        received = b""
        while len(received) < count:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise TimeoutError("the handshake took too long")
            self._socket.settimeout(left_s)
            data = self._socket.recv(count - len(received))
            if not data:
                raise ConnectionResetError("the shard closed the connection")
            received += data
        return received


class BlockingTlsConnection(BlockingConnection):
    """The same over TLS: whose library takes the timeouts of `settimeout` alone."""

    def set_timeout(self, timeout_s: float) -> None:
        self._socket.settimeout(timeout_s)

    def exchange(self, request: bytes) -> bytes:
        try:
            return super().exchange(request)
        except TimeoutError as error:
            raise BlockingIOError(str(error)) from error

    def _prepare(self, address: Address) -> bytes:
        secured = tls.client_context().wrap_socket(self._socket, server_hostname=address[0])
        self._socket = secured
        return tls.transport_of(secured.getpeercert(binary_form=True))


def _nothing() -> None: ...


def _nowhere(_request: bytes) -> None: ...
