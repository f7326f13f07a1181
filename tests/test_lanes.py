"""Lanes: operations of one event loop on their way to a shard and back, over connections of the test."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fsm_ray import protocol
from fsm_ray.codec import encode_data, extension_hook
from fsm_ray.errors import (
    FsmRayError,
    NamespaceUnavailable,
    OutcomeUnknown,
    RecordTooLarge,
    StorageClosed,
    UnknownBot,
    ValueNotDecodable,
)
from fsm_ray.namespace import Namespace
from fsm_ray.options import BotOptions
from fsm_ray.protocol import (
    MAX_OPERATIONS,
    READ_CONTENT,
    READ_RECORD,
    WRITE,
    Clear,
    ContentView,
    ReadContent,
    ReadRecord,
    RecordView,
    ReplyDecoder,
    Request,
    Transact,
    WriteRequest,
)
from fsm_ray.routing import lanes
from fsm_ray.routing.directory import Directory
from fsm_ray.routing.lanes import Lane
from fsm_ray.routing.loop import LoopBot
from fsm_ray.routing.route import Route
from fsm_ray.stores.base import Contents
from fsm_ray.stores.memory import MemoryStore

TIMEOUT_S = 10.0


class FakeClock:
    """The loop's clock; it stands still until it is moved."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s

    async def advance(self, seconds: float) -> None:
        """Move, and let everything run that is due."""
        self.now_s += seconds
        await settle()


async def settle() -> None:
    """Let everything run that is ready, and what that makes ready."""
    for _ in range(5):
        await asyncio.sleep(0)


class FakeConnection:
    """Takes requests, and delivers them nowhere."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.frames: list[bytes] = []
        self.answered = 0
        """How many requests got their answers, by `Rig.answer_oldest`."""

    def send(self, request: bytes) -> None:
        assert int.from_bytes(request[:4], "little") == len(request) - 4
        self.frames.append(request)
        self.requests.append(protocol.decode_request(request[4:]))

    def close(self) -> None:
        """Nothing to release."""

    @property
    def keys(self) -> list[list[bytes]]:
        """The keys of the operations of each request."""
        return [
            [operation.key for operation in request.operations if not isinstance(operation, Transact)]
            if isinstance(request, WriteRequest)
            else request.keys
            for request in self.requests
            if isinstance(request, ReadContent | ReadRecord | WriteRequest)
        ]

    @property
    def numbers(self) -> list[int]:
        return [request.number for request in self.requests]

    @property
    def sessions(self) -> list[bytes]:
        return [request.session for request in self.requests if isinstance(request, WriteRequest)]

    @property
    def resends(self) -> list[bool]:
        return [isinstance(request, WriteRequest) and request.is_resend for request in self.requests]


def too_late(*, outcome_unknown: bool) -> FsmRayError:
    return (OutcomeUnknown if outcome_unknown else NamespaceUnavailable)("too late", timeout_s=TIMEOUT_S)


class Rig:
    """A lane, with what a test does to it."""

    def __init__(self, kind: int, *, is_committing: bool = False) -> None:
        self.wakes = 0
        self.silences = 0
        self._kind = kind
        self.lane = Lane(
            kind,
            TIMEOUT_S,
            self._wake,
            too_late,
            is_committing=is_committing,
            on_silence=self._count_silence,
        )

    def connect(self) -> FakeConnection:
        connection = FakeConnection()
        self.lane.connected(connection)
        return connection

    def submit(self, *keys: bytes) -> list[asyncio.Future[Any]]:
        make = (lambda key: protocol.clear(key, None)) if self._kind == WRITE else protocol.read
        return [self.lane.submit(make(key)) for key in keys]

    def answer_oldest(self, connection: FakeConnection) -> None:
        """Answer the first request that has no answer yet."""
        number = connection.answered
        connection.answered += 1
        self.lane.answered(connection.numbers[number], answers_to(*connection.keys[number]))

    def answer(self, connection: FakeConnection, results: Sequence[Any] | None = None) -> None:
        """Answer the last request."""
        answers = answers_to(*connection.keys[-1]) if results is None else results
        self.lane.answered(connection.numbers[-1], answers)

    async def finish(self, connection: FakeConnection) -> None:
        """Answer every request."""
        for _ in range(1000):
            if self.lane.has_work:
                await settle()
                self.answer(connection)
        assert not self.lane.has_work

    def _wake(self) -> None:
        self.wakes += 1

    def _count_silence(self) -> None:
        self.silences += 1


def stood_still(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    """The clock of the running loop and of its lanes."""
    clock = FakeClock()
    monkeypatch.setattr(asyncio.get_running_loop(), "time", clock)
    monkeypatch.setattr(lanes, "monotonic", clock)
    return clock


@pytest.fixture
async def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    return stood_still(monkeypatch)


@pytest.fixture
async def writes(clock: FakeClock) -> Rig:
    return Rig(WRITE)


@pytest.fixture
async def commits(clock: FakeClock) -> Rig:
    """A lane of writes that the shard commits."""
    return Rig(WRITE, is_committing=True)


@pytest.fixture(params=[WRITE, READ_CONTENT, READ_RECORD], ids=["writes", "contents", "records"])
async def rig(request: pytest.FixtureRequest, clock: FakeClock) -> Rig:
    return Rig(request.param)


def answer_to(key: bytes) -> int:
    """What the fake shard answers to an operation on this key: another number for each."""
    return zlib.crc32(key)


def answers_to(*keys: bytes) -> list[int]:
    return [answer_to(key) for key in keys]


def outcome(future: asyncio.Future[Any]) -> Any:
    """The future's result, or the class of its error; "pending" where there is neither."""
    if not future.done():
        return "pending"
    if future.cancelled():
        return "cancelled"
    error = future.exception()
    return future.result() if error is None else type(error)


