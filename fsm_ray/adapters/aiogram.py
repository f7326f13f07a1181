"""RayStorage: aiogram's FSM storage, kept in fsm_ray.

One conversation is one record, so state and data never part; `update_data` is one atomic step. Setting a
state, and emptying the data, read the record and write it only if it is still the same, again until nobody
was faster. As in aiogram, a conversation that has neither state nor data is gone: it leaves no record.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from contextlib import suppress
from typing import Any

from fsm_ray.errors import MissingExtra, VersionConflict
from fsm_ray.state import State
from fsm_ray.storage import AsyncStorage

try:
    from aiogram.exceptions import DataNotDictLikeError
    from aiogram.fsm.state import State as StateOfGroup
    from aiogram.fsm.storage.base import BaseStorage, StateType, StorageKey
except ModuleNotFoundError as error:
    raise MissingExtra(
        f"RayStorage needs {error.name!r}, which is not installed: pip install 'fsm-ray[aiogram]'"
    ) from error


class RayStorage(BaseStorage):
    """Keeps the conversations of an aiogram 3 dispatcher in the namespace of a bot.

    The bot must have been made by `init` of a `Storage` or `AsyncStorage`. Whatever their methods raise,
    these raise too.

    >>> from aiogram import Dispatcher
    >>> dispatcher = Dispatcher(storage=RayStorage("my_bot"))
    """

    def __init__(self, bot_name: str, storage: AsyncStorage | None = None) -> None:
        """Nothing is opened yet.

        Args:
            bot_name: the bot, as `init` made it.
            storage: to operate with; it stays the caller's to close. None: one of its own.
        """
        self._bot_name = bot_name
        self._storage = AsyncStorage() if storage is None else storage
        self._owns_storage = storage is None

    async def set_state(self, key: StorageKey, state: StateType = None) -> None:
        """Set the conversation's state and keep its data; `None` takes the state away."""
        await self._change(key, state=state.state if isinstance(state, StateOfGroup) else state)

    async def get_state(self, key: StorageKey) -> str | None:
        """The conversation's state, or None when it has none."""
        record = await self._storage.get_state(self._bot_name, record_key(key))
        return None if record is None else record.state

    async def set_data(self, key: StorageKey, data: Mapping[str, Any]) -> None:
        """Replace the conversation's data and keep its state.

        Raises:
            DataNotDictLikeError: data is no mapping.
        """
        _check_mapping(data)
        if data:
            await self._storage.set_data(self._bot_name, record_key(key), data)
        else:
            await self._change(key, data={})

    async def get_data(self, key: StorageKey) -> dict[str, Any]:
        """The conversation's data, {} when it has none."""
        return await self._storage.get_data(self._bot_name, record_key(key)) or {}

    async def update_data(self, key: StorageKey, data: Mapping[str, Any]) -> dict[str, Any]:
        """Merge into the conversation's data and return the result; concurrent updates lose nothing.

        Raises:
            DataNotDictLikeError: data is no mapping.
        """
        _check_mapping(data)
        if not data:
            return await self.get_data(key)
        return await self._storage.update_data(self._bot_name, record_key(key), data)

    async def close(self) -> None:
        """Close the connections, unless the storage was given; the conversations stay."""
        if self._owns_storage:
            await self._storage.close()

    async def _change(self, key: StorageKey, **fields: Any) -> None:
        """Change fields of the record by compare and set, until nobody else was faster."""
        is_done = False
        while not is_done:
            with suppress(VersionConflict):
                await self._change_once(record_key(key), fields)
                is_done = True

    async def _change_once(self, key: Hashable, fields: dict[str, Any]) -> None:
        record = await self._storage.get_state(self._bot_name, key)
        before = State(version=0) if record is None else record
        after = before.model_copy(update=fields)
        if after.state is not None or after.data:
            await self._storage.set_state(self._bot_name, key, after, expected_version=before.version)
        elif record is not None:
            await self._storage.clear(self._bot_name, key, expected_version=record.version)


def record_key(key: StorageKey) -> tuple[int, int, int, int | None, str | None, str]:
    """The key of the conversation's record: all that aiogram tells conversations apart by.

    >>> record_key(StorageKey(bot_id=1, chat_id=-100, user_id=7))
    (1, -100, 7, None, None, 'default')
    """
    return (
        key.bot_id,
        key.chat_id,
        key.user_id,
        key.thread_id,
        key.business_connection_id,
        key.destiny,
    )


def _check_mapping(data: object) -> None:
    if not isinstance(data, Mapping):
        raise DataNotDictLikeError(f"data must be a dict or another mapping, not {type(data).__name__}")
