"""Transaction: writes to conversations of one shard, made together or not at all.

What is written is encoded as the method is called, and sent as one operation when the block is left.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable, Iterable, Mapping
from types import TracebackType
from typing import Any, Self

from fsm_ray.errors import AcrossShards, InvalidInput
from fsm_ray.routing.blocking import BlockingBot
from fsm_ray.routing.loop import LoopBot
from fsm_ray.routing.route import Addressed, Route
from fsm_ray.state import State


class TransactionWrites:
    """The writes of a transaction: the methods of a storage, which here return nothing.

    Each raises at once what can be told at once, and then is not part of the transaction.
    """

    def __init__(self) -> None:
        self.version: int | None = None
        """After the commit: the version of the last write."""
        self._route: Route | None = None
        self._is_open = False
        self._shard = 0
        self._operations: list[bytes] = []

    def set_state(
        self,
        key: Hashable,
        state: State,
        *,
        expected_version: int | None = None,
        ttl_s: float | None = None,
    ) -> None:
        """See `Storage.set_state`.

        Raises:
            AcrossShards: the key is on another shard than those before.
            InvalidState, InvalidKey, InvalidData, PickleNotAllowed, RecordTooLarge: as the storage.
        """
        self._add(key, self._open().set_record(key, state, expected_version, ttl_s))

    def set_data(
        self,
        key: Hashable,
        data: Mapping[str, Any],
        *,
        expected_version: int | None = None,
        ttl_s: float | None = None,
    ) -> None:
        """See `Storage.set_data`; raises as `set_state`."""
        self._add(key, self._open().set_data(key, data, expected_version, ttl_s))

    def enter_state(
        self,
        key: Hashable,
        state: str | None,
        *,
        flow: str | None = None,
        expected_version: int | None = None,
        ttl_s: float | None = None,
    ) -> None:
        """See `Storage.enter_state`; raises as `set_state`."""
        self._add(key, self._open().enter_state(key, (flow, state), expected_version, ttl_s))

    def update_data(
        self,
        key: Hashable,
        changes: Mapping[str, Any],
        *,
        expected_version: int | None = None,
        ttl_s: float | None = None,
    ) -> None:
        """See `Storage.update_data`; raises as `set_state`."""
        self._add(key, self._open().update_data(key, changes, expected_version, ttl_s))

    def patch(
        self,
        key: Hashable,
        *,
        set: Mapping[str, Any] | None = None,  # noqa: A002  # the word for it, as in the storage
        unset: Iterable[str] = (),
        increment: Mapping[str, float] | None = None,
        append: Mapping[str, Any] | None = None,
        expected_version: int | None = None,
        ttl_s: float | None = None,
    ) -> None:
        """See `Storage.patch`; raises as `set_state`."""
        self._add(
            key,
            self._open().patch(
                key,
                set_=set,
                unset=unset,
                increment=increment,
                append=append,
                expected_version=expected_version,
                ttl_s=ttl_s,
            ),
        )

    def clear(self, key: Hashable, *, expected_version: int | None = None) -> None:
        """See `Storage.clear`; raises as `set_state`."""
        self._add(key, self._open().clear(key, expected_version))

    def _enter(self, route: Route) -> None:
        if self._route is not None:
            raise InvalidInput("a transaction is entered once: call storage.transaction(...) for each one")
        self._route = route
        self._is_open = True

    def _leave(self, error: BaseException | None) -> bool:
        """Whether there is something to be committed."""
        self._is_open = False
        return error is None and bool(self._operations)

    def _commit(self, route: Route) -> Addressed:
        """All writes as one operation, by what is the bot's route now."""
        if self._route is not None:
            route.check_options(self._route.options)
        return self._shard, route.transact(self._operations)

    def _open(self) -> Route:
        if self._route is None or not self._is_open:
            raise InvalidInput(
                "a transaction takes writes inside of its block: with storage.transaction(...)"
            )
        return self._route

    def _add(self, key: Hashable, addressed: Addressed) -> None:
        shard, operation = addressed
        if self._operations and shard != self._shard:
            bot_name = self._open().bot_name
            raise AcrossShards(
                f"{key!r} is on shard {shard} of bot {bot_name!r}, and what was written before on shard "
                f"{self._shard}: make a transaction for each, or init the bot with shards=1",
                bot=bot_name,
                key=key,
                shards=(self._shard, shard),
            )
        self._shard = shard
        self._operations.append(operation)


class Transaction(TransactionWrites):
    """What `Storage.transaction` returns: enter it with `with`, once."""

    def __init__(self, bot: Callable[[], BlockingBot]) -> None:
        super().__init__()
        self._bot = bot

    def __enter__(self) -> Self:
        self._enter(self._bot().route)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._leave(error):
            bot = self._bot()
            self.version = bot.write(self._commit(bot.route))


class AsyncTransaction(TransactionWrites):
    """What `AsyncStorage.transaction` returns: enter it with `async with`, once."""

    def __init__(self, bot: Callable[[], Awaitable[LoopBot]]) -> None:
        super().__init__()
        self._bot = bot

    async def __aenter__(self) -> Self:
        self._enter((await self._bot()).route)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._leave(error):
            bot = await self._bot()
            self.version = await bot.write(self._commit(bot.route))
