"""Owner: who opened a store last, as the store itself says.

It is kept in the store as JSON, so that people can read it there.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from fsm_ray.options import SLOTS

FORMAT = 1
"""Raised when what a store keeps changes its form."""

ENCRYPTED_FORMAT = 2
"""The same, but for rows, records and replies, which are encrypted."""

NOBODY = ""
"""The process of an owner that closed its store."""


class Owner(msgspec.Struct, frozen=True, kw_only=True):
    """What is written into a store by whoever opens it."""

    epoch: int
    """Counts the owners. A commit is good only in the epoch that its owner took."""
    opening: str
    """Random: tells this opening of the store from every other, also by the same process."""
    process: str
    """See `this_process`."""
    lease_s: float
    """For how long this owner answers reads without asking the store again."""
    waits_s: float = 0.0
    """How long, from its opening, owners before it may still answer reads; 0 when it has waited that long.

    Whoever opens the store meanwhile must wait as long, even when this owner's process has ended.
    """
    bot_name: str
    shard: int
    shards: int
    slots: int = SLOTS
    format: int = FORMAT

    @property
    def is_over(self) -> bool:
        """Whether this owner certainly answers no more: it closed the store, or its process has ended."""
        return self.process == NOBODY or has_ended(self.process)


encode_owner = msgspec.json.Encoder().encode
decode_owner = msgspec.json.Decoder(Owner).decode


def this_process() -> str:
    """What tells this process from every other, on any machine, before and after."""
    return f"{_here()} {os.getpid()} {_started_at(os.getpid())}"


def has_ended(process: str) -> bool:
    """Whether that process is known to have ended; of another machine's, nothing is known."""
    here, pid, started_at = process.rsplit(" ", 2)
    return here == _here() and _started_at(int(pid)) != started_at


def _here() -> str:
    """This boot of this machine, and the namespace that its process ids are from."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot_id} {Path('/proc/self/ns/pid').readlink()}"


def _started_at(pid: int) -> str:
    """When the process started, in ticks since the boot; nothing when it has ended (see proc(5))."""
    try:
        # The second field is the command in parentheses, which may hold anything.
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if state in "ZX" else rest[18]
