"""A node that stands still, is given up by Ray, and wakes: its actor must not answer from what it remembers.

A script: `python -m tests.chaos_node`. It starts a Ray of two nodes that declares a silent one dead within
seconds, and freezes the node that has the bot's actor. The actor is not killed with its node's raylet, for
then the system ends it with its parent, and nobody is left to be wrong.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fsm_ray import BotOptions, State, Storage
from fsm_ray.actor import ACTOR_OPTIONS
from fsm_ray.bench.servers import ValkeyServer, temporary_directory
from fsm_ray.channel.client import BlockingConnection
from fsm_ray.hosting import ShardDescription
from fsm_ray.protocol import READ_RECORD, read_request, write_request

from .conftest import DEADLINE_S, eventually

BOT = "bot"
KEY = "chat"

SYSTEM_CONFIG = {
    "health_check_initial_delay_ms": 500,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 500,
    "health_check_failure_threshold": 4,
}


def main() -> None:
    """Say that all is as it must be, or raise."""
    with two_nodes() as node, temporary_directory() as directory, contextlib.ExitStack() as stack:
        server = stack.enter_context(ValkeyServer(directory, fsync="always"))
        options = BotOptions(store=server.url, listen_host="127.0.0.1", ownership_lease_s=0.5)
        raw_reader, raw_writer, faithful, fresh = (
            stack.enter_context(Storage(timeout_s=DEADLINE_S)) for _ in range(4)
        )
        old = make_bot_on(node, fresh, options)
        for storage in (raw_reader, raw_writer, faithful):
            storage.set_state(BOT, KEY, State(state="old"))
        to_read, to_write = connection_of(raw_reader), connection_of(raw_writer)
        raylet_pid = node.all_processes["raylet"][0].process.pid

        os.kill(raylet_pid, signal.SIGSTOP)
        os.kill(old.pid, signal.SIGSTOP)
        try:
            after = Storage(timeout_s=DEADLINE_S)
            written = after.set_state(BOT, KEY, State(state="new"))
            assert after.describe(BOT).shards[0].node_id != old.node_id
            to_read._socket.sendall(read_frame(raw_reader))
            to_write._socket.sendall(write_frame(raw_writer))
            os.kill(old.pid, signal.SIGCONT)

            assert reply_of(to_read) is None
            assert reply_of(to_write) is None
            seen = faithful.get_state(BOT, KEY)
            assert seen is not None
            assert (seen.state, seen.version) == ("new", written)
            assert faithful.update_data(BOT, KEY, {"n": 1}) == {"n": 1}
        finally:
            os.kill(raylet_pid, signal.SIGCONT)
        fresh.drop(BOT)
    print("all as it must be")  # noqa: T201


@contextlib.contextmanager
def two_nodes() -> Iterator[Any]:
    """A Ray of two nodes, this process on the first; the value is the other."""
    # No more processes than need be: Ray starts a worker for each CPU, and the bot's actors claim none.
    head = {
        "num_cpus": 0,
        "include_dashboard": False,
        "include_log_monitor": False,
        "no_monitor": True,
        "_system_config": SYSTEM_CONFIG,
    }
    nodes = Cluster(initialize_head=True, head_node_args=head)
    try:
        node = nodes.add_node(num_cpus=0)
        ray.init(address=nodes.address, log_to_driver=False)
        yield node
    finally:
        ray.shutdown()
        nodes.shutdown()


def make_bot_on(node: Any, storage: Storage, options: BotOptions) -> ShardDescription:
    """Make the bot on this node, but so that it may be restarted on another."""
    ACTOR_OPTIONS["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node.node_id, soft=True)

    def is_there() -> bool:
        # A node that Ray has just met may be passed over.
        storage.init(BOT, options)
        if storage.describe(BOT).shards[0].node_id == node.node_id:
            return True
        storage.drop(BOT)
        return False

    eventually(is_there, "the actor is on the node")
    return storage.describe(BOT).shards[0]


def connection_of(storage: Storage) -> BlockingConnection:
    connection = storage._bot(BOT).shards[0]._connection
    assert isinstance(connection, BlockingConnection)
    return connection


def read_frame(storage: Storage) -> bytes:
    _, operation = storage._bot(BOT).route.read(KEY)
    return read_request(READ_RECORD, 1, (operation,))


def write_frame(storage: Storage) -> bytes:
    _, operation = storage._bot(BOT).route.set_record(KEY, State(state="stale"), None)
    return write_request(1, (operation,), os.urandom(16), is_resend=False)


def reply_of(connection: BlockingConnection) -> bytes | None:
    """The reply that comes; None when the connection ends without one."""
    try:
        return connection._receive()
    except ConnectionResetError:
        return None


if __name__ == "__main__":
    main()
