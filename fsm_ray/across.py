"""Across: all conversations of a bot at once, to be gone through, counted, and watched."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections import Counter
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Generator,
    Hashable,
    Iterable,
    Iterator,
    Sequence,
)
from dataclasses import dataclass
from typing import Any, Literal

from fsm_ray import protocol
from fsm_ray.codec import encode_key
from fsm_ray.errors import (
    ChangesMissed,
    FsmRayError,
    InvalidInput,
    NamespaceUnavailable,
    Overloaded,
    PickleNotAllowed,
    ValueNotDecodable,
)
from fsm_ray.protocol import COUNT, SCAN, WATCH, ChangeView, Counted, Found, RecordView, good, state_of
from fsm_ray.record import Front
from fsm_ray.routing.asking import Asking
from fsm_ray.routing.blocking import BlockingBot
from fsm_ray.routing.directory import retry_delay_s
from fsm_ray.routing.loop import LoopBot
from fsm_ray.routing.route import Route
from fsm_ray.state import State

Position = tuple[int, ...]
"""How far a watch has come: the version of each shard."""

By = Literal["flow", "state"] | None
"""What conversations are counted by."""

_PAGE = 500
"""Conversations that travel together at most; the shard may find it enough much earlier."""

_WATCH_S = 5.0
"""How long a shard that has nothing to tell lets a watch wait, before it is asked again."""


_LAST_VERSION = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Conversation:
    """One conversation that a scan found."""

    key: Hashable
    record: RecordView
    """Its record as it came: `state` has all of it."""

    @property
    def state(self) -> State:
        """Its flow, state, data, version and expiry. Made when asked for: half of what a scan would take."""
        return state_of(self.record)


@dataclass(frozen=True, slots=True)
class Change:
    """What one write did to one conversation."""

    key: Hashable
    before: Front | None
    """Its flow and state before; None: it had no record."""
    state: State | None
    """What it is now; None: its record was cleared, or has expired."""
    version: int
    position: Position
    """Where a watch goes on that has seen this: its `since`."""


class _ShardScan:
    """The scan of one shard, page by page."""

    def __init__(self, route: Route, front: Front, after: bytes | None) -> None:
        self._decode_key = route.decode_key
        self.is_done = False
        self.is_answered = False
        """Whether the last request was: if not, the shard may be gone, and the scan with it."""
        self._id = os.urandom(16)
        self._page = 0
        self._has_begun = False
        self._front = front
        self._after = after

    def request(self, limit: int) -> Callable[[int], bytes]:
        """Makes the request for the next page; limit 0: for the end of the scan."""
        self.is_answered = False
        scan = (self._id, self._page, self._has_begun)
        return lambda number: protocol.scan_request(number, scan, self._front, self._after, limit)

    def take(self, results: Sequence[Any]) -> Iterator[Conversation]:
        """What was found; what cannot be decoded fails when it is come to."""
        *found, is_done = results
        self.is_done = good(is_done)
        self.is_answered = True
        self._page += 1
        self._has_begun |= bool(found)
        return map(self._conversation, map(good, found))

    def _conversation(self, found: Found) -> Conversation:
        return Conversation(self._decode_key(found.key), found.record)


def scan(
    find_bot: Callable[[], BlockingBot], front: Front, after: Hashable | None, limit: int | None
) -> Generator[Conversation, None, None]:
    """See `Storage.scan`.

    `find_bot` gives the bot as the calling thread sees it: an iterator may go from thread to thread.
    """
    return _scan(find_bot, _checked_front(front), _start(find_bot(), after), _checked_limit(limit))


def _scan(
    find_bot: Callable[[], BlockingBot], front: Front, start: _Start, left: float
) -> Generator[Conversation, None, None]:
    shards, after = start
    for number in shards:
        pages = _ShardScan(find_bot().route, front, after)
        try:
            while left and not pages.is_done:
                results = find_bot().shards[number].ask(SCAN, pages.request(_size(left)))
                for conversation in pages.take(results):
                    left -= 1
                    yield conversation
        finally:
            if pages.is_answered and not pages.is_done:
                # Neither a shard that is gone nor a closed storage matters any more.
                with contextlib.suppress(FsmRayError):
                    find_bot().shards[number].ask(SCAN, pages.request(0))


async def scan_async(
    find_bot: Callable[[], Awaitable[LoopBot]],
    front: Front,
    after: Hashable | None,
    limit: int | None,
    timeout_s: float,
) -> AsyncGenerator[Conversation, None]:
    """See `Storage.scan`."""
    front, left = _checked_front(front), _checked_limit(limit)
    bot = await find_bot()
    shards, after_key = _start(bot, after)
    for number in shards:
        asking, pages = bot.shards[number].asking, _ShardScan(bot.route, front, after_key)
        try:
            while left and not pages.is_done:
                results = await asking.ask(SCAN, pages.request(_size(left)), timeout_s)
                for conversation in pages.take(results):
                    left -= 1
                    yield conversation
        finally:
            if not pages.is_done:
                asking.tell(pages.request(0))


def count(bot: BlockingBot, by: By) -> int | dict[Any, int]:
    """See `Storage.count`."""
    _check_by(by)
    return _sum((shard.ask(COUNT, protocol.count_request) for shard in bot.shards), by)


async def count_async(bot: LoopBot, by: By, timeout_s: float) -> int | dict[Any, int]:
    """See `Storage.count`."""
    _check_by(by)
    asked = [shard.asking.ask(COUNT, protocol.count_request, timeout_s) for shard in bot.shards]
    return _sum(await asyncio.gather(*asked), by)


def position(bot: BlockingBot) -> Position:
    """See `Storage.position`."""
    return tuple(good(shard.ask(WATCH, _where)[0]) for shard in bot.shards)


async def position_async(bot: LoopBot, timeout_s: float) -> Position:
    """See `Storage.position`."""
    asked = [shard.asking.ask(WATCH, _where, timeout_s) for shard in bot.shards]
    return tuple([good(results[0]) for results in await asyncio.gather(*asked)])


async def watch(
    find_bot: Callable[[], Awaitable[LoopBot]], front: Front, since: Position | None, timeout_s: float
) -> AsyncGenerator[Change, None]:
    """See `AsyncStorage.watch`."""
    front = _checked_front(front)
    bot = await find_bot()
    reached = list(await position_async(bot, timeout_s) if since is None else _checked_since(since, bot))
    asked: dict[asyncio.Task[Sequence[Any]], int] = {}

    def ask(number: int) -> None:
        request = _changes(bot.shards[number].asking, front, reached[number], timeout_s)
        asked[asyncio.get_running_loop().create_task(request)] = number

    try:
        for number in range(len(bot.shards)):
            ask(number)
        while True:
            done, _ = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                number = asked.pop(task)
                for result in task.result():
                    if isinstance(result, ChangeView):
                        reached[number] = result.version
                        yield _change(bot.route, result, tuple(reached))
                    else:
                        reached[number] = _end(result, reached, number)
                ask(number)
    finally:
        for task in asked:
            task.cancel()
        # Several may have failed, and an error that nobody looks at is logged.
        await asyncio.gather(*asked, return_exceptions=True)


def _end(result: Any, reached: list[int], number: int) -> int:
    """The version up to which a shard has told everything."""
    try:
        version: int = good(result)
    except (ChangesMissed, PickleNotAllowed, ValueNotDecodable) as error:
        reached[number] = error.version or reached[number]
        error.position = tuple(reached)
        raise
    return version


async def _changes(asking: Asking, front: Front, since: int, timeout_s: float) -> Sequence[Any]:
    """The results of a watch request: asked again as long as the shard cannot be reached."""
    for attempt in itertools.count():
        try:
            return await asking.ask(
                WATCH,
                lambda number: protocol.watch_request(number, front, since, _WATCH_S),
                _WATCH_S + timeout_s,
            )
        except Overloaded:
            raise
        except NamespaceUnavailable:
            await asyncio.sleep(retry_delay_s(attempt))
    raise AssertionError  # the loop has no end


def _where(number: int) -> bytes:
    """The request for a shard's present version."""
    return protocol.watch_request(number, (None, None), None, 0.0)


