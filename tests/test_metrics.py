"""Metrics: what is published, that the dashboard and the documentation speak of nothing else, and the log."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.util import metrics as ray_metrics
from ray.util.client import ray as ray_client

from fsm_ray import AsyncStorage, Storage, hosting
from fsm_ray.errors import (
    FsmRayError,
    NamespaceUnavailable,
    NotOwner,
    OutcomeUnknown,
    Overloaded,
    StoreUnavailable,
    VersionConflict,
)
from fsm_ray.hosting import ShardHost
from fsm_ray.metrics import catalog, client
from fsm_ray.metrics.__main__ import DASHBOARD
from fsm_ray.metrics.catalog import METRICS, Metric
from fsm_ray.metrics.client import OF_THIS_PROCESS, ClientMetrics
from fsm_ray.metrics.publisher import Publisher
from fsm_ray.metrics.shard import ShardMetrics
from fsm_ray.namespace import NamespaceStatistics
from fsm_ray.options import BotOptions
from fsm_ray.protocol import GRANTS, READ_RECORD, TURN, WATCH, WRITE, SetRecord
from fsm_ray.stores.base import Contents
from fsm_ray.stores.memory import MemoryStore
from fsm_ray.tally import OPERATIONS, OUTCOMES, REQUESTS, ShardTally, Spread

from .conftest import Bots, RayCluster

DOCUMENT = Path(__file__).parent.parent / "docs" / "how-to" / "metrics.md"

HISTOGRAM = Metric("fsm_ray_test_seconds", "histogram", "for tests", exponents=range(14, 36))

STATISTICS = NamespaceStatistics(
    records=7,
    sessions=2,
    operations=99,
    operations_per_s=1.5,
    version=9,
    turns=1,
    waiting_turns=3,
    watches=0,
    scans=0,
)


class FakeRay:
    """What Ray's metrics were told. It checks what Ray checks."""

    def __init__(self) -> None:
        self.values: dict[str, dict[frozenset[tuple[str, str]], float]] = defaultdict(dict)
        """By the name that Prometheus reads, and the tags."""
        self.calls = 0

    def counter(self, name: str, description: str, tag_keys: tuple[str, ...]) -> FakeMetric:
        return FakeMetric(self, f"ray_{name}_total", tag_keys)

    def gauge(self, name: str, description: str, tag_keys: tuple[str, ...]) -> FakeMetric:
        return FakeMetric(self, f"ray_{name}", tag_keys)

    def value(self, name: str, **tags: str) -> float:
        return self.values[name][frozenset({"bot": "my_bot", "shard": "0", **tags}.items())]

    def tag_values(self, tag: str) -> set[str]:
        found = {dict(tags).get(tag) for each in self.values.values() for tags in each}
        return {value for value in found if value is not None}


class FakeMetric:
    def __init__(self, told: FakeRay, name: str, tag_keys: tuple[str, ...]) -> None:
        self._told, self._name, self._tag_keys = told, name, tag_keys

    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert value > 0
        key = self._key(tags)
        known = self._told.values[self._name]
        known[key] = known.get(key, 0.0) + value

    def set(self, value: float, tags: dict[str, str]) -> None:
        self._told.values[self._name][self._key(tags)] = value

    def _key(self, tags: dict[str, str]) -> frozenset[tuple[str, str]]:
        assert sorted(tags) == sorted(self._tag_keys)
        assert all(type(value) is str for value in tags.values())
        self._told.calls += 1
        return frozenset(tags.items())


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    told = FakeRay()
    monkeypatch.setattr(ray_metrics, "Counter", told.counter)
    monkeypatch.setattr(ray_metrics, "Gauge", told.gauge)
    return told


class Session:
    """A Ray that this process is a part of, as its runtime context tells."""

    node_id = "first"

    def get_node_id(self) -> str:
        return self.node_id

    def get_worker_id(self) -> str:
        return "01000000"


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> Session:
    """As if Ray were initialised in this process."""
    session = Session()
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: session)
    return session


@pytest.fixture
def metrics(told: FakeRay, session: Session) -> ClientMetrics:
    """What is published when the test says so."""
    return ClientMetrics(publish_every_s=None)


class Owner:
    """Whoever counts, for as long as it lives."""


def busy_tally() -> ShardTally:
    """A tally in which everything happened."""
    tally = ShardTally()
    for operation in OPERATIONS:
        tally.operations[operation] = 10
    tally.count_failed(SetRecord, VersionConflict(""))
    for spread in (*tally.request_ns, *tally.batch, tally.commit_ns, tally.commit_operations):
        spread.add(100_000)
    return tally


