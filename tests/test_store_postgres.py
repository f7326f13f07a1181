"""The PostgreSQL store: the kit, and what its server, its schema and the people at it can do."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest
import uvloop
from psycopg import errors

from fsm_ray.bench.servers import PostgresServer
from fsm_ray.errors import (
    ConfigurationError,
    FsmRayError,
    NotOwner,
    StoreCorrupted,
    StoreMismatch,
    StoreUnavailable,
)
from fsm_ray.stores import postgres
from fsm_ray.stores.base import Batch, Contents, Place
from fsm_ray.stores.postgres import PostgresStore
from fsm_ray.testing import MakeStore, SharedStoreConformance, StoreConformance
from fsm_ray.testing.batches import kept_of, make_blob, numbered_batch
from fsm_ray.testing.stores import commit_all, contents_of, opened
from tests.conftest import eventually

DEADLINE_S = 60.0


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    # Not in pytest's tmp_path: where we are root, the server runs as another user, who may not look there.
    directory = Path(tempfile.mkdtemp(prefix="fsm-ray-"))
    directory.chmod(0o711)
    try:
        with PostgresServer(directory) as server:
            yield server
            # Nothing of it is needed any more, so it need not write all that to its disk.
            server.kill()
    finally:
        shutil.rmtree(directory)


@pytest.fixture
def url(server: PostgresServer) -> str:
    """The database that tests share which leave the schema alone."""
    return server.url


@pytest.fixture
def new_url(server: PostgresServer) -> str:
    """A database that nobody used."""
    return make_database(server)


@pytest.fixture
def place(url: str) -> Place:
    return make_place(url)


class TestPostgresStore(SharedStoreConformance, StoreConformance):
    @pytest.fixture
    def make_store(self) -> MakeStore:
        return PostgresStore

    @pytest.fixture
    def url(self, server: PostgresServer) -> str:
        return server.url


def make_place(url: str) -> Place:
    return Place(url=url, bot_name=f"bot-{uuid.uuid4().hex[:12]}", shard=0, shards=1, lease_s=0.2)


def make_database(server: PostgresServer, options: str = "") -> str:
    name = f"new-{uuid.uuid4().hex[:12]}"
    execute(server.url, f'CREATE DATABASE "{name}" {options}')
    return in_database(server.url, name)


def in_database(url: str, name: str) -> str:
    return url.replace("/postgres?", f"/{name}?")


def as_user(url: str, user: str) -> str:
    return url.replace("//postgres@", f"//{user}@")


def execute(url: str, statement: str, parameters: Any = None) -> list[tuple[Any, ...]]:
    """What a user does at the database, with whatever client."""
    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(statement.encode(), parameters)
        return [] if cursor.description is None else cursor.fetchall()


def make_impatient(place: Place) -> PostgresStore:
    """A store that waits for its server no longer than half a second."""
    store = PostgresStore(place)
    store.timeout_s = 0.5
    return store


async def refusal_of(store: PostgresStore, kind: type[FsmRayError]) -> str:
    """What the error says that the store raises when it is opened."""
    with pytest.raises(kind) as caught:
        await asyncio.wait_for(store.open(), DEADLINE_S)
    await store.close()
    assert type(caught.value) is kind
    assert caught.value.bot == store.place.bot_name
    return str(caught.value)


# What people see


async def test_people_can_count_a_bots_conversations_by_state(place: Place) -> None:
    records = {b"%d" % number: make_blob("registration", f"step {number % 3}") for number in range(30)}
    records[b"without"] = make_blob()
    await commit_all(PostgresStore(place), [Batch(version=1, records=records, sessions={})])

    counts = execute(
        place.url,
        "SELECT state, count(*) FROM fsm_ray.records WHERE bot = %s GROUP BY state ORDER BY state",
        [place.bot_name],
    )

    assert counts == [("step 0", 10), ("step 1", 10), ("step 2", 10), (None, 1)]


async def test_flow_state_and_version_are_beside_the_blob_and_follow_it(place: Place) -> None:
    query = "SELECT flow, state, version, expires_at, blob FROM fsm_ray.records WHERE bot = %s AND key = %s"
    store = PostgresStore(place)
    for flow, state, version in (("f", "s", 2**40), ("g", None, 2**40 + 1), (None, "день 🌞", 2**40 + 2)):
        blob = make_blob(flow, state, version)

        await commit_all(store, [Batch(version=version, records={b"key": blob}, sessions={})])

        [row] = execute(place.url, query, [place.bot_name, b"key"])
        assert row == (flow, state, version, None, blob)


async def test_text_that_no_column_can_hold_is_shown_otherwise_and_kept_in_the_blob(place: Place) -> None:
    blob = make_blob("\x00", "a\x00b")

    await commit_all(PostgresStore(place), [Batch(version=1, records={b"key": blob}, sessions={})])

    query = "SELECT flow, state FROM fsm_ray.records WHERE bot = %s"
    assert execute(place.url, query, [place.bot_name]) == [("␀", "a␀b")]
    assert (await contents_of(PostgresStore(place))).records == {b"key": blob}


async def test_people_can_see_who_owns_a_shard_and_who_is_connected(place: Place) -> None:
    async with opened(PostgresStore(place)):
        owner = execute(
            place.url,
            "SELECT epoch, owner ->> 'bot_name', owner ->> 'process' > '' FROM fsm_ray.owners WHERE bot = %s",
            [place.bot_name],
        )
        names = execute(place.url, "SELECT application_name FROM pg_stat_activity")

    assert owner == [(1, place.bot_name, True)]
    assert (f"fsm_ray {place.bot_name} 0",) in names


async def test_who_edits_the_owner_by_hand_takes_the_store_from_it(place: Place) -> None:
    async with opened(PostgresStore(place)) as (store, _):
        execute(
            place.url,
            "UPDATE fsm_ray.owners SET owner = jsonb_set(owner, '{epoch}', '7') WHERE bot = %s",
            [place.bot_name],
        )

        with pytest.raises(NotOwner):
            await store.commit(numbered_batch(1))
    async with opened(PostgresStore(place)) as (_, contents):
        assert contents == Contents(version=0)


# Owners


def test_a_takeover_amid_commits_finds_all_that_was_acknowledged_and_ends_them(place: Place) -> None:
    """The owner and who takes over are threads with loops of their own, as two actors are."""
    acknowledged, has_begun = 0, threading.Event()

    async def commit_until_refused() -> None:
        nonlocal acknowledged
        store = PostgresStore(place)
        await store.open()
        try:
            for number in range(1, 1 << 30):
                await store.commit(numbered_batch(number))
                acknowledged = number
                if number == 5:
                    has_begun.set()
        except NotOwner:
            pass
        finally:
            await store.close()

    async def no_sleep(duration_s: float) -> None:
        """This takes the records while the old owner still works."""

    async def take_over() -> None:
        async with opened(PostgresStore(place, sleep=no_sleep)) as (owner, found):
            assert found == kept_of(map(numbered_batch, range(1, found.version + 1)))
            await asyncio.to_thread(old.join, DEADLINE_S)
            assert not old.is_alive()
            # One more may be kept: its answer was on its way when its owner was told.
            assert found.version - 1 <= acknowledged <= found.version
            await owner.commit(numbered_batch(found.version + 1))
        assert await contents_of(PostgresStore(place)) == kept_of(
            map(numbered_batch, range(1, found.version + 2))
        )

    old = threading.Thread(target=run, args=[commit_until_refused], daemon=True)
    old.start()
    assert has_begun.wait(DEADLINE_S)
    run(take_over)


def run(main: Callable[[], Any]) -> None:
    """As Ray's asyncio actors do: on uvloop."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


