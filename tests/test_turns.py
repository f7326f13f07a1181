"""Turns over a real Ray: one worker at a time, two requests, all or nothing, and whoever dies lets go."""
# ruff: noqa: RUF012  # a flow's declaration is a plain dict; what the class keeps of it is immutable

from __future__ import annotations

import asyncio
import contextlib
import itertools
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import types
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import ray

from fsm_ray import AsyncStorage, State, Storage, protocol
from fsm_ray.channel.client import BlockingConnection, ClientConnection
from fsm_ray.errors import (
    FsmRayError,
    InvalidData,
    InvalidInput,
    InvalidKey,
    InvalidState,
    Overloaded,
    PickleNotAllowed,
    RecordTooLarge,
    StorageClosed,
    TurnLost,
    TurnTimeout,
    UnknownBot,
    UnknownFlow,
    ValueNotDecodable,
    VersionConflict,
)
from fsm_ray.flows import Flow
from fsm_ray.namespace.leases import LEASE_S, MAX_WAITERS
from fsm_ray.protocol import GRANTS, NO_TURN, TURN, WRITE
from fsm_ray.routing.blocking import BlockingRayCall
from fsm_ray.routing.loop import RayCallConnection
from fsm_ray.routing.pulse import Pulse
from fsm_ray.routing.turns import LoopTurns
from fsm_ray.testing import AnyStorage, Blocking
from fsm_ray.turn import Turn
from tests.conftest import DEADLINE_S, Bots, eventually
from tests.test_contract import KINDS

pytestmark = pytest.mark.ray

BOT = "turns"
AT_ONCE_S = LEASE_S / 3
"""Far more than letting go takes, far less than it takes for a lease to be over."""


class Order(Flow):
    default_state = "choose"
    transitions = {"choose": ["pay"], "pay": []}


@pytest.fixture(scope="module")
def admin(cluster: object) -> Iterator[Storage]:
    """A storage to look from outside, and the bot of most tests."""
    with Storage(timeout_s=30) as storage:
        storage.init(BOT, allow_pickle=False)
        yield storage
        storage.drop(BOT)


@contextlib.contextmanager
def made(kind: str, **settings: Any) -> Iterator[AnyStorage]:
    facade, transport = KINDS[kind]
    storage = facade(transport=transport, **settings)
    if isinstance(storage, Storage):
        yield storage
        storage.close()
    else:
        blocking = Blocking(storage)
        yield blocking
        blocking.stop()


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


@pytest.fixture
def storage(kind: str, admin: Storage) -> Iterator[AnyStorage]:
    with made(kind, timeout_s=30) as storage:
        storage.register_flows(BOT, Order)
        yield storage


_numbers = itertools.count(1)


@pytest.fixture
def key() -> tuple[str, int]:
    """Of a conversation that there was not before."""
    return ("turn", next(_numbers))


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(32) as pool:
        yield pool


