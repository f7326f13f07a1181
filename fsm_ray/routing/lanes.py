"""Lanes: operations of one event loop on their way to a shard and back.

A shard has two lanes, reads and writes, so that a read never waits for a commit. A lane has one request
under way; operations that come meanwhile wait and travel together in the next one. That keeps their order,
makes big batches under load without a timer, and leaves one answer for a shard to remember.
"""

from __future__ import annotations

import asyncio
import bisect
import itertools
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ray.actor import ActorHandle
from ray.exceptions import RayError

from fsm_ray import protocol
from fsm_ray.actor import NamespaceActor
from fsm_ray.channel.client import addresses, open_connection
from fsm_ray.channel.handshake import HandshakeFailed
from fsm_ray.errors import FsmRayError, NamespaceUnavailable
from fsm_ray.protocol import GOOD_RESULTS, MAX_FRAME_BYTES, MAX_OPERATIONS, READ, WRITE, Result
from fsm_ray.routing.directory import Directory, retry_delay_s
from fsm_ray.routing.route import Addressed, Route

logger = logging.getLogger(__name__)

_MAX_REQUEST_BYTES = MAX_FRAME_BYTES // 2
"""Of operations; the rest leaves room for a single one that is larger, and for the request's head."""


class Load:
    """Operations, the futures of their results, and the loop's times of their calls, in order."""

    __slots__ = ("called_at", "futures", "operations")

    def __init__(
        self, operations: list[bytes], futures: list[asyncio.Future[Any]], called_at: list[float]
    ) -> None:
        self.operations = operations
        self.futures = futures
        self.called_at = called_at

    def __len__(self) -> int:
        return len(self.operations)

    def take(self, count: int) -> Load:
        """Remove the first so many, and return them."""
        taken = Load(self.operations[:count], self.futures[:count], self.called_at[:count])
        del self.operations[:count], self.futures[:count], self.called_at[:count]
        return taken

    def fail(self, error: Callable[[], FsmRayError]) -> None:
        for future in self.futures:
            if not future.done():
                future.set_exception(error())


def _empty() -> Load:
    return Load([], [], [])


class Connection(Protocol):
    """What a lane sends its requests through."""

    def send(self, request: bytes) -> None: ...
    def close(self) -> None: ...


class RayCallConnection:
    """Carries frames as arguments of Ray calls, where no socket leads to the shard."""

    def __init__(
        self,
        handle: ActorHandle[NamespaceActor],
        on_reply: Callable[[memoryview], None],
        on_lost: Callable[[], None],
    ) -> None:
        self._handle = handle
        self._on_reply = on_reply
        self._on_lost = on_lost
        self._calls: set[asyncio.Task[None]] = set()

    def send(self, request: bytes) -> None:
        call = asyncio.get_running_loop().create_task(self._call(request))
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)

    def close(self) -> None:
        for call in self._calls:
            call.cancel()
        self._calls.clear()

    async def _call(self, request: bytes) -> None:
        try:
            reply = await self._handle.exchange.remote(request)
        except (RayError, ConnectionError) as error:
            logger.info("a Ray call to a shard failed: %s", error)
            self.close()
            self._on_lost()
        else:
            self._on_reply(memoryview(reply)[4:])


