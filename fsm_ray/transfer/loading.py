"""Loading: conversations from any source into a bot, many at a time, each by a write of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Hashable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from fsm_ray.errors import InvalidInput, VersionConflict
from fsm_ray.state import State
from fsm_ray.storage import AsyncStorage

_REASON_LENGTH = 300
"""Characters of what was wrong with a conversation that are kept: it may cite all of it."""

_BATCH = 256
"""Conversations that are written at the same time; they travel and are committed together."""

Progress = Callable[[int, int | None], None]
"""Told how many conversations were gone through, and of how many, where that is known."""


class Arrival(NamedTuple):
    """A conversation that a source has."""

    source: str
    """Where in the source it is: a line, a key."""
    key: Hashable
    state: State
    ttl_s: float | None = None


class Refusal(NamedTuple):
    """What was left out, and why."""

    source: str
    """Where in the source it is: a line, a key."""
    reason: str
    """Why it was left out."""


def refusal(source: str, error: Exception) -> Refusal:
    """What was left out because of this error, told in short."""
    return Refusal(
        *(
            f"{text[:_REASON_LENGTH]}..." if len(text) > _REASON_LENGTH else text
            for text in (source, str(error))
        )
    )


@dataclass
class Report:
    """What became of the conversations."""

    written: int = 0
    """They are in the bot, or in the file, now."""
    skipped: int = 0
    """There was a record already, or the conversation has ended."""
    refused: list[Refusal] = field(default_factory=list)
    """What was left out, and why."""

    @property
    def total(self) -> int:
        """How many conversations there were."""
        return self.written + self.skipped + len(self.refused)


def no_progress(done: int, total: int | None) -> None:
    """Tell nobody."""


async def load(
    storage: AsyncStorage,
    bot_name: str,
    source: AsyncIterator[Arrival | Refusal | None],
    *,
    overwrite: bool,
    progress: Progress | None,
) -> Report:
    """Write what the source has; None of it is a conversation that has ended.

    A conversation that cannot be written does not keep others from it.

    Raises:
        UnknownBot, NamespaceUnavailable: some were written; to be called again.
    """
    report, tell = Report(), progress or no_progress
    batch: list[Arrival] = []
    async for each in source:
        if each is None:
            report.skipped += 1
        elif isinstance(each, Refusal):
            report.refused.append(each)
        else:
            batch.append(each)
        if len(batch) == _BATCH:
            await _write(storage, bot_name, batch, report, overwrite=overwrite)
            tell(report.total, None)
            batch.clear()
    await _write(storage, bot_name, batch, report, overwrite=overwrite)
    tell(report.total, report.total)
    return report


async def _write(
    storage: AsyncStorage, bot_name: str, batch: list[Arrival], report: Report, *, overwrite: bool
) -> None:
    expected_version = None if overwrite else 0
    outcomes = await asyncio.gather(
        *(_write_one(storage, bot_name, each, expected_version) for each in batch), return_exceptions=True
    )
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
        if isinstance(outcome, Refusal):
            report.refused.append(outcome)
        elif outcome == "written":
            report.written += 1
        else:
            report.skipped += 1


async def _write_one(
    storage: AsyncStorage, bot_name: str, arrival: Arrival, expected_version: int | None
) -> Literal["written", "skipped"] | Refusal:
    try:
        await storage.set_state(
            bot_name, arrival.key, arrival.state, expected_version=expected_version, ttl_s=arrival.ttl_s
        )
    except VersionConflict:
        return "skipped"
    except InvalidInput as error:
        return refusal(arrival.source, error)
    return "written"
