"""Looking across a bot's conversations as users do: scans, counts, watches and descriptions, over Ray."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import random
import signal
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, closing, suppress
from enum import Enum
from typing import Any, NamedTuple

import pytest

from fsm_ray import AsyncStorage, Change, Conversation, State, Storage, across
from fsm_ray.codec import encode_key, slot_of
from fsm_ray.errors import (
    ChangesMissed,
    InvalidInput,
    InvalidKey,
    ScanInterrupted,
    StorageClosed,
    UnknownBot,
    ValueNotDecodable,
    VersionConflict,
)
from fsm_ray.storage import Transport
from fsm_ray.testing import AnyStorage, Blocking
from tests.conftest import DEADLINE_S, Bots, eventually
from tests.test_contract import KINDS

pytestmark = pytest.mark.ray

SHARDS = 3


class Size(Enum):
    SMALL = "small"
    LARGE = "large"


class Place(NamedTuple):
    """A key as bots make them."""

    chat: int
    user: int


FRONTS = [("order", "size"), ("order", "pay"), ("support", "pay"), ("support", None), (None, None)]


def some_states() -> dict[Any, State]:
    """More than fit into one page of a shard, under keys of every kind."""
    keys: list[Any] = [Place(-number, number) for number in range(1_000)]
    keys += [(1, 42), 42, "42", b"42", True, Size.LARGE, uuid.UUID(int=42), None, ("nested", (1, None))]
    return {
        key: State(flow=flow, state=state, data={"n": n, "size": Size.SMALL})
        for n, (key, (flow, state)) in enumerate(zip(keys, itertools.cycle(FRONTS), strict=False))
    }


CONTENT = some_states()


def place_of(key: Any) -> tuple[int, bytes]:
    """What scans go by."""
    encoded = encode_key(key)
    return slot_of(encoded), encoded


IN_ORDER = sorted(CONTENT, key=place_of)


@pytest.fixture(scope="module", params=["blocking-socket", "async-ray-call"])
def storage(request: pytest.FixtureRequest, cluster: object) -> Iterator[AnyStorage]:
    facade, transport = KINDS[request.param]
    made = facade(transport=transport, timeout_s=DEADLINE_S)
    if isinstance(made, Storage):
        with made:
            yield made
    else:
        blocking = Blocking(made)
        yield blocking
        blocking.stop()


@pytest.fixture(scope="module")
def other(cluster: object) -> Iterator[Storage]:
    """Somebody else, who writes, and looks at the actors."""
    with Storage(timeout_s=DEADLINE_S) as storage:
        yield storage


@pytest.fixture(scope="module")
def filled_bots(other: Storage) -> Iterator[dict[int, str]]:
    """Bots of so many shards with these conversations, which no test changes."""
    names = {shards: f"across-{shards}" for shards in (1, SHARDS)}
    for shards, name in names.items():
        other.init(name, shards=shards)
        other.set_many(name, CONTENT)
    yield names
    for name in names.values():
        other.drop(name)


@pytest.fixture
def filled(request: pytest.FixtureRequest, filled_bots: dict[int, str]) -> str:
    """One of these; that of so many shards if a test asks for it, else each facade meets its kind."""
    asked: int | None = getattr(request, "param", None)
    kind = request.node.callspec.params.get("storage") if hasattr(request.node, "callspec") else None
    return filled_bots[asked or (1 if kind == "async-ray-call" else SHARDS)]


def going_through(storage: AnyStorage, bot: str, **wanted: Any) -> Generator[Conversation, None, None]:
    """A scan by either facade; whoever closes this ends it."""
    scan: Any = storage.scan(bot, **wanted)
    if isinstance(storage, Storage):
        yield from scan
        return

    async def following() -> Conversation | None:
        found: Conversation | None = await anext(scan, None)
        return found

    try:
        while (found := storage.run(following())) is not None:
            yield found
    finally:
        storage.run(scan.aclose())


def keys_of(storage: AnyStorage, bot: str, **wanted: Any) -> list[Any]:
    return [found.key for found in going_through(storage, bot, **wanted)]


def kill(bot: str, shard: int = 0) -> None:
    with Storage(timeout_s=DEADLINE_S) as storage:
        os.kill(storage.describe(bot).shards[shard].pid, signal.SIGKILL)


def total(storage: Storage, bot: str, name: str) -> Any:
    """The sum over the bot's shards of one of their statistics."""
    return sum(getattr(shard.statistics, name) for shard in storage.describe(bot).shards)


