"""The log: one line for each event that an operator must know, and nothing of users in any."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fsm_ray import hosting, protocol
from fsm_ray.channel.server import Server
from fsm_ray.codec import encode_data, encode_key
from fsm_ray.errors import Overloaded, StoreCorrupted, StoreUnavailable, TurnLost
from fsm_ray.hosting import ShardHost
from fsm_ray.logs import Seldom, where
from fsm_ray.namespace import MalformedRequest, Namespace, NotServing, serving
from fsm_ray.namespace.events import CALM_S, SLOW_COMMIT_S, Events
from fsm_ray.options import BotOptions
from fsm_ray.protocol import CommitTurn, SetRecord
from fsm_ray.stores.base import Contents
from fsm_ray.stores.memory import MemoryStore
from fsm_ray.tally import ShardTally

NAME = "shard 3 of bot 'my_bot'"


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def tally() -> ShardTally:
    return ShardTally()


@pytest.fixture
def shard_events(tally: ShardTally, clock: Clock) -> Events:
    return Events(NAME, tally, clock)


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What was logged so far, at any level, by anybody, tracebacks included."""
    caplog.set_level(logging.DEBUG)
    return lambda: [f"{record.getMessage()} {record.exc_text or ''}".rstrip() for record in caplog.records]


def test_a_line_that_comes_again_and_again_passes_once_a_minute_and_says_how_many_did_not(
    clock: Clock,
) -> None:
    seldom = Seldom(60.0, clock)

    passed = [seldom.passes() for _ in range(5)]
    clock.now_s += 60.0

    assert passed == [True, False, False, False, False]
    assert seldom.passes()
    assert seldom.more() == " (4 more since the last such line)"
    assert seldom.more() == ""


def test_a_slow_commit_is_told_once_a_minute(
    shard_events: Events, clock: Clock, told: Callable[[], list[str]]
) -> None:
    shard_events.committed(int(SLOW_COMMIT_S * 1e9) - 1)
    shard_events.committed(2_500_000_000)
    shard_events.committed(3_000_000_000)
    clock.now_s += 61.0
    shard_events.committed(4_000_000_000)

    assert told() == [
        f"{NAME}: its store took 2.5 s for a commit",
        f"{NAME}: its store took 4.0 s for a commit (1 more since the last such line)",
    ]


def test_refusing_is_told_when_it_begins_and_when_it_is_over(
    shard_events: Events, tally: ShardTally, clock: Clock, told: Callable[[], list[str]]
) -> None:
    for refused in (0, 5, 0, 3, 0, 0, 0):
        for _ in range(refused):
            tally.count_failed(SetRecord, Overloaded(""))
        shard_events.look_at_refusals()
        clock.now_s += CALM_S / 2

    assert told() == [
        f"{NAME}: refuses operations, as too many wait (Overloaded)",
        f"{NAME}: refuses nothing any more; it refused 8 operations in 10 s",
    ]


def test_a_commit_of_a_lost_turn_is_told(
    shard_events: Events, tally: ShardTally, told: Callable[[], list[str]]
) -> None:
    shard_events.look_at_refusals()
    tally.count_failed(CommitTurn, TurnLost(""))
    shard_events.look_at_refusals()
    shard_events.look_at_refusals()

    assert told() == [f"{NAME}: a worker committed a turn that it had lost (TurnLost)"]


def test_a_silent_store_is_told_once_and_again_when_it_answers(
    shard_events: Events, clock: Clock, told: Callable[[], list[str]]
) -> None:
    shard_events.confirmed()
    for _ in range(3):
        shard_events.unconfirmed(StoreUnavailable("no route"), clock.now_s + 2.0)
    clock.now_s += 1.5
    shard_events.confirmed()
    shard_events.confirmed()

    assert told() == [
        f"{NAME}: its store does not confirm ownership, and if that stays so it stops in 2.0 s: no route",
        f"{NAME}: its store answers again, after 1.5 s",
    ]


async def test_tidying_up_goes_on_after_an_error_of_its_own_and_the_log_does_not_say_its_key(
    monkeypatch: pytest.MonkeyPatch, told: Callable[[], list[str]]
) -> None:
    monkeypatch.setattr(serving, "TICK_S", 0.001)
    shard = Namespace("my_bot", BotOptions(), MemoryStore(), Contents(version=0), shard=3)
    ticks: list[int] = []
    third = asyncio.Event()

    def sweep() -> bool:
        ticks.append(1)
        if len(ticks) == 3:
            third.set()
        raise KeyError("secret-key")

    monkeypatch.setattr(shard, "sweep", sweep)
    tidying = asyncio.create_task(shard.keep_tidy())
    async with asyncio.timeout(10):
        await third.wait()
    tidying.cancel()

    (line,) = told()
    assert line.startswith(f"{NAME}: tidying up met KeyError in sweep (")
    assert "secret-key" not in line


