"""Sealed: the form of what an encrypted store gives to another one; to tell it takes no key."""

from __future__ import annotations

from fsm_ray.stores.keyring import is_key_id

RECORD_MARK = b"\x94\xc0\xc0\x92\x80\x00\xc6"
"""How an encrypted record begins, and no plain one, which is an array of three. The length of what is sealed
follows, in four bytes."""

REPLY_MARK = b"\xff\xff\xff\xff"
"""How an encrypted reply begins. A plain one begins with its length, and none is so long."""

NOT_ENCRYPTED = (
    "it is not encrypted, and all here should be. If the store was being encrypted, and that did not come to "
    'its end, set "accept_plain": true beside the keys; if not, somebody else wrote it'
)
TWICE = "another row has the same conversation: one of them was put back"

LENGTH_BYTES = 4
ROW_BYTES = 16
SALT_BYTES, CHECK_BYTES, NUMBER_BYTES, TAG_BYTES = 16, 4, 8, 16

_SEAL_START = len(RECORD_MARK) + LENGTH_BYTES


class Damaged(Exception):
    """Raised when something sealed is not what was sealed, or not where it was; it stays in the stores."""


def ends(sealed: bytes) -> tuple[int, int, int]:
    """Where something sealed has the ends of its key's id, of salt and check, and of its number.

    Raises:
        Damaged: it is too short to have them.
    """
    id_end = 1 + sealed[0] if sealed else 1
    head_end = id_end + SALT_BYTES + CHECK_BYTES
    number_end = head_end + NUMBER_BYTES
    if len(sealed) < number_end + TAG_BYTES:
        raise Damaged("it is cut off")
    return id_end, head_end, number_end


def key_id_of(sealed: bytes) -> str:
    """The id of the key that it says that it was sealed with.

    Raises:
        Damaged: it has not the form of something sealed.
    """
    id_end, _, _ = ends(sealed)
    key_id = sealed[1:id_end].decode(errors="replace")
    if not is_key_id(key_id):
        raise Damaged("it does not say which key it was encrypted with")
    return key_id


def in_record(blob: bytes) -> bytes | None:
    """What is sealed in a record; None: it is a plain one, or none.

    Raises:
        Damaged: its length is another one.
    """
    if not blob.startswith(RECORD_MARK):
        return None
    sealed = blob[_SEAL_START:]
    if blob[len(RECORD_MARK) : _SEAL_START] != len(sealed).to_bytes(LENGTH_BYTES, "big"):
        raise Damaged("it is cut off, or something was added to it")
    return sealed


def in_reply(reply: bytes) -> bytes | None:
    """What is sealed in a reply; None: it is a plain one."""
    return reply[len(REPLY_MARK) :] if reply.startswith(REPLY_MARK) else None
