"""Bytes to values."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import msgspec
from pydantic import BaseModel, RootModel
from pydantic_core import PydanticUndefined

from fsm_ray.codec import classes, wire
from fsm_ray.errors import PickleNotAllowed, ValueNotDecodable


def extension_hook(*, allow_pickle: bool) -> Callable[[int, memoryview], Any]:
    """Return the `ext_hook` with which a client's msgspec decoder rebuilds values.

    No `__init__`, `__post_init__` or validator runs. A field that the class gained since gets its default,
    one that it lost is dropped. msgspec passes the hook's errors on as they are; its own, for msgpack that is
    broken outside of extensions, are `msgspec.DecodeError`, `UnicodeDecodeError` and `RecursionError`.

    >>> decoder = msgspec.msgpack.Decoder(ext_hook=extension_hook(allow_pickle=False))
    >>> decoder.decode(bytes.fromhex("c70307920102"))
    (1, 2)

    Raises:
        ValueNotDecodable: (the hook) a class is not importable here or gained a field without default, or the
            payload is broken.
        PickleNotAllowed: (the hook) the value is pickled, and allow_pickle is False.
    """

    def hook(code: int, payload: memoryview) -> Any:
        try:
            if code == wire.PICKLE:
                return _unpickle(payload, allow_pickle=allow_pickle)
            if code in _FROM_BYTES:
                return _FROM_BYTES[code](bytes(payload))
            if code in _FROM_PARTS:
                return _FROM_PARTS[code](decoder.decode(payload))
        except (PickleNotAllowed, ValueNotDecodable):
            raise
        except Exception as error:  # users' code runs: imports, __setstate__, __hash__, default factories
            raise ValueNotDecodable(f"a value cannot be rebuilt: {error!r}") from error
        raise ValueNotDecodable(f"extension code {code} is unknown: broken, or written by a newer fsm_ray")

    decoder = msgspec.msgpack.Decoder(ext_hook=hook)
    return hook


def _unpickle(payload: memoryview, *, allow_pickle: bool) -> Any:
    if not allow_pickle:
        raise PickleNotAllowed("a stored value is pickled: read it with allow_pickle=True, or replace it")
    return pickle.loads(payload)  # noqa: S301 - the bot's options allow it, and only clients come here


def _clock(cls: Any, parts: list[Any]) -> Any:
    *numbers, fold, zone = parts
    return cls(*numbers, tzinfo=_zone(zone), fold=fold)


def _zone(packed: Any) -> ZoneInfo | timezone | None:
    if packed is None:
        return None
    if type(packed) is str:
        return ZoneInfo(packed)
    days, seconds, microseconds, *name = packed
    return timezone(timedelta(days, seconds, microseconds), *name)


def _named_tuple(module: str, qualname: str, fields: dict[str, Any]) -> Any:
    cls = classes.find_class(module, qualname, classes.is_named_tuple)
    return classes.new_named_tuple(cls, {**cls._field_defaults, **fields})


def _dataclass(module: str, qualname: str, fields: dict[str, Any], *attributes: dict[str, Any]) -> Any:
    cls = classes.find_class(module, qualname, classes.is_dataclass)
    for field in dataclasses.fields(cls):
        if field.name not in fields:
            fields[field.name] = _dataclass_default(cls, field)
    return classes.new_dataclass(cls, fields, *attributes)


def _dataclass_default(cls: type, field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    raise classes.missing_field(cls, field.name)


def _model(  # noqa: PLR0917 - the parts of the payload
    module: str,
    qualname: str,
    stored: dict[str, Any],
    attributes: dict[str, Any],
    names_set: list[str],
    extra: dict[str, Any] | None,
    private: dict[str, Any] | None,
) -> Any:
    cls = classes.find_class(module, qualname, _is_model)
    fields = _model_fields(cls, stored)
    extra = (extra or {}) if cls.model_config.get("extra") == "allow" else None
    known = fields.keys() | (extra or {}).keys()
    state = {
        "__dict__": fields | attributes,
        "__pydantic_fields_set__": known.intersection(names_set),
        "__pydantic_extra__": extra,
        "__pydantic_private__": _model_private(cls, fields, private or {}),
    }
    new = object.__new__(cls)
    (RootModel if issubclass(cls, RootModel) else BaseModel).__setstate__(new, state)
    return new


def _is_model(cls: type) -> bool:
    return issubclass(cls, BaseModel)


def _model_fields(cls: Any, stored: dict[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, field in cls.model_fields.items():
        if name not in stored and field.is_required():
            raise classes.missing_field(cls, name)
        fields[name] = stored[name] if name in stored else _model_default(field, fields)
    return fields


def _model_private(cls: Any, fields: dict[str, Any], stored: dict[str, Any]) -> dict[str, Any] | None:
    private = {
        name: stored[name] if name in stored else _model_default(attribute, fields)
        for name, attribute in cls.__private_attributes__.items()
    }
    set_ones = {name: value for name, value in private.items() if value is not PydanticUndefined}
    return set_ones if private else None


def _model_default(field: Any, fields: dict[str, Any]) -> Any:
    if field.default_factory is None:
        return copy.deepcopy(field.default)
    if getattr(field, "default_factory_takes_validated_data", False):  # pydantic has it since 2.10
        return field.default_factory(fields)
    return field.default_factory()


_FROM_BYTES: dict[int, Callable[[bytes], Any]] = {
    wire.INT: wire.unpack_int,
    wire.UUID: lambda payload: UUID(bytes=payload),
    wire.DECIMAL: lambda payload: Decimal(payload.decode()),
    wire.BYTEARRAY: bytearray,
}
_FROM_PARTS: dict[int, Callable[[Any], Any]] = {
    wire.ENUM: lambda parts: classes.find_member(*parts),
    wire.NAMED_TUPLE: lambda parts: _named_tuple(*parts),
    wire.DATACLASS: lambda parts: _dataclass(*parts),
    wire.MODEL: lambda parts: _model(*parts),
    wire.TUPLE: tuple,
    wire.SET: set,
    wire.FROZENSET: frozenset,
    wire.DICT: dict,
    wire.DATETIME: lambda parts: _clock(datetime, parts),
    wire.TIME: lambda parts: _clock(time, parts),
    wire.DATE: date.fromordinal,
    wire.TIMEDELTA: lambda parts: timedelta(*parts),
}
