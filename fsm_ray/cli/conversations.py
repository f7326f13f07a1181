"""The commands about one conversation: `get`, `set` and `clear`."""

from __future__ import annotations

import time
from collections.abc import Hashable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fsm_ray.cli.exits import EXIT_FAILED
from fsm_ray.cli.shared import Address, AsJson, BotName, Yes, attached, confirm, tell
from fsm_ray.errors import VersionConflict

if TYPE_CHECKING:
    from fsm_ray.storage import Storage

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


def get(bot_name: BotName, key: Key, *, address: Address = None, as_json: AsJson = False) -> None:
    """Print a conversation: flow, state, data, version and expiry.

    Without a record, this ends with exit code 1.
    """
    from fsm_ray.cli.texts import key_text, printable, read_key, state_json, to_line
    from fsm_ray.transfer.typed_json import key_to_json

    found_key = read_key(key)
    with attached(address) as storage:
        state = storage.get_state(bot_name, found_key)
    if state is None:
        if as_json:
            typer.echo("null")
        tell(f"{bot_name} has no record of {key_text(found_key)}")
        raise typer.Exit(EXIT_FAILED)
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

    Values in the data keep their types as in exports: `{"$tuple": [1, 2]}`, `{"$datetime": ...}`. A bot's
    workers may hold the conversation in a turn at that moment; theirs is refused then, and tried again.
    """
    from fsm_ray.cli.texts import front_text, key_text, read_data, read_key, to_line
    from fsm_ray.state import State
    from fsm_ray.transfer.typed_json import key_to_json

    if flow is state is data is None:
        raise typer.BadParameter("say what to write", param_hint="--flow, --state or --data")
    found_key = read_key(key)
    fields = {} if data is None else read_data(data)
    given: dict[str, Any] = {"expected_version": expected_version, "ttl_s": ttl}
    with attached(address) as storage:
        if merge:
            written = _merge(storage, bot_name, found_key, (flow, state, fields), given)
        else:
            written = State(flow=flow, state=state, data=fields)
            written.version = storage.set_state(bot_name, found_key, written, **given)
    front = front_text(written.flow, written.state)
    if as_json:
        typer.echo(to_line({"key": key_to_json(found_key), "version": written.version}))
    else:
        fields_told = f"{len(written.data):,} field{'' if len(written.data) == 1 else 's'} of data"
        typer.echo(
            f"{bot_name} {key_text(found_key)} is in {front} with {fields_told}, version {written.version}"
        )


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
    from fsm_ray.transfer.typed_json import key_to_json

    found_key = read_key(key)
    with attached(address) as storage:
        if not yes:
            state = storage.get_state(bot_name, found_key)
            if state is not None:
                confirm(f"Clear {conversation_line(found_key, state)}?", yes=yes)
        was_there = storage.clear(bot_name, found_key, expected_version=expected_version)
    if as_json:
        typer.echo(to_line({"key": key_to_json(found_key), "cleared": was_there}))
    elif was_there:
        typer.echo(f"Cleared {key_text(found_key)} of {bot_name}")
    else:
        typer.echo(f"{bot_name} has no record of {key_text(found_key)}: nothing to clear")


def _merge(
    storage: Storage,
    bot_name: str,
    key: Hashable,
    given: tuple[str | None, str | None, dict[str, Any]],
    conditions: dict[str, Any],
) -> Any:
    """Write what is given into the record that is there, and return what it is then.

    Raises:
        VersionConflict: others wrote it again and again, or the version is not the one that was expected.
    """
    from fsm_ray.state import State

    flow, state, fields = given
    deadline = time.monotonic() + _MERGE_S
    while True:
        found = storage.get_state(bot_name, key) or State(version=0)
        merged = State(
            flow=found.flow if flow is None else flow,
            state=found.state if state is None else state,
            data=found.data | fields,
        )
        expected = conditions["expected_version"]
        try:
            merged.version = storage.set_state(
                bot_name,
                key,
                merged,
                expected_version=found.version if expected is None else expected,
                ttl_s=conditions["ttl_s"],
            )
        except VersionConflict:
            if expected is not None or time.monotonic() > deadline:
                raise
        else:
            return merged
