"""Directory: which bots there are and where their shards listen, as Ray knows it.

Everything here may block for as long as a Ray call takes; answers are kept, so a forked process, in which
Ray does not work, can still connect to the shards that its parent knew.
"""

from __future__ import annotations

import itertools
import logging
import os
import random
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import ray
from ray._private import services
from ray.actor import ActorHandle
from ray.util.client import ray as ray_client

from fsm_ray import actor
from fsm_ray.actor import NamespaceActor
from fsm_ray.channel.handshake import Endpoint, check_protocol_version
from fsm_ray.errors import (
    EncryptionKeysUnusable,
    FsmRayError,
    NamespaceUnavailable,
    ProtocolMismatch,
    RayUnreachable,
    UnknownBot,
)
from fsm_ray.hosting import ShardDescription
from fsm_ray.metrics.client import OF_THIS_PROCESS
from fsm_ray.notes import Version, find_mark
from fsm_ray.options import BotOptions, check_bot_name, whereabouts
from fsm_ray.upgrade import ReplacedShard, upgrade_shards

T = TypeVar("T")

logger = logging.getLogger(__name__)

RETRY_DELAYS_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""Pauses between attempts to reach a shard, the last one again and again; each is varied by half."""


PROBE_TIMEOUT_S = 5.0


def retry_delay_s(attempt: int) -> float:
    """How long to pause after this many failed attempts before."""
    return RETRY_DELAYS_S[min(attempt, len(RETRY_DELAYS_S) - 1)] * random.uniform(0.5, 1.5)


@dataclass(frozen=True)
class BotDescription:
    """A bot as its actors see themselves."""

    bot_name: str
    options: BotOptions
    shards: list[ShardDescription] = field(default_factory=list)


@dataclass(frozen=True)
class KeyRotation:
    """How far a bot is with encrypting everything with its current key."""

    key_id: str
    """The id of that key."""
    pending: int
    """Records, and answers to writes, that are still to be encrypted with it."""

    @property
    def is_done(self) -> bool:
        """Whether no other key is in use any more; who removes the others removes nothing needed."""
        return self.pending == 0


def attach(address: str | None, *, may_start: bool = True, **settings: Any) -> None:
    """Attach this process to Ray: to the cluster at `address`, to one that is there, or to a new local one.

    Args:
        address: of the cluster, as `ray.init` takes it.
        may_start: whether a Ray may be started where there is none.
        settings: more of what `ray.init` takes.

    Raises:
        RayUnreachable: nothing answers at the address, or no local Ray could be started.
    """
    if ray.is_initialized():
        return
    try:
        found = find_running(address, may_start=may_start)
        if found in {None, "local"} and not may_start:
            raise ConnectionError("none runs here")  # noqa: TRY301  # told as all that is wrong with Ray
        if found and not named_address(address):
            # For a cluster that it finds by itself, and no other, Ray takes the token that it keeps here.
            found = "auto"
        # "local" takes no notice of the address file that an earlier Ray may have left behind.
        ray.init(address=found or "local", **settings)
    except Exception as error:
        # Ray raises whatever its parts raise, a bare Exception among them; its cause may have a traceback in
        # its message, of which the last line tells most.
        reason = " ".join([str(error), *str(error.__cause__ or "").strip().splitlines()[-1:]])
        raise RayUnreachable(
            f"no Ray at {_place(address)}: {reason}. Start one with `ray start --head`, "
            "or give the address of a running cluster"
        ) from error


def find_running(address: str | None, *, may_start: bool = False) -> str | None:
    """The address of a Ray that answers; None: there is none.

    It is the one at `address`, or else at RAY_ADDRESS, or the one that runs here.

    Raises:
        OSError: nobody answers there.
    """
    named = named_address(address)
    return _answering(named) if named else _running_ray(may_start=may_start)


def named_address(address: str | None) -> str | None:
    """The address, or else that of RAY_ADDRESS, as `ray.init` takes it from there; None: there is neither."""
    from_environment = os.environ.get("RAY_ADDRESS")
    return address or (None if from_environment == "auto" else from_environment)


def _place(address: str | None) -> str:
    """Where Ray was looked for."""
    named = named_address(address)
    return address or (f"{named}, which RAY_ADDRESS names" if named else "this machine")


def _running_ray(*, may_start: bool) -> str | None:
    """The address of the Ray that runs on this machine."""
    try:
        # What ray.init("auto") does, but for waiting minutes at an address where nobody is any more.
        address = services.canonicalize_bootstrap_address("auto")
    except ConnectionError:
        return None
    try:
        return None if address is None else _answering(address)
    except OSError as error:
        if not may_start:
            raise ConnectionError(f"the one that ran at {address} is gone ({error})") from error
        logger.warning("the Ray that ran at %s is gone (%s): starting a local one", address, error)
        return None


def check_answers(address: str) -> None:
    """Return if somebody listens there: Ray itself takes minutes to find out that nobody does.

    Raises:
        OSError: nobody does.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), PROBE_TIMEOUT_S).close()


