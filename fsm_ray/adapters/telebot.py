"""RayStateStorage and AsyncRayStateStorage: pyTelegramBotAPI's state storages, kept in fsm_ray.

One conversation is one record, and every change of it is a turn: handlers of one conversation that change it
wait for each other, anywhere in the cluster. So the `with` block of `retrieve_data` loses nothing that
another handler writes meanwhile, and a block that fails stores nothing.
"""

from __future__ import annotations

import copy
from collections.abc import AsyncGenerator, Callable, Generator, Hashable, Mapping
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

from fsm_ray.adapters.access import BotAccess, chosen_options
from fsm_ray.errors import InvalidData, InvalidState, MissingExtra, TurnLost, VersionConflict
from fsm_ray.options import BotOptions, check_bot_name
from fsm_ray.state import State
from fsm_ray.storage import AsyncStorage, Storage
from fsm_ray.turn import AsyncTurn, BlockingTurn, Turn

try:
    from telebot.asyncio_storage.base_storage import StateStorageBase as AsyncStateStorageBase
    from telebot.states import State as StateOfGroup
    from telebot.storage.base_storage import StateStorageBase
except ModuleNotFoundError as error:
    raise MissingExtra(
        f"RayStateStorage needs {error.name!r}, which is not installed: pip install 'fsm-ray[telebot]'"
    ) from error

INT_STATE = "int"
"""The flow of conversations whose state is a number: pyTelegramBotAPI tells `1` from `"1"`."""

T = TypeVar("T")


@dataclass
class _Block:
    """A `with` block of `get_interactive_data`: what its own handler does meanwhile belongs to its turn."""

    owner: object
    key: Hashable
    turn: Turn
    is_open: bool = True


_blocks: ContextVar[tuple[_Block, ...]] = ContextVar("blocks", default=())
"""The blocks that the running thread or task is in."""


class _States:
    """What both storages are made of: the methods, which the asynchronous one returns coroutines from.

    Conversations are told apart by all that pyTelegramBotAPI passes. What a handler does to its own
    conversation inside of a `with` block of `get_interactive_data` becomes part of that block.
    """

    def set_state(  # noqa: PLR0917 - pyTelegramBotAPI's signature
        self,
        chat_id: int,
        user_id: int,
        state: StateOfGroup | str | int | None,
        business_connection_id: str | None = None,
        message_thread_id: int | None = None,
        bot_id: int | None = None,
    ) -> Any:
        """Set the state and keep the data; `None` takes the state away. True.

        Raises:
            InvalidState: state is nothing of these, or a `State` outside of a `StatesGroup`, without a name.
        """
        key = record_key(chat_id, user_id, business_connection_id, message_thread_id, bot_id)
        return self._change(key, lambda turn: _set_state(turn, state))

    def get_state(
        self,
        chat_id: int,
        user_id: int,
        business_connection_id: str | None = None,
        message_thread_id: int | None = None,
        bot_id: int | None = None,
    ) -> Any:
        """The state, a `str` or `int` as it was set, or None when there is none."""
        key = record_key(chat_id, user_id, business_connection_id, message_thread_id, bot_id)
        return self._read(key, _state_in)

    def delete_state(
        self,
        chat_id: int,
        user_id: int,
        business_connection_id: str | None = None,
        message_thread_id: int | None = None,
        bot_id: int | None = None,
    ) -> Any:
        """Remove state and data. Whether there was a record."""
        key = record_key(chat_id, user_id, business_connection_id, message_thread_id, bot_id)
        return self._change(key, _delete)

    def set_data(  # noqa: PLR0917 - pyTelegramBotAPI's signature
        self,
        chat_id: int,
        user_id: int,
        key: str,
        value: Any,
        business_connection_id: str | None = None,
        message_thread_id: int | None = None,
        bot_id: int | None = None,
    ) -> Any:
        """Set one field of the data and keep the others. True.

        Raises:
            RuntimeError: there is no record: a state is set first.
        """
        whose = record_key(chat_id, user_id, business_connection_id, message_thread_id, bot_id)
        return self._change(whose, lambda turn: _set_field(turn, key, value))

    def get_data(
        self,
        chat_id: int,
        user_id: int,
        business_connection_id: str | None = None,
        message_thread_id: int | None = None,
        bot_id: int | None = None,
    ) -> Any:
        """The data, {} when there is none; a copy."""
        key = record_key(chat_id, user_id, business_connection_id, message_thread_id, bot_id)
        return self._read(key, _data_in)

    def reset_data(
        self,
        chat_id: int,
        user_id: int,
        business_connection_id: str | None = None,
        message_thread_id: int | None = None,
        bot_id: int | None = None,
    ) -> Any:
        """Empty the data and keep the state. Whether there is a record."""
        key = record_key(chat_id, user_id, business_connection_id, message_thread_id, bot_id)
        return self._change(key, lambda turn: _save(turn, {}))

    def save(  # noqa: PLR0917 - pyTelegramBotAPI's signature
        self,
        chat_id: int,
        user_id: int,
        data: Mapping[str, Any],
        business_connection_id: str | None = None,
        message_thread_id: int | None = None,
        bot_id: int | None = None,
    ) -> Any:
        """Replace the data and keep the state. False if there is no record: then nothing is stored."""
        key = record_key(chat_id, user_id, business_connection_id, message_thread_id, bot_id)
        return self._change(key, lambda turn: _save(turn, data))

    def get_interactive_data(
        self,
        chat_id: int,
        user_id: int,
        business_connection_id: str | None = None,
        message_thread_id: int | None = None,
        bot_id: int | None = None,
    ) -> Any:
        """Change the data in a `with` block, `async with` for the asynchronous storage.

        The block has the conversation for itself: other handlers that change it wait. Leaving it stores all
        in one write, where there was no record too; an exception stores nothing. A block within a block of
        the same conversation shares its data, and is stored with it.

        Raises:
            TurnTimeout: on entering: another block kept the conversation for the storage's `timeout_s`.
            TurnLost, VersionConflict: on leaving: as those of `Storage.turn`; nothing was changed.
        """
        key = record_key(chat_id, user_id, business_connection_id, message_thread_id, bot_id)
        return self._block(key)

    def _change(self, key: Hashable, change: Callable[[Turn], T]) -> Any:
        """Change the record in a turn: the one of the block that the caller is in, or one of its own."""
        raise NotImplementedError

    def _read(self, key: Hashable, view: Callable[[Turn | State | None], T]) -> Any:
        raise NotImplementedError

    def _block(self, key: Hashable) -> Any:
        raise NotImplementedError

    def _turn_here(self, key: Hashable) -> Turn | None:
        """The turn of the block that the caller is in, if it is in one."""
        for block in _blocks.get():
            if block.owner is self and block.key == key and block.is_open:
                return block.turn
        return None

    @contextmanager
    def _inside(self, key: Hashable, turn: Turn) -> Generator[dict[str, Any], None, None]:
        outer = _blocks.get()
        block = _Block(self, key, turn)
        _blocks.set((*outer, block))
        try:
            yield turn.data
        finally:
            block.is_open = False  # tasks begun inside of the block may outlive it
            _blocks.set(outer)


