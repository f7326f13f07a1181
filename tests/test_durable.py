"""Bots with durable stores on a Ray cluster: what outlives an actor, and what is said when it cannot."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fsm_ray import AsyncStorage, BotOptions, State, Storage
from fsm_ray.bench.servers import PostgresServer, ServerProcess, ValkeyServer
from fsm_ray.errors import (
    NamespaceUnavailable,
    StoreCorrupted,
    StoreMismatch,
    StoreUnavailable,
    UnknownBot,
)
from fsm_ray.stores.by_url import make_store
from fsm_ray.testing import AnyStorage, StorageContract
from tests.conftest import DEADLINE_S, Bots, RayCluster

pytestmark = pytest.mark.ray

KEY = (42, 7)

MakeStore = Callable[[], str]
"""Gives the URL of a store in which nothing is yet."""


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    """A directory that other users may pass through, as PostgreSQL runs as one where we are root."""
    path = Path(tempfile.mkdtemp(prefix="fsm-ray-test-"))
    path.chmod(0o711)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="module")
def valkey(directory: Path) -> Iterator[ValkeyServer]:
    (directory / "valkey").mkdir()
    with ValkeyServer(directory / "valkey", fsync="always") as server:
        yield server


@pytest.fixture(scope="module")
def postgres(directory: Path) -> Iterator[PostgresServer]:
    (directory / "postgres").mkdir()
    with PostgresServer(directory / "postgres") as server:
        yield server


@pytest.fixture(scope="module", params=["rocksdb", "redis", "postgresql", "file"])
def url(request: pytest.FixtureRequest, directory: Path) -> str:
    """One store for all bots of this module; each bot has its own place in it."""
    if request.param == "redis":
        server: ValkeyServer | PostgresServer = request.getfixturevalue("valkey")
        return server.url
    if request.param == "postgresql":
        server = request.getfixturevalue("postgres")
        return server.url
    (directory / request.param).mkdir()
    return f"{request.param}://{directory}/{request.param}"


@pytest.fixture
def storage(cluster: RayCluster) -> Iterator[Storage]:
    with Storage(timeout_s=DEADLINE_S) as storage:
        yield storage


def pid_of(storage: Storage, bot_name: str, shard: int = 0) -> int:
    return storage.describe(bot_name).shards[shard].pid


def kill(storage: Storage, bot_name: str, shard: int = 0) -> None:
    os.kill(pid_of(storage, bot_name, shard), signal.SIGKILL)


@pytest.fixture(scope="module")
def bot_of_all_tests(bots: Bots) -> str:
    """Of one store: to the facade they are all the same, and each passes StoreConformance."""
    return bots.emptied(store="rocksdb")


class TestContract(StorageContract):
    @pytest.fixture
    def storage(self, cluster: RayCluster) -> Iterator[AnyStorage]:
        with Storage(timeout_s=DEADLINE_S) as storage:
            yield storage

    @pytest.fixture
    def bot(self, bot_of_all_tests: str) -> str:
        return bot_of_all_tests


@pytest.fixture(scope="module")
def bot(cluster: RayCluster, url: str) -> Iterator[str]:
    """One bot for each store."""
    name = "durable"
    with Storage(timeout_s=DEADLINE_S) as storage:
        storage.init(name, store=url)
        yield name
        storage.drop(name)


async def test_records_outlive_a_killed_actor_and_every_write_under_way_takes_effect_once(bot: str) -> None:
    """Each writer counts up through conditional writes, so that one applied twice or lost breaks the row."""
    states = {("kept", number): State(flow="f", state="s", data={"n": number}) for number in range(20)}
    async with AsyncStorage(timeout_s=DEADLINE_S) as shared:
        await shared.set_many(bot, states)
        await shared.clear(bot, ("kept", 0))
        done = asyncio.Event()

        async def count_up(writer: int) -> int:
            count, version = 0, 0
            while not done.is_set():
                version = await shared.set_state(
                    bot, writer, State(data={"count": count + 1}), expected_version=version
                )
                count += 1
            return count

        writers = [asyncio.create_task(count_up(writer)) for writer in range(16)]
        for _ in range(2):
            with Storage() as storage:
                await asyncio.to_thread(kill, storage, bot)
            await shared.get_state(bot, 0)
        done.set()
        counts = await asyncio.gather(*writers)
        found = [await shared.get_data(bot, writer) for writer in range(16)]
        kept = await shared.get_many(bot, list(states))
        described = await shared.describe(bot)

    assert found == [{"count": count} for count in counts]
    assert kept == [None, *list(states.values())[1:]]
    assert not described.shards[0].restarted_empty


def test_records_outlive_a_dropped_bot(storage: Storage, bot: str, url: str) -> None:
    version = storage.set_state(bot, KEY, State(state="kept"))
    storage.drop(bot)
    storage.init(bot, store=url)

    assert storage.get_state(bot, KEY) == State(state="kept")
    assert storage.set_state(bot, KEY, State(), expected_version=version) == version + 1


def test_shards_of_another_number_are_refused_and_the_bot_can_be_made_as_it_was(
    storage: Storage, bot_name: str, directory: Path
) -> None:
    url = f"rocksdb://{directory}/resharded"
    storage.init(bot_name, store=url)
    storage.set_state(bot_name, KEY, State(state="kept"))
    storage.drop(bot_name)

    with pytest.raises(StoreMismatch, match="of 1 of bot"):
        storage.init(bot_name, store=url, shards=2)
    storage.init(bot_name, store=url)
    assert storage.get_state(bot_name, KEY) == State(state="kept")


# Servers


@pytest.mark.parametrize(("url", "name"), [("redis", "valkey"), ("postgresql", "postgres")], indirect=["url"])
async def test_writes_go_on_when_the_server_is_killed_and_started_again(
    bot: str, name: str, request: pytest.FixtureRequest
) -> None:
    server: ValkeyServer | PostgresServer = request.getfixturevalue(name)
    async with AsyncStorage(timeout_s=DEADLINE_S) as shared:
        done = asyncio.Event()

        async def count_up(writer: int) -> int:
            count = 0
            while not done.is_set():
                await shared.update_data(bot, ("writer", writer), {"count": count + 1})
                count += 1
            return count

        writers = [asyncio.create_task(count_up(writer)) for writer in range(8)]
        for _ in range(2):
            await asyncio.to_thread(restart, server)
            await shared.update_data(bot, "probe", {"answered": True})
        done.set()
        counts = await asyncio.gather(*writers)
        found = [await shared.get_data(bot, ("writer", writer)) for writer in range(8)]

    assert found == [{"count": count} for count in counts]


def restart(server: ServerProcess) -> None:
    server.kill()
    server.start()


def test_a_server_that_is_not_there_is_named_and_its_password_is_not(storage: Storage, bot_name: str) -> None:
    with (
        Storage(timeout_s=3) as impatient,
        pytest.raises(NamespaceUnavailable, match=r"redis://user:\*\*\*@127\.0\.0\.1") as caught,
    ):
        impatient.init(bot_name, store="redis://user:hunter2@127.0.0.1:1")

    assert "hunter2" not in str(caught.value)
    with pytest.raises(UnknownBot):
        storage.describe(bot_name)


# RocksDB alone


def test_a_damaged_directory_is_refused_and_named(storage: Storage, bot_name: str, directory: Path) -> None:
    store = f"rocksdb://{directory}/damaged"
    storage.init(bot_name, store=store)
    storage.set_state(bot_name, KEY, State(state="kept"))
    storage.drop(bot_name)
    (directory / "damaged" / bot_name / "0" / "CURRENT").write_text("garbage")

    with pytest.raises(StoreCorrupted, match=rf"damaged/{bot_name}/0"):
        storage.init(bot_name, store=store)
    with pytest.raises(UnknownBot):
        storage.describe(bot_name)


def test_a_directory_that_another_bot_of_another_cluster_holds_is_unavailable(
    storage: Storage, bot_name: str, directory: Path
) -> None:
    """Held by this process here, which is as good as another cluster's actor."""
    options = BotOptions(store=f"rocksdb://{directory}/held")

    async def hold() -> Any:
        held = make_store(bot_name, 0, options)
        await held.open()
        with Storage(timeout_s=3) as impatient, pytest.raises(StoreUnavailable, match="another process"):
            await asyncio.to_thread(impatient.init, bot_name, options)
        await held.close()

    asyncio.run(hold())
    storage.init(bot_name, options)


