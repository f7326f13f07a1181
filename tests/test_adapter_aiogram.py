"""The aiogram adapter keeps aiogram's contracts, and what these do not promise: nothing is lost."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import pytest
import ray
from aiogram import Bot, Dispatcher, F, Router
from aiogram.exceptions import DataNotDictLikeError
from aiogram.filters import Command
from aiogram.fsm.context import FSMContext
from aiogram.fsm.scene import Scene, SceneRegistry, ScenesManager, on
from aiogram.fsm.state import State as StateOfGroup
from aiogram.fsm.state import StatesGroup
from aiogram.fsm.storage.base import BaseEventIsolation, BaseStorage, StorageKey
from aiogram.fsm.strategy import FSMStrategy
from aiogram.types import ErrorEvent, Message, Update

from fsm_ray import AsyncStorage, BotOptions, State, Storage, Turn
from fsm_ray.adapters.aiogram import RayEventIsolation, RayFSMMiddleware, RayStorage, record_key
from fsm_ray.errors import (
    ConfigurationError,
    InvalidOptions,
    NamespaceUnavailable,
    OptionsConflict,
    StorageClosed,
    TurnTimeout,
    UnknownBot,
    VersionConflict,
)
from fsm_ray.protocol import TURN, WRITE
from tests.conftest import DEADLINE_S, Bots
from tests.test_turns import AT_ONCE_S, frames, start  # noqa: F401

T = TypeVar("T")

KEY = StorageKey(bot_id=1, chat_id=-42, user_id=42)
RECORD_KEY = record_key(KEY)


class Order(StatesGroup):
    size = StateOfGroup()
    address = StateOfGroup()


class RacedStorage(AsyncStorage):
    """Lets a rival write after the next read, before whoever read can write."""

    rival: Callable[[], Awaitable[Any]] | None = None
    on_read: Callable[[Hashable], None] = staticmethod(lambda _: None)

    async def get_state(self, bot_name: str, key: Hashable) -> State | None:
        self.on_read(key)
        record = await super().get_state(bot_name, key)
        rival, self.rival = self.rival, None
        if rival is not None:
            await rival()
        return record


@pytest.fixture
def bot_name(bots: Bots) -> str:
    return bots.emptied()


@pytest.fixture
async def storage(bot_name: str) -> AsyncIterator[RacedStorage]:
    async with RacedStorage() as storage:
        yield storage


@pytest.fixture
def ray_storage(storage: RacedStorage, bot_name: str) -> RayStorage:
    return RayStorage(bot_name, storage)


@pytest.mark.ray
class TestContract:
    async def test_a_missing_conversation_has_no_state_and_empty_data(self, ray_storage: RayStorage) -> None:
        assert await ray_storage.get_state(key=KEY) is None
        assert await ray_storage.get_data(key=KEY) == {}
        assert await ray_storage.get_value(storage_key=KEY, dict_key="foo") is None
        assert await ray_storage.get_value(storage_key=KEY, dict_key="foo", default="baz") == "baz"

    async def test_a_state_that_was_set_is_read_until_it_is_set_to_none(
        self, ray_storage: RayStorage
    ) -> None:
        await ray_storage.set_state(key=KEY, state="state")
        was = await ray_storage.get_state(key=KEY)
        await ray_storage.set_state(key=KEY, state=None)

        assert was == "state"
        assert await ray_storage.get_state(key=KEY) is None

    async def test_a_state_of_a_group_is_stored_by_its_full_name(self, ray_storage: RayStorage) -> None:
        await ray_storage.set_state(key=KEY, state=Order.size)

        assert await ray_storage.get_state(key=KEY) == "Order:size"

    async def test_data_that_was_set_is_read_until_it_is_replaced(self, ray_storage: RayStorage) -> None:
        await ray_storage.set_data(key=KEY, data={"foo": "bar"})
        was = await ray_storage.get_data(key=KEY)
        await ray_storage.set_data(key=KEY, data={"spam": "egg"})

        assert was == {"foo": "bar"}
        assert await ray_storage.get_data(key=KEY) == {"spam": "egg"}
        assert await ray_storage.get_value(storage_key=KEY, dict_key="spam", default="baz") == "egg"

    async def test_update_data_merges_and_returns_what_is_stored(self, ray_storage: RayStorage) -> None:
        answers = [
            await ray_storage.update_data(key=KEY, data=changes)
            for changes in ({}, {"foo": "bar"}, {}, {"baz": "spam"}, {"baz": "test"})
        ]

        assert answers == [
            {},
            {"foo": "bar"},
            {"foo": "bar"},
            {"foo": "bar", "baz": "spam"},
            {"foo": "bar", "baz": "test"},
        ]
        assert await ray_storage.get_data(key=KEY) == answers[-1]

    @pytest.mark.parametrize("data", [(), [("foo", "bar")], "foo", None, 1])
    async def test_data_that_is_no_mapping_is_refused(self, ray_storage: RayStorage, data: Any) -> None:
        for write in (ray_storage.set_data, ray_storage.update_data):
            with pytest.raises(DataNotDictLikeError, match=type(data).__name__):
                await write(key=KEY, data=data)

    async def test_state_and_data_do_not_affect_each_other(self, ray_storage: RayStorage) -> None:
        await ray_storage.set_data(key=KEY, data={"foo": "bar"})
        await ray_storage.set_state(key=KEY, state="state")
        both = await ray_storage.get_state(key=KEY), await ray_storage.get_data(key=KEY)
        await ray_storage.set_data(key=KEY, data={})
        without_data = await ray_storage.get_state(key=KEY), await ray_storage.get_data(key=KEY)
        await ray_storage.update_data(key=KEY, data={"spam": "egg"})
        await ray_storage.set_state(key=KEY, state=None)
        without_state = await ray_storage.get_state(key=KEY), await ray_storage.get_data(key=KEY)

        assert both == ("state", {"foo": "bar"})
        assert without_data == ("state", {})
        assert without_state == (None, {"spam": "egg"})

    async def test_conversations_that_differ_in_any_part_of_the_key_are_apart(
        self, ray_storage: RayStorage
    ) -> None:
        others: dict[str, Any] = {
            "bot_id": 2,
            "chat_id": -43,
            "user_id": 43,
            "thread_id": 5,
            "business_connection_id": "b",
            "destiny": "other",
        }
        keys = [KEY, *(dataclasses.replace(KEY, **{name: value}) for name, value in others.items())]
        for number, key in enumerate(keys):
            await ray_storage.set_state(key=key, state=f"state {number}")

        assert [await ray_storage.get_state(key=key) for key in keys] == [
            f"state {number}" for number in range(len(keys))
        ]
        assert others.keys() == {field.name for field in dataclasses.fields(StorageKey)}

    async def test_close_leaves_the_conversations(self, storage: AsyncStorage, bot_name: str) -> None:
        first = RayStorage(bot_name)
        await first.set_state(key=KEY, state="state")
        await first.close()

        with pytest.raises(StorageClosed):
            await first.get_state(key=KEY)
        assert await RayStorage(bot_name, storage).get_state(key=KEY) == "state"

    async def test_close_leaves_open_a_storage_that_was_given(
        self, ray_storage: RayStorage, storage: AsyncStorage, bot_name: str
    ) -> None:
        await ray_storage.close()

        assert await storage.get_state(bot_name, RECORD_KEY) is None


@pytest.mark.ray
class TestRecords:
    async def test_state_and_data_are_one_record_that_other_clients_read(
        self, ray_storage: RayStorage, storage: AsyncStorage, bot_name: str
    ) -> None:
        await ray_storage.set_state(key=KEY, state="state")
        await ray_storage.update_data(key=KEY, data={"foo": "bar"})

        assert await storage.get_state(bot_name, (1, -42, 42, None, None, "default")) == State(
            state="state", data={"foo": "bar"}
        )

    async def test_reads_and_empty_writes_leave_no_record(
        self, ray_storage: RayStorage, storage: AsyncStorage, bot_name: str
    ) -> None:
        await ray_storage.get_state(key=KEY)
        await ray_storage.get_data(key=KEY)
        await ray_storage.update_data(key=KEY, data={})
        await ray_storage.set_data(key=KEY, data={})
        await ray_storage.set_state(key=KEY, state=None)

        assert await storage.get_state(bot_name, RECORD_KEY) is None

    async def test_a_cleared_context_leaves_no_record(
        self, ray_storage: RayStorage, storage: AsyncStorage, bot_name: str
    ) -> None:
        context = FSMContext(ray_storage, KEY)
        await context.set_state(Order.size)
        await context.update_data(foo="bar")
        await context.clear()

        assert await storage.get_state(bot_name, RECORD_KEY) is None

    async def test_taking_away_the_data_first_leaves_no_record_either(
        self, ray_storage: RayStorage, storage: AsyncStorage, bot_name: str
    ) -> None:
        await ray_storage.set_state(key=KEY, state="state")
        await ray_storage.update_data(key=KEY, data={"foo": "bar"})
        await ray_storage.set_data(key=KEY, data={})
        await ray_storage.set_state(key=KEY, state=None)

        assert await storage.get_state(bot_name, RECORD_KEY) is None


@pytest.mark.ray
class TestConcurrency:
    async def test_concurrent_updates_lose_nothing(self, ray_storage: RayStorage, bot_name: str) -> None:
        other = RayStorage(bot_name)
        await asyncio.gather(
            *(
                each.update_data(key=KEY, data={f"{name} {number}": number})
                for number in range(100)
                for name, each in (("this", ray_storage), ("other", other))
            )
        )
        data = await ray_storage.get_data(key=KEY)
        await other.close()

        assert len(data) == 200

    async def test_concurrent_states_and_updates_lose_no_update(
        self, ray_storage: RayStorage, bot_name: str
    ) -> None:
        other = RayStorage(bot_name)
        await asyncio.gather(
            *(ray_storage.set_state(key=KEY, state=f"state {number}") for number in range(30)),
            *(other.update_data(key=KEY, data={str(number): number}) for number in range(30)),
        )
        data = await ray_storage.get_data(key=KEY)
        await other.close()

        assert data == {str(number): number for number in range(30)}

    async def test_data_written_while_the_state_is_taken_away_survives(
        self, ray_storage: RayStorage, storage: RacedStorage, bot_name: str
    ) -> None:
        await ray_storage.set_state(key=KEY, state="state")
        storage.rival = lambda: storage.update_data(bot_name, RECORD_KEY, {"foo": "bar"})
        await ray_storage.set_state(key=KEY, state=None)

        assert await storage.get_state(bot_name, RECORD_KEY) == State(data={"foo": "bar"})

    async def test_a_state_set_while_the_data_is_emptied_survives(
        self, ray_storage: RayStorage, storage: RacedStorage, bot_name: str
    ) -> None:
        await ray_storage.set_data(key=KEY, data={"foo": "bar"})
        storage.rival = lambda: storage.set_state(bot_name, RECORD_KEY, State(state="state"))
        await ray_storage.set_data(key=KEY, data={})

        assert await storage.get_state(bot_name, RECORD_KEY) == State(state="state")

    async def test_a_record_cleared_while_the_state_is_taken_away_does_not_come_back(
        self, ray_storage: RayStorage, storage: RacedStorage, bot_name: str
    ) -> None:
        await storage.set_state(bot_name, RECORD_KEY, State(state="state", data={"foo": "bar"}))
        storage.rival = lambda: storage.clear(bot_name, RECORD_KEY)
        await ray_storage.set_state(key=KEY, state=None)

        assert await storage.get_state(bot_name, RECORD_KEY) is None


@pytest.mark.ray
class TestTimesToLive:
    @pytest.mark.parametrize(
        ("state_ttl", "data_ttl"), [(3600, 60), (60, timedelta(hours=1)), (timedelta(hours=1), 3600)]
    )
    async def test_a_conversation_lives_for_the_longer_of_both_times_whatever_is_written(
        self, storage: AsyncStorage, bot_name: str, state_ttl: Any, data_ttl: Any
    ) -> None:
        limited = RayStorage(bot_name, storage, state_ttl=state_ttl, data_ttl=data_ttl)
        ends = []
        for write in (
            lambda: limited.set_state(KEY, "state"),
            lambda: limited.set_data(KEY, {"foo": "bar"}),
            lambda: limited.update_data(KEY, {"spam": "egg"}),
            lambda: limited.set_data(KEY, {}),
        ):
            await storage.clear(bot_name, RECORD_KEY)
            await storage.set_state(bot_name, RECORD_KEY, State(state="before", data={"before": 1}))
            begun = datetime.now(UTC)
            await write()
            record = await storage.get_state(bot_name, RECORD_KEY)
            assert record is not None
            assert record.expires_at is not None
            ends.append(record.expires_at - begun)

        assert all(timedelta(seconds=3599) < end < timedelta(seconds=3600 + DEADLINE_S) for end in ends)

    async def test_without_times_it_lives_as_the_options_say(
        self, ray_storage: RayStorage, storage: AsyncStorage, bot_name: str
    ) -> None:
        await ray_storage.set_state(KEY, "state")
        record = await storage.get_state(bot_name, RECORD_KEY)

        assert record is not None
        assert record.expires_at is None


class InitCounter(AsyncStorage):
    """Counts inits, and lets the first ones fail."""

    inits = 0
    failures = 0

    async def init(self, bot_name: str, options: BotOptions | None = None, **changes: Any) -> None:
        self.inits += 1
        await asyncio.sleep(0)
        if self.inits <= self.failures:
            raise NamespaceUnavailable("not yet")
        await super().init(bot_name, options, **changes)


@pytest.mark.ray
class TestInitialisation:
    @pytest.fixture
    def bot_name(self, cluster: object) -> Iterator[str]:
        """A bot that is not there."""
        yield "aiogram-new"
        with Storage() as storage, suppress(UnknownBot):
            storage.drop("aiogram-new")

    async def test_concurrent_first_uses_initialise_the_bot_once(self, bot_name: str) -> None:
        async with InitCounter() as storage:
            ray_storage = RayStorage(bot_name, storage, BotOptions(shards=2), max_record_bytes=5_000)
            await asyncio.gather(*(ray_storage.update_data(KEY, {str(n): n}) for n in range(16)))

            assert storage.inits == 1
            assert (await storage.describe(bot_name)).options == BotOptions(shards=2, max_record_bytes=5_000)
            assert len(await ray_storage.get_data(KEY)) == 16

    async def test_a_failure_to_initialise_is_told_to_all_who_wait_and_then_tried_again(
        self, bot_name: str
    ) -> None:
        async with InitCounter() as storage:
            storage.failures = 1
            ray_storage = RayStorage(bot_name, storage, BotOptions())
            answers = await asyncio.gather(
                *(ray_storage.get_state(KEY) for _ in range(4)), return_exceptions=True
            )

            assert [type(answer) for answer in answers] == [NamespaceUnavailable] * 4
            assert await ray_storage.get_state(KEY) is None
            assert storage.inits == 2

    async def test_who_is_cancelled_does_not_keep_the_others_from_the_bot(self, bot_name: str) -> None:
        async with InitCounter() as storage:
            ray_storage = RayStorage(bot_name, storage, BotOptions())
            first, second = (asyncio.create_task(ray_storage.get_state(KEY)) for _ in range(2))
            await asyncio.sleep(0)
            first.cancel()

            assert await second is None
            assert storage.inits == 1

    async def test_the_start_of_polling_initialises_the_bot(self, bot_name: str) -> None:
        async with InitCounter() as storage:
            ray_storage = RayStorage(bot_name, storage, shards=2)
            dispatcher = Dispatcher(storage=ray_storage)
            dispatcher.startup.register(ray_storage.startup)
            await dispatcher.emit_startup()

            assert len((await storage.describe(bot_name)).shards) == 2
            await dispatcher.emit_shutdown()

    async def test_without_options_a_bot_that_is_missing_fails_the_start(self, bot_name: str) -> None:
        ray_storage, isolation = RayStorage(bot_name), RayEventIsolation(bot_name)
        for each in (ray_storage, isolation):
            with pytest.raises(UnknownBot, match="init"):
                await each.startup()
            await each.close()

    async def test_other_options_than_those_of_the_running_bot_are_refused(self, bot_name: str) -> None:
        async with AsyncStorage() as storage:
            await storage.init(bot_name)
            with pytest.raises(OptionsConflict):
                await RayStorage(bot_name, storage, shards=3).get_state(KEY)

    async def test_an_isolation_may_be_the_first_to_use_the_bot(self, bot_name: str) -> None:
        async with AsyncStorage() as storage:
            ray_storage = RayStorage(bot_name, storage, shards=2)
            async with ray_storage.create_isolation().lock(KEY):
                await ray_storage.set_state(KEY, "state")

            assert await ray_storage.get_state(KEY) == "state"


def count_up(bot_name: str, times: int) -> None:
    """Count in the conversation's data, by a read and a write with time between them."""

    async def count() -> None:
        storage, isolation = RayStorage(bot_name), RayEventIsolation(bot_name)
        await asyncio.gather(*(count_once(storage, isolation) for _ in range(times)))
        await isolation.close()
        await storage.close()

    asyncio.run(count())


