"""A Ray that runs on this machine is found by processes that were told nothing about it."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import DEADLINE_S

ASKS = """
from fsm_ray import Storage
with Storage() as storage:
    storage.init("my_bot")
    print(storage.bots())
"""


def beside_python(name: str) -> str:
    """A command that is installed with the Python of the tests."""
    return str(Path(sys.executable).with_name(name))


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    """Of a user who has a token of Ray's, and set no variable for Ray."""
    home = Path(tempfile.mkdtemp(prefix="fsm"))  # the paths of Ray's sockets begin with it, and must be short
    token = home / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text(secrets.token_hex(32))
    others = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    yield others | {"HOME": str(home), "RAY_TMPDIR": str(home)}
    shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def started_ray(environment: dict[str, str]) -> Iterator[None]:
    """One that wants the token of this user, as Ray sets it up where there is one."""
    options = ("--head", "--port=0", "--num-cpus=1", "--include-dashboard=false", "--block")
    with subprocess.Popen(
        [beside_python("ray"), "start", *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as ray_start:
        assert ray_start.stdout is not None
        assert any(b"Ray runtime started" in line for line in ray_start.stdout)
        yield
        ray_start.kill()  # what it started ends with it


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("started_ray")
def test_a_ray_that_wants_a_token_is_attached_to_with_the_one_that_it_keeps_here(
    environment: dict[str, str],
) -> None:
    """Ray takes it by itself for the address "auto" alone."""

    def run(*command: str) -> str:
        ran = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False
        )
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    assert run(sys.executable, "-c", ASKS) == "['my_bot']\n"
    assert run(beside_python("fsm-ray"), "count", "my_bot") == "0\n"
