"""Races: many change a bot's state at once, over a framework's own storage and over ours; losses are counted.

A script, too: `python -m tests.races 20` prints what is lost in so many rounds of each race.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Container
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import redis
import redis.asyncio
import telebot.asyncio_storage
import telebot.storage
from aiogram.fsm.storage.base import BaseStorage, StorageKey
from aiogram.fsm.storage.redis import RedisStorage
from rich.console import Console
from rich.table import Table
from telebot import TeleBot
from telebot.async_telebot import AsyncTeleBot
from telegram import Update
from telegram.ext import (
    Application,
    BasePersistence,
    ConversationHandler,
    MessageHandler,
    PicklePersistence,
    TypeHandler,
    filters,
)

from fsm_ray import Storage
from fsm_ray.adapters.aiogram import RayStorage
from fsm_ray.adapters.telebot import AsyncRayStateStorage, RayStateStorage
from fsm_ray.adapters.telegram import RayApplication, RayPersistence
from fsm_ray.bench.servers import ValkeyServer, temporary_directory
from fsm_ray.bench.session import ray_running
from tests.test_adapter_telegram import begin, text

RACERS = 32
"""Changes at once, in each round."""

TOKEN = "1:token"
BEGUN, ANSWERED = range(2)


@dataclass(frozen=True)
class Course:
    """Where a race is held: it has the chat of this number for itself."""

    bot_name: str
    valkey_url: str
    directory: Path
    chat: int


@dataclass(frozen=True)
class Racers:
    """Those who change one and the same, each a part of its own, and all at once."""

    change: Callable[[int], Awaitable[object]]
    """Make the change of this number."""
    kept: Callable[[], Awaitable[Container[int]]]
    """The numbers of the changes that are there."""


async def hold(racers: Racers, number: int) -> int:
    """Hold the round of this number; how many of its changes are lost."""
    numbers = range(number * RACERS, (number + 1) * RACERS)
    await asyncio.gather(*(racers.change(each) for each in numbers))
    kept = await racers.kept()
    return sum(each not in kept for each in numbers)


@asynccontextmanager
async def aiogram_redis(course: Course) -> AsyncGenerator[Racers, None]:
    """Tasks update the data over aiogram's RedisStorage."""
    storage = RedisStorage.from_url(course.valkey_url)
    try:
        yield _updating(storage, course)
    finally:
        await storage.close()


@asynccontextmanager
async def aiogram_ray(course: Course) -> AsyncGenerator[Racers, None]:
    """Tasks update the data over RayStorage."""
    storage = RayStorage(course.bot_name)
    try:
        yield _updating(storage, course)
    finally:
        await storage.close()


def _updating(storage: BaseStorage, course: Course) -> Racers:
    key = StorageKey(bot_id=1, chat_id=course.chat, user_id=course.chat)

    async def kept() -> Container[int]:
        return _numbers(await storage.get_data(key))

    return Racers(lambda number: storage.update_data(key, {str(number): True}), kept)


def _numbers(data: dict[str, Any]) -> set[int]:
    return {int(field) for field in data}


@asynccontextmanager
async def telebot_redis_tasks(course: Course) -> AsyncGenerator[Racers, None]:
    """Tasks change the data in blocks, over its asynchronous StateRedisStorage."""
    states: Any = telebot.asyncio_storage.StateRedisStorage(redis_url=course.valkey_url)
    try:
        async with _tasks(states, course) as racers:
            yield racers
    finally:
        await states.redis.aclose()


@asynccontextmanager
async def telebot_memory_tasks(course: Course) -> AsyncGenerator[Racers, None]:
    """Tasks change the data in blocks, over its asynchronous StateMemoryStorage."""
    async with _tasks(telebot.asyncio_storage.StateMemoryStorage(), course) as racers:
        yield racers


@asynccontextmanager
async def telebot_ray_tasks(course: Course) -> AsyncGenerator[Racers, None]:
    """Tasks change the data in blocks, over AsyncRayStateStorage."""
    states = AsyncRayStateStorage(course.bot_name)
    try:
        async with _tasks(states, course) as racers:
            yield racers
    finally:
        await states.close()


