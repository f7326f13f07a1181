"""Leases: which turn has which conversation, and which wait for it, first come first served.

A turn belongs to a client's session and ends with it: at once when the connection is gone that it came by,
and when the session is not heard of for LEASE_S. Only conversations that a turn has take memory.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field

from fsm_ray.errors import Overloaded
from fsm_ray.tally import ShardTally

LEASE_S = 30.0
"""How long a session that is silent keeps its turns. Clients make themselves heard three times as often."""

MAX_WAITERS = 1_000
"""Turns that may wait for one conversation."""

MAX_TURNS = 65_536
"""Turns of one shard, those that wait among them."""

MAX_SESSIONS = 65_536
"""Clients of one shard that use turns at a time."""

TurnId = tuple[bytes, int]
"""A session, and the number that it gave to the turn."""


@dataclass(slots=True)
class _Session:
    heard_at_s: float
    turns: dict[int, tuple[bytes, Hashable]] = field(default_factory=dict)
    """Number of each of its turns -> the conversation's key, and the connection that the turn came by."""
    granted: dict[int, bytes] = field(default_factory=dict)
    """Those of its turns that waited, have their conversation, and were not told: number -> key."""


class Leases:
    """The turns of one shard.

    `on_granted` is called with a session when one that waited of its turns has the conversation.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        on_granted: Callable[[bytes], None],
        tally: ShardTally | None = None,
    ) -> None:
        self._clock = clock
        self._on_granted = on_granted
        self._queues: dict[bytes, dict[TurnId, None]] = {}
        """Key -> the turn that has the conversation, then those that wait for it, in the order they came."""
        self._sessions: dict[bytes, _Session] = {}
        self._connections: dict[Hashable, dict[TurnId, None]] = {}
        """Connection -> the turns that came by it."""
        self._tally = tally or ShardTally()
        self._open = 0
        """How many turns there are."""

    def __len__(self) -> int:
        """How many conversations a turn has."""
        return len(self._queues)

    @property
    def lost(self) -> int:
        """Turns that had their conversation and ended with their session."""
        return self._tally.turns_lost

    @property
    def waiting(self) -> int:
        """How many turns wait."""
        return sum(map(len, self._queues.values())) - len(self._queues)

    def heard_of(self, session: bytes) -> None:
        """Note that the session lives.

        Raises:
            Overloaded: it is a new one, and there are too many.
        """
        known = self._sessions.get(session)
        if known is None:
            if len(self._sessions) >= MAX_SESSIONS:
                raise Overloaded(f"{MAX_SESSIONS} clients use turns of this shard already: retry later")
            self._sessions[session] = _Session(self._clock())
        else:
            known.heard_at_s = self._clock()

    def begin(self, turn: TurnId, key: bytes, connection: Hashable) -> bool:
        """Take the conversation, or a place in its queue; tell whether it is taken. Safe to repeat.

        The session was heard of before.

        Raises:
            Overloaded: too many wait for it already, or there are too many turns.
        """
        session, number = turn
        turns = self._sessions[session].turns
        if number not in turns and self._open >= MAX_TURNS:
            raise Overloaded(f"{MAX_TURNS} turns of this shard are open: retry later")
        queue = self._queues.get(key)
        if queue is None:
            self._queues[key] = {turn: None}
        elif turn not in queue:
            if len(queue) > MAX_WAITERS:
                raise Overloaded(f"{MAX_WAITERS} turns wait for this conversation already: retry later")
            queue[turn] = None
        else:
            self.keep(turn)  # it may have come by another connection
        self._open += number not in turns
        turns[number] = (key, connection)
        self._connections.setdefault(connection, {})[turn] = None
        return self.has(turn, key)

    def has(self, turn: TurnId, key: bytes) -> bool:
        """Whether the conversation is the turn's."""
        queue = self._queues.get(key)
        return queue is not None and next(iter(queue)) == turn

    def is_held(self, key: bytes) -> bool:
        """Whether any turn has the conversation."""
        return key in self._queues

    def take_granted(self, session: bytes) -> dict[int, bytes]:
        """The turns that have their conversation and were not told, and their keys; they are told now."""
        known = self._sessions.get(session)
        if known is None:
            return {}
        granted, known.granted = known.granted, {}
        return granted

    def end(self, turn: TurnId) -> bool:
        """End the turn, and let the next one have the conversation; tell if there was such a turn."""
        key = self.keep(turn)
        if key is None:
            return False
        self.release(turn, key)
        return True

    def keep(self, turn: TurnId) -> bytes | None:
        """Let nothing but `release` end the turn; return its key, or None if there is no such turn.

        What is being committed must not be granted before it is: the next turn would begin with what was.
        """
        session, number = turn
        known = self._sessions.get(session)
        found = None if known is None else known.turns.pop(number, None)
        if known is None or found is None:
            return None
        self._open -= 1
        known.granted.pop(number, None)
        key, connection = found
        turns = self._connections[connection]
        del turns[turn]
        if not turns:
            del self._connections[connection]
        return key

    def release(self, turn: TurnId, key: bytes) -> None:
        """End a turn that was kept, and let the next one have the conversation. Safe to repeat."""
        self.keep(turn)
        queue = self._queues.get(key, {})
        if turn not in queue:
            return
        had_it = self.has(turn, key)
        del queue[turn]
        if not queue:
            del self._queues[key]
        elif had_it:
            session, number = next(iter(queue))
            self._sessions[session].granted[number] = key
            self._on_granted(session)

    def disconnected(self, connection: Hashable) -> None:
        """End the turns that came by this connection."""
        self._lose(self._connections.get(connection, ()))

    def expire(self) -> None:
        """End the turns of sessions that were silent for LEASE_S, and forget these sessions."""
        horizon_s = self._clock() - LEASE_S
        silent = [session for session, known in self._sessions.items() if known.heard_at_s <= horizon_s]
        self._lose((session, number) for session in silent for number in self._sessions[session].turns)
        for session in silent:
            del self._sessions[session]

    def _lose(self, turns: Iterable[TurnId]) -> None:
        # Those that wait go first, so that none of them is granted what it loses in the next moment.
        keys = {turn: self._sessions[turn[0]].turns[turn[1]][0] for turn in turns}
        for turn, key in sorted(keys.items(), key=lambda each: self.has(*each)):
            self._tally.turns_lost += self.has(turn, key)
            self.end(turn)
