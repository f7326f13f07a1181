"""The store that a bot's options name by URL. Drivers are imported only when a bot uses them."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from fsm_ray.errors import MissingExtra
from fsm_ray.options import BotOptions
from fsm_ray.stores.base import Place, Store
from fsm_ray.stores.memory import MemoryStore

_KINDS = {
    "rocksdb": ("rocksdb", "RocksDBStore"),
    "redis": ("redis", "RedisStore"),
    "rediss": ("redis", "RedisStore"),
    "unix": ("redis", "RedisStore"),
    "postgresql": ("postgres", "PostgresStore"),
    "s3": ("objectstore", "ObjectStore"),
    "gs": ("objectstore", "ObjectStore"),
    "az": ("objectstore", "ObjectStore"),
    "file": ("objectstore", "ObjectStore"),
}
"""Scheme -> module in this folder, which is also the name of the extra, and class."""


def make_store(bot_name: str, shard: int, options: BotOptions) -> Store:
    """The store of one shard, not opened yet.

    Raises:
        MissingExtra: its driver is not installed.
    """
    scheme = options.store_scheme
    if scheme not in _KINDS:
        return MemoryStore()
    module, name = _KINDS[scheme]
    try:
        kind: Callable[[Place], Store] = getattr(importlib.import_module(f"fsm_ray.stores.{module}"), name)
    except ImportError as error:
        raise MissingExtra(
            f"a {scheme}:// store needs {error.name}, which cannot be imported where the bot's actors run: "
            f"pip install 'fsm-ray[{module}]' on all nodes",
            bot=bot_name,
        ) from error
    return kind(
        Place(
            url=options.store,
            bot_name=bot_name,
            shard=shard,
            shards=options.shards,
            lease_s=options.ownership_lease_s,
        )
    )
