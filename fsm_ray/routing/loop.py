"""Loop: a bot as one event loop sees it: shards, each with lanes over a connection that is made anew."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

from ray.actor import ActorHandle
from ray.exceptions import RayError

from fsm_ray import protocol
from fsm_ray.actor import NamespaceActor
from fsm_ray.channel.client import ClientConnection, addresses, open_connection
from fsm_ray.channel.handshake import HandshakeFailed
from fsm_ray.codec import encode_key
from fsm_ray.errors import FsmRayError, NamespaceUnavailable, OutcomeUnknown, ProtocolMismatch
from fsm_ray.logs import one_line, where
from fsm_ray.protocol import (
    BIN8,
    READ_CONTENT,
    READ_RECORD,
    TURN,
    UNDECODABLE,
    WRITE,
    ContentView,
    RecordView,
    is_write,
)
from fsm_ray.routing.asking import Asking
from fsm_ray.routing.directory import Directory, retry_delay_s
from fsm_ray.routing.lanes import Connection, Lane
from fsm_ray.routing.route import Addressed, Route
from fsm_ray.routing.turns import LoopTurns

logger = logging.getLogger(__name__)


class RayCallConnection:
    """Carries frames as arguments of Ray calls, where no socket leads to the shard."""

    def __init__(
        self,
        handle: ActorHandle[NamespaceActor],
        on_reply: Callable[[bytes], None],
        on_lost: Callable[[], None],
    ) -> None:
        self._handle = handle
        self._on_reply = on_reply
        self._on_lost = on_lost
        self._calls: set[asyncio.Task[None]] = set()
        # Ray promises no order, and writes need theirs.
        self._one_write = asyncio.Lock()

    def send(self, request: bytes) -> None:
        reply: Any = None
        if not is_write(request):
            # At once: a turn is to end though the storage is closed in the next moment. Errors meet `_call`.
            with contextlib.suppress(RayError, ConnectionError):
                reply = self._handle.exchange.remote(request)
        call = asyncio.get_running_loop().create_task(self._call(request, reply))
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)

    def close(self) -> None:
        for call in self._calls:
            call.cancel()
        self._calls.clear()

    async def _call(self, request: bytes, reply: Any) -> None:
        try:
            async with self._one_write if is_write(request) else contextlib.nullcontext():
                frame = await (self._handle.exchange.remote(request) if reply is None else reply)
        except (RayError, ConnectionError) as error:
            # Not what it says: an error of the actor's has its traceback in its message.
            logger.info("a Ray call to a shard failed: %s", where(error))
            self.close()
            self._on_lost()
        else:
            self._on_reply(frame[4:])


class Shard:
    """One shard as one event loop sees it: its lanes over a connection, made again when it breaks."""

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
        self._decode = route.decoder.whole
        self._decode_each = route.decoder.decode_each
        self._shard = shard
        self._by_socket = by_socket
        self._on_gone = on_gone
        self._connection: Connection | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._timeout_s = timeout_s
        self._trouble = "it could not be reached"
        self._useless = 0
        """Connections, one after another, that were lost before the oldest requests were answered."""
        self._oldest_requests: list[int | None] = []
        self._tally = directory.metrics.tally(self, route.bot_name, shard)
        self.lanes = [
            Lane(
                kind,
                timeout_s,
                self._connect,
                self._too_late,
                max_operations=route.max_operations,
                is_committing=kind == WRITE and route.options.store_scheme != "memory",
                on_silence=self._hang_up,
                tally=self._tally,
            )
            for kind in (WRITE, READ_CONTENT, READ_RECORD, TURN)
        ]
        self.asking = Asking(self._connect, self._too_late, self._hang_up, self._tally)
        self.turns = LoopTurns(self.lanes[TURN], self.asking, timeout_s, self._tally)

    def close(self) -> None:
        """End the connection. Operations that wait go on waiting until `fail`."""
        if self._connecting is not None:
            self._connecting.cancel()
        self.turns.close()
        for lane in self.lanes:
            lane.close()
        self.asking.close()
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def abandon(self) -> None:
        """End the connection of a loop that was closed, on which nothing else can be done."""
        if isinstance(self._connection, ClientConnection):
            self._connection.abandon()

    def fail(
        self, error: Callable[[], FsmRayError], of_write_under_way: Callable[[], FsmRayError] | None = None
    ) -> None:
        for lane in self.lanes:
            lane.fail(error, of_write_under_way)
        self.asking.fail(error)
        self.turns.fail(error)

    def _connect(self) -> None:
        if self._connecting is None:
            self._connecting = self._loop.create_task(self._keep_trying())

    async def _keep_trying(self) -> None:
        try:
            attempt = 0
            if self._useless > 1:
                # A request that the shard cannot bear, say, is not to keep it busy.
                await asyncio.sleep(retry_delay_s(self._useless))
            while self._has_work():
                try:
                    self._connection = await self._open(is_first=attempt == 0)
                except NamespaceUnavailable as error:
                    self._trouble = str(error)
                    logger.info(
                        "no way to shard %d of bot %r: %s",
                        self._shard,
                        self._route.bot_name,
                        one_line(error),
                    )
                    self._tally.retries += 1
                    await asyncio.sleep(retry_delay_s(attempt))
                    attempt += 1
                else:
                    self._tally.connections += 1
                    self._trouble = "it is connected and silent"
                    for lane in self.lanes:
                        lane.connected(self._connection)
                    self.asking.connected(self._connection)
                    self.turns.connected()
                    self._oldest_requests = [lane.oldest_request for lane in self.lanes]
                    return
        except FsmRayError as error:
            # Such as a bot that was dropped: trying again will not help.
            self._on_gone()
            told = str(error)
            is_mismatch = isinstance(error, ProtocolMismatch)
            self.fail(error.copied, (lambda: self._route.outcome_unknown(told)) if is_mismatch else None)
        except Exception as error:  # noqa: BLE001  # nobody awaits this task, and who waits for it gets the error
            self._give_up(error)
        finally:
            self._connecting = None

    def _give_up(self, error: Exception) -> None:
        """Tell all that wait, and the log, of an error that nobody expected."""
        bot_name = self._route.bot_name
        logger.error("shard %d of bot %r cannot be reached: %s", self._shard, bot_name, where(error))
        trouble = f"shard {self._shard} of bot {bot_name!r} cannot be reached: {error!r}"
        self.fail(lambda: NamespaceUnavailable(trouble, bot=bot_name))

    async def _open(self, *, is_first: bool) -> Connection:
        """A connection by the best way there is.

        Raises:
            NamespaceUnavailable: the shard is not there at the moment.
            UnknownBot: the bot is gone, or was made anew with other options.
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
        handle, options = await self._loop.run_in_executor(
            None, self._directory.handle, bot_name, self._shard
        )
        self._route.check_options(options)
        return RayCallConnection(handle, self._on_reply, self._on_lost)

    def _too_late(self, *, outcome_unknown: bool) -> FsmRayError:
        return self._route.too_late(
            self._shard, self._timeout_s, self._trouble, outcome_unknown=outcome_unknown
        )

    def _on_reply(self, body: bytes) -> None:
        try:
            kind, number, results = self._decode[body[1]](body)
        except UNDECODABLE:
            kind, number, results = self._decode_each(body)
        if kind < len(self.lanes):
            self.lanes[kind].answered(number, results)
        else:
            self.asking.answered(number, results)

    def _hang_up(self) -> None:
        """Leave an actor that is silent: another one may have its shard by now."""
        if self._connection is not None:
            self._connection.close()
            self._on_lost()

    def _on_lost(self) -> None:
        self._connection = None
        is_useless = self._has_work() and self._oldest_requests == [
            lane.oldest_request for lane in self.lanes
        ]
        self._useless = self._useless + 1 if is_useless else 0
        for lane in self.lanes:
            lane.disconnected()
        self.asking.disconnected()
        if self._has_work():
            self._connect()

    def _has_work(self) -> bool:
        return self.asking.has_work or self.turns.has_work or any(lane.has_work for lane in self.lanes)


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
        self._is_single = route.options.shards == 1
        self._encode_update = route.update_data
        self.shards = [
            Shard(directory, route, shard, timeout_s, on_gone, by_socket=by_socket)
            for shard in range(route.options.shards)
        ]
        self._writes, self._content_reads, self._record_reads = (
            [shard.lanes[kind].submit for shard in self.shards] for kind in (WRITE, READ_CONTENT, READ_RECORD)
        )

    def write(self, addressed: Addressed) -> asyncio.Future[Any]:
        """The future of the operation's result."""
        shard, operation = addressed
        return self._writes[shard](operation)

    def update_data(
        self, key: Hashable, changes: Mapping[str, Any], expected_version: int | None
    ) -> asyncio.Future[ContentView]:
        """The future of the merged content."""
        shard, operation = self._encode_update(key, changes, expected_version)
        return self._writes[shard](operation)

    def read_content(self, key: Hashable) -> asyncio.Future[ContentView | None]:
        """The future of what is under the key, flow and state left out."""
        # As `Route.read`, written out: this is what bots do most.
        encoded = encode_key(key)
        length = len(encoded)
        operation = BIN8[length] + encoded if length < len(BIN8) else protocol.read(encoded)
        return self._content_reads[0 if self._is_single else self.route.shard_of(encoded)](operation)

    def read_record(self, key: Hashable) -> asyncio.Future[RecordView | None]:
        """The future of what is under the key."""
        shard, operation = self.route.read(key)
        return self._record_reads[shard](operation)

    async def read_records(self, keys: Iterable[Hashable]) -> list[RecordView | None]:
        """What is under each of the keys."""
        addressed = [self.route.read(key) for key in keys]
        records: list[RecordView | None] = await _all(
            [self._record_reads[shard](operation) for shard, operation in addressed]
        )
        return records

    async def write_many(self, addressed: Sequence[Addressed]) -> list[Any]:
        """The result of each operation; all are made, though one fails."""
        return await _all([self._writes[shard](operation) for shard, operation in addressed])

    def shard_of(self, key: bytes) -> Shard:
        """The shard that has this encoded key."""
        return self.shards[0 if self._is_single else self.route.shard_of(key)]

    def abandon(self) -> None:
        """End the connections of a loop that was closed."""
        for shard in self.shards:
            shard.abandon()

    def close(self, error: Callable[[], FsmRayError]) -> None:
        """End the connections; operations that wait get this error."""
        for shard in self.shards:
            shard.close()
            shard.fail(error, _closed_under_way)


async def _all(futures: Sequence[asyncio.Future[Any]]) -> list[Any]:
    """Their results, when all are done; or else the first error."""
    results = await asyncio.gather(*futures, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def _closed_under_way() -> OutcomeUnknown:
    return OutcomeUnknown(
        "the storage was closed while a write was under way: it may or may not have taken effect"
    )
