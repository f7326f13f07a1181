"""What a durable store promises to a namespace; and what one does that others can open, or cannot.

A test file subclasses `StoreConformance` and one of the other two, and supplies two fixtures:

    class TestPaperStore(SharedStoreConformance, StoreConformance):
        @pytest.fixture
        def make_store(self) -> MakeStore:
            return PaperStore

        @pytest.fixture
        def url(self, printer: Printer) -> str:
            return f"paper://{printer.address}"

The promises about crashes and stale owners are tried with processes that are really killed and stopped; see
`writer.Writer`.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fsm_ray.errors import NotOwner, StoreMismatch, StoreUnavailable
from fsm_ray.stores.base import Answered, Batch, Contents, Place, Store
from fsm_ray.testing.batches import assert_kept, make_blob, numbered_batch
from fsm_ray.testing.writer import DEADLINE_S, MakeStore, Writer

ROUNDS = 5
"""How often a writer is killed or stopped, each time later in a commit."""

LEASE_S = 0.2
"""The shortest that there is: a store that does not know that an owner's process has ended waits it out."""

LONG_LEASE_S = 7.0
"""One that a test does not wait out, but for a clock of its own."""

_ODD = [b"", b"\x00", b"a", b"a\x00", b"A", b"%_'\"\\;", b"a:b/c", "ключ".encode(), b"\xff\xfe", bytes(200)]
"""Bytes that a store might mistake for something else, as keys and as sessions."""


class _StoreKit:
    """The fixtures of the kits. Of the loop they ask nothing but that it is asyncio's."""

    pytestmark = pytest.mark.asyncio

    @pytest.fixture
    def make_store(self) -> MakeStore:
        """What makes a store that is not opened yet: `make_store(place)`, most simply the store's class.

        It is called in other processes too, so it must be picklable, and its module importable in a fresh
        process: a class or function at the top of a module, or a functools.partial of one; no lambda. A
        shared store is also made with the keywords `clock` and `sleep`, see `OwnedStore`.
        """
        raise NotImplementedError

    @pytest.fixture
    def url(self) -> str:
        """Where the store keeps things: the `Place.url` of every store that a test makes.

        It need not be empty, and tests may share it, for each one uses bots of its own: a server of the whole
        session will do, and who started it removes what is left in it.
        """
        raise NotImplementedError

    @pytest.fixture
    def place(self, url: str) -> Place:
        """A place that no other test uses."""
        return _new_place(url)


