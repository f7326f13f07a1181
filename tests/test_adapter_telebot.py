"""Both storages keep pyTelegramBotAPI's contract, and what its own do not promise: nothing is lost."""

from __future__ import annotations

import asyncio
import enum
import inspect
import itertools
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import telebot.asyncio_storage
import telebot.states.asyncio
import telebot.states.sync
import telebot.storage
from telebot import TeleBot, asyncio_filters, custom_filters, types
from telebot.async_telebot import AsyncTeleBot
from telebot.states import State as StateOfGroup
from telebot.states import StatesGroup

from fsm_ray import AsyncStorage, BotOptions, State, Storage, Turn
from fsm_ray.adapters.telebot import AsyncRayStateStorage, RayStateStorage, record_key
from fsm_ray.errors import InvalidData, InvalidState, StorageClosed, TurnTimeout, UnknownBot
from tests.test_adapter_aiogram import run_python

BOT = "adapter-telebot"
AnyStates = RayStateStorage | AsyncRayStateStorage

_numbers = itertools.count(1)


class Order(StatesGroup):
    size = StateOfGroup()
    paid = StateOfGroup()


class Mood(enum.Enum):
    GOOD = 1


async def done(answer: Any) -> Any:
    """What a method of either storage answers."""
    return await answer if inspect.isawaitable(answer) else answer


@asynccontextmanager
async def block(context: Any) -> AsyncIterator[Any]:
    """A block of either kind."""
    if hasattr(context, "__aenter__"):
        async with context as data:
            yield data
    else:
        with context as data:
            yield data


@pytest.fixture(scope="module")
def blocking(cluster: object) -> Iterator[Storage]:
    """One bot for all tests: each has a chat of its own."""
    with Storage() as storage:
        storage.init(BOT)
        yield storage
        storage.drop(BOT)


@pytest.fixture
def chat() -> tuple[int, int]:
    return -next(_numbers), 7


@pytest.fixture(params=[RayStateStorage, AsyncRayStateStorage])
async def states(request: pytest.FixtureRequest, blocking: Storage) -> AsyncIterator[AnyStates]:
    states: AnyStates = request.param(BOT)
    yield states
    await done(states.close())


