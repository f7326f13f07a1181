"""The encrypted store: another store, which sees nothing of records but how many there are, and how long.

Whoever has that other store, a copy or a backup of it, learns neither flow, state and data of a conversation,
nor whose it is, nor what a write was answered:

    row                 BLAKE2b of the conversation's key, under a key of the bot's own
    record              an array of four, [nil, nil, [{}, 0], sealed]: a record as stores check it, without
                        flow, state and version, and longer than a plain one, which is an array of three;
                        sealed are the conversation's key and the plain record
    session's answer    its number and time, and the reply: ff ff ff ff, a length that no plain one begins
                        with, and sealed

A seal is bound to the bot, the shard, and the row or session, number and time: it opens nowhere else. The
shard's version is plain, and refused if it is less than one that is sealed. What remains possible for who can
write to the store is to delete, and to put back what was in that very place before; see
docs/how-to/encryption.md.

A namespace has its records in its own memory, plain: encryption costs reads nothing.
"""

from __future__ import annotations

import asyncio
import logging
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

import msgspec

from fsm_ray.errors import EncryptionKeysUnusable, FsmRayError, StoreCorrupted, StoreUnavailable
from fsm_ray.protocol import version_told
from fsm_ray.record import check_blob, version_in
from fsm_ray.stores.base import Answered, Batch, Contents, OwnedStore, RotatingStore, Stale, lease_clock
from fsm_ray.stores.cipher import Cipher
from fsm_ray.stores.keyring import Keyring, read_keyring
from fsm_ray.stores.sealed import (
    LENGTH_BYTES,
    NOT_ENCRYPTED,
    RECORD_MARK,
    REPLY_MARK,
    TWICE,
    Damaged,
    in_record,
    in_reply,
)

logger = logging.getLogger(__name__)

_PLAIN_RECORD = b"\x93"

_RowOf = Callable[[bytes], bytes]


class OpenedRecord(NamedTuple):
    """A record as it was before it was encrypted."""

    key_id: str | None
    """Of the key that it was encrypted with; None: it is plain."""
    key: bytes
    """The conversation's."""
    blob: bytes


class OpenedReply(NamedTuple):
    """The same of a reply."""

    key_id: str | None
    reply: bytes


class Opener:
    """Opens what lies in the store of one shard."""

    def __init__(self, cipher: Cipher, bot_name: str, shard: int) -> None:
        self._cipher = cipher
        self._record_bound = record_bound(bot_name, shard)
        self._session_bound = session_bound(bot_name, shard)

    @property
    def accepts_plain(self) -> bool:
        """See `Keyring.accepts_plain`."""
        return self._cipher.keyring.accepts_plain

    def record(self, row: bytes, blob: bytes) -> OpenedRecord:
        """What is in the blob of this row.

        Raises:
            Damaged: it is not what a shard wrote there, or plain, and should not be.
            EncryptionKeysUnusable: see `Cipher.open`.
        """
        sealed = in_record(blob)
        if sealed is None:
            self._check_plain()
            _check_record(blob)
            return OpenedRecord(None, row, blob)
        key_id, plain = self._cipher.open(sealed, self._record_bound + row)
        end = LENGTH_BYTES + int.from_bytes(plain[:LENGTH_BYTES], "big")
        return OpenedRecord(key_id, plain[LENGTH_BYTES:end], plain[end:])

    def reply(self, session: bytes, answered: Answered) -> OpenedReply:
        """The reply of the session's answer; raises as `record`."""
        sealed = in_reply(answered.reply)
        if sealed is None:
            self._check_plain()
            return OpenedReply(None, answered.reply)
        bound = self._session_bound + _bound_answer(session, answered)
        return OpenedReply(*self._cipher.open(sealed, bound))

    def _check_plain(self) -> None:
        if not self.accepts_plain:
            raise Damaged(NOT_ENCRYPTED)


def record_bound(bot_name: str, shard: int) -> bytes:
    """What the seal of a record is bound to, before its row."""
    return f"fsm_ray 1 record {bot_name}/{shard} ".encode()


def session_bound(bot_name: str, shard: int) -> bytes:
    """What the seal of a reply is bound to, before its number, time and session."""
    return f"fsm_ray 1 session {bot_name}/{shard} ".encode()


def _bound_answer(session: bytes, answered: Answered) -> bytes:
    return struct.pack("!Qd", answered.number, answered.at_s) + session


