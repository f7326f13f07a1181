"""Protocol: the operations on a shard, and the frames that carry them."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fsm_ray import errors, protocol
from fsm_ray.codec import encode_data, encode_key, extension_hook
from fsm_ray.errors import FsmRayError, PickleNotAllowed, ValueNotDecodable
from fsm_ray.protocol import (
    READ_CONTENT,
    READ_RECORD,
    WRITE,
    Clear,
    ContentView,
    EnterState,
    ReadContent,
    ReadRecord,
    RecordView,
    ReplyDecoder,
    SetData,
    SetRecord,
    UpdateData,
    WriteRequest,
)

SESSION = b"0123456789abcdef"
KEY = encode_key((42, 7))
DATA = encode_data({"name": "Ann", "age": 7, "tags": {"a", "b"}}, allow_pickle=False)
RAW_DATA: dict[str, msgspec.Raw] = msgspec.msgpack.decode(DATA, type=dict[str, msgspec.Raw])

NAMES = [None, "", "registration", "имя", "x" * 300]
NUMBERS = [0, 1, 127, 128, 1 << 32, (1 << 64) - 1]
EXPECTED_VERSIONS = [None, 0, 1, 127, 128, (1 << 63) - 1]


@dataclass(frozen=True)
class Chat:
    """A key's class; a test makes it vanish."""

    number: int


@pytest.fixture
def decoder() -> ReplyDecoder:
    return ReplyDecoder(extension_hook(allow_pickle=True))


def written(operation: bytes) -> protocol.Write:
    """The operation as a shard decodes it."""
    request = request_in(protocol.write_request(1, [operation], SESSION, is_resend=False))
    assert isinstance(request, WriteRequest)
    (decoded,) = request.operations
    return decoded


Request = ReadContent | ReadRecord | WriteRequest


def request_in(frame: bytes) -> Request:
    request = protocol.decode_request(body_of(frame))
    assert isinstance(request, Request)
    return request


def body_of(frame: bytes) -> bytes:
    """What follows the length, which must be right."""
    assert int.from_bytes(frame[:4], "little") == len(frame) - 4
    return frame[4:]


def record(value: bytes) -> bytes:
    """A record with this encoded value as its only field."""
    return msgspec.msgpack.encode(("flow", "state", ({"field": msgspec.Raw(value)}, 1)))


def view(flow: str | None, state: str | None, data: dict[str, Any], version: int) -> RecordView:
    return RecordView(flow, state, ContentView(data, version))


class TestOperations:
    @pytest.mark.parametrize("expected_version", EXPECTED_VERSIONS)
    @pytest.mark.parametrize("name", NAMES)
    def test_set_record_carries_all_it_was_given(
        self, name: str | None, expected_version: int | None
    ) -> None:
        operation = written(protocol.set_record(KEY, name, name, DATA, expected_version))

        assert operation == SetRecord(KEY, name, name, RAW_DATA, expected_version)

    def test_set_record_does_not_mix_up_flow_and_state(self) -> None:
        operation = written(protocol.set_record(KEY, "flow", "state", DATA, None))

        assert isinstance(operation, SetRecord)
        assert (operation.flow, operation.state) == ("flow", "state")

    @pytest.mark.parametrize("expected_version", EXPECTED_VERSIONS)
    def test_set_data_carries_all_it_was_given(self, expected_version: int | None) -> None:
        operation = written(protocol.set_data(KEY, DATA, expected_version))

        assert operation == SetData(KEY, RAW_DATA, expected_version)

    @pytest.mark.parametrize("expected_version", EXPECTED_VERSIONS)
    def test_enter_state_carries_all_it_was_given(self, expected_version: int | None) -> None:
        operation = written(protocol.enter_state(KEY, ("flow", "state"), expected_version, 5))

        assert operation == EnterState(KEY, "flow", "state", expected_version, 5)

    @pytest.mark.parametrize("expected_version", EXPECTED_VERSIONS)
    def test_update_data_carries_all_it_was_given(self, expected_version: int | None) -> None:
        operation = written(protocol.update_data(KEY, DATA, expected_version))

        assert operation == UpdateData(KEY, RAW_DATA, expected_version)

    @pytest.mark.parametrize("expected_version", EXPECTED_VERSIONS)
    def test_clear_carries_all_it_was_given(self, expected_version: int | None) -> None:
        assert written(protocol.clear(KEY, expected_version)) == Clear(KEY, expected_version)

    @pytest.mark.parametrize("size", [0, 1, 31, 255, 256, 65_535, 65_536])
    def test_keys_of_any_length_arrive_whole(self, size: int) -> None:
        key = b"k" * size

        assert written(protocol.clear(key, None)) == Clear(key, None)
        assert written(protocol.update_data(key, DATA, None)) == UpdateData(key, RAW_DATA, None)
        assert request_in(protocol.read_request(READ_CONTENT, 1, [protocol.read(key)])) == ReadContent(
            1, [key]
        )

    def test_values_travel_as_the_bytes_that_the_codec_made(self) -> None:
        operation = written(protocol.set_data(KEY, DATA, None))

        assert isinstance(operation, SetData)
        decoded = {
            name: msgspec.msgpack.decode(value, ext_hook=extension_hook(allow_pickle=False))
            for name, value in operation.data.items()
        }
        assert decoded == {"name": "Ann", "age": 7, "tags": {"a", "b"}}


