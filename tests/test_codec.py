"""Keys and values survive the way to bytes and back, exactly, or an error says why not."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from enum import Enum, Flag, IntEnum, IntFlag, StrEnum, auto
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, Generic, NamedTuple, TypeVar
from zoneinfo import ZoneInfo

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.msgpack import Ext
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, RootModel

from fsm_ray.codec import EncodedKey, decode_key, decode_plain_key, encode_data, encode_key, extension_hook
from fsm_ray.errors import InvalidData, InvalidKey, PickleNotAllowed, ValueNotDecodable

T = TypeVar("T")
DATACLASS_CODE, PICKLE_CODE = 5, 17


class Color(Enum):
    RED = auto()
    GREEN = "1"
    BLUE = RED  # an alias


class Step(StrEnum):
    NAME = "name"
    EMAIL = "email"


class Priority(IntEnum):
    LOW = 1
    HIGH = 2


class Right(Flag):
    READ = 1
    WRITE = 2
    BOTH = 3


class Bits(IntFlag):
    LOW = 1
    HUGE = 1 << 70


class Pair(NamedTuple):
    left: Any
    right: Any = None


class OtherPair(NamedTuple):
    left: Any
    right: Any = None


Loose = collections.namedtuple("Loose", "left right")  # noqa: PYI024 - the untyped kind is the subject


class Named(Loose):
    """A named tuple with methods, and with a __dict__ for want of __slots__."""


@dataclasses.dataclass(frozen=True)
class Chat:
    bot: Any
    user: Any = None


@dataclasses.dataclass(frozen=True, slots=True)
class Seat:
    bot: Any
    user: Any = None


@dataclasses.dataclass
class Order:
    items: Any
    note: Any = dataclasses.field(default_factory=list)
    total: int = dataclasses.field(init=False, default=3)

    def __post_init__(self) -> None:
        if self.note == "refused":
            pytest.fail("__post_init__ ran")

    @functools.cached_property
    def size(self) -> int:
        return 17


@dataclasses.dataclass
class Box(Generic[T]):
    inside: T


class Profile(BaseModel):
    model_config = ConfigDict(extra="allow")

    name: Any
    tags: Any = ()
    _secret: Any = PrivateAttr(default=None)


class Sealed(BaseModel):
    model_config = ConfigDict(frozen=True)

    age: int = Field(default=0, lt=200)


class Names(RootModel[list[str]]):
    pass


class Plain:
    """What only pickle can carry."""

    def __init__(self, content: Any) -> None:
        self.content = content

    def __eq__(self, other: object) -> bool:
        return type(other) is Plain and other.content == self.content

    def __hash__(self) -> int:
        return hash(self.content)


@dataclasses.dataclass
class Guarded:
    """A dataclass with its own idea of what is its state."""

    content: Any
    lock: Any = dataclasses.field(default_factory=threading.Lock)

    def __getstate__(self) -> dict[str, Any]:
        return {"content": self.content}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.content = state["content"]
        self.lock = "made again"


@dataclasses.dataclass(frozen=True)
class Uncompared:
    bot: int
    note: str = dataclasses.field(default="", compare=False)


@dataclasses.dataclass
class DictWithField(dict[str, int]):
    field: Any


@dataclasses.dataclass(frozen=True)
class TextWithField(str):
    __slots__ = ("field",)
    field: Any


class Text(str):
    __slots__ = ()


class Number(int):
    pass


def decode(encoded: bytes | msgspec.Raw, *, allow_pickle: bool = True) -> Any:
    return msgspec.msgpack.Decoder(ext_hook=extension_hook(allow_pickle=allow_pickle)).decode(encoded)


def round_trip(value: Any, *, allow_pickle: bool = False) -> Any:
    encoded = bytes(encode_data({"field": value}, allow_pickle=allow_pickle))
    return decode(encoded, allow_pickle=allow_pickle)["field"]


def identity(value: Any) -> Any:  # noqa: PLR0911 - one for each kind
    """A hashable that is equal for exactly the same values of exactly the same types, at every level."""
    cls = type(value)
    if isinstance(value, Enum):
        return cls, "member", value._name_, repr(value._value_)
    if isinstance(value, tuple | list):
        return cls, tuple(map(identity, value))
    if isinstance(value, set | frozenset):
        return cls, frozenset(map(identity, value))
    if isinstance(value, dict):
        return cls, tuple((identity(key), identity(item)) for key, item in value.items())
    if isinstance(value, BaseModel):
        return cls, identity(value.__getstate__())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        skipped = {*names, "__orig_class__"}  # which Box[int](1) leaves and is not kept
        extra = {name: item for name, item in getattr(value, "__dict__", {}).items() if name not in skipped}
        return cls, tuple(identity(getattr(value, name)) for name in names), identity(extra)
    if isinstance(value, datetime | time):
        return cls, repr(value.replace(tzinfo=None)), value.fold, type(value.tzinfo), repr(value.tzinfo)
    if isinstance(value, bytearray):
        return cls, bytes(value)
    if isinstance(value, Plain):
        return cls, identity(value.content)
    return cls, repr(value)


def key_identity(key: Any) -> Any:
    """Like `identity`, but for keys -0.0 is 0.0."""
    if type(key) is float:
        return float, key + 0.0
    if isinstance(key, tuple):
        return type(key), tuple(map(key_identity, key))
    if isinstance(key, Chat | Seat):
        return type(key), key_identity(key.bot), key_identity(key.user)
    return identity(key)


members = st.sampled_from(
    [
        *Color,
        *Step,
        *Priority,
        *Right,
        Right.READ | Right.WRITE,
        Right(0),
        *Bits,
        Bits.LOW | Bits.HUGE,
        Bits(-1),
    ]
)
integers = (
    st.integers() | st.integers(-3, 3) | st.sampled_from([2**63 - 1, 2**63, -(2**63) - 1, 2**64 - 1, 2**64])
)
key_scalars = (
    st.none()
    | st.booleans()
    | integers
    | st.floats(allow_nan=False)
    | st.sampled_from(["", "1", "name", b"", b"1", 0.0, -0.0, 1.0, uuid.UUID(int=1)])
    | st.text()
    | st.binary()
    | members
    | st.uuids()
)


def compounds(parts: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(parts, max_size=3).map(tuple) | st.one_of(
        [st.builds(cls, parts, parts) for cls in (Pair, OtherPair, Loose, Named, Chat, Seat)]
    )


keys = st.recursive(key_scalars, compounds, max_leaves=6)

zones: st.SearchStrategy[tzinfo | None] = (
    st.none()
    | st.just(UTC)
    | st.builds(timezone, st.timedeltas(timedelta(hours=-23), timedelta(hours=23)))
    | st.builds(timezone, st.timedeltas(timedelta(hours=-23), timedelta(hours=23)), st.text(max_size=3))
    | st.sampled_from([ZoneInfo("Europe/Berlin"), ZoneInfo("America/New_York"), ZoneInfo("UTC")])
)


def clocks(moments: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.builds(
        lambda moment, zone, fold: moment.replace(tzinfo=zone, fold=fold), moments, zones, st.integers(0, 1)
    )


value_scalars = (
    key_scalars
    | st.floats()
    | st.dates()
    | st.timedeltas()
    | st.decimals()
    | st.sampled_from([Decimal("-0"), Decimal("1.10"), Decimal("sNaN12"), Decimal("1e-999999")])
    | clocks(st.datetimes())
    | clocks(st.times())
    | st.binary().map(bytearray)
    | st.builds(Sealed, age=st.integers(0, 9))
    | st.builds(Names, st.lists(st.text(max_size=2), max_size=2))
)


def profile(name: Any, tags: Any, secret: Any, extra: dict[str, Any]) -> Profile:
    made = Profile(name=name, **({"tags": tags} if tags else {}), **extra)
    made._secret = secret
    return made


def containers(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    hashables = st.recursive(
        key_scalars | st.dates(), lambda parts: st.lists(parts, max_size=2).map(tuple), max_leaves=3
    )
    extras = st.dictionaries(st.sampled_from(["x", "y"]), values, max_size=2)
    return (
        compounds(values)
        | st.lists(values, max_size=3)
        | st.dictionaries(hashables, values, max_size=3)
        | st.sets(hashables, max_size=3)
        | st.frozensets(hashables, max_size=3)
        | st.builds(Order, values, values)
        | st.builds(Box, values)
        | st.builds(profile, values, values, values, extras)
    )


values = st.recursive(value_scalars, containers, max_leaves=8)
plain_values = st.recursive(
    st.none() | integers | st.floats() | st.text() | st.binary(),
    lambda parts: (
        st.lists(parts, max_size=3) | st.dictionaries(st.text() | integers | st.none(), parts, max_size=3)
    ),
    max_leaves=6,
)
many = settings(deadline=None, max_examples=200)


@pytest.mark.slow
@many
@given(keys, keys)
def test_two_keys_are_encoded_alike_exactly_if_they_are_the_same(one: Any, other: Any) -> None:
    assert (encode_key(one) == encode_key(other)) == (key_identity(one) == key_identity(other))


def test_keys_that_only_look_equal_are_all_different() -> None:
    # Each of these equals or resembles another one.
    lookalikes: list[Any] = [
        *(1, "1", True, 1.0, b"1", None, (), (1,), ((1,),), (1, None), "", b"", 0, False, 0.0, -1),
        *(
            Priority.LOW,
            Right.READ,
            Color.RED,
            Color.GREEN,
            Step.NAME,
            "name",
            Bits.LOW,
            Bits.LOW | Bits.HUGE,
        ),
        *(Pair(1), OtherPair(1), Loose(1, None), Named(1, None), Chat(1), Seat(1), (Pair(1),), Pair((1,))),
        *(
            Pair("1"),
            Pair(left=True),
            Pair(1.0),
            Chat("1"),
            Chat(bot=True),
            Chat(1.0),
            Chat(Chat(1)),
            Chat(1, Chat(1)),
        ),
        *(2**64, -(2**63) - 1, 2**64 - 1, float(2**64), str(2**64), (2**64).to_bytes(9), -(2**64)),
        *(uuid.UUID(int=1), uuid.UUID(int=1).bytes, str(uuid.UUID(int=1)), uuid.UUID(int=2), "NaN", "None"),
    ]

    assert len({encode_key(key) for key in lookalikes}) == len(lookalikes)


@pytest.mark.slow
@many
@given(keys)
def test_a_key_comes_back_the_same(key: Any) -> None:
    decoded = decode_key(encode_key(key))

    assert key_identity(decoded) == key_identity(key)
    assert decoded == key
    assert encode_key(decoded) == encode_key(key)


def test_equal_keys_are_encoded_alike() -> None:
    assert encode_key(-0.0) == encode_key(0.0)
    assert encode_key((1, (-0.0,))) == encode_key((1, (0.0,)))
    assert encode_key(Color.BLUE) == encode_key(Color.RED)
    assert encode_key(Right.READ | Right.WRITE) == encode_key(Right.BOTH)
    assert encode_key(Chat(user=2, bot=1)) == encode_key(Chat(1, 2))


def nested(depth: int, wrap: Callable[[Any], Any]) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = wrap(value)
    return value


def damaged(encoded: bytes, data: st.DataObject) -> bytes:
    """The bytes with one of them changed, or cut off at one."""
    position = data.draw(st.integers(0, len(encoded) - 1))
    change = data.draw(st.binary(max_size=1))
    return encoded[:position] + (change + encoded[position + 1 :] if change else b"")


def local_class() -> Any:
    @dataclasses.dataclass(frozen=True)
    class Local:
        content: int

    return Local


@pytest.mark.parametrize(
    "part",
    [
        *([1], {}, {1}, frozenset({1}), bytearray(b"x"), float("nan"), "\ud800", object(), 1j, Decimal(1)),
        *(
            date(2024, 1, 1),
            Order(1),
            Plain(1),
            Text("x"),
            Number(1),
            Sealed(),
            Uncompared(1),
            TextWithField("x"),
        ),
        *(local_class()(1), Chat([1]), Pair({}), Chat("\ud800"), Ext(1, b"x"), msgspec.Raw(b"\x01"), Chat),
    ],
    ids=lambda part: type(part).__name__,
)
def test_a_key_of_anything_else_is_refused_with_its_name(part: Any) -> None:
    for key in (part, (1, part), (1, ("a", part))):
        with pytest.raises(InvalidKey, match=r"a key cannot hold .*") as caught:
            encode_key(key)

        assert caught.value.key is key


def test_a_refused_key_is_told_what_keys_are_made_of() -> None:
    with pytest.raises(InvalidKey, match=r"cannot hold \[1, 2\] \(list\), only None, bool, int"):
        encode_key(("chat", [1, 2]))


def test_a_key_nested_too_deeply_is_refused() -> None:
    with pytest.raises(InvalidKey, match="deeper"):
        encode_key(nested(100, lambda key: (key,)))
    with pytest.raises(InvalidKey, match="deeper"):
        encode_key(nested(100, Chat))


def test_a_key_dataclass_without_a_value_for_a_field_is_refused() -> None:
    with pytest.raises(InvalidKey):
        encode_key(object.__new__(Chat))


@many
@given(st.binary())
def test_random_bytes_are_a_key_or_not_decodable(encoded: bytes) -> None:
    with contextlib.suppress(ValueNotDecodable):
        hash(decode_key(encoded))


@pytest.mark.slow
@many
@given(keys, st.data())
def test_a_damaged_key_is_a_key_or_not_decodable(key: Any, data: st.DataObject) -> None:
    with contextlib.suppress(ValueNotDecodable):
        hash(decode_key(damaged(encode_key(key), data)))


@pytest.mark.slow
@many
@given(values)
def test_a_value_comes_back_the_same(value: Any) -> None:
    assert identity(round_trip(value)) == identity(value)


@pytest.mark.slow
@many
@given(st.dictionaries(st.text(), values, max_size=4))
def test_each_value_of_the_data_stands_alone(data: dict[str, Any]) -> None:
    raws = msgspec.msgpack.decode(encode_data(data, allow_pickle=False), type=dict[str, msgspec.Raw])

    assert list(raws) == list(data)
    assert {name: identity(decode(raw)) for name, raw in raws.items()} == {
        name: identity(value) for name, value in data.items()
    }


@pytest.mark.slow
@many
@given(st.dictionaries(st.text(), plain_values))
def test_plain_data_is_plain_msgpack_and_comes_back_the_same(data: dict[str, Any]) -> None:
    assert identity(decode(encode_data(data, allow_pickle=False))) == identity(data)


@pytest.mark.parametrize(
    "value",
    [
        *(float("nan"), float("inf"), -0.0, 2**64, -(2**63) - 1, True, 1, 1.0, "", b"", None),
        *([], {}, (), set(), frozenset(), bytearray(), [()], {(): ()}, {None: 1, b"x": 2, 1.5: 3}),
        *(
            {(1, "a"): [1]},
            {2**70: 1},
            {Color.RED: {1: Step.NAME}},
            {Chat(1): Chat([2])},
            {date(2024, 1, 1): 1},
        ),
        *(
            datetime(2024, 10, 27, 2, 30, fold=1, tzinfo=ZoneInfo("Europe/Berlin")),
            datetime.max.replace(tzinfo=UTC),
            datetime.min.replace(tzinfo=UTC),
        ),
        *(datetime(2024, 1, 1, tzinfo=UTC), datetime(2024, 1, 1, tzinfo=timezone(timedelta(0), "Zulu"))),
        *(time(1, 2, 3, 4, fold=1), time(1, tzinfo=UTC), timedelta.max, timedelta(-1, 1, 1), date.max),
        *(
            Box(1),
            Box[list[int]]([1]),
            Seat({}),
            Order(Order(1)),
            Names(["x"]),
            profile(1, (2,), 3, {"x": 4}),
            Sealed(),
        ),
    ],
    ids=repr,
)
def test_this_value_comes_back_the_same_without_pickle(value: Any) -> None:
    assert identity(round_trip(value)) == identity(value)


STORED: list[tuple[Any, bytes]] = [
    # One for each extension code. These bytes are in users' stores: never change a line, only add some.
    (2**64, b"\xc7\t\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00"),
    (-(2**63) - 1, b"\xc7\t\x01\xff\x7f\xff\xff\xff\xff\xff\xff\xff"),
    (uuid.UUID(int=1), b"\xd8\x02\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01"),
    (Step.EMAIL, b"\xc7\x1d\x03\x93\xb0tests.test_codec\xa4Step\xa5EMAIL"),
    (Right.BOTH, b"\xc7\x19\x03\x93\xb0tests.test_codec\xa5Right\x03"),
    (Pair(1), b"\xc7%\x04\x93\xb0tests.test_codec\xa4Pair\x82\xa4left\x01\xa5right\xc0"),
    (Chat(1), b"\xc7#\x05\x93\xb0tests.test_codec\xa4Chat\x82\xa3bot\x01\xa4user\xc0"),
    (
        Names(["x"]),
        b"\xc7*\x06\x97\xb0tests.test_codec\xa5Names\x81\xa4root\x91\xa1x\x80\x91\xa4root\xc0\xc0",
    ),
    (
        profile(1, (), 2, {"x": 3}),
        b"\xc7@\x06\x97\xb0tests.test_codec\xa7Profile\x82\xa4name\x01\xa4tags\xd4\x07\x90\x80\x92\xa4name\xa1x\x81\xa1x\x03\x81\xa7_secret\x02",
    ),
    ((1,), b"\xd5\x07\x91\x01"),
    ({1}, b"\xd5\x08\x91\x01"),
    (frozenset({1}), b"\xd5\t\x91\x01"),
    ({(): 1}, b"\xc7\x06\n\x91\x92\xd4\x07\x90\x01"),
    (bytearray(b"x"), b"\xd4\x0bx"),
    (
        datetime(2024, 10, 27, 2, 30, fold=1, tzinfo=ZoneInfo("Europe/Berlin")),
        b"\xc7\x19\x0c\x99\xcd\x07\xe8\n\x1b\x02\x1e\x00\x00\x01\xadEurope/Berlin",
    ),
    (
        datetime(2024, 1, 2, tzinfo=timezone(timedelta(hours=-1), "X")),
        b"\xc7\x15\x0c\x99\xcd\x07\xe8\x01\x02\x00\x00\x00\x00\x00\x94\xff\xce\x00\x01Cp\x00\xa1X",
    ),
    (time(1, 2, 3, 4), b"\xc7\x07\r\x96\x01\x02\x03\x04\x00\xc0"),
    (date(2024, 1, 2), b"\xc7\x05\x0e\xce\x00\x0bFG"),
    (timedelta(1, 2, 3), b"\xd6\x0f\x93\x01\x02\x03"),
    (Decimal("1.10"), b"\xd6\x101.10"),
]


@pytest.mark.parametrize(("value", "stored"), STORED, ids=lambda value: type(value).__name__)
def test_the_stored_form_stays_what_it_is(value: Any, stored: bytes) -> None:
    encoded = encode_data({"": value}, allow_pickle=False)

    assert bytes(encoded) == b"\x81\xa0" + stored
    assert identity(decode(encoded)[""]) == identity(value)


def test_utc_and_zones_come_back_as_the_same_objects() -> None:
    zone = ZoneInfo("Europe/Berlin")

    assert round_trip(datetime(2024, 1, 1, tzinfo=UTC)).tzinfo is UTC
    assert round_trip(time(1, tzinfo=zone)).tzinfo is zone


def test_attributes_that_are_no_fields_come_back() -> None:
    order = Order([1])
    assert order.size == 17  # now cached in its __dict__

    assert vars(round_trip(order)) == {"items": [1], "note": [], "total": 3, "size": 17}


def test_a_model_comes_back_with_what_was_set_extra_and_private() -> None:
    came_back = round_trip(profile("Ada", (), "hidden", {"x": (1,)}))

    assert came_back.model_fields_set == {"name", "x"}
    assert came_back.model_extra == {"x": (1,)}
    assert came_back._secret == "hidden"


def test_rebuilding_runs_no_validator_and_no_post_init() -> None:
    order = Order([1])
    order.note = "refused"

    assert round_trip(order).note == "refused"
    assert round_trip(Sealed.model_construct(age=1000)).age == 1000


@pytest.mark.parametrize(
    "value",
    [
        *(
            collections.OrderedDict(a=1),
            collections.defaultdict(list, a=[1]),
            collections.deque([1]),
            1j,
            range(3),
        ),
        *(
            Text("x"),
            Number(1),
            Plain([1]),
            [Plain(1)],
            {"x": (Plain(1),)},
            {Plain(1): 1},
            Order([Plain(1)]),
            Chat,
        ),
        *(UTC, DictWithField("x"), MappingProxyType, Guarded),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_only_pickle_can_carry_comes_back_by_pickle_or_is_refused(value: Any) -> None:
    encoded = bytes(encode_data({"basket": value}, allow_pickle=True))

    assert identity(decode(encoded)["basket"]) == identity(value)
    with pytest.raises(
        PickleNotAllowed, match=r"'basket' holds .*, which only pickle can carry: put its class into"
    ):
        encode_data({"basket": value}, allow_pickle=False)
    with pytest.raises(PickleNotAllowed, match="allow_pickle=True"):
        decode(encoded, allow_pickle=False)


def test_a_class_with_its_own_pickling_is_left_to_it() -> None:
    came_back = round_trip(Guarded([1]), allow_pickle=True)

    assert (came_back.content, came_back.lock) == ([1], "made again")


def test_a_dataclass_without_a_value_for_a_field_comes_back_without_it() -> None:
    half = object.__new__(Box)

    assert not hasattr(round_trip(half, allow_pickle=True), "inside")


def test_a_named_tuple_with_attributes_keeps_them() -> None:
    named = Named(1, 2)
    named.note = "kept"  # type: ignore[attr-defined]

    assert round_trip(named, allow_pickle=True).note == "kept"


def test_a_local_class_comes_back_by_pickle() -> None:
    local = local_class()(1)

    assert identity(round_trip(local, allow_pickle=True)) == identity(local)
    with pytest.raises(PickleNotAllowed, match="Local"):
        round_trip(local)


MAIN = """
import dataclasses, enum, sys, typing
import pydantic
from fsm_ray.codec import encode_data
from fsm_ray.errors import PickleNotAllowed

