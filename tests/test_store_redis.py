"""The Redis store: the kit, and what a foreign, damaged, full, silent or killed server does."""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import redis
import uvloop

from fsm_ray.bench.servers import ValkeyServer, temporary_directory
from fsm_ray.errors import (
    FsmRayError,
    InvalidOptions,
    NotOwner,
    StoreCorrupted,
    StoreMismatch,
    StoreUnavailable,
)
from fsm_ray.stores.base import Batch, Place, with_slot
from fsm_ray.stores.redis import RedisStore, _Connection
from fsm_ray.testing import MakeStore, SharedStoreConformance, StoreConformance
from fsm_ray.testing.batches import kept_of, make_blob, numbered_batch
from fsm_ray.testing.stores import commit_all, contents_of, opened

SECRET = "s3cr3t-w0rd"


@pytest.fixture(scope="module")
def server() -> Iterator[ValkeyServer]:
    """One that every test leaves as it was."""
    with temporary_directory() as directory, ValkeyServer(directory, fsync="always") as server:
        yield server


@pytest.fixture
def own_server() -> Iterator[ValkeyServer]:
    """One that is the test's own: to be killed, stopped or set differently."""
    with temporary_directory() as directory, ValkeyServer(directory, fsync="always") as server:
        yield server


@pytest.fixture
def place(server: ValkeyServer) -> Place:
    return place_on(server)


@pytest.fixture
def admin(server: ValkeyServer) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(server.url) as client:
        yield client


@pytest.fixture
def own_admin(own_server: ValkeyServer) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(own_server.url) as client:
        yield client


def place_on(server: ValkeyServer, query: str = "") -> Place:
    name = f"bot-{uuid.uuid4().hex[:12]}"
    return Place(url=server.url + query, bot_name=name, shard=0, shards=1, lease_s=1.0)


def key_of(place: Place, name: str) -> str:
    """The Redis key of the place's owner, records or sessions."""
    return f"fsm_ray:{{{place.bot_name}/{place.shard}}}:{name}"


class TestRedisStore(SharedStoreConformance, StoreConformance):
    @pytest.fixture
    def make_store(self) -> MakeStore:
        return RedisStore

    @pytest.fixture
    def url(self, server: ValkeyServer) -> str:
        return server.url


# Commits


async def test_a_batch_of_20000_records_is_kept_and_cleared(place: Place) -> None:
    blob = make_blob("flow", "state", padding_bytes=50)
    many = [b"%d" % number for number in range(20_000)]

    await commit_all(RedisStore(place), [Batch(1, dict.fromkeys(many, blob), {})])
    assert await contents_of(RedisStore(place)) == kept_of([Batch(1, dict.fromkeys(many, blob), {})])

    await commit_all(RedisStore(place), [Batch(2, dict.fromkeys(many), {})])
    assert await contents_of(RedisStore(place)) == kept_of([], version=2)


async def test_a_commit_whose_script_the_server_forgot_is_kept(place: Place, admin: redis.Redis) -> None:
    async with opened(RedisStore(place)) as (store, _):
        await store.commit(numbered_batch(1))
        admin.script_flush()

        await store.commit(numbered_batch(2))

    assert await contents_of(RedisStore(place)) == kept_of([numbered_batch(1), numbered_batch(2)])


@pytest.mark.parametrize("name", ["records", "sessions"])
async def test_a_commit_onto_a_key_of_another_type_changes_nothing(
    place: Place, admin: redis.Redis, name: str
) -> None:
    async with opened(RedisStore(place)) as (store, _):
        admin.set(key_of(place, name), b"foreign")

        with pytest.raises(StoreUnavailable, match="WRONGTYPE"):
            await store.commit(numbered_batch(1))

    assert admin.hget(key_of(place, "owner"), "version") == b"0"
    assert [key for key in admin.keys(f"*{place.bot_name}*") if b"owner" not in key] == [
        key_of(place, name).encode()
    ]


async def test_an_owner_whose_keys_were_removed_can_do_nothing(place: Place, admin: redis.Redis) -> None:
    async with opened(RedisStore(place)) as (store, _):
        await store.commit(numbered_batch(1))
        admin.delete(*(key_of(place, name) for name in ("owner", "records", "sessions")))

        with pytest.raises(NotOwner):
            await store.confirm()
        with pytest.raises(NotOwner):
            await store.commit(numbered_batch(2))

    assert admin.keys(f"*{place.bot_name}*") == []


# Connections


async def test_a_lost_connection_is_never_made_again_without_a_word(place: Place, admin: redis.Redis) -> None:
    async with opened(RedisStore(place)) as (store, _):
        await store.commit(numbered_batch(1))
        drop_clients(admin)

        for _ in range(2):
            with pytest.raises(StoreUnavailable):
                await store.commit(numbered_batch(2))
        with pytest.raises(StoreUnavailable):
            await store.confirm()

        assert (await store.open()).records == kept_of([numbered_batch(1)]).records
        await store.commit(numbered_batch(2))


