"""RayEventIsolation: one update of a conversation at a time, in the whole cluster."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

from aiogram.fsm.storage.base import BaseEventIsolation, StorageKey

from fsm_ray.adapters.aiogram.access import BotAccess
from fsm_ray.adapters.aiogram.records import record_key
from fsm_ray.options import BotOptions
from fsm_ray.storage import AsyncStorage


class RayEventIsolation(BaseEventIsolation):
    """Lets updates of one conversation be handled one after the other, first come first served.

    It holds across all workers of the cluster, for as long as a handler takes, and ends at once when its
    worker dies. It excludes the turns of that conversation too.

    >>> from aiogram import Dispatcher
    >>> from fsm_ray.adapters.aiogram import RayStorage
    >>> storage = RayStorage("my_bot")
    >>> dispatcher = Dispatcher(storage=storage, events_isolation=storage.create_isolation())
    """

    def __init__(
        self,
        bot_name: str,
        storage: AsyncStorage | None = None,
        options: BotOptions | None = None,
        *,
        timeout_s: float = math.inf,
        **changes: Any,
    ) -> None:
        """Nothing is opened yet.

        Args:
            bot_name: the bot.
            storage: to operate with; it stays the caller's to close. None: one of its own.
            options: as of RayStorage, and the same. aiogram asks for the lock before it reads a state.
            timeout_s: how long an update waits for those before it. One that has waited for so long is not
                handled, so none is given up unless this says so.
            changes: fields of BotOptions, over those of `options`.

        Raises:
            InvalidOptions, InvalidBotName: a bot cannot have them.
        """
        self._bot = BotAccess(bot_name, storage, options, changes)
        self._timeout_s = timeout_s

    @asynccontextmanager
    async def lock(self, key: StorageKey) -> AsyncGenerator[None, None]:
        """Keep the conversation for as long as the block takes.

        Raises:
            TurnTimeout: others kept it for `timeout_s`.
            Overloaded: too many wait for it already.
            UnknownBot, NamespaceUnavailable: as `AsyncStorage.lock`.
        """
        storage = await self._bot.ready()
        async with storage.lock(self._bot.name, record_key(key), timeout_s=self._timeout_s):
            yield

    async def startup(self) -> None:
        """See `RayStorage.startup`."""
        await self._bot.startup()

    async def close(self) -> None:
        """Close the connections, unless the storage was given."""
        await self._bot.close()