class RayStateStorage(_States, StateStorageBase):
    """Keeps the states of a `TeleBot` in the namespace of a bot. Whatever `Storage` raises, this raises too.

    Examples:
        >>> from telebot import TeleBot
        >>> bot = TeleBot("1:token", state_storage=RayStateStorage("my_bot", store="memory://"))
    """

    def __init__(
        self,
        bot_name: str,
        storage: Storage | None = None,
        options: BotOptions | None = None,
        **changes: Any,
    ) -> None:
        """Nothing is opened yet.

        Args:
            bot_name: the bot.
            storage: to operate with; it stays the caller's to close. None: one of its own.
            options: what to initialise the bot with, when it is first used. With none, and no changes
                either, it must have been initialised.
            changes: fields of BotOptions, over those of `options`.

        Raises:
            InvalidOptions, InvalidBotName: a bot cannot have them.
        """
        super().__init__()
        self._bot_name = check_bot_name(bot_name)
        self._storage = Storage() if storage is None else storage
        self._owns_storage = storage is None
        self._options = chosen_options(options, changes)

    def close(self) -> None:
        """Close the connections, unless the storage was given; the conversations stay."""
        if self._owns_storage:
            self._storage.close()

    def _ready(self) -> Storage:
        if (options := self._options) is not None:
            self._storage.init(self._bot_name, options)  # idempotent: threads need not agree
            self._options = None
        return self._storage

    def _change(self, key: Hashable, change: Callable[[Turn], T]) -> T:
        while True:
            # Overtaken by a write outside of turns, or by a restart; nothing was changed.
            with suppress(VersionConflict, TurnLost), self._turn(key) as turn:
                return change(turn)

    def _read(self, key: Hashable, view: Callable[[Turn | State | None], T]) -> T:
        return view(self._turn_here(key) or self._ready().get_state(self._bot_name, key))

    @contextmanager
    def _block(self, key: Hashable) -> Generator[dict[str, Any], None, None]:
        with self._turn(key) as turn, self._inside(key, turn) as data:
            yield data

    def _turn(self, key: Hashable) -> nullcontext[Turn] | BlockingTurn:
        turn = self._turn_here(key)
        return self._ready().turn(self._bot_name, key) if turn is None else nullcontext(turn)


