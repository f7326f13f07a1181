"""The doors of the channel, each tried from outside: proofs, TLS, other users, and who would fill memory."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import subprocess
import sys
import tempfile
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fsm_ray.channel import client, handshake, intake, outflow, server, tls
from fsm_ray.channel.client import Address, open_blocking
from fsm_ray.channel.handshake import HandshakeFailed
from fsm_ray.channel.intake import Intake
from fsm_ray.channel.outflow import PATIENCE_S, Outflow
from fsm_ray.channel.pacing import PacedTransport
from fsm_ray.channel.server import ServerConnection, socket_directory
from fsm_ray.errors import ConfigurationError
from fsm_ray.protocol import PROTOCOL_VERSION, frame

from .certificates import Authority
from .test_channel import DEADLINE_S, LOOPS, SECRET, LoopClient, Peer, RunningServer, listener_that
from .test_lanes import FakeClock

NOBODY = 65_534
REFUSED = (OSError, HandshakeFailed)

CHUNK = 256 << 10
"""What a loop takes from a socket at once, at most."""


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
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
def authority(temporary: Path) -> Authority:
    return Authority(temporary / "authority")


@contextlib.contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """This process as one with these variables."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield


async def ask_by_loop(address: Address, secret: bytes, body: bytes = b"hello") -> bytes:
    loop_client = LoopClient()
    await loop_client.open(address, secret)
    try:
        return await loop_client.exchange(body)
    finally:
        loop_client.connection.close()
        await asyncio.sleep(0)


async def ask_by_blocking(address: Address, secret: bytes, body: bytes = b"hello") -> bytes:
    def ask() -> bytes:
        with contextlib.closing(open_blocking(address, secret, DEADLINE_S)) as connection:
            return bytes(connection.exchange(frame(body)))

    return await asyncio.to_thread(ask)


both_clients = pytest.mark.parametrize("ask", [ask_by_loop, ask_by_blocking])


class TestKeepalive:
    """A node that lost power is found out by the systems of those that it was connected with."""

    @pytest.mark.parametrize("is_tls", [False, True])
    async def test_both_ends_of_a_connection_between_nodes_ask_after_each_other(
        self,
        running: RunningServer,
        authority: Authority,
        is_tls: bool,  # noqa: FBT001
    ) -> None:
        with environment(authority.environment("node") if is_tls else {}):
            address = await asyncio.to_thread(running.run, running.server.listen_tcp("127.0.0.1"))
            by_loop = LoopClient()
            await by_loop.open(address, running.secret)
            with contextlib.closing(open_blocking(address, running.secret, DEADLINE_S)) as blocking:
                transports = [
                    by_loop.connection._transport,
                    *(each._transport for each in running.server.connections),
                ]
                sockets = [_socket_of(each) for each in transports]

                assert [minutes_until_it_is_ended(each) for each in (*sockets, blocking._socket)] == [1.0] * 4
        by_loop.connection.close()
        await asyncio.to_thread(running.until, lambda: not running.server.connections)


def _socket_of(transport: asyncio.Transport | None) -> socket.socket:
    assert transport is not None
    secured = transport._secured if isinstance(transport, PacedTransport) else transport
    found: socket.socket = secured.get_extra_info("socket")
    return found


def minutes_until_it_is_ended(connection: socket.socket) -> float:
    """How long the system keeps a connection of whose peer nothing is heard."""
    assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    idle_s, interval_s, probes = (
        connection.getsockopt(socket.IPPROTO_TCP, option)
        for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
    )
    return (idle_s + interval_s * probes) / 60


