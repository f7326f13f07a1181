"""Events: what an operator must know of a shard that serves, one line of the log each."""

from __future__ import annotations

import logging
from collections.abc import Callable

from fsm_ray.errors import Overloaded, TurnLost
from fsm_ray.logs import Seldom, where
from fsm_ray.namespace.leases import LEASE_S
from fsm_ray.tally import ShardTally

logger = logging.getLogger(__name__)

SLOW_COMMIT_S = 1.0
"""A commit that takes so long is worth a line."""

CALM_S = 10.0
"""Refusing is over when nothing was refused for so long."""


class Events:
    """Writes the lines of one shard; `clock` counts seconds."""

    def __init__(self, name: str, tally: ShardTally, clock: Callable[[], float]) -> None:
        self._name = name
        self._tally = tally
        self._clock = clock
        self._slow_commits, self._late_turns, self._troubles, self._failures = (
            Seldom(clock=clock) for _ in range(4)
        )
        self._unconfirmed_since_s: float | None = None
        self._refusing_since_s: float | None = None
        self._refused_at_s = 0.0
        """When an operation was last found to be refused."""
        self._refused_before = 0
        """How many were refused before refusing began."""
        self._refused = tally.refused(Overloaded)
        self._too_late = tally.refused(TurnLost)

    def committed(self, took_ns: int) -> None:
        """A commit took so long."""
        if took_ns >= SLOW_COMMIT_S * 1e9 and self._slow_commits.passes():
            more = self._slow_commits.more()
            logger.warning("%s: its store took %.1f s for a commit%s", self._name, took_ns / 1e9, more)

    def expired(self, lost: int) -> None:
        """So many turns ended, as nothing was heard of their workers."""
        if lost:
            logger.warning(
                "%s: ended %d turns, as their workers were silent for %.0f s", self._name, lost, LEASE_S
            )

    def disconnected(self, lost: int) -> None:
        """So many turns ended with the connection of their worker."""
        if lost:
            logger.info("%s: a worker's connection ended, and with it %d turns", self._name, lost)

    def unconfirmed(self, error: Exception, serves_until_s: float) -> None:
        """The store did not say that the shard still owns it."""
        if self._unconfirmed_since_s is None:
            self._unconfirmed_since_s = self._clock()
            logger.warning(
                "%s: its store does not confirm ownership, and if that stays so it stops in %.1f s: %s",
                self._name,
                serves_until_s - self._clock(),
                str(error) or "no answer",
            )

    def confirmed(self) -> None:
        """The store said so."""
        if self._unconfirmed_since_s is not None:
            silent_s = self._clock() - self._unconfirmed_since_s
            self._unconfirmed_since_s = None
            logger.warning("%s: its store answers again, after %.1f s", self._name, silent_s)

    def tidying_failed(self, error: Exception) -> None:
        """What is done every second met an error that nobody expected."""
        if self._troubles.passes():
            more = self._troubles.more()
            # Not with its traceback: what an error says may be a user's key.
            logger.error("%s: tidying up met %s%s", self._name, where(error), more)

    def operation_failed(self, error: Exception) -> None:
        """An operation met an error that nobody expected, and was refused."""
        if self._failures.passes():
            logger.error(
                "%s: refused an operation that met %s%s", self._name, where(error), self._failures.more()
            )

    def look_at_refusals(self) -> None:
        """Tell when refusing for want of room began and ended, and of commits by turns that were lost."""
        now_s = self._clock()
        before, self._refused = self._refused, self._tally.refused(Overloaded)
        if self._refused > before:
            self._refused_at_s = now_s
            if self._refusing_since_s is None:
                self._refusing_since_s, self._refused_before = now_s, before
                logger.warning("%s: refuses operations, as too many wait (Overloaded)", self._name)
        elif self._refusing_since_s is not None and now_s - self._refused_at_s >= CALM_S:
            logger.warning(
                "%s: refuses nothing any more; it refused %d operations in %.0f s",
                self._name,
                self._refused - self._refused_before,
                self._refused_at_s - self._refusing_since_s,
            )
            self._refusing_since_s = None
        before, self._too_late = self._too_late, self._tally.refused(TurnLost)
        if self._too_late > before and self._late_turns.passes():
            more = self._late_turns.more()
            logger.warning("%s: a worker committed a turn that it had lost (TurnLost)%s", self._name, more)
