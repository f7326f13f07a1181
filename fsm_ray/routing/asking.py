"""Asking: requests of one event loop that a shard may take its time to answer, each by itself."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

from fsm_ray.errors import FsmRayError, Overloaded
from fsm_ray.protocol import GOOD_RESULTS, error_of
from fsm_ray.routing.lanes import Connection
from fsm_ray.tally import MEASURE_EVERY, ClientTally, now_ns

MAX_OPEN = 4_096
"""Requests of one loop to one shard that are under way."""


class Asking:
    """Sends requests that are safe to repeat: each again over a new connection, until it is answered."""

    def __init__(
        self,
        wake: Callable[[], None],
        too_late: Callable[..., FsmRayError],
        on_silence: Callable[[], None],
        tally: ClientTally | None = None,
    ) -> None:
        """Make one without a connection.

        Args:
            wake: called when there is work and no connection.
            too_late: makes the error of a request that is given up.
            on_silence: called when a request got no answer in time.
            tally: what to count in.
        """
        self._tally = tally or ClientTally()
        self._measured = random.randrange(MEASURE_EVERY)
        self._loop = asyncio.get_running_loop()
        self._wake = wake
        self._too_late = too_late
        self._on_silence = on_silence
        self._numbers = itertools.count(1)
        self._open: dict[int, tuple[bytes, asyncio.Future[Any]]] = {}
        """Number -> the request, and the future of its results."""
        self._send: Callable[[bytes], None] | None = None

    @property
    def has_work(self) -> bool:
        return bool(self._open)

    async def ask(self, kind: int, request: Callable[[int], bytes], timeout_s: float) -> Sequence[Any]:
        """The results that the shard gives to this request, which gets a number.

        Raises:
            NamespaceUnavailable: none came in time.
            Overloaded: too many are under way.
        """
        number, began_ns = next(self._numbers), now_ns()
        frame = request(number)
        try:
            results = await self._results(number, frame, timeout_s)
        except FsmRayError as error:
            self._tally.given_up[kind, type(error)] += 1
            raise
        if number % MEASURE_EVERY == self._measured:
            self._tally.measure(kind, len(results), now_ns() - began_ns)
        for result in results:
            if type(result) not in GOOD_RESULTS:
                self._tally.failed[kind, type(error_of(result))] += 1
        return results

    def tell(self, request: Callable[[int], bytes]) -> None:
        """Send a request whose results nobody waits for, if there is a connection."""
        if self._send is not None:
            self._send(request(next(self._numbers)))

    def connected(self, connection: Connection) -> None:
        self._send = connection.send
        for frame, _ in tuple(self._open.values()):
            self._send(frame)

    def disconnected(self) -> None:
        self._send = None

    def answered(self, number: int, results: Sequence[Any]) -> None:
        """Hand out what was asked for, unless nobody waits for it any more."""
        _, waiting = self._open.pop(number, (b"", None))
        if waiting is not None and not waiting.done():
            waiting.set_result(results)

    def fail(self, error: Callable[[], FsmRayError]) -> None:
        """Give every request this error."""
        for _, results in self._open.values():
            if not results.done():
                results.set_exception(error())

    def close(self) -> None:
        self._send = None

    async def _results(self, number: int, frame: bytes, timeout_s: float) -> Sequence[Any]:
        if len(self._open) >= MAX_OPEN:
            raise Overloaded(
                f"{MAX_OPEN} scans, counts and watches of this process are under way: retry later"
            )
        results: asyncio.Future[Sequence[Any]] = self._loop.create_future()
        self._open[number] = (frame, results)
        timer = self._loop.call_later(timeout_s, self._expire, results)
        try:
            if self._send is None:
                self._wake()
            else:
                self._send(frame)
            return await results
        finally:
            timer.cancel()
            self._open.pop(number, None)

    def _expire(self, results: asyncio.Future[Any]) -> None:
        if not results.done():
            results.set_exception(self._too_late(outcome_unknown=False))
            if self._send is not None:
                self._on_silence()