async def test_who_opens_a_store_again_after_a_failure_and_was_not_the_last_is_not_its_owner(
    place: Place, admin: redis.Redis
) -> None:
    async with opened(RedisStore(place)) as (store, _):
        drop_clients(admin)
        with pytest.raises(StoreUnavailable):
            await store.commit(numbered_batch(1))
        async with opened(RedisStore(place, sleep=no_sleep)) as (other, _):
            with pytest.raises(NotOwner):
                await store.open()

            await other.commit(numbered_batch(1, "other"))

    assert await contents_of(RedisStore(place)) == kept_of([numbered_batch(1, "other")])


async def test_no_connection_is_left(own_server: ValkeyServer, own_admin: redis.Redis) -> None:
    place = place_on(own_server)
    async with opened(RedisStore(place)) as (store, _):
        await asyncio.gather(store.commit(numbered_batch(1)), store.confirm(), store.confirm())
        with pytest.raises(StoreMismatch):
            await RedisStore(replace(place, shards=2)).open()
        await store.open()
        await until(lambda: len(own_admin.client_list()) == 2)  # the store's, and this one

    await until(lambda: len(own_admin.client_list()) == 1)


def test_a_connection_that_was_reset_while_idle_is_lost_also_for_uvloop() -> None:
    async def answer_once_then_reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while b"HGET" not in (received := await reader.read(1000)):
            writer.write(b"+OK\r\n" * received.count(b"SETINFO"))
        connection = writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.write(b"$-1\r\n")
        await writer.drain()
        writer.transport.abort()

    async def ask_twice() -> None:
        async with await asyncio.start_server(answer_once_then_reset, "127.0.0.1", 0) as fake:
            port = fake.sockets[0].getsockname()[1]
            async with _Connection(f"redis://127.0.0.1:{port}", timeout_s=5.0) as connection:
                assert await connection.ask(b"HGET", b"key", b"field") is None
                writer = connection._connection._writer
                assert writer is not None
                await until(writer.is_closing)

                with pytest.raises(redis.ConnectionError):
                    await connection.ask(b"HGET", b"key", b"field")

    uvloop.run(asyncio.wait_for(ask_twice(), 10))


async def test_the_urls_database_is_used(server: ValkeyServer, admin: redis.Redis) -> None:
    place = place_on(server, "?db=3")

    await commit_all(RedisStore(place), [numbered_batch(1)])

    assert not admin.exists(key_of(place, "records"))
    with redis.Redis.from_url(place.url) as client:
        assert client.exists(key_of(place, "records"))


# A server that is killed, stopped or full


@pytest.mark.slow
async def test_a_server_killed_in_a_commit_keeps_what_it_acknowledged_and_no_half(
    own_server: ValkeyServer,
) -> None:
    batches: list[Batch] = []
    store = RedisStore(place_on(own_server))
    for round_number in range(5):
        await store.open()
        for _ in range(3):
            batches.append(numbered_batch(len(batches) + 1))
            await store.commit(batches[-1])
        begun = numbered_batch(len(batches) + 1)
        commit = store.commit(begun)
        for _ in range(round_number):
            await asyncio.sleep(0)
        own_server.kill()
        (error,) = await asyncio.gather(commit, return_exceptions=True)
        own_server.start()

        contents = await contents_of(store)

        assert error is None or isinstance(error, StoreUnavailable)
        if error is None or contents.version == begun.version:
            batches.append(begun)
        assert contents == kept_of(batches)


@pytest.mark.slow
async def test_a_server_that_answers_nothing_is_unavailable_within_the_lease(
    own_server: ValkeyServer,
) -> None:
    store = RedisStore(place_on(own_server, "?socket_timeout=100&retry_on_timeout=yes"))
    await store.open()
    await store.commit(numbered_batch(1))
    own_server.pause()
    started_s = time.monotonic()

    with pytest.raises(StoreUnavailable):
        await store.commit(numbered_batch(2))
    taken_s = time.monotonic() - started_s
    with pytest.raises(StoreUnavailable):
        await store.open()

    assert 0.9 < taken_s < 3.0
    own_server.resume()
    # What the server had not read yet comes before or after this, and so is kept or refused.
    found = await store.open()
    assert found.version in {1, 2}
    batches = [numbered_batch(number) for number in range(1, found.version + 1)]
    await store.commit(numbered_batch(3))
    await store.close()
    assert await contents_of(store) == kept_of([*batches, numbered_batch(3)])


