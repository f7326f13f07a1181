"""The Redis store: records on a Redis or Valkey server, acknowledged when the server has them in memory.

How durable that is, is the server's affair: only with `appendfsync always` are they on its disk by then, and
`open` logs a warning where they are not. A server that may evict records is refused.

A shard has three hashes. The braces put them into one slot of a Redis Cluster, but no redirections are
followed. Fields and values are bytes; those of the first can be read by people.

    fsm_ray:{bot/shard}:owner       owner: see `owner.Owner`; version: the last one given out, in digits
    fsm_ray:{bot/shard}:records     slot, key: a record's blob
    fsm_ray:{bot/shard}:sessions    session: the session's last answer

A commit is one Lua script, which goes on only if `owner` still is, byte for byte, what this store wrote.
Nothing is ever sent twice: a commit that got no answer may have been kept, or may be still on its way. If it
arrives after the store was opened again, it finds another owner.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Self

import msgspec
from redis.asyncio import ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    InvalidResponse,
    NoPermissionError,
    NoScriptError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from fsm_ray.errors import InvalidOptions, StoreCorrupted, StoreMismatch, StoreUnavailable
from fsm_ray.record import check_blob
from fsm_ray.stores.base import (
    NO_BOT,
    Batch,
    Contents,
    Inspectable,
    OwnedStore,
    Place,
    Row,
    decode_answered,
    encode_answered,
    with_slot,
)

logger = logging.getLogger(__name__)

_MIN_TIMEOUT_S, _MAX_TIMEOUT_S = 1.0, 5.0
"""Within these bounds, the server has as long as the lease to take a command, and again to answer it.

The lease itself does not depend on them: it lapses whether or not a commit has failed by then.
"""
_PAGE = 1000
"""Fields that one HSCAN asks for. Larger pages are no faster, and keep the server and this loop longer."""
_SLOT_BYTES = 2
_OWNER_KEY = re.compile(rb"fsm_ray:\{([^/{}]+)/(\d+)\}:(?:owner|records|sessions)")

_Arguments = Sequence[bytes | int]


class _Script:
    """A Lua script, and what the server knows it by."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.sha1 = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


# The first write of a script is the only one that the server can refuse, for want of memory, of replicas or
# of the right to write. So that one must be refused in each of these cases, and HDEL would not be.
_COMMIT = _Script("""
local owner, records, sessions = unpack(KEYS)
if redis.call('HGET', owner, 'owner') ~= ARGV[1] then return 0 end
redis.call('HLEN', records)  -- fails before anything is written, unless it is a hash
redis.call('HLEN', sessions)
redis.call('HSET', owner, 'version', ARGV[2])
local at = 7
local function change(command, key, count)
  local last = at + count - 1
  while at <= last do
    local to = math.min(at + 3999, last)  -- unpack takes less than 8000, and HSET an even number
    redis.call(command, key, unpack(ARGV, at, to))
    at = to + 1
  end
end
change('HSET', records, tonumber(ARGV[3]))
change('HDEL', records, tonumber(ARGV[4]))
change('HSET', sessions, tonumber(ARGV[5]))
change('HDEL', sessions, tonumber(ARGV[6]))
return 1
""")

_REPLACE_OWNER = _Script("""
local found = redis.call('HGET', KEYS[1], 'owner')
local epoch = found and cjson.decode(found).epoch or 0
if epoch ~= tonumber(ARGV[1]) then return 0 end
redis.call('HSET', KEYS[1], 'owner', ARGV[2])
if not found then redis.call('HSET', KEYS[1], 'version', '0') end
return 1
""")


