"""DemoConfig: what one run of the demo does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What to run; the defaults are those of `fsm-ray demo`."""

    updates: int = 3_000
    """How many to make."""
    seed: int = 1
    """What they are made from."""
    file: Path | None = None
    """Where to read updates instead, as JSON, one a line."""
    workers: int = 4
    shards: int = 2
    address: str | None = None
    """Of the Ray to attach to; None: the one on this machine, or a new one; "local": a new one."""
    store: str | None = None
    """Where records are kept, see `BotOptions.store`; None: in a RocksDB that is removed in the end."""
    keep: bool = False
    """Whether to leave the bot on a Ray that was there before."""
