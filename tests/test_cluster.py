"""Bots on a real Ray of several nodes: who makes actors, who may share them, what survives a kill."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fsm_ray import AsyncStorage, BotOptions, State, Storage, actor
from fsm_ray.actor import ACTOR_OPTIONS, find_shard
from fsm_ray.channel.client import BlockingConnection
from fsm_ray.errors import (
    FsmRayError,
    NamespaceUnavailable,
    OptionsConflict,
    OutcomeUnknown,
    ProtocolMismatch,
    RayUnreachable,
    UnknownBot,
)
from fsm_ray.routing.route import Route
from fsm_ray.storage import Transport

from .conftest import DEADLINE_S, Bots, RayCluster, eventually

pytestmark = [pytest.mark.ray, pytest.mark.slow]

KEY = (1, 42)
LOCAL = BotOptions(listen_host="127.0.0.1")

both_transports = pytest.mark.parametrize("transport", ["auto", "ray"])


@pytest.fixture
def storage(cluster: RayCluster) -> Iterator[Storage]:
    with Storage(timeout_s=30) as storage:
        yield storage


def on_node(node_id: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Run the function in a Ray task on this node; return what it returned."""
    task: Any = ray.remote(function).options(
        num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)
    )
    return ray.get(task.remote(*arguments), timeout=DEADLINE_S)


