"""The object storage store: records in a bucket, or in a directory that all nodes share, kept by SlateDB.

`s3://bucket/prefix`, `gs://bucket/prefix`, `az://container/prefix`, `file:///directory`. Credentials, region
and endpoint come from the environment of the bot's actors, under the names that the Rust crate object_store
reads: AWS_ACCESS_KEY_ID, AWS_REGION, AWS_ENDPOINT, GOOGLE_SERVICE_ACCOUNT, AZURE_STORAGE_ACCOUNT_NAME and so
on. The object store must support conditional puts (`If-None-Match`), or the directory hard links.

Each shard is a database of its own, `<prefix>/<bot>/<shard>`, with this layout:

    owner               see `owner.Owner`
    confirmed           nothing: it is written to find out who may write
    version             the last version given out, 8 bytes
    r, slot, key        a record's blob
    s, session          the session's last answer

A commit is one object of SlateDB's log, put under the next number if there is none; that is one request. To
open a database takes the next number too, so that the writer before can put nothing more: it is fenced. The
object that fences is never deleted here, so this holds however long that writer slept.

A commit is as durable as an object is. In a directory, that is a file which the system was not told to sync:
it survives any process, but not a power cut of the machine that serves it. SlateDB's log and tables have
checksums; its manifests have none, so for those, the object store's own are relied on.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, ClassVar

import msgspec
from slatedb import uniffi as slatedb  # type: ignore[import-untyped]

from fsm_ray.errors import InvalidInput, NotOwner, StoreCorrupted, StoreMismatch, StoreUnavailable
from fsm_ray.stores.base import (
    Batch,
    Contents,
    Inspectable,
    OwnedStore,
    Place,
    Row,
    decode_answered,
    encode_answered,
    shard_directories,
    sorted_row,
    with_slot,
)
from fsm_ray.stores.owner import decode_owner

logger = logging.getLogger(__name__)

_OWNER = b"owner"
_CONFIRMED = b"confirmed"
_VERSION = b"version"
_RECORD = b"r"
_SESSION = b"s"
_KEY_START = 3
"""Where the key begins, behind `r` and the slot."""

_PAGE = 1000
"""Rows of one step of loading: about 10 ms of Python's time."""
_MIN_COMMIT_S = 1.0
"""How long a commit may take at least, however short the lease is."""
_STEP_S = 15.0
"""How long one step of opening or closing may take."""
_REPLAY_S = 300.0
"""How long it may take to become the writer: SlateDB reads its log first, of up to 4,096 commits."""
_SHUTDOWN_S = 2.0

_SETTINGS: dict[str, Any] = {
    # Commits are flushed one by one, as soon as they are written.
    "flush_interval": None,
    # Each poll costs two requests. What it finds is the work of the compactor, which polls as often.
    "manifest_poll_interval": "5s",
    # Each opening leaves a small table. With 8, the default, a shard that is often opened again would wait
    # for the compactor.
    "l0_max_ssts": 64,
    "l0_max_ssts_per_key": 64,
    # Nothing fences a writer that slept but what it finds in its way.
    "garbage_collector_options.wal_fence_options": None,
}
_DIRECTORY_SETTINGS: dict[str, Any] = {
    # What makes it safe to delete old manifests and lists of compactions is a file that is replaced
    # conditionally, and that object_store cannot do. So here they are deleted so late that no process that
    # was stopped while it wrote one comes back to find its number free.
    "garbage_collector_options.boundary_files_enabled": False,
    "garbage_collector_options.manifest_options.min_age": "86400s",
    "garbage_collector_options.compactions_options.min_age": "86400s",
}
_SIGNS_OF_DAMAGE = (slatedb.Error.Data, slatedb.Error.Internal, slatedb.InternalError)
_ALL = slatedb.KeyRange(start=None, start_inclusive=True, end=None, end_inclusive=True)


