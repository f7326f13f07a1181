"""The commands about whole bots: `bots`, `describe` and `drop`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import typer

from fsm_ray.cli.shared import Address, AsJson, BotName, Yes, attached, confirm, counted, status
from fsm_ray.errors import NamespaceUnavailable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from fsm_ray.hosting import ShardDescription
    from fsm_ray.routing.directory import BotDescription
    from fsm_ray.storage import Storage

Columns = dict[str, tuple[list[str], str]]
"""Name -> what it is of each shard, and of all."""

_WIDE = 1_000
"""Characters of a line where nobody may be looking; few options of a bot are longer."""


def bots(*, address: Address = None, as_json: AsJson = False) -> None:
    """List the bots of the cluster, a name a line."""
    with attached(address) as storage:
        names = storage.bots()
    from fsm_ray.cli.texts import to_line

    for name in names:
        typer.echo(to_line({"bot": name}) if as_json else name)


def describe(bot_name: BotName, *, address: Address = None, as_json: AsJson = False) -> None:
    """Show a bot's options, and where its shards are, what they hold and do.

    Passwords in the store's URL are not shown. `size` is what keys and records take in the actors' memory;
    `recovery` is how long it took to load them, the last time; `version` is the fsm_ray that an actor runs.
    Of encryption keys, it is shown where they are.
    """
    with attached(address) as storage, status(f"Asking the shards of {bot_name}"):
        description = storage.describe(bot_name)
    if as_json:
        from fsm_ray.cli.texts import to_line

        typer.echo(to_line(_to_json(description)))
    else:
        _show(description)


def drop(bot_name: BotName, *, yes: Yes = False, address: Address = None, as_json: AsJson = False) -> None:
    """End a bot's actors. What its store keeps stays there, and `init` brings it back.

    The records of a `memory://` bot are gone with its actors: export them first.
    """
    with attached(address) as storage:
        what, fate = _at_stake(storage, bot_name)
        confirm(f"Drop bot {bot_name} ({what})? {fate}", yes=yes)
        with status(f"Dropping {bot_name}"):
            storage.drop(bot_name)
    if as_json:
        from fsm_ray.cli.texts import to_line

        typer.echo(to_line({"bot": bot_name, "dropped": True}))
    else:
        typer.echo(f"Dropped {bot_name}. {fate}")


def _at_stake(storage: Storage, bot_name: str) -> tuple[str, str]:
    """What the bot has, and what becomes of its records when it is dropped."""
    from fsm_ray.options import redacted

    try:
        description = storage.describe(bot_name)
    except NamespaceUnavailable:
        return "it does not answer", "What its store keeps, if it is not memory://, stays there."
    options = description.options
    records = sum(shard.statistics.records for shard in description.shards)
    what = f"{counted(options.shards, 'shard')}, {counted(records, 'record')}"
    if options.store_scheme == "memory":
        return what, "Its records lived in its actors alone, and go with them."
    return what, f"Its records stay in {redacted(options.store)}."


def other_versions(shards: Iterable[ShardDescription]) -> str | None:
    """Which shards run another fsm_ray than this process; None: none of them does."""
    from fsm_ray.notes import Version

    numbers: dict[Version | None, list[str]] = {}
    for shard in shards:
        numbers.setdefault(shard.version, []).append(str(shard.shard))
    if not numbers.keys() - {Version()}:
        return None
    told = [
        f"shard{'' if len(each) == 1 else 's'} {', '.join(each)}: {version or 'an unknown version'}"
        for version, each in numbers.items()
    ]
    return f"{'; '.join(told)}; here: {Version()}"


def upgrade_cure(bot_name: str) -> str:
    """How a bot gets to this process's version."""
    import fsm_ray

    return f"install fsm_ray {fsm_ray.__version__} on all nodes, and run: fsm-ray upgrade {bot_name}"


