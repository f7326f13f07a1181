"""Record: the stored form of a State, and the pure changes to it.

A record is one msgpack blob, the same in a store and on its way to a reader:

    [flow, state, [data, version]]

Its data is a map of still encoded values, so a shard merges maps without ever decoding what users put into
them. In a shard's memory it is packed: flow and state, which thousands of conversations share, are kept once.
"""

from __future__ import annotations

import msgspec

Data = dict[str, msgspec.Raw]


class Content(msgspec.Struct, array_like=True, gc=False):
    """What changes with every write. Stored: fields are only ever added, at the end, with a default."""

    data: Data
    version: int


class _Record(msgspec.Struct, array_like=True, gc=False):
    flow: str | None
    state: str | None
    content: Content


_encode = msgspec.msgpack.Encoder().encode
_decode_content = msgspec.msgpack.Decoder(Content).decode
_decode_record = msgspec.msgpack.Decoder(_Record).decode
_decode_pair = msgspec.msgpack.Decoder(tuple[str | None, str | None]).decode

_MAX_FRONTS = 0xFFFF
MAX_FRONT_BYTES = 256
"""The longest front that records share."""

_UNSHARED = b"\x00\x00"


class Packer:
    """Packs the records of one shard: the number of their front, and their content.

    The front is the blob's beginning, with flow and state. Packed, 24 of 85 bytes of a typical record go. A
    front that comes too late, or is too long to be shared, is kept in its record: number 0, its length in
    four bytes, and itself.
    """

    def __init__(self) -> None:
        self._fronts = [b""]
        self._numbers: dict[tuple[str | None, str | None], bytes] = {}

    def pack(self, flow: str | None, state: str | None, data: Data, version: int) -> bytes:
        """A record with this content."""
        head = self._numbers.get((flow, state)) or self._head(flow, state)
        # The sum is a copy of exact size. What the encoder returns occupies up to half more than it says.
        return head + _encode((data, version))

    def replace(self, packed: bytes | None, data: Data, version: int) -> bytes:
        """The record with its data replaced; flow and state are kept, or None where there was no record."""
        if packed is None:
            return self.pack(None, None, data, version)
        return packed[: _head_end(packed)] + _encode((data, version))

    def merge(self, packed: bytes | None, changes: Data, version: int) -> tuple[bytes, bytes]:
        """The record with changes merged into its data, field by field, and its content alone."""
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

    def pack_all(self, records: dict[bytes, bytes]) -> None:
        """Replace each blob by its packed form: the inverse of `blob`, for what comes from a store.

        Raises:
            ValueError: something there does not begin as a record does.
        """
        heads: dict[bytes, bytes] = {}
        for key, blob in records.items():
            end = _front_end(blob)
            front = blob[:end]
            head = heads.get(front)
            if head is None:
                flow, state = _decode_pair(b"\x92" + front[1:])
                head = heads[front] = self._numbers.get((flow, state)) or self._head(flow, state)
            records[key] = head + blob[end:]

    def _head(self, flow: str | None, state: str | None) -> bytes:
        """What stands before the content, for a flow and state that were not met before."""
        front = b"\x93" + _encode(flow) + _encode(state)
        if len(self._fronts) > _MAX_FRONTS or len(front) > MAX_FRONT_BYTES:
            return _UNSHARED + len(front).to_bytes(4, "big") + front
        number = len(self._fronts).to_bytes(2, "big")
        self._fronts.append(front)
        self._numbers[flow, state] = number
        return number


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


def version_of(packed: bytes | None) -> int | None:
    """The version of the record, None where there is none."""
    return None if packed is None else _decode_content(packed[_head_end(packed) :]).version


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
