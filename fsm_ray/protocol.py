"""The operations on a shard, and the frames that carry them.

Everything is msgpack. A client encodes each operation when it is called and joins those that wait into one
request, so the writers here build bytes; the structs are what the other side decodes.

    write request   [0, number, session, is_resend, [operation, ...]]
    read request    [1 or 2, number, [key, ...]]
    reply           [kind of the request, number, [result, ...]]    one for each operation, in order

Reads of kind 1 ask for contents, data and version; those of kind 2 for whole records. A result is what was
asked for, a number (the new version), a bool, nil, or a map that describes an error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
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

WRITE = 0
READ_CONTENT = 1
READ_RECORD = 2

SET_RECORD = 0
SET_DATA = 1
UPDATE_DATA = 2
CLEAR = 3

NIL = b"\xc0"

_HEADS = (b"\x93\x00\xcf", b"\x93\x01\xcf", b"\x93\x02\xcf")
"""An array of three, its first the kind, its second an integer of eight bytes."""

BIN8 = tuple(b"\xc4" + bytes([length]) for length in range(256))
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
    """Merge changes into the data. Answer: the content as it is now."""

    key: bytes
    changes: dict[str, msgspec.Raw]
    expected_version: int | None = None


class Clear(msgspec.Struct, array_like=True, tag=CLEAR, gc=False):
    """Remove the record. Answer: whether there was one."""

    key: bytes
    expected_version: int | None = None


Write = SetRecord | SetData | UpdateData | Clear


class WriteRequest(msgspec.Struct, array_like=True, tag=WRITE, gc=False):
    number: int
    session: bytes
    is_resend: bool
    operations: list[Write]


class ReadContent(msgspec.Struct, array_like=True, tag=READ_CONTENT, gc=False):
    number: int
    keys: list[bytes]


class ReadRecord(msgspec.Struct, array_like=True, tag=READ_RECORD, gc=False):
    number: int
    keys: list[bytes]


class ContentView(msgspec.Struct, array_like=True, gc=False):
    """The fields of `record.Content`, with values decoded."""

    data: dict[str, Any]
    version: int


class RecordView(msgspec.Struct, array_like=True, gc=False):
    """A record as a client sees it."""

    flow: str | None
    state: str | None
    content: ContentView


Error = dict[str, Any]
"""An error as it travels; see `encode_error`."""

Result = ContentView | RecordView | bool | int | Error | None

GOOD_RESULTS = frozenset({ContentView, RecordView, bool, int, type(None)})
"""What a result is when the operation did not fail."""

_WriteResult = ContentView | bool | int | Error | None
_ContentResult = ContentView | Error | None
_RecordResult = RecordView | Error | None

_UPDATE_HEADS = tuple(b"\x93\x02" + head for head in BIN8)
"""An array of three, UPDATE_DATA, and the head of a key of this length."""

_REPLIES: dict[int, tuple[Any, Any]] = {
    WRITE: (tuple[int, int, list[_WriteResult]], _WriteResult),
    READ_CONTENT: (tuple[int, int, list[_ContentResult]], _ContentResult),
    READ_RECORD: (tuple[int, int, list[_RecordResult]], _RecordResult),
}
"""Kind of a request -> what its reply is, and what one result in it is."""

_encode = msgspec.msgpack.Encoder().encode

decode_request = msgspec.msgpack.Decoder(WriteRequest | ReadContent | ReadRecord).decode


def read(key: bytes) -> bytes:
    """An operation of a read request. `key`, here and below, is an encoded one."""
    length = len(key)
    return BIN8[length] + key if length < len(BIN8) else fitting(_encode(key))


def set_record(
    key: bytes, flow: str | None, state: str | None, data: bytes, expected_version: int | None
) -> bytes:
    """`data`, here and below, is an encoded map."""
    return fitting(_encode((SET_RECORD, key, flow, state, msgspec.Raw(data), expected_version)))


def set_data(key: bytes, data: bytes, expected_version: int | None) -> bytes:
    return _encode((SET_DATA, key, msgspec.Raw(data), expected_version))


def update_data(key: bytes, changes: bytes, expected_version: int | None) -> bytes:
    length = len(key)
    if expected_version is None and length < len(_UPDATE_HEADS):
        # What the line below makes, in a third of the time.
        return _UPDATE_HEADS[length] + key + changes
    return _encode((UPDATE_DATA, key, msgspec.Raw(changes), expected_version))


def clear(key: bytes, expected_version: int | None) -> bytes:
    return fitting(_encode((CLEAR, key, expected_version)))


def fitting(operation: bytes) -> bytes:
    """The operation, if a frame can hold it.

    Raises:
        FrameTooLarge: none can, and nothing is to be sent.
    """
    if len(operation) > MAX_FRAME_BYTES // 2:
        raise errors.FrameTooLarge(
            f"the operation takes {len(operation):,} bytes, and a frame holds {MAX_FRAME_BYTES // 2:,}; "
            "nothing was sent: use a shorter key, flow and state",
            size_bytes=len(operation),
        )
    return operation


def write_request(number: int, operations: Sequence[bytes], session: bytes, *, is_resend: bool) -> bytes:
    """A whole frame, its length in front, of operations that are encoded already."""
    body = b"".join(
        (
            b"\x95\x00\xcf",
            number.to_bytes(8, "big"),
            b"\xc4\x10",
            session,
            b"\xc3\xdd" if is_resend else b"\xc2\xdd",
            len(operations).to_bytes(4, "big"),
            *operations,
        )
    )
    return len(body).to_bytes(4, "little") + body


def is_write(request: bytes) -> bool:
    """Whether this frame is a write request."""
    return request[5] == WRITE


def reply(kind: int, number: int, results: Sequence[bytes]) -> bytes:
    """A whole frame of results that are encoded already."""
    body = b"".join(
        (_HEADS[kind], number.to_bytes(8, "big"), b"\xdd", len(results).to_bytes(4, "big"), *results)
    )
    return len(body).to_bytes(4, "little") + body


read_request = reply
"""A request of reads, `(kind, number, operations)`, has the form of a reply."""


def frame(body: bytes) -> bytes:
    """The body with its length in front, as it travels on a socket."""
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


Decoded = tuple[int, int, Sequence[Result | FsmRayError]]
"""A reply: the kind and number of its request, and the results."""

UNDECODABLE = (FsmRayError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What decoding a reply may raise."""