class Lane:
    """The reads, or the writes, of one loop to one shard."""

    def __init__(
        self, kind: int, timeout_s: float, wake: Callable[[], None], too_late: Callable[..., FsmRayError]
    ) -> None:
        """`wake`: called when there is work and no connection; `too_late`: makes a timeout's error."""
        self._kind = kind
        self._loop = asyncio.get_running_loop()
        self._make_future = self._loop.create_future
        self._now = self._loop.time
        self._timeout_s = timeout_s
        self._wake = wake
        self._too_late = too_late
        self._session = os.urandom(16)
        self._number = 0
        self._waiting = _empty()
        self._under_way = _empty()
        self._was_sent = False
        self._connection: Connection | None = None
        # Connected, nothing under way, and no flush scheduled.
        self._is_idle = False
        self._was_alone = True
        self._timer: asyncio.TimerHandle | None = None

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._under_way)

    def submit(self, operation: bytes) -> asyncio.Future[Any]:
        """The future of the operation's result."""
        future = self._make_future()
        waiting = self._waiting
        waiting.operations.append(operation)
        waiting.futures.append(future)
        waiting.called_at.append(self._now())
        if self._is_idle:
            self._is_idle = False
            if self._was_alone:
                self._flush()
            else:
                # The last request carried several operations: let every task that is ready add its own.
                self._loop.call_soon(self._flush)
        elif self._connection is None:
            self._arm()
            self._wake()
        return future

    def connected(self, connection: Connection) -> None:
        """Go on over this connection: first with what was under way on the last one, then with the rest."""
        self._connection = connection
        if self._under_way:
            self._send(is_resend=self._was_sent)
        else:
            self._flush()

    def disconnected(self) -> None:
        self._connection = None
        self._is_idle = False

    def answered(self, number: int, results: Sequence[Result | FsmRayError]) -> None:
        """Hand out the results of the request under way."""
        futures = self._under_way.futures
        if number != self._number or not futures:
            return  # its operations were given up when their time was over
        self._under_way = _empty()
        self._was_alone = len(futures) == 1
        for future, result in zip(futures, results, strict=True):
            if future.done():
                continue  # cancelled by its caller
            if type(result) in GOOD_RESULTS:
                future.set_result(result)
            else:
                future.set_exception(protocol.error_of(result))
        self._flush()

    def fail(self, error: Callable[[], FsmRayError]) -> None:
        """Give every operation this error: there is no sense in waiting on."""
        loads = self._under_way, self._waiting
        self._under_way, self._waiting = _empty(), _empty()
        for load in loads:
            load.fail(error)

    def close(self) -> None:
        self.disconnected()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _flush(self) -> None:
        """Send what waits, unless a request is under way."""
        if self._connection is None or self._under_way:
            return
        if not self._waiting:
            self._is_idle = True
            return
        if len(self._waiting) == 1 or _fits(self._waiting):
            self._under_way, self._waiting = self._waiting, _empty()
        else:
            self._under_way = self._waiting.take(_fitting(self._waiting))
        self._number += 1
        self._was_sent = False
        self._send(is_resend=False)
        if self._timer is None:
            self._arm()

    def _send(self, *, is_resend: bool) -> None:
        if self._connection is None:
            return
        operations = self._under_way.operations
        self._was_sent = True
        if self._kind == READ:
            request = protocol.read_request(self._number, operations)
        else:
            request = protocol.write_request(self._number, operations, self._session, is_resend=is_resend)
        self._connection.send(request)

    # One timer for all operations: it looks at the oldest ones, and comes back when the next may be due.

    def _arm(self) -> None:
        oldest = self._under_way.called_at or self._waiting.called_at
        if self._timer is None and oldest:
            self._timer = self._loop.call_at(oldest[0] + self._timeout_s, self._expire)

    def _expire(self) -> None:
        self._timer = None
        horizon = self._now() - self._timeout_s
        if self._under_way and self._under_way.called_at[0] <= horizon:
            # Later ones of this request are given up with the first: a request has one outcome.
            outcome_unknown = self._kind == WRITE and self._was_sent
            self._under_way.fail(lambda: self._too_late(outcome_unknown=outcome_unknown))
            self._under_way = _empty()
        overdue = bisect.bisect_right(self._waiting.called_at, horizon)
        self._waiting.take(overdue).fail(lambda: self._too_late(outcome_unknown=False))
        if not self._is_idle:
            self._flush()
        self._arm()


def _fits(load: Load) -> bool:
    """Whether the load can travel in one request."""
    return len(load) <= MAX_OPERATIONS and sum(map(len, load.operations)) <= _MAX_REQUEST_BYTES


def _fitting(load: Load) -> int:
    """How many of the load's first operations can travel in one request."""
    sizes = itertools.accumulate(map(len, load.operations[:MAX_OPERATIONS]))
    return max(1, sum(size <= _MAX_REQUEST_BYTES for size in sizes))


