"""How the command ends where stdout takes nothing, or not all characters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fsm_ray import cli

COMMAND = str(Path(sys.executable).with_name("fsm-ray"))

pytestmark = pytest.mark.slow


def run(*arguments: str, to: str = "", **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Runs the command in a shell, with stdout going where `to` says."""
    return subprocess.run(
        ["bash", "-c", f'"$0" "$@" {to}', COMMAND, *arguments],
        capture_output=True,
        check=False,
        timeout=60,
        env=os.environ | environment,
    )


@pytest.fixture
def store(tmp_path: Path) -> str:
    """A store with damage: a shard without anything, of a bot whose name is none."""
    (tmp_path / "Zo\u00eb \u20ac \U0001f600" / "0").mkdir(parents=True)
    return f"rocksdb://{tmp_path}"


COMMANDS = [("--help",), ("verify", "STORE"), ("doctor", "--address", "127.0.0.1:9"), ("bench", "--help")]


def with_store(command: tuple[str, ...], store: str) -> list[str]:
    return [store if each == "STORE" else each for each in command]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_is_told_in_a_line(command: tuple[str, ...], store: str) -> None:
    result = run(*with_store(command, store), to="> /dev/full")

    assert (result.returncode, result.stderr) == (
        cli.EXIT_FAILED,
        b"fsm-ray: stdout cannot be written: No space left on device\n",
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_a_closed_stdout_is_told_in_a_line(command: tuple[str, ...], store: str) -> None:
    result = run(*with_store(command, store), to=">&-")

    assert (result.returncode, result.stderr) == (
        cli.EXIT_USAGE,
        b"fsm-ray: stdout is closed: send it to /dev/null, if nobody is to read it\n",
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_a_pipe_that_nobody_reads_ends_it_quietly_and_is_no_damage(
    command: tuple[str, ...], store: str
) -> None:
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run(
        [COMMAND, *with_store(command, store)], stdout=write, stderr=subprocess.PIPE, check=False, timeout=60
    )
    os.close(write)

    assert (result.returncode, result.stderr) == (cli.EXIT_UNREAD, b"")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_characters_that_stdout_has_not_are_escaped_as_in_json(store: str, encoding: str) -> None:
    result = run("verify", store, "--json", PYTHONIOENCODING=encoding)

    assert (result.returncode, result.stderr) == (cli.EXIT_FAILED, b"")
    # ASCII is taken for a locale that nobody chose: click writes UTF-8 then.
    out = result.stdout.decode("utf-8" if encoding == "ascii" else encoding)
    assert json.loads(out)["bot"] == "Zo\u00eb \u20ac \U0001f600"
