"""The report as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from fsm_ray.bench.figures import Figure, ratio
from fsm_ray.bench.results import (
    ADAPTER_PEER,
    ADAPTER_TARGET,
    COUNT_TARGET_MS,
    OURS,
    SLOWDOWN_TARGET,
    TARGETS,
    TURN_TARGETS,
    TURNS,
    Cell,
    Kills,
    Race,
    Recovery,
    Report,
    Scan,
)

_NOT_APPLICABLE = "-"
_ROUNDED_FROM = 10


def print_report(report: Report, console: Console) -> None:
    """Print every part that was measured."""
    for part in _parts(report):
        console.print(part)
        console.print()


def _parts(report: Report) -> Iterator[RenderableType]:
    yield _machine_text(report)
    if report.cells:
        yield from _comparisons(report)
    if report.memory:
        yield _memory_table(report)
    if report.sizes:
        yield _sizes_table(report)
    if report.turns:
        yield _turns_table(report)
    if report.race:
        yield _race_table(report.race)
    if report.scan:
        yield _scan_table(report.scan)
    if report.recovery:
        yield _recovery_table(report.recovery)
    if report.kills:
        yield _kills_table(report.kills)
    if report.adapter:
        yield _adapter_table(report)


def _comparisons(report: Report) -> Iterator[RenderableType]:
    yield from (_comparison(report, tasks) for tasks in report.config.tasks)
    yield _legend(report)
    if report.config.stores:
        yield _targets_table(report)


def _machine_text(report: Report) -> Text:
    machine = report.machine
    versions = ", ".join(f"{package} {version}" for package, version in machine.versions.items())
    config, disk = report.config, report.disk
    on_disk = disk and (
        f"\ndurable stores on {disk.filesystem}, where fdatasync of 4 KiB takes {disk.fdatasync_us:,.0f} µs"
    )
    return Text(
        f"{machine.cpu}, {machine.cores} cores, load {machine.load_before:.1f} to {machine.load_after:.1f}; "
        f"{machine.system}; {machine.python}; {versions}; {machine.started_at}\n"
        f"medians of {config.rounds} rounds of {config.seconds:g} s, ± half the range of the rounds"
        f"{on_disk or ''}"
    )


def _comparison(report: Report, tasks: int) -> RenderableType:
    table = _table(f"{tasks} concurrent {'task' if tasks == 1 else 'tasks'}", "contender")
    _add_numbers(table, "operations/s", "p50 µs", "p99 µs", "fsm-ray is")
    for name in report.labels:
        table.add_row(name, *_row(report, report.cell(name, tasks)), style=_style(name == OURS))
    failed = [cell for cell in report.cells if cell.tasks == tasks and cell.failure is not None]
    return Group(table, *map(_failure, failed))


def _failure(cell: Cell) -> Text:
    return Text(f"{cell.contender} fails: {cell.failure}", "red")


def _style(is_ours: bool) -> str | None:  # noqa: FBT001 - what it asks
    return "bold" if is_ours else None


def _row(report: Report, cell: Cell | None) -> tuple[str, ...]:
    if cell is None:
        return (_NOT_APPLICABLE,) * 4
    return (
        _rate_of(cell),
        _number(cell.p50_us),
        _number(cell.p99_us),
        _times(report.times_faster(cell)),
    )


def _legend(report: Report) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    for name, label in report.labels.items():
        table.add_row(name, label)
    return table


def _targets_table(report: Report) -> Table:
    table = _table("durable stores", "operations/s of", "against")
    _add_numbers(table, "ratio", "wanted")
    for target in TARGETS:
        if target.contender in report.labels:
            ours, theirs = f"{target.contender}, {target.tasks}", f"{target.peer}, {target.peer_tasks}"
            table.add_row(ours, theirs, _times(report.reached(target)), _times(target.wanted))
    return table


def _recovery_table(recovery: Sequence[Recovery]) -> Table:
    ours = recovery[0]
    table = _table(f"recovery of {ours.conversations:,} conversations, until", "")
    _add_numbers(table, "seconds", "worst", "the first takes", "wanted")
    for each in recovery:
        compared = (_times(ratio(ours.seconds, each.seconds)), "<= 1") if each.is_peer else ("", "")
        table.add_row(each.way, *_three_digits(each.seconds), *compared)
    return table


def _kills_table(kills: Kills) -> RenderableType:
    table = _table(f"{len(kills.answered_s.rounds)} times kill -9 in mid-write, rocksdb store", "until")
    _add_numbers(table, "seconds", "worst")
    table.add_row("a read is answered", *_three_digits(kills.answered_s))
    table.add_row("of it: the store is opened and loaded", *_three_digits(kills.recovery_s))
    table.add_row("a bare Ray actor answers", *_three_digits(kills.bare_s))
    return Group(
        table,
        Text(f"without the recovery {kills.restart_ratio:.2f}x the bare actor's; wanted: at most 1.3x"),
        Text(
            f"{kills.acknowledged:,} writes acknowledged, {kills.unknown:,} of unknown outcome; "
            f"{kills.lost:,} lost, {kills.applied_twice:,} applied twice",
            "" if kills.is_sound else "red",
        ),
    )


def _memory_table(report: Report) -> Table:
    table = _table("memory per conversation", "contender", "counted by")
    _add_numbers(table, "conversations", "bytes each")
    for memory in report.memory:
        count, each = f"{memory.conversations:,}", f"{memory.bytes_each:,.0f}"
        table.add_row(memory.contender, memory.counted_by, count, each)
    return table


def _sizes_table(report: Report) -> Table:
    table = _table("fsm-ray by number of conversations")
    _add_numbers(table, "tasks", "conversations", "operations/s", "µs each", "cost of the smallest")
    for cell in report.sizes:
        table.add_row(
            f"{cell.tasks}",
            f"{cell.conversations:,}",
            _rate(cell.operations_per_s),
            f"{cell.us_per_operation:.1f}",
            _times(report.relative_cost(cell)),
        )
    return table


def _turns_table(report: Report) -> RenderableType:
    table = _table("whole updates", "contender")
    _add_numbers(table, "tasks", "updates/s", "a turn is", "wanted")
    for cell in report.turns:
        if is_ours := cell.contender == TURNS:
            compared = ("", "")
        else:
            compared = (_times(report.times_faster(cell, TURNS)), _wanted_turns(cell.tasks))
        table.add_row(cell.contender, f"{cell.tasks}", _rate_of(cell), *compared, style=_style(is_ours))
    what = Text("an update: lock, load, two writes of data, a transition, commit, unlock")
    return Group(table, what, *(_failure(cell) for cell in report.turns if cell.failure is not None))


def _wanted_turns(tasks: int) -> str:
    return f">= {TURN_TARGETS[tasks]:g}" if tasks in TURN_TARGETS else ""


def _adapter_table(report: Report) -> RenderableType:
    config = report.config
    table = _table(f"{config.adapter}'s dispatcher, fsm_ray on {next(iter(config.stores), 'memory')}", "over")
    _add_numbers(table, "tasks", "updates/s", f"of {ADAPTER_PEER}", "wanted")
    for cell in report.adapter:
        is_ours = cell.contender != ADAPTER_PEER
        compared = (_times(report.times_peer(cell)), f">= {ADAPTER_TARGET:g}") if is_ours else ("", "")
        table.add_row(cell.contender, f"{cell.tasks}", _rate_of(cell), *compared, style=_style(is_ours))
    what = Text("an update: isolation, a state filter, get_data, update_data, set_state, an answer")
    return Group(table, what, *(_failure(cell) for cell in report.adapter if cell.failure is not None))


def _race_table(race: Sequence[Race]) -> Table:
    table = _table("race for one conversation", "contender")
    _add_numbers(table, "updates", "lost")
    for each in race:
        is_unsound = each.contender == OURS and each.lost
        table.add_row(
            each.contender, f"{each.updates:,}", f"{each.lost:,}", style="red" if is_unsound else None
        )
    return table


def _scan_table(scan: Scan) -> Table:
    table = _table(f"fsm-ray with {scan.conversations:,} conversations, one shard", "")
    _add_numbers(table, "median", "worst", "ratio", "wanted")
    table.add_row("count by state, ms", *_three_digits(scan.count_ms), "", f"< {COUNT_TARGET_MS:g}")
    table.add_row(f"scan, s ({scan.records_per_s:,.0f} records/s)", *_three_digits(scan.scan_s))
    table.add_row("p99 of a write, 16 tasks, µs", *_whole(scan.alone_p99_us))
    slower = (_times(scan.slowdown), f"<= {SLOWDOWN_TARGET:g}")
    table.add_row("the same while a scan goes on, µs", *_whole(scan.beside_p99_us), *slower)
    return table


def _table(title: str, *text_columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE, padding=(0, 0, 0, 1))
    for heading in text_columns:
        table.add_column(heading, no_wrap=True)
    return table


def _add_numbers(table: Table, *headings: str) -> None:
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)


def _number(figure: Figure | None) -> str:
    return _NOT_APPLICABLE if figure is None else f"{figure.median:,.0f}"


def _three_digits(figure: Figure) -> tuple[str, str]:
    return f"{figure.median:.3f}", f"{max(figure.rounds):.3f}"


def _whole(figure: Figure) -> tuple[str, str]:
    return f"{figure.median:,.0f}", f"{max(figure.rounds):,.0f}"


def _rate_of(cell: Cell) -> str:
    return (
        _rate(cell.operations_per_s) if cell.failure is None else f"fails: {cell.failure.partition(':')[0]}"
    )


def _rate(figure: Figure | None) -> str:
    return _NOT_APPLICABLE if figure is None else f"{figure.median:,.0f} ±{figure.spread:4.0%}"


def _times(ratio: float | None) -> str:
    return (
        _NOT_APPLICABLE if ratio is None else f"{ratio:.2f}x" if ratio < _ROUNDED_FROM else f"{ratio:,.1f}x"
    )
