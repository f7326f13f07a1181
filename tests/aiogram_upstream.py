"""A pytest plugin for aiogram's own tests: where they ask for aiogram's storages, they get fsm_ray's.

Given with `-p`, it is loaded before the tests and their conftest, which take what they find in aiogram's
modules. The tests of the modules in FSM_RAY_UPDATES run twice: the second time, dispatchers handle updates in
turns. All in one process: to import aiogram takes seconds.
"""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import aiogram.dispatcher.dispatcher
import aiogram.fsm.storage.memory
import pytest
from aiogram.fsm.middleware import FSMContextMiddleware
from aiogram.types import TelegramObject

from fsm_ray import Storage
from fsm_ray.adapters.aiogram import RayEventIsolation, RayFSMMiddleware, RayStorage

BOT = os.environ["FSM_RAY_BOT"]
UPDATES = set(os.environ["FSM_RAY_UPDATES"].split())
IN_TURNS = "in-turns"


class StorageForTests(RayStorage):
    """Made without arguments."""

    def __init__(self) -> None:
        super().__init__(BOT)


class IsolationForTests(RayEventIsolation):
    """Made without arguments."""

    def __init__(self) -> None:
        super().__init__(BOT)


class TurnsForTests(FSMContextMiddleware):
    """What a dispatcher takes for aiogram's FSM middleware."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._turns = RayFSMMiddleware(self)

    async def __call__(
        self,
        handler: Callable[[TelegramObject, dict[str, Any]], Awaitable[Any]],
        event: TelegramObject,
        data: dict[str, Any],
    ) -> Any:
        return await self._turns(handler, event, data)


class Absent(types.ModuleType):
    """A driver of MongoDB, which aiogram's conftest imports from, and no test here uses."""

    __path__: list[str] = []  # noqa: RUF012  # a module's, not the class's

    def __getattr__(self, name: str) -> type[list[Any]]:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (list,), {})  # annotations subscript it


for name in ("motor", "motor.motor_asyncio", "pymongo", "pymongo.errors", "pymongo.uri_parser"):
    sys.modules[name] = Absent(name)

for module in (aiogram.fsm.storage.memory, aiogram.dispatcher.dispatcher):
    module.MemoryStorage = StorageForTests  # type: ignore[attr-defined]
aiogram.fsm.storage.memory.SimpleEventIsolation = IsolationForTests  # type: ignore[assignment, misc]


@pytest.fixture(scope="session")
def _storage() -> Iterator[Storage]:
    with Storage() as storage:
        storage.init(BOT)
        yield storage
        storage.drop(BOT)


@pytest.fixture(autouse=True)
def _no_conversations(_storage: Storage) -> None:
    """Each test finds a storage that was never used."""
    for conversation in _storage.scan(BOT):
        _storage.clear(BOT, conversation.key)


@pytest.fixture(autouse=True)
def _handling(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if getattr(request, "param", None) == IN_TURNS:
        monkeypatch.setattr(aiogram.dispatcher.dispatcher, "FSMContextMiddleware", TurnsForTests)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.definition.path.stem in UPDATES:
        metafunc.parametrize("_handling", ["one-by-one", IN_TURNS], indirect=True)


def pytest_collection_finish(session: pytest.Session) -> None:
    assert {item.path.stem for item in session.items if IN_TURNS in item.nodeid} == UPDATES
