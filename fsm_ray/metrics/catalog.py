"""Catalog: every metric, with its tags. A tag has few values: never a key, a chat or a user."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SHARD = ("bot", "shard")

Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric."""

    name: str
    """As Ray is told it; see `series` for what Prometheus reads."""
    kind: Kind
    meaning: str
    tags: tuple[str, ...] = SHARD
    exponents: range = range(0)
    """Of a histogram: its buckets end one before these powers of two, of nanoseconds if it counts seconds."""

    @property
    def series(self) -> tuple[str, ...]:
        """What Prometheus reads.

        Ray puts a `ray_` in front of all names, and a `_total` behind those of counters. A histogram is three
        of them: Ray's own takes each observation by itself, at several microseconds each.
        """
        if self.kind == "gauge":
            return (f"ray_{self.name}",)
        if self.kind == "counter":
            return (f"ray_{self.name}_total",)
        return tuple(f"ray_{self.name}_{part}_total" for part in ("bucket", "sum", "count"))


_SECONDS = range(14, 36)
"""From 16 microseconds to 34 seconds."""

_CLIENT_SECONDS = range(15, 36, 2)
"""From 33 microseconds to 34 seconds, in steps of four: of worker processes there are many."""

_OPERATIONS = range(1, 15)
"""1, 3, 7 and so on, to 16383."""

OPERATIONS = Metric(
    "fsm_ray_operations",
    "counter",
    "Operations that the shard did or refused",
    (*SHARD, "operation", "outcome"),
)
REQUEST_SECONDS = Metric(
    "fsm_ray_request_seconds",
    "histogram",
    "From a request's arrival to its reply, the commit included; of one in 16, and of each scan and count",
    (*SHARD, "request"),
    _SECONDS,
)
REQUEST_OPERATIONS = Metric(
    "fsm_ray_request_operations",
    "histogram",
    "Operations that came together in one request; of one in 16",
    (*SHARD, "request"),
    _OPERATIONS,
)
COMMIT_SECONDS = Metric(
    "fsm_ray_commit_seconds", "histogram", "How long the store took for a commit", SHARD, _SECONDS
)
COMMIT_OPERATIONS = Metric(
    "fsm_ray_commit_operations", "histogram", "Operations of one commit", SHARD, _OPERATIONS
)
COMMITS_FAILED = Metric(
    "fsm_ray_commits_failed", "counter", "Commits that failed; after each, the store is opened anew"
)
OWNERSHIPS_LOST = Metric(
    "fsm_ray_ownerships_lost",
    "counter",
    "How often the shard lost its store: to another process, or as it was silent for a whole lease",
)
ANSWERED_AGAIN = Metric(
    "fsm_ray_requests_answered_again",
    "counter",
    "Writes that were sent again though they had taken effect, and got the same answer",
)
TURNS_LOST = Metric(
    "fsm_ray_turns_lost", "counter", "Turns that ended with their worker, or its connection, or its silence"
)
CONNECTIONS_REFUSED = Metric(
    "fsm_ray_connections_refused",
    "counter",
    "Connections closed by the shard, for the peer did not know its secret or broke the rules",
)
OPENINGS = Metric(
    "fsm_ray_openings", "counter", "How often the shard's store was opened and its records loaded"
)
SERVING = Metric("fsm_ray_serving", "gauge", "1 while the shard serves, 0 while its store is not open")
RECORDS = Metric("fsm_ray_records", "gauge", "Records")
RECORD_BYTES = Metric(
    "fsm_ray_record_bytes",
    "gauge",
    "What keys and records take in the actor's memory; measured every half a minute or less often",
)
SESSIONS = Metric("fsm_ray_sessions", "gauge", "Client sessions whose last write is remembered")
TURNS = Metric("fsm_ray_turns", "gauge", "Conversations that a turn has")
WAITING_TURNS = Metric("fsm_ray_waiting_turns", "gauge", "Turns that wait for a conversation")
WATCHES = Metric("fsm_ray_watches", "gauge", "Watches that wait for changes")
SCANS = Metric("fsm_ray_scans", "gauge", "Scans under way")
CONNECTIONS = Metric("fsm_ray_connections", "gauge", "Connections of clients, over sockets")
RECOVERY_SECONDS = Metric(
    "fsm_ray_recovery_seconds", "gauge", "How long it took to open the store and load all records"
)
CLIENT_FAILURES = Metric(
    "fsm_ray_client_failures",
    "counter",
    "Operations of workers that ended with an error, or without an answer",
    (*SHARD, "request", "outcome"),
)
CLIENT_SECONDS = Metric(
    "fsm_ray_client_operation_seconds",
    "histogram",
    "From the call of an operation to its answer; of one request in 16",
    (*SHARD, "request"),
    _CLIENT_SECONDS,
)
CLIENT_TURN_WAIT_SECONDS = Metric(
    "fsm_ray_client_turn_wait_seconds",
    "histogram",
    "How long turns waited that had to, until they had their conversation",
    SHARD,
    _CLIENT_SECONDS,
)
CLIENT_TURNS_GIVEN_UP = Metric(
    "fsm_ray_client_turns_given_up", "counter", "Turns that waited for too long (TurnTimeout)"
)
CLIENT_CONNECTIONS = Metric(
    "fsm_ray_client_connections", "counter", "Connections made to the shard: more than one is a reconnection"
)
CLIENT_RETRIES = Metric(
    "fsm_ray_client_retries", "counter", "Attempts to reach the shard that failed and were repeated"
)
CLIENT_RESENDS = Metric(
    "fsm_ray_client_resends", "counter", "Requests that were sent once more, over a new connection"
)

METRICS = tuple(each for each in tuple(globals().values()) if isinstance(each, Metric))
"""All of them."""
