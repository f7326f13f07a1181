"""The RocksDB store: records on the disk of one node, each commit on the disk before it is answered.

RocksDB's lock lets one process at a time open a directory, and the system frees it with the process, so there
is no lease. The layout of the one column family:

    owner               see `owner.Owner`
    r, slot, key        a record's blob
    s, session          the session's last answer
    version             the last version given out, 8 bytes; always there, and always the last key
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import re
import tempfile
import threading
import zlib
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any, ClassVar, TypeVar, cast

import msgspec
from rocksdict import AccessType, DBRecoveryMode, MemtableFactory, Options, Rdict, ReadOptions, WriteBatch

from fsm_ray.errors import FsmRayError, StoreCorrupted, StoreMismatch, StoreUnavailable
from fsm_ray.options import SLOTS
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
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

_OWNER = b"owner"
_VERSION = b"version"
_RECORD = b"r"
_SESSION = b"s"
_KEY_START = 3
"""Where the key begins, behind `r` and the slot."""

_RECORD_PREFIXES = tuple(_RECORD + slot.to_bytes(2, "big") for slot in range(SLOTS))
_READAHEAD_BYTES = 4 << 20

_SCRATCH = "fsm_ray-look-"
"""How the name of a directory of links begins."""

_LOOKS = 5
"""How often a directory is tried to be read whose owner is just replacing files."""


class RocksDBStore(OwnedStore, Inspectable):
    """Keeps one shard in a directory of its own, `<directory>/<bot>/<shard>`."""

    is_shared: ClassVar[bool] = False
    max_commits: ClassVar[int] = 2

    def __init__(self, place: Place, **clocks: Any) -> None:
        super().__init__(place, **clocks)
        self.directory = Path(place.url.partition("://")[2]) / place.bot_name / str(place.shard)
        self._db: Rdict | None = None
        self._worker: _Worker | None = None

    def commit(self, batch: Batch) -> asyncio.Future[None]:
        """See `Store.commit`.

        rocksdict holds Python's lock while it writes, and frees it only while it syncs. So the write, which
        goes to the page cache, is made here, and only the sync in a thread. The next batch is written while
        the last one is synced.
        """
        write = WriteBatch(raw_mode=True)
        put, delete, crc32 = write.put, write.delete, zlib.crc32
        put(_VERSION, batch.version.to_bytes(8, "big"))
        for key, blob in batch.records.items():
            # As `with_slot`, written out.
            stored = _RECORD_PREFIXES[crc32(key) % SLOTS] + key
            if blob is None:
                delete(stored)
            else:
                put(stored, blob)
        for session, answered in batch.sessions.items():
            put(_SESSION + session, encode_answered(answered))
        for session in batch.forgotten:
            delete(_SESSION + session)
        try:
            self._opened.write(write)
        except Exception as error:  # noqa: BLE001  # rocksdict raises nothing narrower
            failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            failed.set_exception(self._translated(error))
            return failed
        return self._at_work.run(self._sync)

    async def confirm(self) -> None:
        """Never called: who has the lock is the owner."""
        raise NotImplementedError

    @classmethod
    async def places(cls, url: str) -> list[tuple[str, int]]:
        """See `Inspectable.places`."""
        return shard_directories(url.partition("://")[2])

    async def rows(self) -> AsyncGenerator[Row, None]:
        """See `Inspectable.rows`. It is of one moment."""
        with tempfile.TemporaryDirectory(prefix=_SCRATCH) as scratch:
            self._db = db = self._open_to_read(Path(scratch))
            try:
                is_whole = False
                for key, value in itertools.chain(
                    [(_OWNER, db.get(_OWNER))], self._strangers(), self._stored()
                ):
                    is_whole |= key == _VERSION
                    if value is not None:
                        yield sorted_row(key, value)
                if not is_whole:
                    self._find_damage()
            except Exception as error:
                raise self._translated(error) from error
            finally:
                self._db = None
                db.close()

    @property
    def _opened(self) -> Rdict:
        if self._db is None:
            raise StoreUnavailable(f"{self.name} is closed", bot=self.place.bot_name)
        return self._db

    @property
    def _at_work(self) -> _Worker:
        if self._worker is None:
            self._worker = _Worker()
        return self._worker

    async def _connect(self) -> None:
        await self._at_work.run(self._open_directory)

    async def _disconnect(self) -> None:
        db, self._db = self._db, None
        worker, self._worker = self._worker, None
        if worker is not None:
            if db is not None:
                await worker.run(lambda: self._close(db))
            worker.stop()

    async def _read_owner(self) -> bytes | None:
        owner, is_empty = await self._at_work.run(self._look)
        if owner is None and not is_empty:
            raise StoreMismatch(
                f"{self.directory} holds a RocksDB that fsm_ray did not write; nothing was changed: "
                "give another directory",
                bot=self.place.bot_name,
            )
        return owner

    async def _replace_owner(self, last_epoch: int, epoch: int, owner: bytes) -> bool:  # noqa: ARG002
        # Nobody else can have written since `_read_owner`: this process has the lock.
        await self._at_work.run(lambda: self._put_owner(owner))
        return True

    async def _load(self) -> Contents:
        return await self._at_work.run(self._read_all)

    def _open_to_read(self, scratch: Path) -> Rdict:
        """The database as it is now, which its owner may go on writing.

        By links, for rocksdict writes into the directory that it opens, also when it is to read only.
        """
        if not self.directory.is_dir():
            raise StoreUnavailable(f"{self.directory} is not there", bot=self.place.bot_name)
        self._check_files()
        options = self._options()
        for look in itertools.count(1):
            links = scratch / str(look)
            links.mkdir()
            for path in self.directory.iterdir():
                if path.suffix in {".sst", ".log"} or path.name.startswith(("CURRENT", "MANIFEST")):
                    (links / path.name).symlink_to(path.absolute())
            try:
                return Rdict(
                    str(links), options, access_type=AccessType.read_only(error_if_log_file_exist=False)
                )
            except Exception as error:
                # Files that an owner has just replaced are gone when they are come to.
                if look == _LOOKS or "No such file" not in str(error):
                    raise self._translated(error) from error
        raise AssertionError  # the last look returns or raises

    def _strangers(self) -> Iterator[tuple[bytes, bytes]]:
        """What lies before the records and is not the owner."""
        before = itertools.takewhile(lambda item: item[0] < _RECORD, self._stored(from_key=b""))
        return (item for item in before if item[0] != _OWNER)

    def _options(self) -> Options:
        options = Options(raw_mode=True)
        options.set_paranoid_checks(enabled=True)
        # A torn end of the log is what a crash leaves of a commit that nobody was told of. Other damage is
        # refused; by default, RocksDB would go on without all that follows it.
        options.set_wal_recovery_mode(DBRecoveryMode.tolerate_corrupted_tail_records())
        # What is written is never read before it is opened again. So it need not be sorted on its way: the
        # write of 128 records takes 74 us instead of 256.
        options.set_memtable_factory(MemtableFactory.vector())
        options.set_allow_concurrent_memtable_write(allow=False)
        return options

    def _open_directory(self) -> None:
        options = self._options()
        options.create_if_missing(create_if_missing=True)
        options.set_keep_log_file_num(5)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._check_files()
            self._db = Rdict(str(self.directory), options)
            for directory in (self.directory, *self.directory.parents[:3]):
                _sync_directory(directory)
        except Exception as error:
            raise self._translated(error) from error

    def _check_files(self) -> None:
        """Refuse a directory that lost what RocksDB would go on without, as if there had been nothing."""
        if not any(self.directory.glob("*.sst")):
            # Nothing was ever acknowledged from here: `_put_owner` makes the first table.
            return
        for what in ("CURRENT", "*.log"):
            if not any(self.directory.glob(what)):
                raise StoreCorrupted(
                    f"{self.directory} is damaged: {what} is missing. Nothing was changed; "
                    "restore it from a backup",
                    bot=self.place.bot_name,
                )

    def _close(self, db: Rdict) -> None:
        try:
            db.close()
        except Exception as error:  # noqa: BLE001  # rocksdict raises nothing narrower
            # It could not write what it had not synced: nobody was told that. It is closed all the same.
            logger.info("%s: not closed properly: %s", self.name, error)

    def _look(self) -> tuple[bytes | None, bool]:
        """The owner's record, and whether there is nothing at all."""
        items = self._opened.iter()
        try:
            items.seek_to_first()
            is_empty = not items.valid()
            items.status()
            return self._opened.get(_OWNER), is_empty
        except Exception as error:
            raise self._translated(error) from error
        finally:
            del items  # as in `_stored`

    def _put_owner(self, owner: bytes) -> None:
        write = WriteBatch(raw_mode=True)
        write.put(_OWNER, owner)
        try:
            if self._opened.get(_VERSION) is None:
                write.put(_VERSION, (0).to_bytes(8, "big"))
            self._opened.write(write)
            # Into a table: a directory whose log was removed must not pass for a new one.
            self._opened.flush()
        except Exception as error:
            raise self._translated(error) from error

    def _sync(self) -> None:
        try:
            self._opened.flush_wal(sync=True)
        except Exception as error:
            raise self._translated(error) from error

    def _read_all(self) -> Contents:
        contents = Contents(version=0)
        records, is_whole = contents.records, False
        try:
            for key, value in self._stored():
                if key[0] == _RECORD[0]:
                    records[key[_KEY_START:]] = value
                elif key != _VERSION:
                    contents.sessions[key[1:]] = decode_answered(value)
                else:
                    contents.version, is_whole = int.from_bytes(value, "big"), True
            if not is_whole:
                self._find_damage()
        except msgspec.MsgspecError as error:
            raise StoreCorrupted(
                f"{self.directory}: a session cannot be read: {error}", bot=self.place.bot_name
            ) from error
        except Exception as error:
            raise self._translated(error) from error
        return contents

    def _stored(self, from_key: bytes = _RECORD) -> Iterator[tuple[bytes, bytes]]:
        """Records, sessions and the version; less, without a word, where a block is damaged."""
        # Nobody may keep this iterator, not even a traceback: it keeps the directory's lock.
        options = ReadOptions()
        options.set_readahead_size(_READAHEAD_BYTES)
        return cast("Iterator[tuple[bytes, bytes]]", self._opened.items(from_key=from_key, read_opt=options))

    def _find_damage(self) -> None:
        """Raise what RocksDB says of it."""
        items = self._opened.iter()
        try:
            items.seek_to_first()
            while items.valid():
                items.next()
            items.status()
        finally:
            del items  # as in `_stored`
        raise StoreCorrupted(
            f"{self.directory} is damaged: the last key is missing. Nothing was changed; "
            "restore it from a backup",
            bot=self.place.bot_name,
        )

    def _translated(self, error: Exception) -> FsmRayError:
        """The error of ours for one of rocksdict's, which raises bare exceptions with RocksDB's message."""
        said = re.sub(rf"\S*/{_SCRATCH}\w+/\d+", str(self.directory), " ".join(str(error).split()))
        bot = self.place.bot_name
        if isinstance(error, FsmRayError):
            return error
        if said.startswith(("Corruption", "IO error: No such file")):
            return StoreCorrupted(
                f"{self.directory} is damaged: {said}. Nothing was changed; restore it from a backup",
                bot=bot,
            )
        if f"{self.directory}/LOCK: " in said:
            return StoreUnavailable(f"{self.directory} is open in another process: {said}", bot=bot)
        return StoreUnavailable(f"{self.directory} cannot be used: {said}", bot=bot)


def _sync_directory(directory: Path) -> None:
    """Let the names in it outlive a power failure. RocksDB does it for its own files."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Worker:
    """A thread that does one thing after the other. An executor does the same, and takes twice as long."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._work: SimpleQueue[tuple[Callable[[], Any], asyncio.Future[Any]] | None] = SimpleQueue()
        threading.Thread(target=self._run, name="rocksdb", daemon=True).start()

    def run(self, function: Callable[[], T]) -> asyncio.Future[T]:
        """The future of what the function returns, or raises."""
        future: asyncio.Future[T] = self._loop.create_future()
        self._work.put((function, future))
        return future

    def stop(self) -> None:
        """End the thread when it has done what it was given."""
        self._work.put(None)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            function, future = work
            try:
                result = function()
            except Exception as error:  # noqa: BLE001  # whoever waits for the future gets it
                self._loop.call_soon_threadsafe(_fail, future, error)
            else:
                self._loop.call_soon_threadsafe(_finish, future, result)


def _finish(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
