"""Cipher: AES-256-GCM over what one shard keeps, and what it keeps it under.

Something sealed is

    length of the key's id, id, salt (16 bytes), check (4 bytes), number (8 bytes), ciphertext and tag

Nonces: GCM fails wholly when a nonce comes twice under one key. With random ones of 96 bits, NIST SP 800-38D
(section 8.3) allows 2^32 uses of a key, which a busy bot makes within hours. So no key of the keyring
encrypts anything itself. Each opening of a store takes a random salt of 128 bits, derives a key of its own
from it (HKDF, RFC 5869), and numbers what it seals under that one: the deterministic construction of section
8.2.1, whose field that tells contexts apart is the derived key. Openings may be counted in 2^48 before two of
them are likelier than 2^-32 to have the same salt, and the epoch would do worse: it comes again when a store
is restored from a backup. After 2^32 seals a new salt is taken, which keeps each derived key far from where
GCM's bounds on the amount of data begin.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable
from hashlib import blake2b

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fsm_ray.errors import EncryptionKeysUnusable
from fsm_ray.stores.keyring import KEY_BYTES, Keyring
from fsm_ray.stores.sealed import CHECK_BYTES, NUMBER_BYTES, ROW_BYTES, SALT_BYTES, Damaged, ends

MAX_SEALS = 1 << 32
"""After so many, a new key is derived."""

_NONCE_BYTES = 12
_PAD = bytes(_NONCE_BYTES - NUMBER_BYTES)

Open = Callable[[bytes, bytes, bytes], bytes]
"""AESGCM.decrypt: (nonce, ciphertext, associated data) -> what was sealed."""


class Cipher:
    """Seals with the keyring's current key, and opens what any of its keys sealed."""

    def __init__(self, keyring: Keyring) -> None:
        self.keyring = keyring
        self._openers: dict[bytes, Open] = {}
        self._renew()

    def seal(self, plain: bytes, bound: bytes) -> bytes:
        """Encrypt. It opens with the same `bound` alone."""
        number = next(self._numbers)
        if number == MAX_SEALS:
            self._renew()
            number = next(self._numbers)
        numbered = number.to_bytes(NUMBER_BYTES, "big")
        return self._head + numbered + self._encrypt(_PAD + numbered, plain, bound)

    def open(self, sealed: bytes, bound: bytes) -> tuple[str, bytes]:
        """The id of the key that sealed it, and what was sealed.

        Raises:
            Damaged: this was not sealed with that key and `bound`, or was changed since.
            EncryptionKeysUnusable: the keyring lacks the key, or has another one under its id.
        """
        id_end, head_end, number_end = ends(sealed)
        head = sealed[:head_end]
        opener = self._openers.get(head) or self._opener(head, id_end)
        try:
            plain = opener(_PAD + sealed[head_end:number_end], sealed[number_end:], bound)
        except InvalidTag:
            raise Damaged(
                "its authentication tag does not fit: it was changed, or moved here from elsewhere"
            ) from None
        return head[1:id_end].decode(), plain

    def row_maker(self, key_id: str, bot_name: str) -> Callable[[bytes], bytes]:
        """A function that gives, under this key, what stands in the store for a conversation's key.

        Keyed BLAKE2b (RFC 7693): a pseudorandom function, so that whoever lacks the key cannot try out the
        ids of users. HMAC-SHA256 does the same and takes 3 us instead of 0.6, once for every record written.
        """
        start = blake2b(
            key=_derived(self.keyring.keys[key_id], b"", f"rows {bot_name}"), digest_size=ROW_BYTES
        )

        def row_of(key: bytes) -> bytes:
            state = start.copy()
            state.update(key)
            return state.digest()

        return row_of

    def _renew(self) -> None:
        """Derive a new key to seal with."""
        key_id = self.keyring.current
        key, salt = self.keyring.keys[key_id], secrets.token_bytes(SALT_BYTES)
        self._head = bytes([len(key_id)]) + key_id.encode() + salt + _check(key, salt)
        self._encrypt = AESGCM(_derived(key, salt, "seal")).encrypt
        self._numbers = itertools.count()

    def _opener(self, head: bytes, id_end: int) -> Open:
        key_id = head[1:id_end].decode(errors="replace")
        salt, check = head[id_end : id_end + SALT_BYTES], head[id_end + SALT_BYTES :]
        key = self.keyring.keys.get(key_id)
        if key is None:
            raise EncryptionKeysUnusable(
                f"what is in the store was encrypted with the key {key_id!r}, which is not among the "
                f"encryption keys ({', '.join(map(repr, self.keyring.keys))}): put it back, and remove a key "
                "only when rotate_keys says that it is done",
                key_id=key_id,
            )
        if _check(key, salt) != check:
            raise EncryptionKeysUnusable(
                f"the key {key_id!r} is not the one that the store was encrypted with under this id, unless "
                "the store is damaged: put the right one back, and give a new key a new id",
                key_id=key_id,
            )
        opener = self._openers[head] = AESGCM(_derived(key, salt, "seal")).decrypt
        return opener


def _derived(key: bytes, salt: bytes, purpose: str, size: int = KEY_BYTES) -> bytes:
    return HKDF(SHA256(), size, salt or None, f"fsm_ray 1 {purpose}".encode()).derive(key)


def _check(key: bytes, salt: bytes) -> bytes:
    """Tells a wrong key from damage: derived apart from all else, it says nothing of the key."""
    return _derived(key, salt, "check", CHECK_BYTES)