async def count_once(storage: BaseStorage, isolation: BaseEventIsolation) -> None:
    async with isolation.lock(key=KEY):
        seen = await storage.get_value(KEY, "n", 0)
        await asyncio.sleep(0)
        await storage.set_data(KEY, {"n": seen + 1})


def hold(bot_name: str) -> None:
    """Keep the conversation until killed."""

    async def keep() -> None:
        async with RayEventIsolation(bot_name).lock(KEY), AsyncStorage() as storage:
            await storage.set_data(bot_name, "holder", {"pid": os.getpid()})
            await asyncio.Event().wait()

    asyncio.run(keep())


@pytest.mark.ray
class TestIsolation:
    async def test_tasks_with_a_conversation_are_alone_and_come_in_their_order(
        self, storage: AsyncStorage, bot_name: str
    ) -> None:
        other = RayEventIsolation(bot_name)
        isolations = itertools.cycle([RayEventIsolation(bot_name, storage), other])
        steps: list[tuple[int, str]] = []

        async def handle(number: int, isolation: RayEventIsolation) -> None:
            async with isolation.lock(key=KEY):
                steps.append((number, "begins"))
                await asyncio.sleep(0)
                await storage.update_data(bot_name, RECORD_KEY, {"n": number})
                steps.append((number, "ends"))

        tasks = []
        async with storage.lock(bot_name, RECORD_KEY):
            for number in range(8):
                tasks.append(asyncio.create_task(handle(number, next(isolations))))
                await until_waiting(storage, bot_name, number + 1)
        await asyncio.gather(*tasks)
        await other.close()

        assert steps == [(number, step) for number in range(8) for step in ("begins", "ends")]

    async def test_conversations_do_not_wait_for_each_other(
        self, storage: AsyncStorage, bot_name: str
    ) -> None:
        isolation = RayEventIsolation(bot_name, storage, timeout_s=AT_ONCE_S)

        async with isolation.lock(KEY), isolation.lock(dataclasses.replace(KEY, user_id=43)):
            pass

    async def test_two_processes_lose_nothing_that_they_read_and_write_in_a_lock(
        self, ray_storage: RayStorage, bot_name: str
    ) -> None:
        # A worker takes seconds to import aiogram, so this process is the second one.
        counting = start(count_up, bot_name, 200)
        await until(lambda: ray_storage.get_value(KEY, "n"), "the other process counts")
        await asyncio.to_thread(count_up, bot_name, 20)
        await counting

        assert await ray_storage.get_data(KEY) == {"n": 220}

    async def test_a_killed_holder_lets_the_next_one_in_at_once(
        self, storage: AsyncStorage, bot_name: str
    ) -> None:
        holder = start(hold, bot_name)
        note = await until(lambda: storage.get_data(bot_name, "holder"), "the holder has its lock")
        next_one = asyncio.create_task(enter(RayEventIsolation(bot_name, storage)))
        await until_waiting(storage, bot_name, 1)

        os.kill(note["pid"], signal.SIGKILL)
        await asyncio.wait_for(next_one, AT_ONCE_S)

        with pytest.raises(ray.exceptions.WorkerCrashedError):
            await holder

    async def test_who_is_to_wait_no_longer_than_so_is_told(
        self, storage: AsyncStorage, bot_name: str
    ) -> None:
        impatient = RayEventIsolation(bot_name, storage, timeout_s=0.1)

        async with RayEventIsolation(bot_name, storage).lock(KEY):
            with pytest.raises(TurnTimeout):
                await enter(impatient)

    async def test_the_state_comes_with_the_lock_for_who_reads_it_at_once(
        self, storage: RacedStorage, ray_storage: RayStorage
    ) -> None:
        await ray_storage.set_state(KEY, "state")
        read: list[Hashable] = []
        storage.on_read = read.append

        async with ray_storage.create_isolation().lock(KEY):
            first = await ray_storage.get_state(KEY)
            assert read == []
            second = await ray_storage.get_state(KEY)

        assert (first, second) == ("state", "state")
        assert read == [RECORD_KEY]

    async def test_what_is_read_later_is_as_it_is_then(
        self, storage: RacedStorage, ray_storage: RayStorage
    ) -> None:
        other = dataclasses.replace(KEY, user_id=43)
        await ray_storage.set_state(other, "another")
        isolation = ray_storage.create_isolation()

        async with isolation.lock(KEY):
            of_another = await ray_storage.get_state(other)
        async with isolation.lock(KEY):
            await RayStorage(ray_storage.bot_name, storage).set_state(KEY, "newer")
            later = await ray_storage.get_state(KEY)

        assert (of_another, later) == ("another", "newer")

    async def test_close_leaves_open_a_storage_that_was_given(
        self, storage: AsyncStorage, bot_name: str
    ) -> None:
        own = RayEventIsolation(bot_name)
        for isolation in (own, RayEventIsolation(bot_name, storage)):
            await enter(isolation)
            await isolation.close()

        with pytest.raises(StorageClosed):
            await enter(own)
        assert await storage.get_state(bot_name, RECORD_KEY) is None


