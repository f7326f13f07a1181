"""The RocksDB store: the kit, and what it says of damaged, foreign and full directories."""

from __future__ import annotations

import os
import random
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from rocksdict import Options, Rdict

from fsm_ray.errors import FsmRayError, StoreCorrupted, StoreMismatch, StoreUnavailable
from fsm_ray.stores.base import Batch, Place, with_slot
from fsm_ray.stores.rocksdb import RocksDBStore
from fsm_ray.testing import ExclusiveStoreConformance, MakeStore, StoreConformance
from fsm_ray.testing.batches import assert_kept, make_blob, numbered_batch
from fsm_ray.testing.stores import commit_all, contents_of, opened
from fsm_ray.testing.writer import Writer

BATCHES = 12


class TestRocksDBStore(ExclusiveStoreConformance, StoreConformance):
    @pytest.fixture
    def make_store(self) -> MakeStore:
        return RocksDBStore

    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"rocksdb://{tmp_path}"


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(url=f"rocksdb://{tmp_path}", bot_name="bot", shard=0, shards=1, lease_s=5.0)


@pytest.fixture
def directory(place: Place) -> Path:
    return RocksDBStore(place).directory


@pytest.fixture
async def closed(place: Place, directory: Path) -> Path:
    """The directory of a store that was closed: all is in tables."""
    await commit_all(RocksDBStore(place), map(numbered_batch, range(1, BATCHES + 1)))
    return directory


@pytest.fixture
def crashed(place: Place, directory: Path) -> Path:
    """The directory of a store whose owner was killed: all is in the log."""
    with Writer(RocksDBStore, place, BATCHES) as writer:
        writer.wait_until_acknowledged(BATCHES)
    return directory


def largest(directory: Path, pattern: str) -> Path:
    """The file of that name that has the records."""
    return max(directory.glob(pattern), key=lambda path: path.stat().st_size)


def flip_bits(path: Path, part: float) -> None:
    """Damage the file at that part of its length."""
    content = bytearray(path.read_bytes())
    start = int(len(content) * part)
    content[start : start + 16] = bytes(byte ^ 0xFF for byte in content[start : start + 16])
    path.write_bytes(content)


async def assert_refused(place: Place, kind: type[FsmRayError], match: str) -> None:
    """It cannot be opened, however often one tries, and the error names the directory."""
    for _ in range(2):
        with pytest.raises(kind, match=match) as caught:
            await contents_of(RocksDBStore(place))
        assert str(RocksDBStore(place).directory) in str(caught.value)
        assert caught.value.bot == "bot"


# Damage: refused, never read as less than there was


def remove_logs(directory: Path) -> None:
    for path in directory.glob("*.log"):
        path.unlink()


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "CURRENT missing": (lambda directory: (directory / "CURRENT").unlink(), "CURRENT is missing"),
    "CURRENT empty": (lambda directory: (directory / "CURRENT").write_bytes(b""), "CURRENT"),
    "CURRENT garbage": (lambda directory: (directory / "CURRENT").write_bytes(b"garbage\n"), "CURRENT"),
    "MANIFEST missing": (lambda directory: largest(directory, "MANIFEST-*").unlink(), "MANIFEST"),
    "MANIFEST empty": (lambda directory: os.truncate(largest(directory, "MANIFEST-*"), 0), "MANIFEST"),
    "MANIFEST damaged": (lambda directory: flip_bits(largest(directory, "MANIFEST-*"), 0.5), "damaged"),
    "table missing": (lambda directory: largest(directory, "*.sst").unlink(), "sst"),
    "table's records damaged": (lambda directory: flip_bits(largest(directory, "*.sst"), 0.1), "sst"),
    "table's index damaged": (lambda directory: flip_bits(largest(directory, "*.sst"), 0.8), "sst"),
    "table's end damaged": (lambda directory: flip_bits(largest(directory, "*.sst"), 0.99), "sst"),
    "log missing": (remove_logs, r"\*.log is missing"),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
async def test_a_damaged_directory_is_refused(closed: Path, place: Place, damage: str) -> None:
    inflict, match = DAMAGES[damage]
    inflict(closed)

    await assert_refused(place, StoreCorrupted, match)


@pytest.mark.parametrize("part", [0.02, 0.5, 0.9])
async def test_a_log_that_is_damaged_before_its_end_is_refused(
    crashed: Path, place: Place, part: float
) -> None:
    flip_bits(largest(crashed, "*.log"), part)

    await assert_refused(place, StoreCorrupted, "checksum")


async def test_a_removed_log_does_not_pass_for_a_new_store(crashed: Path, place: Place) -> None:
    largest(crashed, "*.log").unlink()

    await assert_refused(place, StoreCorrupted, r"\*.log is missing")


async def test_a_torn_end_of_the_log_is_a_commit_that_nobody_was_told_of(crashed: Path, place: Place) -> None:
    log = largest(crashed, "*.log")
    os.truncate(log, log.stat().st_size - 100)

    assert_kept(await contents_of(RocksDBStore(place)), map(numbered_batch, range(1, BATCHES)))


