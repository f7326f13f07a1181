"""Keys to bytes and back: canonical and injective."""

from __future__ import annotations

import base64
import dataclasses
import reprlib
import zlib
from collections.abc import Hashable, Iterable
from enum import Enum
from typing import Any
from uuid import UUID

import msgspec
from msgspec import Raw
from msgspec.msgpack import Ext

from fsm_ray.codec import classes, wire
from fsm_ray.errors import InvalidKey, ValueNotDecodable
from fsm_ray.options import SLOTS

_PLAIN = wire.PLAIN - {float}  # a float may be -0.0 or NaN
_PARTS = (
    "None, bool, int, float (not NaN), str, bytes, UUID, tuples, and Enum members, named tuples and frozen "
    "dataclasses that compare all fields, of classes made outside of functions"
)
_UUID_BYTES = 16
_encode = wire.to_msgpack  # a global of this module is found faster


@dataclasses.dataclass(frozen=True, slots=True)
class EncodedKey:
    """Stands for a key that cannot be decoded here; wherever a key is taken, it is that key."""

    encoded: bytes

    def __repr__(self) -> str:
        return f"EncodedKey({base64.b64encode(self.encoded).decode()})"


def encode_key(key: Hashable) -> bytes:
    """Return the bytes that stand for key, the same for equal keys and for no other.

    Types count: `1`, `"1"`, `True` and `1.0` are four keys; `-0.0` is `0.0`. Enum members, named tuples and
    frozen dataclasses count by their class's module and name and by their fields' names and values (an Enum
    by the member's name, a Flag by its value), so renaming or moving the class changes its keys.

    >>> encode_key((1, "a")) == encode_key((1, "a")), encode_key(1) == encode_key(True)
    (True, False)

    Raises:
        InvalidKey: key holds anything else, NaN, a lone surrogate or a class made inside a function, or is
            nested deeper than 64 levels.
    """
    try:
        if type(key) is tuple:
            for part in key:
                if type(part) not in _PLAIN:
                    break
            else:
                return _encode(key)
        elif type(key) in _PLAIN:
            return _encode(key)
    except (OverflowError, UnicodeEncodeError):
        pass  # an int beyond 64 bits or a lone surrogate: _pack tells
    try:
        return _encode(_pack(key, 0))
    except InvalidKey as error:
        error.key = key
        raise
    except UnicodeEncodeError as error:
        raise InvalidKey(
            f"a key cannot hold {error.object!r}: UTF-8 has no lone surrogates", key=key
        ) from error


def slot_of(key: bytes) -> int:
    """The slot of an encoded key: its CRC-32, modulo 4,096. It never changes, for stores are sorted by it."""
    return zlib.crc32(key) % SLOTS


def decode_key(encoded: bytes) -> Hashable:
    """Return the key that `encode_key` made these bytes from; classes are found by import.

    Raises:
        ValueNotDecodable: a class is not importable here or has other fields now, or the bytes are no key;
            the error's `key` is an `EncodedKey`.
    """
    return _decoded(_decoder, encoded)


def decode_plain_key(encoded: bytes) -> Hashable:
    """As `decode_key`, but nothing is imported: a key that would need it comes as an `EncodedKey`."""
    try:
        return _decoded(_plain_decoder, encoded)
    except ValueNotDecodable:
        return EncodedKey(encoded)


def _decoded(decoder: msgspec.msgpack.Decoder[Any], encoded: bytes) -> Hashable:
    try:
        return _frozen(decoder.decode(encoded))  # type: ignore[no-any-return]
    except ValueNotDecodable as error:
        error.key = EncodedKey(encoded)
        raise
    except Exception as error:  # broken bytes fail in many ways
        raise ValueNotDecodable(f"these bytes are no key: {error!r}", key=EncodedKey(encoded)) from error


def check_key(encoded: bytes) -> None:
    """Return if `encode_key` can have made these bytes; no class is imported for it.

    Raises:
        ValueNotDecodable: it cannot.
    """
    try:
        canonical = _canonical(_bare_decoder.decode(encoded), 0)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ValueNotDecodable(f"these bytes are no key: {error}") from error
    if _encode(canonical) != encoded:
        raise ValueNotDecodable("these bytes are no key: the encoding of a key is another one")


def _canonical(part: Any, depth: int) -> Any:
    """The part as it would be encoded, if it is one of a key."""
    if isinstance(part, list) and depth < wire.MAX_DEPTH:
        return [_canonical(each, depth + 1) for each in part]
    if not isinstance(part, Ext):
        if type(part) in wire.PLAIN:
            return part
    elif part.code == wire.INT:
        return wire.pack_int(wire.unpack_int(bytes(part.data)))
    elif part.code == wire.UUID and len(bytes(part.data)) == _UUID_BYTES:
        return part
    elif part.code in {wire.ENUM, wire.NAMED_TUPLE, wire.DATACLASS}:
        module, name, content = _reference_decoder.decode(part.data)
        if part.code == wire.ENUM:
            content = _canonical(content, depth + 1)
        elif isinstance(content, dict) and all(isinstance(field, str) for field in content):
            content = {field: _canonical(each, depth + 1) for field, each in content.items()}
        else:
            raise ValueNotDecodable(f"these bytes are no key: the fields of {module}.{name} are no map")
        return Ext(part.code, _encode([module, name, content]))
    raise ValueNotDecodable(f"these bytes are no key: no key holds {reprlib.repr(part)}")


