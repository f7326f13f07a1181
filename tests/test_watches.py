"""Watches: frames in and frames out of a namespace, in memory and over a store."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fsm_ray import protocol
from fsm_ray.errors import ChangesMissed, FsmRayError, Overloaded
from fsm_ray.namespace import watches
from fsm_ray.protocol import ChangeView
from fsm_ray.record import Front
from tests.test_namespace import (
    ANN,
    BOB,
    CID,
    DECODER,
    AheadStore,
    clear,
    set_record,
    until,
    update_data,
)
from tests.test_scans import FRONTS, KEYS, Bustle, LookedAt, fill, keys_of

ANY: Front = (None, None)

LONG_S = 60.0
"""Longer than any test waits."""

Told = tuple[int, bytes, Front | None, Front | None]
"""Version, key, and flow and state before and after."""


class Watch:
    """One watch request and its answer."""

    def __init__(
        self, shard: LookedAt, since: int | None, front: Front = ANY, wait_s: float = LONG_S
    ) -> None:
        self._replies: list[bytes] = []
        self.answer = self._replies.append
        """What the namespace was to call."""
        request = protocol.watch_request(7, front, since, wait_s)
        reply = shard.namespace.handle(request[4:], self.answer)
        if reply is not None:
            self._replies.append(reply)

    @property
    def is_answered(self) -> bool:
        return bool(self._replies)

    @property
    def results(self) -> list[Any]:
        (reply,) = self._replies
        kind, number, results = DECODER.decode(reply[4:])
        assert (kind, number) == (protocol.WATCH, 7)
        return list(results)

    @property
    def error(self) -> FsmRayError:
        (result,) = self.results
        return protocol.decode_error(result)

    @property
    def since(self) -> int:
        """The version up to which changes were told."""
        since = self.results[-1]
        assert type(since) is int
        return since

    @property
    def told(self) -> list[Told]:
        return [short(change) for change in self.results[:-1]]


def short(change: ChangeView) -> Told:
    record = change.record
    after = None if record is None else (record.flow, record.state)
    return (change.version, change.key, change.before, after)


async def answer(watch: Watch) -> Watch:
    await until(lambda: watch.is_answered)
    return watch


@pytest.fixture(params=[False, True], ids=["memory", "durable"])
async def shard(request: pytest.FixtureRequest) -> LookedAt:
    return LookedAt(is_durable=request.param)


@pytest.fixture
async def durable() -> LookedAt:
    return LookedAt(is_durable=True)


class TestWhatIsTold:
    async def test_without_a_position_the_present_one_is_told_at_once(self, shard: LookedAt) -> None:
        await shard.write(set_record(ANN), set_record(ANN))

        assert Watch(shard, None).results == [2]
        await shard.write(set_record(ANN))
        assert Watch(shard, None).results == [3]

    async def test_every_change_is_told_in_order_with_what_there_was_and_is(self, shard: LookedAt) -> None:
        since = Watch(shard, None).since
        await shard.write(set_record(ANN, "a", "x", n=1), update_data(BOB), clear(CID))
        await shard.write(set_record(ANN, "a", "y"), clear(ANN), set_record(ANN, "b"), clear(BOB))
        watch = Watch(shard, since)

        assert watch.told == [
            (1, ANN, None, ("a", "x")),
            (2, BOB, None, (None, None)),
            (3, ANN, ("a", "x"), ("a", "y")),
            (4, ANN, ("a", "y"), None),
            (5, ANN, None, ("b", None)),
            (6, BOB, (None, None), None),
        ]
        assert watch.results[0].record.content.data == {"n": 1}
        assert watch.since == 6
        assert Watch(shard, 4).told == watch.told[4:]

    async def test_what_the_record_was_or_is_has_to_match(self, shard: LookedAt) -> None:
        since = Watch(shard, None).since
        await shard.write(
            *[set_record(ANN, *front) for front in (("a", "x"), ("a", "y"), ("b", "y"))], clear(ANN)
        )

        told = {
            front: [version for version, *_ in Watch(shard, since, front).told]
            for front in (("a", None), ("a", "x"), ("b", None), (None, "y"), ("b", "y"))
        }
        assert told == {
            ("a", None): [1, 2, 3],
            ("a", "x"): [1, 2],
            ("b", None): [3, 4],
            (None, "y"): [2, 3, 4],
            ("b", "y"): [3, 4],
        }

    async def test_that_a_record_expired_is_told_when_it_is_swept(self, shard: LookedAt) -> None:
        since = Watch(shard, None).since
        await shard.write(protocol.set_record(ANN, "a", "x", b"\x80", None, ttl_ms=1_000))
        shard.now_s += 10
        shard.namespace.sweep()
        await shard.settled()

        assert Watch(shard, since).told == [(1, ANN, None, ("a", "x")), (2, ANN, ("a", "x"), None)]

    async def test_updates_that_are_remembered_are_no_records(self, shard: LookedAt) -> None:
        since = Watch(shard, None).since
        await shard.write(set_record(ANN, "a"))
        await shard.write(shard.handled(ANN, 1), shard.handled(BOB, 2))
        await shard.write(set_record(ANN, "b"))

        watch = Watch(shard, since)
        assert watch.told == [
            (1, ANN, None, ("a", None)),
            (2, ANN, ("a", None), None),
            (4, ANN, None, ("b", None)),
        ]

    async def test_a_transaction_that_fails_tells_nothing(self, shard: LookedAt) -> None:
        since = Watch(shard, None).since
        await shard.write(
            protocol.transact([set_record(ANN), set_record(BOB, expected_version=9)]), set_record(CID)
        )

        assert Watch(shard, since).told == [(1, CID, None, (None, None))]

    async def test_a_long_list_is_told_in_parts(
        self, shard: LookedAt, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(watches, "_MOST_LOOKED_AT", 15)
        since = Watch(shard, None).since
        await fill(shard)
        versions = []
        while since < len(KEYS):
            watch = Watch(shard, since)
            versions.append([version for version, *_ in watch.told])
            since = watch.since

        assert versions == [[*range(1, 16)], [*range(16, 31)], [*range(31, 41)]]

    async def test_a_reply_that_grows_large_ends(self, shard: LookedAt) -> None:
        since = Watch(shard, None).since
        await shard.write(*[set_record(ANN, text="x" * 100_000) for _ in range(4)])

        assert [Watch(shard, since).since, Watch(shard, 3).since] == [3, 4]


class TestWaiting:
    async def test_a_change_is_told_when_it_is_committed_and_not_before(self, durable: LookedAt) -> None:
        watch = Watch(durable, Watch(durable, None).since)
        durable.begin_to_write(set_record(ANN))
        await asyncio.sleep(2 * watches.TOLD_AFTER_S)
        was_early = watch.is_answered
        await durable.committed()

        assert not was_early
        assert (await answer(watch)).told == [(1, ANN, None, (None, None))]

    async def test_in_memory_it_is_told_too(self, shard: LookedAt) -> None:
        watch = Watch(shard, 0)
        await shard.write(set_record(ANN))

        assert (await answer(watch)).told == [(1, ANN, None, (None, None))]
        assert shard.namespace.statistics().watches == 0

    async def test_when_there_is_nothing_for_long_enough_the_answer_says_so(self, shard: LookedAt) -> None:
        watch = await answer(Watch(shard, 0, wait_s=0.001))

        assert watch.results == [0]
        assert shard.namespace.statistics().watches == 0

    async def test_who_wants_none_of_the_changes_keeps_up(
        self, shard: LookedAt, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(watches, "_MOST_LOOKED_AT", 3)
        monkeypatch.setattr(watches, "MAX_CHANGES", 20)
        watch = Watch(shard, 0, ("nobody", None))
        for _ in range(5):
            await shard.write(*[update_data(ANN)] * 10)
            version = shard.namespace.statistics().version
            await until(lambda version=version: waiting_at(shard) == [version])  # type: ignore[misc]

        assert (waiting_at(shard), watch.is_answered) == ([50], False)

    async def test_who_is_far_behind_is_told_without_a_further_change(
        self, shard: LookedAt, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(watches, "_MOST_LOOKED_AT", 3)
        since = Watch(shard, None).since
        await shard.write(*[update_data(ANN)] * 20, set_record(BOB, "a"))

        watch = await answer(Watch(shard, since, ("a", None)))
        assert watch.told == [(21, BOB, None, ("a", None))]

    async def test_many_that_wait_are_all_told_though_not_at_once(
        self, shard: LookedAt, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(watches, "_MOST_LOOKED_AT", 1)
        all_watches = [Watch(shard, 0) for _ in range(10)]
        await shard.write(set_record(ANN))
        await until(lambda: any(watch.is_answered for watch in all_watches))
        at_first = sum(watch.is_answered for watch in all_watches)

        assert at_first == 4
        for watch in all_watches:
            assert (await answer(watch)).since == 1

    async def test_who_disconnected_is_forgotten(self, shard: LookedAt) -> None:
        gone, stays = Watch(shard, 0), Watch(shard, 0)
        shard.namespace.disconnected(gone.answer)
        await shard.write(set_record(ANN))
        await answer(stays)

        assert not gone.is_answered
        assert shard.namespace.statistics().watches == 0

    async def test_more_than_can_wait_are_refused(
        self, shard: LookedAt, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(watches, "MAX_WATCHES", 2)
        first, second, third = (Watch(shard, 0) for _ in range(3))

        assert (first.is_answered, second.is_answered) == (False, False)
        assert isinstance(third.error, Overloaded)


def waiting_at(shard: LookedAt) -> list[int]:
    """The versions that watches wait behind."""
    return [waiting.since for waiting in shard.namespace._watches._waiting.values()]


class TestMissed:
    async def test_what_was_before_the_first_watch_is_missed(self, shard: LookedAt) -> None:
        await shard.write(set_record(ANN), set_record(ANN))
        error = Watch(shard, 1).error

        assert isinstance(error, ChangesMissed)
        assert (error.bot, error.version) == ("my_bot", 2)

    @pytest.mark.parametrize("is_known", [False, True])
    async def test_a_version_of_the_future_is_missed(self, shard: LookedAt, is_known: bool) -> None:  # noqa: FBT001
        await shard.write(set_record(ANN))
        if is_known:
            Watch(shard, None)
        error = Watch(shard, 2).error

        assert isinstance(error, ChangesMissed)
        assert error.version == 1

    @pytest.mark.parametrize(("most", "size"), [("MAX_CHANGES", 10), ("MAX_BYTES", 10_000)])
    async def test_the_ring_is_bounded_and_who_is_behind_it_is_told(
        self, shard: LookedAt, monkeypatch: pytest.MonkeyPatch, most: str, size: int
    ) -> None:
        monkeypatch.setattr(watches, most, size)
        since = Watch(shard, None).since
        kept = []
        for _ in range(50):
            await shard.write(set_record(ANN, text="x" * 1_000))
            ring = shard.namespace._watches._ring
            kept.append(len(ring) if most == "MAX_CHANGES" else sum(map(watches._size, ring)))
        error = Watch(shard, since).error

        assert size // 4 < max(kept) <= size
        assert isinstance(error, ChangesMissed)
        assert error.version == 50
        assert Watch(shard, 49).told == [(50, ANN, (None, None), (None, None))]
        assert shard.namespace._watches._bytes == sum(map(watches._size, shard.namespace._watches._ring))

    async def test_who_waits_is_told_as_well(self, shard: LookedAt, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(watches, "MAX_CHANGES", 10)
        watch = Watch(shard, 0)
        await shard.write(*[set_record(ANN)] * 20)

        assert isinstance((await answer(watch)).error, ChangesMissed)

    async def test_when_nobody_watches_for_long_nothing_is_kept(self, shard: LookedAt) -> None:
        Watch(shard, None)
        await shard.write(set_record(ANN))
        shard.passed_s += watches.IDLE_S
        tidy(shard)
        kept = Watch(shard, 0).told
        shard.passed_s += watches.IDLE_S + 0.001
        tidy(shard)
        was_observed = shard.namespace._evaluator.tells_all
        await shard.write(set_record(ANN))

        assert len(kept) == 1
        assert not was_observed
        assert not shard.namespace._watches.have_changes
        assert isinstance(Watch(shard, 1).error, ChangesMissed)

    async def test_as_long_as_somebody_waits_and_a_while_longer_changes_are_kept(
        self, shard: LookedAt
    ) -> None:
        watch = Watch(shard, 0)
        shard.passed_s += 10 * watches.IDLE_S
        tidy(shard)
        await shard.write(set_record(ANN))
        since = (await answer(watch)).since
        tidy(shard)
        await shard.write(set_record(ANN))

        assert Watch(shard, since).told == [(2, ANN, (None, None), (None, None))]

    async def test_nothing_is_noted_when_nobody_watches(self, shard: LookedAt) -> None:
        await shard.write(set_record(ANN))
        shard.scan()
        await shard.write(set_record(ANN))

        assert not shard.namespace._watches.have_changes


def tidy(shard: LookedAt) -> None:
    shard.namespace._watches.forget_idle()
    shard.namespace._observe()


class TestCommitsUnderWay:
    """A position is told when all before it is committed, so that scan and watch together miss nothing."""

    @pytest.mark.parametrize("scanned_before", [[], [b"sorts"]], ids=["unscanned", "scanned"])
    @pytest.mark.parametrize("since", [None, 0])
    async def test_the_first_position_is_told_when_it_is_committed(
        self,
        durable: LookedAt,
        scanned_before: list[bytes],
        since: int | None,
    ) -> None:
        await durable.write(set_record(ANN))
        for scan in scanned_before:
            durable.scan(scan)
        durable.begin_to_write(set_record(BOB))
        watch, other = Watch(durable, since), Watch(durable, since)
        was_early = watch.is_answered or other.is_answered
        await durable.committed()
        position = watch.since if since is None else vars(watch.error)["version"]
        durable.begin_to_write(set_record(CID))
        found = keys_of(durable.scan())
        await durable.committed()

        assert (was_early, other.results) == (False, watch.results)
        assert set(found) == {ANN, BOB}
        assert Watch(durable, position).told == [(3, CID, None, (None, None))]

    async def test_later_positions_are_told_at_once_and_are_of_what_is_committed(
        self, durable: LookedAt
    ) -> None:
        Watch(durable, None)
        await durable.write(set_record(ANN))
        durable.begin_to_write(set_record(BOB))
        since = Watch(durable, None).since
        await durable.committed()

        assert since == 1
        assert Watch(durable, since).told == [(2, BOB, None, (None, None))]


class WatchedBustle(Bustle):
    """Watches that ask again and again are told of each change once."""

    def __init__(self, seed: int, *, is_durable: bool) -> None:
        super().__init__(seed, is_durable=is_durable)
        self.watches = {front: Watch(self.shard, 0, front) for front in [ANY, *FRONTS[1:], ("a", None)]}
        self.told: dict[Front, list[Told]] = {front: [] for front in self.watches}

    async def ask_again(self) -> None:
        for front, watch in self.watches.items():
            if watch.is_answered:
                self.told[front] += watch.told
                self.watches[front] = Watch(self.shard, watch.since, front)

    async def finish(self) -> None:
        await self.shard.settled()
        end = self.shard.namespace._watches._end
        async with asyncio.timeout(10):
            while waiting_at(self.shard) != [end] * len(self.watches):
                await asyncio.sleep(0)
                await self.ask_again()


@pytest.mark.slow
@pytest.mark.parametrize("is_durable", [False, True], ids=["memory", "durable"])
@given(seed=st.integers(0, 1 << 32))
@settings(max_examples=20, deadline=None)
def test_who_asks_again_and_again_is_told_of_each_change_once(is_durable: bool, seed: int) -> None:  # noqa: FBT001
    async def go() -> None:
        bustle = WatchedBustle(seed, is_durable=is_durable)
        fronts: dict[bytes, Front | None] = {}
        for _ in range(100):
            await bustle.step()
            if random.Random(seed).random() < 0.5:
                await asyncio.sleep(0)
            await bustle.ask_again()
        await bustle.finish()
        for version, key, before, after in bustle.told[ANY]:
            assert fronts.get(key) == before, version
            fronts[key] = after
        versions = [version for version, *_ in bustle.told[ANY]]
        records = dict(zip(KEYS, bustle.shard.client().read(*KEYS), strict=True))
        wanted = {
            front: [each for each in bustle.told[ANY] if matches(each[2], front) or matches(each[3], front)]
            for front in bustle.told
        }

        assert versions == sorted(set(versions))
        assert bustle.told == wanted
        assert {key: front for key, front in fronts.items() if front and records[key]} == {
            key: (each.flow, each.state) for key, each in records.items() if each
        }

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(watches, "_MOST_LOOKED_AT", 5)
        patched.setattr(watches, "TOLD_AFTER_S", 0)
        asyncio.run(go())


def matches(front: Front | None, asked: Front) -> bool:
    return front is not None and all(want in (None, have) for want, have in zip(asked, front, strict=True))


class Ahead(LookedAt):
    """A shard over a store that takes a commit ahead."""

    def make_store(self, *, is_durable: bool) -> AheadStore:
        assert is_durable
        return AheadStore(asyncio.get_running_loop())


async def test_between_two_commits_under_way_the_position_is_behind_both() -> None:
    shard = Ahead(is_durable=True)
    store = shard.store
    assert isinstance(store, AheadStore)
    shard.scan()
    for key in (ANN, BOB):
        shard.begin_to_write(set_record(key))
    first = Watch(shard, None)
    await store.done_with_one()
    between = Watch(shard, None)
    was_early = between.is_answered
    await store.done_with_one()

    assert not was_early
    assert first.results == between.results == [2]


async def test_over_a_store_that_takes_commits_ahead_nothing_is_skipped() -> None:
    shard = Ahead(is_durable=True)
    store = shard.store
    assert isinstance(store, AheadStore)
    for key in (ANN, BOB, CID):
        shard.begin_to_write(set_record(key))
    first, scan = Watch(shard, None), shard.scan(b"first")
    shard.begin_to_write(set_record(ANN, "again"))
    while store.commits:
        await store.done_with_one()

    assert (scan, first.since) == ([], 2)
    assert Watch(shard, 2).told == [(3, CID, None, (None, None)), (4, ANN, (None, None), ("again", None))]
    assert set(keys_of(shard.scan(b"second"))) == {ANN, BOB, CID}
