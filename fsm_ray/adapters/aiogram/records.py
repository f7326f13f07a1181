"""What of aiogram's conversations goes into records, and how."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from aiogram.exceptions import DataNotDictLikeError
from aiogram.fsm.state import State as StateOfGroup
from aiogram.fsm.storage.base import StateType, StorageKey

from fsm_ray.codec import encode_data, extension_hook

_decode = msgspec.msgpack.Decoder(dict[str, Any], ext_hook=extension_hook(allow_pickle=True)).decode


def record_key(key: StorageKey) -> tuple[int, int, int, int | None, str | None, str]:
    """The key of the conversation's record: all that aiogram tells conversations apart by.

    Examples:
        >>> record_key(StorageKey(bot_id=1, chat_id=-100, user_id=7))
        (1, -100, 7, None, None, 'default')
    """
    return (
        key.bot_id,
        key.chat_id,
        key.user_id,
        key.thread_id,
        key.business_connection_id,
        key.destiny,
    )


def state_name(state: StateType) -> str | None:
    """What is stored of a state: its full name."""
    return state.state if isinstance(state, StateOfGroup) else state


def check_mapping(data: object) -> None:
    """Refuse data that is no mapping, as aiogram's storages do.

    Raises:
        DataNotDictLikeError: it is none.
    """
    if not isinstance(data, Mapping):
        raise DataNotDictLikeError(f"data must be a dict or another mapping, not {type(data).__name__}")


def copied(data: Mapping[str, Any]) -> dict[str, Any]:
    """The data as it is read again once it was stored: nothing is shared with what was given.

    Raises:
        InvalidData: it cannot be stored.
    """
    return _decode(encode_data(data, allow_pickle=True))