@pytest.fixture
def shards_here(cluster: RayCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Place the actors that this process makes on its own node."""
    place_here(cluster, monkeypatch)


def place_here(cluster: RayCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    here = NodeAffinitySchedulingStrategy(cluster.node_ids[0], soft=False)
    monkeypatch.setitem(ACTOR_OPTIONS, "scheduling_strategy", here)


@pytest.fixture(scope="module")
def kept_here(cluster: RayCluster) -> Iterator[str]:
    name = "here"
    with Storage(timeout_s=30) as storage:
        with pytest.MonkeyPatch.context() as monkeypatch:
            place_here(cluster, monkeypatch)
            storage.init(name, LOCAL)
        yield name
        storage.drop(name)


@pytest.fixture
def bot_here(storage: Storage, kept_here: str) -> str:
    """A bot on this process's node that has no record of KEY."""
    storage.clear(kept_here, KEY)
    return kept_here


def pid_of(storage: Storage, bot_name: str, shard: int = 0) -> int:
    return storage.describe(bot_name).shards[shard].pid


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """The process stands still, every thread of it, within this context."""

    def states() -> set[str]:
        stats = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
        return {stat.rpartition(")")[2].split()[0] for stat in stats}

    os.kill(pid, signal.SIGSTOP)
    try:
        eventually(lambda: states() == {"T"}, f"process {pid} stands still")
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


# init


def test_fifty_inits_at_once_make_one_actor_a_shard(
    cluster: RayCluster, storage: Storage, bot_name: str
) -> None:
    def init_many_times(storage: Storage, bot_name: str) -> set[tuple[int, ...]]:
        def init(_: int) -> tuple[int, ...]:
            storage.init(bot_name, shards=2)
            return tuple(shard.pid for shard in storage.describe(bot_name).shards)

        with ThreadPoolExecutor(25) as pool:
            return set(pool.map(init, range(25)))

    task: Any = ray.remote(init_many_times).options(num_cpus=0)
    seen = ray.get([task.remote(storage, bot_name) for _ in range(2)], timeout=2 * DEADLINE_S)

    (pids,) = set.union(*seen)
    named = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
    assert len(set(pids)) == 2
    assert sorted(name for name in named if name.startswith(f"{bot_name}/")) == [
        f"{bot_name}/0",
        f"{bot_name}/1",
    ]


def test_of_two_inits_with_different_options_at_once_one_wins_and_one_is_told(
    storage: Storage, bot_name: str
) -> None:
    def init(shards: int) -> int | None:
        try:
            storage.init(bot_name, shards=shards)
        except OptionsConflict:
            return None
        return shards

    with ThreadPoolExecutor(2) as pool:
        winners = [shards for shards in pool.map(init, (1, 2)) if shards is not None]

    assert len(winners) == 1
    assert storage.describe(bot_name).options.shards == winners[0]
    assert len(storage.describe(bot_name).shards) == winners[0]


def test_an_interrupted_init_is_completed_by_the_next(storage: Storage, bot_name: str) -> None:
    storage.init(bot_name, shards=2)
    ray.kill(find_shard(bot_name, 1), no_restart=True)
    eventually(lambda: _is_missing(bot_name, 1), "the shard is gone")
    key = next(key for key in range(100) if _shard_of(key, 2) == 1)

    with Storage(timeout_s=0.5) as hasty, pytest.raises(NamespaceUnavailable, match="init again"):
        hasty.get_state(bot_name, key)
    storage.init(bot_name, shards=2)
    storage.set_state(bot_name, key, State(state="a"))

    assert storage.get_state(bot_name, key) == State(state="a")


def _is_missing(bot_name: str, shard: int) -> bool:
    try:
        find_shard(bot_name, shard)
    except FsmRayError:
        return True
    return False


def _shard_of(key: Any, shards: int) -> int:
    shard, _ = Route("bot", BotOptions(shards=shards)).read(key)
    return shard


def test_shards_take_no_cpu(bots: Bots) -> None:
    bots.emptied(shards=3)

    eventually(
        lambda: ray.available_resources()["CPU"] == ray.cluster_resources()["CPU"], "all CPUs are free"
    )


def test_a_bot_outlives_the_driver_that_made_it(cluster: RayCluster, bot_name: str) -> None:
    script = (
        "from fsm_ray import State, Storage\n"
        f"storage = Storage({cluster.address!r})\n"
        f"storage.init({bot_name!r})\n"
        f"storage.set_state({bot_name!r}, 1, State(state='left behind'))\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=DEADLINE_S, capture_output=True)

    with Storage() as storage:
        assert storage.get_state(bot_name, 1) == State(state="left behind")


def test_where_no_ray_answers_the_error_says_how_to_start_one() -> None:
    script = (
        "from fsm_ray import Storage, errors\n"
        "try:\n"
        "    Storage('127.0.0.1:1').get_state('bot', 1)\n"
        "except errors.RayUnreachable as error:\n"
        "    print('told:', error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        timeout=DEADLINE_S,
        capture_output=True,
        text=True,
        check=True,
    )

    assert "ray start --head" in done.stdout
    assert RayUnreachable.__name__ not in done.stderr


# Sharing


def test_a_storage_pickles_into_tasks_and_they_share_state(storage: Storage, bots: Bots) -> None:
    bot = bots.emptied()

    def add(storage: Storage, bot_name: str, worker: int) -> None:
        for number in range(50):
            storage.update_data(bot, (1, 42), {f"{worker}-{number}": worker})

    task: Any = ray.remote(add).options(num_cpus=0.1)
    ray.get([task.remote(storage, bot, worker) for worker in range(4)], timeout=DEADLINE_S)

    data = storage.get_data(bot, KEY)
    assert data is not None
    assert len(data) == 200


def test_an_async_storage_pickles_into_async_actors(storage: Storage, bots: Bots) -> None:
    bot = bots.emptied()

    class Worker:
        def __init__(self, storage: AsyncStorage) -> None:
            self._storage = storage

        async def work(self, bot_name: str, worker: int) -> None:
            await asyncio.gather(
                *(self._storage.update_data(bot, (1, 42), {f"{worker}-{n}": n}) for n in range(100))
            )

    actor: Any = ray.remote(Worker).options(num_cpus=0)
    workers = [actor.remote(AsyncStorage()) for _ in range(2)]
    ray.get([worker.work.remote(bot, number) for number, worker in enumerate(workers)], timeout=DEADLINE_S)

    data = storage.get_data(bot, KEY)
    assert data is not None
    assert len(data) == 200


def test_a_pickled_storage_keeps_its_settings() -> None:
    copy = pickle.loads(pickle.dumps(Storage("ray://host:1", timeout_s=3, transport="ray")))

    assert (copy._address, copy._timeout_s, copy._transport) == ("ray://host:1", 3, "ray")


def test_threads_share_a_storage(storage: Storage, bots: Bots) -> None:
    bot = bots.emptied(shards=3)

    def work(worker: int) -> list[dict[str, Any] | None]:
        for number in range(100):
            storage.update_data(bot, worker, {str(number % 5): number})
        return [storage.get_data(bot, worker)]

    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(work, range(16)))

    assert results == [[{str(number % 5): number for number in range(95, 100)}]] * 16


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_storage_survives_a_fork(storage: Storage, bot_here: str) -> None:
    storage.set_data(bot_here, KEY, {"parent": 1})

    def child() -> None:
        for number in range(50):
            storage.update_data(bot_here, (1, 42), {f"child-{number}": number})

    children = [multiprocessing.get_context("fork").Process(target=child) for _ in range(2)]
    for process in children:
        process.start()
    for number in range(50):
        storage.update_data(bot_here, KEY, {f"parent-{number}": number})
    for process in children:
        process.join(DEADLINE_S)

    assert [process.exitcode for process in children] == [0, 0]
    data = storage.get_data(bot_here, KEY)
    assert data is not None
    assert len(data) == 101


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_that_would_need_ray_is_told_so(storage: Storage, bot_here: str) -> None:
    with Storage() as fresh:
        fresh._directory._attach()
        receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)

        def child() -> None:
            try:
                fresh.get_state(bot_here, KEY)
            except RayUnreachable as error:
                sender.send(str(error))

        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join(DEADLINE_S)

    assert receiver.poll(0)
    assert "forked" in receiver.recv()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
