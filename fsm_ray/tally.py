"""Tally: plain numbers, counted where the work is done and published by somebody else, now and then.

What is counted for each request or operation costs an index and an addition. A tally is counted by one
thread; any other may read it, and may miss the last few.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Sequence
from time import perf_counter_ns

from fsm_ray import protocol
from fsm_ray.errors import (
    ConfigurationError,
    FsmRayError,
    InvalidInput,
    NamespaceUnavailable,
    OutcomeUnknown,
    Overloaded,
    TurnLost,
    UnknownBot,
    VersionConflict,
)
from fsm_ray.protocol import KINDS

now_ns = perf_counter_ns
"""The clock of all durations here."""

MEASURE_EVERY = 16
"""Of the requests of a session, one in so many is measured: its time, and how much came together.

A lone task would feel it if every one were. Operations and errors are all counted.
"""

TOTAL = -1
"""Where a spread has the sum of all its numbers."""

_PLACES = 66
"""For numbers of 0 to 64 bits, and the total."""


class Spread:
    """How often a number was how large: `counts[n]` of them had n bits, so were less than 2**n."""

    __slots__ = ("counts",)

    def __init__(self) -> None:
        self.counts = [0] * _PLACES

    def add(self, number: int) -> None:
        counts = self.counts
        counts[number.bit_length()] += 1
        counts[TOTAL] += number

    def __len__(self) -> int:
        """How many there were."""
        return sum(self.counts[:TOTAL])

    @property
    def total(self) -> int:
        """All of them, added up."""
        return self.counts[TOTAL]

    def merge(self, other: Spread) -> None:
        """Count all that the other one counted."""
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]


def add_waits(spread: Spread, since_s: Sequence[float], now_s: float) -> None:
    """Count how long ago each of these moments was, in nanoseconds.

    They are in order, so nearly always all fall into one bucket or two, which takes no look at each.
    """
    counts, count = spread.counts, len(since_s)
    counts[TOTAL] += int((count * now_s - sum(since_s)) * 1e9)
    bits = int((now_s - since_s[-1]) * 1e9).bit_length()
    most_bits = int((now_s - since_s[0]) * 1e9).bit_length()
    while bits < most_bits:
        older = bisect_right(since_s, now_s - (1 << bits) / 1e9, 0, count)
        counts[bits] += count - older
        count = older
        bits += 1
    counts[bits] += count


OPERATIONS: dict[type, str] = {
    protocol.SetRecord: "set_state",
    protocol.EnterState: "enter_state",
    protocol.SetData: "set_data",
    protocol.UpdateData: "update_data",
    protocol.Patch: "patch",
    protocol.Clear: "clear",
    protocol.Transact: "transaction",
    protocol.CommitTurn: "commit_turn",
    protocol.ReadContent: "get_data",
    protocol.ReadRecord: "get_state",
    protocol.Begin: "begin_turn",
    protocol.End: "end_turn",
    protocol.ScanRequest: "scan",
    protocol.CountRequest: "count",
    protocol.WatchRequest: "watch",
}
"""What a shard does, by what asks for it -> its name in metrics. A page of a scan counts as one."""

REQUESTS = {
    protocol.WRITE: "write",
    protocol.READ_CONTENT: "read",
    protocol.READ_RECORD: "read",
    protocol.TURN: "turn",
    protocol.GRANTS: "turn",
    protocol.SCAN: "scan",
    protocol.COUNT: "count",
    protocol.WATCH: "watch",
}
"""Kind of a request -> its name in metrics."""

_WAITING = frozenset({protocol.GRANTS, protocol.WATCH})
"""Kinds of requests that wait until something happens: the time that they take tells nothing."""

_OF_MANY = frozenset({protocol.SCAN, protocol.COUNT})
"""Kinds of requests that are one operation, however many results it has."""

OK = "ok"
OVERLOADED = "overloaded"
UNKNOWN = "unknown"

_OUTCOMES: tuple[tuple[type[FsmRayError], str], ...] = (
    (VersionConflict, "conflict"),
    (InvalidInput, "invalid"),
    (TurnLost, "turn_lost"),
    (Overloaded, OVERLOADED),
    (OutcomeUnknown, UNKNOWN),
    (NamespaceUnavailable, "unavailable"),
    (UnknownBot, "unknown_bot"),
    (ConfigurationError, "misconfigured"),
)
"""Of an error, the first that fits."""

OUTCOMES = (OK, *(outcome for _, outcome in _OUTCOMES), "failed")
"""Every value that the tag `outcome` can have."""


def outcome_of(error: type[FsmRayError]) -> str:
    """How an operation ended that met this error."""
    return next((outcome for kind, outcome in _OUTCOMES if issubclass(error, kind)), "failed")


_NO_OPERATIONS = dict.fromkeys(OPERATIONS, 0)


class OperationTally:
    """Operations that were done or refused."""

    __slots__ = ("failed", "operations")

    def __init__(self) -> None:
        self.operations = _NO_OPERATIONS.copy()
        """How many, by what asks for them."""
        self.failed: defaultdict[tuple[type, type[FsmRayError]], int] = defaultdict(int)
        """Those of them that met an error."""

    def count_failed(self, operation: type, error: FsmRayError) -> None:
        """Count an operation that met an error, and is among `operations`."""
        self.failed[operation, type(error)] += 1

    def add(self, done: OperationTally) -> None:
        """Count all that the other one counted."""
        for operation, count in done.operations.items():
            if count:
                self.operations[operation] += count
        for failed, count in done.failed.items():
            self.failed[failed] += count

    def add_failed(self, undone: OperationTally, error: FsmRayError) -> None:
        """Count all operations that the other one counted; all of them met this error in the end."""
        for operation, count in undone.operations.items():
            if count:
                self.operations[operation] += count
                self.failed[operation, type(error)] += count


class ShardTally(OperationTally):
    """What one shard did, since its actor's process began."""

    def __init__(self) -> None:
        super().__init__()
        self.request_ns = [Spread() for _ in KINDS]
        """From the arrival of a request to its reply, by its kind; of one in MEASURE_EVERY."""
        self.batch = [Spread() for _ in KINDS]
        """Operations of a request, by its kind; of one in MEASURE_EVERY."""
        self.commit_ns = Spread()
        """From the moment that the store got a commit until it had it."""
        self.commit_operations = Spread()
        """Operations of a commit."""
        self.commits_failed = 0
        self.ownerships_lost = 0
        """How often another process had the store, or the store did not confirm in time that it has none."""
        self.answered_again = 0
        """Requests that were sent again, though they had taken effect."""
        self.turns_lost = 0
        """Turns that had their conversation and ended with their client."""
        self.connections_refused = 0
        """Peers that could not prove who they are, or broke the rules."""

    def refused(self, error: type[FsmRayError]) -> int:
        """How many operations met this error."""
        return sum(count for (_, kind), count in self.failed.items() if issubclass(kind, error))


