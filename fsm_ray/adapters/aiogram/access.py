"""One bot of an AsyncStorage, initialised when it is first used, and what its users hand to each other."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable, Mapping
from typing import Any

from fsm_ray.options import BotOptions, check_bot_name, make_options
from fsm_ray.storage import AsyncStorage


class GrantedState:
    """The state that came with a lock, for the task that has it to read in the same step of its event loop.

    aiogram reads the state as soon as it has the lock; this saves that request.
    """

    def __init__(self) -> None:
        self._granted: tuple[Hashable, asyncio.Task[Any] | None, str | None] | None = None

    def put(self, key: Hashable, state: str | None) -> None:
        """Have the state of this conversation ready until the running step ends."""
        self._granted = (key, asyncio.current_task(), state)
        asyncio.get_running_loop().call_soon(self._forget)

    def is_of(self, key: Hashable) -> bool:
        """Whether there is one, of this conversation and for this task."""
        return self._granted is not None and self._granted[:2] == (key, asyncio.current_task())

    def take(self) -> str | None:
        """The state, once: `is_of` tells whether there is one."""
        state = None if self._granted is None else self._granted[2]
        self._granted = None
        return state

    def _forget(self) -> None:
        self._granted = None


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
        self.options = make_options(options, dict(changes)) if options is not None or changes else None
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

    async def _make(self) -> None:
        try:
            await self.storage.init(self.name, self.options)
            self._is_ready = True
        finally:
            self._making = None
