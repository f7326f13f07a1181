"""RayPersistence keeps python-telegram-bot's contract; RayApplication shares one bot among processes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from enum import Enum
from itertools import count
from typing import Any

import pytest
from telegram import Chat, Message, Update, User
from telegram.ext import (
    Application,
    BasePersistence,
    ContextTypes,
    ConversationHandler,
    MessageHandler,
    PersistenceInput,
    TypeHandler,
    filters,
)
from telegram.request import BaseRequest, RequestData

from fsm_ray import AsyncStorage, BotOptions
from fsm_ray.adapters.telegram import RayApplication, RayPersistence, conversation_key
from fsm_ray.errors import ConfigurationError, FsmRayError, InvalidData, StorageClosed, TurnTimeout
from tests.conftest import Bots, RayCluster
from tests.test_adapter_aiogram import run_python

NAME, CITY, STREET = range(3)
END = ConversationHandler.END
update_ids = count(1)


class Colour(Enum):
    RED = 1


class Profile:
    """User data that is no dict."""

    def __init__(self) -> None:
        self.visits = 0
        self.is_new = True


class OfflineRequest(BaseRequest):
    """Answers what an application asks of Telegram."""

    read_timeout = None

    async def initialize(self) -> None: ...

    async def shutdown(self) -> None: ...

    async def do_request(
        self, url: str, method: str, request_data: RequestData | None = None, *_: Any, **__: Any
    ) -> tuple[int, bytes]:
        chat = {"id": 7, "type": "private"}
        answers = {
            "getMe": {"id": 1, "is_bot": True, "first_name": "Bot", "username": "a_bot"},
            "sendMessage": {"message_id": 1, "date": 1, "chat": chat, "text": "text"},
        }
        return 200, json.dumps({"ok": True, "result": answers[url.rpartition("/")[2]]}).encode()


class BrokenStorage(AsyncStorage):
    """Fails to write for as long as it is broken."""

    is_broken = False

    async def set_state(self, *args: Any, **settings: Any) -> int:
        if self.is_broken:
            raise FsmRayError("broken")
        return await super().set_state(*args, **settings)


@pytest.fixture
def bot_name(bots: Bots) -> str:
    return bots.emptied()


@pytest.fixture
async def storage(cluster: RayCluster) -> AsyncIterator[BrokenStorage]:
    async with BrokenStorage() as storage:
        yield storage


@pytest.fixture
def make(storage: AsyncStorage, bot_name: str) -> Callable[..., RayPersistence]:
    """A new persistence, as another process has one."""

    def make(**settings: Any) -> RayPersistence:
        return RayPersistence(bot_name, storage, **settings)

    return make


Make = Callable[..., RayPersistence]


@dataclass(frozen=True)
class Kind:
    """One of the two kinds of data that belong to an id."""

    name: str

    def __getattr__(self, verb: str) -> Callable[..., Awaitable[Any]]:
        return lambda persistence, *args: getattr(persistence, f"{verb}_{self.name}_data")(*args)


@pytest.fixture(params=["user", "chat"])
def kind(request: pytest.FixtureRequest) -> Kind:
    return Kind(request.param)


@pytest.mark.ray
class TestContract:
    async def test_there_is_nothing_before_anything_was_stored(self, make: Make) -> None:
        persistence = make()

        assert await persistence.get_user_data() == {}
        assert await persistence.get_chat_data() == {}
        assert await persistence.get_bot_data() == {}
        assert await persistence.get_callback_data() is None
        assert await persistence.get_conversations("name") == {}

    async def test_data_is_stored_by_update_and_removed_by_drop(self, make: Make, kind: Kind) -> None:
        persistence = make()
        for whose in (1, -2):
            await kind.update(persistence, whose, {"of": whose})
        stored = await kind.get(make())
        await kind.drop(persistence, 1)
        await kind.drop(persistence, 3)

        assert stored == {1: {"of": 1}, -2: {"of": -2}}
        assert await kind.get(make()) == {-2: {"of": -2}}

    async def test_changing_what_get_returned_stores_nothing_before_an_update(
        self, make: Make, kind: Kind
    ) -> None:
        await kind.update(make(), 1, {"nested": {"list": [1]}})
        await make().update_bot_data({"nested": {"list": [1]}})
        persistence = make()
        data, bot_data = (await kind.get(persistence))[1], await persistence.get_bot_data()
        for each in (data, bot_data):
            each["nested"]["list"].append(2)
        before = (await kind.get(make()))[1], await make().get_bot_data()
        await kind.update(persistence, 1, data)
        await persistence.update_bot_data(bot_data)

        assert before == ({"nested": {"list": [1]}},) * 2
        assert (await kind.get(make()))[1] == await make().get_bot_data() == {"nested": {"list": [1, 2]}}

    async def test_changing_what_was_given_to_update_stores_nothing(self, make: Make, kind: Kind) -> None:
        data: dict[str, Any] = {"nested": []}
        await kind.update(make(), 1, data)
        data["nested"].append(1)

        assert await kind.get(make()) == {1: {"nested": []}}

    async def test_a_change_of_type_alone_is_stored(self, make: Make) -> None:
        persistence = make()
        await persistence.update_bot_data({"nested": [1]})
        await persistence.update_bot_data({"nested": [True]})

        assert (await make().get_bot_data())["nested"][0] is True

    @pytest.mark.parametrize("name", ["text", "", "\0", 1, True, None, 1.5, (1, "a"), Colour.RED, b"b"])
    async def test_names_and_values_keep_their_types(self, make: Make, name: Hashable) -> None:
        data = {name: [1, 1.0, (1,), {2}, Decimal(1), Colour.RED, datetime.now(UTC), {(1, 2): None}]}
        await make().update_user_data(1, data)
        stored = (await make().get_user_data())[1]

        assert stored == data
        assert [type(key) for key in stored] == [type(name)]

    async def test_telegrams_objects_come_back_with_the_applications_bot(self, make: Make) -> None:
        message = text("hello").message
        assert message is not None
        async with running(make()) as application:
            message.set_bot(application.bot)
            await make().update_chat_data(1, {"nested": [(message,)], "user": message.from_user})
        persistence = make()
        async with running(persistence) as application:
            data = application.chat_data[1]
            found = data["nested"][0][0]

            assert found == message
            assert found.text == "hello"
            assert found.get_bot() is found.from_user.get_bot() is data["user"].get_bot() is application.bot

    async def test_callback_data_comes_back(self, make: Make) -> None:
        data = ([("b", 1.0, {"x": ("any", 1)}), ("a", 2.0, {})], {"query": "b"})
        persistence = make()
        await persistence.update_callback_data(data)
        stored = await make().get_callback_data()
        await persistence.update_callback_data((data[0][1:], {}))

        assert stored == data
        assert await make().get_callback_data() == (data[0][1:], {})

    @pytest.mark.parametrize("state", [0, 1, "state", (1, "a"), Colour.RED, None, END])
    async def test_a_conversation_has_the_state_it_was_given_until_it_ends(
        self, make: Make, state: object
    ) -> None:
        persistence = make()
        await persistence.update_conversation("name", (-1, 2, "message"), state)
        await persistence.update_conversation("other", (1, 1), 5)

        stored = await make().get_conversations("name")
        assert stored == ({} if state in {None, END} else {(-1, 2, "message"): state})
        assert [type(each) for each in stored.values()] == [type(state)] * len(stored)

    @pytest.mark.parametrize("end", [None, END])
    async def test_a_conversation_that_ended_leaves_no_record(
        self, make: Make, storage: AsyncStorage, bot_name: str, end: object
    ) -> None:
        await make().update_conversation("name", (1, 2), 1)
        await make().update_conversation("name", (1, 2), end)

        assert await storage.count(bot_name) == 0

    async def test_data_of_other_types_is_made_as_the_context_types_say(self, make: Make) -> None:
        types: ContextTypes[Any, Any, Any, Any] = ContextTypes(user_data=Profile)
        profile, elsewhere, refreshed = Profile(), make(context_types=types), Profile()
        profile.visits = 3
        await make(context_types=types).update_user_data(1, profile)
        stored = (await make(context_types=types).get_user_data())[1]
        await elsewhere.refresh_user_data(1, refreshed)
        changed = vars(refreshed).copy()
        await make().drop_user_data(1)
        await elsewhere.refresh_user_data(1, refreshed)

        assert type(stored) is Profile
        assert vars(stored) == changed == {"visits": 3, "is_new": True}
        assert vars(refreshed) == {"visits": 0, "is_new": True}

    async def test_a_persistence_can_be_loaded_again(self, make: Make) -> None:
        persistence = make()
        await persistence.update_user_data(1, {"a": 1})
        await persistence.update_bot_data({"a": 1})
        await persistence.update_callback_data(([("a", 1.0, {})], {}))

        for _ in range(2):
            assert await persistence.get_user_data() == {1: {"a": 1}}
            assert await persistence.get_bot_data() == {"a": 1}
            assert await persistence.get_callback_data() == ([("a", 1.0, {})], {})

    async def test_the_options_make_the_bot_and_flush_closes_what_is_its_own(
        self, storage: AsyncStorage, bot_name: str
    ) -> None:
        bot_name = f"{bot_name}-own"
        persistence = RayPersistence(bot_name, options=BotOptions(shards=3), shards=2)
        await persistence.update_bot_data({"a": 1})
        own, shards = persistence._bot.storage, (await storage.describe(bot_name)).shards
        await persistence.flush()
        again = await persistence.get_bot_data()
        await persistence.flush()

        assert len(shards) == 2
        with pytest.raises(StorageClosed):
            await own.get_state(bot_name, ("bot",))
        assert again == {"a": 1}
        await storage.drop(bot_name)

    async def test_flush_leaves_open_a_storage_that_was_given(
        self, make: Make, storage: AsyncStorage, bot_name: str
    ) -> None:
        await make().flush()

        assert await storage.count(bot_name) == 0


@pytest.mark.ray
class TestRecords:
    async def test_each_kind_is_found_by_its_flow(
        self, make: Make, storage: AsyncStorage, bot_name: str
    ) -> None:
        persistence = make()
        await persistence.update_user_data(1, {"a": 1})
        await persistence.update_chat_data(1, {"b": 1})
        await persistence.update_bot_data({"c": 1})
        await persistence.update_callback_data(([("d", 1.0, {})], {}))
        await persistence.update_conversation("name", (1, 2), "state")
        await persistence.update_conversation("name", (2, 2), (1, 2))

        assert await storage.count(bot_name, by="state") == {
            ("user", None): 1,
            ("chat", None): 1,
            ("bot", None): 1,
            ("callback", None): 1,
            ("conversation:name", "state"): 1,
            ("conversation:name", None): 1,
        }
        assert await storage.get_data(bot_name, ("user", 1)) == {"a": 1}
        assert await storage.get_data(bot_name, conversation_key("name", (1, 2))) == {"state": "state"}

    async def test_data_that_is_empty_or_became_so_leaves_no_record(
        self, make: Make, storage: AsyncStorage, bot_name: str
    ) -> None:
        persistence = make()
        await persistence.update_user_data(1, {})
        await persistence.refresh_user_data(1, {})
        await persistence.update_chat_data(1, {"a": 1})
        await persistence.update_chat_data(1, {})

        assert await storage.count(bot_name) == 0

    async def test_data_that_did_not_change_is_not_written(
        self, make: Make, storage: AsyncStorage, bot_name: str
    ) -> None:
        message = text("hello").message
        await make().update_bot_data({"message": message, "set": {*"abcdef"}})
        before = await storage.get_state(bot_name, ("bot",))
        persistence = make()
        await persistence.update_bot_data(await persistence.get_bot_data())
        after = await storage.get_state(bot_name, ("bot",))

        assert before is not None
        assert after is not None
        assert after.version == before.version


@pytest.mark.ray
class TestSharing:
    async def test_processes_that_change_different_fields_lose_nothing(self, make: Make, kind: Kind) -> None:
        await kind.update(make(), 1, {"a": 0, "b": 0, "c": 0, "d": 0})
        first, second = make(), make()
        of_first, of_second = (await kind.get(first))[1], (await kind.get(second))[1]
        of_first |= {"a": 1, "new": 1}
        of_second |= {"b": 2}
        del of_second["c"]
        await kind.update(first, 1, of_first)
        await kind.update(second, 1, of_second)
        await kind.refresh(first, 1, of_first)
        await kind.refresh(second, 1, of_second)

        assert of_first == of_second == {"a": 1, "b": 2, "d": 0, "new": 1}
        assert await kind.get(make()) == {1: of_first}

    async def test_of_one_field_the_last_write_stays(self, make: Make) -> None:
        first, second = make(), make()
        await first.update_bot_data({"a": 1})
        await second.update_bot_data({"a": 2})

        assert await make().get_bot_data() == {"a": 2}

    async def test_concurrent_writers_lose_nothing(self, make: Make) -> None:
        persistences = [make() for _ in range(4)]
        data: list[dict[str, int]] = [{} for _ in persistences]
        for step in range(5):
            for number, each in enumerate(data):
                each[f"{number} {step}"] = step
            await asyncio.gather(
                *(
                    persistence.update_bot_data(each)
                    for persistence, each in zip(persistences, data, strict=True)
                )
            )

        assert len(await make().get_bot_data()) == 20

    async def test_a_refresh_keeps_what_is_not_stored_yet(self, make: Make, kind: Kind) -> None:
        persistence = make()
        await kind.update(persistence, 1, {"a": 0, "b": 0, "c": 0})
        await kind.update(make(), 1, {"a": 1, "b": 1, "other": 1})
        data = {"a": 0, "b": 2, "mine": 2}
        await kind.refresh(persistence, 1, data)
        await kind.update(persistence, 1, data)

        assert data == {"a": 1, "b": 2, "mine": 2, "other": 1}
        assert await kind.get(make()) == {1: data}

    async def test_a_refresh_sees_what_others_dropped(self, make: Make, kind: Kind) -> None:
        persistence, data = make(), {"a": 1}
        await kind.update(persistence, 1, data)
        await kind.drop(make(), 1)
        await kind.refresh(persistence, 1, data)

        assert data == {}

    async def test_a_field_that_cannot_be_stored_is_told_and_keeps_nothing_from_being_loaded(
        self, make: Make
    ) -> None:
        persistence, data = make(), {"bad": "\ud800", "good": 1}
        with pytest.raises(InvalidData, match="bad"):
            await persistence.update_user_data(1, data)
        await make().update_user_data(1, {"other": 1})
        await persistence.refresh_user_data(1, data)
        loaded = data.copy()
        del data["bad"]
        await persistence.update_user_data(1, data)

        assert loaded == {"bad": "\ud800", "good": 1, "other": 1}
        assert await make().get_user_data() == {1: {"good": 1, "other": 1}}

    async def test_what_a_refresh_brings_after_data_was_copied_is_not_taken_for_removed(
        self, make: Make
    ) -> None:
        persistence, data = make(), {"mine": 1}
        saving = persistence.update_user_data(1, data.copy())  # to be run as the next task
        await make().update_user_data(1, {"theirs": 1})
        await persistence.refresh_user_data(1, data)
        await saving

        assert data == {"mine": 1, "theirs": 1}
        assert await make().get_user_data() == {1: data}

    async def test_what_a_refresh_brings_while_data_is_saved_is_not_taken_for_ours(
        self, make: Make, storage: BrokenStorage
    ) -> None:
        persistence, other, data, theirs = make(), make(), {"mine": 1}, {"theirs": 1}
        set_state = storage.set_state

        async def raced(*args: Any, **settings: Any) -> int:
            version = await set_state(*args, **settings)
            del storage.set_state
            await other.update_user_data(1, theirs)
            await persistence.refresh_user_data(1, data)
            return version

        storage.set_state = raced  # type: ignore[method-assign]
        await persistence.update_user_data(1, data.copy())
        brought = data.copy()
        await other.update_user_data(1, {"theirs": 2})
        data["more"] = 1
        await persistence.update_user_data(1, data.copy())

        assert brought == {"mine": 1, "theirs": 1}
        assert await make().get_user_data() == {1: {"mine": 1, "theirs": 2, "more": 1}}

    async def test_what_moved_to_another_chat_is_stored_before_it_goes(
        self, make: Make, storage: BrokenStorage, bot_name: str
    ) -> None:
        persistence = make()
        await persistence.update_chat_data(1, {"a": 1})
        seen = []
        clear = storage.clear

        async def watched(*args: Any, **settings: Any) -> bool:
            seen.append(await storage.get_data(bot_name, ("chat", -1)))
            return await clear(*args, **settings)

        storage.clear = watched  # type: ignore[method-assign]
        await asyncio.gather(persistence.drop_chat_data(1), persistence.update_chat_data(-1, {"a": 1}))

        assert seen == [{"a": 1}]
        assert await make().get_chat_data() == {-1: {"a": 1}}


class Dialogue:
    """Asks for a name, then in a nested conversation for city and street. Keeps the answers in user data."""

    def __init__(self, *, block: bool = True) -> None:
        self.block = block
        self.gate: asyncio.Event | None = None

    def handler(self) -> ConversationHandler[Any]:
        where: ConversationHandler[Any] = ConversationHandler(
            [MessageHandler(filters.Text(["where"]), self.begin_where)],
            {CITY: [self.on(self.city)], STREET: [self.on(self.street)]},
            [],
            name="where",
            persistent=True,
            map_to_parent={END: END},
        )
        return ConversationHandler(
            [MessageHandler(filters.Text(["start"]), self.start, block=self.block)],
            {NAME: [where, self.on(self.name)]},
            [],
            name="registration",
            persistent=True,
        )

    def on(self, callback: Any) -> MessageHandler[Any, Any]:
        return MessageHandler(filters.TEXT & ~filters.Text(["start", "where"]), callback)

    async def start(self, update: Update, context: Any) -> int:
        if self.gate is not None:
            await self.gate.wait()
        context.user_data["steps"] = ["start"]
        return NAME

    async def name(self, update: Update, context: Any) -> None:
        self.note(update, context, "name")

    async def begin_where(self, update: Update, context: Any) -> int:
        return CITY

    async def city(self, update: Update, context: Any) -> int:
        self.note(update, context, "city")
        return STREET

    async def street(self, update: Update, context: Any) -> int:
        self.note(update, context, "street")
        return END

    def note(self, update: Update, context: Any, field: str) -> None:
        assert update.message is not None
        context.user_data[field] = update.message.text
        context.user_data["steps"].append(field)
        context.chat_data["last"] = field
        context.bot_data["answers"] = context.bot_data.get("answers", 0) + 1


def text(words: str, user_id: int = 7, chat_id: int = 7) -> Update:
    user = User(user_id, "Ada", is_bot=False)
    message = Message(1, datetime.now(UTC), Chat(chat_id, "private"), from_user=user, text=words)
    return Update(next(update_ids), message=message)


def build(
    persistence: BasePersistence[Any, Any, Any] | None, kind: type[Application[Any, Any, Any, Any, Any, Any]]
) -> Application[Any, Any, Any, Any, Any, Any]:
    builder: Any = Application.builder().application_class(kind).token("1:a").updater(None).job_queue(None)
    builder = builder.request(OfflineRequest())
    return builder.build() if persistence is None else builder.persistence(persistence).build()  # type: ignore[no-any-return]


async def begin(
    persistence: BasePersistence[Any, Any, Any], *handlers: Any, kind: type[Any] = RayApplication
) -> Application[Any, Any, Any, Any, Any, Any]:
    """An application that works, and that a test may leave as a killed process does."""
    application = build(persistence, kind)
    application.add_handlers(handlers)
    await application.initialize()
    return application


@asynccontextmanager
async def running(
    persistence: RayPersistence, *handlers: Any, kind: type[Any] = RayApplication
) -> AsyncIterator[Application[Any, Any, Any, Any, Any, Any]]:
    application = await begin(persistence, *handlers, kind=kind)
    await application.start()
    try:
        yield application
    finally:
        await application.stop()
        await application.shutdown()


WORDS = ["start", "Ada", "where", "Paris", "Main Street"]
ANSWERS = {
    "name": "Ada",
    "city": "Paris",
    "street": "Main Street",
    "steps": ["start", "name", "city", "street"],
}


@pytest.mark.ray
class TestApplications:
    async def test_a_process_that_dies_between_updates_loses_nothing(self, make: Make) -> None:
        for words in WORDS:
            application = await begin(make(), Dialogue().handler())
            await application.process_update(text(words))
        persistence = make()

        assert await persistence.get_user_data() == {7: ANSWERS}
        assert await persistence.get_chat_data() == {7: {"last": "street"}}
        assert await persistence.get_bot_data() == {"answers": 3}
        assert await persistence.get_conversations("registration") == {}
        assert await persistence.get_conversations("where") == {}

    @pytest.mark.parametrize("first", [0, 1])
    async def test_two_processes_in_turns_handle_one_dialogue(self, make: Make, first: int) -> None:
        both = [await begin(make(), Dialogue().handler()) for _ in range(2)]
        for number, words in enumerate(WORDS + WORDS):
            await both[(number + first) % 2].process_update(text(words))

        assert await make().get_user_data() == {7: ANSWERS}
        assert await make().get_bot_data() == {"answers": 6}

    async def test_the_states_of_nested_conversations_are_stored_as_they_are_between_updates(
        self, make: Make
    ) -> None:
        application = await begin(make(), Dialogue().handler())
        seen = []
        for words in WORDS:
            await application.process_update(text(words))
            seen.append([(await make().get_conversations(name)).get((7, 7)) for name in HANDLERS])

        assert seen == [[NAME, None], [NAME, None], [NAME, CITY], [NAME, STREET], [None, None]]

    async def test_updates_of_one_conversation_wait_for_each_other_in_all_processes(self, make: Make) -> None:
        at_work, most = 0, 0

        async def work(update: Update, context: Any) -> int:
            nonlocal at_work, most
            at_work += 1
            most = max(most, at_work)
            await asyncio.sleep(0)
            context.user_data["count"] = context.user_data.get("count", 0) + 1
            await asyncio.sleep(0)
            at_work -= 1
            return NAME

        def handler() -> ConversationHandler[Any]:
            on: list[Any] = [MessageHandler(filters.TEXT, work)]
            return ConversationHandler(on, {NAME: on}, [], name="name", persistent=True)

        applications = [await begin(make(), handler()) for _ in range(3)]
        await asyncio.gather(
            *(application.process_update(text("go")) for _ in range(10) for application in applications)
        )

        assert most == 1
        assert await make().get_user_data() == {7: {"count": 30}}

    async def test_conversations_of_other_users_do_not_wait(self, make: Make) -> None:
        slow, dialogue = Dialogue(), Dialogue()
        slow.gate = asyncio.Event()
        first, second = await begin(make(), slow.handler()), await begin(make(), dialogue.handler())
        waiting = asyncio.create_task(first.process_update(text("start", 8)))
        await second.process_update(text("start", 7))
        is_done = waiting.done()
        slow.gate.set()
        await waiting

        assert not is_done
        assert await make().get_conversations("registration") == {(7, 7): NAME, (7, 8): NAME}

    async def test_an_update_whose_conversation_cannot_be_had_is_told_to_error_handlers(
        self, make: Make
    ) -> None:
        application = await begin(make(turn_timeout_s=0.05), Dialogue().handler())
        errors = []

        async def on_error(update: object, context: Any) -> None:
            errors.append((update, context.error))

        application.add_error_handler(on_error)
        late = text("start")
        async with make().turn("registration", (7, 7)):
            await application.process_update(late)
        await application.process_update(text("start"))

        assert [(update, type(error)) for update, error in errors] == [(late, TurnTimeout)]
        assert await make().get_conversations("registration") == {(7, 7): NAME}

    async def test_what_could_not_be_stored_is_told_and_stored_with_the_next_change(
        self, make: Make, storage: BrokenStorage
    ) -> None:
        application = await begin(make(), Dialogue().handler())
        errors = []

        async def on_error(update: object, context: Any) -> None:
            errors.append(str(context.error))

        application.add_error_handler(on_error)
        await application.process_update(text("start"))
        storage.is_broken = True
        await application.process_update(text("Ada"))
        told = len(errors)
        storage.is_broken = False
        for words in WORDS[2:]:
            await application.process_update(text(words))

        assert told == len(errors) == 3  # user, chat and bot data
        assert await make().get_user_data() == {7: ANSWERS}

    async def test_a_state_of_a_non_blocking_handler_is_stored_when_it_is_there(self, make: Make) -> None:
        dialogue = Dialogue(block=False)
        dialogue.gate = asyncio.Event()
        async with running(make(update_interval=0.01), dialogue.handler()) as application:
            await application.process_update(text("start"))
            await application.process_update(text("too early"))
            before = await make().get_conversations("registration")
            dialogue.gate.set()
            await until(lambda: make().get_conversations("registration"))
            await application.process_update(text("Ada"))

        assert before == {}
        assert (await make().get_user_data())[7]["name"] == "Ada"

    async def test_a_conversation_that_a_non_blocking_handler_ends_leaves_no_record(
        self, make: Make, storage: AsyncStorage, bot_name: str
    ) -> None:
        async def end(update: Update, context: Any) -> int:
            return END

        def handler() -> ConversationHandler[Any]:
            states: dict[object, list[Any]] = {
                NAME: [MessageHandler(filters.Text(["end"]), end, block=False)]
            }
            start: list[Any] = [MessageHandler(filters.Text(["start"]), Dialogue().start)]
            return ConversationHandler(start, states, [], name="name", persistent=True)

        async with running(make(update_interval=60), handler()) as application:
            await application.process_update(text("start"))
            before = await storage.count(bot_name, by="flow")
            await application.process_update(text("end"))
        after = await storage.count(bot_name, by="flow")
        again = await begin(make(), handler())
        await again.process_update(text("start"))

        assert before["conversation:name"] == 1
        assert "conversation:name" not in after
        assert await make().get_conversations("name") == {(7, 7): NAME}

    async def test_a_group_that_became_a_supergroup_keeps_its_data(self, make: Make) -> None:
        async def migrate(update: Update, context: Any) -> None:
            context.application.migrate_chat_data(old_chat_id=7, new_chat_id=-100)

        await make().update_chat_data(7, {"a": 1})
        application = await begin(make(), TypeHandler(Update, migrate))
        await application.process_update(text("moved"))

        assert await make().get_chat_data() == {-100: {"a": 1}}

    async def test_dropped_data_is_gone_after_the_update(self, make: Make, kind: Kind) -> None:
        async def drop(update: Update, context: Any) -> None:
            getattr(context.application, f"drop_{kind.name}_data")(7)

        await kind.update(make(), 7, {"a": 1})
        application = await begin(make(), TypeHandler(Update, drop))
        await application.process_update(text("forget me"))

        assert await kind.get(make()) == {}

    async def test_only_what_is_to_be_stored_is(
        self, make: Make, storage: AsyncStorage, bot_name: str
    ) -> None:
        nothing = PersistenceInput(bot_data=False, chat_data=False, user_data=False, callback_data=False)
        application = await begin(make(store_data=nothing), Dialogue().handler())
        for words in WORDS[:3]:
            await application.process_update(text(words))

        assert await storage.count(bot_name, by="flow") == {
            "conversation:registration": 1,
            "conversation:where": 1,
        }

    async def test_an_application_of_any_class_stores_every_interval_and_at_shutdown(
        self, make: Make
    ) -> None:
        async with running(make(update_interval=0.01), Dialogue().handler(), kind=Application) as application:
            await application.process_update(text("start"))
            await until(lambda: make().get_conversations("registration"))
        async with running(make(update_interval=60), Dialogue().handler(), kind=Application) as application:
            for words in WORDS[1:]:
                await application.process_update(text(words))
            answers = application.user_data[7].copy()

        assert answers == ANSWERS
        assert await make().get_user_data() == {7: ANSWERS}
        assert await make().get_conversations("registration") == {}


HANDLERS = ["registration", "where"]


async def until(condition: Callable[[], Awaitable[object]]) -> None:
    """Wait until what is awaited is true."""
    async with asyncio.timeout(20):
        while not await condition():  # noqa: ASYNC110  # what another process may change, has no event
            await asyncio.sleep(0.01)


class TestWithoutRay:
    def test_a_ray_application_needs_a_ray_persistence(self) -> None:
        with pytest.raises(ConfigurationError, match="RayPersistence"):
            build(None, RayApplication)

    def test_the_update_interval_is_a_second_and_given_to_telegram(self) -> None:
        assert RayPersistence("bot").update_interval == 1.0
        assert RayPersistence("bot", update_interval=0.5).update_interval == 0.5

    def test_without_python_telegram_bot_the_error_names_the_extra(self) -> None:
        code = """
import sys
sys.modules["telegram"] = None
from fsm_ray.errors import MissingExtra
try:
    import fsm_ray.adapters.telegram
except MissingExtra as error:
    print(error)
"""

        assert run_python(code).endswith("pip install 'fsm-ray[telegram]'")