class ClientTally:
    """What one shard did for one event loop, or one thread, as that saw it."""

    def __init__(self) -> None:
        self.answer_ns = [Spread() for _ in KINDS]
        """From the call of an operation to its answer, by kind of request; of one in MEASURE_EVERY."""
        self.failed: Counter[tuple[int, type[FsmRayError]]] = Counter()
        """Answers that were errors."""
        self.given_up: Counter[tuple[int, type[FsmRayError]]] = Counter()
        """Operations that got no answer."""
        self.turn_wait_ns = Spread()
        """How long turns waited that had to, until they had their conversation."""
        self.turns_given_up = 0
        """Turns that waited, and got none in time."""
        self.connections = 0
        self.retries = 0
        """Attempts to reach the shard that failed and were followed by another."""
        self.resends = 0
        """Requests that were sent once more, over a new connection."""

    def measure(self, kind: int, operations: int, took_ns: int) -> None:
        """Count how long a request took that had so many operations, unless it waited for something."""
        if kind not in _WAITING:
            for _ in range(1 if kind in _OF_MANY else operations):
                self.answer_ns[kind].add(took_ns)

    def merge(self, other: ClientTally) -> None:
        """Count all that the other one counted."""
        for mine, theirs in zip(self.answer_ns, other.answer_ns, strict=True):
            mine.merge(theirs)
        # A copy is taken in one step, though its thread goes on counting.
        self.failed.update(other.failed.copy())
        self.given_up.update(other.given_up.copy())
        self.turn_wait_ns.merge(other.turn_wait_ns)
        self.turns_given_up += other.turns_given_up
        self.connections += other.connections
        self.retries += other.retries
        self.resends += other.resends