async def enter(isolation: RayEventIsolation) -> None:
    async with isolation.lock(KEY):
        pass


async def until_waiting(storage: AsyncStorage, bot_name: str, count: int) -> None:
    """Wait until so many turns and locks wait for a conversation."""

    async def are_waiting() -> bool:
        return (await storage.describe(bot_name)).shards[0].statistics.waiting_turns == count

    await until(are_waiting, f"{count} wait")


async def until(find: Callable[[], Awaitable[T | None]], what: str) -> T:
    """What is found, once it is true; fail, naming it, when it does not come in time."""
    end = time.monotonic() + DEADLINE_S
    while not (found := await find()):
        if time.monotonic() > end:
            pytest.fail(f"not within {DEADLINE_S} s: {what}")
        await asyncio.sleep(0.01)
    return found


TELEGRAM_BOT = Bot("1:token")
USER = {"id": 42, "is_bot": False, "first_name": "Ann"}
_update_ids = itertools.count(1)


def message(text: str, *, update_id: int | None = None, **more: Any) -> Update:
    """A message in a topic of a group."""
    number = next(_update_ids) if update_id is None else update_id
    content = {
        "message_id": number,
        "date": 1_767_225_600,
        "chat": {"id": -42, "type": "supergroup", "is_forum": True},
        "from": USER,
        "message_thread_id": 9,
        "is_topic_message": True,
        "text": text,
    }
    return Update.model_validate(
        {"update_id": number, "message": content | more}, context={"bot": TELEGRAM_BOT}
    )


