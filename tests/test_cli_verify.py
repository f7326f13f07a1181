"""`fsm-ray verify`: a sound store passes beside its owner, and every fault is found where it is."""

from __future__ import annotations

import asyncio
import errno
import random
import shutil
import sys
import tempfile
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis
from rocksdict import Rdict
from slatedb import uniffi as slatedb  # type: ignore[import-untyped]

from fsm_ray import cli, protocol
from fsm_ray.bench.servers import PostgresServer, ValkeyServer, temporary_directory
from fsm_ray.codec import encode_key
from fsm_ray.codec.keys import check_key
from fsm_ray.errors import InvalidInput, StoreUnavailable, ValueNotDecodable
from fsm_ray.stores.base import Answered, Batch, OwnedStore, Place, Row, encode_answered, with_slot
from fsm_ray.stores.objectstore import ObjectStore
from fsm_ray.stores.owner import Owner, encode_owner
from fsm_ray.stores.postgres import PostgresStore
from fsm_ray.stores.redis import RedisStore
from fsm_ray.stores.rocksdb import RocksDBStore
from fsm_ray.testing.batches import make_blob
from fsm_ray.testing.stores import commit_all, opened
from fsm_ray.verification import ShardReport, verify

from .test_transfer import KEYS

SESSION = bytes(16)


def answered(number: int, said: int | None = None) -> Answered:
    """The answer to a write as a shard keeps it; `said` is the number in the answer itself."""
    return Answered(number, protocol.reply(protocol.WRITE, said or number, [b"\x01"]), 1.0)


def batch(version: int) -> Batch:
    records = {encode_key((-100, n)): make_blob("flow", "state\x00", version) for n in range(20)}
    return Batch(version, records, {SESSION: answered(version)})


class Kind(ABC):
    """A kind of store, and how to damage one."""

    store: Any

    def __init__(self, url: str) -> None:
        self.place = Place(url=url, bot_name=f"bot-{uuid.uuid4().hex[:12]}", shard=0, shards=1, lease_s=0.2)

    def make(self) -> OwnedStore:
        store: OwnedStore = self.store(self.place)
        return store

    @abstractmethod
    async def put(self, kind: str, key: bytes, value: bytes) -> None:
        """Write a raw row; the key of a record has its slot in front."""


class Sorted(Kind, ABC):
    """A kind that keeps everything under sorted keys."""

    @abstractmethod
    async def write(self, key: bytes, value: bytes) -> None: ...

    async def put(self, kind: str, key: bytes, value: bytes) -> None:
        prefix = {"record": b"r", "session": b"s", "owner": b"owner", "version": b"version", "other": b"x"}
        await self.write(prefix[kind] + key, value)


class RocksDB(Sorted):
    store = RocksDBStore

    @property
    def directory(self) -> Path:
        return Path(self.place.url.partition("://")[2]) / self.place.bot_name / str(self.place.shard)

    async def write(self, key: bytes, value: bytes) -> None:
        database = Rdict(str(self.directory), RocksDBStore(self.place)._options())
        database[key] = value
        database.close()


class Objects(Sorted):
    store = ObjectStore

    async def write(self, key: bytes, value: bytes) -> None:
        builder = slatedb.ObjectStoreBuilder(slatedb.ObjectStoreType.LOCAL)
        builder.with_config("local_path", self.place.url.partition("://")[2])
        path = f"{self.place.bot_name}/{self.place.shard}"
        database = await slatedb.DbBuilder(path, builder.build()).build()
        await database.put(key, value)
        await database.flush()
        await database.shutdown()


class Redis(Kind):
    store = RedisStore

    async def put(self, kind: str, key: bytes, value: bytes) -> None:
        name = f"fsm_ray:{{{self.place.bot_name}/{self.place.shard}}}:"
        with redis.Redis.from_url(self.place.url) as client:
            if kind in {"record", "session"}:
                client.hset(f"{name}{kind}s", key, value)
            elif kind == "version":
                client.hset(f"{name}owner", "version", str(int.from_bytes(value, "big")))
            elif kind == "owner":
                client.hset(f"{name}owner", "owner", value)


class Postgres(Kind):
    store = PostgresStore

    async def put(self, kind: str, key: bytes, value: bytes) -> None:
        where = (self.place.bot_name, self.place.shard)
        with psycopg.connect(self.place.url) as connection:
            if kind == "record":
                connection.execute(
                    "INSERT INTO fsm_ray.records (bot, shard, slot, key, version, blob)"
                    " VALUES (%s, %s, %s, %s, 1, %s)",
                    [*where, int.from_bytes(key[:2], "big"), key[2:], value],
                )
            elif kind == "session":
                connection.execute(
                    "INSERT INTO fsm_ray.sessions VALUES (%s, %s, %s, 7, %s, 0)", [*where, key, value]
                )
            elif kind == "version":
                connection.execute(
                    "UPDATE fsm_ray.owners SET version = %s WHERE bot = %s AND shard = %s",
                    [int.from_bytes(value, "big"), *where],
                )
            elif kind == "owner":
                connection.execute(
                    "UPDATE fsm_ray.owners SET owner = %s::jsonb WHERE bot = %s AND shard = %s",
                    [value.decode(), *where],
                )


