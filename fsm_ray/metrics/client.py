"""What a process publishes that operates on bots: how they look from there."""

from __future__ import annotations

import logging
import os
import threading
import weakref

import ray
from ray.util.client import ray as ray_client

from fsm_ray.logs import where
from fsm_ray.metrics import catalog
from fsm_ray.metrics.publisher import PUBLISH_EVERY_S, Publisher
from fsm_ray.tally import REQUESTS, ClientTally, Spread, outcome_of

logger = logging.getLogger(__name__)

_NS = 1e-9


class ClientMetrics:
    """The metrics of one storage, published by a thread of its own, from the first tally until `stop`.

    Only where this process is a part of a Ray cluster. One that is connected by Ray Client, or was forked,
    counts for nobody: there is no Ray in it to publish anything.
    """

    def __init__(self, publish_every_s: float = PUBLISH_EVERY_S) -> None:
        self._publish_every_s = publish_every_s
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._shards: dict[tuple[str, int], _Shard] = {}
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def tally(self, owner: object, bot_name: str, shard: int) -> ClientTally:
        """A new tally of this shard, which is published for as long as its owner lives."""
        tally = ClientTally()
        if self._pid != os.getpid():
            return tally  # the lock may be held by a thread that is not here
        with self._lock:
            if (bot_name, shard) not in self._shards:
                self._shards[bot_name, shard] = _Shard(bot_name, shard)
            self._shards[bot_name, shard].tallies.append((weakref.ref(owner), tally))
            if self._thread is None and not self._stopped.is_set():
                self._thread = threading.Thread(
                    target=_keep_publishing,
                    args=(weakref.ref(self), self._stopped, self._publish_every_s),
                    name="fsm_ray metrics",
                    daemon=True,
                )
                self._thread.start()
        return tally

    def publish(self) -> None:
        """Publish what was counted since the last time."""
        if self._pid != os.getpid() or not ray.is_initialized() or ray_client.is_connected():
            return
        with self._lock:
            for shard in self._shards.values():
                shard.publish()

    def stop(self) -> None:
        """Publish for the last time. May be called again."""
        if not self._stopped.is_set():
            self._stopped.set()
            if self._thread is not None and self._pid == os.getpid():
                self._thread.join(1.0)  # at once, unless it is just publishing
            self.publish()


class _Shard:
    """The tallies of one shard: of each loop, or each thread, that has one."""

    def __init__(self, bot_name: str, shard: int) -> None:
        self.tallies: list[tuple[weakref.ref[object], ClientTally]] = []
        self._ended = ClientTally()
        """All that was counted for owners that are gone."""
        self._publisher = Publisher(bot_name, shard)

    def publish(self) -> None:
        gone = [tally for owner, tally in self.tallies if owner() is None]
        if gone:
            # Found gone first: what a thread counted at last is in its tally by now.
            self.tallies = [(owner, tally) for owner, tally in self.tallies if tally not in gone]
            for tally in gone:
                self._ended.merge(tally)
        total = ClientTally()
        total.merge(self._ended)
        for _, tally in self.tallies:
            total.merge(tally)
        self._publish(total)

    def _publish(self, total: ClientTally) -> None:
        publisher = self._publisher
        for request in dict.fromkeys(REQUESTS.values()):
            kinds = [kind for kind, name in REQUESTS.items() if name == request]
            answers = Spread()
            for kind in kinds:
                answers.merge(total.answer_ns[kind])
            publisher.histogram(catalog.CLIENT_SECONDS, answers, _NS, request=request)
            for outcome, count in _outcomes(total, kinds).items():
                publisher.counter(catalog.CLIENT_FAILURES, count, request=request, outcome=outcome)
        publisher.histogram(catalog.CLIENT_TURN_WAIT_SECONDS, total.turn_wait_ns, _NS)
        publisher.counter(catalog.CLIENT_TURNS_GIVEN_UP, total.turns_given_up)
        publisher.counter(catalog.CLIENT_CONNECTIONS, total.connections)
        publisher.counter(catalog.CLIENT_RETRIES, total.retries)
        publisher.counter(catalog.CLIENT_RESENDS, total.resends)


def _outcomes(total: ClientTally, kinds: list[int]) -> dict[str, int]:
    """How operations of these kinds ended that failed."""
    ends: dict[str, int] = {}
    for errors in (total.failed, total.given_up):
        for (kind, error), count in errors.items():
            if kind in kinds:
                outcome = outcome_of(error)
                ends[outcome] = ends.get(outcome, 0) + count
    return ends


def _keep_publishing(
    metrics: weakref.ref[ClientMetrics], stopped: threading.Event, publish_every_s: float
) -> None:
    """Publish until the storage is closed, or gone."""
    while not stopped.wait(publish_every_s):
        storage_metrics = metrics()
        if storage_metrics is None:
            return
        try:
            storage_metrics.publish()
        except Exception as error:  # noqa: BLE001  # numbers that are missing must break nothing
            logger.warning("metrics are published no more: %s", where(error))
            return
        del storage_metrics
