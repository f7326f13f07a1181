"""A progress bar, where somebody may be looking."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from fsm_ray.transfer.loading import Progress, no_progress


@contextmanager
def progress_bar(what: str, console: Console | None = None) -> Generator[Progress, None, None]:
    """What to give an importer as `progress`: a bar on stderr if that is a terminal, and nothing else."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield no_progress
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Bar(*columns, console=console) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