@pytest.mark.ray
class TestContract:
    async def test_a_missing_conversation_has_nothing(self, states: AnyStates, chat: tuple[int, int]) -> None:
        assert await done(states.get_state(*chat)) is None
        assert await done(states.get_data(*chat)) == {}
        assert await done(states.delete_state(*chat)) is False
        assert await done(states.reset_data(*chat)) is False
        assert await done(states.save(*chat, {"name": "Ada"})) is False
        assert await done(states.get_data(*chat)) == {}

    @pytest.mark.parametrize(
        ("state", "read"),
        [
            (Order.size, "Order:size"),
            ("size", "size"),
            ("1", "1"),
            (1, 1),
            (0, 0),
            (-(10**30), -(10**30)),
            (True, 1),
            (Mood.GOOD, "GOOD"),
            ("", ""),
            (None, None),
        ],
    )
    async def test_a_state_is_read_as_it_was_set(
        self, states: AnyStates, chat: tuple[int, int], state: Any, read: Any
    ) -> None:
        await done(states.set_state(*chat, "before"))
        await done(states.set_data(*chat, "name", "Ada"))
        answer = await done(states.set_state(*chat, state))
        found = await done(states.get_state(*chat))

        assert answer is True
        assert (type(found), found) == (type(read), read)
        assert await done(states.get_data(*chat)) == {"name": "Ada"}

    @pytest.mark.parametrize("state", [StateOfGroup(), 1.5, b"size", ("a", "b")])
    async def test_what_is_no_state_is_refused(
        self, states: AnyStates, chat: tuple[int, int], state: Any
    ) -> None:
        with pytest.raises(InvalidState, match="State of a StatesGroup"):
            await done(states.set_state(*chat, state))

    async def test_delete_state_removes_state_and_data(
        self, states: AnyStates, chat: tuple[int, int], blocking: Storage
    ) -> None:
        await done(states.set_state(*chat, Order.size))
        await done(states.set_data(*chat, "name", "Ada"))

        assert await done(states.delete_state(*chat)) is True
        assert blocking.get_state(BOT, record_key(*chat)) is None

    async def test_set_data_sets_one_field(self, states: AnyStates, chat: tuple[int, int]) -> None:
        await done(states.set_state(*chat, Order.size))
        answers = [await done(states.set_data(*chat, key, value)) for key, value in (("a", (1,)), ("b", 2))]

        assert answers == [True, True]
        assert await done(states.get_data(*chat)) == {"a": (1,), "b": 2}
        assert await done(states.get_state(*chat)) == "Order:size"

    async def test_set_data_without_a_record_is_refused(
        self, states: AnyStates, chat: tuple[int, int], blocking: Storage
    ) -> None:
        with pytest.raises(RuntimeError, match="set a state first"):
            await done(states.set_data(*chat, "name", "Ada"))
        assert blocking.get_state(BOT, record_key(*chat)) is None

    async def test_reset_data_and_save_replace_the_data_and_keep_the_state(
        self, states: AnyStates, chat: tuple[int, int]
    ) -> None:
        await done(states.set_state(*chat, Order.size))
        saved = await done(states.save(*chat, {"name": "Ada"}))
        data = await done(states.get_data(*chat))
        reset = await done(states.reset_data(*chat))

        assert (saved, data, reset) == (True, {"name": "Ada"}, True)
        assert await done(states.get_data(*chat)) == {}
        assert await done(states.get_state(*chat)) == "Order:size"

    async def test_data_that_is_no_mapping_is_refused(self, states: AnyStates, chat: tuple[int, int]) -> None:
        await done(states.set_state(*chat, Order.size))
        not_data: Any = [("name", "Ada")]

        with pytest.raises(InvalidData, match="list"):
            await done(states.save(*chat, not_data))

    async def test_conversations_that_differ_in_any_part_are_apart(
        self, states: AnyStates, chat: tuple[int, int]
    ) -> None:
        chat_id, user_id = chat
        # Some of these have one key in pyTelegramBotAPI's own storages.
        places: list[dict[str, Any]] = [
            {"chat_id": chat_id, "user_id": user_id},
            {"chat_id": chat_id, "user_id": 8},
            {"chat_id": chat_id, "user_id": user_id, "bot_id": 5},
            {"chat_id": chat_id, "user_id": user_id, "message_thread_id": 5},
            {"chat_id": chat_id, "user_id": user_id, "business_connection_id": "5"},
            {"chat_id": chat_id, "user_id": user_id, "bot_id": 5, "message_thread_id": 6},
            {"chat_id": chat_id, "user_id": user_id, "bot_id": 5, "business_connection_id": "6"},
        ]
        for number, place in enumerate(places):
            await done(states.set_state(**place, state=number))

        assert [await done(states.get_state(**place)) for place in places] == list(range(len(places)))

    async def test_an_id_may_be_text_and_nothing_may_be_zero(
        self, states: AnyStates, chat: tuple[int, int]
    ) -> None:
        await done(states.set_state(*chat, Order.size))
        chat_id, user_id = map(str, chat)
        as_text: Any = {"chat_id": chat_id, "user_id": user_id}
        nothing: Any = {"business_connection_id": "", "message_thread_id": 0, "bot_id": 0}

        assert await done(states.get_state(**as_text, **nothing)) == "Order:size"

    async def test_what_is_read_is_a_copy(self, states: AnyStates, chat: tuple[int, int]) -> None:
        await done(states.set_state(*chat, Order.size))
        await done(states.set_data(*chat, "names", ["Ada"]))
        (await done(states.get_data(*chat)))["names"].append("Bob")

        async with block(states.get_interactive_data(*chat)):
            (await done(states.get_data(*chat)))["names"].append("Bob")

        assert await done(states.get_data(*chat)) == {"names": ["Ada"]}


