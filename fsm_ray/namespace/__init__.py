"""Namespace: one shard's records, and all that is done with them; it knows neither Ray nor sockets.

`serving` takes requests, commits and answers; `evaluation` says what each operation does; `leases` and
`turns` have conversations used by one worker at a time; `events` writes the log; `expiry`, `scans` and
`watches` are what their names say.
"""

from __future__ import annotations

from fsm_ray.namespace.serving import (
    Answer,
    MalformedRequest,
    Namespace,
    NamespaceStatistics,
    NotServing,
    RequestRefused,
)

__all__ = [
    "Answer",
    "MalformedRequest",
    "Namespace",
    "NamespaceStatistics",
    "NotServing",
    "RequestRefused",
]
