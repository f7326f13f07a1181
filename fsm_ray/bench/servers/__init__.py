"""Real servers, for benchmarks and tests: each a process of its own that listens on a Unix socket.

A Unix socket is the fastest way that the peers offer; over TCP on 127.0.0.1 every one of them is slower.
"""

from __future__ import annotations

from fsm_ray.bench.servers.echo import echo_process
from fsm_ray.bench.servers.postgres import PostgresServer
from fsm_ray.bench.servers.process import ServerProcess, temporary_directory
from fsm_ray.bench.servers.valkey import ValkeyServer

__all__ = ["PostgresServer", "ServerProcess", "ValkeyServer", "echo_process", "temporary_directory"]
