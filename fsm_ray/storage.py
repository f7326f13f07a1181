"""Storage and AsyncStorage: conversation state of bots, scoped by bot name and key.

The same operations twice, blocking and as coroutines. Each is atomic, and linearizable per key. When a write
returns, it is in the bot's store. A read never creates a record, and nothing returned is shared with what is
stored.
"""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping
from threading import get_ident
from typing import Any, Literal, Self, TypeVar

from fsm_ray.errors import InvalidInput, StorageClosed
from fsm_ray.options import BotOptions, check_bot_name, make_options
from fsm_ray.protocol import ContentView, RecordView
from fsm_ray.routing.blocking import BlockingBot
from fsm_ray.routing.directory import BotDescription, Directory
from fsm_ray.routing.lanes import LoopBot
from fsm_ray.routing.route import Addressed, Route
from fsm_ray.state import State

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)

Here = tuple[int, Callable[[], bool], dict[str, "LoopBot"]]
"""A thread, whether its loop is running, and the bots of that loop."""

_NOWHERE: Here = (0, bool, {})

_forked_along: weakref.WeakSet[AsyncStorage] = weakref.WeakSet()
"""The storages that have loops: a forked child inherits them, and must not use them."""


def _leave_parent() -> None:
    for storage in _forked_along:
        storage.leave_parent()


os.register_at_fork(after_in_child=_leave_parent)

Transport = Literal["auto", "ray"]
"""How operations travel: over a socket where one leads to the shard, or always as arguments of Ray calls."""

MAX_TIMEOUT_S = 300.0
"""Shards remember a write's answer for twice as long, so a resend is always recognised."""


class _Facade:
    """What both storages are made of."""

    def __init__(
        self, address: str | None = None, *, timeout_s: float = 10.0, transport: Transport = "auto"
    ) -> None:
        """Nothing is opened yet: Ray is attached to, or started on this machine, at the first operation.

        Args:
            address: of the Ray cluster, as `ray.init` takes it. None: the one this process is attached to,
                or the one on this machine, or a new one.
            timeout_s: how long an operation may take, reconnecting included; at most 300.
            transport: "ray" carries every operation in a Ray call, where no socket can be used.
        """
        if not 0 < timeout_s <= MAX_TIMEOUT_S:
            raise InvalidInput(f"timeout_s is more than 0 and at most {MAX_TIMEOUT_S:.0f}, not {timeout_s!r}")
        if transport not in ("auto", "ray"):
            raise InvalidInput(f'transport is "auto" or "ray", not {transport!r}')
        self._address = address
        self._timeout_s = timeout_s
        self._transport: Transport = transport
        self._directory = Directory(address, timeout_s)
        self._is_closed = False

    def __reduce__(self) -> tuple[Any, ...]:
        # A storage is its settings: the copy in another process makes its own connections.
        return _rebuild, (type(self), self._address, self._timeout_s, self._transport)

    def _check_open(self) -> None:
        if self._is_closed:
            raise _closed()


