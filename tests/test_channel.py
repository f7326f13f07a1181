"""Channel: a real server and real clients, and peers that break the rules.

The server runs on a loop of its own thread, as it does in an actor: asyncio's, and uvloop, which Ray uses.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import select
import socket
import stat
import struct
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, Self, TypeVar

import pytest
import uvloop
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fsm_ray import protocol
from fsm_ray.channel import client, handshake, server, tls
from fsm_ray.channel.client import Address, BlockingConnection, ClientConnection, addresses, open_connection
from fsm_ray.channel.frames import FrameProtocol
from fsm_ray.channel.handshake import MAX_HANDSHAKE_BYTES, Endpoint, HandshakeFailed
from fsm_ray.channel.server import MAX_UNIX_PATH_BYTES, Server, ServerConnection, socket_directory
from fsm_ray.codec import encode_data
from fsm_ray.errors import ConfigurationError, ProtocolMismatch
from fsm_ray.namespace import Answer, MalformedRequest, Namespace
from fsm_ray.options import BotOptions
from fsm_ray.protocol import MAX_FRAME_BYTES, PROTOCOL_VERSION, frame
from fsm_ray.stores.memory import MemoryStore
from fsm_ray.tally import ShardTally

T = TypeVar("T")

DEADLINE_S = 20.0
"""What is waited for comes at once; whoever waits this long will wait in vain."""

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.SelectorEventLoop,
    "uvloop": uvloop.new_event_loop,
}
SIZES = [0, 1, 3, 4, 65_531, 65_532, 65_533, 65_536, 1 << 20]
"""Of frames; 65,536 bytes are what a client takes from the socket at once."""

SECRET = b"s" * 32


class RunningServer:
    """A server on the loop of its own thread; unless told else, it answers a request with the same bytes."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.requests: list[bytes] = []
        self.failures: list[dict[str, Any]] = []
        """What the loop's exception handler was told."""
        self.respond: Callable[[bytes, Answer], bytes | None] = lambda body, _: frame(bytes(body))
        self.server = Server(self._handle)
        self._asker: ServerConnection | None = None
        self._loop = loop
        self._loop.set_exception_handler(lambda _, context: self.failures.append(context))
        self._thread = threading.Thread(target=loop.run_forever)
        self._thread.start()

    @property
    def secret(self) -> bytes:
        return self.server.secret

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run it on the server's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(DEADLINE_S)

    def call(self, function: Callable[[], T]) -> T:
        """Call it on the server's loop."""

        async def call() -> T:
            return function()

        return self.run(call())

    def until(self, condition: Callable[[], object]) -> None:
        """Wait until the condition holds, which is looked at on the server's loop."""

        async def until() -> None:
            async with asyncio.timeout(DEADLINE_S):
                while not condition():  # noqa: ASYNC110  # of what is no event
                    await asyncio.sleep(0)

        self.run(until())

    @property
    def transport(self) -> asyncio.Transport:
        """Of whoever sent the last request."""
        assert self._asker is not None
        assert self._asker._transport is not None
        return self._asker._transport

    def stop(self) -> None:
        self.call(self.server.close)
        self.until(lambda: not self.server.connections)
        self.run(self._loop.shutdown_asyncgens())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(DEADLINE_S)
        self._loop.close()

    def _handle(self, body: bytes, answer: Answer) -> bytes | None:
        self.requests.append(bytes(body))
        self._asker = getattr(answer, "__self__", None)
        return self.respond(body, answer)


class Peer:
    """A socket that speaks the channel by hand, and may break its rules; by TLS where Ray uses it."""

    def __init__(self, address: Address) -> None:
        self.transport = handshake.UNIX if isinstance(address, str) else handshake.TCP
        family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
        self.socket = socket.socket(family, socket.SOCK_STREAM)
        self.socket.settimeout(DEADLINE_S)
        try:
            self.socket.connect(address)
            if isinstance(address, tuple) and tls.is_wanted():
                self.socket = secured = tls.client_context().wrap_socket(self.socket)
                self.transport = tls.transport_of(secured.getpeercert(binary_form=True))
        except OSError:
            self.socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        # A server that has closed the connection already may refuse the rest.
        with contextlib.suppress(ConnectionError):
            self.socket.sendall(data)

    def receive(self) -> bytes:
        """One frame."""
        length = int.from_bytes(self._receive_bytes(4), "little")
        return self._receive_bytes(length)

    def shake_hands(self, secret: bytes) -> bytes:
        """Prove the secret, and return the frame that did."""
        response, expected = handshake.respond(secret, self.receive(), self.transport)
        self.send(frame(response))
        assert self.receive() == expected
        return frame(response)

    def wait_for_end(self) -> None:
        """Take what comes until the server closes the connection."""
        with contextlib.suppress(ConnectionError):
            while self.socket.recv(1 << 20):
                pass

    def _receive_bytes(self, count: int) -> bytes:
        received = b""
        while len(received) < count:
            data = self.socket.recv(count - len(received))
            if not data:
                raise ConnectionResetError("the server closed the connection")
            received += data
        return received


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The system's directory for temporary files: one of this test, with a path short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="fsm") as path:
        monkeypatch.setattr(tempfile, "tempdir", path)
        yield Path(path)


@pytest.fixture(params=LOOPS)
def running(request: pytest.FixtureRequest, temporary: Path) -> Iterator[RunningServer]:
    running = RunningServer(LOOPS[request.param]())
    yield running
    running.stop()

    assert running.failures == []


@pytest.fixture(params=["unix", "tcp"])
def address(request: pytest.FixtureRequest, running: RunningServer) -> Address:
    if request.param == "unix":
        return running.run(running.server.listen_unix("shard"))
    return running.run(running.server.listen_tcp("127.0.0.1"))


@pytest.fixture
def peer(address: Address) -> Iterator[Peer]:
    with Peer(address) as peer:
        yield peer


@pytest.fixture
def witness(running: RunningServer, address: Address) -> Iterator[Peer]:
    """Another client, which must never notice."""
    with Peer(address) as witness:
        witness.shake_hands(running.secret)
        yield witness

        witness.send(frame(b"still here"))
        assert witness.receive() == b"still here"