def made_dispatcher(
    storage: RayStorage, *, strategy: FSMStrategy = FSMStrategy.USER_IN_CHAT, **settings: Any
) -> Dispatcher:
    """A dispatcher that handles updates in turns."""
    dispatcher = Dispatcher(storage=storage, fsm_strategy=strategy, disable_fsm=True)
    dispatcher.update.outer_middleware(RayFSMMiddleware(dispatcher.fsm, **settings))
    return dispatcher


async def feed(dispatcher: Dispatcher, *updates: Update) -> list[Any]:
    return [await dispatcher.feed_update(TELEGRAM_BOT, update) for update in updates]


async def ask_size(_: Message, state: FSMContext) -> None:
    await state.update_data(starts=await state.get_value("starts", 0) + 1)
    await state.set_state(Order.size)


async def ask_address(message: Message, state: FSMContext) -> None:
    await state.update_data({"size": message.text}, asked=["size"])
    await state.set_state(Order.address)


async def finish(message: Message, state: FSMContext) -> dict[str, Any]:
    data = await state.update_data(address=message.text)
    await state.clear()
    return data


async def fail(_: Message, state: FSMContext) -> None:
    await state.set_data({"lost": True})
    await state.set_state(None)
    raise ZeroDivisionError


def add_order(dispatcher: Dispatcher) -> Dispatcher:
    """Handlers as they are written for any storage of aiogram."""
    dispatcher.message.register(ask_size, Command("order"))
    dispatcher.message.register(fail, Command("fail"))
    dispatcher.message.register(ask_address, Order.size)
    dispatcher.message.register(finish, Order.address)
    return dispatcher


