"""Lanes: operations of one event loop on their way to a shard and back.

A shard has a lane for each kind of request, so that a read never waits for a commit. A lane has one request
under way for each of its sessions; operations that come meanwhile wait and travel together in the next one.
That keeps their order, makes big batches under load without a timer, and leaves one answer of each session
for a shard to remember.
"""

from __future__ import annotations

import asyncio
import bisect
import functools
import itertools
import os
import random
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any, Protocol

from fsm_ray import protocol
from fsm_ray.errors import FsmRayError, Overloaded
from fsm_ray.protocol import (
    GOOD_RESULTS,
    MAX_FRAME_BYTES,
    MAX_OPERATIONS,
    TURN,
    WRITE,
    Result,
    read_request,
    turn_request,
    write_request,
)
from fsm_ray.tally import MEASURE_EVERY, ClientTally, add_waits

_ENOUGH = 8
"""Operations that are sent without waiting for more, if none are under way: client and shard then work at the
same time. Measured with 16 and 256 tasks, against 4, 12, 16, 24, 64 and waiting for all."""

MAX_WAITING = 65_536
"""Operations of one lane that may wait to be sent; past it, further ones are refused."""

MAX_WAITING_BYTES = 256 << 20
"""The same, of what they take."""

_LOOK_EACH = 256
"""After so many further operations, it is looked whether too much waits: they may exceed the bytes."""

_MAX_REQUEST_BYTES = MAX_FRAME_BYTES // 2
"""Of operations; the rest leaves room for a single one that is larger, and for the request's head."""


class Connection(Protocol):
    """What a lane sends its requests through."""

    @property
    def send(self) -> Callable[[bytes], None]: ...
    def close(self) -> None: ...


class _Session:
    """Numbers the requests of a lane, one under way at a time: what lets a shard know a write it has had."""

    __slots__ = ("id", "number")

    def __init__(self) -> None:
        self.id = os.urandom(16)
        self.number = 0


class _Request:
    """Operations under way, futures of their results, and when they were called, in order."""

    __slots__ = ("called_at", "futures", "given_up", "operations", "session")

    def __init__(
        self,
        session: _Session,
        operations: list[bytes],
        futures: list[asyncio.Future[Any]],
        called_at: list[float],
    ) -> None:
        self.session = session
        self.operations = operations
        self.futures = futures
        self.called_at = called_at
        self.given_up = 0
        """How many of the operations, the first ones, waited for too long."""


