"""Evaluation: patches, and transactions, of which all takes effect or nothing."""

from __future__ import annotations

import asyncio
import copy
import datetime
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Raw
from msgspec.msgpack import encode

from fsm_ray import protocol
from fsm_ray.codec import encode_data
from fsm_ray.errors import FsmRayError, InvalidPatch, RecordTooLarge, VersionConflict
from fsm_ray.namespace.evaluation import Effects, Evaluator
from fsm_ray.namespace.leases import TurnId
from fsm_ray.options import BotOptions
from fsm_ray.protocol import (
    Clear,
    CommitTurn,
    ContentView,
    EnterState,
    Operation,
    Patch,
    SetData,
    SetRecord,
    Transact,
    UpdateData,
)
from fsm_ray.record import MAX_FRONT_BYTES, NEVER_MS, Census, Packer, content_of, deadline_of, head_of
from tests.test_namespace import (
    ANN,
    BOB,
    CID,
    AheadStore,
    FakeStore,
    clear,
    set_data,
    set_record,
    update_data,
    view,
)
from tests.test_turns_at_shard import ForgetfulStore, TurnShard, swept

LONG = "x" * MAX_FRONT_BYTES


@pytest.fixture(params=[ForgetfulStore, FakeStore])
async def store(request: pytest.FixtureRequest) -> FakeStore:
    made: FakeStore = request.param(asyncio.get_running_loop())
    return made


@pytest.fixture
async def shard(store: FakeStore) -> TurnShard:
    return TurnShard(store)


def encoded(data: dict[str, Any] | None) -> bytes:
    return encode_data(data or {}, allow_pickle=True)


def patch(
    key: bytes = ANN,
    expected_version: int | None = None,
    *,
    put: dict[str, Any] | None = None,
    unset: tuple[str, ...] = (),
    increment: dict[str, Any] | None = None,
    append: dict[str, Any] | None = None,
) -> bytes:
    changes = (encoded(put), unset, encoded(increment), encoded(append))
    return protocol.patch(key, changes, expected_version)


class TestPatch:
    async def test_it_sets_then_unsets_then_increments_then_appends(self, shard: TurnShard) -> None:
        await shard.write(set_record(ANN, "flow", "state", old=1, gone=2))
        (result,) = await shard.write(
            patch(
                put={"n": 5, "items": [1], "never": 0},
                unset=("gone", "never", "absent"),
                increment={"n": 2, "gone": 1},
                append={"items": 2},
            )
        )
        data = {"old": 1, "n": 7, "items": [1, 2], "gone": 1}

        assert result == ContentView(data, 2)
        assert shard.client().read(ANN) == [view("flow", "state", data, 2)]

    async def test_where_there_is_no_record_it_makes_one(self, shard: TurnShard) -> None:
        await shard.write(patch(ANN, 0, increment={"n": 1}, append={"items": "a"}))

        assert shard.client().read(ANN) == [view(None, None, {"n": 1, "items": ["a"]}, 1)]

    @pytest.mark.parametrize(
        ("stored", "amount", "total"),
        [
            (1, 2, 3),
            (5, -7, -2),
            (1, 0.5, 1.5),
            (0.5, 1, 1.5),
            (1.0, 1, 2.0),
            ((1 << 64) - 1, 1, 1 << 64),
            (1 << 64, -1, (1 << 64) - 1),
            (-(1 << 63), -1, -(1 << 63) - 1),
            (1 << 200, -(1 << 200), 0),
            (math.inf, 1, math.inf),
        ],
    )
    async def test_an_increment_is_the_sum_of_ints_of_any_size_and_floats(
        self, shard: TurnShard, stored: Any, amount: Any, total: Any
    ) -> None:
        await shard.write(set_data(ANN, n=stored))
        (result,) = await shard.write(patch(increment={"n": amount}))

        assert repr(result.data) == repr({"n": total})

    @pytest.mark.parametrize(
        "item", ["a", None, (1, 2), {3}, datetime.date(2026, 1, 2), [[]], 1 << 99], ids=repr
    )
    async def test_an_item_of_any_type_is_appended_as_it_is(self, shard: TurnShard, item: Any) -> None:
        await shard.write(protocol.set_data(ANN, encoded({"items": [item]}), None))
        (result,) = await shard.write(patch(append={"items": item, "new": item}))

        assert result.data == {"items": [item, item], "new": [item]}

    @pytest.mark.parametrize(
        ("stored", "amount"),
        [("x", 1), (True, 1), (None, 1), ([1], 1), ((1,), 1), (datetime.date(2026, 1, 2), 1), (1, "x")],
        ids=repr,
    )
    async def test_what_is_no_number_is_not_incremented(
        self, shard: TurnShard, stored: Any, amount: Any
    ) -> None:
        await self.is_refused(shard, stored, increment={"n": 1, "value": amount})

    async def test_an_int_that_no_float_can_hold_and_a_float_have_no_sum(self, shard: TurnShard) -> None:
        await self.is_refused(shard, 10**400, increment={"value": 0.5})

    @pytest.mark.parametrize("stored", ["x", 1, None, (1,), {1}, {}], ids=repr)
    async def test_nothing_is_appended_to_what_is_no_list(self, shard: TurnShard, stored: Any) -> None:
        await self.is_refused(shard, stored, append={"items": 1, "value": 1})

    async def is_refused(self, shard: TurnShard, stored: Any, **invalid: Any) -> None:
        data = {"n": 1, "items": [], "value": stored}
        await shard.write(protocol.set_data(ANN, encoded(data), None))
        error, other = await shard.write(patch(put={"new": 1}, unset=("n",), **invalid), set_data(BOB))

        assert type(error) is InvalidPatch
        assert (error.key, error.field) == ("ann", "value")
        assert shard.client().read(ANN) == [view(None, None, data, 1)]
        assert other == 2

    async def test_text_that_no_client_of_ours_writes_is_no_number_either(self, shard: TurnShard) -> None:
        malformed = b"\x82\xa1a\xa1\xff\xa1b\x91\xa1\xff"
        await shard.write(protocol.set_data(ANN, malformed, None))
        results = await shard.write(patch(increment={"a": 1}), patch(append={"a": 1}))

        assert [type(result) for result in results] == [InvalidPatch] * 2

    async def test_another_version_than_expected_comes_before_all_else(self, shard: TurnShard) -> None:
        await shard.write(set_data(ANN, n="x"))
        (error,) = await shard.write(patch(ANN, 9, increment={"n": 1}))

        assert type(error) is VersionConflict