@pytest.mark.ray
class TestBlock:
    async def test_it_gives_the_data_and_stores_what_became_of_it(
        self, states: AnyStates, chat: tuple[int, int]
    ) -> None:
        await done(states.set_state(*chat, Order.size))
        await done(states.save(*chat, {"items": [1], "note": "x"}))
        async with block(states.get_interactive_data(*chat)) as data:
            loaded = dict(data)
            data["items"].append(2)
            del data["note"]

        assert loaded == {"items": [1, 2], "note": "x"}
        assert await done(states.get_data(*chat)) == {"items": [1, 2]}
        assert await done(states.get_state(*chat)) == "Order:size"

    async def test_a_block_that_fails_stores_nothing(self, states: AnyStates, chat: tuple[int, int]) -> None:
        async def fail() -> None:
            async with block(states.get_interactive_data(*chat)) as data:
                data["name"] = "Ada"
                await done(states.set_state(*chat, Order.paid))
                raise ZeroDivisionError

        await done(states.set_state(*chat, Order.size))
        with pytest.raises(ZeroDivisionError):
            await fail()
        assert await done(states.get_data(*chat)) == {}
        assert await done(states.get_state(*chat)) == "Order:size"

    async def test_it_stores_data_without_a_record_too_and_none_when_there_is_none(
        self, states: AnyStates, chat: tuple[int, int], blocking: Storage
    ) -> None:
        async with block(states.get_interactive_data(*chat)):
            pass
        before = blocking.get_state(BOT, record_key(*chat))
        async with block(states.get_interactive_data(*chat)) as data:
            data["name"] = "Ada"

        assert before is None
        assert await done(states.get_data(*chat)) == {"name": "Ada"}

    async def test_what_its_handler_does_meanwhile_is_part_of_it(
        self, states: AnyStates, chat: tuple[int, int]
    ) -> None:
        await done(states.set_state(*chat, Order.size))
        async with block(states.get_interactive_data(*chat)) as data:
            data["name"] = "Ada"
            await done(states.set_state(*chat, Order.paid))
            await done(states.set_data(*chat, "age", 7))
            inside = await done(states.get_state(*chat)), await done(states.get_data(*chat)), dict(data)

        assert inside == ("Order:paid", {"name": "Ada", "age": 7}, {"name": "Ada", "age": 7})
        assert await done(states.get_data(*chat)) == {"name": "Ada", "age": 7}
        assert await done(states.get_state(*chat)) == "Order:paid"

    async def test_a_conversation_deleted_in_it_stays_deleted(
        self, states: AnyStates, chat: tuple[int, int], blocking: Storage
    ) -> None:
        await done(states.set_state(*chat, Order.size))
        async with block(states.get_interactive_data(*chat)) as data:
            was_there = await done(states.delete_state(*chat))
            data["name"] = "Ada"

        assert was_there is True
        assert blocking.get_state(BOT, record_key(*chat)) is None

    async def test_saved_and_reset_data_is_what_the_block_has_in_hands(
        self, states: AnyStates, chat: tuple[int, int]
    ) -> None:
        await done(states.set_state(*chat, Order.size))
        async with block(states.get_interactive_data(*chat)) as data:
            data["a"] = 1
            await done(states.save(*chat, data))
            await done(states.reset_data(*chat))
            await done(states.save(*chat, {"b": 2}))
            data["c"] = 3

        assert await done(states.get_data(*chat)) == {"b": 2, "c": 3}

    async def test_a_block_within_shares_the_data_and_ends_with_the_outer_one(
        self, states: AnyStates, chat: tuple[int, int]
    ) -> None:
        async with block(states.get_interactive_data(*chat)) as outer:
            outer["outer"] = 1
            async with block(states.get_interactive_data(*chat)) as inner:
                inner["inner"] = 2
            async with block(states.get_interactive_data(chat[0], 8)) as other:
                other["other"] = 3

        assert await done(states.get_data(*chat)) == {"outer": 1, "inner": 2}
        assert await done(states.get_data(chat[0], 8)) == {"other": 3}

    async def test_a_block_of_another_storage_waits_and_gives_up(
        self, chat: tuple[int, int], blocking: Storage
    ) -> None:
        with Storage(timeout_s=2.0) as storage:
            first, second = RayStateStorage(BOT, blocking), RayStateStorage(BOT, storage)
            second.set_state(*chat, Order.size)
            with first.get_interactive_data(*chat), pytest.raises(TurnTimeout):
                second.get_interactive_data(*chat).__enter__()

            assert first.set_state(*chat, Order.paid) is True

    async def test_a_task_that_outlives_its_block_has_turns_of_its_own(
        self, chat: tuple[int, int], blocking: Storage
    ) -> None:
        states, is_left = AsyncRayStateStorage(BOT), asyncio.Event()

        async def late() -> None:
            await is_left.wait()
            await states.set_state(*chat, Order.paid)

        async with states.get_interactive_data(*chat):
            task = asyncio.create_task(late())
        is_left.set()
        await task
        await states.close()

        assert blocking.get_state(BOT, record_key(*chat)) == State(state="Order:paid")

    def test_a_change_that_a_write_outside_of_turns_overtook_is_made_again(
        self, chat: tuple[int, int], blocking: Storage
    ) -> None:
        states, key = RayStateStorage(BOT, blocking), record_key(*chat)

        def change(turn: Turn) -> None:
            if not turn.data:
                blocking.update_data(BOT, key, {"rival": 1})
            turn.state = "mine"

        states._change(key, change)

        assert blocking.get_state(BOT, key) == State(state="mine", data={"rival": 1})


