"""Hosting: one shard in its process, opened from its store, served, watched over, and stopped."""

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

import ray

from fsm_ray.channel.handshake import Endpoint
from fsm_ray.channel.server import Server
from fsm_ray.errors import (
    FsmRayError,
    InvalidInput,
    NamespaceUnavailable,
    NotOwner,
    Overloaded,
    StoreCorrupted,
)
from fsm_ray.logs import Seldom, where
from fsm_ray.metrics.publisher import PUBLISH_EVERY_S
from fsm_ray.metrics.shard import ShardMetrics
from fsm_ray.namespace import Namespace, NamespaceStatistics, NotServing
from fsm_ray.notes import Version, remove_version
from fsm_ray.options import BotOptions, redacted
from fsm_ray.stores.base import RotatingStore, Store
from fsm_ray.stores.by_url import make_store
from fsm_ray.tally import ShardTally
from fsm_ray.version import load_fields

logger = logging.getLogger(__name__)

MAX_EXCHANGES = 4_096
"""Requests by Ray calls that are under way; past it, further ones are refused. Ray lets in more calls, among
them those by which clients connect."""

_EVERYWHERE = ("0.0.0.0", "::", "")  # noqa: S104  # compared with, not listened to

_OPENING_PATIENCE_S = 2.0
"""How long a caller waits for a store to be opened and loaded before it is told so, and asks again."""

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

    __setstate__ = load_fields


class ShardHost:
    """One shard: its store, the namespace, the channel's server, and the metrics.

    The namespace is made from the store when somebody asks, and made anew when it stops by itself: a commit
    failed, or the store could not be asked who owns it. Not when another process owns the store by now.
    """

    PERFORMED = frozenset({"rotate_keys"})
    """What clients ask for by `NamespaceActor.perform`."""

    def __init__(self, bot_name: str, shard: int, options: BotOptions) -> None:
        self.options = options
        self._bot_name = bot_name
        self._shard = shard
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

    async def open(self) -> None:
        """Open the store, unless it is open.

        Raises:
            StoreUnavailable, StoreMismatch, StoreCorrupted, NotOwner, MissingExtra: it cannot be.
            NamespaceUnavailable: it is still being loaded, or was dropped.
        """
        await self._opened()

    def was_opened(self) -> bool:
        """Whether it ever opened its store."""
        return self._namespace is not None or self._final is not None or self._recovery_s > 0

    async def endpoint(self, node_id: str) -> Endpoint:
        """Where a client of this node connects. Begins to listen when need be.

        Raises:
            NamespaceUnavailable: the namespace stopped meanwhile: ask again; and as `open`.
        """
        namespace = await self._opened()
        async with self._listening:
            self._check_serves(namespace)
            if self._server is None or self._endpoint is None:
                server, endpoint = await self._listen(namespace)
                self._check_serves(namespace, server)
                self._server, self._endpoint = server, endpoint
            server, endpoint = self._server, self._endpoint
            if endpoint.tcp_address is None and node_id != endpoint.node_id:
                node_address = ray.util.get_node_ip_address()
                host, port = await server.listen_tcp(self.options.listen_host or node_address)
                self._check_serves(namespace, server)
                # Who listens everywhere is found at the node's own address.
                address = (node_address if host in _EVERYWHERE else host, port)
                self._endpoint = dataclasses.replace(endpoint, tcp_address=address)
            return self._endpoint

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
        """What it holds and does; raises as `open`."""
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
        await self._opened()
        store = self._store
        if not isinstance(store, RotatingStore):
            raise InvalidInput(
                f"bot {self._bot_name!r} has no encryption_keys, so there are none to rotate: to encrypt its "
                "store, drop it, and init it with some",
                bot=self._bot_name,
            )
        has_rotated = await store.rotate()
        namespace = await self._opened()  # another one, if it stopped meanwhile
        if has_rotated:
            namespace.make_all_stale()
            logger.info("%s: encrypts with the key %r", self._name, store.key_id)
        self._rewrite_stale(namespace, store)
        return ShardRotation(store.key_id, namespace.stale)

    async def stop(self) -> None:
        """Stop for good, and release the store; the actor is about to be killed."""
        self._final = self._unavailable("it was told to stop, and is about to be killed")
        remove_version(self._bot_name, self._shard)
        await self._close_namespace()
        if self._publishing is not None:
            self._publishing.cancel()
        if self._store is not None:
            await self._store.close()
        # Last, as Ray's metrics may raise what they like.
        self._metrics.publish()

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
        loop = asyncio.get_running_loop()
        if self._publishing is None:
            # Before there is anything to tell: a store that cannot be opened must be seen, too.
            self._publishing = loop.create_task(self._keep_publishing())
        started_s = time.monotonic()
        # Millions of new objects, none of them garbage, would be looked at again and again.
        gc.disable()
        try:
            if self._store is None:
                self._store = make_store(self._bot_name, self._shard, self.options)
            contents = await self._store.open()
        except FsmRayError as error:
            self._tell_of_failure(error)
            if isinstance(error, NotOwner):
                self._final = error
                self._tally.ownerships_lost += 1
            raise
        else:
            self._namespace = namespace = Namespace(
                self._bot_name,
                self.options,
                self._store,
                contents,
                on_stopped=self._stopped,
                tally=self._tally,
                shard=self._shard,
            )
        finally:
            gc.enable()
        self._openings += 1
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
            redacted(self.options.store),
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
            logger.info("%s: all is encrypted with the key %r now", self._name, store.key_id)

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

    def _check_serves(self, namespace: Namespace, begun: Server | None = None) -> None:
        """See to it that no server that was begun for a namespace outlives it.

        Raises:
            NamespaceUnavailable: the namespace stopped meanwhile.
        """
        if self._namespace is not namespace:
            if begun is not None:
                begun.close()
            raise self._unavailable("it has just stopped")

    async def _listen(self, namespace: Namespace) -> tuple[Server, Endpoint]:
        server = Server(namespace.handle, namespace.disconnected, name=self._name, tally=self._tally)
        # A restarted actor has the same name for its sockets, and so removes what its killed self left. With
        # what the server adds it has 24 bytes: `fsm-ray doctor` looks whether there is room for so many.
        identity = f"{ray.get_runtime_context().gcs_address} {self._bot_name}/{self._shard}"
        unix_path = await server.listen_unix(hashlib.sha256(identity.encode()).hexdigest()[:17])
        return server, Endpoint(
            options=self.options,
            node_id=_node_id(),
            unix_path=unix_path,
            tcp_address=None,
            secret=server.secret,
        )


def _prefer_this_thread() -> None:
    """Give the loop's thread the priority of an ordinary process, where the system lets us.

    Ray runs its workers at niceness 15 (RAY_worker_niceness), so that they leave its own daemons alone. All
    of a bot's workers wait for its shards, so a shard is more of a daemon than of a worker.
    """
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 0)


def _was_restarted() -> bool:
    with warnings.catch_warnings():
        # Ray's own property goes through a deprecated one of Ray's.
        warnings.simplefilter("ignore", DeprecationWarning)
        return bool(ray.get_runtime_context().was_current_actor_reconstructed)


def _node_id() -> str:
    node_id: str = ray.get_runtime_context().get_node_id()
    return node_id