@pytest.mark.ray
class TestTurns:
    @pytest.fixture
    def dispatcher(self, ray_storage: RayStorage) -> Dispatcher:
        return add_order(made_dispatcher(ray_storage))

    async def record(self, ray_storage: RayStorage) -> State | None:
        storage = await ray_storage.ready()
        return await storage.get_state(ray_storage.bot_name, RECORD_KEY)

    async def test_handlers_and_state_filters_run_unchanged(
        self, dispatcher: Dispatcher, ray_storage: RayStorage
    ) -> None:
        await feed(dispatcher, message("/order"), message("large"))
        between = await self.record(ray_storage)
        (answer,) = await feed(dispatcher, message("Main Street 1"))

        assert between == State(state="Order:address", data={"starts": 1, "size": "large", "asked": ["size"]})
        assert answer == {"starts": 1, "size": "large", "asked": ["size"], "address": "Main Street 1"}
        assert await self.record(ray_storage) is None

    @pytest.mark.parametrize(
        ("texts", "last"),
        [(["/order"], WRITE), (["/order", "large"], WRITE), (["nothing to handle"], TURN)],
        ids=["first", "second", "unhandled"],
    )
    async def test_an_update_is_two_requests(
        self,
        dispatcher: Dispatcher,
        frames: list[bytes],  # noqa: F811  # the fixture
        texts: list[str],
        last: int,
    ) -> None:
        await feed(dispatcher, message("nothing yet"), *map(message, texts[:-1]))
        frames.clear()
        await feed(dispatcher, message(texts[-1]))
        await asyncio.sleep(0)

        assert [frame[5] for frame in frames] == [TURN, last]

    async def test_updates_at_once_are_handled_one_after_the_other_in_all_processes(
        self, dispatcher: Dispatcher, ray_storage: RayStorage, bot_name: str
    ) -> None:
        there = RayStorage(bot_name)
        other = add_order(made_dispatcher(there))
        updates = [feed(each, message("/order")) for each in (dispatcher, other) for _ in range(8)]
        await asyncio.gather(*updates)
        await there.close()

        assert await ray_storage.get_data(KEY) == {"starts": 16}

    async def test_a_handler_that_raises_stores_nothing_and_frees_the_conversation(
        self, dispatcher: Dispatcher, ray_storage: RayStorage
    ) -> None:
        await feed(dispatcher, message("/order"))
        with pytest.raises(ZeroDivisionError):
            await feed(dispatcher, message("/fail"))
        await asyncio.wait_for(feed(dispatcher, message("large")), AT_ONCE_S)

        assert await ray_storage.get_state(KEY) == "Order:address"
        assert await ray_storage.get_value(KEY, "lost") is None

    async def test_what_an_error_handler_does_to_the_state_is_stored(
        self, dispatcher: Dispatcher, ray_storage: RayStorage
    ) -> None:
        seen = []

        async def recover(_: ErrorEvent, state: FSMContext) -> None:
            seen.append((await state.get_state(), await state.get_data()))
            await state.set_state(Order.address)
            await state.set_data({"errors": 1})
            seen.append((await state.get_state(), await state.update_data(more=1)))

        dispatcher.errors.register(recover)
        await feed(dispatcher, message("/order"), message("/fail"))

        assert seen == [("Order:size", {"starts": 1}), ("Order:address", {"errors": 1, "more": 1})]
        assert await self.record(ray_storage) == State(state="Order:address", data={"errors": 1, "more": 1})

    async def test_an_error_handler_does_not_overtake_the_next_update(
        self, dispatcher: Dispatcher, ray_storage: RayStorage, storage: AsyncStorage, bot_name: str
    ) -> None:
        async def recover(_: ErrorEvent, state: FSMContext) -> None:
            await state.update_data(errors=1)

        dispatcher.errors.register(recover)
        async with storage.lock(bot_name, RECORD_KEY):
            updates = []
            for number, text in enumerate(("/fail", "/order", "/order")):
                updates.append(asyncio.create_task(feed(dispatcher, message(text))))
                await until_waiting(storage, bot_name, number + 1)
        await asyncio.gather(*updates)

        assert await ray_storage.get_data(KEY) == {"starts": 2, "errors": 1}

    async def test_data_that_a_handler_changed_and_did_not_set_is_not_stored(
        self, dispatcher: Dispatcher, ray_storage: RayStorage
    ) -> None:
        async def change_copies(_: Message, state: FSMContext) -> list[Any]:
            mine = {"items": [1]}
            await state.set_data(mine)
            mine["items"].append(2)
            (await state.get_data())["items"].append(3)
            (await state.update_data(more=1))["items"].append(4)
            items: list[int] = await state.get_value("items", [])
            return items

        dispatcher.message.register(change_copies)

        assert await feed(dispatcher, message("go")) == [[1]]
        assert await ray_storage.get_data(KEY) == {"items": [1], "more": 1}

    async def test_data_that_is_no_mapping_is_refused_at_once(self, dispatcher: Dispatcher) -> None:
        async def set_list(_: Message, state: FSMContext) -> None:
            for write in (state.set_data, state.storage.update_data):
                with pytest.raises(DataNotDictLikeError):
                    await (write([1]) if write == state.set_data else write(state.key, [1]))  # type: ignore[call-arg, arg-type]

        dispatcher.message.register(set_list)
        await feed(dispatcher, message("go"))

    async def test_handlers_may_take_the_turn_and_what_they_do_to_it_is_in_the_state(
        self, dispatcher: Dispatcher, ray_storage: RayStorage
    ) -> None:
        async def use(_: Message, turn: Turn, state: FSMContext, raw_state: str | None) -> Any:
            turn.data["n"] = 1
            turn.state = "mine"
            return raw_state, await state.get_state(), await state.get_data()

        dispatcher.message.register(use)

        assert await feed(dispatcher, message("go")) == [(None, "mine", {"n": 1})]
        assert await self.record(ray_storage) == State(state="mine", data={"n": 1})

    async def test_another_conversation_is_written_at_once(
        self, dispatcher: Dispatcher, ray_storage: RayStorage
    ) -> None:
        other = dataclasses.replace(KEY, user_id=43)

        async def tell(_: Message, fsm_storage: BaseStorage) -> Any:
            context = FSMContext(fsm_storage, other)
            await context.set_state(Order.size)
            await context.set_data({"told": 1})
            assert await context.update_data(by="Ann") == {"told": 1, "by": "Ann"}
            return await ray_storage.get_state(other), await ray_storage.get_data(other)

        dispatcher.message.register(tell)

        assert await feed(dispatcher, message("go")) == [("Order:size", {"told": 1, "by": "Ann"})]

    async def test_a_write_past_the_turn_is_a_conflict_and_nothing_of_the_turn_is_stored(
        self, dispatcher: Dispatcher, ray_storage: RayStorage
    ) -> None:
        async def overtake(_: Message, state: FSMContext) -> None:
            await state.update_data(lost=True)
            await ray_storage.set_data(KEY, {"other": 1})

        dispatcher.message.register(overtake)
        with pytest.raises(VersionConflict):
            await feed(dispatcher, message("go"))

        assert await ray_storage.get_data(KEY) == {"other": 1}

    async def test_an_update_that_comes_again_is_not_handled_again_unless_it_failed(
        self, ray_storage: RayStorage
    ) -> None:
        dispatcher = add_order(made_dispatcher(ray_storage, skips_handled=True))
        first, failing = message("/order"), message("/fail")
        answers = await feed(dispatcher, first, message("large"), first)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                await feed(dispatcher, failing)

        assert answers[-1] is None
        assert await ray_storage.get_state(KEY) == "Order:address"
        assert await ray_storage.get_value(KEY, "starts") == 1

    async def test_an_update_without_a_conversation_is_handled_without_a_state(
        self, dispatcher: Dispatcher, ray_storage: RayStorage
    ) -> None:
        async def note(_: Message, fsm_storage: BaseStorage, **data: Any) -> Any:
            return fsm_storage, "state" in data or "turn" in data

        dispatcher.channel_post.register(note)
        post = {
            "message_id": 1,
            "date": 1_767_225_600,
            "chat": {"id": -100, "type": "channel"},
            "text": "news",
        }
        update = Update.model_validate({"update_id": 1, "channel_post": post}, context={"bot": TELEGRAM_BOT})

        assert await feed(dispatcher, update) == [(ray_storage, False)]

    @pytest.mark.parametrize("strategy", list(FSMStrategy))
    async def test_a_conversation_has_the_key_that_aiogram_gives_it(
        self, ray_storage: RayStorage, strategy: FSMStrategy
    ) -> None:
        theirs = add_order(Dispatcher(storage=ray_storage, fsm_strategy=strategy))
        ours = add_order(made_dispatcher(ray_storage, strategy=strategy))
        await feed(theirs, message("/order"))
        await feed(ours, message("/order"))
        storage = await ray_storage.ready()

        assert [found.state.data async for found in storage.scan(ray_storage.bot_name)] == [{"starts": 2}]

    async def test_a_turn_gives_the_times_to_live_of_its_storage(
        self, storage: AsyncStorage, bot_name: str
    ) -> None:
        limited = RayStorage(bot_name, storage, state_ttl=60, data_ttl=60)
        await feed(add_order(made_dispatcher(limited)), message("/order"))
        record = await self.record(limited)

        assert record is not None
        assert record.expires_at is not None

    async def test_both_middlewares_at_once_are_refused(self, ray_storage: RayStorage) -> None:
        dispatcher = Dispatcher(storage=ray_storage)
        dispatcher.update.outer_middleware(RayFSMMiddleware(dispatcher.fsm))

        with pytest.raises(ConfigurationError, match="disable_fsm=True"):
            await feed(dispatcher, message("go"))