@pytest.fixture
def everything(told: FakeRay, metrics: ClientMetrics) -> FakeRay:
    """What a shard and a client publish when everything happened."""
    shard = ShardMetrics("my_bot", 0, busy_tally())
    shard.publish()
    shard.publish_state(STATISTICS, record_bytes=1234, connections=5, openings=1, recovery_s=0.5)
    owner = Owner()
    tally = metrics.tally(owner, "my_bot", 0)
    for kind in REQUESTS:
        tally.measure(kind, 1, 50_000)
        tally.failed[kind, VersionConflict] += 1
    tally.turn_wait_ns.add(50_000)
    metrics.publish()
    return told


# What is published


def test_everything_in_the_catalog_is_published_and_nothing_else(everything: FakeRay) -> None:
    assert set(everything.values) == {series for metric in METRICS for series in metric.series}


def test_the_tags_have_few_values(everything: FakeRay) -> None:
    assert everything.tag_values("operation") == set(OPERATIONS.values())
    assert everything.tag_values("request") == set(REQUESTS.values())
    assert everything.tag_values("outcome") <= set(OUTCOMES)
    tags = {tag for each in everything.values.values() for tags in each for tag, _ in tags}
    assert tags == {"bot", "shard", "operation", "request", "outcome", "le"}


def test_operations_are_published_by_kind_and_outcome(everything: FakeRay) -> None:
    operations = "ray_fsm_ray_operations_total"

    assert everything.value(operations, operation="set_state", outcome="ok") == 9
    assert everything.value(operations, operation="set_state", outcome="conflict") == 1
    assert everything.value("ray_fsm_ray_records") == 7
    assert everything.value("ray_fsm_ray_record_bytes") == 1234


@pytest.mark.parametrize(
    ("error", "lost"), [(StoreUnavailable("it is full"), 0), (NotOwner("it is not ours"), 1)]
)
async def test_a_shard_whose_store_was_never_opened_is_told_of(
    told: FakeRay, no_ray: None, monkeypatch: pytest.MonkeyPatch, error: FsmRayError, lost: int
) -> None:
    class Unusable(MemoryStore):
        async def open(self) -> Contents:
            raise error

    monkeypatch.setattr(hosting, "make_store", lambda *_: Unusable())
    shard = ShardHost("my_bot", 0, BotOptions())
    with pytest.raises(type(error)):
        await shard.open()
    async with asyncio.timeout(10):
        while "ray_fsm_ray_serving" not in told.values:  # noqa: ASYNC110  # publishing is no event
            await asyncio.sleep(0)
    await shard.stop()

    assert told.value("ray_fsm_ray_serving") == 0
    assert told.value("ray_fsm_ray_openings_total") < 1
    assert told.value("ray_fsm_ray_ownerships_lost_total") == pytest.approx(lost, abs=1e-6)
    assert "ray_fsm_ray_records" not in told.values


def test_only_the_difference_is_published(told: FakeRay) -> None:
    publisher = Publisher("my_bot", 0)
    for total in (0, 0, 5, 5, 7):
        publisher.counter(catalog.TURNS_LOST, total)

    assert told.value("ray_fsm_ray_turns_lost_total") == pytest.approx(7)
    assert told.calls == 3


def test_a_histogram_has_all_its_buckets_from_the_first_number_on(told: FakeRay) -> None:
    publisher, spread = Publisher("my_bot", 0), Spread()

    publisher.histogram(HISTOGRAM, spread, 1e-9)
    assert not told.values

    for ns in (20_000, 20_000, 3_000_000, 10**12):
        spread.add(ns)
    publisher.histogram(HISTOGRAM, spread, 1e-9)

    buckets = told.values["ray_fsm_ray_test_seconds_bucket_total"]
    counts = {float(dict(tags)["le"]): value for tags, value in buckets.items()}
    assert len(counts) == len(HISTOGRAM.exponents) + 1
    assert min(counts) == pytest.approx(2**14 / 1e9, rel=1e-3)
    for bound, value in counts.items():
        expected = sum(ns / 1e9 <= bound for ns in (20_000, 20_000, 3_000_000, 10**12))
        assert value == pytest.approx(expected, abs=1e-6)
        assert value > 0
    assert counts[float("inf")] == told.value("ray_fsm_ray_test_seconds_count_total") == 4
    assert told.value("ray_fsm_ray_test_seconds_sum_total") == pytest.approx(1000.00304)


