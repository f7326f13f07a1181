"""Verification: whether what a store holds is what shards of a bot have written there.

Nothing is written, no ownership is taken, and no actor is needed; one may run, and notices nothing. Keys and
values are looked through without importing the classes of those that are objects. What is encrypted is opened
with its keys, or else looked at from outside: its form, and in which row it lies. No finding tells what is in
a record that was opened.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from fsm_ray.codec import check_key, slot_of
from fsm_ray.errors import EncryptionKeysUnusable, FsmRayError, InvalidInput, StoreCorrupted, StoreMismatch
from fsm_ray.options import SLOTS, check_bot_name
from fsm_ray.record import check_blob, front_of
from fsm_ray.stores.base import Answered, Inspectable, Place, Row, decode_answered
from fsm_ray.stores.by_url import inspectable, make_opener
from fsm_ray.stores.owner import ENCRYPTED_FORMAT, FORMAT, Owner, decode_owner
from fsm_ray.stores.sealed import NOT_ENCRYPTED, ROW_BYTES, TWICE, Damaged, in_record, in_reply, key_id_of

if TYPE_CHECKING:
    from fsm_ray.stores.encrypted import Opener

_MAX_FINDINGS = 100
"""Of one shard, and missing shards of one bot, that are told one by one."""

_HIDDEN = (None, None, 0)
"""What a store shows of an encrypted record."""

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
    encrypted_records: int = 0
    encrypted_sessions: int = 0
    """Whose answers are encrypted."""
    key_ids: set[str] = field(default_factory=set)
    """Of the keys that these say they were encrypted with."""
    is_opened: bool = False
    """Whether they were opened, with keys."""
    findings: list[Finding] = field(default_factory=list)
    more_findings: int = 0
    """Beyond those that are told one by one."""

    @property
    def shards(self) -> int | None:
        """How many shards the bot has, by this one's owner; None: it does not say, or no bot has so many."""
        return self.owner.shards if self.owner is not None and _is_count(self.owner.shards) else None

    def find(self, where: str, problem: str) -> None:
        """Add a finding."""
        if len(self.findings) < _MAX_FINDINGS:
            self.findings.append(Finding(where, problem))
        else:
            self.more_findings += 1


async def verify(
    url: str, bot_name: str | None = None, *, encryption_keys: str | None = None
) -> AsyncGenerator[ShardReport, None]:
    """Look through the store of each shard at the URL, of one bot or of all.

    With `encryption_keys`, as in `BotOptions`, what is encrypted is opened, and all should be. The keys are
    read in this process.

    Raises:
        EncryptionKeysUnusable: the keys cannot be read, or open nothing in a shard.
        InvalidInput: the URL's store keeps nothing, or cannot tell which bots it has.
        InvalidOptions, InvalidBotName: the URL, or the name, is none.
        MissingExtra: the store's driver is not installed here.
        StoreUnavailable: it cannot be reached.
    """
    source = _Source(inspectable(url, encryption_keys), url, encryption_keys)
    if bot_name is None:
        for bot, places in itertools.groupby(await source.kind.places(url), key=lambda place: place[0]):
            async for report in _verify_bot(source, bot, [shard for _, shard in places]):
                yield report
    else:
        check_bot_name(bot_name)
        async for report in _verify_bot(source, bot_name, await _shards_of(source, bot_name)):
            yield report


@dataclass(frozen=True)
class _Source:
    """What is verified."""

    kind: Any
    """A class of stores that are `Inspectable`."""
    url: str
    encryption_keys: str | None

    def store(self, bot_name: str, shard: int) -> Inspectable:
        place = Place(url=self.url, bot_name=bot_name, shard=shard, shards=1, lease_s=5.0)
        store: Inspectable = self.kind(place)
        return store

    def opener(self, bot_name: str, shard: int) -> Opener | None:
        keys = self.encryption_keys
        opener: Opener | None = None if keys is None else make_opener(keys, bot_name, shard)
        return opener


async def _shards_of(source: _Source, bot_name: str) -> list[int] | None:
    """The bot's shards; None where the store cannot list them."""
    try:
        return [shard for bot, shard in await source.kind.places(source.url) if bot == bot_name]
    except InvalidInput:
        return None


async def _verify_bot(
    source: _Source, bot_name: str, listed: list[int] | None
) -> AsyncGenerator[ShardReport, None]:
    """Look through these shards, and at what they say of each other.

    Where they could not be listed, the first one tells how many there are.
    """
    count: int | None = None
    known = [0] if listed is None else sorted(listed)
    for shard in known:
        report = await _verify_shard(source, bot_name, shard)
        count = _compare(report, count)
        yield report
    others = [shard for shard in range(count or 1) if shard not in known]
    if listed is not None:
        for report in _missing(bot_name, others):
            yield report
        return
    for shard in others:
        report = await _verify_shard(source, bot_name, shard)
        _compare(report, count)
        yield report


