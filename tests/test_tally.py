"""Tallies: what is counted on the hot path, and whether it says what happened."""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import Sequence
from typing import Any, ClassVar, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fsm_ray import errors, protocol
from fsm_ray.codec import encode_key
from fsm_ray.errors import (
    ChangesMissed,
    FsmRayError,
    NamespaceUnavailable,
    NotOwner,
    Overloaded,
    StoreUnavailable,
    VersionConflict,
)
from fsm_ray.metrics.client import ClientMetrics
from fsm_ray.namespace import Namespace
from fsm_ray.options import BotOptions
from fsm_ray.protocol import (
    COUNT,
    GRANTS,
    NO_TURN,
    READ_CONTENT,
    SCAN,
    WATCH,
    WRITE,
    Begin,
    Clear,
    End,
    ReadContent,
    SetRecord,
    WatchRequest,
)
from fsm_ray.routing.asking import Asking
from fsm_ray.routing.blocking import BlockingShard
from fsm_ray.routing.directory import Directory
from fsm_ray.routing.lanes import Lane
from fsm_ray.routing.route import Route
from fsm_ray.stores.base import Contents
from fsm_ray.stores.memory import MemoryStore
from fsm_ray.tally import (
    MEASURE_EVERY,
    OK,
    OPERATIONS,
    OUTCOMES,
    ClientTally,
    ShardTally,
    Spread,
    add_waits,
    outcome_of,
)

from .test_lanes import FakeConnection, settle, too_late
from .test_namespace import LEASE_S, FakeStore, Owner, set_record

ANN, BOB = encode_key("ann"), encode_key("bob")

WAITS_S = st.lists(st.integers(0, 10**11).map(lambda ns: ns / 1e9), min_size=1, max_size=50)


def write(number: int, *operations: bytes, session: bytes = bytes(16), is_resend: bool = False) -> bytes:
    return protocol.write_request(number, operations, session, is_resend=is_resend)[4:]


def a_shard(tally: ShardTally) -> Namespace:
    return Namespace("my_bot", BotOptions(), MemoryStore(), Contents(version=0), tally=tally)


@pytest.fixture
async def owner() -> Owner:
    return Owner()


def ignore(_reply: bytes) -> None: ...


@given(st.lists(st.integers(0, 2**40)))
def test_a_spread_counts_each_number_once_below_the_power_of_two_above_it(numbers: list[int]) -> None:
    spread = Spread()
    for number in numbers:
        spread.add(number)

    assert (len(spread), spread.total) == (len(numbers), sum(numbers))
    for bits in range(42):
        assert sum(spread.counts[: bits + 1]) == sum(number < 2**bits for number in numbers)


@given(WAITS_S)
def test_waits_that_are_counted_together_are_counted_as_each_by_itself(waits_s: list[float]) -> None:
    now_s = 1e6
    since_s = sorted(now_s - wait_s for wait_s in waits_s)
    together, each = Spread(), Spread()

    add_waits(together, since_s, now_s)
    for moment_s in since_s:
        each.add(int((now_s - moment_s) * 1e9))

    assert len(together) == len(each)
    assert together.total == pytest.approx(each.total, abs=len(since_s) * 1000)
    for bits in range(1, 40):
        # A wait at the very edge of a bucket may fall to either side of it, as floats have it.
        at_edge = sum(abs((now_s - moment_s) * 1e9 - 2**bits) < 2 for moment_s in since_s)
        more = sum(together.counts[:bits]) - sum(each.counts[:bits])
        assert abs(more) <= at_edge + sum(abs((now_s - s) * 1e9 - 2 ** (bits - 1)) < 2 for s in since_s)


def test_every_error_has_an_outcome_and_there_are_few() -> None:
    kinds = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, FsmRayError)
    ]

    assert {outcome_of(kind) for kind in kinds} == set(OUTCOMES) - {OK}
    assert len(OUTCOMES) <= 10