def test_what_an_alert_looks_for_is_published_before_it_happens(
    told: FakeRay, metrics: ClientMetrics
) -> None:
    ShardMetrics("my_bot", 0, ShardTally()).publish()
    owner = Owner()
    tally = metrics.tally(owner, "my_bot", 0)
    metrics.publish()
    before = told.value("ray_fsm_ray_client_failures_total", request="write", outcome="unknown")
    tally.given_up[WRITE, OutcomeUnknown] += 1
    metrics.publish()

    assert before == pytest.approx(0, abs=1e-6)
    assert told.value("ray_fsm_ray_client_failures_total", request="write", outcome="unknown") - before == 1
    for operation in OPERATIONS.values():
        refused = told.value("ray_fsm_ray_operations_total", operation=operation, outcome="overloaded")
        assert refused == pytest.approx(0, abs=1e-6)


def test_what_storages_counted_that_are_gone_is_published(told: FakeRay, metrics: ClientMetrics) -> None:
    stays, goes, went = Owner(), Owner(), Owner()
    metrics.tally(stays, "my_bot", 0).retries = 1
    metrics.tally(went, "my_bot", 0).retries = 10
    tally = metrics.tally(goes, "my_bot", 0)
    tally.retries = 2
    del went
    gc.collect()
    metrics.publish()
    tally.retries = 5
    tally.given_up[TURN, Overloaded] += 1
    del goes
    gc.collect()
    metrics.publish()
    metrics.publish()

    assert told.value("ray_fsm_ray_client_retries_total") == 16
    assert told.value("ray_fsm_ray_client_failures_total", request="turn", outcome="overloaded") == 1


def test_requests_that_wait_are_published_when_they_failed_and_not_how_long_they_took(
    told: FakeRay, metrics: ClientMetrics
) -> None:
    owner = Owner()
    tally = metrics.tally(owner, "my_bot", 0)
    for kind in (GRANTS, WATCH):
        tally.measure(kind, 1, 10**10)
        tally.given_up[kind, NamespaceUnavailable] += 1
    metrics.publish()

    failures = "ray_fsm_ray_client_failures_total"
    assert told.value(failures, request="turn", outcome="unavailable") == 1
    assert told.value(failures, request="watch", outcome="unavailable") == 1
    assert "ray_fsm_ray_client_operation_seconds_count_total" not in told.values


@pytest.mark.parametrize("kind", [Storage, AsyncStorage])
async def test_closing_a_storage_publishes_at_once(
    told: FakeRay, metrics: ClientMetrics, kind: type[Storage | AsyncStorage]
) -> None:
    storage, owner = kind(), Owner()
    storage._directory.metrics = metrics
    metrics.tally(owner, "my_bot", 0).retries = 3
    closing = storage.close()
    if closing is not None:
        await closing

    assert told.value("ray_fsm_ray_client_retries_total") == 3


def test_another_ray_is_told_everything_anew(told: FakeRay, metrics: ClientMetrics, session: Session) -> None:
    owner = Owner()
    tally = metrics.tally(owner, "my_bot", 0)
    tally.measure(WRITE, 1, 50_000)
    metrics.publish()
    first = {name: set(values) for name, values in told.values.items()}
    told.values.clear()
    metrics.publish()
    assert not told.values

    session.node_id = "second"
    tally.retries = 1
    metrics.publish()

    assert {name: set(values) for name, values in told.values.items()} == first
    assert told.value("ray_fsm_ray_client_retries_total") == 1