# Scan


def test_a_scan_finds_every_conversation_once_with_its_key_as_it_was(
    storage: AnyStorage, filled: str
) -> None:
    found = list(going_through(storage, filled))

    assert [each.key for each in found] == IN_ORDER
    assert [type(each.key) for each in found if each.key not in (1, True)] == [
        type(key) for key in IN_ORDER if key not in (1, True)
    ]
    assert {each.key: each.state for each in found} == CONTENT
    assert [each.state.version for each in found] == [
        state.version for state in storage.get_many(filled, IN_ORDER) if state is not None
    ]


@pytest.mark.parametrize(
    ("flow", "state"),
    [("order", None), (None, "pay"), ("order", "pay"), ("support", "size"), ("unheard of", None)],
)
def test_a_scan_finds_those_in_the_flow_and_state_asked_for(
    storage: AnyStorage, filled: str, flow: str | None, state: str | None
) -> None:
    expected = [
        key for key in IN_ORDER if flow in (None, CONTENT[key].flow) and state in (None, CONTENT[key].state)
    ]

    assert keys_of(storage, filled, flow=flow, state=state) == expected


@pytest.mark.parametrize("limit", [0, 1, 300, 10_000])
def test_a_scan_finds_no_more_than_its_limit(
    storage: AnyStorage, other: Storage, filled: str, limit: int
) -> None:
    assert keys_of(storage, filled, limit=limit) == IN_ORDER[:limit]
    assert (
        keys_of(storage, filled, limit=limit, flow="order", state="pay")
        == [key for key in IN_ORDER if (CONTENT[key].flow, CONTENT[key].state) == ("order", "pay")][:limit]
    )
    eventually(lambda: total(other, filled, "scans") == 0, "no scan is left")


def test_pages_of_several_scans_give_everything_once(storage: AnyStorage, filled: str) -> None:
    found: list[Any] = []
    page = keys_of(storage, filled, limit=97)
    while page:
        found += page
        page = keys_of(storage, filled, limit=97, after=page[-1])

    # Every key comes after None but the key None itself, which is met in its place.
    assert found[: IN_ORDER.index(None)] == IN_ORDER[: IN_ORDER.index(None)]
    assert found == IN_ORDER


def test_a_scan_begins_behind_a_key_that_has_no_record(storage: AnyStorage, filled: str) -> None:
    for after in range(1_000, 1_010):
        expected = [key for key in IN_ORDER if place_of(key) > place_of(after)]

        assert keys_of(storage, filled, after=after) == expected


def test_a_scan_that_is_left_leaves_nothing_at_the_shards(
    storage: AnyStorage, other: Storage, filled: str
) -> None:
    with closing(going_through(storage, filled)) as scan:
        assert next(scan).key == IN_ORDER[0]
        assert total(other, filled, "scans") == 1

    eventually(lambda: total(other, filled, "scans") == 0, "the scan is gone")
    assert keys_of(storage, filled) == IN_ORDER


def test_a_scan_of_an_empty_bot_finds_nothing(storage: AnyStorage, other: Storage, bots: Bots) -> None:
    bot = bots.emptied(shards=SHARDS)

    assert keys_of(storage, bot) == []


