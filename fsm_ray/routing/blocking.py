"""Blocking: operations of one thread, each a request and its reply on a connection of its own.

A connection for each thread measured better than one behind a lock: nobody waits for another's reply.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Protocol

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayError

from fsm_ray import protocol
from fsm_ray.actor import NamespaceActor
from fsm_ray.channel.client import addresses, open_blocking
from fsm_ray.channel.frames import FrameTooLong
from fsm_ray.channel.handshake import HandshakeFailed
from fsm_ray.errors import (
    FsmRayError,
    NamespaceUnavailable,
    OutcomeUnknown,
    ProtocolMismatch,
    StorageClosed,
    UnknownBot,
)
from fsm_ray.logs import one_line, where
from fsm_ray.protocol import (
    GOOD_RESULTS,
    GRANTS,
    MAX_OPERATIONS,
    NO_TURN,
    READ_CONTENT,
    READ_RECORD,
    TURN,
    WRITE,
    ContentView,
    Grant,
    RecordView,
    good,
)
from fsm_ray.routing.directory import Directory, retry_delay_s
from fsm_ray.routing.lanes import fitting
from fsm_ray.routing.route import Addressed, Route
from fsm_ray.tally import MEASURE_EVERY, now_ns

logger = logging.getLogger(__name__)


class Connection(Protocol):
    """What carries a request to a shard and brings its reply."""

    def exchange(self, request: bytes) -> bytes: ...
    def set_timeout(self, timeout_s: float) -> None: ...
    def close(self) -> None: ...


class BlockingRayCall:
    """Carries frames as arguments of Ray calls, where no socket leads to the shard."""

    def __init__(self, handle: ActorHandle[NamespaceActor], timeout_s: float) -> None:
        self._handle = handle
        self._timeout_s = timeout_s

    def exchange(self, request: bytes) -> bytes:
        try:
            call: Any = self._handle.exchange.remote(request)
            reply: bytes = ray.get(call, timeout=self._timeout_s)
        except GetTimeoutError as error:
            raise BlockingIOError(str(error)) from error
        except RayError as error:
            # Not what it says: an error of the actor's has its traceback in its message.
            raise ConnectionResetError(f"a Ray call failed: {where(error)}") from error
        return reply[4:]

    def set_timeout(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s

    def close(self) -> None:
        """Nothing to release."""


class BlockingShard:
    """One shard as one thread sees it. A connection goes with the thread that made it."""

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
        self._directory = directory
        self._route = route
        self._shard = shard
        self._timeout_s = timeout_s
        self._by_socket = by_socket
        self._on_gone = on_gone
        self.session_id = os.urandom(16)
        """What the shard knows this thread's writes and turns by."""
        self._number = 0
        self._asked = 0
        # Not the first for all: that of a session has the connecting in its time.
        self._measured = random.randrange(MEASURE_EVERY)
        self._last_turn = NO_TURN
        self._untold: list[int] = []
        """Turns that were ended, of which the shard could not be told yet; at most MAX_OPERATIONS."""
        self._connection: Connection | None = None
        self._tally = directory.metrics.tally(self, route.bot_name, shard)
        self._connections = 0
        self._pid = os.getpid()
        self.is_closed = False
        """Whether there is to be no connection any more."""

    def read(self, kind: int, operations: Sequence[bytes]) -> Sequence[Any]:
        """The operations' results, errors among them; they must fit into one request.

        Raises:
            NamespaceUnavailable: no answer within `timeout_s`.
        """
        return self.ask(kind, lambda number: protocol.read_request(kind, number, operations))

    def write(self, operations: Sequence[bytes]) -> Sequence[Any]:
        """As `read`.

        Raises:
            NamespaceUnavailable: the shard could not be reached within `timeout_s`; nothing was changed.
            OutcomeUnknown: it was reached, and did not answer in time.
        """
        if self._pid != os.getpid():
            self._leave_parent()
        self._number += 1
        number, session = self._number, self.session_id
        return self._call(
            WRITE,
            number,
            lambda is_resend: protocol.write_request(number, operations, session, is_resend=is_resend),
        )

    def write_one(self, operation: bytes) -> Any:
        """The operation's result; raises as `write`, and the operation's own error."""
        return good(self.write((operation,))[0])

    def ask(self, kind: int, request: Callable[[int], bytes]) -> Sequence[Any]:
        """The results that the shard gives to a request that is safe to repeat, and gets a number.

        Raises:
            NamespaceUnavailable: none came within `timeout_s`.
        """
        if self._pid != os.getpid():
            self._leave_parent()
        self._asked += 1
        frame = request(self._asked)
        return self._call(kind, self._asked, lambda _: frame)

    def begin_turn(self, key: bytes, timeout_s: float) -> tuple[int, RecordView | None]:
        """The number of a turn that has the conversation of this encoded key, and the record.

        Raises:
            TimeoutError: other turns kept it for so long.
            Overloaded: too many wait for it.
            NamespaceUnavailable: the shard gave no answer in time.
        """
        self._last_turn += 1
        number, began_ns = self._last_turn, now_ns()
        deadline = time.monotonic() + timeout_s
        try:
            while True:
                record = good(self._turn(protocol.begin_turn(number, key))[-1])
                if record is not False:
                    return number, record
                granted = self._wait_for_grant(number, deadline)
                if granted is not None:
                    self._tally.turn_wait_ns.add(now_ns() - began_ns)
                    return number, granted.record
        except BaseException as error:
            self._tally.turns_given_up += isinstance(error, TimeoutError)
            self.end_turn(number)
            raise

    def end_turn(self, number: int) -> None:
        """End a turn without a commit; a shard that cannot be reached is told when another begins or ends."""
        self._untold = [*self._untold, number][-MAX_OPERATIONS:]
        with contextlib.suppress(FsmRayError):
            self._turn()

    def show_life(self, session_id: bytes) -> None:
        """Tell the shard that this session's turns are still being worked on."""
        self.ask(
            TURN, lambda number: protocol.turn_request(number, (protocol.end_turn(NO_TURN),), session_id)
        )

    def twin(self, timeout_s: float) -> BlockingShard:
        """The same shard for another thread, which waits for no answer longer than this."""
        return BlockingShard(
            self._directory,
            self._route,
            self._shard,
            min(timeout_s, self._timeout_s),
            self._on_gone,
            by_socket=self._by_socket,
        )

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _turn(self, *operations: bytes) -> Sequence[Any]:
        """The results of a turn request: of the ends that were not told of yet, and of these operations."""
        ends = [protocol.end_turn(number) for number in self._untold]
        results = self.ask(
            TURN, lambda number: protocol.turn_request(number, (*ends, *operations), self.session_id)
        )
        # What this thread goes on to begin keeps its session alive, and with it the turns that did not end.
        told = zip(self._untold, results, strict=False)
        self._untold = [number for number, result in told if type(result) not in GOOD_RESULTS]
        return results

    def _wait_for_grant(self, number: int, deadline: float) -> Grant | None:
        """The turn's grant; None when it has to be asked for again, over a new connection."""
        connections = self._connections
        while connections == self._connections:
            wait_s = min(deadline - time.monotonic(), self._timeout_s / 2)
            if wait_s <= 0:
                raise TimeoutError
            grants = self._grants(wait_s)
            if self.is_closed:
                raise self._closed()  # what was granted ends with the connection
            for grant in grants:
                if grant.turn == number:
                    return grant
                self.end_turn(grant.turn)  # whoever asked for it waits no more
        return None

    def _grants(self, wait_s: float) -> list[Grant]:
        """What is granted to this thread's turns within this time, at most once."""
        self._asked += 1
        number = self._asked

        def request(is_resend: bool) -> bytes:  # noqa: FBT001  # as `_call` calls it
            # Over a new connection there is nothing to wait for: each turn has to be asked for again.
            return protocol.grants_request(number, self.session_id, 0.0 if is_resend else wait_s)

        results = self._call(GRANTS, number, request)
        return [good(result) for result in results]

    def __del__(self) -> None:
        self.close()

    def _call(self, kind: int, number: int, request: Callable[[bool], bytes]) -> Sequence[Any]:
        began_ns = now_ns() if number % MEASURE_EVERY == self._measured else 0
        _, _, results = self._route.decoder.decode(self._exchange(kind, request))
        if began_ns:
            self._tally.measure(kind, len(results), now_ns() - began_ns)
        for result in results:
            if type(result) not in GOOD_RESULTS:
                self._tally.failed[kind, type(protocol.error_of(result))] += 1
        return results

    def _exchange(self, kind: int, request: Callable[[bool], bytes]) -> bytes:
        """The reply to the request, sent again over new connections until `timeout_s` is over."""
        if self._pid != os.getpid():
            self._leave_parent()
        deadline = time.monotonic() + self._timeout_s
        attempt = 0
        was_sent = False
        while True:
            try:
                connection = self._connection or self._open(deadline - time.monotonic(), attempt)
                is_resend, was_sent = was_sent, True
                self._tally.resends += is_resend
                reply = connection.exchange(request(is_resend))
                if attempt:
                    connection.set_timeout(self._timeout_s)
            except (OSError, FrameTooLong, HandshakeFailed, NamespaceUnavailable) as error:
                self.close()
                left_s = deadline - time.monotonic()
                if left_s <= 0 or isinstance(error, BlockingIOError):
                    unknown = was_sent and kind == WRITE
                    trouble = (
                        "it is connected and silent" if isinstance(error, BlockingIOError) else str(error)
                    )
                    too_late = self._route.too_late(
                        self._shard, self._timeout_s, trouble, outcome_unknown=unknown
                    )
                    self._tally.given_up[kind, type(too_late)] += 1
                    raise too_late from error
                logger.info(
                    "no way to shard %d of bot %r: %s", self._shard, self._route.bot_name, one_line(error)
                )
                self._tally.retries += 1
                time.sleep(min(retry_delay_s(attempt), left_s))
                attempt += 1
            except (UnknownBot, ProtocolMismatch) as error:
                self._leave(error, kind, was_sent=was_sent)
                raise
            except BaseException as error:
                # An interrupt, say: the reply may still come, and must not pass for that of the next request.
                self.close()
                if isinstance(error, FsmRayError):
                    self._tally.given_up[kind, type(error)] += 1
                raise
            else:
                return reply

    def _leave(self, error: UnknownBot | ProtocolMismatch, kind: int, *, was_sent: bool) -> None:
        """Forget the bot: it is gone, or another one. Raises OutcomeUnknown if that leaves a write open."""
        self.close()
        self._on_gone()
        is_open = was_sent and kind == WRITE and isinstance(error, ProtocolMismatch)
        self._tally.given_up[kind, OutcomeUnknown if is_open else type(error)] += 1
        if is_open:
            raise self._route.outcome_unknown(str(error)) from error

    def _open(self, timeout_s: float, attempt: int) -> Connection:
        """A connection by the best way there is; its replies may take `timeout_s`."""
        bot_name = self._route.bot_name
        if self.is_closed:
            raise self._closed()
        timeout_s = max(timeout_s, 0.001)
        self._connections += 1
        if self._by_socket and not self._directory.is_remote:
            find = self._directory.locate if attempt else self._directory.known_endpoint
            endpoint = find(bot_name, self._shard)
            self._route.check_options(endpoint.options)
            for address in addresses(endpoint, self._directory.node_id):
                try:
                    self._connection = open_blocking(address, endpoint.secret, timeout_s)
                except (OSError, FrameTooLong, HandshakeFailed) as error:
                    logger.info("no connection to %s: %s", address, error)
                else:
                    self._tally.connections += 1
                    return self._connection
            if attempt == 0:
                raise NamespaceUnavailable(f"shard {self._shard} of bot {bot_name!r} is not where it was")
        handle, options = self._directory.handle(bot_name, self._shard)
        self._route.check_options(options)
        self._connection = BlockingRayCall(handle, timeout_s)
        self._tally.connections += 1
        return self._connection

    def _closed(self) -> StorageClosed:
        return StorageClosed("this storage was closed: make a new one", bot=self._route.bot_name)

    def _leave_parent(self) -> None:
        """Begin anew in a forked child: the parent goes on with the connection and the session."""
        self.close()
        self.session_id = os.urandom(16)
        self._number = 0
        self._untold.clear()
        self._pid = os.getpid()


