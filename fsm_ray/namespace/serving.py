"""Namespace: one shard's records. It evaluates batches, commits them, and answers.

Reads are answered from committed records at once. Writes that arrive during a commit form the next one, and
are answered when the store has them. A namespace that cannot know what its store holds, or whether it still
owns it, answers nothing more: a new one is made from the store. It knows neither Ray nor sockets: frames come
in, replies go out.
"""

from __future__ import annotations

import asyncio
import functools
import math
import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, islice
from typing import NoReturn, cast

import msgspec

from fsm_ray import protocol
from fsm_ray.errors import FsmRayError, NamespaceUnavailable, NotOwner, Overloaded, StoreUnavailable
from fsm_ray.logs import where
from fsm_ray.namespace.evaluation import Effects, Evaluator, shown
from fsm_ray.namespace.events import Events
from fsm_ray.namespace.refusals import refusal
from fsm_ray.namespace.scans import Scans
from fsm_ray.namespace.turns import Turns
from fsm_ray.namespace.watches import Watches
from fsm_ray.options import BotOptions
from fsm_ray.protocol import (
    COUNT,
    NIL,
    READ_CONTENT,
    READ_RECORD,
    SCAN,
    TURN,
    WRITE,
    CountRequest,
    GrantsRequest,
    ReadContent,
    ReadRecord,
    Request,
    ScanRequest,
    Transact,
    TurnRequest,
    WatchRequest,
    Write,
    WriteRequest,
    decode_request,
    reply,
)
from fsm_ray.record import Packer, count_in
from fsm_ray.sessions import LARGE_REPLY_BYTES, Sessions
from fsm_ray.stores.base import Answered, Batch, Contents, Stale, Store, lease_clock
from fsm_ray.tally import MEASURE_EVERY, OperationTally, ShardTally, now_ns
from fsm_ray.version import load_fields

Answer = Callable[[bytes], None]
"""Takes the reply to one request, a whole frame."""


@dataclass(frozen=True, slots=True)
class NamespaceStatistics:
    """What a namespace holds and did, at one moment."""

    records: int
    sessions: int
    operations: int
    """Operations answered since this actor started."""
    operations_per_s: float
    """Of the last seconds."""
    version: int
    turns: int
    """Conversations that a turn has."""
    waiting_turns: int
    """Turns that wait for one."""
    watches: int
    scans: int

    __setstate__ = load_fields


@dataclass(slots=True, eq=False)
class _Commit:
    """What the store is about to have, and who waits for that."""

    done: asyncio.Future[None]
    started_s: float
    effects: Effects
    answers: list[tuple[Answer, bytes]]
    began_ns: int
    measured: list[tuple[int, int]]
    """Operations of the write requests that are measured, and when these came."""
    evaluated: OperationTally
    """Its operations, which are counted when it is done: what was published cannot be taken back."""


_ABSENT = b""
"""What is found where there is no record: unlike None, which is a record that is being cleared."""

_OF_MANY = (ScanRequest, CountRequest, WatchRequest)

MAX_WAITING_BYTES = 256 << 20
"""Of writes that wait for a commit; past it, further ones are refused."""

_MAX_COMMIT_BYTES = 64 << 20
"""Of the requests of one commit, their replies and what else they put into it, but for the last request; the
others wait for the next commit."""

_OPERATION_BYTES = 1_024
"""What an operation takes beside its bytes, decoded. Measured: 0.3 to 0.7 KB with one to eight fields."""

_RATED_TICKS = 10
"""Ticks over which operations per second are told."""

TICK_S = 1.0
"""How often what has grown old is looked at."""

SWEEP_PAUSE_S = 0.005
"""Between two steps of a sweep, so that others have most of the time."""

_SWEPT_AT_ONCE = 128
"""Records that are swept in one step."""

_REWRITTEN_AT_ONCE = 128
"""Records and sessions that are committed again in one step."""

_REWRITTEN_BYTES = 4 << 20
"""Of these records and replies, but for the last one."""

_CONFIRM_AT = 2 / 3
"""The part of a lease that is left when the store is asked to confirm it, if no commit did."""


