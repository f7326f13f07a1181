"""Record: the stored form of a State, and the pure changes to it.

A record is one msgpack blob, the same in a store and on its way to a reader:

    [flow, state, [data, version]]
    [flow, state, [data, version, updates, ttl_ms, deadline_ms]]    with a tail

Its data is a map of still encoded values, so a shard merges maps without ever decoding what users put into
them. In a shard's memory it is packed: flow and state, which thousands of conversations share, are kept once.
Most records have no tail: see `Tail`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

Data = dict[str, msgspec.Raw]

Front = tuple[str | None, str | None]
"""Flow and state."""

NEVER_MS = (1 << 64) - 1
"""A deadline that is never reached, and the time to live that leads to it."""

_TAILED = 0x95
"""The head of an array of five: a content with a tail."""


class Tail(NamedTuple):
    """What a record has that expires, or whose conversation remembers updates."""

    updates: Collection[int] = ()
    """The last updates that were handled in turns, by Telegram's `update_id`."""
    ttl_ms: int = 0
    """The time to live that a write gave to this record itself; 0: none did."""
    deadline_ms: int = NEVER_MS
    """When there is no record any more, in milliseconds since 1970; 0: there is none, but updates are
    remembered: until `ttl_ms` after 1970."""


NO_TAIL = Tail()


def to_ms(duration_s: float | None) -> int:
    """A time to live in milliseconds; None, or infinite: for ever."""
    if duration_s is None or duration_s * 1_000 >= NEVER_MS:
        return NEVER_MS
    return max(1, round(duration_s * 1_000))


class Content(msgspec.Struct, array_like=True, gc=False):
    """What changes with every write. Stored: fields are only ever added, at the end, with a default."""

    data: Data
    version: int
    updates: list[int] = []
    ttl_ms: int = 0
    deadline_ms: int = NEVER_MS


class Versioned(msgspec.Struct, array_like=True, gc=False):
    """What tells the version of a Content, and takes half the time."""

    data: msgspec.Raw
    version: int


class _Record(msgspec.Struct, array_like=True, gc=False):
    flow: str | None
    state: str | None
    content: Content


_encode = msgspec.msgpack.Encoder().encode
_decode_content = msgspec.msgpack.Decoder(Content).decode
_decode_record = msgspec.msgpack.Decoder(_Record).decode
_decode_versioned = msgspec.msgpack.Decoder(tuple[msgspec.Raw, msgspec.Raw, Versioned]).decode
_decode_pair = msgspec.msgpack.Decoder(Front).decode

_MAX_FRONTS = 0xFFFF
MAX_FRONT_BYTES = 256
"""The longest front that records share."""

_UNSHARED = b"\x00\x00"


@dataclass(slots=True)
class Census:
    """What there is among many records."""

    counts: dict[bytes, int] = field(default_factory=dict)
    """Head -> how many records have it; not those of which but the updates are left."""
    tailed: list[bytes] = field(default_factory=list)
    """The keys of records with a tail."""


class Packer:
    """Packs the records of one shard: the number of their front, and their content.

    The front is the blob's beginning, with flow and state. Packed, 24 of 85 bytes of a typical record go. A
    front that comes too late, or is too long to be shared, is kept in its record: number 0, its length in
    four bytes, and itself.
    """

    def __init__(self) -> None:
        self._fronts = [b""]
        self._pairs: list[Front] = [(None, None)]
        self._numbers: dict[Front, bytes] = {}

    def head(self, flow: str | None, state: str | None) -> bytes:
        """What stands before the content in records with this flow and state."""
        return self._numbers.get((flow, state)) or self._head(flow, state)

    def pack(
        self, flow: str | None, state: str | None, data: Data, version: int, tail: Tail = NO_TAIL
    ) -> bytes:
        """A record with this content."""
        head = self._numbers.get((flow, state)) or self._head(flow, state)
        # The sum is a copy of exact size. What the encoder returns occupies up to half more than it says.
        return head + (_encode((data, version)) if tail is NO_TAIL else encode_content(data, version, tail))

    def replace(self, packed: bytes | None, data: Data, version: int) -> bytes:
        """The record with its data replaced; flow and state are kept, or None where there was no record."""
        if packed is None:
            return self.pack(None, None, data, version)
        return head_of(packed) + _encode((data, version))

    def merge(self, packed: bytes | None, changes: Data, version: int) -> tuple[bytes, bytes]:
        """The record with changes merged into its data, field by field, and its content; without a tail."""
        if packed is None:
            packed = self.pack(None, None, changes, version)
            return packed, self.content(packed)
        end = 2 if packed[0] or packed[1] else _head_end(packed)
        data = _decode_content(packed[end:]).data
        data.update(changes)
        content = _encode((data, version))
        return packed[:end] + content, content

    def content(self, packed: bytes) -> bytes:
        """The record's encoded Content, for readers that want no more."""
        return packed[2:] if packed[0] or packed[1] else packed[_head_end(packed) :]

    def blob(self, packed: bytes) -> bytes:
        """The record as stores and readers get it."""
        number = packed[0] << 8 | packed[1]
        return self._fronts[number] + packed[2:] if number else packed[6:]

    def front(self, head: bytes) -> Front:
        """The flow and state of records with this head."""
        number = head[0] << 8 | head[1]
        return self._pairs[number] if number else _decode_pair(b"\x92" + head[7:])

    def pack_all(self, records: dict[bytes, bytes]) -> Census:
        """Replace each blob by its packed form: the inverse of `blob`, for what comes from a store.

        Raises:
            ValueError: something there does not begin as a record does.
        """
        census = Census()
        counts, tailed = census.counts, census.tailed
        heads: dict[bytes, bytes] = {}
        for key, blob in records.items():
            end = _front_end(blob)
            front = blob[:end]
            head = heads.get(front)
            if head is None:
                flow, state = _decode_pair(b"\x92" + front[1:])
                head = heads[front] = self.head(flow, state)
            records[key] = head + blob[end:]
            if blob[end] == _TAILED:
                tailed.append(key)
                if not deadline_of(records[key]):
                    continue
            count_in(counts, head, 1)
        return census

    def _head(self, flow: str | None, state: str | None) -> bytes:
        """What stands before the content, for a flow and state that were not met before."""
        front = b"\x93" + _encode(flow) + _encode(state)
        if len(self._fronts) > _MAX_FRONTS or len(front) > MAX_FRONT_BYTES:
            return _UNSHARED + len(front).to_bytes(4, "big") + front
        number = len(self._fronts).to_bytes(2, "big")
        self._fronts.append(front)
        self._pairs.append((flow, state))
        self._numbers[flow, state] = number
        return number


