"""What clients ask: the operations, and the frames that carry them to a shard.

    write request   [0, number, session, is_resend, [operation, ...]]
    read request    [1 or 2, number, [key, ...]]
    turn request    [3, number, session, [begin or end, ...]]
    grants request  [4, number, session, wait_s]
    scan request    [5, number, scan, page, has_begun, flow, state, after, limit]
    count request   [6, number]
    watch request   [7, number, flow, state, since, wait_s]

Reads of kind 1 ask for contents, data and version; those of kind 2 for whole records. Grants and changes are
answered when there are any, or in `wait_s`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, final

import msgspec

from fsm_ray import errors
from fsm_ray.record import Front

MAX_FRAME_BYTES = 64 << 20
"""The largest request a shard accepts."""

MAX_OPERATIONS = 1024
"""The most operations that travel in one request."""

WRITE = 0
READ_CONTENT = 1
READ_RECORD = 2
TURN = 3
GRANTS = 4
SCAN = 5
COUNT = 6
WATCH = 7

KINDS = range(8)
"""Of requests, and of the replies to them."""

SET_RECORD = 0
SET_DATA = 1
UPDATE_DATA = 2
CLEAR = 3
COMMIT_TURN = 4
PATCH = 5
TRANSACT = 6
ENTER_STATE = 7

BEGIN = 0
END = 1

NO_TURN = 0
"""A number that no turn has."""

BIN8 = tuple(b"\xc4" + bytes([length]) for length in range(256))
"""The msgpack head of a byte string of this length."""


Natural = Annotated[int, msgspec.Meta(ge=0)]
"""Shards compute with it: with a negative one, a request is none."""

WaitSeconds = Annotated[float, msgspec.Meta(ge=0, le=3_600)]
"""Likewise; NaN would put a loop's timers out of order."""


class SetRecord(msgspec.Struct, array_like=True, tag=SET_RECORD, gc=False):
    """Create or overwrite a record. Answer: the new version."""

    key: bytes
    flow: str | None
    state: str | None
    data: dict[str, msgspec.Raw]
    expected_version: int | None = None
    ttl_ms: Natural | None = None


class SetData(msgspec.Struct, array_like=True, tag=SET_DATA, gc=False):
    """Replace the data, keep flow and state. Answer: the new version."""

    key: bytes
    data: dict[str, msgspec.Raw]
    expected_version: int | None = None
    ttl_ms: Natural | None = None


class EnterState(msgspec.Struct, array_like=True, tag=ENTER_STATE, gc=False):
    """Set flow and state, keep the data. Answer: the new version."""

    key: bytes
    flow: str | None
    state: str | None
    expected_version: int | None = None
    ttl_ms: Natural | None = None


class UpdateData(msgspec.Struct, array_like=True, tag=UPDATE_DATA, gc=False):
    """Merge changes into the data. Answer: the content as it is now."""

    key: bytes
    changes: dict[str, msgspec.Raw]
    expected_version: int | None = None
    ttl_ms: Natural | None = None


class Clear(msgspec.Struct, array_like=True, tag=CLEAR, gc=False):
    """Remove the record. Answer: whether there was one."""

    key: bytes
    expected_version: int | None = None


class CommitTurn(msgspec.Struct, array_like=True, tag=COMMIT_TURN, gc=False):
    """Create, overwrite or (data: nil) remove the record, if that changes it, and end the turn.

    `expected_version` is that of the record with which the turn began, 0 if there was none. `update_id` is
    remembered. Answer: the version of the record, 0 if there is none.
    """

    key: bytes
    turn_session: bytes
    turn: Natural
    flow: str | None
    state: str | None
    data: dict[str, msgspec.Raw] | None
    expected_version: int
    ttl_ms: Natural | None = None
    update_id: int | None = None


