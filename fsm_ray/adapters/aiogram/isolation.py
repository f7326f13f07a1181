"""RayEventIsolation: one update of a conversation at a time, in the whole cluster."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Hashable
from contextlib import AbstractAsyncContextManager
from typing import Any, NamedTuple

from aiogram.fsm.storage.base import BaseEventIsolation, StorageKey

from fsm_ray.adapters.access import BotAccess
from fsm_ray.adapters.aiogram.records import record_key
from fsm_ray.options import BotOptions
from fsm_ray.storage import AsyncStorage
from fsm_ray.turn import AsyncTurn


class Granted(NamedTuple):
    """The state of a conversation at the moment that it was locked, and the task that locked it."""

    key: Hashable
    task: asyncio.Task[Any] | None
    state: str | None


class GrantedState:
    """The state that came with a lock, for the task that has it to read in the same step of its event loop.

    aiogram reads the state as soon as it has the lock; this saves that request.
    """

    def __init__(self) -> None:
        self._granted: Granted | None = None

    def put(self, key: Hashable, state: str | None) -> None:
        """Have the state of this conversation ready until the running step ends."""
        self._granted = Granted(key, asyncio.current_task(), state)
        asyncio.get_running_loop().call_soon(self._forget)

    def take(self, key: Hashable) -> Granted | None:
        """What there is of this conversation, for this task, once."""
        granted = self._granted
        if granted is None or granted[:2] != (key, asyncio.current_task()):
            return None
        self._granted = None
        return granted

    def _forget(self) -> None:
        self._granted = None


class RayEventIsolation(BaseEventIsolation):
    """Lets updates of one conversation be handled one after the other, first come first served.

    It holds across all workers of the cluster, for as long as a handler takes. When a worker dies, its lock
    is free at once; 30 s later where operations travel as Ray calls. It excludes the turns of that
    conversation too.

    Examples:
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
        self.granted = GrantedState()
        """The state of the conversation that was locked in this very moment."""

    # A context manager as aiogram's, but for the cost of a generator.
    def lock(self, key: StorageKey) -> AbstractAsyncContextManager[None]:  # type: ignore[override]
        """Keep the conversation for as long as an `async with` block takes.

        Raises:
            TurnTimeout: as the block is entered: others kept it for `timeout_s`.
            Overloaded: as the block is entered: too many wait for it already.
            ValueNotDecodable, UnknownBot, NamespaceUnavailable: as the block is entered: as
                `AsyncStorage.lock`.
        """
        return _Lock(self._bot, key, self._timeout_s, self.granted)

    async def startup(self) -> None:
        """See `RayStorage.startup`."""
        await self._bot.startup()

    async def close(self) -> None:
        """Close the connections, unless the storage was given."""
        await self._bot.close()


class _Lock(AbstractAsyncContextManager[None]):
    _turn: AsyncTurn

    def __init__(self, bot: BotAccess, key: StorageKey, timeout_s: float, granted: GrantedState) -> None:
        self._bot = bot
        self._key = record_key(key)
        self._timeout_s = timeout_s
        self._granted = granted

    async def __aenter__(self) -> None:
        storage = await self._bot.ready()
        self._turn = storage.turn(self._bot.name, self._key, timeout_s=self._timeout_s)
        turn = await self._turn.__aenter__()
        self._granted.put(self._key, turn.state)

    async def __aexit__(self, *_: object) -> None:
        self._turn.end()