def count_in(counts: dict[bytes, int], head: bytes, more: int) -> None:
    """Count so many more records with this head; what is at zero is dropped, or made-up states would pile up.

    Not a Counter: assigning to one takes three times as long.
    """
    count = counts.get(head, 0) + more
    if count:
        counts[head] = count
    else:
        counts.pop(head, None)


def check_blob(blob: bytes) -> None:
    """Look through a whole blob, for stores that keep no checksums.

    Raises:
        msgspec.MsgspecError, UnicodeDecodeError, RecursionError: it is no record.
    """
    _decode_record(blob)


def front_of(blob: bytes) -> tuple[str | None, str | None, int]:
    """The flow, state and version in a blob, for stores that show them to people."""
    record = _decode_record(blob)
    return record.flow, record.state, record.content.version


def version_in(blob: bytes) -> int:
    """The version in a blob."""
    return _decode_versioned(blob)[2].version


def encode_content(data: Data, version: int, tail: Tail = NO_TAIL) -> bytes:
    """An encoded Content."""
    if tail is NO_TAIL:
        return _encode((data, version))
    # The deadline is last, and always takes eight bytes: `deadline_of` decodes no more.
    parts = (_encode(data), _encode(version), _encode(list(tail.updates)), _encode(tail.ttl_ms))
    return b"".join((b"\x95", *parts, b"\xcf", tail.deadline_ms.to_bytes(8, "big")))


def version_of(packed: bytes | None) -> int | None:
    """The version of the record, None where there is none."""
    return None if packed is None else content_of(packed).version


def content_of(packed: bytes) -> Content:
    """The record's content, with values still encoded."""
    return _decode_content(packed[_head_end(packed) :])


def head_of(packed: bytes) -> bytes:
    """What stands for the record's flow and state; equal for records that share them."""
    return packed[: _head_end(packed)]


def deadline_of(packed: bytes) -> int:
    """When there is no such record any more, see `Tail.deadline_ms`."""
    end = 2 if packed[0] or packed[1] else _head_end(packed)
    return int.from_bytes(packed[-8:], "big") if packed[end] == _TAILED else NEVER_MS


def _head_end(packed: bytes) -> int:
    return 2 if packed[0] or packed[1] else 6 + int.from_bytes(packed[2:6], "big")


def _front_end(blob: bytes) -> int:
    """Where the content of a blob begins: behind an array's head, and two strings or nils."""
    if blob[:1] != b"\x93":
        raise ValueError("no array of three")
    end = 1
    for _ in range(2):
        head = blob[end]
        if head & 0xE0 == 0xA0:  # noqa: PLR2004  # a string of up to 31 bytes
            end += 1 + (head & 0x1F)
        elif head == 0xC0:  # noqa: PLR2004  # nil
            end += 1
        elif 0xD9 <= head <= 0xDB:  # noqa: PLR2004  # a string whose length takes one, two or four bytes
            start = end + 1 + (1 << (head - 0xD9))
            end = start + int.from_bytes(blob[end + 1 : start], "big")
        else:
            raise ValueError(f"flow or state begins with the byte {head:#x}")
    return end
