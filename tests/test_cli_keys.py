"""`fsm-ray keys` and `fsm-ray rotate-keys`."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fsm_ray import State, Storage
from fsm_ray.cli import EXIT_USAGE, app
from fsm_ray.errors import EncryptionKeysUnusable
from fsm_ray.stores.keyring import read_keyring
from tests.conftest import DEADLINE_S, RayCluster

COMMAND = str(Path(sys.executable).with_name("fsm-ray"))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(each) for each in arguments])


def refusal_of(*arguments: object) -> str:
    error = run(*arguments).exception
    assert isinstance(error, EncryptionKeysUnusable)
    return str(error)


def test_a_new_key_file_is_made_and_the_option_that_names_it_is_printed(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"

    result = run("keys", "new", path)

    assert f'encryption_keys="file://{path}"' in result.stdout
    assert read_keyring(f"file://{path}").current == datetime.now(UTC).date().isoformat()


def test_a_key_is_added_under_its_id(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    run("keys", "new", path, "--id", "first")

    result = run("keys", "add", path, "--id", "second")

    assert "rotate-keys" in result.stdout
    keyring = read_keyring(f"file://{path}")
    assert (keyring.current, list(keyring.keys)) == ("second", ["first", "second"])


def test_json_names_the_key_and_the_option(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"

    for command in ("new", "add"):
        told = json.loads(run("keys", command, path, "--id", command, "--json").stdout)
        assert told == {"key_id": command, "encryption_keys": f"file://{path}"}


def test_no_key_is_printed(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"

    output = run("keys", "new", path).output + run("keys", "add", path, "--id", "second").output

    assert not any(encoded in output for encoded in json.loads(path.read_text())["keys"].values())


def test_a_key_file_that_is_there_is_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    run("keys", "new", path)
    before = path.read_bytes()

    assert "keys add" in refusal_of("keys", "new", path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("command", ["new", "add"])
def test_a_directory_that_is_not_there_is_told(tmp_path: Path, command: str) -> None:
    assert "nowhere" in refusal_of("keys", command, tmp_path / "nowhere" / "keys.json")


@pytest.mark.ray
def test_rotate_keys_waits_until_all_is_encrypted_with_the_current_key(
    cluster: RayCluster, bot_name: str, tmp_path: Path
) -> None:
    path = tmp_path / "keys.json"
    run("keys", "new", path, "--id", "first")
    with Storage(timeout_s=DEADLINE_S) as storage:
        storage.init(bot_name, store=f"rocksdb://{tmp_path}/store", encryption_keys=f"file://{path}")
        storage.set_many(bot_name, {key: State(state="kept") for key in range(500)})
    run("keys", "add", path, "--id", "second")

    begun = json.loads(run("rotate-keys", bot_name, "--no-wait", "--json").stdout)
    assert (begun["bot"], begun["key_id"]) == (bot_name, "second")
    assert begun["is_done"] == (begun["pending"] == 0)
    assert "All of" in run("rotate-keys", bot_name).stdout
    done = json.loads(run("rotate-keys", bot_name, "--json").stdout)
    assert done == {"bot": bot_name, "key_id": "second", "pending": 0, "is_done": True}


@pytest.mark.ray
@pytest.mark.slow
def test_a_bot_without_keys_is_told_in_a_line(cluster: RayCluster, bot_name: str) -> None:
    with Storage(timeout_s=DEADLINE_S) as storage:
        storage.init(bot_name, shards=2)
    # Ray prints what became of answers that nobody fetched as the process ends.
    result = subprocess.run(
        [COMMAND, "rotate-keys", bot_name, "--address", cluster.address],
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_S,
    )

    assert (result.returncode, result.stderr.count("\n")) == (EXIT_USAGE, 1)
    assert result.stderr.startswith("fsm-ray: ")
