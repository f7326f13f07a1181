"""A bot's actors are replaced by ones of another version, while writers of both versions go on."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

import pytest
import ray

from fsm_ray import AsyncStorage, BotOptions, State, Storage, actor, upgrade
from fsm_ray.actor import NamespaceActor, call, find_actor, find_shard
from fsm_ray.channel.handshake import Endpoint, check_protocol_version
from fsm_ray.errors import (
    ConfigurationError,
    InvalidInput,
    NamespaceUnavailable,
    OutcomeUnknown,
    ProtocolMismatch,
    UnknownBot,
)
from fsm_ray.hosting import ShardDescription, ShardHost, ShardRotation
from fsm_ray.namespace import NamespaceStatistics
from fsm_ray.notes import Mark, Version, find_mark, note_version, set_mark
from fsm_ray.protocol import PROTOCOL_VERSION
from fsm_ray.version import load_fields
from tests.conftest import DEADLINE_S, Bots, RayCluster, eventually

ROOT = Path(__file__).parent.parent
OLD_VERSION = "0.0.1"
KEYS = range(8)
KEY = (1, 42)


# What travels between versions


def test_options_of_a_version_that_knew_fewer_have_defaults_for_the_rest() -> None:
    older = BotOptions(shards=3)
    del older.__dict__["ttl_mode"], older.__dict__["state_ttl_s"]
    loaded = pickle.loads(pickle.dumps(older))

    assert loaded == BotOptions(shards=3)
    assert (loaded.ttl_mode, loaded.state_ttl_s) == ("idle", {})


def test_options_of_a_version_that_knew_more_are_used_and_travel_on_with_all_they_have() -> None:
    newer = BotOptions(shards=3)
    newer.__dict__["compression"] = "zstd"
    loaded = pickle.loads(pickle.dumps(newer))

    assert loaded == BotOptions(shards=3)
    assert pickle.loads(pickle.dumps(loaded)).__dict__["compression"] == "zstd"


@dataclass(frozen=True, slots=True)
class _Grown:
    first: int
    second: str = "default"
    third: list[int] = dataclasses.field(default_factory=list)

    __setstate__ = load_fields


def test_a_description_of_another_version_has_defaults_for_what_that_did_not_know() -> None:
    of_older, of_newer = _Grown.__new__(_Grown), _Grown.__new__(_Grown)
    of_older.__setstate__([1])
    of_newer.__setstate__([1, "two", [3], "unknown"])

    assert of_older == _Grown(1)
    assert of_newer == _Grown(1, "two", [3])


FIRST_FIELDS: dict[type[Any], str] = {
    Endpoint: "options node_id unix_path tcp_address secret",
    Mark: "options version",
    NamespaceStatistics: (
        "records sessions operations operations_per_s version turns waiting_turns watches scans"
    ),
    ShardDescription: "shard node_id pid restarted_empty recovery_s size_bytes statistics",
    ShardRotation: "key_id pending",
    Version: "",
}
"""The fields that every version knows, in this order. One that is added comes later, and has a default."""


def test_all_that_travels_between_versions_is_listed_here() -> None:
    by_name = [getattr(ShardHost, name) for name in ShardHost.PERFORMED]
    methods = [method for _, method in inspect.getmembers(NamespaceActor, inspect.isfunction)] + by_name
    hints = [hint for method in methods for hint in get_type_hints(method).values()]

    in_control_store = {Mark, Version}
    assert {kind for hint in hints for kind in dataclasses_in(hint)} | in_control_store == set(FIRST_FIELDS)


def dataclasses_in(hint: Any) -> Iterator[type[Any]]:
    """The dataclasses that a value with this annotation is made of."""
    parts = get_args(hint)
    if dataclasses.is_dataclass(hint):
        yield cast(type[Any], hint)
        parts = tuple(get_type_hints(hint).values())
    for part in parts:
        yield from dataclasses_in(part)


@pytest.mark.parametrize("kind", FIRST_FIELDS, ids=lambda kind: kind.__name__)
def test_what_travels_loads_though_its_version_knew_fewer_fields_or_more(kind: Any) -> None:
    first = FIRST_FIELDS[kind].split()
    names = [field.name for field in dataclasses.fields(kind)]
    of_older, of_newer = kind.__new__(kind), kind.__new__(kind)
    of_older.__setstate__(first)
    of_newer.__setstate__([*names, "unknown"])

    assert [getattr(of_older, name) for name in first] == first
    assert dataclasses.MISSING not in [getattr(of_older, name) for name in names]
    assert [getattr(of_newer, name) for name in names] == names


def test_actors_have_the_methods_that_clients_of_every_version_know_and_no_others() -> None:
    """Ray's export of the class names each of them; a client that lacks one could not call any."""
    names = {name for name, _ in inspect.getmembers(NamespaceActor, inspect.isfunction)}

    known = {"options", "open", "was_opened", "endpoint", "exchange", "describe", "stop", "perform"}
    assert names == {"__init__"} | known