class StoreConformance(_StoreKit):
    """What every durable store promises: see `Store`."""

    # What is committed is there, and nothing else

    async def test_it_says_that_it_is_durable(self, make_store: MakeStore, place: Place) -> None:
        assert make_store(place).is_durable

    async def test_a_new_store_is_empty(self, make_store: MakeStore, place: Place) -> None:
        contents = await contents_of(make_store(place))

        assert contents == Contents(contents.version)
        assert contents.version >= 0

    async def test_what_was_committed_is_there_for_another_object(
        self, make_store: MakeStore, place: Place
    ) -> None:
        batches = [numbered_batch(1), numbered_batch(2)]

        await commit_all(make_store(place), batches)

        assert_kept(await contents_of(make_store(place)), batches)

    async def test_what_was_committed_is_there_for_the_same_object_opened_again(
        self, make_store: MakeStore, place: Place
    ) -> None:
        store = make_store(place)

        await commit_all(store, [numbered_batch(1)])

        assert_kept(await contents_of(store), [numbered_batch(1)])

    async def test_a_store_can_be_opened_again_without_being_closed(
        self, make_store: MakeStore, place: Place
    ) -> None:
        async with opened(make_store(place)) as (store, _):
            await store.commit(numbered_batch(1))

            assert_kept(_bare(await store.open()), [numbered_batch(1)])
            await store.commit(numbered_batch(2))

        assert_kept(await contents_of(make_store(place)), [numbered_batch(1), numbered_batch(2)])

    async def test_a_later_commit_replaces_an_earlier_ones_records(
        self, make_store: MakeStore, place: Place
    ) -> None:
        first, second = make_blob(state="first"), make_blob(state="second", padding_bytes=5000)

        await commit_all(make_store(place), [_batch(1, {b"key": first}), _batch(2, {b"key": second})])
        assert (await contents_of(make_store(place))).records == {b"key": second}

        await commit_all(make_store(place), [_batch(3, {b"key": first})])
        assert (await contents_of(make_store(place))).records == {b"key": first}

    async def test_a_cleared_record_is_gone(self, make_store: MakeStore, place: Place) -> None:
        blob = make_blob()
        batches = [_batch(1, {b"cleared": blob, b"other": blob}), _batch(2, {b"cleared": None})]

        await commit_all(make_store(place), batches)

        assert (await contents_of(make_store(place))).records == {b"other": blob}

    async def test_a_cleared_record_can_be_made_again(self, make_store: MakeStore, place: Place) -> None:
        blob = make_blob()
        batches = [_batch(1, {b"key": blob}), _batch(2, {b"key": None}), _batch(3, {b"key": blob})]

        await commit_all(make_store(place), batches)

        assert (await contents_of(make_store(place))).records == {b"key": blob}

    async def test_to_clear_or_forget_what_is_not_there_is_no_error(
        self, make_store: MakeStore, place: Place
    ) -> None:
        batch = Batch(version=1, records={b"no record": None}, sessions={}, forgotten=[b"no session"])

        await commit_all(make_store(place), [batch])

        assert await contents_of(make_store(place)) == Contents(version=1)

    async def test_a_sessions_later_answer_replaces_the_earlier_one(
        self, make_store: MakeStore, place: Place
    ) -> None:
        first, second = Answered(1, b"long" * 100, 1.5), Answered(2, b"", 2.5)
        batches = [
            Batch(version=1, records={}, sessions={b"session": first}),
            Batch(version=2, records={}, sessions={b"session": second}),
        ]

        await commit_all(make_store(place), batches)

        assert (await contents_of(make_store(place))).sessions == {b"session": second}

    async def test_a_forgotten_session_is_gone(self, make_store: MakeStore, place: Place) -> None:
        answered = Answered(1, b"reply", 1.5)
        batches = [
            Batch(version=1, records={}, sessions={b"old": answered, b"new": answered}),
            Batch(version=1, records={}, sessions={}, forgotten=[b"old"]),
        ]

        await commit_all(make_store(place), batches)

        assert (await contents_of(make_store(place))).sessions == {b"new": answered}

    async def test_keys_and_sessions_are_any_bytes(self, make_store: MakeStore, place: Place) -> None:
        batch = Batch(
            version=1,
            records={key: make_blob(state=str(number)) for number, key in enumerate(_ODD)},
            sessions={session: Answered(number, session, 0.1) for number, session in enumerate(_ODD)},
        )

        await commit_all(make_store(place), [batch])

        assert_kept(await contents_of(make_store(place)), [batch])

    async def test_flow_and_state_are_any_text(self, make_store: MakeStore, place: Place) -> None:
        texts = [None, "", "a", "None", "\x00", "a\x00b", "день 🌞", "\\N\t\n", "x" * 70_000]
        records = {
            b"%d %d" % (i, j): make_blob(flow, state)
            for i, flow in enumerate(texts)
            for j, state in enumerate(texts)
        }

        await commit_all(make_store(place), [_batch(1, records)])

        assert (await contents_of(make_store(place))).records == records

    @pytest.mark.parametrize("version", [1, 2**31, 2**53 + 1, 2**63 - 1])
    async def test_versions_and_numbers_have_63_bits(
        self, make_store: MakeStore, place: Place, version: int
    ) -> None:
        batch = Batch(
            version=version,
            records={b"key": make_blob(version=version)},
            sessions={b"session": Answered(version, b"reply", 1_700_000_000.123456)},
        )

        await commit_all(make_store(place), [batch])

        assert_kept(await contents_of(make_store(place)), [batch])

    async def test_a_record_of_the_largest_size_is_kept(self, make_store: MakeStore, place: Place) -> None:
        blob = make_blob(padding_bytes=(16 << 20) - 64)

        await commit_all(make_store(place), [_batch(1, {b"key": blob})])

        assert (await contents_of(make_store(place))).records == {b"key": blob}

    async def test_a_batch_of_thousands_is_kept(self, make_store: MakeStore, place: Place) -> None:
        blob = make_blob("flow", "state", padding_bytes=50)
        answered = Answered(1, b"reply", 1.5)
        many = [b"%d" % number for number in range(5000)]
        batches = [
            Batch(version=1, records=dict.fromkeys(many, blob), sessions=dict.fromkeys(many, answered)),
            Batch(version=2, records=dict.fromkeys(many[:4000]), sessions={}, forgotten=many[:4000]),
        ]

        await commit_all(make_store(place), batches[:1])
        assert_kept(await contents_of(make_store(place)), batches[:1])

        await commit_all(make_store(place), batches[1:])
        assert_kept(await contents_of(make_store(place)), batches)

    @settings(
        max_examples=25,
        deadline=None,
        # The fixtures only tell where and how; each example has a bot of its own. And each store's test class
        # is an executor of its own.
        suppress_health_check=[
            HealthCheck.function_scoped_fixture,
            HealthCheck.differing_executors,
            HealthCheck.too_slow,
        ],
    )
    @given(data=st.data())
    async def test_any_series_of_batches_and_openings_leaves_what_a_dict_would_hold(
        self, make_store: MakeStore, url: str, data: st.DataObject
    ) -> None:
        place = _new_place(url)
        store = make_store(place)
        batches: list[Batch] = []
        try:
            contents = await store.open()
            for version, step in enumerate(data.draw(st.lists(_steps)), contents.version + 1):
                if isinstance(step, Batch):
                    batches.append(Batch(version, step.records, step.sessions, step.forgotten))
                    await store.commit(batches[-1])
                else:
                    await store.close()
                    store = store if step == "open again" else make_store(place)
                    assert_kept(_bare(await store.open()), batches, contents.version)
        finally:
            await store.close()

        assert_kept(await contents_of(make_store(place)), batches, contents.version)

    # Shards and bots have records of their own

    async def test_shards_and_bots_at_one_url_see_nothing_of_each_other(
        self, make_store: MakeStore, place: Place
    ) -> None:
        bot = place.bot_name
        names = [
            bot,
            f"{bot}1",
            f"{bot}.1",
            f"{bot}-1",
            f"{bot}_",
            f"{bot}@",
            bot.upper(),
            bot.ljust(64, "x"),
        ]
        places = [
            replace(place, bot_name=name, shard=shard, shards=12) for name in names for shard in (0, 1, 11)
        ]
        batches = [numbered_batch(1, f"{each.bot_name} {each.shard}") for each in places]

        for each, batch in zip(places, batches, strict=True):
            await commit_all(make_store(each), [batch])

        for each, batch in zip(places, batches, strict=True):
            assert_kept(await contents_of(make_store(each)), [batch])

    async def test_a_shard_of_another_number_of_shards_is_refused_and_changes_nothing(
        self, make_store: MakeStore, place: Place
    ) -> None:
        await commit_all(make_store(place), [numbered_batch(1)])

        with pytest.raises(StoreMismatch, match=place.bot_name):
            await contents_of(make_store(replace(place, shards=2)))

        assert_kept(await contents_of(make_store(place)), [numbered_batch(1)])

    async def test_commits_that_are_under_way_together_end_in_their_order(
        self, make_store: MakeStore, place: Place
    ) -> None:
        numbers = range(1, 10 * make_store(place).max_commits + 1)
        begun: list[asyncio.Future[None]] = []
        ended: list[asyncio.Future[None]] = []
        async with opened(make_store(place)) as (store, _):
            for number in numbers:
                if len(begun) >= store.max_commits:
                    await begun[-store.max_commits]
                begun.append(store.commit(numbered_batch(number)))
                begun[-1].add_done_callback(ended.append)
            await asyncio.gather(*begun)
            await asyncio.sleep(0)

        assert ended == begun
        assert_kept(await contents_of(make_store(place)), map(numbered_batch, numbers))

    # Closing

    async def test_a_commit_after_close_fails(self, make_store: MakeStore, place: Place) -> None:
        store = make_store(place)
        await commit_all(store, [numbered_batch(1)])

        commit = store.commit(numbered_batch(2))

        with pytest.raises((NotOwner, StoreUnavailable)):
            await commit
        assert_kept(await contents_of(make_store(place)), [numbered_batch(1)])

    async def test_a_store_can_be_closed_at_any_time(self, make_store: MakeStore, place: Place) -> None:
        store, refused = make_store(place), make_store(replace(place, shards=2))
        await store.close()
        await commit_all(store, [numbered_batch(1)])
        await store.close()
        with pytest.raises(StoreMismatch):
            await refused.open()
        await refused.close()

        assert_kept(await contents_of(store), [numbered_batch(1)])

    # Crashes

    async def test_an_acknowledged_commit_survives_kill_9(self, make_store: MakeStore, place: Place) -> None:
        with Writer(make_store, place, batches=1) as writer:
            writer.wait_until_acknowledged(1)

        contents = await contents_of(make_store(place))

        assert_kept(contents, [numbered_batch(contents.version)], contents.version)
        assert contents.version == writer.acknowledged

    async def test_a_writer_killed_at_any_point_loses_nothing_acknowledged_and_leaves_no_half_of_a_batch(
        self, make_store: MakeStore, place: Place
    ) -> None:
        first = (await contents_of(make_store(place))).version + 1
        for round_number in range(ROUNDS):
            with Writer(make_store, place) as writer:
                commit_s = writer.wait_until_acknowledged(5)
                _wait_for_a_part(commit_s, round_number)

            contents = await contents_of(make_store(place))

            assert writer.acknowledged <= contents.version <= writer.begun, writer
            assert_kept(contents, map(numbered_batch, range(first, contents.version + 1)))

    async def test_a_store_whose_first_owner_is_killed_while_it_opens_it_can_be_opened(
        self, make_store: MakeStore, place: Place
    ) -> None:
        start_s = time.monotonic()
        with Writer(make_store, place, batches=0) as writer:
            writer.wait_until_opened()
        open_s = time.monotonic() - start_s

        for round_number in range(ROUNDS):
            new = replace(place, bot_name=f"{place.bot_name}.{round_number}")
            with Writer(make_store, new, batches=0):
                _wait_for_a_part(open_s, round_number)

            await commit_all(make_store(new), [numbered_batch(1)])
            assert_kept(await contents_of(make_store(new)), [numbered_batch(1)])


