"""Namespace: one shard's records. It evaluates batches, commits them, and answers.

Reads are answered from committed records at once. Writes that arrive during a commit form the next one, and
are answered when the store has them. It knows neither Ray nor sockets: frames come in, replies go out.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from fsm_ray import protocol, record
from fsm_ray.errors import FsmRayError, RecordTooLarge, VersionConflict
from fsm_ray.options import BotOptions
from fsm_ray.protocol import Clear, ReadRequest, SetData, SetRecord, UpdateData, WriteRequest
from fsm_ray.record import Packer
from fsm_ray.sessions import Sessions
from fsm_ray.stores.base import Answered, Batch, Contents, Store

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


class MalformedRequest(Exception):
    """Raised when bytes from a client are no request; it never leaves the actor: the connection is closed."""


class Namespace:
    """One shard's records."""

    def __init__(
        self,
        bot_name: str,
        options: BotOptions,
        store: Store,
        contents: Contents,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._bot_name = bot_name
        self._max_record_bytes = options.max_record_bytes
        self._store = store
        self._packer = Packer()
        self._records = {key: self._packer.pack_blob(blob) for key, blob in contents.records.items()}
        self._version = contents.version
        self._sessions = Sessions(contents.sessions, clock)
        self._clock = clock
        self._waiting: list[tuple[WriteRequest, Answer]] = []
        self._commit: asyncio.Future[None] | None = None
        # What the commit that is being put together, or is under way, changes.
        self._overlay: dict[bytes, bytes | None] = {}
        self._cleared: set[bytes] = set()
        self._answered: dict[bytes, Answered] = {}
        self._operations = 0
        self._apply: dict[type, Callable[..., bytes]] = {
            SetRecord: self._set_record,
            SetData: self._set_data,
            UpdateData: self._update_data,
            Clear: self._clear,
        }

    def handle(self, body: bytes | memoryview, answer: Answer) -> None:
        """Take one request. The answer is called once, now or when the request is committed.

        Raises:
            MalformedRequest: the bytes are no request; nothing of it was evaluated.
        """
        try:
            request = protocol.decode_request(body)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            raise MalformedRequest(str(error)) from error
        if type(request) is ReadRequest:
            self._operations += len(request.keys)
            get, blob, nil = self._records.get, self._packer.blob, protocol.NIL
            results = [nil if (packed := get(key)) is None else blob(packed) for key in request.keys]
            answer(protocol.reply(protocol.READ, request.number, results))
        else:
            self._waiting.append((request, answer))
            if self._commit is None:
                self._commit_waiting()

    def statistics(self) -> NamespaceStatistics:
        return NamespaceStatistics(
            records=len(self._records),
            sessions=len(self._sessions),
            operations=self._operations,
            version=self._version,
        )

    # The way of a write: evaluate all that wait, commit, publish, answer; again with what came meanwhile.

    def _commit_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        self._overlay = {}
        self._answered = {}
        answers = [(answer, self._evaluate(request)) for request, answer in waiting]
        commit = self._store.commit(self._batch()) if self._store.is_durable else None
        if commit is None:
            self._publish(answers)
        else:
            self._commit = commit
            commit.add_done_callback(lambda done: self._committed(done, answers))

    def _batch(self) -> Batch:
        blob = self._packer.blob
        records = {key: packed and blob(packed) for key, packed in self._overlay.items()}
        return Batch(self._version, records, self._answered)

    def _committed(self, commit: asyncio.Future[None], answers: list[tuple[Answer, bytes]]) -> None:
        commit.result()
        self._commit = None
        self._publish(answers)
        if self._waiting:
            self._commit_waiting()

    def _publish(self, answers: list[tuple[Answer, bytes]]) -> None:
        for key in self._cleared:
            if self._overlay[key] is None:
                del self._overlay[key]
                self._records.pop(key, None)
        self._cleared.clear()
        self._records.update(self._overlay)  # type: ignore[arg-type]  # no None is left in it
        self._sessions.remember(self._answered)
        for answer, reply in answers:
            answer(reply)

    def _evaluate(self, request: WriteRequest) -> bytes:
        """The reply to one request; its effect goes to the overlay."""
        try:
            reply = self._sessions.recall(
                request.session, request.number, is_resend=request.is_resend, uncommitted=self._answered
            )
        except FsmRayError as error:
            refusal = protocol.encode_error(error)
            return protocol.reply(protocol.WRITE, request.number, [refusal] * len(request.operations))
        if reply is None:
            self._operations += len(request.operations)
            results = [self._result(operation) for operation in request.operations]
            reply = protocol.reply(protocol.WRITE, request.number, results)
            self._answered[request.session] = Answered(request.number, reply, self._clock())
        return reply

    def _result(self, operation: protocol.Write) -> bytes:
        """Apply one operation, or say why not; a failed one leaves the others of its batch alone."""
        try:
            if operation.expected_version is not None:
                self._check_version(operation.key, operation.expected_version)
            return self._apply[type(operation)](operation)
        except FsmRayError as error:
            return protocol.encode_error(error, operation.key)

    def _set_record(self, operation: SetRecord) -> bytes:
        version = self._version + 1
        self._put(operation.key, self._packer.pack(operation.flow, operation.state, operation.data, version))
        return protocol.encode_result(version)

    def _set_data(self, operation: SetData) -> bytes:
        key, version = operation.key, self._version + 1
        self._put(key, self._packer.replace(self._current(key), operation.data, version))
        return protocol.encode_result(version)

    def _update_data(self, operation: UpdateData) -> bytes:
        key = operation.key
        packed = self._packer.merge(self._current(key), operation.changes, self._version + 1)
        self._put(key, packed)
        return self._packer.blob(packed)

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
        return overlay[key] if key in overlay else self._records.get(key)

    def _put(self, key: bytes, packed: bytes) -> None:
        size = len(key) + len(packed)
        if size > self._max_record_bytes:
            raise RecordTooLarge(
                f"the record would take {size:,} bytes, and max_record_bytes of bot {self._bot_name!r} "
                f"is {self._max_record_bytes:,}; nothing was changed: keep less, or init with a larger limit",
                bot=self._bot_name,
                size_bytes=size,
                max_record_bytes=self._max_record_bytes,
            )
        self._overlay[key] = packed
        self._version += 1

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