@pytest.mark.parametrize(
    ("refuse", "accept", "error"),
    [
        ("CONFIG SET maxmemory 1", "CONFIG SET maxmemory 0", "maxmemory"),
        ("CONFIG SET min-replicas-to-write 1", "CONFIG SET min-replicas-to-write 0", "NOREPLICAS"),
        ("REPLICAOF 127.0.0.1 1", "REPLICAOF no one", "replica"),
    ],
)
async def test_a_server_that_accepts_no_writes_is_unavailable_and_keeps_nothing_of_the_batch(
    place: Place, admin: redis.Redis, refuse: str, accept: str, error: str
) -> None:
    batches = [numbered_batch(1), Batch(2, {b"key": make_blob()}, {}), Batch(2, {b"last": None}, {})]
    async with opened(RedisStore(place)) as (store, _):
        await store.commit(batches[0])
        for refused in batches[1:]:
            admin.execute_command(*refuse.split())  # type: ignore[no-untyped-call]
            try:
                with pytest.raises(StoreUnavailable, match=error):
                    await store.commit(refused)
                with pytest.raises(StoreUnavailable, match=error):
                    await store.open()
            finally:
                admin.execute_command(*accept.split())  # type: ignore[no-untyped-call]

            await store.open()

    assert await contents_of(RedisStore(place)) == kept_of(batches[:1])


# What others wrote


@pytest.mark.parametrize("name", ["owner", "records", "sessions"])
@pytest.mark.parametrize("is_hash", [True, False])
async def test_what_fsm_ray_did_not_write_is_refused_and_left_alone(
    place: Place, admin: redis.Redis, name: str, *, is_hash: bool
) -> None:
    key = key_of(place, name)
    if is_hash:
        admin.hset(key, "field", "foreign")
    else:
        admin.set(key, "foreign")
    before = admin.dump(key)

    with pytest.raises(StoreMismatch, match=key):
        await RedisStore(place).open()

    assert admin.keys(f"*{place.bot_name}*") == [key.encode()]
    assert admin.dump(key) == before


@pytest.mark.parametrize("name", ["records", "sessions"])
async def test_a_key_of_another_type_beside_an_owner_is_refused(
    place: Place, admin: redis.Redis, name: str
) -> None:
    await commit_all(RedisStore(place), [])
    admin.set(key_of(place, name), "foreign")

    with pytest.raises(StoreMismatch, match=key_of(place, name)):
        await RedisStore(place).open()


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("owner", b"version", b"1x"),
        ("owner", b"version", b""),
        ("records", with_slot(b"key"), b""),
        ("records", with_slot(b"key"), make_blob()[:-1]),
        ("records", with_slot(b"key"), make_blob() + b"\x00"),
        ("records", with_slot(b"key"), make_blob(state="\xe9").replace("\xe9".encode(), b"\xe9\xe9")),
        ("records", with_slot(b"key"), b"\x91" * 10_000),
        ("records", b"\x00" + with_slot(b"key"), make_blob()),
        ("records", b"", make_blob()),
        ("sessions", b"session", b"foreign"),
        ("sessions", b"session", b""),
    ],
)
async def test_what_cannot_be_read_is_named(
    place: Place, admin: redis.Redis, name: str, field: bytes, value: bytes
) -> None:
    await commit_all(RedisStore(place), [numbered_batch(1)])
    admin.hset(key_of(place, name), field, value)

    with pytest.raises(StoreCorrupted) as caught:
        await RedisStore(place).open()

    assert key_of(place, name) in str(caught.value)
    assert repr(field) in str(caught.value)


@pytest.mark.parametrize("owner", [b"", b"foreign", b'{"epoch": 1}', b"\xff\xfe"])
async def test_an_owner_that_cannot_be_read_is_corruption(
    place: Place, admin: redis.Redis, owner: bytes
) -> None:
    await commit_all(RedisStore(place), [numbered_batch(1)])
    admin.hset(key_of(place, "owner"), "owner", owner)

    with pytest.raises(StoreCorrupted, match=place.bot_name):
        await RedisStore(place).open()

    assert admin.hget(key_of(place, "owner"), "owner") == owner


async def test_a_version_that_was_removed_is_corruption(place: Place, admin: redis.Redis) -> None:
    await commit_all(RedisStore(place), [numbered_batch(1)])
    admin.hdel(key_of(place, "owner"), "version")

    with pytest.raises(StoreCorrupted, match="version"):
        await RedisStore(place).open()


# How the server is set


@pytest.mark.parametrize("policy", ["allkeys-lru", "allkeys-random"])
async def test_a_server_that_may_evict_records_is_refused(
    place: Place, admin: redis.Redis, policy: str
) -> None:
    settings = {"maxmemory": "1gb", "maxmemory-policy": policy}
    with configured(admin, settings), pytest.raises(InvalidOptions, match="noeviction"):
        await RedisStore(place).open()

    assert admin.keys(f"*{place.bot_name}*") == []


