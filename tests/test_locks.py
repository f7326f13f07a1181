"""Locks over a real Ray: a conversation to oneself, and its record left to the storage's own writes."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from fsm_ray import State, Storage
from fsm_ray.errors import InvalidInput, InvalidKey, TurnTimeout, UnknownBot
from fsm_ray.protocol import TURN
from fsm_ray.testing import AnyStorage
from tests.conftest import DEADLINE_S
from tests.test_turns import (  # noqa: F401  # fixtures
    AT_ONCE_S,
    BOT,
    admin,
    frames,
    increment,
    key,
    kind,
    made,
    nothing_is_left,
    pool,
    storage,
    until_waiting,
)

pytestmark = pytest.mark.ray
# ruff: noqa: F811  # a fixture's name is an argument's


def test_writes_in_a_lock_are_stored_and_it_commits_nothing(
    storage: AnyStorage, admin: Storage, key: Hashable, frames: list[bytes]
) -> None:
    with storage.lock(BOT, key):
        version = storage.set_state(BOT, key, State(state="inside"))
        frames.clear()
    again: Any = storage.lock(BOT, key)
    with again:
        pass
    kinds = {frame[5] for frame in frames}

    record = admin.get_state(BOT, key)
    assert record is not None
    assert (record, record.version) == (State(state="inside"), version)
    assert kinds == {TURN}
    with pytest.raises(InvalidInput, match="entered once"):
        again.__enter__()


def test_locks_and_turns_wait_for_each_other_in_the_order_they_came(
    storage: AnyStorage, admin: Storage, key: Hashable, pool: ThreadPoolExecutor
) -> None:
    def append(number: int) -> None:
        with storage.lock(BOT, key, timeout_s=math.inf):
            numbers = (storage.get_data(BOT, key) or {}).get("order", [])
            storage.set_data(BOT, key, {"order": [*numbers, number]})

    def append_in_turn(number: int) -> None:
        with storage.turn(BOT, key, timeout_s=math.inf) as turn:
            turn.data["order"] = [*turn.data.get("order", []), number]

    with storage.lock(BOT, key):
        workers = []
        for number in range(6):
            workers.append(pool.submit(append_in_turn if number % 2 else append, number))
            until_waiting(admin, number + 1)
    for worker in workers:
        worker.result(DEADLINE_S)

    assert storage.get_data(BOT, key) == {"order": list(range(6))}
    assert nothing_is_left(admin)


def test_an_exception_frees_the_conversation_and_what_was_written_stays(
    storage: AnyStorage, key: Hashable
) -> None:
    def fail() -> None:
        with storage.lock(BOT, key):
            storage.set_data(BOT, key, {"n": 1})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with storage.lock(BOT, key, timeout_s=AT_ONCE_S):
        assert storage.get_data(BOT, key) == {"n": 1}


def test_entering_fails_as_that_of_a_turn_does(storage: AnyStorage, key: Hashable) -> None:
    with pytest.raises(UnknownBot, match="init"), storage.lock("nobody", key):
        pass
    with pytest.raises(InvalidKey):
        storage.lock(BOT, (object(),))
    with pytest.raises(InvalidInput, match="timeout_s"):
        storage.lock(BOT, key, timeout_s=0)
    with storage.lock(BOT, key), pytest.raises(TurnTimeout), storage.lock(BOT, key, timeout_s=0.1):
        pass


def test_a_lock_that_the_actor_s_restart_took_away_is_left_in_peace(
    storage: AnyStorage, admin: Storage, bot_name: str
) -> None:
    admin.init(bot_name)
    with storage.lock(bot_name, "key"):
        os.kill(admin.describe(bot_name).shards[0].pid, signal.SIGKILL)
        increment(admin, "key", bot_name)

    assert storage.get_data(bot_name, "key") == {"n": 1}
