"""The operations on a shard, and the frames that carry them.

Everything is msgpack. A client encodes each operation when it is called and joins those that wait into one
request, so the writers here build bytes; the structs are what the other side decodes.

    read request    [0, number, [key, ...]]
    write request   [1, number, session, is_resend, [operation, ...]]
    reply           [0 or 1, number, [result, ...]]     one result for each operation, in order

A result is a record, a number (the new version), a bool, nil, or a map that describes an error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from fsm_ray import errors
from fsm_ray.codec import decode_key
from fsm_ray.errors import FsmRayError

PROTOCOL_VERSION = 1
"""Raised whenever a frame, an operation or the handshake changes its meaning."""

MAX_FRAME_BYTES = 64 << 20
"""The largest request a shard accepts."""

MAX_REPLY_BYTES = (1 << 32) - 1
"""The largest reply a client accepts: what the four bytes of a frame's length can say."""

MAX_OPERATIONS = 1024
"""The most operations that travel in one request."""

READ = 0
WRITE = 1

SET_RECORD = 0
SET_DATA = 1
UPDATE_DATA = 2
CLEAR = 3

NIL = b"\xc0"

_BIN8 = tuple(b"\xc4" + bytes([length]) for length in range(256))
"""The msgpack head of a byte string of this length."""


class SetRecord(msgspec.Struct, array_like=True, tag=SET_RECORD, gc=False):
    """Create or overwrite a record. Answer: the new version."""

    key: bytes
    flow: str | None
    state: str | None
    data: dict[str, msgspec.Raw]
    expected_version: int | None = None


class SetData(msgspec.Struct, array_like=True, tag=SET_DATA, gc=False):
    """Replace the data, keep flow and state. Answer: the new version."""

    key: bytes
    data: dict[str, msgspec.Raw]
    expected_version: int | None = None


class UpdateData(msgspec.Struct, array_like=True, tag=UPDATE_DATA, gc=False):
    """Merge changes into the data. Answer: the record as it is now."""

    key: bytes
    changes: dict[str, msgspec.Raw]
    expected_version: int | None = None


class Clear(msgspec.Struct, array_like=True, tag=CLEAR, gc=False):
    """Remove the record. Answer: whether there was one."""

    key: bytes
    expected_version: int | None = None


Write = SetRecord | SetData | UpdateData | Clear


class ReadRequest(msgspec.Struct, array_like=True, tag=READ, gc=False):
    number: int
    keys: list[bytes]


class WriteRequest(msgspec.Struct, array_like=True, tag=WRITE, gc=False):
    number: int
    session: bytes
    is_resend: bool
    operations: list[Write]


class ContentView(msgspec.Struct, array_like=True, gc=False):
    """The fields of `record.Content`, with values decoded."""

    data: dict[str, Any]
    version: int


class RecordView(msgspec.Struct, array_like=True, gc=False):
    """A record as a client sees it."""

    flow: str | None
    state: str | None
    content: ContentView


Result = RecordView | bool | int | dict[str, Any] | None

GOOD_RESULTS = frozenset({RecordView, bool, int, type(None)})
"""What a result is when the operation did not fail."""


class Reply(msgspec.Struct, array_like=True, gc=False):
    lane: int
    number: int
    results: list[Result]


class _UndecodedReply(msgspec.Struct, array_like=True, gc=False):
    lane: int
    number: int
    results: list[msgspec.Raw]


_encode = msgspec.msgpack.Encoder().encode

decode_request = msgspec.msgpack.Decoder(ReadRequest | WriteRequest).decode


def get_record(key: bytes) -> bytes:
    """An operation of a read request. `key`, here and below, is an encoded one."""
    length = len(key)
    return _BIN8[length] + key if length < len(_BIN8) else _encode(key)


def set_record(
    key: bytes, flow: str | None, state: str | None, data: bytes, expected_version: int | None
) -> bytes:
    """`data`, here and below, is an encoded map."""
    return _encode((SET_RECORD, key, flow, state, msgspec.Raw(data), expected_version))


def set_data(key: bytes, data: bytes, expected_version: int | None) -> bytes:
    return _encode((SET_DATA, key, msgspec.Raw(data), expected_version))


