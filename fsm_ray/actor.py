"""The named actors: one for each shard of a bot, found by name in Ray's namespace `fsm_ray`.

Shard 0 is made first, so whoever makes it decides the bot's options; all others follow it. The functions
here call Ray and block; a caller on an event loop runs them in a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import hashlib
import logging
import os
import threading
import time
import warnings
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError

from fsm_ray.channel.handshake import Endpoint
from fsm_ray.channel.server import Server
from fsm_ray.errors import (
    ConfigurationError,
    FsmRayError,
    InvalidInput,
    NamespaceUnavailable,
    NotOwner,
    OptionsConflict,
    Overloaded,
    StoreCorrupted,
    UnknownBot,
)
from fsm_ray.logs import Seldom, where
from fsm_ray.metrics.publisher import PUBLISH_EVERY_S
from fsm_ray.metrics.shard import ShardMetrics
from fsm_ray.namespace import Namespace, NamespaceStatistics, NotServing
from fsm_ray.notes import Version, find_mark, note_version, noted_version, remove_notes, remove_version
from fsm_ray.options import BotOptions, redacted
from fsm_ray.stores.base import RotatingStore, Store
from fsm_ray.stores.by_url import make_store
from fsm_ray.tally import ShardTally
from fsm_ray.version import load_fields

logger = logging.getLogger(__name__)

RAY_NAMESPACE = "fsm_ray"

ACTOR_OPTIONS: dict[str, Any] = {
    "namespace": RAY_NAMESPACE,
    "lifetime": "detached",
    "get_if_exists": True,
    "num_cpus": 0,
    "max_restarts": -1,
    # Ray makes calls again as soon as an actor is back. Without, it tells of failures alone, and those come a
    # second apart. `exchange` is the exception.
    "max_task_retries": -1,
    # Calls that wait for a commit must not keep others out.
    "max_concurrency": 10_000,
}
"""What `ray.remote(...).options` gets for every shard, beside its name."""


MAX_EXCHANGES = 4_096
"""Requests by Ray calls that are under way; past it, further ones are refused. Ray lets in more calls, among
them those by which clients connect."""

_EVERYWHERE = ("0.0.0.0", "::", "")  # noqa: S104  # compared with, not listened to

_OPENING_PATIENCE_S = 2.0
"""How long a caller waits for a store to be opened and loaded before it is told so, and asks again."""

_KILL_PAUSE_S = 0.01
"""How long before Ray is asked again whether killed actors are gone."""

_MEASURE_EVERY_S = 30.0
"""How often records are measured, which looks at all of them; less often where that takes more than a
hundredth of the time."""

_OPENING_PAUSE_S = 0.2
"""How long after a failure a store is not asked again."""


@dataclass(frozen=True, slots=True)
class ShardDescription:
    """One shard as its actor sees itself."""

    shard: int
    node_id: str
    pid: int
    restarted_empty: bool
    """Whether this actor was restarted and came back empty, since its store does not outlive the process."""
    recovery_s: float
    """How long it took to open the store and load all records, the last time."""
    size_bytes: int
    """What keys and records take in the actor's memory."""
    statistics: NamespaceStatistics
    version: Version | None = None
    """Of fsm_ray, and of its protocol, in this actor; None: one that cannot tell."""

    __setstate__ = load_fields


@dataclass(frozen=True, slots=True)
class ShardRotation:
    """How far one shard is with encrypting everything with its current key."""

    key_id: str
    pending: int
    """Records, and answers to writes, that are still to be encrypted with it."""


