"""Evaluation: what an operation does to the records, and its answer; pure, but for the records themselves.

What is evaluated is seen by the operations after it alone, until its commit is done.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import NamedTuple

from fsm_ray.codec import patches
from fsm_ray.errors import FsmRayError, InvalidPatch, RecordTooLarge, VersionConflict
from fsm_ray.namespace.expiry import Deadlines, TimesToLive
from fsm_ray.namespace.leases import TurnId
from fsm_ray.options import BotOptions
from fsm_ray.protocol import (
    Clear,
    CommitTurn,
    EnterState,
    Patch,
    SetData,
    SetRecord,
    Transact,
    UpdateData,
    encode_result,
)
from fsm_ray.record import (
    MAX_FRONT_BYTES,
    NEVER_MS,
    NO_TAIL,
    Census,
    Content,
    Data,
    Packer,
    Tail,
    content_of,
    count_in,
    deadline_of,
    encode_content,
    head_of,
    version_of,
)

UPDATES_REMEMBERED_MS = 86_400_000
"""How long updates are remembered where there is no record any more: as long as Telegram keeps those that it
could not deliver."""

_MAX_UPDATES = 100
_NEAR_UPDATES = 1_024
"""Updates are remembered while one so near may come again: Telegram delivers at most 100 at a time, and
numbers them in sequence, until a week without any."""

_MAX_TTLS = 4_096
"""Heads of which the time to live is known: bots may make up names of states as they go."""

_ABSENT = b""
"""What is found where there is no record: unlike None, which is a record that is being cleared."""


class Change(NamedTuple):
    """What one write did to one record; None: there was none, or is none.

    Until it is swept, a record that has expired counts as one.
    """

    version: int
    key: bytes
    before: bytes | None
    after: bytes | None


@dataclass(slots=True)
class Effects:
    """What the operations of one commit do."""

    overlay: dict[bytes, bytes | None] = field(default_factory=dict)
    """Records as they are then. Cleared ones are None until they are removed, before anybody reads them."""
    cleared: set[bytes] = field(default_factory=set)
    moved: dict[bytes, int] = field(default_factory=dict)
    """Head -> how many records more have it."""
    changes: list[Change] = field(default_factory=list)
    """What is to be told to those who watch or scan, if anybody does."""
    ended: list[tuple[TurnId, bytes]] = field(default_factory=list)
    """Turns that were committed, and their keys."""
    unsent_bytes: int = 0
    """Of records that are neither in their request nor in its reply."""


class Evaluator:
    """Evaluates operations, one after another, into the effects of a commit."""

    def __init__(
        self,
        bot_name: str,
        options: BotOptions,
        packer: Packer,
        *,
        version: int,
        census: Census,
        below: Callable[[bytes], bytes | None],
        now_ms: int,
        check_turn: Callable[[CommitTurn], TurnId],
    ) -> None:
        """Make one for records with this census, that `below` finds.

        `check_turn` returns the turn to be committed, or raises TurnLost.
        """
        self.version = version
        """The last one that was given out."""
        self.deadlines = Deadlines()
        self.tells_births = False
        """Whether changes are told of that make records, or end them."""
        self.tells_all = False
        """Whether all changes are told of."""
        self._bot_name = bot_name
        self._max_record_bytes = options.max_record_bytes
        # A packed record is smaller than its blob by no more than the front that it shares.
        self._surely_fitting_bytes = options.max_record_bytes - MAX_FRONT_BYTES
        self._packer = packer
        self._check_turn = check_turn
        self._times = TimesToLive(options)
        self._ttls: dict[bytes, int] = {}
        self.has_tails = self._times.are_given or bool(census.tailed)
        """Whether any record may have a tail; if not, nobody looks for one."""
        self.now_ms = now_ms
        """When what follows happens, in milliseconds since 1970."""
        for key in census.tailed:
            packed = below(key)
            if packed is not None:
                self.deadlines.add(key, _end_ms(packed))
        self._effects = Effects()
        self._overlay = self._effects.overlay
        self._below = below
        self.methods: dict[type, Callable[..., bytes]] = {
            SetRecord: self._set_record,
            SetData: self._set_data,
            EnterState: self._enter_state,
            UpdateData: self._update_data,
            Clear: self._clear,
            CommitTurn: self._commit_turn,
            Patch: self._patch,
            Transact: self._transact,
        }
        """Type of an operation -> what returns its result, encoded; when that raises, nothing was changed."""

    def begin(self, effects: Effects, below: Callable[[bytes], bytes | None]) -> None:
        """Let what follows go to these effects, over what `below` finds."""
        self._effects = effects
        self._overlay = effects.overlay
        self._below = below

    def is_over(self, packed: bytes, now_ms: int) -> bool:
        """Whether there is no such record any more, though it was not swept."""
        return self.has_tails and deadline_of(packed) <= now_ms

    def sweep(self, key: bytes) -> None:
        """Remove the record if it has expired, and what is left of it when that is over."""
        raw = self._current(key)
        if raw is None:
            return
        end_ms = _end_ms(raw)
        if end_ms > self.now_ms:
            self.deadlines.add(key, end_ms)
        else:
            self._remove(key, raw)

    def memory_of(self, packed: bytes) -> bytes | None:
        """The blob that tells a turn which updates were handled, where the record has expired."""
        content = content_of(packed)
        if not content.updates:
            return None
        tail = Tail(content.updates, 0, 0)
        return self._packer.blob(self._packer.pack(None, None, {}, content.version, tail))

    def _set_record(self, operation: SetRecord) -> bytes:
        key, overlay = operation.key, self._overlay
        raw = overlay[key] if key in overlay else self._below(key)
        if self.has_tails or operation.ttl_ms is not None:
            old = self._alive(raw)
            self._check_version(old, operation.expected_version)
            head = self._packer.head(operation.flow, operation.state)
            self._put_tailed(operation, raw, old, head, operation.data, is_whole=True)
        else:
            if operation.expected_version is not None:
                self._check_version(raw, operation.expected_version)
            packed = self._packer.pack(operation.flow, operation.state, operation.data, self.version + 1)
            self._put(key, raw, packed)
        return encode_result(self.version)

    def _set_data(self, operation: SetData) -> bytes:
        key, overlay = operation.key, self._overlay
        raw = overlay[key] if key in overlay else self._below(key)
        if self.has_tails or operation.ttl_ms is not None:
            old = self._alive(raw)
            self._check_version(old, operation.expected_version)
            self._put_tailed(operation, raw, old, self._head(old), operation.data)
        else:
            if operation.expected_version is not None:
                self._check_version(raw, operation.expected_version)
            self._put(key, raw, self._packer.replace(raw, operation.data, self.version + 1))
        return encode_result(self.version)

    def _enter_state(self, operation: EnterState) -> bytes:
        raw = self._current(operation.key)
        old = self._alive(raw)
        self._check_version(old, operation.expected_version)
        head = self._packer.head(operation.flow, operation.state)
        content = self._put_tailed(operation, raw, old, head, _data(old))
        self._effects.unsent_bytes += len(content)
        return encode_result(self.version)

    def _update_data(self, operation: UpdateData) -> bytes:
        key, overlay = operation.key, self._overlay
        raw = overlay[key] if key in overlay else self._below(key)
        if self.has_tails or operation.ttl_ms is not None:
            old = self._alive(raw)
            self._check_version(old, operation.expected_version)
            return self._put_tailed(operation, raw, old, self._head(old), _data(old) | operation.changes)
        if operation.expected_version is not None:
            self._check_version(raw, operation.expected_version)
        packed, content = self._packer.merge(raw, operation.changes, self.version + 1)
        if raw is None or self.tells_all or len(key) + len(packed) > self._surely_fitting_bytes:
            self._put(key, raw, packed)
        else:
            # What `_put` does then, a call less for what bots do most.
            overlay[key] = packed
            self.version += 1
        return content

    def _patch(self, operation: Patch) -> bytes:
        raw = self._current(operation.key)
        old = self._alive(raw)
        self._check_version(old, operation.expected_version)
        data = _data(old) | operation.set
        for name in operation.unset:
            data.pop(name, None)
        name = ""
        try:
            for name, amount in operation.increment.items():
                data[name] = patches.add(data.get(name), amount)
            for name, item in operation.append.items():
                data[name] = patches.append(data.get(name), item)
        except TypeError as error:
            raise InvalidPatch(
                f"field {name!r} holds {error}: nothing was changed; set it first",
                bot=self._bot_name,
                field=name,
            ) from error
        return self._put_tailed(operation, raw, old, self._head(old), data)

    def _clear(self, operation: Clear) -> bytes:
        old = self._alive(self._current(operation.key))
        self._check_version(old, operation.expected_version)
        if old is not None:
            self._remove(operation.key, old)
        return encode_result(value=old is not None)

    def _commit_turn(self, operation: CommitTurn) -> bytes:
        turn, key = self._check_turn(operation), operation.key
        raw = self._current(key)
        old = self._begun_with(raw, operation.expected_version)
        version = 0
        if operation.data is not None:
            head = self._packer.head(operation.flow, operation.state)
            version = operation.expected_version
            if old is None or not self._is_same(operation, old, head):
                self._put_tailed(operation, raw, old, head, operation.data)
                version = self.version
        elif operation.update_id is not None:
            known = None if raw is None else content_of(raw)
            end_ms = self.now_ms + UPDATES_REMEMBERED_MS
            self._put_memory(key, raw, _updates(known, operation.update_id), end_ms)
        elif old is not None:
            self._remove(key, old)
        self._effects.ended.append((turn, key))
        return encode_result(version)

    def _begun_with(self, raw: bytes | None, expected_version: int) -> bytes | None:
        """The record with which a turn began; raise VersionConflict if it was changed since.

        What expires while a turn has it is the turn's all the same.
        """
        old = raw if expected_version and shown(raw) else self._alive(raw)
        self._check_version(old, expected_version)
        return old

    def _is_same(self, operation: CommitTurn, old: bytes, head: bytes) -> bool:
        """Whether the commit would change nothing."""
        if operation.ttl_ms is not None or operation.update_id is not None or head_of(old) != head:
            return False
        content = content_of(old)
        is_renewed = not self._times.is_absolute or content.deadline_ms <= self.now_ms
        if content.deadline_ms != NEVER_MS and is_renewed:
            return False
        return list(content.data.items()) == list((operation.data or {}).items())

    def _transact(self, operation: Transact) -> bytes:
        effects = self._effects
        version, changes = self.version, len(effects.changes)
        undo: list[tuple[bytes, bytes | None, bool]] = []
        for each in operation.operations:
            key = each.key
            undo.append((key, self._overlay.get(key, _ABSENT), key in effects.cleared))
            try:
                self.methods[type(each)](each)
            except Exception as error:
                for done in reversed(undo):
                    self._undo(*done)
                self.version = version
                del effects.changes[changes:]
                if isinstance(error, FsmRayError):
                    error.key = key
                raise
        effects.unsent_bytes += sum(len(self._overlay.get(key) or b"") for key, _, _ in undo)
        return encode_result(self.version)

    def _undo(self, key: bytes, before: bytes | None, was_cleared: bool) -> None:  # noqa: FBT001
        """Put back what an operation found."""
        overlay, undone = self._overlay, self._current(key)
        if before == _ABSENT:
            overlay.pop(key, None)
        else:
            overlay[key] = before
        if not was_cleared:
            self._effects.cleared.discard(key)
        restored = self._current(key)
        self._move(undone, restored)
        if restored is None:
            self.deadlines.remove(key)
        else:
            self.deadlines.add(key, _end_ms(restored))

    def _current(self, key: bytes) -> bytes | None:
        """The record as the operations before this one leave it, committed or not; it may have expired."""
        overlay = self._overlay
        return overlay[key] if key in overlay else self._below(key)

    def _alive(self, raw: bytes | None) -> bytes | None:
        """The record, unless it has expired."""
        return None if raw is None or (self.has_tails and deadline_of(raw) <= self.now_ms) else raw

    def _head(self, old: bytes | None) -> bytes:
        return self._packer.head(None, None) if old is None else head_of(old)

    def _put(self, key: bytes, raw: bytes | None, packed: bytes) -> None:
        """Keep the record in place of `raw`, under the next version."""
        if len(key) + len(packed) > self._surely_fitting_bytes:
            self._check_size(key, packed)
        # Fronts that are not shared are all number 0.
        if (
            raw is None
            or raw[1] != packed[1]
            or raw[0] != packed[0]
            or self.has_tails
            or not (packed[0] or packed[1])
        ):
            self._move(raw, packed)
        self.version += 1
        if self.tells_all or (self.tells_births and (raw is None or self.has_tails)):
            self._tell(key, raw, packed)
        self._overlay[key] = packed

    def _put_memory(self, key: bytes, raw: bytes | None, updates: Collection[int], end_ms: int) -> None:
        """Keep nothing but the updates that were handled, until this time."""
        self.has_tails = True
        self._put(key, raw, self._packer.pack(None, None, {}, self.version + 1, Tail(updates, end_ms, 0)))
        self.deadlines.add(key, end_ms)

    def _put_tailed(
        self,
        operation: SetRecord | SetData | EnterState | UpdateData | Patch | CommitTurn,
        raw: bytes | None,
        old: bytes | None,
        head: bytes,
        data: Data,
        *,
        is_whole: bool = False,
    ) -> bytes:
        """As `_put`, of a record that may have a tail, and its encoded content.

        `old`: the record that goes on, None if what is replaced has expired. The time to live that an earlier
        write gave is kept where flow and state are, unless `is_whole`.
        """
        update_id = operation.update_id if type(operation) is CommitTurn else None
        tail = NO_TAIL
        if self.has_tails or operation.ttl_ms is not None or update_id is not None:
            known = None if raw is None else content_of(raw)
            before = None if old is None else known
            tail = self._tail(operation.ttl_ms, old, before, head, is_whole=is_whole)
            updates = _updates(known, update_id)
            if updates:
                tail = tail._replace(updates=updates)
        content = encode_content(data, self.version + 1, tail)
        self._put(operation.key, raw, head + content)
        if tail is not NO_TAIL:
            self.has_tails = True
            self.deadlines.add(operation.key, tail.deadline_ms)
        return content

    def _tail(
        self, ttl_ms: int | None, old: bytes | None, content: Content | None, head: bytes, *, is_whole: bool
    ) -> Tail:
        """The time to live, and the deadline, that a write leaves; `content` is that of `old`."""
        moves = old is not None and head_of(old) != head
        own_ms = ttl_ms or (0 if content is None or is_whole or moves else content.ttl_ms)
        lives_ms = own_ms or self._ttl_ms(head)
        if lives_ms == NEVER_MS:
            return Tail((), own_ms) if own_ms else NO_TAIL
        if ttl_ms is None and old is not None and content is not None and self._times.is_absolute:
            counts_on = not (self._times.by_state and moves)
            if counts_on and content.ttl_ms == own_ms and self.now_ms < content.deadline_ms < NEVER_MS:
                return Tail((), own_ms, content.deadline_ms)
        return Tail((), own_ms, min(self.now_ms + lives_ms, NEVER_MS))

    def _ttl_ms(self, head: bytes) -> int:
        ttl_ms = self._ttls.get(head)
        if ttl_ms is None:
            if len(self._ttls) >= _MAX_TTLS:
                self._ttls.clear()
            ttl_ms = self._ttls[head] = self._times.ttl_ms(*self._packer.front(head))
        return ttl_ms

    def _remove(self, key: bytes, raw: bytes) -> None:
        """Remove a record, but remember its updates for a while; or what was remembered."""
        if self.has_tails and shown(raw) and (updates := content_of(raw).updates):
            end_ms = min(self.now_ms, deadline_of(raw)) + UPDATES_REMEMBERED_MS
            if end_ms > self.now_ms:
                self._put_memory(key, raw, updates, end_ms)
                return
        self._overlay[key] = None
        self._effects.cleared.add(key)
        if self.has_tails:
            self.deadlines.remove(key)
        self._move(raw, None)
        self.version += 1
        if self.tells_all or self.tells_births:
            self._tell(key, raw, None)

    def _tell(self, key: bytes, raw: bytes | None, packed: bytes | None) -> None:
        """Let those who watch or scan know, if there was a record, or is one."""
        before, after = (shown(raw), shown(packed)) if self.has_tails else (raw, packed)
        if (before is None) is not (after is None) or (self.tells_all and after is not None):
            self._effects.changes.append(Change(self.version, key, before, after))

    def _move(self, raw: bytes | None, packed: bytes | None) -> None:
        """Count the record where it is now."""
        moved = self._effects.moved
        if (packed := shown(packed)) is not None:
            count_in(moved, head_of(packed), 1)
        if (raw := shown(raw)) is not None:
            count_in(moved, head_of(raw), -1)

    def _check_size(self, key: bytes, packed: bytes) -> None:
        """Raise RecordTooLarge if flow, state and data take too much; what else there is does not count."""
        if shown(packed) is None:
            return
        content = content_of(packed)
        record = head_of(packed) + encode_content(content.data, content.version)
        size = len(key) + len(self._packer.blob(record))
        if size > self._max_record_bytes:
            raise RecordTooLarge(
                f"the record would take {size:,} bytes, and max_record_bytes of bot {self._bot_name!r} is "
                f"{self._max_record_bytes:,}; nothing was changed: keep less, or init with a larger limit",
                bot=self._bot_name,
                size_bytes=size,
                max_record_bytes=self._max_record_bytes,
            )

    def _check_version(self, old: bytes | None, expected_version: int | None) -> None:
        """Raise VersionConflict unless the record is of this version; 0: unless there is none."""
        if expected_version is None:
            return
        actual = version_of(old)
        if actual == (expected_version or None):
            return
        raise VersionConflict(
            f"expected version {expected_version} and found {actual or 'no record'}; "
            "nothing was changed: read the record again, then decide",
            bot=self._bot_name,
            expected_version=expected_version,
            actual_version=actual,
        )


def shown(packed: bytes | None) -> bytes | None:
    """The record, unless all that is left of it are the updates that were handled."""
    return packed if packed is not None and deadline_of(packed) else None


def _end_ms(packed: bytes) -> int:
    """When the record is to be swept, or what is left of it."""
    return deadline_of(packed) or content_of(packed).ttl_ms


def _data(old: bytes | None) -> Data:
    return {} if old is None else content_of(old).data


def _updates(content: Content | None, update_id: int | None) -> list[int]:
    """The updates that are to be remembered, the last one behind the others."""
    known = [] if content is None else content.updates
    if update_id is None:
        return known
    near = [each for each in known if abs(each - update_id) < _NEAR_UPDATES and each != update_id]
    return [*near[1 - _MAX_UPDATES :], update_id]
