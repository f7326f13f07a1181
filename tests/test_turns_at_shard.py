"""Turns at a shard: frames in and frames out of a namespace, in memory and over a store."""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

import pytest

from fsm_ray import protocol
from fsm_ray.codec import encode_data
from fsm_ray.errors import FsmRayError, Overloaded, StoreUnavailable, TurnLost, VersionConflict
from fsm_ray.namespace import NotServing, leases
from fsm_ray.protocol import GRANTS, TURN, Grant
from tests.test_namespace import (
    ANN,
    BOB,
    CID,
    DECODER,
    AheadStore,
    Client,
    FakeStore,
    Shard,
    clear,
    session_of,
    set_data,
    set_record,
    until,
    update_data,
    view,
)

DAY_S = 86_400.0


class ForgetfulStore(FakeStore):
    """Keeps nothing, as the memory store; its versions begin at 0."""

    is_durable: ClassVar[bool] = False


class Worker(Client):
    """A client with turns, whose turn requests come by one connection."""

    def __init__(self, shard: Shard, name: str) -> None:
        super().__init__(shard.namespace, name)
        self.told: list[list[Any]] = []
        """The replies to its grants requests."""

    def begin(self, key: bytes = ANN, number: int = 1) -> Any:
        return self._turn(protocol.begin_turn(number, key))

    def end(self, number: int = 1) -> Any:
        return self._turn(protocol.end_turn(number))

    def listen(self, wait_s: float = 60.0, number: int = 1) -> None:
        body = protocol.grants_request(number, self._session, wait_s)[4:]
        reply = self.namespace.handle(body, self._tell)
        if reply is not None:
            self._tell(reply)

    def commit(self, expected_version: int, data: dict[str, Any] | None, **more: Any) -> None:
        self.write(self.commit_turn(expected_version, data, **more))

    def commit_turn(
        self,
        expected_version: int,
        data: dict[str, Any] | None,
        *,
        key: bytes = ANN,
        number: int = 1,
        flow: str | None = None,
        state: str | None = None,
        **more: Any,
    ) -> bytes:
        encoded = None if data is None else encode_data(data, allow_pickle=False)
        turn = (self._session, number)
        return protocol.commit_turn(key, turn, (flow, state), encoded, expected_version, **more)

    def disconnect(self) -> None:
        self.namespace.disconnected(self._tell)

    def _turn(self, operation: bytes) -> Any:
        reply = self.namespace.handle(protocol.turn_request(9, [operation], self._session)[4:], self._tell)
        assert reply is not None
        kind, number, (result,) = DECODER.decode(reply[4:])
        assert (kind, number) == (TURN, 9)
        return protocol.decode_error(result) if type(result) is dict else result

    def _tell(self, reply: bytes) -> None:
        kind, _, results = DECODER.decode(reply[4:])
        assert kind == GRANTS
        self.told.append(list(results))


class TurnShard(Shard):
    """A shard, in memory or over a store."""

    def __init__(self, store: FakeStore, **options: Any) -> None:
        self._writers = 0
        super().__init__(store, **options)

    @property
    def is_durable(self) -> bool:
        return self.store.is_durable

    def worker(self, name: str) -> Worker:
        return Worker(self, name)

    async def write(self, *operations: bytes) -> list[Any]:
        self._writers += 1
        client = self.client(f"writer {self._writers}")
        client.write(*operations)
        await self.settled()
        return client.results


@pytest.fixture(params=[ForgetfulStore, FakeStore])
async def shard(request: pytest.FixtureRequest) -> TurnShard:
    return TurnShard(request.param(asyncio.get_running_loop()))


@pytest.fixture
async def durable() -> TurnShard:
    return TurnShard(FakeStore(asyncio.get_running_loop()))


@pytest.fixture
async def ann(shard: TurnShard) -> Worker:
    return shard.worker("ann")


@pytest.fixture
async def bob(shard: TurnShard) -> Worker:
    return shard.worker("bob")


