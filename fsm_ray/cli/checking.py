"""The commands that look for trouble: `verify` and `doctor`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fsm_ray.cli.exits import EXIT_FAILED
from fsm_ray.cli.shared import Address, AsJson, attach, checked_options, counted, read_url

if TYPE_CHECKING:
    from fsm_ray.verification import ShardReport


def verify(
    store: Annotated[
        str,
        typer.Argument(
            metavar="STORE_URL",
            callback=read_url,
            help="The bot's `store=`, as `rocksdb:///dir`, or `env:NAME` of a variable that has it.",
            show_default=False,
        ),
    ],
    bot_name: Annotated[
        str | None,
        typer.Argument(metavar="BOT", help="One bot. Default: all that are there.", show_default=False),
    ] = None,
    *,
    encryption_keys: Annotated[
        str | None,
        typer.Option(
            metavar="WHERE",
            help="The bot's `encryption_keys=`: `file:///keys.json` or `env:NAME`. They are read here.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check what a store holds, without Ray. Nothing is written, and the bot may run meanwhile.

    Checked are: who owns each shard, and in which format; that records, keys and the answers to writes can be
    read; that each record lies in the shard and slot of its key, and none is of a later version than its
    shard. A rocksdb store is read where its directory is: on the bot's node. What is encrypted is opened with
    --encryption-keys, and all should be encrypted then, unless the keys' file accepts plain records; without
    them, only its form is checked.
    """
    import asyncio

    checked_options(
        {"store": "STORE_URL", "encryption_keys": "--encryption-keys"},
        {"store": store, "encryption_keys": encryption_keys},
    )

    async def look_through() -> list[ShardReport]:
        from fsm_ray.verification import verify as reports

        found = []
        async for report in reports(store, bot_name, encryption_keys=encryption_keys):
            _tell(report, as_json=as_json)
            found.append(report)
        return found

    reports = asyncio.run(look_through())
    faults = sum(len(report.findings) + report.more_findings for report in reports)
    if not as_json:
        what = f" of {bot_name}" if bot_name else ""
        records = sum(report.records for report in reports)
        typer.echo(
            f"{counted(len(reports), 'shard')}{what}, {counted(records, 'record')}: {_sum(faults, reports)}"
        )
    if faults or not reports:
        raise typer.Exit(EXIT_FAILED)


def _sum(faults: int, reports: list[ShardReport]) -> str:
    if faults:
        return counted(faults, "finding")
    return "all is well" if reports else "there is nothing there"


def doctor(
    *,
    store: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            callback=read_url,
            help="Also check the way to this store, from where a bot's actors run. Of a URL with a password,"
            " better `env:NAME` of a variable that has it.",
        ),
    ] = None,
    node_resource: Annotated[
        str | None,
        typer.Option(metavar="RESOURCE", help="The bot's `node_resource`, for a rocksdb store."),
    ] = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Check what bots need, and say how to mend what is wrong. Nothing is changed.

    Checked are: Python and package versions; Ray, and the file in which it remembers its address; on each
    node fsm_ray's version, the directory of its sockets, the clock and the priority of workers; the way to a
    store; and of each bot, whether it answers, over sockets, too, and whether its nodes reach its store.
    """
    from fsm_ray.cli.doctor import examine
    from fsm_ray.cli.texts import printable, to_line

    if store is not None:
        checked_options(
            {"store": "--store", "node_resource": "--node-resource"},
            {"store": store, "node_resource": node_resource},
        )
    problems = 0
    for check in examine(address, store, node_resource, attach):
        problems += check.outcome == "problem"
        if as_json:
            typer.echo(to_line(check._asdict()))
            continue
        mark, colour = _MARKS[check.outcome]
        told = " ".join(check.told.split())
        styled = mark if os.environ.get("NO_COLOR") else typer.style(mark, fg=colour)
        typer.echo(f"{styled} {printable(f'{check.name}: {told}')}")
        if check.cure:
            typer.echo(f"          to mend it: {printable(check.cure)}")
    if not as_json:
        typer.echo(counted(problems, "problem") if problems else "All is well.")
    if problems:
        raise typer.Exit(EXIT_FAILED)


_MARKS = {"ok": ("ok      ", "green"), "hint": ("hint    ", "yellow"), "problem": ("problem ", "red")}


def _tell(report: ShardReport, *, as_json: bool) -> None:
    from fsm_ray.cli.texts import printable, to_line

    if as_json:
        typer.echo(to_line(_to_json(report)))
        return
    shards = "" if report.shards is None else f" of {report.shards}"
    version = "no version" if report.version is None else f"version {report.version}"
    # A name that is no bot's may lie in a store, too.
    typer.echo(
        f"{printable(report.bot_name)} shard {report.shard}{shards}: {counted(report.records, 'record')}, "
        f"{counted(report.sessions, 'session')}, {version}"
    )
    if hint := _unseen(report):
        typer.echo(printable(f"  {hint}"))
    for finding in report.findings:
        typer.echo(printable(f"  {finding.where}: {finding.problem}"))
    if report.more_findings:
        typer.echo(f"  and {report.more_findings:,} more")


def _unseen(report: ShardReport) -> str | None:
    """What was not looked into for want of keys, and how to."""
    if report.is_opened or not (report.encrypted_records or report.encrypted_sessions):
        return None
    ids = f" with {', '.join(sorted(report.key_ids))}" if report.key_ids else ""
    return (
        f"{counted(report.encrypted_records, 'record')} and {counted(report.encrypted_sessions, 'session')}"
        f" are encrypted{ids}, and were not looked into: give --encryption-keys"
    )


def _to_json(report: ShardReport) -> dict[str, Any]:
    owner = report.owner
    return {
        "bot": report.bot_name,
        "shard": report.shard,
        "shards": report.shards,
        "epoch": None if owner is None else owner.epoch,
        "version": report.version,
        "records": report.records,
        "sessions": report.sessions,
        "encrypted_records": report.encrypted_records,
        "encrypted_sessions": report.encrypted_sessions,
        "key_ids": sorted(report.key_ids),
        "unseen": _unseen(report),
        "findings": [{"where": each.where, "problem": each.problem} for each in report.findings],
        "more_findings": report.more_findings,
    }