@pytest.mark.parametrize(
    ("wanted", "error"),
    [
        ({"limit": -1}, InvalidInput),
        ({"limit": True}, InvalidInput),
        ({"limit": 1.0}, InvalidInput),
        ({"flow": 5}, InvalidInput),
        ({"state": Size}, InvalidInput),
        ({"after": object()}, InvalidKey),
    ],
)
def test_what_no_scan_can_go_by_is_refused(
    storage: AnyStorage, filled: str, wanted: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        keys_of(storage, filled, **wanted)


def test_a_scan_tells_when_conversations_expire(storage: AnyStorage, other: Storage, bots: Bots) -> None:
    bot = bots.emptied()
    other.set_state(bot, 1, State(state="a"), ttl_s=1_000.0)
    other.set_state(bot, 2, State(state="a"))
    other.set_state(bot, 3, State(state="a"), ttl_s=0.001)
    eventually(lambda: other.get_state(bot, 3) is None, "it has expired")

    found = {each.key: each.state.expires_at for each in going_through(storage, bot)}

    assert found.keys() == {1, 2}
    assert found[2] is None
    assert found[1] is not None
    assert abs(found[1].timestamp() - time.time() - 1_000) < DEADLINE_S


def test_a_scan_shows_what_there_was_as_it_began(storage: AnyStorage, other: Storage, bots: Bots) -> None:
    bot = bots.emptied()
    other.set_many(bot, CONTENT)
    scan = going_through(storage, bot)
    found = [next(scan)]

    for key, number in zip(CONTENT, itertools.count(), strict=False):
        if number % 3 == 0:
            other.clear(bot, key)
        elif number % 3 == 1:
            other.set_state(bot, key, State(flow="changed"))
        other.set_state(bot, ("new", number), State(flow="new"))
    found += scan

    assert [each.key for each in found] == IN_ORDER
    assert {each.key: each.state for each in found} == CONTENT


def test_scans_under_concurrent_writes_miss_and_repeat_nothing(
    storage: AnyStorage, other: Storage, bots: Bots
) -> None:
    # Each facade meets another kind of store.
    bot = bots.emptied(shards=SHARDS, store="rocksdb" if isinstance(storage, Storage) else "memory")
    other.set_many(bot, CONTENT)
    done = threading.Event()

    def write(seed: int) -> None:
        choose = random.Random(seed)
        while not done.is_set():
            key = choose.randrange(1_000)
            if choose.random() < 0.5:
                other.clear(bot, ("moving", key))
            else:
                other.update_data(bot, ("moving", key), {"n": key})
            other.update_data(bot, choose.choice(IN_ORDER), {"n": key})

    with ThreadPoolExecutor(2) as pool:
        writers = [pool.submit(write, seed) for seed in range(2)]
        try:
            for _ in range(3):
                found = keys_of(storage, bot)

                assert len(found) == len(set(map(encode_key, found)))
                assert [key for key in found if key in CONTENT] == IN_ORDER
        finally:
            done.set()
    for writer in writers:
        writer.result()


def test_a_value_whose_class_is_missing_fails_when_it_is_come_to(
    storage: AnyStorage, other: Storage, bots: Bots, monkeypatch: pytest.MonkeyPatch
) -> None:
    bot = bots.emptied()
    keys = sorted(range(9), key=place_of)
    for key in keys:
        other.set_data(bot, key, {"size": Size.SMALL if key == keys[5] else "small"})
    monkeypatch.delattr(sys.modules[__name__], "Size")

    found: list[Any] = []
    with pytest.raises(ValueNotDecodable, match="Size") as raised:
        found.extend(each.key for each in going_through(storage, bot))

    assert found == keys[:5]
    assert raised.value.key == keys[5]
    assert [each.key for each in other.scan(bot, after=raised.value.key)] == keys[6:]
    eventually(lambda: total(other, bot, "scans") == 0, "no scan is left")


def test_a_scan_of_a_killed_shard_is_interrupted_and_goes_on_behind_the_last_key(
    storage: AnyStorage, other: Storage, bots: Bots
) -> None:
    bot = bots.emptied(store="rocksdb")
    other.set_many(bot, CONTENT)
    scan = going_through(storage, bot)
    found = [next(scan).key]
    kill(bot)

    with pytest.raises(ScanInterrupted):
        found.extend(each.key for each in scan)
    assert 1 < len(found) < len(CONTENT)
    found += keys_of(storage, bot, after=found[-1])

    assert found == IN_ORDER
    eventually(lambda: total(other, bot, "scans") == 0, "no scan is left")


def test_a_scan_is_gone_on_with_by_a_thread_while_the_one_that_began_it_waits_for_something_else(
    other: Storage, filled: str
) -> None:
    """As by a web framework that streams what a generator yields from a pool of threads."""

    def begin() -> Generator[Conversation, None, None]:
        scan = other.scan(filled)
        assert next(scan).key == IN_ORDER[0]
        return scan

    def wait_for_a_turn() -> None:
        with other.turn(filled, "contended"):
            pass

    with ThreadPoolExecutor(1) as pool:
        scan = pool.submit(begin).result()
        with other.turn(filled, "contended"):
            waiting = pool.submit(wait_for_a_turn)
            eventually(lambda: total(other, filled, "waiting_turns") == 1, "the other thread waits")
            rest = [found.key for found in scan]

        waiting.result()
        assert rest == IN_ORDER[1:]


def test_a_scan_ends_with_its_storage(cluster: object, filled: str) -> None:
    storage = Storage(timeout_s=DEADLINE_S)
    scan = storage.scan(filled)
    next(scan)
    storage.close()

    with pytest.raises(StorageClosed):
        list(scan)


# Count


def test_counts_are_of_all_shards(storage: AnyStorage, filled: str) -> None:
    assert storage.count(filled) == len(CONTENT)
    assert storage.count(filled, by="flow") == Counter(state.flow for state in CONTENT.values())
    assert storage.count(filled, by="state") == Counter(
        (state.flow, state.state) for state in CONTENT.values()
    )


@pytest.mark.parametrize("by", ["key", "", True, ["flow"]])
def test_conversations_are_not_counted_by_anything_else(storage: AnyStorage, filled: str, by: Any) -> None:
    with pytest.raises(InvalidInput, match='by is "flow" or "state"'):
        storage.count(filled, by=by)


def test_of_an_empty_bot_counts_are_nothing(storage: AnyStorage, other: Storage, bots: Bots) -> None:
    bot = bots.emptied(shards=SHARDS)
    other.set_state(bot, 1, State(flow="f"))
    other.clear(bot, 1)

    assert storage.count(bot) == 0
    assert storage.count(bot, by="flow") == storage.count(bot, by="state") == {}


def test_counts_equal_what_a_scan_finds_after_any_writes(
    storage: AnyStorage, other: Storage, bots: Bots
) -> None:
    bot = bots.emptied(shards=SHARDS)
    choose = random.Random(7)
    for _ in range(500):
        write_something(other, bot, choose)

    found = [(each.state.flow, each.state.state) for each in going_through(storage, bot)]
    assert storage.count(bot) == len(found)
    assert storage.count(bot, by="flow") == Counter(flow for flow, _ in found)
    assert storage.count(bot, by="state") == Counter(found)


def write_something(storage: Storage, bot: str, choose: random.Random) -> None:
    """One of all kinds of writes, to one of forty keys."""
    key = choose.randrange(40)
    flow, state = choose.choice(FRONTS)
    data = {"n": choose.randrange(1_000)}
    kind = choose.randrange(7)
    if kind == 0:
        storage.clear(bot, key)
    elif kind == 1:
        storage.set_data(bot, key, data)
    elif kind == 2:
        storage.update_data(bot, key, data)
    elif kind == 3:
        storage.patch(bot, key, increment={"count": 1})
    elif kind == 4:
        # It may be overtaken by a write of another kind.
        with suppress(VersionConflict), storage.turn(bot, key) as turn:
            turn.flow, turn.state = flow, state
    elif kind == 5:
        with storage.transaction(bot) as transaction:
            transaction.set_state(key, State(flow=flow, state=state, data=data))
            transaction.patch(key, append={"log": 1})
    else:
        storage.set_state(bot, key, State(flow=flow, state=state, data=data))


def test_what_looks_across_an_unknown_bot_says_so(storage: AnyStorage, bot_name: str) -> None:
    operations: list[Callable[[], Any]] = [
        lambda: keys_of(storage, bot_name),
        lambda: storage.count(bot_name),
        lambda: storage.position(bot_name),
        lambda: storage.describe(bot_name),
    ]

    for operation in operations:
        with pytest.raises(UnknownBot):
            operation()


# Watch


@pytest.fixture
async def watcher(
    request: pytest.FixtureRequest, cluster: object, monkeypatch: pytest.MonkeyPatch
) -> AsyncGenerator[AsyncStorage, None]:
    transport: Transport = getattr(request, "param", "auto")
    if transport == "ray":
        # A shard does not learn that nobody awaits a Ray call any more; it would keep the next test waiting.
        monkeypatch.setattr(across, "_WATCH_S", 0.2)
    async with AsyncStorage(timeout_s=DEADLINE_S, transport=transport) as storage:
        yield storage


both_transports = pytest.mark.parametrize("watcher", ["auto", "ray"], indirect=True)


async def take(changes: AsyncGenerator[Change, None], count: int) -> list[Change]:
    """So many changes, and no more: the watch may be gone on with."""
    async with asyncio.timeout(DEADLINE_S):
        return [await anext(changes) for _ in range(count)]


async def told(storage: AsyncStorage, bot: str, count: int, **wanted: Any) -> list[Change]:
    """The first so many changes that a watch tells of."""
    async with aclosing(storage.watch(bot, **wanted)) as changes:
        return await take(changes, count)


async def follow(changes: AsyncGenerator[Change, None], versions: list[int]) -> None:
    """Note the versions of all changes that there are."""
    async with asyncio.timeout(DEADLINE_S):
        async for change in changes:
            versions.append(change.version)  # noqa: PERF401  # until it fails


async def settled(condition: Callable[[], bool], what: str) -> None:
    """As `eventually`, while the loop goes on."""
    await asyncio.to_thread(eventually, condition, what)


@both_transports
@pytest.mark.parametrize("shards", [1, SHARDS])
async def test_a_watch_tells_what_others_write_from_now_on(
    watcher: AsyncStorage, other: Storage, bots: Bots, shards: int
) -> None:
    bot = bots.emptied(shards=shards)
    other.set_state(bot, "before", State())
    watching = asyncio.create_task(told(watcher, bot, 4))
    await settled(lambda: total(other, bot, "watches") == shards, "it watches")

    first = other.set_state(bot, 1, State(flow="f", state="a", data={"size": Size.SMALL}))
    other.update_data(bot, 1, {"more": 1})
    last = other.set_state(bot, 1, State(flow="f", state="b"), ttl_s=1_000)
    other.clear(bot, 1)
    changes = await watching

    assert [(change.key, change.before, change.state) for change in changes] == [
        (1, None, State(flow="f", state="a", data={"size": Size.SMALL})),
        (1, ("f", "a"), State(flow="f", state="a", data={"size": Size.SMALL, "more": 1})),
        (1, ("f", "a"), State(flow="f", state="b")),
        (1, ("f", "b"), None),
    ]
    assert [change.version for change in changes] == [first, first + 1, last, last + 1]
    assert [change.state.version for change in changes if change.state is not None] == [
        first,
        first + 1,
        last,
    ]
    assert changes[1].state is not None
    assert changes[1].state.expires_at is None
    assert changes[2].state is not None
    assert changes[2].state.expires_at is not None
    assert all(len(change.position) == shards and change.version in change.position for change in changes)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({"flow": "f"}, [0, 1, 2, 3, 5, 6]),
        ({"state": "a"}, [0, 1, 2, 4, 5]),
        ({"flow": "f", "state": "a"}, [0, 1, 2]),
    ],
)
async def test_a_watch_tells_of_those_that_enter_leave_or_are_in_the_flow_and_state(
    watcher: AsyncStorage, other: Storage, bots: Bots, wanted: dict[str, str], expected: list[int]
) -> None:
    bot = bots.emptied()
    since = other.position(bot)
    first = 1 + since[0]
    for flow, state in [("f", "a"), ("f", "a"), ("f", "b"), ("g", "c"), ("g", "a"), ("f", "b")]:
        other.set_state(bot, 1, State(flow=flow, state=state))
    other.clear(bot, 1)
    other.set_state(bot, 1, State(flow="g", state="c"))
    other.set_state(bot, 2, State(flow=wanted.get("flow"), state=wanted.get("state")))

    changes = await told(watcher, bot, len(expected) + 1, since=since, **wanted)

    assert [change.version - first for change in changes] == [*expected, 8]


