"""Verification: whether what a store holds is what shards of a bot have written there.

Nothing is written, no ownership is taken, and no actor is needed; one may run, and notices nothing. Keys and
values are looked through without importing the classes of those that are objects.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import msgspec

from fsm_ray.codec import check_key, slot_of
from fsm_ray.errors import FsmRayError, InvalidInput, StoreCorrupted, StoreMismatch
from fsm_ray.options import SLOTS, check_bot_name
from fsm_ray.record import check_blob, front_of
from fsm_ray.stores.base import Inspectable, Place, Row, decode_answered
from fsm_ray.stores.by_url import inspectable
from fsm_ray.stores.owner import FORMAT, Owner, decode_owner

_MAX_FINDINGS = 100
"""Of one shard that are told one by one."""

_UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


@dataclass(frozen=True)
class Finding:
    """Something that should not be so."""

    where: str
    problem: str


@dataclass
class ShardReport:
    """What one shard's store holds."""

    bot_name: str
    shard: int
    owner: Owner | None = None
    version: int | None = None
    records: int = 0
    sessions: int = 0
    findings: list[Finding] = field(default_factory=list)
    more_findings: int = 0
    """Beyond those that are told one by one."""

    def find(self, where: str, problem: str) -> None:
        """Add a finding."""
        if len(self.findings) < _MAX_FINDINGS:
            self.findings.append(Finding(where, problem))
        else:
            self.more_findings += 1


async def verify(url: str, bot_name: str | None = None) -> AsyncGenerator[ShardReport, None]:
    """Look through the store of each shard at the URL, of one bot or of all.

    Raises:
        InvalidInput: the URL's store keeps nothing, or cannot tell which bots it has.
        InvalidOptions, InvalidBotName: the URL, or the name, is none.
        MissingExtra: the store's driver is not installed here.
        StoreUnavailable: it cannot be reached.
    """
    kind = inspectable(url)
    if bot_name is None:
        for bot, places in itertools.groupby(await kind.places(url), key=lambda place: place[0]):
            async for report in _verify_bot(kind, url, bot, [shard for _, shard in places]):
                yield report
    else:
        check_bot_name(bot_name)
        async for report in _verify_bot(kind, url, bot_name, await _shards_of(kind, url, bot_name)):
            yield report


async def _shards_of(kind: Any, url: str, bot_name: str) -> list[int]:
    """The bot's shards; where the store cannot list them, those that the first one tells of."""
    try:
        return [shard for bot, shard in await kind.places(url) if bot == bot_name]
    except InvalidInput:
        first = await _verify_shard(_store(kind, url, bot_name, 0), bot_name, 0)
        return list(range(1 if first.owner is None else first.owner.shards))


async def _verify_bot(
    kind: Any, url: str, bot_name: str, shards: Iterable[int]
) -> AsyncGenerator[ShardReport, None]:
    """Look through these shards, and at what they say of each other."""
    count: int | None = None
    seen: set[int] = set()
    for shard in sorted(shards):
        report = await _verify_shard(_store(kind, url, bot_name, shard), bot_name, shard)
        if report.owner is not None:
            count = report.owner.shards if count is None else count
            if report.owner.shards != count:
                report.find("owner", f"it is one of {report.owner.shards} shards, and others of {count}")
        seen.add(shard)
        yield report
    for shard in range(count or 1):
        if shard not in seen:
            missing = ShardReport(bot_name, shard)
            missing.find("the whole shard", "there is nothing of it")
            yield missing


def _store(kind: Any, url: str, bot_name: str, shard: int) -> Inspectable:
    store: Inspectable = kind(Place(url=url, bot_name=bot_name, shard=shard, shards=1, lease_s=5.0))
    return store


async def _verify_shard(store: Inspectable, bot_name: str, shard: int) -> ShardReport:
    report = ShardReport(bot_name, shard)
    newest, newest_where, has_owner = 0, "", False
    try:
        async with aclosing(store.rows()) as rows:
            async for row in rows:
                version = _check(report, row)
                has_owner |= row.kind == "owner"
                if version > newest:
                    newest, newest_where = version, row.where
    except (StoreCorrupted, StoreMismatch) as error:
        report.find("the whole shard", str(error))
        return report
    if not has_owner:
        report.find("owner", "it has none")
    if report.version is None:
        report.find("version", "it has none, or none that can be read")
    elif newest > report.version:
        report.find(newest_where, f"its version, {newest}, is later than the shard's last, {report.version}")
    return report


def _check(report: ShardReport, row: Row) -> int:
    """Look at one row; the version of a record, else 0."""
    if row.kind == "record":
        return _check_record(report, row)
    if row.kind == "owner":
        _check_owner(report, row)
    elif row.kind == "session":
        _check_session(report, row)
    elif row.kind == "version":
        report.version = int.from_bytes(row.value, "big")
    else:
        report.find(row.where, "nothing of fsm_ray's is kept there")
    return 0


def _check_owner(report: ShardReport, row: Row) -> None:
    try:
        owner = decode_owner(row.value)
    except _UNREADABLE as error:
        report.find(row.where, f"the owner cannot be read: {error}")
        return
    report.owner = owner
    if (owner.format, owner.slots) != (FORMAT, SLOTS):
        report.find(
            row.where,
            f"it has format {owner.format} and {owner.slots} slots; this fsm_ray has {FORMAT} and {SLOTS}",
        )
    if (owner.bot_name, owner.shard) != (report.bot_name, report.shard):
        report.find(row.where, f"it is shard {owner.shard} of bot {owner.bot_name!r}")
    if not 0 <= owner.shard < owner.shards:
        report.find(row.where, f"it has number {owner.shard} of {owner.shards} shards")


def _check_session(report: ShardReport, row: Row) -> None:
    report.sessions += 1
    try:
        answered = decode_answered(row.value)
        _, number, _ = _decode_reply(answered.reply[4:])
    except _UNREADABLE as error:
        report.find(row.where, f"the session's last answer cannot be read: {error}")
        return
    if int.from_bytes(answered.reply[:4], "little") != len(answered.reply) - 4:
        report.find(row.where, "the session's last answer has not the length that it says")
    if number != answered.number:
        report.find(row.where, f"the answer to write {number} is kept as that to {answered.number}")


def _check_record(report: ShardReport, row: Row) -> int:
    """The record's version; 0 where it has none."""
    report.records += 1
    _check_place(report, row)
    try:
        check_blob(row.value)
    except _UNREADABLE as error:
        report.find(row.where, f"it is no record: {error}")
        return 0
    flow, state, version = front_of(row.value)
    if row.shown is not None and row.shown != (_shown(flow), _shown(state), version):
        report.find(row.where, f"beside {(flow, state, version)} in the blob, the columns have {row.shown}")
    return version


def _check_place(report: ShardReport, row: Row) -> None:
    try:
        check_key(row.key)
    except FsmRayError as error:
        report.find(row.where, str(error))
    slot = slot_of(row.key)
    if row.slot != slot:
        report.find(row.where, f"it lies in slot {row.slot}, and its key belongs to {slot}")
    elif report.owner is not None and slot * report.owner.shards // SLOTS != report.shard:
        belongs = slot * report.owner.shards // SLOTS
        report.find(row.where, f"its key belongs to shard {belongs} of {report.owner.shards}")


def _shown(text: str | None) -> str | None:
    """As a column that cannot hold NUL has it."""
    return None if text is None else text.replace("\x00", "\N{SYMBOL FOR NULL}")


_decode_reply = msgspec.msgpack.Decoder(tuple[int, int, Any]).decode