class Shard:
    """One shard as one event loop sees it: two lanes over a connection, made again when it breaks."""

    def __init__(
        self,
        directory: Directory,
        route: Route,
        shard: int,
        timeout_s: float,
        on_gone: Callable[[], None],
        *,
        by_socket: bool,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._directory = directory
        self._route = route
        self._shard = shard
        self._by_socket = by_socket
        self._on_gone = on_gone
        self._connection: Connection | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._timeout_s = timeout_s
        self._trouble = "it could not be reached"
        self.reads = Lane(READ, timeout_s, self._connect, self._too_late)
        self.writes = Lane(WRITE, timeout_s, self._connect, self._too_late)

    def close(self) -> None:
        """End the connection. Operations that wait go on waiting until `fail`."""
        if self._connecting is not None:
            self._connecting.cancel()
        self.reads.close()
        self.writes.close()
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def fail(self, error: Callable[[], FsmRayError]) -> None:
        self.reads.fail(error)
        self.writes.fail(error)

    def _connect(self) -> None:
        if self._connecting is None:
            self._connecting = self._loop.create_task(self._keep_trying())

    async def _keep_trying(self) -> None:
        try:
            attempt = 0
            while self.reads.has_work or self.writes.has_work:
                try:
                    self._connection = await self._open(is_first=attempt == 0)
                except NamespaceUnavailable as error:
                    self._trouble = str(error)
                    logger.info("shard %d of bot %r: %s", self._shard, self._route.bot_name, error)
                    await asyncio.sleep(retry_delay_s(attempt))
                    attempt += 1
                else:
                    self._trouble = "it is connected and silent"
                    self.reads.connected(self._connection)
                    self.writes.connected(self._connection)
                    return
        except FsmRayError as error:
            # Such as a bot that was dropped: trying again will not help.
            final = error
            self._on_gone()
            self.fail(lambda: type(final)(str(final), **vars(final)))
        finally:
            self._connecting = None

    async def _open(self, *, is_first: bool) -> Connection:
        """A connection by the best way there is.

        Raises:
            NamespaceUnavailable: the shard is not there at the moment.
        """
        find = self._directory.known_endpoint if is_first else self._directory.locate
        bot_name = self._route.bot_name
        if self._by_socket and not self._directory.is_remote:
            endpoint = await self._loop.run_in_executor(None, find, bot_name, self._shard)
            self._route.check_options(endpoint.options)
            for address in addresses(endpoint, self._directory.node_id):
                try:
                    return await open_connection(address, endpoint.secret, self._on_reply, self._on_lost)
                except (OSError, TimeoutError, HandshakeFailed) as error:
                    logger.info("no connection to %s: %s", address, error)
            if is_first:
                raise NamespaceUnavailable(f"shard {self._shard} of bot {bot_name!r} is not where it was")
        handle = await self._loop.run_in_executor(None, self._directory.handle, bot_name, self._shard)
        return RayCallConnection(handle, self._on_reply, self._on_lost)

    def _too_late(self, *, outcome_unknown: bool) -> FsmRayError:
        return self._route.too_late(
            self._shard, self._timeout_s, self._trouble, outcome_unknown=outcome_unknown
        )

    def _on_reply(self, body: memoryview) -> None:
        kind, number, results = self._route.decoder.decode(body)
        (self.reads if kind == READ else self.writes).answered(number, results)

    def _on_lost(self) -> None:
        self._connection = None
        self.reads.disconnected()
        self.writes.disconnected()
        if self.reads.has_work or self.writes.has_work:
            self._connect()


class LoopBot:
    """One bot as one event loop sees it."""

    def __init__(
        self,
        directory: Directory,
        route: Route,
        timeout_s: float,
        on_gone: Callable[[], None],
        *,
        by_socket: bool,
    ) -> None:
        """`on_gone` is called when the bot turns out to be gone: this object is of no further use."""
        self.route = route
        self._shards = [
            Shard(directory, route, shard, timeout_s, on_gone, by_socket=by_socket)
            for shard in range(route.options.shards)
        ]
        self._reads = [shard.reads.submit for shard in self._shards]
        self._writes = [shard.writes.submit for shard in self._shards]

    def read(self, addressed: Addressed) -> asyncio.Future[Any]:
        """The future of the operation's result, from the shard that has the key."""
        shard, operation = addressed
        return self._reads[shard](operation)

    def write(self, addressed: Addressed) -> asyncio.Future[Any]:
        """As `read`, for an operation that writes."""
        shard, operation = addressed
        return self._writes[shard](operation)

    def close(self, error: Callable[[], FsmRayError]) -> None:
        """End the connections; operations that wait get this error."""
        for shard in self._shards:
            shard.close()
            shard.fail(error)