class LoopClient:
    """A connection of the running loop; replies can be waited for, one by one."""

    def __init__(self) -> None:
        self.connection: ClientConnection
        self.replies: asyncio.Queue[bytes] = asyncio.Queue()
        self.lost = asyncio.Event()
        self.times_lost = 0

    async def open(self, address: Address, secret: bytes) -> None:
        self.connection = await open_connection(
            address, secret, lambda body: self.replies.put_nowait(bytes(body)), self._on_lost
        )

    async def exchange(self, body: bytes) -> bytes:
        self.connection.send(frame(body))
        return await self.reply()

    async def reply(self) -> bytes:
        async with asyncio.timeout(DEADLINE_S):
            return await self.replies.get()

    def _on_lost(self) -> None:
        self.times_lost += 1
        self.lost.set()


@pytest.fixture
async def loop_client(running: RunningServer, address: Address) -> AsyncIterator[LoopClient]:
    loop_client = LoopClient()
    await loop_client.open(address, running.secret)
    yield loop_client
    loop_client.connection.close()
    await asyncio.sleep(0)


@pytest.fixture
def blocking_client(running: RunningServer, address: Address) -> Iterator[BlockingConnection]:
    with contextlib.closing(BlockingConnection(address, running.secret, DEADLINE_S)) as connection:
        yield connection


@contextlib.asynccontextmanager
async def listener_that(script: Callable[[socket.socket], object], directory: Path) -> AsyncIterator[str]:
    """A socket's path; whoever connects meets this script, and then the end of the connection."""

    def serve() -> None:
        connected, _ = listener.accept()
        with connected, contextlib.suppress(ConnectionError):
            connected.settimeout(DEADLINE_S)
            script(connected)

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.settimeout(DEADLINE_S)
        listener.bind(str(directory / "impostor"))
        listener.listen()
        served = asyncio.create_task(asyncio.to_thread(serve))
        yield str(directory / "impostor")
        await served


async def open_by_loop(address: Address) -> None:
    await LoopClient().open(address, SECRET)


async def open_by_blocking(address: Address) -> None:
    await asyncio.to_thread(BlockingConnection, address, SECRET, DEADLINE_S)


both_clients = pytest.mark.parametrize("open_client", [open_by_loop, open_by_blocking])
OpenClient = Callable[[Address], Coroutine[Any, Any, None]]


class Collector(FrameProtocol):
    """Notes what it is given."""

    def __init__(self, max_frame_bytes: int = 1 << 20) -> None:
        super().__init__()
        self.max_frame_bytes = max_frame_bytes
        self.bodies: list[bytes] = []
        self.errors: list[Exception] = []

    def frame_received(self, body: bytes) -> None:
        self.bodies.append(body)

    def malformed(self, error: Exception) -> None:
        self.errors.append(error)


class TestFrames:
    @given(st.lists(st.binary(max_size=300), max_size=6), st.randoms(use_true_random=False))
    def test_frames_are_cut_out_of_the_stream_in_whatever_pieces_it_comes(
        self, bodies: list[bytes], randomness: random.Random
    ) -> None:
        collector = Collector()
        stream = b"".join(map(frame, bodies))
        while stream:
            size = randomness.choice([1, 2, 3, 4, 5, 50, len(stream)])
            collector.data_received(stream[:size])
            stream = stream[size:]

        assert collector.bodies == bodies
        assert collector.errors == []

    def test_a_piece_that_looks_like_a_frame_is_taken_for_what_it_is(self) -> None:
        collector = Collector()
        outer = frame(frame(b"inner"))
        collector.data_received(outer[:4])
        collector.data_received(outer[4:])

        assert collector.bodies == [frame(b"inner")]

    def test_a_frame_that_is_not_whole_yet_is_not_given(self) -> None:
        collector = Collector()
        collector.data_received(frame(b"body")[:-1])

        assert collector.bodies == []

    @pytest.mark.parametrize("piece_size", [1, 10_000])
    def test_a_frame_of_exactly_the_limit_is_taken(self, piece_size: int) -> None:
        collector = Collector(max_frame_bytes=1000)
        stream = frame(b"x" * 1000)
        for start in range(0, len(stream), piece_size):
            collector.data_received(stream[start : start + piece_size])

        assert collector.bodies == [b"x" * 1000]
        assert collector.errors == []

    @pytest.mark.parametrize("piece_size", [1, 10_000])
    def test_a_frame_of_a_byte_more_is_refused_once_and_not_collected(self, piece_size: int) -> None:
        collector = Collector(max_frame_bytes=1000)
        stream = frame(b"good") + frame(b"x" * 1001)[:4]
        for start in range(0, len(stream), piece_size):
            collector.data_received(stream[start : start + piece_size])

        assert collector.bodies == [b"good"]
        assert [str(error) for error in collector.errors] == [
            "a frame of 1,001 bytes; at most 1,000 are taken"
        ]

    def test_the_limit_may_change_from_one_frame_to_the_next(self) -> None:
        class Trusting(Collector):
            def frame_received(self, body: bytes) -> None:
                super().frame_received(body)
                self.max_frame_bytes = 1000

        trusting = Trusting(max_frame_bytes=10)
        trusting.data_received(frame(b"short") + frame(b"x" * 1000))

        assert trusting.bodies == [b"short", b"x" * 1000]

    @pytest.mark.parametrize("piece_size", [1, 5, 1000])
    def test_after_its_end_nothing_more_is_handed_out_or_kept(self, piece_size: int) -> None:
        class Ending(Collector):
            def frame_received(self, body: bytes) -> None:
                super().frame_received(body)
                if body == b"last":
                    self.end()

        ending = Ending()
        stream = frame(b"first") + frame(b"last") + frame(b"after") * 3 + b"\xff\xff\xff\xff"
        for start in range(0, len(stream), piece_size):
            ending.data_received(stream[start : start + piece_size])
        ending.go_on()

        assert (ending.bodies, ending.errors) == ([b"first", b"last"], [])
        assert not ending._partial

    def test_what_was_given_stays_as_it_is(self) -> None:
        collector = Collector()
        collector.data_received(frame(b"one") + frame(b"two") + frame(b"three")[:-1])
        collector.data_received(b"e" + frame(b"four"))

        assert collector.bodies == [b"one", b"two", b"three", b"four"]


