"""What shards answer.

    reply    [kind of the request, number, [result, ...]]    one for each operation or key, in order

A result is what was asked for, a number (the version), a bool, nil, or a map that describes an error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec

from fsm_ray import errors
from fsm_ray.codec import decode_key
from fsm_ray.errors import FsmRayError
from fsm_ray.protocol.requests import (
    COUNT,
    GRANTS,
    KINDS,
    READ_CONTENT,
    READ_RECORD,
    SCAN,
    TURN,
    WATCH,
    WRITE,
)
from fsm_ray.record import NEVER_MS, Front, Versioned
from fsm_ray.state import State

MAX_REPLY_BYTES = (1 << 32) - 1
"""The largest reply a client accepts: what the four bytes of a frame's length can say."""

NIL = b"\xc0"

_HEADS = tuple(b"\x93" + bytes([kind]) + b"\xcf" for kind in KINDS)
"""An array of three, its first the kind, its second an integer of eight bytes."""


class ContentView(msgspec.Struct, array_like=True, gc=False):
    """The fields of `record.Content`, with values decoded."""

    data: dict[str, Any]
    version: int
    updates: list[int] = []
    ttl_ms: int = 0
    deadline_ms: int = NEVER_MS


class RecordView(msgspec.Struct, array_like=True, gc=False):
    """A record as a client sees it."""

    flow: str | None
    state: str | None
    content: ContentView


class Grant(msgspec.Struct, array_like=True, gc=False):
    """A turn that waited has its conversation."""

    turn: int
    record: RecordView | None


class Found(msgspec.Struct, array_like=True, gc=False):
    """What a scan found under an encoded key."""

    key: bytes
    record: RecordView


class Counted(msgspec.Struct, array_like=True, gc=False):
    """How many records have this flow and state."""

    flow: str | None
    state: str | None
    count: int


class ChangeView(msgspec.Struct, array_like=True, gc=False):
    """A change of the record under an encoded key; None: it was cleared, or has expired."""

    version: int
    key: bytes
    before: Front | None
    """Flow and state before the change; None: there was no record."""
    record: RecordView | None


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

_LAST_MS = 253_402_300_799_999
"""The last moment that a datetime can tell; what lives longer lives for ever."""


def state_of(record: RecordView) -> State:
    """The record as users read it."""
    content = record.content
    state = State(flow=record.flow, state=record.state, data=content.data, version=content.version)
    if content.deadline_ms <= _LAST_MS:
        state.expires_at = _EPOCH + timedelta(milliseconds=content.deadline_ms)
    return state


Error = dict[str, Any]
"""An error as it travels; see `encode_error`."""

Result = ContentView | RecordView | Grant | Found | Counted | ChangeView | bool | int | Error | None

GOOD_RESULTS = frozenset({ContentView, RecordView, Grant, Found, Counted, ChangeView, bool, int, type(None)})
"""What a result is when the operation did not fail."""

_RESULTS: dict[int, Any] = {
    WRITE: ContentView | bool | int | Error | None,
    READ_CONTENT: ContentView | Error | None,
    READ_RECORD: RecordView | Error | None,
    TURN: RecordView | bool | Error | None,
    GRANTS: Grant | Error,
    SCAN: Found | bool | Error,
    COUNT: Counted | Error,
    WATCH: ChangeView | int | Error,
}
"""Kind of a request -> what one result in its reply is."""

_encode = msgspec.msgpack.Encoder().encode


_decode_versions = msgspec.msgpack.Decoder(
    tuple[int, int, list[Versioned | bool | int | dict[str, msgspec.Raw] | None]]
).decode
_decode_found = msgspec.msgpack.Decoder(tuple[bytes, msgspec.Raw]).decode
_decode_change = msgspec.msgpack.Decoder(tuple[int, bytes, msgspec.Raw, msgspec.Raw]).decode


