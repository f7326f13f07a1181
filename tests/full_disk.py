"""A bot whose disk fills up, in a process that may mount one: `unshare --map-root-user --mount python ...`.

Prints what it saw, as JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ray

from fsm_ray import Storage
from fsm_ray.errors import NamespaceUnavailable

DISK_BYTES = 4 << 20
BALLAST_BYTES = 2 << 20
DEADLINE_S = 60.0


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="full_disk") as directory:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", directory], check=True, timeout=10
        )
        try:
            ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
            try:
                sys.stdout.write(json.dumps(fill_and_free(Path(directory))))
            finally:
                ray.shutdown()
        finally:
            subprocess.run(["umount", "--lazy", directory], check=True, timeout=10)


def fill_and_free(directory: Path) -> dict[str, object]:
    """Write until the disk is full, make room, and read what was acknowledged."""
    ballast = directory / "ballast"
    ballast.write_bytes(bytes(BALLAST_BYTES))
    with Storage(timeout_s=3) as storage:
        storage.init("my_bot", store=f"rocksdb://{directory}/bots")
        pid = storage.describe("my_bot").shards[0].pid
        acknowledged, told = 0, ""
        end_s = time.monotonic() + DEADLINE_S
        while not told and time.monotonic() < end_s:
            try:
                storage.set_data("my_bot", acknowledged, {"text": "x" * 1000})
            except NamespaceUnavailable as error:
                told = f"{type(error).__name__}: {error}"
            else:
                acknowledged += 1
        ballast.unlink()
    with Storage(timeout_s=DEADLINE_S) as storage:
        there = sum(storage.get_data("my_bot", key) is not None for key in range(acknowledged))
        storage.set_data("my_bot", "afterwards", {})
        same_process = storage.describe("my_bot").shards[0].pid == pid
        storage.drop("my_bot")
    return {
        "acknowledged": acknowledged,
        "told": told,
        "directory": str(directory),
        "there": there,
        "same_process": same_process,
    }


if __name__ == "__main__":
    main()
