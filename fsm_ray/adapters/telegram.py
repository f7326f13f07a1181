"""RayPersistence: python-telegram-bot's persistence, kept in fsm_ray; RayApplication, which uses it at once.

Each user, each chat and each conversation is a record of its own. Of data, only the fields that were changed
are written, so processes that change different fields of one user's data lose nothing; a refresh brings in
what others wrote, and keeps what is not written yet.

python-telegram-bot writes every `update_interval`, and reads conversations when it starts. RayApplication
writes at the end of each update, and handles an update in turns of the conversations that it belongs to: any
number of processes may share one bot's updates. A turn ends when its process dies.
"""

from __future__ import annotations

import asyncio
from collections import UserDict
from collections.abc import AsyncGenerator, Callable, Hashable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any

from fsm_ray.codec import decode_key, encode_data, encode_key
from fsm_ray.errors import ConfigurationError, FsmRayError, InvalidInput, MissingExtra, VersionConflict
from fsm_ray.options import BotOptions
from fsm_ray.state import State
from fsm_ray.storage import AsyncStorage
from fsm_ray.turn import Turn

try:
    from telegram import Bot, TelegramObject, Update
    from telegram.ext import (
        Application,
        BaseHandler,
        BasePersistence,
        ContextTypes,
        ConversationHandler,
        PersistenceInput,
    )
except ModuleNotFoundError as error:
    raise MissingExtra(
        f"RayPersistence needs {error.name!r}, which is not installed: pip install 'fsm-ray[telegram]'"
    ) from error

ConversationKey = tuple[int | str, ...]
CallbackData = tuple[list[tuple[str, float, dict[str, Any]]], dict[str, str]]
Handler = ConversationHandler[Any]

RecordKey = tuple[str] | tuple[str, int]

