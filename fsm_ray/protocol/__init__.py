"""The operations on a shard, and the frames that carry them.

Everything is msgpack. A client encodes each operation when it is called and joins those that wait into one
request, so the writers here build bytes; the structs are what the other side decodes.
"""

from __future__ import annotations

from fsm_ray.protocol.replies import *  # noqa: F403
from fsm_ray.protocol.requests import *  # noqa: F403

PROTOCOL_VERSION = 4
"""Raised whenever a frame, an operation or the handshake changes its meaning."""