async def test_a_takeover_waits_for_a_commit_that_has_the_owners_row(place: Place) -> None:
    async with opened(PostgresStore(place)) as (stale, _):
        async with await psycopg.AsyncConnection.connect(place.url) as commit:
            # Of a commit that ends when this test wants it to.
            await commit.execute("UPDATE fsm_ray.owners SET version = 42 WHERE bot = %s", [place.bot_name])
            new = PostgresStore(place)
            opening = asyncio.create_task(new.open())
            await asyncio.to_thread(eventually, partial(is_waiting_for_a_lock, place), "it waits")
            assert not opening.done()

        assert (await opening).version == 42
        with pytest.raises(NotOwner):
            await stale.commit(numbered_batch(1))
        await new.close()


async def test_a_commit_that_waited_for_a_takeover_keeps_nothing(place: Place) -> None:
    async with opened(PostgresStore(place)) as (stale, _):
        async with await psycopg.AsyncConnection.connect(place.url) as takeover:
            await takeover.execute(
                "UPDATE fsm_ray.owners SET owner = jsonb_set(owner, '{epoch}', '2') WHERE bot = %s",
                [place.bot_name],
            )
            commit = stale.commit(numbered_batch(1))
            await asyncio.to_thread(eventually, partial(is_waiting_for_a_lock, place), "it waits")

        with pytest.raises(NotOwner):
            await commit
    assert await contents_of(PostgresStore(place)) == Contents(version=0)