async def test_a_watch_tells_that_a_conversation_has_expired(
    watcher: AsyncStorage, other: Storage, bots: Bots
) -> None:
    bot = bots.emptied()
    since = other.position(bot)
    other.set_state(bot, 1, State(flow="f", state="a"), ttl_s=0.05)

    made, expired = await told(watcher, bot, 2, since=since)

    assert made.state == State(flow="f", state="a")
    assert (expired.key, expired.before, expired.state) == (1, ("f", "a"), None)


@both_transports
async def test_a_watch_goes_on_behind_the_position_of_any_change(
    watcher: AsyncStorage, other: Storage, bots: Bots
) -> None:
    bot = bots.emptied(shards=SHARDS)
    since = await watcher.position(bot)
    assert since == other.position(bot)
    for key in range(30):
        other.set_state(bot, key, State(state="a"))

    changes = await told(watcher, bot, 30, since=since)

    assert len(changes) == 30
    assert {change.key for change in changes} == set(range(30))
    for seen in (1, 10, 29):
        rest = await told(watcher, bot, 30 - seen, since=changes[seen - 1].position)
        assert {change.key for change in rest} == {change.key for change in changes[seen:]}
    assert changes[-1].position == other.position(bot)


async def test_several_watch_at_once_and_each_is_told_of_everything(
    watcher: AsyncStorage, other: Storage, bots: Bots
) -> None:
    bot = bots.emptied(shards=SHARDS)
    since = other.position(bot)
    watching = [asyncio.create_task(told(watcher, bot, 50, since=since)) for _ in range(5)]
    for number in range(50):
        await asyncio.to_thread(other.set_state, bot, number % 7, State(data={"n": number}))

    for task in watching:
        changes = await task
        for key in range(7):
            numbers = [each.state.data["n"] for each in changes if each.key == key and each.state is not None]
            assert numbers == list(range(key, 50, 7))


