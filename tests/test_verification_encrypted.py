"""`fsm-ray verify` of encrypted stores: opened with keys, or looked at from outside."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fsm_ray import cli, protocol
from fsm_ray.bench.servers import ValkeyServer, temporary_directory
from fsm_ray.codec import encode_key
from fsm_ray.errors import EncryptionKeysUnusable, InvalidOptions
from fsm_ray.stores.base import Answered, Batch, Inspectable, Row, encode_answered, with_slot
from fsm_ray.stores.encrypted import EncryptedStore
from fsm_ray.stores.keyring import add_key, make_key_file
from fsm_ray.stores.owner import FORMAT, decode_owner, encode_owner
from fsm_ray.testing.batches import make_blob
from fsm_ray.testing.stores import commit_all
from fsm_ray.verification import ShardReport, verify

from .test_cli_verify import SESSION, Kind, Redis, RocksDB, answered, batch, problems

KEY = encode_key((-100, 3))
"""One of those in `batch`."""


@pytest.fixture(scope="module")
def valkey() -> Iterator[ValkeyServer]:
    with temporary_directory() as directory, ValkeyServer(directory, fsync="always") as server:
        yield server


@pytest.fixture(params=["rocksdb", "redis"])
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> Kind:
    if request.param == "rocksdb":
        return RocksDB(f"rocksdb://{tmp_path / 'store'}")
    return Redis(request.getfixturevalue("valkey").url)


@pytest.fixture
def rocksdb(tmp_path: Path) -> RocksDB:
    return RocksDB(f"rocksdb://{tmp_path / 'store'}")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "keys.json"
    make_key_file(path, "first")
    return path


@pytest.fixture
def where(path: Path) -> str:
    return f"file://{path}"


def keys_of(path: Path) -> dict[str, str]:
    keys: dict[str, str] = json.loads(path.read_text())["keys"]
    return keys


def change_keys(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def encrypted(kind: Kind, where: str) -> EncryptedStore:
    return EncryptedStore(kind.store(replace(kind.place, is_encrypted=True)), where)


async def reports(kind: Kind, where: str | None = None) -> list[ShardReport]:
    return [each async for each in verify(kind.place.url, kind.place.bot_name, encryption_keys=where)]


async def rows(kind: Kind, of: str) -> list[Row]:
    store = kind.make()
    assert isinstance(store, Inspectable)
    return [row async for row in store.rows() if row.kind == of]


async def test_a_sound_store_passes_with_its_keys_and_without(kind: Kind, where: str) -> None:
    await commit_all(encrypted(kind, where), [batch(1), batch(2)])
    [opened] = await reports(kind, where)
    [unseen] = await reports(kind)

    for report in (opened, unseen):
        assert problems(report) == []
        assert (report.records, report.encrypted_records) == (20, 20)
        assert (report.sessions, report.encrypted_sessions) == (1, 1)
        assert (report.version, report.key_ids) == (2, {"first"})
    assert (opened.is_opened, unseen.is_opened) == (True, False)


async def test_an_answer_that_was_forgotten_and_encrypted_again_is_sound(kind: Kind, where: str) -> None:
    forgotten = Answered(7, b"", 1_700_000_000.0)
    await commit_all(encrypted(kind, where), [Batch(1, {}, {b"session".ljust(16): forgotten})])
    [report] = await reports(kind, where)

    assert problems(report) == []
    assert report.sessions == 1


def cut(blob: bytes) -> bytes:
    return blob[:-1]


def flipped(blob: bytes) -> bytes:
    return blob[:-1] + bytes([blob[-1] ^ 1])


def anonymous(blob: bytes) -> bytes:
    """The length of the key's id is 0."""
    return blob[:11] + b"\0" + blob[12:]


@pytest.mark.parametrize(
    ("damage", "told", "is_seen_from_outside"),
    [
        (cut, "it is cut off", True),
        (anonymous, "it does not say which key", True),
        (flipped, "its authentication tag does not fit", False),
    ],
)
async def test_a_damaged_record_is_found(
    kind: Kind, where: str, *, damage: Callable[[bytes], bytes], told: str, is_seen_from_outside: bool
) -> None:
    await commit_all(encrypted(kind, where), [batch(1)])
    row = (await rows(kind, "record"))[7]
    await kind.put("record", with_slot(row.key), damage(row.value))
    [report] = await reports(kind, where)
    [unseen] = await reports(kind)

    assert [each.where for each in report.findings] == [row.where]
    assert told in report.findings[0].problem
    assert len(unseen.findings) == is_seen_from_outside
    assert report.records == 20