class SharedStoreConformance(_StoreKit):
    """What a store promises that others can open while its owner lives: the last one to open it owns it."""

    async def test_it_says_that_it_is_shared(self, make_store: MakeStore, place: Place) -> None:
        assert make_store(place).is_shared

    async def test_the_owner_is_confirmed_also_beside_a_commit(
        self, make_store: MakeStore, place: Place
    ) -> None:
        async with opened(make_store(place)) as (store, _):
            await store.confirm()
            await asyncio.gather(store.commit(numbered_batch(1)), *(store.confirm() for _ in range(3)))

        assert_kept(await contents_of(make_store(place)), [numbered_batch(1)])

    async def test_who_opened_the_store_before_can_commit_nothing_more(
        self, make_store: MakeStore, place: Place
    ) -> None:
        async with opened(make_store(place)) as (stale, _):
            await stale.commit(numbered_batch(1))
            async with opened(_make_patient(make_store, place)) as (owner, found):
                assert_kept(found, [numbered_batch(1)])
                for _ in range(2):
                    with pytest.raises(NotOwner):
                        await stale.commit(numbered_batch(2, "stale"))

                await owner.commit(numbered_batch(2, "owner"))

        assert_kept(await contents_of(make_store(place)), [numbered_batch(1), numbered_batch(2, "owner")])

    async def test_who_opened_the_store_before_is_told_when_it_asks(
        self, make_store: MakeStore, place: Place
    ) -> None:
        async with (
            opened(make_store(place)) as (stale, _),
            opened(_make_patient(make_store, place)) as (owner, _),
        ):
            with pytest.raises(NotOwner):
                await stale.confirm()
            await owner.confirm()

    async def test_who_opened_the_store_before_cannot_open_it_again(
        self, make_store: MakeStore, place: Place
    ) -> None:
        async with (
            opened(make_store(place)) as (stale, _),
            opened(_make_patient(make_store, place)) as (owner, _),
        ):
            for _ in range(2):
                with pytest.raises(NotOwner):
                    await stale.open()

            await owner.commit(numbered_batch(1))
            await owner.confirm()

    async def test_who_opened_the_store_before_closes_it_for_itself_alone(
        self, make_store: MakeStore, place: Place
    ) -> None:
        clock = _Clock()
        async with (
            opened(make_store(place)) as (stale, _),
            opened(_make_patient(make_store, place)) as (owner, _),
        ):
            await stale.close()

            await owner.commit(numbered_batch(1))
            async with opened(make_store(place, clock=clock, sleep=clock.sleep)) as (_, contents):
                assert_kept(contents, [numbered_batch(1)])
            assert clock.slept_s >= LONG_LEASE_S

    async def test_of_two_that_open_the_store_at_once_one_owns_it(
        self, make_store: MakeStore, place: Place
    ) -> None:
        for number in range(1, ROUNDS + 1):
            both = [_make_patient(make_store, place) for _ in range(2)]
            batches = [numbered_batch(number, "one"), numbered_batch(number, "other")]
            try:
                openings = await asyncio.gather(*(each.open() for each in both), return_exceptions=True)
                assert all(isinstance(each, Contents | NotOwner) for each in openings), openings
                outcomes = await asyncio.gather(*map(_outcome, both, batches))
            finally:
                for each in both:
                    await each.close()

            assert outcomes.count(True) == 1, outcomes
            kept = (await contents_of(make_store(place))).records[b"last"]
            assert kept == batches[outcomes.index(True)].records[b"last"]

    async def test_contenders_never_overwrite_what_was_acknowledged_to_another(
        self, make_store: MakeStore, place: Place
    ) -> None:
        first = (await contents_of(make_store(place))).version + 1
        acknowledged: dict[int, str] = {}

        async def contend(name: str) -> None:
            for _ in range(6):
                store = _make_patient(make_store, place)
                try:
                    version = (await store.open()).version
                    for number in range(version + 1, version + 6):
                        await store.commit(numbered_batch(number, name))
                        assert number not in acknowledged, f"both {acknowledged[number]} and {name}"
                        acknowledged[number] = name
                        # Let the others in, also where a commit has nothing to wait for.
                        await asyncio.sleep(0)
                except NotOwner:
                    pass
                finally:
                    await store.close()

        await asyncio.gather(*map(contend, ["one", "two", "three"]))

        contents = await contents_of(make_store(place))
        for number, name in acknowledged.items():
            assert contents.records[b"number %d" % number] == numbered_batch(number, name).records[b"last"]
        assert {b"number %d" % number for number in range(first, contents.version + 1)} <= set(
            contents.records
        )

    async def test_an_owner_that_was_stopped_in_a_commit_changes_nothing_when_it_wakes(
        self, make_store: MakeStore, place: Place
    ) -> None:
        for round_number in range(ROUNDS):
            here = replace(place, bot_name=f"{place.bot_name}.{round_number}")
            with Writer(make_store, here) as writer:
                commit_s = writer.wait_until_acknowledged(5)
                first = (writer.found or 0) + 1
                _wait_for_a_part(commit_s, round_number)
                writer.stop()
                async with opened(_make_patient(make_store, here)) as (owner, found):
                    batches = [numbered_batch(number) for number in range(first, found.version + 1)]
                    assert_kept(found, batches)
                    batches += [numbered_batch(found.version + number, "owner") for number in (1, 2)]
                    await owner.commit(batches[-2])
                    writer.resume()
                    await asyncio.to_thread(writer.wait_until_refused_or_past, found.version)
                    await owner.commit(batches[-1])

            assert writer.refused, writer
            assert writer.acknowledged <= found.version <= writer.begun, writer
            assert_kept(await contents_of(make_store(here)), batches)

    # The lease

    async def test_open_waits_out_the_lease_of_an_owner_whose_process_lives(
        self, make_store: MakeStore, place: Place
    ) -> None:
        clock = _Clock()
        async with (
            opened(make_store(replace(place, lease_s=LONG_LEASE_S))),
            opened(make_store(place, clock=clock, sleep=clock.sleep)),
        ):
            assert clock.slept_s >= LONG_LEASE_S

    async def test_open_does_not_wait_when_the_last_owner_closed_the_store(
        self, make_store: MakeStore, place: Place
    ) -> None:
        clock = _Clock()
        await commit_all(make_store(place), [numbered_batch(1)])

        await contents_of(make_store(place, clock=clock, sleep=clock.sleep))

        assert clock.slept_s == 0

    async def test_open_does_not_wait_when_the_last_owners_process_has_ended(
        self, make_store: MakeStore, place: Place
    ) -> None:
        clock = _Clock()
        with Writer(make_store, place, batches=1) as writer:
            writer.wait_until_acknowledged(1)

        await contents_of(make_store(place, clock=clock, sleep=clock.sleep))

        assert clock.slept_s == 0

    async def test_open_waits_out_a_lease_that_an_owner_between_gave_up_waiting_for(
        self, make_store: MakeStore, place: Place
    ) -> None:
        async def give_up(_: float) -> None:
            raise StoreUnavailable("gave up")

        clock = _Clock()
        async with opened(make_store(replace(place, lease_s=LONG_LEASE_S))):
            with pytest.raises(StoreUnavailable, match="gave up"):
                await contents_of(make_store(place, clock=clock, sleep=give_up))

            await contents_of(make_store(place, clock=clock, sleep=clock.sleep))

        assert clock.slept_s >= LONG_LEASE_S

    async def test_open_does_not_wait_for_its_own_lease(self, make_store: MakeStore, place: Place) -> None:
        clock = _Clock()
        async with opened(make_store(place, clock=clock, sleep=clock.sleep)) as (store, _):
            await store.open()

        assert clock.slept_s == 0