def _compare(report: ShardReport, count: int | None) -> int | None:
    """The number of shards that the bot has, by the first one that says it; others must say the same."""
    if count is not None and report.shards not in {None, count}:
        report.find("owner", f"it is one of {report.shards} shards, and others of {count}")
    return report.shards if count is None else count


def _missing(bot_name: str, shards: list[int]) -> Iterator[ShardReport]:
    """Reports of shards that are not there: of many, the last one counts the rest."""
    told = shards[:_MAX_FINDINGS]
    for shard in told:
        report = ShardReport(bot_name, shard)
        report.find("the whole shard", "there is nothing of it")
        if shard == told[-1]:
            report.more_findings = len(shards) - len(told)
        yield report


async def _verify_shard(source: _Source, bot_name: str, shard: int) -> ShardReport:
    report = ShardReport(bot_name, shard)
    seals = _Seals(report, source.opener(bot_name, shard))
    newest, newest_where, has_owner = 0, "", False
    try:
        async with aclosing(source.store(bot_name, shard).rows()) as rows:
            async for row in rows:
                version = _check(report, row, seals)
                has_owner |= row.kind == "owner"
                if version > newest:
                    newest, newest_where = version, row.where
    except (StoreCorrupted, StoreMismatch) as error:
        report.find("the whole shard", str(error))
        return report
    seals.settle()
    if not has_owner:
        report.find("owner", "it has none")
    if report.version is None:
        report.find("version", "it has none, or none that can be read")
    elif newest > report.version:
        report.find(newest_where, f"its version, {newest}, is later than the shard's last, {report.version}")
    return report


class _Seals:
    """Opens what is encrypted in one shard, or looks at it from outside."""

    def __init__(self, report: ShardReport, opener: Opener | None) -> None:
        report.is_opened = opener is not None
        self._report = report
        self._opener = opener
        self._opened = 0
        self._rows: dict[bytes, bytes] = {}
        """Conversation -> its row."""
        self._unusable: dict[str | None, _Unusable] = {}

    def record(self, row: Row) -> Row | None:
        """The record in the row, under its conversation's key; None where no more of it can be checked."""
        with self._told(row):
            sealed = in_record(row.value)
            if sealed is None:
                if self._is_encrypted:
                    self._check_plain()
                    self._check_once(row, row.key)
                return row
            self._report.encrypted_records += 1
            self._report.key_ids.add(key_id_of(sealed))
            if len(row.key) != ROW_BYTES or row.shown not in {None, _HIDDEN}:
                self._report.find(row.where, "nothing encrypted lies in such a row")
            if self._opener is not None:
                _, key, blob = self._opener.record(row.key, row.value)
                self._opened += 1
                self._check_once(row, key)
                return row._replace(key=key, value=blob, slot=None, shown=None)
        return None

    def reply(self, row: Row, answered: Answered) -> bytes | None:
        """The session's reply; None where no more of it can be checked."""
        with self._told(row):
            sealed = in_reply(answered.reply)
            if sealed is None:
                if self._is_encrypted:
                    self._check_plain()
                return answered.reply
            self._report.encrypted_sessions += 1
            self._report.key_ids.add(key_id_of(sealed))
            if self._opener is not None:
                _, reply = self._opener.reply(row.key, answered)
                self._opened += 1
                return reply
        return None

    def settle(self) -> None:
        """Tell what can be known of the whole shard alone.

        Raises:
            EncryptionKeysUnusable: nothing could be opened.
        """
        report = self._report
        if report.owner is not None and not self._is_encrypted:
            should_be = self._opener is not None and not self._opener.accepts_plain
            if should_be or report.encrypted_records or report.encrypted_sessions:
                report.find("owner", "it says that the store is not encrypted, or somebody made it say so")
        for each in self._unusable.values():
            if not self._opened:
                raise EncryptionKeysUnusable(
                    f"shard {report.shard} of bot {report.bot_name!r}: {each.error}",
                    bot=report.bot_name,
                    key_id=each.error.key_id,
                )
            others = f"; and so it is with {each.rows - 1:,} more" if each.rows > 1 else ""
            report.find(each.where, f"{each.error}{others}")

    @property
    def _is_encrypted(self) -> bool:
        """Whether the store says that it is."""
        owner = self._report.owner
        return owner is not None and owner.format == ENCRYPTED_FORMAT

    def _check_plain(self) -> None:
        if self._opener is None or not self._opener.accepts_plain:
            raise Damaged(NOT_ENCRYPTED)

    def _check_once(self, row: Row, key: bytes) -> None:
        # A row may come twice.
        if self._rows.setdefault(key, row.key) != row.key:
            self._report.find(row.where, f"{TWICE}, if no keys were rotated meanwhile")

    @contextmanager
    def _told(self, row: Row) -> Iterator[None]:
        """Tell what is wrong with the row, and go on."""
        try:
            yield
        except Damaged as error:
            self._report.find(row.where, str(error))
        except EncryptionKeysUnusable as error:
            self._unusable.setdefault(error.key_id, _Unusable(row.where, error)).rows += 1