def outcomes(futures: Sequence[asyncio.Future[Any]]) -> list[Any]:
    return [outcome(future) for future in futures]


class TestBatches:
    async def test_a_lone_operation_is_sent_at_once(self, rig: Rig) -> None:
        connection = rig.connect()
        rig.submit(b"a")

        assert connection.keys == [[b"a"]]

    async def test_a_lone_operation_is_sent_at_once_again_and_again(self, rig: Rig) -> None:
        connection = rig.connect()
        sent_at_once = []
        for key in (b"a", b"b", b"c"):
            rig.submit(key)
            sent_at_once.append(connection.keys[-1] == [key])
            rig.answer(connection)

        assert sent_at_once == [True] * 3

    async def test_operations_that_come_while_a_request_is_under_way_travel_in_the_next(
        self, rig: Rig
    ) -> None:
        connection = rig.connect()
        rig.submit(b"a")
        rig.submit(b"b", b"c")
        await settle()
        rig.submit(b"d")
        await settle()
        keys_before_the_answer = connection.keys
        rig.answer(connection)
        await settle()

        assert keys_before_the_answer == [[b"a"]]
        assert connection.keys == [[b"a"], [b"b", b"c", b"d"]]

    async def test_operations_of_tasks_that_are_ready_together_travel_together(self, rig: Rig) -> None:
        connection = rig.connect()
        rig.submit(b"a")
        rig.submit(b"b", b"c")
        rig.answer(connection)
        rig.answer(connection)
        rig.submit(b"d")
        rig.submit(b"e", b"f")
        await settle()

        assert connection.keys == [[b"a"], [b"b", b"c"], [b"d", b"e", b"f"]]

    async def test_enough_operations_are_sent_without_waiting_for_more(self, rig: Rig) -> None:
        connection = rig.connect()
        rig.submit(b"a", b"b", b"c")
        rig.answer(connection)
        rig.answer(connection)
        keys = [b"%d" % number for number in range(lanes._ENOUGH + 2)]
        futures = rig.submit(*keys)
        at_once = connection.keys[-1]
        await rig.finish(connection)

        assert at_once == keys[: lanes._ENOUGH]
        assert connection.keys[2:] == [keys[: lanes._ENOUGH], keys[lanes._ENOUGH :]]
        assert outcomes(futures) == answers_to(*keys)

    async def test_after_a_lone_one_operations_are_sent_at_once_again(self, rig: Rig) -> None:
        connection = rig.connect()
        rig.submit(b"a")
        rig.submit(b"b", b"c")
        rig.answer(connection)
        rig.answer(connection)
        rig.submit(b"d")
        await settle()
        rig.answer(connection)
        rig.submit(b"e")

        assert connection.keys[-1] == [b"e"]

    async def test_each_operation_gets_its_own_result_in_order(self, rig: Rig) -> None:
        connection = rig.connect()
        futures = rig.submit(b"a", b"b", b"c", b"d")
        rig.answer(connection)
        rig.answer(connection)

        assert outcomes(futures) == answers_to(b"a", b"b", b"c", b"d")

    async def test_order_is_kept_over_many_requests(self, rig: Rig) -> None:
        connection = rig.connect()
        expected = []
        for number in range(100):
            keys = [b"%d %d" % (number, each) for each in range(number % 7 + 1)]
            expected += keys
            rig.submit(*keys)
            if number % 3 == 0:
                await settle()
                rig.answer(connection)
        await rig.finish(connection)

        assert [key for keys in connection.keys for key in keys] == expected

    async def test_requests_are_numbered_one_by_one(self, rig: Rig) -> None:
        connection = rig.connect()
        for _ in range(5):
            rig.submit(b"a")
            rig.answer(connection)

        assert connection.numbers == [1, 2, 3, 4, 5]

    async def test_requests_are_of_the_lanes_kind(self, clock: FakeClock) -> None:
        requests = []
        for kind in (WRITE, READ_CONTENT, READ_RECORD):
            rig = Rig(kind)
            connection = rig.connect()
            rig.submit(b"a")
            requests += connection.requests

        write, contents, records = requests
        assert isinstance(write, WriteRequest)
        assert write.operations == [Clear(b"a")]
        assert (contents, records) == (ReadContent(1, [b"a"]), ReadRecord(1, [b"a"]))

    async def test_each_lane_has_a_session_of_its_own(self, clock: FakeClock) -> None:
        sessions = set()
        for _ in range(100):
            writes = Rig(WRITE)
            connection = writes.connect()
            writes.submit(b"a")
            (request,) = connection.requests
            assert isinstance(request, WriteRequest)
            sessions.add(request.session)

        assert len(sessions) == 100
        assert {len(session) for session in sessions} == {16}

    async def test_a_lane_has_work_from_the_call_to_the_answer(self, rig: Rig) -> None:
        connection = rig.connect()
        has_work = [rig.lane.has_work]
        rig.submit(b"a", b"b")
        for _ in range(2):
            has_work.append(rig.lane.has_work)
            rig.answer(connection)
        has_work.append(rig.lane.has_work)

        assert has_work == [False, True, True, False]