@pytest.mark.ray
def test_what_an_actor_does_not_know_is_refused_with_the_way_to_mend_it(bots: Bots) -> None:
    shard = find_shard(bots.emptied(), 0)

    with pytest.raises(ProtocolMismatch, match="cannot fly: upgrade the bot with `fsm-ray upgrade BOT`"):
        call(shard.perform.remote("fly"), "my_bot", DEADLINE_S)


def test_an_endpoint_tells_its_protocol_whatever_version_made_it() -> None:
    """This is unpickled before versions are compared, so its fields keep their places."""
    names = [field.name for field in dataclasses.fields(Endpoint)]

    assert names[:6] == ["options", "node_id", "unix_path", "tcp_address", "secret", "protocol_version"]


@pytest.mark.parametrize(
    ("theirs", "cure"),
    [(PROTOCOL_VERSION - 1, "fsm-ray upgrade BOT"), (PROTOCOL_VERSION + 1, "start this worker")],
)
def test_a_mismatch_says_who_is_behind_and_what_to_do(theirs: int, cure: str) -> None:
    with pytest.raises(ProtocolMismatch, match=cure):
        check_protocol_version(theirs)


# One version


@pytest.fixture
def storage(cluster: RayCluster) -> Iterator[Storage]:
    with Storage(timeout_s=DEADLINE_S) as storage:
        yield storage


def versions(storage: Storage, bot_name: str) -> list[Version | None]:
    return [shard.version for shard in storage.describe(bot_name).shards]


def pids(storage: Storage, bot_name: str) -> list[int]:
    return [shard.pid for shard in storage.describe(bot_name).shards]


@pytest.mark.ray
def test_a_bot_in_memory_is_not_upgraded_unless_its_records_may_be_lost(storage: Storage, bots: Bots) -> None:
    bot_name = bots.emptied()
    storage.set_state(bot_name, KEY, State(state="a"))

    with pytest.raises(InvalidInput, match="would be lost"):
        storage.upgrade(bot_name, force=True)
    assert storage.get_state(bot_name, KEY) == State(state="a")
    assert storage.upgrade(bot_name, allow_loss=True) == []  # for it is of this version
    assert storage.get_state(bot_name, KEY) == State(state="a")

    (replaced,) = storage.upgrade(bot_name, allow_loss=True, force=True)
    assert (replaced.shard, replaced.old_version) == (0, Version().fsm_ray)
    assert storage.get_state(bot_name, KEY) is None
    assert versions(storage, bot_name) == [Version()]


