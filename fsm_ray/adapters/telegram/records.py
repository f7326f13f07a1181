"""What of python-telegram-bot's data and conversations goes into records, and how."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, MutableMapping
from typing import Any

from telegram.ext import ConversationHandler

from fsm_ray.codec import decode_key, encode_key
from fsm_ray.state import State

ConversationKey = tuple[int | str, ...]
CallbackData = tuple[list[tuple[str, float, dict[str, Any]]], dict[str, str]]

RecordKey = tuple[str] | tuple[str, int]

BOT, CALLBACK = ("bot",), ("callback",)
"""The keys of the records of the bot's data, and of the callback data."""


def conversation_key(name: str, key: ConversationKey) -> tuple[str | int, ...]:
    """The key of the record of a conversation of the handler of this name.

    Examples:
        >>> conversation_key("registration", (-100, 7))
        ('conversation', 'registration', -100, 7)
    """
    return ("conversation", name, *key)


def conversation_flow(name: str) -> str:
    """The flow of the conversations of the handler of this name.

    Examples:
        >>> conversation_flow("registration")
        'conversation:registration'
    """
    return f"conversation:{name}"


def conversation_record(name: str, state: object | None) -> State | None:
    """The record of a conversation of the handler of this name; None: it has ended, and there is none.

    A state that is text or a number is the record's too, so that scans find conversations by it.

    Examples:
        >>> conversation_record("registration", 1).state
        '1'
    """
    if state is None or state == ConversationHandler.END:
        return None
    shown = str(state) if type(state) in {str, int} else None
    return State(flow=conversation_flow(name), state=shown, data={"state": state})


def callback_fields(data: CallbackData) -> dict[Hashable, Any]:
    """The fields of the record of the callback data, by their names: one for each keyboard and each query."""
    keyboards, queries = data
    sent: dict[Hashable, Any] = {("keyboard", name): rest for name, *rest in keyboards}
    return sent | {("query", name): keyboard for name, keyboard in queries.items()}


def callback_data(fields: Mapping[Any, Any]) -> CallbackData:
    """The callback data that has these fields, the keyboard first that was used the longest ago."""
    keyboards = [(name, *rest) for (kind, name), rest in fields.items() if kind == "keyboard"]
    keyboards.sort(key=lambda keyboard: keyboard[1])
    return keyboards, {name: keyboard for (kind, name), keyboard in fields.items() if kind == "query"}


def fields_of(data: Any) -> MutableMapping[Any, Any]:
    """What is stored of data that is a mapping, or an object: by name, to be changed in place."""
    fields: MutableMapping[Any, Any] = data if isinstance(data, MutableMapping) else vars(data)
    return fields


def by_encoded_name(data: Any) -> dict[str, Any]:
    """The data as its record has it.

    Examples:
        >>> by_encoded_name({"name": "Ada"})
        {'name': 'Ada'}
    """
    return {encoded_name(name): value for name, value in fields_of(data).items()}


def encoded_name(name: Hashable) -> str:
    """The name of a field of a record: a str is its own, unless it might be mistaken for another.

    Raises:
        InvalidKey: it cannot be encoded.
    """
    if type(name) is str and not name.startswith("\0"):
        return name
    return "\0" + encode_key(name).hex()


def decoded_name(name: str) -> Hashable:
    """The name that this stands for in a record."""
    return decode_key(bytes.fromhex(name[1:])) if name.startswith("\0") else name