class ObjectStore(OwnedStore, Inspectable):
    """Keeps one shard in a SlateDB of its own."""

    is_shared: ClassVar[bool] = True

    def __init__(self, place: Place, **clocks: Any) -> None:
        super().__init__(place, **clocks)
        scheme, _, rest = place.url.partition("://")
        self._is_directory = scheme == "file"
        bucket, _, prefix = (rest, "", "") if self._is_directory else rest.partition("/")
        self._root = bucket if self._is_directory else f"{scheme}://{bucket}"
        self._path = "/".join([*filter(None, prefix.split("/")), place.bot_name, str(place.shard)])
        self._commit_s = max(place.lease_s, _MIN_COMMIT_S)
        self._objects: Any = None
        self._db: Any = None

    def commit(self, batch: Batch) -> asyncio.Future[None]:
        """See `Store.commit`."""
        return asyncio.get_running_loop().create_task(self._commit(batch))

    async def confirm(self) -> None:
        """See `Store.confirm`.

        It is a commit of nothing: one request, which no writer but the last can make. To read a manifest
        instead would take two, and one of those is a listing, which costs as much.
        """
        write = slatedb.WriteBatch()
        write.put(_CONFIRMED, b"")
        await self._write(write)

    @classmethod
    async def places(cls, url: str) -> list[tuple[str, int]]:
        """See `Inspectable.places`. Only a directory can tell: slatedb's interface lists no buckets."""
        scheme, _, path = url.partition("://")
        if scheme != "file":
            raise InvalidInput(f"a {scheme}:// store cannot tell which bots it has: name one")
        return shard_directories(path)

    async def rows(self) -> AsyncGenerator[Row, None]:
        """See `Inspectable.rows`. It is of one moment."""
        reader = None
        try:
            await self._connect()
            reader = await self._open_reader(skips_log=False)
            if reader is None:
                return
            owner = await self._get(reader, _OWNER)
            if owner is not None:
                yield Row("owner", "key owner", b"", owner)
            rows = await self._scan(reader)
            while page := await self._next_page(rows):
                for row in page:
                    if row.key not in {_OWNER, _CONFIRMED}:
                        yield sorted_row(row.key, row.value)
        finally:
            await self._shut_down(reader)
            await self.close()

    @property
    def _opened(self) -> Any:
        if self._db is None:
            raise self._unavailable("it is closed")
        return self._db

    async def _connect(self) -> None:
        try:
            self._objects = self._find_objects()
        except slatedb.Error as error:
            raise self._unavailable(_said(error)) from error

    async def _disconnect(self) -> None:
        db, self._db, self._objects = self._db, None, None
        await self._shut_down(db)

    async def _read_owner(self) -> bytes | None:
        """See `OwnedStore._read_owner`. It fences nobody: `_replace_owner` does."""
        if self._db is not None:
            return await self._get(self._db, _OWNER)
        # The owner is in a table, so the log need not be read: unless whoever was the first to open the
        # database came to its end while it did.
        for skips_log in (True, False):
            reader = await self._open_reader(skips_log=skips_log)
            if reader is None:
                return None
            try:
                owner = await self._get(reader, _OWNER)
                if owner is None and await self._next_page(await self._scan(reader)):
                    # Asked again, for somebody else may have written it meanwhile: before all else.
                    owner = await self._get(reader, _OWNER)
                    if owner is None:
                        raise self._foreign("a SlateDB that fsm_ray did not write")
            finally:
                await self._shut_down(reader)
            if owner is not None:
                return owner
        return None

    async def _replace_owner(self, last_epoch: int, epoch: int, owner: bytes) -> bool:  # noqa: ARG002
        try:
            return await self._write_owner(last_epoch, owner)
        except NotOwner:
            if self.owner is not None:
                raise
            # Of two that begin at once, each may fence the other. Both go on trying, and the last one wins.
            db, self._db = self._db, None
            await self._shut_down(db)
            return False

    async def _write_owner(self, last_epoch: int, owner: bytes) -> bool:
        if self._db is None:
            self._db = await self._become_writer()
        found = await self._get(self._db, _OWNER)
        if (0 if found is None else decode_owner(found).epoch) != last_epoch:
            return False
        write = slatedb.WriteBatch()
        write.put(_OWNER, owner)
        await self._write(write)
        # Into a table: for `_read_owner`, and because a database whose log was removed must not pass for new.
        async with self._asking(_STEP_S, to_write=True):
            await self._db.flush_with_options(slatedb.FlushOptions(flush_type=slatedb.FlushType.MEM_TABLE))
        return True

    async def _load(self) -> Contents:
        contents = Contents(version=0)
        rows = await self._scan(self._opened)
        while page := await self._next_page(rows):
            try:
                _take_in(contents, page)
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                raise self._corrupted(f"a session: {error}") from error
        return contents

    async def _commit(self, batch: Batch) -> None:
        # In a thread, since slatedb copies each byte on its own, in Python: 0.3 s for a MiB. Its generator of
        # bindings does so no more, from uniffi 0.32 on: https://github.com/mozilla/uniffi-rs/pull/2824
        write = await asyncio.to_thread(_write_of, batch)
        await self._write(write)

    async def _write(self, write: Any) -> None:
        """Write, and return when the object store has it."""
        db = self._opened
        async with self._asking(self._commit_s, to_write=True):
            written = await db.write(write)
            await db.flush()
            await written.await_durable()

    async def _become_writer(self) -> Any:
        """The database, in which nobody else can write anything from now on."""
        if self._objects is None:
            raise self._unavailable("it is closed")
        settings = slatedb.Settings.default()
        for name, value in (_SETTINGS | (_DIRECTORY_SETTINGS if self._is_directory else {})).items():
            settings.set(name, json.dumps(value))
        builder = slatedb.DbBuilder(self._path, self._objects)
        builder.with_settings(settings)
        async with self._asking(_REPLAY_S):
            try:
                return await builder.build()
            except slatedb.Error.Data as error:
                if "already exists" in error.message:
                    raise self._not_owner() from error  # somebody else made the database at the same time
                raise

    async def _open_reader(self, *, skips_log: bool) -> Any:
        """The database to read, which disturbs nobody; None where there is none."""
        async with self._asking(_STEP_S):
            try:
                return await self._reader_builder(skips_log=skips_log).build()
            except slatedb.Error.Data:
                if await self._is_empty():
                    return None
            # Somebody made it meanwhile. Or it is damaged, and this fails again.
            return await self._reader_builder(skips_log=skips_log).build()

    async def _is_empty(self) -> bool:
        """Whether nothing is below the path: a database that lost its manifests must not pass for new."""
        admin = slatedb.AdminBuilder(self._path, self._objects).build()
        # Unconfirmed, it deletes nothing: it lists what there is.
        if not await admin.delete_db(confirm=False):
            return True
        # Looked for only now: a database begins with its manifest.
        if await admin.read_manifest(None) is None:
            raise self._foreign("objects, but no SlateDB, or one that lost its manifests")
        return False

    def _reader_builder(self, *, skips_log: bool) -> Any:
        builder = slatedb.DbReaderBuilder(self._path, self._objects)
        builder.with_reader_mode(slatedb.ReaderMode.FOLLOW_LATEST())
        builder.with_options(
            slatedb.ReaderOptions(
                manifest_poll_interval_ms=3_600_000,
                checkpoint_lifetime_ms=7_200_000,
                max_memtable_bytes=64 << 20,
                skip_wal_replay=skips_log,
                # Everything else goes on trying without end, and never says what is wrong.
                object_store_max_retries=0,
            )
        )
        return builder

    async def _get(self, db: Any, key: bytes) -> bytes | None:
        async with self._asking(_STEP_S):
            value: bytes | None = await db.get(key)
        return value

    async def _scan(self, db: Any) -> Any:
        """All rows of the database, for `_next_page`."""
        options = slatedb.ScanOptions(
            durability_filter=slatedb.DurabilityLevel.MEMORY,
            dirty=False,
            read_ahead_bytes=1 << 20,
            cache_blocks=False,
            max_fetch_tasks=4,
        )
        async with self._asking(_STEP_S):
            return await db.scan_with_options(_ALL, options)

    async def _next_page(self, rows: Any) -> list[Any]:
        async with self._asking(_STEP_S):
            page: list[Any] = await rows.next_batch(_PAGE)
        return page

    async def _shut_down(self, db: Any) -> None:
        """Shut down a database or its reader, without waiting long for an object store that is not there."""
        if db is None:
            return
        try:
            async with asyncio.timeout(_SHUTDOWN_S):
                if isinstance(db, slatedb.DbReader):
                    await db.shutdown()
                else:
                    await db.shutdown_with_options(slatedb.CloseOptions(flush_type=None))
        except (slatedb.Error, slatedb.InternalError, TimeoutError) as error:
            logger.info("%s: not shut down properly: %r", self.name, error)

    def _find_objects(self) -> Any:
        if not self._is_directory:
            return slatedb.ObjectStore.resolve(self._root)
        builder = slatedb.ObjectStoreBuilder(slatedb.ObjectStoreType.LOCAL)
        builder.with_config("local_path", self._root)
        return builder.build()

    @asynccontextmanager
    async def _asking(self, timeout_s: float, *, to_write: bool = False) -> AsyncIterator[None]:
        """Raise an error of ours for one of SlateDB's, and when it takes longer than that.

        What damage SlateDB finds while it writes says nothing about what it writes: that is only unavailable,
        until the store is opened again.
        """
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except TimeoutError as error:
            raise self._unavailable(f"no answer within {timeout_s} s") from error
        except (slatedb.Error, slatedb.InternalError) as error:
            if isinstance(error, slatedb.Error.Closed) and error.reason == slatedb.CloseReason.FENCED:
                raise self._not_owner() from error
            # Internal errors are Rust's panics and failed conversions; a damaged manifest causes both.
            if to_write or not isinstance(error, _SIGNS_OF_DAMAGE):
                raise self._unavailable(_said(error)) from error
            raise self._corrupted(_said(error)) from error

    def _corrupted(self, reason: str) -> StoreCorrupted:
        return StoreCorrupted(
            f"{self.name}: what is below {self._path} cannot be read: {reason}. Nothing was changed; restore "
            "it from a backup",
            bot=self.place.bot_name,
        )

    def _foreign(self, what: str) -> StoreMismatch:
        return StoreMismatch(
            f"{self.name}: {self._path} holds {what}. Nothing was changed: give another prefix",
            bot=self.place.bot_name,
        )

    def _unavailable(self, reason: str) -> StoreUnavailable:
        return StoreUnavailable(f"{self.name} cannot be used: {reason}", bot=self.place.bot_name)