async def test_a_shard_that_stops_releases_its_store_whatever_its_metrics_raise(
    no_ray: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = BotOptions(store=f"rocksdb://{tmp_path}")
    shard, after = ShardHost("my_bot", 0, options), ShardHost("my_bot", 0, options)

    def publish() -> None:
        raise OSError("Ray's exporter is gone")

    await shard.open()
    monkeypatch.setattr(shard._metrics, "publish", publish)
    with pytest.raises(OSError, match="exporter"):
        await shard.stop()

    await after.open()  # where RocksDB lets in one at a time
    await after.stop()


@pytest.mark.ray
def test_an_upgrade_of_no_bot_is_refused(storage: Storage, bot_name: str) -> None:
    with pytest.raises(UnknownBot):
        storage.upgrade(bot_name)


@pytest.mark.ray
@pytest.mark.slow
def test_an_upgrade_that_was_interrupted_leaves_a_bot_that_is_waited_for_and_is_ended_by_the_next(
    storage: Storage, bots: Bots, monkeypatch: pytest.MonkeyPatch
) -> None:
    bot_name = bots.emptied(store="rocksdb")
    storage.set_state(bot_name, KEY, State(state="a"))

    # After the old actor was stopped, and before it is killed.
    with monkeypatch.context() as patched:
        patched.setattr(ray, "kill", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            storage.upgrade(bot_name, force=True)
    with Storage(timeout_s=0.3) as hasty, pytest.raises(NamespaceUnavailable):
        hasty.get_state(bot_name, KEY)

    # After the old one was killed, and before there is a new one.
    with monkeypatch.context() as patched:
        patched.setattr(upgrade, "create_shard", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            storage.upgrade(bot_name)
    eventually(lambda: find_actor(bot_name, 0) is None, "the actor is gone")
    with Storage(timeout_s=0.3) as hasty, pytest.raises(NamespaceUnavailable, match="upgrade the bot again"):
        hasty.get_state(bot_name, KEY)

    (replaced,) = storage.upgrade(bot_name)

    assert (replaced.shard, replaced.old_version) == (0, None)
    assert find_mark(bot_name) is None
    assert storage.get_state(bot_name, KEY) == State(state="a")
    assert storage.upgrade(bot_name) == []


def _interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.ray
@pytest.mark.slow
def test_a_bot_without_actors_whose_upgrade_was_interrupted_can_be_dropped(
    storage: Storage, bot_name: str
) -> None:
    set_mark(bot_name, Mark(BotOptions(), Version()))
    with Storage(timeout_s=0.1) as hasty, pytest.raises(NamespaceUnavailable):
        hasty.get_state(bot_name, KEY)

    storage.drop(bot_name)

    with pytest.raises(UnknownBot):
        storage.get_state(bot_name, KEY)


@pytest.mark.ray
@pytest.mark.slow
def test_an_actor_that_others_make_meanwhile_of_another_version_is_replaced_too(
    storage: Storage, bots: Bots, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a worker of the old version that calls `init` while there is no actor."""
    bot_name = bots.emptied(store="rocksdb")
    create = actor.create_shard
    intruders: list[Any] = []

    def create_late(*arguments: Any, **options: Any) -> Any:
        if not intruders:
            intruders.append(create(bot_name, 0, arguments[2]))
            ray.get(intruders[0].options.remote())
            note_version(bot_name, 0, "not the intruder's id")
        return create(*arguments, **options)

    monkeypatch.setattr(upgrade, "create_shard", create_late)
    storage.upgrade(bot_name, force=True)

    assert intruders[0] != find_actor(bot_name, 0)
    assert versions(storage, bot_name) == [Version()]


@pytest.mark.ray
@pytest.mark.slow
def test_nodes_that_have_another_version_than_the_caller_are_told_of(
    storage: Storage, bots: Bots, monkeypatch: pytest.MonkeyPatch
) -> None:
    bot_name = bots.emptied(store="rocksdb")
    storage.set_state(bot_name, KEY, State(state="a"))
    with monkeypatch.context() as patched:
        patched.setattr(upgrade, "Version", lambda: Version("99.0", PROTOCOL_VERSION))
        with pytest.raises(ConfigurationError, match="install it on all nodes"):
            storage.upgrade(bot_name)

    assert storage.get_state(bot_name, KEY) == State(state="a")
    assert storage.upgrade(bot_name) == []


@pytest.mark.ray
@pytest.mark.slow
def test_a_write_whose_answer_is_lost_as_its_actor_is_replaced_takes_effect_once(
    storage: Storage, bots: Bots
) -> None:
    bot_name = bots.emptied(store="rocksdb")
    storage.set_data(bot_name, KEY, {})
    shard = next(iter(storage._bots)).shards[0]
    connection: Any = shard._connection

    class LosesOneAnswer:
        def exchange(self, request: bytes) -> bytes:
            connection.exchange(request)
            connection.close()
            storage.upgrade(bot_name, force=True)
            raise ConnectionResetError("the answer is lost")

        def set_timeout(self, timeout_s: float) -> None: ...
        def close(self) -> None: ...

    shard._connection = LosesOneAnswer()

    assert storage.patch(bot_name, KEY, increment={"n": 1}) == {"n": 1}


# A write under way when its actor turns out to be of another version


@pytest.mark.ray
def test_a_write_under_way_when_the_protocol_changes_has_an_unknown_outcome(
    storage: Storage, bots: Bots, monkeypatch: pytest.MonkeyPatch
) -> None:
    bot_name = bots.emptied()
    storage.set_data(bot_name, KEY, {})
    shard = next(iter(storage._bots)).shards[0]

    class LosesOneAnswer:
        def exchange(self, request: bytes) -> bytes:
            raise ConnectionResetError("the answer is lost")

        def set_timeout(self, timeout_s: float) -> None: ...
        def close(self) -> None: ...

    shard.close()
    shard._connection = LosesOneAnswer()
    monkeypatch.setattr("fsm_ray.channel.handshake.PROTOCOL_VERSION", PROTOCOL_VERSION - 1)

    with pytest.raises(OutcomeUnknown, match="newer than this client"):
        storage.set_data(bot_name, KEY, {"n": 1})
    with pytest.raises(ProtocolMismatch, match="newer than this client"):
        storage.set_data(bot_name, KEY, {"n": 1})


@pytest.mark.ray
async def test_async_writes_under_way_when_the_protocol_changes_have_an_unknown_outcome_and_others_none(
    storage: Storage, bots: Bots, monkeypatch: pytest.MonkeyPatch
) -> None:
    bot_name = bots.emptied()
    async with AsyncStorage(timeout_s=DEADLINE_S) as used:
        await used.set_data(bot_name, KEY, {})
        under_way = asyncio.ensure_future(used.set_data(bot_name, KEY, {"n": 1}))
        await asyncio.sleep(0)  # until it is sent, and before an answer can be read
        monkeypatch.setattr("fsm_ray.channel.handshake.PROTOCOL_VERSION", PROTOCOL_VERSION - 1)
        connection: Any = used._bots()[bot_name].shards[0]._connection
        connection._transport.abort()
        read = asyncio.ensure_future(used.get_data(bot_name, KEY))

        results = await asyncio.gather(under_way, read, return_exceptions=True)

    assert [type(result) for result in results] == [OutcomeUnknown, ProtocolMismatch]


# Over Ray calls nobody shakes hands.


@pytest.mark.ray
def test_the_protocol_is_compared_where_frames_travel_in_ray_calls(
    storage: Storage, bots: Bots, monkeypatch: pytest.MonkeyPatch
) -> None:
    bot_name = bots.emptied()
    monkeypatch.setattr("fsm_ray.channel.handshake.PROTOCOL_VERSION", PROTOCOL_VERSION + 1)

    with Storage(transport="ray") as newer, pytest.raises(ProtocolMismatch, match="fsm-ray upgrade") as error:
        newer.get_state(bot_name, KEY)
    assert error.value.bot == bot_name


# Two versions


@dataclass(frozen=True)
class Old:
    """A wheel of another version, unpacked."""

    path: Path
    protocol: int


def previous_commit(directory: Path) -> Old:
    """The commit before this one, as a wheel."""
    source = directory / "source"
    with tarfile.open(fileobj=io.BytesIO(archived(ROOT))) as archive:
        archive.extractall(source, filter="data")
    return build(source, directory, None)


def archived(root: Path) -> bytes:
    """What the commit before this one holds. Where there is no history the test is skipped, but not in CI."""
    # Not a repository that this tree only lies in.
    command = ["git", "--git-dir", str(root / ".git"), "archive", "HEAD~1"]
    try:
        return subprocess.run(command, capture_output=True, check=True, timeout=DEADLINE_S).stdout
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        reason = f"the commit before this one is not to be had, as without git or in a shallow clone: {error}"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.mark.parametrize("has_git", [True, False], ids=["a tree without history", "no git"])
def test_where_there_is_no_commit_before_this_one_a_test_is_skipped_and_fails_in_ci(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, has_git: bool
) -> None:
    if not has_git:
        monkeypatch.setenv("PATH", str(tmp_path))

    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="the commit before this one"):
        archived(tmp_path)
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="the commit before this one"):
        archived(tmp_path)


def other_protocol(directory: Path) -> Old:
    """This tree, as a wheel, but for the numbers of its version and protocol."""
    source = directory / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "fsm_ray", source / "fsm_ray", ignore=shutil.ignore_patterns("__pycache__"))
    return build(source, directory, PROTOCOL_VERSION - 1)


def build(source: Path, directory: Path, protocol: int | None) -> Old:
    """Build a wheel of OLD_VERSION, and of this protocol version or its own."""
    version = source / "fsm_ray/version.py"
    home = version if version.exists() else source / "fsm_ray/__init__.py"
    edit(home, r'^__version__ = ".*"', f'__version__ = "{OLD_VERSION}"')
    found = edit(
        source / "fsm_ray/protocol/__init__.py",
        r"^PROTOCOL_VERSION = (\d+)",
        None if protocol is None else f"PROTOCOL_VERSION = {protocol}",
    )
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(directory)]
    subprocess.run(command, cwd=source, check=True, capture_output=True, timeout=DEADLINE_S)
    (wheel,) = directory.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(directory / "unpacked")
    return Old(directory / "unpacked", protocol or int(found[1]))


def edit(path: Path, pattern: str, replacement: str | None) -> re.Match[str]:
    """Replace the only line of the file that fits, unless it is to stay; return what was found."""
    text = path.read_text()
    (found,) = re.finditer(pattern, text, re.MULTILINE)
    if replacement is not None:
        path.write_text(text[: found.start()] + replacement + text[found.end() :])
    return found


WRITER = """
import json, sys, threading
from collections import Counter

import ray

import fsm_ray
from fsm_ray.errors import OutcomeUnknown, ProtocolMismatch, UnknownBot

address, bot_name, store, path, keys = sys.argv[1:]
assert fsm_ray.__file__.startswith(path)
ray.init(address, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": path}})
storage = fsm_ray.Storage(timeout_s=60)
storage.init(bot_name, store=store, shards=2)
print("ready", flush=True)
acknowledged, doubtful, end = Counter(), Counter(), ""
is_over = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), is_over.set()), daemon=True).start()
number = 0
while not (is_over.is_set() or end):
    key = number % int(keys)
    number += 1
    try:
        storage.patch(bot_name, ("old", key), increment={"n": 1})
        acknowledged[key] += 1
    except (OutcomeUnknown, UnknownBot, ProtocolMismatch) as error:
        doubtful[key] += 1
        end = str(error) if "protocol version" in str(error) else ""
print("report", json.dumps({"acknowledged": acknowledged, "doubtful": doubtful, "end": end}), flush=True)
"""
"""What a worker of the old version does: makes the bot, and writes until its stdin is closed."""


@pytest.fixture
def old_worker(
    request: pytest.FixtureRequest, cluster: RayCluster, bot_name: str, tmp_path: Path
) -> Iterator[tuple[Old, subprocess.Popen[str]]]:
    """A worker of the version that the test builds; the bot has its actors."""
    old = request.param(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    store = f"rocksdb://{tmp_path}/bot"
    worker = subprocess.Popen(
        [sys.executable, "-c", WRITER, cluster.address, bot_name, store, str(old.path), str(len(KEYS))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=elsewhere,
        env=os.environ | {"PYTHONPATH": str(old.path)},
    )
    try:
        assert worker.stdout is not None
        assert "ready\n" in iter(worker.stdout.readline, "")  # Ray prints there, too
        yield old, worker
    finally:
        worker.kill()
        worker.communicate()


def counted(storage: Storage, bot_name: str, who: str) -> Counter[int]:
    """What the records say that somebody's writes did, by key."""
    states = storage.get_many(bot_name, [(who, key) for key in KEYS])
    return Counter({key: state.data["n"] for key, state in zip(KEYS, states, strict=True) if state})


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("old_worker", [previous_commit, other_protocol], indirect=True)
async def test_a_bot_of_an_old_wheel_is_upgraded_while_writers_of_both_versions_lose_nothing(
    old_worker: tuple[Old, subprocess.Popen[str]], storage: Storage, bot_name: str
) -> None:
    old, worker = old_worker
    may_meet = old.protocol == PROTOCOL_VERSION
    acknowledged: Counter[int] = Counter()
    is_over = asyncio.Event()

    async with AsyncStorage(timeout_s=DEADLINE_S) as used:

        async def write(key: int) -> None:
            await until(lambda: may_meet or find_mark(bot_name) is not None)
            while not is_over.is_set():
                await used.patch(bot_name, ("new", key), increment={"n": 1})
                acknowledged[key] += 1

        if not may_meet:
            with pytest.raises(ProtocolMismatch, match="fsm-ray upgrade BOT"):
                await used.get_state(bot_name, KEY)
        writers = [asyncio.create_task(write(key)) for key in KEYS]
        replaced = await used.upgrade(bot_name)
        before = acknowledged.copy()
        await until(lambda: all(acknowledged[key] > before[key] for key in KEYS))
        if may_meet:
            theirs = counted(storage, bot_name, "old").total()
            await until(lambda: counted(storage, bot_name, "old").total() > theirs)
        is_over.set()
        await asyncio.gather(*writers)
        said, _ = await asyncio.to_thread(worker.communicate, timeout=DEADLINE_S)
        report = json.loads(said.partition("report ")[2].partition("\n")[0])

        assert [shard.shard for shard in replaced] == [1, 0]
        assert {shard.old_version for shard in replaced} == {OLD_VERSION}
        description = await used.describe(bot_name)
        assert [shard.version for shard in description.shards] == [Version(), Version()]
        assert counted(storage, bot_name, "new") == acknowledged
        kept = counted(storage, bot_name, "old")
        assert sum(report["acknowledged"].values()) > 0
        for key in KEYS:
            sure = report["acknowledged"].get(str(key), 0)
            assert sure <= kept[key] <= sure + report["doubtful"].get(str(key), 0)
        assert bool(report["end"]) != may_meet
        assert sum(report["doubtful"].values()) <= 1


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110  # other processes bring it about
            await asyncio.sleep(0.001)