class First(Scene, state="first"):
    @on.message.enter()
    async def note(self, _: Message, state: FSMContext) -> None:
        await state.update_data(at="first")

    @on.message(F.text == "on")
    async def go_on(self, _: Message) -> None:
        await self.wizard.goto(Second)


class Second(Scene, state="second"):
    @on.message.enter()
    async def note(self, message: Message, state: FSMContext) -> None:
        await state.update_data(at="second")

    @on.message(F.text == "back")
    async def go_back(self, _: Message) -> None:
        await self.wizard.back()

    @on.message(F.text == "fail")
    async def fail(self, _: Message) -> None:
        await self.wizard.back()
        raise ZeroDivisionError


async def begin(_: Message, scenes: ScenesManager) -> None:
    await scenes.enter(First)


@pytest.mark.ray
class TestScenes:
    @pytest.fixture(params=["each-by-itself", "in-turns"])
    def dispatcher(self, request: pytest.FixtureRequest, ray_storage: RayStorage) -> Dispatcher:
        in_turns = request.param == "in-turns"
        dispatcher = made_dispatcher(ray_storage) if in_turns else Dispatcher(storage=ray_storage)
        SceneRegistry(dispatcher).add(First, Second)
        router = Router()
        router.message.register(begin, Command("begin"))
        dispatcher.include_routers(First.as_router(), Second.as_router(), router)
        return dispatcher

    async def where(self, ray_storage: RayStorage) -> tuple[str | None, Any, list[Any]]:
        history = await ray_storage.get_data(dataclasses.replace(KEY, destiny="scenes_history"))
        return await ray_storage.get_state(KEY), await ray_storage.get_data(KEY), history.get("history", [])

    async def test_a_scene_goes_on_and_back(self, dispatcher: Dispatcher, ray_storage: RayStorage) -> None:
        before = {"state": "first", "data": {"at": "first"}}
        await feed(dispatcher, message("/begin"), message("on"))
        on = await self.where(ray_storage)
        await feed(dispatcher, message("back"))

        assert on == ("second", {"at": "second"}, [before])
        assert await self.where(ray_storage) == ("first", {"at": "first"}, [])