class AsyncRayStateStorage(_States, AsyncStateStorageBase):
    """Keeps the states of an `AsyncTeleBot`: the methods of `RayStateStorage`, awaited.

    Examples:
        >>> from telebot.async_telebot import AsyncTeleBot
        >>> bot = AsyncTeleBot("1:token", state_storage=AsyncRayStateStorage("my_bot", store="memory://"))
    """

    def __init__(
        self,
        bot_name: str,
        storage: AsyncStorage | None = None,
        options: BotOptions | None = None,
        **changes: Any,
    ) -> None:
        """See `RayStateStorage`; the storage is an `AsyncStorage`."""
        super().__init__()
        self._bot = BotAccess(bot_name, storage, options, changes)

    async def close(self) -> None:
        """See `RayStateStorage.close`."""
        await self._bot.close()

    async def _change(self, key: Hashable, change: Callable[[Turn], T]) -> T:
        while True:
            # Overtaken by a write outside of turns, or by a restart; nothing was changed.
            with suppress(VersionConflict, TurnLost):
                async with await self._turn(key) as turn:
                    return change(turn)

    async def _read(self, key: Hashable, view: Callable[[Turn | State | None], T]) -> T:
        return view(self._turn_here(key) or await (await self._bot.ready()).get_state(self._bot.name, key))

    @asynccontextmanager
    async def _block(self, key: Hashable) -> AsyncGenerator[dict[str, Any], None]:
        async with await self._turn(key) as turn:
            with self._inside(key, turn) as data:
                yield data

    async def _turn(self, key: Hashable) -> nullcontext[Turn] | AsyncTurn:
        turn = self._turn_here(key)
        return (await self._bot.ready()).turn(self._bot.name, key) if turn is None else nullcontext(turn)


def record_key(
    chat_id: int,
    user_id: int,
    business_connection_id: str | None = None,
    message_thread_id: int | None = None,
    bot_id: int | None = None,
) -> tuple[int | None, int, int, int | None, str | None]:
    """The key of the conversation's record: all that pyTelegramBotAPI tells conversations apart by.

    As in its own storages, an id may be given as text, and 0 and "" are no topic and no connection.

    Examples:
        >>> record_key(-100, 7, message_thread_id=9, bot_id=1)
        (1, -100, 7, 9, None)
    """
    return (
        _number(bot_id or None),
        _number(chat_id),
        _number(user_id),
        _number(message_thread_id or None),
        business_connection_id or None,
    )


def _number(number: Any) -> Any:
    """The id that a text of digits stands for; anything else is left as it is."""
    with suppress(ValueError):
        return int(number) if isinstance(number, str) else number
    return number


def stored_state(state: object) -> tuple[str | None, str | None]:
    """The flow and state of a record that keeps this state.

    Raises:
        InvalidState: it is none.

    Examples:
        >>> stored_state("Order:size"), stored_state(1)
        ((None, 'Order:size'), ('int', '1'))
    """
    # As pyTelegramBotAPI does: whatever has a name, an Enum's member too, is stored by it.
    name: Any = getattr(state, "name", state)
    if isinstance(name, int):
        return INT_STATE, str(int(name))
    if isinstance(name, str) or state is None:
        return None, name
    raise InvalidState(f"a state is a State of a StatesGroup, a str or an int, not {state!r}")


def _set_state(turn: Turn, state: object) -> bool:
    turn.flow, turn.state = stored_state(state)
    return True


def _state_in(record: Turn | State | None) -> str | int | None:
    if record is None or record.state is None:
        return None
    return int(record.state) if record.flow == INT_STATE else record.state


def _delete(turn: Turn) -> bool:
    was_there = turn.to_state() is not None
    turn.clear_flow()
    return was_there


def _set_field(turn: Turn, name: str, value: Any) -> bool:
    if turn.to_state() is None:
        raise RuntimeError(
            f"bot {turn.bot!r} has no record {turn.key!r} to set {name!r} in: set a state first"
        )
    turn.data[name] = value
    return True


def _data_in(record: Turn | State | None) -> dict[str, Any]:
    if record is None:
        return {}
    return copy.deepcopy(record.data) if isinstance(record, Turn) else record.data


def _save(turn: Turn, data: object) -> bool:
    if not isinstance(data, Mapping):
        raise InvalidData(f"data is a dict, not {type(data).__name__}")
    if turn.to_state() is None:
        return False
    saved = dict(data)  # it may be the turn's own, which is changed in place: a block has it in its hands
    turn.data.clear()
    turn.data.update(saved)
    return True