class TestHolding:
    """A protocol that is held hands out nothing; what arrives meanwhile is kept."""

    @pytest.mark.parametrize("piece_size", [1, 5, 1000])
    def test_frames_that_come_while_it_is_held_are_handed_out_afterwards(self, piece_size: int) -> None:
        collector = Collector()
        stream = frame(b"one") + frame(b"two") + frame(b"three")[:-1]
        collector.hold()
        for start in range(0, len(stream), piece_size):
            collector.data_received(stream[start : start + piece_size])
        while_held = list(collector.bodies)
        collector.go_on()
        afterwards = list(collector.bodies)
        collector.data_received(b"e" + frame(b"four"))

        assert while_held == []
        assert afterwards == [b"one", b"two"]
        assert collector.bodies == [b"one", b"two", b"three", b"four"]

    def test_a_frame_that_comes_whole_while_it_is_held_is_handed_out_afterwards(self) -> None:
        collector = Collector()
        collector.hold()
        collector.data_received(frame(b"one"))
        while_held = list(collector.bodies)
        collector.go_on()

        assert (while_held, collector.bodies) == ([], [b"one"])

    def test_it_may_be_held_by_each_frame_that_it_hands_out(self) -> None:
        class Holding(Collector):
            def frame_received(self, body: bytes) -> None:
                super().frame_received(body)
                self.hold()

        holding = Holding()
        holding.data_received(b"".join(map(frame, (b"one", b"two", b"three"))))
        counts = [len(holding.bodies)]
        for _ in range(3):
            holding.go_on()
            counts.append(len(holding.bodies))
        holding.data_received(frame(b"four"))
        counts.append(len(holding.bodies))

        assert counts == [1, 2, 3, 3, 4]
        assert holding.bodies == [b"one", b"two", b"three", b"four"]

    def test_it_may_be_held_and_go_on_within_one_frame(self) -> None:
        class Flickering(Collector):
            def frame_received(self, body: bytes) -> None:
                super().frame_received(body)
                self.hold()
                self.go_on()

        flickering = Flickering()
        flickering.data_received(b"".join(map(frame, (b"one", b"two", b"three"))))

        assert flickering.bodies == [b"one", b"two", b"three"]

    def test_a_frame_too_long_is_refused_when_its_turn_comes(self) -> None:
        collector = Collector(max_frame_bytes=10)
        collector.hold()
        collector.data_received(frame(b"good") + frame(b"x" * 11))
        while_held = list(collector.errors)
        collector.go_on()

        assert while_held == []
        assert (len(collector.bodies), len(collector.errors)) == (1, 1)


class TestExchange:
    @pytest.mark.parametrize("size", SIZES)
    async def test_a_loop_gets_its_reply(self, loop_client: LoopClient, size: int) -> None:
        assert await loop_client.exchange(b"x" * size) == b"x" * size

    @pytest.mark.parametrize("size", SIZES)
    def test_a_thread_gets_its_reply(self, blocking_client: BlockingConnection, size: int) -> None:
        assert bytes(blocking_client.exchange(frame(b"x" * size))) == b"x" * size

    def test_a_loop_of_uvloop_gets_its_reply(self, running: RunningServer, address: Address) -> None:
        async def exchange() -> bytes:
            loop_client = LoopClient()
            await loop_client.open(address, running.secret)
            reply = await loop_client.exchange(b"hello")
            loop_client.connection.close()
            return reply

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            assert runner.run(exchange()) == b"hello"

    async def test_requests_that_do_not_wait_are_answered_in_order(self, loop_client: LoopClient) -> None:
        for number in range(100):
            loop_client.connection.send(frame(b"%d" % number))

        assert [await loop_client.reply() for _ in range(100)] == [b"%d" % number for number in range(100)]

    def test_a_thread_makes_one_exchange_after_the_other(self, blocking_client: BlockingConnection) -> None:
        bodies = [b"%d" % number * size for number, size in enumerate(SIZES)]

        assert [bytes(blocking_client.exchange(frame(body))) for body in bodies] == bodies

    @pytest.mark.parametrize("piece_size", [1, 2, 3, 4, 5, 7])
    def test_a_thread_takes_a_reply_in_whatever_pieces_it_comes(
        self, blocking_client: BlockingConnection, monkeypatch: pytest.MonkeyPatch, piece_size: int
    ) -> None:
        receive = blocking_client._recv
        monkeypatch.setattr(blocking_client, "_recv", lambda _: receive(piece_size))

        assert [bytes(blocking_client.exchange(frame(body))) for body in (b"", b"hello", b"x" * 50)] == [
            b"",
            b"hello",
            b"x" * 50,
        ]

    def test_requests_that_come_byte_by_byte_are_answered(self, running: RunningServer, peer: Peer) -> None:
        peer.shake_hands(running.secret)
        for byte in frame(b"one") + frame(b"") + frame(b"two"):
            peer.send(bytes([byte]))

        assert [peer.receive() for _ in range(3)] == [b"one", b"", b"two"]

    def test_requests_that_come_together_are_answered_each(self, running: RunningServer, peer: Peer) -> None:
        peer.shake_hands(running.secret)
        peer.send(b"".join(frame(b"%d" % number) for number in range(1000)))

        assert [peer.receive() for _ in range(1000)] == [b"%d" % number for number in range(1000)]

    def test_a_request_that_comes_together_with_the_proof_is_answered(
        self, running: RunningServer, peer: Peer
    ) -> None:
        response, expected = handshake.respond(running.secret, peer.receive(), peer.transport)
        peer.send(frame(response) + frame(b"hello"))

        assert [peer.receive(), peer.receive()] == [expected, b"hello"]

    def test_clients_do_not_get_each_others_replies(self, running: RunningServer, address: Address) -> None:
        with contextlib.ExitStack() as stack:
            peers = [stack.enter_context(Peer(address)) for _ in range(10)]
            for peer in peers:
                peer.shake_hands(running.secret)
            for number, peer in enumerate(peers):
                peer.send(frame(b"%d" % number))

            assert [peer.receive() for peer in reversed(peers)] == [b"%d" % n for n in reversed(range(10))]

    def test_an_answer_may_come_later(self, running: RunningServer, peer: Peer) -> None:
        answers: list[Answer] = []
        running.respond = lambda _, answer: answers.append(answer)
        peer.shake_hands(running.secret)
        peer.send(frame(b"one") + frame(b"two"))
        running.until(lambda: len(answers) == 2)
        running.call(lambda: answers[1](frame(b"second")))
        running.call(lambda: answers[0](frame(b"first")))

        assert [peer.receive(), peer.receive()] == [b"second", b"first"]


