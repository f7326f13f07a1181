"""The object storage store: the kit, and what a damaged, foreign, silent or missing object store does."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from email.utils import formatdate
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from slatedb import uniffi as slatedb  # type: ignore[import-untyped]

from fsm_ray.errors import StoreCorrupted, StoreMismatch, StoreUnavailable
from fsm_ray.stores import objectstore
from fsm_ray.stores.base import Batch, Place
from fsm_ray.stores.objectstore import ObjectStore
from fsm_ray.testing import MakeStore, SharedStoreConformance, StoreConformance
from fsm_ray.testing.batches import kept_of, make_blob, numbered_batch
from fsm_ray.testing.stores import commit_all, contents_of, opened


class TestObjectStore(SharedStoreConformance, StoreConformance):
    @pytest.fixture
    def make_store(self) -> MakeStore:
        return ObjectStore

    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"file://{tmp_path}"


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(url=f"file://{tmp_path}", bot_name="bot", shard=0, shards=1, lease_s=1.0)


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """Where the store at `place` keeps its objects."""
    return tmp_path / "bot" / "0"


# What is not a database of this shard


async def test_a_directory_that_is_not_there_is_not_made(place: Place, tmp_path: Path) -> None:
    missing = tmp_path / "not mounted"

    with pytest.raises(StoreUnavailable, match="not mounted"):
        await ObjectStore(replace(place, url=f"file://{missing}")).open()

    assert not missing.exists()


async def test_a_foreign_database_is_refused_and_its_writer_goes_on(place: Place, tmp_path: Path) -> None:
    foreign = await open_foreign(tmp_path, "bot/0")
    await foreign.put(b"key", b"value")
    await foreign.flush()

    with pytest.raises(StoreMismatch, match="bot/0 holds a SlateDB that"):
        await ObjectStore(place).open()

    await foreign.put(b"key", b"another")
    await foreign.flush()
    await foreign.shutdown()


async def test_a_bot_with_other_options_is_refused_and_the_owner_goes_on(place: Place) -> None:
    async with opened(ObjectStore(place)) as (owner, _):
        with pytest.raises(StoreMismatch, match="shard 0 of 1"):
            await ObjectStore(replace(place, shards=2)).open()

        await owner.commit(numbered_batch(1))


async def test_files_of_others_are_refused(place: Place, database: Path) -> None:
    notes = database / "notes"
    notes.parent.mkdir(parents=True)
    notes.write_text("ours")

    with pytest.raises(StoreMismatch, match="bot/0 holds objects, but no SlateDB"):
        await ObjectStore(place).open()

    assert await asyncio.to_thread(os.listdir, database) == ["notes"]


# Damage


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["wal", "compacted"])
async def test_a_flipped_byte_is_found(place: Place, database: Path, folder: str) -> None:
    batches = [numbered_batch(number) for number in (1, 2, 3)]
    if folder == "wal":
        await open_and_forget(place, batches)
    else:
        await commit_all(ObjectStore(place), batches)
    whole = shutil.copytree(database, database.with_name("whole"))
    damaged = max((database / folder).glob("*.sst"), key=lambda path: path.stat().st_size)
    content = damaged.read_bytes()

    for at in range(0, len(content), len(content) // 20):
        shutil.rmtree(database)
        shutil.copytree(whole, database)
        damaged.write_bytes(content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :])
        try:
            # Some bytes of a table are never read, for the manifest repeats them.
            assert await contents_of(ObjectStore(place)) == kept_of(batches)
            assert folder == "compacted"
        except StoreCorrupted as error:
            assert "bot/0" in str(error)  # noqa: PT017


async def test_a_missing_object_of_the_log_is_found(place: Place, database: Path) -> None:
    await open_and_forget(place, [numbered_batch(number) for number in (1, 2, 3)])
    log = sorted((database / "wal").glob("*.sst"))
    log[-2].unlink()

    with pytest.raises(StoreCorrupted, match=str(int(log[-2].stem))):
        await ObjectStore(place).open()


async def test_a_missing_table_is_found(place: Place, database: Path) -> None:
    await commit_all(ObjectStore(place), [numbered_batch(1)])
    for table in (database / "compacted").glob("*.sst"):
        table.unlink()

    with pytest.raises(StoreCorrupted, match="bot/0"):
        await ObjectStore(place).open()


async def test_a_database_without_its_manifests_does_not_pass_for_a_new_one(
    place: Place, database: Path
) -> None:
    await commit_all(ObjectStore(place), [numbered_batch(1)])
    shutil.rmtree(database / "manifest")

    for _ in range(2):
        with pytest.raises(StoreMismatch, match="lost its manifests"):
            await ObjectStore(place).open()


async def test_a_session_that_cannot_be_read_is_refused(place: Place, tmp_path: Path) -> None:
    await commit_all(ObjectStore(place), [numbered_batch(1)])
    database = await open_foreign(tmp_path, "bot/0")
    await database.put(b"s" + b"session", b"nonsense")
    await database.flush()
    await database.shutdown()

    with pytest.raises(StoreCorrupted, match="session"):
        await ObjectStore(place).open()


# Size, and the end of the process


@pytest.mark.slow
async def test_a_commit_of_20000_records_leaves_the_loop_to_others(place: Place) -> None:
    blob = make_blob("flow", "state", padding_bytes=50)
    batch = Batch(1, {b"%d" % number: blob for number in range(20_000)}, {})
    turns = 0
    async with opened(ObjectStore(replace(place, lease_s=10.0))) as (store, _):
        commit = store.commit(batch)
        while not commit.done():
            await asyncio.sleep(0.001)
            turns += 1
        await commit

    assert turns > 20
    assert await contents_of(ObjectStore(place)) == kept_of([batch])


@pytest.mark.slow
def test_a_process_that_closes_nothing_ends_without_a_word(place: Place) -> None:
    program = (
        "import asyncio\n"
        "from fsm_ray.stores.base import Place\n"
        "from fsm_ray.stores.objectstore import ObjectStore\n"
        f"asyncio.run(ObjectStore(Place(**{dataclasses.asdict(place)!r})).open())\n"
    )

    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, timeout=30, check=False
    )

    assert (ran.returncode, ran.stdout, ran.stderr) == (0, b"", b"")


# Buckets


class Bucket(ThreadingHTTPServer):
    """The part of S3 that SlateDB uses in its first minutes: a fake that keeps objects in memory."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Request)
        self.objects: dict[str, bytes] = {}
        self.turn = threading.Lock()
        self.requests: list[str] = []
        self.refusal: tuple[int, str] | None = None
        """The status and error code with which it answers everything."""
        self.answers = threading.Event()
        """Whether it answers at all."""
        self.answers.set()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Bucket

    def do(self) -> None:
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.answers.wait()
        self.server.requests.append(f"{self.command} {url.path}")
        if self.server.refusal is not None:
            status, code = self.server.refusal
            self.answer(
                status, f"<?xml version='1.0'?><Error><Code>{code}</Code><Key>ID</Key></Error>".encode()
            )
        elif url.query:
            self.answer(200, self.listing(parse_qs(url.query)["prefix"][0]))
        else:
            self.answer(*self.act(url.path, body))

    do_GET = do_HEAD = do_PUT = do_DELETE = do  # noqa: N815

    def act(self, path: str, body: bytes) -> tuple[int, bytes]:
        objects = self.server.objects
        if self.command == "PUT":
            with self.server.turn:
                if self.headers["If-None-Match"] and path in objects:
                    return 412, b""
                objects[path] = body
            return 200, b""
        if path not in objects:
            return 404, b""
        if self.command == "DELETE":
            del objects[path]
            return 204, b""
        return 200, objects[path]

    def listing(self, prefix: str) -> bytes:
        bucket = urlsplit(self.path).path + "/"
        now = datetime.now(UTC).isoformat()  # so that nothing is old enough to be deleted
        keys = sorted(path.removeprefix(bucket) for path in self.server.objects)
        items = "".join(
            f"<Contents><Key>{key}</Key><Size>{len(self.server.objects[bucket + key])}</Size><ETag>e</ETag>"
            f"<LastModified>{now}</LastModified></Contents>"
            for key in keys
            if key.startswith(prefix)
        )
        return f"<ListBucketResult>{items}</ListBucketResult>".encode()

    def answer(self, status: int, content: bytes) -> None:
        size = len(content)
        requested = self.headers["Range"]
        if status == 200 and requested and self.command == "GET":
            start, _, end = requested.removeprefix("bytes=").partition("-")
            first, last = int(start or size - int(end)), int(end) if start and end else size - 1
            content, status = content[first : last + 1], 206
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{first + len(content) - 1}/{size}")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{md5(self.server.objects.get(self.path, b"")).hexdigest()}"')
        self.send_header("Last-Modified", formatdate(usegmt=True))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Nothing: it would go to stderr."""


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    with Bucket() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT", server.endpoint)
        monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        try:
            yield server
        finally:
            server.answers.set()
            server.shutdown()
            thread.join()


@pytest.fixture
def in_bucket(place: Place) -> Place:
    return replace(place, url="s3://bucket/some/prefix/")


@pytest.mark.slow
async def test_a_commit_and_a_confirmation_are_one_request_each(bucket: Bucket, in_bucket: Place) -> None:
    async with opened(ObjectStore(in_bucket)) as (store, _):
        for question in (store.commit(numbered_batch(1)), store.confirm()):
            bucket.requests.clear()
            await question
            # What looks for news in the background never writes.
            assert len([each for each in bucket.requests if each.startswith("PUT")]) == 1

    assert all(path.startswith("/bucket/some/prefix/bot/0/") for path in bucket.objects)
    assert await contents_of(ObjectStore(in_bucket)) == kept_of([numbered_batch(1)])


@pytest.mark.slow
@pytest.mark.parametrize("refusal", [(404, "NoSuchBucket"), (403, "SignatureDoesNotMatch")])
async def test_a_refusal_is_told_without_what_is_nobodys_business(
    bucket: Bucket, in_bucket: Place, refusal: tuple[int, str]
) -> None:
    bucket.refusal = refusal

    with pytest.raises(StoreUnavailable, match=refusal[1]) as caught:
        await ObjectStore(in_bucket).open()

    assert "<" not in str(caught.value)
    assert "list-type" not in str(caught.value)


@pytest.mark.slow
async def test_a_silent_object_store_is_not_waited_for(
    bucket: Bucket, in_bucket: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objectstore, "_STEP_S", 0.5)
    bucket.answers.clear()

    with pytest.raises(StoreUnavailable, match=r"no answer within 0\.5 s"):
        await ObjectStore(in_bucket).open()


@pytest.mark.slow
async def test_an_outage_ends_a_commit_and_loses_nothing_acknowledged(
    bucket: Bucket, in_bucket: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objectstore, "_MIN_COMMIT_S", 0.5)
    monkeypatch.setattr(objectstore, "_SHUTDOWN_S", 0.5)
    async with opened(ObjectStore(replace(in_bucket, lease_s=0.5))) as (store, _):
        await store.commit(numbered_batch(1))
        bucket.answers.clear()
        start_s = time.monotonic()
        for question in (store.commit(numbered_batch(2)), store.confirm()):
            with pytest.raises(StoreUnavailable, match=r"no answer within 0\.5 s"):
                await question
        await store.close()
        assert time.monotonic() - start_s < 10

        bucket.answers.set()
        contents = await store.open()
        assert contents.version in {1, 2}
        assert contents.records == kept_of(map(numbered_batch, range(1, contents.version + 1))).records


async def test_a_signature_in_a_url_is_not_told(place: Place) -> None:
    said = slatedb.Error.Unavailable("GET https://a.blob.core.windows.net/c?sv=1&sig=secret in 2ms - refused")

    with pytest.raises(StoreUnavailable, match=r"windows\.net/c in 2ms - refused"):
        async with ObjectStore(place)._asking(1.0):
            raise said


async def open_foreign(root: Path, path: str) -> Any:
    """A SlateDB that this test writes to as it likes."""
    builder = slatedb.ObjectStoreBuilder(slatedb.ObjectStoreType.LOCAL)
    builder.with_config("local_path", str(root))
    return await slatedb.DbBuilder(path, builder.build()).build()


async def open_and_forget(place: Place, batches: list[Batch]) -> None:
    """Commit, and end without closing the store, so that the batches are in the log alone."""
    store = ObjectStore(place)
    await store.open()
    for batch in batches:
        await store.commit(batch)
    await store._disconnect()