class NamespaceActor:
    """One shard's namespace in an actor of its own. A plain class: `_create` makes it a Ray actor.

    The namespace is made from the store when somebody asks, and made anew when it stops by itself: a commit
    failed, or the store could not be asked who owns it. Not when another process owns the store by now.

    Clients of other versions call it, and Ray ends an actor that is called by a method that it does not have.
    So no method is ever removed or renamed, and one that is added later is called only where the version in
    `notes` has it.
    """

    def __init__(self, bot_name: str, shard: int, options: BotOptions) -> None:
        self._bot_name = bot_name
        self._shard = shard
        self._options = options
        self._name = f"shard {shard} of bot {bot_name!r}"
        self._tally = ShardTally()
        self._metrics = ShardMetrics(bot_name, shard, self._tally)
        self._publishing: asyncio.Task[None] | None = None
        self._openings = 0
        self._opening_failures = Seldom()
        self._restarted = _was_restarted()
        self._store: Store | None = None
        self._namespace: Namespace | None = None
        self._opening: asyncio.Task[Namespace] | None = None
        self._recovery_s = 0.0
        self._final: FsmRayError | None = None
        self._keepers: list[asyncio.Task[None]] = []
        self._rewriting: asyncio.Task[None] | None = None
        self._exchanges: set[asyncio.Future[bytes]] = set()
        self._listening = asyncio.Lock()
        self._server: Server | None = None
        self._endpoint: Endpoint | None = None
        note_version(bot_name, shard, _own_id())

    async def options(self) -> BotOptions:
        return self._options

    async def open(self) -> None:
        """Open the store, unless it is open.

        Raises:
            StoreUnavailable, StoreMismatch, StoreCorrupted, NotOwner, MissingExtra: it cannot be.
            NamespaceUnavailable: it is still being loaded, or was dropped.
        """
        await self._opened()

    async def was_opened(self) -> bool:
        """Whether this actor ever opened its store."""
        return self._namespace is not None or self._final is not None or self._recovery_s > 0

    async def endpoint(self, node_id: str) -> Endpoint:
        """Where a client of this node connects. Begins to listen when need be; raises as `open`."""
        namespace = await self._opened()
        async with self._listening:
            if self._server is None or self._endpoint is None:
                self._server, self._endpoint = await self._listen(namespace)
            if self._endpoint.tcp_address is None and node_id != self._endpoint.node_id:
                node_address = ray.util.get_node_ip_address()
                host, port = await self._server.listen_tcp(self._options.listen_host or node_address)
                # Who listens everywhere is found at the node's own address.
                address = (node_address if host in _EVERYWHERE else host, port)
                self._endpoint = dataclasses.replace(self._endpoint, tcp_address=address)
            return self._endpoint

    # Retries of operations are the routing's, which numbers its writes; Ray would not know them apart.
    @ray.method(max_task_retries=0)
    async def exchange(self, request: bytes) -> bytes:
        """One frame in, its reply out: the channel's fallback, over a Ray call.

        Raises:
            NamespaceUnavailable: the namespace stopped, before or while it worked on the request: ask again.
        """
        namespace = await self._opened()
        if len(self._exchanges) >= MAX_EXCHANGES:
            return self._refuse(namespace, request)
        committed: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._exchanges.add(committed)
        try:
            reply = namespace.handle(request[4:], committed.set_result)
            # Shielded: the commit answers even when the caller has given up.
            return await asyncio.shield(committed) if reply is None else reply
        except NotServing as error:
            if committed.done():
                committed.exception()  # retrieved: what stopped it just now told all that wait
            raise self._unavailable("it has just stopped") from error
        finally:
            self._exchanges.discard(committed)

    def _refuse(self, namespace: Namespace, request: bytes) -> bytes:
        why = f"{MAX_EXCHANGES} Ray calls to it are under way"
        error = Overloaded(f"{self._name}: {why}: nothing was changed, retry later", bot=self._bot_name)
        refusal = namespace.refuse(request[4:], error)
        if refusal is None:
            raise self._unavailable(why)
        return refusal

    async def describe(self) -> ShardDescription:
        namespace = await self._opened()
        return ShardDescription(
            shard=self._shard,
            node_id=_node_id(),
            pid=os.getpid(),
            restarted_empty=self._restarted and not self._is_durable,
            recovery_s=self._recovery_s,
            size_bytes=await namespace.size_bytes(),
            statistics=namespace.statistics(),
            version=Version(),
        )

    async def rotate_keys(self) -> ShardRotation:
        """Read the encryption keys again, and go on to what `Storage.rotate_keys` says.

        Raises:
            InvalidInput: the bot's store is not encrypted.
            EncryptionKeysUnusable: see `RotatingStore.rotate`; and as `open`.
        """
        namespace = await self._opened()
        store = self._store
        if not isinstance(store, RotatingStore):
            raise InvalidInput(
                f"bot {self._bot_name!r} has no encryption_keys, so there are none to rotate: to encrypt its "
                "store, drop it, and init it with some",
                bot=self._bot_name,
            )
        if store.rotate():
            namespace.make_all_stale()
            logger.info(
                "shard %d of bot %r: encrypts with the key %r", self._shard, self._bot_name, store.key_id
            )
        self._rewrite_stale(namespace, store)
        return ShardRotation(store.key_id, namespace.stale)

    async def stop(self) -> None:
        """Stop for good, and release the store; the actor is about to be killed."""
        self._final = self._unavailable("it was told to stop, and is about to be killed")
        remove_version(self._bot_name, self._shard)
        await self._close_namespace()
        if self._publishing is not None:
            self._publishing.cancel()
        self._metrics.publish()
        if self._store is not None:
            await self._store.close()

    @property
    def _is_durable(self) -> bool:
        return self._store is not None and self._store.is_durable

    async def _opened(self) -> Namespace:
        """The namespace, opened by whoever comes first: Ray runs no coroutine at construction."""
        if self._namespace is not None:
            return self._namespace
        if self._final is not None:
            raise self._final.copied()
        if self._opening is None:
            self._opening = asyncio.get_running_loop().create_task(self._open())
            self._opening.add_done_callback(self._tried_to_open)
        opening = self._opening
        done, _ = await asyncio.wait([opening], timeout=_OPENING_PATIENCE_S)
        if not done:
            raise self._unavailable("it is still loading its records")
        error = opening.exception()
        if error is None:
            return opening.result()
        raise error.copied() if isinstance(error, FsmRayError) else error

    async def _open(self) -> Namespace:
        """Make the namespace from what the store holds."""
        _prefer_this_thread()
        started_s = time.monotonic()
        # Millions of new objects, none of them garbage, would be looked at again and again.
        gc.disable()
        try:
            if self._store is None:
                self._store = make_store(self._bot_name, self._shard, self._options)
            contents = await self._store.open()
        except FsmRayError as error:
            self._tell_of_failure(error)
            if isinstance(error, NotOwner):
                self._final = error
            raise
        else:
            self._namespace = namespace = Namespace(
                self._bot_name,
                self._options,
                self._store,
                contents,
                on_stopped=self._stopped,
                tally=self._tally,
                shard=self._shard,
            )
        finally:
            gc.enable()
        loop = asyncio.get_running_loop()
        self._openings += 1
        if self._publishing is None:
            self._publishing = loop.create_task(self._keep_publishing())
        self._keepers = [loop.create_task(namespace.keep_tidy())]
        if self._store.is_shared:
            self._keepers.append(loop.create_task(namespace.keep_ownership()))
        if isinstance(self._store, RotatingStore):
            self._rewrite_stale(namespace, self._store)
        self._recovery_s = time.monotonic() - started_s
        if self._restarted and not self._is_durable:
            logger.warning("%s was restarted and is empty: its records lived in memory only", self._name)
        logger.info(
            "%s: opened %s with %d records in %.2f s",
            self._name,
            redacted(self._options.store),
            namespace.statistics().records,
            self._recovery_s,
        )
        # What is imported by now stays for good: let no collection look at it again.
        gc.collect()
        gc.freeze()
        return namespace

    def _rewrite_stale(self, namespace: Namespace, store: RotatingStore) -> None:
        """Encrypt in the background what the current key did not, unless that is being done."""
        is_at_it = self._rewriting is not None and not self._rewriting.done()
        if namespace.stale and not is_at_it:
            self._rewriting = asyncio.get_running_loop().create_task(self._rewrite(namespace, store))
            self._keepers.append(self._rewriting)

    async def _rewrite(self, namespace: Namespace, store: RotatingStore) -> None:
        if await namespace.rewrite():
            store.rotated()
            logger.info(
                "shard %d of bot %r: all is encrypted with the key %r now",
                self._shard,
                self._bot_name,
                store.key_id,
            )

    def _tried_to_open(self, opening: asyncio.Task[Namespace]) -> None:
        if opening.cancelled() or opening.exception() is not None:
            # Who asks before this is over gets the same answer: a store in trouble is left in peace.
            asyncio.get_running_loop().call_later(_OPENING_PAUSE_S, self._forget_opening)
        else:
            self._forget_opening()

    def _forget_opening(self) -> None:
        self._opening = None

    def _stopped(self, reason: FsmRayError) -> None:
        """The namespace stopped by itself: drop it and all who talk to it; they come back and ask again."""
        logger.error("%s stopped: %s", self._name, reason)
        if isinstance(reason, NotOwner):
            self._final = reason
        self._namespace = None
        self._hang_up()

    async def _close_namespace(self) -> None:
        namespace, self._namespace = self._namespace, None
        self._hang_up()
        if namespace is not None:
            await namespace.close()
        for keeper in self._keepers:
            keeper.cancel()

    def _tell_of_failure(self, error: FsmRayError) -> None:
        """Log why the store could not be opened; those who ask get the same error."""
        if self._opening_failures.passes():
            # Which record is damaged is told to whoever calls init: a log must not say a user's key.
            why = "what it holds cannot be read" if isinstance(error, StoreCorrupted) else str(error)
            more = self._opening_failures.more()
            logger.warning(
                "%s: cannot open its store (%s): %s%s", self._name, type(error).__name__, why, more
            )

    async def _keep_publishing(self) -> None:
        """Publish metrics, again and again; without them, everything works all the same."""
        troubles = Seldom()
        size_bytes, due_s = 0, 0.0
        while True:
            try:
                namespace, now_s = self._namespace, time.monotonic()
                if namespace is not None and now_s >= due_s:
                    size_bytes = await namespace.size_bytes()
                    due_s = now_s + max(_MEASURE_EVERY_S, 100 * (time.monotonic() - now_s))
                self._publish(size_bytes)
            except Exception as error:  # noqa: BLE001  # of Ray's, say
                if troubles.passes():
                    logger.warning("%s: no metrics: %s%s", self._name, where(error), troubles.more())
            await asyncio.sleep(PUBLISH_EVERY_S)

    def _publish(self, size_bytes: int) -> None:
        self._metrics.publish()
        self._metrics.publish_state(
            None if self._namespace is None else self._namespace.statistics(),
            record_bytes=size_bytes,
            connections=0 if self._server is None else len(self._server.connections),
            openings=self._openings,
            recovery_s=self._recovery_s,
        )

    def _hang_up(self) -> None:
        """Close all connections, and stop to listen."""
        if self._server is not None:
            self._server.close()
        self._server = self._endpoint = None
        for exchange in tuple(self._exchanges):
            if not exchange.done():
                exchange.set_exception(self._unavailable("it stopped while it worked on a request"))

    def _unavailable(self, why: str) -> NamespaceUnavailable:
        return NamespaceUnavailable(f"{self._name}: {why}", bot=self._bot_name)

    async def _listen(self, namespace: Namespace) -> tuple[Server, Endpoint]:
        server = Server(namespace.handle, namespace.disconnected, name=self._name, tally=self._tally)
        # A restarted actor has the same name for its socket, and so removes what its killed self left.
        identity = f"{ray.get_runtime_context().gcs_address} {self._bot_name}/{self._shard}"
        unix_path = await server.listen_unix(hashlib.sha256(identity.encode()).hexdigest()[:24])
        return server, Endpoint(
            options=self._options,
            node_id=_node_id(),
            unix_path=unix_path,
            tcp_address=None,
            secret=server.secret,
        )