_UNDECODABLE = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError)


def _decoded(body: bytes) -> Request:
    try:
        return decode_request(body)
    except _UNDECODABLE as error:
        raise MalformedRequest(str(error)) from error


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
        tally: ShardTally | None = None,
        shard: int = 0,
    ) -> None:
        """Make one of what the store holds.

        Args:
            bot_name: for errors and the log, as `shard`.
            options: of the bot.
            store: gets the commits.
            contents: what `store.open` returned; the namespace keeps it, and changes it.
            clock: wall clock, in seconds.
            lease_clock: see `stores.base.lease_clock`.
            on_stopped: called once, when the namespace stops by itself, with the reason.
            tally: what to count in.
            shard: its number.
        """
        self._bot_name = bot_name
        self._tally = tally or ShardTally()
        self._counted = self._tally.operations
        self._measured = 0
        """Which of so many requests of a session is; another one each second, as sessions may be short."""
        self._store = store
        self._is_durable = store.is_durable
        self._packer = Packer()
        self._content = self._packer.content
        census = self._packer.pack_all(contents.records)
        self._records = cast("dict[bytes, bytes | None]", contents.records)
        self._counts = census.counts
        self._sessions = Sessions(contents.sessions, clock, is_durable=store.is_durable)
        self._clock = clock
        self._lease_clock = lease_clock
        self._lease_s = options.ownership_lease_s
        self._serves_until_s = contents.owned_since_s + self._lease_s if store.is_shared else math.inf
        self._stopped: FsmRayError | None = None
        self._on_stopped = on_stopped
        self._scanned_after = 0
        """How many operations there were when a scan was last asked for."""
        self._waiting: deque[tuple[WriteRequest, Answer, int, int]] = deque()
        """Writes that are to be committed, who gets their replies, when they came (0: that is not measured),
        and how many bytes they take."""
        self._waiting_bytes = 0
        self._resent: dict[tuple[bytes, int], list[Answer]] = {}
        """Session and number of those of them that were sent again -> all who get the reply. They are not
        bounded by MAX_WAITING_BYTES, so one that comes once more takes no further place."""
        self._due: list[bytes] = []
        self._stale = contents.stale
        self._rewriting = Stale()
        """What of `_stale` goes into the next commit."""
        self._rewritten: asyncio.Future[None] | None = None
        """Done when that is committed; cancelled when the namespace stops."""
        self._commits: deque[_Commit] = deque()
        self._max_commits = store.max_commits
        self._answered: dict[bytes, Answered] = {} if self._is_durable else self._sessions.answered
        self._turns = Turns(self._blob_for_turn, lease_clock, self._tally)
        self._evaluator = Evaluator(
            bot_name,
            options,
            self._packer,
            version=contents.version,
            census=census,
            below=self._records.get,
            now_ms=self._now_ms(),
            check_turn=self._turns.check,
        )
        self._is_over = self._evaluator.is_over
        self._scans = Scans(
            bot_name, self._records, self._packer, self._is_over, lease_clock, tally=self._tally
        )
        self._watches = Watches(bot_name, self._packer, lease_clock, self._tally)
        self._events = Events(f"shard {shard} of bot {bot_name!r}", self._tally, lease_clock)
        self._rates = deque([(lease_clock(), self._operations)], maxlen=_RATED_TICKS)
        # What the commit that is being put together does. In memory there is nothing to commit.
        self._effects = Effects() if self._is_durable else Effects(self._records, moved=self._counts)
        self._evaluator.begin(self._effects, self._records.get)
        self._evaluated: OperationTally = self._tally
        """Where the writes of that commit are counted."""

    def handle(self, body: bytes, answer: Answer) -> bytes | None:
        """Take one request, and return its reply; or None, and call `answer` with it when it is committed.

        Raises:
            MalformedRequest: the bytes are no request; nothing of it was evaluated.
            NotServing: the namespace stopped, now or before.
        """
        try:
            request = decode_request(body)
        except _UNDECODABLE as error:
            raise MalformedRequest(str(error)) from error
        began_ns = now_ns() if request.number % MEASURE_EVERY == self._measured else 0
        if type(request) is WriteRequest:
            if self._is_durable:
                return self._commit_soon(request, answer, began_ns, len(body))
            # There is nothing to commit: what is evaluated is there.
            answered = self._evaluate(request)
            effects = self._effects
            if effects.cleared or effects.changes or effects.ended:
                self._settle(effects)
            if began_ns:
                self._measure(WRITE, len(request.operations), began_ns)
            return answered
        if self._is_durable and self._lease_clock() >= self._serves_until_s:
            self._stop_serving()
        if type(request) is ReadContent:
            kind, answered = READ_CONTENT, self._read(READ_CONTENT, request, self._content)
        elif type(request) is ReadRecord:
            kind, answered = READ_RECORD, self._read(READ_RECORD, request, self._packer.blob)
        else:
            return self._handle_other(request, answer, began_ns)
        if began_ns:
            self._measure(kind, len(request.keys), began_ns)
        return answered

    def _handle_other(
        self,
        request: TurnRequest | GrantsRequest | ScanRequest | CountRequest | WatchRequest,
        answer: Answer,
        began_ns: int,
    ) -> bytes | None:
        if isinstance(request, TurnRequest):
            answered = self._turns.handle(request, answer)
            if began_ns:
                self._measure(TURN, len(request.operations), began_ns)
            return answered
        if isinstance(request, GrantsRequest):
            return self._turns.listen(request, answer)
        self._counted[type(request)] += 1
        if isinstance(request, WatchRequest):
            return self._watch(request, answer)
        # These are few, and take their time.
        began_ns = now_ns()
        if isinstance(request, CountRequest):
            kind, answered = COUNT, self._count(request)
        else:
            kind, answered = SCAN, self._scan(request)
        self._measure(kind, 1, began_ns)
        return answered

    def _measure(self, kind: int, operations: int, began_ns: int) -> None:
        """Count a request of this kind and size, which came then, and is answered now."""
        self._tally.batch[kind].add(operations)
        self._tally.request_ns[kind].add(now_ns() - began_ns)

    def _scan(self, request: ScanRequest) -> bytes:
        operations = self._operations
        is_alone, self._scanned_after = operations == self._scanned_after, operations
        answered = self._scans.handle(request, self._now_ms(), is_alone=is_alone)
        self._observe()
        return answered

    def _watch(self, request: WatchRequest, answer: Answer) -> bytes | None:
        answered = self._watches.handle(request, self._evaluator.version, answer)
        if answered is not None and self._commits and not self._watches.have_changes:
            # The version in it may not be committed yet: a scan that followed would miss changes.
            self._commits[-1].answers.append((answer, answered))
            answered = None
        self._observe()
        return answered

    def disconnected(self, answer: Answer) -> None:
        """Forget a client whose connection is gone; `handle` got this, or its equal, with its requests."""
        lost = self._tally.turns_lost
        self._turns.disconnected(answer)
        self._events.disconnected(self._tally.turns_lost - lost)
        self._watches.disconnected(answer)

    def refuse(self, body: bytes, error: FsmRayError) -> bytes | None:
        """The reply to a request that is not to be handled now: this error for each of its operations.

        None: a write that was sent again may have been committed, so nothing can be said of it.

        Raises:
            MalformedRequest: the bytes are no request.
        """
        request = _decoded(body)
        if isinstance(request, WriteRequest) and request.is_resend:
            return None
        return refusal(request, error, self._tally)

    def _read(self, kind: int, request: ReadContent | ReadRecord, part: Callable[[bytes], bytes]) -> bytes:
        keys = request.keys
        self._counted[type(request)] += len(keys)
        get, results = self._records.get, []
        if self._evaluator.has_tails:
            now_ms = self._now_ms()
            for key in keys:
                packed = get(key)
                results.append(NIL if packed is None or self._is_over(packed, now_ms) else part(packed))
            return reply(kind, request.number, results)
        for key in keys:
            packed = get(key)
            results.append(NIL if packed is None else part(packed))
        return reply(kind, request.number, results)

    def _blob_for_turn(self, key: bytes) -> bytes:
        """The record with which a turn begins; NIL: there is none."""
        packed = self._records.get(key)
        if packed is None:
            return NIL
        if self._is_over(packed, self._now_ms()):
            return self._evaluator.memory_of(packed) or NIL
        return self._packer.blob(packed)

    def _count(self, request: CountRequest) -> bytes:
        front = self._packer.front
        counted = [protocol.encode_counted(front(head), count) for head, count in self._counts.items()]
        return reply(COUNT, request.number, counted)

    def _observe(self) -> None:
        """See to it that changes are told of as long as somebody wants them."""
        # What a commit does to the records is told to scans when it is shown.
        in_memory = not self._is_durable
        self._evaluator.tells_births = in_memory and self._scans.want_births
        self._evaluator.tells_all = self._watches.want_changes or (in_memory and len(self._scans) > 0)

    @property
    def _operations(self) -> int:
        """Operations so far on single conversations."""
        counted = self._counted
        return sum(counted.values()) - sum(counted[each] for each in _OF_MANY)

    def _now_ms(self) -> int:
        return int(self._clock() * 1_000)

    def statistics(self) -> NamespaceStatistics:
        """What there is at this moment."""
        since_s, before = self._rates[0]
        return NamespaceStatistics(
            records=sum(self._counts.values()),
            sessions=len(self._sessions),
            operations=self._operations,
            operations_per_s=(self._operations - before) / max(self._lease_clock() - since_s, TICK_S),
            version=self._evaluator.version,
            turns=len(self._turns.leases),
            waiting_turns=self._turns.leases.waiting,
            watches=len(self._watches),
            scans=len(self._scans),
        )

    async def size_bytes(self) -> int:
        """What keys and records take, packed; added up in small steps."""
        total = 0
        keys, get = iter(list(self._records)), self._records.get
        while some := list(islice(keys, 1_000)):
            total += sum(len(key) + len(get(key) or b"") for key in some)
            await asyncio.sleep(0)
        return total

    async def keep_tidy(self) -> None:
        """End and forget what has grown old, again and again, until the namespace stops."""
        while self._stopped is None:
            await asyncio.sleep(TICK_S)
            try:
                await self._tidy_up()
            except Exception as error:  # noqa: BLE001  # if this ended, dead workers would keep their turns
                self._events.tidying_failed(error)

    async def _tidy_up(self) -> None:
        self._rates.append((self._lease_clock(), self._operations))
        self._measured = random.randrange(MEASURE_EVERY)
        lost = self._tally.turns_lost
        self._turns.leases.expire()
        self._events.expired(self._tally.turns_lost - lost)
        self._events.look_at_refusals()
        self._scans.forget_idle()
        self._watches.forget_idle()
        self._observe()
        while self.sweep():  # noqa: ASYNC110  # it is paused for others, and waits for no event
            await asyncio.sleep(SWEEP_PAUSE_S)

    def sweep(self) -> bool:
        """Remove some of the records that have expired; tell whether there may be more."""
        if self._stopped is not None or self._due:
            return self._stopped is None
        due = list(islice(self._evaluator.deadlines.take_due(self._now_ms()), _SWEPT_AT_ONCE))
        if not due:
            return False
        if self._is_durable:
            self._due = due
            self._commit_waiting()
        else:
            self._sweep(due)
            self._settle(self._effects)
        return True

    def _sweep(self, due: list[bytes]) -> None:
        self._evaluator.now_ms = self._now_ms()
        for key in due:
            if self._turns.leases.is_held(key):
                # It is the turn's for as long as that takes.
                self._evaluator.deadlines.add(key, self._now_ms())
            else:
                self._evaluator.sweep(key)

    @property
    def stale(self) -> int:
        """How many records and sessions are still to be committed again, see `rewrite`."""
        return len(self._stale) + (self._rewritten is not None)

    def make_all_stale(self) -> None:
        """Let `rewrite` commit everything again."""
        # Also what is about to be committed, and so was given to the store already.
        under_way = [commit.effects.overlay for commit in self._commits]
        self._stale = Stale(
            list({}.fromkeys(chain(self._records, *under_way))), list(self._sessions.answered)
        )

    async def rewrite(self) -> bool:
        """Commit what is stale again, as it is, in small steps; tell whether the namespace lived to see it.

        A store that encrypts asks for this, see `RotatingStore`. Operations go on meanwhile.
        """
        while self._stopped is None and self._stale:
            self._rewriting = self._take_stale()
            self._rewritten = asyncio.get_running_loop().create_future()
            self._commit_waiting()
            # Not awaited itself, which would raise here where the namespace stops.
            await asyncio.wait([self._rewritten])
            self._rewritten = None
            await asyncio.sleep(SWEEP_PAUSE_S)
        return self._stopped is None

    def _take_stale(self) -> Stale:
        """What is committed again in the next step."""
        taken, size, stale = Stale(), 0, self._stale
        while stale and len(taken) < _REWRITTEN_AT_ONCE and size < _REWRITTEN_BYTES:
            if stale.keys:
                taken.keys.append(key := stale.keys.pop())
                size += len(self._records.get(key) or b"")
            else:
                taken.sessions.append(session := stale.sessions.pop())
                known = self._sessions.answered.get(session)
                size += 0 if known is None else len(known.reply)
        return taken

    def _add_stale(
        self, stale: Stale, records: dict[bytes, bytes | None], below: Callable[[bytes], bytes | None]
    ) -> dict[bytes, Answered]:
        """Add to a commit's records those of these that it does not change; return its sessions and these."""
        for key in stale.keys:
            if key not in records and (packed := below(key)) is not None:
                records[key] = self._packer.blob(packed)
        known = self._sessions.answered
        return {each: known[each] for each in stale.sessions if each in known} | self._answered

    def _tell_rewritten(self, _: bytes) -> None:
        if self._rewritten is not None and not self._rewritten.done():
            self._rewritten.set_result(None)

    async def keep_ownership(self) -> None:
        """Ask a shared store, in time, whether this is still its owner, until the namespace stops."""
        while self._stopped is None:
            now_s = self._lease_clock()
            if now_s >= self._serves_until_s:
                self._lapse()
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
            self._events.unconfirmed(error, self._serves_until_s)
            await asyncio.sleep(self._lease_s / 20)
        except FsmRayError as error:
            self._stop(error)
        else:
            self._owned_since(now_s)
            self._events.confirmed()

    def _owned_since(self, since_s: float) -> None:
        if self._store.is_shared and self._stopped is None:
            self._serves_until_s = max(self._serves_until_s, since_s + self._lease_s)

    def _stop_serving(self) -> NoReturn:
        if self._stopped is None:
            self._lapse()
        raise NotServing

    def _lapse(self) -> None:
        reason = StoreUnavailable(
            f"the store of bot {self._bot_name!r} did not confirm within ownership_lease_s "
            f"({self._lease_s} s) that this actor owns it",
            bot=self._bot_name,
        )
        self._stop(reason, is_lapsed=True)

    def _stop(self, reason: FsmRayError, *, is_lapsed: bool = False) -> None:
        if self._stopped is None:
            self._stopped = reason
            self._tally.ownerships_lost += is_lapsed or isinstance(reason, NotOwner)
            self._serves_until_s = -math.inf
            self._waiting.clear()
            self._waiting_bytes = 0
            self._resent.clear()
            self._turns.stop()
            self._watches.stop()
            if self._rewritten is not None:
                self._rewritten.cancel()
            self._on_stopped(reason)

    # The way of a write to a store: evaluate all that wait into an overlay, commit it, publish it, answer;
    # then again with what came meanwhile. Where a store takes commits ahead, the next one is evaluated over
    # the overlay of the one under way, and handed over before that is done.

    def _commit_soon(self, request: WriteRequest, answer: Answer, began_ns: int, size: int) -> bytes | None:
        """Commit the request soon; or return a refusal, where too much waits."""
        if self._stopped is not None:
            raise NotServing
        size += _OPERATION_BYTES * len(request.operations)
        # What is sent again may have been committed: it waits. Clients have a request or two under way each.
        if self._waiting and self._waiting_bytes + size > MAX_WAITING_BYTES and not request.is_resend:
            error = Overloaded(
                f"a shard of bot {self._bot_name!r} has {self._waiting_bytes:,} bytes of writes that wait "
                "for its store: nothing was changed, retry later",
                bot=self._bot_name,
            )
            return refusal(request, error, self._tally)
        if request.is_resend:
            answers = self._resent.setdefault((request.session, request.number), [])
            answers.append(answer)
            if len(answers) > 1:
                return None
        self._waiting.append((request, answer, began_ns, size))
        self._waiting_bytes += size
        self._commit_waiting()
        return None

    def _commit_waiting(self) -> None:
        """Commit what waits, if anything does, and the store takes a further commit."""
        if not (self._waiting or self._due or self._rewriting) or len(self._commits) == self._max_commits:
            return
        due, self._due = self._due, []
        rewriting, self._rewriting = self._rewriting, Stale()
        below = (
            _over(self._commits[-1].effects.overlay, self._records) if self._commits else self._records.get
        )
        self._effects = effects = Effects()
        self._evaluator.begin(effects, below)
        self._answered = {}
        self._evaluated = evaluated = OperationTally()
        answers, measured, operations = self._evaluate_waiting()
        for turn, _ in effects.ended:
            self._turns.leases.keep(turn)
        if due:
            self._sweep(due)
        if not (effects.overlay or rewriting) and self._answered.keys() <= self._sessions.answered.keys():
            # Nothing was changed, so there is nothing to keep: sent again, such a write is answered again.
            # Only a new session is kept at once, for an unknown one that resends passes for a forgotten one.
            # What was found is as good as what a read finds, once it is committed.
            if self._commits:
                self._commits[-1].answers += answers
                self._commits[-1].measured += measured
                self._commits[-1].effects.ended += effects.ended
                self._commits[-1].evaluated.add(evaluated)
            elif self._lease_clock() < self._serves_until_s:
                self._tally.add(evaluated)
                self._end_turns(effects)
                for answer, answered in answers:
                    answer(answered)
                self._measure_writes(measured)
                self._commit_waiting()
            else:
                self._lapse()
            return
        blob = self._packer.blob
        records = {key: packed and blob(packed) for key, packed in effects.overlay.items()}
        forgotten = self._sessions.take_forgotten(self._answered)
        self._sessions.remember(self._answered)
        sessions = self._answered
        if rewriting:
            sessions = self._add_stale(rewriting, records, below)
            answers.append((self._tell_rewritten, b""))
        self._tally.commit_operations.add(operations)
        started_s, began_ns = self._lease_clock(), now_ns()
        done = self._handed_over(Batch(self._evaluator.version, records, sessions, forgotten))
        commit = _Commit(done, started_s, effects, answers, began_ns, measured, evaluated)
        self._commits.append(commit)
        done.add_done_callback(functools.partial(self._committed, commit))
        self._commit_waiting()

    def _handed_over(self, batch: Batch) -> asyncio.Future[None]:
        """Give the batch to the store; done when it is kept."""
        try:
            return self._store.commit(batch)
        except Exception as error:  # noqa: BLE001  # it is told as that of a commit that fails later
            failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            failed.set_exception(error)
            return failed

    def _evaluate_waiting(self) -> tuple[list[tuple[Answer, bytes]], list[tuple[int, int]], int]:
        """Evaluate what waits, as much as fits into one commit.

        Returns the replies; of each request that is measured, how many operations it has and when it came;
        and how many operations there are in all.
        """
        answers, measured, operations, total = [], [], 0, 0
        effects = self._effects
        while self._waiting and total + effects.unsent_bytes < _MAX_COMMIT_BYTES:
            request, answer, began_ns, size = self._waiting.popleft()
            self._waiting_bytes -= size
            answered = self._evaluate(request)
            total += size + len(answered)
            operations += len(request.operations)
            if request.is_resend:
                resent = self._resent.pop((request.session, request.number))
                answers += [(each, answered) for each in resent]
            else:
                answers.append((answer, answered))
            if began_ns:
                measured.append((len(request.operations), began_ns))
        return answers, measured, operations

    def _committed(self, commit: _Commit, done: asyncio.Future[None]) -> None:
        error = asyncio.CancelledError() if done.cancelled() else done.exception()
        if error is None:
            self._tally.add(commit.evaluated)
        else:
            # Whether it was kept is unknown, and memory can follow the store no more.
            self._tally.commits_failed += 1
            if not isinstance(error, FsmRayError):
                # What others say than the system may be of users.
                why = repr(error) if isinstance(error, OSError) else where(error)
                error = StoreUnavailable(f"a commit failed: {why}", bot=self._bot_name)
            self._tally.add_failed(commit.evaluated, error)
            self._stop(error)
        if self._stopped is None:
            self._commits.popleft()
            self._owned_since(commit.started_s)
            took_ns = now_ns() - commit.began_ns
            self._tally.commit_ns.add(took_ns)
            self._events.committed(took_ns)
            self._publish(commit)

    def _publish(self, commit: _Commit) -> None:
        """Show what was committed, and answer; then go on with what came meanwhile."""
        effects = commit.effects
        if self._scans.want_births:
            get = self._records.get
            self._scans.note(
                (0, key, shown(get(key)), shown(packed)) for key, packed in effects.overlay.items()
            )
        self._records.update(effects.overlay)
        for head, more in effects.moved.items():
            count_in(self._counts, head, more)
        if effects.cleared or effects.changes or effects.ended:
            self._settle(effects)
        for answer, answered in commit.answers:
            answer(answered)
        self._measure_writes(commit.measured)
        self._commit_waiting()

    def _measure_writes(self, measured: list[tuple[int, int]]) -> None:
        for operations, began_ns in measured:
            self._measure(WRITE, operations, began_ns)

    def _settle(self, effects: Effects) -> None:
        """Let all else follow the records."""
        for key in effects.cleared:
            if self._records.get(key, _ABSENT) is None:
                del self._records[key]
        effects.cleared.clear()
        if effects.changes:
            if not self._is_durable and self._scans.want_births:
                self._scans.note(effects.changes)
            self._watches.note(effects.changes)
            effects.changes.clear()
        self._end_turns(effects)

    def _end_turns(self, effects: Effects) -> None:
        """End what was committed, so that those that wait for it begin with what it left."""
        for turn, key in effects.ended:
            self._turns.leases.release(turn, key)
        effects.ended.clear()

    def _evaluate(self, request: WriteRequest) -> bytes:
        """The reply to one request; its effect goes to the overlay."""
        last = self._answered.get(request.session)
        if last is None or last.number >= request.number:
            try:
                known = self._sessions.recall(request, self._answered)
            except FsmRayError as error:
                return refusal(request, error, self._evaluated)
            if known is not None:
                self._tally.answered_again += 1
                return known
        now_s = self._clock()
        self._evaluator.now_ms = int(now_s * 1_000)
        methods, counted, results = self._evaluator.methods, self._evaluated.operations, []
        for operation in request.operations:
            kind = type(operation)
            counted[kind] += 1
            try:
                results.append(methods[kind](operation))
            except Exception as error:  # noqa: BLE001  # whatever it is, the others of the commit are left alone
                results.append(self._failed(operation, error))
        answer = reply(WRITE, request.number, results)
        self._answered[request.session] = Answered(request.number, answer, now_s)
        if len(answer) > LARGE_REPLY_BYTES and not self._is_durable:
            # Those of a commit are remembered, and counted, as it is handed over.
            self._sessions.keep_large(request.session, len(answer))
        return answer

    def _failed(self, operation: Write, error: Exception) -> bytes:
        """The result of an operation that met this error."""
        if not isinstance(error, FsmRayError):
            self._events.operation_failed(error)
            error = FsmRayError(
                f"a shard of bot {self._bot_name!r} met {where(error)}: this operation changed nothing. It "
                "is a fault of fsm_ray, or of what sent it: report it",
                bot=self._bot_name,
            )
        self._evaluated.count_failed(type(operation), error)
        # Of a transaction, the error names the key of the operation that failed.
        key = vars(error).pop("key", None) if isinstance(operation, Transact) else operation.key
        return protocol.encode_error(error, key)
