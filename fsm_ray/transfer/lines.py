"""Export and import of fsm_ray itself: JSON lines, one conversation a line, between a header and a footer.

Values keep their types (see `typed_json`), and expiry is kept as a copy of a conversation keeps it. Left out
are the versions, which are the shards' own, and the `update_id`s that turns have handled.
"""

from __future__ import annotations

import math
import time
from collections.abc import AsyncGenerator, Hashable
from datetime import datetime
from typing import Any, BinaryIO, Literal

import msgspec

from fsm_ray.across import Conversation
from fsm_ray.errors import FsmRayError, InvalidData, PickleNotAllowed, ScanInterrupted, ValueNotDecodable
from fsm_ray.routing.route import MAX_TTL_S
from fsm_ray.state import State
from fsm_ray.storage import AsyncStorage
from fsm_ray.transfer.encoded import AsyncEncodedStorage, seconds
from fsm_ray.transfer.loading import Arrival, Progress, Refusal, Report, load, no_progress, refusal
from fsm_ray.transfer.typed_json import data_from_json, encoded_to_json, key_from_json, key_to_json

_FORMAT = 1

_PICKLE_CURE = "allow_pickle=True (--allow-pickle) accepts it; a file from others can run any code then"

_WRONG_LINE = (msgspec.MsgspecError, ValueError, ArithmeticError, RecursionError, FsmRayError)
"""What a line that is none, or of nothing that can be a conversation, may raise."""


class _Header(msgspec.Struct, forbid_unknown_fields=True):
    """The first line."""

    fsm_ray_export: int
    bot: str