def is_waiting_for_a_lock(place: Place) -> bool:
    return bool(
        execute(
            place.url,
            "SELECT FROM pg_stat_activity WHERE application_name = %s AND wait_event_type = 'Lock'",
            [f"fsm_ray {place.bot_name} 0"],
        )
    )


# Batches


async def test_a_batch_of_20_000_records_is_kept_replaced_and_cleared(place: Place) -> None:
    keys = [b"%d" % number for number in range(20_000)]
    store = PostgresStore(place)
    for version, blob in enumerate((make_blob("f", "s", 1), make_blob("f", "t", 2)), 1):
        records = dict.fromkeys(keys, blob)

        await commit_all(store, [Batch(version=version, records=records, sessions={})])

        assert await contents_of(store) == Contents(version, records)

    await commit_all(store, [Batch(version=3, records=dict.fromkeys(keys), sessions={})])

    assert await contents_of(store) == Contents(version=3)


# A server in trouble


async def test_a_closed_store_is_unavailable(place: Place) -> None:
    store = PostgresStore(place)
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match="closed"):
            await store.commit(numbered_batch(1))
        with pytest.raises(StoreUnavailable, match="closed"):
            await store.confirm()
        await store.close()
        await contents_of(store)


async def test_a_lost_connection_is_an_error_and_the_same_object_opens_the_store_again(place: Place) -> None:
    async with opened(PostgresStore(place)) as (store, _):
        await store.commit(numbered_batch(1))
        end_connections_of(place)

        with pytest.raises(StoreUnavailable):
            await store.commit(numbered_batch(2))
        with pytest.raises(StoreUnavailable):
            await store.confirm()
        assert (await store.open()).version == 1
        await store.commit(numbered_batch(2))

    assert await contents_of(PostgresStore(place)) == kept_of([numbered_batch(1), numbered_batch(2)])


def end_connections_of(place: Place) -> None:
    execute(
        place.url,
        "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE application_name = %s",
        [f"fsm_ray {place.bot_name} 0"],
    )


@pytest.mark.slow
async def test_a_server_killed_under_load_keeps_all_that_was_acknowledged(
    server: PostgresServer, place: Place
) -> None:
    acknowledged: list[int] = [0]
    for _ in range(2):
        store = PostgresStore(place)
        start = (await store.open()).version
        writing = asyncio.create_task(commit_on(store, start, acknowledged))
        await asyncio.to_thread(eventually, partial(has_passed, acknowledged, start + 50), "50 commits")
        server.kill()
        with pytest.raises(StoreUnavailable):
            await asyncio.wait_for(writing, DEADLINE_S)
        await store.close()
        with pytest.raises(StoreUnavailable):
            await store.open()
        server.start()

        contents = await contents_of(PostgresStore(place))

        assert acknowledged[-1] <= contents.version <= acknowledged[-1] + 1
        assert contents == kept_of(map(numbered_batch, range(1, contents.version + 1)))


def has_passed(acknowledged: list[int], version: int) -> bool:
    return acknowledged[-1] > version


async def commit_on(store: PostgresStore, version: int, acknowledged: list[int]) -> None:
    """Commit one numbered batch after the other, and note those that were kept."""
    while True:
        version += 1
        await store.commit(numbered_batch(version))
        acknowledged.append(version)


@contextlib.contextmanager
def paused(server: PostgresServer) -> Iterator[None]:
    server.pause()
    try:
        yield
    finally:
        server.resume()


@pytest.mark.slow
async def test_a_server_that_hangs_is_unavailable_in_bounded_time(
    server: PostgresServer, place: Place
) -> None:
    store = make_impatient(place)
    await store.open()
    with paused(server):
        start_s = time.monotonic()
        commit = store.commit(numbered_batch(1))
        with pytest.raises(StoreUnavailable, match=r"did not answer within 0\.5 s"):
            await store.confirm()
        with pytest.raises(StoreUnavailable, match=r"did not answer within 0\.5 s"):
            await commit
        with pytest.raises(StoreUnavailable, match=r"did not answer within 0\.5 s"):
            await store.open()
        await store.close()
        taken_s = time.monotonic() - start_s

    assert taken_s < 5
    async with opened(store) as (_, contents):
        assert contents in (Contents(version=0), kept_of([numbered_batch(1)]))


