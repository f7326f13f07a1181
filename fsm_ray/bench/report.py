"""The report as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from fsm_ray.bench.figures import Figure, ratio
from fsm_ray.bench.results import OURS, TARGETS, Cell, Kills, Recovery, Report

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
        yield from (_comparison(report, tasks) for tasks in report.config.tasks)
        yield _legend(report)
    if report.config.stores and report.cells:
        yield _targets_table(report)
    if report.memory:
        yield _memory_table(report)
    if report.sizes:
        yield _sizes_table(report)
    if report.recovery:
        yield _recovery_table(report.recovery)
    if report.kills:
        yield _kills_table(report.kills)


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
        table.add_row(name, *_row(report, report.cell(name, tasks)), style="bold" if name == OURS else None)
    failed = [cell for cell in report.cells if cell.tasks == tasks and cell.failure is not None]
    return Group(table, *(Text(f"{cell.contender} fails: {cell.failure}", "red") for cell in failed))


def _row(report: Report, cell: Cell | None) -> tuple[str, ...]:
    if cell is None:
        return (_NOT_APPLICABLE,) * 4
    if cell.failure is not None:
        return (f"fails: {cell.failure.partition(':')[0]}", *(_NOT_APPLICABLE,) * 3)
    return (
        _rate(cell.operations_per_s),
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
        table.add_row(each.way, *_seconds(each.seconds), *compared)
    return table


def _kills_table(kills: Kills) -> RenderableType:
    table = _table(f"{len(kills.answered_s.rounds)} times kill -9 in mid-write, rocksdb store", "until")
    _add_numbers(table, "seconds", "worst")
    table.add_row("a read is answered", *_seconds(kills.answered_s))
    table.add_row("of it: the store is opened and loaded", *_seconds(kills.recovery_s))
    table.add_row("a bare Ray actor answers", *_seconds(kills.bare_s))
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


def _seconds(figure: Figure) -> tuple[str, str]:
    return f"{figure.median:.3f}", f"{max(figure.rounds):.3f}"


def _rate(figure: Figure | None) -> str:
    return _NOT_APPLICABLE if figure is None else f"{figure.median:,.0f} ±{figure.spread:4.0%}"


def _times(ratio: float | None) -> str:
    return (
        _NOT_APPLICABLE if ratio is None else f"{ratio:.2f}x" if ratio < _ROUNDED_FROM else f"{ratio:,.1f}x"
    )