@pytest.fixture
def frames(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """All requests that this process's storages send from now on, however they travel."""
    sent: list[bytes] = []

    def noting(send: Callable[[Any, bytes], Any]) -> Callable[[Any, bytes], Any]:
        def noted(connection: Any, request: bytes) -> Any:
            sent.append(request)
            return send(connection, request)

        return noted

    for carrier in (BlockingConnection, BlockingRayCall):
        monkeypatch.setattr(carrier, "exchange", noting(carrier.exchange))
    monkeypatch.setattr(RayCallConnection, "send", noting(RayCallConnection.send))
    original = ClientConnection.send

    def send_of(connection: ClientConnection) -> Callable[[bytes], Any]:
        go: Callable[[bytes], Any] = original.fget(connection)  # type: ignore[attr-defined]
        return lambda request: noting(lambda _, frame: go(frame))(connection, request)

    monkeypatch.setattr(ClientConnection, "send", property(send_of))
    return sent


def version_of(storage: AnyStorage, key: Hashable) -> int | None:
    found = storage.get_state(BOT, key)
    return None if found is None else found.version


def in_turn(storage: AnyStorage, key: Hashable, *steps: Callable[[Turn], object], **more: Any) -> Turn:
    """Take these steps in a turn of BOT's, and return what it became."""
    with storage.turn(BOT, key, **more) as turn:
        for step in steps:
            step(turn)
    left: Turn = turn
    return left


def increment(storage: AnyStorage, key: Hashable, bot: str = BOT, by: int = 1) -> None:
    with storage.turn(bot, key) as turn:
        turn.data["n"] = turn.data.get("n", 0) + by


def fail(_turn: Turn) -> None:
    raise ZeroDivisionError


def until_waiting(admin: Storage, count: int, bot: str = BOT) -> None:
    """Wait until so many turns wait for a conversation of the bot."""
    eventually(lambda: admin.describe(bot).shards[0].statistics.waiting_turns == count, f"{count} turns wait")


def nothing_is_left(admin: Storage, bot: str = BOT) -> bool:
    """Whether no turn has or waits for a conversation."""
    statistics = admin.describe(bot).shards[0].statistics
    return (statistics.turns, statistics.waiting_turns) == (0, 0)


# What a turn costs, and what it stores


@pytest.mark.parametrize(
    ("steps", "last"),
    [
        ([lambda turn: turn.start_flow(Order), lambda turn: turn.transition("pay")] * 10, WRITE),
        ([lambda turn: turn.update_data(seen=True), Turn.clear_flow], WRITE),
        ([Turn.get_data, lambda turn: turn.is_in(Order)], WRITE),
        ([lambda turn: turn.update_data(seen=True), fail], TURN),
    ],
    ids=["many-steps", "cleared", "unchanged", "raised"],
)
def test_a_turn_is_two_requests_whatever_happens_in_it(
    storage: AnyStorage, key: Hashable, frames: list[bytes], steps: list[Callable[[Turn], object]], last: int
) -> None:
    in_turn(storage, key, lambda turn: turn.update_data(n=1))
    frames.clear()

    with contextlib.suppress(ZeroDivisionError):
        in_turn(storage, key, *steps)

    assert [request[5] for request in frames] == [TURN, last]


def test_a_turn_of_nothing_that_makes_nothing_writes_nothing(
    storage: AnyStorage, key: Hashable, frames: list[bytes]
) -> None:
    in_turn(storage, "connected")
    frames.clear()

    turn = in_turn(storage, key, Turn.clear_flow)

    assert [request[5] for request in frames] == [TURN, TURN]
    assert (turn.version, storage.get_state(BOT, key)) == (None, None)


def test_an_exception_stores_nothing_and_frees_the_conversation_at_once(
    storage: AnyStorage, key: Hashable
) -> None:
    increment(storage, key)
    before = version_of(storage, key)

    with pytest.raises(ZeroDivisionError):
        in_turn(storage, key, lambda turn: turn.data.clear(), Turn.clear_flow, fail)

    turn = in_turn(storage, key, timeout_s=AT_ONCE_S)
    assert (turn.data, turn.version) == ({"n": 1}, before)


def test_an_unchanged_turn_makes_no_version(storage: AnyStorage, key: Hashable) -> None:
    version = storage.set_state(BOT, key, State(flow="Order", state="choose", data={"items": [{"n": 1}]}))

    turn = in_turn(storage, key, lambda turn: turn.update_data(items=[{"n": 1}]))

    assert turn.version == version_of(storage, key) == version


def test_a_change_deep_inside_the_data_is_noticed(storage: AnyStorage, key: Hashable) -> None:
    version = storage.set_data(BOT, key, {"items": [{"n": 1}]})

    turn = in_turn(storage, key, lambda turn: turn.data["items"][0].update(n=2))

    assert storage.get_state(BOT, key) == State(data={"items": [{"n": 2}]})
    assert turn.version == version_of(storage, key) == version + 1


def test_what_a_turn_left_is_not_shared_with_what_is_stored(storage: AnyStorage, key: Hashable) -> None:
    turn = in_turn(storage, key, lambda turn: turn.update_data(items=[1]))

    turn.data["items"].append(2)

    assert storage.get_data(BOT, key) == {"items": [1]}


@pytest.mark.parametrize("is_new", [True, False])
def test_a_write_outside_of_turns_is_a_conflict_and_nothing_of_the_turn_is_stored(
    storage: AnyStorage, admin: Storage, key: Hashable, *, is_new: bool
) -> None:
    version = 0 if is_new else storage.set_data(BOT, key, {"n": 1})

    with pytest.raises(VersionConflict) as raised:
        in_turn(
            storage,
            key,
            lambda turn: turn.update_data(lost=True),
            lambda _: admin.set_data(BOT, key, {"other": 1}),
        )

    error = raised.value
    assert (error.bot, error.key, error.expected_version) == (BOT, key, version)
    assert error.actual_version == version_of(storage, key)
    assert in_turn(storage, key, timeout_s=AT_ONCE_S).data == {"other": 1}


def test_a_conversation_that_was_cleared_outside_of_turns_is_a_conflict(
    storage: AnyStorage, admin: Storage, key: Hashable
) -> None:
    storage.set_data(BOT, key, {"n": 1})

    with pytest.raises(VersionConflict) as raised:
        in_turn(storage, key, lambda turn: turn.update_data(n=2), lambda _: admin.clear(BOT, key))

    assert raised.value.actual_version is None
    assert storage.get_state(BOT, key) is None


def _assign(attribute: str, value: Any) -> Callable[[Turn], None]:
    return lambda turn: setattr(turn, attribute, value)


@pytest.mark.parametrize(
    ("step", "error"),
    [
        (lambda turn: turn.update_data(bad=object()), PickleNotAllowed),
        (_assign("data", {1: 2}), InvalidData),
        (_assign("data", None), InvalidData),
        (_assign("state", 5), InvalidState),
        (_assign("flow", Order), InvalidState),
        (_assign("ttl_s", -1), InvalidInput),
        (lambda turn: turn.update_data(much="x" * (2 << 20)), RecordTooLarge),
    ],
    ids=["pickle", "field-no-string", "data-None", "state", "flow", "ttl_s", "too-large"],
)
def test_what_cannot_be_stored_is_told_on_leaving_and_frees_the_conversation(
    storage: AnyStorage, key: Hashable, step: Callable[[Turn], object], error: type[FsmRayError]
) -> None:
    increment(storage, key)

    with pytest.raises(error) as raised:
        in_turn(storage, key, step)

    assert (raised.value.bot, raised.value.key) == (BOT, key)
    assert in_turn(storage, key, timeout_s=AT_ONCE_S).data == {"n": 1}


def test_a_turn_object_is_entered_once(storage: AnyStorage, key: Hashable) -> None:
    turn: Any = storage.turn(BOT, key)

    with turn, pytest.raises(InvalidInput, match="entered once"):
        turn.__enter__()
    with pytest.raises(InvalidInput, match="entered once"):
        turn.__enter__()

    in_turn(storage, key, timeout_s=AT_ONCE_S)


def test_a_turn_of_an_unknown_bot_is_refused(storage: AnyStorage, key: Hashable) -> None:
    with pytest.raises(UnknownBot, match="init"), storage.turn("nobody", key):
        pass


def test_a_key_that_cannot_be_encoded_is_refused(storage: AnyStorage) -> None:
    with pytest.raises(InvalidKey) as raised:
        storage.turn(BOT, (object(),))

    assert raised.value.bot == BOT


@pytest.mark.parametrize("timeout_s", [0, -1, float("-inf"), float("nan")])
def test_a_timeout_that_is_none_is_refused(storage: AnyStorage, key: Hashable, timeout_s: float) -> None:
    with pytest.raises(InvalidInput, match="timeout_s"):
        storage.turn(BOT, key, timeout_s=timeout_s)


# One at a time, first come first served


def test_of_many_turns_at_once_none_is_lost(
    storage: AnyStorage, key: Hashable, pool: ThreadPoolExecutor
) -> None:
    list(pool.map(lambda _: increment(storage, key), range(32)))

    assert storage.get_data(BOT, key) == {"n": 32}


def test_they_get_the_conversation_in_the_order_they_came(
    storage: AnyStorage, admin: Storage, key: Hashable, pool: ThreadPoolExecutor
) -> None:
    def note(number: int) -> None:
        in_turn(storage, key, lambda turn: turn.update_data(order=[*turn.data.get("order", ()), number]))

    with storage.turn(BOT, key):
        workers = []
        for number in range(8):
            workers.append(pool.submit(note, number))
            until_waiting(admin, number + 1)
    for worker in workers:
        worker.result(DEADLINE_S)

    assert storage.get_data(BOT, key) == {"order": list(range(8))}


def test_turns_of_processes_threads_and_tasks_lose_nothing(admin: Storage, key: Hashable) -> None:
    def of_threads(storage: Storage, bot: str, key: Hashable) -> None:
        def work(_: int) -> None:
            with storage.turn(bot, key) as turn:
                turn.data["n"] = turn.data.get("n", 0) + 1

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))

    def of_tasks(storage: AsyncStorage, bot: str, key: Hashable) -> None:
        async def work() -> None:
            async with storage.turn(bot, key) as turn:
                seen = turn.data.get("n", 0)
                await asyncio.sleep(0)
                turn.data["n"] = seen + 1

        async def all_of_them() -> None:
            await asyncio.gather(*(work() for _ in range(8)))

        asyncio.run(all_of_them())

    tasks = [start(of_threads, Storage(timeout_s=30), BOT, key) for _ in range(2)]
    tasks += [start(of_tasks, AsyncStorage(timeout_s=30), BOT, key) for _ in range(2)]
    ray.get(tasks, timeout=DEADLINE_S)

    assert admin.get_data(BOT, key) == {"n": 32}
    assert nothing_is_left(admin)


