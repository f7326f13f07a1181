"""From aiogram's Redis: what its RedisStorage has stored, into the records of our RayStorage."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator, Callable
from typing import Any

from fsm_ray.adapters.aiogram import record_key
from fsm_ray.errors import InvalidInput, MissingExtra
from fsm_ray.state import State
from fsm_ray.storage import AsyncStorage
from fsm_ray.transfer.loading import Arrival, Progress, Refusal, Report, load
from fsm_ray.transfer.redis import Redis, opened, scan, text_of

try:
    from aiogram.fsm.storage.base import DEFAULT_DESTINY, DefaultKeyBuilder, StorageKey
except ModuleNotFoundError as error:
    raise MissingExtra(
        f"the importer needs {error.name!r}, which is not installed: pip install 'fsm-ray[aiogram]'"
    ) from error

__all__ = ["DefaultKeyBuilder", "import_aiogram_redis"]

_NEVER, _MISSING = -1, -2
"""What PTTL says of a key that does not expire, and of one that is not there."""


async def import_aiogram_redis(
    url: str,
    storage: AsyncStorage,
    bot_name: str,
    *,
    key_builder: DefaultKeyBuilder | None = None,
    bot_id: int | None = None,
    json_loads: Callable[[str], Any] = json.loads,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Write the conversations that an aiogram bot has in Redis into a bot, which must have been initialised.

    Redis is only read. State and data of a conversation become one record, which lives as long as the longer
    living of both.

    Args:
        url: of the Redis, as `RedisStorage.from_url` takes it.
        storage: the storage.
        bot_name: the bot.
        key_builder: the one that the RedisStorage was given.
        bot_id: Telegram's id of the bot, the number in front of its token. With a key builder that has
            `with_bot_id`, only this bot's conversations are taken; None: all. Else it must be given.
        json_loads: the one that the RedisStorage was given.
        overwrite: replace the conversations that are there.
        progress: told how far it is.

    Raises:
        InvalidInput: the bot's id is nowhere, or the URL is none; nothing was changed.
        UnknownBot, NamespaceUnavailable, redis.RedisError: some were imported; to be called again.
    """
    builder = key_builder or DefaultKeyBuilder()
    if bot_id is None and not builder.with_bot_id:
        raise InvalidInput("the keys in Redis do not tell the bot's id: give bot_id")
    async with opened(url) as redis:
        source = _conversations(redis, builder, bot_id, json_loads)
        return await load(storage, bot_name, source, overwrite=overwrite, progress=progress)


async def _conversations(
    redis: Redis, builder: DefaultKeyBuilder, bot_id: int | None, json_loads: Callable[[str], Any]
) -> AsyncGenerator[Arrival | Refusal | None, None]:
    pattern, separator = _pattern(builder), builder.separator
    async for name in scan(redis, f"{builder.prefix}{separator}", "string"):
        found = pattern.fullmatch(name)
        if found is None:
            if not name.endswith(f"{separator}lock"):
                yield Refusal(name, "it is no key of this key builder")
            continue
        key = _storage_key(found, bot_id)
        if bot_id not in {None, key.bot_id}:
            continue
        stem = name.removesuffix(found["part"])
        async with redis.pipeline(transaction=True) as pipe:
            pipe.mget(f"{stem}state", f"{stem}data")
            pipe.pttl(f"{stem}state")
            pipe.pttl(f"{stem}data")
            (state, data), *ttls_ms = await pipe.execute()
        if found["part"] == "data" and state is not None:
            continue  # it comes with its state
        ttls_ms = [ttl_ms for ttl_ms in ttls_ms if ttl_ms != _MISSING]
        yield _arrival(stem, key, (state, data), ttls_ms, json_loads)


def _arrival(
    stem: str,
    key: StorageKey,
    stored: tuple[bytes | None, bytes | None],
    ttls_ms: list[int],
    json_loads: Callable[[str], Any],
) -> Arrival | Refusal | None:
    state, data = stored
    if not ttls_ms:
        return None  # it has ended meanwhile
    try:
        fields = {} if data is None else json_loads(text_of(data))
        name = None if state is None else text_of(state)
    except ValueError as error:
        return Refusal(stem, f"what it holds cannot be read: {error}")
    if not isinstance(fields, dict):
        return Refusal(stem, f"its data is no JSON object: {fields!r:.80}")
    ttl_s = None if _NEVER in ttls_ms else max(1, *ttls_ms) / 1_000
    return Arrival(stem, record_key(key), State(state=name, data=fields), ttl_s)


def _storage_key(found: re.Match[str], bot_id: int | None) -> StorageKey:
    parts = found.groupdict()
    thread = parts["thread"]
    return StorageKey(
        bot_id=int(parts.get("bot") or bot_id or 0),
        chat_id=int(parts["chat"]),
        user_id=int(parts["user"]),
        thread_id=None if thread is None else int(thread),
        business_connection_id=parts.get("business"),
        destiny=parts.get("destiny") or DEFAULT_DESTINY,
    )


def _pattern(builder: DefaultKeyBuilder) -> re.Pattern[str]:
    """What the builder's keys look like. A business connection's id is told from a chat's by being no number.

    Examples:
        >>> _pattern(DefaultKeyBuilder()).fullmatch("fsm:-100:7:42:state").groupdict()
        {'chat': '-100', 'thread': '7', 'user': '42', 'part': 'state'}
    """
    end = re.escape(builder.separator)
    parts = [re.escape(builder.prefix) + end]
    if builder.with_bot_id:
        parts.append(rf"(?P<bot>\d+){end}")
    if builder.with_business_connection_id:
        parts.append(rf"(?:(?!-?\d+{end})(?P<business>(?:(?!{end}).)+){end})?")
    parts.append(rf"(?P<chat>-?\d+){end}(?:(?P<thread>\d+){end})?(?P<user>-?\d+){end}")
    if builder.with_destiny:
        parts.append(rf"(?P<destiny>.+){end}")
    return re.compile("".join([*parts, "(?P<part>state|data)"]), re.DOTALL)