def _to_json(description: BotDescription) -> dict[str, Any]:
    from dataclasses import asdict

    from fsm_ray.options import redacted

    options = description.options.model_dump()
    return {
        "bot": description.bot_name,
        "options": options | {"store": redacted(description.options.store)},
        "is_encrypted": description.options.encryption_keys is not None,
        "other_versions": other_versions(description.shards),
        "shards": [asdict(shard) for shard in description.shards],
    }


def _show(description: BotDescription) -> None:
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = _WIDE  # programs read lines, and cut nothing
    shards = description.shards
    console.print(_options_table(description), markup=False)
    console.print()
    columns = _columns(shards)
    table = _table(columns, with_sums=len(shards) > 1)
    whole = console.measure(table, options=console.options.update(width=_WIDE)).maximum
    if whole <= console.width:
        console.print(table, markup=False)
    else:
        _print_blocks(console, columns, with_sums=len(shards) > 1)
    for shard in shards:
        if shard.restarted_empty:
            console.print(
                f"Shard {shard.shard} was restarted and came back empty: its records lived in memory alone."
            )
    if told_versions := other_versions(shards):
        console.print(f"Not all is of one version. {told_versions}.", markup=False)
        console.print(f"To mend it: {upgrade_cure(description.bot_name)}", markup=False)


def _options_table(description: BotDescription) -> Table:
    from rich.table import Table

    options = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    options.add_column(no_wrap=True)
    options.add_column(overflow="fold")
    told = _to_json(description)["options"]
    told["encryption_keys"] = told["encryption_keys"] or "- (what its store keeps is not encrypted)"
    for name, value in {"bot": description.bot_name, **told}.items():
        options.add_row(name, "-" if value is None else str(value), style=None if name == "bot" else "dim")
    return options


def _columns(shards: list[ShardDescription]) -> Columns:
    """What is told of the shards, by its name."""
    statistics = [shard.statistics for shard in shards]
    return {
        "shard": ([str(shard.shard) for shard in shards], "all"),
        "node": ([shard.node_id[:8] for shard in shards], f"{len({each.node_id for each in shards})}"),
        "version": ([shard.version.fsm_ray if shard.version else "-" for shard in shards], ""),
        "pid": ([str(shard.pid) for shard in shards], ""),
        "records": _summed([each.records for each in statistics]),
        "size": _summed([shard.size_bytes for shard in shards], _size),
        "operations/s": _summed([each.operations_per_s for each in statistics], "{:,.0f}".format),
        "turns": _summed([each.turns for each in statistics]),
        "waiting": _summed([each.waiting_turns for each in statistics]),
        "recovery": ([f"{shard.recovery_s:.2f} s" for shard in shards], ""),
    }


def _table(columns: Columns, *, with_sums: bool) -> Table:
    """A line for each shard."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), show_footer=with_sums)
    for name, (_, footer) in columns.items():
        table.add_column(name, footer=footer, justify="left" if name == "node" else "right", no_wrap=True)
    for row in zip(*(cells for cells, _ in columns.values()), strict=True):
        table.add_row(*row)
    return table


def _print_blocks(console: Console, columns: Columns, *, with_sums: bool) -> None:
    """A few lines for each shard, where a line has no room for all."""
    from rich.table import Table

    rows = list(zip(*(cells for cells, _ in columns.values()), strict=True))
    if with_sums:
        rows.append(tuple(footer for _, footer in columns.values()))
    for row in rows:
        block = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        for name, cell in zip(columns, row, strict=True):
            if cell:
                block.add_row(name if name == "shard" else f"  {name}", cell)
        console.print(block, markup=False)


def _summed(values: list[Any], shown: Any = "{:,}".format) -> tuple[list[str], str]:
    return [shown(value) for value in values], shown(sum(values))


def _size(size_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size_bytes < 1024:  # noqa: PLR2004
            return f"{size_bytes:,.0f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:,.1f} GiB"