_Start = tuple[range, bytes | None]
"""Where a scan begins: the shards that it goes through, and the encoded key behind which it begins."""


def _start(bot: BlockingBot | LoopBot, after: Hashable | None) -> _Start:
    if after is None:
        return range(len(bot.shards)), None
    key = encode_key(after)
    return range(bot.route.shard_of(key), len(bot.shards)), key


def _size(left: float) -> int:
    """Of the next page, when so many conversations are left to be found."""
    return int(min(left, _PAGE))


def _checked_front(front: Front) -> Front:
    for what, name in zip(("flow", "state"), front, strict=True):
        if not (name is None or isinstance(name, str)):
            raise InvalidInput(f"{what} is the name of a {what}, or None for any, not {name!r}")
    return front


def _checked_limit(limit: int | None) -> float:
    if limit is None:
        return float("inf")
    if type(limit) is not int or limit < 0:
        raise InvalidInput(f"limit is how many conversations are to be found at most, not {limit!r}")
    return limit


def _checked_since(since: object, bot: LoopBot) -> Position:
    # JSON makes a list of a tuple.
    if (
        isinstance(since, tuple | list)
        and len(since) == len(bot.shards)
        and all(type(version) is int and 0 <= version <= _LAST_VERSION for version in since)
    ):
        return tuple(since)
    raise InvalidInput(
        f"since is the position of a change of bot {bot.route.bot_name!r}, or of storage.position(...), "
        f"not {since!r}",
        bot=bot.route.bot_name,
    )


def _check_by(by: object) -> None:
    if by not in (None, "flow", "state"):
        raise InvalidInput(f'by is "flow" or "state", or None for one number, not {by!r}')


def _sum(replies: Iterable[Sequence[Counted]], by: By) -> int | dict[Any, int]:
    counts: Counter[Any] = Counter()
    for counted in replies:
        for each in map(good, counted):
            counts[each.flow if by == "flow" else (each.flow, each.state)] += each.count
    return counts.total() if by is None else dict(counts)


def _change(route: Route, view: ChangeView, reached: Position) -> Change:
    state = None if view.record is None else state_of(view.record)
    try:
        return Change(route.decode_key(view.key), view.before, state, view.version, reached)
    except ValueNotDecodable as error:
        error.position = reached
        raise