@both_transports
@pytest.mark.parametrize("end", ["cancel", "aclose", "close the storage"])
async def test_a_watch_that_ends_leaves_nothing_at_the_shards(
    watcher: AsyncStorage, other: Storage, bots: Bots, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(across, "_WATCH_S", 0.2)
    unseen: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unseen.append(context))
    bot = bots.emptied(shards=SHARDS)
    changes = watcher.watch(bot)
    if end == "aclose":
        since = other.position(bot)
        other.set_state(bot, 1, State())
        changes = watcher.watch(bot, since=since)
        await take(changes, 1)
        await changes.aclose()
    else:
        watching = asyncio.create_task(take(changes, 1))
        await settled(lambda: total(other, bot, "watches") == SHARDS, "it watches")
        if end == "cancel":
            watching.cancel()
            with pytest.raises(asyncio.CancelledError):
                await watching
        else:
            await watcher.close()
            with pytest.raises(StorageClosed):
                await watching

    assert not [task for task in asyncio.all_tasks() if "_changes" in repr(task)]
    gc.collect()
    assert unseen == []
    await settled(lambda: total(other, bot, "watches") == 0, "nobody watches any more")


async def test_a_watch_of_an_unknown_bot_says_so(watcher: AsyncStorage, bot_name: str) -> None:
    with pytest.raises(UnknownBot):
        await told(watcher, bot_name, 1)