def _answering(address: str) -> str:
    check_answers(address)
    return address


class Directory:
    """What this process knows of the bots. Thread-safe; where two ask at once, Ray is asked twice."""

    def __init__(self, address: str | None, timeout_s: float) -> None:
        self._address = address
        self._timeout_s = timeout_s
        self._pid: int | None = None
        self._node_id = ""
        self._lock = threading.Lock()
        self._options: dict[str, BotOptions] = {}
        self._endpoints: dict[tuple[str, int], Endpoint] = {}
        self.metrics = OF_THIS_PROCESS

    def init(self, bot_name: str, options: BotOptions) -> None:
        """See `Storage.init`. The shards' endpoints are known afterwards."""
        check_bot_name(bot_name)
        self._attach()
        try:
            self._patiently(lambda: actor.create_shards(bot_name, options, self._timeout_s))
        except NamespaceUnavailable as error:
            raise error.copied(whereabouts(options)) from error
        try:
            self._patiently(lambda: actor.open_shards(bot_name, options, self._timeout_s))
        except FsmRayError as error:
            actor.remove_unopened(bot_name, options, error, self._timeout_s)
            raise
        self._options[bot_name] = options
        if not self.is_remote:
            for shard in range(options.shards):
                self._patiently(lambda shard=shard: self.locate(bot_name, shard))  # type: ignore[misc]

    def options(self, bot_name: str) -> BotOptions:
        """The options of a bot that runs.

        Raises:
            UnknownBot, InvalidBotName, NamespaceUnavailable
        """
        options = self._options.get(bot_name)
        if options is None:
            check_bot_name(bot_name)
            self._attach()
            options = self._patiently(lambda: actor.running_options(bot_name, self._timeout_s))
            self._options[bot_name] = options
        return options

    def known_endpoint(self, bot_name: str, shard: int) -> Endpoint:
        """Where the shard was last seen, or Ray's word where it was never seen."""
        return self._endpoints.get((bot_name, shard)) or self.locate(bot_name, shard)

    def locate(self, bot_name: str, shard: int) -> Endpoint:
        """Where the shard listens now, by Ray's word.

        Raises:
            UnknownBot: there is no such bot, or it was made anew with fewer shards.
            ProtocolMismatch: it is of another version, and no upgrade to this one is under way.
            NamespaceUnavailable: the shard is being restarted, or about to be replaced.
            RayUnreachable: this is a forked process.
        """
        handle = self._find(bot_name, shard)
        endpoint: Endpoint = actor.call(handle.endpoint.remote(self.node_id), bot_name, self._timeout_s)
        self._check_protocol(bot_name, shard, endpoint.protocol_version)
        self._endpoints[bot_name, shard] = endpoint
        return endpoint

    def handle(self, bot_name: str, shard: int) -> tuple[ActorHandle[NamespaceActor], BotOptions]:
        """The shard's actor, for calls without a channel, and the options that it has just told.

        Raises:
            UnknownBot, ProtocolMismatch, NamespaceUnavailable: as `locate`.
        """
        handle = self._find(bot_name, shard)
        options: BotOptions = actor.call(handle.options.remote(), bot_name, self._timeout_s)
        version = actor.version_noted_by(handle, bot_name, shard)
        if version is None:
            raise NamespaceUnavailable(
                f"shard {shard} of bot {bot_name!r} does not answer, or is about to end", bot=bot_name
            )
        self._check_protocol(bot_name, shard, version.protocol)
        return handle, options

    def forget(self, bot_name: str) -> None:
        """Drop what is known of a bot that is gone or was made anew."""
        self._options.pop(bot_name, None)
        for bot, shard in tuple(self._endpoints):
            if bot == bot_name:
                self._endpoints.pop((bot, shard), None)

    def bots(self) -> list[str]:
        """See `Storage.bots`."""
        self._attach()
        return actor.running_bots()

    def describe(self, bot_name: str) -> BotDescription:
        """What the bot's shards say of themselves, now.

        Raises:
            UnknownBot, InvalidBotName, NamespaceUnavailable
        """
        options = self.options(bot_name)
        self._attach()
        return BotDescription(
            bot_name,
            options,
            self._patiently(lambda: actor.describe_shards(bot_name, options.shards, self._timeout_s)),
        )

    def rotate_keys(self, bot_name: str) -> KeyRotation:
        """See `Storage.rotate_keys`."""
        shards = self.options(bot_name).shards
        self._attach()
        rotations = self._patiently(lambda: actor.rotate_shards(bot_name, shards, self._timeout_s))
        by_shard = {shard: each.key_id for shard, each in enumerate(rotations)}
        if len(set(by_shard.values())) > 1:
            raise EncryptionKeysUnusable(
                f"the shards of bot {bot_name!r} found different current keys, {by_shard}: give all nodes "
                "the same encryption keys, and call again",
                bot=bot_name,
            )
        return KeyRotation(by_shard[0], sum(each.pending for each in rotations))

    def drop(self, bot_name: str) -> None:
        """End the bot's actors; what its store keeps is not touched."""
        check_bot_name(bot_name)
        self._attach()
        self.forget(bot_name)
        actor.kill_shards(bot_name, self._timeout_s)

    def upgrade(
        self, bot_name: str, timeout_s: float, *, force: bool, allow_loss: bool
    ) -> list[ReplacedShard]:
        """See `Storage.upgrade`."""
        check_bot_name(bot_name)
        self._attach()
        return upgrade_shards(bot_name, timeout_s, force=force, allow_loss=allow_loss)

    @property
    def is_remote(self) -> bool:
        """Whether this process is no part of the cluster and reaches it through Ray Client."""
        return bool(ray_client.is_connected())

    @property
    def node_id(self) -> str:
        """Ray's id of the node that this process runs on."""
        return self._node_id

    def _find(self, bot_name: str, shard: int) -> ActorHandle[NamespaceActor]:
        """The shard's actor; raises as `locate`."""
        self._attach()
        try:
            return actor.find_shard(bot_name, shard)
        except NamespaceUnavailable as error:
            # Whoever knows the bot from before would wait in vain for a shard that it has no more.
            shards = actor.running_options(bot_name, self._timeout_s).shards
            if shard < shards:
                raise
            raise UnknownBot(
                f"bot {bot_name!r} was dropped and initialised anew with fewer shards ({shards}): call again",
                bot=bot_name,
            ) from error

    def _check_protocol(self, bot_name: str, shard: int, theirs: int) -> None:
        try:
            check_protocol_version(theirs)
        except ProtocolMismatch as error:
            error.bot = bot_name
            mark = find_mark(bot_name)
            if mark is None or mark.version.protocol != Version().protocol:
                raise
            raise NamespaceUnavailable(
                f"shard {shard} of bot {bot_name!r} is of another version, and about to be replaced",
                bot=bot_name,
            ) from error

    def _patiently(self, ask: Callable[[], T]) -> T:
        """What `ask` returns; it is asked again while shards restart, for as long as `timeout_s`."""
        deadline = time.monotonic() + self._timeout_s
        for attempt in itertools.count():
            try:
                return ask()
            except NamespaceUnavailable:
                pause_s = retry_delay_s(attempt)
                if time.monotonic() + pause_s > deadline:
                    raise
                time.sleep(pause_s)
        raise AssertionError  # the loop has no end

    def _attach(self) -> None:
        pid = os.getpid()
        if self._pid == pid and ray.is_initialized():
            return
        with self._lock:
            if self._pid is not None and self._pid != pid:
                raise RayUnreachable(
                    "this process was forked from one that is attached to Ray, and Ray does not survive a "
                    "fork: operate on the bot once before forking, or start workers as Ray tasks or by spawn"
                )
            attach(self._address)
            if not self.is_remote:
                self._node_id = ray.get_runtime_context().get_node_id()
            self._pid = pid