async def test_an_async_storage_survives_a_fork_out_of_its_running_loop(
    storage: Storage, bot_here: str
) -> None:
    async with AsyncStorage() as shared:
        await shared.init(bot_here, LOCAL)
        await shared.update_data(bot_here, KEY, {"parent": 1})

        async def work() -> None:
            await asyncio.gather(*(shared.update_data(bot_here, KEY, {f"child-{n}": n}) for n in range(50)))

        def child() -> None:
            asyncio.events._set_running_loop(None)
            asyncio.run(work())

        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        await asyncio.gather(*(shared.update_data(bot_here, KEY, {f"parent-{n}": n}) for n in range(50)))
        await asyncio.get_running_loop().run_in_executor(None, process.join, DEADLINE_S)

        assert process.exitcode == 0
        assert len(await shared.get_data(bot_here, KEY) or {}) == 101


async def test_loops_that_take_turns_in_one_thread_each_have_connections(
    storage: Storage, bots: Bots
) -> None:
    bot = bots.emptied()
    shared = AsyncStorage()

    def take_turns() -> int:
        loops = [asyncio.new_event_loop() for _ in range(2)]
        for number in range(6):
            loops[number % 2].run_until_complete(shared.update_data(bot, KEY, {str(number): number}))
        data = loops[0].run_until_complete(shared.get_data(bot, KEY))
        for loop in loops:
            for task in asyncio.all_tasks(loop):
                task.cancel()
                loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
            loop.close()
        return len(data or {})

    assert await asyncio.get_running_loop().run_in_executor(None, take_turns) == 6


def test_asyncio_run_twice_in_one_process_just_works(storage: Storage, bots: Bots) -> None:
    bot = bots.emptied()
    shared = AsyncStorage()

    async def count() -> dict[str, Any]:
        await asyncio.gather(*(shared.update_data(bot, KEY, {f"{time.monotonic_ns()}": 1}) for _ in range(5)))
        return await shared.get_data(bot, KEY) or {}

    assert len(asyncio.run(count())) == 5
    assert len(asyncio.run(count())) == 10