def reply(kind: int, number: int, results: Sequence[bytes]) -> bytes:
    """A whole frame of results that are encoded already."""
    body = b"".join(
        (_HEADS[kind], number.to_bytes(8, "big"), b"\xdd", len(results).to_bytes(4, "big"), *results)
    )
    return len(body).to_bytes(4, "little") + body


read_request = reply
"""A request of reads, `(kind, number, operations)`, has the form of a reply."""


def encode_result(value: int) -> bytes:
    """A version, or a bool."""
    return _encode(value)


def encode_grant(turn: int, record: bytes) -> bytes:
    """`record`, here and below, is a blob, or NIL."""
    return b"\x92" + _encode(turn) + record


def encode_found(key: bytes, record: bytes) -> bytes:
    return b"\x92" + _encode(key) + record


def encode_counted(front: Front, count: int) -> bytes:
    """`front`, here and below: flow and state."""
    return _encode((*front, count))


def encode_change(version: int, key: bytes, before: Front | None, record: bytes) -> bytes:
    return b"".join((b"\x94", _encode(version), _encode(key), _encode(before), record))


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
        facts["key"] = _key(result["key"])
    error: FsmRayError = kind(result["message"], **facts)
    return error


def _key(encoded: bytes) -> Hashable:
    """The key of an error: one whose class is missing here must not hide what went wrong."""
    try:
        return decode_key(encoded)
    except errors.ValueNotDecodable as error:
        return error.key  # type: ignore[no-any-return]


def version_told(written: bytes) -> int:
    """The last version that a reply to a write request, a whole frame, tells of; 0: none.

    Raises:
        msgspec.MsgspecError, UnicodeDecodeError, RecursionError: it is no such reply.
    """
    _, _, results = _decode_versions(written[4:])
    numbers = [each for each in results if type(each) is int]
    return max([0, *numbers, *(each.version for each in results if isinstance(each, Versioned))])


def error_of(result: Result | FsmRayError) -> FsmRayError:
    """The error that a result is which is none of GOOD_RESULTS."""
    if isinstance(result, FsmRayError):
        return result
    if isinstance(result, dict):
        return decode_error(result)
    return FsmRayError(f"a shard gave a result that this version does not know: {result!r}")


def good(result: Any) -> Any:
    """The result, unless it is an error: that is raised."""
    if type(result) not in GOOD_RESULTS:
        raise error_of(result)
    return result


Decoded = tuple[int, int, Sequence[Result | FsmRayError]]
"""A reply: the kind and number of its request, and the results."""

UNDECODABLE = (FsmRayError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What decoding a reply may raise."""


class ReplyDecoder:
    """Decodes replies for one client, user values included.

    A value that cannot be decoded here (its class is missing, say) fails its own operation, not the batch.
    `whole` has a function for each kind of request, which does the work of `decode` but for such values.
    """

    def __init__(self, extension_hook: Callable[[int, memoryview], Any] | None) -> None:
        """Make one. Without a hook, values of classes stay as they are encoded: msgspec's `Ext`."""

        def decoders(types: Iterable[Any]) -> list[Callable[[bytes], Any]]:
            return [msgspec.msgpack.Decoder(each, ext_hook=extension_hook).decode for each in types]

        results = [_RESULTS[kind] for kind in KINDS]
        replies: list[Any] = [tuple[int, int, list[each]] for each in results]  # type: ignore[valid-type]
        self.whole = decoders(replies)
        self._decode_result = decoders(results)
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
            return _located(error, kind, encoded)
        except UNDECODABLE as error:
            message = f"a stored value cannot be decoded here: {error}"
            return _located(errors.ValueNotDecodable(message), kind, encoded)
        return result


def _located(error: FsmRayError, kind: int, encoded: msgspec.Raw) -> FsmRayError:
    """The error with the key, or the version, of what a scan or a watch goes on behind."""
    with contextlib.suppress(*UNDECODABLE):
        if kind == SCAN:
            error.key = _key(_decode_found(encoded)[0])
        elif kind == WATCH:
            vars(error)["version"], key, *_ = _decode_change(encoded)
            error.key = _key(key)
    return error
