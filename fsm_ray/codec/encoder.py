"""Values to bytes.

msgspec encodes datetime, Enum, dataclasses, sets, tuples and more natively, but lossily: so everything that
is not exactly of a plain type is packed here first.
"""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Callable, Iterable, Mapping
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import cloudpickle  # type: ignore[import-untyped]
from msgspec import Raw
from msgspec.msgpack import Ext
from pydantic import BaseModel

from fsm_ray.codec import classes, wire
from fsm_ray.errors import InvalidData, PickleNotAllowed

_CURE = "put its class into an importable module, store plain values, or use allow_pickle=True"
_PLAIN = wire.PLAIN
_SEQUENCES: dict[type, int] = {tuple: wire.TUPLE, set: wire.SET, frozenset: wire.FROZENSET}
_encode = wire.to_msgpack  # a global of this module is found faster


def encode_data(data: Mapping[str, Any], *, allow_pickle: bool) -> bytes:
    """Return data as one msgpack map, whose values decode each alone, with `extension_hook`.

    Classes of an importable module are stored by name and fields, so they may gain and lose fields. Other
    classes, subclasses of built-in types among them, go through cloudpickle.

    >>> encode_data({"age": 7}, allow_pickle=False).hex()
    '81a361676507'

    Raises:
        InvalidData: data is no mapping, a name in it is no str, or a value cannot be encoded.
        PickleNotAllowed: only pickle could carry a value.
    """
    try:
        if type(data) is dict:
            for name in data:
                if type(name) is not str or (type(data[name]) not in _PLAIN and not _is_plain(data[name], 1)):
                    break
            else:
                return _encode(data)
    except (OverflowError, UnicodeEncodeError):
        pass  # an int beyond 64 bits or a lone surrogate: _pack_field tells
    if not isinstance(data, Mapping):
        raise InvalidData(f"data is {wire.type_name(data)}; give a dict of names and values")
    return _encode({name: _pack_field(name, data[name], allow_pickle) for name in data})


def _is_plain(value: Any, depth: int) -> bool:
    """Whether value is lists and dicts of plain values, which msgspec encodes without loss."""
    items: Iterable[Any]
    if type(value) is list:
        items = value
    elif type(value) is dict and _PLAIN.issuperset(map(type, value)):
        items = value.values()
    else:
        return False
    if depth > wire.MAX_DEPTH:
        return False
    for item in items:  # noqa: SIM110 - all() of a generator takes twice as long
        if type(item) not in _PLAIN and not _is_plain(item, depth + 1):
            return False
    return True


def _pack_field(name: Any, value: Any, allow_pickle: bool) -> Raw:  # noqa: FBT001 - private
    if type(name) is not str:
        raise InvalidData(f"data has a name {reprlib.repr(name)} ({wire.type_name(name)}); use a plain str")
    try:
        _encode(name)
        return Raw(_encode(_Packer(name, allow_pickle).pack(value, 0)))
    except UnicodeEncodeError as error:
        raise InvalidData(f"data field {name!r} holds a lone surrogate, which UTF-8 has not") from error
    except RecursionError as error:
        raise InvalidData(f"data field {name!r} is too deep for what is left of the stack") from error