BOT, CALLBACK = ("bot",), ("callback",)


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

    >>> from telegram.ext import Application
    >>> builder = Application.builder().application_class(RayApplication).token("123:abc")
    >>> application = builder.persistence(RayPersistence("my_bot", options=BotOptions())).build()
    """

    def __init__(
        self,
        bot_name: str,
        storage: AsyncStorage | None = None,
        options: BotOptions | None = None,
        store_data: PersistenceInput | None = None,
        *,
        update_interval: float = 1.0,
        context_types: ContextTypes[Any, Any, Any, Any] | None = None,
        turn_timeout_s: float = 60.0,
    ) -> None:
        """Nothing is opened yet.

        Args:
            bot_name: of fsm_ray's namespace.
            storage: to operate with; it stays the caller's to close. None: one of its own.
            options: to `init` the bot with, at first use. None: somebody else has done so.
            store_data: which kinds of data are kept; None: all.
            update_interval: in seconds, how often an application looks for changes made outside of updates,
                such as by jobs; one that is no RayApplication, for all changes.
            context_types: those of the application, if its data are other than dicts: mappings, or objects
                whose attributes are stored.
            turn_timeout_s: how long a RayApplication waits while other processes handle updates of the same
                conversation, before it gives up an update.
        """
        super().__init__(store_data=store_data, update_interval=update_interval)
        self.turn_timeout_s = turn_timeout_s
        self._bot_name = bot_name
        self._storage = storage
        self._owns_storage = storage is None
        self._options = options
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
        keyboards = [(name, *rest) for (kind, name), rest in fields.items() if kind == "keyboard"]
        keyboards.sort(key=lambda keyboard: keyboard[1])  # by the time of their last use
        queries = {name: keyboard for (kind, name), keyboard in fields.items() if kind == "query"}
        return (keyboards, queries) if fields else None

    async def get_conversations(self, name: str) -> dict[ConversationKey, object]:
        """The states of all conversations of the handler of this name."""
        storage = await self._open()
        return {
            found.key[2:]: found.state.data["state"]
            async for found in storage.scan(self._bot_name, flow=_flow_of(name))
            if isinstance(found.key, tuple)
        }

    async def update_user_data(self, user_id: int, data: Any) -> None:
        """Store the fields of the user's data that were changed or removed."""
        await self._save(("user", user_id), data)

    async def update_chat_data(self, chat_id: int, data: Any) -> None:
        """Store the fields of the chat's data that were changed or removed."""
        await self._save(("chat", chat_id), data)

    async def update_bot_data(self, data: Any) -> None:
        """Store the fields of the bot's data that were changed or removed."""
        await self._save(BOT, data)

    async def update_callback_data(self, data: CallbackData) -> None:
        """Store which buttons were sent and pressed, and forget those that were dropped."""
        keyboards, queries = data
        sent = {("keyboard", name): rest for name, *rest in keyboards}
        await self._save(CALLBACK, sent | {("query", name): keyboard for name, keyboard in queries.items()})

    async def update_conversation(self, name: str, key: ConversationKey, new_state: object | None) -> None:
        """Store the conversation's state; None, or `END`, ends it.

        While an update is handled in the conversation's turn, the state is stored as the turn ends.
        """
        record_key = conversation_key(name, key)
        turn = self._turns.get(record_key)
        has_ended = new_state is None or new_state == ConversationHandler.END
        flow, state, data = _flow_of(name), _name_of(new_state), {"state": new_state}
        if turn is not None and has_ended:
            turn.clear_flow()
        elif turn is not None:
            turn.flow, turn.state, turn.data = flow, state, data
        elif has_ended:
            await (await self._open()).clear(self._bot_name, record_key)
        else:
            stored = State(flow=flow, state=state, data=data)
            await (await self._open()).set_state(self._bot_name, record_key, stored)

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
        """Close the connections, unless the storage was given: nothing waits to be stored."""
        storage = self._storage
        if self._owns_storage and storage is not None:
            self._storage = None
            await storage.close()

    @asynccontextmanager
    async def turn(self, name: str, key: ConversationKey) -> AsyncGenerator[object | None, None]:
        """Use a conversation exclusively among all processes, for as long as the block takes. Its state.

        Raises:
            TurnTimeout: others used it for `turn_timeout_s`.
            TurnLost, VersionConflict: on leaving: others changed it meanwhile; the state was not stored.
        """
        record_key = conversation_key(name, key)
        turn = (await self._open()).turn(self._bot_name, record_key, timeout_s=self.turn_timeout_s)
        async with turn as turn_of_update:
            self._turns[record_key] = turn_of_update
            try:
                yield turn_of_update.data.get("state")
            finally:
                del self._turns[record_key]

    async def _open(self) -> AsyncStorage:
        if self._storage is None:
            self._storage = AsyncStorage()
        if self._options is not None:
            await self._storage.init(self._bot_name, self._options)
            self._options = None
        return self._storage

    async def _load_all(self, kind: str) -> dict[int, Any]:
        data: dict[int, Any] = {}
        storage = await self._open()
        async for found in storage.scan(self._bot_name, flow=kind):
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
        storage = await self._open()
        is_settled = False
        while not is_settled:
            before = self._loaded.get(key)
            record = await storage.get_state(self._bot_name, key)
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
        here = _fields_of(data)
        changed = _changes(loaded, data)
        for name, value in stored.items():
            if name not in changed:
                here[_decoded(name)] = value
        for name in loaded.fields.keys() - stored.keys() - changed:
            here.pop(_decoded(name), None)
        _give_bot(stored, self.bot)
        self._loaded[key] = _Loaded(version, _forms(stored))

    def _loaded_of(self, key: RecordKey) -> _Loaded:
        return self._loaded.get(key) or _Loaded(0, _forms(self._defaults(key)))

    def _defaults(self, key: RecordKey) -> dict[str, Any]:
        """The fields of data that nobody has changed."""
        return _by_encoded_name(self._new[key[0]]())

    async def _save(self, key: RecordKey, data: Any) -> None:
        saved = asyncio.get_running_loop().create_future()
        self._saving.add(saved)
        try:
            await self._save_changes(key, data)
        finally:
            self._saving.remove(saved)
            saved.set_result(None)

    async def _save_changes(self, key: RecordKey, data: Any) -> None:
        """Write the changed fields over the record as it is now, again until nobody was faster."""
        loaded = self._loaded_of(key)
        changed = _changes(loaded, data)
        if not changed:
            return
        fields = _by_encoded_name(data)
        try:
            version = await self._write(key, fields, loaded.version)
        except VersionConflict:
            await self._merge(key, {name: fields.get(name, _REMOVED) for name in changed})
            # What others wrote is not in the application's memory: the next refresh is to bring it.
            version = loaded.version
        self._loaded[key] = _Loaded(version, _forms(fields))

    async def _merge(self, key: RecordKey, changes: dict[str, Any]) -> None:
        is_done = False
        while not is_done:
            version, theirs = _version_and_data(await (await self._open()).get_state(self._bot_name, key))
            merged = {name: value for name, value in (theirs | changes).items() if value is not _REMOVED}
            with suppress(VersionConflict):
                await self._write(key, merged, version)
                is_done = True

    async def _write(self, key: RecordKey, data: dict[str, Any], expected_version: int) -> int:
        storage = await self._open()
        if data:
            state = State(flow=key[0], data=data)
            return await storage.set_state(self._bot_name, key, state, expected_version=expected_version)
        await storage.clear(self._bot_name, key, expected_version=expected_version)
        return 0

    async def _drop(self, key: RecordKey) -> None:
        """Remove the record; what is saved in the same round first, for it may be what was moved away."""
        await asyncio.sleep(0)  # the tasks of the round begin
        if self._saving:
            await asyncio.wait(tuple(self._saving))
        self._loaded.pop(key, None)
        await (await self._open()).clear(self._bot_name, key)


