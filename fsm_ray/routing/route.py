"""Route: one bot's operations, encoded, and the shard that each belongs to.

Shards own equal ranges of slots, so a later change of their number moves slots between shards and never
rehashes a key.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from fsm_ray import protocol
from fsm_ray.channel import outflow
from fsm_ray.codec import (
    decode_key,
    decode_plain_key,
    encode_data,
    encode_key,
    extension_hook,
    slot_of,
)
from fsm_ray.errors import (
    FrameTooLarge,
    InvalidData,
    InvalidInput,
    InvalidState,
    NamespaceUnavailable,
    OutcomeUnknown,
    RecordTooLarge,
    UnknownBot,
)
from fsm_ray.options import SLOTS, BotOptions, whereabouts
from fsm_ray.protocol import BIN8, MAX_OPERATIONS, RecordView, ReplyDecoder
from fsm_ray.record import Front, to_ms
from fsm_ray.state import State

Addressed = tuple[int, bytes]
"""A shard, and an operation for it."""

Fields = Mapping[str, Any] | None
"""Fields of the data, by name; None: no field."""

_MAX_REPLY_BYTES = outflow.MAX_BYTES // 2
"""Of records in one reply: a shard must be able to keep it for a client that is slow to read, and others."""

MAX_TTL_S = 1e10
"""As in BotOptions."""


class Route:
    """How the operations on one bot are encoded, and which shard each goes to.

    All that can be refused here is, before anything is sent.
    """

    def __init__(self, bot_name: str, options: BotOptions, *, imports_classes: bool = True) -> None:
        """Make one; without `imports_classes`, what is read needs no class, and has the form of the codec."""
        self.bot_name = bot_name
        self.options = options
        hook = extension_hook(allow_pickle=options.allow_pickle) if imports_classes else None
        self.decoder = ReplyDecoder(hook)
        self.decode_key = decode_key if imports_classes else decode_plain_key
        self.max_operations = min(MAX_OPERATIONS, _MAX_REPLY_BYTES // options.max_record_bytes)
        """In one request, to which each may be answered with the largest record."""
        self._shards = options.shards
        self._is_single = options.shards == 1
        self._allow_pickle = options.allow_pickle
        self._max_record_bytes = options.max_record_bytes
        self._place = whereabouts(options)

    def read(self, key: Hashable) -> Addressed:
        encoded = encode_key(key)
        length = len(encoded)
        operation = BIN8[length] + encoded if length < len(BIN8) else protocol.read(encoded)
        return 0 if self._is_single else self.shard_of(encoded), operation

    def set_record(
        self, key: Hashable, state: State, expected_version: int | None, ttl_s: float | None = None
    ) -> Addressed:
        try:
            if not isinstance(state, State):
                raise InvalidState(
                    f"set_state takes a fsm_ray.State, not {type(state).__name__}: State(state={state!r})"
                )
            encoded = encode_key(key)
            data = encode_data(state.data, allow_pickle=self._allow_pickle)
            _check_version(expected_version)
            ttl_ms = None if ttl_s is None else self.ttl_ms(ttl_s)
            operation = protocol.set_record(
                encoded, state.flow, state.state, data, expected_version, ttl_ms=ttl_ms
            )
            return self._bounded(encoded, data, operation)
        except InvalidInput as error:
            raise self._about(error, key)  # noqa: B904  # the same error, with more facts

    def put_record(
        self, key: Hashable, record: RecordView, expected_version: int | None, ttl_ms: int | None
    ) -> Addressed:
        """As `set_record`, of a record as it was read."""
        try:
            encoded = encode_key(key)
            data = encode_data(record.content.data, allow_pickle=self._allow_pickle)
            operation = protocol.set_record(
                encoded, record.flow, record.state, data, expected_version, ttl_ms=ttl_ms
            )
            return self._bounded(encoded, data, operation)
        except InvalidInput as error:
            raise self._about(error, key)  # noqa: B904  # the same error, with more facts

    def set_data(
        self,
        key: Hashable,
        data: Mapping[str, Any],
        expected_version: int | None,
        ttl_s: float | None = None,
    ) -> Addressed:
        try:
            encoded = encode_key(key)
            values = encode_data(data, allow_pickle=self._allow_pickle)
            _check_version(expected_version)
            ttl_ms = None if ttl_s is None else self.ttl_ms(ttl_s)
            operation = protocol.set_data(encoded, values, expected_version, ttl_ms)
            return self._bounded(encoded, values, operation)
        except InvalidInput as error:
            raise self._about(error, key)  # noqa: B904  # the same error, with more facts

    def enter_state(
        self,
        key: Hashable,
        front: Front,
        expected_version: int | None,
        ttl_s: float | None = None,
    ) -> Addressed:
        try:
            encoded = encode_key(key)
            flow, state = front
            if not all(each is None or isinstance(each, str) for each in front):
                raise InvalidState(f"flow and state are each a str or None, not {flow!r} and {state!r}")
            _check_version(expected_version)
            ttl_ms = None if ttl_s is None else self.ttl_ms(ttl_s)
            operation = protocol.enter_state(encoded, (_plain(flow), _plain(state)), expected_version, ttl_ms)
        except InvalidInput as error:
            raise self._about(error, key)  # noqa: B904  # the same error, with more facts
        return 0 if self._is_single else self.shard_of(encoded), operation

    def update_data(
        self,
        key: Hashable,
        changes: Mapping[str, Any],
        expected_version: int | None,
        ttl_s: float | None = None,
    ) -> Addressed:
        try:
            encoded = encode_key(key)
            values = encode_data(changes, allow_pickle=self._allow_pickle)
            if expected_version is not None:
                _check_version(expected_version)
            ttl_ms = None if ttl_s is None else self.ttl_ms(ttl_s)
            if len(encoded) + len(values) > self._max_record_bytes:
                self._refuse(len(encoded) + len(values))
        except InvalidInput as error:
            raise self._about(error, key)  # noqa: B904  # the same error, with more facts
        shard = 0 if self._is_single else self.shard_of(encoded)
        return shard, protocol.update_data(encoded, values, expected_version, ttl_ms)

    def patch(
        self,
        key: Hashable,
        *,
        set_: Fields,
        unset: Iterable[str],
        increment: Fields,
        append: Fields,
        expected_version: int | None,
        ttl_s: float | None,
    ) -> Addressed:
        try:
            encoded = encode_key(key)
            fields, names = _check_patch({"set": set_, "increment": increment, "append": append}, unset)
            values, amounts, items = (
                encode_data(each, allow_pickle=self._allow_pickle) for each in fields.values()
            )
            _check_version(expected_version)
            ttl_ms = None if ttl_s is None else self.ttl_ms(ttl_s)
            operation = protocol.patch(
                encoded, (values, names, amounts, items), expected_version, ttl_ms=ttl_ms
            )
            # Not the amounts: a sum may be shorter than what it is made of.
            return self._bounded(encoded, values + items, operation)
        except InvalidInput as error:
            raise self._about(error, key)  # noqa: B904  # the same error, with more facts

    def clear(self, key: Hashable, expected_version: int | None) -> Addressed:
        try:
            encoded = encode_key(key)
            _check_version(expected_version)
            operation = protocol.clear(encoded, expected_version)
        except InvalidInput as error:
            raise self._about(error, key)  # noqa: B904  # the same error, with more facts
        return 0 if self._is_single else self.shard_of(encoded), operation

    def transact(self, operations: Sequence[bytes]) -> bytes:
        """One operation of these, which are for one shard.

        Raises:
            FrameTooLarge: together they are too large.
        """
        try:
            return protocol.transact(operations)
        except FrameTooLarge as error:
            error.bot = self.bot_name
            raise error.copied(", or several transactions") from None

    @staticmethod
    def ttl_ms(ttl_s: float) -> int:
        """The time to live that a write gives, in milliseconds.

        Raises:
            InvalidInput: it is none.
        """
        is_number = isinstance(ttl_s, int | float) and not isinstance(ttl_s, bool)
        if is_number and (0 < ttl_s <= MAX_TTL_S or ttl_s == math.inf):
            return to_ms(ttl_s)
        raise InvalidInput(
            f"ttl_s is a time to live in seconds, more than 0 and at most {MAX_TTL_S:.0f}; "
            f"math.inf: for ever; None: as the bot's options say; not {ttl_s!r}"
        )

    def check_options(self, options: BotOptions) -> None:
        """Refuse a shard of other options: the bot was dropped and made again since this route was."""
        if options != self.options:
            raise UnknownBot(
                f"bot {self.bot_name!r} was dropped and initialised anew with other options: call again",
                bot=self.bot_name,
            )

    def too_late(
        self, shard: int, timeout_s: float, trouble: str, *, outcome_unknown: bool
    ) -> NamespaceUnavailable:
        """The error of an operation that got no answer in time; `trouble` is what stood in the way."""
        trouble += self._place
        what = f"shard {shard} of bot {self.bot_name!r} gave no answer within {timeout_s} s ({trouble})"
        if outcome_unknown:
            return OutcomeUnknown(
                f"{what}: the write may or may not have taken effect; read the record, then decide",
                bot=self.bot_name,
                timeout_s=timeout_s,
            )
        return NamespaceUnavailable(
            f"{what}; nothing was changed, a retry is safe", bot=self.bot_name, timeout_s=timeout_s
        )

    def outcome_unknown(self, trouble: str) -> OutcomeUnknown:
        """The error of a write that was under way when `trouble` made it useless to wait."""
        return OutcomeUnknown(
            f"{trouble}. A write was under way, and may or may not have taken effect: read the record, then "
            "decide",
            bot=self.bot_name,
        )

    def shard_of(self, key: bytes) -> int:
        """The shard that has this encoded key."""
        return slot_of(key) * self._shards // SLOTS

    def _bounded(self, key: bytes, data: bytes, operation: bytes) -> Addressed:
        if len(key) + len(data) > self._max_record_bytes:
            self._refuse(len(key) + len(data))
        return 0 if self._is_single else self.shard_of(key), operation

    def _refuse(self, size: int) -> NoReturn:
        """Keep off the channel what cannot fit; the shard has the exact check."""
        raise RecordTooLarge(
            f"key and data take {size:,} bytes, and max_record_bytes of bot {self.bot_name!r} is "
            f"{self._max_record_bytes:,}; nothing was changed: keep less, or init with a larger limit",
            size_bytes=size,
            max_record_bytes=self._max_record_bytes,
        )

    def _about(self, error: InvalidInput, key: Hashable) -> InvalidInput:
        error.bot, error.key = self.bot_name, key
        return error


def _plain(name: str | None) -> str | None:
    """The text alone, as a `State` takes it from a subclass of str."""
    return None if name is None else str.__str__(name)


def _check_version(expected_version: int | None) -> None:
    if expected_version is None or (type(expected_version) is int and 0 <= expected_version < 1 << 63):
        return
    raise InvalidInput(
        "expected_version is the version of a State that was read, or 0 for no record; "
        f"not {expected_version!r}"
    )


def _check_patch(
    fields: Mapping[str, Fields], unset: Iterable[str]
) -> tuple[dict[str, Mapping[str, Any]], list[str]]:
    """The fields that each argument of a patch changes, and the names of those to be removed.

    Raises:
        InvalidData: they cannot be, or a field is named twice, so that the order would decide.
    """
    given = {argument: {} if each is None else each for argument, each in fields.items()}
    for argument, each in given.items():
        if not isinstance(each, Mapping):
            raise InvalidData(f"patch takes {argument}={{name: value}}, not {reprlib.repr(each)}")
    if isinstance(unset, str) or not isinstance(unset, Iterable):
        raise InvalidData(f"patch takes unset=[name, ...], not {reprlib.repr(unset)}")
    names = list(unset)
    if not all(isinstance(name, str) for name in names):
        raise InvalidData(f"patch takes names of fields in unset, not {reprlib.repr(names)}")
    encode_data(dict.fromkeys(names), allow_pickle=False)  # refuses what is no name
    seen: dict[str, str] = {}
    for argument, each in {**given, "unset": dict.fromkeys(names)}.items():
        for name in each:
            if name in seen:
                raise InvalidData(
                    f"patch names field {name!r} in {seen[name]} and in {argument}: make two patches"
                )
            seen[name] = argument
    for name, amount in given["increment"].items():
        if type(amount) is not int and type(amount) is not float:
            raise InvalidData(
                f"patch increments field {name!r} by {reprlib.repr(amount)}: give an int or a float"
            )
    return given, names