@pytest.mark.parametrize("filled", [SHARDS], indirect=True)
@pytest.mark.parametrize(
    "wanted",
    [
        {"since": (1, 2)},
        {"since": (1, 2, 3, 4)},
        {"since": (1, 2, -1)},
        {"since": (1, 2, True)},
        {"since": (1, 2, 1 << 64)},
        {"since": "123"},
        {"since": 1},
        {"flow": 5},
        {"state": Size},
    ],
    ids=str,
)
async def test_what_no_watch_can_go_by_is_refused(
    watcher: AsyncStorage, filled: str, wanted: dict[str, Any]
) -> None:
    with pytest.raises(InvalidInput):
        await told(watcher, filled, 1, **wanted)


@both_transports
async def test_a_watch_resumes_by_itself_when_nothing_was_written_while_its_shard_was_away(
    watcher: AsyncStorage, other: Storage, bots: Bots
) -> None:
    bot = bots.emptied(store="rocksdb")
    since = other.position(bot)
    other.set_state(bot, 1, State(state="before"))
    async with aclosing(watcher.watch(bot, since=since)) as changes:
        (before,) = await take(changes, 1)
        resuming = asyncio.create_task(take(changes, 1))
        await settled(lambda: total(other, bot, "watches") == 1, "it watches")
        await asyncio.to_thread(kill, bot)
        await settled(lambda: total(other, bot, "watches") == 1, "it watches again")
        other.set_state(bot, 1, State(state="after"))
        (after,) = await resuming

    assert (after.key, after.before, after.state) == (1, (None, "before"), State(state="after"))
    assert after.version == before.version + 1