def update_data(key: bytes, changes: bytes, expected_version: int | None) -> bytes:
    length = len(key)
    if expected_version is None and length < len(_BIN8):
        # What the line below makes, in a third of the time.
        return b"\x93\x02" + _BIN8[length] + key + changes
    return _encode((UPDATE_DATA, key, msgspec.Raw(changes), expected_version))


def clear(key: bytes, expected_version: int | None) -> bytes:
    return _encode((CLEAR, key, expected_version))


def read_request(number: int, operations: Sequence[bytes]) -> bytes:
    """A whole frame, its length in front, of operations that are encoded already."""
    return _frame(b"\x93\x00" + _encode(number), operations)


def write_request(number: int, operations: Sequence[bytes], session: bytes, *, is_resend: bool) -> bytes:
    """As `read_request`, for operations that write."""
    return _frame(b"\x95\x01" + _encode(number) + _encode(session) + _encode(is_resend), operations)


def reply(lane: int, number: int, results: Sequence[bytes]) -> bytes:
    """A whole frame of results that are encoded already."""
    return _frame((b"\x93\x00" if lane == READ else b"\x93\x01") + _encode(number), results)


def frame(body: bytes) -> bytes:
    """The body with its length in front, as it travels on a socket."""
    return len(body).to_bytes(4, "little") + body


def _frame(head: bytes, parts: Sequence[bytes]) -> bytes:
    body = b"".join((head, b"\xdd", len(parts).to_bytes(4, "big"), *parts))
    return len(body).to_bytes(4, "little") + body


def encode_result(value: int) -> bytes:
    """A version, or a bool."""
    return _encode(value)


def encode_error(error: FsmRayError, key: bytes | None = None) -> bytes:
    """The error as a result: its class by name, its message, its facts, and the key it is about."""
    return _encode({"error": type(error).__name__, "message": str(error), "facts": vars(error), "key": key})


def decode_error(result: dict[str, Any]) -> FsmRayError:
    """The error that `encode_error` wrote; a class unknown here, of a later version, becomes the base."""
    kind = getattr(errors, str(result["error"]), FsmRayError)
    if not (isinstance(kind, type) and issubclass(kind, FsmRayError)):
        kind = FsmRayError
    facts = dict(result["facts"])
    if result["key"] is not None:
        # A key whose class is missing here must not hide what went wrong.
        with contextlib.suppress(FsmRayError):
            facts["key"] = decode_key(result["key"])
    error: FsmRayError = kind(result["message"], **facts)
    return error


def error_of(result: Result | FsmRayError) -> FsmRayError:
    """The error that a result is which is none of GOOD_RESULTS."""
    if isinstance(result, FsmRayError):
        return result
    if isinstance(result, dict):
        return decode_error(result)
    return FsmRayError(f"a shard gave a result that this version does not know: {result!r}")


class ReplyDecoder:
    """Decodes replies for one client, user values included.

    A value that cannot be decoded here (its class is missing, say) fails its own operation, not the batch.
    """

    def __init__(self, extension_hook: Callable[[int, memoryview], Any]) -> None:
        self._decode = msgspec.msgpack.Decoder(Reply, ext_hook=extension_hook).decode
        self._decode_result = msgspec.msgpack.Decoder(Result, ext_hook=extension_hook).decode
        self._decode_undecoded = msgspec.msgpack.Decoder(_UndecodedReply).decode

    def decode(self, body: bytes | memoryview) -> tuple[int, int, Sequence[Result | FsmRayError]]:
        """Lane, number and results; errors of the shard are results here too, not raised."""
        try:
            whole = self._decode(body)
        except (FsmRayError, msgspec.ValidationError):
            undecoded = self._decode_undecoded(body)
            return undecoded.lane, undecoded.number, [self._one(result) for result in undecoded.results]
        return whole.lane, whole.number, whole.results

    def _one(self, encoded: msgspec.Raw) -> Result | FsmRayError:
        try:
            result: Result = self._decode_result(encoded)
        except FsmRayError as error:
            return error
        except msgspec.ValidationError as error:
            # msgspec wraps what an extension hook raises in its own error.
            if isinstance(error.__cause__, FsmRayError):
                return error.__cause__
            return errors.ValueNotDecodable(f"a stored value cannot be decoded here: {error}")
        return result
