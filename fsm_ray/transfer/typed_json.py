"""Keys and data to JSON and back, without loss of type.

What JSON can say stands there as it is. Everything else is an object with one name that begins with `$`: its
type, as the codec knows it, and what it is made of. In a key, an array is a tuple.
"""

from __future__ import annotations

import base64
import math
import reprlib
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import Any
from uuid import UUID

import msgspec
from msgspec.msgpack import Ext

from fsm_ray.codec import decode_key, encode_data, encode_key, extension_hook, wire
from fsm_ray.errors import InvalidData, PickleNotAllowed, ValueNotDecodable

_NESTED = {
    wire.ENUM: "$enum",
    wire.NAMED_TUPLE: "$named_tuple",
    wire.DATACLASS: "$dataclass",
    wire.MODEL: "$model",
    wire.TUPLE: "$tuple",
    wire.SET: "$set",
    wire.FROZENSET: "$frozenset",
    wire.DICT: "$dict",
    wire.DATETIME: "$datetime",
    wire.TIME: "$time",
    wire.DATE: "$date",
    wire.TIMEDELTA: "$timedelta",
}
"""Extension codes whose payload is msgpack itself."""


def _to_base64(payload: bytes) -> str:
    return base64.b64encode(payload).decode()


def _from_base64(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


def _packed_int(value: int) -> bytes:
    return value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True)


_TEXTS: dict[int, tuple[str, Callable[[bytes], str], Callable[[str], bytes]]] = {
    wire.INT: (
        "$int",
        # Python refuses to tell, or to read, more than 4,300 decimal digits.
        lambda payload: hex(wire.unpack_int(payload)),
        lambda text: _packed_int(int(text, 0)),
    ),
    wire.UUID: ("$uuid", lambda payload: str(UUID(bytes=payload)), lambda text: UUID(text).bytes),
    wire.DECIMAL: ("$decimal", bytes.decode, str.encode),
    wire.BYTEARRAY: ("$bytearray", _to_base64, _from_base64),
    wire.PICKLE: ("$pickle", _to_base64, _from_base64),
}
"""Extension codes whose payload is told by a text: its name, and how to tell it and read it."""

_NESTED_CODES = {name: code for code, name in _NESTED.items()}
_TEXT_CODES = {name: code for code, (name, _, _) in _TEXTS.items()}

_decode = msgspec.msgpack.Decoder().decode
_encode = msgspec.msgpack.Encoder().encode


def key_to_json(key: Hashable) -> Any:
    """The key, as `key_from_json` reads it.

    >>> key_to_json((-100, "a", b"b")), key_from_json([-100, "a", {"$bytes": "Yg=="}])
    ([-100, 'a', {'$bytes': 'Yg=='}], (-100, 'a', b'b'))
    """
    return _to_json(_decode(encode_key(key)))


def key_from_json(value: Any) -> Hashable:
    """The key that `key_to_json` told.

    Raises:
        InvalidData: it is none.
        ValueNotDecodable: its class is not importable here; the error's `key` stands for it, if it is one.
    """
    return decode_key(_encode(_read(value)))


def data_to_json(data: Mapping[str, Any]) -> dict[str, Any]:
    """The data, as `data_from_json` reads it.

    >>> data_to_json({"pair": (1, 2.0), "name": "Ada"})
    {'pair': {'$tuple': [1, 2.0]}, 'name': 'Ada'}
    """
    return encoded_to_json(_decode(encode_data(data, allow_pickle=True)))


def encoded_to_json(data: Mapping[str, Any], *, allow_pickle: bool = True) -> dict[str, Any]:
    """As `data_to_json`, of data as an `EncodedStorage` reads it. Nothing in it is rebuilt.

    Raises:
        PickleNotAllowed: a value is pickled, and allow_pickle is False.
        ValueNotDecodable: a later version of fsm_ray wrote a value.
    """
    return {name: _to_json(value, allow_pickle=allow_pickle) for name, value in data.items()}


def data_from_json(value: Any, *, allow_pickle: bool) -> dict[str, Any]:
    """The data that `data_to_json` told.

    Raises:
        InvalidData: it is none.
        PickleNotAllowed: a value is pickled, and allow_pickle is False.
        ValueNotDecodable: a value's class is not importable here.
    """
    if not isinstance(value, dict):
        raise InvalidData(f"data is a JSON object, not {reprlib.repr(value)}")
    encoded = _encode({name: _read(each) for name, each in value.items()})
    decoder = msgspec.msgpack.Decoder(dict[str, Any], ext_hook=extension_hook(allow_pickle=allow_pickle))
    return decoder.decode(encoded)


def _to_json(value: Any, *, allow_pickle: bool = True) -> Any:  # noqa: PLR0911 - one for each kind
    tell = partial(_to_json, allow_pickle=allow_pickle)
    match value:
        case float() if not math.isfinite(value):
            return {"$float": str(value)}
        case bytes():
            return {"$bytes": _to_base64(value)}
        case list():
            return [tell(item) for item in value]
        case dict() if all(isinstance(name, str) for name in value) and not _is_typed(value):
            return {name: tell(item) for name, item in value.items()}
        case dict():
            return {"$map": [[tell(name), tell(item)] for name, item in value.items()]}
        case Ext(code=wire.PICKLE) if not allow_pickle:
            raise PickleNotAllowed("a value is pickled, and the bot's options do not allow it: replace it")
        case Ext(code=code, data=payload) if code in _TEXTS:
            name, text_of, _ = _TEXTS[code]
            return {name: text_of(bytes(payload))}
        case Ext(code=code, data=payload) if code in _NESTED:
            return {_NESTED[code]: tell(_decode(bytes(payload)))}
        case Ext(code=code):
            raise ValueNotDecodable(f"extension code {code} is unknown: a newer fsm_ray wrote it")
    return value


def _is_typed(value: Mapping[Any, Any]) -> bool:
    return len(value) == 1 and str(next(iter(value))).startswith("$")


def _read(value: Any) -> Any:
    """What msgspec makes the encoded form from.

    Raises:
        InvalidData: it is nothing that `_to_json` tells.
    """
    if type(value) is int:
        return wire.pack_int(value)
    if isinstance(value, list):
        return [_read(item) for item in value]
    if not isinstance(value, dict):
        return value
    if not _is_typed(value):
        return {name: _read(item) for name, item in value.items()}
    ((name, content),) = value.items()
    try:
        return _read_typed(name, content)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise InvalidData(f"{reprlib.repr(value)} is no value of a known type: {error!r:.200}") from error


def _read_typed(name: str, content: Any) -> Any:
    match name:
        case "$float":
            return float(content)
        case "$bytes":
            return _from_base64(content)
        case "$map":
            return {_read(key): _read(item) for key, item in content}
        case _ if name in _TEXT_CODES:
            code = _TEXT_CODES[name]
            return Ext(code, _TEXTS[code][2](content))
    return Ext(_NESTED_CODES[name], _encode(_read(content)))