async def test_what_was_moved_is_found(kind: Kind, where: str) -> None:
    await commit_all(encrypted(kind, where), [batch(1)])
    one, other, *_ = await rows(kind, "record")
    [session] = await rows(kind, "session")
    await kind.put("record", with_slot(other.key), one.value)
    await kind.put("session", b"another".ljust(16), session.value)
    [report] = await reports(kind, where)

    assert {each.problem for each in report.findings} == {
        "its authentication tag does not fit: it was changed, or moved here from elsewhere"
    }
    assert report.findings[0].where == other.where
    assert len(report.findings) == 2


async def test_what_a_shard_never_wrote_is_found_in_what_opens(kind: Kind, where: str) -> None:
    """Who has the keys, or our own fault."""
    odd = answered(7, said=8)
    stray = {
        b"\xc1 no key": make_blob(None, None, 1),
        encode_key("later"): make_blob("flow", "state", 9),
        encode_key("garbage"): b"\x93 no record",
    }
    await commit_all(encrypted(kind, where), [batch(1), Batch(2, stray, {b"odd".ljust(16): odd})])
    [report] = await reports(kind, where)
    found = "\n".join(problems(report))

    assert found.count("what is encrypted there has no key") == 1
    assert found.count("its version, 9, is later than the shard's last, 2") == 1
    assert found.count("it is no record: ") == 1
    assert found.count("the answer to write 8 is kept as that to 7") == 1
    assert len(report.findings) == 4
    assert problems((await reports(kind))[0]) == []


async def test_a_conversation_of_another_shard_is_found(rocksdb: RocksDB, where: str) -> None:
    rocksdb.place = replace(rocksdb.place, shards=2)
    await commit_all(encrypted(rocksdb, where), [batch(1)])
    found = (await reports(rocksdb, where))[0].findings

    assert 0 < len(found) < 20
    assert {each.problem for each in found} == {"its key belongs to shard 1 of 2"}


async def test_a_shard_in_the_place_of_another_is_found(rocksdb: RocksDB, where: str) -> None:
    await commit_all(encrypted(rocksdb, where), [batch(1)])
    shutil.copytree(rocksdb.directory, rocksdb.directory.with_name("1"))
    copied = (await reports(rocksdb, where))[1]

    assert sum("moved here from elsewhere" in problem for problem in problems(copied)) == 21


async def test_plain_ones_among_encrypted_ones_are_found_unless_the_keys_accept_them(
    kind: Kind, where: str, path: Path
) -> None:
    await commit_all(encrypted(kind, where), [batch(1)])
    slipped_in = encode_key("slipped in")
    await kind.put("record", with_slot(slipped_in), make_blob("flow", "admin", 1))
    await kind.put("session", b"plain".ljust(16), encode_answered(answered(1)))

    for keys in (where, None):
        [report] = await reports(kind, keys)
        assert len(report.findings) == 2
        assert all("it is not encrypted, and all here should be" in each for each in problems(report))
    change_keys(path, accept_plain=True)
    [report] = await reports(kind, where)
    assert problems(report) == []
    assert (report.records, report.encrypted_records) == (21, 20)

    await kind.put("record", with_slot(KEY), make_blob("flow", "admin", 1))
    [report] = await reports(kind, where)
    [problem] = problems(report)
    assert "another row has the same conversation" in problem


async def test_a_store_that_does_not_say_that_it_is_encrypted_is_found(rocksdb: RocksDB, where: str) -> None:
    await commit_all(encrypted(rocksdb, where), [batch(1)])
    [row] = await rows(rocksdb, "owner")
    owner = decode_owner(row.value)
    owner = type(owner)(
        **{name: getattr(owner, name) for name in owner.__struct_fields__} | {"format": FORMAT}
    )
    await rocksdb.put("owner", b"", encode_owner(owner))
    told = ["owner: it says that the store is not encrypted, or somebody made it say so"]

    assert problems((await reports(rocksdb, where))[0]) == told
    assert problems((await reports(rocksdb))[0]) == told


