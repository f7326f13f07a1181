"""Namespace: one shard's records. It evaluates batches, commits them, and answers.

Reads are answered from committed records at once. Writes that arrive during a commit form the next one, and
are answered when the store has them. A namespace that cannot know what its store holds, or whether it still
owns it, answers nothing more: a new one is made from the store. It knows neither Ray nor sockets: frames come
in, replies go out.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn, cast

import msgspec

from fsm_ray import protocol, record
from fsm_ray.errors import (
    FsmRayError,
    NamespaceUnavailable,
    RecordTooLarge,
    StoreUnavailable,
    VersionConflict,
)
from fsm_ray.options import BotOptions
from fsm_ray.protocol import (
    NIL,
    READ_CONTENT,
    READ_RECORD,
    WRITE,
    Clear,
    ReadContent,
    SetData,
    SetRecord,
    UpdateData,
    WriteRequest,
    decode_request,
    reply,
)
from fsm_ray.record import MAX_FRONT_BYTES, Packer
from fsm_ray.sessions import Sessions
from fsm_ray.stores.base import Answered, Batch, Contents, Store, lease_clock

logger = logging.getLogger(__name__)

Answer = Callable[[bytes], None]
"""Takes the reply to one request, a whole frame."""


@dataclass(frozen=True, slots=True)
class NamespaceStatistics:
    """What a namespace holds and did, at one moment."""

    records: int
    sessions: int
    operations: int
    """Operations answered since this actor started."""
    version: int


@dataclass(slots=True)
class _Commit:
    """What the store is about to have, and who waits for that."""

    done: asyncio.Future[None]
    started_s: float
    overlay: dict[bytes, bytes | None]
    cleared: set[bytes]
    answers: list[tuple[Answer, bytes]]


_ABSENT = b""
"""What is found where there is no record: unlike None, which is a record that is being cleared."""


_CONFIRM_AT = 2 / 3
"""The part of a lease that is left when the store is asked to confirm it, if no commit did."""


def _ignore(_reason: FsmRayError) -> None: ...


def _over(
    overlay: dict[bytes, bytes | None], records: dict[bytes, bytes | None]
) -> Callable[[bytes], bytes | None]:
    """Finds records as they are when the overlay is committed."""
    return lambda key: overlay[key] if key in overlay else records.get(key)


class RequestRefused(Exception):
    """Raised when a request gets no reply; it never leaves the actor: the connection is closed."""


class MalformedRequest(RequestRefused):
    """Raised when bytes from a client are no request."""


class NotServing(RequestRefused):
    """Raised when the namespace has stopped. The client asks again, and finds the one that came after it."""


class Namespace:
    """One shard's records."""

    def __init__(
        self,
        bot_name: str,
        options: BotOptions,
        store: Store,
        contents: Contents,
        *,
        clock: Callable[[], float] = time.time,
        lease_clock: Callable[[], float] = lease_clock,
        on_stopped: Callable[[FsmRayError], None] = _ignore,
    ) -> None:
        """`on_stopped` is called once, when the namespace stops by itself, with the reason."""
        self._bot_name = bot_name
        self._max_record_bytes = options.max_record_bytes
        # A packed record is smaller than its blob by no more than the front that it shares.
        self._surely_fitting_bytes = options.max_record_bytes - MAX_FRONT_BYTES
        self._store = store
        self._is_durable = store.is_durable
        self._packer = Packer()
        self._content = self._packer.content
        self._packer.pack_all(contents.records)
        self._records = cast("dict[bytes, bytes | None]", contents.records)
        self._version = contents.version
        self._sessions = Sessions(contents.sessions, clock, is_durable=store.is_durable)
        self._clock = clock
        self._lease_clock = lease_clock
        self._lease_s = options.ownership_lease_s
        self._serves_until_s = contents.owned_since_s + self._lease_s if store.is_shared else math.inf
        self._stopped: FsmRayError | None = None
        self._on_stopped = on_stopped
        self._operations = 0
        self._waiting: list[tuple[WriteRequest, Answer]] = []
        self._commits: deque[_Commit] = deque()
        self._max_commits = store.max_commits
        # What the commit that is being put together changes, and what it finds where it changes nothing.
        # Cleared records are None until they are removed, which is before anybody can read them.
        self._overlay = {} if self._is_durable else self._records
        self._below: Callable[[bytes], bytes | None] = self._records.get
        self._cleared: set[bytes] = set()
        self._answered: dict[bytes, Answered] = {} if self._is_durable else self._sessions.answered
        self._methods: dict[type, Callable[..., bytes]] = {
            SetRecord: self._set_record,
            SetData: self._set_data,
            UpdateData: self._update_data,
            Clear: self._clear,
        }

    def handle(self, body: bytes, answer: Answer) -> bytes | None:
        """Take one request, and return its reply; or None, and call `answer` with it when it is committed.

        Raises:
            MalformedRequest: the bytes are no request; nothing of it was evaluated.
            NotServing: the namespace stopped, now or before.
        """
        try:
            request = decode_request(body)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            raise MalformedRequest(str(error)) from error
        if type(request) is WriteRequest:
            if not self._is_durable:
                # There is nothing to commit: the overlay is the records.
                answered = self._evaluate(request)
                if self._cleared:
                    self._remove(self._cleared)
                return answered
            self._commit_soon(request, answer)
            return None
        if self._is_durable and self._lease_clock() >= self._serves_until_s:
            self._stop_serving()
        self._operations += len(request.keys)
        get, results = self._records.get, []
        if type(request) is ReadContent:
            for key in request.keys:
                packed = get(key)
                results.append(NIL if packed is None else self._content(packed))
            return reply(READ_CONTENT, request.number, results)
        for key in request.keys:
            packed = get(key)
            results.append(NIL if packed is None else self._packer.blob(packed))
        return reply(READ_RECORD, request.number, results)

    def statistics(self) -> NamespaceStatistics:
        return NamespaceStatistics(
            records=len(self._records),
            sessions=len(self._sessions),
            operations=self._operations,
            version=self._version,
        )

    async def keep_ownership(self) -> None:
        """Ask a shared store, in time, whether this is still its owner, until the namespace stops."""
        while self._stopped is None:
            now_s = self._lease_clock()
            if now_s >= self._serves_until_s:
                self._stop(self._lapsed())
            elif (wait_s := self._serves_until_s - self._lease_s * _CONFIRM_AT - now_s) > 0:
                await asyncio.sleep(wait_s)
            else:
                await self._confirm(now_s)

    async def close(self) -> None:
        """Stop, and wait for the commit under way. Whoever waits for an answer gets none."""
        self._on_stopped = _ignore
        self._stop(NamespaceUnavailable(f"a shard of bot {self._bot_name!r} was closed", bot=self._bot_name))
        if self._commits:
            await asyncio.wait([commit.done for commit in self._commits])

    async def _confirm(self, now_s: float) -> None:
        try:
            async with asyncio.timeout(self._serves_until_s - now_s):
                await self._store.confirm()
        except (StoreUnavailable, TimeoutError) as error:
            logger.warning("bot %r: its store does not confirm ownership: %s", self._bot_name, error)
            await asyncio.sleep(self._lease_s / 20)
        except FsmRayError as error:
            self._stop(error)
        else:
            self._owned_since(now_s)

    def _owned_since(self, since_s: float) -> None:
        if self._store.is_shared and self._stopped is None:
            self._serves_until_s = max(self._serves_until_s, since_s + self._lease_s)

    def _stop_serving(self) -> NoReturn:
        if self._stopped is None:
            self._stop(self._lapsed())
        raise NotServing

    def _lapsed(self) -> StoreUnavailable:
        return StoreUnavailable(
            f"the store of bot {self._bot_name!r} did not confirm within ownership_lease_s "
            f"({self._lease_s} s) that this actor owns it",
            bot=self._bot_name,
        )

    def _stop(self, reason: FsmRayError) -> None:
        if self._stopped is None:
            self._stopped = reason
            self._serves_until_s = -math.inf
            self._waiting.clear()
            self._on_stopped(reason)

    # The way of a write to a store: evaluate all that wait into an overlay, commit it, publish it, answer;
    # then again with what came meanwhile. Where a store takes commits ahead, the next one is evaluated over
    # the overlay of the one under way, and handed over before that is done.

    def _commit_soon(self, request: WriteRequest, answer: Answer) -> None:
        if self._stopped is not None:
            raise NotServing
        self._waiting.append((request, answer))
        self._commit_waiting()

    def _commit_waiting(self) -> None:
        """Commit what waits, if anything does, and the store takes a further commit."""
        if not self._waiting or len(self._commits) == self._max_commits:
            return
        waiting, self._waiting = self._waiting, []
        self._below = _over(self._commits[-1].overlay, self._records) if self._commits else self._records.get
        self._overlay = {}
        self._cleared = set()
        self._answered = {}
        answers = [(answer, self._evaluate(request)) for request, answer in waiting]
        if not self._overlay and self._answered.keys() <= self._sessions.answered.keys():
            # Nothing was changed, so there is nothing to keep: sent again, such a write is answered again.
            # Only a new session is kept at once, for an unknown one that resends passes for a forgotten one.
            # What was found is as good as what a read finds, once it is committed.
            if self._commits:
                self._commits[-1].answers += answers
            elif self._lease_clock() < self._serves_until_s:
                for answer, answered in answers:
                    answer(answered)
            else:
                self._stop(self._lapsed())
            return
        blob = self._packer.blob
        records = {key: packed and blob(packed) for key, packed in self._overlay.items()}
        forgotten = self._sessions.take_forgotten(self._answered)
        self._sessions.remember(self._answered)
        started_s = self._lease_clock()
        done = self._store.commit(Batch(self._version, records, self._answered, forgotten))
        self._commits.append(_Commit(done, started_s, self._overlay, self._cleared, answers))
        done.add_done_callback(self._committed)

    def _committed(self, done: asyncio.Future[None]) -> None:
        error = asyncio.CancelledError() if done.cancelled() else done.exception()
        if error is not None:
            # Whether it was kept is unknown, and memory can follow the store no more.
            if not isinstance(error, FsmRayError):
                error = StoreUnavailable(f"a commit failed: {error!r}", bot=self._bot_name)
            self._stop(error)
        if self._stopped is None:
            commit = self._commits.popleft()
            self._owned_since(commit.started_s)
            self._publish(commit)

    def _publish(self, commit: _Commit) -> None:
        """Show what was committed, and answer; then go on with what came meanwhile."""
        self._records.update(commit.overlay)
        self._remove(commit.cleared)
        for answer, answered in commit.answers:
            answer(answered)
        self._commit_waiting()

    def _remove(self, cleared: set[bytes]) -> None:
        for key in cleared:
            if self._records.get(key, _ABSENT) is None:
                del self._records[key]
        cleared.clear()

    def _evaluate(self, request: WriteRequest) -> bytes:
        """The reply to one request; its effect goes to the overlay."""
        last = self._answered.get(request.session)
        if last is None or last.number >= request.number:
            try:
                known = self._sessions.recall(request, self._answered)
            except FsmRayError as error:
                refusal = protocol.encode_error(error)
                return reply(WRITE, request.number, [refusal] * len(request.operations))
            if known is not None:
                return known
        self._operations += len(request.operations)
        results = []
        for operation in request.operations:
            try:
                if operation.expected_version is not None:
                    self._check_version(operation.key, operation.expected_version)
                results.append(self._methods[type(operation)](operation))
            except FsmRayError as error:
                # A failed operation leaves the others of its batch alone.
                results.append(protocol.encode_error(error, operation.key))
        answer = reply(WRITE, request.number, results)
        self._answered[request.session] = Answered(request.number, answer, self._clock())
        return answer

    def _set_record(self, operation: SetRecord) -> bytes:
        version = self._version + 1
        self._put(operation.key, self._packer.pack(operation.flow, operation.state, operation.data, version))
        return protocol.encode_result(version)

    def _set_data(self, operation: SetData) -> bytes:
        key, version = operation.key, self._version + 1
        self._put(key, self._packer.replace(self._current(key), operation.data, version))
        return protocol.encode_result(version)

    def _update_data(self, operation: UpdateData) -> bytes:
        key, overlay = operation.key, self._overlay
        packed = overlay[key] if key in overlay else self._below(key)
        packed, content = self._packer.merge(packed, operation.changes, self._version + 1)
        if len(key) + len(packed) > self._surely_fitting_bytes:
            self._check_size(key, packed)
        overlay[key] = packed
        self._version += 1
        return content

    def _clear(self, operation: Clear) -> bytes:
        was_there = self._current(operation.key) is not None
        if was_there:
            self._overlay[operation.key] = None
            self._cleared.add(operation.key)
            self._version += 1
        return protocol.encode_result(was_there)

    def _current(self, key: bytes) -> bytes | None:
        """The record as the operations before this one leave it, committed or not."""
        overlay = self._overlay
        return overlay[key] if key in overlay else self._below(key)

    def _put(self, key: bytes, packed: bytes) -> None:
        if len(key) + len(packed) > self._surely_fitting_bytes:
            self._check_size(key, packed)
        self._overlay[key] = packed
        self._version += 1

    def _check_size(self, key: bytes, packed: bytes) -> None:
        size = len(key) + len(self._packer.blob(packed))
        if size > self._max_record_bytes:
            raise RecordTooLarge(
                f"the record would take {size:,} bytes, and max_record_bytes of bot {self._bot_name!r} is "
                f"{self._max_record_bytes:,}; nothing was changed: keep less, or init with a larger limit",
                bot=self._bot_name,
                size_bytes=size,
                max_record_bytes=self._max_record_bytes,
            )

    def _check_version(self, key: bytes, expected_version: int) -> None:
        actual = record.version_of(self._current(key))
        if actual != (expected_version or None):
            raise VersionConflict(
                f"expected version {expected_version} and found {actual or 'no record'}; "
                "nothing was changed: read the record again, then decide",
                bot=self._bot_name,
                expected_version=expected_version,
                actual_version=actual,
            )
