"""Keyring: where keys are read from, who else may read them, and what is said when they cannot be used."""

from __future__ import annotations

import base64
import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fsm_ray.errors import EncryptionKeysUnusable
from fsm_ray.stores.keyring import KEY_BYTES, add_key, make_key_file, read_keyring

IS_ROOT = os.geteuid() == 0

KEY = base64.b64encode(bytes(range(KEY_BYTES))).decode()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def write(path: Path, content: Any, mode: int = 0o600) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    path.chmod(mode)
    return f"file://{path}"


def test_a_new_file_has_one_key_and_is_readable_by_its_owner_alone(path: Path) -> None:
    make_key_file(path, "2026-11")

    keyring = read_keyring(f"file://{path}")
    assert keyring.current == "2026-11"
    assert [len(key) for key in keyring.keys.values()] == [KEY_BYTES]
    assert not keyring.accepts_plain
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(path.parent.iterdir()) == [path]


def test_keys_are_random(path: Path) -> None:
    for number in range(3):
        make_key_file(path.with_name(f"{number}"), "a")

    assert len({read_keyring(f"file://{path.with_name(str(n))}").keys["a"] for n in range(3)}) == 3


def test_a_file_that_is_there_is_never_replaced_by_a_new_one(path: Path) -> None:
    make_key_file(path, "first")
    before = path.read_bytes()

    with pytest.raises(FileExistsError):
        make_key_file(path, "second")

    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_an_added_key_is_the_current_one_and_the_others_and_all_else_stay(path: Path) -> None:
    where = write(path, {"current": "old", "keys": {"old": KEY}, "accept_plain": True})

    add_key(path, "new")

    keyring = read_keyring(where)
    assert keyring.current == "new"
    assert keyring.keys["old"] == base64.b64decode(KEY)
    assert keyring.keys["new"] != keyring.keys["old"]
    assert keyring.accepts_plain
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o640])
def test_an_added_key_leaves_the_file_to_those_who_could_read_it(path: Path, mode: int) -> None:
    write(path, {"current": "old", "keys": {"old": KEY}}, mode)
    group = 12345 if IS_ROOT else -1
    os.chown(path, -1, group)
    before = path.stat()

    add_key(path, "new")

    after = path.stat()
    assert (after.st_uid, after.st_gid, after.st_mode) == (before.st_uid, before.st_gid, before.st_mode)


def test_who_cannot_leave_it_to_them_changes_nothing_and_is_told_the_cure(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> None:
        raise PermissionError

    make_key_file(path, "old")
    before = path.read_bytes()
    monkeypatch.setattr(os, "fchown", refuse)

    with pytest.raises(EncryptionKeysUnusable, match=f"belongs to user {os.geteuid()} .* as root"):
        add_key(path, "new")

    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_of_keys_that_are_added_at_once_none_is_lost(path: Path) -> None:
    make_key_file(path, "first")
    ids = [f"key-{number}" for number in range(24)]

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key_id: add_key(path, key_id), ids))

    assert read_keyring(f"file://{path}").keys.keys() == {"first", *ids}


def test_a_key_that_is_there_is_not_replaced(path: Path) -> None:
    make_key_file(path, "first")
    before = path.read_bytes()

    with pytest.raises(EncryptionKeysUnusable, match="first"):
        add_key(path, "first")

    assert path.read_bytes() == before


def test_keys_can_be_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOT_KEYS", json.dumps({"current": "a", "keys": {"a": KEY}}))

    assert read_keyring("env:BOT_KEYS").keys == {"a": base64.b64decode(KEY)}


def test_a_variable_that_is_not_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BOT_KEYS", raising=False)

    with pytest.raises(EncryptionKeysUnusable, match="BOT_KEYS"):
        read_keyring("env:BOT_KEYS")


@pytest.mark.parametrize("mode", [0o604, 0o644, 0o602, 0o601, 0o620, 0o777])
def test_a_file_that_others_can_use_is_refused_with_the_cure(path: Path, mode: int) -> None:
    where = write(path, {"current": "a", "keys": {"a": KEY}}, mode)

    with pytest.raises(EncryptionKeysUnusable, match=rf"{mode:04o}.*chmod 600 {path}"):
        read_keyring(where)


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o440, 0o640])
def test_the_owner_and_the_group_may_read_it(path: Path, mode: int) -> None:
    assert read_keyring(write(path, {"current": "a", "keys": {"a": KEY}}, mode)).current == "a"


@pytest.mark.skipif(not IS_ROOT, reason="only root can give files away")
def test_a_file_of_another_user_is_refused(path: Path) -> None:
    where = write(path, {"current": "a", "keys": {"a": KEY}})
    os.chown(path, 12345, -1)

    with pytest.raises(EncryptionKeysUnusable, match="12345"):
        read_keyring(where)


def test_a_missing_file_is_named_with_the_command_that_makes_one(path: Path) -> None:
    with pytest.raises(EncryptionKeysUnusable, match=rf"{path}.*fsm-ray keys new"):
        read_keyring(f"file://{path}")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "holds no encryption keys"),
        ("{", "holds no encryption keys"),
        ([KEY], "holds no encryption keys"),
        ({"keys": {"a": KEY}}, "current"),
        ({"current": "a", "keys": {"a": KEY}, "accept_plian": True}, "accept_plian"),
        ({"current": "a", "keys": {"a": "AAAA" + KEY}}, "key 'a' is not the base64 of 32 bytes"),
        ({"current": "a", "keys": {"a": "!" + KEY[1:]}}, "key 'a' is not the base64 of 32 bytes"),
        ({"current": "a", "keys": {}}, "current key is 'a'"),
        ({"current": "b", "keys": {"a": KEY}}, "current key is 'b'"),
        ({"current": "a b", "keys": {"a b": KEY}}, "an id is 1 to 32"),
        ({"current": "x" * 33, "keys": {"x" * 33: KEY}}, "an id is 1 to 32"),
        ({"current": "", "keys": {"": KEY}}, "an id is 1 to 32"),
    ],
)
def test_what_are_no_keys_is_refused_without_showing_any(path: Path, content: Any, told: str) -> None:
    where = write(path, content)

    with pytest.raises(EncryptionKeysUnusable, match=told) as caught:
        read_keyring(where)

    assert str(path) in str(caught.value)
    assert KEY[2:] not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__


def test_keys_are_in_no_repr(path: Path) -> None:
    keyring = read_keyring(write(path, {"current": "a", "keys": {"a": KEY}}))

    assert repr(keyring) == "Keyring(current='a', accepts_plain=False)"
