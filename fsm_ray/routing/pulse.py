"""Pulse: shows shards that threads are still at work on their turns, however long they take."""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter

from fsm_ray.errors import FsmRayError
from fsm_ray.logs import Seldom, one_line
from fsm_ray.namespace.leases import LEASE_S
from fsm_ray.routing.blocking import BlockingShard

logger = logging.getLogger(__name__)

SIGN_OF_LIFE_S = LEASE_S / 3


class Pulse:
    """One thread for all turns of a storage, there from the first turn until `stop`."""

    def __init__(self, sign_of_life_s: float = SIGN_OF_LIFE_S) -> None:
        self._sign_of_life_s = sign_of_life_s
        self._troubles = Seldom()
        self._begin_anew()

    def _begin_anew(self) -> None:
        """Know of no turn: those of the process that this one was forked from are not to be kept alive."""
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._held: Counter[BlockingShard] = Counter()
        """Shard as the turn's thread has it -> its turns."""
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def begun(self, shard: BlockingShard) -> None:
        if self._pid != os.getpid():
            self._begin_anew()
        with self._lock:
            self._held[shard] += 1
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="fsm_ray pulse", daemon=True)
                self._thread.start()

    def ended(self, shard: BlockingShard) -> None:
        with self._lock:
            self._held[shard] -= 1
            if self._held[shard] <= 0:
                del self._held[shard]

    def stop(self) -> None:
        self._stopped.set()

    def _run(self) -> None:
        twins: dict[BlockingShard, BlockingShard] = {}
        while not self._stopped.wait(self._sign_of_life_s):
            with self._lock:
                held = tuple(self._held)
            for shard in twins.keys() - set(held):
                twins.pop(shard).close()
            for shard in held:
                if shard not in twins:
                    twins[shard] = shard.twin(self._sign_of_life_s / 3)  # others wait for it
                try:
                    twins[shard].show_life(shard.session_id)
                except FsmRayError as error:
                    if self._troubles.passes():
                        more = self._troubles.more()
                        logger.warning("a turn may be lost: %s%s", one_line(error), more)
        for twin in twins.values():
            twin.close()