class ExclusiveStoreConformance(_StoreKit):
    """What a store promises that only one process can open: who has it keeps it, for as long as it lives."""

    async def test_it_says_that_it_is_not_shared(self, make_store: MakeStore, place: Place) -> None:
        assert not make_store(place).is_shared

    async def test_a_store_that_another_process_has_open_is_refused_and_that_one_goes_on(
        self, make_store: MakeStore, place: Place
    ) -> None:
        with Writer(make_store, place) as writer:
            writer.wait_until_acknowledged(1)
            for _ in range(2):
                with pytest.raises(StoreUnavailable, match="open"):
                    await contents_of(make_store(place))

            writer.catch_up()
            writer.wait_until_acknowledged(2)

    async def test_a_store_that_another_object_has_open_is_refused_and_that_one_goes_on(
        self, make_store: MakeStore, place: Place
    ) -> None:
        async with opened(make_store(place)) as (store, _):
            for _ in range(2):
                with pytest.raises(StoreUnavailable, match="open"):
                    await contents_of(make_store(place))

            await store.commit(numbered_batch(1))

        assert_kept(await contents_of(make_store(place)), [numbered_batch(1)])

    async def test_a_store_can_be_opened_once_its_owner_is_killed(
        self, make_store: MakeStore, place: Place
    ) -> None:
        with Writer(make_store, place, batches=0) as writer:
            writer.wait_until_opened()
            with pytest.raises(StoreUnavailable):
                await contents_of(make_store(place))

        assert (await contents_of(make_store(place))).version == writer.found


