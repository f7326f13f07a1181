"""The echo server as a process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fsm_ray.bench import echo_server
from fsm_ray.bench.servers.process import ServerProcess


@contextmanager
def echo_process(directory: Path) -> Iterator[str]:
    """Run the echo server; the value is the path of its socket."""
    path = directory / "echo.sock"
    # -P: the script's folder must not come first on the path, its file names are not meant for `import`.
    with ServerProcess([sys.executable, "-P", str(echo_server.__file__), str(path)], path):
        yield str(path)
