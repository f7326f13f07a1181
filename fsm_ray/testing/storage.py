"""What every way to a bot's conversations promises: the contract of Storage and AsyncStorage."""

from __future__ import annotations

import asyncio
import datetime
import itertools
import math
import threading
import time
import uuid
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from decimal import Decimal
from types import TracebackType
from typing import Any
from uuid import UUID

import pytest

from fsm_ray.errors import (
    AcrossShards,
    FrameTooLarge,
    FsmRayError,
    InvalidBotName,
    InvalidData,
    InvalidInput,
    InvalidKey,
    InvalidOptions,
    InvalidPatch,
    InvalidState,
    OptionsConflict,
    PickleNotAllowed,
    RecordTooLarge,
    StorageClosed,
    UnknownBot,
    VersionConflict,
)
from fsm_ray.options import BotOptions
from fsm_ray.protocol import MAX_OPERATIONS
from fsm_ray.routing.route import Route
from fsm_ray.state import State
from fsm_ray.storage import AsyncStorage, Storage


class Blocking:
    """An AsyncStorage with the methods of a Storage: each coroutine runs on a loop in a thread.

    So one suite, written in blocking style, holds both facades to the same contract.
    """

    def __init__(self, storage: AsyncStorage) -> None:
        self._storage = storage
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="storage loop", daemon=True)
        self._thread.start()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method: Callable[..., Any] = getattr(self._storage, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            made = method(*args, **kwargs)
            if asyncio.iscoroutine(made):
                return self.run(made)
            return BlockingContext(self, made) if hasattr(made, "__aenter__") else made

        return call

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """The coroutine's result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def stop(self) -> None:
        """Close the storage and end the loop."""
        self.run(self._storage.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class BlockingContext:
    """What is entered with `async with`, for `with`."""

    def __init__(self, blocking: Blocking, context: Any) -> None:
        self._blocking = blocking
        self._context = context

    def __enter__(self) -> Any:
        return self._blocking.run(self._context.__aenter__())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> Any:
        return self._blocking.run(self._context.__aexit__(kind, error, traceback))


AnyStorage = Storage | Blocking

_DEADLINE_S = 30.0

_RICH = State(
    flow="f",
    state="s",
    data={"int": 2**100, "tuple": (1, [2]), "set": {1}, "at": datetime.date(2026, 2, 28), "none": None},
)


def other_key(storage: AnyStorage, bot: str, key: Any, *, is_near: bool) -> Any:
    """Another key, on the same shard; or not `is_near`: on another one, if the bot has several."""
    route = Route(bot, storage.describe(bot).options)
    is_near = is_near or route.options.shards == 1
    shard, _ = route.read(key)
    return next((key, n) for n in itertools.count() if (route.read((key, n))[0] == shard) == is_near)


class _Contract:
    """What tests of a storage and a bot are given."""

    @pytest.fixture
    def storage(self) -> AnyStorage:
        """The storage under test."""
        raise NotImplementedError

    @pytest.fixture
    def bot(self) -> str:
        """The name of an initialised bot, with default options but for `shards`; tests share it."""
        raise NotImplementedError


class StorageContract(_Contract):
    """What every way to a bot's conversations promises.

    The first part is what the tests of ExGram FSM v0.1.0's ETS storage assert, one to one; the rest is what
    they leave out.
    """

    @pytest.fixture
    def key(self) -> tuple[str, int]:
        """A key that no other test uses."""
        return uuid.uuid4().hex, 42

    # ExGram FSM: init

    def test_init_makes_the_bot(self, storage: AnyStorage, bot: str) -> None:
        storage.init(bot, storage.describe(bot).options)

        assert storage.describe(bot).bot_name == bot

    def test_init_is_idempotent(self, storage: AnyStorage, bot: str, key: Any) -> None:
        options = storage.describe(bot).options
        storage.set_state(bot, key, State(state="kept"))

        for _ in range(3):
            storage.init(bot, options)

        assert storage.get_state(bot, key) == State(state="kept")

    # ExGram FSM: get_state and set_state

    def test_get_state_of_an_unknown_key_is_none(self, storage: AnyStorage, bot: str, key: Any) -> None:
        assert storage.get_state(bot, key) is None

    def test_get_state_returns_what_set_state_stored(self, storage: AnyStorage, bot: str, key: Any) -> None:
        state = State(flow="registration", state="get_name", data={"attempts": 2})

        storage.set_state(bot, key, state)

        assert storage.get_state(bot, key) == state

    def test_a_round_trip_keeps_every_part_of_a_state(self, storage: AnyStorage, bot: str, key: Any) -> None:
        for state in (
            State(),
            State(flow="only_flow"),
            State(state="only_state"),
            State(data={"only": "data"}),
            State(flow="all", state="three", data={"of": "them"}),
        ):
            storage.set_state(bot, key, state)

            assert storage.get_state(bot, key) == state

    def test_set_state_returns_the_version_it_made(self, storage: AnyStorage, bot: str, key: Any) -> None:
        version = storage.set_state(bot, key, State(state="a"))

        stored = storage.get_state(bot, key)
        assert stored is not None
        assert stored.version == version

    def test_set_state_overwrites_flow_state_and_data(self, storage: AnyStorage, bot: str, key: Any) -> None:
        storage.set_state(bot, key, State(flow="old", state="old", data={"old": 1}))

        storage.set_state(bot, key, State(flow="new", data={"new": 2}))

        assert storage.get_state(bot, key) == State(flow="new", data={"new": 2})

    # ExGram FSM: get_data and set_data

    def test_get_data_of_an_unknown_key_is_none(self, storage: AnyStorage, bot: str, key: Any) -> None:
        assert storage.get_data(bot, key) is None

    def test_get_data_returns_the_data(self, storage: AnyStorage, bot: str, key: Any) -> None:
        storage.set_state(bot, key, State(state="a", data={"name": "Alice"}))

        assert storage.get_data(bot, key) == {"name": "Alice"}

    def test_get_data_of_a_record_without_data_is_empty(
        self, storage: AnyStorage, bot: str, key: Any
    ) -> None:
        storage.set_state(bot, key, State(state="a"))

        assert storage.get_data(bot, key) == {}

    def test_set_data_replaces_data_and_keeps_flow_and_state(
        self, storage: AnyStorage, bot: str, key: Any
    ) -> None:
        storage.set_state(bot, key, State(flow="f", state="s", data={"old": 1}))

        storage.set_data(bot, key, {"new": 2})

        assert storage.get_state(bot, key) == State(flow="f", state="s", data={"new": 2})

    def test_set_data_without_a_record_makes_one_with_state_none(
        self, storage: AnyStorage, bot: str, key: Any
    ) -> None:
        storage.set_data(bot, key, {"name": "Alice"})

        assert storage.get_state(bot, key) == State(data={"name": "Alice"})

    # enter_state: set_data's counterpart

    def test_enter_state_sets_flow_and_state_and_keeps_the_data(
        self, storage: AnyStorage, bot: str, key: Any
    ) -> None:
        old = storage.set_state(bot, key, State(flow="f", state="s", data={"kept": (1, 2)}))

        new = storage.enter_state(bot, key, "t", flow="g", expected_version=old)

        stored = storage.get_state(bot, key)
        assert stored == State(flow="g", state="t", data={"kept": (1, 2)})
        assert stored.version == new > old
        storage.enter_state(bot, key, None)
        assert storage.get_state(bot, key) == State(data={"kept": (1, 2)})

    def test_enter_state_without_a_record_makes_one_with_empty_data(
        self, storage: AnyStorage, bot: str, key: Any
    ) -> None:
        storage.enter_state(bot, key, "s")

        assert storage.get_state(bot, key) == State(state="s")

    # ExGram FSM: update_data

    def test_update_data_merges_into_the_data(self, storage: AnyStorage, bot: str, key: Any) -> None:
        storage.set_state(bot, key, State(flow="f", state="s", data={"kept": 1, "changed": 1}))

        storage.update_data(bot, key, {"changed": 2, "added": 3})

        assert storage.get_state(bot, key) == State(
            flow="f", state="s", data={"kept": 1, "changed": 2, "added": 3}
        )

    def test_update_data_returns_the_merged_data(self, storage: AnyStorage, bot: str, key: Any) -> None:
        storage.set_data(bot, key, {"kept": 1})

        assert storage.update_data(bot, key, {"added": 2}) == {"kept": 1, "added": 2}

    def test_update_data_without_a_record_makes_one_with_state_none(
        self, storage: AnyStorage, bot: str, key: Any
    ) -> None:
        storage.update_data(bot, key, {"name": "Alice"})

        assert storage.get_state(bot, key) == State(data={"name": "Alice"})

    def test_update_data_is_shallow(self, storage: AnyStorage, bot: str, key: Any) -> None:
        storage.set_data(bot, key, {"address": {"city": "Kyiv", "zip": "01001"}})

        storage.update_data(bot, key, {"address": {"city": "Lviv"}})

        assert storage.get_data(bot, key) == {"address": {"city": "Lviv"}}

    def test_update_data_with_nothing_changes_no_data(self, storage: AnyStorage, bot: str, key: Any) -> None:
        storage.set_data(bot, key, {"kept": 1})

        assert storage.update_data(bot, key, {}) == {"kept": 1}

    # ExGram FSM: clear

    def test_clear_removes_the_record(self, storage: AnyStorage, bot: str, key: Any) -> None:
        storage.set_state(bot, key, State(state="a"))

        assert storage.clear(bot, key) is True
        assert storage.get_state(bot, key) is None
        assert storage.get_data(bot, key) is None

    def test_clear_without_a_record_is_false_and_no_error(
        self, storage: AnyStorage, bot: str, key: Any
    ) -> None:
        assert storage.clear(bot, key) is False

    def test_clear_leaves_other_keys_alone(self, storage: AnyStorage, bot: str, key: Any) -> None:
        storage.set_state(bot, key, State(state="a"))
        storage.set_state(bot, (1, 1), State(state="b"))

        storage.clear(bot, key)

        assert storage.get_state(bot, (1, 1)) == State(state="b")

    # Versions

    def test_every_write_makes_a_greater_version(self, storage: AnyStorage, bot: str, key: Any) -> None:
        def version() -> int:
            state = storage.get_state(bot, key)
            assert state is not None
            assert state.version is not None
            return state.version

        storage.set_state(bot, key, State(state="a"))
        versions = [version()]
        storage.set_data(bot, key, {"n": 1})
        versions.append(version())
        storage.update_data(bot, key, {"n": 2})
        versions.append(version())
        storage.clear(bot, key)
        storage.set_state(bot, key, State(state="a"))
        versions.append(version())

        assert versions == sorted(set(versions))

    def test_a_write_that_expects_the_stored_version_succeeds(
        self, storage: AnyStorage, bot: str, key: Any
    ) -> None:
        first = storage.set_state(bot, key, State(state="a"))
        second = storage.set_state(bot, key, State(state="b"), expected_version=first)
        third = storage.set_data(bot, key, {"n": 1}, expected_version=second)
        storage.update_data(bot, key, {"n": 2}, expected_version=third)
        stored = storage.get_state(bot, key)
        assert stored is not None

        assert storage.clear(bot, key, expected_version=stored.version) is True

    def test_a_write_that_expects_another_version_changes_nothing(
        self, storage: AnyStorage, bot: str, key: Any
    ) -> None:
        old = storage.set_state(bot, key, State(state="a"))
        new = storage.set_state(bot, key, State(state="b"))

        for write in (
            lambda: storage.set_state(bot, key, State(state="c"), expected_version=old),
            lambda: storage.set_data(bot, key, {"n": 1}, expected_version=old),
            lambda: storage.enter_state(bot, key, "c", expected_version=old),
            lambda: storage.update_data(bot, key, {"n": 1}, expected_version=old),
            lambda: storage.clear(bot, key, expected_version=old),
        ):
            with pytest.raises(VersionConflict) as caught:
                write()

            assert (caught.value.expected_version, caught.value.actual_version) == (old, new)
            assert (caught.value.bot, caught.value.key) == (bot, key)
        assert storage.get_state(bot, key) == State(state="b")

    def test_expected_version_zero_means_that_there_is_no_record(
        self, storage: AnyStorage, bot: str, key: Any
    ) -> None:
        storage.set_state(bot, key, State(state="first"), expected_version=0)

        with pytest.raises(VersionConflict):
            storage.set_state(bot, key, State(state="second"), expected_version=0)
        assert storage.get_state(bot, key) == State(state="first")

    # Time to live

    def test_a_record_is_gone_when_its_time_to_live_is_over(
        self, storage: AnyStorage, bot: str, key: Any
    ) -> None:
        ttl_s = 0.05
        keys = [(key, number) for number in range(5)]
        storage.set_state(bot, keys[0], State(state="a"), ttl_s=ttl_s)
        storage.set_data(bot, keys[1], {"n": 1}, ttl_s=ttl_s)
        storage.update_data(bot, keys[2], {"n": 1}, ttl_s=ttl_s)
        storage.patch(bot, keys[3], increment={"n": 1}, ttl_s=ttl_s)
        with storage.transaction(bot) as transaction:
            transaction.set_data(keys[4], {"n": 1}, ttl_s=ttl_s)

        end = time.monotonic() + _DEADLINE_S
        while storage.get_many(bot, keys) != [None] * 5:
            assert time.monotonic() < end
        assert [storage.clear(bot, each) for each in keys] == [False] * 5

    def test_a_state_tells_when_it_expires(self, storage: AnyStorage, bot: str, key: Any) -> None:
        margin = datetime.timedelta(minutes=1)
        expected = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)
        storage.set_state(bot, key, State(state="a"), ttl_s=3600)
        storage.update_data(bot, key, {"n": 1})

        stored = storage.get_state(bot, key)
        assert stored is not None
        assert stored.expires_at is not None
        assert stored.expires_at.tzinfo is datetime.UTC
        assert abs(stored.expires_at - expected) < margin

    @pytest.mark.parametrize("ttl_s", [None, math.inf])
    def test_a_write_of_a_whole_state_forgets_the_time_to_live(
        self, storage: AnyStorage, bot: str, key: Any, ttl_s: float | None
    ) -> None:
        storage.set_state(bot, key, State(state="a"), ttl_s=3600)
        expiring = storage.get_state(bot, key)
        assert expiring is not None

        storage.set_state(bot, key, expiring, ttl_s=ttl_s)

        stored = storage.get_state(bot, key)
        assert stored is not None
        assert stored.expires_at is None

    @pytest.mark.parametrize("ttl_s", [0, -1, math.nan, -math.inf, 2e10, True, "60", Decimal(60)])
    def test_what_is_no_time_to_live_is_refused(
        self, storage: AnyStorage, bot: str, key: Any, ttl_s: Any
    ) -> None:
        for write in (
            lambda: storage.set_state(bot, key, State(), ttl_s=ttl_s),
            lambda: storage.set_data(bot, key, {}, ttl_s=ttl_s),
            lambda: storage.enter_state(bot, key, "a", ttl_s=ttl_s),
            lambda: storage.update_data(bot, key, {}, ttl_s=ttl_s),
            lambda: storage.patch(bot, key, ttl_s=ttl_s),
        ):
            with pytest.raises(InvalidInput, match="seconds"):
                write()
        assert storage.get_state(bot, key) is None

    # Patches

    def test_a_patch_changes_several_fields_and_returns_the_data(
        self, storage: AnyStorage, bot: str, key: Any
    ) -> None:
        data = {"kept": (1, 2), "gone": 1, "changed": 1, "count": 2**100, "share": 0.5, "log": [{"at": 1}]}
        storage.set_state(bot, key, State(flow="f", state="s", data=data))

        patched = storage.patch(
            bot,
            key,
            set={"changed": {1, 2}, "new": None},
            unset=["gone", "missing"],
            increment={"count": 1, "share": 1},
            append={"log": UUID(int=7)},
        )

        expected = {
            "kept": (1, 2),
            "changed": {1, 2},
            "count": 2**100 + 1,
            "share": 1.5,
            "log": [{"at": 1}, UUID(int=7)],
            "new": None,
        }
        assert patched == expected
        assert storage.get_state(bot, key) == State(flow="f", state="s", data=expected)

    def test_a_patch_without_a_record_counts_from_zero_and_appends_to_an_empty_list(
        self, storage: AnyStorage, bot: str, key: Any
    ) -> None:
        patched = storage.patch(
            bot, key, unset=("x",), increment={"n": -(2**70), "m": 0.5}, append={"log": ["a"]}
        )

        assert patched == {"n": -(2**70), "m": 0.5, "log": [["a"]]}
        assert storage.get_state(bot, key) == State(data=patched)

    def test_a_patch_of_nothing_changes_no_data(self, storage: AnyStorage, bot: str, key: Any) -> None:
        storage.set_data(bot, key, {"kept": 1})

        assert storage.patch(bot, key) == {"kept": 1}

    @pytest.mark.parametrize(
        ("field", "change"),
        [
            ("text", {"increment": {"text": 1}}),
            ("bool", {"increment": {"bool": 1}}),
            ("text", {"append": {"text": 1}}),
            ("tuple", {"append": {"tuple": 1}}),
        ],
    )
    def test_a_patch_that_does_not_fit_the_data_changes_nothing(
        self, storage: AnyStorage, bot: str, key: Any, field: str, change: Any
    ) -> None:
        data = {"text": "x", "bool": True, "tuple": ()}
        storage.set_data(bot, key, data)

        with pytest.raises(InvalidPatch, match=field) as caught:
            storage.patch(bot, key, set={"new": 1}, **change)

        assert (caught.value.field, caught.value.key) == (field, key)
        assert storage.get_data(bot, key) == data

    def test_a_patch_that_expects_another_version_changes_nothing(
        self, storage: AnyStorage, bot: str, key: Any
    ) -> None:
        version = storage.set_data(bot, key, {"n": 1})
        storage.patch(bot, key, increment={"n": 1}, expected_version=version)

        with pytest.raises(VersionConflict):
            storage.patch(bot, key, increment={"n": 1}, expected_version=version)
        assert storage.get_data(bot, key) == {"n": 2}

    @pytest.mark.parametrize(
        "patch",
        [
            {"set": {"a": 1}, "unset": ["a"]},
            {"increment": {"a": True}},
            {"unset": "name"},
            {"append": {"a": threading.Lock()}},
        ],
    )
    def test_what_is_no_patch_is_refused(self, storage: AnyStorage, bot: str, key: Any, patch: Any) -> None:
        with pytest.raises(InvalidData):
            storage.patch(bot, key, **patch)
        assert storage.get_state(bot, key) is None

    def test_concurrent_increments_all_count(self, storage: AnyStorage, bot: str, key: Any) -> None:
        def patch(worker: int) -> None:
            for _ in range(20):
                storage.patch(bot, key, increment={"n": 1}, append={"log": worker})

        with ThreadPoolExecutor(32) as pool:
            list(pool.map(patch, range(32)))

        data = storage.get_data(bot, key)
        assert data is not None
        assert data["n"] == 640
        assert sorted(data["log"]) == sorted(list(range(32)) * 20)

    # Transactions

    def test_a_transaction_makes_all_its_writes_in_order(
        self, storage: AnyStorage, bot: str, key: Any
    ) -> None:
        other = other_key(storage, bot, key, is_near=True)
        version = storage.set_state(bot, key, State(flow="f", state="s", data={"gone": 1}))

        with storage.transaction(bot) as transaction:
            transaction.set_data(key, {"n": 1}, expected_version=version)
            transaction.update_data(key, {"m": 2})
            transaction.enter_state(key, "t", flow="f")
            transaction.set_state(other, State(state="new"), expected_version=0)
            transaction.clear(other)
            transaction.set_state(other, State(state="newer"))
            transaction.patch(other, increment={"n": 5}, ttl_s=3600)
            assert storage.get_state(bot, other) is None

        first, second = storage.get_many(bot, [key, other])
        assert first == State(flow="f", state="t", data={"n": 1, "m": 2})
        assert second is not None
        assert second == State(state="newer", data={"n": 5})
        assert second.expires_at is not None
        assert transaction.version == second.version

    @pytest.mark.parametrize(
        ("error", "last_write"),
        [
            (VersionConflict, lambda t, key: t.clear(key, expected_version=1 << 60)),
            (InvalidPatch, lambda t, key: t.patch(key, increment={"text": 1})),
            (RecordTooLarge, lambda t, key: t.update_data(key, {"b": "x" * ((1 << 20) - 50)})),
        ],
    )
    def test_a_transaction_of_which_one_write_fails_changes_nothing(
        self,
        storage: AnyStorage,
        bot: str,
        key: Any,
        error: type[FsmRayError],
        last_write: Callable[[Any, Any], None],
    ) -> None:
        other = other_key(storage, bot, key, is_near=True)
        states = {key: State(state="kept"), other: State(state="kept", data={"text": "x"})}
        versions = storage.set_many(bot, states)
        context = storage.transaction(bot)

        def write() -> None:
            with context as transaction:
                transaction.clear(key)
                transaction.set_state(key, State(state="new"))
                transaction.update_data(other, {"text": "y"})
                last_write(transaction, other)

        with pytest.raises(error) as caught:
            write()
        assert (caught.value.bot, caught.value.key) == (bot, other)
        found = storage.get_many(bot, list(states))
        assert found == list(states.values())
        assert [state and state.version for state in found] == versions

    def test_an_exception_in_the_block_sends_nothing(self, storage: AnyStorage, bot: str, key: Any) -> None:
        context = storage.transaction(bot)

        def write() -> int:
            with context as transaction:
                transaction.set_state(key, State(state="a"))
                return 1 // 0

        with pytest.raises(ZeroDivisionError):
            write()
        assert storage.get_state(bot, key) is None

    def test_a_transaction_of_nothing_has_no_version(self, storage: AnyStorage, bot: str) -> None:
        with storage.transaction(bot) as transaction:
            pass

        assert transaction.version is None

    def test_what_is_refused_is_no_part_of_the_transaction(
        self, storage: AnyStorage, bot: str, key: Any
    ) -> None:
        no_state: Any = None
        with storage.transaction(bot) as transaction:
            refusals: list[tuple[type[InvalidInput], Callable[[], None]]] = [
                (InvalidState, lambda: transaction.set_state(key, no_state)),
                (InvalidData, lambda: transaction.set_data(key, {"a": threading.Lock()})),
                (InvalidKey, lambda: transaction.clear(object())),
                (InvalidInput, lambda: transaction.update_data(key, {}, expected_version=-1)),
                (InvalidInput, lambda: transaction.patch(key, ttl_s=0)),
            ]
            for error, write in refusals:
                with pytest.raises(error):
                    write()
            transaction.update_data(key, {"good": 1})

        assert storage.get_state(bot, key) == State(data={"good": 1})

    def test_keys_of_several_shards_are_refused_in_a_transaction(
        self, storage: AnyStorage, bot: str, key: Any
    ) -> None:
        other = other_key(storage, bot, key, is_near=False)
        refusals: list[AcrossShards] = []

        with storage.transaction(bot) as transaction:
            transaction.set_data(key, {"n": 1})
            try:
                transaction.set_data(other, {"n": 1})
            except AcrossShards as error:
                refusals.append(error)

        assert storage.get_data(bot, key) == {"n": 1}
        assert storage.get_data(bot, other) == (None if refusals else {"n": 1})
        assert bool(refusals) == (storage.describe(bot).options.shards > 1)
        for refusal in refusals:
            assert (refusal.bot, refusal.key, "shards=1" in str(refusal)) == (bot, other, True)
            assert len(set(refusal.shards or ())) == 2

    def test_a_transaction_is_used_once_and_in_its_block(
        self, storage: AnyStorage, bot: str, key: Any
    ) -> None:
        context = storage.transaction(bot)
        with context as transaction:
            transaction.set_data(key, {"n": 1})

        with pytest.raises(InvalidInput, match="block"):
            transaction.set_data(key, {"n": 2})
        with pytest.raises(InvalidInput, match="once"), context:
            pass
        assert storage.get_data(bot, key) == {"n": 1}

    def test_a_transaction_that_no_frame_can_hold_is_refused(
        self, storage: AnyStorage, bot: str, key: Any
    ) -> None:
        context = storage.transaction(bot)
        text = "x" * (1_000 << 10)

        def write() -> None:
            with context as transaction:
                for _ in range(33):
                    transaction.set_data(key, {"text": text})

        with pytest.raises(FrameTooLarge, match="several transactions") as caught:
            write()
        assert caught.value.bot == bot
        assert storage.get_state(bot, key) is None

    # Another key

    @pytest.mark.parametrize("is_near", [True, False])
    def test_a_copy_says_the_same_and_leaves_the_record_alone(
        self,
        storage: AnyStorage,
        bot: str,
        key: Any,
        is_near: bool,  # noqa: FBT001
    ) -> None:
        other = other_key(storage, bot, key, is_near=is_near)
        version = storage.set_state(bot, key, _RICH)

        assert storage.copy(bot, key, other) is True

        original, copied = storage.get_many(bot, [key, other])
        assert original is not None
        assert copied is not None
        assert original == copied == _RICH
        assert original.version == version
        assert copied.version != version or not is_near
        assert [type(value) for value in copied.data.values()] == list(map(type, _RICH.data.values()))

    @pytest.mark.parametrize("is_near", [True, False])
    def test_a_renamed_record_is_under_its_new_key_alone(
        self,
        storage: AnyStorage,
        bot: str,
        key: Any,
        is_near: bool,  # noqa: FBT001
    ) -> None:
        other = other_key(storage, bot, key, is_near=is_near)
        storage.set_state(bot, key, _RICH)

        assert storage.rename(bot, key, other) is True

        assert storage.get_many(bot, [key, other]) == [None, _RICH]

    @pytest.mark.parametrize("name", ["copy", "rename"])
    @pytest.mark.parametrize("is_near", [True, False])
    def test_a_record_under_the_new_key_is_replaced_on_demand_alone(
        self,
        storage: AnyStorage,
        bot: str,
        key: Any,
        is_near: bool,  # noqa: FBT001
        name: str,
    ) -> None:
        other = other_key(storage, bot, key, is_near=is_near)
        states = {key: State(state="new"), other: State(state="old")}
        _, version = storage.set_many(bot, states)

        with pytest.raises(VersionConflict, match="overwrite=True") as caught:
            getattr(storage, name)(bot, key, other)
        assert (caught.value.bot, caught.value.key, caught.value.actual_version) == (bot, other, version)
        assert storage.get_many(bot, list(states)) == list(states.values())

        assert getattr(storage, name)(bot, key, other, overwrite=True) is True
        assert storage.get_state(bot, other) == State(state="new")

    @pytest.mark.parametrize("name", ["copy", "rename"])
    def test_where_there_is_no_record_none_gets_another_key(
        self, storage: AnyStorage, bot: str, key: Any, name: str
    ) -> None:
        for is_near in (True, False):
            other = other_key(storage, bot, key, is_near=is_near)
            storage.set_state(bot, other, State(state="kept"))

            assert getattr(storage, name)(bot, key, other, overwrite=True) is False
            assert storage.get_state(bot, other) == State(state="kept")

    @pytest.mark.parametrize("name", ["copy", "rename"])
    def test_the_new_key_must_be_another(self, storage: AnyStorage, bot: str, key: Any, name: str) -> None:
        storage.set_state(bot, key, State(state="kept"))

        with pytest.raises(InvalidInput, match="another") as caught:
            getattr(storage, name)(bot, key, tuple(key), overwrite=True)

        assert (caught.value.bot, caught.value.key) == (bot, key)
        assert storage.get_state(bot, key) == State(state="kept")

    @pytest.mark.parametrize("is_near", [True, False])
    @pytest.mark.parametrize("name", ["copy", "rename"])
    def test_a_time_to_live_that_a_write_gave_goes_along(
        self,
        storage: AnyStorage,
        bot: str,
        key: Any,
        is_near: bool,  # noqa: FBT001
        name: str,
    ) -> None:
        other = other_key(storage, bot, key, is_near=is_near)
        storage.set_state(bot, key, State(state="a"), ttl_s=3600)
        before = storage.get_state(bot, key)

        getattr(storage, name)(bot, key, other)

        after = storage.get_state(bot, other)
        assert before is not None
        assert after is not None
        assert before.expires_at is not None
        assert after.expires_at is not None
        assert after.expires_at - before.expires_at < datetime.timedelta(minutes=1)

    @pytest.mark.parametrize("is_near", [True, False])
    def test_no_write_is_lost_while_a_record_is_renamed(
        self,
        storage: AnyStorage,
        bot: str,
        key: Any,
        is_near: bool,  # noqa: FBT001
    ) -> None:
        other = other_key(storage, bot, key, is_near=is_near)
        storage.patch(bot, key, increment={"n": 1})
        has_begun = threading.Barrier(5)

        def patch(_: int) -> None:
            has_begun.wait(_DEADLINE_S)
            for _ in range(20):
                storage.patch(bot, key, increment={"n": 1})

        with ThreadPoolExecutor(4) as pool:
            done = pool.map(patch, range(4))
            has_begun.wait(_DEADLINE_S)
            assert storage.rename(bot, key, other) is True
            list(done)

        counts = [
            (data or {}).get("n", 0) for data in (storage.get_data(bot, key), storage.get_data(bot, other))
        ]
        assert sum(counts) == 81
        assert counts[1] >= 1

    # Many at once

    def test_many_come_back_in_the_order_of_their_keys(self, storage: AnyStorage, bot: str, key: Any) -> None:
        count = MAX_OPERATIONS + 10
        states = {
            (key, number): State(flow="f", state=str(number), data={"n": number}) for number in range(count)
        }
        versions = storage.set_many(bot, states)
        asked = [(key, number) for number in reversed(range(count + 1))]

        found = storage.get_many(bot, asked)

        assert found == [None, *reversed(states.values())]
        assert [state and state.version for state in found] == [None, *reversed(versions)]

    def test_many_may_be_none(self, storage: AnyStorage, bot: str) -> None:
        assert storage.get_many(bot, []) == []
        assert storage.set_many(bot, {}) == []

    def test_a_key_may_be_asked_for_twice(self, storage: AnyStorage, bot: str, key: Any) -> None:
        storage.set_many(bot, {key: State(state="kept")})

        assert storage.get_many(bot, iter([key, key])) == [State(state="kept")] * 2

    @pytest.mark.parametrize(
        ("bad", "error"),
        [
            ({"bad": {"state": "no State"}}, InvalidState),
            ({"bad": State(data={"lock": threading.Lock()})}, InvalidData),
            ({(object(),): State()}, InvalidKey),
        ],
        ids=["state", "data", "key"],
    )
    def test_of_many_with_a_bad_one_none_is_stored(
        self, storage: AnyStorage, bot: str, key: Any, bad: Any, error: type[InvalidInput]
    ) -> None:
        with pytest.raises(error):
            storage.set_many(bot, {key: State(state="good"), **bad})

        assert storage.get_state(bot, key) is None

    def test_of_many_with_one_that_the_shard_refuses_the_others_are_stored(
        self, storage: AnyStorage, bot: str, key: Any
    ) -> None:
        too_large = State(state="x" * storage.describe(bot).options.max_record_bytes)
        good = State(state="good")
        with pytest.raises(RecordTooLarge) as raised:
            storage.set_many(bot, {(key, 1): good, (key, 2): too_large, (key, 3): good})

        assert raised.value.key == (key, 2)
        assert storage.get_many(bot, [(key, 1), (key, 2), (key, 3)]) == [good, None, good]

    # Keys and values

    def test_keys_that_differ_only_in_type_are_different_keys(self, storage: AnyStorage, bot: str) -> None:
        keys: list[Any] = [1, "1", True, 1.0, b"1", (1,), ("1",), None, ((1,),), UUID(int=1)]
        for number, key in enumerate(keys):
            storage.set_data(bot, key, {"number": number})

        assert [storage.get_data(bot, key) for key in keys] == [{"number": n} for n in range(len(keys))]

    def test_values_come_back_with_their_types(self, storage: AnyStorage, bot: str, key: Any) -> None:
        data = {
            "none": None,
            "bool": True,
            "int": 2**100,
            "float": -0.0,
            "bytes": b"\x00\xff",
            "tuple": (1, [2, (3,)]),
            "set": {1, 2},
            "dict": {1: "one", (2, 3): "pair"},
            "date": datetime.date(2026, 2, 28),
            "moment": datetime.datetime(2026, 2, 28, 12, tzinfo=datetime.UTC),
            "decimal": Decimal("1.10"),
            "uuid": UUID(int=7),
        }

        storage.set_data(bot, key, data)

        stored = storage.get_data(bot, key)
        assert stored == data
        assert {name: type(value) for name, value in stored.items()} == {
            name: type(value) for name, value in data.items()
        }

    def test_what_is_returned_is_not_what_is_stored(self, storage: AnyStorage, bot: str, key: Any) -> None:
        given = {"list": [1]}
        storage.set_data(bot, key, given)
        given["list"].append(2)
        returned = storage.get_data(bot, key)
        assert returned is not None
        returned["list"].append(3)

        assert storage.get_data(bot, key) == {"list": [1]}

    def test_reads_make_no_records(self, storage: AnyStorage, bot: str, key: Any) -> None:
        def records() -> int:
            return sum(shard.statistics.records for shard in storage.describe(bot).shards)

        before = records()
        for number in range(50):
            storage.get_state(bot, (key, number))
            storage.get_data(bot, (key, number))

        assert records() == before

    # Bad input: a typed error that says what to do, and nothing written

    @pytest.mark.parametrize("key", [[1], {"a": 1}, (1, [2]), object(), float("nan"), "\ud800"])
    def test_a_key_that_cannot_be_encoded_is_refused(self, storage: AnyStorage, bot: str, key: Any) -> None:
        for operation in (
            lambda: storage.get_state(bot, key),
            lambda: storage.set_state(bot, key, State()),
            lambda: storage.clear(bot, key),
        ):
            with pytest.raises(InvalidKey, match="key"):
                operation()

    @pytest.mark.parametrize("data", [None, 7, "text", [("a", 1)], {1: "a"}, {"a": threading.Lock()}])
    def test_data_that_cannot_be_stored_is_refused(
        self, storage: AnyStorage, bot: str, key: Any, data: Any
    ) -> None:
        for write in (storage.set_data, storage.update_data):
            with pytest.raises(InvalidData):
                write(bot, key, data)
        assert storage.get_state(bot, key) is None

    @pytest.mark.parametrize("state", [None, "get_name", {"state": "get_name"}])
    def test_a_state_that_is_no_state_is_refused(
        self, storage: AnyStorage, bot: str, key: Any, state: Any
    ) -> None:
        with pytest.raises(InvalidState, match="State"):
            storage.set_state(bot, key, state)
        assert storage.get_state(bot, key) is None

    @pytest.mark.parametrize("version", [-1, 1.0, "1", True, 1 << 63])
    def test_an_expected_version_that_is_none_is_refused(
        self, storage: AnyStorage, bot: str, key: Any, version: Any
    ) -> None:
        with pytest.raises(InvalidInput, match="expected_version"):
            storage.set_data(bot, key, {}, expected_version=version)
        assert storage.get_state(bot, key) is None

    def test_a_record_over_its_limit_is_refused_and_the_stored_one_kept(
        self, storage: AnyStorage, bot: str, key: Any
    ) -> None:
        half = "x" * (600 << 10)
        storage.set_data(bot, key, {"a": half})

        with pytest.raises(RecordTooLarge, match="max_record_bytes"):
            storage.update_data(bot, key, {"b": half})
        with pytest.raises(RecordTooLarge, match="max_record_bytes"):
            storage.set_data(bot, key, {"a": half + half})
        assert storage.get_data(bot, key) == {"a": half}

    def test_an_operation_on_an_unknown_bot_names_init(self, storage: AnyStorage, key: Any) -> None:
        for operation in (
            lambda: storage.get_state("nobody", key),
            lambda: storage.update_data("nobody", key, {}),
            lambda: storage.describe("nobody"),
            lambda: storage.drop("nobody"),
        ):
            with pytest.raises(UnknownBot, match="init") as caught:
                operation()
            assert caught.value.bot == "nobody"

    @pytest.mark.parametrize("name", ["", "a b", "a/b", "ü", "a" * 65, "a\n", None, 7])
    def test_a_bot_name_with_odd_characters_is_refused(
        self, storage: AnyStorage, key: Any, name: Any
    ) -> None:
        for operation in (
            lambda: storage.init(name),
            lambda: storage.get_state(name, key),
            lambda: storage.set_data(name, key, {}),
        ):
            with pytest.raises(InvalidBotName, match="letters"):
                operation()

    def test_other_options_for_a_running_bot_are_refused(self, storage: AnyStorage, bot: str) -> None:
        options = storage.describe(bot).options

        with pytest.raises(OptionsConflict, match="max_record_bytes is 1048576, not 4096") as caught:
            storage.init(bot, options, max_record_bytes=4096)
        assert caught.value.differences == {"max_record_bytes": (1 << 20, 4096)}
        assert storage.describe(bot).options == options

    def test_options_that_are_not_valid_are_refused(self, storage: AnyStorage, bot: str) -> None:
        for changes in ({"shards": 0}, {"no_such": 1}, {"store": "paper://"}, {"max_record_bytes": "1"}):
            with pytest.raises(InvalidOptions, match=next(iter(changes))):
                storage.init(f"{bot}.bad", **changes)
        with pytest.raises(UnknownBot):
            storage.describe(f"{bot}.bad")

    # Concurrency

    def test_concurrent_updates_never_lose_each_others_fields(
        self, storage: AnyStorage, bot: str, key: Any
    ) -> None:
        def update(worker: int) -> None:
            for number in range(20):
                storage.update_data(bot, key, {f"{worker}-{number}": number})

        with ThreadPoolExecutor(32) as pool:
            list(pool.map(update, range(32)))

        data = storage.get_data(bot, key)
        assert data is not None
        assert len(data) == 640

    def test_of_concurrent_compare_and_sets_one_wins(self, storage: AnyStorage, bot: str, key: Any) -> None:
        version = storage.set_state(bot, key, State(state="start"))

        def attempt(worker: int) -> int | None:
            try:
                storage.set_state(bot, key, State(state=str(worker)), expected_version=version)
            except VersionConflict:
                return None
            return worker

        with ThreadPoolExecutor(16) as pool:
            winners = [worker for worker in pool.map(attempt, range(16)) if worker is not None]

        assert len(winners) == 1
        assert storage.get_state(bot, key) == State(state=str(winners[0]))

    def test_a_worker_reads_its_own_writes(self, storage: AnyStorage, bot: str, key: Any) -> None:
        def write_and_read(worker: int) -> bool:
            for number in range(50):
                storage.set_data(bot, (key, worker), {"number": number})
                if storage.get_data(bot, (key, worker)) != {"number": number}:
                    return False
            return True

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(write_and_read, range(8)))


class BotsContract(_Contract):
    """What `init`, `bots` and `drop` promise: by Ray calls, whatever the transport of operations."""

    @pytest.fixture
    def other(self, storage: AnyStorage, bot: str) -> Iterator[str]:
        """The name of a bot that a test makes."""
        name = f"{bot}.other"
        yield name
        with suppress(UnknownBot):
            storage.drop(name)

    def test_bots_have_records_of_their_own(self, storage: AnyStorage, bot: str, other: str) -> None:
        storage.init(other)

        storage.set_state(bot, "of a bot", State(state="here"))

        assert storage.get_state(other, "of a bot") is None

    def test_a_bot_is_listed_from_init_to_drop(self, storage: AnyStorage, bot: str, other: str) -> None:
        before = storage.bots()
        storage.init(other, shards=2)
        between = storage.bots()
        storage.drop(other)

        assert (other in before, between.count(other), other in storage.bots()) == (False, 1, False)
        assert bot in between
        assert between == sorted(between)

    def test_a_dropped_bot_is_unknown_and_can_be_made_again_as_one_that_refuses_pickle(
        self, storage: AnyStorage, other: str
    ) -> None:
        storage.init(other)
        storage.set_data(other, 1, {"complex": 1j})
        storage.drop(other)
        with pytest.raises(UnknownBot):
            storage.get_state(other, 1)

        storage.init(other, BotOptions(allow_pickle=False))

        assert storage.get_state(other, 1) is None
        storage.set_data(other, 1, {"plain": (1, "two")})
        with pytest.raises(PickleNotAllowed, match="allow_pickle"):
            storage.update_data(other, 1, {"complex": 1j})
        assert storage.get_data(other, 1) == {"plain": (1, "two")}


class ClosedStorageContract:
    """What a closed storage does."""

    @pytest.fixture
    def storage(self) -> AnyStorage:
        """A storage that was closed."""
        raise NotImplementedError

    def test_every_operation_of_a_closed_storage_is_refused(self, storage: AnyStorage) -> None:
        for operation in (
            lambda: storage.init("bot"),
            lambda: storage.get_state("bot", 1),
            lambda: storage.set_state("bot", 1, State()),
            lambda: storage.get_data("bot", 1),
            lambda: storage.set_data("bot", 1, {}),
            lambda: storage.update_data("bot", 1, {}),
            lambda: storage.clear("bot", 1),
            lambda: storage.get_many("bot", [1]),
            lambda: storage.set_many("bot", {1: State()}),
            lambda: storage.patch("bot", 1),
            lambda: storage.transaction("bot").__enter__(),
            lambda: storage.copy("bot", 1, 2),
            lambda: storage.rename("bot", 1, 2),
            storage.bots,
            lambda: storage.describe("bot"),
            lambda: storage.drop("bot"),
        ):
            with pytest.raises(StorageClosed, match="new one"):
                operation()
