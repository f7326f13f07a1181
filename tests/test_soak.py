"""Ten minutes of full load, with memory that does not grow, and nothing left open at the end.

    pytest -m soak -s                       # ten minutes
    pytest -m soak -s --soak-seconds 60     # while something is being changed

Memory is steady if the trend of each process over the second half of the time is below GROWTH: what a bot
of this load would leak with each operation, were it two bytes, is more.
"""

from __future__ import annotations

import os
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray

from fsm_ray import BotOptions, Storage

from .conftest import DEADLINE_S, RayCluster, eventually
from .soak import Report, lines, run_process

pytestmark = [pytest.mark.ray, pytest.mark.soak]

WORKERS = 2

GROWTH_PER_MINUTE = 1 << 20
"""Bytes of a process's resident memory."""

NOISE = 4 << 20
"""Bytes that a trend over little time may show all the same: a memtable, an arena that Python got or gave."""

PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Left:
    """What an actor has open."""

    fds: int
    turns: int
    waiting_turns: int
    watches: int
    scans: int
    sessions: int


@pytest.fixture
def soaked(cluster: RayCluster, bot_name: str, tmp_path: Path) -> Iterator[list[str]]:
    """A bot in memory and one on disk, with two shards each."""
    names = [f"{bot_name}-memory", f"{bot_name}-rocksdb"]
    with Storage(timeout_s=DEADLINE_S) as storage:
        for name, store in zip(names, ("memory://", f"rocksdb://{tmp_path}"), strict=True):
            storage.init(name, BotOptions(store=store, shards=2, ttl_s=60.0, listen_host="127.0.0.1"))
        yield names
        for name in names:
            storage.drop(name)


def test_under_full_load_memory_is_steady_and_nothing_is_left_open(
    soaked: list[str], tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    seconds: float = pytestconfig.getoption("--soak-seconds")
    with Storage(timeout_s=DEADLINE_S) as storage:
        actors = {name: pids(storage, name) for name in soaked}
        before = {pid: left for name in soaked for pid, left in left_open(storage, name).items()}
        (at_work := tmp_path / "at_work").mkdir()
        end_s = time.monotonic() + seconds + 10
        task: Any = ray.remote(run_process).options(num_cpus=0, max_retries=0, scheduling_strategy="SPREAD")
        tasks = [task.remote(f"worker-{i}", soaked, end_s, at_work) for i in range(WORKERS)]
        eventually(lambda: len(list(at_work.iterdir())) == WORKERS, "all workers are at work")
        begun_s = time.monotonic()
        workers = [int(path.name.partition(".")[0]) for path in at_work.iterdir()]
        samples = sampled([*workers, *(pid for each in actors.values() for pid in each)], end_s)
        reports: list[Report] = ray.get(tasks, timeout=5 * DEADLINE_S)
        done = sum((report.done for report in reports), Counter[str]())
        show(done, time.monotonic() - begun_s, samples, actors)
        after = wait_for_peace(storage, soaked, before)

        assert grown(samples) == []
        for report in reports:
            assert report.fds_after <= report.fds_before
            for (name, client), count in report.counted.items():
                assert storage.get_data(name, ("count", client)) == {"n": count}
        assert {pids(storage, name) == actors[name] for name in soaked} == {True}, "an actor was restarted"
        for left in after.values():
            print(left)  # noqa: T201
            # A client's session is remembered for minutes: one or two for each storage and thread.
            assert left.sessions <= 4 * (done["came and went"] + done["scan"] + 100)


def pids(storage: Storage, name: str) -> list[int]:
    return [shard.pid for shard in storage.describe(name).shards]


def left_open(storage: Storage, name: str) -> dict[int, Left]:
    return {
        shard.pid: Left(
            sum(1 for _ in Path(f"/proc/{shard.pid}/fd").iterdir()),
            shard.statistics.turns,
            shard.statistics.waiting_turns,
            shard.statistics.watches,
            shard.statistics.scans,
            shard.statistics.sessions,
        )
        for shard in storage.describe(name).shards
    }


def wait_for_peace(storage: Storage, names: list[str], before: dict[int, Left]) -> dict[int, Left]:
    """What is open when all is as it was before, sessions left out."""
    after: dict[int, Left] = {}

    def is_peace() -> bool:
        for name in names:
            after.update(left_open(storage, name))
        return all(
            (left.turns, left.waiting_turns, left.watches, left.scans) == (0, 0, 0, 0)
            # RocksDB opens files as it compacts, at most so many.
            and left.fds <= before[pid].fds + 16
            for pid, left in after.items()
        )

    eventually(is_peace, "turns, watches, scans and connections are gone", 3 * DEADLINE_S)
    return after


def sampled(processes: list[int], end_s: float) -> dict[int, list[tuple[float, int]]]:
    """The resident memory of each process, once a second until this time."""
    samples: defaultdict[int, list[tuple[float, int]]] = defaultdict(list)
    while (now_s := time.monotonic()) < end_s:
        for pid in processes:
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            samples[pid].append((now_s, pages * PAGE))
        time.sleep(min(1.0, max(0.0, end_s - time.monotonic())))
    return dict(samples)


def trend(samples: list[tuple[float, int]]) -> float:
    """Bytes per minute by which the second half of them grows; the line of least squares."""
    half = samples[len(samples) // 2 :]
    slope, _ = statistics.linear_regression([at_s for at_s, _ in half], [size for _, size in half])
    return slope * 60


def grown(samples: dict[int, list[tuple[float, int]]]) -> list[str]:
    """The processes whose memory is not steady."""
    found = []
    for pid, each in samples.items():
        minutes = (each[-1][0] - each[len(each) // 2][0]) / 60
        if trend(each) > GROWTH_PER_MINUTE + NOISE / minutes:
            found.append(f"process {pid} grows by {trend(each) / 1e6:.2f} MB a minute")
    return found


def show(
    done: Counter[str],
    seconds: float,
    samples: dict[int, list[tuple[float, int]]],
    actors: dict[str, list[int]],
) -> None:
    """Print the figures."""
    print(f"\n{seconds:.0f} s: {', '.join(lines(done))}")  # noqa: T201
    names = {pid: name.rpartition("-")[2] for name, each in actors.items() for pid in each}
    for pid, each in samples.items():
        sizes = [size / 1e6 for _, size in each]
        quarters = [
            f"{statistics.mean(sizes[len(sizes) * i // 4 : len(sizes) * (i + 1) // 4]):.1f}" for i in range(4)
        ]
        print(  # noqa: T201
            f"{names.get(pid, 'worker')} {pid}: MB of each quarter {', '.join(quarters)}; "
            f"{trend(each) / 1e6:+.2f} MB a minute"
        )


def test_a_process_that_leaks_is_found() -> None:
    """The negative control."""
    leaking = [(float(at_s), 200_000_000 + at_s * 50_000) for at_s in range(600)]
    sawtooth = [(float(at_s), 200_000_000 + at_s % 40 * 1_000_000) for at_s in range(600)]

    assert len(grown({1: leaking, 2: sawtooth})) == 1
