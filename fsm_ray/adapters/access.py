"""BotAccess: one bot of an AsyncStorage, initialised when it is first used."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from fsm_ray.options import BotOptions, check_bot_name, make_options
from fsm_ray.storage import AsyncStorage


class BotAccess:
    """Whoever needs the bot, awaits `ready` first, from one event loop at a time.

    With options, that initialises the bot, once, however many ask at the same time; one failure is told to
    all of them, and the next to ask tries again. Without options, the bot must be there.

    Raises:
        InvalidBotName, InvalidOptions: it can have no such name, or options.
    """

    def __init__(
        self,
        name: str,
        storage: AsyncStorage | None,
        options: BotOptions | None,
        changes: Mapping[str, Any],
    ) -> None:
        self.name = check_bot_name(name)
        self.options = chosen_options(options, changes)
        self.storage = AsyncStorage() if storage is None else storage
        self._owns_storage = storage is None
        self._is_ready = self.options is None
        self._making: asyncio.Task[None] | None = None

    async def ready(self) -> AsyncStorage:
        """The storage, the bot being there.

        Raises:
            OptionsConflict, RayUnreachable, NamespaceUnavailable, StorageClosed: as `AsyncStorage.init`.
        """
        if not self._is_ready:
            if self._making is None:
                self._making = asyncio.create_task(self._make())
            # Who is cancelled stops waiting; the others do not.
            await asyncio.shield(self._making)
        return self.storage

    async def startup(self) -> None:
        """Initialise the bot, or, without options, see that it is there.

        Raises:
            UnknownBot: there are no options, and the bot was never initialised.
        """
        storage = await self.ready()
        if self.options is None:
            await storage.position(self.name)

    async def close(self) -> None:
        """Close the connections, unless the storage was given."""
        if self._owns_storage:
            await self.storage.close()

    async def reopen(self) -> None:
        """As `close`, and whoever needs the bot afterwards opens new connections."""
        if self._owns_storage:
            closing, self.storage = self.storage, AsyncStorage()
            await closing.close()

    async def _make(self) -> None:
        try:
            await self.storage.init(self.name, self.options)
            self._is_ready = True
        finally:
            self._making = None


def chosen_options(options: BotOptions | None, changes: Mapping[str, Any]) -> BotOptions | None:
    """What an adapter that was given these initialises its bot with; None: it was given none.

    Raises:
        InvalidOptions: a bot cannot have them.
    """
    return None if options is None and not changes else make_options(options, dict(changes))