class RayApplication(Application[Any, Any, Any, Any, Any, Any]):
    """An application that stores what an update changed before it handles the next one, and shares its bot.

    An update waits until no process handles another one of the same persistent conversations, and sees them
    as the last one left them. When they cannot be had, error handlers are told, and the update is given up.

    With a RayPersistence only. A state that a non-blocking handler returns is stored when it returns, and not
    in a turn. `conversation_timeout` is kept by the process that handled the last update, and arbitrary
    callback data is read as a process starts: python-telegram-bot has no hook to share them by.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        if not isinstance(self.persistence, RayPersistence):
            raise ConfigurationError("a RayApplication needs a RayPersistence: builder.persistence(...)")
        self._ray_persistence = self.persistence

    async def process_update(self, update: object) -> None:
        """Handle the update as any application does, in the turns of its conversations, and store changes."""
        try:
            async with AsyncExitStack() as stack:
                for handler, key in _conversations_of(self.handlers.values(), update):
                    state = await stack.enter_async_context(
                        self._ray_persistence.turn(str(handler.name), key)
                    )
                    _show(handler, key, state)
                await super().process_update(update)
                await self.update_persistence()
        except FsmRayError as error:
            await self.process_error(update, error)


def conversation_key(name: str, key: ConversationKey) -> tuple[str | int, ...]:
    """The key of the record of a conversation of the handler of this name.

    >>> conversation_key("registration", (-100, 7))
    ('conversation', 'registration', -100, 7)
    """
    return ("conversation", name, *key)


def _flow_of(name: str) -> str:
    return f"conversation:{name}"


def _name_of(state: object) -> str | None:
    """What a scan finds a conversation's state by."""
    return str(state) if type(state) in {str, int} else None


def _conversations_of(
    groups: Iterable[Iterable[BaseHandler[Any, Any, Any]]], update: object
) -> list[tuple[Handler, ConversationKey]]:
    """The persistent conversations that the update may belong to, in the same order in every process."""
    found = {}
    for handler in _persistent(chain.from_iterable(groups)):
        if isinstance(update, Update):
            # Without a chat, user or button press to make a key of, the handler does not take the update.
            with suppress(RuntimeError):
                key = handler._get_key(update)  # noqa: SLF001  # to be the same is what matters
                found[repr((handler.name, key))] = handler, key
    return [found[name] for name in sorted(found)]


def _persistent(handlers: Iterable[BaseHandler[Any, Any, Any]]) -> Iterator[Handler]:
    for handler in handlers:
        if isinstance(handler, ConversationHandler):
            if handler.persistent:
                yield handler
            yield from _persistent(chain(handler.entry_points, *handler.states.values(), handler.fallbacks))


def _show(handler: Handler, key: ConversationKey, state: object | None) -> None:
    """Let the handler see a conversation's state as it is stored.

    What `check_update` reads has no public name, and no hook refreshes it:
    https://github.com/python-telegram-bot/python-telegram-bot/issues/5225
    """
    states: Any = handler._conversations  # noqa: SLF001
    if hasattr(states.get(key), "task"):
        return  # a non-blocking handler is under way, or done: its state is stored when the handler has it
    untracked = states.data if isinstance(states, UserDict) else states
    if state is None:
        untracked.pop(key, None)
    else:
        untracked[key] = state


def _fields_of(data: Any) -> MutableMapping[Any, Any]:
    fields: MutableMapping[Any, Any] = data if isinstance(data, MutableMapping) else vars(data)
    return fields


def _by_encoded_name(data: Any) -> dict[str, Any]:
    return {_encoded(name): value for name, value in _fields_of(data).items()}


def _version_and_data(record: State | None) -> tuple[int, dict[str, Any]]:
    return (0, {}) if record is None or record.version is None else (record.version, record.data)


def _changes(loaded: _Loaded, data: Any) -> set[str]:
    """The encoded names of the fields that were set or removed since."""
    forms = _forms(_by_encoded_name(data))
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


def _encoded(name: Hashable) -> str:
    """The name of a field of a record: a str is its own, unless it might be mistaken for another."""
    if type(name) is str and not name.startswith("\0"):
        return name
    return "\0" + encode_key(name).hex()


def _decoded(name: str) -> Hashable:
    return decode_key(bytes.fromhex(name[1:])) if name.startswith("\0") else name


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