class ReplyDecoder:
    """Decodes replies for one client, user values included.

    A value that cannot be decoded here (its class is missing, say) fails its own operation, not the batch.
    `whole` has a function for each kind of request, which does the work of `decode` but for such values.
    """

    def __init__(self, extension_hook: Callable[[int, memoryview], Any]) -> None:
        def decoders(types: Iterable[Any]) -> list[Callable[[bytes], Any]]:
            return [msgspec.msgpack.Decoder(each, ext_hook=extension_hook).decode for each in types]

        self.whole = decoders(reply for _, (reply, _) in sorted(_REPLIES.items()))
        self._decode_result = decoders(result for _, (_, result) in sorted(_REPLIES.items()))
        self._decode_raw = msgspec.msgpack.Decoder(tuple[int, int, list[msgspec.Raw]]).decode

    def decode(self, body: bytes) -> Decoded:
        """Kind, number and results; errors of the shard are results here too, not raised."""
        try:
            whole: Decoded = self.whole[body[1]](body)
        except UNDECODABLE:
            return self.decode_each(body)
        return whole

    def decode_each(self, body: bytes) -> Decoded:
        """As `decode`, each result by itself."""
        kind, number, results = self._decode_raw(body)
        return kind, number, [self._one(kind, result) for result in results]

    def _one(self, kind: int, encoded: msgspec.Raw) -> Result | FsmRayError:
        try:
            result: Result = self._decode_result[kind](encoded)
        except FsmRayError as error:
            return error
        except UNDECODABLE as error:
            return errors.ValueNotDecodable(f"a stored value cannot be decoded here: {error}")
        return result