def test_every_operation_of_the_protocol_has_a_name() -> None:
    asked = {*get_args(protocol.Write), protocol.Begin, protocol.End}
    of_many = {each for each in get_args(protocol.requests.Request) if not hasattr(each, "session")}

    assert asked | of_many == set(OPERATIONS)
    assert len(set(OPERATIONS.values())) == len(OPERATIONS)


def test_operations_are_counted_by_kind_and_the_failed_ones_by_error() -> None:
    tally = ShardTally()
    shard = a_shard(tally)

    shard.handle(
        write(1, set_record(ANN), set_record(BOB, expected_version=7), protocol.clear(ANN, None)), ignore
    )
    shard.handle(protocol.read_request(READ_CONTENT, 1, [protocol.read(ANN)] * 5)[4:], ignore)

    assert (tally.operations[SetRecord], tally.operations[Clear], tally.operations[ReadContent]) == (2, 1, 5)
    assert tally.failed == {(SetRecord, VersionConflict): 1}
    assert shard.statistics().operations == 8


def test_one_of_every_sixteen_requests_is_measured() -> None:
    tally = ShardTally()
    shard = a_shard(tally)

    for number in range(1, 2 * MEASURE_EVERY + 1):
        shard.handle(write(number, set_record(ANN), set_record(BOB)), ignore)

    assert (len(tally.request_ns[WRITE]), len(tally.batch[WRITE]), tally.batch[WRITE].total) == (2, 2, 4)
    assert tally.request_ns[WRITE].total > 0
    assert tally.operations[SetRecord] == 4 * MEASURE_EVERY


async def test_requests_of_short_sessions_are_measured_now_and_then() -> None:
    tally = ShardTally()
    shard = a_shard(tally)

    async with asyncio.timeout(10):
        while not tally.request_ns[WRITE]:
            shard.handle(write(1, set_record(ANN), session=os.urandom(16)), ignore)
            await shard._tidy_up()

    assert tally.operations[SetRecord] > 1


def test_a_sign_of_life_is_no_operation() -> None:
    tally = ShardTally()
    shard = a_shard(tally)
    sign = protocol.end_turn(NO_TURN)

    turn = [protocol.begin_turn(1, ANN), sign, protocol.end_turn(1)]
    shard.handle(protocol.turn_request(1, turn, bytes(16))[4:], ignore)
    shard.refuse(protocol.turn_request(2, [sign], bytes(16))[4:], Overloaded(""))

    assert (tally.operations[Begin], tally.operations[End], tally.failed) == (1, 1, {})


def test_a_watch_that_missed_changes_has_failed() -> None:
    tally = ShardTally()

    a_shard(tally).handle(protocol.watch_request(1, (None, None), 99, 0.0)[4:], ignore)

    assert tally.operations[WatchRequest] == 1
    assert tally.failed == {(WatchRequest, ChangesMissed): 1}


def test_scans_are_all_measured() -> None:
    tally = ShardTally()
    request = protocol.count_request(2)[4:]

    a_shard(tally).handle(request, ignore)

    assert len(tally.request_ns[protocol.COUNT]) == 1
    assert len(tally.request_ns[SCAN]) == 0


def test_a_write_that_is_sent_again_is_told_from_a_new_one() -> None:
    tally = ShardTally()
    shard = a_shard(tally)

    shard.handle(write(1, set_record(ANN)), ignore)
    shard.handle(write(1, set_record(ANN), is_resend=True), ignore)

    assert (tally.operations[SetRecord], tally.answered_again) == (1, 1)


async def test_a_commit_is_timed_until_the_store_has_it_and_its_writes_until_they_are_answered() -> None:
    tally = ShardTally()
    store = FakeStore(asyncio.get_running_loop())
    shard = Namespace("my_bot", BotOptions(), store, await store.open(), tally=tally)
    replies: list[bytes] = []

    shard.handle(write(MEASURE_EVERY, set_record(ANN), set_record(BOB)), replies.append)
    before = len(tally.commit_ns), len(tally.request_ns[WRITE])
    store.done()
    await asyncio.sleep(0)

    assert before == (0, 0)
    assert len(replies) == 1
    assert (len(tally.commit_ns), tally.commit_operations.total) == (1, 2)
    assert tally.request_ns[WRITE].total >= tally.commit_ns.total > 0