class Counter:
    """Tasks that each add one to a counter, with an await between reading and writing it (issue 2245)."""

    TASKS = 20

    def __init__(self) -> None:
        self._inside = 0
        self._has_all = asyncio.Event()

    async def run(self, states: Any, chat: tuple[int, int], *, are_let_in_together: bool) -> int:
        await states.set_state(*chat, "counting")
        await asyncio.gather(*(self._add(states, chat, wait=are_let_in_together) for _ in range(self.TASKS)))
        return int((await states.get_data(*chat)).get("count", 0))

    async def _add(self, states: Any, chat: tuple[int, int], *, wait: bool) -> None:
        async with states.get_interactive_data(*chat) as data:
            count = data.get("count", 0)
            self._inside += 1
            if self._inside == self.TASKS:
                self._has_all.set()
            await (self._has_all.wait() if wait else asyncio.sleep(0))
            data["count"] = count + 1


@pytest.mark.ray
class TestConcurrency:
    @pytest.mark.parametrize("kind", ["memory", "pickle"])
    async def test_its_own_storages_lose_updates_when_a_block_awaits(
        self, kind: str, tmp_path: Path, chat: tuple[int, int]
    ) -> None:
        if kind == "pickle":
            pytest.importorskip("aiofiles")
        peers: dict[str, Callable[[], Any]] = {
            "memory": telebot.asyncio_storage.StateMemoryStorage,
            "pickle": lambda: telebot.asyncio_storage.StatePickleStorage(str(tmp_path / "states.pkl")),
        }

        assert await Counter().run(peers[kind](), chat, are_let_in_together=True) == 1

    async def test_ours_loses_none(self, blocking: Storage, chat: tuple[int, int]) -> None:
        states = AsyncRayStateStorage(BOT)
        count = await Counter().run(states, chat, are_let_in_together=False)
        await states.close()

        assert count == Counter.TASKS

    async def test_set_data_of_many_tasks_and_processes_loses_none(
        self, blocking: Storage, chat: tuple[int, int]
    ) -> None:
        here, there = AsyncRayStateStorage(BOT), AsyncRayStateStorage(BOT)
        await here.set_state(*chat, Order.size)
        await asyncio.gather(
            *(each.set_data(*chat, f"{id(each)} {n}", n) for n in range(50) for each in (here, there)),
            *(here.set_state(*chat, n) for n in range(20)),
        )
        data = await here.get_data(*chat)
        for each in (here, there):
            await each.close()

        assert len(data) == 100

    def test_blocks_of_threads_exclude_each_other(self, blocking: Storage, chat: tuple[int, int]) -> None:
        states, all_there = RayStateStorage(BOT, blocking), threading.Barrier(8)

        def add(_: int) -> None:
            all_there.wait()
            for _ in range(5):
                with states.get_interactive_data(*chat) as data:
                    data["count"] = data.get("count", 0) + 1

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(add, range(8)))

        assert states.get_data(*chat) == {"count": 40}


def message(number: int, text: str, chat: tuple[int, int], **fields: Any) -> Any:
    """A Telegram update with a message, as pyTelegramBotAPI reads it."""
    chat_id, user_id = chat
    user = {"id": user_id, "is_bot": False, "first_name": "Ada"}
    content = {"message_id": number, "date": 0, "text": text, "from": user, **fields}
    content["chat"] = {"id": chat_id, "type": "supergroup"}
    de_json: Any = types.Update.de_json
    return de_json({"update_id": number, "message": content})


def start(message: types.Message, state: Any) -> Any:
    return state.set(Order.size)


def take_size(message: types.Message, state: Any) -> Any:
    with state.data() as data:
        data["size"] = message.text
    return state.set(Order.paid)


async def take_size_async(message: types.Message, state: Any) -> Any:
    async with state.data() as data:
        data["size"] = message.text
    return await state.set(Order.paid)


def take_name(message: types.Message, state: Any) -> Any:
    return state.add_data(name=message.text, vip=True)


def rate(message: types.Message, state: Any) -> Any:
    return state.set(3)


def end(message: types.Message, state: Any) -> Any:
    return state.delete()


def make_bot(states: AnyStates) -> Any:
    """A bot with state filters and a StateContext, whose handlers hold a dialogue."""
    bot: Any
    filters: Any
    middleware: Any
    if isinstance(states, RayStateStorage):
        bot = TeleBot("5:token", state_storage=states, threaded=False, use_class_middlewares=True)
        filters, middleware = custom_filters, telebot.states.sync.StateMiddleware(bot)
        bot.register_message_handler(take_size, state=Order.size)
    else:
        bot = AsyncTeleBot("5:token", state_storage=states)
        filters, middleware = asyncio_filters, telebot.states.asyncio.StateMiddleware(bot)
        bot.register_message_handler(take_size_async, state=Order.size)
    bot.add_custom_filter(filters.StateFilter(bot))
    bot.setup_middleware(middleware)
    bot.register_message_handler(start, commands=["start"])
    bot.register_message_handler(rate, state=[Order.paid], regexp="^good$")
    bot.register_message_handler(take_name, state=[Order.paid])
    bot.register_message_handler(end, state=3)
    return bot


