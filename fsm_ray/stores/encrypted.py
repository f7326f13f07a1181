"""The encrypted store: another store, which sees nothing of records but how many there are, and how long.

Whoever has that other store, a copy or a backup of it, learns neither flow, state and data of a conversation,
nor whose it is, nor what a write was answered:

    row                 BLAKE2b of the conversation's key, under a key of the bot's own
    record              an array of four, [nil, nil, [{}, 0], sealed]: a record as stores check it, without
                        flow, state and version, and longer than a plain one, which is an array of three;
                        sealed are the conversation's key and the plain record
    session's answer    its number and time, and the reply: the byte c1, which begins no plain one, and sealed

A seal is bound to the bot, the shard, and the row or session, number and time: it opens nowhere else. What
remains possible for who can write to the store is to delete, and to put back what was in that very place
before; see docs/how-to/encryption.md.

A namespace has its records in its own memory, plain: encryption costs reads nothing.
"""

from __future__ import annotations

import asyncio
import logging
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import msgspec

from fsm_ray.errors import EncryptionKeysUnusable, FsmRayError, StoreCorrupted, StoreUnavailable
from fsm_ray.record import check_blob
from fsm_ray.stores.base import Answered, Batch, Contents, OwnedStore, RotatingStore, Stale, lease_clock
from fsm_ray.stores.cipher import Cipher, Damaged
from fsm_ray.stores.keyring import read_keyring

logger = logging.getLogger(__name__)

_RECORD_MARK = b"\x94\xc0\xc0\x92\x80\x00\xc6"
"""How an encrypted record begins; the length of what is sealed follows, in four bytes."""

_REPLY_MARK = b"\xc1"
_PLAIN_RECORD = b"\x93"
_LENGTH_BYTES = 4
_SEAL_START = len(_RECORD_MARK) + _LENGTH_BYTES

_RowOf = Callable[[bytes], bytes]


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
        place = inner.place
        shard = f"{place.bot_name}/{place.shard}"
        self._record_bound = f"fsm_ray 1 record {shard} ".encode()
        self._session_bound = f"fsm_ray 1 session {shard} ".encode()

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
                sealed = seal(len(key).to_bytes(_LENGTH_BYTES, "big") + key + blob, bound + row)
                records[row] = _RECORD_MARK + len(sealed).to_bytes(_LENGTH_BYTES, "big") + sealed
        sessions = {
            session: Answered(
                answered.number,
                _REPLY_MARK + seal(answered.reply, self._bound_of(session, answered)),
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

    def rotate(self) -> bool:
        """See `RotatingStore.rotate`."""
        keys = self._opened
        used = keys.cipher.keyring
        try:
            keyring = read_keyring(self._where)
        except EncryptionKeysUnusable as error:
            raise self._about(error) from None
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

    def rotated(self) -> None:
        """See `RotatingStore.rotated`."""
        self._opened.earlier.clear()

    @property
    def _opened(self) -> _Keys:
        if self._keys is None:
            raise RuntimeError("the store was never opened")
        return self._keys

    def _row_maker(self, cipher: Cipher, key_id: str | None) -> _RowOf:
        return bytes if key_id is None else cipher.row_maker(key_id, self.inner.place.bot_name)

    def _bound_of(self, session: bytes, answered: Answered) -> bytes:
        return self._session_bound + struct.pack("!Qd", answered.number, answered.at_s) + session

    def _decrypted(self, cipher: Cipher, sealed: Contents) -> tuple[_Keys, Contents]:
        """What the store holds; the sealed records are given up one by one, for the sake of memory."""
        current = cipher.keyring.current
        contents, stale = Contents(sealed.version), Stale()
        key_ids: set[str | None] = set()
        try:
            while sealed.records:
                row, blob = sealed.records.popitem()
                key_id, key, contents_blob = self._opened_record(cipher, row, blob, contents)
                contents.records[key] = contents_blob
                if key_id != current:
                    key_ids.add(key_id)
                    stale.keys.append(key)
            for session, answered in sealed.sessions.items():
                key_id, reply = self._opened_reply(cipher, session, answered)
                contents.sessions[session] = Answered(answered.number, reply, answered.at_s)
                if key_id != current:
                    key_ids.add(key_id)
                    stale.sessions.append(session)
        except EncryptionKeysUnusable as error:
            raise self._about(error) from None
        contents.stale = stale
        earlier = {key_id: self._row_maker(cipher, key_id) for key_id in key_ids}
        return _Keys(cipher, self._row_maker(cipher, current), earlier), contents

    def _opened_record(
        self, cipher: Cipher, row: bytes, blob: bytes, contents: Contents
    ) -> tuple[str | None, bytes, bytes]:
        """The id of what encrypted it, None where it is plain; its conversation's key; the plain record."""
        try:
            if blob.startswith(_RECORD_MARK):
                key_id: str | None
                key_id, plain = cipher.open(_sealed_in(blob), self._record_bound + row)
                end = _LENGTH_BYTES + int.from_bytes(plain[:_LENGTH_BYTES], "big")
                key, blob = plain[_LENGTH_BYTES:end], plain[end:]
            else:
                key_id, key = None, row
                _check_plain(cipher)
                _check_record(blob)
        except Damaged as error:
            self._corrupted(f"the record in row {row.hex()}", error)
        if key in contents.records:
            twice = Damaged("another row has the same conversation: one of them was put back")
            self._corrupted(f"the record in row {row.hex()}", twice)
        return key_id, key, blob

    def _opened_reply(self, cipher: Cipher, session: bytes, answered: Answered) -> tuple[str | None, bytes]:
        """The id of the key that it was encrypted with, None: it is plain; and the reply."""
        reply = answered.reply
        try:
            if reply.startswith(_REPLY_MARK):
                return cipher.open(reply[len(_REPLY_MARK) :], self._bound_of(session, answered))
            _check_plain(cipher)
        except Damaged as error:
            self._corrupted(f"the answer of session {session.hex()}", error)
        return None, reply

    def _corrupted(self, what: str, error: Exception) -> NoReturn:
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


def _sealed_in(blob: bytes) -> bytes:
    sealed = blob[_SEAL_START:]
    if blob[len(_RECORD_MARK) : _SEAL_START] != len(sealed).to_bytes(_LENGTH_BYTES, "big"):
        raise Damaged("it is cut off, or something was added to it")
    return sealed


def _check_plain(cipher: Cipher) -> None:
    if not cipher.keyring.accepts_plain:
        raise Damaged(
            "it is not encrypted, and all here should be. If the store was being encrypted, and that did not "
            'come to its end, set "accept_plain": true beside the keys; if not, somebody else wrote it'
        )


def _check_record(blob: bytes) -> None:
    try:
        check_blob(blob)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Damaged(f"it is no record: {error}") from error
    if not blob.startswith(_PLAIN_RECORD):
        raise Damaged("it is no plain record")
