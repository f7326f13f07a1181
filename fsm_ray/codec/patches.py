"""Changes to encoded values that a shard makes itself: the sum of numbers, and one more item of a list.

Numbers and lists are all that is looked into; no user's class is ever needed.
"""

from __future__ import annotations

import msgspec
from msgspec import Raw
from msgspec.msgpack import Ext

from fsm_ray.codec import wire

_decode_number = msgspec.msgpack.Decoder(int | float | Ext).decode
_decode_list = msgspec.msgpack.Decoder(list[Raw]).decode
_encode = wire.to_msgpack


def add(stored: Raw | None, amount: Raw) -> Raw:
    """The sum of two encoded numbers, each an int of any size or a float; nothing stored counts as 0.

    Raises:
        TypeError: one of them is no number.
    """
    left, right = 0 if stored is None else _number(stored), _number(amount)
    try:
        total = left + right
    except OverflowError as error:
        raise TypeError("an int beyond the range of float") from error
    return Raw(_encode(wire.pack_int(total) if type(total) is int else total))


def append(stored: Raw | None, item: Raw) -> Raw:
    """The encoded list with one more item at its end; nothing stored counts as an empty list.

    Raises:
        TypeError: what is stored is no list.
    """
    try:
        items = [] if stored is None else _decode_list(stored)
    except msgspec.ValidationError as error:
        raise TypeError("no list") from error
    return Raw(_encode([*items, item]))


def _number(encoded: Raw) -> int | float:
    try:
        number: int | float | Ext = _decode_number(encoded)
    except msgspec.ValidationError as error:
        raise TypeError("no number") from error
    if not isinstance(number, Ext):
        return number
    if number.code != wire.INT:
        raise TypeError("no number")
    return wire.unpack_int(memoryview(number.data))
