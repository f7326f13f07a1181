"""The commands about all conversations of a bot: `count`, `scan` and `watch`."""

from __future__ import annotations

import sys
from collections.abc import Hashable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fsm_ray.cli.exits import EXIT_FAILED
from fsm_ray.cli.shared import (
    Address,
    AsJson,
    BotName,
    Flow,
    State,
    attached,
    run_attached,
    tell,
)
from fsm_ray.errors import ChangesMissed, FsmRayError, ScanInterrupted, ValueNotDecodable

if TYPE_CHECKING:
    from fsm_ray.across import Change, Conversation
    from fsm_ray.storage import AsyncStorage

Limit = Annotated[int | None, typer.Option(min=0, help="End after so many.")]


def count(
    bot_name: BotName,
    *,
    by: Annotated[
        Literal["state", "flow"] | None, typer.Option(help="Count each flow, or each state, by itself.")
    ] = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Count a bot's conversations. It takes no longer for a million of them."""
    with attached(address) as storage:
        if by is None:
            total = storage.count(bot_name)
            typer.echo(f'{{"count": {total}}}' if as_json else str(total))
            return
        counts: dict[Any, int] = dict(storage.count(bot_name, by=by))
    from fsm_ray.cli.texts import front_text, to_line

    for front, number in sorted(counts.items(), key=lambda each: (-each[1], repr(each[0]))):
        flow, state = (front, None) if by == "flow" else front
        if as_json:
            typer.echo(
                to_line({"flow": flow} | ({} if by == "flow" else {"state": state}) | {"count": number})
            )
        else:
            shown = front_text(None, flow) if by == "flow" else front_text(flow, state)
            typer.echo(f"{number:>10,}  {shown}")


def scan(
    bot_name: BotName,
    *,
    flow: Flow = None,
    state: State = None,
    after: Annotated[
        str | None, typer.Option(metavar="KEY", help="Begin behind this key; see `fsm-ray get --help`.")
    ] = None,
    limit: Limit = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Print a bot's conversations, a line each; bots may work meanwhile.

    Their order depends on their keys alone, so a scan goes on with --after. None of the bot's classes is
    needed. A conversation that a newer fsm_ray wrote in a way that is unknown here is told on stderr and left
    out, and the exit code is 1 then.
    """
    from fsm_ray.cli.texts import read_key
    from fsm_ray.transfer.encoded import EncodedStorage

    position = None if after is None else read_key(after)
    left, left_out = limit, 0
    with attached(address) as storage, EncodedStorage.of(storage) as encoded:
        while True:
            try:
                for each in encoded.scan(bot_name, flow=flow, state=state, after=position, limit=left):
                    position, left = each.key, None if left is None else left - 1
                    left_out += not _print(each, as_json=as_json)
                break
            except ScanInterrupted:
                continue
            except ValueNotDecodable as error:
                if error.key is None:
                    raise
                position = error.key
                left_out += 1
                _tell_left_out(position, error)
    if left_out:
        raise typer.Exit(EXIT_FAILED)


def watch(
    bot_name: BotName,
    *,
    flow: Flow = None,
    state: State = None,
    since: Annotated[
        str | None,
        typer.Option(metavar="POSITION", help="Go on behind this position, which an earlier watch told."),
    ] = None,
    limit: Limit = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Print what is written to a bot's conversations, as it is written, until Ctrl-C.

    It goes on after an outage. On stderr it tells at its end the position for --since; with --json each
    change has its own.
    """
    from fsm_ray.cli.texts import read_position
    from fsm_ray.transfer.encoded import AsyncEncodedStorage

    start = None if since is None else read_position(since)

    async def follow(storage: AsyncStorage) -> None:
        async with AsyncEncodedStorage.of(storage) as encoded:
            await follow_encoded(encoded)

    async def follow_encoded(storage: AsyncEncodedStorage) -> None:
        position, left = start or await storage.position(bot_name), limit
        try:
            if left == 0:
                return
            async for change in storage.watch(bot_name, flow=flow, state=state, since=position):
                position, left = change.position, None if left is None else left - 1
                typer.echo(_change(change, as_json=as_json))
                if left == 0:
                    return
        except (ChangesMissed, ValueNotDecodable) as error:
            position = error.position or position
            raise
        finally:
            tell(f"to go on: --since '{list(position)}'")

    run_attached(address, follow)


def _print(each: Conversation, *, as_json: bool) -> bool:
    """Whether the conversation was printed, and not left out."""
    try:
        sys.stdout.write(f"{_conversation(each, as_json=as_json)}\n")
    except ValueNotDecodable as error:
        _tell_left_out(each.key, error)
        return False
    return True


def _tell_left_out(key: Hashable, error: FsmRayError) -> None:
    tell(f"{key!r} is left out: {error}")


def _conversation(each: Conversation, *, as_json: bool) -> str:
    from fsm_ray.cli.texts import conversation_line, state_json, to_line
    from fsm_ray.transfer.typed_json import key_to_json

    if as_json:
        return to_line({"key": key_to_json(each.key), **state_json(each.state)})
    return conversation_line(each.key, each.state)


def _change(change: Change, *, as_json: bool) -> str:
    from fsm_ray.cli.texts import conversation_line, front_text, key_text, state_json, to_line
    from fsm_ray.transfer.typed_json import key_to_json

    before = None if change.before is None else dict(zip(("flow", "state"), change.before, strict=True))
    if as_json:
        return to_line(
            {
                "key": key_to_json(change.key),
                "before": before,
                "now": None if change.state is None else state_json(change.state),
                "version": change.version,
                "position": change.position,
            }
        )
    was = "new" if change.before is None else front_text(*change.before)
    if change.state is None:
        return f"{key_text(change.key)}  {was} -> no record  v{change.version}"
    key, rest = conversation_line(change.key, change.state).split("  ", 1)
    return f"{key}  {was} -> {rest}"