class BlockingBot:
    """One bot as one thread sees it."""

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
        self.shards = [
            BlockingShard(directory, route, shard, timeout_s, on_gone, by_socket=by_socket)
            for shard in range(route.options.shards)
        ]

    def read_content(self, key: Hashable) -> ContentView | None:
        """What is under the key, flow and state left out; raises as `BlockingShard.read`."""
        shard, operation = self.route.read(key)
        content: ContentView | None = good(self.shards[shard].read(READ_CONTENT, (operation,))[0])
        return content

    def read_record(self, key: Hashable) -> RecordView | None:
        """What is under the key; raises as `BlockingShard.read`."""
        shard, operation = self.route.read(key)
        record: RecordView | None = good(self.shards[shard].read(READ_RECORD, (operation,))[0])
        return record

    def write(self, addressed: Addressed) -> Any:
        """The operation's result; raises as `BlockingShard.write`."""
        shard, operation = addressed
        return self.shards[shard].write_one(operation)

    def read_records(self, keys: Iterable[Hashable]) -> list[RecordView | None]:
        """What is under each of the keys; raises as `BlockingShard.read`."""
        addressed = [self.route.read(key) for key in keys]
        return self._many(addressed, lambda shard, operations: shard.read(READ_RECORD, operations))

    def write_many(self, addressed: Sequence[Addressed]) -> list[Any]:
        """The result of each operation; all are made, though one fails. Raises as `BlockingShard.write`."""
        return self._many(addressed, BlockingShard.write)

    def _many(
        self,
        addressed: Sequence[Addressed],
        exchange: Callable[[BlockingShard, Sequence[bytes]], Sequence[Any]],
    ) -> list[Any]:
        """The results, in the order of the operations; one request at a time, each as full as it can be."""
        results: list[Any] = [None] * len(addressed)
        of_shards: defaultdict[int, list[int]] = defaultdict(list)
        for place, (shard, _) in enumerate(addressed):
            of_shards[shard].append(place)
        for shard, places in of_shards.items():
            while places:
                operations = [addressed[place][1] for place in places[: self.route.max_operations]]
                count = fitting(operations)
                for place, result in zip(
                    places, exchange(self.shards[shard], operations[:count]), strict=False
                ):
                    results[place] = result
                del places[:count]
        return [good(result) for result in results]

    def shard_of(self, key: bytes) -> BlockingShard:
        """The shard that has this encoded key."""
        return self.shards[self.route.shard_of(key)]

    def retire(self) -> None:
        """Let no turn begin, and no connection be made, any more."""
        for shard in self.shards:
            shard.is_closed = True

    def close(self) -> None:
        self.retire()
        for shard in self.shards:
            shard.close()
