"""The race: many update one conversation at once, each a field of its own, and what is lost of it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from fsm_ray.bench.aiogram_peers import AiogramRedis
from fsm_ray.bench.contender import Contender, Surroundings
from fsm_ray.bench.ours import FsmRay
from fsm_ray.bench.results import Race
from fsm_ray.bench.workload import FIRST_USER

_RACERS = 32


def hold_races(surroundings: Surroundings, rounds: int) -> tuple[Race, ...]:
    """Let 32 tasks update a conversation of fsm_ray's at once, and one of aiogram's, so often each."""
    return race((FsmRay(surroundings), AiogramRedis(surroundings)), rounds)


def race(contenders: Sequence[Contender[Any]], rounds: int) -> tuple[Race, ...]:
    """Let each contender hold so many races, in turns, and count in the end what it has lost."""
    with ExitStack() as stack:
        for contender in contenders:
            contender.open()
            stack.callback(contender.close)
            contender.load([FIRST_USER])
        for number in range(rounds):
            for contender in contenders:
                contender.surroundings.run(_start(contender, number))
        fields = [field for number in range(rounds) for field in _fields(number)]
        return tuple(
            Race(contender.name, len(fields), contender.surroundings.run(_count_lost(contender, fields)))
            for contender in contenders
        )


async def _start(contender: Contender[Any], number: int) -> None:
    key = contender.make_key(FIRST_USER)
    await asyncio.gather(*(contender.update_data(key, {field: number}) for field in _fields(number)))


async def _count_lost(contender: Contender[Any], fields: list[str]) -> int:
    data = await contender.get_data(contender.make_key(FIRST_USER))
    return sum(field not in data for field in fields)


def _fields(number: int) -> list[str]:
    return [f"round {number}, racer {racer}" for racer in range(_RACERS)]