def test_one_async_storage_serves_loops_of_several_threads(storage: Storage, bots: Bots) -> None:
    bot = bots.emptied()
    shared = AsyncStorage()

    async def work(worker: int) -> None:
        for number in range(50):
            await shared.update_data(bot, KEY, {f"{worker}-{number}": number})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda worker: asyncio.run(work(worker)), range(4)))

    data = storage.get_data(bot, KEY)
    assert data is not None
    assert len(data) == 200


async def test_closing_an_async_storage_ends_what_waits(storage: Storage, bots: Bots) -> None:
    bot = bots.emptied()
    shared = AsyncStorage(timeout_s=30)
    await shared.set_state(bot, KEY, State())
    with stopped(pid_of(storage, bot)):
        waiting = asyncio.ensure_future(shared.get_state(bot, KEY))
        await asyncio.sleep(0)
        await shared.close()

        with pytest.raises(FsmRayError, match="closed"):
            await waiting


async def test_four_thousand_tasks_at_once_are_no_error(storage: Storage, bots: Bots) -> None:
    bot = bots.emptied(shards=3)
    async with AsyncStorage(timeout_s=60) as shared:

        async def work(worker: int) -> bool:
            await shared.update_data(bot, worker, {"n": worker})
            return await shared.get_data(bot, worker) == {"n": worker}

        assert all(await asyncio.gather(*(work(worker) for worker in range(4096))))


# Transports