@pytest.mark.slow
async def test_a_store_can_be_closed_while_its_server_hangs_in_a_commit(
    server: PostgresServer, place: Place
) -> None:
    store = make_impatient(place)
    await store.open()
    with paused(server):
        commit = store.commit(numbered_batch(1))
        await asyncio.sleep(0)  # the commit begins
        await asyncio.wait_for(store.close(), 5)

        with pytest.raises(StoreUnavailable):
            await commit


@pytest.mark.slow
async def test_whoever_waits_behind_a_statement_that_is_given_up_is_told_the_same(
    server: PostgresServer, place: Place
) -> None:
    store = make_impatient(place)
    await store.open()
    with paused(server):
        commit = store.commit(numbered_batch(1))
        await asyncio.sleep(0)  # the commit begins
        store.timeout_s = DEADLINE_S
        with pytest.raises(StoreUnavailable, match=r"did not answer within 0\.5 s"):
            await store.confirm()
        with pytest.raises(StoreUnavailable, match=r"did not answer within 0\.5 s"):
            await commit
        await store.close()


@pytest.mark.slow
async def test_confirm_can_be_given_up_while_the_server_hangs(server: PostgresServer, place: Place) -> None:
    store = make_impatient(place)
    await store.open()
    start_s = time.monotonic()
    with paused(server):
        with pytest.raises((TimeoutError, StoreUnavailable)):
            async with asyncio.timeout(0.1):
                await store.confirm()
        await store.close()

    assert time.monotonic() - start_s < 5


async def test_a_lease_longer_than_the_shortest_timeout_is_the_timeout(place: Place) -> None:
    assert PostgresStore(replace(place, lease_s=7.0)).timeout_s == 7.0
    assert PostgresStore(replace(place, lease_s=0.2)).timeout_s == 5.0


# Settings


async def test_commits_are_synchronous_also_where_the_database_says_otherwise(new_url: str) -> None:
    for setting, expected in (("off", "on"), ("local", "local")):
        execute(new_url, f"ALTER ROLE postgres SET synchronous_commit = {setting}")
        try:
            async with opened(PostgresStore(make_place(new_url))) as (store, _):
                assert isinstance(store, PostgresStore)
                assert await store._execute("SHOW synchronous_commit") == [(expected,)]
        finally:
            execute(new_url, "ALTER ROLE postgres RESET synchronous_commit")


async def test_a_server_that_does_not_sync_is_named_in_the_log(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        await contents_of(PostgresStore(place))
        assert not caplog.records

        with server_setting(place.url, "fsync", "off"):
            await contents_of(PostgresStore(place))

    assert "fsync=off" in caplog.text


@contextlib.contextmanager
def server_setting(url: str, name: str, value: str) -> Iterator[None]:
    def is_set() -> bool:
        return execute(url, f"SHOW {name}") == [(value,)]

    execute(url, f"ALTER SYSTEM SET {name} = {value}")
    try:
        execute(url, "SELECT pg_reload_conf()")
        eventually(is_set, f"{name} is {value}")
        yield
    finally:
        execute(url, f"ALTER SYSTEM RESET {name}")
        execute(url, "SELECT pg_reload_conf()")
        eventually(lambda: not is_set(), f"{name} is what it was")


async def test_a_database_that_cannot_hold_all_text_is_refused(server: PostgresServer) -> None:
    url = make_database(server, "ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")

    assert "ENCODING 'UTF8'" in await refusal_of(PostgresStore(make_place(url)), ConfigurationError)


async def test_a_read_only_server_is_unavailable_and_said_to_be_a_replica(new_url: str) -> None:
    place = make_place(new_url)
    await contents_of(PostgresStore(place))
    database = new_url.partition("@/")[2].partition("?")[0]
    execute(new_url, f'ALTER DATABASE "{database}" SET default_transaction_read_only = on')

    assert "replica" in await refusal_of(PostgresStore(place), StoreUnavailable)


# URLs


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://user:se%zzcret@host/db",
        "postgresql://user:zzcret@[host/db",
        "postgresql://host/db?zzcret=1",
        "postgresql://user:zz/cret@host/db",
        "postgresql://user:se@zzcret@host/db",
    ],
)
async def test_a_url_that_means_something_else_is_refused_and_no_part_of_its_password_shown(url: str) -> None:
    with pytest.raises(ConfigurationError, match="%XX") as caught:
        await PostgresStore(make_place(url)).open()

    shown = "".join(traceback.format_exception(caught.value))
    assert "zz" not in shown
    assert "cret" not in shown


