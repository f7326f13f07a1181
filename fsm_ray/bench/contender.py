"""What a contender is: a way to keep conversations, with the two operations that are measured.

A contender must not win by doing less: `update_data` is atomic and returns the merged data as a new dict. A
peer that cannot do that says so in its label.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from fsm_ray.bench.workload import Workload

K = TypeVar("K")
T = TypeVar("T")

_VERIFIED_UPDATES = 50


@dataclass(frozen=True)
class Surroundings:
    """What one run gives to its contenders: the event loop, and the servers to connect to."""

    runner: asyncio.Runner
    """Its loop (uvloop) stays open between the measurements; between them it stands still."""
    valkey_socket: str
    echo_socket: str
    shards: int

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Wait for the coroutine, on the loop of this run."""
        return self.runner.run(coroutine)


class WrongData(Exception):
    """Raised when a contender no longer has what it acknowledged."""


class Contender(ABC, Generic[K]):
    """One way to keep conversations; K is its own form of a key.

    Keys are made before the clock starts. `get_data` and `update_data` are called with nothing around them.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    blocking: ClassVar[bool] = False
    """Whether operations block: then one task alone can be measured, and no event loop runs meanwhile."""
    needs_ray: ClassVar[bool] = False

    def __init__(self, surroundings: Surroundings) -> None:
        self.surroundings = surroundings

    @abstractmethod
    def open(self) -> None: ...

    @abstractmethod
    def close(self) -> None:
        """Give back what `open` took; called once, after an `open` that returned."""

    @abstractmethod
    def make_key(self, user: int) -> K: ...

    @abstractmethod
    def load(self, users: Iterable[int]) -> None:
        """Store the demo's record for each user."""

    @abstractmethod
    def get_data(self, key: K) -> Any:
        """Return the data; an awaitable of it, unless blocking."""

    @abstractmethod
    def update_data(self, key: K, changes: Mapping[str, Any]) -> Any:
        """Merge the changes and return the data; an awaitable of it, unless blocking."""

    def verify(self, workload: Workload[K]) -> int:
        """Count the keys that were written; every one holds its last update.

        Raises:
            WrongData: one does not, or an update does not return the merged data.
        """
        expectations = list(workload.expectations())
        at_once = len(workload.shares)  # no more than it was measured with
        for start in range(0, len(expectations), at_once):
            some = expectations[start : start + at_once]
            keys = [key for key, _ in some]
            for (key, expected), found in zip(some, self._read(keys), strict=True):
                _check(key, found, expected)
        for key, expected in expectations[:_VERIFIED_UPDATES]:
            _check(key, self._update(key, expected), expected)
        return len(expectations)

    def _read(self, keys: list[K]) -> list[Any]:
        if self.blocking:
            return [self.get_data(key) for key in keys]

        async def read_all() -> list[Any]:
            return await asyncio.gather(*map(self.get_data, keys))

        return self.surroundings.run(read_all())

    def _update(self, key: K, changes: Mapping[str, Any]) -> Any:
        if self.blocking:
            return self.update_data(key, changes)

        async def update() -> Any:
            return await self.update_data(key, changes)

        return self.surroundings.run(update())


def _check(key: object, found: object, expected: object) -> None:
    if found != expected:
        raise WrongData(f"under {key!r} is {found!r}, not {expected!r}")