class Patch(msgspec.Struct, array_like=True, tag=PATCH, gc=False):
    """Change fields of the data: set, then unset, increment, append. Answer: the content as it is now."""

    key: bytes
    set: dict[str, msgspec.Raw]
    unset: list[str]
    increment: dict[str, msgspec.Raw]
    append: dict[str, msgspec.Raw]
    expected_version: int | None = None
    ttl_ms: Natural | None = None


Operation = SetRecord | SetData | EnterState | UpdateData | Clear | Patch
"""A write that a transaction can hold."""


class Transact(msgspec.Struct, array_like=True, tag=TRANSACT, gc=False):
    """All of the operations, or none. Answer: the last version."""

    operations: list[Operation]


Write = Operation | CommitTurn | Transact


class Begin(msgspec.Struct, array_like=True, tag=BEGIN, gc=False):
    """Begin a turn, or ask for it again. Answer: the record, nil where there is none; or false: it waits."""

    turn: Natural
    key: bytes


class End(msgspec.Struct, array_like=True, tag=END, gc=False):
    """End a turn that changed nothing, or waits no longer. Answer: whether there was such a turn.

    Of NO_TURN, it says that the session lives.
    """

    turn: Natural


@final
class WriteRequest(msgspec.Struct, array_like=True, tag=WRITE, gc=False):
    number: Natural
    session: bytes
    is_resend: bool
    operations: list[Write]


@final
class ReadContent(msgspec.Struct, array_like=True, tag=READ_CONTENT, gc=False):
    number: Natural
    keys: list[bytes]


@final
class ReadRecord(msgspec.Struct, array_like=True, tag=READ_RECORD, gc=False):
    number: Natural
    keys: list[bytes]


class TurnRequest(msgspec.Struct, array_like=True, tag=TURN, gc=False):
    number: Natural
    session: bytes
    operations: list[Begin | End]


class GrantsRequest(msgspec.Struct, array_like=True, tag=GRANTS, gc=False):
    """What was granted to turns of this session that waited. Answer: a grant for each."""

    number: Natural
    session: bytes
    wait_s: WaitSeconds


class ScanRequest(msgspec.Struct, array_like=True, tag=SCAN, gc=False):
    """The next page of a scan. Answer: what was found, maybe nothing, and whether that was the last page."""

    number: Natural
    scan: bytes
    page: int
    """Counts; the same page again gets the same reply."""
    has_begun: bool
    """Whether anything was found before, so that the rest has to be of the same moment."""
    flow: str | None
    state: str | None
    after: bytes | None
    """Where a scan begins: behind this encoded key."""
    limit: Natural


class CountRequest(msgspec.Struct, array_like=True, tag=COUNT, gc=False):
    """How many records there are. Answer: a count for each flow and state."""

    number: Natural


class WatchRequest(msgspec.Struct, array_like=True, tag=WATCH, gc=False):
    """Changes after version `since`; None: none yet. Answer: changes, and the version they reach up to."""

    number: Natural
    flow: str | None
    state: str | None
    since: int | None
    wait_s: WaitSeconds


Request = (
    WriteRequest
    | ReadContent
    | ReadRecord
    | TurnRequest
    | GrantsRequest
    | ScanRequest
    | CountRequest
    | WatchRequest
)

decode_request: Callable[[bytes], Request] = msgspec.msgpack.Decoder(Request).decode

_encode = msgspec.msgpack.Encoder().encode

_UPDATE_HEADS = tuple(b"\x93\x02" + head for head in BIN8)
"""An array of three, UPDATE_DATA, and the head of a key of this length."""


def read(key: bytes) -> bytes:
    """An operation of a read request. `key`, here and below, is an encoded one."""
    length = len(key)
    return BIN8[length] + key if length < len(BIN8) else fitting(_encode(key))


def set_record(
    key: bytes,
    flow: str | None,
    state: str | None,
    data: bytes,
    expected_version: int | None,
    *,
    ttl_ms: int | None = None,
) -> bytes:
    """`data`, here and below, is an encoded map."""
    return fitting(_encode((SET_RECORD, key, flow, state, msgspec.Raw(data), expected_version, ttl_ms)))


