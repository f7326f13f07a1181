"""Where the frameworks' own storages lose what is changed at once, ours loses nothing."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fsm_ray.bench.servers import ValkeyServer, temporary_directory
from tests.conftest import DEADLINE_S, Bots
from tests.races import RACES, Course, Race, count_lost, hold

ROUNDS = 3

pytestmark = [pytest.mark.ray, pytest.mark.slow]

_chats = itertools.count(1)


@pytest.fixture(scope="module")
def valkey() -> Iterator[ValkeyServer]:
    with temporary_directory() as directory, ValkeyServer(directory) as server:
        yield server


@pytest.fixture
def make_course(bots: Bots, valkey: ValkeyServer, tmp_path: Path) -> Callable[[], Course]:
    """Each race has a chat of its own."""
    bot_name = bots.emptied()
    return lambda: Course(bot_name, valkey.url, tmp_path, next(_chats))


@pytest.mark.parametrize("race", RACES, ids=lambda race: f"{race.what}, {race.peer}")
async def test_ours_loses_nothing_where_the_framework_s_own_storage_does(
    race: Race, make_course: Callable[[], Course]
) -> None:
    lost_by_peer, rounds = 0, itertools.count()
    async with asyncio.timeout(DEADLINE_S), race.over_peer(make_course()) as racers:
        while not lost_by_peer:
            lost_by_peer = await hold(racers, next(rounds))
    lost_by_ours = await count_lost(race.over_ours, make_course(), ROUNDS)

    assert lost_by_ours == 0 < lost_by_peer
