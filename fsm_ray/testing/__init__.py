"""Conformance kits: promises as pytest classes, for this project and for authors of parts of it.

A kit is a class with abstract fixtures; a test file subclasses it and supplies them. It states promises,
never policies: an optional ability is a class of its own. Needs pytest, pytest-asyncio and hypothesis.
"""

from __future__ import annotations

import pytest

# Before they are imported, so that their failed assertions tell what was compared, as those of test files do.
pytest.register_assert_rewrite("fsm_ray.testing.storage", "fsm_ray.testing.stores")

from fsm_ray.testing.storage import (  # noqa: E402
    AnyStorage,
    Blocking,
    BotsContract,
    ClosedStorageContract,
    StorageContract,
)
from fsm_ray.testing.stores import (  # noqa: E402
    ExclusiveStoreConformance,
    SharedStoreConformance,
    StoreConformance,
)
from fsm_ray.testing.writer import MakeStore  # noqa: E402

__all__ = [
    "AnyStorage",
    "Blocking",
    "BotsContract",
    "ClosedStorageContract",
    "ExclusiveStoreConformance",
    "MakeStore",
    "SharedStoreConformance",
    "StorageContract",
    "StoreConformance",
]