class TestProofs:
    @pytest.mark.parametrize("claimed", [handshake.UNIX, handshake.TCP, tls.transport_of(b"any")])
    def test_a_proof_for_another_transport_is_refused(
        self, running: RunningServer, address: Address, claimed: bytes
    ) -> None:
        with Peer(address) as peer:
            is_true, peer.transport = claimed == peer.transport, claimed
            if is_true:
                peer.shake_hands(running.secret)
                return
            with pytest.raises(ConnectionError):
                peer.shake_hands(running.secret)

        assert running.requests == []

    def test_whoever_changes_the_version_under_way_spoils_the_proof(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        older = PROTOCOL_VERSION - 1
        challenge = handshake.challenge()
        changed = challenge.replace(PROTOCOL_VERSION.to_bytes(2, "big"), older.to_bytes(2, "big"), 1)
        with monkeypatch.context() as as_an_older_client:
            as_an_older_client.setattr(handshake, "PROTOCOL_VERSION", older)
            response, _ = handshake.respond(SECRET, changed, handshake.TCP)

        with pytest.raises(HandshakeFailed):
            handshake.verify(SECRET, challenge, response, handshake.TCP)

    @pytest.mark.parametrize("change", [-32, -1, 1, 32])
    def test_a_challenge_of_another_length_is_refused(self, change: int) -> None:
        challenge = handshake.challenge()
        changed = challenge[:change] if change < 0 else challenge + b"\x00" * change

        with pytest.raises(HandshakeFailed):
            handshake.respond(SECRET, changed, handshake.TCP)

    @both_clients
    async def test_a_server_that_replays_a_whole_handshake_is_refused(
        self, temporary: Path, ask: Callable[..., object]
    ) -> None:
        challenge = handshake.challenge()
        overheard, _ = handshake.respond(SECRET, challenge, handshake.UNIX)
        proof = handshake.verify(SECRET, challenge, overheard, handshake.UNIX)

        def script(connected: socket.socket) -> None:
            connected.sendall(frame(challenge))
            connected.recv(1000)
            connected.sendall(frame(proof))
            connected.recv(1000)

        async with listener_that(script, temporary) as address:
            with pytest.raises(HandshakeFailed, match="secret"):
                await ask(address, SECRET)  # type: ignore[misc]

    @both_clients
    async def test_a_server_that_sends_byte_by_byte_is_given_up_in_time(
        self, temporary: Path, ask: Callable[..., object], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(client, "CONNECT_TIMEOUT_S", 0.1)
        monkeypatch.setattr(client, "HANDSHAKE_TIMEOUT_S", 0.1)
        gone = threading.Event()

        def script(connected: socket.socket) -> None:
            for byte in frame(handshake.challenge()) * 1_000:
                connected.sendall(bytes([byte]))
                if gone.wait(0.01):
                    return

        async with listener_that(script, temporary) as address:
            with pytest.raises(TimeoutError):
                await ask(address, SECRET)  # type: ignore[misc]
            gone.set()


class TestStrangers:
    def test_past_the_bound_the_oldest_connection_that_proved_nothing_gives_way(
        self, running: RunningServer, address: Address, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(server, "MAX_UNPROVED", 3)
        with contextlib.ExitStack() as stack:
            trusted = stack.enter_context(Peer(address))
            trusted.shake_hands(running.secret)
            strangers = [stack.enter_context(Peer(address)) for _ in range(3)]
            for stranger in strangers:
                stranger.receive()
            honest = stack.enter_context(Peer(address))
            honest.shake_hands(running.secret)
            strangers[0].wait_for_end()

            for peer in (honest, trusted):
                peer.send(frame(b"hello"))
                assert peer.receive() == b"hello"
            for stranger in strangers[1:]:
                stranger.send(frame(b"no proof"))
                stranger.wait_for_end()
        running.until(lambda: not running.server._unproved and not running.server.connections)

    def test_strangers_who_come_and_go_cause_one_line_in_the_log(
        self,
        running: RunningServer,
        address: Address,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        monkeypatch.setattr(server, "MAX_UNPROVED", 1)
        for _ in range(20):
            with Peer(address) as stranger, Peer(address) as next_one:
                stranger.wait_for_end()
                next_one.receive()
        running.until(lambda: not running.server.connections)

        assert len(caplog.records) == 1

    def test_past_the_bound_of_clients_a_further_one_is_closed_until_one_leaves(
        self, running: RunningServer, address: Address, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(server, "MAX_CONNECTIONS", 2)
        with Peer(address) as one, Peer(address) as two:
            one.shake_hands(running.secret)
            two.shake_hands(running.secret)
            with Peer(address) as third, pytest.raises(ConnectionError):
                third.shake_hands(running.secret)
        running.until(lambda: not running.server.connections)

        with Peer(address) as fourth:
            fourth.shake_hands(running.secret)

    def test_what_a_stranger_sends_does_not_pile_up(self, running: RunningServer, address: Address) -> None:
        with Peer(address) as stranger:
            stranger.receive()
            stranger.send((128).to_bytes(4, "little") + b"x" * 127)
            running.until(lambda: any(each._partial for each in running.server.connections))
            (connection,) = running.server.connections

            assert len(connection._partial) == 131
            stranger.send(b"x" * 100_000)
            stranger.wait_for_end()

    @pytest.mark.parametrize("length", [0, 64, 128])
    def test_a_stranger_who_sends_many_proofs_at_once_has_one_of_them_looked_at(
        self, running: RunningServer, address: Address, monkeypatch: pytest.MonkeyPatch, length: int
    ) -> None:
        looked_at: list[bytes] = []

        def verify(secret: bytes, challenge: bytes, response: bytes, transport: bytes) -> bytes:
            looked_at.append(response)
            return really_verify(secret, challenge, response, transport)

        really_verify = handshake.verify
        monkeypatch.setattr(handshake, "verify", verify)
        with Peer(address) as stranger:
            stranger.receive()
            stranger.send(frame(bytes(length)) * (CHUNK // (4 + length)))
            stranger.wait_for_end()

        assert looked_at == [bytes(length)]

    def test_for_whom_there_is_no_room_nothing_is_done_that_came_with_its_proof(
        self, running: RunningServer, address: Address, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(server, "MAX_CONNECTIONS", 0)
        with Peer(address) as peer:
            response, _ = handshake.respond(running.secret, peer.receive(), peer.transport)
            peer.send(frame(response) + frame(b"request") * 100)
            peer.wait_for_end()

        assert running.server._tally.connections_refused == 1
        assert running.requests == []


class OverTlsToo:
    """Tests of peers that proved the secret, over TLS as well."""

    @pytest.fixture(params=["unix", "tcp", "tls"])
    def address(
        self,
        request: pytest.FixtureRequest,
        running: RunningServer,
        authority: Authority,
        monkeypatch: pytest.MonkeyPatch,
    ) -> Address:
        if request.param == "unix":
            return running.run(running.server.listen_unix("shard"))
        if request.param == "tls":
            for name, value in authority.environment("node").items():
                monkeypatch.setenv(name, value)
        return running.run(running.server.listen_tcp("127.0.0.1"))


class FakeSender:
    """Notes what the intake tells it."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def wait_for_room(self) -> None:
        self.told.append("wait")

    def has_room(self) -> None:
        self.told.append("read on")

    def malformed(self, error: Exception) -> None:
        self.told.append(str(error))


class TestIntake:
    @pytest.fixture
    def intake(self, monkeypatch: pytest.MonkeyPatch) -> Intake:
        monkeypatch.setattr(intake, "MAX_BYTES", 1_000)
        monkeypatch.setattr(intake, "SMALL_BYTES", 10)
        return Intake()

    async def test_a_frame_without_room_waits_for_those_that_came_before(self, intake: Intake) -> None:
        one, two, three, four = (FakeSender() for _ in range(4))
        intake.begun(one, 600)
        intake.begun(two, 600)
        intake.begun(three, 300)
        intake.begun(four, 500)

        assert [each.told for each in (one, two, three, four)] == [[], ["wait"], ["wait"], ["wait"]]
        intake.ended(one)
        assert [each.told[1:] for each in (two, three, four)] == [["read on"], ["read on"], []]
        intake.ended(two)
        assert four.told == ["wait", "read on"]

    async def test_room_is_taken_once_and_given_back_once(self, intake: Intake) -> None:
        sender = FakeSender()
        for _ in range(3):
            intake.begun(sender, 700)
        assert intake.bytes == 700

        for _ in range(3):
            intake.ended(sender)
        assert intake.bytes == 0

    async def test_who_leaves_while_it_waits_lets_others_pass(self, intake: Intake) -> None:
        one, two, three = (FakeSender() for _ in range(3))
        intake.begun(one, 600)
        intake.begun(two, 900)
        intake.begun(three, 300)
        intake.ended(two)

        assert three.told == ["wait", "read on"]
        assert intake.bytes == 900

    async def test_a_small_frame_never_waits(self, intake: Intake) -> None:
        one, two, small = (FakeSender() for _ in range(3))
        intake.begun(one, 1_000)
        intake.begun(two, 1_000)
        intake.begun(small, 10)

        assert small.told == []
        assert intake.bytes == 1_000

    async def test_a_frame_that_is_not_finished_in_time_gives_its_room_away(
        self, intake: Intake, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("fsm_ray.channel.intake.FRAME_TIMEOUT_S", 0.02)
        slow, small, next_one = (FakeSender() for _ in range(3))
        intake.begun(slow, 1_000)
        intake.begun(small, 10)
        intake.begun(next_one, 1_000)
        async with asyncio.timeout(DEADLINE_S):
            while len(next_one.told) < 3:  # noqa: ASYNC110  # of what is no event
                await asyncio.sleep(0)

        late = "a frame was not complete within 0 s"
        assert [slow.told, small.told, next_one.told] == [[late], [late], ["wait", "read on", late]]
        assert intake.bytes == 0


class TestSlowSenders(OverTlsToo):
    """Clients that prove the secret, and then send large frames, byte by byte or never to the end."""

    LENGTH = 1 << 20

    @pytest.fixture(autouse=True)
    def _room_for_two(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(intake, "MAX_BYTES", 2 * self.LENGTH)

    def unfinished(self, running: RunningServer, address: Address, count: int) -> list[Peer]:
        """Peers that have sent the first half of a large frame, as far as it is taken."""
        peers = [Peer(address) for _ in range(count)]
        for peer in peers:
            peer.shake_hands(running.secret)
        for peer in peers:
            peer.socket.settimeout(0.2)
            with contextlib.suppress(TimeoutError):
                peer.socket.sendall(frame(b"x" * self.LENGTH)[: self.LENGTH // 2])
            peer.socket.settimeout(DEADLINE_S)
        return peers

    def received(self, running: RunningServer) -> int:
        return running.call(lambda: sum(len(each._partial) for each in running.server.connections))

    def test_what_was_received_of_unfinished_frames_is_bounded_over_all_connections(
        self, running: RunningServer, address: Address
    ) -> None:
        with contextlib.ExitStack() as stack:
            for peer in self.unfinished(running, address, 12):
                stack.enter_context(peer)
            witness = stack.enter_context(Peer(address))
            witness.shake_hands(running.secret)
            witness.send(frame(b"small"))

            assert witness.receive() == b"small"
            assert running.call(lambda: running.server.intake.bytes) == 2 * self.LENGTH
            assert self.received(running) <= self.LENGTH + 10 * CHUNK

        running.until(lambda: not running.server.connections)
        assert running.server.intake.bytes == 0

    def test_frames_that_had_to_wait_are_answered_when_others_are_finished(
        self, running: RunningServer, address: Address
    ) -> None:
        body = b"y" * self.LENGTH

        def exchange() -> None:
            with contextlib.closing(open_blocking(address, running.secret, DEADLINE_S)) as connection:
                answered.extend(bytes(connection.exchange(frame(body))) == body for _ in range(3))

        answered: list[bool] = []
        threads = [threading.Thread(target=exchange) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE_S)

        assert answered == [True] * 24
        assert running.call(lambda: running.server.intake.bytes) == 0

    def test_a_sender_that_never_finishes_is_dropped_and_others_get_its_room(
        self,
        running: RunningServer,
        address: Address,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        monkeypatch.setattr(intake, "FRAME_TIMEOUT_S", 0.3)
        with contextlib.ExitStack() as stack:
            for peer in self.unfinished(running, address, 2):
                stack.enter_context(peer)
            with contextlib.closing(open_blocking(address, running.secret, DEADLINE_S)) as honest:
                body = b"z" * self.LENGTH

                assert bytes(honest.exchange(frame(body))) == body
            running.until(lambda: not running.server.connections)

        assert {record.getMessage() for record in caplog.records} == {
            "closing a connection: a frame was not complete within 0 s"
        }

    def test_a_frame_that_comes_byte_by_byte_is_dropped_in_time(
        self, running: RunningServer, address: Address, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(intake, "FRAME_TIMEOUT_S", 0.1)
        with Peer(address) as slow:
            slow.shake_hands(running.secret)
            with contextlib.suppress(OSError):
                for byte in frame(b"x" * 1_000):
                    slow.socket.sendall(bytes([byte]))
                    running.call(lambda: None)
                    if not running.call(lambda: running.server.connections):
                        break
                    threading.Event().wait(0.005)
            slow.wait_for_end()

        assert running.requests == []

    def test_time_counts_for_each_frame_alone(
        self, running: RunningServer, address: Address, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with Peer(address) as peer:
            peer.shake_hands(running.secret)
            for number in range(5):
                one = frame(b"%d" % number)
                # The end of one, and the beginning of the next.
                peer.send(one[2:] + one[:2] if number else one + frame(b"1")[:2])
                assert peer.receive() == b"%d" % number
                running.until(lambda: len(running.server.intake._begun) == 1)
        running.until(lambda: not running.server.intake._begun)


class FakeReader:
    """A client for which so much waits; notes why it is closed."""

    def __init__(self, unsent_bytes: int) -> None:
        self.unsent_bytes = unsent_bytes
        self.errors: list[str] = []

    def malformed(self, error: Exception) -> None:
        self.errors.append(str(error))


class TestOutflow:
    @pytest.fixture
    async def clock(self, monkeypatch: pytest.MonkeyPatch) -> FakeClock:
        clock = FakeClock()
        monkeypatch.setattr(asyncio.get_running_loop(), "time", clock)
        return clock

    @pytest.fixture
    def outflow(self, clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> Outflow:
        monkeypatch.setattr(outflow, "MAX_BYTES", 1_000)
        return Outflow()

    def slow(self, outflow: Outflow, *unsent_bytes: int) -> list[FakeReader]:
        readers = [FakeReader(each) for each in unsent_bytes]
        for reader in readers:
            outflow.begun(reader)
        return readers

    async def test_up_to_the_bound_nobody_is_closed(self, outflow: Outflow, clock: FakeClock) -> None:
        readers = self.slow(outflow, 600, 400)
        await clock.advance(10 * PATIENCE_S)

        assert [each.errors for each in readers] == [[], []]

    async def test_past_it_those_with_most_who_take_nothing_are_closed_until_the_rest_fits(
        self, outflow: Outflow, clock: FakeClock
    ) -> None:
        readers = self.slow(outflow, 300, 600, 500, 400)
        await clock.advance(PATIENCE_S - 0.1)
        before = [len(each.errors) for each in readers]
        await clock.advance(0.1)

        assert before == [0, 0, 0, 0]
        assert [each.errors for each in readers] == [
            [],
            ["it does not read its replies: 600 bytes wait"],
            ["it does not read its replies: 500 bytes wait"],
            [],
        ]

    async def test_who_takes_something_is_not_closed_though_it_has_most(
        self, outflow: Outflow, clock: FakeClock
    ) -> None:
        stuck, reading = self.slow(outflow, 500, 5_000)
        reading.unsent_bytes -= 1
        await clock.advance(PATIENCE_S)

        assert [len(each.errors) for each in (reading, stuck)] == [0, 1]

    async def test_who_stops_reading_later_is_closed_then(self, outflow: Outflow, clock: FakeClock) -> None:
        other, one = self.slow(outflow, 500, 5_000)
        for _ in range(3):
            one.unsent_bytes -= 1
            other.unsent_bytes -= 1
            await clock.advance(PATIENCE_S)
        so_far = [*one.errors, *other.errors]
        await clock.advance(PATIENCE_S)

        assert so_far == []
        assert [len(each.errors) for each in (one, other)] == [1, 0]

    async def test_the_only_slow_one_is_not_closed_for_nobody_needs_the_room(
        self, outflow: Outflow, clock: FakeClock
    ) -> None:
        (only,) = self.slow(outflow, 5_000)
        await clock.advance(3 * PATIENCE_S)
        assert only.errors == []

        self.slow(outflow, 1)
        await clock.advance(PATIENCE_S)
        await clock.advance(PATIENCE_S)
        assert len(only.errors) == 1

    async def test_what_is_added_does_not_hide_that_a_client_reads(
        self, outflow: Outflow, clock: FakeClock
    ) -> None:
        stuck, reading = self.slow(outflow, 10, 2_000)
        reading.unsent_bytes += 500 - 1
        outflow.added(reading, 500)
        stuck.unsent_bytes += 5
        outflow.added(stuck, 5)
        await clock.advance(PATIENCE_S)

        assert [len(each.errors) for each in (reading, stuck)] == [0, 1]

    async def test_who_has_just_become_slow_gets_as_much_time_as_others(
        self, outflow: Outflow, clock: FakeClock
    ) -> None:
        one, other = self.slow(outflow, 500, 2_000)
        await clock.advance(PATIENCE_S - 0.1)
        one.unsent_bytes, other.unsent_bytes = 490, 1_990
        (late,) = self.slow(outflow, 3_000)
        await clock.advance(0.1)

        assert [each.errors for each in (one, other, late)] == [[], [], []]

    async def test_who_has_read_enough_or_is_gone_counts_no_more(
        self, outflow: Outflow, clock: FakeClock
    ) -> None:
        readers = self.slow(outflow, 900, 800, 100)
        outflow.ended(readers[1])
        outflow.added(readers[1], 5_000)
        await clock.advance(PATIENCE_S)

        assert [each.errors for each in readers] == [[], [], []]


class TestSlowReaders(OverTlsToo):
    REPLY = b"r" * (1 << 20)

    @pytest.fixture(autouse=True)
    def _bound(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(outflow, "MAX_BYTES", 16 << 20)

    def reply_to(self, running: RunningServer, peer: Peer, count: int) -> ServerConnection:
        """Have so many replies written to this peer at once; return its connection."""
        answers: list[Callable[[bytes], None]] = []
        running.respond = lambda _, answer: answers.append(answer)
        peer.shake_hands(running.secret)
        peer.send(frame(b"?"))
        running.until(lambda: answers)
        running.call(lambda: [answers[0](frame(self.REPLY)) for _ in range(count)])
        connection: ServerConnection = answers[0].__self__  # type: ignore[attr-defined]
        return connection

    def test_past_the_bound_the_client_with_most_unread_is_closed_alone(
        self, running: RunningServer, address: Address, caplog: pytest.LogCaptureFixture
    ) -> None:
        with Peer(address) as lesser, Peer(address) as worst:
            self.reply_to(running, lesser, 12)
            self.reply_to(running, worst, 20)
            running.call(running.server.outflow._look)
            running.until(lambda: len(running.server.connections) == 1)

            assert [lesser.receive() for _ in range(12)] == [self.REPLY] * 12
        (line,) = [record.getMessage() for record in caplog.records]
        assert "does not read its replies" in line

    def test_a_client_that_reads_gets_what_is_past_the_bound_and_who_does_not_gives_way(
        self, running: RunningServer, address: Address
    ) -> None:
        with Peer(address) as stuck, Peer(address) as reading:
            self.reply_to(running, stuck, 12)
            connection = self.reply_to(running, reading, 48)
            before = running.call(lambda: connection.unsent_bytes)
            replies = [reading.receive() for _ in range(12)]
            running.until(lambda: connection.unsent_bytes < before)
            running.call(running.server.outflow._look)
            running.until(lambda: running.server.connections == {connection})
            replies += [reading.receive() for _ in range(36)]

        assert replies == [self.REPLY] * 48

    def test_of_a_reply_that_nobody_reads_all_but_a_little_is_known_to_wait(
        self, running: RunningServer, address: Address
    ) -> None:
        length = 64 << 20
        running.respond = lambda _, __: frame(b"r" * length)
        with Peer(address) as peer:
            peer.shake_hands(running.secret)
            peer.send(frame(b"?"))
            running.until(lambda: running.requests)
            (connection,) = running.server.connections

            assert connection.unsent_bytes > length * 3 // 4
            assert connection._is_held

    def test_of_requests_that_came_together_few_are_answered_to_a_client_that_does_not_read(
        self, running: RunningServer, address: Address
    ) -> None:
        running.respond = lambda _, __: frame(self.REPLY)
        with Peer(address) as peer:
            peer.shake_hands(running.secret)
            peer.send(frame(b"?") * 100)
            (connection,) = running.server.connections
            running.until(lambda: connection._is_held)

            assert running.call(lambda: connection.unsent_bytes) < 2 * len(self.REPLY)
            assert [peer.receive() for _ in range(100)] == [self.REPLY] * 100


needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")


@needs_root
class TestAnotherUser:
    """Another user of the same node, with the same directory for temporary files."""

    @pytest.fixture(autouse=True)
    def _shared(self, temporary: Path) -> None:
        temporary.chmod(0o1777)

    @contextlib.contextmanager
    def somebody_else(self, script: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        """A process of another user that runs this."""
        code = f"import os, socket, sys\nos.setgid({NOBODY}); os.setuid({NOBODY})\n" + textwrap.dedent(script)
        with subprocess.Popen(
            [sys.executable, "-S", "-c", code, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            yield process
            process.communicate(timeout=DEADLINE_S)

    @both_clients
    async def test_a_socket_on_which_somebody_else_listens_gets_nothing(
        self, temporary: Path, ask: Callable[..., object]
    ) -> None:
        script = """
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(sys.argv[1])
                os.chmod(sys.argv[1], 0o777)
                listener.listen()
                print("ready", flush=True)
                connected, _ = listener.accept()
                print(len(connected.recv(1000)), flush=True)
        """
        with self.somebody_else(script, str(temporary / "trap")) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            with pytest.raises(HandshakeFailed, match=f"user {NOBODY} listens"):
                await ask(str(temporary / "trap"), SECRET)  # type: ignore[misc]

            assert process.stdout.readline() == "0\n"

    def test_somebody_else_cannot_connect(self, running: RunningServer) -> None:
        address = running.run(running.server.listen_unix("shard"))
        script = """
            try:
                socket.socket(socket.AF_UNIX).connect(sys.argv[1])
            except OSError as error:
                print(type(error).__name__, flush=True)
        """
        with self.somebody_else(script, address) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "PermissionError\n"

        assert running.call(lambda: len(running.server.connections)) == 0

    def test_a_directory_that_somebody_else_made_first_is_refused_with_the_cure(
        self, temporary: Path
    ) -> None:
        squatted = temporary / f"fsm_ray-{os.getuid()}"
        with self.somebody_else(
            "os.mkdir(sys.argv[1], 0o700); print('made', flush=True)", str(squatted)
        ) as p:
            assert p.stdout is not None
            assert p.stdout.readline() == "made\n"

        with pytest.raises(ConfigurationError, match="set TMPDIR to a directory of your own"):
            socket_directory()


class TestTls:
    @pytest.fixture
    def mine(self, authority: Authority) -> dict[str, str]:
        return authority.environment("node")

    @pytest.fixture
    def address(self, running: RunningServer, mine: dict[str, str]) -> Address:
        """Of a server with TLS; the test itself is back in an environment without."""
        with environment(mine):
            return running.run(running.server.listen_tcp("127.0.0.1"))

    @both_clients
    @pytest.mark.parametrize("size", [0, 5, 16_384, 65_536, 3 << 20])
    async def test_frames_travel(
        self,
        running: RunningServer,
        address: Address,
        mine: dict[str, str],
        ask: Callable[..., object],
        size: int,
    ) -> None:
        with environment(mine):
            assert await ask(address, running.secret, b"x" * size) == b"x" * size  # type: ignore[misc]

        await asyncio.to_thread(running.until, lambda: not running.server.connections)
        assert running.server._unproved == {}

    @both_clients
    async def test_a_certificate_of_another_node_is_as_good(
        self, running: RunningServer, address: Address, authority: Authority, ask: Callable[..., object]
    ) -> None:
        with environment(authority.environment("other")):
            assert await ask(address, running.secret) == b"hello"  # type: ignore[misc]

    @both_clients
    async def test_the_socket_of_a_node_goes_without(
        self, running: RunningServer, mine: dict[str, str], ask: Callable[..., object]
    ) -> None:
        with environment(mine):
            path = await asyncio.to_thread(running.run, running.server.listen_unix("shard"))
            assert await ask(path, running.secret) == b"hello"  # type: ignore[misc]

    @both_clients
    async def test_a_client_without_tls_is_refused(
        self,
        running: RunningServer,
        address: Address,
        ask: Callable[..., object],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(server, "HANDSHAKE_TIMEOUT_S", 0.05)
        with pytest.raises(REFUSED):
            await ask(address, running.secret)  # type: ignore[misc]

        assert running.requests == []

    @both_clients
    async def test_a_client_with_tls_refuses_a_server_without(
        self,
        running: RunningServer,
        mine: dict[str, str],
        ask: Callable[..., object],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(client, "CONNECT_TIMEOUT_S", 0.5)
        plain = await asyncio.to_thread(running.run, running.server.listen_tcp("127.0.0.1"))
        with environment(mine), pytest.raises(REFUSED):
            await ask(plain, running.secret)  # type: ignore[misc]

        assert running.requests == []

    @both_clients
    async def test_a_client_whose_certificate_another_authority_signed_is_refused(
        self,
        running: RunningServer,
        address: Address,
        mine: dict[str, str],
        temporary: Path,
        ask: Callable[..., object],
    ) -> None:
        foreign = Authority(temporary / "foreign").environment("stranger")
        with environment({**foreign, "RAY_TLS_CA_CERT": mine["RAY_TLS_CA_CERT"]}), pytest.raises(REFUSED):
            await ask(address, running.secret)  # type: ignore[misc]

        assert running.requests == []

    @both_clients
    async def test_a_server_whose_certificate_another_authority_signed_is_refused(
        self,
        running: RunningServer,
        address: Address,
        mine: dict[str, str],
        temporary: Path,
        ask: Callable[..., object],
    ) -> None:
        foreign = Authority(temporary / "foreign").environment("stranger")
        trusting_others = {**mine, "RAY_TLS_CA_CERT": foreign["RAY_TLS_CA_CERT"]}
        with environment(trusting_others), pytest.raises(ssl.SSLCertVerificationError):
            await ask(address, running.secret)  # type: ignore[misc]

    def test_a_client_without_a_certificate_is_refused(
        self, running: RunningServer, address: Address, mine: dict[str, str]
    ) -> None:
        context = ssl.create_default_context(cafile=mine["RAY_TLS_CA_CERT"])
        context.check_hostname = False
        with Peer(address) as peer:
            # By TLS 1.3, a client learns what became of its certificate with the first bytes.
            peer.socket = context.wrap_socket(peer.socket)
            with pytest.raises(OSError, match=r"certificate required|reset|closed|EOF"):
                peer.receive()

        assert running.requests == []

    def test_older_versions_of_tls_are_refused(
        self, running: RunningServer, address: Address, mine: dict[str, str]
    ) -> None:
        with environment(mine):
            context = tls.client_context()
        context.set_ciphers("ALL:@SECLEVEL=0")
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            context.minimum_version = ssl.TLSVersion.TLSv1
            context.maximum_version = ssl.TLSVersion.TLSv1_1
        with Peer(address) as peer, pytest.raises(OSError, match=r"(?i)version|reset|EOF"):
            context.wrap_socket(peer.socket)

    @both_clients
    async def test_who_stands_between_with_another_certificate_of_the_authority_is_found_out(
        self, running: RunningServer, address: Address, authority: Authority, ask: Callable[..., object]
    ) -> None:
        between = authority.environment("between")
        with environment(between):
            listening, _ = tls.server_context()
            asking = tls.client_context()

        async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            assert isinstance(address, tuple)
            far_reader, far_writer = await asyncio.open_connection(*address, ssl=asking)
            try:
                await asyncio.gather(_pump(reader, far_writer), _pump(far_reader, writer))
            finally:
                for each in (writer, far_writer):
                    each.transport.abort()

        async with await asyncio.start_server(relay, "127.0.0.1", 0, ssl=listening) as relaying:
            with environment(between), pytest.raises(REFUSED):
                await ask(relaying.sockets[0].getsockname(), running.secret)  # type: ignore[misc]

        assert running.requests == []

    def test_whoever_never_begins_with_tls_counts_as_a_stranger(
        self, running: RunningServer, address: Address, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(server, "MAX_UNPROVED", 2)
        with Peer(address) as first, Peer(address), Peer(address):
            first.wait_for_end()
            running.until(lambda: len(running.server._unproved) == 2)
        running.until(lambda: not running.server._unproved)

    def test_whoever_does_not_go_on_with_tls_is_dropped(
        self, running: RunningServer, address: Address, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(server, "HANDSHAKE_TIMEOUT_S", 0.05)
        with Peer(address) as silent:
            silent.send(b"\x16\x03\x01")
            silent.wait_for_end()
        running.until(lambda: not running.server._unproved)

    def test_a_reply_that_does_not_come_is_given_up(
        self, running: RunningServer, address: Address, mine: dict[str, str]
    ) -> None:
        running.respond = lambda _, __: None
        with (
            environment(mine),
            contextlib.closing(open_blocking(address, running.secret, 0.05)) as connection,
            pytest.raises(BlockingIOError),
        ):
            connection.exchange(frame(b"hello"))

    @pytest.mark.parametrize("variable", ["RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT"])
    @pytest.mark.parametrize("value", ["", "/nowhere/at/all", "not PEM"])
    async def test_a_certificate_that_cannot_be_used_is_named_and_nothing_goes_without_tls(
        self, running: RunningServer, mine: dict[str, str], temporary: Path, variable: str, value: str
    ) -> None:
        if value == "not PEM":
            (temporary / "not.pem").write_text("nothing")
            value = str(temporary / "not.pem")
        plain = await asyncio.to_thread(running.run, running.server.listen_tcp("127.0.0.1"))
        with environment({**mine, variable: value}):
            for attempt in (ask_by_loop(plain, running.secret), ask_by_blocking(plain, running.secret)):
                with pytest.raises(ConfigurationError, match=variable):
                    await attempt
            with pytest.raises(ConfigurationError, match=variable):
                await asyncio.to_thread(running.run, running.server.listen_tcp("127.0.0.1"))

    @pytest.mark.parametrize(
        ("value", "expected"), [("1", True), ("true", True), ("True", True), ("0", False), ("", False)]
    )
    def test_it_is_wanted_where_ray_wants_it(self, value: str, expected: bool) -> None:  # noqa: FBT001
        assert tls.is_wanted({"RAY_USE_TLS": value}) is expected
        assert not tls.is_wanted({})


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        while data := await reader.read(1 << 16):
            writer.write(data)
    writer.transport.abort()