@dataclasses.dataclass
class Data:
    content: int

class Kind(enum.Enum):
    ONE = 1

class Named(typing.NamedTuple):
    content: int

class Model(pydantic.BaseModel):
    content: int

values = {"data": Data(1), "kind": Kind.ONE, "named": Named(1), "model": Model(content=1)}
for name, value in values.items():
    try:
        encode_data({name: value}, allow_pickle=False)
    except PickleNotAllowed:
        continue
    sys.exit(f"{name} needed no pickle")
sys.stdout.buffer.write(bytes(encode_data(values, allow_pickle=True)))
"""


@pytest.mark.slow
def test_classes_of_a_script_come_back_by_pickle_in_another_process() -> None:
    written = subprocess.run([sys.executable, "-c", MAIN], check=True, capture_output=True)

    decoded = decode(written.stdout)
    assert [type(value).__name__ for value in decoded.values()] == ["Data", "Kind", "Named", "Model"]
    assert decoded["data"].content == decoded["named"].content == decoded["model"].content == 1
    with pytest.raises(PickleNotAllowed):
        decode(written.stdout, allow_pickle=False)


def generator() -> Iterator[int]:
    yield 1


def cyclic() -> list[Any]:
    cycle: list[Any] = []
    cycle += [cycle, cycle]
    return cycle


@pytest.mark.parametrize(
    "value",
    [
        *(
            threading.Lock(),
            generator(),
            [threading.Lock()],
            Order(generator()),
            "\ud800",
            ["\ud800"],
            ("\ud800",),
        ),
        *({"\ud800": 1}, Pair("\ud800"), cyclic(), (cyclic(),), nested(100, lambda value: [value])),
        *(nested(100, lambda value: {"x": value}), nested(100, lambda value: (value,)), nested(100, Box)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_encoded_is_refused_with_the_name_of_its_field(value: Any) -> None:
    with pytest.raises(InvalidData, match="data field 'basket'"):
        encode_data({"name": "Ada", "basket": value}, allow_pickle=True)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda value: [value],
        lambda value: {"x": value},
        Pair,
        Box,
        lambda value: Order(value, 0),
        Names.model_construct,
    ],
)
def test_a_value_of_the_deepest_nesting_comes_back_even_from_a_deep_stack(wrap: Callable[[Any], Any]) -> None:
    value = nested(64, wrap)

    def deep(frames: int) -> Any:
        return deep(frames - 1) if frames else round_trip(value)

    assert repr(deep(250)) == repr(value)
    with pytest.raises(InvalidData, match="deeper than 64"):
        round_trip(wrap(value))


@pytest.mark.parametrize("data", [None, [("name", 1)], "name", 1, Chat(1), {"name"}])
def test_data_that_is_no_mapping_is_refused(data: Any) -> None:
    with pytest.raises(InvalidData, match="give a dict"):
        encode_data(data, allow_pickle=True)


@pytest.mark.parametrize("name", [1, None, b"name", Step.NAME, Text("name"), ("name",)])
def test_data_with_a_name_that_is_no_plain_str_is_refused(name: Any) -> None:
    with pytest.raises(InvalidData, match="use a plain str"):
        encode_data({name: 1}, allow_pickle=True)


def test_data_with_a_lone_surrogate_in_a_name_is_refused() -> None:
    with pytest.raises(InvalidData, match="surrogate"):
        encode_data({"\ud800": 1}, allow_pickle=True)


@pytest.mark.parametrize(
    "kind", [MappingProxyType, collections.OrderedDict, collections.ChainMap, collections.UserDict]
)
def test_any_mapping_is_data(kind: Callable[[dict[str, Any]], Mapping[str, Any]]) -> None:
    encoded = encode_data(kind({"name": "Ada", "tags": (1,)}), allow_pickle=False)

    assert decode(encoded) == {"name": "Ada", "tags": (1,)}


def test_values_never_alias() -> None:
    value = {"list": [[1]], "order": Order([1]), "profile": Profile(name=[1]), "bytes": bytearray(b"x")}
    encoded = encode_data(value, allow_pickle=False)

    value["list"].append(2)  # type: ignore[attr-defined]
    value["order"].items.append(2)  # type: ignore[attr-defined]
    first, second = decode(encoded), decode(encoded)
    first["order"].items.append(3)
    first["profile"].name.append(3)
    first["bytes"].append(3)

    assert second["list"] == [[1]]
    assert second["order"] == Order([1])
    assert second["profile"] == Profile(name=[1])
    assert second["bytes"] == bytearray(b"x")


def test_decoded_values_do_not_need_the_buffer() -> None:
    buffer = bytearray(
        encode_data({"a": (b"xyz", "xyz", bytearray(b"xyz"), Pair(b"xyz"))}, allow_pickle=False)
    )

    decoded = msgspec.msgpack.Decoder(ext_hook=extension_hook(allow_pickle=False)).decode(buffer)
    buffer[:] = bytes(len(buffer))

    assert decoded == {"a": (b"xyz", "xyz", bytearray(b"xyz"), Pair(b"xyz"))}


class Versions:
    """A module whose source changes between writing and reading."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self._imports = (
            "from dataclasses import *; from enum import *; from typing import *; from pydantic import *\n"
        )

    def become(self, source: str) -> Any:
        module: Any = ModuleType("codec_versions")
        self._monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(self._imports + source, vars(module))
        return module


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> Versions:
    return Versions(monkeypatch)