@dataclass(slots=True)
class _Keys:
    """What an open store encrypts with."""

    cipher: Cipher
    row_of: _RowOf
    earlier: dict[str | None, _RowOf]
    """By the ids of earlier keys that may be in use, and None for no key: under which row they left a record.

    So that whoever gets hold of an old key finds no rows made with it, by which to try out users' ids.
    """


class EncryptedStore(RotatingStore):
    """Encrypts what is committed to the inner store, and decrypts what that one holds."""

    def __init__(self, inner: OwnedStore, where: str, *, clock: Callable[[], float] = lease_clock) -> None:
        """`where` is `BotOptions.encryption_keys`."""
        self.is_durable = True  # type: ignore[misc]  # of the class elsewhere: a kind of store has one answer
        self.is_shared = inner.is_shared  # type: ignore[misc]
        self.max_commits = inner.max_commits  # type: ignore[misc]
        self.inner = inner
        self._where = where
        self._clock = clock
        self._keys: _Keys | None = None
        self._rotating = asyncio.Lock()
        self._record_bound = record_bound(inner.place.bot_name, inner.place.shard)
        self._session_bound = session_bound(inner.place.bot_name, inner.place.shard)

    @property
    def key_id(self) -> str:
        """See `RotatingStore.key_id`."""
        return self._opened.cipher.keyring.current

    async def open(self) -> Contents:
        """See `Store.open`.

        Raises:
            EncryptionKeysUnusable: the keys cannot be read, or are not those of this store.
        """
        try:
            keyring = await asyncio.to_thread(read_keyring, self._where)
            self.inner.takes_plain = keyring.accepts_plain
            sealed = await self.inner.open()
        except EncryptionKeysUnusable as error:
            raise self._about(error) from None
        try:
            # In a thread, for it takes a second for each 250,000 records.
            self._keys, contents = await asyncio.to_thread(self._decrypted, Cipher(keyring), sealed)
            if self.is_shared:
                # Meanwhile a lease may have passed.
                contents.owned_since_s = self._clock()
                await self.inner.confirm()
        except BaseException:
            await self.inner.close()
            raise
        if keyring.accepts_plain:
            logger.warning(
                "%s: plain records are accepted, as %s says: remove accept_plain when rotate_keys is done",
                self.inner.name,
                self._where,
            )
        return contents

    def commit(self, batch: Batch) -> asyncio.Future[None]:
        """See `Store.commit`."""
        keys = self._keys
        if keys is None:
            failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            failed.set_exception(
                StoreUnavailable(f"{self.inner.name} was never opened", bot=self.inner.place.bot_name)
            )
            return failed
        seal, row_of, earlier = keys.cipher.seal, keys.row_of, keys.earlier.values()
        bound = self._record_bound
        records: dict[bytes, bytes | None] = {}
        for key, blob in batch.records.items():
            for earlier_row_of in earlier:
                records[earlier_row_of(key)] = None
            row = row_of(key)
            if blob is None:
                records[row] = None
            else:
                sealed = seal(len(key).to_bytes(LENGTH_BYTES, "big") + key + blob, bound + row)
                records[row] = RECORD_MARK + len(sealed).to_bytes(LENGTH_BYTES, "big") + sealed
        sessions = {
            session: Answered(
                answered.number,
                REPLY_MARK + seal(answered.reply, self._session_bound + _bound_answer(session, answered)),
                answered.at_s,
            )
            for session, answered in batch.sessions.items()
        }
        return self.inner.commit(Batch(batch.version, records, sessions, batch.forgotten))

    async def confirm(self) -> None:
        """See `Store.confirm`."""
        await self.inner.confirm()

    async def close(self) -> None:
        """See `Store.close`."""
        await self.inner.close()

    async def rotate(self) -> bool:
        """See `RotatingStore.rotate`."""
        # One at a time: what is read later is applied later.
        async with self._rotating:
            try:
                keyring = await asyncio.to_thread(read_keyring, self._where)
            except EncryptionKeysUnusable as error:
                raise self._about(error) from None
            return self._rotate_to(keyring)

    def rotated(self) -> None:
        """See `RotatingStore.rotated`."""
        self._opened.earlier.clear()

    @property
    def _opened(self) -> _Keys:
        if self._keys is None:
            raise RuntimeError("the store was never opened")
        return self._keys

    def _rotate_to(self, keyring: Keyring) -> bool:
        keys = self._opened
        used = keys.cipher.keyring
        for key_id in {used.current, *keys.earlier}:
            if key_id is not None and keyring.keys.get(key_id) != used.keys[key_id]:
                raise EncryptionKeysUnusable(
                    f"{self.inner.name}: the key {key_id!r} is in use, and {self._where} has it no more, or "
                    "another one of this id; put it back until rotate_keys says that it is done. The keys of "
                    "before stay in use",
                    bot=self.inner.place.bot_name,
                    key_id=key_id,
                )
        if keyring.current == used.current:
            return False
        earlier = {**keys.earlier, used.current: keys.row_of}
        earlier.pop(keyring.current, None)
        cipher = Cipher(keyring)
        self._keys = _Keys(cipher, self._row_maker(cipher, keyring.current), earlier)
        return True

    def _row_maker(self, cipher: Cipher, key_id: str | None) -> _RowOf:
        return bytes if key_id is None else cipher.row_maker(key_id, self.inner.place.bot_name)

    def _decrypted(self, cipher: Cipher, sealed: Contents) -> tuple[_Keys, Contents]:
        """What the store holds; the sealed records are given up one by one, for the sake of memory."""
        current = cipher.keyring.current
        opener = Opener(cipher, self.inner.place.bot_name, self.inner.place.shard)
        contents, stale = Contents(sealed.version), Stale()
        key_ids: set[str | None] = set()
        newest = 0
        try:
            while sealed.records:
                row, blob = sealed.records.popitem()
                (key_id, key, contents_blob), version = self._opened_record(opener, row, blob, contents)
                contents.records[key] = contents_blob
                newest = max(newest, version)
                if key_id != current:
                    key_ids.add(key_id)
                    stale.keys.append(key)
            for session, answered in sealed.sessions.items():
                key_id, reply = self._opened_reply(opener, session, answered)
                contents.sessions[session] = Answered(answered.number, reply, answered.at_s)
                newest = max(newest, _version_told(reply))
                if key_id != current:
                    key_ids.add(key_id)
                    stale.sessions.append(session)
        except EncryptionKeysUnusable as error:
            raise self._about(error) from None
        if newest > sealed.version:
            # Versions would come again, and a write that expects one would overwrite what it never saw.
            self._corrupted("the shard's version", f"it is {sealed.version}, and there is a {newest} already")
        contents.stale = stale
        earlier = {key_id: self._row_maker(cipher, key_id) for key_id in key_ids}
        return _Keys(cipher, self._row_maker(cipher, current), earlier), contents

    def _opened_record(
        self, opener: Opener, row: bytes, blob: bytes, contents: Contents
    ) -> tuple[OpenedRecord, int]:
        """The record, and its version."""
        what = f"the record in row {row.hex()}"
        try:
            opened = opener.record(row, blob)
            version = _version_in(opened.blob)
        except Damaged as error:
            self._corrupted(what, error)
        if opened.key in contents.records:
            self._corrupted(what, TWICE)
        return opened, version

    def _opened_reply(self, opener: Opener, session: bytes, answered: Answered) -> OpenedReply:
        try:
            return opener.reply(session, answered)
        except Damaged as error:
            self._corrupted(f"the answer of session {session.hex()}", error)

    def _corrupted(self, what: str, error: Damaged | str) -> NoReturn:
        raise StoreCorrupted(
            f"{self.inner.name}: {what} cannot be used: {error}. Nothing was changed; restore it from "
            "a backup",
            bot=self.inner.place.bot_name,
        ) from None

    def _about(self, error: FsmRayError) -> FsmRayError:
        """The error, with the store that it is about."""
        told = type(error)(f"{self.inner.name}: {error}", **vars(error))
        told.bot = self.inner.place.bot_name
        return told


def _version_in(blob: bytes) -> int:
    try:
        return version_in(blob)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Damaged(f"it is no record: {error}") from error


def _version_told(reply: bytes) -> int:
    try:
        return version_told(reply)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return 0  # of a later fsm_ray, say


def _check_record(blob: bytes) -> None:
    try:
        check_blob(blob)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Damaged(f"it is no record: {error}") from error
    if not blob.startswith(_PLAIN_RECORD):
        raise Damaged("it is no plain record")
