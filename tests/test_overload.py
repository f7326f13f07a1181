"""Each bound on an operation's way: at it, an error that says to retry; and below it again, all goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from fsm_ray import across, hosting, protocol, sessions
from fsm_ray.channel import outflow
from fsm_ray.channel.handshake import Endpoint
from fsm_ray.errors import (
    NamespaceUnavailable,
    OutcomeUnknown,
    Overloaded,
    RecordTooLarge,
    ScanInterrupted,
)
from fsm_ray.hosting import ShardHost
from fsm_ray.namespace import Namespace, evaluation, leases, scans, serving
from fsm_ray.options import BotOptions
from fsm_ray.protocol import COUNT, GRANTS, KINDS, READ_CONTENT, READ_RECORD, SCAN, TURN, WATCH, WRITE
from fsm_ray.routing import asking, lanes
from fsm_ray.routing.asking import Asking
from fsm_ray.routing.route import Route
from fsm_ray.sessions import Sessions
from fsm_ray.stores.base import Answered, Contents
from fsm_ray.stores.memory import MemoryStore

from .test_lanes import TIMEOUT_S, FakeClock, FakeConnection, Rig, outcomes, settle, stood_still, too_late
from .test_namespace import (
    ANN,
    BOB,
    CID,
    DECODER,
    AheadStore,
    FakeStore,
    Shard,
    clear,
    session_of,
    set_data,
    update_data,
    write_request,
)
from .test_scans import LookedAt
from .test_turns_at_shard import TurnShard


@pytest.fixture
async def shard() -> Shard:
    return Shard(FakeStore(asyncio.get_running_loop()))


@pytest.fixture
async def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    return stood_still(monkeypatch)


def test_overloaded_says_to_retry_by_its_type() -> None:
    assert issubclass(Overloaded, NamespaceUnavailable)
    assert not issubclass(Overloaded, OutcomeUnknown)


class TestCommits:
    """Writes that wait for a store that is slower than they come."""

    async def test_a_write_past_the_bound_is_refused_and_one_after_the_commit_is_not(
        self, shard: Shard, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(serving, "MAX_WAITING_BYTES", 10_000)
        under_way, waiting, refused = (shard.client(name) for name in ("one", "two", "three"))
        under_way.write(set_data(ANN))
        waiting.write(set_data(BOB, name="x" * 8_000))
        refused.write(set_data(CID), set_data(CID, name="x" * 2_000))

        assert [type(result) for result in refused.results] == [Overloaded, Overloaded]
        assert "nothing was changed, retry later" in str(refused.results[0])
        assert shard.namespace._tally.refused(Overloaded) == 2
        await shard.settled()
        assert shard.client().read(CID) == [None]
        refused.write(set_data(CID))
        await shard.settled()
        assert refused.results == [3]

    async def test_a_write_that_was_sent_again_is_not_refused_for_it_may_be_committed(
        self, shard: Shard, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(serving, "MAX_WAITING_BYTES", 10_000)
        under_way, waiting = shard.client("one"), shard.client("two")
        under_way.write(set_data(ANN))
        waiting.write(set_data(BOB, name="x" * 9_000))
        under_way.resend(set_data(ANN))
        await shard.settled()

        assert [results for _, results in under_way.replies] == [[1], [1]]

    async def test_a_write_that_is_sent_again_and_again_takes_one_more_place_and_gets_each_reply(
        self, shard: Shard
    ) -> None:
        under_way, client = shard.client("one"), shard.client("two")
        under_way.write(set_data(ANN))
        client.write(set_data(BOB))
        waiting_bytes = shard.namespace._waiting_bytes
        elsewhere = [shard.client("two") for _ in range(10)]
        for again in elsewhere:
            again.send(1, set_data(BOB), is_resend=True)

        assert len(shard.namespace._waiting) == 2
        assert shard.namespace._waiting_bytes == 2 * waiting_bytes
        await shard.settled()
        assert [again.replies for again in (client, *elsewhere)] == [[(1, [2])]] * 11
        assert shard.namespace._resent == {}
        assert shard.namespace.statistics().operations == 2
        client.resend(set_data(BOB))
        assert client.replies == [(1, [2])] * 2

    async def test_a_write_of_any_size_is_taken_when_nothing_waits(
        self, shard: Shard, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(serving, "MAX_WAITING_BYTES", 10)
        client = shard.client()
        client.write(set_data(ANN, name="x" * 1_000))
        await shard.settled()

        assert client.results == [1]

    @pytest.mark.parametrize("make_store", [FakeStore, AheadStore])
    async def test_a_commit_takes_no_more_than_its_bound_and_the_rest_comes_next(
        self, make_store: type[FakeStore], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(serving, "_MAX_COMMIT_BYTES", 10_000)
        shard = Shard(make_store(asyncio.get_running_loop()))
        shard.client("first").write(set_data(ANN))
        clients = [shard.client(str(number)) for number in range(12)]
        for client in clients:
            client.write(set_data(BOB, name="x" * 3_000))
        while isinstance(shard.store, AheadStore) and shard.store.commits:
            await shard.store.done_with_one()
        await shard.settled()

        assert [client.results for client in clients] == [[version] for version in range(2, 14)]
        assert max(len(batch.sessions) for batch in shard.store.batches) <= 4

    async def test_replies_count_for_they_may_be_much_larger_than_what_was_asked(
        self, shard: Shard, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await shard.write(set_data(ANN, name="x" * 9_000))
        monkeypatch.setattr(serving, "_MAX_COMMIT_BYTES", 10_000)
        shard.client("first").write(set_data(BOB))
        clients = [shard.client(str(number)) for number in range(4)]
        for client in clients:
            client.write(update_data(ANN, n=1))
        await shard.settled()

        assert [len(batch.sessions) for batch in shard.store.batches[2:]] == [1, 1, 1, 1]
        assert [client.results[0].version for client in clients] == [3, 4, 5, 6]

    @pytest.mark.parametrize(
        "small",
        [
            lambda key: protocol.enter_state(key, (None, "next"), None),
            lambda key: protocol.transact([update_data(key, n=1)]),
        ],
        ids=["enter_state", "transaction"],
    )
    async def test_records_count_for_they_may_be_much_larger_than_what_was_asked_and_answered(
        self, shard: Shard, small: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for key in (ANN, BOB, CID):
            await shard.write(set_data(key, name="x" * 9_000))
        monkeypatch.setattr(serving, "_MAX_COMMIT_BYTES", 10_000)
        shard.client("first").write(clear(b"\xa3dan"))
        for number, key in enumerate((ANN, BOB, CID, ANN)):
            shard.client(str(number)).write(small(key))
        await shard.settled()

        assert [list(batch.records) for batch in shard.store.batches[4:]] == [[ANN], [BOB], [CID], [ANN]]

    async def test_writes_that_change_nothing_do_not_keep_the_rest_waiting(
        self, shard: Shard, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clients = [shard.client(str(number)) for number in range(6)]
        for client in clients:
            client.write(clear(ANN))
        await shard.settled()
        monkeypatch.setattr(serving, "_MAX_COMMIT_BYTES", 1)
        shard.client("first").write(set_data(BOB))
        for client in clients:
            client.write(clear(ANN))
        await shard.settled()

        assert [len(client.replies) for client in clients] == [2] * 6

    async def test_what_waited_counts_no_more_once_it_is_committed(self, shard: Shard) -> None:
        for number in range(3):
            shard.client(str(number)).write(set_data(ANN))
        assert shard.namespace._waiting_bytes > 0
        await shard.settled()

        assert shard.namespace._waiting_bytes == 0


class TestReplies:
    """Replies that are remembered for writes that are sent again."""

    LARGE = 5_000

    def answered(self, known: Sessions, name: bytes, number: int, size: int) -> None:
        known.remember({name: Answered(number, b"r" * size, 1_000.0)})

    def recall(self, known: Sessions, name: bytes, number: int) -> bytes | None:
        request = protocol.WriteRequest(number, name, is_resend=True, operations=[])
        return known.recall(request, {})

    def test_past_the_bound_the_oldest_large_ones_are_forgotten_and_who_asks_is_told(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sessions, "MAX_LARGE_BYTES", 3 * self.LARGE)
        known = Sessions({}, lambda: 1_000.0)
        for number in range(5):
            self.answered(known, b"%d" % number, 1, self.LARGE)
        self.answered(known, b"small", 1, 10)

        for number in range(2):
            with pytest.raises(OutcomeUnknown, match="answer was forgotten"):
                self.recall(known, b"%d" % number, 1)
        assert [self.recall(known, name, 1) for name in (b"2", b"3", b"4")] == [b"r" * self.LARGE] * 3
        assert self.recall(known, b"small", 1) == b"r" * 10
        assert self.recall(known, b"0", 2) is None

    def test_a_large_reply_that_was_followed_by_a_small_one_takes_nothing(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sessions, "MAX_LARGE_BYTES", 2 * self.LARGE)
        known = Sessions({}, lambda: 1_000.0)
        self.answered(known, b"a", 1, self.LARGE)
        self.answered(known, b"a", 2, 10)
        for name in (b"b", b"c"):
            self.answered(known, name, 1, self.LARGE)

        assert self.recall(known, b"a", 2) == b"r" * 10
        assert self.recall(known, b"b", 1) == self.recall(known, b"c", 1) == b"r" * self.LARGE

    def test_those_that_a_store_kept_are_bounded_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sessions, "MAX_LARGE_BYTES", 2 * self.LARGE)
        kept = {b"%d" % number: Answered(1, b"r" * self.LARGE, 1_000.0) for number in range(10)}
        known = Sessions(kept, lambda: 1_000.0)

        assert sum(len(each.reply) for each in known.answered.values()) == 2 * self.LARGE

    def test_forgotten_sessions_take_nothing(self) -> None:
        now_s = [1_000.0]
        known = Sessions({}, lambda: now_s[0])
        self.answered(known, b"old", 1, self.LARGE)
        now_s[0] += 2 * sessions.SESSION_IDLE_S
        self.recall(known, b"new", 1)

        assert known._large_bytes == 0

    @pytest.mark.parametrize("is_durable", [False, True])
    async def test_a_shard_remembers_large_replies_within_the_bound(
        self,
        is_durable: bool,  # noqa: FBT001
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(sessions, "MAX_LARGE_BYTES", 30_000)
        shard = LookedAt(is_durable=is_durable)
        for _ in range(20):
            await shard.write(update_data(ANN, name="x" * self.LARGE))

        kept = shard.namespace._sessions.answered
        assert len(kept) == 20
        assert sum(len(each.reply) for each in kept.values()) <= 30_000

    async def test_those_of_one_commit_are_bounded_too(
        self, shard: Shard, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sessions, "MAX_LARGE_BYTES", 30_000)
        shard.client("under way").write(set_data(BOB))
        clients = [shard.client(str(number)) for number in range(20)]
        for client in clients:
            client.write(update_data(ANN, name="x" * self.LARGE))
        await shard.settled()

        kept = shard.namespace._sessions.answered
        assert sum(len(each.reply) for each in kept.values()) <= 30_000
        assert len(shard.store.batches) == 2
        clients[-1].resend(update_data(ANN, name="x" * self.LARGE))
        clients[0].resend(update_data(ANN, name="x" * self.LARGE))
        assert clients[-1].replies[1] == clients[-1].replies[0]
        assert isinstance(clients[0].results[0], OutcomeUnknown)


class TestTurns:
    async def test_past_the_bound_of_turns_one_is_refused_until_another_ends(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(leases, "MAX_TURNS", 2)
        shard = TurnShard(FakeStore(asyncio.get_running_loop()))
        one, two, three = (shard.worker(name) for name in ("one", "two", "three"))
        assert [one.begin(ANN), two.begin(ANN)] == [None, False]

        assert isinstance(three.begin(BOB), Overloaded)
        assert two.begin(ANN) is False  # asked for again, it is the same turn
        one.end()
        assert three.begin(BOB) is None

    async def test_turns_that_are_lost_make_room(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(leases, "MAX_TURNS", 2)
        shard = TurnShard(FakeStore(asyncio.get_running_loop()))
        for number in range(5):
            worker = shard.worker(str(number))
            assert [worker.begin(ANN, 1), worker.begin(BOB, 2)] == [None, None]
            worker.disconnect()

        assert shard.namespace._turns.leases._open == 0

    async def test_past_the_bound_of_clients_a_new_one_is_refused_and_known_ones_are_not(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(leases, "MAX_SESSIONS", 1)
        shard = TurnShard(FakeStore(asyncio.get_running_loop()))
        known, new = shard.worker("known"), shard.worker("new")
        assert known.begin(ANN) is None

        assert isinstance(new.begin(BOB), Overloaded)
        new.listen()
        ((refusal,),) = new.told
        assert isinstance(protocol.decode_error(refusal), Overloaded)
        assert known.begin(BOB, 2) is None


class TestScans:
    @pytest.mark.parametrize("is_durable", [False, True])
    async def test_past_the_bound_the_scan_with_most_kept_aside_is_interrupted_alone(
        self,
        is_durable: bool,  # noqa: FBT001
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(scans, "MAX_ASIDE_BYTES", 15_000)
        shard = LookedAt(is_durable=is_durable)
        keys = [b"\xa3%03d" % number for number in range(10)]
        await shard.write(*(set_data(key, name="x" * 1_000) for key in keys))
        _first, _ = shard.page(0, b"first", limit=1)
        await shard.write(*(set_data(key, name="y" * 1_000) for key in keys))
        later, _ = shard.page(0, b"later", limit=1)
        await shard.write(*(set_data(key, name="z" * 1_000) for key in keys))

        with pytest.raises(ScanInterrupted):
            shard.page(1, b"first", has_begun=True)
        rest, is_last = shard.page(1, b"later", has_begun=True)
        assert is_last
        assert [each.record.content.data["name"][0] for each in (*later, *rest)] == ["y"] * 10
        assert len(shard.scan(b"again")) == 10

    async def test_what_a_scan_has_looked_at_is_kept_no_more(self) -> None:
        shard = LookedAt(is_durable=False)
        keys = [b"\xa3%03d" % number for number in range(10)]
        await shard.write(*(set_data(key, name="x") for key in keys))
        pages = shard.pages(limit=3)
        while not next(pages):
            pass  # keys are put into order first
        await shard.write(*(clear(key) for key in keys))
        (scan,) = shard.namespace._scans._scans.values()
        assert scan.aside_bytes > 0
        list(pages)

        assert scan.aside_bytes == 0


class TestCounts:
    @pytest.mark.parametrize("is_durable", [False, True])
    async def test_a_state_that_no_record_has_any_more_takes_nothing(self, *, is_durable: bool) -> None:
        shard = LookedAt(is_durable=is_durable)
        for number in range(100):
            await shard.write(protocol.set_record(ANN, None, f"state {number}", b"\x80", None))
            await shard.write(set_data(BOB), clear(BOB))

        assert list(shard.namespace._counts.values()) == [1]
        assert shard.namespace.statistics().records == 1


class TestTimesToLive:
    async def test_states_with_made_up_names_are_forgotten(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(evaluation, "_MAX_TTLS", 10)
        shard = Shard(FakeStore(asyncio.get_running_loop()), ttl_s=60.0)
        for number in range(100):
            await shard.write(protocol.set_record(ANN, None, f"state {number}", b"\x80", None))

        assert len(shard.namespace._evaluator._ttls) <= 10


REQUESTS = {
    WRITE: protocol.write_request(7, [set_data(ANN), clear(BOB)], session_of("a"), is_resend=False),
    READ_CONTENT: protocol.read_request(READ_CONTENT, 7, [protocol.read(ANN), protocol.read(BOB)]),
    READ_RECORD: protocol.read_request(READ_RECORD, 7, [protocol.read(ANN)]),
    TURN: protocol.turn_request(7, [protocol.begin_turn(1, ANN), protocol.end_turn(2)], session_of("a")),
    GRANTS: protocol.grants_request(7, session_of("a"), 1.0),
    SCAN: protocol.scan_request(7, (b"scan", 0, False), (None, None), None, 1),
    COUNT: protocol.count_request(7),
    WATCH: protocol.watch_request(7, (None, None), None, 1.0),
}


class TestReplySizes:
    """The largest reply that a client can ask for, by the real numbers."""

    @pytest.mark.parametrize("max_record_bytes", [256, 64 << 10, 1 << 20, 16 << 20])
    async def test_it_takes_about_half_of_what_a_shard_keeps_for_slow_readers(
        self, max_record_bytes: int
    ) -> None:
        shard = TurnShard(FakeStore(asyncio.get_running_loop()), max_record_bytes=max_record_bytes)
        await self.fill(shard, max_record_bytes)
        replies: list[bytes] = []
        for kind in (READ_CONTENT, READ_RECORD, TURN, WRITE):
            reply = shard.namespace.handle(self.request(kind)[4:], replies.append)
            replies += [reply] if reply else []
        await shard.settled()
        operations = Route("my_bot", BotOptions(max_record_bytes=max_record_bytes)).max_operations

        assert [len(reply) > max_record_bytes for reply in replies] == [True] * 4
        assert operations * max(map(len, replies)) < 0.55 * outflow.MAX_BYTES

    def request(self, kind: int) -> bytes:
        """One whose answer has the record."""
        if kind == WRITE:
            return protocol.write_request(1, [update_data(ANN)], session_of("any"), is_resend=False)
        if kind == TURN:
            return protocol.turn_request(1, [protocol.begin_turn(1_000, ANN)], session_of("any"))
        return protocol.read_request(kind, 1, [protocol.read(ANN)])

    async def fill(self, shard: TurnShard, max_record_bytes: int) -> None:
        """Make a record that is as large as one may be, and remembers as many updates as one can."""
        worker, version = shard.worker("worker"), 0
        for number in range(1, 2 * evaluation._MAX_UPDATES):
            worker.begin(ANN, number)
            worker.commit(version, {}, number=number, update_id=(1 << 40) + number)
            await shard.settled()
            (version,) = worker.results
        (refused,) = await shard.write(set_data(ANN, x="y" * max_record_bytes))
        assert isinstance(refused, RecordTooLarge)
        assert refused.size_bytes is not None
        size = max_record_bytes - (refused.size_bytes - max_record_bytes)
        (written,) = await shard.write(set_data(ANN, x="y" * size))
        assert type(written) is int


class TestRayCalls:
    """Requests that come as Ray calls, at an actor without Ray."""

    @pytest.fixture
    def busy(self, shard: Shard, no_ray: None, monkeypatch: pytest.MonkeyPatch) -> Any:
        monkeypatch.setattr(hosting, "MAX_EXCHANGES", 2)
        busy: Any = ShardHost("my_bot", 0, BotOptions())
        busy._namespace = shard.namespace
        return busy

    async def under_way(self, busy: Any, count: int) -> list[asyncio.Task[bytes]]:
        calls = [
            asyncio.create_task(
                busy.exchange(b"\0" * 4 + write_request(1, [set_data(ANN)], session_of(str(number))))
            )
            for number in range(count)
        ]
        await settle()
        return calls

    @pytest.mark.parametrize("kind", KINDS)
    async def test_past_the_bound_each_operation_of_any_request_is_refused(
        self, shard: Shard, busy: Any, kind: int
    ) -> None:
        calls = await self.under_way(busy, 2)
        answered, number, results = DECODER.decode((await busy.exchange(REQUESTS[kind]))[4:])

        assert (answered, number) == (kind, 7)
        assert [type(protocol.error_of(result)) for result in results] == [Overloaded] * len(results)
        assert len(results) == (2 if kind in (WRITE, READ_CONTENT, TURN) else 1)
        await shard.settled()
        await asyncio.gather(*calls)
        assert shard.namespace.statistics().records == 1

    async def test_a_write_that_was_sent_again_is_to_be_sent_once_more(self, shard: Shard, busy: Any) -> None:
        calls = await self.under_way(busy, 2)
        request = protocol.write_request(1, [set_data(ANN)], session_of("0"), is_resend=True)
        with pytest.raises(NamespaceUnavailable) as raised:
            await busy.exchange(request)

        assert not isinstance(raised.value, Overloaded)
        await shard.settled()
        first, _ = await asyncio.gather(*calls)
        assert await busy.exchange(request) == first

    async def test_below_the_bound_requests_are_served(self, shard: Shard, busy: Any) -> None:
        calls = await self.under_way(busy, 1)
        _, _, results = DECODER.decode((await busy.exchange(REQUESTS[READ_CONTENT]))[4:])

        assert list(results) == [None, None]
        await shard.settled()
        await asyncio.gather(*calls)

    @pytest.mark.parametrize("listen_host", ["0.0.0.0", "::"])
    async def test_who_listens_everywhere_is_found_at_the_address_of_the_node(
        self, busy: Any, listen_host: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class FakeServer:
            hosts: list[str] = []  # noqa: RUF012

            async def listen_tcp(self, host: str) -> tuple[str, int]:
                self.hosts.append(host)
                return host, 1234

        monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "10.0.0.7")
        busy.options = BotOptions(listen_host=listen_host)
        busy._server = FakeServer()
        busy._endpoint = Endpoint(busy.options, "here", "/socket", None, b"secret")
        endpoint = await busy.endpoint("there")

        assert FakeServer.hosts == [listen_host]
        assert endpoint.tcp_address == ("10.0.0.7", 1234)


class TestLanes:
    """What waits in a client."""

    @pytest.fixture
    async def writes(self, clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> Rig:
        monkeypatch.setattr(lanes, "MAX_WAITING", 300)
        return Rig(WRITE)

    def many(self, rig: Rig, count: int) -> list[asyncio.Future[Any]]:
        return rig.submit(*(b"%d" % number for number in range(count)))

    @pytest.mark.parametrize("is_connected", [False, True])
    async def test_past_the_bound_operations_are_refused_at_once_and_others_are_not(
        self,
        writes: Rig,
        is_connected: bool,  # noqa: FBT001
    ) -> None:
        connection = writes.connect() if is_connected else None
        futures = self.many(writes, 2_000)
        refused = [future for future in futures if future.done()]
        error = refused[-1].exception()

        assert isinstance(error, Overloaded)
        assert "nothing was changed, retry later" in str(error)
        assert {type(future.exception()) for future in refused} == {Overloaded}
        assert 300 <= len(futures) - len(refused) <= 300 + 2 * lanes._LOOK_EACH
        await writes.finish(connection or writes.connect())
        assert all(future.done() for future in futures)
        assert sum(isinstance(future.exception(), Overloaded) for future in futures) == len(refused)

    async def test_when_some_are_sent_others_are_taken_again(self, writes: Rig) -> None:
        connection = writes.connect()
        self.many(writes, 2_000)
        writes.answer(connection)
        (taken,) = writes.submit(b"next")

        assert not taken.done()
        await writes.finish(connection)
        assert type(taken.result()) is int

    async def test_when_some_are_given_up_others_are_taken_again(self, writes: Rig, clock: FakeClock) -> None:
        self.many(writes, 2_000)
        await clock.advance(TIMEOUT_S)
        (taken,) = writes.submit(b"next")

        assert not taken.done()
        await writes.finish(writes.connect())

    async def test_bytes_are_bounded_too(self, clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(lanes, "MAX_WAITING_BYTES", 1_000_000)
        writes = Rig(WRITE)
        futures = writes.submit(*(b"x" * 10_000 for _ in range(1_000)))
        taken = sum(not future.done() for future in futures)

        assert 100 <= taken <= 100 + lanes._LOOK_EACH
        await writes.finish(writes.connect())

    async def test_operations_that_nobody_waits_for_any_more_make_room(self, writes: Rig) -> None:
        waiting = self.many(writes, 255)
        for future in waiting:
            future.cancel()
        futures = self.many(writes, 299)
        connection = writes.connect()

        assert not any(future.done() for future in futures)
        await writes.finish(connection)
        assert sum(len(keys) for keys in connection.keys) == 299

    async def test_those_that_are_cancelled_while_it_is_full_make_room_too(self, writes: Rig) -> None:
        waiting = [future for future in self.many(writes, 2_000) if not future.done()]
        for future in waiting:
            future.cancel()
        futures = self.many(writes, 250)
        refused = [future for future in futures if future.done()]

        assert len(refused) <= len(waiting) // lanes._LOOK_EACH + 1
        for future in refused:
            assert isinstance(future.exception(), Overloaded)
        await writes.finish(writes.connect())

    async def test_while_it_is_full_what_is_cancelled_is_seldom_looked_for(
        self, writes: Rig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(lanes, "MAX_WAITING", 20 * lanes._LOOK_EACH)
        self.many(writes, 30 * lanes._LOOK_EACH)
        looks: list[None] = []
        monkeypatch.setattr(writes.lane, "_drop_cancelled", lambda: looks.append(None))
        refused = self.many(writes, 1_000)

        assert all(isinstance(future.exception(), Overloaded) for future in refused)
        assert 0 < len(looks) <= 1_000 // 20
        monkeypatch.undo()
        await writes.finish(writes.connect())

    async def test_what_was_cancelled_before_there_was_a_connection_is_not_sent(self, writes: Rig) -> None:
        first, second, third = writes.submit(b"a", b"b", b"c")
        second.cancel()
        connection = writes.connect()
        await writes.finish(connection)

        assert [key for keys in connection.keys for key in keys] == [b"a", b"c"]
        assert [type(each.result()) for each in (first, third)] == [int, int]

    @pytest.mark.parametrize("is_committing", [False, True])
    async def test_no_number_of_operations_slips_by(
        self,
        clock: FakeClock,
        monkeypatch: pytest.MonkeyPatch,
        is_committing: bool,  # noqa: FBT001
    ) -> None:
        monkeypatch.setattr(lanes, "MAX_WAITING", 300)
        writes = Rig(WRITE, is_committing=is_committing)
        connection = writes.connect()
        most = 0
        for step in range(1, 60):
            self.many(writes, step * 7 % 90)
            await settle()
            most = max(most, len(writes.lane._operations))
            if step % 3 == 0 and writes.lane._under_way:
                writes.answer_oldest(connection)

        assert 256 < most <= 300 + lanes._LOOK_EACH
        while writes.lane.has_work:
            await settle()
            writes.answer_oldest(connection)


class TestTimeOfEachOperation:
    """Operations of one request that were called at different times."""

    async def test_younger_ones_are_not_given_up_with_the_oldest_of_their_request(
        self, clock: FakeClock
    ) -> None:
        writes = Rig(WRITE)
        old = writes.submit(b"a")
        await clock.advance(TIMEOUT_S - 1)
        young = writes.submit(b"b", b"c")
        connection = writes.connect()
        assert connection.keys == [[b"a", b"b", b"c"]]
        await clock.advance(1)

        assert outcomes([*old, *young]) == [OutcomeUnknown, "pending", "pending"]
        writes.answer(connection)
        assert [type(each.result()) for each in young] == [int, int]

    async def test_younger_ones_are_given_up_when_it_is_their_time_and_the_connection_is_left_once(
        self, clock: FakeClock
    ) -> None:
        writes = Rig(WRITE)
        first = writes.submit(b"a")
        await clock.advance(4)
        second = writes.submit(b"b")
        await clock.advance(4)
        third = writes.submit(b"c")
        writes.connect()
        seen: list[tuple[list[Any], int]] = []
        for _ in range(3):
            await clock.advance(TIMEOUT_S - 8 if not seen else 4)
            seen.append((outcomes([*first, *second, *third]), writes.silences))

        assert seen == [
            ([OutcomeUnknown, "pending", "pending"], 1),
            ([OutcomeUnknown, OutcomeUnknown, "pending"], 1),
            ([OutcomeUnknown] * 3, 1),
        ]
        assert not writes.lane.has_work

    async def test_over_a_new_connection_the_whole_request_goes_again_under_its_number(
        self, clock: FakeClock
    ) -> None:
        writes = Rig(WRITE)
        old = writes.submit(b"a")
        await clock.advance(TIMEOUT_S - 1)
        young = writes.submit(b"b")
        silent = writes.connect()
        await clock.advance(1)
        writes.lane.disconnected()
        connection = writes.connect()
        writes.answer(connection)

        assert (connection.keys, connection.resends) == (silent.keys, [True])
        assert (connection.numbers, connection.sessions) == (silent.numbers, silent.sessions)
        assert outcomes(old) == [OutcomeUnknown]
        assert [type(each.result()) for each in young] == [int]


class TestAsking:
    async def test_past_the_bound_a_request_is_refused_and_after_an_answer_it_is_not(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(asking, "MAX_OPEN", 2)
        open_ones = Asking(lambda: None, too_late, lambda: None)
        open_ones.connected(FakeConnection())
        waiting = [
            asyncio.create_task(open_ones.ask(COUNT, protocol.count_request, TIMEOUT_S)) for _ in range(2)
        ]
        await settle()
        with pytest.raises(Overloaded, match="retry later"):
            await open_ones.ask(COUNT, protocol.count_request, TIMEOUT_S)

        open_ones.answered(1, [1])
        assert await waiting[0] == [1]
        third = asyncio.create_task(open_ones.ask(COUNT, protocol.count_request, TIMEOUT_S))
        await settle()
        open_ones.answered(2, [2])
        open_ones.answered(4, [3])
        assert [await waiting[1], await third] == [[2], [3]]


def test_a_refused_count_raises_what_the_shard_said() -> None:
    namespace = Namespace("my_bot", BotOptions(), MemoryStore(), Contents(version=0))
    refusal = namespace.refuse(REQUESTS[COUNT][4:], Overloaded("too much"))
    assert refusal is not None
    _, _, results = DECODER.decode(refusal[4:])

    with pytest.raises(Overloaded, match="too much"):
        across._sum([results], None)  # type: ignore[list-item]
