"""The disk below the durable stores: synced writes cost what it makes them cost."""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

from fsm_ray.bench.results import Disk
from fsm_ray.bench.servers import temporary_directory

_IN_MEMORY = ("tmpfs", "ramfs")
_SYNCS = 200
_BLOCK = bytes(4096)


@contextmanager
def disk_directory() -> Iterator[Path]:
    """A directory of our own, removed at the end; on a disk, if the machine has one where we may write."""
    writable = (place for place in _places() if os.access(place, os.W_OK))
    on_disk = (place for place in writable if filesystem_of(place) not in _IN_MEMORY)
    with temporary_directory(next(on_disk, None)) as directory:
        yield directory


def filesystem_of(path: Path) -> str:
    """The type of the file system that the path lies on, such as ext4. Linux only."""
    mounts = Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()
    types = {Path(point): kind for _, point, kind, *_ in map(str.split, mounts)}
    whole = path.resolve()
    return next(types[place] for place in (whole, *whole.parents) if place in types)


def look_at_disk() -> Disk:
    """Append 4 KiB and sync them, again and again, where the durable stores are going to write."""
    with disk_directory() as directory, (directory / "appended").open("wb", buffering=0) as file:
        samples = []
        for _ in range(_SYNCS):
            file.write(_BLOCK)
            started = perf_counter()
            os.fdatasync(file.fileno())
            samples.append(perf_counter() - started)
        return Disk(filesystem_of(directory), 1e6 * statistics.median(samples))


def _places() -> tuple[Path, ...]:
    return Path(tempfile.gettempdir()), Path("/var/tmp"), Path.cwd()  # noqa: S108 - a place for directories