def set_data(key: bytes, data: bytes, expected_version: int | None, ttl_ms: int | None = None) -> bytes:
    return _encode((SET_DATA, key, msgspec.Raw(data), expected_version, ttl_ms))


def enter_state(key: bytes, front: Front, expected_version: int | None, ttl_ms: int | None = None) -> bytes:
    return fitting(_encode((ENTER_STATE, key, *front, expected_version, ttl_ms)))


def update_data(key: bytes, changes: bytes, expected_version: int | None, ttl_ms: int | None = None) -> bytes:
    length = len(key)
    if expected_version is None and ttl_ms is None and length < len(_UPDATE_HEADS):
        # What the line below makes, in a third of the time.
        return _UPDATE_HEADS[length] + key + changes
    return _encode((UPDATE_DATA, key, msgspec.Raw(changes), expected_version, ttl_ms))


def clear(key: bytes, expected_version: int | None) -> bytes:
    return fitting(_encode((CLEAR, key, expected_version)))


def commit_turn(
    key: bytes,
    turn: tuple[bytes, int],
    front: Front,
    data: bytes | None,
    expected_version: int,
    *,
    ttl_ms: int | None = None,
    update_id: int | None = None,
) -> bytes:
    """`turn`: session and number; `front`: flow and state; `data` None: remove the record."""
    encoded = None if data is None else msgspec.Raw(data)
    return fitting(_encode((COMMIT_TURN, key, *turn, *front, encoded, expected_version, ttl_ms, update_id)))


def patch(
    key: bytes,
    changes: tuple[bytes, Sequence[str], bytes, bytes],
    expected_version: int | None,
    *,
    ttl_ms: int | None = None,
) -> bytes:
    """`changes`: what is set, unset, incremented and appended, as encoded maps but for the names to unset."""
    set_, unset, increment, append = changes
    maps = (msgspec.Raw(set_), unset, msgspec.Raw(increment), msgspec.Raw(append))
    return fitting(_encode((PATCH, key, *maps, expected_version, ttl_ms)))


def transact(operations: Sequence[bytes]) -> bytes:
    return fitting(_encode((TRANSACT, [msgspec.Raw(operation) for operation in operations])))


def begin_turn(turn: int, key: bytes) -> bytes:
    """An operation of a turn request, as the next."""
    return fitting(_encode((BEGIN, turn, key)))


def end_turn(turn: int) -> bytes:
    return _encode((END, turn))


def ends_turn(operation: bytes) -> bool:
    """Whether this operation of a turn request is an end."""
    return operation[1] == END


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


def turn_request(number: int, operations: Sequence[bytes], session: bytes) -> bytes:
    """A whole frame, as `write_request`."""
    body = b"".join(
        (
            b"\x94\x03\xcf",
            number.to_bytes(8, "big"),
            b"\xc4\x10",
            session,
            b"\xdd",
            len(operations).to_bytes(4, "big"),
            *operations,
        )
    )
    return frame(body)


def grants_request(number: int, session: bytes, wait_s: float) -> bytes:
    """A whole frame, as those below."""
    return frame(_encode((GRANTS, number, session, wait_s)))


def scan_request(
    number: int,
    scan: tuple[bytes, int, bool],
    front: Front,
    after: bytes | None,
    limit: int,
) -> bytes:
    """`scan`: its id, the page, and `has_begun`; `front`: the flow and state to be found, None for any."""
    return frame(_encode((SCAN, number, *scan, *front, after, limit)))


def count_request(number: int) -> bytes:
    return frame(_encode((COUNT, number)))


def watch_request(number: int, front: Front, since: int | None, wait_s: float) -> bytes:
    return frame(_encode((WATCH, number, *front, since, wait_s)))


def is_write(request: bytes) -> bool:
    """Whether this frame is a write request."""
    return request[5] == WRITE


def frame(body: bytes) -> bytes:
    """The body with its length in front, as it travels on a socket."""
    return len(body).to_bytes(4, "little") + body