def test_where_an_error_came_from_is_said_without_what_it_says() -> None:
    try:
        dict[str, int]()["ann"]
    except KeyError as error:
        said = where(error)

    assert said.startswith("KeyError in test_where_an_error_came_from")
    assert "ann" not in said.replace("said", "")


# Nothing of users


MARKER = f"marker{uuid.uuid4().hex}"
"""In every key, flow, state and data of what follows."""


def marked_requests() -> Iterator[bytes]:
    """Requests of every kind, good ones and bad ones, and bytes that are none."""
    key = encode_key((MARKER, 1))
    data = encode_data({MARKER: MARKER}, allow_pickle=False)
    number = encode_data({MARKER: 1}, allow_pickle=False)
    empty = encode_data({}, allow_pickle=False)
    session = bytes(16)
    writes = [
        protocol.set_record(key, MARKER, MARKER, data, None),
        protocol.set_record(key, MARKER, MARKER, data, 999),
        protocol.update_data(key, data, None),
        protocol.patch(key, (empty, [], number, empty), None),
        protocol.set_data(key, encode_data({MARKER: MARKER * 100}, allow_pickle=False), None),
        protocol.transact([protocol.clear(key, 999), protocol.set_data(key, data, None)]),
        protocol.commit_turn(key, (session, 77), (MARKER, MARKER), data, 0),
        protocol.clear(key, None),
    ]
    for count, operation in enumerate(writes, 1):
        yield protocol.write_request(count, [operation], session, is_resend=False)[4:]
    yield protocol.write_request(1, writes, session, is_resend=True)[4:]
    yield protocol.turn_request(1, [protocol.begin_turn(1, key)], session)[4:]
    yield protocol.read_request(protocol.READ_RECORD, 1, [protocol.read(key)])[4:]
    good = protocol.write_request(99, writes[:1], session, is_resend=False)[4:]
    yield good[:-3]
    yield good.replace(MARKER.encode(), b"\xff" + MARKER.encode()[1:])
    yield MARKER.encode()


@pytest.mark.parametrize("scheme", ["memory", "rocksdb", "file"])
async def test_no_line_of_an_actor_says_a_key_a_state_or_data(
    no_ray: None, told: Callable[[], list[str]], tmp_path: Path, scheme: str
) -> None:
    store = "memory://" if scheme == "memory" else f"{scheme}://{tmp_path}"
    shard: Any = ShardHost("my_bot", 0, BotOptions(store=store, max_record_bytes=1000))
    await shard.open()
    refused: list[str] = []
    for request in marked_requests():
        try:
            await shard.exchange(len(request).to_bytes(4, "little") + request)
        except MalformedRequest as error:
            refused.append(str(error))
            Server(lambda *_: None, name="a shard").refused(error)
    await shard.describe()
    await shard.stop()

    assert any(line.startswith("shard 0 of bot 'my_bot': opened ") for line in told())
    assert len(refused) >= 2
    assert sum("closing a connection" in line for line in told()) == len(refused)
    assert not [line for line in told() if MARKER in line or MARKER.encode().hex() in line]


async def test_an_exchange_that_is_over_leaves_nothing_behind(no_ray: None) -> None:
    shard: Any = ShardHost("my_bot", 0, BotOptions())
    await shard.open()
    read = protocol.read_request(protocol.READ_RECORD, 2, [protocol.read(encode_key("ann"))])
    await shard.exchange(read)
    with pytest.raises(MalformedRequest):
        await shard.exchange(b"\x01\x00\x00\x00?")
    await asyncio.sleep(0)

    assert not shard._exchanges
    await shard.stop()


async def test_a_damaged_record_is_told_to_who_opens_the_store_and_not_to_the_log(
    no_ray: None, told: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Damaged(MemoryStore):
        async def open(self) -> Contents:
            raise StoreCorrupted(f"the record of {MARKER} cannot be read")

    monkeypatch.setattr(hosting, "make_store", lambda *_: Damaged())
    shard = ShardHost("my_bot", 0, BotOptions())
    for _ in range(3):
        with pytest.raises(StoreCorrupted, match=MARKER):
            await shard.open()
    await shard.stop()

    (line,) = told()
    assert line.endswith("cannot open its store (StoreCorrupted): what it holds cannot be read")


async def test_a_request_that_comes_too_late_is_no_broken_rule(
    told: Callable[[], list[str]], tally: ShardTally
) -> None:
    Server(lambda *_: None, tally=tally).refused(NotServing())

    assert told() == []
    assert tally.connections_refused == 0


def test_peers_that_break_the_rules_are_counted_and_told_once_a_minute(
    told: Callable[[], list[str]], tally: ShardTally
) -> None:
    server = Server(lambda *_: None, name=NAME, tally=tally)
    for _ in range(3):
        server.refused(MalformedRequest("no request"))

    assert told() == [f"{NAME}: closing a connection: no request"]
    assert tally.connections_refused == 3
