"""The report as a picture: throughput as bars on a logarithmic scale, and below it memory and sizes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Picture
from matplotlib.ticker import EngFormatter, NullFormatter

from fsm_ray.bench.figures import Figure
from fsm_ray.bench.results import OURS, Cell, Memory, Report

_OURS_COLOUR, _PEER_COLOUR, _LIMIT_COLOUR = "#c8553d", "#6b8fb5", "#c4c4c4"
_TEXT_COLOUR, _ABSENT_COLOUR, _FAILURE_COLOUR = "#444444", "#999999", "#a02020"
_LIMITS = ("aiogram-memory", "echo")
"""Contenders that share records with nobody, or keep none: what could be reached, rather than rivals."""

_PANEL_WIDTH_IN, _BAR_HEIGHT_IN, _MARGIN_IN, _DETAILS_HEIGHT_IN = 4.6, 0.34, 1.2, 3.0
_DOTS_PER_INCH = 130


def write_plot(report: Report, path: Path) -> None:
    """Write the picture as a PNG."""
    levels = report.config.tasks if report.cells else ()
    bars_in = _MARGIN_IN + _BAR_HEIGHT_IN * len(report.labels) if levels else 0.0
    details_in = _DETAILS_HEIGHT_IN if report.memory or report.sizes else 0.0
    heights = [height for height in (bars_in, details_in) if height] or [_MARGIN_IN]
    size = (max(2, len(levels)) * _PANEL_WIDTH_IN, sum(heights) + _MARGIN_IN / 2)
    picture = Picture(figsize=size, layout="constrained")
    FigureCanvasAgg(picture)
    picture.suptitle(_title(report), fontsize=10, color=_TEXT_COLOUR)
    rows = picture.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    if levels:
        for panel, tasks in zip(
            rows[0].subplots(1, len(levels), sharey=True, squeeze=False)[0], levels, strict=True
        ):
            _draw_comparison(panel, report, tasks)
    if details_in:
        memory_panel, sizes_panel = rows[-1].subplots(1, 2)
        _draw_memory(memory_panel, report.memory)
        _draw_sizes(sizes_panel, report)
    picture.savefig(path, dpi=_DOTS_PER_INCH)


def _title(report: Report) -> str:
    machine, config = report.machine, report.config
    return (
        f"half get_data, half update_data, one worker process; medians of {config.rounds} rounds of "
        f"{config.seconds:g} s, thin lines from the lowest to the highest round\n"
        f"{machine.cpu}, {machine.cores} cores; {machine.python}; Ray {machine.versions.get('ray', '?')}"
    )


def _draw_comparison(panel: Axes, report: Report, tasks: int) -> None:
    names = list(report.labels)
    _dress(panel, f"operations/s, {tasks} concurrent {'task' if tasks == 1 else 'tasks'}")
    panel.set_yticks(range(len(names)), names)
    panel.set_ylim(len(names) - 0.4, -0.6)  # the first on top
    _use_log_scale(panel, report)
    for row, name in enumerate(names):
        cell = report.cell(name, tasks)
        if cell is not None and cell.operations_per_s is not None:
            _draw_bar(panel, row, name, cell.operations_per_s)
        else:
            _write_absence(panel, row, cell)


def _use_log_scale(panel: Axes, report: Report) -> None:
    medians = [cell.operations_per_s.median for cell in report.cells if cell.operations_per_s is not None]
    panel.set_xscale("log")
    panel.set_xlim(min(medians, default=100) / 3, max(medians, default=1_000) * 10)  # room for the numbers
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.grid(axis="x", color="#e8e8e8")


def _draw_bar(panel: Axes, row: int, name: str, rate: Figure) -> None:
    panel.barh(row, rate.median, height=0.66, color=_colour(name))
    panel.plot([min(rate.rounds), max(rate.rounds)], [row, row], color=_TEXT_COLOUR, linewidth=1.0)
    _write(panel, max(rate.rounds), row, f"{rate.median:,.0f}", is_bold=name == OURS)


def _write_absence(panel: Axes, row: int, cell: Cell | None) -> None:
    left = panel.get_xlim()[0]
    if cell is not None and cell.failure is not None:
        _write(panel, left, row, f"fails: {cell.failure.partition(':')[0]}", colour=_FAILURE_COLOUR)
    else:
        _write(panel, left, row, "blocking: for one task", colour=_ABSENT_COLOUR)


def _draw_memory(panel: Axes, memory: Sequence[Memory]) -> None:
    if not memory:
        panel.set_axis_off()
        return
    _dress(panel, f"bytes per conversation, {memory[0].conversations:,} loaded")
    panel.set_yticks(range(len(memory)), [f"{each.contender}\n{each.counted_by}" for each in memory])
    panel.invert_yaxis()
    panel.set_xlim(0, max(each.bytes_each for each in memory) * 1.2)
    for row, each in enumerate(memory):
        panel.barh(row, each.bytes_each, height=0.6, color=_colour(each.contender))
        _write(panel, each.bytes_each, row, f"{each.bytes_each:,.0f}", is_bold=each.contender == OURS)


def _draw_sizes(panel: Axes, report: Report) -> None:
    if not report.sizes:
        panel.set_axis_off()
        return
    _dress(panel, "fsm-ray, cost of an operation by conversations in the bot")
    panel.set_xscale("log")
    panel.set_xlim(min(report.config.sizes) / 2, max(report.config.sizes) * 4)
    panel.set_ylabel("x the cost with the fewest")
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    for place, tasks in enumerate(report.config.size_tasks):
        _draw_size_line(panel, report, tasks, f"C{place}")
    panel.set_ylim(0, max(2.0, panel.get_ylim()[1]))
    panel.legend(frameon=False, loc="lower right")


def _draw_size_line(panel: Axes, report: Report, tasks: int, colour: str) -> None:
    cells = [cell for cell in report.sizes if cell.tasks == tasks]
    costs = [report.relative_cost(cell) or 0.0 for cell in cells]
    counts = [cell.conversations for cell in cells]
    panel.plot(counts, costs, marker="o", color=colour, label=f"{tasks} {'task' if tasks == 1 else 'tasks'}")
    offset = (0, 11) if tasks == max(report.config.size_tasks) else (0, -13)
    for count, cost, cell in zip(counts, costs, cells, strict=True):
        text = f"{cell.us_per_operation:.1f} µs"
        _write(panel, count, cost, text, colour=colour, offset=offset, align="center")


def _dress(panel: Axes, title: str) -> None:
    panel.set_title(title, fontsize=11)
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_axisbelow(True)
    panel.tick_params(labelsize=9, colors=_TEXT_COLOUR)


def _write(
    panel: Axes,
    x: float,
    y: float,
    text: str,
    *,
    colour: str = _TEXT_COLOUR,
    is_bold: bool = False,
    offset: tuple[float, float] = (5, 0),
    align: Literal["left", "center"] = "left",
) -> None:
    panel.annotate(
        text,
        (x, y),
        xytext=offset,
        textcoords="offset points",
        ha=align,
        va="center",
        fontsize=9,
        color=colour,
        fontweight="bold" if is_bold else "normal",
    )


def _colour(name: str) -> str:
    if name.startswith(OURS):
        return _OURS_COLOUR
    return _LIMIT_COLOUR if name in _LIMITS else _PEER_COLOUR