class Lane:
    """The operations of one kind, of one loop, to one shard.

    A lone task feels every Python call that is made here, twice, for each of its operations comes to a cold
    processor cache. So there are few, and they do much.
    """

    def __init__(
        self,
        kind: int,
        timeout_s: float,
        wake: Callable[[], None],
        too_late: Callable[..., FsmRayError],
        *,
        max_operations: int = MAX_OPERATIONS,
        is_committing: bool = False,
        on_silence: Callable[[], None] = lambda: None,
        tally: ClientTally | None = None,
    ) -> None:
        """Make an idle lane without a connection.

        Args:
            kind: of its requests.
            timeout_s: after which an operation is given up.
            wake: called when there is work and no connection.
            too_late: makes the error of an operation that is given up.
            max_operations: in one request.
            is_committing: whether the shard commits these requests, which takes longer than all else. Then
                a request carries all that waits, and one may wait at the shard while another is committed.
            on_silence: called when a request got no answer in time.
            tally: what to count in.
        """
        self._kind = kind
        self._tally = tally or ClientTally()
        # Not the first for all: that of a session has the connecting in its time.
        self._measured = random.randrange(MEASURE_EVERY)
        self._loop = asyncio.get_running_loop()
        self._make_future = functools.partial(asyncio.Future, loop=self._loop)
        # Not the loop's time: that of uvloop counts milliseconds, and latencies are less than one.
        self._now = monotonic
        self._timeout_s = timeout_s
        self._wake = wake
        self._too_late = too_late
        self._max_operations = max_operations
        self._takes_all = is_committing
        self._on_silence = on_silence
        self._free_sessions = [_Session() for _ in range(2 if is_committing else 1)]
        self.session_id = self._free_sessions[0].id
        """What the shard knows this lane by, if it has one session."""
        # What waits: operations, futures of their results, and when they were called.
        self._operations: list[bytes] = []
        self._futures: list[asyncio.Future[Any]] = []
        self._called_at: list[float] = []
        self._under_way: list[_Request] = []
        self._send: Callable[[bytes], None] | None = None
        # Connected, nothing under way, and no flush scheduled.
        self._is_idle = False
        # When so many operations wait, they are sent, though the lane is not idle.
        self._enough = _LOOK_EACH
        self._refusals_left = 0
        """How many operations are refused before it is looked again whether too much waits."""
        self._last_count = 1
        self._timer: asyncio.TimerHandle | None = None

    @property
    def has_work(self) -> bool:
        return bool(self._operations or self._under_way)

    @property
    def oldest_request(self) -> int | None:
        """The number of the oldest request without an answer, None if there is none."""
        return self._under_way[0].session.number if self._under_way else None

    @property
    def request_under_way(self) -> tuple[int, int]:
        """The number of the oldest request without an answer, and how many operations it has."""
        request = self._under_way[0]
        return request.session.number, len(request.futures)

    def submit(self, operation: bytes) -> asyncio.Future[Any]:
        """The future of the operation's result."""
        future: asyncio.Future[Any] = self._make_future()
        self._operations.append(operation)
        self._futures.append(future)
        self._called_at.append(self._now())
        if self._is_idle:
            if self._last_count == 1:
                self._flush()
            else:
                # The last request carried several operations: let every task that is ready add its own.
                self._is_idle = False
                self._enough = _ENOUGH
                self._loop.call_soon(self._flush)
        elif len(self._operations) == self._enough:
            if self._enough > _ENOUGH:
                self._look()
            elif self._under_way:
                self._enough = _LOOK_EACH
                self._loop.call_soon(self._flush)
            else:
                # Enough to begin with: the shard works on them while the other tasks add theirs.
                self._flush()
        elif self._send is None:
            self._arm()
            self._wake()
        return future

    def connected(self, connection: Connection) -> None:
        """Go on over this connection: first with what was under way on the last one, then with the rest."""
        self._send = connection.send
        self._tally.resends += len(self._under_way)
        for request in self._under_way:
            self._send(self._frame(request, is_resend=True))
        self._drop_cancelled()
        self._flush()

    def disconnected(self) -> None:
        self._send = None
        self._is_idle = False
        self._look_later()
        self._arm()

    def answered(self, number: int, results: Sequence[Result | FsmRayError]) -> None:
        """Hand out the results of the oldest request under way: a connection answers in order."""
        under_way = self._under_way
        if not under_way or number != under_way[0].session.number:
            return  # its operations were given up when their time was over
        request = under_way.pop(0)
        futures = request.futures
        self._free_sessions.append(request.session)
        self._last_count = len(futures)
        # The next request first: the shard works on it while results are handed out.
        if self._operations or under_way:
            self._flush()
        else:
            self._is_idle = self._send is not None
        if number % MEASURE_EVERY == self._measured:
            add_waits(self._tally.answer_ns[self._kind], request.called_at, self._now())
        for future, result in zip(futures, results, strict=True):
            try:
                if type(result) in GOOD_RESULTS:
                    future.set_result(result)
                else:
                    error = protocol.error_of(result)
                    self._tally.failed[self._kind, type(error)] += 1
                    future.set_exception(error)
            except asyncio.InvalidStateError:
                pass  # cancelled by its caller

    def fail(
        self, error: Callable[[], FsmRayError], of_write_under_way: Callable[[], FsmRayError] | None = None
    ) -> None:
        """Give every operation this error, or a write under way its own: there is no sense in waiting on."""
        of_under_way = of_write_under_way or error if self._kind == WRITE else error
        under_way, self._under_way = self._under_way, []
        for request in under_way:
            self._free_sessions.append(request.session)
            self._give_up(request.futures, of_under_way)
        waiting = self._futures
        self._operations, self._futures, self._called_at = [], [], []
        self._look_later()
        self._give_up(waiting, error)

    def close(self) -> None:
        self._send = None
        self._is_idle = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _flush(self) -> None:
        """Send what waits, as far as sessions are free."""
        if self._send is None or not self._free_sessions:
            return
        operations = self._operations
        if self._under_way:
            # Beside a small request, whose commit takes longer than all work for it, goes one as large. Any
            # other would only make commits smaller. Measured with 4 to 256 tasks, against half as large,
            # twice as large, and beside requests of up to 12, 16 and any number.
            enough = len(self._under_way[-1].futures)
            if enough > _ENOUGH:
                return
            if len(operations) < enough:
                self._enough = enough
                return
        elif not operations:
            self._is_idle = True
            return
        self._is_idle = False
        # About half of all that is going on, so that there are two halves: the shard has the one while the
        # client has the other. All in one request, each would wait for the other to be done with it.
        if len(operations) == 1:
            count = 1
        else:
            half = (len(operations) + self._last_count + 1) // 2
            many = self._max_operations if self._takes_all else max(half, _ENOUGH)
            count = fitting(operations[: min(many, self._max_operations)])
        session = self._free_sessions.pop()
        session.number += 1
        if count == len(operations):
            request = _Request(session, operations, self._futures, self._called_at)
            self._operations, self._futures, self._called_at = [], [], []
        else:
            request = _Request(session, operations[:count], self._futures[:count], self._called_at[:count])
            self._operations, self._futures = operations[count:], self._futures[count:]
            self._called_at = self._called_at[count:]
        self._under_way.append(request)
        self._send(self._frame(request, is_resend=False))
        self._look_later()
        if self._free_sessions:
            self._flush()
        if self._timer is None:
            self._arm()

    # Counting what waits would cost each operation: it is looked at now and then, by the same number that
    # tells when enough wait to be sent.

    def _look_later(self) -> None:
        self._enough = (len(self._operations) // _LOOK_EACH + 1) * _LOOK_EACH
        self._refusals_left = 0

    def _look(self) -> None:
        """Refuse the last operation if too much waits; then each further one is looked at."""
        if not self._refusals_left:
            self._drop_cancelled()
            count = len(self._operations)
            if count < MAX_WAITING and sum(map(len, self._operations)) <= MAX_WAITING_BYTES:
                self._look_later()
                return
            # Looking at all that waits takes as long as many refusals.
            self._refusals_left = count // _LOOK_EACH + 1
        self._refusals_left -= 1
        if self._kind != TURN or not protocol.ends_turn(self._operations[-1]):
            del self._operations[-1], self._called_at[-1]
            self._give_up([self._futures.pop()], self._overloaded)
        self._enough = len(self._operations) + 1

    def _overloaded(self) -> FsmRayError:
        return Overloaded(
            f"{len(self._operations)} operations of this process wait to be sent to one shard: nothing was "
            "changed, retry later"
        )

    def _drop_cancelled(self) -> None:
        """Forget what nobody waits for any more, though its time is not over."""
        waiting = zip(self._operations, self._futures, self._called_at, strict=True)
        left = [each for each in waiting if not each[1].cancelled()]
        if len(left) < len(self._operations):
            self._operations = [each[0] for each in left]
            self._futures = [each[1] for each in left]
            self._called_at = [each[2] for each in left]

    def _frame(self, request: _Request, *, is_resend: bool) -> bytes:
        session = request.session
        if self._kind == WRITE:
            return write_request(session.number, request.operations, session.id, is_resend=is_resend)
        if self._kind == TURN:
            return turn_request(session.number, request.operations, session.id)
        return read_request(self._kind, session.number, request.operations)

    # One timer for all operations: it looks at the oldest ones, and comes back when the next may be due.

    def _arm(self) -> None:
        if self._timer is not None:
            return
        if self._under_way:
            first = self._under_way[0]
            oldest = first.called_at[first.given_up]
        elif self._called_at:
            oldest = self._called_at[0]
        else:
            return
        self._timer = self._loop.call_later(oldest + self._timeout_s - self._now(), self._expire)

    def _expire(self) -> None:
        self._timer = None
        horizon = self._now() - self._timeout_s
        is_silent = False
        while self._under_way:
            request = self._under_way[0]
            is_silent |= not request.given_up and request.called_at[0] <= horizon
            self._give_up_older(request, horizon)
            if request.given_up < len(request.futures):
                break  # the others of it are younger
            self._free_sessions.append(self._under_way.pop(0).session)
        if is_silent:
            self._on_silence()
        overdue = bisect.bisect_right(self._called_at, horizon)
        futures = self._futures[:overdue]
        del self._operations[:overdue], self._futures[:overdue], self._called_at[:overdue]
        if overdue:
            self._look_later()
        self._give_up(futures, lambda: self._too_late(outcome_unknown=False))
        if not self._is_idle:
            self._flush()
        self._arm()

    def _give_up_older(self, request: _Request, horizon: float) -> None:
        """Give up the operations that were called so long ago."""
        before, request.given_up = request.given_up, bisect.bisect_right(request.called_at, horizon)
        futures = request.futures[before : request.given_up]
        self._give_up(futures, lambda: self._too_late(outcome_unknown=self._kind == WRITE))

    def _give_up(self, futures: list[asyncio.Future[Any]], error: Callable[[], FsmRayError]) -> None:
        for future in futures:
            if not future.done():
                reason = error()
                self._tally.given_up[self._kind, type(reason)] += 1
                future.set_exception(reason)


def fitting(operations: list[bytes]) -> int:
    """How many of the first operations can travel in one request."""
    if sum(map(len, operations)) <= _MAX_REQUEST_BYTES:
        return len(operations)
    sizes = itertools.accumulate(map(len, operations))
    return max(1, sum(size <= _MAX_REQUEST_BYTES for size in sizes))
