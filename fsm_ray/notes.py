"""Notes about bots in Ray's control store: an actor's version, a bot's options, and an upgrade under way.

They are read without a call to an actor, which may hang, or be of another version: Ray ends an actor that is
called by a method that it does not have.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put

from fsm_ray.options import BotOptions
from fsm_ray.protocol import PROTOCOL_VERSION
from fsm_ray.version import __version__, load_fields

_NAMESPACE = b"fsm_ray"


@dataclass(frozen=True, slots=True)
class Version:
    """What an actor or a client runs; by default, what this process does."""

    fsm_ray: str = __version__
    protocol: int = PROTOCOL_VERSION

    def __str__(self) -> str:
        return f"fsm_ray {self.fsm_ray} (protocol {self.protocol})"

    __setstate__ = load_fields


@dataclass(frozen=True, slots=True)
class Mark:
    """Says that a bot's actors are being replaced, to be seen by whoever finds none of them.

    While shard 0 is replaced, no actor has its name for some milliseconds; without the mark, that would pass
    for a bot that was never made. It stays when an upgrade is interrupted, so that the next one can end it.
    """

    options: BotOptions
    version: Version
    """Which the new actors run."""
    id: str = field(default_factory=lambda: uuid4().hex)
    """Of one call of `upgrade`."""

    __setstate__ = load_fields


def note_version(bot_name: str, shard: int, actor_id: str) -> None:
    """Note that this actor runs this version."""
    _put(f"{bot_name}/version/{shard}", (actor_id, Version()))


def noted_version(bot_name: str, shard: int, actor_id: str) -> Version | None:
    """The version that this actor noted last; None: it did not, or is to be replaced."""
    version: Version | None = _get_of(actor_id, f"{bot_name}/version/{shard}")
    return version


def remove_version(bot_name: str, shard: int) -> None:
    """Let the shard's actor pass for one that is to be replaced."""
    _internal_kv_del(f"{bot_name}/version/{shard}", namespace=_NAMESPACE)


def note_options(bot_name: str, actor_id: str, options: BotOptions) -> None:
    """Note that the bot's first shard, this actor, was made with these options."""
    _put(f"{bot_name}/options", (actor_id, options))


def noted_options(bot_name: str, actor_id: str) -> BotOptions | None:
    """The options that this actor, a bot's first shard, noted; None: it did not."""
    options: BotOptions | None = _get_of(actor_id, f"{bot_name}/options")
    return options


def set_mark(bot_name: str, mark: Mark) -> None:
    """Mark the bot, in place of any mark that it has."""
    _put(f"{bot_name}/upgrade", mark)


def find_mark(bot_name: str) -> Mark | None:
    """The bot's mark; None: nobody replaces its actors."""
    mark: Mark | None = _get(f"{bot_name}/upgrade")
    return mark


def remove_mark(bot_name: str) -> None:
    """Remove the bot's mark, if it has one."""
    _internal_kv_del(f"{bot_name}/upgrade", namespace=_NAMESPACE)


def remove_notes(bot_name: str) -> None:
    """Remove all that is noted of the bot."""
    _internal_kv_del(f"{bot_name}/", del_by_prefix=True, namespace=_NAMESPACE)


def _put(key: str, value: Any) -> None:
    _internal_kv_put(key, pickle.dumps(value), namespace=_NAMESPACE)


def _get_of(actor_id: str, key: str) -> Any:
    """What this actor put there; None: it did not, or another one did later."""
    of_actor, value = _get(key) or (None, None)
    return value if of_actor == actor_id else None


def _get(key: str) -> Any:
    pickled = _internal_kv_get(key, namespace=_NAMESPACE)
    # Who can write there can make Ray calls, and so run any code on the cluster already.
    return None if pickled is None else pickle.loads(pickled)  # noqa: S301
