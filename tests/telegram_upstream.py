"""A pytest plugin for python-telegram-bot's own tests of persistences: these run over RayPersistence.

Their TrackingPersistence counts what an application calls. What it then shows as stored is what another
RayPersistence reads, as another process would. No token of a bot is used: theirs have real ones.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from fsm_ray import Storage
from fsm_ray.adapters.telegram import RayPersistence

BOT = os.environ["FSM_RAY_BOT"] + os.environ.get("PYTEST_XDIST_WORKER", "")

IDS = ("chat_id", "super_group_id", "forum_group_id", "channel_id", "subscription_channel_id")
BOT_INFO = {"token": "1:token", "payment_provider_token": "", "name": "Bot", "username": "@bot"}


def over_ray(tracking: Any) -> type[Any]:  # noqa: C901  # a class of plain methods
    """Their class, which counts and shows; what it has stored is in fsm_ray."""

    class RayTracking(tracking):  # type: ignore[misc]
        """Begins with what their class is filled with."""

        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **settings)
            self.ours, self.other = RayPersistence(BOT), RayPersistence(BOT)
            self.is_filled = False

        def set_bot(self, bot: Any) -> None:
            super().set_bot(bot)
            self.ours.set_bot(bot)

        async def filled(self) -> RayPersistence:
            """Ours, which is first asked for data when the test has said what there is."""
            if not self.is_filled:
                self.is_filled = True
                await self.fill_ours()
            return self.ours

        async def fill_ours(self) -> None:
            await self.other.update_bot_data(self.bot_data)
            await self.other.update_callback_data(self.callback_data)
            for whose, data in self.user_data.items():
                await self.other.update_user_data(whose, data)
            for whose, data in self.chat_data.items():
                await self.other.update_chat_data(whose, data)
            for name, states in self.conversations.items():
                for key, state in states.items():
                    await self.other.update_conversation(name, key, state)

        async def get_user_data(self) -> Any:
            return await (await self.filled()).get_user_data()

        async def get_chat_data(self) -> Any:
            return await (await self.filled()).get_chat_data()

        async def get_bot_data(self) -> Any:
            return await (await self.filled()).get_bot_data()

        async def get_callback_data(self) -> Any:
            return await (await self.filled()).get_callback_data()

        async def get_conversations(self, name: str) -> Any:
            return await (await self.filled()).get_conversations(name)

        async def update_user_data(self, user_id: int, data: Any) -> None:
            await super().update_user_data(user_id, data)
            await self.ours.update_user_data(user_id, data)
            self.user_data[user_id] = (await self.other.get_user_data()).get(user_id, {})

        async def update_chat_data(self, chat_id: int, data: Any) -> None:
            await super().update_chat_data(chat_id, data)
            await self.ours.update_chat_data(chat_id, data)
            self.chat_data[chat_id] = (await self.other.get_chat_data()).get(chat_id, {})

        async def update_bot_data(self, data: Any) -> None:
            await super().update_bot_data(data)
            await self.ours.update_bot_data(data)
            self.bot_data = await self.other.get_bot_data()

        async def update_callback_data(self, data: Any) -> None:
            await super().update_callback_data(data)
            await self.ours.update_callback_data(data)
            self.callback_data: Any = await self.other.get_callback_data() or ([], {})

        async def update_conversation(self, name: str, key: Any, new_state: Any) -> None:
            await super().update_conversation(name, key, new_state)
            await self.ours.update_conversation(name, key, new_state)
            self.conversations[name][key] = (await self.other.get_conversations(name)).get(key)

        async def drop_user_data(self, user_id: int) -> None:
            await super().drop_user_data(user_id)
            await self.ours.drop_user_data(user_id)
            assert user_id not in await self.other.get_user_data()

        async def drop_chat_data(self, chat_id: int) -> None:
            await super().drop_chat_data(chat_id)
            await self.ours.drop_chat_data(chat_id)
            assert chat_id not in await self.other.get_chat_data()

        async def refresh_user_data(self, user_id: int, user_data: Any) -> None:
            await self.ours.refresh_user_data(user_id, user_data)
            await super().refresh_user_data(user_id, user_data)

        async def refresh_chat_data(self, chat_id: int, chat_data: Any) -> None:
            await self.ours.refresh_chat_data(chat_id, chat_data)
            await super().refresh_chat_data(chat_id, chat_data)

        async def refresh_bot_data(self, bot_data: Any) -> None:
            await self.ours.refresh_bot_data(bot_data)
            await super().refresh_bot_data(bot_data)

        async def flush(self) -> None:
            await super().flush()
            for each in (self.ours, self.other):
                await each.flush()

    return RayTracking


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put ours in the place of theirs before any test runs."""
    sys.modules["tests.auxil.ci_bots"].BOT_INFO_PROVIDER._cached = BOT_INFO | dict.fromkeys(IDS, "1")
    for module in {item.module for item in items if isinstance(item, pytest.Function)}:
        module.TrackingPersistence = over_ray(module.TrackingPersistence)


@pytest.fixture(scope="session")
def _storage() -> Iterator[Storage]:
    with Storage() as storage:
        storage.init(BOT)
        yield storage
        storage.drop(BOT)


@pytest.fixture(autouse=True)
def _no_conversations(_storage: Storage) -> None:
    """Each test finds a bot that was never used."""
    for conversation in _storage.scan(BOT):
        _storage.clear(BOT, conversation.key)
