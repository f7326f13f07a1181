"""What a store must do for a namespace: give back its records, and commit batches for their one owner.

A namespace keeps all its records in memory and asks the store only at start and at commits. Opening a store
takes a new epoch in it, and every commit is conditional on that epoch, so whoever was its owner before can
change nothing any more.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import msgspec

from fsm_ray.codec import slot_of
from fsm_ray.errors import FsmRayError, NotOwner, StoreCorrupted, StoreMismatch, StoreUnavailable
from fsm_ray.options import SLOTS, redacted
from fsm_ray.stores.owner import (
    ENCRYPTED_FORMAT,
    FORMAT,
    NOBODY,
    Owner,
    decode_owner,
    encode_owner,
    this_process,
)

logger = logging.getLogger(__name__)

_SLOT_END = 3
"""Where the key begins in sorted stores, behind `r` and the slot."""

NO_BOT = "-"
"""In a place, instead of a bot's name, which never is this: the store as a whole is meant."""

LEASE_MARGIN = 1.05
"""A new owner waits this many times the last one's lease: the clocks of machines differ less in speed."""


class Answered(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The last write request of a session, and the reply to it."""

    number: int
    reply: bytes
    at_s: float
    """Wall clock of the answer, in seconds since 1970."""


encode_answered = msgspec.msgpack.Encoder().encode
decode_answered = msgspec.msgpack.Decoder(Answered).decode


class Batch(msgspec.Struct, frozen=True):
    """What one commit changes. All of it is kept, or nothing."""

    version: int
    """The last version given out; the next owner goes on from it."""
    records: Mapping[bytes, bytes | None]
    """Encoded key -> the record's blob, or None when the record was cleared."""
    sessions: Mapping[bytes, Answered]
    """Session -> its last write, committed with the effect so that a resend is recognised after a restart."""
    forgotten: Collection[bytes] = ()
    """Sessions that are too old to be remembered; none of `sessions` is among them."""


@dataclass(slots=True)
class Stale:
    """What was encrypted with a key that is not the current one: it is to be committed again, as it is."""

    keys: list[bytes] = field(default_factory=list)
    sessions: list[bytes] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys) + len(self.sessions)


@dataclass(slots=True)
class Contents:
    """What a store holds when it is opened."""

    version: int
    records: dict[bytes, bytes] = field(default_factory=dict)
    sessions: dict[bytes, Answered] = field(default_factory=dict)
    owned_since_s: float = -math.inf
    """When whoever opened a shared store last knew to be its owner, by `lease_clock`."""
    stale: Stale = field(default_factory=Stale)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where the records of one shard are kept."""

    url: str = field(repr=False)
    """The bot's `BotOptions.store`; it may hold a password."""
    bot_name: str
    shard: int
    shards: int
    lease_s: float
    """See `BotOptions.ownership_lease_s`."""
    is_encrypted: bool = False
    """Whether what is given to the store is encrypted already, and marked so."""

    @property
    def format(self) -> int:
        """The form of what is kept there, see `owner`."""
        return ENCRYPTED_FORMAT if self.is_encrypted else FORMAT


class Row(NamedTuple):
    """One thing that lies in a store."""

    kind: Literal["owner", "record", "session", "version", "other"]
    where: str
    """What people find it by."""
    key: bytes
    """The encoded key of a record, or the session."""
    value: bytes
    """As it was written; of the version, eight bytes."""
    slot: int | None = None
    """The slot that a record lies in."""
    shown: tuple[str | None, str | None, int] | None = None
    """Flow, state and version of a record, where the store shows them to people."""


