"""Storages that read without classes: what needs one stays as it is encoded.

Values come in the form of the codec, with msgspec's `Ext` for what msgpack lacks, and keys that hold a class
as `EncodedKey`. So nothing of a user's is imported, and no pickle is loaded. `typed_json` tells it all.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any, Self

from fsm_ray.protocol import RecordView
from fsm_ray.record import NEVER_MS
from fsm_ray.routing.copying import kept_ttl_ms
from fsm_ray.storage import AsyncStorage, Storage


class EncodedStorage(Storage):
    """A storage for reading; writes take values of Python, as those of any storage."""

    _imports_classes = False

    @classmethod
    def of(cls, storage: Storage) -> Self:
        """One with the settings of this storage."""
        return cls(**_settings(storage))

    def read_record(self, bot_name: str, key: Hashable) -> RecordView | None:
        """As `get_state`, of the record with all that it has."""
        return self._bot(bot_name).read_record(key)

    def kept_ttl_s(self, bot_name: str, record: RecordView) -> float | None:
        """The time to live of a write that is to keep the one that was given to the record itself."""
        if not record.content.ttl_ms:
            return None
        return seconds(kept_ttl_ms(self._bot(bot_name).route, record))


class AsyncEncodedStorage(AsyncStorage):
    """A storage for reading."""

    _imports_classes = False

    async def allows_pickle(self, bot_name: str) -> bool:
        """Whether the bot's options do."""
        return (await self._bot(bot_name)).route.options.allow_pickle

    @classmethod
    def of(cls, storage: AsyncStorage) -> Self:
        """One with the settings of this storage."""
        return cls(**_settings(storage))


def seconds(ttl_ms: int | None) -> float | None:
    """A time to live as a write takes it; None: the record has none of its own."""
    if not ttl_ms:
        return None
    return math.inf if ttl_ms == NEVER_MS else ttl_ms / 1_000


def _settings(storage: Storage | AsyncStorage) -> dict[str, Any]:
    settings = vars(storage)
    return {name: settings[f"_{name}"] for name in ("address", "timeout_s", "transport")}
