"""The store that a bot's options name by URL. Drivers are imported only when a bot uses them."""

from __future__ import annotations

import importlib
from typing import Any

from fsm_ray.errors import InvalidInput, MissingExtra
from fsm_ray.options import BotOptions, make_options
from fsm_ray.stores.base import Inspectable, OwnedStore, Place, Store
from fsm_ray.stores.keyring import read_keyring
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
        MissingExtra: its driver is not installed, or what encrypts.
    """
    scheme = options.store_scheme
    if scheme not in _KINDS:
        return MemoryStore()
    where = options.encryption_keys
    store: OwnedStore = _class_of(scheme, bot_name)(
        Place(
            url=options.store,
            bot_name=bot_name,
            shard=shard,
            shards=options.shards,
            lease_s=options.ownership_lease_s,
            is_encrypted=where is not None,
        )
    )
    if where is None:
        return store
    encrypted: Store = _encrypted(bot_name).EncryptedStore(store, where)
    return encrypted


def make_opener(where: str, bot_name: str, shard: int) -> Any:
    """The `encrypted.Opener` of one shard's store, with the keys that `BotOptions.encryption_keys` names.

    Raises:
        EncryptionKeysUnusable: they cannot be read.
        MissingExtra: what decrypts is not installed.
    """
    module = _encrypted(bot_name)
    return module.Opener(module.Cipher(read_keyring(where)), bot_name, shard)


def inspectable(url: str, encryption_keys: str | None = None) -> Any:
    """The class of the URL's store, a `Store` that is `Inspectable`.

    Raises:
        InvalidOptions: it is no URL of a store, or keys cannot be there.
        InvalidInput: there is nothing to inspect.
        MissingExtra: its driver is not installed.
    """
    scheme = make_options(None, {"store": url, "encryption_keys": encryption_keys}).store_scheme
    if scheme not in _KINDS:
        raise InvalidInput("a memory:// store keeps nothing that could be looked at")
    kind = _class_of(scheme, None)
    assert issubclass(kind, Inspectable)  # noqa: S101  # for every one in the table above
    return kind


def _class_of(scheme: str, bot_name: str | None) -> Any:
    module, name = _KINDS[scheme]
    try:
        return getattr(importlib.import_module(f"fsm_ray.stores.{module}"), name)
    except ImportError as error:
        raise MissingExtra(
            f"a {scheme}:// store needs {error.name}, which cannot be imported where the bot's actors run: "
            f"pip install 'fsm-ray[{module}]' on all nodes",
            bot=bot_name,
        ) from error


def _encrypted(bot_name: str) -> Any:
    try:
        return importlib.import_module("fsm_ray.stores.encrypted")
    except ImportError as error:
        raise MissingExtra(
            f"encryption_keys needs {error.name}, which cannot be imported where the bot's actors run: "
            "pip install 'fsm-ray[encryption]' on all nodes",
            bot=bot_name,
        ) from error
