"""Looks: what is found on nodes, by tasks that look around there and change nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

_NODE_PATIENCE_S = 30.0


class Check(NamedTuple):
    """What was found."""

    name: str
    outcome: Literal["ok", "hint", "problem"]
    told: str
    cure: str = ""


def ask(node_id: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns on that node, or the error that it did not."""
    strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
    options = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": strategy}
    task: Any = ray.remote(function).options(**options)
    try:
        return ray.get(task.remote(*arguments), timeout=_NODE_PATIENCE_S)
    except RayError as error:
        return error


def look_around() -> Callable[[], dict[str, Any]]:
    """Looks at the node's Python, fsm_ray, priority and directory of sockets."""

    # A function in a function travels by value: a node may have another fsm_ray, or none.
    def look() -> dict[str, Any]:
        import os
        import platform

        found: dict[str, Any] = {
            "python": platform.python_version(),
            "niceness": os.nice(0),
            "is_root": os.geteuid() == 0,
            "fsm_ray": None,
            "socket_error": "",
        }
        try:
            import fsm_ray
            from fsm_ray.channel.server import MAX_UNIX_PATH_BYTES, socket_directory
            from fsm_ray.protocol import PROTOCOL_VERSION
        except ImportError as error:
            return found | {"error": str(error)}
        found |= {"fsm_ray": fsm_ray.__version__, "protocol": PROTOCOL_VERSION, "sockets": ""}
        try:
            sockets = socket_directory()
        except Exception as error:  # noqa: BLE001  # told, whatever it is
            cure = "mend it; or give TMPDIR a directory that Ray's user can write, and start Ray again"
            return found | {"socket_error": str(error), "socket_cure": cure}
        if len(os.fsencode(sockets)) + 1 + 24 > MAX_UNIX_PATH_BYTES:
            return found | {
                "socket_error": f"{sockets} is too long a path for sockets",
                "socket_cure": "set TMPDIR to a shorter directory, and start Ray again",
            }
        return found | {"sockets": str(sockets)}

    return look


def tell_time() -> Callable[[], float]:
    """Tells the time of the node's clock."""

    def tell() -> float:
        import time

        return time.time()

    return tell


def reach_store() -> Callable[..., str]:
    """Tells what keeps a shard there from its store."""

    def reach(url: str, bot_name: str = "-", shard: int = 0) -> str:
        """What keeps a shard there from its store at the URL; nothing if nothing does. It is read alone."""
        import asyncio
        import os
        from pathlib import Path

        from fsm_ray.errors import FsmRayError, StoreMismatch
        from fsm_ray.stores.base import Place
        from fsm_ray.stores.by_url import inspectable

        async def read() -> None:
            place = Place(url=url, bot_name=bot_name, shard=shard, shards=shard + 1, lease_s=5.0)
            async for _ in inspectable(url)(place).rows():
                return

        try:
            if not url.startswith("rocksdb://"):
                asyncio.run(read())
                return ""
            inspectable(url)
        except StoreMismatch:
            return ""  # a database that no bot has used yet
        except FsmRayError as error:
            return str(error)
        directory = Path(url.partition("://")[2])
        there = next(path for path in (directory, *directory.parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            return f"{there} is no directory that Ray's user can write"
        return ""

    return reach


def line(error: Exception) -> str:
    """The error in one line; of a task's, the last, which has what went wrong."""
    lines = str(error).strip().splitlines() or [repr(error)]
    return f"{type(error).__name__}: {lines[-1].strip()}"