def test_a_rocksdb_bot_waits_for_its_node_and_says_where_its_records_lie(
    cluster: RayCluster, storage: Storage, bot_name: str, directory: Path
) -> None:
    options: dict[str, Any] = {"store": f"rocksdb://{directory}/on_one_node", "node_resource": "bot_disk"}
    lies_there = r"on_one_node on the node with the Ray resource 'bot_disk'"
    node = cluster.nodes.add_node(num_cpus=1, resources={"bot_disk": 1})
    with Storage(timeout_s=5) as impatient:
        impatient.init(bot_name, **options)
        impatient.set_state(bot_name, KEY, State(state="kept"))
        described = impatient.describe(bot_name).shards[0]
        assert described.node_id == node.node_id
        cluster.nodes.remove_node(node, allow_graceful=False)
        os.kill(described.pid, signal.SIGKILL)

        with ThreadPoolExecutor(2) as pool:
            operations: list[Future[Any]] = [
                pool.submit(impatient.get_state, bot_name, KEY),
                pool.submit(impatient.init, bot_name, **options),
            ]
        for operation in operations:
            with pytest.raises(NamespaceUnavailable, match=lies_there):
                operation.result()
    node = cluster.nodes.add_node(num_cpus=1, resources={"bot_disk": 1})
    try:
        assert storage.get_state(bot_name, KEY) == State(state="kept")
        assert storage.describe(bot_name).shards[0].node_id == node.node_id
    finally:
        storage.drop(bot_name)
        cluster.nodes.remove_node(node)


def test_a_write_that_changes_nothing_does_not_reach_the_disk(storage: Storage, bots: Bots) -> None:
    bot = bots.emptied(store="rocksdb")
    storage.clear(bot, KEY)
    log = max((bots.directory / bot / "0").glob("*.log"))
    size = log.stat().st_size
    for _ in range(10):
        storage.clear(bot, KEY)

    assert log.stat().st_size == size


def test_a_disk_that_fills_up_takes_nothing_acknowledged_with_it() -> None:
    # In a process of its own, which may mount a small tmpfs though it may be no administrator.
    namespace = ["unshare", "--map-root-user", "--mount"]
    ran = subprocess.run(
        [*namespace, sys.executable, str(Path(__file__).with_name("full_disk.py"))],
        capture_output=True,
        text=True,
        timeout=3 * DEADLINE_S,
        check=False,
    )
    assert ran.returncode == 0, f"{' '.join(namespace)} needs user namespaces:\n{ran.stderr}"
    seen = json.loads(ran.stdout.splitlines()[-1])

    assert seen["acknowledged"] > 100
    assert "No space left on device" in seen["told"]
    assert seen["directory"] in seen["told"]
    assert seen["there"] == seen["acknowledged"]
    assert seen["same_process"]
