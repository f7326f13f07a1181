"""What the kits commit to a store, and what they must then find in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import msgspec

from fsm_ray.record import Packer
from fsm_ray.stores.base import Answered, Batch, Contents

PAGES = 16
"""Records of 1 KiB that each numbered batch replaces, so that it is more than one page or packet."""

_MAX_FAULTS = 8
_SHOWN = 60


def make_blob(
    flow: str | None = None, state: str | None = None, version: int = 1, *, padding_bytes: int = 0
) -> bytes:
    """A record as a namespace gives it to its store."""
    data = {"padding": msgspec.Raw(msgspec.msgpack.encode(bytes(padding_bytes)))}
    packer = Packer()
    return packer.blob(packer.pack(flow, state, data, version))


def numbered_batch(number: int, writer: str = "") -> Batch:
    """Says the number in all that it changes: any mixture of two of them, or a half of one, can be told.

    It makes a record that stays, replaces others, and makes a record and a session that the next one clears.
    """
    record = make_blob(writer, str(number), number)
    page = make_blob(writer, str(number), number, padding_bytes=1024)
    answered = Answered(number, str(number).encode(), float(number))
    return Batch(
        version=number,
        records={
            b"number %d" % number: record,
            b"last": record,
            b"only %d" % number: record,
            b"only %d" % (number - 1): None,
            **{b"page %d" % index: page for index in range(PAGES)},
        },
        sessions={b"last": answered, b"only %d" % number: answered},
        forgotten=[b"only %d" % (number - 1)],
    )


def kept_of(batches: Iterable[Batch], version: int = 0) -> Contents:
    """What a store holds that began empty, at this version, and kept these batches."""
    records: dict[bytes, bytes | None] = {}
    sessions: dict[bytes, Answered] = {}
    for batch in batches:
        version = batch.version
        records.update(batch.records)
        sessions.update(batch.sessions)
        for session in batch.forgotten:
            sessions.pop(session, None)
    return Contents(version, {key: blob for key, blob in records.items() if blob is not None}, sessions)


def assert_kept(found: Contents, batches: Iterable[Batch], version: int = 0) -> None:
    """Fail, and name some of the differences, unless that is `kept_of` the batches."""
    expected = kept_of(batches, version)
    faults = (
        [] if found.version == expected.version else [f"version is {found.version}, not {expected.version}"]
    )
    faults += _faults("record", found.records, expected.records)
    faults += _faults("session", found.sessions, expected.sessions)
    if faults:
        more = f"\nand {len(faults) - _MAX_FAULTS} more" if len(faults) > _MAX_FAULTS else ""
        raise AssertionError("the store holds something else:\n" + "\n".join(faults[:_MAX_FAULTS]) + more)


def _faults(kind: str, found: Mapping[bytes, object], expected: Mapping[bytes, object]) -> Iterator[str]:
    for key in sorted(found.keys() | expected.keys()):
        if key not in expected:
            yield f"{kind} {_short(key)} should be gone"
        elif key not in found:
            yield f"{kind} {_short(key)} is missing"
        elif found[key] != expected[key]:
            yield f"{kind} {_short(key)} is {_short(found[key])}, not {_short(expected[key])}"


def _short(value: object) -> str:
    whole = repr(value)
    return whole if len(whole) <= _SHOWN else f"{whole[:_SHOWN]}..."
