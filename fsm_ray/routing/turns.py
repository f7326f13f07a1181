"""The turns of one event loop at one shard: begun over a lane, granted when their conversation is free."""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections.abc import Callable
from typing import Any

from fsm_ray import protocol
from fsm_ray.errors import FsmRayError, NamespaceUnavailable, Overloaded
from fsm_ray.namespace.leases import LEASE_S, MAX_TURNS
from fsm_ray.protocol import GRANTS, NO_TURN, Grant, RecordView, grants_request
from fsm_ray.routing.asking import Asking
from fsm_ray.routing.lanes import Lane
from fsm_ray.tally import ClientTally, now_ns

SIGN_OF_LIFE_S = LEASE_S / 3
"""How often a shard hears of a client that has turns."""


class LoopTurns:
    """Begins and ends turns. Those that wait begin again over a new connection, at the end of the queue."""

    def __init__(
        self, lane: Lane, asking: Asking, timeout_s: float, tally: ClientTally | None = None
    ) -> None:
        """`timeout_s`: how long the shard may take to answer what it can answer at once."""
        self._tally = tally or ClientTally()
        self._lane = lane
        self._asking = asking
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count(NO_TURN + 1)
        self._open: set[int] = set()
        """Turns that were begun and not ended."""
        self._ending: dict[int, None] = {}
        """Turns that were ended, of which the shard may not know yet; at most MAX_TURNS, the oldest first."""
        self._untold: set[int] = set()
        """Those of them of which the shard could not be told: they are to be ended again."""
        self._early: dict[int, RecordView | None] = {}
        """Grants that came before those who asked knew that they had to wait."""
        self._waiting: dict[int, tuple[bytes, asyncio.Future[RecordView | None]]] = {}
        self._listening: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._is_closed = False

    @property
    def session_id(self) -> bytes:
        """What the shard knows these turns by, beside their numbers."""
        return self._lane.session_id

    @property
    def has_work(self) -> bool:
        return bool(self._waiting)

    async def begin(self, key: bytes, timeout_s: float) -> tuple[int, RecordView | None]:
        """The number of a turn that has the conversation of this encoded key, and the record.

        Raises:
            TimeoutError: others kept it for so long.
            Overloaded: too many wait for it.
            NamespaceUnavailable: the shard gave no answer in time.
        """
        number = next(self._numbers)
        self._open.add(number)
        self._arm()
        begun = self._lane.submit(protocol.begin_turn(number, key))
        try:
            record = await begun
            if record is False:
                record = await self._wait(number, key, timeout_s)
        except BaseException:
            if _is_refused(begun):
                self.committed(number)
            else:
                self.end(number)
            raise
        return number, record

    def end(self, number: int) -> None:
        """End a turn without a commit; nobody waits for that."""
        self.committed(number)
        self._ending[number] = None
        if len(self._ending) > MAX_TURNS:
            # A shard has no more, so it never had this one, or has ended it with its silent session.
            del self._ending[next(iter(self._ending))]
        self._submit(number)

    def committed(self, number: int) -> None:
        """Forget a turn of which the shard knows, by its commit say, that there is none any more."""
        self._open.discard(number)
        if self._early:
            self._early.pop(number, None)

    def connected(self) -> None:
        """Let all that wait begin again: the shard forgot them with the last connection."""
        for number, (key, _) in tuple(self._waiting.items()):
            self._ask_again(number, key)

    def fail(self, error: Callable[[], FsmRayError]) -> None:
        """Give every turn that waits this error."""
        for _, granted in self._waiting.values():
            if not granted.done():
                granted.set_exception(error())

    def close(self) -> None:
        """End all turns, and send nothing more. Ray calls need to be told: they end with no connection."""
        self._is_closed = True
        left = self._open.union(self._ending)
        if left:
            ends = [protocol.end_turn(number) for number in left]
            self._asking.tell(lambda _: protocol.turn_request(0, ends, self.session_id))
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._listening is not None:
            self._listening.cancel()

    async def _wait(self, number: int, key: bytes, timeout_s: float) -> RecordView | None:
        """The record, once the conversation is this turn's."""
        if number in self._early:
            return self._early.pop(number)
        granted: asyncio.Future[RecordView | None] = self._loop.create_future()
        self._waiting[number] = (key, granted)
        if self._listening is None:
            self._listening = self._loop.create_task(self._listen())
        began_ns = now_ns()
        try:
            async with asyncio.timeout(timeout_s):
                record = await granted
        except TimeoutError:
            self._tally.turns_given_up += 1
            raise
        else:
            self._tally.turn_wait_ns.add(now_ns() - began_ns)
            return record
        finally:
            del self._waiting[number]

    async def _listen(self) -> None:
        """Ask the shard who of those that wait has a conversation, as long as any does."""
        try:
            while self._waiting:
                results = await self._asking.ask(
                    GRANTS,
                    lambda number: grants_request(number, self.session_id, SIGN_OF_LIFE_S),
                    SIGN_OF_LIFE_S + self._timeout_s,
                )
                for grant in results:
                    if isinstance(grant, Grant):
                        self._granted(grant.turn, grant.record)
                    else:
                        self.connected()  # a record that cannot be decoded here: whose it is, gets the error
        except FsmRayError as error:
            self.fail(error.copied)
        finally:
            self._listening = None

    def _granted(self, number: int, record: RecordView | None) -> None:
        _, granted = self._waiting.get(number, (b"", None))
        if granted is not None:
            if not granted.done():
                granted.set_result(record)
        elif number in self._open:
            self._early[number] = record
        # Otherwise it waits no more, and was ended: the shard is told of that next.

    def _ask_again(self, number: int, key: bytes) -> None:
        begun = self._lane.submit(protocol.begin_turn(number, key))
        begun.add_done_callback(functools.partial(self._begun_again, number))

    def _begun_again(self, number: int, begun: asyncio.Future[Any]) -> None:
        if begun.cancelled():
            return
        error = begun.exception()
        _, granted = self._waiting.get(number, (b"", None))
        if error is not None:
            if granted is not None and not granted.done():
                granted.set_exception(error)
        elif begun.result() is not False:
            self._granted(number, begun.result())

    def _arm(self) -> None:
        if self._timer is None and not self._is_closed:
            self._timer = self._loop.call_later(SIGN_OF_LIFE_S, self._show_life)

    def _show_life(self) -> None:
        """Keep the session alive, and with it its turns: so those that were ended must not be forgotten."""
        self._timer = None
        untold, self._untold = self._untold, set()
        for number in untold.intersection(self._ending):
            self._submit(number)
        if self._open:
            self._submit(NO_TURN)
            self._arm()

    def _submit(self, number: int) -> None:
        """Send an end that nobody waits for."""
        if not self._is_closed:
            sent = self._lane.submit(protocol.end_turn(number))
            sent.add_done_callback(functools.partial(self._told, number))

    def _told(self, number: int, sent: asyncio.Future[Any]) -> None:
        error = None if sent.cancelled() else sent.exception()
        if isinstance(error, NamespaceUnavailable) and number in self._ending:
            self._untold.add(number)
            self._arm()
        else:
            self._ending.pop(number, None)


def _is_refused(begun: asyncio.Future[Any]) -> bool:
    """Whether the turn was not even begun, since there was no room for it."""
    return begun.done() and not begun.cancelled() and isinstance(begun.exception(), Overloaded)