class TestCommits:
    """A lane of writes that are committed: one request may wait at the shard while another is committed."""

    async def test_a_request_as_large_as_the_small_one_under_way_is_sent_beside_it(
        self, commits: Rig
    ) -> None:
        connection = commits.connect()
        futures = commits.submit(b"a", b"b")
        await settle()
        keys_before_any_answer = connection.keys
        commits.answer_oldest(connection)
        commits.answer_oldest(connection)

        assert keys_before_any_answer == [[b"a"], [b"b"]]
        assert outcomes(futures) == answers_to(b"a", b"b")

    async def test_it_takes_all_of_the_tasks_that_are_ready(self, commits: Rig) -> None:
        connection = commits.connect()
        commits.submit(b"a")
        commits.submit(b"b", b"c", b"d")
        await settle()

        assert connection.keys == [[b"a"], [b"b", b"c", b"d"]]

    async def test_there_is_no_third(self, commits: Rig) -> None:
        connection = commits.connect()
        for key in (b"a", b"b", b"c", b"d"):
            commits.submit(key)
            await settle()
        keys_before_any_answer = connection.keys
        commits.answer_oldest(connection)
        await settle()

        assert keys_before_any_answer == [[b"a"], [b"b"]]
        assert connection.keys == [[b"a"], [b"b"], [b"c", b"d"]]

    async def test_a_smaller_one_waits_until_it_is_as_large(self, commits: Rig) -> None:
        commits.submit(b"a", b"b", b"c")
        connection = commits.connect()
        commits.submit(b"d", b"e")
        await settle()
        requests_before = len(connection.requests)
        commits.submit(b"f")
        await settle()

        assert requests_before == 1
        assert connection.keys == [[b"a", b"b", b"c"], [b"d", b"e", b"f"]]

    async def test_beside_a_large_one_nothing_is_sent(self, commits: Rig) -> None:
        keys = [b"%d" % number for number in range(3 * lanes._ENOUGH)]
        commits.submit(*keys)
        connection = commits.connect()
        commits.submit(*keys)
        await settle()
        requests_before = len(connection.requests)
        commits.answer_oldest(connection)

        assert requests_before == 1
        assert connection.keys == [keys, keys]

    async def test_each_of_the_two_has_a_session_of_its_own(self, commits: Rig) -> None:
        connection = commits.connect()
        for _ in range(3):
            commits.submit(b"a", b"b")
            await settle()
            commits.answer_oldest(connection)
            commits.answer_oldest(connection)

        one, other = connection.sessions[:2]
        assert one != other
        for session in (one, other):
            numbers = [
                number
                for number, its in zip(connection.numbers, connection.sessions, strict=True)
                if its == session
            ]
            assert numbers == [1, 2, 3]

    async def test_a_lone_task_needs_one_session(self, commits: Rig) -> None:
        connection = commits.connect()
        for _ in range(5):
            commits.submit(b"a")
            commits.answer_oldest(connection)

        assert len(set(connection.sessions)) == 1

    async def test_both_are_sent_again_in_their_order(self, commits: Rig) -> None:
        first = commits.connect()
        futures = commits.submit(b"a", b"b", b"c")
        await settle()
        commits.lane.disconnected()
        second = commits.connect()
        sent_again = second.keys, second.resends, second.numbers, second.sessions
        commits.answer_oldest(second)
        commits.answer_oldest(second)

        assert sent_again == (first.keys, [True, True], first.numbers, first.sessions)
        assert outcomes(futures) == answers_to(b"a", b"b", b"c")

    async def test_each_is_given_up_at_its_own_time(self, commits: Rig, clock: FakeClock) -> None:
        commits.connect()
        futures = commits.submit(b"a")
        await clock.advance(1)
        futures += commits.submit(b"b")
        await clock.advance(TIMEOUT_S - 1)
        at_first = outcomes(futures)
        silences = commits.silences
        await clock.advance(1)

        assert at_first == [OutcomeUnknown, "pending"]
        assert silences == 1
        assert outcomes(futures) == [OutcomeUnknown, OutcomeUnknown]

    async def test_both_fail_with_an_unknown_outcome_and_what_waits_does_not(self, commits: Rig) -> None:
        commits.connect()
        futures = commits.submit(b"a", b"b")
        await settle()
        futures += commits.submit(b"c")
        commits.lane.fail(lambda: StorageClosed("closed"), lambda: OutcomeUnknown("closed"))

        assert outcomes(futures) == [OutcomeUnknown, OutcomeUnknown, StorageClosed]
        assert not commits.lane.has_work


