"""Record: the stored form of a State, and the pure changes to it.

A record is one msgpack blob, the same in memory, in a store and on its way to a reader. Its data is a map
of still encoded values, so a shard merges maps without ever decoding what users put into them.
"""

from __future__ import annotations

import msgspec


class Record(msgspec.Struct, array_like=True, gc=False):
    """A conversation as a shard sees it. Stored: fields are only ever added, at the end, with a default."""

    flow: str | None
    state: str | None
    data: dict[str, msgspec.Raw]
    version: int


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Record).decode


def made(flow: str | None, state: str | None, data: dict[str, msgspec.Raw], version: int) -> bytes:
    """The blob of a record with this content."""
    return _encode((flow, state, data, version))


def with_data(blob: bytes | None, data: dict[str, msgspec.Raw], version: int) -> bytes:
    """The blob with its data replaced; flow and state are kept, or None where there was no record."""
    if blob is None:
        return _encode((None, None, data, version))
    record = _decode(blob)
    record.data = data
    record.version = version
    return _encode(record)


def merged(blob: bytes | None, changes: dict[str, msgspec.Raw], version: int) -> bytes:
    """The blob with changes merged into its data, field by field, the new value winning."""
    if blob is None:
        return _encode((None, None, changes, version))
    record = _decode(blob)
    record.data.update(changes)
    record.version = version
    return _encode(record)


def version_of(blob: bytes | None) -> int | None:
    """The version of the record, None where there is none."""
    return None if blob is None else _decode(blob).version