@pytest.mark.parametrize(
    "settings",
    [
        {"maxmemory": "0", "maxmemory-policy": "allkeys-lru"},
        {"maxmemory": "1gb", "maxmemory-policy": "volatile-lru"},
        {"maxmemory": "1gb", "maxmemory-policy": "noeviction"},
    ],
)
async def test_a_server_that_evicts_no_records_is_accepted(
    place: Place, admin: redis.Redis, settings: dict[str, str]
) -> None:
    with configured(admin, settings):
        await commit_all(RedisStore(place), [numbered_batch(1)])

        assert await contents_of(RedisStore(place)) == kept_of([numbered_batch(1)])


@pytest.mark.parametrize(
    ("settings", "warned_of"),
    [
        ({"appendfsync": "always"}, None),
        ({"appendfsync": "everysec"}, "everysec"),
        ({"appendonly": "no"}, "off"),
    ],
)
async def test_a_server_that_acknowledges_what_is_not_on_its_disk_is_warned_of_once(
    place: Place,
    admin: redis.Redis,
    caplog: pytest.LogCaptureFixture,
    settings: dict[str, str],
    warned_of: str | None,
) -> None:
    with configured(admin, settings):
        async with opened(RedisStore(place)) as (store, _):
            await store.open()

    warnings = [each.message for each in caplog.records if each.levelno >= logging.WARNING]
    assert len(warnings) == (warned_of is not None)
    assert all(warned_of in each for each in warnings if warned_of)


async def test_a_user_who_may_not_ask_how_the_server_is_set_is_accepted(
    server: ValkeyServer, admin: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    admin.acl_setuser(
        "modest",
        enabled=True,
        passwords=[f"+{SECRET}"],
        keys=["fsm_ray:*"],
        categories=["+@all"],
        commands=["-info", "-config"],
    )
    place = place_on(server, f"?username=modest&password={SECRET}")

    await commit_all(RedisStore(place), [numbered_batch(1)])

    assert await contents_of(RedisStore(place)) == kept_of([numbered_batch(1)])
    assert "unknown" in caplog.text


# Users and passwords


async def test_a_user_who_may_not_run_scripts_is_refused(server: ValkeyServer, admin: redis.Redis) -> None:
    admin.acl_setuser(
        "mute",
        enabled=True,
        passwords=[f"+{SECRET}"],
        keys=["*"],
        categories=["+@all"],
        commands=["-evalsha"],
    )
    place = place_on(server, f"?username=mute&password={SECRET}")

    error = await error_of_open(place)

    assert isinstance(error, InvalidOptions)
    assert "evalsha" in str(error)


@pytest.mark.parametrize("query", ["", f"?password={SECRET}-not", f"?username=nobody&password={SECRET}-not"])
async def test_a_server_that_refuses_the_password_is_a_matter_of_options(
    own_server: ValkeyServer, own_admin: redis.Redis, query: str
) -> None:
    own_admin.config_set("requirepass", SECRET)

    assert isinstance(await error_of_open(place_on(own_server, query)), InvalidOptions)

    place = place_on(own_server, f"?password={SECRET}")
    await commit_all(RedisStore(place), [numbered_batch(1)])
    assert await contents_of(RedisStore(place)) == kept_of([numbered_batch(1)])


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        (f"redis://user:{SECRET}@127.0.0.1:1/0", StoreUnavailable),
        (f"rediss://user:{SECRET}@127.0.0.1:1/0", StoreUnavailable),
        (f"unix:///no/such/socket?password={SECRET}", StoreUnavailable),
        (f"redis://user:{SECRET}@127.0.0.1:port/0", InvalidOptions),
        (f"redis://user:{SECRET}@127.0.0.1/0?socket_timeout=long", InvalidOptions),
        (f"redis://user:{SECRET}@127.0.0.1/0?no_such_option=1", InvalidOptions),
    ],
)
async def test_a_server_that_is_not_there_or_no_url_is_reported_without_the_password(
    place: Place, url: str, kind: type[FsmRayError]
) -> None:
    assert isinstance(await error_of_open(replace(place, url=url)), kind)


async def error_of_open(place: Place) -> FsmRayError:
    """What opening the store raises; nothing that would be printed of it tells the password."""
    with pytest.raises(FsmRayError) as caught:
        await RedisStore(place).open()
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    assert caught.value.bot == place.bot_name
    return caught.value


async def no_sleep(_: float) -> None: ...


def drop_clients(admin: redis.Redis) -> None:
    """Close all connections to the server but this one."""
    admin.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")  # type: ignore[no-untyped-call]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


@contextmanager
def configured(admin: redis.Redis, settings: dict[str, str]) -> Iterator[None]:
    """The server with other settings."""
    usual = admin.config_get(*settings)
    for name, value in settings.items():
        admin.config_set(name, value)
    try:
        yield
    finally:
        for name in settings:
            admin.config_set(name, usual[name] or "")
