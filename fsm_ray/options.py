"""BotOptions: everything that can be chosen for one bot, in one place.

The first `init` of a bot fixes its options; a later `init` must give the same ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fsm_ray.errors import InvalidBotName, InvalidOptions

SLOTS = 4096
"""Slots that a bot's keys fall into; shards own ranges of slots, so no bot has more shards than this."""

STORE_SCHEMES = ("memory", "rocksdb", "redis", "rediss", "unix", "postgresql", "s3", "gs", "az", "file")

_PATH_SCHEMES = ("rocksdb", "file", "unix")

_BOT_NAME = re.compile(r"[A-Za-z0-9_@][A-Za-z0-9_.@-]{0,63}", re.ASCII)


_KEYS = re.compile(r"file:///[^\0]+|env:[A-Za-z_][A-Za-z0-9_]*", re.ASCII)

HEAD_NODE = "node:__internal_head__"
"""The resource that Ray gives to the head node."""


class BotOptions(BaseModel):
    """How one bot's conversations are kept.

    Examples:
        >>> BotOptions(shards=4).store
        'memory://'
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)

    store: str = "memory://"
    """Where records are kept, as a URL.

    `memory://`: in the actors, for as long as they live. `rocksdb:///dir`: on the disk of one node.
    `redis://`, `rediss://`, `unix:///socket` (of Redis),
    `postgresql://`: on a server. `s3://`, `gs://`, `az://`, `file:///dir`: in an
    object store, or a directory that all nodes share.
    """

    shards: int = Field(default=1, ge=1, le=SLOTS)
    """Named actors that share the bot's conversations; each serves about one core's worth of operations."""

    ttl_s: float | None = Field(default=None, gt=0, le=1e10)
    """How long a conversation lives, in seconds, if neither its state nor a write says; None: for ever."""

    ttl_mode: Literal["idle", "absolute"] = "idle"
    """What a time to live counts from.

    "idle": the last write or turn. "absolute": when the conversation began, or entered its state, or a write
    gave the time to live.
    """

    state_ttl_s: dict[str, Annotated[float, Field(gt=0, le=1e10)]] = Field(default_factory=dict)
    """How long a conversation lives in a state, by `"state"` or `"flow:state"`, in seconds."""

    max_record_bytes: int = Field(default=1 << 20, ge=256, le=16 << 20)
    """The largest record, encoded: flow, state and data together."""

    allow_pickle: bool = True
    """Whether values that only pickle can carry are accepted; if not, none is written and none is decoded.

    Dataclasses, Enums, named tuples and pydantic models are no such values: what is stored names their class,
    and whoever reads it imports that.
    """

    listen_host: str | None = None
    """Where shards listen for workers of other nodes; `None`: the address that Ray uses for the node.

    `"0.0.0.0"` or `"::"`: everywhere; workers connect to the address that Ray uses.
    """

    ownership_lease_s: float = Field(default=5.0, ge=0.2, le=300.0)
    """For how long a shard answers reads without hearing from a store that others could open.

    A shard that takes over from one on another node waits for as long before it answers. Stores that only one
    process can open (`memory://`, `rocksdb://`) need no lease.
    """

    node_resource: str | None = None
    """The Ray resource of the node that has the directory of a `rocksdb://` store; None: the head node.

    `"node:10.0.0.7"` names a node by its address. Shards start there and nowhere else.
    """

    encryption_keys: str | None = None
    """Where shards find the keys to encrypt their store with: `file:///path` or `env:NAME`; None: plain text.

    The keys themselves are no option: each shard reads them on its own node. See `stores.keyring`.
    """

    def __setstate__(self, state: dict[Any, Any]) -> None:
        """Load what another version pickled: options that it did not know have their defaults.

        Those that this version does not know stay with it, unseen, and travel on when it is pickled.
        """
        known = {
            name: field.get_default(call_default_factory=True)
            for name, field in self.__pydantic_fields__.items()
        }
        super().__setstate__(state | {"__dict__": known | state["__dict__"]})

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        """What `repr` and `str` show: of the store's URL no password."""
        for name, value in super().__repr_args__():
            yield name, redacted(value) if name == "store" else value

    @property
    def store_scheme(self) -> str:
        """The kind of store, as its URL names it."""
        return self.store.partition("://")[0]

    @property
    def store_node(self) -> str | None:
        """The Ray resource of the one node on which the store can be opened; None: any node can."""
        return (self.node_resource or HEAD_NODE) if self.store_scheme == "rocksdb" else None

    @field_validator("store")
    @classmethod
    def _store_is_known(cls, store: str) -> str:
        scheme, separator, rest = store.partition("://")
        if not separator or scheme not in STORE_SCHEMES:
            known = ", ".join(f"{name}://" for name in STORE_SCHEMES)
            raise ValueError(
                f"no store is known for {redacted(store)!r}; a store is a URL of one of: {known}"
            )
        if scheme in _PATH_SCHEMES and not (rest.startswith("/") and rest.strip("/")):
            raise ValueError(f"{redacted(store)!r}: give an absolute path, {scheme}:///path/to/it")
        return store

    @field_validator("encryption_keys")
    @classmethod
    def _keys_are_elsewhere(cls, where: str | None) -> str | None:
        # What was given is not in the message: it may be a key.
        if where is not None and _KEYS.fullmatch(where) is None:
            raise ValueError("say where the keys are: file:///absolute/path or env:NAME_OF_VARIABLE")
        return where

    @model_validator(mode="after")
    def _encrypted_is_stored(self) -> Self:
        if self.encryption_keys is not None and self.store_scheme == "memory":
            raise ValueError("encryption_keys encrypts a store, and memory:// has none: give one, or no keys")
        return self


def redacted(url: str) -> str:
    """The URL for people to read: without its password, and without what follows a question mark."""
    # Greedy, and first: a password may hold a slash, an @ or a question mark that should have been escaped.
    return re.sub(r"(?<=://)([^/@:?]*):.*@", r"\1:***@", url).partition("?")[0]


def whereabouts(options: BotOptions) -> str:
    """What to add where a shard is missed: on which node its records are, if they are on one alone."""
    resource = options.store_node
    if resource is None:
        return ""
    node = "Ray's head node" if resource == HEAD_NODE else f"the node with the Ray resource {resource!r}"
    directory = options.store.partition("://")[2]
    return f"; its records lie in {directory} on {node}, and it runs there alone"


def make_options(options: BotOptions | None, changes: dict[str, Any]) -> BotOptions:
    """The options that `init(bot, options, **changes)` means.

    Raises:
        InvalidOptions: an option is unknown or has a value it cannot have.
    """
    if options is not None and not isinstance(options, BotOptions):
        raise InvalidOptions(f"options must be a BotOptions, not {type(options).__name__}")
    try:
        return BotOptions(**({} if options is None else dict(options)) | changes)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise InvalidOptions(f"options of init: {faults}") from error


def check_bot_name(bot_name: object) -> str:
    """Return the name if a bot can have it: it becomes part of actor names, file names and metric labels.

    Raises:
        InvalidBotName: it is not 1 to 64 letters, digits or `_ . @ -`, or begins with `.` or `-`.
    """
    if type(bot_name) is str and _BOT_NAME.fullmatch(bot_name):
        return bot_name
    raise InvalidBotName(
        f"bot name {bot_name!r}: a bot's name is a str of 1 to 64 letters, digits or _ . @ - "
        "that does not begin with . or -",
        bot=bot_name,
    )