async def test_a_server_that_is_not_there_is_unavailable() -> None:
    place = make_place("postgresql://user:zzcret@/db?host=/nowhere")

    said = await refusal_of(PostgresStore(place), StoreUnavailable)

    assert "/nowhere" in said
    assert "zzcret" not in said


async def test_a_missing_database_is_named(url: str) -> None:
    place = make_place(in_database(url, "nowhere"))

    assert '"nowhere" does not exist' in await refusal_of(PostgresStore(place), StoreUnavailable)


async def test_a_wrong_password_is_said_and_not_shown(server: PostgresServer, url: str) -> None:
    rules = server.socket_path.parent / "pg_hba.conf"
    before = rules.read_text()
    execute(url, "CREATE ROLE careful LOGIN PASSWORD 'right'")
    try:
        rules.write_text(f"local all careful scram-sha-256\n{before}")
        execute(url, "SELECT pg_reload_conf()")
        eventually(lambda: not can_connect(as_user(url, "careful:wrong")), "passwords are asked for")

        said = await refusal_of(PostgresStore(make_place(as_user(url, "careful:zzcret"))), StoreUnavailable)
    finally:
        rules.write_text(before)
        execute(url, "SELECT pg_reload_conf()")

    assert 'password authentication failed for user "careful"' in said
    assert "zzcret" not in said


def can_connect(url: str) -> bool:
    try:
        psycopg.connect(url).close()
    except psycopg.OperationalError:
        return False
    return True


# The schema


async def test_the_schema_is_made_once_by_eight_stores_that_open_at_once(new_url: str) -> None:
    stores = [PostgresStore(replace(make_place(new_url), shard=shard, shards=8)) for shard in range(8)]
    try:
        found = await asyncio.gather(*(store.open() for store in stores))
    finally:
        for store in stores:
            await store.close()

    assert [contents.version for contents in found] == [0] * 8
    versions = execute(new_url, "SELECT version FROM fsm_ray.migrations ORDER BY version")
    assert versions == [(number,) for number in range(1, len(postgres.MIGRATIONS) + 1)]