@pytest.mark.parametrize(
    ("row", "value", "match"),
    [
        (b"s" + b"session", b"garbage", "session"),
        (b"s" + b"session", b"", "session"),
        (b"owner", b"garbage", "owner"),
        (b"owner", b"", "owner"),
        (b"owner", b"\xff\xfe", "owner"),
    ],
)
async def test_a_row_that_cannot_be_read_is_refused(
    closed: Path, place: Place, row: bytes, value: bytes, match: str
) -> None:
    with opened_directly(closed) as db:
        db[row] = value

    with pytest.raises(StoreCorrupted, match=match) as caught:
        await contents_of(RocksDBStore(place))
    assert str(closed.parent.parent) in str(caught.value)


# Foreign: refused, and left as it was


@pytest.fixture
def foreign(directory: Path) -> Path:
    """The directory, which another program already keeps its RocksDB in."""
    directory.mkdir(parents=True)
    with opened_directly(directory) as db:
        db[b"theirs"] = b"precious"
    return directory


async def test_a_rocksdb_that_another_program_wrote_is_refused(foreign: Path, place: Place) -> None:
    await assert_refused(place, StoreMismatch, "fsm_ray did not write")

    with opened_directly(foreign) as db:
        assert dict(db.items()) == {b"theirs": b"precious"}


async def test_another_bots_directory_is_refused(closed: Path, place: Place) -> None:
    closed.parent.rename(closed.parent.with_name("other"))

    with pytest.raises(StoreMismatch, match="'bot'"):
        await contents_of(RocksDBStore(replace(place, bot_name="other")))


async def test_a_store_of_a_later_format_is_refused(closed: Path, place: Place) -> None:
    with opened_directly(closed) as db:
        db[b"owner"] = (db[b"owner"] or b"").replace(b'"format":1', b'"format":3')

    with pytest.raises(StoreMismatch, match="format 3"):
        await contents_of(RocksDBStore(place))


# Places where no directory can be


@pytest.mark.parametrize("path", ["/proc/self", "/dev/null"])
async def test_a_directory_that_cannot_be_made_is_named(place: Place, path: str) -> None:
    await assert_refused(replace(place, url=f"rocksdb://{path}"), StoreUnavailable, "cannot be used")


@pytest.fixture
def _file(directory: Path) -> None:
    """A file where the directory should be."""
    directory.parent.mkdir()
    directory.touch()


@pytest.mark.usefixtures("_file")
async def test_a_file_in_the_place_of_the_directory_is_named(place: Place) -> None:
    await assert_refused(place, StoreUnavailable, "cannot be used")


# The lock


@pytest.mark.parametrize("damage", ["table's records damaged", "MANIFEST damaged"])
async def test_a_store_that_was_refused_is_not_kept_locked(closed: Path, place: Place, damage: str) -> None:
    """Not even by the error's traceback: rocksdict keeps the lock while an iterator of it lives."""
    inflict, match = DAMAGES[damage]
    inflict(closed)
    store = RocksDBStore(place)
    with pytest.raises(StoreCorrupted) as kept:
        await store.open()

    with pytest.raises(StoreCorrupted, match=match):
        await RocksDBStore(place).open()
    assert kept.tb is not None


async def test_a_foreign_store_is_not_kept_locked(foreign: Path, place: Place) -> None:
    with pytest.raises(StoreMismatch) as kept:
        await RocksDBStore(place).open()

    with opened_directly(foreign) as db:
        assert db[b"theirs"] == b"precious"
    assert kept.tb is not None


async def test_a_store_in_use_says_so(place: Place) -> None:
    async with opened(RocksDBStore(place)):
        await assert_refused(place, StoreUnavailable, "open in another process")


# The disk


async def test_a_full_disk_fails_the_commit_and_loses_nothing_acknowledged(
    directory: Path, place: Place
) -> None:
    acknowledged = 0
    async with opened(RocksDBStore(place)) as (store, _):
        with file_size_limit(300_000):
            with pytest.raises(StoreUnavailable) as caught:  # noqa: PT012 - which one is what is asked
                for number in range(1, 1000):
                    await store.commit(incompressible_batch(number))
                    acknowledged = number
            with pytest.raises(StoreUnavailable):
                await store.commit(incompressible_batch(acknowledged + 2))

        contents = await store.open()
        await store.commit(incompressible_batch(contents.version + 1))

    assert str(directory) in str(caught.value)
    assert 0 < acknowledged <= contents.version <= acknowledged + 1
    kept = map(incompressible_batch, range(1, contents.version + 2))
    assert_kept(await contents_of(RocksDBStore(place)), kept)


async def test_slots_stand_in_front_of_the_keys(closed: Path) -> None:
    with opened_directly(closed) as db:
        assert db[b"r" + with_slot(b"last")] == numbered_batch(BATCHES).records[b"last"]


def incompressible_batch(number: int) -> Batch:
    """Two kilobytes at least, whatever RocksDB does to make them fewer."""
    state = random.Random(number).randbytes(2000).hex()
    return Batch(number, {b"%d" % number: make_blob(state=state)}, {})


@contextmanager
def opened_directly(directory: Path) -> Iterator[Rdict]:
    """The directory as RocksDB alone sees it."""
    options = Options(raw_mode=True)
    options.set_allow_concurrent_memtable_write(allow=False)  # as the store's kind of memtable wants
    db = Rdict(str(directory), options)
    try:
        yield db
    finally:
        db.close()


@contextmanager
def file_size_limit(size_bytes: int) -> Iterator[None]:
    """No file of this process can grow past that: what is written there fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
