"""Rewriting: all records and sessions committed again, while writes go on, for a store that encrypts anew."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from fsm_ray.codec import encode_key
from fsm_ray.errors import StoreUnavailable
from fsm_ray.namespace import serving
from fsm_ray.stores.base import Answered, Contents, Stale
from tests.test_namespace import AheadStore, Client, FakeStore, Shard, clear, set_record, update_data

RECORDS = 300
KEYS = [encode_key(number) for number in range(RECORDS)]


class Stepped(FakeStore):
    """Is done with each commit when the loop comes to it next."""

    def commit(self, batch: object) -> asyncio.Future[None]:
        future = super().commit(batch)  # type: ignore[arg-type]
        self._loop.call_soon(self.done)
        return future


@pytest.fixture
async def shard() -> Shard:
    """With records of many sessions."""
    shard = Shard(Stepped(asyncio.get_running_loop()))
    clients = [shard.client(f"client {number}") for number in range(7)]
    for number, key in enumerate(KEYS):
        clients[number % len(clients)].write(set_record(key, state="old", n=number))
        await asyncio.sleep(0)
    while shard.store.commit_under_way is not None:  # noqa: ASYNC110  # the loop's next round is the event
        await asyncio.sleep(0)
    shard.store.batches.clear()
    return shard


def written(store: FakeStore) -> set[bytes]:
    return {key for batch in store.batches for key in batch.records}


async def test_all_is_committed_again_as_it_is_in_small_steps(shard: Shard) -> None:
    before = shard.store.contents()
    shard.namespace.make_all_stale()
    assert shard.namespace.stale == RECORDS + len(before.sessions)

    assert await shard.namespace.rewrite()

    assert shard.namespace.stale == 0
    assert shard.store.contents() == before
    assert written(shard.store) == set(KEYS)
    assert {name for batch in shard.store.batches for name in batch.sessions} == before.sessions.keys()
    assert len(shard.store.batches) == 3
    assert max(len(batch.records) for batch in shard.store.batches) == 128
    assert {batch.version for batch in shard.store.batches} == {before.version}


async def test_large_ones_are_committed_again_in_smaller_steps(
    shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "_REWRITTEN_BYTES", 1_000)
    shard.client("large").write(*(update_data(key, n="x" * 400) for key in KEYS[:30]))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    shard.store.batches.clear()
    shard.namespace.make_all_stale()

    assert await shard.namespace.rewrite()

    large = [sum(len(blob or b"") > 400 for blob in batch.records.values()) for batch in shard.store.batches]
    assert max(large) == 3
    assert sum(large) == 30
    assert written(shard.store) == set(KEYS)


async def test_writes_that_are_made_meanwhile_are_kept_and_answered(shard: Shard) -> None:
    shard.namespace.make_all_stale()
    rewriting = asyncio.create_task(shard.namespace.rewrite())
    client = Client(shard.namespace, "meanwhile")
    changed = 0
    while not rewriting.done():
        client.write(update_data(KEYS[-1 - changed], n=-changed), clear(KEYS[changed]))
        changed += 1
        await asyncio.sleep(0.001)
    await asyncio.sleep(0)

    assert await rewriting
    assert changed > 2
    assert len(client.replies) == changed
    assert client.read(*KEYS[:changed]) == [None] * changed
    kept = Shard(shard.store).client()
    assert kept.read(*KEYS) == client.read(*KEYS)
    assert [each.content.data["n"] for each in kept.read(*KEYS[-changed:])] == [-n for n in range(changed)][
        ::-1
    ]


async def test_a_record_under_way_when_all_becomes_stale_is_committed_again() -> None:
    shard = Shard(FakeStore(asyncio.get_running_loop()))
    shard.client().write(set_record(KEYS[0], state="new"))

    shard.namespace.make_all_stale()
    rewriting = asyncio.create_task(shard.namespace.rewrite())
    await asyncio.sleep(0)
    await shard.settled()

    assert await rewriting
    assert [list(batch.records) for batch in shard.store.batches] == [[KEYS[0]], [KEYS[0]]]
    assert shard.store.batches[0].records == shard.store.batches[1].records


async def test_a_step_over_a_commit_under_way_has_what_that_one_writes() -> None:
    store = AheadStore(asyncio.get_running_loop())
    shard = Shard(store)
    shard.client("a").write(set_record(KEYS[0], state="first"), set_record(KEYS[1], state="first"))
    await store.done_with_one()
    shard.namespace.make_all_stale()
    shard.client("b").write(set_record(KEYS[0], state="second"), clear(KEYS[1]))

    rewriting = asyncio.create_task(shard.namespace.rewrite())
    await asyncio.sleep(0)
    assert len(store.commits) == 2
    await store.done_with_one()
    await store.done_with_one()

    assert await rewriting
    assert store.batches[-1].records == {KEYS[0]: store.batches[-2].records[KEYS[0]]}
    assert shard.client().read(KEYS[1]) == [None]


async def test_what_the_store_found_stale_is_committed_again_and_nothing_else() -> None:
    store = FakeStore(asyncio.get_running_loop())
    shard = Shard(store)
    await shard.write(*(set_record(key, state="old") for key in KEYS[:9]))
    contents = dataclasses.replace(store.contents(), stale=Stale(KEYS[3:5], []))
    assert isinstance(contents, Contents)
    store.batches.clear()
    namespace = type(shard.namespace)("my_bot", shard._options, store, contents)

    rewriting = asyncio.create_task(namespace.rewrite())
    await asyncio.sleep(0)
    store.done()

    assert await rewriting
    assert written(store) == set(KEYS[3:5])


async def test_a_session_that_was_forgotten_meanwhile_is_not_remembered_again(shard: Shard) -> None:
    shard.namespace.make_all_stale()
    shard.now_s += 10_000
    shard.client("newcomer").write(set_record(KEYS[0]))

    assert await shard.namespace.rewrite()

    assert list(shard.store.contents().sessions) == [b"newcomer".ljust(16)]


async def test_rewriting_ends_when_the_namespace_stops() -> None:
    store = FakeStore(asyncio.get_running_loop())
    shard = Shard(store)
    await shard.write(set_record(KEYS[0], state="old"))
    shard.namespace.make_all_stale()
    rewriting = asyncio.create_task(shard.namespace.rewrite())
    await asyncio.sleep(0)

    store.done(StoreUnavailable("gone"))

    assert not await asyncio.wait_for(rewriting, 5)
    assert [str(each) for each in shard.stopped] == ["gone"]


async def test_an_answer_that_is_sent_again_during_the_rewriting_is_the_same(shard: Shard) -> None:
    client = shard.client("resender")
    client.write(update_data(KEYS[0], n="once"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    shard.namespace.make_all_stale()
    rewriting = asyncio.create_task(shard.namespace.rewrite())
    await asyncio.sleep(0)

    client.resend(update_data(KEYS[0], n="once"))
    assert await rewriting

    assert client.replies[0] == client.replies[1]
    kept = shard.store.contents().sessions[b"resender".ljust(16)]
    assert isinstance(kept, Answered)
    assert kept.number == 1
