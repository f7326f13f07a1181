"""RayApplication: an application of python-telegram-bot that shares its bot with other processes.

It stores at the end of each update, and handles an update in turns of the conversations that it belongs to:
any number of processes may share one bot's updates. A turn ends when its process dies.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterable, Iterator
from contextlib import AsyncExitStack, suppress
from itertools import chain
from typing import Any

from telegram import Update
from telegram.ext import Application, BaseHandler, ConversationHandler

from fsm_ray.adapters.telegram.persistence import RayPersistence
from fsm_ray.adapters.telegram.records import ConversationKey
from fsm_ray.errors import ConfigurationError, FsmRayError

Handler = ConversationHandler[Any]


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