@asynccontextmanager
async def _tasks(states: Any, course: Course) -> AsyncGenerator[Racers, None]:
    """In their blocks they wait for an answer, as a handler that sends a message does."""
    bot: Any = AsyncTeleBot(TOKEN, state_storage=states)
    where = course.chat, course.chat

    async def change(number: int) -> None:
        async with bot.retrieve_data(*where) as data:
            data[str(number)] = True
            await server.ping()

    async def kept() -> Container[int]:
        return _numbers(await states.get_data(*where, bot_id=1))

    async with redis.asyncio.Redis.from_url(course.valkey_url) as server:
        await bot.set_state(course.chat, "racing", course.chat)
        yield Racers(change, kept)


@asynccontextmanager
async def telebot_redis_threads(course: Course) -> AsyncGenerator[Racers, None]:
    """Threads change the data in blocks, over its StateRedisStorage."""
    states: Any = telebot.storage.StateRedisStorage(redis_url=course.valkey_url)
    try:
        async with _threads(states, course) as racers:
            yield racers
    finally:
        states.redis.close()


@asynccontextmanager
async def telebot_memory_threads(course: Course) -> AsyncGenerator[Racers, None]:
    """Threads change the data in blocks, over its StateMemoryStorage."""
    async with _threads(telebot.storage.StateMemoryStorage(), course) as racers:
        yield racers


@asynccontextmanager
async def telebot_ray_threads(course: Course) -> AsyncGenerator[Racers, None]:
    """Threads change the data in blocks, over RayStateStorage."""
    states = RayStateStorage(course.bot_name)
    try:
        async with _threads(states, course) as racers:
            yield racers
    finally:
        states.close()


@asynccontextmanager
async def _threads(states: Any, course: Course) -> AsyncGenerator[Racers, None]:
    """See `_tasks`."""
    bot: Any = TeleBot(TOKEN, state_storage=states, threaded=False)
    where = course.chat, course.chat

    def change(number: int) -> None:
        with bot.retrieve_data(*where) as data:
            data[str(number)] = True
            server.ping()

    async def kept() -> Container[int]:
        return _numbers(states.get_data(*where, bot_id=1))

    run = asyncio.get_running_loop().run_in_executor
    with redis.Redis.from_url(course.valkey_url) as server, ThreadPoolExecutor(RACERS) as threads:
        bot.set_state(course.chat, "racing", course.chat)
        yield Racers(lambda number: run(threads, change, number), kept)


def pickle_file(course: Course) -> PicklePersistence[Any, Any, Any]:
    """A persistence over the file that both processes have."""
    return PicklePersistence(course.directory / f"{course.chat}.pickle")


def ray_bot(course: Course) -> RayPersistence:
    """A persistence over the bot that both processes have."""
    return RayPersistence(course.bot_name)


Persist = Callable[[Course], BasePersistence[Any, Any, Any]]


@asynccontextmanager
async def _telegram_data(course: Course, make: Persist, kind: type[Any]) -> AsyncGenerator[Racers, None]:
    """Two applications, as two processes have them, set fields of one user's data."""

    async def note(update: Update, context: Any) -> None:
        assert update.message is not None
        context.user_data[update.message.text] = True

    async def kept() -> Container[int]:
        async with _opened(make(course)) as persistence:
            return _numbers((await persistence.get_user_data()).get(course.chat, {}))

    async with _two_applications(course, make, kind, lambda: TypeHandler(Update, note)) as both:
        yield Racers(
            lambda number: _handle(both[number % 2], text(str(number), course.chat, course.chat)), kept
        )


@asynccontextmanager
async def _telegram_dialogues(course: Course, make: Persist, kind: type[Any]) -> AsyncGenerator[Racers, None]:
    """Dialogues begin in one of two applications, and are answered in the other one."""
    name = f"dialogue {course.chat}"

    async def begin_dialogue(update: Update, context: Any) -> int:
        return BEGUN

    async def answer(update: Update, context: Any) -> int:
        return ANSWERED

    def dialogue() -> ConversationHandler[Any]:
        entry: list[Any] = [MessageHandler(filters.Text(["begin"]), begin_dialogue)]
        states: dict[object, list[Any]] = {
            BEGUN: [MessageHandler(filters.Text(["answer"]), answer)],
            ANSWERED: [],
        }
        return ConversationHandler(entry, states, [], name=name, persistent=True)

    async def change(number: int) -> None:
        user = number + 1
        await _handle(both[number % 2], text("begin", user, user))
        await _handle(both[(number + 1) % 2], text("answer", user, user))

    async def kept() -> Container[int]:
        async with _opened(make(course)) as persistence:
            states = await persistence.get_conversations(name)
            return {int(user) - 1 for (_, user), state in states.items() if state == ANSWERED}

    async with _two_applications(course, make, kind, dialogue) as both:
        yield Racers(change, kept)


