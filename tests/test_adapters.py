"""What the adapters have in common."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from fsm_ray.adapters.aiogram import RayEventIsolation, RayStorage
from fsm_ray.adapters.telebot import AsyncRayStateStorage, RayStateStorage
from fsm_ray.adapters.telegram import RayPersistence
from fsm_ray.errors import InvalidBotName, InvalidOptions

ADAPTERS = [RayStorage, RayEventIsolation, RayStateStorage, AsyncRayStateStorage, RayPersistence]


@pytest.mark.parametrize("adapter", ADAPTERS)
class TestConstructors:
    def test_a_bot_its_storage_and_its_options_are_given_alike(self, adapter: type[Any]) -> None:
        parameters = inspect.signature(adapter).parameters.values()
        positional = [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
        others = [each.name for each in parameters if each.kind is each.VAR_KEYWORD]

        assert positional == ["bot_name", "storage", "options"]
        assert others == ["changes"]

    def test_what_no_bot_can_have_is_refused_at_once(self, adapter: type[Any]) -> None:
        with pytest.raises(InvalidOptions, match="shard"):
            adapter("bot", shard=2)
        with pytest.raises(InvalidOptions, match="BotOptions"):
            adapter("bot", options={"shards": 2})
        with pytest.raises(InvalidBotName):
            adapter("no bot")
