"""Bots with encrypted stores on a Ray cluster: keys rotated under load, through kill -9, and what is told."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fsm_ray import AsyncStorage, State, Storage
from fsm_ray.errors import EncryptionKeysUnusable, InvalidInput, StoreMismatch, UnknownBot
from fsm_ray.routing.directory import KeyRotation
from fsm_ray.stores.keyring import add_key, make_key_file
from tests.conftest import DEADLINE_S, RayCluster, eventually

pytestmark = pytest.mark.ray

KEYS = 10_000
MARK = "w0Nx7Bq"


@pytest.fixture
def storage(cluster: RayCluster) -> Iterator[Storage]:
    with Storage(timeout_s=DEADLINE_S) as storage:
        yield storage


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "keys.json"
    make_key_file(path, "first")
    return path


@pytest.fixture
def options(tmp_path: Path, path: Path) -> dict[str, Any]:
    return {"store": f"rocksdb://{tmp_path}/store", "encryption_keys": f"file://{path}"}


def change_keys(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def keep_only(path: Path, key_id: str) -> None:
    change_keys(path, keys={key_id: json.loads(path.read_text())["keys"][key_id]})


def fill(storage: Storage, bot_name: str) -> None:
    storage.set_many(bot_name, {key: State(state="kept", data={"n": key}) for key in range(KEYS)})


def wait_until_done(storage: Storage, bot_name: str) -> KeyRotation:
    rotation = storage.rotate_keys(bot_name)
    eventually(lambda: storage.rotate_keys(bot_name).is_done, f"rotated: {rotation}")
    return storage.rotate_keys(bot_name)


async def test_keys_are_rotated_under_load_though_a_shard_is_killed_in_the_middle(
    storage: Storage, bot_name: str, options: dict[str, Any], path: Path
) -> None:
    """Writers count up through conditional writes, so that one lost or made twice breaks their row."""
    storage.init(bot_name, shards=2, **options)
    fill(storage, bot_name)
    done = asyncio.Event()
    async with AsyncStorage(timeout_s=DEADLINE_S) as shared:

        async def count_up(writer: int) -> int:
            count, version = 0, (await shared.set_data(bot_name, writer, {"count": 0}))
            while not done.is_set():
                version = await shared.set_data(
                    bot_name, writer, {"count": count + 1}, expected_version=version
                )
                count += 1
            return count

        writers = [asyncio.create_task(count_up(writer)) for writer in range(16)]
        for number in itertools.count():
            pid = (await shared.describe(bot_name)).shards[0].pid
            add_key(path, f"key-{number}")
            begun = await shared.rotate_keys(bot_name)
            assert begun.pending > 0
            os.kill(pid, signal.SIGKILL)
            if (await shared.rotate_keys(bot_name)).pending:
                break  # otherwise it had been faster than the kill
        rotation = await asyncio.to_thread(wait_until_done, storage, bot_name)
        done.set()
        counts = await asyncio.gather(*writers)

    assert rotation == KeyRotation(begun.key_id, 0)
    keep_only(path, begun.key_id)
    storage.drop(bot_name)
    storage.init(bot_name, shards=2, **options)
    assert [storage.get_data(bot_name, writer) for writer in range(16)] == [{"count": n} for n in counts]
    assert all(count > 0 for count in counts)
    kept = storage.get_many(bot_name, range(16, KEYS))
    assert kept == [State(state="kept", data={"n": key}) for key in range(16, KEYS)]
    assert storage.count(bot_name) == KEYS


def test_an_existing_bot_is_encrypted_and_then_refuses_to_run_without_keys(
    storage: Storage, bot_name: str, options: dict[str, Any], path: Path
) -> None:
    storage.init(bot_name, store=options["store"])
    storage.set_state(bot_name, MARK, State(flow=MARK, data={"mark": MARK}))
    storage.drop(bot_name)
    with pytest.raises(StoreMismatch, match="accept_plain"):
        storage.init(bot_name, **options)
    change_keys(path, accept_plain=True)

    storage.init(bot_name, **options)
    wait_until_done(storage, bot_name)
    storage.drop(bot_name)

    with pytest.raises(StoreMismatch, match="is encrypted"):
        storage.init(bot_name, store=options["store"])
    change_keys(path, accept_plain=False)
    with Storage(timeout_s=DEADLINE_S) as another:
        another.init(bot_name, **options)
        assert another.get_state(bot_name, MARK) == State(flow=MARK, data={"mark": MARK})


def test_keys_that_cannot_be_used_are_told_and_the_bot_goes_on_with_those_it_had(
    storage: Storage, bot_name: str, options: dict[str, Any], path: Path
) -> None:
    storage.init(bot_name, **options)
    good = path.read_text()
    path.chmod(0o644)
    with pytest.raises(EncryptionKeysUnusable, match="chmod 600"):
        storage.rotate_keys(bot_name)
    path.chmod(0o600)
    add_key(path, "second")
    keep_only(path, "second")
    with pytest.raises(EncryptionKeysUnusable, match="'first' is in use"):
        storage.rotate_keys(bot_name)

    storage.set_state(bot_name, 1, State(state="kept"))

    path.write_text(good)
    assert storage.rotate_keys(bot_name) == KeyRotation("first", 0)
    storage.drop(bot_name)
    add_key(path, "second")
    keep_only(path, "second")
    with pytest.raises(EncryptionKeysUnusable, match="'first', which is not among"):
        storage.init(bot_name, **options)
    with pytest.raises(UnknownBot):
        storage.describe(bot_name)


def test_a_bot_without_encryption_has_no_keys_to_rotate(storage: Storage, bot_name: str) -> None:
    storage.init(bot_name)

    with pytest.raises(InvalidInput, match="encryption_keys"):
        storage.rotate_keys(bot_name)