async def _handle(application: Application[Any, Any, Any, Any, Any, Any], update: Update) -> None:
    await application.process_update(update)
    await application.update_persistence()  # what an application does every `update_interval`, at the latest


@asynccontextmanager
async def _two_applications(
    course: Course, make: Persist, kind: type[Any], handler: Callable[[], Any]
) -> AsyncGenerator[list[Application[Any, Any, Any, Any, Any, Any]], None]:
    async with AsyncExitStack() as stack:
        both = [await stack.enter_async_context(_opened(make(course))) for _ in range(2)]
        yield [await begin(persistence, handler(), kind=kind) for persistence in both]


@asynccontextmanager
async def _opened(
    persistence: BasePersistence[Any, Any, Any],
) -> AsyncGenerator[BasePersistence[Any, Any, Any], None]:
    try:
        yield persistence
    finally:
        if isinstance(persistence, RayPersistence):
            await persistence.flush()  # closes; a PicklePersistence would write once more


Make = Callable[[Course], AbstractAsyncContextManager[Racers]]


@dataclass(frozen=True)
class Race:
    """One race: the same changes, over the framework's own storage and over ours."""

    what: str
    peer: str
    over_peer: Make
    over_ours: Make


RACES = (
    Race("aiogram `update_data`, 32 tasks", "RedisStorage", aiogram_redis, aiogram_ray),
    Race(
        "pyTelegramBotAPI `retrieve_data`, 32 tasks",
        "StateRedisStorage",
        telebot_redis_tasks,
        telebot_ray_tasks,
    ),
    Race(
        "pyTelegramBotAPI `retrieve_data`, 32 tasks",
        "StateMemoryStorage",
        telebot_memory_tasks,
        telebot_ray_tasks,
    ),
    Race(
        "pyTelegramBotAPI `retrieve_data`, 32 threads",
        "StateRedisStorage",
        telebot_redis_threads,
        telebot_ray_threads,
    ),
    Race(
        "pyTelegramBotAPI `retrieve_data`, 32 threads",
        "StateMemoryStorage",
        telebot_memory_threads,
        telebot_ray_threads,
    ),
    Race(
        "python-telegram-bot `user_data`, 2 applications",
        "PicklePersistence",
        partial(_telegram_data, make=pickle_file, kind=Application),
        partial(_telegram_data, make=ray_bot, kind=RayApplication),
    ),
    Race(
        "python-telegram-bot dialogues, 2 applications",
        "PicklePersistence",
        partial(_telegram_dialogues, make=pickle_file, kind=Application),
        partial(_telegram_dialogues, make=ray_bot, kind=RayApplication),
    ),
)


async def count_lost(make: Make, course: Course, rounds: int) -> int:
    """How many changes are lost in so many rounds."""
    async with make(course) as racers:
        return sum([await hold(racers, number) for number in range(rounds)])


def main(rounds: int) -> None:
    """Print what each race loses."""
    table = Table("race", "its own storage", f"lost of {rounds * RACERS}", "fsm_ray lost")
    with (
        ray_running(needed=True),
        temporary_directory() as directory,
        ValkeyServer(directory) as valkey,
        Storage() as storage,
    ):
        storage.init("races")
        chats = itertools.count(1)
        for race in RACES:
            courses = (Course("races", valkey.url, directory, next(chats)) for _ in range(2))
            counts = [
                str(asyncio.run(count_lost(make, course, rounds)))
                for make, course in zip((race.over_peer, race.over_ours), courses, strict=True)
            ]
            table.add_row(race.what, race.peer, *counts)
        storage.drop("races")
    Console(width=110).print(table)


if __name__ == "__main__":
    main(int(sys.argv[1]))