@dataclasses.dataclass(slots=True)
class _Packer:
    """Turns the value of one field into what msgspec encodes without loss."""

    field: str
    allow_pickle: bool

    def pack(self, value: Any, depth: int) -> Any:
        cls = type(value)
        if cls in _PLAIN:
            return wire.pack_int(value) if cls is int else value
        if depth >= wire.MAX_DEPTH:
            raise InvalidData(f"data field {self.field!r} is cyclic or deeper than {wire.MAX_DEPTH} levels")
        if cls is dict:
            return self._pack_dict(value, depth)
        if cls is list or cls in _SEQUENCES:
            items = [self.pack(item, depth + 1) for item in value]
            return items if cls is list else Ext(_SEQUENCES[cls], _encode(items))
        packed = _LEAVES[cls](value) if cls in _LEAVES else self._pack_object(value, cls, depth)
        return self._pickle(value) if packed is None else packed

    def _pack_dict(self, values: dict[Any, Any], depth: int) -> Any:
        pairs = [(self.pack(key, depth + 1), self.pack(value, depth + 1)) for key, value in values.items()]
        if any(type(key) is Ext for key, _ in pairs):
            return Ext(wire.DICT, _encode(pairs))
        return dict(pairs)

    def _pack_object(self, value: Any, cls: Any, depth: int) -> Ext | None:
        """The instance by its class's name and its fields; None if only pickle can carry it."""
        if not classes.is_importable(cls):
            return None
        if isinstance(value, Enum):
            member = self.pack(classes.member_id(value), depth)
            return Ext(wire.ENUM, _encode([*classes.reference(cls), member]))
        return self._pack_fields(value, cls, depth) if classes.has_default_pickling(cls) else None

    def _pack_fields(self, value: Any, cls: Any, depth: int) -> Ext | None:
        if classes.is_named_tuple(cls) and not object.__getstate__(value):
            return self._pack_parts(wire.NAMED_TUPLE, cls, depth, dict(classes.named_tuple_items(value)))
        if not classes.is_built_by_object(cls):
            return None
        if isinstance(value, BaseModel):
            return self._pack_model(value, cls, depth)
        return self._pack_dataclass(value, cls, depth) if classes.is_dataclass(cls) else None

    def _pack_dataclass(self, value: Any, cls: Any, depth: int) -> Ext | None:
        attributes = _attributes(value)
        attributes.pop(
            "__orig_class__", None
        )  # Box[int](1) leaves it: a note of typing's, which has to be pickled
        fields = {}
        for field in dataclasses.fields(cls):
            if field.name in attributes:
                fields[field.name] = attributes.pop(field.name)
            elif field.default is dataclasses.MISSING:
                return None  # never set, or deleted: rebuilding would miss it
        return self._pack_parts(wire.DATACLASS, cls, depth, fields, *([attributes] if attributes else []))

    def _pack_model(self, value: BaseModel, cls: type[BaseModel], depth: int) -> Ext | None:
        state = value.__getstate__()
        attributes = dict(state["__dict__"])
        if not attributes.keys() >= cls.model_fields.keys():
            return None
        fields = {name: attributes.pop(name) for name in cls.model_fields}
        names_set = sorted(state["__pydantic_fields_set__"])
        extra, private = state.get("__pydantic_extra__"), state.get("__pydantic_private__")
        return self._pack_parts(wire.MODEL, cls, depth, fields, attributes, names_set, extra, private)

    def _pack_parts(self, code: int, cls: type, depth: int, *parts: dict[str, Any] | list[str] | None) -> Ext:
        packed = [
            {name: self.pack(value, depth + 1) for name, value in part.items()}
            if isinstance(part, dict)
            else part
            for part in parts
        ]
        return Ext(code, _encode([*classes.reference(cls), *packed]))

    def _pickle(self, value: Any) -> Ext:
        subject = f"data field {self.field!r} holds {wire.type_name(value)}"
        if not self.allow_pickle:
            raise PickleNotAllowed(f"{subject}, which only pickle can carry: {_CURE}")
        try:
            return Ext(wire.PICKLE, cloudpickle.dumps(value))
        except Exception as error:  # pickling runs users' code, and refuses in many ways
            raise InvalidData(f"{subject}, which cannot be pickled: {error!r}") from error


def _attributes(value: object) -> dict[str, Any]:
    state: Any = object.__getstate__(value)
    if type(state) is tuple:  # of __dict__, of __slots__
        return {**(state[0] or {}), **state[1]}
    return dict(state or {})


def _pack_datetime(value: datetime) -> Ext | None:
    return _pack_clock(wire.DATETIME, value, value.year, value.month, value.day)


def _pack_time(value: time) -> Ext | None:
    return _pack_clock(wire.TIME, value)


def _pack_clock(code: int, value: datetime | time, *date_parts: int) -> Ext | None:
    zone: Any = value.tzinfo
    packed: Any = None
    if type(zone) is timezone:
        made_of: Any = zone.__reduce__()[1]  # tzname() would make up a name
        offset, *name = made_of
        packed = [offset.days, offset.seconds, offset.microseconds, *name]
    elif type(zone) is ZoneInfo and zone.key:
        packed = zone.key
    elif zone is not None:
        return None
    parts = (*date_parts, value.hour, value.minute, value.second, value.microsecond, value.fold, packed)
    return Ext(code, _encode(parts))


_LEAVES: dict[type, Callable[[Any], Ext | None]] = {
    UUID: lambda value: Ext(wire.UUID, value.bytes),
    Decimal: lambda value: Ext(wire.DECIMAL, str(value).encode()),
    bytearray: lambda value: Ext(wire.BYTEARRAY, bytes(value)),
    datetime: _pack_datetime,
    time: _pack_time,
    date: lambda value: Ext(wire.DATE, _encode(value.toordinal())),
    timedelta: lambda value: Ext(wire.TIMEDELTA, _encode((value.days, value.seconds, value.microseconds))),
}
