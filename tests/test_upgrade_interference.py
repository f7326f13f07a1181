"""An upgrade while others init, drop or upgrade the same bot, or when an actor does not end by itself."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fsm_ray import State, Storage, actor
from fsm_ray.actor import NamespaceActor
from fsm_ray.errors import StoreCorrupted, StoreMismatch
from tests.conftest import DEADLINE_S, RayCluster

pytestmark = [pytest.mark.ray, pytest.mark.slow]

KEY = (1, 42)


@pytest.fixture
def storage(cluster: RayCluster) -> Iterator[Storage]:
    with Storage(timeout_s=DEADLINE_S) as storage:
        yield storage


def actors_of(bot_name: str) -> list[str]:
    return [name for name in actor._actor_names() if name.startswith(f"{bot_name}/")]


# Actors that do not end


ERRORS = [StoreCorrupted("of ann"), StoreMismatch("of ann"), OSError("of ann")]


@pytest.fixture
def unstoppable(storage: Storage, bot_name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bot whose actors fail when they are told to stop, each in its own way."""

    class Unstoppable(NamespaceActor):
        async def stop(self) -> None:
            raise ERRORS[self._host._shard]

    with monkeypatch.context() as patched:
        patched.setattr(actor, "NamespaceActor", Unstoppable)
        storage.init(bot_name, shards=len(ERRORS))
    return bot_name


def test_actors_that_fail_as_they_stop_are_replaced(
    storage: Storage, unstoppable: str, caplog: pytest.LogCaptureFixture
) -> None:
    replaced = storage.upgrade(unstoppable, force=True, allow_loss=True)

    assert [each.shard for each in replaced] == [2, 1, 0]
    storage.set_state(unstoppable, KEY, State(state="a"))
    lines = [line for line in caplog.messages if "did not stop by itself" in line]
    assert [line.rpartition(": ")[2] for line in lines] == [
        "RayTaskError(OSError)",
        "StoreMismatch",
        "StoreCorrupted",
    ]
    assert "ann" not in caplog.text


def test_actors_that_fail_as_they_stop_are_dropped(storage: Storage, unstoppable: str) -> None:
    storage.drop(unstoppable)

    assert not actors_of(unstoppable)