def _pack(part: Any, depth: int) -> Any:
    cls = type(part)
    if depth > wire.MAX_DEPTH:
        raise InvalidKey(f"a key cannot be nested deeper than {wire.MAX_DEPTH} levels")
    if cls in _PLAIN:
        return wire.pack_int(part) if cls is int else part
    if cls is float and part == part:  # noqa: PLR0124 - only NaN differs from itself
        return part + 0.0  # -0.0 becomes 0.0
    if cls is tuple:
        return [_pack(item, depth + 1) for item in part]
    if cls is EncodedKey:
        return Raw(part.encoded)
    packed = Ext(wire.UUID, part.bytes) if cls is UUID else _pack_object(part, cls, depth)
    if packed is None:
        raise InvalidKey(f"a key cannot hold {reprlib.repr(part)} ({wire.type_name(part)}), only {_PARTS}")
    return packed


def _pack_object(part: Any, cls: type, depth: int) -> Ext | None:
    if "<locals>" in cls.__qualname__:
        return None
    if isinstance(part, Enum):
        return Ext(wire.ENUM, _encode([*classes.reference(cls), _pack(classes.member_id(part), depth)]))
    if classes.is_named_tuple(cls):
        return _pack_fields(wire.NAMED_TUPLE, cls, classes.named_tuple_items(part), depth)
    names = _key_fields(cls)
    if names is None:
        return None
    # A field without value becomes MISSING, which is then refused like any object.
    items = [(name, getattr(part, name, dataclasses.MISSING)) for name in names]
    return _pack_fields(wire.DATACLASS, cls, items, depth)


def _pack_fields(code: int, cls: type, items: Iterable[tuple[str, Any]], depth: int) -> Ext:
    fields = {name: _pack(value, depth + 1) for name, value in items}
    return Ext(code, _encode([*classes.reference(cls), fields]))


def _key_fields(cls: Any) -> list[str] | None:
    """The fields of a dataclass whose instances are equal when all of them are; None for another class."""
    if not (classes.is_dataclass(cls) and classes.is_built_by_object(cls)):
        return None
    fields, parameters = dataclasses.fields(cls), cls.__dataclass_params__
    if not (parameters.frozen and parameters.eq and all(field.compare for field in fields)):
        return None
    return [field.name for field in fields]


def _is_key_dataclass(cls: type) -> bool:
    return _key_fields(cls) is not None


def _frozen(part: Any) -> Any:
    """The part with its arrays as the tuples that they were."""
    if type(part) is list:
        return tuple([_frozen(item) for item in part])
    hash(part)  # maps, which no key has, fail here
    return part


def _plain_extension(code: int, payload: memoryview) -> Any:
    if code == wire.INT:
        return wire.unpack_int(payload)
    if code == wire.UUID:
        return UUID(bytes=bytes(payload))
    raise ValueNotDecodable(f"extension code {code} is unknown in plain keys")


def _extension(code: int, payload: memoryview) -> Any:
    if code == wire.ENUM:
        return classes.find_member(*_decoder.decode(payload))
    if code == wire.NAMED_TUPLE:
        return _named_tuple(*_decoder.decode(payload))
    if code == wire.DATACLASS:
        return _dataclass(*_decoder.decode(payload))
    return _plain_extension(code, payload)


def _named_tuple(module: str, qualname: str, stored: dict[str, Any]) -> Any:
    cls = classes.find_class(module, qualname, classes.is_named_tuple)
    return classes.new_named_tuple(cls, _same_fields(cls, list(cls._fields), stored))


def _dataclass(module: str, qualname: str, stored: dict[str, Any]) -> Any:
    cls = classes.find_class(module, qualname, _is_key_dataclass)
    names = [field.name for field in dataclasses.fields(cls)]
    return classes.new_dataclass(cls, _same_fields(cls, names, stored))


def _same_fields(cls: type, names: list[str], stored: dict[str, Any]) -> dict[str, Any]:
    """The stored fields, if they are the class's still: a default would make it another key."""
    if list(stored) != names:
        raise ValueNotDecodable(
            f"{cls.__module__}.{cls.__qualname__} has the fields {names}, in a key it has {list(stored)}"
        )
    return {name: _frozen(value) for name, value in stored.items()}


_decoder = msgspec.msgpack.Decoder(ext_hook=_extension)
_plain_decoder = msgspec.msgpack.Decoder(ext_hook=_plain_extension)
_bare_decoder = msgspec.msgpack.Decoder()
_reference_decoder = msgspec.msgpack.Decoder(tuple[str, str, Any])