class TestHandshake:
    async def test_a_loop_with_another_secret_is_refused(
        self, running: RunningServer, address: Address, witness: Peer
    ) -> None:
        with pytest.raises((OSError, HandshakeFailed)):
            await LoopClient().open(address, SECRET)

        running.until(lambda: len(running.server.connections) == 1)
        assert running.requests == []

    def test_a_thread_with_another_secret_is_refused(
        self, running: RunningServer, address: Address, witness: Peer
    ) -> None:
        with pytest.raises((OSError, HandshakeFailed)):
            BlockingConnection(address, SECRET, DEADLINE_S)

        running.until(lambda: len(running.server.connections) == 1)
        assert running.requests == []

    def test_a_wrong_proof_ends_the_connection_with_one_line_in_the_log(
        self, running: RunningServer, peer: Peer, caplog: pytest.LogCaptureFixture
    ) -> None:
        response, _ = handshake.respond(SECRET, peer.receive(), peer.transport)
        peer.send(frame(response) + frame(b"request") * 3)
        peer.wait_for_end()

        assert running.requests == []
        assert [record.getMessage() for record in caplog.records] == [
            "closing a connection: the peer does not know this shard's secret"
        ]

    @pytest.mark.parametrize("change", [-1, 1, -32, 32, -64])
    def test_a_proof_of_another_length_is_refused(
        self, running: RunningServer, peer: Peer, change: int
    ) -> None:
        response, _ = handshake.respond(running.secret, peer.receive(), peer.transport)
        peer.send(frame(response[:change] if change < 0 else response + b"\x00" * change))
        peer.wait_for_end()
        running.until(lambda: not running.server.connections)

        assert running.requests == []

    def test_a_request_before_the_proof_is_not_handled(self, running: RunningServer, peer: Peer) -> None:
        peer.send(frame(b"request"))
        peer.wait_for_end()

        assert running.requests == []

    def test_a_proof_is_worth_nothing_on_another_connection(
        self, running: RunningServer, address: Address
    ) -> None:
        with Peer(address) as honest, Peer(address) as replaying:
            overheard = honest.shake_hands(running.secret)
            replaying.receive()
            replaying.send(overheard + frame(b"request"))
            replaying.wait_for_end()

        assert running.requests == []

    def test_each_connection_gets_another_challenge(self, address: Address) -> None:
        with Peer(address) as one, Peer(address) as two:
            assert one.receive() != two.receive()

    def test_the_proof_of_a_server_is_none_of_a_client(self) -> None:
        challenge = handshake.challenge()
        response, servers_proof = handshake.respond(SECRET, challenge, handshake.TCP)

        with pytest.raises(HandshakeFailed):
            handshake.verify(SECRET, challenge, response[:32] + servers_proof, handshake.TCP)

    def test_the_server_proves_the_secret_to_who_proved_it(self) -> None:
        challenge = handshake.challenge()
        response, expected = handshake.respond(SECRET, challenge, handshake.TCP)

        assert handshake.verify(SECRET, challenge, response, handshake.TCP) == expected

    def test_the_secret_is_not_in_the_representation_of_an_endpoint(self) -> None:
        endpoint = Endpoint(BotOptions(), "node", "/socket", None, b"very secret")

        assert "very secret" not in repr(endpoint)

    @both_clients
    async def test_a_server_that_does_not_know_the_secret_is_refused(
        self, temporary: Path, open_client: OpenClient
    ) -> None:
        def script(connected: socket.socket) -> None:
            connected.sendall(frame(handshake.challenge()))
            connected.recv(1000)
            connected.sendall(frame(b"p" * 32))
            connected.recv(1000)

        async with listener_that(script, temporary) as address:
            with pytest.raises(HandshakeFailed, match="secret"):
                await open_client(address)

    @both_clients
    async def test_a_server_that_sends_the_clients_proof_back_is_refused(
        self, temporary: Path, open_client: OpenClient
    ) -> None:
        def script(connected: socket.socket) -> None:
            connected.sendall(frame(handshake.challenge()))
            response = connected.recv(1000)[4:]
            connected.sendall(frame(response[32:]))
            connected.recv(1000)

        async with listener_that(script, temporary) as address:
            with pytest.raises(HandshakeFailed, match="secret"):
                await open_client(address)

    @both_clients
    @pytest.mark.parametrize("theirs", [0, 1, PROTOCOL_VERSION + 1, 65_535])
    async def test_a_server_of_another_protocol_version_is_refused_by_name(
        self, temporary: Path, open_client: OpenClient, theirs: int
    ) -> None:
        def script(connected: socket.socket) -> None:
            connected.sendall(frame(b"fsm_ray" + theirs.to_bytes(2, "big") + b"whatever that version sends"))
            connected.recv(1000)

        async with listener_that(script, temporary) as address:
            with pytest.raises(ProtocolMismatch, match=f"{theirs}"):
                await open_client(address)

    @both_clients
    @pytest.mark.parametrize(
        "greeting",
        [
            b"",
            b"\x00\x00\x00\x00",
            b"\x05\x00\x00\x00hello",
            b"220 mail.example ESMTP\r\n",
            b"SSH-2.0-OpenSSH_9.6\r\n",
            b"HTTP/1.1 400 Bad Request\r\n\r\n",
        ],
    )
    async def test_whoever_else_listens_there_is_of_no_use(
        self, temporary: Path, open_client: OpenClient, greeting: bytes
    ) -> None:
        async with listener_that(lambda connected: connected.sendall(greeting), temporary) as address:
            with pytest.raises((OSError, HandshakeFailed)):
                await open_client(address)

    @both_clients
    async def test_where_nobody_listens_there_is_no_connection(
        self, temporary: Path, open_client: OpenClient
    ) -> None:
        with pytest.raises(OSError, match="No such file"):
            await open_client(str(temporary / "nothing"))

    @both_clients
    async def test_a_server_that_never_speaks_is_given_up(
        self, temporary: Path, open_client: OpenClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(client, "CONNECT_TIMEOUT_S", 0.02)
        monkeypatch.setattr(client, "HANDSHAKE_TIMEOUT_S", 0.02)

        async with listener_that(lambda connected: connected.recv(1), temporary) as address:
            with pytest.raises(TimeoutError):
                await open_client(address)

    async def test_a_thread_waits_for_a_server_that_never_speaks_no_longer_than_for_a_reply(
        self, temporary: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(client, "HANDSHAKE_TIMEOUT_S", 2 * DEADLINE_S)

        async with listener_that(lambda connected: connected.recv(1), temporary) as address:
            async with asyncio.timeout(DEADLINE_S):
                with pytest.raises(TimeoutError):
                    await asyncio.to_thread(BlockingConnection, address, SECRET, 0.02)

    @pytest.mark.parametrize("speech", [b"", b"\x40", b"\x40\x00\x00\x00" + b"x" * 63])
    def test_a_client_that_does_not_prove_the_secret_in_time_is_dropped_alone(
        self,
        address: Address,
        witness: Peer,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        speech: bytes,
    ) -> None:
        monkeypatch.setattr(server, "HANDSHAKE_TIMEOUT_S", 0.02)
        with Peer(address) as silent:
            silent.send(speech)
            silent.wait_for_end()

        assert [record.getMessage() for record in caplog.records] == [
            "closing a connection: no proof of the secret came in time"
        ]

    def test_a_client_that_proved_the_secret_may_be_silent_for_as_long_as_it_likes(
        self, running: RunningServer, address: Address, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(server, "HANDSHAKE_TIMEOUT_S", 0.02)
        with contextlib.ExitStack() as stack:
            trusted = stack.enter_context(self.in_time(running, address))
            silent = stack.enter_context(Peer(address))
            silent.wait_for_end()  # its time began after that of the other
            trusted.send(frame(b"hello"))

            assert trusted.receive() == b"hello"

    def in_time(self, running: RunningServer, address: Address) -> Peer:
        """A peer that proved the secret, however busy this machine is."""
        while True:
            peer = Peer(address)
            try:
                peer.shake_hands(running.secret)
            except ConnectionError:
                peer.socket.close()
            else:
                return peer


class TestRuleBreakers:
    @pytest.mark.parametrize("length", [MAX_HANDSHAKE_BYTES + 1, MAX_FRAME_BYTES, (1 << 32) - 1])
    def test_a_long_frame_before_the_proof_ends_that_connection_alone(
        self, peer: Peer, witness: Peer, caplog: pytest.LogCaptureFixture, length: int
    ) -> None:
        peer.send(length.to_bytes(4, "little") + b"x" * 1000)
        peer.wait_for_end()

        assert [record.getMessage() for record in caplog.records] == [
            f"closing a connection: a frame of {length:,} bytes; at most 128 are taken"
        ]

    def test_a_long_frame_after_the_proof_ends_that_connection_alone(
        self, running: RunningServer, peer: Peer, witness: Peer, caplog: pytest.LogCaptureFixture
    ) -> None:
        peer.shake_hands(running.secret)
        peer.send((MAX_FRAME_BYTES + 1).to_bytes(4, "little"))
        peer.wait_for_end()

        assert [record.getMessage() for record in caplog.records] == [
            "closing a connection: a frame of 67,108,865 bytes; at most 67,108,864 are taken"
        ]

    def test_a_frame_of_exactly_the_limit_is_answered(
        self, running: RunningServer, peer: Peer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(server, "MAX_FRAME_BYTES", 100_000)
        peer.shake_hands(running.secret)
        peer.send(frame(b"x" * 100_000))

        assert peer.receive() == b"x" * 100_000

    def test_a_malformed_request_ends_that_connection_alone_and_those_behind_it_are_not_handled(
        self, running: RunningServer, peer: Peer, witness: Peer, caplog: pytest.LogCaptureFixture
    ) -> None:
        def respond(body: bytes, _: Answer) -> bytes:
            if body == b"bad":
                raise MalformedRequest("no request")
            return frame(bytes(body))

        running.respond = respond
        peer.shake_hands(running.secret)
        peer.send(frame(b"good") + frame(b"bad") + frame(b"after"))
        peer.wait_for_end()

        assert running.requests == [b"good", b"bad"]
        assert [record.getMessage() for record in caplog.records] == ["closing a connection: no request"]

    def test_a_truncated_frame_is_not_handled(
        self, running: RunningServer, address: Address, witness: Peer
    ) -> None:
        with Peer(address) as leaving:
            leaving.shake_hands(running.secret)
            leaving.send(frame(b"request")[:-1])
        running.until(lambda: len(running.server.connections) == 1)

        assert running.requests == []

    def test_an_unexpected_error_ends_that_connection_alone(
        self, running: RunningServer, peer: Peer, witness: Peer
    ) -> None:
        def respond(body: bytes, _: Answer) -> bytes:
            if body == b"bad":
                raise LookupError("a bug")
            return frame(bytes(body))

        running.respond = respond
        peer.shake_hands(running.secret)
        peer.send(frame(b"bad"))
        peer.wait_for_end()

        assert [str(failure["exception"]) for failure in running.failures] == ["a bug"]
        running.failures.clear()

    def test_an_answer_for_a_client_that_is_gone_goes_nowhere(
        self, running: RunningServer, address: Address, witness: Peer
    ) -> None:
        answers: list[Answer] = []
        usual, running.respond = running.respond, lambda _, answer: answers.append(answer)
        with Peer(address) as leaving:
            leaving.shake_hands(running.secret)
            leaving.send(frame(b"request"))
            running.until(lambda: answers)
        running.until(lambda: len(running.server.connections) == 1)
        running.respond = usual

        running.call(lambda: answers[0](frame(b"too late")))

    def test_an_answer_for_a_client_that_broke_the_rules_meanwhile_goes_nowhere(
        self, running: RunningServer, peer: Peer, witness: Peer
    ) -> None:
        answers: list[Answer] = []
        usual, running.respond = running.respond, lambda _, answer: answers.append(answer)
        peer.shake_hands(running.secret)
        peer.send(frame(b"request") + b"\xff\xff\xff\xff")
        running.until(lambda: answers)
        running.call(lambda: answers[0](frame(b"too late")))
        running.respond = usual
        peer.wait_for_end()


class TestBackPressure:
    """A client that does not read its replies: what waits for it stays bounded, and nothing is lost."""

    REPLY = b"r" * 65_536
    ENDLESS = 2_000
    """Requests that no buffers of the system could hold."""

    def test_a_client_that_does_not_read_is_not_read_from(self, running: RunningServer, peer: Peer) -> None:
        peer.shake_hands(running.secret)
        sent = self.send_until_refused(running, peer)

        assert sent < self.ENDLESS
        assert running.call(running.transport.get_write_buffer_size) < 1 << 20

    def test_a_client_that_reads_again_gets_every_reply(self, running: RunningServer, peer: Peer) -> None:
        peer.shake_hands(running.secret)
        sent = self.send_until_refused(running, peer)

        assert [peer.receive() for _ in range(sent)] == [self.REPLY] * sent

    def test_others_are_answered_while_a_client_does_not_read(
        self, running: RunningServer, peer: Peer, witness: Peer
    ) -> None:
        peer.shake_hands(running.secret)
        self.send_until_refused(running, peer)
        witness.send(frame(b"hello"))

        assert witness.receive() == b"hello"

    def test_a_client_that_goes_without_having_read_leaves_nothing_behind(
        self, running: RunningServer, address: Address
    ) -> None:
        with Peer(address) as leaving:
            leaving.shake_hands(running.secret)
            self.send_until_refused(running, leaving)
        running.until(lambda: not running.server.connections)

    def test_small_requests_that_came_together_are_not_all_answered_to_a_client_that_does_not_read(
        self, running: RunningServer, peer: Peer
    ) -> None:
        running.respond = lambda _, __: frame(self.REPLY)
        peer.shake_hands(running.secret)
        peer.send(frame(b"?") * 1000)
        running.until(lambda: running.requests and not running.transport.is_reading())

        assert running.call(running.transport.get_write_buffer_size) < 1 << 20

    def test_a_client_that_reads_a_little_is_not_read_from_before_it_has_read_enough(
        self, running: RunningServer, peer: Peer
    ) -> None:
        running.respond = lambda _, __: frame(self.REPLY)
        peer.shake_hands(running.secret)
        peer.send(frame(b"?") * 1000)
        running.until(lambda: running.requests and not running.transport.is_reading())
        replies = [peer.receive() for _ in range(200)]
        sent = self.send_until_refused(running, peer)
        replies += [peer.receive() for _ in range(800 + sent)]

        assert sent < self.ENDLESS
        assert replies == [self.REPLY] * (1000 + sent)

    def send_until_refused(self, running: RunningServer, peer: Peer) -> int:
        """Send requests until the server does not read and the system's buffers are full; return how many."""
        sent = 0
        unsent = b""
        peer.socket.settimeout(0)
        while sent < self.ENDLESS:
            unsent = unsent or frame(self.REPLY)
            try:
                unsent = unsent[peer.socket.send(unsent) :]
            except BlockingIOError:
                if running.requests and not running.call(running.transport.is_reading):
                    break
                select.select([], [peer.socket], [], 0.01)
            else:
                sent += not unsent
        peer.socket.settimeout(DEADLINE_S)
        return sent


class TestTheEndOfAConnection:
    async def test_a_loop_is_told_once_that_its_connection_is_lost(
        self, running: RunningServer, loop_client: LoopClient
    ) -> None:
        running.call(running.server.close)
        async with asyncio.timeout(DEADLINE_S):
            await loop_client.lost.wait()
        await asyncio.sleep(0)

        assert loop_client.times_lost == 1

    async def test_a_loop_that_closes_its_connection_is_not_told(
        self, running: RunningServer, loop_client: LoopClient
    ) -> None:
        loop_client.connection.close()
        await asyncio.to_thread(running.until, lambda: not running.server.connections)

        assert loop_client.times_lost == 0

    async def test_what_a_loop_sends_after_the_end_goes_nowhere(
        self, running: RunningServer, loop_client: LoopClient
    ) -> None:
        loop_client.connection.close()
        await asyncio.to_thread(running.until, lambda: not running.server.connections)
        loop_client.connection.send(frame(b"too late"))

        assert running.requests == []

    async def test_a_loop_that_is_refused_is_not_told_that_it_lost_a_connection(
        self, running: RunningServer, address: Address
    ) -> None:
        refused = LoopClient()
        with pytest.raises((OSError, HandshakeFailed)):
            await refused.open(address, SECRET)
        await asyncio.to_thread(running.until, lambda: not running.server.connections)
        await asyncio.sleep(0)

        assert refused.times_lost == 0

    async def test_a_reply_too_long_ends_the_connection_of_a_loop(
        self, running: RunningServer, loop_client: LoopClient
    ) -> None:
        loop_client.connection.max_frame_bytes = 10
        loop_client.connection.send(frame(b"x" * 11))
        async with asyncio.timeout(DEADLINE_S):
            await loop_client.lost.wait()

        assert loop_client.replies.empty()

    def test_a_thread_learns_that_its_connection_is_lost(
        self, running: RunningServer, blocking_client: BlockingConnection
    ) -> None:
        running.call(running.server.close)

        with pytest.raises(OSError, match=r"closed|reset|[Bb]roken"):
            blocking_client.exchange(frame(b"hello"))

    def test_a_thread_gives_up_when_its_time_is_over(
        self, running: RunningServer, blocking_client: BlockingConnection
    ) -> None:
        running.respond = lambda _, __: None
        blocking_client.set_timeout(0.02)

        with pytest.raises(BlockingIOError):
            blocking_client.exchange(frame(b"hello"))

    @pytest.mark.parametrize(
        ("timeout_s", "seconds", "microseconds"),
        [(1e-9, 0, 1), (0.25, 0, 250_000), (1.5, 1, 500_000), (300.0, 300, 1)],
    )
    def test_no_timeout_of_a_thread_means_forever(
        self, blocking_client: BlockingConnection, timeout_s: float, seconds: int, microseconds: int
    ) -> None:
        blocking_client.set_timeout(timeout_s)

        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            value = struct.unpack("ll", blocking_client._socket.getsockopt(socket.SOL_SOCKET, option, 16))
            # The kernel counts in ticks of up to 10 ms, and rounds up.
            assert value > (0, 0)
            assert 0 <= (value[0] - seconds) * 1_000_000 + value[1] - microseconds <= 10_000

    def test_close_ends_every_connection_and_listens_no_more(
        self, running: RunningServer, address: Address
    ) -> None:
        with Peer(address) as trusted, Peer(address) as unproved:
            trusted.shake_hands(running.secret)
            unproved.receive()
            running.call(running.server.close)
            trusted.wait_for_end()
            unproved.wait_for_end()

        with pytest.raises(OSError, match=r"refused|No such file"), Peer(address):
            pass


@both_clients
async def test_a_client_of_another_version_hangs_up_and_is_not_taken_for_a_stranger(
    running: RunningServer, address: Address, open_client: OpenClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mismatch(_theirs: int) -> None:
        raise ProtocolMismatch("the actor speaks another version")

    monkeypatch.setattr(handshake, "check_protocol_version", mismatch)
    with pytest.raises(ProtocolMismatch):
        await open_client(address)
    await asyncio.to_thread(running.until, lambda: not running.server.connections)

    assert running.server._tally.connections_refused == 0


class TestTheUnixSocket:
    def test_only_its_owner_can_open_it(self, running: RunningServer) -> None:
        path = Path(running.run(running.server.listen_unix("shard")))

        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_ISSOCK(path.stat().st_mode)

    @pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o277, 0o777])
    def test_its_directory_is_its_owners_alone_whatever_the_umask(
        self, running: RunningServer, temporary: Path, umask: int
    ) -> None:
        old = os.umask(umask)
        try:
            path = Path(running.run(running.server.listen_unix("shard")))
        finally:
            os.umask(old)

        assert path.parent == temporary / f"fsm_ray-{os.getuid()}"
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert stat.S_IMODE(path.stat().st_mode) == 0o600

    @pytest.mark.parametrize("mode", [0o777, 0o755, 0o750, 0o710, 0o701, 0o720, 0o704])
    def test_a_directory_that_others_can_enter_is_refused(self, temporary: Path, mode: int) -> None:
        directory = temporary / f"fsm_ray-{os.getuid()}"
        directory.mkdir()
        directory.chmod(mode)

        with pytest.raises(ConfigurationError, match="chmod it 700"):
            socket_directory()

    @pytest.mark.parametrize("mode", [0o000, 0o500, 0o600, 0o300])
    def test_a_directory_that_its_owner_cannot_use_is_refused_before_it_is_tried(
        self, temporary: Path, mode: int
    ) -> None:
        directory = temporary / f"fsm_ray-{os.getuid()}"
        directory.mkdir()
        directory.chmod(mode)

        with pytest.raises(ConfigurationError, match="chmod it 700"):
            socket_directory()

    @pytest.mark.parametrize("where", ["gone", "a file"])
    def test_where_no_directory_can_be_made_the_error_names_the_cure(
        self, temporary: Path, monkeypatch: pytest.MonkeyPatch, where: str
    ) -> None:
        (temporary / "a file").touch()
        monkeypatch.setattr(tempfile, "tempdir", str(temporary / where))

        with pytest.raises(ConfigurationError, match="set TMPDIR"):
            socket_directory()

    def test_a_directory_of_somebody_else_is_refused(
        self, temporary: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        me = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: me + 1)

        with pytest.raises(ConfigurationError):
            socket_directory()

    def test_a_link_to_a_directory_is_refused(self, temporary: Path) -> None:
        (temporary / "elsewhere").mkdir(mode=0o700)
        (temporary / f"fsm_ray-{os.getuid()}").symlink_to(temporary / "elsewhere")

        with pytest.raises(ConfigurationError):
            socket_directory()

    def test_a_link_to_nowhere_is_refused(self, temporary: Path) -> None:
        (temporary / f"fsm_ray-{os.getuid()}").symlink_to(temporary / "nowhere")

        with pytest.raises(ConfigurationError):
            socket_directory()

    def test_a_file_in_the_place_of_the_directory_is_refused(self, temporary: Path) -> None:
        (temporary / f"fsm_ray-{os.getuid()}").touch(mode=0o600)

        with pytest.raises(ConfigurationError):
            socket_directory()

    def test_a_directory_that_is_there_already_is_used(self, temporary: Path) -> None:
        assert socket_directory() == socket_directory() == temporary / f"fsm_ray-{os.getuid()}"

    def test_a_path_of_107_bytes_is_short_enough(self, running: RunningServer) -> None:
        name = "x" * (MAX_UNIX_PATH_BYTES - len(f"{socket_directory()}/-123456"))
        address = running.run(running.server.listen_unix(name))

        assert len(address) == 107
        with Peer(address) as peer:
            peer.shake_hands(running.secret)

    @pytest.mark.parametrize("letter", ["x", "ä"])
    def test_a_longer_path_is_refused_with_the_cure(self, running: RunningServer, letter: str) -> None:
        room = MAX_UNIX_PATH_BYTES - len(f"{socket_directory()}/-123456")
        name = letter * (room // len(letter.encode()) + 1)

        with pytest.raises(ConfigurationError, match=r"107 bytes.*TMPDIR"):
            running.run(running.server.listen_unix(name))

        assert list(socket_directory().iterdir()) == []

    def test_a_socket_that_a_killed_server_left_is_removed_and_no_other(self, running: RunningServer) -> None:
        theirs, others = socket_directory() / "shard-123456", socket_directory() / "shard2-123456"
        for path in (theirs, others):
            with socket.socket(socket.AF_UNIX) as left:
                left.bind(str(path))
        address = running.run(running.server.listen_unix("shard"))

        assert set(socket_directory().iterdir()) == {Path(address), others}
        with Peer(address) as peer:
            peer.shake_hands(running.secret)

    @both_clients
    async def test_who_knew_the_server_before_finds_nobody_and_is_not_taken_for_a_stranger(
        self, running: RunningServer, open_client: OpenClient
    ) -> None:
        path = await asyncio.to_thread(running.run, running.server.listen_unix("shard"))
        running.call(running.server.close)
        tally = ShardTally()
        after = Server(running.server.handle, tally=tally)
        await asyncio.to_thread(running.run, after.listen_unix("shard"))
        try:
            with pytest.raises(FileNotFoundError):
                await open_client(path)
        finally:
            running.call(after.close)

        assert tally.connections_refused == 0

    def test_beginning_to_listen_leaves_the_modes_of_other_files_alone(self, running: RunningServer) -> None:
        async def listen_while_another_task_makes_a_directory() -> None:
            asyncio.get_running_loop().call_soon((socket_directory() / "of another task").mkdir)
            await running.server.listen_unix("shard")
            await asyncio.sleep(0)

        old = os.umask(0o022)
        try:
            running.run(listen_while_another_task_makes_a_directory())
        finally:
            os.umask(old)

        assert stat.S_IMODE((socket_directory() / "of another task").stat().st_mode) == 0o755

    def test_close_removes_it(self, running: RunningServer) -> None:
        path = Path(running.run(running.server.listen_unix("shard")))
        running.call(running.server.close)

        assert not path.exists()

    def test_close_leaves_the_socket_of_a_server_that_came_after_it(self, running: RunningServer) -> None:
        running.run(running.server.listen_unix("shard"))
        successor = Server(lambda body, _: frame(bytes(body)))
        address = running.run(successor.listen_unix("shard"))
        running.call(running.server.close)
        with contextlib.closing(BlockingConnection(address, successor.secret, DEADLINE_S)) as connection:
            answer = bytes(connection.exchange(frame(b"hello")))
        running.call(successor.close)

        assert answer == b"hello"
        assert list(socket_directory().iterdir()) == []

    def test_close_may_be_repeated(self, running: RunningServer) -> None:
        running.run(running.server.listen_unix("shard"))
        running.call(running.server.close)
        running.call(running.server.close)

        assert list(socket_directory().iterdir()) == []


class TestAddresses:
    ENDPOINT = Endpoint(BotOptions(), "here", "/socket", ("127.0.0.1", 80), SECRET)

    def test_on_its_own_node_the_socket_is_tried_first(self) -> None:
        assert list(addresses(self.ENDPOINT, "here")) == ["/socket", ("127.0.0.1", 80)]

    def test_from_another_node_the_socket_is_not_tried(self) -> None:
        assert list(addresses(self.ENDPOINT, "there")) == [("127.0.0.1", 80)]

    def test_from_another_node_there_is_no_way_before_one_asked(self) -> None:
        endpoint = Endpoint(BotOptions(), "here", "/socket", None, SECRET)

        assert list(addresses(endpoint, "there")) == []

    def test_tcp_listens_on_the_given_address_alone(self, running: RunningServer) -> None:
        host, port = running.run(running.server.listen_tcp("127.0.0.1"))

        (listener,) = running.server._listeners
        assert [each.getsockname() for each in listener.sockets] == [(host, port)] == [("127.0.0.1", port)]

    def test_both_are_listened_to_together(self, running: RunningServer) -> None:
        unix = running.run(running.server.listen_unix("shard"))
        tcp = running.run(running.server.listen_tcp("127.0.0.1"))

        for address in (unix, tcp):
            with contextlib.closing(BlockingConnection(address, running.secret, DEADLINE_S)) as connection:
                assert bytes(connection.exchange(frame(b"hello"))) == b"hello"


REQUEST = protocol.write_request(
    1,
    [
        protocol.update_data(b"\xa3ann", encode_data({"a": 1}, allow_pickle=False), 5),
        protocol.clear(b"", None),
    ],
    b"s" * 16,
    is_resend=False,
)
STREAMS = st.one_of(
    st.binary(max_size=300),
    st.builds(frame, st.binary(max_size=100)),
    st.lists(st.binary(max_size=100), max_size=4).map(lambda bodies: b"".join(map(frame, bodies))),
    st.builds(
        lambda position, byte: REQUEST[:position] + bytes([byte]) + REQUEST[position + 1 :],
        st.integers(0, len(REQUEST) - 1),
        st.integers(0, 255),
    ),
    st.integers(0, len(REQUEST)).map(lambda end: REQUEST[:end]),
)


class TestFuzz:
    """Whatever anybody sends to the server of a real namespace, nobody else notices, and nothing is left."""

    @pytest.fixture
    def _namespace(self, running: RunningServer) -> None:
        store = MemoryStore()
        namespace = Namespace("my_bot", BotOptions(), store, running.run(store.open()))
        running.respond = namespace.handle

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
    @given(is_trusted=st.booleans(), stream=STREAMS)
    @example(is_trusted=True, stream=REQUEST)
    @pytest.mark.usefixtures("_namespace")
    def test_random_bytes_harm_no_other_connection_and_leave_none_behind(
        self,
        running: RunningServer,
        address: Address,
        is_trusted: bool,  # noqa: FBT001
        stream: bytes,
    ) -> None:
        read = protocol.read_request(protocol.READ_RECORD, 7, [protocol.read(b"\xa3bob")])
        with contextlib.closing(BlockingConnection(address, running.secret, DEADLINE_S)) as other:
            with Peer(address) as peer:
                if is_trusted:
                    peer.shake_hands(running.secret)
                peer.send(stream)
                with contextlib.suppress(OSError):
                    peer.socket.shutdown(socket.SHUT_WR)
                peer.wait_for_end()
            running.until(lambda: len(running.server.connections) == 1)

            assert bytes(other.exchange(read)) == protocol.reply(protocol.READ_RECORD, 7, [protocol.NIL])[4:]
        running.until(lambda: not running.server.connections)
        assert running.failures == []