class TestFrames:
    """The layouts that the module's docstring promises: another client could be written from it."""

    @pytest.mark.parametrize("kind", [READ_CONTENT, READ_RECORD])
    @pytest.mark.parametrize("number", NUMBERS)
    def test_a_read_request_is_its_kind_its_number_and_its_keys(self, number: int, kind: int) -> None:
        frame = protocol.read_request(kind, number, [protocol.read(b"a"), protocol.read(b"b")])

        assert msgspec.msgpack.decode(body_of(frame)) == [kind, number, [b"a", b"b"]]

    @pytest.mark.parametrize("is_resend", [False, True])
    @pytest.mark.parametrize("number", NUMBERS)
    def test_a_write_request_is_its_kind_its_number_its_session_its_repetition_and_its_operations(
        self,
        number: int,
        is_resend: bool,  # noqa: FBT001
    ) -> None:
        operations = [protocol.clear(b"a", None), protocol.clear(b"b", 5)]
        frame = protocol.write_request(number, operations, SESSION, is_resend=is_resend)

        assert msgspec.msgpack.decode(body_of(frame)) == [
            0,
            number,
            SESSION,
            is_resend,
            [[3, b"a", None], [3, b"b", 5]],
        ]

    @pytest.mark.parametrize("kind", [WRITE, READ_CONTENT, READ_RECORD])
    @pytest.mark.parametrize("number", NUMBERS)
    def test_a_reply_is_the_kind_of_its_request_its_number_and_its_results(
        self, number: int, kind: int
    ) -> None:
        results = [protocol.encode_result(7), protocol.encode_result(value=True), protocol.NIL]
        frame = protocol.reply(kind, number, results)

        assert msgspec.msgpack.decode(body_of(frame)) == [kind, number, [7, True, None]]

    def test_the_kinds_are_those_of_the_layouts(self) -> None:
        assert (WRITE, READ_CONTENT, READ_RECORD) == (0, 1, 2)

    @pytest.mark.parametrize("count", [0, 1, 15, 16, 1024, 70_000])
    def test_any_number_of_operations_keeps_its_order(self, count: int) -> None:
        keys = [b"%d" % number for number in range(count)]
        read = protocol.read_request(READ_RECORD, 1, [protocol.read(key) for key in keys])
        write = protocol.write_request(
            1, [protocol.clear(key, None) for key in keys], SESSION, is_resend=False
        )

        assert request_in(read) == ReadRecord(1, keys)
        assert request_in(write) == WriteRequest(1, SESSION, False, [Clear(key) for key in keys])  # noqa: FBT003

    @pytest.mark.parametrize("size", [0, 1, 255, 256, 65_536])
    def test_a_frame_is_a_length_in_four_little_endian_bytes_and_the_body(self, size: int) -> None:
        frame = protocol.frame(b"x" * size)

        assert frame == size.to_bytes(4, "little") + b"x" * size

    def test_fields_that_a_later_version_adds_at_the_end_are_ignored(self) -> None:
        body = msgspec.msgpack.encode([READ_RECORD, 1, [b"a"], "more"])

        assert protocol.decode_request(body) == ReadRecord(1, [b"a"])