def create_shards(bot_name: str, options: BotOptions, timeout_s: float) -> None:
    """Make the bot's actors unless they are there.

    Raises:
        OptionsConflict: the bot runs with other options; nothing was changed.
        NamespaceUnavailable: an actor did not come up within `timeout_s`; a retry is safe.
    """
    first = create_shard(bot_name, 0, options)
    running: BotOptions = call(first.options.remote(), bot_name, timeout_s)
    if running != options:
        differences = {
            name: (_shown(value), _shown(getattr(options, name)))
            for name, value in running
            if value != getattr(options, name, value)  # one of another version has options of its own
        }
        told = ", ".join(f"{name} is {old!r}, not {new!r}" for name, (old, new) in differences.items())
        raise OptionsConflict(
            f"bot {bot_name!r} already runs with other options: {told}. Nothing was changed: "
            "init it with its own options, or drop it first",
            bot=bot_name,
            differences=differences,
        )
    others = [create_shard(bot_name, shard, options) for shard in range(1, options.shards)]
    for actor in others:
        call(actor.options.remote(), bot_name, timeout_s)


def create_shard(
    bot_name: str, shard: int, options: BotOptions, *, get_if_exists: bool = True
) -> ActorHandle[NamespaceActor]:
    """The shard's actor, made unless it is there.

    Raises:
        ValueError: it is there, and not to be had.
    """
    # Not by the node's id, which changes when the node starts anew: the actor waits for its directory.
    resources = {} if options.store_node is None else {options.store_node: 0.0001}
    actor_class: Any = ray.remote(NamespaceActor).options(
        **ACTOR_OPTIONS
        | {"name": _name(bot_name, shard), "resources": resources, "get_if_exists": get_if_exists}
    )
    actor: ActorHandle[NamespaceActor] = actor_class.remote(bot_name, shard, options)
    return actor


