"""Crew: workers on a Ray cluster that handle all that a feeder gives, though some of them may be lost.

A worker that dies leaves its batch half done, and nobody knows which half. So the crew notes the records of a
batch before it hands the batch out. If the worker is lost, it puts them back as they were, and hands the same
updates to another: to the conversations it is as if the first had never begun.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from fsm_ray.demo.crowd import JSON
from fsm_ray.demo.feeder import Batch, Feeder
from fsm_ray.demo.worker import Done, Process, handle, prepare
from fsm_ray.errors import ConfigurationError, FsmRayError
from fsm_ray.state import State
from fsm_ray.storage import Storage

logger = logging.getLogger(__name__)

_MAX_LOST = 20


@dataclass(frozen=True)
class _Job:
    """A batch in a worker's hands, and its conversations' records as they were before."""

    batch: Batch
    before: dict[Hashable, State | None]


class Crew:
    """Some workers of one bot, each a Ray task that handles one batch."""

    def __init__(self, storage: Storage, bot_name: str, workers: int) -> None:
        self._storage = storage
        self._bot_name = bot_name
        self._workers = workers
        self._running: dict[Any, _Job] = {}
        self._last_process: dict[Hashable, Process] = {}
        self.handovers = 0
        """How often the next part of a conversation went to another process than the part before."""
        self.lost = 0
        """How many workers died."""
        self.failed = 0
        """How many updates the bot's handlers failed over."""
        self.processes: set[Process] = set()
        """The processes that handled something."""

    def assemble(self, sample: list[JSON]) -> None:
        """Have processes started and warmed up with some updates, so that serving does not begin slowly.

        Raises:
            ConfigurationError: a process does not come up, as for want of aiogram on its node.
        """
        try:
            ray.get([_on_ray(prepare, max_retries=3).remote(sample) for _ in range(self._workers)])
        except RayError as error:
            reason = str(error).strip().splitlines()[-1]
            raise ConfigurationError(f"no worker could be started: {reason}") from error

    def serve(self, feeder: Feeder, on_handled: Callable[[int], None]) -> None:
        """Have everything handled; `on_handled` hears of each batch's updates.

        Raises:
            FsmRayError: what a worker's storage raised; the first one ends it.
            ConfigurationError: workers die again and again.
        """
        try:
            while self._hand_out(feeder):
                ready, _ = ray.wait(list(self._running))
                job = self._running.pop(ready[0])
                done = self._result(ready[0])
                if done is None:
                    self._undo(job)
                    feeder.put_back(job.batch)
                else:
                    self._note(job, done)
                    feeder.finish(job.batch)
                    on_handled(len(job.batch))
        finally:
            for reference in self._running:
                ray.cancel(reference, force=True)

    def _hand_out(self, feeder: Feeder) -> bool:
        """Give every idle worker a batch; False when nothing is left and nobody works."""
        # Ray's own retry would have another worker begin the batch on what the first one left half done.
        remote_handle = _on_ray(handle, max_retries=0)
        while len(self._running) < self._workers and (batch := feeder.take()):
            before = {key: self._storage.get_state(self._bot_name, key) for key in batch.updates}
            self._running[remote_handle.remote(self._bot_name, batch)] = _Job(batch, before)
        return bool(self._running)

    def _result(self, reference: Any) -> Done | None:
        """What the worker says, None if it was lost."""
        try:
            done: Done = ray.get(reference)
        except RayTaskError as error:
            if isinstance(error.cause, FsmRayError):
                raise error.cause from None
            raise
        except RayError as error:
            logger.info("a worker was lost: %s", error)
            self.lost += 1
            if self.lost > _MAX_LOST:
                raise ConfigurationError(f"{self.lost} workers died, the last one thus: {error}") from error
            return None
        return done

    def _undo(self, job: _Job) -> None:
        for key, record in job.before.items():
            if record is None:
                self._storage.clear(self._bot_name, key)
            else:
                self._storage.set_state(self._bot_name, key, record)

    def _note(self, job: _Job, done: Done) -> None:
        self.processes.add(done.process)
        self.failed += done.failed
        for key in job.batch.updates:
            self.handovers += self._last_process.get(key, done.process) != done.process
            self._last_process[key] = done.process


def _on_ray(function: Callable[..., Any], *, max_retries: int) -> Any:
    # A worker mostly waits for its storage and its network, so it claims no core.
    return ray.remote(function).options(num_cpus=0, max_retries=max_retries, scheduling_strategy="SPREAD")