class TestMalformedRequests:
    """`Namespace.handle` turns these errors, and no others, into MalformedRequest."""

    EXPECTED = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError)

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"\xc1",
            b"\x90",
            b"\x93\x07\x01\x90",  # no such kind
            b"\x93\x01\x01\xdd\xff\xff\xff\xff",  # four billion keys are announced
            b"\x93\x01\x01\x91\xc6\xff\xff\xff\xff",  # a key of four gigabytes is announced
            b"\x93\x01\x01\x90\x00",  # a byte too many
            b"\x93\x01\xc0\x90",  # no number
            b"\x95\x00\x01\xc4\x01s\xc2\x91\x93\x09\xc4\x01k\x80",  # no such operation
            b"\x95\x00\x01\xc4\x01s\xc2\x91\x93\x01\xc4\x01k\x81\xa1\xff\x01",  # a name that is no UTF-8
            b"\x95\x00\x01\xc4\x01s\xc2\x91\x93\x01\xc4\x01k\x81\xa1a" + b"\x91" * 100_000 + b"\xc0",
        ],
    )
    def test_what_is_no_request_is_refused(self, body: bytes) -> None:
        with pytest.raises(self.EXPECTED):
            protocol.decode_request(body)

    @given(st.binary(max_size=200))
    def test_random_bytes_are_refused_or_decoded(self, body: bytes) -> None:
        assert self.is_refused(body) or isinstance(protocol.decode_request(body), Request)

    @given(st.data())
    def test_a_request_with_damaged_bytes_is_refused_or_decoded(self, data: st.DataObject) -> None:
        operations = [
            protocol.set_record(KEY, "flow", "state", DATA, 5),
            protocol.update_data(KEY, DATA, None),
            protocol.clear(KEY, None),
        ]
        body = bytearray(protocol.write_request(1, operations, SESSION, is_resend=False)[4:])
        for _ in range(data.draw(st.integers(1, 4))):
            body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
        cut = bytes(body[: data.draw(st.integers(0, len(body)))])

        assert self.is_refused(cut) or isinstance(protocol.decode_request(cut), Request)

    def is_refused(self, body: bytes) -> bool:
        try:
            protocol.decode_request(body)
        except self.EXPECTED:
            return True
        return False


KINDS = [
    value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, FsmRayError)
]


def travelled(error: FsmRayError, key: bytes | None = None) -> FsmRayError:
    """The error as the client gets it."""
    result: dict[str, Any] = msgspec.msgpack.decode(protocol.encode_error(error, key))
    return protocol.decode_error(result)


