"""RayFSMMiddleware: a whole update in one turn: two requests, however much its handlers do.

Until they are done, what they do to their conversation happens in memory.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from types import TracebackType
from typing import Any, Self, TypeVar

from aiogram.dispatcher.middlewares.base import BaseMiddleware
from aiogram.fsm.context import FSMContext
from aiogram.fsm.middleware import FSMContextMiddleware
from aiogram.fsm.storage.base import BaseStorage, StateType, StorageKey
from aiogram.types import TelegramObject, Update

from fsm_ray.adapters.aiogram.records import check_mapping, copied, record_key, state_name
from fsm_ray.adapters.aiogram.storage import RayStorage
from fsm_ray.errors import ConfigurationError
from fsm_ray.turn import Turn

_logger = logging.getLogger(__name__)

T = TypeVar("T")

Handler = Callable[[TelegramObject, dict[str, Any]], Awaitable[Any]]


class RayFSMMiddleware(BaseMiddleware):
    """Has each update handled in a turn: one at a time of a conversation, and all or nothing.

    It stands in for aiogram's FSM middleware and isolation; handlers, filters and scenes stay as they are.
    What handlers do to `state` is committed when they are done, and dropped when they raise. They may take
    the `turn` too. Error handlers run after that: what they do to `state` is stored in turns of its own.

    Examples:
        >>> from aiogram import Dispatcher
        >>> dispatcher = Dispatcher(storage=RayStorage("my_bot"), disable_fsm=True)
        >>> _ = dispatcher.update.outer_middleware(RayFSMMiddleware(dispatcher.fsm))
    """

    def __init__(
        self, fsm: FSMContextMiddleware, *, timeout_s: float = math.inf, skips_handled: bool = False
    ) -> None:
        """To be registered before other outer middlewares of updates that use the state, such as scenes.

        Args:
            fsm: the dispatcher's own, for its storage, which is a RayStorage, and its strategy.
            timeout_s: how long an update waits for those before it, see `RayEventIsolation`.
            skips_handled: remember the updates that were handled, the last ones of each conversation, and do
                not handle one again that Telegram delivers again; `feed_update` returns None for it.

        Raises:
            ConfigurationError: the dispatcher has another storage.
        """
        if not isinstance(fsm.storage, RayStorage):
            kind = type(fsm.storage).__name__
            raise ConfigurationError(
                f"RayFSMMiddleware needs Dispatcher(storage=RayStorage(...)), not {kind}"
            )
        self._fsm = fsm
        self._storage = fsm.storage
        self._timeout_s = timeout_s
        self._skips_handled = skips_handled

    async def __call__(self, handler: Handler, event: TelegramObject, data: dict[str, Any]) -> Any:
        """Handle the update.

        Raises:
            TurnTimeout, Overloaded, UnknownBot, NamespaceUnavailable: nothing was handled.
            TurnLost, VersionConflict, InvalidInput: the handlers are done, and nothing of it was stored.
            OutcomeUnknown: they are done, and it may have been stored or not.
        """
        if "fsm_storage" in data:
            raise ConfigurationError(
                "aiogram's own FSM middleware is there too: make the Dispatcher with disable_fsm=True"
            )
        context = self._fsm.resolve_event_context(data["bot"], data)
        if context is None:
            data["fsm_storage"] = self._storage
            return await handler(event, data)
        update_id = event.update_id if self._skips_handled and isinstance(event, Update) else None
        async with TurnStorage(self._storage, context.key, self._timeout_s, update_id) as storage:
            turn = storage.turn
            if turn.was_handled:
                _logger.info("update %d was handled before, and is not handled again", update_id)
                return None
            state = FSMContext(storage, context.key)
            data.update(fsm_storage=storage, state=state, raw_state=turn.state, turn=turn)
            return await handler(event, data)


class TurnStorage(BaseStorage):
    """The storage of one update: its conversation is in a turn, any other in the RayStorage.

    The conversation's other destinies, such as the history of scenes, each get a turn as they are first used,
    which is committed before the conversation's own. When the update is handled, reads go to the RayStorage,
    and each write is a turn of its own: it waits for those who have the conversation then, and overtakes
    none.
    """

    turn: Turn
    """The conversation's own."""

    def __init__(self, storage: RayStorage, key: StorageKey, timeout_s: float, update_id: int | None) -> None:
        self._storage = storage
        self._key = key
        self._timeout_s = timeout_s
        self._update_id = update_id
        self._turns: dict[StorageKey, Turn] = {}
        self._stack = AsyncExitStack()
        self._opening = asyncio.Lock()
        self._is_over = False

    async def __aenter__(self) -> Self:
        self.turn = self._turns[self._key] = await self._begin(self._stack, self._key, self._update_id)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_over = True
        self._turns.clear()
        await self._stack.__aexit__(kind, error, traceback)

    async def set_state(self, key: StorageKey, state: StateType = None) -> None:
        """See `RayStorage.set_state`."""
        name = state_name(state)

        def step(turn: Turn) -> None:
            turn.state = name
            _forget_if_empty(turn)

        if self._has(key):
            await self._change(key, step)
        else:
            await self._storage.set_state(key, state)

    async def get_state(self, key: StorageKey) -> str | None:
        """See `RayStorage.get_state`."""
        turn = await self._turn_of(key)
        return await self._storage.get_state(key) if turn is None else turn.state

    async def set_data(self, key: StorageKey, data: Mapping[str, Any]) -> None:
        """See `RayStorage.set_data`; what the bot's options refuse is told when the turn is committed."""
        check_mapping(data)

        def step(turn: Turn) -> None:
            turn.data = copied(data)
            _forget_if_empty(turn)

        if self._has(key):
            await self._change(key, step)
        else:
            await self._storage.set_data(key, data)

    async def get_data(self, key: StorageKey) -> dict[str, Any]:
        """See `RayStorage.get_data`; a copy."""
        turn = await self._turn_of(key)
        return await self._storage.get_data(key) if turn is None else copied(turn.data)

    async def update_data(self, key: StorageKey, data: Mapping[str, Any]) -> dict[str, Any]:
        """See `RayStorage.update_data`; what the bot's options refuse is told when the turn is committed."""
        check_mapping(data)

        def step(turn: Turn) -> dict[str, Any]:
            turn.data.update(copied(data))
            return copied(turn.data)

        if self._has(key):
            return await self._change(key, step)
        return await self._storage.update_data(key, data)

    async def close(self) -> None:
        """Nothing: the RayStorage is the dispatcher's to close."""

    def _has(self, key: StorageKey) -> bool:
        """Whether it is the update's conversation, in any destiny."""
        return key is self._key or replace(key, destiny=self._key.destiny) == self._key

    async def _turn_of(self, key: StorageKey) -> Turn | None:
        """The open turn that has this conversation; None: it is another one's, or the update is handled."""
        turn = self._turns.get(key)
        if turn is not None or not self._has(key):
            return turn
        # Once for tasks that a handler started side by side: a second turn would wait for the first.
        async with self._opening:
            if key not in self._turns and not self._is_over:
                turn = await self._begin(self._stack, key)
                if self._is_over:
                    await self._stack.aclose()  # the update did not wait for this task
                else:
                    self._turns[key] = turn
            return self._turns.get(key)

    async def _change(self, key: StorageKey, step: Callable[[Turn], T]) -> T:
        """Take the step in the open turn, or in one of its own when the update is handled."""
        turn = await self._turn_of(key)
        if turn is not None:
            return step(turn)
        async with AsyncExitStack() as stack:
            return step(await self._begin(stack, key))

    async def _begin(self, stack: AsyncExitStack, key: StorageKey, update_id: int | None = None) -> Turn:
        """A turn that ends with the stack."""
        storage = await self._storage.ready()
        turn = await stack.enter_async_context(
            storage.turn(
                self._storage.bot_name, record_key(key), timeout_s=self._timeout_s, update_id=update_id
            )
        )
        turn.ttl_s = self._storage.ttl_s
        return turn


def _forget_if_empty(turn: Turn) -> None:
    """Leave no record of a conversation that has neither state nor data."""
    if turn.state is None and not turn.data:
        turn.clear_flow()
