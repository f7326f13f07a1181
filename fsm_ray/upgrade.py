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

import ray
from ray.actor import ActorHandle

from fsm_ray.actor import (
    NamespaceActor,
    call,
    create_shard,
    end_actor,
    find_actor,
    first_noted_options,
    running_options,
    version_of,
)
from fsm_ray.errors import ConfigurationError, InvalidInput, NamespaceUnavailable
from fsm_ray.notes import Mark, Version, find_mark, remove_mark, set_mark
from fsm_ray.options import BotOptions

logger = logging.getLogger(__name__)

_PAUSE_S = 0.002
"""How long before Ray is asked again."""

_ANSWER_TIMEOUT_S = 5.0
"""How long an actor has to answer a question that can be asked again."""

_STOP_TIMEOUT_S = 15.0
"""How long an actor has to release its store before it is killed; half of `timeout_s`, if that is less."""


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
        replacement = _Replacement(bot_name, shard, mark, timeout_s, force=force).make()
        if replacement is not None:
            logger.info("bot %r: %s", bot_name, replacement)
            replaced.append(replacement)
    _check_mark(bot_name, mark)
    remove_mark(bot_name)
    return replaced


class _Replacement:
    """What becomes of one shard."""

    def __init__(self, bot_name: str, shard: int, mark: Mark, timeout_s: float, *, force: bool) -> None:
        self._bot_name = bot_name
        self._shard = shard
        self._mark = mark
        self._force = force
        self._timeout_s = timeout_s
        self._started_s = time.monotonic()
        self._old_version: Version | None = None
        self._ended: list[ActorHandle[NamespaceActor]] = []
        self._made: ActorHandle[NamespaceActor] | None = None
        self._trouble: NamespaceUnavailable | None = None

    def make(self) -> ReplacedShard | None:
        """Replace the shard's actor, and wait until the new one serves; None: it may stay.

        Raises:
            NamespaceUnavailable: that took longer than `timeout_s`, or the mark is not there any more.
            ConfigurationError: the new actor is of another version than the caller.
            FsmRayError: the new actor cannot open its store.
        """
        while not self._is_done():
            self._pause()
        if not self._ended and self._made is None:
            return None
        old_version = None if self._old_version is None else self._old_version.fsm_ray
        away_s = time.monotonic() - self._started_s
        return ReplacedShard(self._shard, old_version, Version().fsm_ray, away_s)

    def _is_done(self) -> bool:
        """Do what comes next; True if that was the last."""
        _check_mark(self._bot_name, self._mark)
        actor = find_actor(self._bot_name, self._shard)
        try:
            if actor is None:
                self._create()
            elif actor not in self._ended:
                if not self._is_old(actor):
                    self._check_serves(actor)
                    return True
                self._end(actor)
        except NamespaceUnavailable as error:
            self._trouble = error
        return False

    def _create(self) -> None:
        # Not to be had, if an `init` was faster, or Ray is not done with the old one.
        with contextlib.suppress(ValueError):
            self._made = create_shard(self._bot_name, self._shard, self._mark.options, get_if_exists=False)
            # A drop removes the mark, and then looks for actors: it may not have seen this one.
            if find_mark(self._bot_name) is None:
                ray.kill(self._made, no_restart=True)

    def _is_old(self, actor: ActorHandle[NamespaceActor]) -> bool:
        if actor == self._made:
            return False
        version = version_of(actor, self._bot_name, self._shard, _ANSWER_TIMEOUT_S)
        if not self._ended:
            self._old_version = version
        if version != Version() or (self._force and not self._ended):
            return True
        # One that others made meanwhile may have other options, too.
        options: BotOptions = call(actor.options.remote(), self._bot_name, _ANSWER_TIMEOUT_S)
        return options != self._mark.options

    def _end(self, actor: ActorHandle[NamespaceActor]) -> None:
        if not self._ended:
            self._started_s = time.monotonic()
        self._trouble = None
        _check_mark(self._bot_name, self._mark)  # it may have taken a while to tell that it is old
        end_actor(actor, self._bot_name, min(_STOP_TIMEOUT_S, self._timeout_s / 2))
        self._ended.append(actor)

    def _check_serves(self, actor: ActorHandle[NamespaceActor]) -> None:
        call(actor.open.remote(), self._bot_name, _ANSWER_TIMEOUT_S)
        version = version_of(actor, self._bot_name, self._shard, _ANSWER_TIMEOUT_S)
        if version is None:
            raise NamespaceUnavailable("somebody else replaces its actor, too", bot=self._bot_name)
        if version != Version():
            raise ConfigurationError(
                f"shard {self._shard} of bot {self._bot_name!r} serves again, but its node has {version}, "
                f"and this is {Version()}: install it on all nodes, then upgrade again",
                bot=self._bot_name,
            )

    def _pause(self) -> None:
        if time.monotonic() - self._started_s > self._timeout_s:
            trouble = self._trouble or "its old actor was told to end, and is still there"
            raise NamespaceUnavailable(
                f"shard {self._shard} of bot {self._bot_name!r} was not replaced within {self._timeout_s} s: "
                f"{trouble}. No shard before it was touched; upgrade again to go on",
                bot=self._bot_name,
                timeout_s=self._timeout_s,
            ) from self._trouble
        time.sleep(_PAUSE_S)


def _options(bot_name: str) -> BotOptions:
    """The bot's options.

    An upgrade that was interrupted knows them best: since then, somebody may have made a shard with others.
    """
    mark = find_mark(bot_name)
    if mark is not None:
        return mark.options
    try:
        return running_options(bot_name, _ANSWER_TIMEOUT_S)
    except NamespaceUnavailable:
        options = first_noted_options(bot_name)
        if options is None:
            raise
        return options


def _check_mark(bot_name: str, mark: Mark) -> None:
    if find_mark(bot_name) != mark:
        raise NamespaceUnavailable(
            f"bot {bot_name!r} was dropped, or somebody else began to upgrade it, so this upgrade stopped: "
            "wait for the other one, or upgrade again if there is none",
            bot=bot_name,
        )