class TestErrors:
    @pytest.mark.parametrize("kind", KINDS)
    def test_an_error_arrives_as_it_left(self, kind: type[FsmRayError]) -> None:
        error = travelled(kind("what went wrong: ä", bot="my_bot"))

        assert (type(error), str(error), vars(error)) == (kind, "what went wrong: ä", {"bot": "my_bot"})

    def test_an_error_arrives_with_its_facts(self) -> None:
        error = travelled(errors.VersionConflict("conflict", expected_version=3, actual_version=None))

        assert isinstance(error, errors.VersionConflict)
        assert vars(error) == {"expected_version": 3, "actual_version": None}

    @pytest.mark.parametrize(
        "key", [(42, 7), "user", 0, False, b"", (), ("имя", None, 1.5, 1 << 80), Chat(1)]
    )
    def test_the_key_arrives_as_the_caller_gave_it(self, key: Any) -> None:
        error = travelled(FsmRayError("what went wrong"), encode_key(key))

        assert (type(error.key), error.key) == (type(key), key)

    def test_without_a_key_there_is_none(self) -> None:
        assert "key" not in vars(travelled(FsmRayError("what went wrong")))

    def test_a_key_that_cannot_be_decoded_here_does_not_hide_what_went_wrong(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        key = encode_key(Chat(1))
        monkeypatch.delitem(globals(), "Chat")

        error = travelled(errors.RecordTooLarge("too large", size_bytes=9), key)

        assert isinstance(error, errors.RecordTooLarge)
        assert (str(error), error.size_bytes, encode_key(error.key)) == ("too large", 9, key)

    @pytest.mark.parametrize("name", ["ErrorOfTheFuture", "annotations", "Any", "__doc__", "", "a.b"])
    def test_a_class_unknown_here_becomes_the_base_with_message_and_facts(self, name: str) -> None:
        result = {"error": name, "message": "what went wrong", "facts": {"new": 1}, "key": KEY}

        error = protocol.decode_error(result)

        assert type(error) is FsmRayError
        assert (str(error), vars(error)) == ("what went wrong", {"new": 1, "key": (42, 7)})

    def test_an_error_is_a_result_of_a_reply_like_any_other(self, decoder: ReplyDecoder) -> None:
        refusal = protocol.encode_error(errors.VersionConflict("conflict", expected_version=3), KEY)
        frame = protocol.reply(WRITE, 1, [protocol.encode_result(7), refusal])

        _, _, (version, result) = decoder.decode(body_of(frame))

        assert version == 7
        assert isinstance(result, dict)
        assert vars(protocol.decode_error(result)) == {"expected_version": 3, "key": (42, 7)}


class TestErrorOf:
    def test_the_map_that_describes_an_error_becomes_it(self) -> None:
        result = msgspec.msgpack.decode(protocol.encode_error(errors.VersionConflict("conflict"), KEY))

        error = protocol.error_of(result)

        assert isinstance(error, errors.VersionConflict)
        assert error.key == (42, 7)

    def test_an_error_of_the_client_itself_stays_as_it_is(self) -> None:
        error = ValueNotDecodable("no class")

        assert protocol.error_of(error) is error

    def test_a_result_of_the_future_is_an_error(self) -> None:
        error = protocol.error_of(["something new"])  # type: ignore[arg-type]

        assert type(error) is FsmRayError
        assert "something new" in str(error)

    @pytest.mark.parametrize("result", [view(None, None, {}, 1), True, False, 0, 1 << 60, None])
    def test_every_other_kind_of_result_is_good(self, result: protocol.Result) -> None:
        assert type(result) in protocol.GOOD_RESULTS

    @pytest.mark.parametrize("result", [{}, [], "", 1.0, b"", FsmRayError("what went wrong")])
    def test_nothing_else_is_good(self, result: object) -> None:
        assert type(result) not in protocol.GOOD_RESULTS


class Unloadable:
    """Pickles, and fails to load."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return int, ("no number",)


UNDECODABLE: dict[str, bytes] = {
    "an extension code of the future": b"\xc7\x01\x63x",
    "a class that is not here": msgspec.msgpack.encode(
        msgspec.msgpack.Ext(5, msgspec.msgpack.encode(["no.such.module", "Class", {}]))
    ),
    "a pickle that fails to load": msgspec.msgpack.encode(
        msgspec.msgpack.Ext(17, pickle.dumps(Unloadable()))
    ),
    "a broken timestamp": b"\xd7\xff" + b"\xff" * 8,
    "text that is no UTF-8": b"\xa1\xff",
    "a map with a map as a key": b"\x81\x80\x01",
}


# Any value, intact or not, but for extension 17, pickle: random bytes must not be unpickled.
EXTENSIONS = st.builds(msgspec.msgpack.Ext, st.integers(0, 16) | st.integers(18, 127), st.binary(max_size=9))
SCALARS = st.none() | st.integers(-(1 << 63), (1 << 64) - 1) | st.binary(max_size=9) | st.text(max_size=9)
VALUES = st.recursive(
    SCALARS | EXTENSIONS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)


class TestReplies:
    @pytest.mark.parametrize(
        ("kind", "results", "expected"),
        [
            (READ_RECORD, [record(b"\xc7\x02\x08\x91\x01")], [view("flow", "state", {"field": {1}}, 1)]),
            (READ_CONTENT, [b"\x92\x81\xa1a\xc7\x02\x08\x91\x01\x05"], [ContentView({"a": {1}}, 5)]),
            (WRITE, [b"\x92\x81\xa1a\xc7\x02\x08\x91\x01\x05"], [ContentView({"a": {1}}, 5)]),
            (WRITE, [protocol.encode_result(1 << 60)], [1 << 60]),
            (WRITE, [protocol.encode_result(value=True), protocol.encode_result(value=False)], [True, False]),
            (READ_RECORD, [protocol.NIL], [None]),
            (READ_CONTENT, [protocol.NIL], [None]),
        ],
    )
    def test_every_kind_of_result_is_decoded(
        self, decoder: ReplyDecoder, kind: int, results: list[bytes], expected: list[Any]
    ) -> None:
        decoded_kind, number, decoded = decoder.decode(body_of(protocol.reply(kind, 9, results)))

        assert (decoded_kind, number) == (kind, 9)
        assert list(decoded) == expected
        assert [type(result) for result in decoded] == [type(result) for result in expected]

    @pytest.mark.parametrize("name", UNDECODABLE)
    def test_one_undecodable_value_fails_its_own_read_alone(self, decoder: ReplyDecoder, name: str) -> None:
        results = [record(b"\x01"), record(UNDECODABLE[name]), record(b"\x02")]
        kind, number, (first, failed, last) = decoder.decode(body_of(protocol.reply(READ_RECORD, 9, results)))

        assert (kind, number) == (READ_RECORD, 9)
        assert isinstance(failed, ValueNotDecodable)
        assert first == view("flow", "state", {"field": 1}, 1)
        assert last == view("flow", "state", {"field": 2}, 1)

    @pytest.mark.parametrize("kind", [WRITE, READ_CONTENT])
    @pytest.mark.parametrize("name", UNDECODABLE)
    def test_one_undecodable_value_fails_its_own_operation_alone(
        self, decoder: ReplyDecoder, name: str, kind: int
    ) -> None:
        values = [b"\x01", UNDECODABLE[name], b"\x02"]
        results = [msgspec.msgpack.encode(({"field": msgspec.Raw(value)}, 1)) for value in values]
        replied, number, (first, failed, last) = decoder.decode(body_of(protocol.reply(kind, 9, results)))

        assert (replied, number) == (kind, 9)
        assert isinstance(failed, ValueNotDecodable)
        assert (first, last) == (ContentView({"field": 1}, 1), ContentView({"field": 2}, 1))

    def test_a_pickled_value_fails_its_own_operation_where_pickle_is_not_allowed(self) -> None:
        decoder = ReplyDecoder(extension_hook(allow_pickle=False))
        pickled = msgspec.msgpack.encode(msgspec.msgpack.Ext(17, pickle.dumps(1)))
        frame = protocol.reply(READ_RECORD, 9, [record(pickled), record(b"\x02")])

        _, _, (failed, last) = decoder.decode(body_of(frame))

        assert isinstance(failed, PickleNotAllowed)
        assert last == view("flow", "state", {"field": 2}, 1)

    def test_several_undecodable_values_fail_each_for_its_own_reason(self, decoder: ReplyDecoder) -> None:
        results = [record(UNDECODABLE["an extension code of the future"])]
        results += [record(UNDECODABLE["a class that is not here"])]

        _, _, (first, second) = decoder.decode(body_of(protocol.reply(READ_RECORD, 9, results)))

        assert "99" in str(first)
        assert "no.such.module" in str(second)

    def test_a_reply_without_results_is_decoded(self, decoder: ReplyDecoder) -> None:
        _, number, results = decoder.decode(body_of(protocol.reply(READ_RECORD, 9, [])))

        assert (number, list(results)) == (9, [])

    @given(VALUES)
    def test_whatever_a_value_is_the_operations_beside_it_are_answered(self, value: Any) -> None:
        decoder = ReplyDecoder(extension_hook(allow_pickle=False))
        results = [record(msgspec.msgpack.encode(value)), record(b"\x02")]

        _, _, (first, last) = decoder.decode(body_of(protocol.reply(READ_RECORD, 9, results)))

        assert isinstance(first, RecordView | ValueNotDecodable)
        assert last == view("flow", "state", {"field": 2}, 1)