@pytest.mark.parametrize("store", ["memory", "rocksdb"])
async def test_a_watch_says_that_it_missed_what_was_written_while_its_shard_was_away(
    watcher: AsyncStorage, other: Storage, bots: Bots, store: str
) -> None:
    bot = bots.emptied(shards=SHARDS, store=store)
    key = next(key for key in itertools.count() if place_of(key)[0] < 4096 // SHARDS)
    since = other.position(bot)
    other.set_state(bot, key, State(state="before"))
    async with aclosing(watcher.watch(bot, since=since)) as changes:
        await take(changes, 1)
        # It has asked for no more: its shard is away, and back, before it does.
        await asyncio.to_thread(kill, bot)
        if store == "rocksdb":
            other.set_state(bot, key, State(state="missed"))
        with pytest.raises(ChangesMissed) as caught:
            await take(changes, 1)

    found = [(each.key, each.state) async for each in watcher.scan(bot)]
    other.set_state(bot, key, State(state="after"))
    (after,) = await told(watcher, bot, 1, since=caught.value.position)

    missed = [(key, State(state="missed"))] if store == "rocksdb" else []
    assert found == missed
    assert after.state == State(state="after")
    assert after.before == ((None, "missed") if missed else None)


async def test_a_slow_watch_is_told_that_it_missed_changes_and_sees_no_hole_before(
    watcher: AsyncStorage, other: Storage, bots: Bots
) -> None:
    bot = bots.emptied()
    since = other.position(bot)
    other.set_many(bot, {key: State() for key in range(10)})
    versions: list[int] = []
    async with aclosing(watcher.watch(bot, since=since)) as changes:
        versions += [change.version for change in await take(changes, 1)]
        for _ in range(50):
            await asyncio.to_thread(other.set_many, bot, {key: State() for key in range(1_000)})
        with pytest.raises(ChangesMissed) as caught:
            await follow(changes, versions)

    assert versions == list(range(since[0] + 1, since[0] + 1 + len(versions)))
    assert caught.value.position == other.position(bot)
    other.set_state(bot, "next", State())
    assert [each.key for each in await told(watcher, bot, 1, since=caught.value.position)] == ["next"]


@both_transports
async def test_a_watch_of_a_bot_that_is_dropped_says_so(
    watcher: AsyncStorage, other: Storage, bot_name: str
) -> None:
    other.init(bot_name, shards=SHARDS)
    watching = asyncio.create_task(told(watcher, bot_name, 1))
    await settled(lambda: total(other, bot_name, "watches") == SHARDS, "it watches")
    await asyncio.to_thread(other.drop, bot_name)

    with pytest.raises(UnknownBot):
        await watching


async def test_a_watch_tells_what_it_can_before_a_value_whose_class_is_missing(
    watcher: AsyncStorage, other: Storage, bots: Bots, monkeypatch: pytest.MonkeyPatch
) -> None:
    bot = bots.emptied()
    since = other.position(bot)
    for key, size in enumerate(["small", Size.SMALL, "large"]):
        other.set_data(bot, key, {"size": size})
    monkeypatch.delattr(sys.modules[__name__], "Size")

    async with aclosing(watcher.watch(bot, since=since)) as changes:
        assert [change.key for change in await take(changes, 1)] == [0]
        with pytest.raises(ValueNotDecodable, match="Size") as raised:
            await take(changes, 1)

    assert raised.value.key == 1
    async with aclosing(watcher.watch(bot, since=raised.value.position)) as changes:
        assert [change.key for change in await take(changes, 1)] == [2]


def test_loops_watch_by_one_storage(cluster: object, other: Storage, bots: Bots) -> None:
    bot = bots.emptied(shards=SHARDS)
    since = other.position(bot)
    shared = AsyncStorage(timeout_s=DEADLINE_S)

    def watch(_: int) -> list[Any]:
        return [change.key for change in asyncio.run(told(shared, bot, 20, since=since))]

    with ThreadPoolExecutor(2) as pool:
        watching = pool.map(watch, range(2))
        for key in range(20):
            other.set_state(bot, key, State())

        assert [sorted(keys) for keys in watching] == [list(range(20))] * 2


@pytest.mark.parametrize(("watcher", "store"), [("ray", "memory"), ("auto", "rocksdb")], indirect=["watcher"])
async def test_who_replays_all_changes_has_what_a_scan_finds(
    watcher: AsyncStorage, other: Storage, bots: Bots, store: str
) -> None:
    bot = bots.emptied(shards=SHARDS, store=store)
    since = other.position(bot)
    replayed: dict[Any, State] = {}
    versions: dict[Any, int] = {}

    async def replay() -> None:
        async with aclosing(watcher.watch(bot, since=since)) as changes:
            async for change in changes:
                before = replayed.pop(change.key, None)
                assert change.before == (before and (before.flow, before.state))
                assert change.version > versions.get(change.key, 0)
                versions[change.key] = change.version
                if change.state is not None:
                    replayed[change.key] = change.state
                if change.position == end:
                    return

    def write(seed: int) -> None:
        choose = random.Random(seed)
        for _ in range(150):
            write_something(other, bot, choose)

    end: Sequence[int] = ()
    replaying = asyncio.create_task(replay())
    await asyncio.gather(*(asyncio.to_thread(write, seed) for seed in range(4)))
    # A last change of each shard, so that the one that is told last has the position of the end.
    end = tuple(version + 1 for version in other.position(bot))
    for shard in range(SHARDS):
        key = next(n for n in itertools.count(100) if place_of(n)[0] * SHARDS // 4096 == shard)
        other.set_state(bot, key, State(state="end"))
    async with asyncio.timeout(DEADLINE_S):
        await replaying

    found = {each.key: each.state for each in other.scan(bot)}
    assert replayed == found
    assert {key: state.version for key, state in found.items()} == {key: versions[key] for key in found}


# Describe


def test_a_description_tells_what_there_is_and_what_was_done(other: Storage, bot_name: str) -> None:
    other.init(bot_name, shards=2)
    for key in range(100):
        other.set_data(bot_name, key, {"text": "x" * 1_000})
    for key in range(50):
        other.get_data(bot_name, key)
        other.clear(bot_name, key)

    described = other.describe(bot_name)
    assert described.options.shards == 2
    assert sum(shard.statistics.records for shard in described.shards) == 50
    assert sum(shard.statistics.operations for shard in described.shards) == 200
    assert 50_000 < sum(shard.size_bytes for shard in described.shards) < 60_000
    assert all(shard.statistics.records for shard in described.shards)
    assert 0 < total(other, bot_name, "operations_per_s") <= 200

    with other.turn(bot_name, 1), closing(other.scan(bot_name, limit=1)) as scan:
        next(scan)
        assert total(other, bot_name, "turns") == 1
        assert total(other, bot_name, "scans") == 1
    assert total(other, bot_name, "turns") == total(other, bot_name, "scans") == 0