@pytest.fixture(scope="module")
def valkey() -> Iterator[ValkeyServer]:
    with temporary_directory() as directory, ValkeyServer(directory, fsync="always") as server:
        yield server


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    # Not in pytest's tmp_path: where we are root, the server runs as another user, who may not look there.
    directory = Path(tempfile.mkdtemp(prefix="fsm-ray-"))
    directory.chmod(0o711)
    try:
        with PostgresServer(directory) as server:
            yield server
            server.kill()
    finally:
        shutil.rmtree(directory)


@pytest.fixture(params=["rocksdb", "objects", "redis", "postgres"])
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> Kind:
    match request.param:
        case "rocksdb":
            return RocksDB(f"rocksdb://{tmp_path}")
        case "objects":
            return Objects(f"file://{tmp_path}")
        case "redis":
            return Redis(request.getfixturevalue("valkey").url)
    return Postgres(request.getfixturevalue("postgres").url)


async def reports(kind: Kind, bot_name: str | None = None) -> list[ShardReport]:
    return [report async for report in verify(kind.place.url, bot_name or kind.place.bot_name)]


def files_of(directory: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in directory.rglob("*")}


def problems(report: ShardReport) -> list[str]:
    return [f"{each.where}: {each.problem}" for each in report.findings]


async def test_a_sound_store_passes_beside_its_owner_who_notices_nothing(kind: Kind) -> None:
    async with opened(kind.make()) as (store, _):
        await store.commit(batch(1))
        await store.commit(batch(2))
        [report] = await reports(kind)
        await store.commit(batch(3))
        [later] = await reports(kind)

        assert problems(report) + problems(later) == []
        assert (report.records, report.sessions, report.version) == (20, 1, 2)
        assert (later.version, later.owner) == (3, report.owner)


async def test_every_fault_of_a_row_is_found(kind: Kind) -> None:
    await commit_all(kind.make(), [batch(5)])
    key, other = encode_key("a"), encode_key("b")
    blob = make_blob(None, None, 1)
    await kind.put("record", with_slot(key), b"\x93 no record")
    await kind.put("record", with_slot(key)[:1] + b"\xee" + other, blob)
    await kind.put("record", with_slot(b"\xc1"), blob)
    await kind.put("record", with_slot(encode_key(6)), make_blob(None, None, 6))
    await kind.put("session", b"garbage", b"\xc1" if isinstance(kind, Postgres) else b"\xc1garbage")
    odd = answered(7, said=8)
    await kind.put("session", b"odd", odd.reply if isinstance(kind, Postgres) else encode_answered(odd))
    [report] = await reports(kind)
    found = "\n".join(problems(report))
    [unreadable] = [line for line in found.splitlines() if "it is no record: " in line]

    assert found.count("and its key belongs to ") == 1
    assert found.count("these bytes are no key") == 1
    assert found.count("its version, 6, is later than the shard's last, 5") == 1
    assert found.count("the session's last answer cannot be read: ") == 1
    assert found.count("the answer to write 8 is kept as that to 7") == 1
    assert key.hex() in unreadable or repr(with_slot(key)) in unreadable
    # Of what was put there by hand, PostgreSQL's columns say other versions than the blob.
    assert len(report.findings) == 6 + isinstance(kind, Postgres)


async def test_a_damaged_owner_and_another_shards_records_are_found(kind: Kind) -> None:
    await commit_all(kind.make(), [batch(1)])
    place = kind.place
    owner = Owner(
        epoch=9, opening="", process="", lease_s=1.0, bot_name="another", shard=1, shards=2, format=0
    )
    await kind.put("owner", b"", encode_owner(owner))
    [report, missing] = await reports(kind)
    found = "\n".join(problems(report))

    assert "it has format 0 and 4096 slots; this fsm_ray has 1, or 2 encrypted, and 4096" in found
    assert "it is shard 1 of bot 'another'" in found
    assert "its key belongs to shard 1 of 2" in found
    assert (missing.bot_name, missing.shard, missing.findings[0].problem) == (
        place.bot_name,
        1,
        "there is nothing of it",
    )


