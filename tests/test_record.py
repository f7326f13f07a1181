"""Record: what is packed comes back from its blob, with a tail and without."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw

from fsm_ray import record
from fsm_ray.record import (
    MAX_FRONT_BYTES,
    NEVER_MS,
    NO_TAIL,
    Data,
    Packer,
    Tail,
    check_blob,
    content_of,
    deadline_of,
    encode_content,
    front_of,
    head_of,
    to_ms,
    version_of,
)

LONG = "x" * MAX_FRONT_BYTES

names = st.none() | st.sampled_from(["", "flow", "x" * 31, "x" * 32, LONG, "x" * 70_000, "имя"])
data = st.dictionaries(st.text(max_size=3), st.integers(0, 300).map(lambda n: Raw(msgspec.msgpack.encode(n))))
versions = st.integers(1, (1 << 64) - 1)
tails = st.just(NO_TAIL) | st.builds(
    Tail,
    st.lists(st.integers(0, (1 << 63) - 1), max_size=3),
    st.integers(0, NEVER_MS),
    st.integers(0, NEVER_MS),
)
records = st.tuples(names, names, data, versions, tails)


@given(st.lists(records, max_size=5))
def test_what_is_packed_comes_back_from_its_blob(
    contents: list[tuple[str | None, str | None, Data, int, Tail]],
) -> None:
    writer, reader = Packer(), Packer()
    packed = {bytes([number]): writer.pack(*content) for number, content in enumerate(contents)}
    blobs = {key: writer.blob(each) for key, each in packed.items()}
    loaded = dict(blobs)
    census = reader.pack_all(loaded)

    assert {key: reader.blob(each) for key, each in loaded.items()} == blobs
    for (flow, state, fields, version, tail), each in zip(contents, loaded.values(), strict=True):
        content = content_of(each)
        assert reader.front(head_of(each)) == (flow, state)
        assert (content.data, content.version) == (fields, version)
        assert (content.updates, content.ttl_ms, content.deadline_ms) == (list(tail[0]), *tail[1:])
        assert deadline_of(each) == tail.deadline_ms
        assert version_of(each) == version
        assert head_of(each) + reader.content(each) == each
    for (flow, state, _, version, _), blob in zip(contents, blobs.values(), strict=True):
        check_blob(blob)
        assert front_of(blob) == (flow, state, version)
    tailed = [content[4] is not NO_TAIL for content in contents]
    assert census.tailed == [key for key, has_tail in zip(packed, tailed, strict=True) if has_tail]
    ends = [content for content in contents if content[4].deadline_ms]
    assert sum(census.counts.values()) == len(ends)
    assert {reader.front(head) for head in census.counts} == {content[:2] for content in ends}


@pytest.mark.parametrize("flow", ["flow", LONG], ids=["shared", "unshared"])
class TestChanges:
    """Records with a tail lose it where `Packer` changes them: their shard does that by itself."""

    TAIL = Tail([7], 1, 2)

    def packed(self, packer: Packer, flow: str) -> bytes:
        return packer.pack(flow, "state", {"a": Raw(b"\x01"), "b": Raw(b"\x02")}, 1, self.TAIL)

    def test_merge(self, flow: str) -> None:
        packer = Packer()
        packed, content = packer.merge(self.packed(packer, flow), {"b": Raw(b"\x03"), "c": Raw(b"\x04")}, 2)
        merged = {"a": Raw(b"\x01"), "b": Raw(b"\x03"), "c": Raw(b"\x04")}

        assert content == encode_content(merged, 2)
        assert packed == packer.pack(flow, "state", merged, 2)
        assert deadline_of(packed) == NEVER_MS

    def test_replace(self, flow: str) -> None:
        packer = Packer()
        packed = packer.replace(self.packed(packer, flow), {"c": Raw(b"\x04")}, 2)

        assert packed == packer.pack(flow, "state", {"c": Raw(b"\x04")}, 2)


def test_fronts_that_come_too_late_are_kept_in_their_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "_MAX_FRONTS", 1)
    packer = Packer()
    early, late = (packer.pack(flow, None, {}, 1, Tail((), 0, 5)) for flow in ("early", "late"))

    assert [len(head_of(each)) > 2 for each in (early, late)] == [False, True]
    assert [packer.front(head_of(each)) for each in (early, late)] == [("early", None), ("late", None)]
    assert [front_of(packer.blob(each)) for each in (early, late)] == [("early", None, 1), ("late", None, 1)]
    assert [deadline_of(each) for each in (early, late)] == [5, 5]


def test_a_record_without_a_tail_is_as_short_as_it_was_before_there_were_any() -> None:
    assert encode_content({}, 1) == msgspec.msgpack.encode([{}, 1])
    assert encode_content({}, 1, Tail([7], 3, 9)) == b"".join(
        (b"\x95", msgspec.msgpack.encode({}), b"\x01", b"\x91\x07", b"\x03", b"\xcf" + bytes(7) + b"\x09")
    )


@pytest.mark.parametrize(
    ("duration_s", "ms"),
    [
        (None, NEVER_MS),
        (math.inf, NEVER_MS),
        (1e300, NEVER_MS),
        (1, 1_000),
        (0.5, 500),
        (1.001, 1_001),
        (1e-9, 1),
        (1e10, 10_000_000_000_000),
    ],
)
def test_durations_are_whole_milliseconds_and_none_is_nothing(duration_s: float | None, ms: Any) -> None:
    assert to_ms(duration_s) == ms