@pytest.mark.parametrize(("flow", "other"), [("a", "b"), (LONG + "a", LONG + "b"), ("a", LONG), (LONG, "a")])
async def test_counts_follow_records_from_front_to_front(store: FakeStore, flow: str, other: str) -> None:
    shard = TurnShard(store)
    await shard.write(set_record(ANN, flow), set_record(BOB, flow), update_data(ANN, a=1))
    await shard.write(set_record(ANN, other), set_data(ANN), set_record(CID, other), clear(CID))
    counts = shard.namespace._counts
    packer = shard.namespace._packer

    assert {packer.front(head)[0]: count for head, count in counts.items()} == {flow: 1, other: 1}


class TestTransactions:
    async def test_all_of_it_is_one_commit_and_answered_with_the_last_version(self, shard: TurnShard) -> None:
        await shard.write(set_record(BOB), set_record(CID))
        operations = [
            set_record(ANN, "flow", n=1),
            update_data(ANN, 3, a=1),
            patch(ANN, 4, increment={"n": 1}),
            clear(BOB),
            set_data(CID, 2, c=1),
            set_record(BOB, "again", expected_version=0),
        ]
        results = await shard.write(protocol.transact(operations))

        assert results == [8]
        assert shard.client().read(ANN, BOB, CID) == [
            view("flow", None, {"n": 2, "a": 1}, 5),
            view("again", None, {}, 8),
            view(None, None, {"c": 1}, 7),
        ]
        if shard.is_durable:
            assert shard.store.batches[-1].records.keys() == {ANN, BOB, CID}

    async def test_an_empty_one_changes_nothing(self, shard: TurnShard) -> None:
        await shard.write(set_record(ANN))

        assert await shard.write(protocol.transact([])) == [1]

    @pytest.mark.parametrize(
        ("failing", "error"),
        [
            (set_data(BOB, 9), VersionConflict),
            (patch(BOB, increment={"text": 1}), InvalidPatch),
            (set_data(BOB, text="x" * 999), RecordTooLarge),
        ],
        ids=["version", "patch", "size"],
    )
    async def test_when_one_fails_nothing_is_changed_and_its_key_is_named(
        self, store: FakeStore, failing: bytes, error: type[FsmRayError]
    ) -> None:
        shard = TurnShard(store, max_record_bytes=999)
        await shard.write(set_record(ANN, a=1), set_record(BOB, text=""))
        before = shard.client().read(ANN, BOB, CID)
        results = await shard.write(
            protocol.transact([update_data(ANN, b=1), set_record(CID), clear(ANN), failing, clear(BOB)]),
            set_data(BOB, 2, text="other"),
        )

        assert type(results[0]) is error
        assert results[0].key == "bob"
        assert results[1] == 3
        assert shard.client().read(ANN, CID) == [before[0], before[2]]
        assert shard.namespace.statistics().records == 2

    async def test_over_what_is_being_committed(self) -> None:
        store = AheadStore(asyncio.get_running_loop())
        ahead = TurnShard(store)
        first, second = ahead.client("first"), ahead.client("second")
        first.write(set_record(ANN, a=1), set_record(BOB))
        await store.done_with_one()
        first.write(update_data(ANN, b=1), clear(BOB))
        failing = protocol.transact([update_data(ANN, 3, c=1), set_record(BOB), set_data(CID, 9)])
        second.write(failing, protocol.transact([update_data(ANN, 3, d=1), set_record(BOB, "new")]))
        for _ in range(2):
            await store.done_with_one()

        assert [type(result) for result in second.results] == [VersionConflict, int]
        assert ahead.client().read(ANN, BOB, CID) == [
            view(None, None, {"a": 1, "b": 1, "d": 1}, 5),
            view("new", None, {}, 6),
            None,
        ]
        assert ahead.namespace.statistics().records == 2


