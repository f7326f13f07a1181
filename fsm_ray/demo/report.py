"""Report: what came out of a run, and whether it is what one worker alone arrives at."""

from __future__ import annotations

import json
import reprlib
from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from fsm_ray.state import State

NO_RECORD = "no record"


@dataclass(frozen=True)
class Difference:
    """A conversation whose record is not what it must be; None: there is no record."""

    key: Hashable
    expected: State | None
    found: State | None

    def __str__(self) -> str:
        if self.expected is None or self.found is None:
            return f"{self.key}: {_told(self.found)}, expected {_told(self.expected)}"
        found, expected = _facts(self.found), _facts(self.expected)
        names = [name for name in {**expected, **found} if found.get(name) != expected.get(name)]
        return f"{self.key}: " + "; ".join(
            f"{name} {reprlib.repr(found.get(name))}, expected {reprlib.repr(expected.get(name))}"
            for name in names
        )


@dataclass(frozen=True, kw_only=True)
class Report:
    """What came out of a run."""

    bot_name: str
    updates: int
    conversations: int
    workers: int
    processes: int
    """How many processes handled something: Ray may start others, as when one was lost."""
    shards: int
    nodes: int
    handovers: int
    """How often a conversation was continued by another process than the one before."""
    lost_workers: int
    failed_updates: int
    """How many updates the bot's handlers failed over."""
    seconds: float
    """How long the workers took; starting them is not counted."""
    reference_seconds: float
    """How long the one worker took."""
    states: dict[str, int]
    """State, or "no record", -> number of conversations."""
    differences: tuple[Difference, ...]
    stray_records: int
    """Records of no conversation of the updates."""
    restarted_empty: tuple[int, ...]
    """Shards whose actor was killed, and came back without the records it had in memory."""

    @property
    def agrees(self) -> bool:
        """Whether every conversation is what it must be, and nothing went wrong on the way."""
        return not (self.differences or self.stray_records or self.restarted_empty or self.failed_updates)

    @property
    def updates_per_s(self) -> float:
        return self.updates / self.seconds


def to_json(report: Report) -> str:
    """Everything of the report, and whether it agrees, in one line."""
    facts = {field.name: getattr(report, field.name) for field in fields(report)}
    facts |= {"differences": [str(each) for each in report.differences], "agrees": report.agrees}
    return json.dumps(facts)


def find_differences(
    expected: Mapping[Hashable, State], found: Mapping[Hashable, State]
) -> tuple[Difference, ...]:
    """The conversations whose records are not the same."""
    keys = dict.fromkeys((*expected, *found))
    pairs = ((key, expected.get(key), found.get(key)) for key in keys)
    return tuple(Difference(key, *records) for key, *records in pairs if records[0] != records[1])


def count_states(keys: set[Hashable], records: Mapping[Hashable, State]) -> dict[str, int]:
    """How many of the conversations stand in each state."""
    return dict(Counter(records[key].state or "no state" if key in records else NO_RECORD for key in keys))


def _told(record: State | None) -> str:
    return NO_RECORD if record is None else f"{record.state} with {', '.join(record.data) or 'no data'}"


def _facts(record: State) -> dict[str, Any]:
    return {"state": record.state} | {f"data[{name!r}]": value for name, value in record.data.items()}