@pytest.mark.parametrize("shards", [300_000, 0])
async def test_a_number_of_shards_that_no_bot_has_is_a_finding_and_nothing_is_made_of_it(
    kind: Kind, shards: int
) -> None:
    await commit_all(kind.make(), [batch(1)])
    place = kind.place
    owner = Owner(
        epoch=9, opening="", process="", lease_s=1.0, bot_name=place.bot_name, shard=0, shards=shards
    )
    await kind.put("owner", b"", encode_owner(owner))
    [report] = await reports(kind)
    [problem] = problems(report)

    assert problem.endswith(f": it says that the bot has {shards} shards; bots have 1 to 4096")
    assert report.shards is None


async def test_many_missing_shards_are_told_in_part_and_counted(tmp_path: Path) -> None:
    kind = RocksDB(f"rocksdb://{tmp_path}")
    kind.place = replace(kind.place, shards=4_000)
    await commit_all(kind.make(), [Batch(1, {}, {})])
    found = await reports(kind)

    assert len(found) == 101
    assert [report.more_findings for report in found] == [0] * 100 + [3_899]


async def test_where_shards_cannot_be_listed_each_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = Objects(f"file://{tmp_path}")
    for shard in range(2):
        kind.place = replace(kind.place, shard=shard, shards=2)
        await commit_all(kind.make(), [Batch(1, {}, {})])
    read: list[int] = []
    rows = ObjectStore.rows

    def counted_rows(store: ObjectStore) -> AsyncGenerator[Row, None]:
        read.append(store.place.shard)
        return rows(store)

    async def no_places(_: str) -> list[tuple[str, int]]:
        raise InvalidInput("such a store cannot tell")

    monkeypatch.setattr(ObjectStore, "rows", counted_rows)
    monkeypatch.setattr(ObjectStore, "places", no_places)
    found = await reports(kind)

    assert [problems(report) for report in found] == [[], []]
    assert read == [0, 1]


async def test_shards_that_disagree_about_their_number_are_found(kind: Kind) -> None:
    await commit_all(kind.make(), [Batch(1, {}, {})])
    kind.place = replace(kind.place, shard=1, shards=2)
    await commit_all(kind.make(), [Batch(1, {}, {})])
    first, second = await reports(kind)

    assert problems(first) == []
    assert problems(second) == ["owner: it is one of 2 shards, and others of 1"]


async def test_without_a_name_all_bots_at_the_url_are_looked_through(kind: Kind) -> None:
    bots = set()
    for _ in range(2):
        kind = type(kind)(kind.place.url)
        bots.add(kind.place.bot_name)
        await commit_all(kind.make(), [batch(1)])

    assert bots <= {report.bot_name async for report in verify(kind.place.url)}


async def test_a_bot_that_is_not_there_is_a_finding(kind: Kind) -> None:
    await commit_all(kind.make(), [Batch(1, {}, {})])
    [report] = await reports(kind, "nobody")

    assert problems(report) == ["the whole shard: there is nothing of it"]


@pytest.mark.parametrize("suffix", [".sst", ".log"])
async def test_bits_that_turned_in_a_table_or_a_log_of_rocksdb_are_found(tmp_path: Path, suffix: str) -> None:
    chance = random.Random(1)
    kind = RocksDB(f"rocksdb://{tmp_path / 'owned'}")
    records = {encode_key(n): make_blob(chance.randbytes(50).hex()) for n in range(2_000)}
    async with opened(kind.make()) as (store, _):
        await store.commit(Batch(1, records, {}))
        # What a kill would leave: closing moves the log into a table, of many blocks.
        shutil.copytree(tmp_path / "owned", tmp_path / "killed")
    kind.place = replace(
        kind.place, url=f"rocksdb://{tmp_path / ('owned' if suffix == '.sst' else 'killed')}"
    )
    path = max(kind.directory.glob(f"*{suffix}"), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    assert len(content) > 50_000
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    [report] = await reports(kind)

    assert len(report.findings) == 1
    assert f"{kind.directory} is damaged" in report.findings[0].problem


async def test_nothing_in_a_rocksdb_is_written(tmp_path: Path) -> None:
    kind = RocksDB(f"rocksdb://{tmp_path}")
    await commit_all(kind.make(), [batch(1)])
    before = files_of(tmp_path)
    await reports(kind)

    assert files_of(tmp_path) == before


@pytest.mark.parametrize("key", KEYS)
def test_every_key_that_was_encoded_is_one(key: Any) -> None:
    check_key(encode_key(key))


@pytest.mark.parametrize(
    "encoded",
    [
        b"",
        b"\xc1",
        b"\xcc\x01",  # 1, longer than need be
        b"\x80",  # a map
        b"\x01\x01",
        b"\xd4\x01\x05",  # 5, as only larger numbers are
        b"\xd4\x02\x00",  # a UUID of one byte
        b"\xd4\x11\x00",  # a pickle
        b"\x91" * 500 + b"\x01",
    ],
)
def test_what_no_key_is_encoded_as_is_none(encoded: bytes) -> None:
    with pytest.raises(ValueNotDecodable):
        check_key(encoded)


def _refuse(_: Path) -> None:
    raise PermissionError(errno.EACCES, "Permission denied")


async def test_a_store_that_cannot_be_looked_at_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InvalidInput, match="keeps nothing"):
        await anext(verify("memory://"))
    monkeypatch.setattr(Path, "iterdir", _refuse)
    with pytest.raises(StoreUnavailable, match="Permission denied"):
        await anext(verify(f"rocksdb://{tmp_path}"))
    with pytest.raises(InvalidInput, match="cannot tell which bots"):
        await anext(verify("s3://bucket"))