KEYS = [ANN, BOB, CID]

values = st.sampled_from([1, "x", "x" * 90]).map(lambda value: Raw(encode(value)))
fields = st.dictionaries(st.sampled_from("ab"), values, max_size=2)
expected = st.none() | st.none() | st.integers(0, 9)
ttls = st.none() | st.sampled_from([1, 500, 5_000])
keys = st.sampled_from(KEYS)
flows = st.sampled_from([None, "flow", LONG])
numbers = st.dictionaries(st.sampled_from("ab"), st.just(Raw(b"\x01")), max_size=1)
operations = st.one_of(
    st.builds(SetRecord, keys, flows, st.none(), fields, expected, ttls),
    st.builds(SetData, keys, fields, expected, ttls),
    st.builds(EnterState, keys, flows, st.none(), expected, ttls),
    st.builds(UpdateData, keys, fields, expected, ttls),
    st.builds(Clear, keys, expected),
    st.builds(Patch, keys, fields, st.just(["a"]), numbers, st.just({}), expected, ttls),
)
several = st.lists(operations, max_size=6)


class Evaluated:
    """An evaluator, and what was there before the commit that it goes on with."""

    def __init__(self, committed: list[Operation], begun: list[Operation], *, is_durable: bool) -> None:
        self.records: dict[bytes, bytes | None] = {}
        self.counts: Counter[bytes] = Counter()
        self.effects = Effects(self.records, moved=self.counts)
        self.evaluator = Evaluator(
            "bot",
            BotOptions(max_record_bytes=256 + MAX_FRONT_BYTES),
            Packer(),
            version=0,
            census=Census(),
            below=self.records.get,
            now_ms=0,
            check_turn=no_turn,
        )
        self.evaluator.tells_all = True
        self.evaluator.begin(self.effects, self.records.get)
        self.evaluate(committed, passed_ms=100)
        for key in self.effects.cleared:
            if self.records[key] is None:
                del self.records[key]
        self.effects.cleared.clear()
        if is_durable:
            self.effects = Effects()
            self.evaluator.begin(self.effects, self.records.get)
        self.evaluate(begun, passed_ms=500)

    def evaluate(self, operations: list[Operation], passed_ms: int = 0) -> list[FsmRayError]:
        """Evaluate each by itself, all at once after this time; return what failed."""
        self.evaluator.now_ms += passed_ms
        errors = []
        for operation in operations:
            try:
                self.evaluator.methods[type(operation)](operation)
            except FsmRayError as error:
                error.key = operation.key
                errors.append(error)
        return errors

    def all_there_is(self) -> Any:
        effects = self.effects
        return copy.deepcopy(
            (
                self.evaluator.version,
                self.records,
                effects.overlay,
                effects.cleared,
                effects.changes,
                effects.moved,
            )
        )

    def counted(self) -> dict[bytes, int]:
        """By what was noted."""
        counts = Counter(self.counts)
        if self.effects.moved is not self.counts:
            counts.update(self.effects.moved)
        return {head: count for head, count in counts.items() if count}

    def recounted(self) -> dict[bytes, int]:
        """By the records."""
        records = (self.records | self.effects.overlay).values()
        return dict(Counter(head_of(each) for each in records if each is not None and deadline_of(each)))


