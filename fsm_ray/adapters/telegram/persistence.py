"""RayPersistence: python-telegram-bot's persistence, kept in fsm_ray.

Each user, each chat and each conversation is a record of its own. Of data, only the fields that were changed
are written, so processes that change different fields of one user's data lose nothing; a refresh brings in
what others wrote, and keeps what is not written yet.

python-telegram-bot writes every `update_interval`, and reads conversations when it starts. RayApplication
writes at the end of each update, and reads them as it begins.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Hashable, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from telegram import Bot, TelegramObject
from telegram.ext import BasePersistence, ContextTypes, PersistenceInput

from fsm_ray.adapters.access import BotAccess
from fsm_ray.adapters.telegram.records import (
    BOT,
    CALLBACK,
    CallbackData,
    ConversationKey,
    RecordKey,
    by_encoded_name,
    callback_data,
    callback_fields,
    conversation_flow,
    conversation_key,
    conversation_record,
    decoded_name,
    fields_of,
)
from fsm_ray.codec import encode_data
from fsm_ray.errors import InvalidInput, VersionConflict
from fsm_ray.options import BotOptions
from fsm_ray.state import State
from fsm_ray.storage import AsyncStorage
from fsm_ray.turn import Turn


@dataclass(frozen=True)
class _Loaded:
    """What a record was when last read or written here: what differs from it has been changed since."""

    version: int
    fields: dict[str, bytes]


_REMOVED = object()


class RayPersistence(BasePersistence[Any, Any, Any]):
    """Keeps the data and conversations of a python-telegram-bot application in the namespace of a bot.

    Names of data may be whatever a key may be, values whatever fsm_ray stores, telegram's objects among them:
    these get the application's bot as they are loaded. What the methods of `AsyncStorage` raise goes to the
    application's error handlers; the changes that could not be stored stay in the application's memory, and
    are stored with the next ones to the same user, chat or bot data.

    Examples:
        >>> from telegram.ext import Application
        >>> from fsm_ray.adapters.telegram import RayApplication
        >>> builder = Application.builder().application_class(RayApplication).token("123:abc")
        >>> application = builder.persistence(RayPersistence("my_bot", shards=2)).build()
    """

    def __init__(
        self,
        bot_name: str,
        storage: AsyncStorage | None = None,
        options: BotOptions | None = None,
        *,
        store_data: PersistenceInput | None = None,
        update_interval: float = 1.0,
        context_types: ContextTypes[Any, Any, Any, Any] | None = None,
        turn_timeout_s: float = 60.0,
        **changes: Any,
    ) -> None:
        """Nothing is opened yet.

        Args:
            bot_name: the bot, in fsm_ray.
            storage: to operate with; it stays the caller's to close. None: one of its own.
            options: what to initialise the bot with, when it is first used. With none, and no changes
                either, it must have been initialised.
            store_data: which kinds of data are kept; None: all.
            update_interval: in seconds, how often an application looks for changes made outside of updates,
                such as by jobs; one that is no RayApplication, for all changes.
            context_types: those of the application, if its data are other than dicts: mappings, or objects
                whose attributes are stored.
            turn_timeout_s: how long a RayApplication waits while other processes handle updates of the same
                conversation, before it gives up an update.
            changes: fields of BotOptions, over those of `options`.

        Raises:
            InvalidOptions, InvalidBotName: a bot cannot have them.
        """
        super().__init__(store_data=store_data, update_interval=update_interval)
        self.turn_timeout_s = turn_timeout_s
        self._bot = BotAccess(bot_name, storage, options, changes)
        types: ContextTypes[Any, Any, Any, Any] = context_types or ContextTypes()
        self._new: dict[Hashable, Callable[[], Any]] = {
            "user": types.user_data,
            "chat": types.chat_data,
            "bot": types.bot_data,
            "callback": dict,
        }
        self._loaded: dict[Hashable, _Loaded] = {}
        self._turns: dict[Hashable, Turn] = {}
        self._saving: set[asyncio.Future[None]] = set()

    async def get_user_data(self) -> dict[int, Any]:
        """The data of all users, by their ids."""
        return await self._load_all("user")

    async def get_chat_data(self) -> dict[int, Any]:
        """The data of all chats, by their ids."""
        return await self._load_all("chat")

    async def get_bot_data(self) -> Any:
        """The bot's data."""
        return await self._load(BOT)

    async def get_callback_data(self) -> CallbackData | None:
        """What the buttons carry that were sent, None if there were none."""
        fields = await self._load(CALLBACK)
        return callback_data(fields) if fields else None

    async def get_conversations(self, name: str) -> dict[ConversationKey, object]:
        """The states of all conversations of the handler of this name."""
        storage = await self._bot.ready()
        return {
            found.key[2:]: found.state.data["state"]
            async for found in storage.scan(self._bot.name, flow=conversation_flow(name))
            if isinstance(found.key, tuple)
        }

    def update_user_data(self, user_id: int, data: Any) -> Coroutine[Any, Any, None]:
        """Store the fields of the user's data that were changed or removed."""
        return self._save(("user", user_id), data)

    def update_chat_data(self, chat_id: int, data: Any) -> Coroutine[Any, Any, None]:
        """Store the fields of the chat's data that were changed or removed."""
        return self._save(("chat", chat_id), data)

    def update_bot_data(self, data: Any) -> Coroutine[Any, Any, None]:
        """Store the fields of the bot's data that were changed or removed."""
        return self._save(BOT, data)

    def update_callback_data(self, data: CallbackData) -> Coroutine[Any, Any, None]:
        """Store which buttons were sent and pressed, and forget those that were dropped."""
        return self._save(CALLBACK, callback_fields(data))

    async def update_conversation(self, name: str, key: ConversationKey, new_state: object | None) -> None:
        """Store the conversation's state; None, or `END`, ends it.

        While an update is handled in the conversation's turn, the state is stored as the turn ends.
        """
        record_key = conversation_key(name, key)
        turn = self._turns.get(record_key)
        record = conversation_record(name, new_state)
        if turn is not None and record is None:
            turn.clear_flow()
        elif turn is not None and record is not None:
            turn.flow, turn.state, turn.data = record.flow, record.state, record.data
        elif record is None:
            await (await self._bot.ready()).clear(self._bot.name, record_key)
        else:
            await (await self._bot.ready()).set_state(self._bot.name, record_key, record)

    async def drop_user_data(self, user_id: int) -> None:
        """Remove the user's data."""
        await self._drop(("user", user_id))

    async def drop_chat_data(self, chat_id: int) -> None:
        """Remove the chat's data."""
        await self._drop(("chat", chat_id))

    async def refresh_user_data(self, user_id: int, user_data: Any) -> None:
        """Bring in what other processes changed in the user's data."""
        await self._refresh(("user", user_id), user_data)

    async def refresh_chat_data(self, chat_id: int, chat_data: Any) -> None:
        """Bring in what other processes changed in the chat's data."""
        await self._refresh(("chat", chat_id), chat_data)

    async def refresh_bot_data(self, bot_data: Any) -> None:
        """Bring in what other processes changed in the bot's data."""
        await self._refresh(BOT, bot_data)

    async def flush(self) -> None:
        """Close the connections, unless the storage was given: nothing waits to be stored.

        An application that is initialised once more opens new ones.
        """
        await self._bot.reopen()

    @asynccontextmanager
    async def turn(self, name: str, key: ConversationKey) -> AsyncGenerator[object | None, None]:
        """Use a conversation exclusively among all processes, for as long as the block takes. Its state.

        Raises:
            TurnTimeout: others used it for `turn_timeout_s`.
            TurnLost, VersionConflict: on leaving: others changed it meanwhile; the state was not stored.
        """
        record_key = conversation_key(name, key)
        turn = (await self._bot.ready()).turn(self._bot.name, record_key, timeout_s=self.turn_timeout_s)
        async with turn as turn_of_update:
            self._turns[record_key] = turn_of_update
            try:
                yield turn_of_update.data.get("state")
            finally:
                del self._turns[record_key]

    async def _load_all(self, kind: str) -> dict[int, Any]:
        data: dict[int, Any] = {}
        storage = await self._bot.ready()
        async for found in storage.scan(self._bot.name, flow=kind):
            match found.key:
                case (_, int(whose)) if found.key == (kind, whose):
                    data[whose] = self._new[kind]()
                    self._loaded.pop(found.key, None)
                    self._bring_in((kind, whose), found.state, data[whose])
        return data

    async def _load(self, key: RecordKey) -> Any:
        data = self._new[key[0]]()
        self._loaded.pop(key, None)
        await self._refresh(key, data)
        return data

    async def _refresh(self, key: RecordKey, data: Any) -> None:
        storage = await self._bot.ready()
        is_settled = False
        while not is_settled:
            before = self._loaded.get(key)
            record = await storage.get_state(self._bot.name, key)
            # What was stored meanwhile may be newer than what was read.
            is_settled = before is self._loaded.get(key)
        self._bring_in(key, record, data)

    def _bring_in(self, key: RecordKey, record: State | None, data: Any) -> None:
        """Change in data, in place, what others changed, other than what was changed here as well."""
        loaded = self._loaded_of(key)
        version, stored = _version_and_data(record)
        if version == loaded.version:
            return
        stored = self._defaults(key) | stored
        here = fields_of(data)
        changed = _changes(loaded, data)
        for name, value in stored.items():
            if name not in changed:
                here[decoded_name(name)] = value
        for name in loaded.fields.keys() - stored.keys() - changed:
            here.pop(decoded_name(name), None)
        _give_bot(stored, self.bot)
        self._loaded[key] = _Loaded(version, _forms(stored))

    def _loaded_of(self, key: RecordKey) -> _Loaded:
        if key not in self._loaded:
            self._loaded[key] = _Loaded(0, _forms(self._defaults(key)))
        return self._loaded[key]

    def _defaults(self, key: RecordKey) -> dict[str, Any]:
        """The fields of data that nobody has changed."""
        return by_encoded_name(self._new[key[0]]())

    def _save(self, key: RecordKey, data: Any) -> Coroutine[Any, Any, None]:
        # Not in the coroutine: the application copies the data as it calls, and until the coroutine's task
        # begins, a refresh may load fields that the copy lacks. They would be taken for removed.
        return self._save_since(self._loaded_of(key), key, data)

    async def _save_since(self, loaded: _Loaded, key: RecordKey, data: Any) -> None:
        saved = asyncio.get_running_loop().create_future()
        self._saving.add(saved)
        try:
            await self._save_changes(loaded, key, data)
        finally:
            self._saving.remove(saved)
            saved.set_result(None)

    async def _save_changes(self, loaded: _Loaded, key: RecordKey, data: Any) -> None:
        """Write the changed fields over the record as it is now, again until nobody was faster."""
        changed = _changes(loaded, data)
        if not changed:
            return
        fields = by_encoded_name(data)
        try:
            version = await self._write(key, fields, loaded.version)
        except VersionConflict:
            await self._merge(key, {name: fields.get(name, _REMOVED) for name in changed})
            version = loaded.version
        now = self._loaded_of(key)
        kept = {name: form for name, form in now.fields.items() if name not in changed}
        kept |= _forms({name: fields[name] for name in changed & fields.keys()})
        # What others wrote, or a refresh loaded meanwhile, need not be in the application's memory, or all of
        # it: the next refresh is to bring it, and finds a later version than this.
        self._loaded[key] = _Loaded(version if now is loaded else loaded.version, kept)

    async def _merge(self, key: RecordKey, changes: dict[str, Any]) -> None:
        is_done = False
        while not is_done:
            version, theirs = _version_and_data(
                await (await self._bot.ready()).get_state(self._bot.name, key)
            )
            merged = {name: value for name, value in (theirs | changes).items() if value is not _REMOVED}
            with suppress(VersionConflict):
                await self._write(key, merged, version)
                is_done = True

    async def _write(self, key: RecordKey, data: dict[str, Any], expected_version: int) -> int:
        storage = await self._bot.ready()
        if data:
            state = State(flow=key[0], data=data)
            return await storage.set_state(self._bot.name, key, state, expected_version=expected_version)
        await storage.clear(self._bot.name, key, expected_version=expected_version)
        return 0

    async def _drop(self, key: RecordKey) -> None:
        """Remove the record; what is saved in the same round first, for it may be what was moved away."""
        await asyncio.sleep(0)  # the tasks of the round begin
        if self._saving:
            await asyncio.wait(tuple(self._saving))
        self._loaded.pop(key, None)
        await (await self._bot.ready()).clear(self._bot.name, key)


def _version_and_data(record: State | None) -> tuple[int, dict[str, Any]]:
    return (0, {}) if record is None or record.version is None else (record.version, record.data)


def _changes(loaded: _Loaded, data: Any) -> set[str]:
    """The encoded names of the fields that were set or removed since."""
    forms = _forms(by_encoded_name(data))
    return {
        name for name in forms.keys() | loaded.fields.keys() if forms.get(name) != loaded.fields.get(name)
    }


def _forms(fields: Mapping[str, Any]) -> dict[str, bytes]:
    """The fields' values encoded, so that the types of what is nested count, and what cannot be is b""."""
    forms = dict.fromkeys(fields, b"")
    for name, value in fields.items():
        with suppress(InvalidInput):
            forms[name] = encode_data({name: value}, allow_pickle=True)
    return forms


def _give_bot(value: object, bot: Bot | None) -> None:
    """Let telegram's objects in value, which are stored without their bot, use this one."""
    parts: Iterable[object] = ()
    if isinstance(value, TelegramObject):
        value.set_bot(bot)
        parts = value.__getstate__().values()
    elif isinstance(value, Mapping):
        parts = value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        parts = value
    for part in parts:
        _give_bot(part, bot)