def open_shards(bot_name: str, options: BotOptions, timeout_s: float) -> None:
    """Open the stores of all shards, at the same time.

    Raises:
        NamespaceUnavailable: one is not open yet; a retry is safe.
        FsmRayError: one cannot be opened, see `NamespaceActor.open`.
    """
    calls: list[Any] = [find_shard(bot_name, shard).open.remote() for shard in range(options.shards)]
    for each in calls:
        call(each, bot_name, timeout_s)


def remove_unopened(bot_name: str, options: BotOptions, error: FsmRayError, timeout_s: float) -> None:
    """End the bot's actors if `error` kept them from ever opening their stores.

    So that an `init` with mended options does not find a bot that runs with others.
    """
    actors = [find_shard(bot_name, shard) for shard in range(options.shards)]
    calls: list[Any] = [each.was_opened.remote() for each in actors]
    opened = [call(each, bot_name, timeout_s) for each in calls]
    # With wrong options, some shards may have found nothing to disagree with; a bot that ran has none wrong.
    ran = all(opened) if isinstance(error, ConfigurationError) else any(opened)
    if not ran:
        kill_shards(bot_name, timeout_s)


def find_shard(bot_name: str, shard: int) -> ActorHandle[NamespaceActor]:
    """The actor's handle.

    Raises:
        UnknownBot: there is no such bot.
        NamespaceUnavailable: the bot is there, but not this shard of it.
    """
    actor = find_actor(bot_name, shard)
    if actor is None and find_mark(bot_name):
        raise NamespaceUnavailable(
            f"shard {shard} of bot {bot_name!r} is being replaced by an upgrade, or an upgrade was "
            "interrupted: if so, upgrade the bot again",
            bot=bot_name,
        )
    # Asked once more, for an upgrade may have ended between the questions.
    actor = actor or find_actor(bot_name, shard)
    if actor is None:
        if shard == 0:
            raise UnknownBot(
                f"no bot {bot_name!r} on this Ray cluster: call storage.init({bot_name!r}) first",
                bot=bot_name,
            )
        find_shard(bot_name, 0)
        raise NamespaceUnavailable(
            f"shard {shard} of bot {bot_name!r} is not there, as its init was interrupted: call init again",
            bot=bot_name,
        )
    return actor


