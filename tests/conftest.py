"""Fixtures: one Ray of two nodes for the whole session, and bots that are dropped after their test."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from fsm_ray import Storage, hosting
from fsm_ray.errors import UnknownBot, ValueNotDecodable

DEADLINE_S = 60.0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--chaos-seconds", type=float, default=0.0, help="how long each fault test goes on")
    parser.addoption("--chaos-seed", type=int, help="the seed that a fault test printed")
    parser.addoption("--soak-seconds", type=float, default=600.0, help="how long the soak goes on")


def pytest_configure() -> None:
    # A shell's background jobs ignore SIGINT, and so would every process that a test starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Every process that a test starts, each actor's too, would compile all of fsm_ray anew: 0.1 s of its 1 s.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


SLOWEST_FIRST = (
    "test_telegram_upstream.py",
    "test_cli.py",
    "test_demo.py",
    "test_durable.py",
    "test_cluster.py",
    "test_bench.py",
    "test_contract.py",
    "test_across.py",
    "test_turns.py",
    "test_chaos.py",
    "test_store_conformance.py",
    "test_examples.py",
    "test_store_objectstore.py",
    "test_upgrade.py",
    "test_upgrade_interference.py",
    "test_store_encrypted.py",
    "test_cli_bots.py",
    "test_metrics.py",
    "test_rotation.py",
    "test_tls_cluster.py",
)
"""Files that take the longest: begun late, they would keep one worker busy while the others have none."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "soak" not in config.getoption("-m"):
        soaks = [item for item in items if item.get_closest_marker("soak")]
        items[:] = [item for item in items if item not in soaks]
        config.hook.pytest_deselected(items=soaks)
    order = {name: number for number, name in enumerate(SLOWEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@dataclass(frozen=True)
class RayCluster:
    """The session's Ray. This process is attached to its first node."""

    address: str
    node_ids: tuple[str, str]
    """The first one is this process's node."""
    nodes: Cluster
    """For tests that add nodes of their own, and remove them."""


@pytest.fixture(scope="session")
def cluster() -> Iterator[RayCluster]:
    # Nothing here is scaled, or printed by a driver: two processes less.
    head = {"num_cpus": 4, "include_dashboard": False, "include_log_monitor": False, "no_monitor": True}
    nodes = Cluster(initialize_head=True, head_node_args=head)
    try:
        nodes.add_node(num_cpus=4)
        ray.init(address=nodes.address, log_to_driver=False)
        here = ray.get_runtime_context().get_node_id()
        (other,) = [node["NodeID"] for node in ray.nodes() if node["NodeID"] != here]
        yield RayCluster(nodes.address, (here, other), nodes)
    finally:
        ray.shutdown()
        nodes.shutdown()


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a shard be hosted by this process, which is no actor's."""
    for name, stand_in in {
        "_was_restarted": lambda: False,
        "_prefer_this_thread": lambda: None,
        "_node_id": lambda: "",
        "remove_version": lambda *_: None,
    }.items():
        monkeypatch.setattr(hosting, name, stand_in)
    monkeypatch.setattr(gc, "freeze", lambda: None)


@pytest.fixture
def bot_name(cluster: RayCluster) -> Iterator[str]:
    """A name for a bot; if the test makes it, it is dropped afterwards."""
    name = f"test-{uuid.uuid4().hex[:12]}"
    yield name
    with Storage() as storage, contextlib.suppress(UnknownBot):
        storage.drop(name)


class Bots:
    """Bots that the session's tests share, one after the other: an actor takes a second of CPU to come up."""

    def __init__(self, storage: Storage, directory: Path) -> None:
        self._storage = storage
        self.directory = directory
        """Where those with a store of this machine have it."""
        self._names: set[str] = set()

    def emptied(self, *, store: str = "memory", shards: int = 1) -> str:
        """The name of a bot with such a store and so many shards that has no records, and that nobody is at.

        It may be killed, but not dropped. Its versions and statistics go on from the tests before.
        """
        name = f"shared-{store}-{shards}"
        self._storage.init(
            name, store=f"{store}://{'' if store == 'memory' else self.directory}", shards=shards
        )
        self._names.add(name)
        self._empty(name)
        eventually(lambda: not self._is_anybody_at(name), f"nobody is at {name} any more")
        return name

    def _empty(self, name: str) -> None:
        try:
            for found in self._storage.scan(name):
                self._storage.clear(name, found.key)
        except ValueNotDecodable as error:
            self._storage.clear(name, error.key)
            self._empty(name)

    def drop_all(self) -> None:
        for name in self._names:
            self._storage.drop(name)

    def _is_anybody_at(self, name: str) -> bool:
        statistics = [shard.statistics for shard in self._storage.describe(name).shards]
        return any(each.scans or each.watches or each.turns or each.waiting_turns for each in statistics)


@pytest.fixture(scope="session")
def bots(cluster: RayCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bots]:
    with Storage(timeout_s=DEADLINE_S) as storage:
        made = Bots(storage, tmp_path_factory.mktemp("bots"))
        yield made
        made.drop_all()


def eventually(condition: Callable[[], bool], what: str, deadline_s: float = DEADLINE_S) -> None:
    """Wait until the condition holds; fail, naming it, when it does not in time."""
    end = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"not within {deadline_s} s: {what}")
        time.sleep(0.01)
