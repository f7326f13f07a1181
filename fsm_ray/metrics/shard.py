"""What the actor of a shard publishes."""

from __future__ import annotations

from fsm_ray.metrics import catalog
from fsm_ray.metrics.publisher import Publisher
from fsm_ray.namespace import NamespaceStatistics
from fsm_ray.tally import OK, OPERATIONS, OVERLOADED, REQUESTS, ShardTally, Spread, outcome_of

_NS = 1e-9


class ShardMetrics:
    """The metrics of one shard, for as long as its actor's process lives."""

    def __init__(self, bot_name: str, shard: int, tally: ShardTally) -> None:
        self._publisher = Publisher(bot_name, shard)
        self._tally = tally

    def publish(self) -> None:
        """Publish what was counted, since the process began."""
        tally, publisher = self._tally, self._publisher
        self._publish_operations()
        for request in dict.fromkeys(REQUESTS.values()):
            publisher.histogram(
                catalog.REQUEST_SECONDS, _of_request(tally.request_ns, request), _NS, request=request
            )
            publisher.histogram(
                catalog.REQUEST_OPERATIONS, _of_request(tally.batch, request), request=request
            )
        publisher.histogram(catalog.COMMIT_SECONDS, tally.commit_ns, _NS)
        publisher.histogram(catalog.COMMIT_OPERATIONS, tally.commit_operations)
        publisher.counter(catalog.COMMITS_FAILED, tally.commits_failed)
        publisher.counter(catalog.OWNERSHIPS_LOST, tally.ownerships_lost)
        publisher.counter(catalog.ANSWERED_AGAIN, tally.answered_again)
        publisher.counter(catalog.TURNS_LOST, tally.turns_lost)
        publisher.counter(catalog.CONNECTIONS_REFUSED, tally.connections_refused)

    def publish_state(
        self,
        statistics: NamespaceStatistics | None,
        *,
        record_bytes: int,
        connections: int,
        openings: int,
        recovery_s: float,
    ) -> None:
        """Publish what there is now; None: the store is not open."""
        publisher = self._publisher
        publisher.counter(catalog.OPENINGS, openings)
        publisher.gauge(catalog.SERVING, statistics is not None)
        publisher.gauge(catalog.CONNECTIONS, connections)
        publisher.gauge(catalog.RECOVERY_SECONDS, recovery_s)
        if statistics is None:
            return
        publisher.gauge(catalog.RECORDS, statistics.records)
        publisher.gauge(catalog.RECORD_BYTES, record_bytes)
        publisher.gauge(catalog.SESSIONS, statistics.sessions)
        publisher.gauge(catalog.TURNS, statistics.turns)
        publisher.gauge(catalog.WAITING_TURNS, statistics.waiting_turns)
        publisher.gauge(catalog.WATCHES, statistics.watches)
        publisher.gauge(catalog.SCANS, statistics.scans)

    def _publish_operations(self) -> None:
        failed: dict[tuple[type, str], int] = {}
        for (operation, error), count in self._tally.failed.items():
            key = (operation, outcome_of(error))
            failed[key] = failed.get(key, 0) + count
        for operation, total in self._tally.operations.items():
            ends = {outcome: count for (kind, outcome), count in failed.items() if kind is operation}
            if total:
                ends[OK] = total - sum(ends.values())
            # There before the first one, which an alert is to see.
            ends.setdefault(OVERLOADED, 0)
            for outcome, count in ends.items():
                self._publisher.counter(
                    catalog.OPERATIONS, count, operation=OPERATIONS[operation], outcome=outcome
                )


def _of_request(spreads: list[Spread], request: str) -> Spread:
    """What was counted of all kinds of requests that have this name."""
    merged = Spread()
    for kind, name in REQUESTS.items():
        if name == request:
            merged.merge(spreads[kind])
    return merged
