"""The limit: what is left of the way when there is nothing to do at its end.

The same client half, with its lanes and frames, to a bare server that sends each frame back unread.
Nothing is encoded, evaluated, kept or decoded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any, cast

from fsm_ray import protocol
from fsm_ray.bench.contender import Contender
from fsm_ray.bench.workload import CHANGED_FIELD, Workload
from fsm_ray.channel.frames import FrameProtocol
from fsm_ray.codec import encode_data, encode_key
from fsm_ray.errors import FsmRayError, NamespaceUnavailable
from fsm_ray.protocol import MAX_FRAME_BYTES, READ_CONTENT, WRITE
from fsm_ray.routing.lanes import Lane

_TIMEOUT_S = 60.0

Key = tuple[bytes, bytes]
"""A read and an update of one conversation, encoded before the clock starts."""


class EchoClient(FrameProtocol):
    """Two lanes over a connection on which every request comes back as it was sent."""

    max_frame_bytes = MAX_FRAME_BYTES

    def __init__(self) -> None:
        super().__init__()
        self.lanes = {
            kind: Lane(kind, _TIMEOUT_S, self._give_up, _unavailable) for kind in (WRITE, READ_CONTENT)
        }

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        for lane in self.lanes.values():
            lane.connected(self)

    def connection_lost(self, _error: Exception | None) -> None:
        for lane in self.lanes.values():
            lane.close()
        self._give_up()

    def frame_received(self, body: bytes) -> None:
        lane = self.lanes[body[1]]
        number, operations = lane.request_under_way
        lane.answered(number, [None] * operations)

    def _give_up(self) -> None:
        """Fail what waits; the connection is gone, and this client makes no other."""
        for lane in self.lanes.values():
            lane.fail(_unavailable)

    def malformed(self, error: Exception) -> None:
        raise error

    def send(self, request: bytes) -> None:
        self._transport.write(request)

    def close(self) -> None:
        self._transport.close()


def _unavailable(**_: object) -> FsmRayError:
    return NamespaceUnavailable("the echo server is gone")


class Echo(Contender[Key]):
    name = "echo"
    label = "the limit: the same frames, echoed by a bare server"

    def open(self) -> None:
        self._client = self.surroundings.run(_connect(self.surroundings.echo_socket))
        self._submit_read = self._client.lanes[READ_CONTENT].submit
        self._submit_update = self._client.lanes[WRITE].submit

    def close(self) -> None:
        self.surroundings.run(_close(self._client))

    def make_key(self, user: int) -> Key:
        key = encode_key((user, user))
        changes = encode_data({CHANGED_FIELD: 1_000}, allow_pickle=False)
        return protocol.read(key), protocol.update_data(key, changes, None)

    def load(self, users: Iterable[int]) -> None:
        """Nothing is kept at the other end."""

    def get_data(self, key: Key) -> Any:
        return self._submit_read(key[0])

    def update_data(self, key: Key, changes: Mapping[str, Any]) -> Any:
        del changes  # they are in the key
        return self._submit_update(key[1])

    def verify(self, workload: Workload[Key]) -> int:
        """Count the keys: there is no data at the other end."""
        return sum(1 for _ in workload.expectations())


async def _connect(socket_path: str) -> EchoClient:
    _, client = await asyncio.get_running_loop().create_unix_connection(EchoClient, socket_path)
    return client


async def _close(client: EchoClient) -> None:
    client.close()
    await asyncio.sleep(0)  # the loop closes the socket in its next turn
