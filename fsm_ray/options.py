"""BotOptions: everything that can be chosen for one bot, in one place.

The first `init` of a bot fixes its options; a later `init` must give the same ones.
"""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from fsm_ray.errors import InvalidBotName, InvalidOptions

SLOTS = 4096
"""Slots that a bot's keys fall into; shards own ranges of slots, so no bot has more shards than this."""

STORE_SCHEMES = ("memory",)

_BOT_NAME = re.compile(r"[A-Za-z0-9_@][A-Za-z0-9_.@-]{0,63}", re.ASCII)


class BotOptions(BaseModel):
    """How one bot's conversations are kept.

    >>> BotOptions(shards=4).store
    'memory://'
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    store: str = "memory://"
    """Where records are kept, as a URL. `memory://`: in the actors, for as long as they live."""

    shards: int = Field(default=1, ge=1, le=SLOTS)
    """Named actors that share the bot's conversations; each serves about one core's worth of operations."""

    max_record_bytes: int = Field(default=1 << 20, ge=256, le=16 << 20)
    """The largest record, encoded: flow, state and data together."""

    allow_pickle: bool = True
    """Whether values that only pickle can carry are accepted; if not, none is written and none is decoded."""

    listen_host: str | None = None
    """Where shards listen for workers of other nodes; `None`: the address that Ray uses for the node."""

    @field_validator("store")
    @classmethod
    def _store_is_known(cls, store: str) -> str:
        scheme, separator, _ = store.partition("://")
        if not separator or scheme not in STORE_SCHEMES:
            known = ", ".join(f"{name}://" for name in STORE_SCHEMES)
            raise ValueError(f"no store is known for {store!r}; a store is a URL of one of: {known}")
        return store


def make_options(options: BotOptions | None, changes: dict[str, Any]) -> BotOptions:
    """The options that `init(bot, options, **changes)` means.

    Raises:
        InvalidOptions: an option is unknown or has a value it cannot have.
    """
    if options is not None and not isinstance(options, BotOptions):
        raise InvalidOptions(f"options must be a BotOptions, not {type(options).__name__}")
    try:
        return BotOptions(**({} if options is None else dict(options)) | changes)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise InvalidOptions(f"options of init: {faults}") from error


def check_bot_name(bot_name: object) -> str:
    """Return the name if a bot can have it: it becomes part of actor names, file names and metric labels.

    Raises:
        InvalidBotName: it is not 1 to 64 letters, digits or `_ . @ -`, or begins with `.` or `-`.
    """
    if type(bot_name) is str and _BOT_NAME.fullmatch(bot_name):
        return bot_name
    raise InvalidBotName(
        f"bot name {bot_name!r}: a bot's name is a str of 1 to 64 letters, digits or _ . @ - "
        "that does not begin with . or -",
        bot=bot_name,
    )