# For stores' own tests too


@asynccontextmanager
async def opened(store: Store) -> AsyncIterator[tuple[Store, Contents]]:
    """Open the store, and close it in the end; it and what it holds, but for when it was owned since."""
    try:
        contents = await asyncio.wait_for(store.open(), DEADLINE_S)
        yield store, _bare(contents)
    finally:
        await store.close()


async def contents_of(store: Store) -> Contents:
    """What the store holds, but for when it was owned since; it is closed again."""
    async with opened(store) as (_, contents):
        return contents


async def commit_all(store: Store, batches: Iterable[Batch]) -> None:
    """Open the store, commit the batches, and close it."""
    async with opened(store):
        for batch in batches:
            await store.commit(batch)


def _bare(contents: Contents) -> Contents:
    return Contents(contents.version, contents.records, contents.sessions)


def _batch(version: int, records: Mapping[bytes, bytes | None]) -> Batch:
    return Batch(version=version, records=records, sessions={})


def _new_place(url: str) -> Place:
    return Place(url=url, bot_name=f"kit-{uuid.uuid4().hex[:12]}", shard=0, shards=1, lease_s=LEASE_S)


def _wait_for_a_part(whole_s: float, round_number: int) -> None:
    """Not for any condition: whatever the writer is at after this part of what it does is what is tried."""
    time.sleep(whole_s * (round_number + 0.5) / ROUNDS)