class TestBegin:
    async def test_a_turn_begins_with_the_record_or_none(self, shard: TurnShard, ann: Worker) -> None:
        await shard.write(set_record(ANN, "flow", "state", n=1))

        assert ann.begin(ANN, 1) == view("flow", "state", {"n": 1}, 1)
        assert ann.begin(BOB, 2) is None
        assert shard.namespace.statistics().turns == 2

    async def test_a_turn_begins_with_what_is_committed(self, durable: TurnShard) -> None:
        ann = durable.worker("ann")
        durable.client("outside").write(set_record(ANN, n=1))
        begun_early = ann.begin()
        await durable.settled()
        ann.end()

        assert begun_early is None
        assert ann.begin() == view(None, None, {"n": 1}, 1)

    async def test_a_second_one_waits_and_is_granted_what_the_first_committed(
        self, shard: TurnShard, ann: Worker, bob: Worker
    ) -> None:
        ann.begin()
        waits = bob.begin()
        bob.listen()
        statistics = shard.namespace.statistics()
        ann.commit(0, {"n": 1})
        await shard.settled()

        assert waits is False
        assert (statistics.turns, statistics.waiting_turns) == (1, 1)
        assert bob.told == [[Grant(1, view(None, None, {"n": 1}, 1))]]

    async def test_it_is_not_granted_before_the_store_has_it(self, durable: TurnShard) -> None:
        ann, bob = durable.worker("ann"), durable.worker("bob")
        ann.begin()
        bob.begin()
        bob.listen()
        ann.commit(0, {"n": 1})
        await asyncio.sleep(0)
        told_early = list(bob.told)
        await durable.committed()

        assert told_early == []
        assert bob.told == [[Grant(1, view(None, None, {"n": 1}, 1))]]

    async def test_too_many_that_wait_are_refused_by_the_key(
        self, shard: TurnShard, ann: Worker, bob: Worker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(leases, "MAX_WAITERS", 0)
        ann.begin()
        error = bob.begin()

        assert isinstance(error, Overloaded)
        assert error.key == "ann"

    async def test_end_frees_the_conversation_and_changes_nothing(
        self, shard: TurnShard, ann: Worker, bob: Worker
    ) -> None:
        ann.begin()
        bob.begin()
        bob.listen()
        ended = [ann.end(), ann.end()]

        assert ended == [True, False]
        assert bob.told == [[Grant(1, None)]]
        assert shard.store.batches == []
        assert shard.namespace.statistics().version == 0


class TestGrants:
    async def test_one_that_came_before_anybody_listened_is_told_at_once_and_once(
        self, shard: TurnShard, ann: Worker, bob: Worker
    ) -> None:
        ann.begin()
        bob.begin()
        ann.end()
        bob.listen()
        bob.listen()

        assert bob.told == [[Grant(1, None)]]

    async def test_several_are_told_together(self, shard: TurnShard, ann: Worker, bob: Worker) -> None:
        for number, key in enumerate((ANN, BOB), 1):
            ann.begin(key, number)
            bob.begin(key, number)
        ann.end(1)
        ann.end(2)
        bob.listen()

        assert bob.told == [[Grant(1, None), Grant(2, None)]]

    async def test_who_listens_again_takes_the_place_of_the_former_request(
        self, shard: TurnShard, ann: Worker, bob: Worker
    ) -> None:
        ann.begin()
        bob.begin()
        numbers: list[int] = []
        for number in (1, 2):
            body = protocol.grants_request(number, session_of("bob"), 60.0)[4:]
            shard.namespace.handle(body, lambda reply: numbers.append(DECODER.decode(reply[4:])[1]))
        ann.end()

        assert numbers == [2]

    async def test_who_listens_for_wait_s_in_vain_is_told_nothing(
        self, shard: TurnShard, bob: Worker
    ) -> None:
        bob.listen(wait_s=0.001)
        await until(lambda: bob.told)

        assert bob.told == [[]]

    async def test_a_turn_that_is_gone_is_not_told_of(
        self, shard: TurnShard, ann: Worker, bob: Worker
    ) -> None:
        ann.begin()
        bob.begin()
        ann.end()
        bob.end()
        bob.listen()

        assert bob.told == []


class TestCommitTurn:
    async def test_it_answers_with_the_version_and_stores_all(self, shard: TurnShard, ann: Worker) -> None:
        ann.begin()
        ann.commit(0, {"n": 1}, flow="flow", state="state")
        await shard.settled()

        assert ann.results == [1]
        assert ann.read(ANN) == [view("flow", "state", {"n": 1}, 1)]
        assert shard.namespace.statistics().turns == 0

    @pytest.mark.parametrize("lost", ["never begun", "ended", "waiting", "another's", "of another key"])
    async def test_a_turn_that_does_not_have_the_conversation_changes_nothing(
        self, shard: TurnShard, ann: Worker, bob: Worker, lost: str
    ) -> None:
        if lost == "ended":
            ann.begin()
            ann.end()
        elif lost == "waiting":
            bob.begin()
            ann.begin()
        elif lost == "another's":
            bob.begin()
        elif lost == "of another key":
            ann.begin(BOB)
        ann.commit(0, {"n": 1})
        await shard.settled()

        assert [type(result) for result in ann.results] == [TurnLost]
        assert ann.results[0].key == "ann"
        assert ann.read(ANN) == [None]
        assert shard.namespace.statistics().version == 0

    async def test_a_turn_is_lost_with_a_restart(self, durable: TurnShard) -> None:
        durable.worker("ann").begin()
        durable.restart()
        ann = durable.worker("ann")
        ann.commit(0, {"n": 1})
        await durable.settled()

        assert [type(result) for result in ann.results] == [TurnLost]

    async def test_a_commit_sent_again_gets_the_same_answer(self, shard: TurnShard, ann: Worker) -> None:
        ann.begin()
        ann.commit(0, {"n": 1})
        await shard.settled()
        ann.resend(ann.commit_turn(0, {"n": 1}))
        await shard.settled()

        assert ann.replies == [(1, [1])] * 2
        assert ann.read(ANN) == [view(None, None, {"n": 1}, 1)]

    async def test_a_commit_sent_again_after_a_restart_gets_the_same_answer(self, durable: TurnShard) -> None:
        ann = durable.worker("ann")
        ann.begin()
        ann.commit(0, {"n": 1})
        durable.store.keep()
        durable.restart()
        again = durable.worker("ann")
        again.send(1, again.commit_turn(0, {"n": 1}), is_resend=True)
        await durable.settled()

        assert again.replies == [(1, [1])]

    @pytest.mark.parametrize(
        ("before", "outside"),
        [([], set_record(ANN)), ([set_record(ANN)], set_data(ANN)), ([set_record(ANN)], clear(ANN))],
        ids=["made", "changed", "cleared"],
    )
    async def test_a_write_outside_of_turns_is_a_conflict_and_the_turn_goes_on(
        self, shard: TurnShard, ann: Worker, before: list[bytes], outside: bytes
    ) -> None:
        await shard.write(*before)
        ann.begin()
        await shard.write(outside)
        (found,) = ann.read(ANN)
        ann.commit(len(before), {"n": 1})
        await shard.settled()
        first = ann.results
        ann.commit(found.content.version if found else 0, {"n": 2})
        await shard.settled()

        assert [type(result) for result in first] == [VersionConflict]
        assert first[0].actual_version == (found and found.content.version)
        assert ann.read(ANN) == [view(None, None, {"n": 2}, len(before) + 2)]

    async def test_unchanged_data_makes_no_version_and_ends_the_turn(
        self, shard: TurnShard, ann: Worker, bob: Worker
    ) -> None:
        ann.write(set_record(ANN, "flow", "state", a=1, b=[2.5]))
        await shard.write(set_record(BOB))
        batches = len(shard.store.batches)
        ann.begin()
        bob.begin()
        bob.listen()
        ann.commit(1, {"a": 1, "b": [2.5]}, flow="flow", state="state")

        assert ann.results == [1]
        assert shard.namespace.statistics().version == 2
        assert len(shard.store.batches) == batches
        assert bob.told == [[Grant(1, view("flow", "state", {"a": 1, "b": [2.5]}, 1))]]

    @pytest.mark.parametrize(
        "changed",
        [
            {"data": {"a": True}},
            {"data": {"a": 1.0}},
            {"data": {"a": 1, "b": None}},
            {"data": {}},
            {"flow": "other"},
            {"state": None},
            {"ttl_ms": 1_000},
            {"update_id": 7},
        ],
        ids=str,
    )
    async def test_whatever_differs_makes_a_version(
        self, shard: TurnShard, ann: Worker, changed: dict[str, Any]
    ) -> None:
        await shard.write(set_record(ANN, "flow", "state", a=1))
        ann.begin()
        ann.commit(1, **{"data": {"a": 1}, "flow": "flow", "state": "state"} | changed)
        await shard.settled()

        assert ann.results == [2]

    async def test_no_data_removes_the_record(self, shard: TurnShard, ann: Worker) -> None:
        await shard.write(set_record(ANN))
        ann.begin()
        ann.commit(1, None)
        await shard.settled()

        assert ann.results == [0]
        assert ann.read(ANN) == [None]
        assert shard.namespace.statistics().records == 0
        assert shard.store.contents().records == {}

    async def test_no_data_where_there_is_no_record_changes_nothing(
        self, shard: TurnShard, ann: Worker
    ) -> None:
        ann.begin()
        ann.commit(0, None)
        await shard.settled()

        assert ann.results == [0]
        assert (shard.namespace.statistics().version, shard.namespace.statistics().turns) == (0, 0)

    async def test_a_failed_commit_stops_the_namespace(self, durable: TurnShard) -> None:
        ann, bob = durable.worker("ann"), durable.worker("bob")
        ann.begin()
        bob.begin()
        bob.listen()
        ann.commit(0, {"n": 1})
        durable.store.done(StoreUnavailable("no"))
        await asyncio.sleep(0)

        assert (ann.replies, bob.told) == ([], [])
        assert [str(error) for error in durable.stopped] == ["no"]
        with pytest.raises(NotServing):
            bob.begin()


class TestConnections:
    async def test_a_turn_goes_with_its_connection(self, shard: TurnShard, ann: Worker, bob: Worker) -> None:
        ann.begin()
        bob.begin()
        bob.listen()
        ann.disconnect()
        ann.commit(0, {"n": 1})
        await shard.settled()

        assert bob.told == [[Grant(1, None)]]
        assert [type(result) for result in ann.results] == [TurnLost]

    async def test_who_waits_goes_with_its_connection(
        self, shard: TurnShard, ann: Worker, bob: Worker
    ) -> None:
        ann.begin()
        bob.begin()
        bob.listen()
        bob.disconnect()
        ann.end()

        assert bob.told == []
        assert shard.namespace.statistics().turns == 0

    async def test_what_a_client_sent_before_it_died_is_committed_before_the_next_turn_begins(
        self, durable: TurnShard
    ) -> None:
        ann, bob = durable.worker("ann"), durable.worker("bob")
        ann.begin()
        bob.begin()
        bob.listen()
        ann.commit(0, {"n": 1})
        ann.disconnect()
        told_early = list(bob.told)
        await durable.settled()
        bob.commit(1, {"n": 2})
        await durable.settled()

        assert told_early == []
        assert bob.told == [[Grant(1, view(None, None, {"n": 1}, 1))]]
        assert bob.results == [2]

    async def test_a_commit_that_still_waits_when_its_client_dies_is_lost(self, durable: TurnShard) -> None:
        ann = durable.worker("ann")
        durable.client("outside").write(set_record(BOB))
        ann.begin()
        ann.commit(0, {"n": 1})
        ann.disconnect()
        await durable.settled()

        assert [type(result) for result in ann.results] == [TurnLost]
        assert ann.read(ANN) == [None]

    async def test_nothing_is_left_of_clients_that_are_gone(
        self, shard: TurnShard, ann: Worker, bob: Worker
    ) -> None:
        ann.begin()
        bob.begin()
        bob.listen()
        for worker in (bob, ann):
            worker.disconnect()
        turns = shard.namespace._turns

        assert (turns._listening, turns._listeners, turns.leases._connections) == ({}, {}, {})


class TestCommitsAhead:
    @pytest.fixture
    async def store(self) -> AheadStore:
        return AheadStore(asyncio.get_running_loop())

    @pytest.fixture
    async def ahead(self, store: AheadStore) -> TurnShard:
        return TurnShard(store)

    async def test_the_next_turn_begins_with_the_commit_of_the_one_before(
        self, ahead: TurnShard, store: AheadStore
    ) -> None:
        ann, bob, cid = ahead.worker("ann"), ahead.worker("bob"), ahead.client("cid")
        ann.begin()
        bob.begin()
        bob.listen()
        cid.write(set_record(CID))
        ann.commit(0, {"n": 1})
        await store.done_with_one()
        told_early = list(bob.told)
        await store.done_with_one()

        assert told_early == []
        assert bob.told == [[Grant(1, view(None, None, {"n": 1}, 2))]]

    async def test_a_turn_that_changed_nothing_ends_with_the_commit_that_it_found(
        self, ahead: TurnShard, store: AheadStore
    ) -> None:
        ann, bob, cid = ahead.worker("ann"), ahead.worker("bob"), ahead.client("cid")
        ann.write(set_record(ANN))
        await store.done_with_one()
        ann.begin()
        bob.begin()
        bob.listen()
        cid.write(set_record(CID))
        ann.commit(1, {})
        early = len(ann.replies), list(bob.told)
        await store.done_with_one()

        assert early == (1, [])
        assert ann.results == [1]
        assert bob.told == [[Grant(1, view(None, None, {}, 1))]]


class TestUpdates:
    """What remembers the updates that were handled."""

    def remembered(self, shard: TurnShard, key: bytes = ANN) -> list[int]:
        worker = shard.worker("reader")
        record = worker.begin(key)
        worker.end()
        return [] if record is None else list(record.content.updates)

    async def handled(
        self, shard: TurnShard, update_id: int | None, data: dict[str, Any] | None, **more: Any
    ) -> Any:
        """Handle an update in a turn, as a client does: a record that ended is none."""
        shard._writers += 1
        worker = shard.worker(f"worker {shard._writers}")
        record = worker.begin()
        is_there = record is not None and record.content.deadline_ms
        worker.commit(record.content.version if is_there else 0, data, update_id=update_id, **more)
        await shard.settled()
        (result,) = worker.results
        return result

    async def test_an_update_is_remembered_by_the_record_and_survives_a_restart(
        self, shard: TurnShard
    ) -> None:
        await self.handled(shard, 7, {"n": 1})
        await self.handled(shard, 8, {"n": 1})
        if shard.is_durable:
            shard.restart()

        assert self.remembered(shard) == [7, 8]
        assert shard.client().read(ANN)[0].content.data == {"n": 1}

    async def test_the_last_hundred_near_ones_are_remembered_each_once(self, shard: TurnShard) -> None:
        for update_id in [1, *range(2_000, 2_100), 2_050]:
            await self.handled(shard, update_id, {})

        assert self.remembered(shard) == [*range(2_000, 2_050), *range(2_051, 2_100), 2_050]

        await self.handled(shard, 2_100, {})
        assert self.remembered(shard) == [*range(2_001, 2_050), *range(2_051, 2_100), 2_050, 2_100]

        await self.handled(shard, 2_050 + 1_024, {})
        assert self.remembered(shard) == [*range(2_051, 2_100), 2_100, 2_050 + 1_024]

    @pytest.mark.parametrize(
        "write",
        [
            set_record(ANN, "flow"),
            set_data(ANN, a=1),
            update_data(ANN, a=1),
            protocol.patch(ANN, (b"\x80", [], b"\x80", b"\x80"), None),
            clear(ANN),
        ],
        ids=["set_record", "set_data", "update_data", "patch", "clear"],
    )
    async def test_writes_outside_of_turns_leave_it_alone(self, shard: TurnShard, write: bytes) -> None:
        await self.handled(shard, 7, {"n": 1})
        await shard.write(write)

        assert self.remembered(shard) == [7]

    async def test_a_turn_without_an_update_leaves_it_alone(self, shard: TurnShard) -> None:
        await self.handled(shard, 7, {"n": 1})
        await self.handled(shard, None, {"n": 2})
        while_there = self.remembered(shard)
        await self.handled(shard, None, None)

        assert while_there == [7]
        assert self.remembered(shard) == [7]

    async def test_it_survives_the_turn_that_clears_though_there_is_no_record(self, shard: TurnShard) -> None:
        await shard.write(set_record(ANN, "flow", n=1))
        answers = [await self.handled(shard, 7, None), await self.handled(shard, 8, None)]
        statistics = shard.namespace.statistics()
        begun = shard.worker("next").begin()
        results = await shard.write(clear(ANN), set_data(ANN, expected_version=0, a=1))

        assert answers == [0, 0]
        assert statistics.records == 0
        assert (begun.content.updates, begun.content.deadline_ms, begun.content.data) == ([7, 8], 0, {})
        assert results[0] is False
        assert type(results[1]) is int
        (record,) = shard.client().read(ANN)
        assert (record.flow, record.content.data, record.content.updates) == (None, {"a": 1}, [7, 8])
        assert shard.namespace.statistics().records == 1

    async def test_where_there_never_was_a_record_it_is_remembered_too(self, shard: TurnShard) -> None:
        await self.handled(shard, 7, None)

        assert self.remembered(shard) == [7]
        assert shard.client().read(ANN) == [None]
        assert shard.namespace.statistics().records == 0

    async def test_where_there_was_no_record_it_is_no_change_to_tell_of(self, durable: TurnShard) -> None:
        durable.namespace._evaluator.tells_all = True
        for update_id in (7, 8):
            ann = durable.worker(f"ann {update_id}")
            ann.begin()
            ann.commit(0, None, update_id=update_id)
            (commit,) = durable.namespace._commits

            assert commit.effects.changes == []
            await durable.settled()

    @pytest.mark.parametrize("restarts", [0, 2])
    async def test_without_a_record_it_is_forgotten_after_a_day(
        self, durable: TurnShard, restarts: int
    ) -> None:
        begun_s = durable.now_s
        await self.handled(durable, 7, None)
        for part in range(restarts):
            durable.now_s = begun_s + DAY_S * (part + 1) / 4
            durable.restart()
        durable.now_s = begun_s + DAY_S - 1
        await swept(durable)
        remembered = self.remembered(durable)
        durable.now_s = begun_s + DAY_S + 1
        await swept(durable)

        assert remembered == [7]
        assert self.remembered(durable) == []
        assert durable.store.contents().records == {}

    async def test_a_record_may_take_its_place_and_is_not_swept_for_it(self, shard: TurnShard) -> None:
        await self.handled(shard, 7, None)
        await self.handled(shard, 8, {"n": 1})
        shard.now_s += 2 * DAY_S
        await swept(shard)

        assert self.remembered(shard) == [7, 8]
        assert shard.namespace.statistics().records == 1

    async def test_it_takes_no_room_from_the_record(self) -> None:
        shard = TurnShard(ForgetfulStore(asyncio.get_running_loop()), max_record_bytes=256)
        for update_id in range(1 << 40, (1 << 40) + 100):
            result = await self.handled(shard, update_id, {"text": "x" * 200})
            assert not isinstance(result, FsmRayError)
        await shard.write(clear(ANN))

        assert len(self.remembered(shard)) == 100


async def swept(shard: TurnShard) -> None:
    """Let a sweep go on to its end."""
    while shard.namespace.sweep():
        await shard.settled()