class TestSizes:
    async def test_a_request_carries_no_more_operations_than_the_protocol_allows(self, rig: Rig) -> None:
        connection = rig.connect()
        keys = [b"%d" % number for number in range(2 * MAX_OPERATIONS + 5)]
        futures = rig.submit(b"first", *keys)
        for _ in range(4):
            rig.answer(connection)

        assert [len(keys) for keys in connection.keys] == [1, MAX_OPERATIONS, MAX_OPERATIONS, 5]
        assert outcomes(futures) == answers_to(b"first", *keys)

    @pytest.mark.parametrize("size", [1, 50, 99, 100, 101, 300, 480, 490, 600, 900])
    async def test_a_request_is_never_longer_than_a_frame_may_be(
        self, rig: Rig, monkeypatch: pytest.MonkeyPatch, size: int
    ) -> None:
        monkeypatch.setattr(lanes, "_MAX_REQUEST_BYTES", 500)  # half of a frame
        connection = rig.connect()
        keys = [b"%d" % number * size for number in range(10)]
        futures = rig.submit(b"first", *keys)
        await rig.finish(connection)

        assert all(len(request) <= 1000 for request in connection.frames)
        assert [key for keys in connection.keys for key in keys] == [b"first", *keys]
        assert outcomes(futures) == answers_to(b"first", *keys)

    async def test_small_operations_beside_a_large_one_still_travel_together(
        self, rig: Rig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(lanes, "_MAX_REQUEST_BYTES", 500)  # half of a frame
        connection = rig.connect()
        rig.submit(b"first", b"a", b"b", b"x" * 600, b"c", b"d")
        await rig.finish(connection)

        assert connection.keys == [[b"first"], [b"a", b"b"], [b"x" * 600], [b"c", b"d"]]

    async def test_many_operations_travel_in_two_halves_so_that_client_and_shard_work_at_once(
        self, rig: Rig
    ) -> None:
        connection = rig.connect()
        rig.submit(b"first", *(b"%d" % number for number in range(20)))
        await rig.finish(connection)

        assert [len(keys) for keys in connection.keys] == [1, 11, 9]


class TestResults:
    async def test_an_error_of_the_shard_is_raised(self, writes: Rig) -> None:
        connection = writes.connect()
        (future,) = writes.submit(b"a")
        error = RecordTooLarge("too large", bot="my_bot", size_bytes=9)
        encoded = protocol.reply(WRITE, 1, [protocol.encode_error(error, b"\xa3ann")])
        _, _, results = ReplyDecoder(extension_hook(allow_pickle=False)).decode(encoded[4:])
        writes.answer(connection, results)

        with pytest.raises(RecordTooLarge, match="too large") as raised:
            await future
        assert vars(raised.value) == {"bot": "my_bot", "size_bytes": 9, "key": "ann"}

    async def test_a_value_that_cannot_be_decoded_is_raised_where_it_was_asked_for(self, rig: Rig) -> None:
        connection = rig.connect()
        rig.submit(b"first")
        futures = rig.submit(b"a", b"b", b"c")
        rig.answer(connection)
        rig.answer(connection, [1, ValueNotDecodable("no class"), 3])

        assert outcomes(futures) == [1, ValueNotDecodable, 3]

    @pytest.mark.parametrize(
        "result", [None, 0, True, False, 7, RecordView(None, None, ContentView({"error": 1}, 1))]
    )
    async def test_any_other_result_is_returned_as_it_is(self, rig: Rig, result: Any) -> None:
        connection = rig.connect()
        (future,) = rig.submit(b"a")
        rig.answer(connection, [result])

        assert await future is result

    async def test_an_answer_nobody_waits_for_is_ignored(self, rig: Rig) -> None:
        connection = rig.connect()
        (future,) = rig.submit(b"a")
        rig.answer(connection)
        rig.answer(connection, [1])
        rig.lane.answered(99, [1])

        assert await future == answer_to(b"a")


class TestConnecting:
    async def test_an_operation_without_a_connection_asks_for_one_and_waits(self, rig: Rig) -> None:
        (future,) = rig.submit(b"a")
        await settle()

        assert rig.wakes >= 1
        assert outcome(future) == "pending"

    async def test_operations_that_waited_for_a_connection_travel_together_and_in_order(
        self, rig: Rig
    ) -> None:
        rig.submit(b"a", b"b")
        rig.submit(b"c")
        connection = rig.connect()

        assert connection.keys == [[b"a", b"b", b"c"]]
        assert connection.resends == [False]

    async def test_a_connection_without_work_sends_nothing(self, rig: Rig) -> None:
        connection = rig.connect()
        await settle()

        assert connection.requests == []
        assert rig.wakes == 0

    async def test_nothing_is_sent_over_a_connection_that_was_lost(self, rig: Rig) -> None:
        lost = rig.connect()
        rig.lane.disconnected()
        rig.submit(b"a")
        await settle()

        assert lost.requests == []
        assert rig.wakes == 1

    async def test_an_operation_after_the_last_answer_of_a_lost_connection_asks_for_a_new_one(
        self, rig: Rig
    ) -> None:
        lost = rig.connect()
        rig.submit(b"a")
        rig.lane.disconnected()
        rig.answer(lost)
        (future,) = rig.submit(b"b")
        wakes = rig.wakes
        rig.answer(rig.connect())

        assert wakes == 1
        assert await future == answer_to(b"b")

    async def test_operations_that_met_the_loss_of_the_connection_are_sent_over_the_next(
        self, rig: Rig
    ) -> None:
        connection = rig.connect()
        rig.submit(b"first", b"a", b"b")
        rig.answer(connection)
        rig.answer(connection)
        (future,) = rig.submit(b"c")  # waits for the other tasks of this turn of the loop
        rig.lane.disconnected()
        await settle()
        after = rig.connect()
        await settle()
        rig.answer(after)

        assert after.keys == [[b"c"]]
        assert outcome(future) == answer_to(b"c")


class TestResends:
    async def test_what_was_under_way_is_sent_again_as_it_was_and_marked(self, writes: Rig) -> None:
        first = writes.connect()
        writes.submit(b"a")
        writes.lane.disconnected()
        second = writes.connect()

        (before,), (after,) = first.requests, second.requests
        assert isinstance(before, WriteRequest)
        assert isinstance(after, WriteRequest)
        assert (before.is_resend, after.is_resend) == (False, True)
        assert (before.number, before.session) == (after.number, after.session)
        assert before.operations == after.operations

    async def test_what_came_after_it_travels_in_a_request_of_its_own(self, writes: Rig) -> None:
        writes.connect()
        futures = writes.submit(b"a", b"b")
        writes.lane.disconnected()
        futures += writes.submit(b"c")
        second = writes.connect()
        keys_at_first = second.keys
        writes.answer(second)
        writes.answer(second)

        assert keys_at_first == [[b"a"]]
        assert second.keys == [[b"a"], [b"b", b"c"]]
        assert second.numbers == [1, 2]
        assert outcomes(futures) == answers_to(b"a", b"b", b"c")

    async def test_the_mark_is_on_the_request_that_is_sent_again_and_on_no_other(self, writes: Rig) -> None:
        first = writes.connect()
        writes.submit(b"a", b"b")
        writes.lane.disconnected()
        second = writes.connect()
        writes.answer(second)
        writes.answer(second)
        writes.submit(b"c")

        assert first.resends == [False]
        assert second.resends == [True, False, False]

    async def test_it_is_sent_again_as_often_as_connections_are_lost(self, writes: Rig) -> None:
        writes.connect()
        (future,) = writes.submit(b"a")
        connections = []
        for _ in range(3):
            writes.lane.disconnected()
            connections.append(writes.connect())
        writes.answer(connections[-1])

        assert [connection.resends for connection in connections] == [[True]] * 3
        assert [connection.numbers for connection in connections] == [[1]] * 3
        assert await future == answer_to(b"a")

    async def test_what_was_answered_is_not_sent_again(self, rig: Rig) -> None:
        first = rig.connect()
        rig.submit(b"a")
        rig.answer(first)
        rig.lane.disconnected()
        second = rig.connect()

        assert second.requests == []

    async def test_reads_are_asked_again(self, clock: FakeClock) -> None:
        reads = Rig(READ_RECORD)
        reads.connect()
        (future,) = reads.submit(b"a")
        reads.lane.disconnected()
        second = reads.connect()
        reads.answer(second)

        assert second.keys == [[b"a"]]
        assert await future == answer_to(b"a")

    async def test_what_was_given_up_is_not_sent_again(self, writes: Rig, clock: FakeClock) -> None:
        writes.connect()
        futures = writes.submit(b"a")
        writes.lane.disconnected()
        await clock.advance(TIMEOUT_S)
        writes.submit(b"b")
        second = writes.connect()

        assert second.keys == [[b"b"]]
        assert second.resends == [False]
        assert outcomes(futures) == [OutcomeUnknown]


class TestDeadlines:
    async def test_an_operation_that_was_never_sent_is_unavailable_and_changed_nothing(
        self, rig: Rig, clock: FakeClock
    ) -> None:
        (future,) = rig.submit(b"a")
        await clock.advance(TIMEOUT_S)

        assert outcome(future) is NamespaceUnavailable

    async def test_the_outcome_of_a_write_under_way_is_unknown(self, writes: Rig, clock: FakeClock) -> None:
        writes.connect()
        (future,) = writes.submit(b"a")
        await clock.advance(TIMEOUT_S)

        assert outcome(future) is OutcomeUnknown

    async def test_the_outcome_of_a_write_that_is_sent_again_is_unknown(
        self, writes: Rig, clock: FakeClock
    ) -> None:
        writes.connect()
        (future,) = writes.submit(b"a")
        writes.lane.disconnected()
        await clock.advance(TIMEOUT_S / 2)
        writes.connect()
        await clock.advance(TIMEOUT_S / 2)

        assert outcome(future) is OutcomeUnknown

    async def test_the_outcome_of_a_write_whose_connection_was_lost_is_unknown(
        self, writes: Rig, clock: FakeClock
    ) -> None:
        writes.connect()
        futures = writes.submit(b"sent", b"waiting")
        writes.lane.disconnected()
        await clock.advance(TIMEOUT_S)

        assert outcomes(futures) == [OutcomeUnknown, NamespaceUnavailable]

    async def test_a_read_under_way_is_unavailable(self, clock: FakeClock) -> None:
        reads = Rig(READ_RECORD)
        reads.connect()
        (future,) = reads.submit(b"a")
        await clock.advance(TIMEOUT_S)

        assert outcome(future) is NamespaceUnavailable

    async def test_nothing_is_given_up_before_its_time(self, rig: Rig, clock: FakeClock) -> None:
        connection = rig.connect()
        futures = rig.submit(b"a", b"b")
        await clock.advance(TIMEOUT_S - 0.001)
        rig.answer(connection)
        rig.answer(connection)

        assert outcomes(futures) == answers_to(b"a", b"b")

    async def test_the_time_counts_from_the_call_however_long_it_waited_to_be_sent(
        self, writes: Rig, clock: FakeClock
    ) -> None:
        (future,) = writes.submit(b"a")
        await clock.advance(TIMEOUT_S - 1)
        writes.connect()
        await clock.advance(0.9)
        before = outcome(future)
        await clock.advance(0.1)

        assert (before, outcome(future)) == ("pending", OutcomeUnknown)

    async def test_an_operation_behind_one_that_is_given_up_is_sent_and_has_its_own_time(
        self, writes: Rig, clock: FakeClock
    ) -> None:
        connection = writes.connect()
        (first,) = writes.submit(b"a")
        await clock.advance(TIMEOUT_S / 2)
        (second,) = writes.submit(b"b")
        await clock.advance(TIMEOUT_S / 2)
        at_first = outcomes([first, second])
        await clock.advance(TIMEOUT_S / 2)

        assert at_first == [OutcomeUnknown, "pending"]
        assert connection.keys == [[b"a"], [b"b"]]
        assert outcomes([first, second]) == [OutcomeUnknown, OutcomeUnknown]

    async def test_operations_that_wait_are_given_up_one_by_one(self, rig: Rig, clock: FakeClock) -> None:
        futures = []
        for key in (b"a", b"b", b"c"):
            futures += rig.submit(key)
            await clock.advance(1)
        await clock.advance(TIMEOUT_S - 3)
        counts = [outcomes(futures).count("pending")]
        for _ in range(2):
            await clock.advance(1)
            counts.append(outcomes(futures).count("pending"))

        assert counts == [2, 1, 0]
        assert not rig.lane.has_work

    async def test_a_deadline_holds_after_any_number_of_answers(self, rig: Rig, clock: FakeClock) -> None:
        connection = rig.connect()
        for _ in range(30):
            rig.submit(b"a")
            await clock.advance(1)
            rig.answer(connection)
        (future,) = rig.submit(b"b")
        await clock.advance(TIMEOUT_S)

        assert outcome(future) in (OutcomeUnknown, NamespaceUnavailable)

    async def test_a_connection_over_which_no_answer_came_in_time_is_told_of(
        self, rig: Rig, clock: FakeClock
    ) -> None:
        rig.submit(b"a")  # waits for a connection, and is given up
        await clock.advance(TIMEOUT_S)
        silences = [rig.silences]
        rig.connect()
        rig.submit(b"b")
        await clock.advance(TIMEOUT_S)

        assert [*silences, rig.silences] == [0, 1]

    async def test_a_deadline_holds_after_a_long_silence(self, rig: Rig, clock: FakeClock) -> None:
        connection = rig.connect()
        rig.submit(b"a")
        rig.answer(connection)
        await clock.advance(100 * TIMEOUT_S)
        (future,) = rig.submit(b"b")
        await clock.advance(TIMEOUT_S - 1)
        before = outcome(future)
        await clock.advance(1)

        assert before == "pending"
        assert outcome(future) in (OutcomeUnknown, NamespaceUnavailable)

    async def test_an_operation_that_meets_the_loss_of_the_connection_is_given_up_in_time_too(
        self, rig: Rig, clock: FakeClock
    ) -> None:
        connection = rig.connect()
        rig.submit(b"first", b"a", b"b")
        rig.answer(connection)
        rig.answer(connection)
        await clock.advance(TIMEOUT_S)
        (future,) = rig.submit(b"c")  # waits for the other tasks of this turn of the loop
        rig.lane.disconnected()
        await clock.advance(TIMEOUT_S)

        assert outcome(future) is NamespaceUnavailable

    async def test_a_late_reply_is_ignored_and_the_next_request_gets_its_own(
        self, rig: Rig, clock: FakeClock
    ) -> None:
        connection = rig.connect()
        rig.submit(b"a")
        await clock.advance(TIMEOUT_S)
        (future,) = rig.submit(b"b")
        rig.lane.answered(1, [1])
        after_the_late_reply = outcome(future)
        rig.lane.answered(2, [2])

        assert connection.keys == [[b"a"], [b"b"]]
        assert after_the_late_reply == "pending"
        assert await future == 2

    async def test_a_late_reply_with_nothing_under_way_is_ignored(self, rig: Rig, clock: FakeClock) -> None:
        connection = rig.connect()
        rig.submit(b"a")
        await clock.advance(TIMEOUT_S)
        rig.answer(connection, [1])
        (future,) = rig.submit(b"b")
        rig.answer(connection)

        assert await future == answer_to(b"b")


class TestCancellation:
    async def test_the_others_of_a_request_get_their_own_results(self, rig: Rig) -> None:
        connection = rig.connect()
        futures = rig.submit(b"first", b"a", b"b", b"c")
        rig.answer(connection)
        futures[2].cancel()
        rig.answer(connection)

        assert outcomes(futures) == [*answers_to(b"first", b"a"), "cancelled", *answers_to(b"c")]

    async def test_the_others_that_wait_get_their_own_results(self, rig: Rig) -> None:
        connection = rig.connect()
        futures = rig.submit(b"first", b"a", b"b", b"c")
        futures[2].cancel()
        rig.answer(connection)
        rig.answer(connection)

        assert outcomes(futures) == [*answers_to(b"first", b"a"), "cancelled", *answers_to(b"c")]

    async def test_a_lane_whose_operations_are_all_cancelled_goes_on(self, rig: Rig) -> None:
        connection = rig.connect()
        for future in rig.submit(b"a", b"b"):
            future.cancel()
        await rig.finish(connection)
        (future,) = rig.submit(b"c")
        await settle()
        rig.answer(connection)

        assert await future == answer_to(b"c")

    async def test_cancelled_operations_pass_their_deadline_unnoticed(
        self, rig: Rig, clock: FakeClock
    ) -> None:
        reported: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
        rig.connect()
        futures = rig.submit(b"a", b"b", b"c")
        futures[0].cancel()
        futures[1].cancel()
        await clock.advance(TIMEOUT_S)

        assert outcomes(futures) == ["cancelled", "cancelled", NamespaceUnavailable]
        assert not rig.lane.has_work
        assert reported == []


class TestFail:
    async def test_every_operation_gets_an_error_of_its_own(self, rig: Rig) -> None:
        rig.connect()
        futures = rig.submit(b"a", b"b", b"c")
        futures[1].cancel()
        rig.lane.close()
        rig.lane.fail(lambda: UnknownBot("dropped", bot="my_bot"))

        assert outcomes(futures) == [UnknownBot, "cancelled", UnknownBot]
        assert futures[0].exception() is not futures[2].exception()
        assert not rig.lane.has_work

    async def test_a_lane_can_be_used_again(self, rig: Rig) -> None:
        rig.submit(b"a")[0].add_done_callback(outcome)
        rig.lane.fail(lambda: UnknownBot("dropped"))
        (future,) = rig.submit(b"b")
        connection = rig.connect()
        rig.answer(connection)

        assert connection.keys == [[b"b"]]
        assert await future == answer_to(b"b")

    async def test_a_write_under_way_as_the_lane_fails_is_not_sent_again(self, writes: Rig) -> None:
        writes.connect()
        writes.submit(b"a")[0].add_done_callback(outcome)
        writes.lane.disconnected()
        writes.lane.fail(lambda: UnknownBot("dropped"))

        assert writes.connect().requests == []

    async def test_a_lane_that_was_closed_leaves_no_timer(self, rig: Rig, clock: FakeClock) -> None:
        rig.connect()
        futures = rig.submit(b"a", b"b")
        rig.lane.close()
        await clock.advance(10 * TIMEOUT_S)

        assert outcomes(futures) == ["pending", "pending"]


class TestLoopBot:
    async def test_the_outcome_of_a_write_under_way_as_the_storage_closes_is_unknown(
        self, clock: FakeClock
    ) -> None:
        route = Route("my_bot", BotOptions())
        directory = Directory(None, TIMEOUT_S)
        bot = LoopBot(directory, route, TIMEOUT_S, lambda: None, by_socket=True)
        bot.shards[0].lanes[WRITE].connected(FakeConnection())
        futures = [bot.write(route.clear("a", None)), bot.write(route.clear("b", None))]
        bot.close(lambda: StorageClosed("closed"))

        assert outcomes(futures) == [OutcomeUnknown, StorageClosed]

    async def test_reads_under_way_as_the_storage_closes_are_told_that_it_closed(
        self, clock: FakeClock
    ) -> None:
        bot = LoopBot(
            Directory(None, TIMEOUT_S), Route("my_bot", BotOptions()), TIMEOUT_S, lambda: None, by_socket=True
        )
        for lane in bot.shards[0].lanes:
            lane.connected(FakeConnection())
        futures: list[asyncio.Future[Any]] = [bot.read_content("a"), bot.read_record("a")]
        bot.close(lambda: StorageClosed("closed"))

        assert outcomes(futures) == [StorageClosed, StorageClosed]


class ShardConnection:
    """A connection to a real namespace; requests and replies are lost when the test says so."""

    def __init__(self, namespace: Namespace, lane: Lane) -> None:
        self.requests: list[bytes] = []
        """On their way to the shard."""
        self.replies: list[bytes] = []
        """On their way back."""
        self._namespace = namespace
        self._lane = lane

    def send(self, request: bytes) -> None:
        self.requests.append(request)

    def close(self) -> None:
        """Nothing to release."""

    def arrive(self) -> None:
        """Let the shard have the oldest request."""
        if self.requests:
            reply = self._namespace.handle(self.requests.pop(0)[4:], self.replies.append)
            assert reply is not None
            self.replies.append(reply)

    def come_back(self) -> None:
        """Let the lane have the oldest reply."""
        if self.replies:
            reply = self.replies.pop(0)
            _, number, results = ReplyDecoder(extension_hook(allow_pickle=False)).decode(reply[4:])
            self._lane.answered(number, results)


class TestWithAShard:
    STEPS = st.lists(
        st.sampled_from(["submit", "submit", "arrive", "arrive", "come back", "lose", "turn"]), max_size=60
    )

    @pytest.mark.parametrize("is_committing", [False, True])
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
    @given(steps=STEPS)
    async def test_every_write_takes_effect_once_and_in_order_whatever_gets_lost(
        self, steps: list[str], clock: FakeClock, *, is_committing: bool
    ) -> None:
        namespace = Namespace("my_bot", BotOptions(), MemoryStore(), Contents(version=0))
        lane = Lane(WRITE, TIMEOUT_S, lambda: None, too_late, is_committing=is_committing)
        connection = ShardConnection(namespace, lane)
        lane.connected(connection)
        futures: list[asyncio.Future[Any]] = []
        for step in [*steps, *["turn", "arrive", "come back"] * 3]:
            if step == "submit":
                data = encode_data({f"n{len(futures)}": 1}, allow_pickle=False)
                futures.append(lane.submit(protocol.update_data(b"key", data, None)))
            elif step == "arrive":
                connection.arrive()
            elif step == "come back":
                connection.come_back()
            elif step == "turn":
                await asyncio.sleep(0)
            else:
                lane.disconnected()
                connection = ShardConnection(namespace, lane)
                lane.connected(connection)

        assert [future.result().version for future in futures] == list(range(1, len(futures) + 1))
        assert [len(future.result().data) for future in futures] == list(range(1, len(futures) + 1))
        assert not lane.has_work