class Inspectable(ABC):
    """A store that can be looked through beside its owner, who notices nothing. Nothing is written."""

    @classmethod
    @abstractmethod
    async def places(cls, url: str) -> list[tuple[str, int]]:
        """The shards that lie at the URL: bot and number, in order.

        Raises:
            InvalidInput: such a store cannot tell.
            StoreUnavailable: it cannot be reached.
        """

    @abstractmethod
    def rows(self) -> AsyncGenerator[Row, None]:
        """Everything in this shard's store, unchecked: its owner first, and its version last.

        A row may come twice. May block the event loop: it is for a process that does nothing else.

        Raises:
            StoreUnavailable: it cannot be reached.
            StoreMismatch: there is something else in its place.
            StoreCorrupted: the rest cannot be read.
        """


def sorted_row(key: bytes, value: bytes) -> Row:
    """The row that lies under this key in a sorted store: `owner`, `version`, r, slot, key or s, session."""
    where = f"key 0x{key.hex()}"
    if key in {b"owner", b"version"}:
        return Row("owner" if key == b"owner" else "version", where, b"", value)
    if key[:1] == b"r" and len(key) > _SLOT_END:
        return Row("record", where, key[_SLOT_END:], value, int.from_bytes(key[1:_SLOT_END], "big"))
    return Row("session" if key[:1] == b"s" else "other", where, key[1:], value)


def shard_directories(root: str) -> list[tuple[str, int]]:
    """Bot and shard of each `<root>/<bot>/<shard>`, in order.

    Raises:
        StoreUnavailable: the root is there, and cannot be read.
    """
    try:
        found = [path.relative_to(root).parts for bot in Path(root).iterdir() for path in bot.glob("*/")]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise StoreUnavailable(f"{root} cannot be read: {error.strerror}") from error
    return sorted((bot, int(shard)) for bot, shard in found if shard.isdecimal())


def with_slot(key: bytes) -> bytes:
    """The encoded key with its slot in front, in two bytes: the form in which sorted stores keep it."""
    return slot_of(key).to_bytes(2, "big") + key


def lease_clock() -> float:
    """Seconds that never go back, and go on while the machine sleeps; one clock for all of its processes."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Store(ABC):
    """Where one shard's records are kept."""

    is_durable: ClassVar[bool]
    """Whether records are still there after the actor's process was killed."""

    is_shared: ClassVar[bool]
    """Whether another process can open the store while this one lives, so that ownership is leased."""

    max_commits: ClassVar[int] = 1
    """How many commits may be under way, 1 or 2. They are kept, and end, in their order."""

    @abstractmethod
    async def open(self) -> Contents:
        """Become the owner, and return everything that was ever acknowledged.

        Opened again, after a failure, the same object owns the store only if nobody else opened it since.

        Raises:
            NotOwner: somebody else did.
            StoreUnavailable: the store cannot be reached, or is held by a process that lives; try again.
            StoreMismatch: it was written with other options, or is not one of this bot's.
            StoreCorrupted: what it holds cannot be read; the message names the file or row.
        """

    @abstractmethod
    def commit(self, batch: Batch) -> asyncio.Future[None]:
        """Keep the batch; when the future is done, it is kept. See `max_commits` for how many at a time.

        Never called when the store is not durable. The future raises NotOwner or StoreUnavailable; after any
        error it is unknown whether the batch was kept, and the store must be closed, and opened again.
        """

    @abstractmethod
    async def confirm(self) -> None:
        """Return if this is still the owner. May run beside a commit; never called when not shared.

        Raises:
            NotOwner: somebody else opened the store.
            StoreUnavailable: it cannot be reached.
        """

    @abstractmethod
    async def close(self) -> None:
        """Release what `open` took, also after a failure. Nothing acknowledged is lost by not calling it.

        Raises none of our errors: nothing can be done about a store that is left.
        """


class RotatingStore(Store):
    """A store that encrypts, and can change to another key while it is open."""

    @property
    @abstractmethod
    def key_id(self) -> str:
        """The id of the key that commits are encrypted with."""

    @abstractmethod
    async def rotate(self) -> bool:
        """Read the keys again; True if another one is the current one now, and all is to be committed again.

        Until `rotated` is called, a commit of a record also removes what an earlier key left of it.

        Raises:
            EncryptionKeysUnusable: they cannot be read, or one that is in use is missing or was changed; the
                keys of before stay in use.
        """

    @abstractmethod
    def rotated(self) -> None:
        """Everything was committed again: no earlier key is in use any more."""