class Storage(_Facade):
    """Conversation state, by blocking calls. May be shared by threads; pickles into Ray tasks and actors.

    Each thread has connections of its own. A forked process makes new ones.

    >>> storage = Storage()
    >>> storage.init("doctest_bot")
    >>> storage.set_state("doctest_bot", (42, 7), State(flow="registration", state="get_name")) > 0
    True
    >>> storage.update_data("doctest_bot", (42, 7), {"name": "Ada"})
    {'name': 'Ada'}
    >>> storage.get_state("doctest_bot", (42, 7)).state
    'get_name'
    >>> storage.clear("doctest_bot", (42, 7)), storage.get_data("doctest_bot", (42, 7))
    (True, None)
    >>> storage.drop("doctest_bot")
    """

    def __init__(
        self, address: str | None = None, *, timeout_s: float = 10.0, transport: Transport = "auto"
    ) -> None:
        super().__init__(address, timeout_s=timeout_s, transport=transport)
        self._local = threading.local()
        self._bots: weakref.WeakSet[BlockingBot] = weakref.WeakSet()

    def init(self, bot_name: str, options: BotOptions | None = None, **changes: Any) -> None:
        """Make the bot's namespace actors, unless they are there. To be called by every worker, in any order.

        Args:
            bot_name: 1 to 64 letters, digits or `_ . @ -`.
            options: a BotOptions; the defaults when there is none.
            changes: fields of BotOptions, over those of `options`.

        Raises:
            OptionsConflict: the bot runs with other options; nothing was changed.
            InvalidOptions, InvalidBotName: nothing was done.
            RayUnreachable: there is no Ray, and none could be started.
            NamespaceUnavailable: an actor did not come up in time; a retry is safe.
        """
        self._check_open()
        self._directory.init(bot_name, make_options(options, changes))

    def get_state(self, bot_name: str, key: Hashable) -> State | None:
        """The conversation's flow, state, data and version, or None when it has no record.

        Raises:
            UnknownBot: the bot was never initialised.
            InvalidKey: the key cannot be encoded.
            ValueNotDecodable: a stored value needs a class that is not here.
            NamespaceUnavailable: no answer within `timeout_s`.
        """
        bot = self._bot(bot_name)
        return _to_state(bot.read_record(key))

    def set_state(
        self, bot_name: str, key: Hashable, state: State, *, expected_version: int | None = None
    ) -> int:
        """Create or overwrite the record with this flow, state and data; return its version.

        Args:
            bot_name: the bot.
            key: the conversation.
            state: what to store; its own version is ignored.
            expected_version: write only over the record of this version; 0: only when there is none.

        Raises:
            VersionConflict: the record has another version; nothing was changed.
            InvalidState, InvalidKey, InvalidData, PickleNotAllowed, RecordTooLarge: nothing was changed.
            UnknownBot: the bot was never initialised.
            NamespaceUnavailable: the shard could not be reached in time; nothing was changed.
            OutcomeUnknown: it was reached and did not answer in time; the write may have taken effect.
        """
        bot = self._bot(bot_name)
        version: int = bot.write(bot.route.set_record(key, state, expected_version))
        return version

    def get_data(self, bot_name: str, key: Hashable) -> dict[str, Any] | None:
        """The conversation's data: None when it has no record, {} when its record has no data.

        Raises:
            UnknownBot, InvalidKey, ValueNotDecodable, NamespaceUnavailable: as get_state.
        """
        bot = self._bot(bot_name)
        content = bot.read_content(key)
        return None if content is None else content.data

    def set_data(
        self, bot_name: str, key: Hashable, data: Mapping[str, Any], *, expected_version: int | None = None
    ) -> int:
        """Replace the data and keep flow and state; return the record's version.

        Where there is no record, one is made with flow and state None.

        Raises:
            VersionConflict, InvalidKey, InvalidData, PickleNotAllowed, RecordTooLarge, UnknownBot,
            NamespaceUnavailable, OutcomeUnknown: as set_state.
        """
        bot = self._bot(bot_name)
        version: int = bot.write(bot.route.set_data(key, data, expected_version))
        return version

    def update_data(
        self, bot_name: str, key: Hashable, changes: Mapping[str, Any], *, expected_version: int | None = None
    ) -> dict[str, Any]:
        """Merge changes into the data, new values winning, and return the data as it is then.

        The merge is shallow and one atomic step: concurrent updates never lose each other's fields. Where
        there is no record, one is made with flow and state None.

        Raises:
            VersionConflict, InvalidKey, InvalidData, PickleNotAllowed, RecordTooLarge, UnknownBot,
            NamespaceUnavailable, OutcomeUnknown: as set_state.
        """
        bot = self._bot(bot_name)
        content: ContentView = bot.write(bot.route.update_data(key, changes, expected_version))
        return content.data

    def clear(self, bot_name: str, key: Hashable, *, expected_version: int | None = None) -> bool:
        """Remove flow, state and data. True if there was a record; without one, nothing happens.

        Raises:
            VersionConflict, InvalidKey, UnknownBot, NamespaceUnavailable, OutcomeUnknown: as set_state.
        """
        bot = self._bot(bot_name)
        was_there: bool = bot.write(bot.route.clear(key, expected_version))
        return was_there

    def get_many(self, bot_name: str, keys: Iterable[Hashable]) -> list[State | None]:
        """As get_state, of each of the keys, in their order. They travel together.

        Each is read by itself: a write that is made meanwhile may be seen in some and not yet in others.

        Raises:
            UnknownBot, InvalidKey, ValueNotDecodable, NamespaceUnavailable: as get_state.
        """
        return [_to_state(record) for record in self._bot(bot_name).read_records(keys)]

    def set_many(self, bot_name: str, states: Mapping[K, State]) -> list[int]:
        """As set_state, of each of the keys; return their versions, in the same order. They travel together.

        Each is stored by itself, and all are tried, though one fails. Calling it again is safe.

        Raises:
            InvalidState, InvalidKey, InvalidData, PickleNotAllowed: nothing was changed.
            RecordTooLarge, UnknownBot, NamespaceUnavailable, OutcomeUnknown: as set_state, of the first that
                failed; others may have been stored.
        """
        bot = self._bot(bot_name)
        return bot.write_many(_set_each(bot.route, states))

    def bots(self) -> list[str]:
        """The names of the bots on this cluster, sorted.

        Raises:
            RayUnreachable: there is no Ray, and none could be started.
        """
        self._check_open()
        return self._directory.bots()

    def describe(self, bot_name: str) -> BotDescription:
        """The bot's options, and where its shards are and what they hold.

        Raises:
            UnknownBot, NamespaceUnavailable
        """
        self._check_open()
        return self._directory.describe(bot_name)

    def drop(self, bot_name: str) -> None:
        """End the bot's actors. Records in memory go with them.

        Raises:
            UnknownBot, NamespaceUnavailable
        """
        self._check_open()
        self._directory.drop(bot_name)

    def close(self) -> None:
        """Close the connections of all threads. The bots live on."""
        self._is_closed = True
        for bot in tuple(self._bots):
            bot.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _bot(self, bot_name: str) -> BlockingBot:
        self._check_open()
        bots: dict[str, BlockingBot] = self._local.__dict__
        bot = bots.get(bot_name)
        if bot is None:
            check_bot_name(bot_name)
            by_socket = self._transport == "auto"
            route = Route(bot_name, self._directory.options(bot_name))
            bot = BlockingBot(
                self._directory, route, self._timeout_s, lambda: self._forget(bot_name), by_socket=by_socket
            )
            bots[bot_name] = bot
            self._bots.add(bot)
        return bot

    def _forget(self, bot_name: str) -> None:
        self._directory.forget(bot_name)
        self._local.__dict__.pop(bot_name, None)


