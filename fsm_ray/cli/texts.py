"""Keys, data and conversations as text: what people write on a command line, and what they get to read.

Keys and values have the typed form of exports (see `transfer.typed_json`). What is printed has no control
characters: what a bot's users wrote shall not reach an operator's terminal as commands for it.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Hashable
from typing import Any

from fsm_ray.codec import check_key, encode_key
from fsm_ray.errors import (
    FsmRayError,
    InvalidData,
    InvalidInput,
    InvalidKey,
    PickleNotAllowed,
    ValueNotDecodable,
)
from fsm_ray.state import State
from fsm_ray.transfer.typed_json import data_from_json, encoded_to_json, key_from_json, key_to_json

ACCEPTED = (
    "a key is written as a literal of Python or JSON: 42, '\"abc\"' (with its quotes), '(-100, 42)' or "
    "'[-100, 42]', null, true, 1.5, or as exports do: '{\"$uuid\": \"...\"}'"
)

_PLAIN = (type(None), bool, int, float, str, bytes)
_SHOWN = 80
"""Characters of wrong input that are cited."""

_NOT_LITERAL = (ValueError, SyntaxError, TypeError, MemoryError, RecursionError)


def read_key(text: str) -> Hashable:
    """The key that is written there. Nothing is evaluated.

    >>> read_key("42"), read_key("(-100, 42)"), read_key('[-100, "a"]'), read_key('"42"')
    (42, (-100, 42), (-100, 'a'), '42')

    Raises:
        InvalidKey: it is none.
    """
    try:
        key = _key_of(_literal(text.strip()))
        encode_key(key)
    except (*_NOT_LITERAL, FsmRayError) as error:
        why = f" ({error})" if isinstance(error, FsmRayError) else ""
        raise InvalidKey(f"{_shortened(text)} is no key{why}: {ACCEPTED}") from error
    return key


def read_data(text: str) -> dict[str, Any]:
    """The data that is written there as JSON; "-": on stdin.

    >>> read_data('{"name": "Ada", "pair": {"$tuple": [1, 2]}}')
    {'name': 'Ada', 'pair': (1, 2)}

    Raises:
        InvalidData: it is no JSON object, or holds no typed values.
        PickleNotAllowed: it holds a pickle.
    """
    if text == "-":
        text = sys.stdin.read()
    try:
        return data_from_json(json.loads(text), allow_pickle=False)
    except PickleNotAllowed as error:
        raise PickleNotAllowed("data that is given here holds no pickles: write plain values") from error
    except ValueNotDecodable as error:
        raise InvalidData(f"the data that is given holds what is no value here: {error}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidData(
            f'data is written as a JSON object, as {{"name": "Ada"}}; {_shortened(text)} is none: {error}'
        ) from error


def read_position(text: str) -> tuple[int, ...]:
    """The position of a watch, as `watch` tells it.

    Raises:
        InvalidInput: it is none.
    """
    try:
        position = json.loads(text)
    except (ValueError, RecursionError):
        position = None
    if isinstance(position, list) and position and all(type(each) is int and each >= 0 for each in position):
        return tuple(position)
    raise InvalidInput(f"{_shortened(text)} is no position: --since takes what `watch` told, as '[17, 4]'")


def key_text(key: Hashable) -> str:
    """The key as people read it, and as `read_key` takes it.

    >>> import uuid
    >>> key_text((-100, 42)), key_text("abc"), key_text(uuid.UUID(int=1))
    ('(-100, 42)', "'abc'", '{"$uuid": "00000000-0000-0000-0000-000000000001"}')
    """
    try:
        shown = repr(key)
        if shown.isprintable() and encode_key(read_key(shown)) == encode_key(key):
            return shown
    except (InvalidKey, ValueError):
        pass  # it is more than a literal, or an int of more digits than Python tells
    return to_line(key_to_json(key))


def front_text(flow: str | None, state: str | None) -> str:
    """Flow and state for people.

    >>> front_text("order", "pay"), front_text(None, "pay"), front_text("order", None), front_text(None, None)
    ('order:pay', 'pay', 'order:-', '-')
    """
    return printable(f"{flow}:{state or '-'}" if flow is not None else state or "-")


def state_json(state: State) -> dict[str, Any]:
    """A conversation, as an `EncodedStorage` reads it, as JSON tells it, but for its key."""
    return {
        "flow": state.flow,
        "state": state.state,
        "data": encoded_to_json(state.data),
        "version": state.version,
        "expires_at": None if state.expires_at is None else state.expires_at.isoformat(),
    }


def conversation_line(key: Hashable, state: State) -> str:
    """A conversation, as an `EncodedStorage` reads it, in one line, for people."""
    expires = "" if state.expires_at is None else f"  until {state.expires_at:%Y-%m-%d %H:%M:%S}Z"
    data = to_line(encoded_to_json(state.data))
    return f"{key_text(key)}  {front_text(state.flow, state.state)}  v{state.version}{expires}  {data}"


def to_line(value: Any, *, indent: int | None = None) -> str:
    r"""The value as JSON, without control characters.

    >>> print(to_line({"name": "Zo\u00eb \u009b2J"}))
    {"name": "Zoë \u009b2J"}
    """
    return printable(json.dumps(value, ensure_ascii=False, indent=indent), keep="\n" if indent else "")


def counted(number: int, noun: str) -> str:
    """The number, and the noun in the form that goes with it.

    >>> counted(1, "conversation"), counted(1_000, "conversation")
    ('1 conversation', '1,000 conversations')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def printable(text: str, keep: str = "") -> str:
    """The text, with the escapes of JSON for what no terminal should get."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() or each in keep else json.dumps(each)[1:-1] for each in text)


def _literal(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return ast.literal_eval(text)


def _key_of(part: Any) -> Hashable:
    if isinstance(part, list | tuple):
        return tuple(_key_of(each) for each in part)
    if isinstance(part, dict) and all(isinstance(name, str) for name in part):
        return _typed_part(part)
    if type(part) in _PLAIN:
        return part  # type: ignore[no-any-return]
    raise InvalidKey(f"{_shortened(repr(part))} is no part of a key")


def _typed_part(part: dict[str, Any]) -> Hashable:
    """The part; one of a class that cannot be imported here is as good as it is encoded."""
    try:
        return key_from_json(part)
    except ValueNotDecodable as error:
        if error.key is None:
            raise
        check_key(encode_key(error.key))
        key: Hashable = error.key
        return key


def _shortened(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")