async def test_operations_are_counted_when_their_commit_is_done() -> None:
    tally = ShardTally()
    store = FakeStore(asyncio.get_running_loop())
    shard = Namespace("my_bot", BotOptions(), store, await store.open(), tally=tally)

    shard.handle(write(1, set_record(ANN), set_record(BOB, expected_version=7)), ignore)
    before = tally.operations[SetRecord], dict(tally.failed)
    store.done()
    await asyncio.sleep(0)

    assert before == (0, {})
    assert (tally.operations[SetRecord], tally.failed) == (2, {(SetRecord, VersionConflict): 1})


async def test_operations_that_change_nothing_are_counted_with_the_commit_that_they_wait_for() -> None:
    class TakesTwo(FakeStore):
        max_commits: ClassVar[int] = 2

    tally = ShardTally()
    store = TakesTwo(asyncio.get_running_loop())
    shard = Namespace("my_bot", BotOptions(), store, await store.open(), tally=tally)

    shard.handle(write(1, set_record(ANN)), ignore)
    shard.handle(write(2, protocol.clear(BOB, None)), ignore)
    before = tally.operations[Clear]
    store.done()
    await asyncio.sleep(0)
    shard.handle(write(3, protocol.clear(BOB, None)), ignore)

    assert (before, tally.operations[Clear], len(store.batches)) == (0, 2, 1)


async def test_operations_of_a_commit_that_fails_are_counted_as_failed_and_once_more_when_sent_again() -> (
    None
):
    tally = ShardTally()
    for error in (OSError("disk full"), None):
        store = FakeStore(asyncio.get_running_loop())
        shard = Namespace("my_bot", BotOptions(), store, await store.open(), tally=tally)
        shard.handle(write(1, set_record(ANN), set_record(BOB, expected_version=7), is_resend=True), ignore)
        store.done(error)
        await asyncio.sleep(0)

    assert (tally.commits_failed, len(tally.commit_ns)) == (1, 1)
    assert tally.operations[SetRecord] == 4
    assert tally.failed == {(SetRecord, StoreUnavailable): 2, (SetRecord, VersionConflict): 1}
    assert outcome_of(StoreUnavailable) == "unavailable"


async def test_a_lease_that_lapsed_counts_once_as_an_ownership_lost(owner: Owner) -> None:
    owner.now_s += LEASE_S
    for _ in range(3):
        owner.serves()

    assert owner.tally.ownerships_lost == 1


@pytest.mark.parametrize(("error", "lost"), [(NotOwner("somebody else"), 1), (OSError("disk full"), 0)])
async def test_a_commit_that_finds_another_owner_counts_as_an_ownership_lost_and_no_other_does(
    owner: Owner, error: Exception, lost: int
) -> None:
    owner.client.write(set_record(ANN))
    owner.store.done(error)
    await asyncio.sleep(0)

    assert owner.tally.ownerships_lost == lost


class Direct:
    """Carries the requests of a thread to a shard that is here."""

    def __init__(self, shard: Namespace) -> None:
        self._shard = shard

    def exchange(self, request: bytes) -> bytes:
        reply = self._shard.handle(request[4:], ignore)
        assert reply is not None
        return reply[4:]

    def set_timeout(self, timeout_s: float) -> None:
        """It takes no time."""

    def close(self) -> None:
        """Nothing to release."""


@pytest.fixture
def thread() -> BlockingShard:
    """A shard with three records, as a thread sees it."""
    directory = Directory(None, 1.0)
    directory.metrics = ClientMetrics(publish_every_s=None)
    thread = BlockingShard(directory, Route("my_bot", BotOptions()), 0, 1.0, lambda: None, by_socket=False)
    thread._connection = Direct(a_shard(ShardTally()))
    thread.write([set_record(encode_key(number)) for number in range(3)])
    return thread


@pytest.fixture
async def loop_tally() -> ClientTally:
    return ClientTally()


