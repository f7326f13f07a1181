"""The stored form: msgpack, and extension codes for what msgpack lacks.

Stored for good: a code is never given another meaning. A key uses codes 1 to 5 alone, and an array in it is a
tuple; in values an array is a list. In the payloads, CLASS stands for two strings, module and qualified name;
ZONE for nil, a ZoneInfo's key, or a timezone's [days, seconds, microseconds] and name, if it has one.
"""

from __future__ import annotations

import msgspec
from msgspec.msgpack import Ext

INT = 1  # beyond 64 bits: big-endian two's complement, as short as it goes
UUID = 2  # 16 bytes
ENUM = 3  # [CLASS, name of the member]; a Flag: [CLASS, value]
NAMED_TUPLE = 4  # [CLASS, {field: value}]
DATACLASS = 5  # [CLASS, {field: value}], and {attribute: value} if it has attributes that are no fields
MODEL = 6  # pydantic: [CLASS, {field: value}, {attribute: value}, [field set], extra or nil, private or nil]
TUPLE = 7  # [item]
SET = 8  # [item]
FROZENSET = 9  # [item]
DICT = 10  # [[key, value]]; only if a key needs an extension code
BYTEARRAY = 11  # its bytes
DATETIME = 12  # [year, month, day, hour, minute, second, microsecond, fold, ZONE]
TIME = 13  # [hour, minute, second, microsecond, fold, ZONE]
DATE = 14  # ordinal
TIMEDELTA = 15  # [days, seconds, microseconds]
DECIMAL = 16  # str(value)
PICKLE = 17  # cloudpickle

MAX_DEPTH = 64
"""Deepest nesting of a key or value, so that rebuilding it stays well below Python's recursion limit."""

PLAIN = frozenset({type(None), bool, int, float, str, bytes})
"""Types that msgpack carries without loss; an int within 64 bits, a str without lone surrogates."""

to_msgpack = msgspec.msgpack.Encoder().encode


def pack_int(value: int) -> int | Ext:
    if -(1 << 63) <= value < 1 << 64:
        return value
    return Ext(INT, value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True))


def unpack_int(payload: bytes | memoryview) -> int:
    return int.from_bytes(payload, "big", signed=True)


def type_name(value: object) -> str:
    cls = type(value)
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"
