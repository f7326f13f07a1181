"""The commands about one conversation: `get`, `set` and `clear`."""

from __future__ import annotations

import time
from collections.abc import Hashable
from typing import TYPE_CHECKING, Annotated, NamedTuple, NoReturn

import typer

from fsm_ray.cli.exits import EXIT_FAILED
from fsm_ray.cli.shared import Address, AsJson, BotName, Yes, attached, confirm, tell
from fsm_ray.errors import VersionConflict

if TYPE_CHECKING:
    from fsm_ray.state import State
    from fsm_ray.transfer.encoded import EncodedStorage

Key = Annotated[
    str,
    typer.Argument(
        metavar="KEY",
        show_default=False,
        help="""The conversation's key, a literal: `42`, `'"abc"'`, `'(-100, 42)'` or `'[-100, 42]'`.""",
    ),
]
ExpectedVersion = Annotated[
    int | None,
    typer.Option(min=0, help="Only over the record of this version; 0: only if there is none."),
]

_MERGE_S = 10.0
"""How long a merge is tried, while others write the same conversation."""

_ASKED_ABOUT = 200
"""Characters of a conversation that are shown before it is cleared."""


class _Given(NamedTuple):
    """What is to be written."""

    flow: str | None
    state: str | None
    data: dict[str, object]
    expected_version: int | None
    ttl_s: float | None


def get(bot_name: BotName, key: Key, *, address: Address = None, as_json: AsJson = False) -> None:
    """Print a conversation: flow, state, data, version and expiry.

    Without a record, this ends with exit code 1.
    """
    from fsm_ray.cli.texts import key_text, printable, read_key, state_json, to_line
    from fsm_ray.transfer.encoded import EncodedStorage
    from fsm_ray.transfer.typed_json import key_to_json

    found_key = read_key(key)
    with attached(address) as storage, EncodedStorage.of(storage) as encoded:
        state = encoded.get_state(bot_name, found_key)
    if state is None:
        if as_json:
            typer.echo("null")
        _fail_without_record(bot_name, found_key)
    told = state_json(state)
    if as_json:
        typer.echo(to_line({"key": key_to_json(found_key), **told}))
        return
    typer.echo(f"key      {key_text(found_key)}")
    for name in ("flow", "state", "version", "expires_at"):
        told_value = "-" if told[name] is None else printable(str(told[name]))
        typer.echo(f"{name.removesuffix('_at'):8} {told_value}")
    typer.echo(f"data     {to_line(told['data'], indent=2)}")


