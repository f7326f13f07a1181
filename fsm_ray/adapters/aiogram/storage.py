"""RayStorage: aiogram's FSM storage, kept in fsm_ray.

One conversation is one record, so state and data never part; each method is one atomic step. Taking the
state away, and emptying the data, read the record and write it only if it is still the same, again until
nobody was faster: as in aiogram, a conversation that has neither state nor data is gone, without a record.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any

from aiogram.fsm.storage.base import BaseStorage, StateType, StorageKey

from fsm_ray.adapters.access import BotAccess
from fsm_ray.adapters.aiogram.isolation import GrantedState, RayEventIsolation
from fsm_ray.adapters.aiogram.records import check_mapping, record_key, state_name
from fsm_ray.errors import InvalidOptions, VersionConflict
from fsm_ray.options import BotOptions
from fsm_ray.state import State
from fsm_ray.storage import AsyncStorage

Ttl = float | timedelta
"""A time to live; a number counts seconds."""


class RayStorage(BaseStorage):
    """Keeps the conversations of an aiogram 3 dispatcher in the namespace of a bot.

    Whatever the methods of `AsyncStorage` raise, these raise too.

    Examples:
        >>> from aiogram import Dispatcher
        >>> dispatcher = Dispatcher(storage=RayStorage("my_bot", shards=2, state_ttl=3600, data_ttl=3600))
    """

    def __init__(
        self,
        bot_name: str,
        storage: AsyncStorage | None = None,
        options: BotOptions | None = None,
        *,
        state_ttl: Ttl | None = None,
        data_ttl: Ttl | None = None,
        **changes: Any,
    ) -> None:
        """Nothing is opened yet.

        Args:
            bot_name: the bot.
            storage: to operate with; it stays the caller's to close. None: one of its own.
            options: what to initialise the bot with, at `startup` or when it is first used. With none, and
                no changes either, it must have been initialised.
            state_ttl: how long a conversation lives after a write, together with data_ttl. State and data are
                one record, which ends as a whole: after the longer one of the two.
            data_ttl: likewise.
            changes: fields of BotOptions, over those of `options`.

        Raises:
            InvalidOptions: the bot cannot have these options; or a time to live is not above 0, or is
                given for the state or the data alone.
            InvalidBotName: a bot cannot have this name.
        """
        self._bot = BotAccess(bot_name, storage, options, changes)
        self._granted = GrantedState()
        self.ttl_s = _ttl_s(state_ttl, data_ttl)
        """How long a conversation lives after a write, in seconds; None: as the options of the bot say."""

    @property
    def bot_name(self) -> str:
        """The bot."""
        return self._bot.name

    async def startup(self) -> None:
        """Make a bot that cannot be used fail before its first update: `dispatcher.startup.register` this.

        Raises:
            UnknownBot: there are no options, and the bot was never initialised.
            OptionsConflict, RayUnreachable, NamespaceUnavailable: as `AsyncStorage.init`.
        """
        await self._bot.startup()

    async def ready(self) -> AsyncStorage:
        """What this operates with, the bot initialised if there are options for that."""
        return await self._bot.ready()

    def create_isolation(self, *, timeout_s: float = math.inf) -> RayEventIsolation:
        """The isolation of this storage's conversations, over the same connections.

        When a worker dies, its lock is free at once; 30 s later where operations travel as Ray calls.
        """
        isolation = RayEventIsolation(
            self._bot.name, self._bot.storage, self._bot.options, timeout_s=timeout_s
        )
        isolation.granted = self._granted
        return isolation

    async def set_state(self, key: StorageKey, state: StateType = None) -> None:
        """Set the conversation's state and keep its data; `None` takes the state away."""
        name = state_name(state)
        if name is None:
            await self._change(key, state=None)
        else:
            storage = await self._bot.ready()
            await storage.enter_state(self._bot.name, record_key(key), name, ttl_s=self.ttl_s)

    async def get_state(self, key: StorageKey) -> str | None:
        """The conversation's state, or None when it has none."""
        whose = record_key(key)
        granted = self._granted.take(whose)
        if granted is not None:
            return granted.state
        storage = await self._bot.ready()
        record = await storage.get_state(self._bot.name, whose)
        return None if record is None else record.state

    async def set_data(self, key: StorageKey, data: Mapping[str, Any]) -> None:
        """Replace the conversation's data and keep its state.

        Raises:
            DataNotDictLikeError: data is no mapping.
        """
        check_mapping(data)
        if data:
            storage = await self._bot.ready()
            await storage.set_data(self._bot.name, record_key(key), data, ttl_s=self.ttl_s)
        else:
            await self._change(key, data={})

    async def get_data(self, key: StorageKey) -> dict[str, Any]:
        """The conversation's data, {} when it has none."""
        storage = await self._bot.ready()
        return await storage.get_data(self._bot.name, record_key(key)) or {}

    async def update_data(self, key: StorageKey, data: Mapping[str, Any]) -> dict[str, Any]:
        """Merge into the conversation's data and return the result; concurrent updates lose nothing.

        Raises:
            DataNotDictLikeError: data is no mapping.
        """
        check_mapping(data)
        if not data:
            return await self.get_data(key)
        storage = await self._bot.ready()
        return await storage.update_data(self._bot.name, record_key(key), data, ttl_s=self.ttl_s)

    async def close(self) -> None:
        """Close the connections, unless the storage was given; the conversations stay."""
        await self._bot.close()

    async def _change(self, key: StorageKey, **fields: Any) -> None:
        """Change fields of the record by compare and set, until nobody else was faster."""
        storage, is_done = await self._bot.ready(), False
        while not is_done:
            with suppress(VersionConflict):
                await self._change_once(storage, record_key(key), fields)
                is_done = True

    async def _change_once(self, storage: AsyncStorage, key: Hashable, fields: dict[str, Any]) -> None:
        record = await storage.get_state(self._bot.name, key)
        before = State(version=0) if record is None else record
        after = before.model_copy(update=fields)
        if after.state is not None or after.data:
            await storage.set_state(
                self._bot.name, key, after, expected_version=before.version, ttl_s=self.ttl_s
            )
        elif record is not None:
            await storage.clear(self._bot.name, key, expected_version=record.version)


def _ttl_s(state_ttl: Ttl | None, data_ttl: Ttl | None) -> float | None:
    """How long the record lives of which the state and the data have these times."""
    if state_ttl is None and data_ttl is None:
        return None
    if state_ttl is None or data_ttl is None:
        # Without the other, aiogram's RedisStorage keeps that part for ever. Here either this time would
        # mean nothing, or what has none would be lost with the rest.
        raise InvalidOptions(
            "state and data are one record, which ends as a whole: give both state_ttl and data_ttl"
        )
    both_s = [ttl.total_seconds() if isinstance(ttl, timedelta) else ttl for ttl in (state_ttl, data_ttl)]
    if not all(ttl_s > 0 for ttl_s in both_s):
        raise InvalidOptions(
            f"a time to live is more than 0 s, not state_ttl={state_ttl!r}, data_ttl={data_ttl!r}"
        )
    return max(both_s)