def start(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run the function once, in a Ray task."""
    task: Any = ray.remote(function).options(num_cpus=0, max_retries=0)
    return task.remote(*arguments)


def test_turns_on_several_conversations_do_not_wait_for_each_other(storage: AnyStorage) -> None:
    keys = [("turn", next(_numbers)) for _ in range(5)]

    with contextlib.ExitStack() as stack:
        turns = [stack.enter_context(storage.turn(BOT, key, timeout_s=AT_ONCE_S)) for key in keys]
        for number, turn in enumerate(turns):
            turn.update_data(n=number)

    assert [storage.get_data(BOT, key) for key in keys] == [{"n": n} for n in range(5)]


def test_turns_leave_nothing_behind(
    storage: AnyStorage, admin: Storage, key: Hashable, pool: ThreadPoolExecutor
) -> None:
    list(pool.map(lambda n: increment(storage, (key, n)), range(200)))
    list(pool.map(lambda n: in_turn(storage, (key, n)), range(200)))
    list(pool.map(lambda n: in_turn(storage, (key, n % 10), Turn.clear_flow), range(100)))

    eventually(lambda: nothing_is_left(admin), "no turn is left")


async def test_a_grant_that_overtakes_the_word_that_its_turn_has_to_wait_is_not_missed() -> None:
    answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    lane: Any = types.SimpleNamespace(submit=lambda _: answer, session_id=bytes(16))
    nobody: Any = types.SimpleNamespace(tell=lambda _: None)
    turns = LoopTurns(lane, nobody, 1.0)
    record = protocol.RecordView(None, "granted", protocol.ContentView({}, 1))
    begun = asyncio.create_task(turns.begin(b"key", AT_ONCE_S))
    await asyncio.sleep(0)

    answer.set_result(False)
    turns._granted(1, record)

    assert await begun == (1, record)
    turns.close()


def test_an_end_that_a_thread_could_not_tell_of_is_told_with_its_next_turn(
    admin: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, other = (("turn", next(_numbers)) for _ in range(2))

    def refuse(_: BlockingRayCall, __: bytes) -> bytes:
        raise ConnectionResetError

    with made("blocking-ray-call", timeout_s=0.3) as storage:
        with monkeypatch.context() as outage, storage.turn(BOT, held):
            outage.setattr(BlockingRayCall, "exchange", refuse)
        with pytest.raises(TurnTimeout):
            in_turn(admin, held, timeout_s=0.1)
        in_turn(storage, other)

        in_turn(admin, held, timeout_s=AT_ONCE_S)


def test_who_waits_too_long_is_told_what_to_do_and_leaves_the_queue(
    storage: AnyStorage, admin: Storage, key: Hashable, pool: ThreadPoolExecutor
) -> None:
    with storage.turn(BOT, key) as turn:
        turn.update_data(n=1)
        impatient = pool.submit(in_turn, storage, key, timeout_s=0.2)
        patient = pool.submit(increment, storage, key)
        with pytest.raises(TurnTimeout, match=r"retry later, or give a longer timeout_s") as raised:
            impatient.result(DEADLINE_S)
        until_waiting(admin, 1)
    patient.result(AT_ONCE_S)

    error = raised.value
    assert (error.bot, error.key, error.timeout_s) == (BOT, key, 0.2)
    assert storage.get_data(BOT, key) == {"n": 2}


def test_without_a_timeout_of_its_own_a_turn_waits_as_long_as_an_operation_may_take(
    kind: str, admin: Storage, key: Hashable
) -> None:
    with made(kind, timeout_s=0.5) as storage, storage.turn(BOT, key), pytest.raises(TurnTimeout) as raised:
        in_turn(storage, key)

    assert raised.value.timeout_s == 0.5


async def test_more_than_a_shard_lets_wait_are_refused_and_the_others_are_served(
    admin: Storage, key: Hashable
) -> None:
    async with AsyncStorage(timeout_s=DEADLINE_S) as storage:

        async def work() -> None:
            async with storage.turn(BOT, key) as turn:
                turn.data["n"] = turn.data.get("n", 0) + 1

        async with storage.turn(BOT, key):
            workers = [asyncio.create_task(work()) for _ in range(MAX_WAITERS)]
            await asyncio.to_thread(until_waiting, admin, MAX_WAITERS)
            with pytest.raises(Overloaded, match="retry later") as raised:
                await work()
        await asyncio.gather(*workers)

        assert raised.value.key == key
        assert await storage.get_data(BOT, key) == {"n": MAX_WAITERS}


async def test_turns_begun_at_once_on_a_new_storage_come_in_their_order(
    admin: Storage, key: Hashable
) -> None:
    async def take(storage: AsyncStorage, number: int, order: list[int]) -> None:
        async with storage.turn(BOT, key):
            order.append(number)

    # It has first to find the bot, in a thread: what is begun meanwhile must not overtake.
    for _ in range(10):
        order: list[int] = []
        async with AsyncStorage() as storage:
            await asyncio.gather(*(take(storage, number, order) for number in range(4)))

        assert order == [0, 1, 2, 3]


# Whoever is gone lets go


@pytest.mark.parametrize("transport", ["auto", "ray"])
async def test_a_task_that_is_cancelled_in_its_turn_stores_nothing_and_lets_go(
    admin: Storage, key: Hashable, transport: Any
) -> None:
    async with AsyncStorage(transport=transport) as storage:
        entered = asyncio.Event()

        async def work() -> None:
            async with storage.turn(BOT, key) as turn:
                turn.update_data(lost=True)
                entered.set()
                await asyncio.Event().wait()

        worker = asyncio.create_task(work())
        await entered.wait()
        worker.cancel()

        async with storage.turn(BOT, key, timeout_s=AT_ONCE_S) as turn:
            assert turn.version is None


@pytest.mark.parametrize("transport", ["auto", "ray"])
async def test_tasks_that_are_cancelled_while_they_wait_leave_the_queue(
    admin: Storage, key: Hashable, transport: Any
) -> None:
    async with AsyncStorage(transport=transport) as storage:

        async def work() -> None:
            async with storage.turn(BOT, key) as turn:
                turn.data["n"] = turn.data.get("n", 0) + 1

        async with storage.turn(BOT, key):
            workers = [asyncio.create_task(work()) for _ in range(6)]
            await asyncio.to_thread(until_waiting, admin, 6)
            for worker in workers[::2]:
                worker.cancel()
            workers.append(asyncio.create_task(work()))
            await asyncio.sleep(0)
            workers[-1].cancel()  # its request is on the way
        results = await asyncio.gather(*workers, return_exceptions=True)

        assert [result is None for result in results] == [False, True] * 3 + [False]
        assert await storage.get_data(BOT, key) == {"n": 3}
        await asyncio.to_thread(eventually, lambda: nothing_is_left(admin), "no turn is left")


@pytest.mark.parametrize("facade", [Storage, AsyncStorage])
def test_a_worker_killed_in_its_turn_lets_the_next_have_the_conversation_at_once(
    admin: Storage, key: Hashable, pool: ThreadPoolExecutor, facade: type[Storage | AsyncStorage]
) -> None:
    def hold(storage: Storage | AsyncStorage, bot: str, key: Hashable, note: str) -> None:
        if isinstance(storage, Storage):
            with storage.turn(bot, key) as turn:
                turn.update_data(dead=True)
                storage.set_data(bot, note, {"pid": os.getpid()})
                threading.Event().wait()
        else:
            asyncio.run(hold_async(storage, bot, key, note))

    async def hold_async(storage: AsyncStorage, bot: str, key: Hashable, note: str) -> None:
        async with storage.turn(bot, key) as turn:
            turn.update_data(dead=True)
            await storage.set_data(bot, note, {"pid": os.getpid()})
            await asyncio.Event().wait()

    start(hold, facade(timeout_s=30), BOT, key, f"pid of {key}")
    eventually(lambda: admin.get_data(BOT, f"pid of {key}") is not None, "the worker has its turn")
    next_one = pool.submit(increment, admin, key)
    until_waiting(admin, 1)

    os.kill((admin.get_data(BOT, f"pid of {key}") or {})["pid"], signal.SIGKILL)
    next_one.result(AT_ONCE_S)

    assert admin.get_data(BOT, key) == {"n": 1}
    assert nothing_is_left(admin)


@pytest.mark.parametrize("facade", [Storage, AsyncStorage])
def test_a_worker_killed_while_it_waits_is_passed_over(
    admin: Storage, key: Hashable, pool: ThreadPoolExecutor, facade: type[Storage | AsyncStorage]
) -> None:
    def wait(storage: Storage | AsyncStorage, bot: str, key: Hashable, note: str) -> None:
        with Storage() as teller:
            teller.set_data(bot, note, {"pid": os.getpid()})
        if isinstance(storage, Storage):
            with storage.turn(bot, key) as turn:
                turn.update_data(dead=True)
        else:
            asyncio.run(wait_async(storage, bot, key))

    async def wait_async(storage: AsyncStorage, bot: str, key: Hashable) -> None:
        async with storage.turn(bot, key) as turn:
            turn.update_data(dead=True)

    with admin.turn(BOT, key):
        start(wait, facade(timeout_s=30), BOT, key, f"pid of {key}")
        until_waiting(admin, 1)
        next_one = pool.submit(increment, admin, key)
        until_waiting(admin, 2)
        os.kill((admin.get_data(BOT, f"pid of {key}") or {})["pid"], signal.SIGKILL)
        until_waiting(admin, 1)
    next_one.result(AT_ONCE_S)

    assert admin.get_data(BOT, key) == {"n": 1}
    assert nothing_is_left(admin)


@pytest.mark.parametrize(
    ("kind", "store"),
    [
        ("blocking-socket", "memory"),
        ("async-ray-call", "memory"),
        ("blocking-ray-call", "rocksdb"),
        ("async-socket", "rocksdb"),
    ],
)
def test_turns_of_a_killed_actor_are_lost_and_those_that_wait_go_on(
    *, admin: Storage, bots: Bots, pool: ThreadPoolExecutor, kind: str, store: str
) -> None:
    bot = bots.emptied(store=store)

    def be_overtaken(storage: AnyStorage) -> None:
        with storage.turn(bot, "key") as turn:
            turn.update_data(lost=True)
            waiting = pool.submit(increment, storage, "key", bot, 10)
            until_waiting(admin, 1, bot)
            os.kill(admin.describe(bot).shards[0].pid, signal.SIGKILL)
            waiting.result(DEADLINE_S)

    with made(kind, timeout_s=30) as storage:
        increment(storage, "key", bot)
        with pytest.raises(TurnLost, match="handle the update again") as raised:
            be_overtaken(storage)

        assert (raised.value.bot, raised.value.key) == (bot, "key")
        assert storage.get_data(bot, "key") == {"n": 10 if store == "memory" else 11}
        increment(storage, "key", bot)
        assert nothing_is_left(admin, bot)


def _is_sign_of_life(request: bytes, session: bytes) -> bool:
    """Whether this request says that the session lives, and nothing else."""
    if request[5] != TURN:
        return False
    decoded = protocol.decode_request(request[4:])
    assert isinstance(decoded, protocol.TurnRequest)
    return (decoded.session, decoded.operations) == (session, [protocol.End(NO_TURN)])


def test_a_thread_s_turn_is_shown_to_be_alive_as_long_as_it_takes(
    admin: Storage, key: Hashable, frames: list[bytes]
) -> None:
    with Storage() as storage:
        storage._pulse = Pulse(sign_of_life_s=0.2)
        with storage.turn(BOT, key):
            session = next(iter(storage._bots)).shards[0].session_id
            frames.clear()
            eventually(
                lambda: sum(_is_sign_of_life(request, session) for request in tuple(frames)) > 2, "signs"
            )

        assert not storage._pulse._held


async def test_a_loop_s_turns_are_shown_to_be_alive_as_long_as_they_take(
    admin: Storage, key: Hashable, frames: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fsm_ray.routing.turns.SIGN_OF_LIFE_S", 0.05)
    async with AsyncStorage() as storage:
        async with storage.turn(BOT, key):
            turns = storage._bots()[BOT].shards[0].turns

            def signs() -> int:
                return sum(_is_sign_of_life(request, turns.session_id) for request in tuple(frames[1:]))

            await asyncio.to_thread(eventually, lambda: signs() > 2, "signs of life")
        await asyncio.to_thread(eventually, lambda: turns._timer is None, "an end of the signs")


# Updates that come again


def test_an_update_that_was_handled_changes_nothing_when_it_comes_again(
    storage: AnyStorage, key: Hashable
) -> None:
    first = in_turn(storage, key, lambda turn: turn.update_data(n=1), update_id=7)

    again = in_turn(storage, key, lambda turn: turn.update_data(n=2), update_id=7)

    assert (first.was_handled, again.was_handled) == (False, True)
    assert storage.get_state(BOT, key) == State(data={"n": 1}, version=first.version)
    assert version_of(storage, key) == first.version


def test_other_updates_and_other_conversations_are_handled(storage: AnyStorage, key: Hashable) -> None:
    in_turn(storage, key, lambda turn: turn.update_data(n=1), update_id=7)

    others = [in_turn(storage, key, lambda turn: turn.update_data(n=2), update_id=each) for each in (0, 6, 8)]
    elsewhere = in_turn(storage, (key, 2), update_id=7)

    assert not any(turn.was_handled for turn in [*others, elsewhere])
    assert in_turn(storage, key, update_id=7).was_handled


def test_an_update_whose_handler_raised_is_handled_when_it_comes_again(
    storage: AnyStorage, key: Hashable
) -> None:
    with pytest.raises(ZeroDivisionError):
        in_turn(storage, key, fail, update_id=7)

    again = in_turn(storage, key, lambda turn: turn.update_data(n=1), update_id=7)

    assert not again.was_handled
    assert storage.get_data(BOT, key) == {"n": 1}


@pytest.mark.parametrize("step", [Turn.clear_flow, Turn.get_data], ids=["cleared", "nothing"])
@pytest.mark.parametrize("is_new", [True, False])
def test_an_update_that_leaves_no_record_or_changes_none_is_remembered(
    storage: AnyStorage, key: Hashable, step: Callable[[Turn], object], *, is_new: bool
) -> None:
    if not is_new:
        in_turn(storage, key, lambda turn: turn.start_flow(Order))
    in_turn(storage, key, step, update_id=7)
    before = storage.get_state(BOT, key)

    again = in_turn(storage, key, lambda turn: turn.update_data(n=2), update_id=7)

    assert again.was_handled
    assert storage.get_state(BOT, key) == before
    assert (before is None) == (is_new or step is Turn.clear_flow)


def test_an_update_is_remembered_by_a_durable_bot_that_was_killed(admin: Storage, bots: Bots) -> None:
    bot = bots.emptied(store="rocksdb")
    for key in ("kept", "cleared"):
        with admin.turn(bot, key, update_id=7) as turn:
            turn.update_data(n=1)
    with admin.turn(bot, "cleared", update_id=8) as turn:
        turn.clear_flow()
    os.kill(admin.describe(bot).shards[0].pid, signal.SIGKILL)

    for key in ("kept", "cleared"):
        with admin.turn(bot, key, update_id=7) as turn:
            assert turn.was_handled
    assert admin.get_data(bot, "kept") == {"n": 1}
    assert admin.get_state(bot, "cleared") is None


@pytest.mark.parametrize("update_id", [-1, 1 << 63, True, "1", 1.0])
def test_an_update_id_that_telegram_never_gives_is_refused(
    storage: AnyStorage, key: Hashable, update_id: Any
) -> None:
    with pytest.raises(InvalidInput, match="update_id") as raised:
        storage.turn(BOT, key, update_id=update_id)

    assert (raised.value.bot, raised.value.key) == (BOT, key)


# Time to live


def test_a_turn_may_give_its_conversation_a_time_to_live(storage: AnyStorage, key: Hashable) -> None:
    in_turn(storage, key, lambda turn: turn.update_data(n=1), _assign("ttl_s", 0.05))

    eventually(lambda: storage.get_state(BOT, key) is None, "the conversation has expired")


def test_a_conversation_that_expires_during_a_turn_is_the_turn_s_all_the_same(
    storage: AnyStorage, key: Hashable
) -> None:
    storage.set_data(BOT, key, {"n": 1}, ttl_s=0.2)

    def outlive(turn: Turn) -> None:
        eventually(lambda: storage.get_state(BOT, key) is None, "the conversation has expired")
        turn.update_data(late=True)
        turn.ttl_s = 60.0

    in_turn(storage, key, outlive)

    assert storage.get_data(BOT, key) == {"n": 1, "late": True}


def test_a_turn_that_changes_nothing_renews_an_idle_conversation(admin: Storage, bot_name: str) -> None:
    admin.init(bot_name, ttl_s=60.0)
    admin.set_data(bot_name, "key", {"n": 1})
    before = admin.get_state(bot_name, "key")

    def is_renewed() -> bool:
        with admin.turn(bot_name, "key"):
            pass
        now = admin.get_state(bot_name, "key")
        assert before is not None
        assert now is not None
        assert before.expires_at is not None
        assert now.expires_at is not None
        return now.expires_at > before.expires_at

    eventually(is_renewed, "the conversation lives longer")


# Values and flows of other processes


def test_a_record_that_cannot_be_decoded_here_is_told_to_who_waited_too_and_frees_the_conversation(
    admin: Storage, kind: str, bots: Bots, pool: ThreadPoolExecutor
) -> None:
    module = types.ModuleType("fsm_ray_tests_gone")
    exec("class Pizza: pass", vars(module))  # a class that can be taken away
    bot = bots.emptied()
    with made(kind) as storage:
        with storage.turn(bot, "key"):
            sys.modules[module.__name__] = module
            admin.set_data(bot, "key", {"dish": module.Pizza()})
            del sys.modules[module.__name__]
            waiting = pool.submit(increment, storage, "key", bot)
            until_waiting(admin, 1, bot)
        with pytest.raises(ValueNotDecodable, match=module.__name__):
            waiting.result(AT_ONCE_S)
        with pytest.raises(ValueNotDecodable, match=module.__name__):
            increment(storage, "key", bot)

        eventually(lambda: nothing_is_left(admin, bot), "no turn is left")


def test_a_storage_takes_its_flows_into_a_task_also_those_that_cannot_be_imported_there(
    admin: Storage, key: Hashable
) -> None:
    class Survey(Flow):
        default_state = "ask"
        transitions = {"ask": ["thank"], "thank": []}

    def work(storage: Storage, bot: str, key: Hashable) -> list[bool]:
        with storage.turn(bot, key) as turn:
            return [turn.start_flow("Survey"), turn.transition("thank"), turn.transition("ask")]

    with Storage() as storage:
        storage.register_flows(BOT, Survey, Order, on_invalid_transition=lambda *_: None)
        steps = ray.get(start(work, storage, BOT, key), timeout=DEADLINE_S)

    assert steps == [True, True, False]
    assert admin.get_state(BOT, key) == State(flow="Survey", state="thank")


@pytest.mark.parametrize("facade", [Storage, AsyncStorage])
def test_a_copy_of_a_storage_has_its_flows_and_later_ones_are_its_own(
    facade: type[Storage | AsyncStorage],
) -> None:
    storage = facade()
    storage.register_flows(BOT, Order, on_invalid_transition="ignore")

    copy = pickle.loads(pickle.dumps(storage))
    storage.register_flows(BOT)

    rules = copy._rules_of(BOT)
    assert (rules.flow("Order"), rules.on_invalid_transition) == (Order, "ignore")
    with pytest.raises(UnknownFlow):
        storage._rules_of(BOT).flow("Order")


# Forks, loops, and the end of a storage


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_forked_processes_and_their_parent_take_turns(admin: Storage, key: Hashable) -> None:
    with Storage(timeout_s=30) as storage:
        with storage.turn(BOT, (key, "parent's")):

            def child() -> None:
                for _ in range(20):
                    increment(storage, key)
                assert not storage._pulse._held

            children = [multiprocessing.get_context("fork").Process(target=child) for _ in range(2)]
            for process in children:
                process.start()
        for _ in range(20):
            increment(storage, key)
        for process in children:
            process.join(DEADLINE_S)

    assert [process.exitcode for process in children] == [0, 0]
    assert admin.get_data(BOT, key) == {"n": 60}
    eventually(lambda: nothing_is_left(admin), "no turn is left")


def test_loops_one_after_another_and_in_several_threads_take_turns(admin: Storage, key: Hashable) -> None:
    storage = AsyncStorage(timeout_s=30)

    async def work() -> None:
        async def one() -> None:
            async with storage.turn(BOT, key) as turn:
                turn.data["n"] = turn.data.get("n", 0) + 1

        await asyncio.gather(*(one() for _ in range(5)))

    for _ in range(2):
        asyncio.run(work())
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: asyncio.run(work()), range(4)))

    assert admin.get_data(BOT, key) == {"n": 30}
    eventually(lambda: nothing_is_left(admin), "no turn is left")


def test_a_loop_that_ends_lets_its_turns_go(admin: Storage, key: Hashable) -> None:
    storage = AsyncStorage(timeout_s=30)

    async def leave_open() -> None:
        async def hold() -> None:
            async with storage.turn(BOT, key) as turn:
                turn.update_data(lost=True)
                entered.set()
                await asyncio.Event().wait()

        entered = asyncio.Event()
        held = asyncio.create_task(hold())
        waiting = asyncio.create_task(hold())
        await entered.wait()
        assert not held.done()
        assert not waiting.done()

    asyncio.run(leave_open())

    assert in_turn(admin, key, timeout_s=AT_ONCE_S).version is None
    eventually(lambda: nothing_is_left(admin), "no turn is left")


@pytest.mark.parametrize("kind", ["blocking-socket", "async-socket", "async-ray-call"])
def test_closing_a_storage_loses_its_turns_and_ends_those_that_wait(
    kind: str, admin: Storage, key: Hashable, pool: ThreadPoolExecutor, frames: list[bytes]
) -> None:
    with made(kind, timeout_s=2) as storage:

        def be_closed() -> None:
            with storage.turn(BOT, key) as turn:
                turn.update_data(lost=True)
                waiting.append(pool.submit(in_turn, storage, key, timeout_s=DEADLINE_S))
                until_waiting(admin, 1)
                eventually(lambda: any(request[5] == GRANTS for request in tuple(frames)), "it listens")
                storage.close()

        waiting: list[Any] = []
        with pytest.raises(StorageClosed):
            be_closed()
        with pytest.raises(StorageClosed):
            waiting[0].result(AT_ONCE_S)

    assert in_turn(admin, key, timeout_s=AT_ONCE_S).version is None
    eventually(lambda: nothing_is_left(admin), "no turn is left")
