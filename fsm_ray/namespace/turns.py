"""Turns: the requests by which clients begin and end turns at a shard, and learn of those granted."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from fsm_ray import protocol
from fsm_ray.errors import FsmRayError, TurnLost
from fsm_ray.namespace.leases import Leases, TurnId
from fsm_ray.namespace.refusals import refusal
from fsm_ray.protocol import GRANTS, NO_TURN, TURN, Begin, CommitTurn, GrantsRequest, TurnRequest, reply
from fsm_ray.tally import ShardTally

_QUEUED = protocol.encode_result(value=False)


@dataclass(frozen=True, slots=True)
class _Listening:
    """A grants request that waits for its reply."""

    number: int
    answer: Callable[[bytes], None]
    timer: asyncio.TimerHandle


class Turns:
    """The turns of one shard. `read` gives the blob of a committed record, or NIL; `clock` counts seconds."""

    def __init__(self, read: Callable[[bytes], bytes], clock: Callable[[], float], tally: ShardTally) -> None:
        self.leases = Leases(clock, self._tell, tally)
        self._tally = tally
        self._read = read
        self._listening: dict[bytes, _Listening] = {}
        """By their session."""
        self._listeners: defaultdict[Hashable, set[bytes]] = defaultdict(set)
        """Connection -> the sessions that listen by it."""

    def handle(self, request: TurnRequest, connection: Hashable) -> bytes:
        """Begin and end turns that came by this connection; return the reply."""
        try:
            self.leases.heard_of(request.session)
        except FsmRayError as error:
            return refusal(request, error, self._tally)
        results = []
        for operation in request.operations:
            turn = (request.session, operation.turn)
            # A sign of life ends no turn, and is no operation.
            self._tally.operations[type(operation)] += operation.turn != NO_TURN
            if type(operation) is not Begin:
                results.append(protocol.encode_result(self.leases.end(turn)))
                continue
            try:
                is_granted = self.leases.begin(turn, operation.key, connection)
            except FsmRayError as error:
                self._tally.count_failed(Begin, error)
                results.append(protocol.encode_error(error, operation.key))
            else:
                results.append(self._read(operation.key) if is_granted else _QUEUED)
        return reply(TURN, request.number, results)

    def listen(self, request: GrantsRequest, answer: Callable[[bytes], None]) -> bytes | None:
        """The reply that tells what was granted, or None: `answer` gets it when something is, or in time.

        One that came before, of the same session, gets no reply any more.
        """
        session = request.session
        try:
            self.leases.heard_of(session)
        except FsmRayError as error:
            return refusal(request, error, self._tally)
        self._stop_listening(session)
        granted = self.leases.take_granted(session)
        if granted:
            return self._reply(request.number, granted)
        timer = asyncio.get_running_loop().call_later(request.wait_s, self._tell, session)
        self._listening[session] = _Listening(request.number, answer, timer)
        self._listeners[answer].add(session)
        return None

    def check(self, operation: CommitTurn) -> TurnId:
        """The turn that is to be committed.

        Raises:
            TurnLost: the conversation is not its own any more.
        """
        turn = (operation.turn_session, operation.turn)
        if not self.leases.has(turn, operation.key):
            raise TurnLost(
                "the turn lost its conversation: the actor was restarted, its connection broke or its worker "
                "was silent for too long. Nothing was changed: handle the update again"
            )
        return turn

    def disconnected(self, connection: Hashable) -> None:
        """End the turns that came by this connection."""
        for session in tuple(self._listeners.get(connection, ())):
            self._stop_listening(session)
        self.leases.disconnected(connection)

    def stop(self) -> None:
        """Answer nobody any more."""
        for session in tuple(self._listening):
            self._stop_listening(session)

    def _tell(self, session: bytes) -> None:
        """Answer who listens for this session."""
        listening = self._stop_listening(session)
        if listening is not None:
            listening.answer(self._reply(listening.number, self.leases.take_granted(session)))

    def _stop_listening(self, session: bytes) -> _Listening | None:
        listening = self._listening.pop(session, None)
        if listening is not None:
            listening.timer.cancel()
            sessions = self._listeners[listening.answer]
            sessions.remove(session)
            if not sessions:
                del self._listeners[listening.answer]
        return listening

    def _reply(self, number: int, granted: dict[int, bytes]) -> bytes:
        grants = [protocol.encode_grant(turn, self._read(key)) for turn, key in granted.items()]
        return reply(GRANTS, number, grants)