@pytest.fixture
async def asking(loop_tally: ClientTally) -> Asking:
    """What a loop asks a shard for, which answers when the test says so."""
    asking = Asking(lambda: None, too_late, lambda: None, loop_tally)
    asking.connected(FakeConnection())
    return asking


async def ask(asking: Asking, kind: int, number: int, results: Sequence[Any]) -> None:
    """Let it ask for anything, and answer."""
    asked = asyncio.create_task(asking.ask(kind, protocol.count_request, 10))
    await settle()
    asking.answered(number, results)
    await asked


def test_a_thread_that_reads_and_writes_in_turns_measures_both(thread: BlockingShard) -> None:
    reads, writes = thread._tally.answer_ns[READ_CONTENT], thread._tally.answer_ns[WRITE]
    before = len(writes)
    for _ in range(MEASURE_EVERY):
        thread.read(READ_CONTENT, [protocol.read(ANN)])
        thread.write([set_record(ANN)])

    assert (len(reads), len(writes) - before) == (1, 1)


def test_a_thread_counts_a_page_of_a_scan_once_whatever_it_found(thread: BlockingShard) -> None:
    for number in range(MEASURE_EVERY):
        scan = (number.to_bytes(16), 0, False)
        request = functools.partial(_scan, scan)
        found = thread.ask(SCAN, request)

    assert len(found) == 4
    assert len(thread._tally.answer_ns[SCAN]) == 1


def _scan(scan: tuple[bytes, int, bool], number: int) -> bytes:
    return protocol.scan_request(number, scan, (None, None), None, 500)


@pytest.mark.parametrize(("kind", "measured"), [(SCAN, 1), (COUNT, 1), (WATCH, 0), (GRANTS, 0)])
async def test_a_loop_counts_what_it_asks_for_as_a_thread_does(
    asking: Asking, loop_tally: ClientTally, kind: int, measured: int
) -> None:
    for number in range(1, MEASURE_EVERY + 1):
        await ask(asking, kind, number, [1, 2, 3])
    await ask(asking, kind, MEASURE_EVERY + 1, [Overloaded("")])

    assert len(loop_tally.answer_ns[kind]) in (measured, 2 * measured)
    assert loop_tally.failed == {(kind, Overloaded): 1}


async def test_a_loop_counts_what_it_asked_for_in_vain(asking: Asking, loop_tally: ClientTally) -> None:
    asked = asyncio.create_task(asking.ask(WATCH, protocol.count_request, 10))
    await settle()
    asking.fail(lambda: NamespaceUnavailable(""))
    await asyncio.wait([asked])

    assert isinstance(asked.exception(), NamespaceUnavailable)
    assert loop_tally.given_up == {(WATCH, NamespaceUnavailable): 1}


async def test_the_first_request_of_a_session_is_not_always_the_measured_one(thread: BlockingShard) -> None:
    sessions: list[Any] = []
    for _ in range(100):
        sessions.append(thread.twin(1.0))
        sessions.append(Lane(WRITE, 1.0, lambda: None, too_late))
        sessions.append(Asking(lambda: None, too_late, lambda: None))

    for kind in (BlockingShard, Lane, Asking):
        of_kind = [session._measured for session in sessions if isinstance(session, kind)]
        assert len(of_kind) == 100
        assert len(set(of_kind)) > 1


def test_tallies_of_several_threads_add_up() -> None:
    first, second = ClientTally(), ClientTally()
    for tally, retries in ((first, 2), (second, 3)):
        tally.retries = retries
        tally.failed[WRITE, VersionConflict] += retries
        tally.given_up[WRITE, Overloaded] += 1
        tally.answer_ns[WRITE].add(1000)
        tally.turn_wait_ns.add(5)

    first.merge(second)

    assert (first.retries, first.failed[WRITE, VersionConflict], first.given_up[WRITE, Overloaded]) == (
        5,
        5,
        2,
    )
    assert (len(first.answer_ns[WRITE]), first.answer_ns[WRITE].total, len(first.turn_wait_ns)) == (
        2,
        2000,
        2,
    )