def _write_of(batch: Batch) -> Any:
    """What the commit of the batch writes."""
    write = slatedb.WriteBatch()
    put, delete = write.put, write.delete
    put(_VERSION, batch.version.to_bytes(8, "big"))
    for key, blob in batch.records.items():
        if blob is None:
            delete(_RECORD + with_slot(key))
        else:
            put(_RECORD + with_slot(key), blob)
    for session, answered in batch.sessions.items():
        put(_SESSION + session, encode_answered(answered))
    for session in batch.forgotten:
        delete(_SESSION + session)
    return write


def _take_in(contents: Contents, page: list[Any]) -> None:
    """Add these rows to the contents."""
    for row in page:
        key, value = row.key, row.value
        if key.startswith(_RECORD):
            contents.records[key[_KEY_START:]] = value
        elif key.startswith(_SESSION):
            contents.sessions[key[1:]] = decode_answered(value)
        elif key == _VERSION:
            contents.version = int.from_bytes(value, "big")


def _said(error: Exception) -> str:
    """SlateDB's message in one line, without XML, and without the queries of URLs, which may be signed."""
    said = " ".join(str(getattr(error, "message", error)).split())
    return re.sub(r"\?[^\s)]*", "", re.sub(r"<\?xml.*?<Code>(.*?)</Code>.*", r"\1", said))
