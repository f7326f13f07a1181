"""From pyTelegramBotAPI's Redis and pickle files: what its storages stored, into the records of ours."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any

from fsm_ray.adapters.telebot import record_key, stored_state
from fsm_ray.errors import FsmRayError, InvalidData
from fsm_ray.state import State
from fsm_ray.storage import AsyncStorage
from fsm_ray.transfer import pickles
from fsm_ray.transfer.loading import Arrival, Progress, Refusal, Report, load
from fsm_ray.transfer.redis import Redis, opened, scan, text_of


async def import_telebot_redis(
    url: str,
    storage: AsyncStorage,
    bot_name: str,
    *,
    bot_id: int | None,
    prefix: str = "telebot",
    separator: str = ":",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Write the conversations that a StateRedisStorage has into a bot, which must have been initialised.

    Redis is only read. It keeps states as text, so one that was a number comes as `"1"`.

    Args:
        url: of the Redis.
        storage: the storage.
        bot_name: the bot.
        bot_id: Telegram's id of the bot, the number in front of its token: only its conversations are taken.
            None: those that were stored without one.
        prefix: the one that the StateRedisStorage was given.
        separator: the one that the StateRedisStorage was given.
        overwrite: replace the conversations that are there.
        progress: told how far it is.

    Raises:
        UnknownBot, NamespaceUnavailable, redis.RedisError: some were imported; to be called again.
    """
    async with opened(url) as redis:
        source = _from_redis(redis, _Keys(bot_id, prefix, separator))
        return await load(storage, bot_name, source, overwrite=overwrite, progress=progress)


async def import_telebot_pickle(
    path: Path | str,
    storage: AsyncStorage,
    bot_name: str,
    *,
    bot_id: int | None,
    prefix: str = "telebot",
    separator: str = ":",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Write the conversations that a StatePickleStorage has into a bot, which must have been initialised.

    The file runs no code: it may hold plain values and pyTelegramBotAPI's `State`. A conversation that holds
    anything else is refused.

    Args:
        path: the `file_path` of the StatePickleStorage.
        storage: the storage.
        bot_name: the bot.
        bot_id: see `import_telebot_redis`.
        prefix: the one that the StatePickleStorage was given.
        separator: the one that the StatePickleStorage was given.
        overwrite: replace the conversations that are there.
        progress: told how far it is.

    Raises:
        InvalidData: the file is damaged, or no such pickle; nothing was changed.
        OSError: there is no such file, or it cannot be read; nothing was changed.
        UnknownBot, NamespaceUnavailable: some were imported; to be called again.
    """
    stored = pickles.load(Path(path), _find)
    if not isinstance(stored, dict):
        raise InvalidData(f"{path} holds nothing that StatePickleStorage writes")
    source = _from_pickle(stored, _Keys(bot_id, prefix, separator))
    return await load(storage, bot_name, source, overwrite=overwrite, progress=progress)


class _Keys:
    """The keys of one bot, as `StateStorageBase._get_key` builds them.

    A business connection's id is told from numbers by being none. Without the bot's id in front, a number
    before the chat's might be a bot's or a topic's: it is taken for a topic's.
    """

    def __init__(self, bot_id: int | None, prefix: str, separator: str) -> None:
        self.bot_id = bot_id
        self.prefix = f"{prefix}{separator}"
        end = re.escape(separator)
        bot = f"{bot_id}{end}" if bot_id else ""
        business = rf"(?:(?!-?\d+{end})(?P<business>(?:(?!{end}).)+){end})?"
        rest = rf"(?:(?P<thread>\d+){end})?(?P<chat>-?\d+){end}(?P<user>-?\d+)"
        self._pattern = re.compile(re.escape(self.prefix) + bot + business + rest, re.DOTALL)

    def record_key(self, name: str) -> tuple[Any, ...] | None:
        """The key of the record; None: it is of another bot."""
        found = self._pattern.fullmatch(name)
        if found is None:
            return None
        thread = found["thread"]
        return record_key(
            int(found["chat"]),
            int(found["user"]),
            found["business"],
            None if thread is None else int(thread),
            self.bot_id,
        )


async def _from_redis(redis: Redis, keys: _Keys) -> AsyncGenerator[Arrival | Refusal | None, None]:
    async for name in scan(redis, keys.prefix, "hash"):
        key = keys.record_key(name)
        if key is None:
            yield Refusal(name, "it is no key of this bot's")
            continue
        state, data = await redis.hmget(name, ["state", "data"])
        try:
            fields = {} if data is None else json.loads(text_of(data))
            yield _arrival(name, key, None if state is None else text_of(state), fields)
        except (FsmRayError, ValueError) as error:
            yield Refusal(name, f"what it holds cannot be read: {error}")


async def _from_pickle(
    stored: Mapping[Any, Any], keys: _Keys
) -> AsyncGenerator[Arrival | Refusal | None, None]:
    for name, conversation in stored.items():
        key = keys.record_key(name) if isinstance(name, str) else None
        if key is None:
            yield Refusal(repr(name), "it is no key of this bot's")
            continue
        try:
            pickles.check(conversation)
            yield _arrival(name, key, conversation["state"], conversation["data"])
        except (FsmRayError, LookupError, TypeError) as error:
            yield Refusal(name, f"what it holds cannot be read: {error}")


def _arrival(name: str, key: tuple[Any, ...], state: object, data: object) -> Arrival:
    if not isinstance(data, dict):
        raise InvalidData(f"its data is no dict: {data!r:.80}")
    flow, state_name = stored_state(state)
    return Arrival(name, key, State(flow=flow, state=state_name, data=data))


class _StateOfGroup:
    """A `telebot.states.State`, of which the name counts; its group is a class of the bot's."""

    name: str | None = None

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.name = state.get("name")


def _find(module: str, name: str) -> Any:
    return _StateOfGroup if (module, name) == ("telebot.states", "State") else None
