"""Blocking: operations of one thread, each a request and its reply on a connection of its own.

A connection for each thread measured better than one behind a lock: nobody waits for another's reply.
"""

from __future__ import annotations

import logging
import os
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Protocol

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayError

from fsm_ray import protocol
from fsm_ray.actor import NamespaceActor
from fsm_ray.channel.client import BlockingConnection, addresses
from fsm_ray.channel.frames import FrameTooLong
from fsm_ray.channel.handshake import HandshakeFailed
from fsm_ray.errors import NamespaceUnavailable, UnknownBot
from fsm_ray.protocol import GOOD_RESULTS, READ_CONTENT, READ_RECORD, WRITE, ContentView, RecordView
from fsm_ray.routing.directory import Directory, retry_delay_s
from fsm_ray.routing.lanes import fitting
from fsm_ray.routing.route import Addressed, Route

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
            raise ConnectionResetError(str(error)) from error
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
        self._session = os.urandom(16)
        self._number = 0
        self._read_number = 0
        self._connection: Connection | None = None
        self._pid = os.getpid()

    def read(self, kind: int, operations: Sequence[bytes]) -> Sequence[Any]:
        """The operations' results, errors among them; they must fit into one request.

        Raises:
            NamespaceUnavailable: no answer within `timeout_s`.
        """
        self._read_number += 1
        number = self._read_number
        return self._call(kind, lambda _: protocol.read_request(kind, number, operations))

    def write(self, operations: Sequence[bytes]) -> Sequence[Any]:
        """As `read`.

        Raises:
            NamespaceUnavailable: the shard could not be reached within `timeout_s`; nothing was changed.
            OutcomeUnknown: it was reached, and did not answer in time.
        """
        if self._pid != os.getpid():
            self._leave_parent()
        self._number += 1
        number, session = self._number, self._session
        return self._call(
            WRITE,
            lambda is_resend: protocol.write_request(number, operations, session, is_resend=is_resend),
        )

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def __del__(self) -> None:
        self.close()

    def _call(self, kind: int, request: Callable[[bool], bytes]) -> Sequence[Any]:
        _, _, results = self._route.decoder.decode(self._exchange(kind, request))
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
                    raise self._route.too_late(
                        self._shard, self._timeout_s, trouble, outcome_unknown=unknown
                    ) from error
                logger.info("shard %d of bot %r: %s", self._shard, self._route.bot_name, error)
                time.sleep(min(retry_delay_s(attempt), left_s))
                attempt += 1
            except UnknownBot:
                self.close()
                self._on_gone()
                raise
            except BaseException:
                # An interrupt, say: the reply may still come, and must not pass for that of the next request.
                self.close()
                raise
            else:
                return reply

    def _open(self, timeout_s: float, attempt: int) -> Connection:
        """A connection by the best way there is; its replies may take `timeout_s`."""
        bot_name = self._route.bot_name
        timeout_s = max(timeout_s, 0.001)
        if self._by_socket and not self._directory.is_remote:
            find = self._directory.locate if attempt else self._directory.known_endpoint
            endpoint = find(bot_name, self._shard)
            self._route.check_options(endpoint.options)
            for address in addresses(endpoint, self._directory.node_id):
                try:
                    self._connection = BlockingConnection(address, endpoint.secret, timeout_s)
                except (OSError, FrameTooLong, HandshakeFailed) as error:
                    logger.info("no connection to %s: %s", address, error)
                else:
                    return self._connection
            if attempt == 0:
                raise NamespaceUnavailable(f"shard {self._shard} of bot {bot_name!r} is not where it was")
        self._connection = BlockingRayCall(self._directory.handle(bot_name, self._shard), timeout_s)
        return self._connection

    def _leave_parent(self) -> None:
        """Begin anew in a forked child: the parent goes on with the connection and the session."""
        self.close()
        self._session = os.urandom(16)
        self._number = 0
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
        self._shards = [
            BlockingShard(directory, route, shard, timeout_s, on_gone, by_socket=by_socket)
            for shard in range(route.options.shards)
        ]

    def read_content(self, key: Hashable) -> ContentView | None:
        """What is under the key, flow and state left out; raises as `BlockingShard.read`."""
        shard, operation = self.route.read(key)
        content: ContentView | None = _good(self._shards[shard].read(READ_CONTENT, (operation,))[0])
        return content

    def read_record(self, key: Hashable) -> RecordView | None:
        """What is under the key; raises as `BlockingShard.read`."""
        shard, operation = self.route.read(key)
        record: RecordView | None = _good(self._shards[shard].read(READ_RECORD, (operation,))[0])
        return record

    def write(self, addressed: Addressed) -> Any:
        """The operation's result; raises as `BlockingShard.write`."""
        shard, operation = addressed
        return _good(self._shards[shard].write((operation,))[0])

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
                    places, exchange(self._shards[shard], operations[:count]), strict=False
                ):
                    results[place] = result
                del places[:count]
        return [_good(result) for result in results]

    def close(self) -> None:
        for shard in self._shards:
            shard.close()


def _good(result: Any) -> Any:
    """The result, unless it is an error: that is raised."""
    if type(result) not in GOOD_RESULTS:
        raise protocol.error_of(result)
    return result