KINDS = {
    "dataclass": "@dataclass\nclass Pizza:",
    "frozen dataclass with slots": "@dataclass(frozen=True, slots=True)\nclass Pizza:",
    "named tuple": "class Pizza(NamedTuple):",
    "model": "class Pizza(BaseModel):",
}
every_kind = pytest.mark.parametrize("head", KINDS.values(), ids=KINDS.keys())


@every_kind
def test_a_field_gained_since_gets_its_default(versions: Versions, head: str) -> None:
    encoded = encode_data({"pizza": versions.become(f"{head}\n size: int").Pizza(size=1)}, allow_pickle=False)
    versions.become(f"{head}\n size: int\n cheese: str = 'gouda'")

    pizza = decode(encoded)["pizza"]

    assert (pizza.size, pizza.cheese) == (1, "gouda")


@pytest.mark.parametrize(
    ("head", "default"),
    [
        (KINDS["dataclass"], "field(default_factory=list)"),
        (KINDS["model"], "Field(default_factory=list)"),
        (KINDS["model"], "[]"),
    ],
)
def test_a_field_gained_since_gets_a_default_of_its_own(versions: Versions, head: str, default: str) -> None:
    encoded = encode_data({"pizza": versions.become(f"{head}\n size: int").Pizza(size=1)}, allow_pickle=False)
    versions.become(f"{head}\n size: int\n toppings: list = {default}")

    first, second = decode(encoded)["pizza"], decode(encoded)["pizza"]
    first.toppings.append("olives")

    assert second.toppings == []