async def test_an_older_schema_is_brought_to_the_newest_version_and_keeps_its_rows(
    new_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = make_place(new_url)
    await commit_all(PostgresStore(place), [numbered_batch(1)])
    later = "ALTER TABLE fsm_ray.records ADD COLUMN later int; UPDATE fsm_ray.records SET later = 5"
    monkeypatch.setattr(postgres, "MIGRATIONS", (*postgres.MIGRATIONS, later))

    assert await contents_of(PostgresStore(place)) == kept_of([numbered_batch(1)])

    assert execute(new_url, "SELECT DISTINCT later FROM fsm_ray.records") == [(5,)]


async def test_a_migration_that_fails_changes_nothing(new_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place = make_place(new_url)
    await commit_all(PostgresStore(place), [numbered_batch(1)])
    with monkeypatch.context() as patched:
        broken = ("DROP TABLE fsm_ray.sessions", "SELECT 1 / 0")
        patched.setattr(postgres, "MIGRATIONS", (*postgres.MIGRATIONS, *broken))
        assert "division by zero" in await refusal_of(PostgresStore(place), StoreUnavailable)

    assert await contents_of(PostgresStore(place)) == kept_of([numbered_batch(1)])


async def test_a_newer_schema_is_refused(new_url: str) -> None:
    place = make_place(new_url)
    await commit_all(PostgresStore(place), [numbered_batch(1)])
    execute(new_url, "INSERT INTO fsm_ray.migrations VALUES (99)")

    assert "99" in await refusal_of(PostgresStore(place), StoreMismatch)

    execute(new_url, "DELETE FROM fsm_ray.migrations WHERE version = 99")
    assert await contents_of(PostgresStore(place)) == kept_of([numbered_batch(1)])


async def test_a_schema_of_somebody_else_is_refused_and_left_alone(new_url: str) -> None:
    execute(new_url, "CREATE SCHEMA fsm_ray CREATE TABLE records (theirs int)")

    assert "did not make" in await refusal_of(PostgresStore(make_place(new_url)), StoreMismatch)
    assert execute(new_url, "SELECT * FROM fsm_ray.records") == []


async def test_a_schema_that_lost_a_table_is_refused(new_url: str) -> None:
    place = make_place(new_url)
    async with opened(PostgresStore(place)) as (store, _):
        execute(new_url, "DROP TABLE fsm_ray.sessions")

        with pytest.raises(StoreMismatch, match=r"fsm_ray\.sessions"):
            await store.commit(numbered_batch(1))
    assert "fsm_ray.sessions" in await refusal_of(PostgresStore(place), StoreMismatch)


@pytest.fixture
def user(url: str) -> str:
    """The name of a user without rights."""
    name = f"user_{uuid.uuid4().hex[:12]}"
    execute(url, f"CREATE ROLE {name} LOGIN")
    return name


async def test_the_grant_that_a_user_needs_is_named_and_enough(new_url: str, user: str) -> None:
    place = make_place(as_user(new_url, user))
    database = new_url.partition("@/")[2].partition("?")[0]

    said = await refusal_of(PostgresStore(place), ConfigurationError)

    grant = f'GRANT CREATE ON DATABASE "{database}" TO "{user}"'
    assert grant in said
    execute(new_url, grant)
    await commit_all(PostgresStore(place), [numbered_batch(1)])


async def test_the_grants_for_a_schema_that_is_there_are_named_and_enough(new_url: str, user: str) -> None:
    await contents_of(PostgresStore(make_place(new_url)))
    place = make_place(as_user(new_url, user))

    said = await refusal_of(PostgresStore(place), ConfigurationError)

    for grant in said.partition("where the schema is there, ")[2].split("; "):
        assert grant.startswith("GRANT")
        execute(new_url, grant)
    await commit_all(PostgresStore(place), [numbered_batch(1)])


async def test_a_schema_that_an_administrator_made_for_the_user_is_enough(new_url: str, user: str) -> None:
    execute(new_url, f"CREATE SCHEMA fsm_ray AUTHORIZATION {user}")

    await commit_all(PostgresStore(make_place(as_user(new_url, user))), [numbered_batch(1)])


# Damage


@pytest.mark.parametrize(
    "damaged", [b"", b"\xff", b"\x93\xc0\xc0", b"\x93\xc0\xa1\xff\x92\x80\x01", b"\x91" * 10_000]
)
async def test_a_blob_that_is_no_record_is_refused_and_its_row_named(place: Place, damaged: bytes) -> None:
    records = {b"%d" % number: make_blob() for number in range(100)}
    await commit_all(PostgresStore(place), [Batch(version=1, records=records, sessions={})])
    execute(
        place.url,
        "UPDATE fsm_ray.records SET blob = %s WHERE bot = %s AND key = %s",
        [damaged, place.bot_name, b"42"],
    )

    said = await refusal_of(PostgresStore(place), StoreCorrupted)

    assert "fsm_ray.records" in said
    where = said.partition("where ")[2].partition(" is no record")[0]
    assert execute(place.url, f"SELECT key FROM fsm_ray.records WHERE {where}") == [(b"42",)]


@pytest.mark.parametrize("damaged", ["{}", "[]", '{"epoch": 5}'])
async def test_an_owner_that_cannot_be_read_is_refused(place: Place, damaged: str) -> None:
    await commit_all(PostgresStore(place), [numbered_batch(1)])
    execute(place.url, "UPDATE fsm_ray.owners SET owner = %s WHERE bot = %s", [damaged, place.bot_name])

    assert damaged in await refusal_of(PostgresStore(place), StoreCorrupted)


async def test_records_without_an_owner_are_refused(place: Place) -> None:
    await commit_all(PostgresStore(place), [numbered_batch(1)])
    execute(place.url, "DELETE FROM fsm_ray.owners WHERE bot = %s", [place.bot_name])

    assert "fsm_ray.owners" in await refusal_of(PostgresStore(place), StoreMismatch)


@pytest.mark.parametrize(
    ("theirs", "ours", "advice"),
    [
        (errors.DiskFull, StoreUnavailable, "make room"),
        (errors.DataCorrupted, StoreCorrupted, "backup"),
        (errors.IndexCorrupted, StoreCorrupted, "REINDEX"),
        (errors.TooManyConnections, StoreUnavailable, "see to the server"),
    ],
)
def test_what_only_a_server_in_ruins_says_is_translated(
    place: Place, theirs: type[psycopg.Error], ours: type[FsmRayError], advice: str
) -> None:
    error = PostgresStore(place)._translated(theirs("what it\nsaid"))

    assert type(error) is ours
    assert "what it said" in str(error)
    assert advice in str(error)