async def test_a_plain_store_is_found_where_keys_are_given(rocksdb: RocksDB, where: str, path: Path) -> None:
    await commit_all(rocksdb.make(), [batch(1)])

    [problem] = problems((await reports(rocksdb, where))[0])
    assert "not encrypted" in problem
    change_keys(path, accept_plain=True)
    assert problems((await reports(rocksdb, where))[0]) == []


async def test_an_old_record_put_back_under_an_earlier_key_is_found(
    kind: Kind, where: str, path: Path
) -> None:
    await commit_all(encrypted(kind, where), [batch(1)])
    old = await rows(kind, "record")
    add_key(path, "second")
    store = encrypted(kind, where)
    await store.open()
    await store.commit(batch(2))
    store.rotated()
    await store.close()
    assert problems((await reports(kind, where))[0]) == []

    await kind.put("record", with_slot(old[0].key), old[0].value)
    [report] = await reports(kind, where)
    assert report.key_ids == {"first", "second"}
    [problem] = problems(report)
    assert "another row has the same conversation: one of them was put back" in problem


async def test_a_key_that_is_missing_is_told_once_or_is_an_error_where_nothing_opens(
    rocksdb: RocksDB, where: str, path: Path, tmp_path: Path
) -> None:
    await commit_all(encrypted(rocksdb, where), [batch(1)])
    add_key(path, "second")
    added = {encode_key("added"): make_blob(None, None, 2)}
    await commit_all(encrypted(rocksdb, where), [Batch(2, added, {})])
    keys = keys_of(path)

    change_keys(path, keys={"second": keys["second"]})
    [problem] = problems((await reports(rocksdb, where))[0])
    assert "the key 'first', which is not among the encryption keys ('second')" in problem
    assert "; and so it is with 20 more" in problem

    change_keys(path, keys={"first": keys["second"], "second": keys["first"]})
    with pytest.raises(
        EncryptionKeysUnusable, match=r"shard 0 of bot .* is not the one that the store"
    ) as wrong:
        await reports(rocksdb, where)
    assert not any(key in str(wrong.value) for key in keys.values())
    with pytest.raises(EncryptionKeysUnusable, match="cannot be read here"):
        await reports(rocksdb, f"file://{tmp_path / 'nowhere'}")
    with pytest.raises(InvalidOptions, match="say where the keys are") as given:
        await reports(rocksdb, keys["first"])
    assert keys["first"] not in str(given.value)


def test_the_command_says_what_it_did_not_look_into_and_prints_nobodys_data(
    rocksdb: RocksDB,
    where: str,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    secret = {encode_key(f"secret {n}"): make_blob("secret", "secret", 99) for n in range(3)}
    reply = protocol.reply(protocol.WRITE, 2, [b"\xa6secret"])
    # Findings of all kinds: the versions are later than the shard's, the answer's number is another one.
    stray = Batch(1, secret | {b"\xdb secret": b"secret"}, {SESSION: Answered(1, reply, 1.0)})
    asyncio.run(commit_all(encrypted(rocksdb, where), [stray]))

    def run(*arguments: str) -> tuple[int | str | None, str]:
        monkeypatch.setattr(sys, "argv", ["fsm-ray", "verify", rocksdb.place.url, *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capsys.readouterr()
        assert "secret" not in out + err
        assert (b"secret").hex() not in out + err
        return stopped.value.code, out + err

    unseen = (
        "4 records and 1 session are encrypted with first, and were not looked into: give --encryption-keys"
    )
    code, told = run()
    assert (code, told.count(unseen)) == (0, 1)
    code, told = run("--json")
    assert (code, json.loads(told)["unseen"], json.loads(told)["encrypted_records"]) == (0, unseen, 4)
    code, told = run("--encryption-keys", where)
    assert (code, "not looked into" in told, "4 findings" in told) == (cli.EXIT_FAILED, False, True)
    code, told = run("--encryption-keys", where, "--json")
    assert (code, json.loads(told)["unseen"]) == (cli.EXIT_FAILED, None)
    assert len(json.loads(told)["findings"]) == 4

    path.chmod(0o644)
    code, told = run("--encryption-keys", where)
    assert (code, "are not safe from others" in told) == (cli.EXIT_USAGE, True)