class AsyncStorage(_Facade):
    """Conversation state, by coroutines: the methods of `Storage`, awaited.

    Operations of concurrent tasks travel together. Connections belong to the event loop that is running, so
    one AsyncStorage serves any number of loops, one after another or in several threads. An operation that
    is cancelled may still take effect.
    """

    def __init__(
        self, address: str | None = None, *, timeout_s: float = 10.0, transport: Transport = "auto"
    ) -> None:
        super().__init__(address, timeout_s=timeout_s, transport=transport)
        # One attribute, so that threads never see half of a change.
        self._here = _NOWHERE
        self._loops: dict[asyncio.AbstractEventLoop, dict[str, LoopBot]] = {}
        self._keepers: dict[asyncio.AbstractEventLoop, asyncio.Task[None]] = {}

    async def init(self, bot_name: str, options: BotOptions | None = None, **changes: Any) -> None:
        """See `Storage.init`."""
        self._check_open()
        await self._in_thread(self._directory.init, bot_name, make_options(options, changes))

    async def get_state(self, bot_name: str, key: Hashable) -> State | None:
        """See `Storage.get_state`."""
        bot = self._bots().get(bot_name) or await self._resolve(bot_name)
        return _to_state(await bot.read_record(key))

    async def set_state(
        self, bot_name: str, key: Hashable, state: State, *, expected_version: int | None = None
    ) -> int:
        """See `Storage.set_state`."""
        bot = self._bots().get(bot_name) or await self._resolve(bot_name)
        version: int = await bot.write(bot.route.set_record(key, state, expected_version))
        return version

    async def get_data(self, bot_name: str, key: Hashable) -> dict[str, Any] | None:
        """See `Storage.get_data`."""
        bot = self._bots().get(bot_name) or await self._resolve(bot_name)
        content = await bot.read_content(key)
        return None if content is None else content.data

    async def set_data(
        self, bot_name: str, key: Hashable, data: Mapping[str, Any], *, expected_version: int | None = None
    ) -> int:
        """See `Storage.set_data`."""
        bot = self._bots().get(bot_name) or await self._resolve(bot_name)
        version: int = await bot.write(bot.route.set_data(key, data, expected_version))
        return version

    async def update_data(
        self, bot_name: str, key: Hashable, changes: Mapping[str, Any], *, expected_version: int | None = None
    ) -> dict[str, Any]:
        """See `Storage.update_data`."""
        bot = self._bots().get(bot_name) or await self._resolve(bot_name)
        return (await bot.update_data(key, changes, expected_version)).data

    async def clear(self, bot_name: str, key: Hashable, *, expected_version: int | None = None) -> bool:
        """See `Storage.clear`."""
        bot = self._bots().get(bot_name) or await self._resolve(bot_name)
        was_there: bool = await bot.write(bot.route.clear(key, expected_version))
        return was_there

    async def get_many(self, bot_name: str, keys: Iterable[Hashable]) -> list[State | None]:
        """See `Storage.get_many`."""
        bot = self._bots().get(bot_name) or await self._resolve(bot_name)
        return [_to_state(record) for record in await bot.read_records(keys)]

    async def set_many(self, bot_name: str, states: Mapping[K, State]) -> list[int]:
        """See `Storage.set_many`."""
        bot = self._bots().get(bot_name) or await self._resolve(bot_name)
        return await bot.write_many(_set_each(bot.route, states))

    async def bots(self) -> list[str]:
        """See `Storage.bots`."""
        self._check_open()
        return await self._in_thread(self._directory.bots)

    async def describe(self, bot_name: str) -> BotDescription:
        """See `Storage.describe`."""
        self._check_open()
        return await self._in_thread(self._directory.describe, bot_name)

    async def drop(self, bot_name: str) -> None:
        """See `Storage.drop`."""
        self._check_open()
        await self._in_thread(self._directory.drop, bot_name)

    async def close(self) -> None:
        """Close the connections of all loops; operations that wait raise StorageClosed. The bots live on."""
        self._is_closed = True
        self._here = _NOWHERE
        for loop, keeper in tuple(self._keepers.items()):
            if loop is asyncio.get_running_loop():
                keeper.cancel()
                await asyncio.wait([keeper])
            elif not loop.is_closed():
                loop.call_soon_threadsafe(keeper.cancel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _bots(self) -> dict[str, LoopBot]:
        """The bots of the running loop.

        Whether that is still the loop that was met last, is told by its thread and by its running: two loops
        do not run in one thread at once. Asking asyncio costs a getpid(2) each time.
        """
        thread_id, is_running, bots = self._here
        return bots if thread_id == get_ident() and is_running() else self._enter()

    def _enter(self) -> dict[str, LoopBot]:
        self._check_open()
        loop = asyncio.get_running_loop()
        bots = self._loops.get(loop)
        if bots is None:
            bots = self._loops[loop] = {}
            self._keepers[loop] = loop.create_task(self._keep(loop, bots))
        self._here = (get_ident(), loop.is_running, bots)
        _forked_along.add(self)
        return bots

    def leave_parent(self) -> None:
        """Forget the loops and connections of the process that this one was forked from."""
        self._here = _NOWHERE
        self._loops, self._keepers = {}, {}

    async def _keep(self, loop: asyncio.AbstractEventLoop, bots: dict[str, LoopBot]) -> None:
        """Close the loop's connections when the loop ends, which cancels its tasks, or the storage closes."""
        try:
            await asyncio.Event().wait()
        finally:
            if self._here[2] is bots:
                self._here = _NOWHERE
            del self._loops[loop], self._keepers[loop]
            for bot in bots.values():
                bot.close(_closed)

    async def _resolve(self, bot_name: str) -> LoopBot:
        check_bot_name(bot_name)
        options = await self._in_thread(self._directory.options, bot_name)
        bots = self._bots()
        if bot_name not in bots:
            bots[bot_name] = LoopBot(
                self._directory,
                Route(bot_name, options),
                self._timeout_s,
                lambda: self._forget(bots, bot_name),
                by_socket=self._transport == "auto",
            )
        return bots[bot_name]

    def _forget(self, bots: dict[str, LoopBot], bot_name: str) -> None:
        self._directory.forget(bot_name)
        bots.pop(bot_name, None)

    async def _in_thread(self, function: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(None, function, *args)


def _to_state(record: RecordView | None) -> State | None:
    if record is None:
        return None
    return State(
        flow=record.flow, state=record.state, data=record.content.data, version=record.content.version
    )


def _set_each(route: Route, states: Mapping[K, State]) -> list[Addressed]:
    return [route.set_record(key, state, None) for key, state in states.items()]


def _closed() -> StorageClosed:
    return StorageClosed("this storage was closed: make a new one")


def _rebuild(kind: type[Any], address: str | None, timeout_s: float, transport: Transport) -> Any:
    return kind(address, timeout_s=timeout_s, transport=transport)