class _Clock:
    """A clock that goes only while somebody sleeps by it."""

    def __init__(self) -> None:
        self.slept_s = 0.0

    def __call__(self) -> float:
        return 1000.0 + self.slept_s

    async def sleep(self, duration_s: float) -> None:
        self.slept_s += duration_s


def _make_patient(make_store: MakeStore, place: Place) -> Store:
    """A store for which leases pass in no time; its own is long, and so are its timeouts."""
    clock = _Clock()
    return make_store(replace(place, lease_s=LONG_LEASE_S), clock=clock, sleep=clock.sleep)


async def _outcome(store: Store, batch: Batch) -> bool:
    """Whether the store's commit of the batch succeeded, or was refused because it does not own the store."""
    try:
        await store.commit(batch)
    except (NotOwner, StoreUnavailable):
        return False
    return True


def _batches() -> st.SearchStrategy[Any]:
    blobs = st.builds(
        make_blob,
        st.sampled_from([None, "f"]),
        st.sampled_from(["a", "b"]),
        padding_bytes=st.integers(0, 300),
    )
    some = st.sampled_from(_ODD)
    answers = st.builds(Answered, st.integers(1, 9), st.binary(max_size=20), st.floats(0, 2e9))
    return st.builds(
        _disjoint,
        st.dictionaries(some, st.none() | blobs, max_size=8),
        st.dictionaries(some, answers, max_size=4),
        st.lists(some, max_size=4, unique=True),
    )


def _disjoint(
    records: dict[bytes, bytes | None], sessions: dict[bytes, Answered], forgotten: list[bytes]
) -> Batch:
    """A batch as a namespace makes it: what it forgets is not what it remembers."""
    return Batch(0, records, sessions, [each for each in forgotten if each not in sessions])


_steps = _batches() | st.sampled_from(["open again", "open another"])