@pytest.mark.ray
async def test_of_an_update_that_failed_no_part_of_a_scene_is_stored(ray_storage: RayStorage) -> None:
    dispatcher = made_dispatcher(ray_storage)
    SceneRegistry(dispatcher).add(First, Second)
    dispatcher.include_routers(First.as_router(), Second.as_router())
    dispatcher.message.register(begin, Command("begin"))
    await feed(dispatcher, message("/begin"), message("on"))
    before = await TestScenes().where(ray_storage)
    with pytest.raises(ZeroDivisionError):
        await feed(dispatcher, message("fail"))

    assert await TestScenes().where(ray_storage) == before
    assert len(before[2]) == 1


class TestWithoutRay:
    @pytest.mark.parametrize(
        ("ttls", "error"),
        [
            ({"state_ttl": 60}, "give both"),
            ({"data_ttl": timedelta(1)}, "give both"),
            ({"state_ttl": 60, "data_ttl": 0}, "more than 0"),
            ({"state_ttl": timedelta(-1), "data_ttl": 60}, "more than 0"),
            ({"state_ttl": 60, "data_ttl": float("nan")}, "more than 0"),
            ({"shards": 0}, "shards"),
        ],
    )
    def test_settings_that_cannot_be_are_refused_at_once(self, ttls: Any, error: str) -> None:
        with pytest.raises(InvalidOptions, match=error):
            RayStorage("my_bot", **ttls)

    def test_turns_need_a_ray_storage(self) -> None:
        with pytest.raises(ConfigurationError, match="MemoryStorage"):
            RayFSMMiddleware(Dispatcher(disable_fsm=True).fsm)

    @pytest.mark.parametrize(
        "method", ["set_state", "get_state", "set_data", "get_data", "get_value", "update_data", "close"]
    )
    def test_parameters_have_the_names_that_aiogram_calls_them_by(self, method: str) -> None:
        ours, theirs = (
            inspect.signature(getattr(storage, method)).parameters for storage in (RayStorage, BaseStorage)
        )

        assert list(ours) == list(theirs)
        assert [each.default for each in ours.values()] == [each.default for each in theirs.values()]

    def test_importing_fsm_ray_imports_no_framework(self) -> None:
        code = "import fsm_ray, fsm_ray.cli, sys; print({'aiogram', 'telegram', 'telebot'} & {*sys.modules})"

        assert run_python(code) == "set()"

    def test_without_aiogram_the_error_names_the_extra(self) -> None:
        code = """
import sys
sys.modules["aiogram"] = None
from fsm_ray.errors import MissingExtra
try:
    import fsm_ray.adapters.aiogram
except MissingExtra as error:
    print(error)
"""

        assert run_python(code).endswith("pip install 'fsm-ray[aiogram]'")


def run_python(code: str) -> str:
    """What the code prints in a process of its own."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return result.stdout.strip()