class _Line(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """One conversation."""

    key: Any
    flow: str | None = None
    state: str | None = None
    data: dict[str, Any] = {}
    version: int | None = None
    """Which write made the record, for people and other programs to see."""
    ttl_s: float | Literal["inf"] | None = None
    """The time to live that a write gave to this record itself; JSON has no number for ever."""
    expires_at: datetime | None = None


class _Footer(msgspec.Struct, forbid_unknown_fields=True):
    """The last line: without it, the file is cut off."""

    conversations: int


_encode = msgspec.json.Encoder().encode
_decode_header = msgspec.json.Decoder(_Header).decode
_decode_line = msgspec.json.Decoder(_Line).decode
_decode_footer = msgspec.json.Decoder(_Footer).decode


async def export(
    storage: AsyncStorage, bot_name: str, file: BinaryIO, *, progress: Progress | None = None
) -> Report:
    """Write the bot's conversations to a file, a line each. Bots may work meanwhile.

    What is written of each shard is of one moment, unless the shard is restarted meanwhile. No class is
    imported for it, and no pickle loaded.

    Raises:
        UnknownBot, NamespaceUnavailable: the file is cut off, and `import_` tells so.
    """
    report, tell = Report(), progress or no_progress
    total = await storage.count(bot_name)
    file.write(_encode(_Header(_FORMAT, bot_name)) + b"\n")
    async with AsyncEncodedStorage.of(storage) as encoded:
        async for each in _all_of(encoded, bot_name):
            if isinstance(each, Refusal):
                report.refused.append(each)
                continue
            file.write(each + b"\n")
            report.written += 1
            if report.written % 1_000 == 0:
                tell(report.total, max(total, report.total))
    file.write(_encode(_Footer(report.written)) + b"\n")
    file.flush()
    tell(report.total, report.total)
    return report


async def import_(
    storage: AsyncStorage,
    bot_name: str,
    file: BinaryIO,
    *,
    overwrite: bool = False,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Write an export's conversations into a bot, which must have been initialised.

    Conversations that are there already are left alone: so an import that was killed is begun again. A line
    that has expired meanwhile is skipped.

    Args:
        storage: the storage.
        bot_name: the bot; it may be another one than the export is of.
        file: the export; lines of conversations may have been removed, changed, and put into another order.
        overwrite: replace the conversations that are there.
        allow_pickle: accept values that only pickle carries, unless the bot does not. A file from others can
            run any code then.
        progress: told how far it is.

    Raises:
        InvalidData: the file is no export, or of a later version; nothing was changed.
        UnknownBot, NamespaceUnavailable: some were imported; to be called again.
    """
    _check_header(file.readline())
    options = (await storage.describe(bot_name)).options
    lines = _arrivals(
        file,
        # Refused by the bot, it must not be decoded first.
        allow_pickle=allow_pickle and options.allow_pickle,
        pickle_cure=_PICKLE_CURE if options.allow_pickle else "the bot's options do not allow it",
        keeps_moment=options.ttl_mode == "absolute",
    )
    return await load(storage, bot_name, lines, overwrite=overwrite, progress=progress)


async def _all_of(storage: AsyncEncodedStorage, bot_name: str) -> AsyncGenerator[bytes | Refusal, None]:
    """Every conversation's line; one that cannot be told does not keep the others from it."""
    after: Hashable = None
    allow_pickle = await storage.allows_pickle(bot_name)
    while True:
        try:
            async for conversation in storage.scan(bot_name, after=after):
                after = conversation.key
                yield _encoded_line(conversation, allow_pickle=allow_pickle)
        except ScanInterrupted:
            continue
        except ValueNotDecodable as error:
            if error.key is None:
                raise
            after = error.key
            yield refusal(repr(after), error)
        else:
            return


def _encoded_line(conversation: Conversation, *, allow_pickle: bool) -> bytes | Refusal:
    try:
        return _encode(_line(conversation, allow_pickle=allow_pickle))
    except (PickleNotAllowed, ValueNotDecodable) as error:
        return refusal(repr(conversation.key), error)


def _line(conversation: Conversation, *, allow_pickle: bool) -> _Line:
    state, ttl_s = conversation.state, seconds(conversation.record.content.ttl_ms)
    return _Line(
        key=key_to_json(conversation.key),
        flow=state.flow,
        state=state.state,
        data=encoded_to_json(state.data, allow_pickle=allow_pickle),
        version=state.version,
        ttl_s="inf" if ttl_s == math.inf else ttl_s,
        expires_at=state.expires_at,
    )


def _check_header(line: bytes) -> None:
    try:
        header = _decode_header(line)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InvalidData(f"the file is no export of fsm_ray: its first line is {line[:80]!r}") from error
    if header.fsm_ray_export != _FORMAT:
        raise InvalidData(f"the export has format {header.fsm_ray_export}, and this fsm_ray reads {_FORMAT}")


async def _arrivals(
    file: BinaryIO, *, allow_pickle: bool, pickle_cure: str, keeps_moment: bool
) -> AsyncGenerator[Arrival | Refusal | None, None]:
    """What the lines hold; `keeps_moment`: what is left of a time to live counts, and not all of it again."""
    footer = None
    for number, line in enumerate(file, start=2):
        where = f"line {number}"
        try:
            if line.startswith(b'{"conversations"'):
                footer = _decode_footer(line)
                continue
            yield _arrival(where, _decode_line(line), allow_pickle=allow_pickle, keeps_moment=keeps_moment)
        except PickleNotAllowed:
            yield Refusal(where, f"it holds a pickled value: {pickle_cure}")
        except _WRONG_LINE as error:
            yield refusal(where, error)
    if footer is None:
        yield Refusal("the end", "the file is cut off: it has no last line that tells how many there are")


def _arrival(where: str, line: _Line, *, allow_pickle: bool, keeps_moment: bool) -> Arrival | None:
    left_s = math.inf if line.expires_at is None else line.expires_at.timestamp() - time.time()
    if left_s <= 0:
        return None
    ttl_s = None if line.ttl_s is None else float(line.ttl_s)
    if keeps_moment and line.expires_at is not None:
        ttl_s = left_s
    if ttl_s is not None and ttl_s > MAX_TTL_S:
        ttl_s = math.inf  # earlier versions wrote it as a number of seconds
    key = key_from_json(line.key)
    data = data_from_json(line.data, allow_pickle=allow_pickle)
    state = State(flow=line.flow, state=line.state, data=data)
    return Arrival(where, key, state, ttl_s)
