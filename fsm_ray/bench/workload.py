"""The work of every contender: the demo's records, each task's keys, and what must be there at the end."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

KEYS_PER_TASK = 50

FLOW = "registration"
STATE = "get_email"
DATA: dict[str, Any] = {"name": "Alice Smith", "age": 30, "email": "alice@example.com"}
CHANGED_FIELD = "age"

FIRST_USER = 5_000_000_000  # Telegram's ids of today have ten digits
_USERS_PER_TASK_COUNT = 10_000_000

K = TypeVar("K")


@dataclass(frozen=True)
class Share(Generic[K]):
    """One task's keys, in the contender's own form, and the number last written under each."""

    keys: list[K]
    written: list[int | None]


@dataclass(frozen=True)
class Workload(Generic[K]):
    """What one contender does at one number of tasks.

    Every update writes a number that was never written before, so the last one tells of a lost update.
    """

    shares: list[Share[K]]
    numbers: Iterator[int]

    def expectations(self) -> Iterator[tuple[K, dict[str, Any]]]:
        """Each key that was written, with the data that must be there now."""
        for share in self.shares:
            for key, number in zip(share.keys, share.written, strict=True):
                if number is not None:
                    yield key, DATA | {CHANGED_FIELD: number}


def users_of_level(tasks: int) -> range:
    """The users whose conversations are worked on at this number of tasks; levels share none.

    A level in which a contender fails half-way therefore leaves the data of the others alone.
    """
    first = FIRST_USER + tasks * _USERS_PER_TASK_COUNT
    return range(first, first + tasks * KEYS_PER_TASK)


def make_workload(tasks: int, make_key: Callable[[int], K]) -> Workload[K]:
    """The work for this number of tasks, none of it done yet."""
    keys = [make_key(user) for user in users_of_level(tasks)]
    shares = [
        Share(keys[start : start + KEYS_PER_TASK], [None] * KEYS_PER_TASK)
        for start in range(0, len(keys), KEYS_PER_TASK)
    ]
    return Workload(shares, itertools.count(1_000))