def find_actor(bot_name: str, shard: int) -> ActorHandle[NamespaceActor] | None:
    """The handle of the actor that has the shard's name at this moment."""
    try:
        return ray.get_actor(_name(bot_name, shard), namespace=RAY_NAMESPACE)
    except ValueError:
        return None


def version_of(
    actor: ActorHandle[NamespaceActor], bot_name: str, shard: int, timeout_s: float
) -> Version | None:
    """What the shard's actor runs; None: it cannot tell, was told to stop, or does not answer in time."""
    try:
        call(actor.options.remote(), bot_name, timeout_s)  # until it was made, or made again
    except NamespaceUnavailable:
        return None
    return noted_version(bot_name, shard, actor._actor_id.hex())  # noqa: SLF001  # Ray shows it nowhere else


def running_bots() -> list[str]:
    """The names of all bots on this cluster, sorted."""
    names = [name.rpartition("/") for name in _actor_names()]
    return sorted(bot_name for bot_name, _, shard in names if shard == "0")


def running_options(bot_name: str, timeout_s: float) -> BotOptions:
    """The options that the bot was made with.

    Raises:
        UnknownBot: there is no such bot.
        NamespaceUnavailable: its first shard did not answer within `timeout_s`.
    """
    options: BotOptions = call(find_shard(bot_name, 0).options.remote(), bot_name, timeout_s)
    return options


