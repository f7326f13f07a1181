"""Route: the shard that a key belongs to, and what is refused before anything is sent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from decimal import Decimal
from enum import Enum
from math import inf, nan
from typing import Any, NamedTuple

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fsm_ray import protocol
from fsm_ray.codec import encode_data, encode_key, slot_of
from fsm_ray.errors import (
    FrameTooLarge,
    FsmRayError,
    InvalidData,
    InvalidInput,
    InvalidKey,
    InvalidState,
    PickleNotAllowed,
    RecordTooLarge,
    UnknownBot,
)
from fsm_ray.namespace import Namespace
from fsm_ray.options import SLOTS, BotOptions
from fsm_ray.protocol import Clear, EnterState, Patch, SetData, SetRecord, Transact, UpdateData, WriteRequest
from fsm_ray.record import NEVER_MS
from fsm_ray.routing.route import Addressed, Route
from fsm_ray.state import State
from fsm_ray.stores.base import Contents
from fsm_ray.stores.memory import MemoryStore

KEYS = 100_000


class NotPlain:
    """A value that only pickle can carry."""

    def __reduce__(self) -> str:
        return "NOT_PLAIN"


NOT_PLAIN = NotPlain()


class Call(NamedTuple):
    """One method of a route, to be called with a key and with data."""

    name: str
    make: Callable[[Route, Any, Any, Any], Addressed]


READ = Call("read", lambda route, key, _, __: route.read(key))
CLEAR = Call("clear", lambda route, key, _, version: route.clear(key, version))
SET = Call("set_record", lambda route, key, data, version: route.set_record(key, state_of(data), version))
SET_DATA = Call("set_data", lambda route, key, data, version: route.set_data(key, data, version))
ENTER = Call("enter_state", lambda route, key, data, version: route.enter_state(key, ("f", "s"), version))
UPDATE = Call("update_data", lambda route, key, data, version: route.update_data(key, data, version))

PATCH = Call("patch", lambda route, key, data, version: patch(route, key, version, set_=data))
APPEND = Call("append", lambda route, key, data, version: patch(route, key, version, append=data))

WITH_DATA = [SET, SET_DATA, UPDATE, PATCH, APPEND]
WRITES = [*WITH_DATA, ENTER, CLEAR]

TIMED = [
    Call("set_record", lambda route, key, data, ttl_s: route.set_record(key, state_of(data), None, ttl_s)),
    Call("set_data", lambda route, key, data, ttl_s: route.set_data(key, data, None, ttl_s)),
    Call("enter_state", lambda route, key, data, ttl_s: route.enter_state(key, ("f", "s"), None, ttl_s)),
    Call("update_data", lambda route, key, data, ttl_s: route.update_data(key, data, None, ttl_s)),
    Call("patch", lambda route, key, data, ttl_s: patch(route, key, set_=data, ttl_s=ttl_s)),
]
"""Writes that may give a time to live; the last argument is that."""


class Name(str):
    __slots__ = ()


class NameOfEnum(str, Enum):  # noqa: UP042  # whose str() is another text
    A = "a"


def calls(*chosen: Call) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("call", chosen, ids=lambda call: call.name)


def state_of(data: Any) -> State:
    """A state with data that was never validated."""
    return State.model_construct(data=data)


def patch(
    route: Route, key: Any = (42, 7), version: Any = None, *, ttl_s: Any = None, **changes: Any
) -> Addressed:
    nothing: dict[str, Any] = {"set_": None, "unset": (), "increment": None, "append": None}
    return route.patch(key, **(nothing | changes), expected_version=version, ttl_s=ttl_s)


def route_of(**options: Any) -> Route:
    return Route("my_bot", BotOptions(**options))


def decoded(operation: bytes) -> protocol.Write:
    frame = protocol.write_request(1, [operation], b"s" * 16, is_resend=False)
    request = protocol.decode_request(frame[4:])
    assert isinstance(request, WriteRequest)
    return request.operations[0]


class TestSlots:
    """Slots are stored: should one of these fail, keys of running bots would be looked for in vain."""

    @pytest.mark.parametrize(
        ("encoded", "slot"),
        [
            (b"", 0),
            (b"a", 3651),
            (b"fsm_ray", 2694),
            (bytes(range(256)), 3187),
        ],
    )
    def test_the_slot_of_an_encoded_key_never_changes(self, encoded: bytes, slot: int) -> None:
        assert slot_of(encoded) == slot

    @pytest.mark.parametrize(
        ("key", "slot"),
        [
            ((42, 7), 3079),
            ((-1_001_234_567_890, 123_456_789), 3758),
            ("user", 1822),
            (1, 3867),
            (b"x", 4033),
            ((1, "a", None, True, 1.5), 1478),
            (("имя",), 1706),
        ],
    )
    def test_the_slot_of_a_key_never_changes(self, key: Hashable, slot: int) -> None:
        shard, _ = route_of(shards=SLOTS).read(key)

        assert shard == slot

    def test_there_are_4096_slots(self) -> None:
        assert SLOTS == 4096

    @given(st.binary())
    def test_every_key_has_a_slot(self, encoded: bytes) -> None:
        assert 0 <= slot_of(encoded) < SLOTS


class TestShards:
    @pytest.mark.parametrize("shards", [1, 2, 3, 7, 64, 1000, SLOTS])
    def test_shards_own_ranges_of_slots_of_nearly_equal_size(self, shards: int) -> None:
        route = route_of(shards=shards)
        owners: dict[int, int] = {}
        number = 0
        while len(owners) < SLOTS:
            owners[slot_of(encode_key(number))] = route.read(number)[0]
            number += 1

        in_order = [owners[slot] for slot in range(SLOTS)]
        sizes = Counter(in_order)
        assert in_order == sorted(in_order)
        assert sizes.keys() == set(range(shards))
        assert max(sizes.values()) - min(sizes.values()) <= 1

    def test_a_single_shard_gets_every_key(self) -> None:
        route = route_of(shards=1)

        assert {route.read(number)[0] for number in range(1000)} == {0}

    @calls(*WRITES)
    @pytest.mark.parametrize("shards", [1, 4, SLOTS])
    def test_reads_and_writes_of_a_key_go_to_the_same_shard(self, call: Call, shards: int) -> None:
        route = route_of(shards=shards)

        for key in range(200):
            assert call.make(route, key, {}, None)[0] == route.read(key)[0]

    @pytest.mark.parametrize("shards", [2, 3, 7, 16])
    @pytest.mark.parametrize(
        "make_key",
        [
            lambda n: n,
            lambda n: (n, n),
            lambda n: (10**9 + n,),
            lambda n: f"user:{n}",
            lambda n: (-1_001_000_000_000 - 7 * n, 5_000_000 + 13 * n),
            lambda n: (4096 * n, 65_536 * n),
            lambda n: n.to_bytes(16, "big"),
        ],
        ids=["numbers", "private chats", "users", "strings", "groups", "strides", "bytes"],
    )
    def test_keys_spread_evenly(self, make_key: Callable[[int], Hashable], shards: int) -> None:
        route = route_of(shards=shards)
        counts = Counter(route.read(make_key(n))[0] for n in range(KEYS))

        expected = KEYS / shards
        chi_square = sum((counts[shard] - expected) ** 2 / expected for shard in range(shards))
        # Random keys exceed this once in ten thousand times, with 15 degrees of freedom.
        assert chi_square < 44.3


class TestOperations:
    def test_a_read_asks_for_the_encoded_key(self) -> None:
        _, operation = route_of().read((42, 7))

        assert msgspec.msgpack.decode(operation) == encode_key((42, 7))

    def test_set_record_carries_flow_state_and_data_and_not_the_states_own_version(self) -> None:
        state = State(flow="registration", state="get_name", data={"a": 1}, version=99)
        _, operation = route_of().set_record((42, 7), state, 5)

        data = {"a": msgspec.Raw(b"\x01")}
        assert decoded(operation) == SetRecord(encode_key((42, 7)), "registration", "get_name", data, 5)

    @pytest.mark.parametrize(("call", "kind"), [(SET_DATA, SetData), (UPDATE, UpdateData)])
    def test_data_is_carried_as_it_is(self, call: Call, kind: type[SetData | UpdateData]) -> None:
        _, operation = call.make(route_of(), (42, 7), {"a": 1}, 5)

        assert decoded(operation) == kind(encode_key((42, 7)), {"a": msgspec.Raw(b"\x01")}, 5)

    def test_enter_state_carries_flow_and_state(self) -> None:
        _, operation = route_of().enter_state((42, 7), ("flow", None), 5)

        assert decoded(operation) == EnterState(encode_key((42, 7)), "flow", None, 5)

    @pytest.mark.parametrize("name", [Name("a"), NameOfEnum.A])
    def test_enter_state_takes_the_text_of_any_str_as_a_state_does(self, name: str) -> None:
        _, operation = route_of().enter_state((42, 7), (name, name), None)

        assert State(flow=name, state=name) == State(flow="a", state="a")
        assert decoded(operation) == EnterState(encode_key((42, 7)), "a", "a")

    @pytest.mark.parametrize("front", [(1, None), (None, b"a")])
    def test_a_flow_or_state_that_is_no_text_cannot_be_entered(self, front: Any) -> None:
        with pytest.raises(InvalidState, match="str or None") as caught:
            route_of().enter_state((42, 7), front, None)
        assert (caught.value.bot, caught.value.key) == ("my_bot", (42, 7))

    def test_clear_carries_the_key(self) -> None:
        _, operation = route_of().clear((42, 7), 5)

        assert decoded(operation) == Clear(encode_key((42, 7)), 5)

    @calls(*WRITES)
    @pytest.mark.parametrize("version", [None, 0, 1, (1 << 63) - 1])
    def test_the_expected_version_is_carried(self, call: Call, version: int | None) -> None:
        _, operation = call.make(route_of(), 1, {}, version)

        write = decoded(operation)
        assert not isinstance(write, Transact)
        assert write.expected_version == version

    @pytest.mark.parametrize(
        ("ttl_s", "ttl_ms"),
        [(None, None), (1, 1000), (0.25, 250), (1e-9, 1), (1e10, 10**13), (inf, NEVER_MS)],
    )
    @calls(*TIMED)
    def test_the_time_to_live_is_carried_in_milliseconds(
        self, call: Call, ttl_s: float | None, ttl_ms: int | None
    ) -> None:
        _, operation = call.make(route_of(), 1, {}, ttl_s)

        write = decoded(operation)
        assert isinstance(write, SetRecord | SetData | EnterState | UpdateData | Patch)
        assert write.ttl_ms == ttl_ms

    def test_a_patch_carries_each_of_its_parts(self) -> None:
        _, operation = patch(
            route_of(), set_={"a": None}, unset=iter("bc"), increment={"n": 1}, append={"l": True}, version=5
        )

        one, true, nil = (msgspec.Raw(each) for each in (b"\x01", b"\xc3", b"\xc0"))
        key = encode_key((42, 7))
        assert decoded(operation) == Patch(key, {"a": nil}, ["b", "c"], {"n": one}, {"l": true}, 5)

    def test_a_transaction_carries_its_operations_in_order(self) -> None:
        route = route_of()
        operations = [call.make(route, (42, 7), {"a": 1}, 5)[1] for call in WRITES]

        assert decoded(route.transact(operations)) == Transact([decoded(each) for each in operations])  # type: ignore[misc]

    def test_a_record_that_was_read_is_carried_as_it_was(self) -> None:
        data = {"set": {1, (2, 3)}, "big": 2**100}
        content = protocol.ContentView(data, 9, [1], 50, 60)
        record = protocol.RecordView("f", "s", content)

        _, operation = route_of().put_record((42, 7), record, 5, 70)

        values = msgspec.msgpack.decode(encode_data(data, allow_pickle=False), type=dict[str, msgspec.Raw])
        assert decoded(operation) == SetRecord(encode_key((42, 7)), "f", "s", values, 5, 70)

    def test_replies_are_decoded_as_the_options_say(self) -> None:
        pickled = msgspec.Raw(encode_data({"a": NOT_PLAIN}, allow_pickle=True))
        record = msgspec.msgpack.encode((None, None, (pickled, 1)))
        reply = protocol.reply(protocol.READ_RECORD, 1, [record])[4:]

        _, _, (allowed,) = route_of(allow_pickle=True).decoder.decode(reply)
        _, _, (refused,) = route_of(allow_pickle=False).decoder.decode(reply)
        assert isinstance(allowed, protocol.RecordView)
        assert isinstance(refused, PickleNotAllowed)


class TestRefusals:
    @calls(READ, *WRITES)
    @pytest.mark.parametrize("key", [[1], {"a": 1}, object(), float("nan"), "\ud800", (1, [2]), {1, 2}])
    def test_what_is_no_key_is_refused_and_named(self, call: Call, key: Any) -> None:
        with pytest.raises(InvalidKey) as refused:
            call.make(route_of(), key, {}, None)

        assert refused.value.key is key

    @pytest.mark.parametrize("state", ["get_name", None, {"state": "get_name"}, State, 1, ("flow", "state")])
    def test_what_is_no_state_is_refused_with_the_cure_bot_and_key(self, state: Any) -> None:
        with pytest.raises(InvalidState, match=r"State\(state=") as refused:
            route_of().set_record((42, 7), state, None)

        assert (refused.value.bot, refused.value.key) == ("my_bot", (42, 7))

    @calls(SET, SET_DATA, UPDATE)
    def test_none_is_no_data(self, call: Call) -> None:
        with pytest.raises(InvalidData):
            call.make(route_of(), (42, 7), None, None)

    @calls(*WITH_DATA)
    @pytest.mark.parametrize("data", ["text", 1, [("a", 1)], {1: 2}, {None: 1}, {"a": (each for each in "")}])
    def test_what_is_no_data_is_refused(self, call: Call, data: Any) -> None:
        with pytest.raises(InvalidData):
            call.make(route_of(), (42, 7), data, None)

    @calls(*WITH_DATA)
    def test_what_only_pickle_can_carry_is_refused_where_the_bot_does_not_allow_it(self, call: Call) -> None:
        with pytest.raises(PickleNotAllowed):
            call.make(route_of(allow_pickle=False), (42, 7), {"a": NOT_PLAIN}, None)

        assert call.make(route_of(allow_pickle=True), (42, 7), {"a": NOT_PLAIN}, None)

    @calls(*WRITES)
    @pytest.mark.parametrize("version", [-1, 1 << 63, 1.0, "1", True, False, b"1", (1,)])
    def test_what_is_no_version_is_refused(self, call: Call, version: Any) -> None:
        with pytest.raises(InvalidInput, match="expected_version") as refused:
            call.make(route_of(), (42, 7), {}, version)

        assert type(refused.value) is InvalidInput

    @calls(*WITH_DATA)
    def test_an_operation_that_no_record_could_hold_is_refused_before_it_is_sent(self, call: Call) -> None:
        with pytest.raises(RecordTooLarge) as refused:
            call.make(route_of(max_record_bytes=1000), (42, 7), {"a": "x" * 1000}, None)

        assert refused.value.bot == "my_bot"
        assert refused.value.max_record_bytes == 1000
        assert refused.value.size_bytes is not None
        assert refused.value.size_bytes > 1000

    @calls(*WITH_DATA)
    @pytest.mark.parametrize("is_conditional", [False, True])
    @pytest.mark.parametrize("version", [2, 1 << 50])
    def test_an_operation_that_its_shard_would_accept_is_sent(
        self,
        call: Call,
        version: int,
        is_conditional: bool,  # noqa: FBT001
    ) -> None:
        expected_version = version if is_conditional else None
        unlimited = route_of()
        length = 1000
        while not self.is_accepted(
            call.make(unlimited, "ann", {"a": "x" * length}, expected_version)[1], version
        ):
            length -= 1

        assert call.make(route_of(max_record_bytes=1000), "ann", {"a": "x" * length}, expected_version)

    def is_accepted(self, operation: bytes, version: int) -> bool:
        """Whether a shard of 1,000 bytes a record accepts it, in the place of a record of this version."""
        options = BotOptions(max_record_bytes=1000)
        namespace = Namespace("my_bot", options, MemoryStore(), Contents(version=version - 1))
        replies: list[bytes] = []
        first = route_of().set_data("ann", {}, None)[1]
        for number, each in enumerate([first, operation], start=1):
            frame = protocol.write_request(number, [each], b"s" * 16, is_resend=False)
            reply = namespace.handle(frame[4:], replies.append)
            replies += [reply] if reply else []
        _, _, (result,) = route_of().decoder.decode(replies[-1][4:])
        return not isinstance(result, dict)

    @calls(READ, CLEAR)
    def test_a_record_of_any_size_can_be_read_and_cleared(self, call: Call) -> None:
        shard, operation = call.make(route_of(max_record_bytes=256), "k" * 10_000, {}, None)

        assert shard == 0
        assert len(operation) > 10_000

    @pytest.mark.parametrize(
        "ttl_s", [0, -1, -0.0, nan, -inf, 1.1e10, 10**400, True, False, "60", b"60", (1,), 1j]
    )
    @calls(*TIMED)
    def test_what_is_no_time_to_live_is_refused_with_the_cure(self, call: Call, ttl_s: Any) -> None:
        with pytest.raises(InvalidInput, match=r"ttl_s .* seconds, .*math\.inf") as refused:
            call.make(route_of(), (42, 7), {}, ttl_s)

        assert (refused.value.bot, refused.value.key) == ("my_bot", (42, 7))

    @pytest.mark.parametrize(
        "changes",
        [
            {"set_": {"a": 1}, "unset": ["a"]},
            {"set_": {"a": 1}, "increment": {"a": 1}},
            {"set_": {"a": 1}, "append": {"a": 1}},
            {"unset": ["b", "a"], "increment": {"a": 1}},
            {"unset": {"a"}, "append": {"a": 1}},
            {"increment": {"b": 1, "a": 1}, "append": {"a": 1}},
        ],
    )
    def test_a_field_that_a_patch_names_twice_is_refused_and_named(self, changes: Any) -> None:
        with pytest.raises(InvalidData, match=r"'a' in \w+ and in \w+"):
            patch(route_of(), **changes)

    @pytest.mark.parametrize("amount", [True, None, "1", b"1", [1], 1j, Decimal(1)])
    def test_an_increment_by_what_is_no_number_is_refused(self, amount: Any) -> None:
        with pytest.raises(InvalidData, match="'n' by"):
            patch(route_of(), increment={"n": amount})

    @pytest.mark.parametrize("amount", [0, -1, 2**64, -(2**1000), 0.5, nan, inf])
    def test_an_increment_by_any_number_is_sent(self, amount: float) -> None:
        _, operation = patch(route_of(), increment={"n": amount})

        write = decoded(operation)
        assert isinstance(write, Patch)
        assert write.increment == msgspec.msgpack.decode(
            encode_data({"n": amount}, allow_pickle=False), type=dict[str, msgspec.Raw]
        )

    def test_an_increment_that_is_larger_than_a_record_is_sent(self) -> None:
        assert patch(route_of(max_record_bytes=1000), increment={"n": -(2**10_000)})

    @pytest.mark.parametrize("unset", ["name", b"name", None, 1, [1], ["a", None], [["a"]], ["\ud800"]])
    def test_what_is_no_names_of_fields_is_refused(self, unset: Any) -> None:
        with pytest.raises(InvalidData):
            patch(route_of(), unset=unset)

    def test_a_transaction_that_no_frame_can_hold_is_refused_with_the_cure(self) -> None:
        operation = route_of().update_data("ann", {"a": "x" * (1 << 19)}, None)[1]

        with pytest.raises(FrameTooLarge, match="several transactions") as refused:
            route_of().transact([operation] * 64)

        assert refused.value.bot == "my_bot"

    REFUSED: Sequence[tuple[str, type[FsmRayError], Callable[[Route], Addressed]]] = [
        ("no data", InvalidData, lambda route: UPDATE.make(route, (42, 7), None, None)),
        (
            "no encodable value",
            InvalidData,
            lambda route: UPDATE.make(route, (42, 7), {"a": "\ud800"}, None),
        ),
        ("pickle", PickleNotAllowed, lambda route: UPDATE.make(route, (42, 7), {"a": NOT_PLAIN}, None)),
        ("too large", RecordTooLarge, lambda route: UPDATE.make(route, (42, 7), {"a": "x" * 1000}, None)),
        ("no version", InvalidInput, lambda route: UPDATE.make(route, (42, 7), {}, -1)),
    ]

    @pytest.mark.parametrize(
        ("kind", "call"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED]
    )
    def test_every_refusal_names_bot_and_key(
        self, kind: type[FsmRayError], call: Callable[[Route], Addressed]
    ) -> None:
        with pytest.raises(kind) as refused:
            call(route_of(allow_pickle=False, max_record_bytes=500))

        assert (refused.value.bot, refused.value.key) == ("my_bot", (42, 7))

    @pytest.mark.parametrize(
        "call",
        [
            lambda route: route.read("k" * (33 << 20)),
            lambda route: route.clear("k" * (33 << 20), None),
            lambda route: route.set_record("ann", State(flow="f" * (33 << 20)), None),
        ],
        ids=["read", "clear", "set_record"],
    )
    def test_what_no_frame_can_hold_is_refused_before_it_is_sent(
        self, call: Callable[[Route], Addressed]
    ) -> None:
        with pytest.raises(FrameTooLarge, match="nothing was sent"):
            call(route_of())


class TestOtherOptions:
    def test_a_shard_of_the_same_options_is_accepted(self) -> None:
        route_of(shards=4).check_options(BotOptions(shards=4))

    def test_a_shard_of_other_options_is_of_another_bot(self) -> None:
        with pytest.raises(UnknownBot) as refused:
            route_of(shards=4).check_options(BotOptions(shards=8))

        assert refused.value.bot == "my_bot"
