"""Copying: a conversation under another key, by awaiting a bot; see `Storage.copy` and `Storage.rename`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Awaitable, Coroutine, Hashable
from typing import Any, Protocol, TypeVar

from fsm_ray.errors import InvalidInput, NamespaceUnavailable, OutcomeUnknown, VersionConflict
from fsm_ray.protocol import RecordView
from fsm_ray.record import NEVER_MS
from fsm_ray.routing.blocking import BlockingBot
from fsm_ray.routing.route import Addressed, Route

T = TypeVar("T")


class Bot(Protocol):
    """What copying needs of a bot."""

    route: Route

    def read_record(self, key: Hashable) -> Awaitable[RecordView | None]: ...
    def write(self, addressed: Addressed) -> Awaitable[Any]: ...


class Immediate:
    """A blocking bot that can be awaited: what it does is done at once, without a loop."""

    def __init__(self, bot: BlockingBot) -> None:
        self.route = bot.route
        self._bot = bot

    async def read_record(self, key: Hashable) -> RecordView | None:
        return self._bot.read_record(key)

    async def write(self, addressed: Addressed) -> Any:
        return self._bot.write(addressed)


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that awaits nothing but an `Immediate`."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    raise RuntimeError("it waits for something")


async def copy(bot: Bot, key: Hashable, new_key: Hashable, *, overwrite: bool) -> bool:
    """See `Storage.copy`."""
    _check_different(bot.route, key, new_key)
    record = await bot.read_record(key)
    if record is None:
        return False
    try:
        await bot.write(_put(bot.route, new_key, record, None if overwrite else 0))
    except VersionConflict as error:
        raise _taken(error, new_key) from error
    return True


async def rename(bot: Bot, key: Hashable, new_key: Hashable, *, overwrite: bool, timeout_s: float) -> bool:
    """See `Storage.rename`."""
    _check_different(bot.route, key, new_key)
    is_one_shard = bot.route.read(key)[0] == bot.route.read(new_key)[0]
    move = _move_within if is_one_shard else _move_across
    deadline = time.monotonic() + timeout_s
    while (record := await bot.read_record(key)) is not None:
        try:
            await move(bot, key, new_key, record, overwrite=overwrite)
        except VersionConflict as error:
            if error.expected_version == 0 and not overwrite:
                raise _taken(error, new_key) from error
            if time.monotonic() >= deadline:
                raise
        else:
            return True
    return False


async def _move_within(
    bot: Bot, key: Hashable, new_key: Hashable, record: RecordView, *, overwrite: bool
) -> None:
    """Move the record in one step of its shard, if it is still the same."""
    route = bot.route
    shard, put = _put(route, new_key, record, None if overwrite else 0)
    _, clear = route.clear(key, record.content.version)
    await bot.write((shard, route.transact((put, clear))))


async def _move_across(
    bot: Bot, key: Hashable, new_key: Hashable, record: RecordView, *, overwrite: bool
) -> None:
    """Move the record to another shard, if it is still the same; if not, leave things as they were."""
    route = bot.route
    replaced = await bot.read_record(new_key) if overwrite else None
    written = await bot.write(_put(route, new_key, record, _version(replaced)))
    try:
        try:
            await bot.write(route.clear(key, record.content.version))
        except VersionConflict:
            undo = (
                route.clear(new_key, written) if replaced is None else _put(route, new_key, replaced, written)
            )
            # Whoever wrote there meanwhile had seen the record, and keeps it.
            with contextlib.suppress(VersionConflict):
                await bot.write(undo)
            raise
    except NamespaceUnavailable as error:
        raise OutcomeUnknown(
            f"rename was not finished in time: {new_key!r} has the record, and {key!r} may still have it; "
            "read both, then decide",
            bot=route.bot_name,
            key=key,
            timeout_s=error.timeout_s,
        ) from error


def _put(route: Route, key: Hashable, record: RecordView, expected_version: int | None) -> Addressed:
    """The operation that stores the record as it was read; with its time to live, unless the bot gives it."""
    return route.put_record(key, record, expected_version, kept_ttl_ms(route, record))


def kept_ttl_ms(route: Route, record: RecordView) -> int | None:
    """The time to live that a write has to give so that the record's own goes on; None: it has none."""
    content = record.content
    if route.options.ttl_mode == "absolute" and content.deadline_ms != NEVER_MS:
        return max(1, content.deadline_ms - int(time.time() * 1_000))
    return content.ttl_ms or None


def _version(record: RecordView | None) -> int:
    """What a write over this record expects."""
    return 0 if record is None else record.content.version


def _check_different(route: Route, key: Hashable, new_key: Hashable) -> None:
    if route.read(key) == route.read(new_key):
        raise InvalidInput(f"the new key is the old one, {key!r}: give another", bot=route.bot_name, key=key)


def _taken(error: VersionConflict, new_key: Hashable) -> VersionConflict:
    return VersionConflict(
        f"{new_key!r} has a record already, of version {error.actual_version}; nothing was changed: "
        "overwrite=True replaces it",
        bot=error.bot,
        key=new_key,
        expected_version=0,
        actual_version=error.actual_version,
    )