def no_turn(operation: CommitTurn) -> TurnId:
    raise NotImplementedError


@given(several, several, several, st.booleans())
def test_a_transaction_does_what_its_operations_do_or_nothing_at_all(
    committed: list[Operation],
    begun: list[Operation],
    operations: list[Operation],
    is_durable: bool,  # noqa: FBT001
) -> None:
    together, alone = (Evaluated(committed, begun, is_durable=is_durable) for _ in range(2))
    before = together.all_there_is()
    errors = alone.evaluate(operations)
    if not errors:
        together.evaluator.methods[Transact](Transact(operations))

        assert together.all_there_is() == alone.all_there_is()
    else:
        with pytest.raises(type(errors[0])) as caught:
            together.evaluator.methods[Transact](Transact(operations))
        assert vars(caught.value) == vars(errors[0])
        assert together.all_there_is() == before
    for each in (together, alone):
        assert each.counted() == each.recounted()
        assert is_looked_after(each.evaluator, each.records | each.effects.overlay)


steps = st.lists(
    st.tuples(
        st.sampled_from(["set", "data", "update", "patch", "clear", "turn", "end"]),
        keys,
        st.sampled_from(["flow", LONG]),
        st.sampled_from([None, "quick"]),
        st.none() | st.integers(1, 3),
        st.sampled_from([0.0, 0.0, 0.4, 3.0, 90_000.0]),
    ),
    max_size=12,
)


@settings(max_examples=25, deadline=None)
@given(steps)
async def test_a_namespace_made_from_the_store_is_as_the_one_that_wrote_it(
    taken: list[tuple[str, bytes, str, str | None, int | None, float]],
) -> None:
    shard = TurnShard(FakeStore(asyncio.get_running_loop()), state_ttl_s={"quick": 1.0})
    for kind, key, flow, state, update_id, passed_s in taken:
        if kind in {"turn", "end"}:
            worker = shard.worker(f"{len(shard.store.batches)}")
            record = worker.begin(key)
            version = record.content.version if record and record.content.deadline_ms else 0
            data = {"n": 1} if kind == "turn" else None
            worker.commit(version, data, key=key, flow=flow, state=state, update_id=update_id)
            await shard.settled()
            assert type(worker.results[0]) is int
        else:
            await shard.write(
                {
                    "set": set_record(key, flow, state),
                    "data": set_data(key, n=1),
                    "update": update_data(key, m=1),
                    "patch": patch(key, increment={"n": 1}),
                    "clear": clear(key),
                }[kind]
            )
        shard.now_s += passed_s
        await swept(shard)
        before = what_is_seen(shard)
        assert is_looked_after(shard.namespace._evaluator, shard.namespace._records)
        shard.restart()
        assert what_is_seen(shard) == before
        assert is_looked_after(shard.namespace._evaluator, shard.namespace._records)
        assert shard.store.contents().version == shard.namespace.statistics().version
    shard.now_s += 2 * 86_400
    await swept(shard)
    left = shard.namespace._records.values()

    assert len(shard.namespace._evaluator.deadlines) == 0
    assert all(each is not None and deadline_of(each) > shard.now_s * 1_000 for each in left)


def what_is_seen(shard: TurnShard) -> Any:
    worker = shard.worker("reader")
    begun = []
    for key in KEYS:
        begun.append(worker.begin(key))
        worker.end()
    packer, counts = shard.namespace._packer, shard.namespace._counts
    counted = {packer.front(head): count for head, count in counts.items()}
    return worker.read(*KEYS), begun, counted


def is_looked_after(evaluator: Evaluator, records: Mapping[bytes, bytes | None]) -> bool:
    """Whether all that ends will be swept in time, and nothing is to be swept that is not there."""
    places = evaluator.deadlines._places
    ends = {
        key: deadline_of(each) or content_of(each).ttl_ms for key, each in records.items() if each is not None
    }
    in_time = (end_ms == NEVER_MS or places[key] * 1_000 <= end_ms + 1_000 for key, end_ms in ends.items())
    return places.keys() <= ends.keys() and all(in_time)
