"""Display: a run on a terminal, while it goes and when it is over."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import Progress, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.progress_bar import ProgressBar
from rich.table import Table

from fsm_ray.demo.report import NO_RECORD, Report

_SHOWN_DIFFERENCES = 5
_REFERENCE = "one worker over aiogram's MemoryStorage"


class _CountingBar(ProgressColumn):
    """A bar for stages that count; others have but their spinner."""

    def render(self, task: Task) -> RenderableType:
        return ProgressBar(task.total, task.completed, width=24) if task.fields["counts"] else ""


class Stage:
    """One stage of a run, while it lasts."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task
        self._start = time.monotonic()
        self._handled = 0

    def advance(self, updates: int) -> None:
        """So many updates more were handled."""
        self._handled += updates
        rate = self._handled / (time.monotonic() - self._start)
        self._progress.advance(self._task, updates)
        self.note(f"{counted(self._handled, 'update')}, {rate:,.0f}/s")

    def note(self, text: str) -> None:
        """Say this beside the stage."""
        self._progress.update(self._task, note=text)


class Display:
    """Shows the stages of a run, one below the other; what is told meanwhile stands above them."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            _CountingBar(),
            console=console,
            redirect_stdout=False,
        )

    @contextmanager
    def stage(self, description: str, total: int | None = None) -> Iterator[Stage]:
        """Show a stage while it lasts, with a bar if a total of updates is given."""
        task = self._progress.add_task(description, total=total, counts=total is not None, note="")
        yield Stage(self._progress, task)
        if total is None:
            self._progress.update(task, total=1, completed=1)

    def tell(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()


def counted(count: int, noun: str) -> str:
    """The number and the noun.

    >>> counted(1, "shard"), counted(2_000, "process")
    ('1 shard', '2,000 processes')
    """
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{count:,} {noun if count == 1 else plural}"


def print_report(report: Report, console: Console) -> None:
    """Print where the conversations stand, how fast that went, and the verdict."""
    console.print()
    console.print(_states_table(report))
    console.print()
    for line in (*_figures(report), *_verdict(report)):
        console.print(line, highlight=False, soft_wrap=True)


def _states_table(report: Report) -> Table:
    table = Table("state", "", box=None, header_style="dim", padding=(0, 3, 0, 0))
    table.columns[1].justify = "right"
    for state, count in sorted(report.states.items(), key=lambda each: (each[0] == NO_RECORD, -each[1])):
        told = f"{state} (cancelled, or never began)" if state == NO_RECORD else state
        table.add_row(told, f"{count:,}", "█" * round(40 * count / report.conversations) or "▏")
    return table


def _figures(report: Report) -> list[str]:
    workers, shards = counted(report.workers, "worker"), counted(report.shards, "shard")
    places = f"{counted(report.processes, 'process')} on {counted(report.nodes, 'node')}"
    return [
        f"{report.updates_per_s:,.0f} updates/s by {workers} ({places}), {shards}",
        f"{counted(report.handovers, 'time')}, a conversation was continued by another process",
    ]


def _verdict(report: Report) -> list[str]:
    conversations = counted(report.conversations, "conversation")
    lines = []
    if report.lost_workers:
        died = f"{counted(report.lost_workers, 'worker')} died"
        lines.append(f"[yellow]! {died}:[/] what was left half done was undone, and done again by others")
    if report.restarted_empty:
        shards = ", ".join(map(str, report.restarted_empty))
        lines.append(f"[red]✗ Records were lost:[/] the actor of shard {shards} died and came back empty.")
        lines.append("  A memory:// store keeps records only as long as its actor lives.")
    if report.failed_updates:
        lines.append(
            f"[red]✗ {counted(report.failed_updates, 'update')} failed:[/] see the logs of the workers."
        )
    if report.differences:
        lines.append(f"[red]✗ {len(report.differences):,} of {conversations} differ[/] from {_REFERENCE}:")
        lines += [f"  {escape(str(each))}" for each in report.differences[:_SHOWN_DIFFERENCES]]
        if len(report.differences) > _SHOWN_DIFFERENCES:
            lines.append(f"  and {len(report.differences) - _SHOWN_DIFFERENCES:,} more")
    if report.stray_records:
        stray = counted(report.stray_records, "record")
        lines.append(f"[red]✗ {stray} too many:[/] no update is of such a conversation.")
    if report.agrees:
        lines.append(f"[green]✓ All {conversations} agree[/] with {_REFERENCE}.")
    return lines