def test_metrics_that_cannot_be_published_break_nothing_and_are_published_later(
    told: FakeRay,
    metrics: ClientMetrics,
    session: Session,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    owner = Owner()
    metrics.tally(owner, "my_bot", 0).retries = 2
    with monkeypatch.context() as trouble:
        trouble.setattr(session, "get_node_id", lambda: 1 // 0, raising=False)
        metrics.publish()
        metrics.publish()
    metrics.publish()

    assert told.value("ray_fsm_ray_client_retries_total") == 2
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("no metrics of this process: ZeroDivisionError in ")


def test_it_is_published_at_once_and_then_again_and_again(
    told: FakeRay, metrics: ClientMetrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = Owner()
    tally = metrics.tally(owner, "my_bot", 0)
    published: list[float] = []

    class Enough(Exception):
        pass

    def sleep(_seconds: float) -> None:
        published.append(told.value("ray_fsm_ray_client_retries_total"))
        tally.retries += 4
        if len(published) == 3:
            raise Enough

    monkeypatch.setattr(client, "time", SimpleNamespace(sleep=sleep))
    with pytest.raises(Enough):
        metrics._keep_publishing(7.0)

    assert published == pytest.approx([0, 4, 8], abs=1e-6)


@pytest.mark.parametrize("where", ["no Ray", "Ray Client", "a forked process"])
def test_a_client_that_is_no_part_of_the_cluster_publishes_nothing_and_keeps_nothing(
    told: FakeRay, metrics: ClientMetrics, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    owner = Owner()
    metrics.tally(owner, "my_bot", 0).retries = 1
    monkeypatch.setattr(ray, "is_initialized", lambda: where != "no Ray")
    monkeypatch.setattr(ray_client, "is_connected", lambda: where == "Ray Client")
    if where == "a forked process":
        monkeypatch.setattr(os, "getpid", lambda: -1)
    goes = Owner()
    metrics.tally(goes, "my_bot", 0).measure(WRITE, 1, 1)
    del goes
    gc.collect()
    metrics.publish()

    assert not told.values
    assert len(metrics._shards["my_bot", 0].tallies) == 1


def test_a_process_that_was_forked_before_anybody_counted_publishes(
    told: FakeRay, metrics: ClientMetrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getpid", lambda: -1)
    owner = Owner()
    metrics.tally(owner, "my_bot", 0).retries = 1
    metrics.publish()

    assert told.value("ray_fsm_ray_client_retries_total") == 1


class Reader:
    """A process that is given storages, as tasks are."""

    def read(self, storage: Storage, bot: str) -> None:
        storage.get_state(bot, "ann")

    def counted(self, bot: str) -> tuple[int, int]:
        """How many connections were counted, and how many threads publish that."""
        gc.collect()
        names = [thread.name for thread in threading.enumerate()]
        return OF_THIS_PROCESS._shards[bot, 0].total().connections, names.count("fsm_ray metrics")


@pytest.mark.ray
def test_storages_that_tasks_are_given_are_counted_together(cluster: RayCluster, bots: Bots) -> None:
    bot = bots.emptied()
    reader: Any = ray.remote(Reader).options(num_cpus=0).remote()
    for _ in range(5):
        ray.get(reader.read.remote(Storage(), bot))

    assert ray.get(reader.counted.remote(bot)) == (5, 1)
    ray.kill(reader)


# The dashboard and the documentation


def queries(panel: Any) -> Iterator[str]:
    if isinstance(panel, dict):
        for key, value in panel.items():
            if key in ("expr", "query") and isinstance(value, str):
                yield value
            yield from queries(value)
    elif isinstance(panel, list):
        for each in panel:
            yield from queries(each)


def series_in(text: str) -> set[str]:
    return set(re.findall(r"ray_fsm_ray_\w+", text))


def test_the_dashboard_queries_every_metric_and_nothing_else() -> None:
    asked = {series for query in queries(json.loads(DASHBOARD.read_text())) for series in series_in(query)}
    published = {series: metric for metric in METRICS for series in metric.series}

    assert asked <= published.keys()
    assert {published[series] for series in asked} == set(METRICS)


def test_the_dashboard_groups_by_tags_that_the_metric_has() -> None:
    published = {series: metric for metric in METRICS for series in metric.series}
    for query in queries(json.loads(DASHBOARD.read_text())):
        for tags, series in re.findall(r"(?:sum|max) by \(([^)]*)\) \((?:\w+\()?(ray_fsm_ray_\w+)", query):
            has = {*published[series].tags, *(["le"] if "_bucket" in series else [])}
            assert set(tags.split(", ")) <= has, query


def test_gauges_of_a_shard_are_not_added_up_with_those_of_its_process_before() -> None:
    """Ray serves a gauge for a while after its process has ended."""
    asked = [*queries(json.loads(DASHBOARD.read_text())), *re.findall("expr: (.*)", DOCUMENT.read_text())]
    for metric in METRICS:
        for query in asked:
            if metric.kind == "gauge" and not query.startswith("label_values("):
                for before in re.findall(rf"(.*?){metric.series[0]}\b", query):
                    assert re.search(r"max by \(bot, shard\) \((max_over_time\()?$", before), query


def test_the_panels_have_numbers_and_places_of_their_own() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells

    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_the_command_prints_the_dashboard() -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "fsm_ray.metrics"], capture_output=True, check=True, timeout=60
    ).stdout

    assert json.loads(printed)["uid"] == "fsm-ray"


def test_the_documentation_has_a_row_for_every_metric_with_its_tags_and_its_meaning() -> None:
    rows = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| `fsm_ray_")]

    assert rows == [
        f"| `{metric.name}` | {metric.kind} | {', '.join(metric.tags)} | {metric.meaning} |"
        for metric in METRICS
    ]


def test_the_documentation_says_how_many_series_a_worker_process_has_for_a_shard(
    told: FakeRay, metrics: ClientMetrics
) -> None:
    owner = Owner()
    tally = metrics.tally(owner, "my_bot", 0)

    def series(*kinds: int) -> int:
        for kind in kinds:
            tally.measure(kind, 1, 50_000)
        metrics.publish()
        return sum(map(len, told.values.values()))

    always, reads_and_writes = series(), series(READ_RECORD, WRITE)
    tally.turn_wait_ns.add(50_000)
    text = " ".join(DOCUMENT.read_text().split())

    each = (reads_and_writes - always) // 2
    assert f"for each shard, {always} series; and {each} more for each kind of request" in text
    assert f"{reads_and_writes} if it reads and writes, {series(*REQUESTS)} if it does everything" in text


def test_the_documentation_names_every_operation_and_outcome() -> None:
    named = set(re.findall(r"`(\w+)`", DOCUMENT.read_text()))

    assert {*OPERATIONS.values(), *REQUESTS.values(), *OUTCOMES} <= named


def test_the_documentation_queries_what_is_published() -> None:
    assert series_in(DOCUMENT.read_text()) <= {series for metric in METRICS for series in metric.series}


# What Prometheus reads

_NODE = """
import re, sys, time, urllib.request
import ray
ray.init(
    address="local",
    num_cpus=1,
    log_to_driver=False,
    include_dashboard=False,
    _metrics_export_port=int(sys.argv[1]),
    _system_config={"metrics_report_interval_ms": 1000},
)
from fsm_ray import Storage, State
from fsm_ray.errors import VersionConflict
with Storage() as storage:
    storage.init("my_bot")
    for number in range(100):
        storage.update_data("my_bot", number, {"n": number})
    try:
        storage.set_state("my_bot", 1, State(state="a"), expected_version=10**9)
    except VersionConflict:
        pass
deadline = time.monotonic() + 60
while time.monotonic() < deadline:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{sys.argv[1]}/metrics", timeout=5) as answer:
            text = answer.read().decode()
    except OSError:
        text = ""
    # The shard publishes everything at once, and so does the worker.
    refused = re.search('operation="set_state",.*outcome="conflict"', text)
    if refused and "ray_fsm_ray_client_resends" in text:
        break
    time.sleep(0.2)
print(text)
"""


@pytest.mark.ray
@pytest.mark.slow
def test_prometheus_reads_what_shards_and_workers_did() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    text = subprocess.run(
        [sys.executable, "-c", _NODE, str(port)], capture_output=True, check=True, timeout=120, text=True
    ).stdout

    read: dict[str, dict[frozenset[tuple[str, str]], float]] = defaultdict(dict)
    for name, tags, value in re.findall(r"^(ray_fsm_ray_\w+){(.*)} (\S+)$", text, re.MULTILINE):
        ours = {"bot", "shard", "operation", "request", "outcome", "le"}
        pairs = [pair for pair in re.findall(r'(\w+)="([^"]*)"', tags) if pair[0] in ours]
        read[name][frozenset(pairs)] = float(value)
    shard = {("bot", "my_bot"), ("shard", "0")}
    operations = read["ray_fsm_ray_operations_total"]
    assert operations[frozenset(shard | {("operation", "update_data"), ("outcome", "ok")})] == 100
    assert operations[frozenset(shard | {("operation", "set_state"), ("outcome", "conflict")})] == 1
    assert read["ray_fsm_ray_records"][frozenset(shard)] == 100
    seconds = read["ray_fsm_ray_client_operation_seconds_bucket_total"]
    buckets = sorted((float(dict(tags)["le"]), count) for tags, count in seconds.items())
    assert len(buckets) == len(catalog.CLIENT_SECONDS.exponents) + 1
    # Which of the first sixteen is measured is left to chance.
    assert buckets[-1] in [(float("inf"), 101 // 16), (float("inf"), 101 // 16 + 1)]
    assert [count for _, count in buckets] == sorted(count for _, count in buckets)
    assert set(read) <= {series for metric in METRICS for series in metric.series}
