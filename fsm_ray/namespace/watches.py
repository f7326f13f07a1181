"""Watches: the last changes of a shard, told to those who watch.

The changes are kept in a ring, from the first watch on until nobody watches any more. Each watch asks for
what came after the last version that it was told of; if that is gone from the ring, it is told so.
"""

from __future__ import annotations

import asyncio
import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from fsm_ray import protocol
from fsm_ray.errors import ChangesMissed, Overloaded
from fsm_ray.namespace.evaluation import Change
from fsm_ray.namespace.scans import matches
from fsm_ray.protocol import NIL, WATCH, WatchRequest, reply
from fsm_ray.record import Front, Packer, head_of
from fsm_ray.tally import ShardTally

MAX_CHANGES = 32_768
MAX_BYTES = 64 << 20
"""What the ring holds at most, keys and records together; when it is full, half of it goes."""

MAX_WATCHES = 256
"""Watches of one shard that wait at a time."""

IDLE_S = 600.0
"""How long the ring is kept when nobody watches."""

TOLD_AFTER_S = 0.002
"""How long changes are gathered before watches that wait are told: not at each of thousands a second."""

_MOST_LOOKED_AT = 512
"""Changes that are looked at for one reply; at four times as many at once, other watches wait for theirs."""

_MOST_BYTES = 1 << 18
"""Of one reply, but for its last change."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    request: WatchRequest
    since: int
    answer: Callable[[bytes], None]
    timer: asyncio.TimerHandle


class Watches:
    """The watches of one shard."""

    def __init__(self, bot_name: str, packer: Packer, clock: Callable[[], float], tally: ShardTally) -> None:
        """`clock` counts seconds."""
        self._bot_name = bot_name
        self._tally = tally
        self._packer = packer
        self._clock = clock
        self._ring: list[Change] = []
        self._begun_at: int | None = None
        """The version behind which the ring has all changes; None: nobody watches."""
        self._bytes = 0
        self._waiting: dict[int, _Waiting] = {}
        self._last_id = 0
        self._telling: asyncio.TimerHandle | None = None
        self._last_s = 0.0

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def want_changes(self) -> bool:
        """Whether `note` is to be called."""
        return self._begun_at is not None

    @property
    def have_changes(self) -> bool:
        """Whether any are in the ring; if not, versions in replies may be of commits under way."""
        return bool(self._ring)

    def handle(self, request: WatchRequest, version: int, answer: Callable[[bytes], None]) -> bytes | None:
        """The reply, or None: `answer` gets it when there are changes, or in time.

        `version` is the last one that was given out.
        """
        self._last_s = self._clock()
        if self._begun_at is None:
            self._begun_at = version
        if request.since is None:
            return self._reply(request, [], self._end)
        told, since = self._after(request.since, request)
        if told is not None:
            return told
        if len(self._waiting) >= MAX_WATCHES:
            error = Overloaded(
                f"{MAX_WATCHES} watches of this shard are open: retry later", bot=self._bot_name
            )
            self._tally.count_failed(WatchRequest, error)
            return reply(WATCH, request.number, [protocol.encode_error(error)])
        self._last_id += 1
        timer = asyncio.get_running_loop().call_later(request.wait_s, self._tell_nothing, self._last_id)
        self._waiting[self._last_id] = _Waiting(request, since, answer, timer)
        if since < self._end:
            self._tell_soon()
        return None

    def note(self, changes: Sequence[Change]) -> None:
        """Take changes into the ring."""
        if self._begun_at is None:
            return
        if changes[0].version <= self._begun_at:
            # They were on their way to the store as the first watch began.
            changes = [change for change in changes if change.version > self._begun_at]
        self._ring += changes
        self._bytes += sum(map(_size, changes))
        if len(self._ring) > MAX_CHANGES or self._bytes > MAX_BYTES:
            self._shorten()
        self._tell_soon()

    def disconnected(self, answer: Callable[[bytes], None]) -> None:
        """Forget who waited by this connection."""
        for number, waiting in tuple(self._waiting.items()):
            if waiting.answer == answer:
                waiting.timer.cancel()
                del self._waiting[number]

    def stop(self) -> None:
        """Answer nobody any more."""
        for waiting in self._waiting.values():
            waiting.timer.cancel()
        self._waiting.clear()
        if self._telling is not None:
            self._telling.cancel()
            self._telling = None

    def forget_idle(self) -> None:
        """Drop the ring if nobody watches."""
        if self._waiting:
            self._last_s = self._clock()
        elif self._last_s < self._clock() - IDLE_S:
            self._ring, self._begun_at, self._bytes = [], None, 0

    @property
    def _end(self) -> int:
        """The version up to which the ring has all changes."""
        return self._ring[-1].version if self._ring else self._begun_at or 0

    def _tell_soon(self) -> None:
        if self._waiting and self._telling is None:
            self._telling = asyncio.get_running_loop().call_later(TOLD_AFTER_S, self._tell_all)

    def _tell_all(self) -> None:
        self._telling = None
        left = 4 * _MOST_LOOKED_AT
        for number, waiting in tuple(self._waiting.items()):
            if left <= 0:
                break
            told, since = self._after(waiting.since, waiting.request)
            left -= since - waiting.since
            if told is not None:
                del self._waiting[number]
                waiting.timer.cancel()
                waiting.answer(told)
            else:
                self._waiting[number] = replace(waiting, since=since)
        if any(waiting.since < self._end for waiting in self._waiting.values()):
            self._tell_soon()

    def _tell_nothing(self, number: int) -> None:
        waiting = self._waiting.pop(number)
        waiting.answer(self._reply(waiting.request, [], waiting.since))

    def _after(self, since: int, request: WatchRequest) -> tuple[bytes | None, int]:
        """The reply with changes after this version that are asked for, if there are any.

        And the version up to which changes were looked at.
        """
        if not (self._begun_at or 0) <= since <= self._end:
            return self._missed(request), since
        first = bisect.bisect_right(self._ring, since, key=_version)
        told: list[bytes] = []
        size = 0
        for change in self._ring[first : first + _MOST_LOOKED_AT]:
            before, after = self._front(change.before), self._front(change.after)
            since = change.version
            if (before and matches(before, request.flow, request.state)) or (
                after and matches(after, request.flow, request.state)
            ):
                record = NIL if change.after is None else self._packer.blob(change.after)
                told.append(protocol.encode_change(since, change.key, before, record))
                size += len(told[-1])
                if size > _MOST_BYTES:
                    break
        return (self._reply(request, told, since) if told else None), since

    def _front(self, packed: bytes | None) -> Front | None:
        return None if packed is None else self._packer.front(head_of(packed))

    def _reply(self, request: WatchRequest, told: list[bytes], since: int) -> bytes:
        return reply(WATCH, request.number, [*told, protocol.encode_result(since)])

    def _missed(self, request: WatchRequest) -> bytes:
        error = ChangesMissed(
            f"changes after version {request.since} are not remembered any more: scan for what there is, and "
            "watch on with since= the position in this error",
            bot=self._bot_name,
            version=self._end,
        )
        self._tally.count_failed(WatchRequest, error)
        return reply(WATCH, request.number, [protocol.encode_error(error)])

    def _shorten(self) -> None:
        """Drop the oldest changes, so many that it need not be done again soon."""
        count = max(len(self._ring) - MAX_CHANGES // 2, 0)
        dropped = sum(map(_size, self._ring[:count]))
        while self._bytes - dropped > MAX_BYTES // 2:
            dropped += _size(self._ring[count])
            count += 1
        self._begun_at = self._ring[count - 1].version
        del self._ring[:count]
        self._bytes -= dropped


def _version(change: Change) -> int:
    return change.version


def _size(change: Change) -> int:
    return len(change.key) + len(change.before or b"") + len(change.after or b"")