@every_kind
def test_a_field_lost_since_is_dropped(versions: Versions, head: str) -> None:
    pizza = versions.become(f"{head}\n size: int\n cheese: str").Pizza(size=1, cheese="gouda")
    encoded = encode_data({"pizza": pizza}, allow_pickle=False)
    now = versions.become(f"{head}\n size: int")

    assert identity(decode(encoded)["pizza"]) == identity(now.Pizza(size=1))


@every_kind
def test_a_field_gained_since_without_default_is_an_error_that_names_it(
    versions: Versions, head: str
) -> None:
    encoded = encode_data({"pizza": versions.become(f"{head}\n size: int").Pizza(size=1)}, allow_pickle=False)
    versions.become(f"{head}\n size: int\n cheese: str")

    with pytest.raises(ValueNotDecodable, match=r"codec_versions.Pizza has a field 'cheese' without default"):
        decode(encoded)


def test_a_model_follows_its_class_in_private_and_extra_attributes(versions: Versions) -> None:
    head = "class Pizza(BaseModel):\n size: int\n"
    pizza = versions.become(f"{head} model_config = ConfigDict(extra='allow')\n _old: int = 1").Pizza(
        size=1, x=2
    )
    encoded = encode_data({"pizza": pizza}, allow_pickle=False)
    now = versions.become(f"{head} _new: list = PrivateAttr(default_factory=list)")

    assert identity(decode(encoded)["pizza"]) == identity(now.Pizza(size=1))


