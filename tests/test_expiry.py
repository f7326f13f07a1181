"""Expiry: what lives how long, and how what has expired is swept; by a clock that the test moves."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fsm_ray import protocol
from fsm_ray.codec import encode_data, encode_key
from fsm_ray.errors import StoreUnavailable, VersionConflict
from fsm_ray.namespace import expiry, serving
from fsm_ray.namespace.expiry import Deadlines, TimesToLive
from fsm_ray.options import BotOptions
from fsm_ray.protocol import ContentView
from fsm_ray.record import NEVER_MS, to_ms
from tests.test_namespace import (
    ANN,
    BOB,
    CID,
    AheadStore,
    FakeStore,
    clear,
    set_data,
    set_record,
    stop,
    until,
    update_data,
)
from tests.test_turns_at_shard import DAY_S, ForgetfulStore, TurnShard, swept

START_S = 1_000_000.0

TTL_S = 10.0

EMPTY = encode_data({}, allow_pickle=False)


def at(shard: TurnShard, passed_s: float) -> None:
    """Move the clock to this time after the start, which means a whole millisecond."""
    shard.now_s = START_S + passed_s + 0.0005


def lives_until_s(shard: TurnShard, key: bytes = ANN) -> float:
    """When the record ends, after the start."""
    (record,) = shard.client().read(key)
    deadline_ms = record.content.deadline_ms
    return math.inf if deadline_ms == NEVER_MS else deadline_ms / 1_000 - START_S


@pytest.fixture(params=[ForgetfulStore, FakeStore])
async def store(request: pytest.FixtureRequest) -> FakeStore:
    made: FakeStore = request.param(asyncio.get_running_loop())
    return made


@pytest.fixture
async def shard(store: FakeStore) -> TurnShard:
    return TurnShard(store, ttl_s=TTL_S)


@pytest.fixture
async def durable() -> TurnShard:
    return TurnShard(FakeStore(asyncio.get_running_loop()), ttl_s=TTL_S)


def patch(key: bytes = ANN, ttl_ms: int | None = None, **increment: int) -> bytes:
    return protocol.patch(
        key, (EMPTY, [], encode_data(increment, allow_pickle=False), EMPTY), None, ttl_ms=ttl_ms
    )


def timed(ttl_s: float, key: bytes = ANN, flow: str | None = None, state: str | None = None) -> bytes:
    """A write that gives a time to live."""
    return protocol.set_record(key, flow, state, EMPTY, None, ttl_ms=to_ms(ttl_s))


class TestTimesToLive:
    @pytest.mark.parametrize(
        ("flow", "state", "ttl_ms"),
        [
            (None, None, 10_000),
            ("flow", None, 10_000),
            ("flow", "other", 10_000),
            ("flow", "quick", 1_000),
            (None, "quick", 1_000),
            ("flow", "slow", 99_000),
            ("other", "slow", 10_000),
            (None, "slow", 10_000),
            (None, "flow:slow", 99_000),
            ("None", "state", 5_000),
            (None, "state", 10_000),
            ("special", "quick", 3_000),
        ],
    )
    def test_the_flow_and_state_come_before_the_state_and_that_before_the_bot(
        self, flow: str | None, state: str | None, ttl_ms: int
    ) -> None:
        by_state = {"quick": 1.0, "flow:slow": 99.0, "None:state": 5.0, "special:quick": 3.0}
        times = TimesToLive(BotOptions(ttl_s=10.0, state_ttl_s=by_state))

        assert times.ttl_ms(flow, state) == ttl_ms

    def test_without_any_nothing_expires_by_itself(self) -> None:
        times = TimesToLive(BotOptions())

        assert not times.are_given
        assert times.ttl_ms("flow", "state") == NEVER_MS
        assert TimesToLive(BotOptions(state_ttl_s={"quick": 1.0})).are_given
        assert TimesToLive(BotOptions(ttl_s=1.0)).are_given


KEYS = [ANN, BOB, CID]


def kept(deadlines: Deadlines) -> int:
    """How many keys are in it, those that were left behind counted."""
    assert len(deadlines._order) <= 2 * len(deadlines._buckets) + expiry._FEW
    assert deadlines._left_behind.keys() <= deadlines._buckets.keys()
    return sum(map(len, deadlines._buckets.values()))


class TestDeadlines:
    def test_a_key_is_due_within_a_second_after_its_deadline_and_once(self) -> None:
        deadlines = Deadlines()
        deadlines.add(ANN, 5_000)
        due = [list(deadlines.take_due(now_ms)) for now_ms in (5_000, 5_999, 6_000, 6_000)]

        assert due == [[], [], [ANN], []]
        assert len(deadlines) == 0

    def test_one_that_is_put_off_a_thousand_times_takes_one_place(self) -> None:
        deadlines = Deadlines()
        for deadline_ms in range(0, 10_000_000, 10_000):
            deadlines.add(ANN, deadline_ms)

        assert len(deadlines) == sum(map(len, deadlines._buckets.values())) == 1
        assert list(deadlines.take_due(10_000_000)) == [ANN]

    def test_one_that_comes_earlier_than_it_was_is_due_then_and_not_again(self) -> None:
        deadlines = Deadlines()
        deadlines.add(ANN, 50_000)
        deadlines.add(ANN, 5_000)

        assert list(deadlines.take_due(6_000)) == [ANN]
        assert list(deadlines.take_due(60_000)) == []
        assert deadlines._buckets == {}

    def test_one_that_is_removed_is_not_due(self) -> None:
        deadlines = Deadlines()
        for key in (ANN, BOB):
            deadlines.add(key, 5_000)
        deadlines.remove(ANN)
        deadlines.remove(CID)

        assert len(deadlines) == 1
        assert list(deadlines.take_due(6_000)) == [BOB]

    def test_one_that_comes_and_goes_a_thousand_times_leaves_nothing_behind(self) -> None:
        deadlines = Deadlines()
        for number in range(1_000):
            deadlines.add(b"%d" % number, 5_000 * number)
            deadlines.remove(b"%d" % number)

        assert kept(deadlines) == 0

    def test_one_that_moves_to_and_fro_leaves_little_behind(self) -> None:
        deadlines = Deadlines()
        for now_ms in range(0, 10_000_000, 10_000):
            deadlines.add(ANN, now_ms + 90_000_000)
            deadlines.add(ANN, now_ms + 1_000)
            assert list(deadlines.take_due(now_ms + 2_000)) == [ANN]
            deadlines.add(ANN, now_ms + 90_000_000)

        assert kept(deadlines) == 1

    def test_what_never_ends_takes_no_place(self) -> None:
        deadlines = Deadlines()
        deadlines.add(ANN, NEVER_MS)

        assert len(deadlines) == 0

    def test_keys_may_come_while_others_are_taken(self) -> None:
        deadlines = Deadlines()
        for key in (ANN, BOB):
            deadlines.add(key, 5_000)
        due = deadlines.take_due(10_000)
        first = next(due)
        deadlines.add(CID, 1_000)
        deadlines.add(first, 20_000)

        assert sorted([first, *due]) == sorted([ANN, BOB, CID])
        assert list(deadlines.take_due(30_000)) == [first]

    @given(
        st.lists(
            st.tuples(
                st.sampled_from(["add", "remove", "take"]), st.sampled_from(KEYS), st.integers(0, 9_999)
            ),
            max_size=50,
        )
    )
    def test_each_key_is_due_once_for_the_earliest_of_its_deadlines(
        self, steps: list[tuple[str, bytes, int]]
    ) -> None:
        deadlines = Deadlines()
        earliest: dict[bytes, int] = {}
        for step, key, time_ms in steps:
            if step == "add":
                deadlines.add(key, time_ms)
                earliest[key] = min(time_ms, earliest.get(key, time_ms))
            elif step == "remove":
                deadlines.remove(key)
                earliest.pop(key, None)
            if step != "take":
                assert kept(deadlines) <= 2 * len(earliest)
                continue
            taken = list(deadlines.take_due(time_ms))
            assert len(taken) == len(set(taken))
            assert all(earliest[each] < time_ms for each in taken)
            assert {each for each, due_ms in earliest.items() if due_ms + 1_000 <= time_ms} <= set(taken)
            for each in taken:
                del earliest[each]

        assert len(deadlines) == len(earliest)


Step = Callable[[TurnShard], Awaitable[Any]]


def write(*operations: bytes) -> Step:
    return lambda shard: shard.write(*operations)


def turn(data: dict[str, Any], **more: Any) -> Step:
    """A turn that leaves this."""

    async def handle(shard: TurnShard) -> None:
        worker = shard.worker("turn")
        record = worker.begin()
        worker.commit(record.content.version, data, **more)
        await shard.settled()
        (result,) = worker.results
        assert type(result) is int

    return handle


RULES: dict[str, Any] = {"ttl_s": TTL_S, "state_ttl_s": {"quick": 2.0, "flow:slow": 100.0}}

QUICK = set_record(ANN, state="quick")
TIMED = timed(50.0)

# What is done at the start, what 1 second later, and when the record ends then.
IDLE: dict[str, tuple[Step, Step, float]] = {
    "set_record": (write(set_record(ANN)), write(set_record(ANN)), 11),
    "set_data": (write(set_record(ANN)), write(set_data(ANN)), 11),
    "enter_state": (write(set_record(ANN)), write(protocol.enter_state(ANN, (None, "s"), None)), 11),
    "update_data": (write(set_record(ANN)), write(update_data(ANN, a=1)), 11),
    "patch": (write(set_record(ANN)), write(patch(a=1)), 11),
    "a turn": (write(set_record(ANN)), turn({"a": 1}), 11),
    "a turn that changes nothing": (write(set_record(ANN)), turn({}), 11),
    "a state with a time of its own": (write(set_record(ANN)), write(QUICK), 3),
    "a write in this state": (write(QUICK), write(update_data(ANN)), 3),
    "out of this state": (write(QUICK), write(set_record(ANN, state="other")), 11),
    "a state of this flow": (write(QUICK), write(set_record(ANN, "flow", "slow")), 101),
    "a state of another flow": (write(QUICK), write(set_record(ANN, "other", "slow")), 11),
    "a time that a write gave, by set_data": (write(TIMED), write(set_data(ANN)), 51),
    "by update_data": (write(TIMED), write(update_data(ANN, a=1)), 51),
    "by patch": (write(TIMED), write(patch(a=1)), 51),
    "by enter_state that stays": (write(TIMED), write(protocol.enter_state(ANN, (None, None), None)), 51),
    "by enter_state that moves": (write(TIMED), write(protocol.enter_state(ANN, (None, "s"), None)), 11),
    "by a turn that stays": (write(TIMED), turn({"a": 1}), 51),
    "by a turn that changes nothing": (write(TIMED), turn({}), 51),
    "by a turn that moves": (write(TIMED), turn({}, state="other"), 11),
    "by set_record": (write(TIMED), write(set_record(ANN)), 11),
    "by clear": (write(TIMED), write(clear(ANN), update_data(ANN)), 11),
    "by another": (write(TIMED), write(timed(5.0)), 6),
    "in a state": (write(QUICK), write(timed(50.0, state="quick")), 51),
    "given by a turn": (write(set_record(ANN)), turn({}, ttl_ms=3_000), 4),
    "given by patch": (write(set_record(ANN)), write(patch(ttl_ms=3_000, a=1)), 4),
    "for ever, by update_data": (write(timed(math.inf)), write(update_data(ANN)), math.inf),
    "for ever, by set_record": (write(timed(math.inf)), write(set_record(ANN)), 11),
    "for ever, from now on": (write(set_record(ANN)), write(timed(math.inf)), math.inf),
    "too long to be counted": (
        write(set_record(ANN)),
        write(protocol.set_data(ANN, EMPTY, None, NEVER_MS - 1)),
        math.inf,
    ),
}

ABSOLUTE: dict[str, tuple[Step, Step, float]] = {
    "set_record": (write(set_record(ANN)), write(set_record(ANN)), 10),
    "set_data": (write(set_record(ANN)), write(set_data(ANN)), 10),
    "update_data": (write(set_record(ANN)), write(update_data(ANN, a=1)), 10),
    "patch": (write(set_record(ANN)), write(patch(a=1)), 10),
    "a turn": (write(set_record(ANN)), turn({"a": 1}), 10),
    "a turn that changes nothing": (write(set_record(ANN)), turn({}), 10),
    "a turn that moves": (write(set_record(ANN)), turn({}, state="quick"), 3),
    "into a state": (write(set_record(ANN)), write(QUICK), 3),
    "in a state": (write(QUICK), write(QUICK), 2),
    "a time that a write gave": (write(TIMED), write(update_data(ANN, a=1)), 50),
    "it is given": (write(set_record(ANN)), write(timed(50.0)), 51),
    "it is given again": (write(TIMED), write(timed(50.0)), 51),
    "it is taken": (write(TIMED), write(set_record(ANN)), 11),
    "for ever": (write(timed(math.inf)), write(update_data(ANN)), math.inf),
    "a new conversation": (write(set_record(ANN)), write(clear(ANN), set_record(ANN)), 11),
}


class TestWhatLivesHowLong:
    async def lives(self, shard: TurnShard, steps: tuple[Step, Step]) -> float:
        await steps[0](shard)
        at(shard, 1)
        await steps[1](shard)
        if shard.is_durable:
            lives_s = lives_until_s(shard)
            shard.restart()
            assert lives_until_s(shard) == lives_s
        return lives_until_s(shard)

    @pytest.mark.parametrize(("first", "second", "until_s"), IDLE.values(), ids=IDLE)
    async def test_idle(self, store: FakeStore, first: Step, second: Step, until_s: float) -> None:
        assert await self.lives(TurnShard(store, **RULES), (first, second)) == until_s

    @pytest.mark.parametrize(("first", "second", "until_s"), ABSOLUTE.values(), ids=ABSOLUTE)
    async def test_absolute(self, store: FakeStore, first: Step, second: Step, until_s: float) -> None:
        assert await self.lives(TurnShard(store, ttl_mode="absolute", **RULES), (first, second)) == until_s

    async def test_where_no_state_has_its_own_an_absolute_time_counts_on_from_state_to_state(
        self, store: FakeStore
    ) -> None:
        shard = TurnShard(store, ttl_s=TTL_S, ttl_mode="absolute")
        steps = write(set_record(ANN)), write(set_record(ANN, "flow", "state"))

        assert await self.lives(shard, steps) == 10

    async def test_a_time_that_one_write_gives_concerns_its_record_alone(self, store: FakeStore) -> None:
        shard = TurnShard(store)
        await shard.write(set_record(ANN, "flow"), timed(5.0, BOB, "flow"))
        await shard.write(set_record(ANN, "other"), update_data(ANN, a=1), set_record(CID))
        records = shard.namespace.statistics().records
        at(shard, 6)
        await swept(shard)

        assert lives_until_s(shard, ANN) == lives_until_s(shard, CID) == math.inf
        assert shard.client().read(BOB) == [None]
        assert (records, shard.namespace.statistics().records) == (3, 2)


# An operation on what was version 1, what is seen of its result where that is there, and where it is not.
EXACT: dict[str, tuple[bytes, Any, Any]] = {
    "update_data": (update_data(ANN, b=1), {"a": 1, "b": 1}, {"b": 1}),
    "patch": (patch(a=1), {"a": 2}, {"a": 1}),
    "clear": (clear(ANN), True, False),
    "clear what is expected": (clear(ANN, 1), True, "conflict with None"),
    "expect it": (set_data(ANN, 1), 2, "conflict with None"),
    "expect none": (set_record(ANN, expected_version=0), "conflict with 1", 2),
    "expect none to update": (update_data(ANN, 0, b=1), "conflict with 1", {"b": 1}),
}


def seen(result: Any) -> Any:
    if isinstance(result, VersionConflict):
        return f"conflict with {result.actual_version}"
    return result.data if isinstance(result, ContentView) else result


class TestExactness:
    @pytest.mark.parametrize("passed_s", [9.999, 10.0])
    async def test_reads(self, shard: TurnShard, passed_s: float) -> None:
        await shard.write(set_record(ANN))
        at(shard, passed_s)
        found = [*shard.client().read(ANN), shard.worker("ann").begin()]

        assert [record is not None for record in found] == [passed_s < TTL_S] * 2

    @pytest.mark.parametrize("passed_s", [9.999, 10.0])
    @pytest.mark.parametrize(("operation", "there", "gone"), EXACT.values(), ids=EXACT)
    async def test_writes(
        self, shard: TurnShard, passed_s: float, operation: bytes, there: Any, gone: Any
    ) -> None:
        await shard.write(set_record(ANN, "flow", "state", a=1))
        at(shard, passed_s)
        (result,) = await shard.write(operation)

        assert seen(result) == (there if passed_s < TTL_S else gone)

    async def test_flow_and_state_are_gone_with_the_data(self, shard: TurnShard) -> None:
        await shard.write(set_record(ANN, "flow", "state", a=1))
        at(shard, 10)
        await shard.write(set_data(ANN, b=1))
        (record,) = shard.client().read(ANN)

        assert (record.flow, record.state, record.content.data) == (None, None, {"b": 1})
        assert shard.namespace.statistics().records == 1

    async def test_a_clock_that_goes_back_brings_back_what_was_not_swept(self, shard: TurnShard) -> None:
        await shard.write(set_record(ANN))
        at(shard, 10)
        gone = shard.client().read(ANN)
        at(shard, 5)
        await swept(shard)

        assert gone == [None]
        assert lives_until_s(shard) == 10


class TestTurns:
    @pytest.mark.parametrize("mode", ["idle", "absolute"])
    @pytest.mark.parametrize("data", [{"a": 1}, {"a": 2}], ids=["same", "changed"])
    async def test_what_expires_while_a_turn_has_it_is_committed_and_lives_anew(
        self, store: FakeStore, mode: str, data: dict[str, int]
    ) -> None:
        shard = TurnShard(store, ttl_s=TTL_S, ttl_mode=mode)
        await shard.write(set_record(ANN, "flow", a=1))
        worker = shard.worker("ann")
        worker.begin()
        at(shard, 20)
        await swept(shard)
        read = shard.client().read(ANN)
        worker.commit(1, data, flow="flow")
        await shard.settled()

        assert read == [None]
        assert worker.results == [2]
        assert lives_until_s(shard) == 30
        assert shard.client().read(ANN)[0].content.data == data
        assert shard.namespace.statistics().records == 1

    async def test_it_keeps_a_time_that_a_write_gave(self, store: FakeStore) -> None:
        shard = TurnShard(store)
        await shard.write(timed(5.0))
        worker = shard.worker("ann")
        worker.begin()
        at(shard, 20)
        worker.commit(1, {"a": 1})
        await shard.settled()

        assert lives_until_s(shard) == 25

    async def test_it_can_be_removed(self, shard: TurnShard) -> None:
        await shard.write(set_record(ANN))
        worker = shard.worker("ann")
        worker.begin()
        at(shard, 20)
        worker.commit(1, None)
        await shard.settled()

        assert worker.results == [0]
        assert shard.namespace.statistics().records == 0

    async def test_a_turn_that_begins_after_the_end_finds_none_and_begins_one(self, shard: TurnShard) -> None:
        await shard.write(set_record(ANN, a=1))
        at(shard, 10)
        worker = shard.worker("ann")
        begun = worker.begin()
        worker.commit(0, {"b": 1})
        await shard.settled()

        assert begun is None
        assert worker.results == [2]
        assert shard.client().read(ANN)[0].content.data == {"b": 1}

    async def test_a_write_after_the_end_is_a_conflict_for_the_turn(self, shard: TurnShard) -> None:
        await shard.write(set_record(ANN, a=1))
        worker = shard.worker("ann")
        worker.begin()
        at(shard, 10)
        await shard.write(update_data(ANN, b=1))
        worker.commit(1, {})
        await shard.settled()

        assert [type(result) for result in worker.results] == [VersionConflict]
        assert shard.client().read(ANN)[0].content.data == {"b": 1}

    async def test_what_is_remembered_is_not_swept_when_the_record_before_it_would_be(
        self, shard: TurnShard
    ) -> None:
        await shard.write(set_record(ANN))
        worker = shard.worker("ann")
        worker.begin()
        worker.commit(1, None, update_id=7)
        await shard.settled()
        at(shard, 12)
        await swept(shard)

        assert worker.begin().content.updates == [7]

    async def test_updates_outlive_the_data_by_a_day(self, shard: TurnShard) -> None:
        worker = shard.worker("ann")
        worker.begin()
        worker.commit(0, {"a": 1}, flow="flow", update_id=7)
        await shard.settled()
        found = []
        for passed_s in (9.0, 10.0, 12.0, DAY_S, DAY_S + 14):
            at(shard, passed_s)
            if passed_s != 10.0:
                await swept(shard)
            record = worker.begin()
            worker.end()
            updates = None if record is None else record.content.updates
            found.append((updates, shard.client().read(ANN) != [None], shard.namespace.statistics().records))

        assert found == [([7], True, 1), ([7], False, 1), ([7], False, 0), ([7], False, 0), (None, False, 0)]
        assert shard.store.contents().records == {}


class TestSweep:
    async def test_it_goes_in_steps(self, shard: TurnShard, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(serving, "_SWEPT_AT_ONCE", 3)
        await shard.write(*(set_record(encode_key(number)) for number in range(7)))
        at(shard, 12)
        left = []
        while shard.namespace.sweep():
            await shard.settled()
            left.append(shard.namespace.statistics().records)

        assert left == [4, 1, 0]
        assert shard.namespace.sweep() is False
        assert shard.namespace.statistics().version == 14

    async def test_a_step_is_one_commit_and_the_store_is_rid_of_them(self, durable: TurnShard) -> None:
        await durable.write(set_record(ANN), set_record(BOB), timed(60.0, CID))
        at(durable, 12)
        await swept(durable)

        assert durable.store.batches[-1].records == {ANN: None, BOB: None}
        assert len(durable.store.batches) == 2
        assert durable.store.contents().records.keys() == {CID}
        assert durable.store.contents().version == 5

    async def test_what_was_put_off_is_swept_in_its_time(self, shard: TurnShard) -> None:
        await shard.write(set_record(ANN))
        at(shard, 8)
        await shard.write(update_data(ANN))
        left = []
        for passed_s in (12, 17.9, 19):
            at(shard, passed_s)
            await swept(shard)
            left.append(shard.namespace.statistics().records)

        assert left == [1, 1, 0]

    async def test_a_record_takes_one_place_however_often_it_is_written(self, store: FakeStore) -> None:
        shard = TurnShard(store, **RULES)
        deadlines = shard.namespace._evaluator.deadlines
        sizes = []
        for second in range(50):
            at(shard, second)
            await swept(shard)
            await shard.write(QUICK, set_record(ANN), timed(50.0), timed(math.inf), set_record(ANN))
            sizes.append(sum(map(len, deadlines._buckets.values())))

        assert max(sizes) <= 5
        at(shard, 100)
        await swept(shard)
        assert (len(deadlines), shard.namespace.statistics().records) == (0, 0)

    async def test_what_was_cleared_waits_for_no_sweep(self, store: FakeStore) -> None:
        shard = TurnShard(store, ttl_s=30 * DAY_S)
        for number in range(100):
            await shard.write(set_record(encode_key(number)), set_record(ANN))
            await shard.write(clear(encode_key(number)))

        assert len(shard.namespace._evaluator.deadlines) == 1

    async def test_what_is_made_while_it_is_cleared_is_swept(self) -> None:
        store = AheadStore(asyncio.get_running_loop())
        ahead = TurnShard(store, ttl_s=TTL_S)
        ahead.client("one").write(set_record(ANN))
        await store.done_with_one()
        ahead.client("two").write(clear(ANN))
        ahead.client("three").write(set_record(ANN))
        while store.commits:
            await store.done_with_one()
        at(ahead, 12)
        assert ahead.namespace.sweep()
        await store.done_with_one()

        assert ahead.namespace.statistics().records == 0

    async def test_what_a_turn_has_is_swept_when_the_turn_has_ended(self, shard: TurnShard) -> None:
        await shard.write(set_record(ANN))
        worker = shard.worker("ann")
        worker.begin()
        left = []
        for passed_s in (12, 14):
            at(shard, passed_s)
            await swept(shard)
            left.append(shard.namespace.statistics().records)
        worker.end()
        at(shard, 16)
        await swept(shard)

        assert left == [1, 1]
        assert shard.namespace.statistics().records == 0

    async def test_after_a_restart_what_has_expired_is_none_and_is_swept(self, durable: TurnShard) -> None:
        await durable.write(set_record(ANN), timed(60.0, BOB))
        at(durable, 12)
        durable.restart()
        read = durable.client().read(ANN)
        await swept(durable)

        assert read == [None]
        assert durable.store.contents().records.keys() == {BOB}
        assert lives_until_s(durable, BOB) == 60

    async def test_it_waits_for_the_commit_under_way(self, durable: TurnShard) -> None:
        await durable.write(set_record(ANN), set_record(BOB))
        at(durable, 12)
        late, later = durable.client("late"), durable.client("later")
        late.write(set_record(CID))
        later.write(set_record(BOB, a=1))
        swept_again = [durable.namespace.sweep(), durable.namespace.sweep()]
        batches = len(durable.store.batches)
        await durable.settled()

        assert swept_again == [True, True]
        assert batches == 2
        assert durable.store.batches[-1].records.keys() == {ANN, BOB}
        assert durable.store.contents().records.keys() == {BOB, CID}
        assert durable.namespace.sweep() is False
        assert durable.namespace.statistics().records == 2

    async def test_it_goes_by_what_the_commit_under_way_leaves(self) -> None:
        store = AheadStore(asyncio.get_running_loop())
        ahead = TurnShard(store, ttl_s=TTL_S)
        ahead.client("first").write(set_record(ANN), set_record(BOB), set_record(CID))
        await store.done_with_one()
        at(ahead, 12)
        ahead.client("second").write(set_record(ANN, "again"), clear(CID))
        ahead.namespace.sweep()
        under_way = [sorted(batch.records) for batch, _ in store.commits]
        await store.done_with_one()
        await store.done_with_one()

        assert under_way == [[ANN], sorted([BOB, CID])]
        assert store.contents().records.keys() == {ANN}
        assert ahead.namespace.statistics().records == 1

    async def test_a_clock_that_goes_back_before_the_commit_saves_the_record(
        self, durable: TurnShard
    ) -> None:
        await durable.write(set_record(ANN))
        at(durable, 12)
        durable.client("late").write(set_record(BOB))
        durable.namespace.sweep()
        at(durable, 5)
        await durable.settled()
        kept = durable.client().read(ANN)
        at(durable, 12)
        await swept(durable)

        assert kept != [None]
        assert durable.store.contents().records.keys() == {BOB}

    async def test_what_is_remembered_of_the_largest_record_is_not_too_large(self, store: FakeStore) -> None:
        shard = TurnShard(store, ttl_s=TTL_S, max_record_bytes=256)
        largest = b"k" * 250
        worker = shard.worker("ann")
        worker.begin(largest)
        worker.commit(0, {}, key=largest, update_id=7)
        await shard.settled()
        await shard.write(*[set_record(ANN)] * 200)  # versions take more bytes from here on
        at(shard, 12)
        await swept(shard)

        assert worker.results == [1]
        assert worker.begin(largest).content.updates == [7]

    async def test_it_ends_when_the_namespace_stops(self, durable: TurnShard) -> None:
        await durable.write(set_record(ANN))
        at(durable, 12)
        durable.client("late").write(set_record(BOB))
        durable.namespace.sweep()
        durable.store.done(StoreUnavailable("no"))
        await asyncio.sleep(0)

        assert durable.namespace.sweep() is False

    async def test_it_goes_on_by_itself(self, shard: TurnShard, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(serving, "TICK_S", 0.001)
        monkeypatch.setattr(serving, "_SWEPT_AT_ONCE", 2)
        await shard.write(*(set_record(encode_key(number)) for number in range(5)))
        tidying = asyncio.create_task(shard.namespace.keep_tidy())

        def is_empty() -> bool:
            if shard.store.commit_under_way:
                shard.store.done()
            return not shard.namespace.statistics().records

        at(shard, 12)
        await until(is_empty)
        await stop(tidying)
