"""The log: one line for each event that an operator must know, and nothing of users in any."""

from __future__ import annotations

import ast
import asyncio
import logging
import re
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from ray.exceptions import RayTaskError

import fsm_ray
from fsm_ray import hosting, protocol
from fsm_ray.channel.server import Server
from fsm_ray.codec import encode_data, encode_key
from fsm_ray.errors import NamespaceUnavailable, Overloaded, StoreCorrupted, StoreUnavailable, TurnLost
from fsm_ray.hosting import ShardHost
from fsm_ray.logs import Seldom, one_line, where
from fsm_ray.metrics.client import ClientMetrics
from fsm_ray.namespace import MalformedRequest, Namespace, NotServing, serving
from fsm_ray.namespace.events import CALM_S, SLOW_COMMIT_S, Events
from fsm_ray.options import BotOptions
from fsm_ray.protocol import CommitTurn, SetRecord
from fsm_ray.routing.blocking import BlockingRayCall
from fsm_ray.routing.directory import Directory
from fsm_ray.routing.loop import RayCallConnection, Shard
from fsm_ray.routing.pulse import Pulse
from fsm_ray.routing.route import Route
from fsm_ray.stores.base import Contents
from fsm_ray.stores.memory import MemoryStore
from fsm_ray.tally import ShardTally

from .conftest import eventually

PACKAGE = Path(fsm_ray.__file__).parent

DOCUMENT = PACKAGE.parent / "docs" / "how-to" / "metrics.md"

READ = protocol.read_request(protocol.READ_RECORD, 1, [])

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


def logged() -> Iterator[str]:
    """The format of every line that the package writes, but for the demo's."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.is_relative_to(PACKAGE / "demo"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith(("logger.", "_logger.")):
                yield from (
                    each.value
                    for each in node.args
                    if isinstance(each, ast.Constant) and isinstance(each.value, str)
                )


@pytest.mark.parametrize("line", sorted(set(logged())))
def test_the_documentation_tells_what_to_do_about_each_line(line: str) -> None:
    _, _, told = DOCUMENT.read_text().partition("## Logs")
    fixed = max((part.strip(" :") for part in re.split(r"%[.\d]*\w", line)), key=len)

    assert fixed in told
    assert len(fixed) > 6 or line == "bot %r: %s"  # an upgrade's, which has nothing else that is fixed


def test_an_error_of_several_lines_is_told_in_one() -> None:
    assert one_line(ValueError("the actor died\n\tname: a\n")) == "the actor died name: a"


class Silent:
    """A shard that a thread has a turn of, and that does not answer."""

    session_id = bytes(16)

    def __init__(self) -> None:
        self.signs = 0

    def twin(self, timeout_s: float) -> Silent:
        assert timeout_s > 0
        return self

    def show_life(self, session_id: bytes) -> None:
        assert session_id == self.session_id
        self.signs += 1
        raise NamespaceUnavailable("shard 3 gave no answer")

    def close(self) -> None:
        """Nothing to release."""


def test_a_turn_that_may_be_lost_is_told_once_though_the_shard_stays_silent(
    told: Callable[[], list[str]],
) -> None:
    pulse, shard = Pulse(sign_of_life_s=0.001), Silent()
    pulse.begun(shard)  # type: ignore[arg-type]
    eventually(lambda: shard.signs > 3, "signs of life")
    pulse.stop()

    assert told() == ["a turn may be lost: shard 3 gave no answer"]


async def test_a_ray_call_that_failed_is_told_in_one_line_without_what_the_actor_said(
    told: Callable[[], list[str]],
) -> None:
    error = RayTaskError("exchange", f"Traceback:\n  {MARKER}\n", KeyError(MARKER))
    lost = asyncio.Event()
    RayCallConnection(Failing(error), lambda _: None, lost.set).send(READ)  # type: ignore[arg-type]
    async with asyncio.timeout(10):
        await lost.wait()
    with pytest.raises(ConnectionResetError) as raised:
        BlockingRayCall(Failing(error), 1.0).exchange(READ)  # type: ignore[arg-type]

    for line in (*told(), str(raised.value)):
        assert MARKER not in line
        assert "\n" not in line
        assert "RayTaskError in " in line


async def test_what_nobody_expected_of_connecting_is_told_in_one_line_without_what_it_says(
    told: Callable[[], list[str]],
) -> None:
    class Odd(Directory):
        def known_endpoint(self, bot_name: str, shard: int) -> NoReturn:
            raise KeyError(MARKER)

    directory = Odd(None, 1.0)
    directory.metrics = ClientMetrics(publish_every_s=None)
    shard = Shard(directory, Route("my_bot", BotOptions()), 0, 10.0, lambda: None, by_socket=True)
    with pytest.raises(NamespaceUnavailable, match="cannot be reached"):
        await shard.lanes[protocol.WRITE].submit(protocol.clear(encode_key("ann"), None))
    shard.close()

    (line,) = told()
    assert line.startswith("shard 0 of bot 'my_bot' cannot be reached: KeyError in known_endpoint")
    assert MARKER not in line
    assert "\n" not in line


class Failing:
    """The handle of an actor whose calls fail."""

    def __init__(self, error: RayTaskError) -> None:
        self._error = error
        self.exchange = self

    def remote(self, _request: bytes) -> NoReturn:
        raise self._error


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