@pytest.mark.parametrize(
    "source", ["", "Pizza = 1", "def Pizza(*a): raise SystemExit", "class Pizza: pass", "raise RuntimeError"]
)
@every_kind
def test_a_class_that_is_gone_or_of_another_kind_is_an_error(
    versions: Versions, head: str, source: str
) -> None:
    encoded = encode_data({"pizza": versions.become(f"{head}\n size: int").Pizza(size=1)}, allow_pickle=False)
    if source.startswith("raise"):
        sys.modules["codec_versions"] = None  # type: ignore[assignment]
    else:
        versions.become(source)

    with pytest.raises(ValueNotDecodable, match=r"codec_versions\.Pizza"):
        decode(encoded)


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What the program codec_program touches when it is run; its module script exits when it is imported."""
    package, touched = tmp_path / "codec_program", tmp_path / "touched"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(f"open({str(touched)!r}, 'w')\nclass Pizza: pass")
    (package / "script.py").write_text("raise SystemExit(2)")
    monkeypatch.syspath_prepend(tmp_path)
    yield touched
    for name in [name for name in sys.modules if name.startswith("codec_program")]:
        del sys.modules[name]


NAMED: dict[str, Callable[[str], Any]] = {
    "value": lambda module: decode(msgspec.msgpack.encode(named(module))),
    "key": lambda module: decode_key(msgspec.msgpack.encode(named(module))),
}


def named(module: str) -> Ext:
    """What names a class of this module, as somebody may write who has the store."""
    return Ext(DATACLASS_CODE, msgspec.msgpack.encode([module, "Pizza", {}]))


@pytest.mark.parametrize("module", ["codec_program.__main__", "codec_program.__main__.x"])
@pytest.mark.parametrize("kind", NAMED)
def test_no_program_is_run_whatever_the_bytes_name(program: Path, kind: str, module: str) -> None:
    with pytest.raises(ValueNotDecodable, match="a program is not imported"):
        NAMED[kind](module)

    assert not program.exists()


@pytest.mark.parametrize("kind", NAMED)
def test_a_module_that_exits_when_it_is_imported_is_an_error_and_no_exit(program: Path, kind: str) -> None:
    with pytest.raises(ValueNotDecodable, match=r"codec_program\.script\.Pizza .*SystemExit"):
        NAMED[kind]("codec_program.script")


@pytest.mark.parametrize("module", ["__main__", "codec_program.__main__"])
def test_a_class_of_the_program_that_runs_comes_back(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    main: Any = ModuleType(module)
    monkeypatch.setitem(sys.modules, module, main)
    exec("from dataclasses import *\n@dataclass(frozen=True)\nclass Pizza:\n size: int", vars(main))
    pizza = main.Pizza(3)

    assert decode_key(encode_key(pizza)) == pizza
    assert decode(encode_data({"x": pizza}, allow_pickle=True))["x"] == pizza


def test_an_enum_member_keeps_its_name_when_its_value_changes(versions: Versions) -> None:
    encoded = encode_data(
        {"x": versions.become("class E(Enum): A = auto(); B = auto()").E.B}, allow_pickle=False
    )

    now = versions.become("class E(Enum): A = auto(); NEW = auto(); B = auto()")
    assert decode(encoded)["x"] is now.E.B

    versions.become("class E(Enum): A = auto()")
    with pytest.raises(ValueNotDecodable, match=r"codec_versions\.E has no member 'B'"):
        decode(encoded)


@pytest.mark.parametrize("head", [KINDS["frozen dataclass with slots"], KINDS["named tuple"]])
def test_a_key_of_a_class_with_other_fields_is_not_decodable(versions: Versions, head: str) -> None:
    encoded = encode_key(versions.become(f"{head}\n size: int").Pizza(1))

    versions.become(f"{head}\n size: int\n cheese: str = ''")
    with pytest.raises(
        ValueNotDecodable, match=r"has the fields \['size', 'cheese'\], in a key it has \['size'\]"
    ):
        decode_key(encoded)

    versions.become("")
    with pytest.raises(ValueNotDecodable, match="cannot be imported here") as raised:
        decode_key(encoded)
    assert raised.value.key == EncodedKey(encoded)


def test_a_key_of_a_class_that_is_missing_here_is_good_as_it_is_encoded(versions: Versions) -> None:
    part = versions.become(f"{KINDS['named tuple']}\n size: int").Pizza(1)
    whole = encode_key((7, part))
    stand_in = EncodedKey(encode_key(part))

    assert encode_key(stand_in) == encode_key(part)
    assert encode_key((7, stand_in)) == encode_key(EncodedKey(whole)) == whole


def test_a_plain_key_is_decoded_and_one_of_a_class_is_left_encoded(versions: Versions) -> None:
    part = versions.become(f"{KINDS['named tuple']}\n size: int").Pizza(1)
    plain = (-100, "a", None, 10**30, uuid.UUID(int=7), (1.5, b"x"))

    assert decode_plain_key(encode_key(plain)) == plain
    assert decode_plain_key(encode_key((7, part))) == EncodedKey(encode_key((7, part)))


@many
@given(st.binary())
def test_random_bytes_are_a_value_or_fail_as_documented(encoded: bytes) -> None:
    with contextlib.suppress(ValueNotDecodable, PickleNotAllowed, msgspec.DecodeError, UnicodeDecodeError):
        decode(encoded, allow_pickle=False)


@many
@given(
    st.integers(-128, 127),
    st.binary() | values.map(lambda value: bytes(encode_data({"": value}, allow_pickle=False))),
)
def test_a_broken_extension_is_a_value_or_not_decodable(code: int, payload: bytes) -> None:
    with contextlib.suppress(ValueNotDecodable, PickleNotAllowed):
        extension_hook(allow_pickle=False)(code, memoryview(payload))


@pytest.mark.slow
@many
@given(values, st.data())
def test_damaged_data_is_a_value_or_fails_as_documented(value: Any, data: st.DataObject) -> None:
    encoded = damaged(bytes(encode_data({"x": value}, allow_pickle=False)), data)

    with contextlib.suppress(ValueNotDecodable, PickleNotAllowed, msgspec.DecodeError, UnicodeDecodeError):
        decode(encoded, allow_pickle=False)


@pytest.mark.parametrize(
    "payload", [b"", b"junk", b"cos\nnothing\n.", b"\x80\x05\x8c", b"cno_such_module\nx\n."]
)
def test_a_broken_pickle_is_not_decodable(payload: bytes) -> None:
    with pytest.raises(ValueNotDecodable, match="cannot be rebuilt"):
        decode(msgspec.msgpack.encode(Ext(PICKLE_CODE, payload)))


def test_extensions_nested_without_end_are_not_decodable() -> None:
    encoded = b"\x90"
    for _ in range(2000):
        encoded = msgspec.msgpack.encode(Ext(7, b"\x91" + encoded))

    with pytest.raises(ValueNotDecodable):
        decode(encoded)
    with pytest.raises(ValueNotDecodable):
        decode_key(b"\x91" * 100_000)
    with pytest.raises(RecursionError):
        decode(b"\x91" * 100_000)