@pytest.mark.ray
class TestBots:
    async def test_a_dialogue_runs_over_state_filters_and_a_state_context(
        self, states: AnyStates, chat: tuple[int, int], blocking: Storage
    ) -> None:
        bot = make_bot(states)
        key = record_key(*chat, bot_id=5)
        found = []
        for number, text in enumerate(("/start", "large", "Ada", "good", "bye")):
            await done(bot.process_new_updates([message(number, text, chat)]))
            found.append(blocking.get_state(BOT, key))

        assert found == [
            State(state="Order:size"),
            State(state="Order:paid", data={"size": "large"}),
            State(state="Order:paid", data={"size": "large", "name": "Ada", "vip": True}),
            State(flow="int", state="3", data={"size": "large", "name": "Ada", "vip": True}),
            None,
        ]

    async def test_a_topic_has_a_conversation_of_its_own(
        self, states: AnyStates, chat: tuple[int, int], blocking: Storage
    ) -> None:
        bot = make_bot(states)
        in_topic = message(1, "/start", chat, message_thread_id=9, is_topic_message=True)
        await done(bot.process_new_updates([in_topic]))

        assert blocking.get_state(BOT, record_key(*chat, bot_id=5)) is None
        assert blocking.get_state(BOT, (5, *chat, 9, None)) == State(state="Order:size")


@pytest.mark.ray
class TestSetup:
    @pytest.mark.parametrize("kind", [RayStateStorage, AsyncRayStateStorage])
    async def test_options_initialise_the_bot_at_first_use(
        self, kind: type[AnyStates], bot_name: str, chat: tuple[int, int]
    ) -> None:
        unmade, made = kind(bot_name), kind(bot_name, options=BotOptions(shards=2), ttl_s=60.0)
        with pytest.raises(UnknownBot, match="init"):
            await done(unmade.get_state(*chat))
        await done(made.set_state(*chat, Order.size))

        assert await done(unmade.get_state(*chat)) == "Order:size"
        with Storage() as storage:
            assert storage.describe(bot_name).options == BotOptions(shards=2, ttl_s=60.0)
        for states in (unmade, made):
            await done(states.close())

    async def test_close_closes_its_own_storage_alone(self, blocking: Storage, chat: tuple[int, int]) -> None:
        own, given = RayStateStorage(BOT), RayStateStorage(BOT, blocking)
        own.set_state(*chat, Order.size)
        for states in (own, given):
            states.close()

        with pytest.raises(StorageClosed):
            own.get_state(*chat)
        assert given.get_state(*chat) == "Order:size"

    async def test_close_of_the_asynchronous_one_leaves_a_given_storage_open(
        self, blocking: Storage, chat: tuple[int, int]
    ) -> None:
        async with AsyncStorage() as storage:
            await AsyncRayStateStorage(BOT, storage).close()

            assert await storage.get_state(BOT, record_key(*chat)) is None


class TestWithoutRay:
    @pytest.mark.parametrize(
        ("ours", "theirs"),
        [
            (RayStateStorage, telebot.storage.StateMemoryStorage),
            (AsyncRayStateStorage, telebot.asyncio_storage.StateMemoryStorage),
        ],
    )
    def test_parameters_have_the_names_that_pytelegrambotapi_calls_them_by(
        self, ours: type[Any], theirs: type[Any]
    ) -> None:
        methods = [name for name in vars(theirs) if not name.startswith("_")]
        parameters = [
            [
                [
                    (each.name, each.default)
                    for each in inspect.signature(getattr(kind, name)).parameters.values()
                ]
                for name in methods
            ]
            for kind in (ours, theirs)
        ]

        assert len(methods) == 8
        assert parameters[0] == parameters[1]

    def test_without_pytelegrambotapi_the_error_names_the_extra(self) -> None:
        code = """
import sys
sys.modules["telebot"] = None
from fsm_ray.errors import MissingExtra
try:
    import fsm_ray.adapters.telebot
except MissingExtra as error:
    print(error)
"""

        assert run_python(code).endswith("pip install 'fsm-ray[telebot]'")