Verify = Callable[..., tuple[int | str | None, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Verify:
    """Runs `fsm-ray verify`: its exit code, and what it printed on stdout and stderr."""

    def run(*arguments: str) -> tuple[int | str | None, str, str]:
        monkeypatch.setattr(sys, "argv", ["fsm-ray", "verify", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return stopped.value.code, *capsys.readouterr()

    return run


def test_the_command_prints_findings_and_fails(run: Verify, tmp_path: Path) -> None:
    kind = RocksDB(f"rocksdb://{tmp_path}")
    asyncio.run(commit_all(kind.make(), [batch(1)]))

    code, told, _ = run(kind.place.url)
    assert (code, told.splitlines()) == (
        0,
        [
            f"{kind.place.bot_name} shard 0 of 1: 20 records, 1 session, version 1",
            "1 shard, 20 records: all is well",
        ],
    )

    asyncio.run(kind.put("other", b"", b""))
    code, told, _ = run(kind.place.url, kind.place.bot_name)
    assert code == cli.EXIT_FAILED
    assert "  key 0x78: nothing of fsm_ray's is kept there\n" in told
    assert told.endswith("20 records: 1 finding\n")
    code, told, _ = run(kind.place.url, "--json")
    assert (code, '"findings": [{"where": "key 0x78"' in told) == (cli.EXIT_FAILED, True)


def test_where_nothing_is_there_is_nothing_to_try_again(run: Verify, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for url in (f"rocksdb://{tmp_path / 'none'}", f"file://{tmp_path / 'none'}", f"rocksdb://{file}"):
        code, told, _ = run(url)
        assert (code, told) == (cli.EXIT_FAILED, "0 shards, 0 records: there is nothing there\n")
        code, told, _ = run(url, "bot")
        assert code == cli.EXIT_FAILED
        assert "bot shard 0: 0 records, 0 sessions, no version\n" in told


def test_wrong_arguments_are_named_as_the_command_has_them(run: Verify) -> None:
    for arguments, told in (
        (["nowhere"], "STORE_URL: no store is known for 'nowhere'; "),
        (["rocksdb:///x", "--encryption-keys", "x"], "--encryption-keys: say where the keys are: "),
        (["memory://", "--encryption-keys", "env:X"], "encryption_keys encrypts a store, and memory:// has "),
        (
            ["env:FSM_RAY_NOWHERE"],
            "env:FSM_RAY_NOWHERE: the environment variable 'FSM_RAY_NOWHERE' is not set",
        ),
    ):
        code, _, err = run(*arguments)
        assert (code, err.startswith(f"fsm-ray: {told}"), err.count("\n")) == (cli.EXIT_USAGE, True, 1)


def test_the_url_may_be_in_the_environment(
    run: Verify, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = RocksDB(f"rocksdb://{tmp_path}")
    asyncio.run(commit_all(kind.make(), [batch(1)]))
    monkeypatch.setenv("FSM_RAY_STORE", kind.place.url)

    assert run("env:FSM_RAY_STORE")[0] == 0


def test_no_name_in_a_store_commands_the_terminal(run: Verify, tmp_path: Path) -> None:
    (tmp_path / "\x1b[2J" / "0").mkdir(parents=True)
    _, told, _ = run(f"rocksdb://{tmp_path}")

    assert "\\u001b[2J shard 0" in told
    assert told.replace("\n", "").isprintable()


def test_an_error_of_the_whole_store_names_no_shard(run: Verify) -> None:
    code, _, err = run("redis://127.0.0.1:1/0")

    assert (code, "shard 0" in err) == (cli.EXIT_UNAVAILABLE, False)
    assert err.startswith("fsm-ray: redis://127.0.0.1:1/0 cannot be used: ")