def describe_shards(bot_name: str, shards: int, timeout_s: float) -> list[ShardDescription]:
    """What each shard says of itself. Raises UnknownBot or NamespaceUnavailable."""
    calls: list[Any] = [find_shard(bot_name, shard).describe.remote() for shard in range(shards)]
    return [call(each, bot_name, timeout_s) for each in calls]


def rotate_shards(bot_name: str, shards: int, timeout_s: float) -> list[ShardRotation]:
    """See `NamespaceActor.rotate_keys`. Raises UnknownBot or NamespaceUnavailable, too."""
    calls: list[Any] = [find_shard(bot_name, shard).rotate_keys.remote() for shard in range(shards)]
    return [call(each, bot_name, timeout_s) for each in calls]


def kill_shards(bot_name: str, timeout_s: float) -> None:
    """End the bot's actors, the first one last, so that an interrupted call can be repeated.

    Raises:
        UnknownBot: it has none.
        NamespaceUnavailable: they are about to end, and Ray still lists them after `timeout_s`.
    """
    names = [name for name in _actor_names() if name.rpartition("/")[0] == bot_name]
    if not names and find_mark(bot_name) is None:
        find_shard(bot_name, 0)
    for name in sorted(names, key=lambda name: int(name.rpartition("/")[2]), reverse=True):
        actor = ray.get_actor(name, namespace=RAY_NAMESPACE)
        # One that does not answer any more cannot remove its socket, and is killed all the same.
        with contextlib.suppress(NamespaceUnavailable):
            call(actor.stop.remote(), bot_name, timeout_s)
        ray.kill(actor, no_restart=True)
    # Ray returns before its control store has taken note.
    deadline = time.monotonic() + timeout_s
    while not set(names).isdisjoint(_actor_names()):
        if time.monotonic() >= deadline:
            raise NamespaceUnavailable(
                f"the actors of bot {bot_name!r} were told to end, and are still there after {timeout_s} s",
                bot=bot_name,
                timeout_s=timeout_s,
            )
        time.sleep(_KILL_PAUSE_S)
    remove_notes(bot_name)


def call(reference: Any, bot_name: str, timeout_s: float) -> Any:
    """What the actor's method returned.

    Raises:
        NamespaceUnavailable: it did not answer within `timeout_s`, or is being restarted.
        FsmRayError: whatever of ours the method raised.
    """
    try:
        return ray.get(reference, timeout=timeout_s)
    except RayTaskError as error:
        if isinstance(error.cause, FsmRayError):
            raise error.cause from None
        raise
    except RayError as error:
        raise NamespaceUnavailable(
            f"bot {bot_name!r} does not answer a Ray call: {error}",
            bot=bot_name,
            timeout_s=timeout_s,
        ) from error


def _name(bot_name: str, shard: int) -> str:
    return f"{bot_name}/{shard}"


def _actor_names() -> list[str]:
    """The names of all bots' actors."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in actors if actor["namespace"] == RAY_NAMESPACE]


def _prefer_this_thread() -> None:
    """Give the loop's thread the priority of an ordinary process, where the system lets us.

    Ray runs its workers at niceness 15 (RAY_worker_niceness), so that they leave its own daemons alone. All
    of a bot's workers wait for its shards, so a shard is more of a daemon than of a worker.
    """
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 0)


def _shown(value: Any) -> Any:
    """An option's value, without the password if it is a URL."""
    return redacted(value) if isinstance(value, str) else value


def _own_id() -> str:
    """This actor's id at Ray."""
    return ray.get_runtime_context().get_actor_id() or ""


def _was_restarted() -> bool:
    with warnings.catch_warnings():
        # Ray's own property goes through a deprecated one of Ray's.
        warnings.simplefilter("ignore", DeprecationWarning)
        return bool(ray.get_runtime_context().was_current_actor_reconstructed)


def _node_id() -> str:
    node_id: str = ray.get_runtime_context().get_node_id()
    return node_id