@dataclass
class _Unusable:
    """What could not be opened for want of one key."""

    where: str
    """The first of these rows."""
    error: EncryptionKeysUnusable
    rows: int = 0


def _check(report: ShardReport, row: Row, seals: _Seals) -> int:
    """Look at one row; the version of a record, else 0."""
    if row.kind == "record":
        return _check_record(report, row, seals)
    if row.kind == "owner":
        _check_owner(report, row)
    elif row.kind == "session":
        _check_session(report, row, seals)
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
    if owner.format not in {FORMAT, ENCRYPTED_FORMAT} or owner.slots != SLOTS:
        report.find(
            row.where,
            f"it has format {owner.format} and {owner.slots} slots; this fsm_ray has {FORMAT}, or "
            f"{ENCRYPTED_FORMAT} encrypted, and {SLOTS}",
        )
    if (owner.bot_name, owner.shard) != (report.bot_name, report.shard):
        report.find(row.where, f"it is shard {owner.shard} of bot {owner.bot_name!r}")
    if not _is_count(owner.shards):
        report.find(row.where, f"it says that the bot has {owner.shards} shards; bots have 1 to {SLOTS}")
    elif not 0 <= owner.shard < owner.shards:
        report.find(row.where, f"it has number {owner.shard} of {owner.shards} shards")


def _check_session(report: ShardReport, row: Row, seals: _Seals) -> None:
    report.sessions += 1
    try:
        answered = decode_answered(row.value)
        reply = seals.reply(row, answered)
        if not reply:
            return  # it cannot be seen, or was a large one, and forgotten
        _, number, _ = _decode_reply(reply[4:])
    except _UNREADABLE as error:
        report.find(row.where, f"the session's last answer cannot be read: {error}")
        return
    if int.from_bytes(reply[:4], "little") != len(reply) - 4:
        report.find(row.where, "the session's last answer has not the length that it says")
    if number != answered.number:
        report.find(row.where, f"the answer to write {number} is kept as that to {answered.number}")


def _check_record(report: ShardReport, row: Row, seals: _Seals) -> int:
    """The record's version; 0 where it has none, or it cannot be seen."""
    report.records += 1
    if row.slot != slot_of(row.key):
        report.find(row.where, f"it lies in slot {row.slot}, and its key belongs to {slot_of(row.key)}")
    plain = seals.record(row)
    if plain is None:
        return 0
    _check_key(report, plain, is_shown=plain is row)
    try:
        check_blob(plain.value)
    except _UNREADABLE as error:
        report.find(row.where, f"it is no record: {error}")
        return 0
    flow, state, version = front_of(plain.value)
    if plain.shown is not None and plain.shown != (_shown(flow), _shown(state), version):
        report.find(row.where, f"beside {(flow, state, version)} in the blob, the columns have {plain.shown}")
    return version


def _check_key(report: ShardReport, row: Row, *, is_shown: bool) -> None:
    """Look whether the conversation's key is one, and of this shard; tell of it only what may be shown."""
    try:
        check_key(row.key)
    except FsmRayError as error:
        report.find(row.where, str(error) if is_shown else "what is encrypted there has no key")
    if report.shards is None:
        return
    belongs = slot_of(row.key) * report.shards // SLOTS
    if belongs != report.shard and row.slot in {None, slot_of(row.key)}:
        report.find(row.where, f"its key belongs to shard {belongs} of {report.shards}")


def _is_count(shards: int) -> bool:
    """Whether a bot can have so many."""
    return 1 <= shards <= SLOTS


def _shown(text: str | None) -> str | None:
    """As a column that cannot hold NUL has it."""
    return None if text is None else text.replace("\x00", "\N{SYMBOL FOR NULL}")


_decode_reply = msgspec.msgpack.Decoder(tuple[int, int, Any]).decode
