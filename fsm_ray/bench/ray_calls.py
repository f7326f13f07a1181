"""What one writes first: a plain Ray actor with the records in a dict, and one actor call per operation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import ray

from fsm_ray.bench.contender import Contender
from fsm_ray.bench.workload import DATA

Key = tuple[int, int]


class Records:
    """The actor: its methods are coroutines, so Ray runs it as an async actor, on uvloop."""

    def __init__(self) -> None:
        self._records: dict[Key, dict[str, Any]] = {}

    async def load(self, keys: list[Key], data: dict[str, Any]) -> None:
        self._records.update((key, dict(data)) for key in keys)

    async def get_data(self, key: Key) -> dict[str, Any]:
        return self._records[key]

    async def update_data(self, key: Key, changes: Mapping[str, Any]) -> dict[str, Any]:
        record = self._records[key]
        record.update(changes)
        return record


class RayCall(Contender[Key]):
    name = "ray-call"
    label = "one Ray actor call per operation"
    needs_ray = True

    def open(self) -> None:
        # No CPU of its own: where Ray has few, one that waits for a slot would never start.
        self._actor: Any = ray.remote(Records).options(num_cpus=0).remote()

    def close(self) -> None:
        ray.kill(self._actor)

    def make_key(self, user: int) -> Key:
        return (user, user)

    def load(self, users: Iterable[int]) -> None:
        ray.get(self._actor.load.remote([self.make_key(user) for user in users], DATA))

    def get_data(self, key: Key) -> Any:
        return self._actor.get_data.remote(key)

    def update_data(self, key: Key, changes: Mapping[str, Any]) -> Any:
        return self._actor.update_data.remote(key, changes)


class RayCallBlocking(RayCall):
    name = "ray-call-blocking"
    label = "the same, with a blocking ray.get"
    blocking = True

    def get_data(self, key: Key) -> Any:
        return ray.get(self._actor.get_data.remote(key))

    def update_data(self, key: Key, changes: Mapping[str, Any]) -> Any:
        return ray.get(self._actor.update_data.remote(key, changes))
