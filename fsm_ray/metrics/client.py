"""What a process publishes that operates on bots: how they look from there."""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref

import ray
from ray.util.client import ray as ray_client

from fsm_ray.logs import Seldom, where
from fsm_ray.metrics import catalog
from fsm_ray.metrics.publisher import PUBLISH_EVERY_S, Publisher
from fsm_ray.protocol import WRITE
from fsm_ray.tally import REQUESTS, UNKNOWN, ClientTally, Spread, outcome_of

logger = logging.getLogger(__name__)

_NS = 1e-9


class ClientMetrics:
    """The metrics of one process: of all its storages, published by one thread from the first tally on.

    Only where this process is a part of a Ray cluster. One that is connected by Ray Client counts for nobody,
    and so does one that was forked after its parent had counted: there is no Ray in it to publish anything.
    """

    def __init__(self, publish_every_s: float | None = PUBLISH_EVERY_S) -> None:
        """`publish_every_s` None: there is no thread, and `publish` is called by somebody else."""
        self._publish_every_s = publish_every_s
        self._pid: int | None = None
        """The process that counts; None: nobody did yet."""
        self._lock = threading.Lock()
        self._shards: dict[tuple[str, int], _Shard] = {}
        self._session: tuple[str, str] | None = None
        """Of Ray, to which all was published so far."""
        self._thread: threading.Thread | None = None
        self._troubles = Seldom()

    def tally(self, owner: object, bot_name: str, shard: int) -> ClientTally:
        """A new tally of this shard. What was counted in it is published also when its owner is gone."""
        tally = ClientTally()
        if self._pid is None:
            self._pid = os.getpid()
        if self._pid != os.getpid():
            return tally  # the lock may be held by a thread that is not here
        with self._lock:
            if (bot_name, shard) not in self._shards:
                self._shards[bot_name, shard] = _Shard(bot_name, shard)
            self._shards[bot_name, shard].tallies.append((weakref.ref(owner), tally))
            if self._thread is None and self._publish_every_s is not None:
                self._thread = threading.Thread(
                    target=self._keep_publishing,
                    args=(self._publish_every_s,),
                    name="fsm_ray metrics",
                    daemon=True,
                )
                self._thread.start()
        return tally

    def publish(self) -> None:
        """Publish what was counted since the last time."""
        if self._pid != os.getpid():
            return
        with self._lock:
            totals = {shard: shard.total() for shard in self._shards.values()}
            try:
                if ray.is_initialized() and not ray_client.is_connected():
                    self._publish(totals)
            except Exception as error:  # noqa: BLE001  # numbers that are missing must break nothing
                if self._troubles.passes():
                    logger.warning("no metrics of this process: %s%s", where(error), self._troubles.more())

    def _publish(self, totals: dict[_Shard, ClientTally]) -> None:
        context = ray.get_runtime_context()
        session = context.get_node_id(), context.get_worker_id()
        is_new, self._session = session != self._session, session
        for shard, total in totals.items():
            if is_new:
                shard.begin_anew()
            shard.publish(total)

    def _keep_publishing(self, publish_every_s: float) -> None:
        while True:
            # At once: what is counted before a counter is seen for the first time is not seen to grow.
            self.publish()
            time.sleep(publish_every_s)


OF_THIS_PROCESS = ClientMetrics()
"""One for all storages, for Ray has one set of counters for the process, too.

Storages come and go: each task that is given one makes its own, which is gone before anything is published.
"""


class _Shard:
    """The tallies of one shard: of each loop, or each thread, that has one."""

    def __init__(self, bot_name: str, shard: int) -> None:
        self.tallies: list[tuple[weakref.ref[object], ClientTally]] = []
        self._ended = ClientTally()
        """All that was counted for owners that are gone."""
        self._place = bot_name, shard
        self.begin_anew()

    def begin_anew(self) -> None:
        """Forget what was published: there is another Ray, which has seen nothing yet."""
        self._publisher = Publisher(*self._place)

    def total(self) -> ClientTally:
        """All that was counted. Tallies whose owners are gone are kept no longer, but for what they say."""
        alive = []
        for owner, tally in self.tallies:
            if owner() is None:
                # Found gone first: what a thread counted at last is in its tally by now.
                self._ended.merge(tally)
            else:
                alive.append((owner, tally))
        self.tallies = alive
        total = ClientTally()
        total.merge(self._ended)
        for _, tally in alive:
            total.merge(tally)
        return total

    def publish(self, total: ClientTally) -> None:
        """Publish this total."""
        publisher = self._publisher
        for request in dict.fromkeys(REQUESTS.values()):
            answers = Spread()
            for kind, name in REQUESTS.items():
                if name == request:
                    answers.merge(total.answer_ns[kind])
            publisher.histogram(catalog.CLIENT_SECONDS, answers, _NS, request=request)
        for (request, outcome), count in _failures(total).items():
            publisher.counter(catalog.CLIENT_FAILURES, count, request=request, outcome=outcome)
        publisher.histogram(catalog.CLIENT_TURN_WAIT_SECONDS, total.turn_wait_ns, _NS)
        publisher.counter(catalog.CLIENT_TURNS_GIVEN_UP, total.turns_given_up)
        publisher.counter(catalog.CLIENT_CONNECTIONS, total.connections)
        publisher.counter(catalog.CLIENT_RETRIES, total.retries)
        publisher.counter(catalog.CLIENT_RESENDS, total.resends)


def _failures(total: ClientTally) -> dict[tuple[str, str], int]:
    """How many operations failed, by the name of their request and how they ended."""
    # There before the first one, which an alert is to see.
    failures = {(REQUESTS[WRITE], UNKNOWN): 0}
    for errors in (total.failed, total.given_up):
        for (kind, error), count in errors.items():
            key = REQUESTS[kind], outcome_of(error)
            failures[key] = failures.get(key, 0) + count
    return failures
