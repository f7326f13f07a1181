"""ServerProcess: a server that can be stopped, killed, and started again over what it kept."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from fsm_ray.errors import ConfigurationError

_START_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 10.0


@contextmanager
def temporary_directory(parent: Path | None = None) -> Iterator[Path]:
    """A directory of our own, removed at the end; in the system's place for them, unless one is given."""
    with tempfile.TemporaryDirectory(prefix="fsm-ray-", dir=parent) as path:
        yield Path(path)


class ServerProcess:
    """One server. As a context manager it is started, and stopped in the end."""

    stop_signal = signal.SIGTERM
    """What makes it end in good order."""

    def __init__(self, command: list[str], socket_path: Path, user: str | None = None) -> None:
        """`user`: whom it runs as, where we are root and it refuses to be."""
        self.socket_path = socket_path
        self._command = command
        self._user = user
        self._log_path = socket_path.with_name(f"{socket_path.name}.log")
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        if self._process is None:
            raise ConfigurationError(f"{self._command[0]} does not run")
        return self._process.pid

    def start(self) -> None:
        """Start it, and wait until it listens.

        Raises:
            ConfigurationError: it does not; the message tells its last words.
        """
        # A process group of its own, for Ctrl-C in the terminal must stop us first. Not a session of its own:
        # Linux schedules sessions as groups (sched_autogroup), Ray's workers are in ours, and with Valkey
        # outside it the hiredis contender did half as many operations on a busy machine.
        with self._log_path.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 - ours
                self._command,
                stdout=log,
                stderr=log,
                process_group=0,
                user=self._user,
                extra_groups=[] if self._user else None,
                cwd="/",
            )
        try:
            self._wait_until_listening(self._process)
        except BaseException:
            self.kill()
            raise

    def stop(self) -> None:
        """End it in good order."""
        if self._process is None:
            return
        self._process.send_signal(self.stop_signal)
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def kill(self) -> None:
        """End it at once, by SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """Stop it in its tracks: it keeps its connections and answers nothing."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on after `pause`."""
        os.kill(self.pid, signal.SIGCONT)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def is_ready(self) -> bool:
        """Whether it answers."""
        # The file alone does not tell: it appears when the address is bound, before anyone listens.
        with socket.socket(socket.AF_UNIX) as probe:
            return self.socket_path.exists() and probe.connect_ex(str(self.socket_path)) == 0

    def _wait_until_listening(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not self.is_ready():
            if process.poll() is not None or time.monotonic() > deadline:
                said = self._log_path.read_text(errors="replace")[-500:].strip()
                raise ConfigurationError(
                    f"{process.args!r} does not listen on {self.socket_path}; it said: {said!r}"
                )
            time.sleep(0.02)