class OwnedStore(Store):
    """A durable store, but for what is done by its driver: the methods with an underscore below.

    They raise StoreUnavailable where the driver's errors mean that the store is not there at the moment.
    """

    is_durable: ClassVar[bool] = True

    def __init__(
        self,
        place: Place,
        clock: Callable[[], float] = lease_clock,
        sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
    ) -> None:
        """`clock` and `sleep` are for the lease of the last owner, and this one's."""
        self.place = place
        self.owner: Owner | None = None
        """What this object wrote into the store when it opened it last."""
        self.takes_plain = False
        """Whether a store of encrypted records may be made from one of plain ones."""
        self._claim: Owner | None = None
        self._clock = clock
        self._sleep = sleep

    async def open(self) -> Contents:
        """See `Store.open`."""
        await self._disconnect()
        try:
            await self._connect()
            owner = await self._take_over()
            taken_at_s = self._clock()
            contents = await self._load()
            if self.is_shared:
                await self._wait_until(taken_at_s + owner.waits_s * LEASE_MARGIN)
                # Loading and waiting may have taken longer than a lease.
                contents.owned_since_s = self._clock()
                await self._confirm_waited(owner)
        except BaseException:
            await self._disconnect()
            raise
        return contents

    async def close(self) -> None:
        """See `Store.close`. The next owner need not wait for a lease."""
        try:
            if self.owner is not None:
                await self._release(self.owner)
        except FsmRayError as error:
            # Where a record is damaged, the error says whose it is.
            why = "it is damaged" if isinstance(error, StoreCorrupted) else error
            logger.info("%s: closed without a word: %s", self.name, why)
        finally:
            await self._disconnect()

    @property
    def name(self) -> str:
        """The store in errors and logs."""
        url = redacted(self.place.url)
        if self.place.bot_name == NO_BOT:
            return url
        return f"{url} (shard {self.place.shard} of bot {self.place.bot_name!r})"

    @abstractmethod
    async def _connect(self) -> None:
        """Make what `_read_owner` and all else need: a connection, a database, a schema."""

    @abstractmethod
    async def _disconnect(self) -> None:
        """Release what `_connect` made; also when it made only a part of it, or nothing."""

    @abstractmethod
    async def _read_owner(self) -> bytes | None:
        """What `_replace_owner` wrote last; None when nobody ever opened the store.

        Raises:
            StoreMismatch: nobody did, and yet there is something in it.
        """

    @abstractmethod
    async def _replace_owner(self, last_epoch: int, epoch: int, owner: bytes) -> bool:
        """Write the owner if the store's epoch is still `last_epoch` (0: there is no owner); tell if it was.

        One atomic step. From here on, no commit of an epoch before `epoch` is kept.
        """

    @abstractmethod
    async def _load(self) -> Contents:
        """Everything in the store.

        Raises:
            StoreCorrupted: a part of it cannot be read.
        """

    async def _take_over(self) -> Owner:
        """Become the owner, as which this returns it."""
        while True:
            found = await self._read_owner()
            last = None if found is None else self._checked(found)
            last_epoch = 0 if last is None else last.epoch
            # A claim may have reached the store though its answer got lost.
            is_own = last is not None and last.opening in (_opening(self.owner), _opening(self._claim))
            if self.owner is not None and not is_own:
                raise self._not_owner()
            place = self.place
            self._claim = owner = Owner(
                epoch=last_epoch + 1,
                opening=secrets.token_hex(8),
                process=this_process(),
                lease_s=place.lease_s,
                waits_s=self._unwaited_s(last, is_own=is_own),
                bot_name=place.bot_name,
                shard=place.shard,
                shards=place.shards,
                format=place.format,
            )
            if await self._replace_owner(last_epoch, owner.epoch, encode_owner(owner)):
                self.owner = owner
                if last is not None and not is_own:
                    self._tell_of(last)
                return owner
            # Somebody else was faster; the last one to open a store is its owner.

    def _tell_of(self, last: Owner) -> None:
        """Log from whom the store was taken over, unless that one closed it."""
        if last.process != NOBODY:
            level, what = (
                (logging.INFO, "has ended") if last.is_over else (logging.WARNING, "may still run elsewhere")
            )
            logger.log(level, "%s: took over from its last owner, which %s", self.name, what)

    def _unwaited_s(self, last: Owner | None, *, is_own: bool) -> float:
        """How long the last owner, or one before it that it had not waited for, may still answer reads."""
        if last is None or not self.is_shared:
            return 0.0
        return max(last.waits_s, 0.0 if is_own or last.is_over else last.lease_s)

    async def _wait_until(self, end_s: float) -> None:
        wait_s = end_s - self._clock()
        if wait_s > 0:
            logger.info("%s: waiting %.1f s for the lease of its last owner", self.name, wait_s)
            await self._sleep(wait_s)

    async def _confirm_waited(self, owner: Owner) -> None:
        """Return if this is still the owner; the next one need not wait for those before it."""
        if not owner.waits_s:
            await self.confirm()
            return
        waited = msgspec.structs.replace(owner, waits_s=0.0)
        if not await self._replace_owner(owner.epoch, owner.epoch, encode_owner(waited)):
            raise self._not_owner()
        self.owner = waited

    def _checked(self, found: bytes) -> Owner:
        """The owner that the store names, if this process can go on from what that one left."""
        try:
            last = decode_owner(found)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise StoreCorrupted(
                f"{self.name}: the owner's record cannot be read ({error}): {found[:200]!r}. "
                "Nothing was changed; restore the store from a backup",
                bot=self.place.bot_name,
            ) from error
        place = self.place
        ours = (SLOTS, place.bot_name, place.shard, place.shards)
        theirs = (last.slots, last.bot_name, last.shard, last.shards)
        if ours != theirs or last.format not in {FORMAT, ENCRYPTED_FORMAT}:
            raise StoreMismatch(
                f"{self.name} was written by shard {last.shard} of {last.shards} of bot {last.bot_name!r} "
                f"in format {last.format} with {last.slots} slots; this is shard {place.shard} of "
                f"{place.shards}, format {place.format}, {SLOTS} slots. Nothing was changed: init the bot "
                "with the options that it had, or with another store",
                bot=place.bot_name,
            )
        self._check_encryption(last)
        return last

    def _check_encryption(self, last: Owner) -> None:
        if last.format == ENCRYPTED_FORMAT and not self.place.is_encrypted:
            raise StoreMismatch(
                f"{self.name} is encrypted. Nothing was changed: init the bot with its encryption_keys",
                bot=self.place.bot_name,
            )
        if last.format == FORMAT and self.place.is_encrypted and not self.takes_plain:
            raise StoreMismatch(
                f"{self.name} is not encrypted, or somebody made it so. Nothing was changed: to encrypt what "
                'is there, set "accept_plain": true beside the keys until rotate_keys says that it is done',
                bot=self.place.bot_name,
            )

    async def _release(self, owner: Owner) -> None:
        """Write into the store that its owner is done with it."""
        released = msgspec.structs.replace(owner, process=NOBODY)
        await self._replace_owner(owner.epoch, owner.epoch, encode_owner(released))

    def _not_owner(self) -> NotOwner:
        return NotOwner(
            f"{self.name}: another process opened this store and is its owner now; this one answers no more. "
            "If two clusters use one store, drop the bot in one of them",
            bot=self.place.bot_name,
        )


def _opening(owner: Owner | None) -> str | None:
    return None if owner is None else owner.opening
