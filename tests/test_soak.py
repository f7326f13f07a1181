"""Ten minutes of full load, with memory that does not grow, and nothing left open at the end.

    pytest -m soak -s                       # ten minutes
    pytest -m soak -s --soak-seconds 60     # while something is being changed: memory is shown, not judged

Memory is steady if the second half of the time, by the line of least squares, rises by no more than
GROWTH_PER_MINUTE for each of its minutes, and NOISE. In ten minutes that finds a leak of 1.8 MiB a minute.
In a shard with RocksDB it finds only a larger one, as its MEMTABLE comes and goes; but for its store, such a
shard does what one in memory does.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray

from fsm_ray import BotOptions, Storage

from .conftest import DEADLINE_S, RayCluster, eventually
from .soak import Report, lines, run_process

WORKERS = 2

GROWTH_PER_MINUTE = 1 << 20
"""Bytes of a process's resident memory."""

JUDGED_FROM_S = 600.0
"""In less time, caches and memtables are still being filled."""

NOISE = 4 << 20
"""Bytes that may come once and stay: an arena that Python got or gave."""

MEMTABLE = 64 << 20
"""Bytes that RocksDB keeps in memory until they are so many, which takes about five minutes here."""

Samples = Sequence[tuple[float, int]]
"""Times in seconds, and bytes."""

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


@pytest.mark.ray
@pytest.mark.soak
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

        assert seconds < JUDGED_FROM_S or grown(samples, with_memtable=actors[soaked[1]]) == []
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


def rise(samples: Samples) -> tuple[float, float]:
    """Bytes by which the second half of them rises, by the line of least squares; and its minutes."""
    half = samples[len(samples) // 2 :]
    slope, _ = statistics.linear_regression([at_s for at_s, _ in half], [size for _, size in half])
    took_s = half[-1][0] - half[0][0]
    return slope * took_s, took_s / 60


def is_steady(samples: Samples, noise: int = NOISE) -> bool:
    """Whether a process's memory does not grow, as far as so many samples can tell."""
    risen, minutes = rise(samples)
    return risen <= GROWTH_PER_MINUTE * minutes + noise


def grown(samples: Mapping[int, Samples], *, with_memtable: Sequence[int] = ()) -> list[str]:
    """The processes whose memory is not steady."""
    noises = {pid: NOISE + MEMTABLE if pid in with_memtable else NOISE for pid in samples}
    return [
        f"process {pid} grows: {told(each)}"
        for pid, each in samples.items()
        if not is_steady(each, noises[pid])
    ]


def told(samples: Samples) -> str:
    risen, minutes = rise(samples)
    return f"{risen / 1e6:+.1f} MB in the last {minutes:.1f} minutes"


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
            f"{names.get(pid, 'worker')} {pid}: MB of each quarter {', '.join(quarters)}; {told(each)}"
        )


TEN_MINUTES = range(600)


def planted(size: Callable[[int], float]) -> Samples:
    """What a process would have in each second of ten minutes, over 200 MB."""
    return [(float(at_s), 200_000_000 + int(size(at_s))) for at_s in TEN_MINUTES]


def per_minute(mebibytes: float) -> Callable[[int], float]:
    return lambda at_s: mebibytes * 2**20 * at_s / 60


def noise(at_s: int) -> float:
    """Within 5 MB."""
    return random.Random(at_s).uniform(0, 5e6)


@pytest.mark.parametrize(
    "size",
    [
        lambda at_s: 0,
        noise,
        lambda at_s: at_s % 40 * 1_000_000,
        lambda at_s: min(at_s, 300) * 1_000_000,
        lambda at_s: (at_s >= 450) * 4_000_000,
        lambda at_s: -at_s * 100_000,
        per_minute(1.7),
    ],
    ids=["constant", "noise", "sawtooth", "filled", "step", "shrinks", "below what is found"],
)
def test_a_process_whose_memory_comes_and_goes_is_steady(size: Callable[[int], float]) -> None:
    assert grown({1: planted(size)}) == []


@pytest.mark.parametrize(
    "size",
    [
        per_minute(1.9),
        lambda at_s: per_minute(2.5)(at_s) + noise(at_s),
        lambda at_s: per_minute(2.5)(at_s) + at_s % 40 * 200_000,
        lambda at_s: per_minute(9)(max(0, at_s - 400)),
    ],
    ids=["alone", "under noise", "under a sawtooth", "late"],
)
def test_a_process_that_leaks_is_found(size: Callable[[int], float]) -> None:
    found = grown({1: planted(lambda at_s: 0), 2: planted(size)})

    assert len(found) == 1
    assert "process 2 grows: +" in found[0]


def test_a_memtable_that_is_filled_and_written_is_no_leak_and_hides_no_large_one() -> None:
    filled = planted(lambda at_s: at_s % 310 * MEMTABLE / 310)
    leaking = planted(lambda at_s: at_s % 310 * MEMTABLE / 310 + per_minute(10)(at_s))

    assert grown({1: filled, 2: filled, 3: leaking}, with_memtable=[1, 3]) == [
        f"process 2 grows: {told(filled)}",
        f"process 3 grows: {told(leaking)}",
    ]


def test_in_less_time_more_is_noise() -> None:
    in_ten_minutes = planted(per_minute(4))

    assert not is_steady(in_ten_minutes)
    assert is_steady(in_ten_minutes[:120])
