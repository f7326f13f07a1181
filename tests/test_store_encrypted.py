"""The encrypted store: the kits over two others, what is found in the files of four, and who cannot fool it.

`DictStore` is what somebody sees and changes who has got hold of a store, but of none of its keys.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import psycopg
import pytest

from fsm_ray import protocol
from fsm_ray.bench.servers import PostgresServer, ValkeyServer, temporary_directory
from fsm_ray.errors import (
    EncryptionKeysUnusable,
    NotOwner,
    StoreCorrupted,
    StoreMismatch,
    VersionConflict,
)
from fsm_ray.record import check_blob, encode_content, front_of
from fsm_ray.stores import cipher as cipher_module
from fsm_ray.stores import encrypted
from fsm_ray.stores.base import Answered, Batch, Contents, OwnedStore, Place, lease_clock
from fsm_ray.stores.cipher import Cipher
from fsm_ray.stores.encrypted import EncryptedStore
from fsm_ray.stores.keyring import Keyring, add_key, make_key_file, read_keyring
from fsm_ray.stores.objectstore import ObjectStore
from fsm_ray.stores.owner import ENCRYPTED_FORMAT, FORMAT
from fsm_ray.stores.postgres import PostgresStore
from fsm_ray.stores.redis import RedisStore
from fsm_ray.stores.rocksdb import RocksDBStore
from fsm_ray.testing import ExclusiveStoreConformance, MakeStore, SharedStoreConformance, StoreConformance
from fsm_ray.testing.batches import kept_of, make_blob, numbered_batch
from fsm_ray.testing.stores import commit_all, contents_of, opened

PLACE = Place(url="dict://", bot_name="bot", shard=0, shards=4, lease_s=5.0, is_encrypted=True)

KEY, SESSION = b"\x92\x01\x02", b"session".ljust(16)
BLOB = make_blob("order", "pay", 7, padding_bytes=20)
ANSWERED = Answered(3, b"\x09\x00\x00\x00 a reply", 1_700_000_000.25)
BATCH = Batch(version=7, records={KEY: BLOB}, sessions={SESSION: ANSWERED})


def make_encrypted(
    kind: Callable[..., OwnedStore], where: str, place: Place, **clocks: Any
) -> EncryptedStore:
    inner = kind(replace(place, is_encrypted=True), **clocks)
    return EncryptedStore(inner, where, clock=clocks.get("clock", lease_clock))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "keys.json"
    make_key_file(path, "first")
    return path


@pytest.fixture
def where(path: Path) -> str:
    return f"file://{path}"


@pytest.fixture(scope="module")
def server() -> Iterator[ValkeyServer]:
    with temporary_directory() as directory, ValkeyServer(directory, fsync="always") as server:
        yield server


class TestOverRocksDB(ExclusiveStoreConformance, StoreConformance):
    @pytest.fixture
    def make_store(self, where: str) -> MakeStore:
        return partial(make_encrypted, RocksDBStore, where)

    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"rocksdb://{tmp_path}/store"


class TestOverRedis(SharedStoreConformance, StoreConformance):
    @pytest.fixture
    def make_store(self, where: str) -> MakeStore:
        return partial(make_encrypted, RedisStore, where)

    @pytest.fixture
    def url(self, server: ValkeyServer) -> str:
        return server.url


# What is in the files


MARKS = {"key": "qWx4Zp", "flow": "Jk7vRt", "state": "hB2nMy", "name": "cF9sLd", "reply": "gT5uEa"}
"""So unlike each other that a store which compresses leaves each of them whole."""


@pytest.fixture(params=["rocksdb", "redis", "postgresql", "file"])
def kept(request: pytest.FixtureRequest) -> Iterator[tuple[type[OwnedStore], str, Path]]:
    """A kind of store, its URL, and the directory in which it keeps everything."""
    with ExitStack() as stack:
        directory = stack.enter_context(temporary_directory())
        if request.param == "redis":
            yield RedisStore, stack.enter_context(ValkeyServer(directory, fsync="always")).url, directory
        elif request.param == "postgresql":
            yield PostgresStore, stack.enter_context(PostgresServer(directory)).url, directory
        else:
            kind = RocksDBStore if request.param == "rocksdb" else ObjectStore
            yield kind, f"{request.param}://{directory}", directory


def marks_in(directory: Path) -> set[str]:
    """The names of the marks that any file has."""
    files = [path.read_bytes() for path in directory.rglob("*") if path.is_file()]
    return {name for name, mark in MARKS.items() if any(mark.encode() in each for each in files)}


async def test_no_part_of_a_conversation_is_in_the_files_of_a_store(
    kept: tuple[type[OwnedStore], str, Path], where: str
) -> None:
    kind, url, directory = kept
    place = Place(url=url, bot_name="bot", shard=0, shards=1, lease_s=1.0)
    blob = make_blob(MARKS["flow"], MARKS["state"]).replace(b"\xa7padding", b"\xa6" + MARKS["name"].encode())
    answered = Answered(1, MARKS["reply"].encode(), 1.0)
    batch = Batch(1, {MARKS["key"].encode(): blob}, {SESSION: answered})

    await commit_all(make_encrypted(kind, where, place), [batch])
    assert marks_in(directory) == set()
    assert (await contents_of(make_encrypted(kind, where, place))).records == batch.records

    # So they are looked for where they would be found.
    await commit_all(kind(replace(place, bot_name="plain")), [batch])
    assert marks_in(directory) == MARKS.keys()


async def test_columns_for_people_are_empty_in_postgresql(where: str) -> None:
    with temporary_directory() as directory, PostgresServer(directory) as postgres:
        place = Place(url=postgres.url, bot_name="bot", shard=0, shards=1, lease_s=1.0)
        await commit_all(make_encrypted(PostgresStore, where, place), [BATCH])

        async with await psycopg.AsyncConnection.connect(postgres.url) as connection:
            found = await connection.execute("SELECT flow, state, version, length(key) FROM fsm_ray.records")
            assert await found.fetchall() == [(None, None, 0, 16)]


# Who has the store, and none of its keys


@dataclass
class Disk:
    """What a store keeps, for everybody to see and change."""

    epoch: int = 0
    owner: bytes | None = None
    contents: Contents = field(default_factory=lambda: Contents(0))
    confirmed: int = 0


class DictStore(OwnedStore):
    """Keeps a shard on a disk that is a dict."""

    is_shared: ClassVar[bool] = True

    def __init__(self, disk: Disk, place: Place = PLACE, **clocks: Any) -> None:
        super().__init__(place, **{"sleep": lambda _: asyncio.sleep(0), **clocks})
        self.disk = disk

    def commit(self, batch: Batch) -> asyncio.Future[None]:
        contents = self.disk.contents
        before = Batch(contents.version, dict(contents.records), dict(contents.sessions))
        self.disk.contents = kept_of([before, batch])
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done

    async def confirm(self) -> None:
        self.disk.confirmed += 1
        if self.owner is None or self.disk.epoch != self.owner.epoch:
            raise self._not_owner()

    async def _connect(self) -> None: ...
    async def _disconnect(self) -> None: ...

    async def _read_owner(self) -> bytes | None:
        return self.disk.owner

    async def _replace_owner(self, last_epoch: int, epoch: int, owner: bytes) -> bool:
        if self.disk.epoch != last_epoch:
            return False
        self.disk.epoch, self.disk.owner = epoch, owner
        return True

    async def _load(self) -> Contents:
        kept = self.disk.contents
        return Contents(kept.version, dict(kept.records), dict(kept.sessions))


@pytest.fixture
async def disk(where: str) -> Disk:
    """Has one record and one session."""
    disk = Disk()
    await commit_all(store_on(disk, where), [BATCH])
    return disk


def store_on(disk: Disk, where: str, **changes: Any) -> EncryptedStore:
    return EncryptedStore(DictStore(disk, replace(PLACE, **changes)), where)


def sole(mapping: dict[bytes, Any]) -> tuple[bytes, Any]:
    [item] = mapping.items()
    return item


async def refused(disk: Disk, where: str, told: str) -> None:
    """Nobody can open the store, and what it holds is left as it is."""
    before = (dict(disk.contents.records), dict(disk.contents.sessions))

    with pytest.raises(StoreCorrupted, match=told) as caught:
        await contents_of(store_on(disk, where))

    assert "dict://" in str(caught.value)
    assert caught.value.bot == "bot"
    assert (disk.contents.records, disk.contents.sessions) == before


async def test_what_a_store_sees_is_a_record_that_tells_nothing(disk: Disk, where: str) -> None:
    row, blob = sole(disk.contents.records)

    check_blob(blob)
    assert front_of(blob) == (None, None, 0)
    assert len(row) == 16
    assert KEY not in row + blob
    assert b"pay" not in blob
    session, answered = sole(disk.contents.sessions)
    assert (session, answered.number, answered.at_s) == (SESSION, ANSWERED.number, ANSWERED.at_s)
    assert ANSWERED.reply not in answered.reply
    assert await contents_of(store_on(disk, where)) == Contents(7, {KEY: BLOB}, {SESSION: ANSWERED})


async def test_a_flipped_bit_anywhere_in_a_record_is_refused(disk: Disk, where: str) -> None:
    row, blob = sole(disk.contents.records)
    for at in range(len(blob)):
        disk.contents.records[row] = blob[:at] + bytes([blob[at] ^ 1]) + blob[at + 1 :]

        with pytest.raises((StoreCorrupted, EncryptionKeysUnusable), match="dict://"):
            await contents_of(store_on(disk, where))

    disk.contents.records[row] = blob[:-20] + bytes([blob[-20] ^ 128]) + blob[-19:]
    await refused(disk, where, f"record in row {row.hex()}.*authentication tag")


async def test_a_flipped_bit_anywhere_in_an_answer_is_refused(disk: Disk, where: str) -> None:
    session, answered = sole(disk.contents.sessions)
    reply = answered.reply
    for at in range(len(reply)):
        changed = reply[:at] + bytes([reply[at] ^ 1]) + reply[at + 1 :]
        disk.contents.sessions[session] = Answered(answered.number, changed, answered.at_s)

        with pytest.raises((StoreCorrupted, EncryptionKeysUnusable), match="dict://"):
            await contents_of(store_on(disk, where))


async def test_a_record_that_is_cut_off_is_refused(disk: Disk, where: str) -> None:
    row, blob = sole(disk.contents.records)
    for length in range(len(blob)):
        disk.contents.records[row] = blob[:length]

        await refused(disk, where, row.hex())


async def test_an_answer_with_another_number_time_or_session_is_refused(disk: Disk, where: str) -> None:
    session, answered = sole(disk.contents.sessions)
    for number, at_s, name in [
        (answered.number - 1, answered.at_s, session),
        (answered.number, answered.at_s + 3600, session),
        (answered.number, answered.at_s, b"another".ljust(16)),
    ]:
        disk.contents.sessions = {name: Answered(number, answered.reply, at_s)}

        await refused(disk, where, f"session {name.hex()}.*moved here from elsewhere")


async def test_a_record_moved_to_another_conversation_is_refused(disk: Disk, where: str) -> None:
    await commit_all(store_on(disk, where), [Batch(8, {b"other": BLOB}, {})])
    row, other = disk.contents.records

    disk.contents.records[other] = disk.contents.records[row]

    await refused(disk, where, f"{other.hex()}.*moved here from elsewhere")


@pytest.mark.parametrize("changes", [{"bot_name": "other"}, {"shard": 1}])
async def test_a_record_and_an_answer_moved_to_another_bot_or_shard_are_refused(
    disk: Disk, where: str, changes: dict[str, Any]
) -> None:
    for kind in ("records", "sessions"):
        theirs = Disk()
        await commit_all(store_on(theirs, where, **changes), [Batch(7, {}, {})])
        getattr(theirs.contents, kind).update(getattr(disk.contents, kind))

        with pytest.raises(StoreCorrupted, match="moved here from elsewhere"):
            await contents_of(store_on(theirs, where, **changes))


async def test_a_record_in_the_place_of_an_answer_is_refused(disk: Disk, where: str) -> None:
    _, blob = sole(disk.contents.records)
    sealed = blob[11:]

    disk.contents.sessions[SESSION] = Answered(ANSWERED.number, b"\xff" * 4 + sealed, ANSWERED.at_s)

    await refused(disk, where, "moved here from elsewhere")


async def test_a_plain_record_that_was_slipped_in_is_refused(disk: Disk, where: str) -> None:
    disk.contents.records[b"slipped in"] = make_blob(state="admin")

    await refused(disk, where, f"{b'slipped in'.hex()}.*not encrypted")


async def test_a_plain_answer_that_was_slipped_in_is_refused(disk: Disk, where: str) -> None:
    disk.contents.sessions[SESSION] = ANSWERED

    await refused(disk, where, f"{SESSION.hex()}.*not encrypted")


async def test_a_store_whose_mark_was_taken_away_is_refused(disk: Disk, where: str) -> None:
    assert disk.owner is not None
    disk.owner = disk.owner.replace(b'"format":%d' % ENCRYPTED_FORMAT, b'"format":%d' % FORMAT)

    with pytest.raises(StoreMismatch, match="not encrypted, or somebody made it so"):
        await contents_of(store_on(disk, where))


async def test_what_is_no_record_though_it_is_sealed_is_refused(disk: Disk, where: str) -> None:
    await commit_all(store_on(disk, where), [Batch(8, {KEY: b"\x93 no record"}, {})])

    await refused(disk, where, "it is no record")


@pytest.mark.parametrize("version", [0, 6])
async def test_a_version_that_was_set_back_behind_a_record_is_refused(
    disk: Disk, where: str, version: int
) -> None:
    disk.contents.version = version

    await refused(disk, where, f"the shard's version .* it is {version}, and there is a 7 already")


@pytest.mark.parametrize("result", [protocol.encode_result(9), encode_content({}, 9)], ids=["set", "update"])
async def test_a_version_that_was_set_back_behind_an_answer_is_refused(where: str, result: bytes) -> None:
    disk, conflict = Disk(), protocol.encode_error(VersionConflict("no", actual_version=10))
    reply = protocol.reply(protocol.WRITE, 3, [result, protocol.encode_result(value=True), conflict])
    await commit_all(store_on(disk, where), [Batch(9, {}, {SESSION: Answered(3, reply, 1_000.0)})])
    assert (await contents_of(store_on(disk, where))).version == 9
    disk.contents.version = 8

    await refused(disk, where, "it is 8, and there is a 9 already")


async def test_two_bots_have_different_rows_for_one_user(disk: Disk, where: str) -> None:
    other = Disk()
    await commit_all(store_on(other, where, bot_name="other"), [BATCH])

    assert disk.contents.records.keys() != other.contents.records.keys()


async def test_who_loses_the_store_while_it_is_decrypted_is_told(disk: Disk, where: str) -> None:
    class Overtaken(DictStore):
        async def confirm(self) -> None:
            await super().confirm()
            if self.disk.confirmed == before + 1:
                # The inner store is sure now, and what it holds not decrypted yet.
                await contents_of(store_on(self.disk, where))

    before = disk.confirmed

    with pytest.raises(NotOwner):
        await contents_of(EncryptedStore(Overtaken(disk), where))


async def test_a_lease_counts_from_when_all_was_decrypted(disk: Disk, where: str) -> None:
    store = EncryptedStore(DictStore(disk, clock=lambda: 100.0), where, clock=lambda: 160.0)
    try:
        assert (await store.open()).owned_since_s == 160.0
    finally:
        await store.close()


# Keys that are missing or wrong


def keys_of(path: Path) -> dict[str, Any]:
    file: dict[str, Any] = json.loads(path.read_text())
    return file


def change_keys(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(keys_of(path) | changes))


async def test_a_missing_key_is_named_with_the_cure(disk: Disk, where: str, path: Path) -> None:
    add_key(path, "second")
    change_keys(path, keys={"second": keys_of(path)["keys"]["second"]})

    with pytest.raises(EncryptionKeysUnusable, match=r"dict://.*'first'.*put it back") as caught:
        await contents_of(store_on(disk, where))

    assert caught.value.key_id == "first"
    assert caught.value.bot == "bot"


async def test_a_wrong_key_is_told_from_damage(disk: Disk, where: str, path: Path) -> None:
    add_key(path, "second")
    change_keys(path, current="first", keys={"first": keys_of(path)["keys"]["second"]})

    with pytest.raises(EncryptionKeysUnusable, match="'first' is not the one") as caught:
        await contents_of(store_on(disk, where))

    assert caught.value.key_id == "first"


async def test_an_encrypted_store_opened_without_keys_is_refused_and_left_alone(
    disk: Disk, where: str
) -> None:
    with pytest.raises(StoreMismatch, match="init the bot with its encryption_keys"):
        await contents_of(DictStore(disk, replace(PLACE, is_encrypted=False)))

    assert (await contents_of(store_on(disk, where))).records == {KEY: BLOB}


# A store that was plain before


@pytest.fixture
async def plain() -> Disk:
    disk = Disk()
    await commit_all(DictStore(disk, replace(PLACE, is_encrypted=False)), [BATCH])
    return disk


async def test_a_plain_store_is_refused_and_stays_plain_unless_the_keys_say_otherwise(
    plain: Disk, where: str
) -> None:
    with pytest.raises(StoreMismatch, match='"accept_plain": true'):
        await contents_of(store_on(plain, where))

    kept = await contents_of(DictStore(plain, replace(PLACE, is_encrypted=False)))
    assert kept.records == {KEY: BLOB}


async def test_a_plain_store_is_taken_and_all_of_it_is_stale(plain: Disk, where: str, path: Path) -> None:
    change_keys(path, accept_plain=True)
    store = store_on(plain, where)

    contents = await store.open()

    assert (contents.records, contents.sessions) == ({KEY: BLOB}, {SESSION: ANSWERED})
    assert (contents.stale.keys, contents.stale.sessions) == ([KEY], [SESSION])
    await store.commit(Batch(7, contents.records, contents.sessions))
    await store.close()
    assert KEY not in plain.contents.records
    change_keys(path, accept_plain=False)
    assert await contents_of(store_on(plain, where)) == Contents(7, {KEY: BLOB}, {SESSION: ANSWERED})


async def test_no_plain_answer_passes_for_an_encrypted_one(plain: Disk, where: str, path: Path) -> None:
    change_keys(path, accept_plain=True)
    answers = [protocol.reply(protocol.WRITE, 1, [b"\x01"] * writes) for writes in range(300)]
    sessions = {n.to_bytes(16): Answered(1, answer, 1.0) for n, answer in enumerate(answers)}
    plain.contents.sessions = sessions

    # A reply begins with its length, so among these are all first bytes.
    assert len({answer[0] for answer in answers}) == 256
    assert (await contents_of(store_on(plain, where))).sessions == sessions


async def test_garbage_is_not_taken_for_a_plain_record(plain: Disk, where: str, path: Path) -> None:
    change_keys(path, accept_plain=True)
    for garbage in (b"", b"\x94garbage", BLOB[:-1], b"\x94" + BLOB[1:]):
        plain.contents.records[KEY] = garbage

        with pytest.raises(StoreCorrupted, match=KEY.hex()):
            await contents_of(store_on(plain, where))


# Rotation


async def test_what_was_committed_before_the_rotation_is_read_with_its_own_key(
    disk: Disk, where: str, path: Path
) -> None:
    add_key(path, "second")
    store = store_on(disk, where)

    contents = await store.open()

    assert contents.records == {KEY: BLOB}
    assert contents.stale.keys == [KEY]
    assert store.key_id == "second"
    await store.close()


async def test_a_commit_takes_the_row_of_an_earlier_key_away(disk: Disk, where: str, path: Path) -> None:
    async with opened(store_on(disk, where)) as (store, _):
        assert isinstance(store, EncryptedStore)
        assert not await store.rotate()
        old_row, _ = sole(disk.contents.records)
        add_key(path, "second")

        assert await store.rotate()
        assert store.key_id == "second"
        await store.commit(BATCH)

        row, _ = sole(disk.contents.records)
        assert row != old_row
        await store.commit(Batch(8, {KEY: None}, {}))
        assert disk.contents.records == {}


async def test_a_record_of_an_earlier_key_can_be_cleared_before_it_is_encrypted_anew(
    disk: Disk, where: str, path: Path
) -> None:
    add_key(path, "second")
    await commit_all(store_on(disk, where), [Batch(8, {KEY: None}, {})])

    assert disk.contents.records == {}


async def test_a_row_of_an_earlier_key_that_is_put_back_is_refused(
    disk: Disk, where: str, path: Path
) -> None:
    old = dict(disk.contents.records)
    add_key(path, "second")
    await commit_all(store_on(disk, where), [BATCH])

    disk.contents.records.update(old)

    await refused(disk, where, "one of them was put back")


async def test_a_rotation_does_not_hold_up_the_loop(
    disk: Disk, where: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_read = threading.Event()

    def read_slowly(where: str) -> Keyring:
        assert may_read.wait(60)
        return read_keyring(where)

    async with opened(store_on(disk, where)) as (store, _):
        assert isinstance(store, EncryptedStore)
        add_key(path, "second")
        monkeypatch.setattr(encrypted, "read_keyring", read_slowly)
        rotations = [asyncio.create_task(store.rotate()) for _ in range(2)]
        await store.commit(BATCH)
        may_read.set()

        assert await asyncio.gather(*rotations) == [True, False]


@pytest.mark.parametrize("change", ["missing", "another"])
async def test_a_rotation_whose_keys_lack_one_in_use_changes_nothing(
    disk: Disk, where: str, path: Path, change: str
) -> None:
    async with opened(store_on(disk, where)) as (store, _):
        assert isinstance(store, EncryptedStore)
        add_key(path, "second")
        keys = keys_of(path)["keys"]
        first = {} if change == "missing" else {"first": keys["second"]}
        change_keys(path, keys={"second": keys["second"], **first})

        with pytest.raises(EncryptionKeysUnusable, match="'first' is in use") as caught:
            await store.rotate()

        assert caught.value.key_id == "first"
        assert store.key_id == "first"
        await store.commit(BATCH)
    change_keys(path, keys=keys)
    assert (await contents_of(store_on(disk, where))).records == {KEY: BLOB}


async def test_once_everything_was_rewritten_the_earlier_key_can_go(
    disk: Disk, where: str, path: Path
) -> None:
    async with opened(store_on(disk, where)) as (store, _):
        assert isinstance(store, EncryptedStore)
        add_key(path, "second")
        await store.rotate()
        await store.commit(BATCH)
        store.rotated()
        change_keys(path, keys={"second": keys_of(path)["keys"]["second"]})

        assert not await store.rotate()

    assert (await contents_of(store_on(disk, where))) == Contents(7, {KEY: BLOB}, {SESSION: ANSWERED})


# Nonces


def heads_and_numbers(sealed: list[bytes]) -> set[bytes]:
    """What tells a key and nonce from every other: all that stands before the ciphertext."""
    return {each[: 1 + each[0] + 16 + 4 + 8] for each in sealed}


def test_no_two_seals_of_any_two_openings_share_key_and_nonce(where: str) -> None:
    keyring = read_keyring(where)
    sealed = [seal(b"same", b"same") for seal in [Cipher(keyring).seal for _ in range(20)] for _ in range(50)]

    assert len(heads_and_numbers(sealed)) == 1000
    assert len({each[-20:] for each in sealed}) == 1000


def test_after_so_many_seals_another_key_is_derived(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cipher_module, "MAX_SEALS", 3)
    cipher = Cipher(read_keyring(where))

    sealed = [cipher.seal(b"%d" % number, b"bound") for number in range(10)]

    assert len(heads_and_numbers(sealed)) == 10
    assert len({each[:-13] for each in sealed}) == 10
    assert len({each[: 1 + each[0] + 16] for each in sealed}) == 4
    assert [cipher.open(each, b"bound") for each in sealed] == [("first", b"%d" % n) for n in range(10)]


def test_rows_are_of_a_key_and_a_bot() -> None:
    keyring = Keyring("a", {"a": bytes(32), "b": bytes(31) + b"\x01"})
    cipher = Cipher(keyring)
    makers = [cipher.row_maker(key_id, bot) for key_id, bot in itertools.product("ab", ("x", "y"))]

    rows = [[row_of(b"%d" % number) for number in range(50)] for row_of in makers]

    assert rows == [[row_of(b"%d" % number) for number in range(50)] for row_of in makers]
    assert len(set(itertools.chain(*rows))) == 200


async def test_numbered_batches_are_kept_through_a_rotation(disk: Disk, where: str, path: Path) -> None:
    batches = [numbered_batch(number) for number in range(8, 14)]
    async with opened(store_on(disk, where)) as (store, _):
        assert isinstance(store, EncryptedStore)
        for batch in batches[:3]:
            await store.commit(batch)
        add_key(path, "second")
        await store.rotate()
        for batch in batches[3:]:
            await store.commit(batch)

    assert await contents_of(store_on(disk, where)) == kept_of([BATCH, *batches])