class RedisStore(OwnedStore, Inspectable):
    """Keeps one shard in three hashes of a server's database."""

    is_shared: ClassVar[bool] = True

    def __init__(self, place: Place, **clocks: Any) -> None:
        super().__init__(place, **clocks)
        prefix = f"fsm_ray:{{{place.bot_name}/{place.shard}}}:".encode()
        self._owner_key = prefix + b"owner"
        self._records_key = prefix + b"records"
        self._sessions_key = prefix + b"sessions"
        self._keys = (self._owner_key, self._records_key, self._sessions_key)
        self._owner_written = b""
        """What this object wrote under `owner` last, where never anything as empty as this is."""
        self._connection: _Connection | None = None

    def commit(self, batch: Batch) -> asyncio.Future[None]:
        """See `Store.commit`."""
        put: list[bytes] = []
        cleared: list[bytes] = []
        for key, blob in batch.records.items():
            if blob is None:
                cleared.append(with_slot(key))
            else:
                put += (with_slot(key), blob)
        answers: list[bytes] = []
        for session, answered in batch.sessions.items():
            answers += (session, encode_answered(answered))
        forgotten = batch.forgotten
        counts = (len(put), len(cleared), len(answers), len(forgotten))
        head: tuple[bytes | int, ...] = (self._owner_written, batch.version, *counts)
        arguments = (*head, *put, *cleared, *answers, *forgotten)
        return asyncio.get_running_loop().create_task(self._commit(arguments))

    async def confirm(self) -> None:
        """See `Store.confirm`.

        Where no commit is under way, its connection is used: so it is never idle for longer than a lease,
        which some servers and firewalls would take for its end.
        """
        question = (b"HGET", self._owner_key, b"owner")
        if self._opened.is_busy:
            with self._translated():
                async with self._new_connection() as connection:
                    owner = await connection.ask(*question)
        else:
            owner = await self._call(*question)
        if owner != self._owner_written:
            raise self._not_owner()

    async def open(self) -> Contents:
        """See `Store.open`.

        Raises:
            InvalidOptions: the URL names no server, or one that refuses this user or may evict records.
        """
        try:
            return await super().open()
        except StoreUnavailable as error:
            if isinstance(error.__cause__, AuthenticationError | NoPermissionError):
                raise InvalidOptions(str(error), bot=error.bot) from error.__cause__
            raise

    @classmethod
    async def places(cls, url: str) -> list[tuple[str, int]]:
        """See `Inspectable.places`."""
        store = cls(Place(url=url, bot_name=NO_BOT, shard=0, shards=1, lease_s=_MAX_TIMEOUT_S))
        found, cursor = set(), b"0"
        try:
            await store._connect_to_read()
            while True:
                cursor, keys = await store._call(b"SCAN", cursor, b"MATCH", b"fsm_ray:{*}:*", b"COUNT", _PAGE)
                found |= {match.groups() for key in keys if (match := _OWNER_KEY.fullmatch(key))}
                if cursor == b"0":
                    return sorted((bot.decode(), int(shard)) for bot, shard in found)
        finally:
            await store.close()

    async def rows(self) -> AsyncGenerator[Row, None]:
        """See `Inspectable.rows`. What is written meanwhile may be among them."""
        try:
            await self._connect_to_read()
            owner = await self._read_owner()
            if owner is not None:
                yield Row("owner", f"field owner of {self._owner_key.decode()}", b"", owner)
            async for field, blob in self._items(self._records_key):
                where = f"field {field!r} of {self._records_key.decode()}"
                slot = int.from_bytes(field[:_SLOT_BYTES], "big")
                yield Row("record", where, field[_SLOT_BYTES:], blob, slot)
            async for session, answered in self._items(self._sessions_key):
                yield Row("session", f"field {session!r} of {self._sessions_key.decode()}", session, answered)
            version = await self._call(b"HGET", self._owner_key, b"version")
            if version is not None and version.isdigit() and int(version) < 1 << 64:
                where = f"field version of {self._owner_key.decode()}"
                yield Row("version", where, b"", int(version).to_bytes(8, "big"))
        finally:
            await self.close()

    @property
    def _opened(self) -> _Connection:
        if self._connection is None:
            raise StoreUnavailable(f"{self.name} is closed", bot=self.place.bot_name)
        return self._connection

    async def _connect(self) -> None:
        await self._connect_to_read()
        await self._check_server()

    async def _connect_to_read(self) -> None:
        self._connection = self._new_connection()
        with self._translated():
            await self._connection.connect()

    async def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    async def _read_owner(self) -> bytes | None:
        kinds = {key: await self._call(b"TYPE", key) for key in self._keys}
        foreign = [key for key, kind in kinds.items() if kind not in {b"hash", b"none"}]
        found: bytes | None = None if foreign else await self._call(b"HGET", self._owner_key, b"owner")
        if found is None:
            foreign = foreign or [key for key, kind in kinds.items() if kind != b"none"]
        if foreign:
            names = ", ".join(key.decode() for key in foreign)
            raise StoreMismatch(
                f"{self.name} holds what fsm_ray did not write, or has lost its owner: {names}. Nothing was "
                "changed: remove it, or give another database",
                bot=self.place.bot_name,
            )
        return found

    async def _replace_owner(self, last_epoch: int, epoch: int, owner: bytes) -> bool:  # noqa: ARG002
        if not await self._run(_REPLACE_OWNER, [self._owner_key], [last_epoch, owner]):
            return False
        self._owner_written = owner
        return True

    async def _load(self) -> Contents:
        found = await self._call(b"HGET", self._owner_key, b"version")
        if found is None or not found.isdigit():
            raise self._corrupted(self._owner_key, b"version", f"it is {found!r}")
        contents = Contents(version=int(found))
        async for field, blob in self._items(self._records_key):
            key = field[_SLOT_BYTES:]
            if with_slot(key) != field:
                raise self._corrupted(self._records_key, field, "its slot is not that of the key")
            try:
                check_blob(blob)
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                raise self._corrupted(self._records_key, field, str(error)) from error
            contents.records[key] = blob
        async for session, answered in self._items(self._sessions_key):
            try:
                contents.sessions[session] = decode_answered(answered)
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                raise self._corrupted(self._sessions_key, session, str(error)) from error
        return contents

    async def _items(self, key: bytes) -> AsyncIterator[tuple[bytes, bytes]]:
        """The hash's fields and values. A field may come twice, and none is left out: nobody else writes."""
        cursor = b"0"
        while True:
            cursor, page = await self._call(b"HSCAN", key, cursor, b"COUNT", _PAGE)
            for at in range(0, len(page), 2):
                yield page[at], page[at + 1]
            if cursor == b"0":
                return

    async def _commit(self, arguments: _Arguments) -> None:
        if not await self._run(_COMMIT, self._keys, arguments):
            raise self._not_owner()

    async def _check_server(self) -> None:
        """Refuse a server that may evict records; warn of one that does not sync before it answers."""
        try:
            info = _fields(await self._call(b"INFO"))
        except StoreUnavailable as error:
            if not isinstance(error.__cause__, NoPermissionError):
                raise
            info = {}
        policy = info.get("maxmemory_policy", "")
        if info.get("maxmemory", "0") != "0" and policy.startswith("allkeys"):
            raise InvalidOptions(
                f"{self.name}: the server may evict records when its memory is full (maxmemory-policy "
                f"{policy}): set maxmemory-policy to noeviction, or give another server",
                bot=self.place.bot_name,
            )
        if self.owner is None:
            fsync = "off" if info.get("aof_enabled") == "0" else await self._fsync()
            if fsync != "always":
                logger.warning(
                    "%s: acknowledged means in the server's memory (its appendfsync: %s)", self.name, fsync
                )

    async def _fsync(self) -> str:
        """The server's `appendfsync`, which only CONFIG tells, and CONFIG is often forbidden."""
        try:
            _, fsync = await self._call(b"CONFIG", b"GET", b"appendfsync")
        except StoreUnavailable as error:
            if isinstance(error.__cause__, ResponseError):
                return "unknown"
            raise
        return str(fsync, "ascii")

    async def _run(self, script: _Script, keys: Sequence[bytes], arguments: _Arguments) -> int:
        """Run the script; every server forgets scripts when it is restarted."""
        tail = (len(keys), *keys, *arguments)
        try:
            result: int = await self._call(b"EVALSHA", script.sha1.encode(), *tail)
        except StoreUnavailable as error:
            if not isinstance(error.__cause__, NoScriptError):
                raise
            result = await self._call(b"EVAL", script.text.encode(), *tail)
        return result

    async def _call(self, *command: bytes | int) -> Any:
        connection = self._opened
        with self._translated():
            return await connection.ask(*command)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Raise StoreUnavailable for what redis-py raises, which is its cause."""
        try:
            yield
        except (RedisConnectionError, RedisTimeoutError, ResponseError, InvalidResponse) as error:
            raise StoreUnavailable(
                f"{self.name} cannot be used: {type(error).__name__}: {error}", bot=self.place.bot_name
            ) from error

    def _new_connection(self) -> _Connection:
        timeout_s = max(_MIN_TIMEOUT_S, min(self.place.lease_s, _MAX_TIMEOUT_S))
        try:
            return _Connection(self.place.url, timeout_s)
        except (TypeError, ValueError, RedisError):
            # Neither cause nor context: they may cite the password.
            raise InvalidOptions(
                f"{self.name}: redis-py cannot make a connection from this URL", bot=self.place.bot_name
            ) from None

    def _corrupted(self, key: bytes, field: bytes, what: str) -> StoreCorrupted:
        return StoreCorrupted(
            f"{self.name}: field {field!r} of {key.decode()} cannot be read: {what}. Nothing was changed; "
            "restore it from a backup",
            bot=self.place.bot_name,
        )


class _Connection:
    """One connection, on which one command runs at a time.

    Once lost, it stays lost. A pool or a client would connect again without a word, and so hide that the
    server was started again, maybe with less than it had acknowledged.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        options: dict[str, Any] = {
            "socket_timeout": timeout_s,
            "socket_connect_timeout": timeout_s,
            "retry": Retry(NoBackoff(), 0),
            "protocol": 2,
            "decode_responses": False,
        }
        pool = ConnectionPool.from_url(url, **options)
        # What the URL says about these would come before the arguments.
        self._connection = pool.connection_class(**{**pool.connection_kwargs, **options})
        self._turn = asyncio.Lock()

    @property
    def is_busy(self) -> bool:
        return self._turn.locked()

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def connect(self) -> None:
        try:
            await self._connection.connect()  # type: ignore[no-untyped-call]
        except BaseException as error:
            await self.close()
            if isinstance(error.__cause__, RedisError):
                # What the server answered; on a Unix socket, redis-py makes a ConnectionError of it.
                raise error.__cause__ from None
            raise

    async def ask(self, *command: bytes | int) -> Any:
        """Send a command, and return the answer."""
        async with self._turn:
            if not self._connection.is_connected:
                raise RedisConnectionError("the connection was lost before")
            try:
                await self._connection.send_command(*command, check_health=False)
            except RuntimeError as error:
                # uvloop's, where the connection was reset while nobody looked; asyncio raises an OSError.
                raise RedisConnectionError(str(error)) from error
            return await self._connection.read_response()

    async def close(self) -> None:
        """Close it, without waiting for a server that does not answer."""
        await self._connection.disconnect(nowait=True)


def _fields(info: bytes) -> dict[str, str]:
    """What INFO tells."""
    lines = info.decode(errors="replace").splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line)
