"""What a run of the benchmark found, as plain frozen values that read and write JSON."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from fsm_ray.bench.config import BenchConfig
from fsm_ray.bench.figures import Figure, ratio

OURS = "fsm-ray"
"""The contender that every other is compared with."""

TURNS = "fsm-ray-turn"
"""The one that every other is compared with at whole updates."""

ADAPTER_PEER = "aiogram-redis"
"""The framework's own, which ours are compared with where its dispatcher is fed."""


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
class Race:
    """What became of updates that were made to one conversation at once."""

    contender: str
    updates: int
    """Updates that were acknowledged, each of a field of its own."""
    lost: int
    """Those whose field was not there in the end."""


@dataclass(frozen=True)
class Scan:
    """A bot's many conversations counted and scanned, and what a scan costs those who write meanwhile."""

    conversations: int
    count_ms: Figure
    """Counting them by state; medians."""
    scan_s: Figure
    """One scan of all, in a process of its own, beside the writers."""
    alone_p99_us: Figure
    """A write without a scan."""
    beside_p99_us: Figure
    """A write while the scan went on."""

    @property
    def records_per_s(self) -> float:
        """How many conversations a scan returns a second."""
        return self.conversations / self.scan_s.median

    @property
    def slowdown(self) -> float | None:
        """The p99 of a write beside a scan, as a multiple of that without."""
        return ratio(self.beside_p99_us, self.alone_p99_us)


@dataclass(frozen=True)
class Disk:
    """Where the durable stores wrote."""

    filesystem: str
    fdatasync_us: float
    """Median time of `os.fdatasync` after 4 KiB were appended, in microseconds."""


@dataclass(frozen=True)
class Recovery:
    """How long one way back from a crash takes, with this number of conversations."""

    way: str
    conversations: int
    seconds: Figure
    is_peer: bool = False
    """Whether it is a peer's, which the first one of ours shall not be slower than."""


@dataclass(frozen=True)
class Kills:
    """What became of a bot, and of its writers, whose actor was killed again and again. A round is a kill."""

    answered_s: Figure
    """From the kill to the answer to a read."""
    recovery_s: Figure
    """The part of it in which the actor opened its store and loaded its records."""
    bare_s: Figure
    """The same for a Ray actor that does nothing, and a call that Ray retries."""
    acknowledged: int
    """Writes that were acknowledged."""
    unknown: int
    """Writes of which the client said that it does not know their outcome."""
    lost: int
    """Acknowledged writes that were not there later."""
    applied_twice: int
    """Applied writes beyond those that were acknowledged, or found to have taken effect."""

    @property
    def restart_ratio(self) -> float:
        """How long the way back takes without the recovery, as a multiple of the bare actor's."""
        # Of medians, not of pairs: whether Ray has a worker at hand is drawn for each restart anew.
        return (self.answered_s.median - self.recovery_s.median) / self.bare_s.median

    @property
    def is_sound(self) -> bool:
        """Whether every acknowledged write took effect, and none did so twice."""
        return not self.lost and not self.applied_twice


@dataclass(frozen=True)
class Target:
    """What a durable store of fsm_ray shall do: so many times the operations of a peer."""

    contender: str
    tasks: int
    peer: str
    peer_tasks: int
    wanted: float


TARGETS = (
    Target("fsm-ray-rocksdb", 1, "aiogram-redis-synced", 1, 1.0),
    Target("fsm-ray-rocksdb", 16, "aiogram-redis-synced", 16, 5.0),
    Target("fsm-ray-rocksdb", 256, "fsm-ray", 256, 0.4),
    Target("fsm-ray-redis", 256, "aiogram-redis", 16, 3.0),
    Target("fsm-ray-redis", 256, "aiogram-redis-synced", 16, 3.0),
    Target("fsm-ray-postgres", 256, "aiogram-redis", 16, 2.0),
    Target("fsm-ray-postgres", 256, "aiogram-redis-synced", 16, 2.0),
)

TURN_TARGETS = {1: 5.0, 64: 30.0}
"""Number of tasks -> how many whole updates a turn shall do for one of the peer."""

ADAPTER_TARGET = 2.0
"""How many updates the dispatcher shall handle over fsm_ray for one over the peer."""

COUNT_TARGET_MS = 5.0
"""How long counting by state may take."""

SLOWDOWN_TARGET = 2.0
"""What a scan may multiply the p99 of a write by."""


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
    turns: tuple[Cell, ...] = ()
    """The comparison of whole updates: each is an operation."""
    race: tuple[Race, ...] = ()
    scan: Scan | None = None
    disk: Disk | None = None
    recovery: tuple[Recovery, ...] = ()
    kills: Kills | None = None
    adapter: tuple[Cell, ...] = ()
    """A framework's dispatcher over fsm_ray and over its own storage: each update is an operation."""

    def cell(self, contender: str, tasks: int) -> Cell | None:
        """The contender's cell at this number of tasks; `None` where it does not apply."""
        cells = (*self.cells, *self.turns)
        return next((c for c in cells if (c.contender, c.tasks) == (contender, tasks)), None)

    @property
    def is_sound(self) -> bool:
        """Whether fsm_ray lost no write, and applied none twice."""
        lost = sum(race.lost for race in self.race if race.contender == OURS)
        failed = any(cell.failure is not None and cell.contender != ADAPTER_PEER for cell in self.adapter)
        return not lost and not failed and (self.kills is None or self.kills.is_sound)

    def times_faster(self, cell: Cell, ours: str = OURS) -> float | None:
        """How many operations fsm_ray does for one of the cell's; `None` where either has no figure."""
        return ratio(self._rate(ours, cell.tasks), cell.operations_per_s)

    def times_peer(self, cell: Cell) -> float | None:
        """How many updates the cell of `adapter` does for one of the peer; `None` where either has none."""
        peer = ADAPTER_PEER, cell.tasks
        rates = (each.operations_per_s for each in self.adapter if (each.contender, each.tasks) == peer)
        return ratio(cell.operations_per_s, next(rates, None))

    def reached(self, target: Target) -> float | None:
        """What the contender does for one operation of the peer; `None` where either has no figure."""
        peer = self._rate(target.peer, target.peer_tasks)
        return ratio(self._rate(target.contender, target.tasks), peer)

    def relative_cost(self, cell: SizeCell) -> float | None:
        """What an operation costs, as a multiple of its cost with the fewest conversations."""
        same_tasks = [other for other in self.sizes if other.tasks == cell.tasks]
        smallest = min(same_tasks, key=lambda other: other.conversations)
        return ratio(smallest.operations_per_s, cell.operations_per_s)

    def _rate(self, contender: str, tasks: int) -> Figure | None:
        cell = self.cell(contender, tasks)
        return None if cell is None else cell.operations_per_s


def to_json(report: Report) -> bytes:
    """The report as a line of JSON; `from_json` gives back an equal report."""
    return msgspec.json.encode(report, enc_hook=str)


def from_json(text: bytes) -> Report:
    """The report that `to_json` wrote."""
    return msgspec.json.decode(text, type=Report, dec_hook=lambda kind, value: kind(value))
