"""Upgrade: a bot's actors replaced by ones of the caller's version, one shard at a time.

The old actor commits what it has and releases its store before the new one opens it. So no acknowledged write
is lost, and none that is sent again takes effect twice, as sessions are in the store. Every step looks at
what there is and does what comes next, so an upgrade that was interrupted anywhere is ended by the next one.
"""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import dataclass

from ray.actor import ActorHandle

from fsm_ray.actor import (
    NamespaceActor,
    call,
    create_shard,
    end_actor,
    find_actor,
    running_options,
    version_of,
)
from fsm_ray.errors import ConfigurationError, InvalidInput, NamespaceUnavailable, UnknownBot
from fsm_ray.notes import Mark, Version, find_mark, remove_mark, set_mark
from fsm_ray.options import BotOptions

logger = logging.getLogger(__name__)

_PAUSE_S = 0.002
"""How long before Ray is asked again."""

_ANSWER_TIMEOUT_S = 5.0
"""How long an actor has to answer a question that can be asked again."""


@dataclass(frozen=True, slots=True)
class ReplacedShard:
    """A shard whose actor was replaced."""

    shard: int
    old_version: str | None
    """Of fsm_ray; None: its actor was gone, or could not tell."""
    new_version: str
    away_s: float
    """From when the old actor was told to stop until the new one had opened its store."""


def upgrade_shards(bot_name: str, timeout_s: float, *, force: bool, allow_loss: bool) -> list[ReplacedShard]:
    """See `Storage.upgrade`."""
    mark = Mark(_options(bot_name), Version())
    if mark.options.store_scheme == "memory" and not allow_loss:
        raise InvalidInput(
            f"the records of bot {bot_name!r} are in its actors alone (memory://), and would be lost with "
            "them; nothing was changed: say that they may be lost by allow_loss=True or "
            "`fsm-ray upgrade --allow-loss`, and export them before",
            bot=bot_name,
        )
    set_mark(bot_name, mark)
    replaced = []
    # The first shard last: as long as it is there, everybody finds the bot and its options.
    for shard in reversed(range(mark.options.shards)):
        replacement = _Replacement(bot_name, shard, mark.options, timeout_s, force=force).make()
        if replacement is not None:
            logger.info("bot %r: %s", bot_name, replacement)
            replaced.append(replacement)
        if find_mark(bot_name) != mark:
            raise NamespaceUnavailable(
                f"bot {bot_name!r} was dropped, or somebody else began to upgrade it: this upgrade stopped "
                f"after shard {shard}",
                bot=bot_name,
            )
    remove_mark(bot_name)
    return replaced


class _Replacement:
    """What becomes of one shard."""

    def __init__(
        self, bot_name: str, shard: int, options: BotOptions, timeout_s: float, *, force: bool
    ) -> None:
        self._bot_name = bot_name
        self._shard = shard
        self._options = options
        self._force = force
        self._timeout_s = timeout_s
        self._started_s = time.monotonic()
        self._old_version: Version | None = None
        self._ended: list[ActorHandle[NamespaceActor]] = []
        self._made: ActorHandle[NamespaceActor] | None = None

    def make(self) -> ReplacedShard | None:
        """Replace the shard's actor, and wait until the new one serves; None: it may stay.

        Raises:
            NamespaceUnavailable: that took longer than `timeout_s`.
            ConfigurationError: the new actor is of another version than the caller.
            FsmRayError: the new actor cannot open its store.
        """
        while self._is_old(actor := self._find_or_make()):
            self._end(actor)
        self._wait_until_open(actor)
        if not self._ended and self._made is None:
            return None
        old_version = None if self._old_version is None else self._old_version.fsm_ray
        away_s = time.monotonic() - self._started_s
        return ReplacedShard(self._shard, old_version, Version().fsm_ray, away_s)

    def _find_or_make(self) -> ActorHandle[NamespaceActor]:
        """The shard's actor, if it is not one that was told to end, or else a new one."""
        while True:
            actor = find_actor(self._bot_name, self._shard)
            if actor is None:
                with contextlib.suppress(
                    ValueError
                ):  # an `init` was faster, or Ray is not done with the old one
                    self._made = create_shard(self._bot_name, self._shard, self._options, get_if_exists=False)
                    return self._made
            elif actor not in self._ended:
                return actor
            self._pause("its old actor was told to end, and is still there")

    def _is_old(self, actor: ActorHandle[NamespaceActor]) -> bool:
        if actor == self._made:
            return False
        version = version_of(actor, self._bot_name, self._shard, _ANSWER_TIMEOUT_S)
        if not self._ended:
            self._old_version = version
        return version != Version() or (self._force and not self._ended)

    def _end(self, actor: ActorHandle[NamespaceActor]) -> None:
        if not self._ended:
            self._started_s = time.monotonic()
        end_actor(actor, self._bot_name, self._timeout_s)
        self._ended.append(actor)

    def _wait_until_open(self, actor: ActorHandle[NamespaceActor]) -> None:
        while True:
            try:
                call(actor.open.remote(), self._bot_name, _ANSWER_TIMEOUT_S)
                break
            except NamespaceUnavailable as error:
                self._pause(str(error), error)
        version = version_of(actor, self._bot_name, self._shard, self._timeout_s)
        if version != Version():
            raise ConfigurationError(
                f"shard {self._shard} of bot {self._bot_name!r} serves again, but its node has {version}, "
                f"and this is {Version()}: install it on all nodes, then upgrade again",
                bot=self._bot_name,
            )

    def _pause(self, trouble: str, error: NamespaceUnavailable | None = None) -> None:
        if time.monotonic() - self._started_s > self._timeout_s:
            raise NamespaceUnavailable(
                f"shard {self._shard} of bot {self._bot_name!r} was not replaced within {self._timeout_s} s: "
                f"{trouble}. No shard before it was touched; upgrade again to go on",
                bot=self._bot_name,
                timeout_s=self._timeout_s,
            ) from error
        time.sleep(_PAUSE_S)


def _options(bot_name: str) -> BotOptions:
    """The bot's options, though an upgrade that was interrupted left it without its first shard."""
    try:
        return running_options(bot_name, _ANSWER_TIMEOUT_S)
    except (NamespaceUnavailable, UnknownBot):
        mark = find_mark(bot_name)
        if mark is None:
            raise
        return mark.options
