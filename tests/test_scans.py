"""Scans and counts: frames in and frames out of a namespace, in memory and over a store."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fsm_ray import protocol, record
from fsm_ray.codec import encode_data, encode_key, slot_of
from fsm_ray.errors import Overloaded, ScanInterrupted
from fsm_ray.namespace import Namespace, scans
from fsm_ray.protocol import Counted, Found, RecordView
from fsm_ray.record import Front
from tests.test_namespace import (
    ANN,
    BOB,
    CID,
    DECODER,
    FakeStore,
    Shard,
    clear,
    handle,
    session_of,
    set_data,
    set_record,
    update_data,
)

FEW = 3
"""Records looked at for one page, and half as many sorted in one step, where a test makes them few."""


class ForgetfulStore(FakeStore):
    """Keeps nothing, as the memory store; its versions begin at 0."""

    is_durable: ClassVar[bool] = False


class LookedAt(Shard):
    """A shard, in memory or over a store, and what clients look at there. The test moves its clocks."""

    def __init__(self, *, is_durable: bool, **options: Any) -> None:
        self.passed_s = 0.0
        self._writers = 0
        super().__init__(self.make_store(is_durable=is_durable), **options)

    def make_store(self, *, is_durable: bool) -> FakeStore:
        return (FakeStore if is_durable else ForgetfulStore)(asyncio.get_running_loop())

    def restart(self) -> None:
        self.store.commit_under_way = None
        self.namespace = Namespace(
            "my_bot",
            self._options,
            self.store,
            self.store.contents(),
            clock=lambda: self.now_s,
            lease_clock=lambda: self.passed_s,
        )

    async def write(self, *operations: bytes) -> list[Any]:
        results = self.begin_to_write(*operations)
        await self.settled()
        return results

    def begin_to_write(self, *operations: bytes) -> list[Any]:
        """Write as a new client; what is returned gets the results when they are there."""
        self._writers += 1
        results: list[Any] = []
        request = protocol.write_request(1, operations, session_of(str(self._writers)), is_resend=False)
        handle(self.namespace, request[4:], lambda reply: results.extend(DECODER.decode(reply[4:])[2]))
        return results

    def ask(self, request: bytes) -> list[Any]:
        """The results of a request that is answered at once.

        Raises:
            FsmRayError: the shard answered with it.
        """
        replies: list[bytes] = []
        handle(self.namespace, request[4:], replies.append)
        (reply,) = replies
        kind, number, results = DECODER.decode(reply[4:])
        assert (kind, number) == (request[5], 7)
        for result in results:
            if isinstance(result, dict):
                raise protocol.decode_error(result)
        return list(results)

    def page(
        self,
        page: int,
        scan: bytes = b"scan",
        *,
        has_begun: bool = False,
        front: Front = (None, None),
        after: bytes | None = None,
        limit: int = 1_000,
    ) -> tuple[list[Found], bool]:
        """One page of a scan, and whether it is the last one."""
        *found, is_last = self.ask(protocol.scan_request(7, (scan, page, has_begun), front, after, limit))
        return found, is_last

    def pages(self, scan: bytes = b"scan", **request: Any) -> Iterator[list[Found]]:
        """The pages of a scan, as they are asked for."""
        page, is_last, has_begun = 0, False, False
        while not is_last:
            found, is_last = self.page(page, scan, has_begun=has_begun, **request)
            has_begun = has_begun or bool(found)
            page += 1
            yield found

    def scan(self, scan: bytes = b"scan", **request: Any) -> list[Found]:
        """All that a scan finds."""
        return [each for found in self.pages(scan, **request) for each in found]

    def counted(self) -> dict[Front, int]:
        """What the shard counts."""
        results: list[Counted] = self.ask(protocol.count_request(7))
        counts = {(each.flow, each.state): each.count for each in results}
        assert len(counts) == len(results)
        assert self.namespace.statistics().records == sum(counts.values())
        return counts

    def recounted(self) -> dict[Front, int]:
        """What there is to be counted."""
        namespace = self.namespace
        packed = [each for each in namespace._records.values() if each is not None]
        blobs = [namespace._packer.blob(each) for each in packed if record.deadline_of(each)]
        return dict(Counter(record.front_of(blob)[:2] for blob in blobs))

    def handled(
        self, key: bytes, update_id: int, data: bytes | None = None, front: Front = (None, None)
    ) -> bytes:
        """A turn is begun; the operation that commits it."""
        session = session_of("turns")
        begin = protocol.begin_turn(update_id, key)
        results: list[bytes] = []
        handle(self.namespace, protocol.turn_request(7, [begin], session)[4:], results.append)
        (found,) = DECODER.decode(results[0][4:])[2]
        version = found.content.version if isinstance(found, RecordView) and found.content.deadline_ms else 0
        return protocol.commit_turn(key, (session, update_id), front, data, version, update_id=update_id)


@pytest.fixture(params=[False, True], ids=["memory", "durable"])
async def shard(request: pytest.FixtureRequest) -> LookedAt:
    return LookedAt(is_durable=request.param)


@pytest.fixture
def few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scans, "_LOOKED_AT_ALONE", FEW)
    monkeypatch.setattr(scans, "_LOOKED_AT_BESIDE_OTHERS", FEW)


KEYS = sorted(map(encode_key, range(40)), key=lambda key: (slot_of(key), key))
"""In the order in which a scan finds them."""


async def fill(shard: LookedAt) -> None:
    """Make a record under each key, of flow a or b and state x, y or z."""
    await shard.write(*[set_record(key, "ab"[n % 2], "xyz"[n % 3], n=n) for n, key in enumerate(KEYS)])


def keys_of(found: list[Found]) -> list[bytes]:
    return [each.key for each in found]


class TestScan:
    @pytest.mark.parametrize("limit", [1, 7, 40, 1_000])
    async def test_finds_each_record_once_in_the_order_of_slots_and_keys(
        self, shard: LookedAt, limit: int
    ) -> None:
        await fill(shard)
        pages = list(shard.pages(limit=limit))
        found = [each for page in pages for each in page]

        assert keys_of(found) == KEYS
        assert [each.record for each in found] == shard.client().read(*KEYS)
        assert max(map(len, pages)) <= limit

    @pytest.mark.parametrize("flow", [None, "a", "b", "c"])
    @pytest.mark.parametrize("state", [None, "x", "z", "a"])
    async def test_finds_those_of_the_flow_and_state_asked_for(
        self, shard: LookedAt, flow: str | None, state: str | None
    ) -> None:
        await fill(shard)

        assert keys_of(shard.scan(front=(flow, state))) == [
            key for n, key in enumerate(KEYS) if flow in (None, "ab"[n % 2]) and state in (None, "xyz"[n % 3])
        ]

    @pytest.mark.parametrize("is_there", [True, False])
    async def test_begins_behind_a_key_that_is_there_or_not(self, shard: LookedAt, is_there: bool) -> None:  # noqa: FBT001
        await fill(shard)
        if not is_there:
            await shard.write(clear(KEYS[20]))

        assert keys_of(shard.scan(after=KEYS[20])) == KEYS[21:]

    async def test_of_an_empty_shard_ends_with_the_first_page(self, shard: LookedAt) -> None:
        assert shard.page(0) == ([], True)

    @pytest.mark.usefixtures("few_at_once")
    async def test_looks_at_no_more_for_a_page_than_others_can_wait_for(self, shard: LookedAt) -> None:
        await fill(shard)
        of_all, of_few = list(shard.pages()), list(shard.pages(b"filtered", front=("a", None)))

        assert max(map(len, of_all)) == FEW
        assert len(of_few) == len(KEYS) // FEW + 1

    async def test_ends_a_page_that_grows_large(self, shard: LookedAt) -> None:
        await shard.write(*[set_record(key, text="x" * 100_000) for key in KEYS[:7]])

        assert [len(page) for page in shard.pages() if page] == [3, 3, 1]

    async def test_a_page_asked_for_again_is_the_same(self, shard: LookedAt) -> None:
        await fill(shard)
        list(shard.pages(b"sorts"))
        pages = []
        for page in range(4):
            pages.append(shard.page(page, has_begun=page > 0, limit=10))
            await shard.write(clear(KEYS[10 * page]), clear(KEYS[10 * page + 9]))
            assert shard.page(page, has_begun=page > 0, limit=10) == pages[-1]

        assert [keys_of(found) for found, _ in pages] == [KEYS[n : n + 10] for n in range(0, 40, 10)]
        assert pages[-1][1]

    async def test_a_request_that_comes_late_skips_nothing(self, shard: LookedAt) -> None:
        await fill(shard)
        list(shard.pages(b"sorts"))
        first, second = (shard.page(page, limit=10)[0] for page in range(2))
        shard.page(0, limit=10)

        assert keys_of([*first, *second, *shard.page(2, limit=10)[0]]) == KEYS[:30]

    async def test_finds_nothing_that_is_not_committed(self) -> None:
        shard = LookedAt(is_durable=True)
        await shard.write(set_record(ANN, "old"), set_record(BOB, "old"))
        shard.begin_to_write(set_record(ANN, "new"), clear(BOB), set_record(CID, "new"))

        assert {each.key: each.record.flow for each in shard.scan()} == {ANN: "old", BOB: "old"}

    async def test_a_commit_under_way_when_somebody_scans_first_is_found_by_the_next_scan(self) -> None:
        shard = LookedAt(is_durable=True)
        shard.begin_to_write(set_record(ANN))
        first = shard.scan(b"first")
        await shard.settled()

        assert (first, keys_of(shard.scan(b"second"))) == ([], [ANN])

    async def test_finds_what_had_not_expired_when_it_began(self, shard: LookedAt) -> None:
        data = encode_data({}, allow_pickle=False)
        await shard.write(
            *[
                protocol.set_record(key, "lives", f"{ttl_ms}", data, None, ttl_ms=ttl_ms)
                for key, ttl_ms in zip(KEYS, [999, 1_000, 1_001, 2_000], strict=False)
            ]
        )
        shard.scan(b"sorts")
        shard.now_s += 1
        found, _ = shard.page(0, limit=1)
        shard.now_s += 60
        while shard.namespace.sweep():
            await shard.settled()
        found += shard.page(1, has_begun=True)[0]

        assert [each.record.state for each in found] == ["1001", "2000"]
        assert shard.scan(b"later") == []
        assert shard.counted() == {}

    async def test_finds_nothing_where_only_handled_updates_are_remembered(self, shard: LookedAt) -> None:
        await shard.write(set_record(ANN), set_record(BOB))
        shard.scan(b"sorts")
        await shard.write(shard.handled(ANN, 1), shard.handled(CID, 2))
        gone = shard.scan(b"gone")
        await shard.write(set_record(ANN, "again"))

        assert keys_of(gone) == [BOB]
        assert {each.key: each.record.flow for each in shard.scan()} == {ANN: "again", BOB: None}


class TestEndsOfScans:
    """Scans that are not finished, and too many."""

    async def test_the_rest_of_a_scan_that_the_shard_does_not_know_is_refused(self, shard: LookedAt) -> None:
        with pytest.raises(ScanInterrupted) as refusal:
            shard.page(3, has_begun=True)

        assert refusal.value.bot == "my_bot"

    async def test_a_scan_that_found_nothing_yet_begins_anew_after_a_restart(self) -> None:
        shard = LookedAt(is_durable=True)
        await fill(shard)
        next(shard.pages())
        shard.restart()

        assert keys_of(shard.scan()) == KEYS

    async def test_more_scans_than_can_be_under_way_are_refused_until_one_ends(
        self, shard: LookedAt, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(scans, "MAX_SCANS", 2)
        await fill(shard)
        shard.scan(b"sorts")
        for scan in (b"first", b"second"):
            shard.page(0, scan, limit=1)
        with pytest.raises(Overloaded):
            shard.page(0, b"third")
        shard.page(1, b"first")

        assert shard.page(0, b"third")[1]

    async def test_a_scan_that_paused_makes_room_for_another(
        self, shard: LookedAt, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(scans, "MAX_SCANS", 2)
        await fill(shard)
        shard.scan(b"sorts")
        for scan in (b"given up", b"goes on"):
            shard.page(0, scan, limit=1)
        shard.passed_s += scans.MAX_PAUSE_S
        shard.page(1, b"goes on", limit=1)
        shard.page(0, b"third", limit=1)

        assert keys_of(shard.page(2, b"goes on", has_begun=True)[0]) == KEYS[2:]
        with pytest.raises(ScanInterrupted):
            shard.page(1, b"given up", has_begun=True)

    async def test_finished_scans_leave_room_and_no_trace(
        self, shard: LookedAt, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(scans, "MAX_SCANS", 2)
        await fill(shard)

        for number in range(10):
            assert keys_of(shard.scan(b"scan %d" % number)) == KEYS
            assert shard.namespace.statistics().scans == 0
        assert len(shard.namespace._scans._finished) == 2

    async def test_a_scan_for_which_too_much_is_kept_is_interrupted(
        self, shard: LookedAt, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(scans, "MAX_KEPT_ASIDE", 5)
        await fill(shard)
        shard.scan(b"sorts")
        shard.page(0, limit=1)
        await shard.write(*[update_data(key, x=1) for key in KEYS[:6]])
        shard.page(1, has_begun=True, limit=5)
        # What it found by now is not kept any more.
        await shard.write(*[clear(key) for key in KEYS[6:11]])
        found, _ = shard.page(2, has_begun=True, limit=5)
        await shard.write(*[clear(key) for key in KEYS[11:17]])

        assert keys_of(found) == KEYS[6:11]
        with pytest.raises(ScanInterrupted):
            shard.page(3, has_begun=True)

    @pytest.mark.usefixtures("few_at_once")
    @pytest.mark.parametrize(
        ("pages", "under_way"), [(1, 0), (10, 1), (30, 0)], ids=["sorts", "scans", "ended"]
    )
    async def test_when_nobody_scans_for_long_the_shard_forgets_all_about_it(
        self, shard: LookedAt, pages: int, under_way: int
    ) -> None:
        await fill(shard)
        for page in range(pages):
            shard.page(page)
        shard.passed_s += scans.IDLE_S
        shard.namespace._scans.forget_idle()
        was_known = shard.namespace.statistics().scans
        shard.passed_s += 0.001
        shard.namespace._scans.forget_idle()
        shard.namespace._observe()
        await shard.write(*[clear(key) for key in KEYS[::2]], set_record(KEYS[0]))

        assert (was_known, shard.namespace.statistics().scans) == (under_way, 0)
        assert not shard.namespace._evaluator.tells_all
        assert keys_of(shard.scan(b"later")) == [KEYS[0], *KEYS[1::2]]

    @pytest.mark.usefixtures("few_at_once")
    async def test_no_slot_keeps_a_key_whose_record_is_gone(self, shard: LookedAt) -> None:
        await fill(shard)
        shard.page(0)
        await shard.write(
            *[clear(key) for key in KEYS[::2]], set_record(ANN), clear(ANN), set_record(KEYS[0])
        )
        shard.scan()
        await shard.write(clear(KEYS[1]))

        slots = shard.namespace._scans._slots
        assert sorted(key for slot in slots for key in slot) == sorted([KEYS[0], *KEYS[3::2]])


FRONTS: list[Front] = [
    (None, None),
    ("a", "x"),
    ("a", "y"),
    ("b", "x"),
    ("long" * 100, "x"),
    ("long" * 100, "y"),
]


class Bustle:
    """Writes, commits, sweeps and scans at random; what scans find is held against what they had to find."""

    def __init__(self, seed: int, *, is_durable: bool) -> None:
        self.random = random.Random(seed)
        self.shard = LookedAt(is_durable=is_durable)
        self.scans: dict[bytes, tuple[int, Front, list[Found]]] = {}
        """Those under way: id -> the next page, the flow and state asked for, and what was found by now."""
        self.due: dict[bytes, list[Found]] = {}
        """What they are to find."""
        self.begun = 0
        self.finished = 0

    async def step(self) -> None:
        step = self.random.choices(
            [self.write, self.commit, self.pass_time, self.begin_to_scan, self.next_page], [8, 4, 1, 1, 8]
        )[0]
        await step()
        assert self.shard.counted() == self.shard.recounted()

    async def write(self) -> None:
        self.shard.begin_to_write(*[self.operation() for _ in range(self.random.randint(1, 4))])

    async def commit(self) -> None:
        if self.shard.store.commit_under_way is not None:
            await self.shard.committed()

    async def pass_time(self) -> None:
        self.shard.now_s += self.random.choice([0.1, 1, 3])
        if self.random.random() < 0.5:
            self.shard.namespace.sweep()

    async def begin_to_scan(self) -> None:
        if len(self.scans) < 3:
            self.begun += 1
            flow, state = self.random.choice(FRONTS)
            front = self.random.choice([(None, None), (flow, None), (None, state), (flow, state)])
            self.scans[b"scan %d" % self.begun] = (0, front, [])

    async def next_page(self) -> None:
        if not self.scans:
            return
        scan = self.random.choice(list(self.scans))
        page, front, found = self.scans[scan]
        if scan not in self.shard.namespace._scans._scans:
            self.due[scan] = self.readable(front)
        new, is_last = self.shard.page(page, scan, has_begun=bool(found), front=front, limit=2)
        found += new
        self.scans[scan] = (page + 1, front, found)
        if is_last:
            assert found == self.due.pop(scan)
            del self.scans[scan]
            self.finished += 1

    def readable(self, front: Front) -> list[Found]:
        records = zip(KEYS, self.shard.client().read(*KEYS), strict=True)
        flow, state = front
        return [
            Found(key, each)
            for key, each in records
            if each is not None and flow in (None, each.flow) and state in (None, each.state)
        ]

    def operation(self, *, may_be_many: bool = True) -> bytes:
        key, front = self.random.choice(KEYS), self.random.choice(FRONTS)
        ttl_ms = self.random.choice([None, None, 1, 2_000, 5_000])
        data = encode_data({"n": self.random.random()}, allow_pickle=False)
        empty = encode_data({}, allow_pickle=False)
        one = encode_data({"count": 1}, allow_pickle=False)
        made = self.random.randrange(9 if may_be_many else 6)
        if made <= 1:
            return protocol.set_record(key, *front, data, None, ttl_ms=ttl_ms)
        if made == 2:
            return self.random.choice([protocol.set_data, protocol.update_data])(key, data, None, ttl_ms)
        if made == 3:
            return protocol.patch(key, (data, ["x"], one, empty), None, ttl_ms=ttl_ms)
        if made <= 5:
            return clear(key)
        if made == 6:
            kept = self.random.choice([data, data, None])
            return self.shard.handled(key, self.random.randrange(1 << 30), kept, front)
        operations = [self.operation(may_be_many=False) for _ in range(4)]
        if made == 7:
            operations.append(set_data(BOB, expected_version=1 << 40))
        return protocol.transact(operations)


@pytest.mark.slow
@pytest.mark.parametrize("is_durable", [False, True], ids=["memory", "durable"])
@given(seed=st.integers(0, 1 << 32))
@settings(max_examples=40, deadline=None)
def test_scans_show_the_moment_at_which_they_began_and_counts_are_exact(is_durable: bool, seed: int) -> None:  # noqa: FBT001
    async def go() -> None:
        bustle = Bustle(seed, is_durable=is_durable)
        for _ in range(300):
            await bustle.step()
        while bustle.scans:
            await bustle.next_page()
        assert bustle.finished == bustle.begun

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(scans, "_LOOKED_AT_ALONE", FEW)
        patched.setattr(scans, "_LOOKED_AT_BESIDE_OTHERS", FEW)
        asyncio.run(go())


class TestCount:
    async def test_follows_every_kind_of_write(self, shard: LookedAt) -> None:
        data = encode_data({"a": 1}, allow_pickle=False)
        empty = encode_data({}, allow_pickle=False)

        def writes() -> Iterator[list[bytes]]:
            yield [set_record(ANN, "a", "x"), set_record(BOB, "a", "x"), set_record(CID, "a", "y")]
            yield [set_record(ANN, "a", "y"), set_record(ANN, "b", None), update_data(BOB, a=1)]
            patch = protocol.patch(KEYS[2], (data, [], empty, empty), None)
            yield [set_data(KEYS[0]), update_data(KEYS[1]), patch]
            yield [clear(KEYS[0]), clear(KEYS[0]), clear(BOB)]
            yield [protocol.transact([set_record(BOB, "t"), clear(KEYS[1]), clear(KEYS[2])])]
            conflict = set_record(CID, "t", expected_version=99)
            yield [protocol.transact([clear(BOB), set_record(ANN, "t"), conflict])]
            yield [shard.handled(ANN, 1, data, ("b", "moved")), shard.handled(CID, 2)]
            yield [shard.handled(ANN, 3), set_record(CID, "a", "y")]

        counted = []
        for operations in writes():
            await shard.write(*operations)
            counted.append(shard.counted())

        assert counted == [
            {("a", "x"): 2, ("a", "y"): 1},
            {("b", None): 1, ("a", "x"): 1, ("a", "y"): 1},
            {("b", None): 1, ("a", "x"): 1, ("a", "y"): 1, (None, None): 3},
            {("b", None): 1, ("a", "y"): 1, (None, None): 2},
            {("b", None): 1, ("a", "y"): 1, ("t", None): 1},
            {("b", None): 1, ("a", "y"): 1, ("t", None): 1},
            {("b", "moved"): 1, ("t", None): 1},
            {("a", "y"): 1, ("t", None): 1},
        ]

    async def test_is_of_what_is_committed(self) -> None:
        shard = LookedAt(is_durable=True)
        await shard.write(set_record(ANN, "a"), set_record(BOB, "a"))
        shard.begin_to_write(set_record(ANN, "b"), clear(BOB), set_record(CID, "c"))
        before = shard.counted()
        await shard.committed()

        assert (before, shard.counted()) == ({("a", None): 2}, {("b", None): 1, ("c", None): 1})

    async def test_is_the_same_after_a_restart(self) -> None:
        shard = LookedAt(is_durable=True)
        await fill(shard)
        await shard.write(shard.handled(KEYS[0], 1), set_record(ANN, "long" * 100))
        before = shard.counted()
        shard.restart()

        assert shard.counted() == before
        assert sum(before.values()) == len(KEYS)

    async def test_tells_names_apart_that_are_too_many_to_be_shared(
        self, shard: LookedAt, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(record, "_MAX_FRONTS", 3)
        await shard.write(*[set_record(key, f"{n}") for n, key in enumerate(KEYS)])
        await shard.write(*[set_record(key, f"{n + 1}") for n, key in enumerate(KEYS)])

        assert shard.counted() == {(f"{n + 1}", None): 1 for n in range(len(KEYS))}
        assert keys_of(shard.scan(front=("20", None))) == [KEYS[19]]


async def test_size_is_what_keys_and_records_take(shard: LookedAt) -> None:
    await fill(shard)
    size = await shard.namespace.size_bytes()
    await shard.write(clear(KEYS[0]))
    kept = shard.namespace._records

    assert size > await shard.namespace.size_bytes()
    assert await shard.namespace.size_bytes() == sum(map(len, kept)) + sum(
        map(len, filter(None, kept.values()))
    )