def set_(
    bot_name: BotName,
    key: Key,
    *,
    flow: Annotated[str | None, typer.Option(help="The flow; without, there is none.")] = None,
    state: Annotated[str | None, typer.Option(help="The state; without, there is none.")] = None,
    data: Annotated[
        str | None, typer.Option(metavar="JSON", help='The data, a JSON object; "-": read it from stdin.')
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Keep what is not given, and merge the data into what is there.")
    ] = False,
    expected_version: ExpectedVersion = None,
    ttl: Annotated[
        float | None, typer.Option(metavar="SECONDS", help='How long the record is to live; "inf": for ever.')
    ] = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Write a conversation: replace its whole record, or, with --merge, what is given of it.

    Values in the data keep their types as in exports: `{"$tuple": [1, 2]}`, `{"$datetime": ...}`. With
    --merge, a time to live that the record was given stays, unless --ttl gives another. A bot's workers may
    hold the conversation in a turn at that moment; theirs is refused then, and tried again.
    """
    from fsm_ray.cli.texts import counted, front_text, key_text, read_data, read_key, to_line
    from fsm_ray.transfer.encoded import EncodedStorage
    from fsm_ray.transfer.typed_json import key_to_json

    if flow is state is data is None and not (merge and ttl is not None):
        raise typer.BadParameter("say what to write", param_hint="--flow, --state or --data")
    found_key = read_key(key)
    given = _Given(flow, state, {} if data is None else read_data(data), expected_version, ttl)
    with attached(address) as storage, EncodedStorage.of(storage) as encoded:
        written = (_merge if merge else _replace)(encoded, bot_name, found_key, given)
    front = front_text(written.flow, written.state)
    if as_json:
        typer.echo(to_line({"key": key_to_json(found_key), "version": written.version}))
    else:
        fields = f"{counted(len(written.data), 'field')} of data"
        typer.echo(f"{bot_name} {key_text(found_key)} is in {front} with {fields}, version {written.version}")


def clear(
    bot_name: BotName,
    key: Key,
    *,
    expected_version: ExpectedVersion = None,
    yes: Yes = False,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Remove a conversation's record: flow, state and data. Where there is none, nothing happens."""
    from fsm_ray.cli.texts import conversation_line, key_text, read_key, to_line
    from fsm_ray.transfer.encoded import EncodedStorage
    from fsm_ray.transfer.typed_json import key_to_json

    found_key = read_key(key)
    with attached(address) as storage, EncodedStorage.of(storage) as encoded:
        if not yes:
            state = encoded.get_state(bot_name, found_key)
            if state is not None:
                line = conversation_line(found_key, state)
                told = f"{line[:_ASKED_ABOUT]}..." if len(line) > _ASKED_ABOUT else line
                confirm(f"Clear {told}?", yes=yes)
        was_there = storage.clear(bot_name, found_key, expected_version=expected_version)
    if as_json:
        typer.echo(to_line({"key": key_to_json(found_key), "cleared": was_there}))
    elif was_there:
        typer.echo(f"Cleared {key_text(found_key)} of {bot_name}")
    else:
        typer.echo(f"{bot_name} has no record of {key_text(found_key)}: nothing to clear")


def _fail_without_record(bot_name: str, key: Hashable) -> NoReturn:
    from fsm_ray.cli.texts import key_text

    tell(f"{bot_name} has no record of {key_text(key)}")
    raise typer.Exit(EXIT_FAILED)


def _replace(storage: EncodedStorage, bot_name: str, key: Hashable, given: _Given) -> State:
    """Write the whole record, and return what it is then."""
    from fsm_ray.state import State

    written = State(flow=given.flow, state=given.state, data=given.data)
    written.version = storage.set_state(
        bot_name, key, written, expected_version=given.expected_version, ttl_s=given.ttl_s
    )
    return written


def _merge(storage: EncodedStorage, bot_name: str, key: Hashable, given: _Given) -> State:
    """Write what is given into the record that is there, and return what it is then.

    Raises:
        VersionConflict: others wrote it again and again, or the version is not the one that was expected.
    """
    deadline = time.monotonic() + _MERGE_S
    while True:
        try:
            return _merge_once(storage, bot_name, key, given)
        except VersionConflict:
            if given.expected_version is not None or time.monotonic() > deadline:
                raise


def _merge_once(storage: EncodedStorage, bot_name: str, key: Hashable, given: _Given) -> State:
    """As `_merge`, over the record as it is read first. What is stored in it is not looked into."""
    from fsm_ray.protocol import state_of
    from fsm_ray.state import State

    record = storage.read_record(bot_name, key)
    if record is None and given.flow is given.state is None and not given.data:
        _fail_without_record(bot_name, key)
    found = State(version=0) if record is None else state_of(record)
    merged = State(
        flow=found.flow if given.flow is None else given.flow,
        state=found.state if given.state is None else given.state,
        data=found.data | given.data,
    )
    ttl_s = given.ttl_s
    expected = found.version if given.expected_version is None else given.expected_version
    with storage.transaction(bot_name) as transaction:
        if (merged.flow, merged.state) != (found.flow, found.state):
            if ttl_s is None and record is not None:
                # To enter a state ends a time to live that was given in another.
                ttl_s = storage.kept_ttl_s(bot_name, record)
            transaction.enter_state(
                key, merged.state, flow=merged.flow, expected_version=expected, ttl_s=ttl_s
            )
            expected = None
        if given.data or expected is not None:
            transaction.update_data(key, given.data, expected_version=expected, ttl_s=given.ttl_s)
    merged.version = transaction.version
    return merged
