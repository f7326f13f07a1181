"""What a run of the benchmark found, as plain frozen values that read and write JSON."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from fsm_ray.bench.config import BenchConfig
from fsm_ray.bench.figures import Figure, ratio

OURS = "fsm-ray"
"""The contender that every other is compared with."""


@dataclass(frozen=True)
class Machine:
    """Where and with what the run took place."""

    cpu: str
    cores: int
    system: str
    python: str
    versions: dict[str, str]
    started_at: str
    """UTC, ISO 8601."""
    load_before: float
    """Load average over the minute before the run: how much the machine had to do besides."""
    load_after: float


@dataclass(frozen=True)
class Cell:
    """One contender at one number of tasks. No figures: it failed, or does not apply."""

    contender: str
    tasks: int
    operations_per_s: Figure | None = None
    p50_us: Figure | None = None
    p99_us: Figure | None = None
    failure: str | None = None
    verified_keys: int = 0
    """Keys whose last update was read back at the end."""


@dataclass(frozen=True)
class Memory:
    """Bytes that one conversation takes, by contender and by way of counting."""

    contender: str
    counted_by: str
    conversations: int
    bytes_each: float


@dataclass(frozen=True)
class SizeCell:
    """fsm_ray with a number of conversations in the bot, random keys over all of them."""

    conversations: int
    tasks: int
    operations_per_s: Figure

    @property
    def us_per_operation(self) -> float:
        """Time per operation of the whole worker, in microseconds; `tasks` of them are under way at once."""
        return 1e6 / self.operations_per_s.median


@dataclass(frozen=True)
class Report:
    """Everything that one run found."""

    config: BenchConfig
    machine: Machine
    labels: dict[str, str]
    """Contender name -> what it is, in a line."""
    cells: tuple[Cell, ...]
    memory: tuple[Memory, ...] = ()
    sizes: tuple[SizeCell, ...] = ()

    def cell(self, contender: str, tasks: int) -> Cell | None:
        """The contender's cell at this number of tasks; `None` where it does not apply."""
        return next((c for c in self.cells if (c.contender, c.tasks) == (contender, tasks)), None)

    def times_faster(self, cell: Cell) -> float | None:
        """How many operations fsm_ray does for one of the cell's; `None` where either has no figure."""
        ours = self.cell(OURS, cell.tasks)
        return ratio(ours.operations_per_s if ours else None, cell.operations_per_s)

    def relative_cost(self, cell: SizeCell) -> float | None:
        """What an operation costs, as a multiple of its cost with the fewest conversations."""
        same_tasks = [other for other in self.sizes if other.tasks == cell.tasks]
        smallest = min(same_tasks, key=lambda other: other.conversations)
        return ratio(smallest.operations_per_s, cell.operations_per_s)


def to_json(report: Report) -> bytes:
    """The report as indented JSON; `from_json` gives back an equal report."""
    return msgspec.json.format(msgspec.json.encode(report, enc_hook=str), indent=2) + b"\n"


def from_json(text: bytes) -> Report:
    """The report that `to_json` wrote."""
    return msgspec.json.decode(text, type=Report, dec_hook=lambda kind, value: kind(value))