def test_on_one_node_the_channel_is_a_unix_socket_of_its_owner_alone(storage: Storage, bot_here: str) -> None:

    endpoint = storage._directory.known_endpoint(bot_here, 0)
    path = Path(endpoint.unix_path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(path.name) == 24  # as long as `fsm-ray doctor` expects it to be
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert endpoint.tcp_address is None
    assert endpoint.secret.hex() not in repr(endpoint)


@pytest.mark.usefixtures("shards_here")
def test_a_worker_of_another_node_comes_by_tcp(cluster: RayCluster, storage: Storage, bot_name: str) -> None:
    storage.init(bot_name, LOCAL)

    def work(storage: Storage, bot_name: str) -> tuple[str, Any]:
        storage.update_data(bot_name, (1, 42), {"from": "afar"})
        connection = next(iter(storage._bots)).shards[0]._connection
        assert isinstance(connection, BlockingConnection)
        address = connection._socket.getpeername()
        return str(connection._socket.family.name), address

    family, address = on_node(cluster.node_ids[1], work, storage, bot_name)

    assert family == "AF_INET"
    assert address[0] == "127.0.0.1"
    assert storage.get_data(bot_name, KEY) == {"from": "afar"}


def test_where_no_socket_connects_operations_go_by_ray_calls(
    cluster: RayCluster, storage: Storage, bot_here: str
) -> None:
    endpoint = storage._directory.known_endpoint(bot_here, 0)
    Path(endpoint.unix_path).rename(f"{endpoint.unix_path}.gone")
    try:
        with Storage() as fresh:
            fresh.set_state(bot_here, KEY, State(state="by call"))
            assert fresh.get_state(bot_here, KEY) == State(state="by call")
        shared = AsyncStorage()

        async def read() -> State | None:
            return await shared.get_state(bot_here, KEY)

        assert asyncio.run(read()) == State(state="by call")
    finally:
        Path(f"{endpoint.unix_path}.gone").rename(endpoint.unix_path)


def test_ray_client_is_served_over_ray_calls(cluster: RayCluster, storage: Storage, bots: Bots) -> None:
    bot = bots.emptied()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "ray.util.client.server"),
            *("--address", cluster.address, "--host", "127.0.0.1", "--port", str(port), "--mode", "legacy"),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    script = (
        "import asyncio\n"
        "from fsm_ray import AsyncStorage, State, Storage\n"
        f"with Storage('ray://127.0.0.1:{port}', timeout_s=60) as storage:\n"
        f"    storage.init({bot!r})\n"
        f"    storage.set_state({bot!r}, 1, State(state='through the client'))\n"
        f"    assert storage.get_state({bot!r}, 1).state == 'through the client'\n"
        "async def work():\n"
        f"    async with AsyncStorage('ray://127.0.0.1:{port}', timeout_s=60) as storage:\n"
        f"        updates = [storage.update_data({bot!r}, 1, {{str(n): n}}) for n in range(20)]\n"
        "        await asyncio.gather(*updates)\n"
        "asyncio.run(work())\n"
    )
    try:
        eventually(lambda: _answers(port), "the Ray Client server listens")
        done = subprocess.run(
            [sys.executable, "-c", script],
            timeout=2 * DEADLINE_S,
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        server.terminate()
        server.wait(DEADLINE_S)

    assert done.returncode == 0, done.stderr
    state = storage.get_state(bot, 1)
    assert state is not None
    assert state.state == "through the client"
    assert len(state.data) == 20


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


# Faults


def test_a_killed_actor_comes_back_empty_says_so_and_serves_the_same_storage(
    storage: Storage, bot_name: str
) -> None:
    transports: tuple[Transport, ...] = ("auto", "ray")
    storage.init(bot_name)
    assert not storage.describe(bot_name).shards[0].restarted_empty
    for transport in transports:
        with Storage(timeout_s=30, transport=transport) as used:
            used.set_state(bot_name, KEY, State(state="before"))

            os.kill(pid_of(storage, bot_name), signal.SIGKILL)
            assert used.get_state(bot_name, KEY) is None
            used.set_state(bot_name, KEY, State(state="after"))

            assert used.get_state(bot_name, KEY) == State(state="after")
            assert storage.describe(bot_name).shards[0].restarted_empty


def test_a_storage_that_comes_while_the_actor_restarts_waits_for_it(storage: Storage, bots: Bots) -> None:
    bot = bots.emptied()
    os.kill(pid_of(storage, bot), signal.SIGKILL)

    with Storage(timeout_s=30) as fresh:
        assert fresh.get_state(bot, KEY) is None
        assert fresh.describe(bot).shards[0].restarted_empty


def test_drop_ends_what_is_left_of_a_bot(storage: Storage, bot_name: str) -> None:
    storage.init(bot_name, shards=2)
    ray.kill(find_shard(bot_name, 0), no_restart=True)
    eventually(lambda: _is_missing(bot_name, 0), "the first shard is gone")

    storage.drop(bot_name)

    names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
    assert not [name for name in names if name.startswith(f"{bot_name}/")]


@pytest.mark.parametrize("transport", ["auto", "ray"])
async def test_operations_under_way_when_the_actor_is_killed_get_answers(
    storage: Storage, bots: Bots, transport: Any
) -> None:
    bot = bots.emptied()
    async with AsyncStorage(timeout_s=30, transport=transport) as used:
        await used.set_data(bot, KEY, {})
        pid = pid_of(storage, bot)
        with stopped(pid):
            operations: list[asyncio.Future[Any]] = [
                asyncio.ensure_future(used.update_data(bot, n, {"n": n})) for n in range(100)
            ]
            operations += [asyncio.ensure_future(used.get_data(bot, n)) for n in range(100)]
            for _ in range(10):
                await asyncio.sleep(0)  # until all of them are sent
            os.kill(pid, signal.SIGKILL)

        results = await asyncio.gather(*operations)

        assert results[:100] == [{"n": n} for n in range(100)]


@pytest.mark.parametrize("transport", ["auto", "ray"])
def test_a_write_without_an_answer_in_time_has_an_unknown_outcome(
    storage: Storage, bots: Bots, transport: Any
) -> None:
    bot = bots.emptied()
    with Storage(timeout_s=0.5, transport=transport) as hasty:
        hasty.set_data(bot, KEY, {"n": 1})
        with stopped(pid_of(storage, bot)):
            with pytest.raises(OutcomeUnknown, match="may or may not") as write:
                hasty.update_data(bot, KEY, {"n": 2})
            with pytest.raises(NamespaceUnavailable, match="retry is safe") as read:
                hasty.get_data(bot, KEY)

        assert write.value.timeout_s == 0.5
        assert not isinstance(read.value, OutcomeUnknown)
    assert storage.get_data(bot, KEY) in ({"n": 1}, {"n": 2})


async def test_an_async_write_without_an_answer_in_time_has_an_unknown_outcome(
    storage: Storage, bots: Bots
) -> None:
    bot = bots.emptied()
    async with AsyncStorage(timeout_s=0.5) as hasty:
        await hasty.set_data(bot, KEY, {"n": 1})
        with stopped(pid_of(storage, bot)):
            write, queued, read = await asyncio.gather(
                hasty.update_data(bot, KEY, {"n": 2}),
                hasty.update_data(bot, KEY, {"m": 3}),
                hasty.get_data(bot, KEY),
                return_exceptions=True,
            )

        assert isinstance(write, OutcomeUnknown)
        assert isinstance(queued, NamespaceUnavailable)
        assert isinstance(read, NamespaceUnavailable)
        assert not isinstance(read, OutcomeUnknown)
        await hasty.set_data(bot, KEY, {"n": 4})
        assert await hasty.get_data(bot, KEY) == {"n": 4}


def test_a_write_whose_answer_was_lost_takes_effect_once(storage: Storage, bots: Bots) -> None:
    bot = bots.emptied()
    storage.set_state(bot, KEY, State(state="start"))
    shard = next(iter(storage._bots)).shards[0]
    connection = shard._connection
    assert connection is not None
    version = storage.set_data(bot, KEY, {})

    class LosesOneAnswer:
        def exchange(self, request: bytes) -> bytes:
            assert connection is not None
            connection.exchange(request)
            connection.close()
            raise ConnectionResetError("the answer is lost")

        def set_timeout(self, timeout_s: float) -> None: ...
        def close(self) -> None: ...

    shard._connection = LosesOneAnswer()
    again = storage.set_data(bot, KEY, {"n": 1})

    assert again == version + 1
    state = storage.get_state(bot, KEY)
    assert state is not None
    assert (state.data, state.version) == ({"n": 1}, version + 1)


async def test_async_writes_over_breaking_connections_take_effect_once(storage: Storage, bots: Bots) -> None:
    bot = bots.emptied()
    async with AsyncStorage(timeout_s=30) as used:
        await used.set_data(bot, KEY, {})
        first = storage.get_state(bot, KEY)
        assert first is not None
        assert first.version is not None
        done = asyncio.Event()

        async def break_connections() -> int:
            count = 0
            while not done.is_set():
                shard = used._bots()[bot].shards[0]
                transport = getattr(shard._connection, "_transport", None)
                if transport is not None:
                    transport.abort()
                    count += 1
                await asyncio.sleep(0.003)
            return count

        async def work(worker: int) -> None:
            for number in range(100):
                await used.update_data(bot, KEY, {f"{worker}-{number}": number})

        breaking = asyncio.create_task(break_connections())
        await asyncio.gather(*(work(worker) for worker in range(8)))
        done.set()

        assert await breaking > 5
        last = await used.get_state(bot, KEY)
        assert last is not None
        assert len(last.data) == 800
        assert last.version == first.version + 800


def test_garbage_on_the_socket_disturbs_nobody(storage: Storage, bots: Bots) -> None:
    bot = bots.emptied()
    storage.set_state(bot, KEY, State(state="a"))
    path = storage._directory.known_endpoint(bot, 0).unix_path

    for garbage in (b"", b"\x00" * 4, b"\xff" * 4096, b"GET / HTTP/1.1\r\n\r\n"):
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.settimeout(DEADLINE_S)
            stranger.connect(path)
            stranger.sendall(garbage)
            stranger.shutdown(socket.SHUT_WR)
            while stranger.recv(4096):
                pass

    assert storage.get_state(bot, KEY) == State(state="a")


def test_an_actor_of_another_protocol_version_is_an_error_that_says_so(
    storage: Storage, bots: Bots, monkeypatch: pytest.MonkeyPatch
) -> None:
    bot = bots.emptied()
    monkeypatch.setattr("fsm_ray.channel.handshake.PROTOCOL_VERSION", 999)

    with Storage() as newer, pytest.raises(ProtocolMismatch, match="fsm-ray upgrade"):
        newer.get_state(bot, KEY)


def test_a_bot_is_dropped_when_ray_lists_it_no_more(
    storage: Storage, bot_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.init(bot_name)
    listed = actor._actor_names()
    left = [listed, listed, listed[:0]]
    monkeypatch.setattr(actor, "_actor_names", lambda: left.pop(0))

    storage.drop(bot_name)

    assert left == []


def test_actors_that_do_not_end_are_told_of(
    storage: Storage, bot_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.init(bot_name)
    listed = actor._actor_names()
    monkeypatch.setattr(actor, "_actor_names", lambda: listed)
    with Storage(timeout_s=1) as impatient, pytest.raises(NamespaceUnavailable, match="still there"):
        impatient.drop(bot_name)


def test_a_dropped_bot_leaves_no_actor_and_no_socket(storage: Storage, bot_name: str) -> None:
    storage.init(bot_name, shards=2)
    paths = [Path(storage._directory.known_endpoint(bot_name, shard).unix_path) for shard in range(2)]

    storage.drop(bot_name)

    with pytest.raises(UnknownBot):
        storage.describe(bot_name)
    assert not any(path.exists() for path in paths)


@both_transports
def test_a_bot_that_was_made_anew_is_found_again_by_old_storages(
    storage: Storage, bot_name: str, transport: Transport
) -> None:
    storage.init(bot_name, shards=1)
    key = next(key for key in range(100) if _shard_of(key, 2) == 1)
    with Storage(timeout_s=30, transport=transport) as old:
        old.set_state(bot_name, key, State(state="first life"))
        storage.drop(bot_name)
        storage.init(bot_name, shards=2)

        with pytest.raises(UnknownBot, match="call again"):
            old.set_state(bot_name, key, State(state="second life"))
        old.set_state(bot_name, key, State(state="second life"))

        assert storage.get_state(bot_name, key) == State(state="second life")


@both_transports
async def test_a_bot_that_was_made_anew_is_found_again_by_old_loops(
    storage: Storage, bot_name: str, transport: Transport
) -> None:
    await asyncio.to_thread(storage.init, bot_name, shards=1)
    key = next(key for key in range(100) if _shard_of(key, 2) == 1)
    async with AsyncStorage(timeout_s=30, transport=transport) as old:
        await old.set_state(bot_name, key, State(state="first life"))
        await asyncio.to_thread(storage.drop, bot_name)
        await asyncio.to_thread(storage.init, bot_name, shards=2)

        with pytest.raises(UnknownBot, match="call again"):
            await old.set_state(bot_name, key, State(state="second life"))
        await old.set_state(bot_name, key, State(state="second life"))

    assert storage.get_state(bot_name, key) == State(state="second life")


@both_transports
def test_a_bot_that_was_made_anew_with_fewer_shards_is_found_again_by_keys_of_those_that_are_gone(
    storage: Storage, bot_name: str, transport: Transport
) -> None:
    storage.init(bot_name, shards=2)
    key = next(key for key in range(100) if _shard_of(key, 2) == 1)
    with Storage(timeout_s=30, transport=transport) as old:
        old.set_state(bot_name, key, State(state="first life"))
        storage.drop(bot_name)
        storage.init(bot_name, shards=1)

        with pytest.raises(UnknownBot, match=r"fewer shards \(1\): call again"):
            old.set_state(bot_name, key, State(state="second life"))
        old.set_state(bot_name, key, State(state="second life"))

        assert storage.get_state(bot_name, key) == State(state="second life")


def test_no_thread_is_left_behind(storage: Storage, bots: Bots) -> None:
    bot = bots.emptied()
    with Storage() as warm:
        warm.get_state(bot, KEY)
    before = threading.active_count()

    for _ in range(5):
        with Storage() as each:
            each.get_state(bot, KEY)

    assert threading.active_count() <= before
