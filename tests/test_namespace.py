"""Namespace: batches, commits, answers, over a store whose commits are done when the test says so."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fsm_ray import protocol, record, sessions
from fsm_ray.codec import encode_data, encode_key, extension_hook
from fsm_ray.errors import (
    FsmRayError,
    NotOwner,
    OutcomeUnknown,
    Overloaded,
    RecordTooLarge,
    StoreUnavailable,
    VersionConflict,
)
from fsm_ray.namespace import MalformedRequest, Namespace, NotServing
from fsm_ray.options import BotOptions
from fsm_ray.protocol import READ_CONTENT, READ_RECORD, WRITE, ContentView, RecordView, ReplyDecoder
from fsm_ray.stores.base import Batch, Contents, Store
from fsm_ray.stores.memory import MemoryStore
from fsm_ray.tally import ShardTally

ANN, BOB, CID = (encode_key(name) for name in ("ann", "bob", "cid"))

DECODER = ReplyDecoder(extension_hook(allow_pickle=False))


def view(flow: str | None, state: str | None, data: dict[str, Any], version: int) -> RecordView:
    return RecordView(flow, state, ContentView(data, version))


class FakeStore(Store):
    """Keeps a batch when the test says so; what it kept outlives the namespace."""

    is_durable: ClassVar[bool] = True
    is_shared: ClassVar[bool] = False

    def __init__(self, loop: asyncio.AbstractEventLoop, version: int = 0) -> None:
        self.batches: list[Batch] = []
        """Every batch that was ever to be committed."""
        self.commit_under_way: asyncio.Future[None] | None = None
        self._loop = loop
        self._kept = Contents(version)

    def contents(self) -> Contents:
        """What is kept; whoever gets it may change it."""
        return Contents(self._kept.version, dict(self._kept.records), dict(self._kept.sessions))

    async def open(self) -> Contents:
        return self.contents()

    def commit(self, batch: Batch) -> asyncio.Future[None]:
        assert self.commit_under_way is None
        self.batches.append(batch)
        self.commit_under_way = self._loop.create_future()
        return self.commit_under_way

    def keep(self, batch: Batch | None = None) -> None:
        """Keep the batch, or else the last one, without telling yet."""
        batch = batch or self.batches[-1]
        self._kept.version = batch.version
        for session in batch.forgotten:
            del self._kept.sessions[session]
        self._kept.sessions.update(batch.sessions)
        for key, blob in batch.records.items():
            if blob is None:
                self._kept.records.pop(key, None)
            else:
                self._kept.records[key] = blob

    def done(self, error: Exception | None = None) -> None:
        """Tell that the commit is done, or failed."""
        commit, self.commit_under_way = self.commit_under_way, None
        assert commit is not None
        if error is None:
            self.keep()
            commit.set_result(None)
        else:
            commit.set_exception(error)

    async def confirm(self) -> None:
        raise NotImplementedError

    async def close(self) -> None:
        """Nothing to release."""


class Client:
    """One client of a namespace: it numbers its writes, and collects the replies."""

    def __init__(self, namespace: Namespace, name: str = "client") -> None:
        self.namespace = namespace
        self.replies: list[tuple[int, list[Any]]] = []
        """Number and results of each reply; errors are results."""
        self._session = session_of(name)
        self._number = 0

    def write(self, *operations: bytes) -> None:
        self._number += 1
        self.send(self._number, *operations)

    def resend(self, *operations: bytes) -> None:
        """Send the last write again."""
        self.send(self._number, *operations, is_resend=True)

    def send(self, number: int, *operations: bytes, is_resend: bool = False) -> None:
        body = write_request(number, operations, self._session, is_resend=is_resend)
        handle(self.namespace, body, self._answered)

    def read(self, *keys: bytes) -> list[Any]:
        """The records; a read is answered at once."""
        records = self._read(READ_RECORD, keys)
        contents = self._read(READ_CONTENT, keys)
        assert contents == [record and record.content for record in records]
        return records

    @property
    def results(self) -> list[Any]:
        """The results of the last reply."""
        return self.replies[-1][1]

    def _read(self, kind: int, keys: Sequence[bytes]) -> list[Any]:
        request = protocol.read_request(kind, 77, [protocol.read(key) for key in keys])
        replies: list[bytes] = []
        handle(self.namespace, request[4:], replies.append)
        (reply,) = replies
        answered, number, results = DECODER.decode(reply[4:])
        assert (answered, number) == (kind, 77)
        return list(results)

    def _answered(self, reply: bytes) -> None:
        kind, number, results = DECODER.decode(reply[4:])
        assert kind == WRITE
        self.replies.append(
            (
                number,
                [protocol.decode_error(result) if type(result) is dict else result for result in results],
            )
        )


def handle(namespace: Namespace, body: bytes, answer: Callable[[bytes], None]) -> None:
    """Let the namespace have a request; `answer` is called with its reply, now or later."""
    reply = namespace.handle(body, answer)
    if reply is not None:
        answer(reply)


def write_request(
    number: int, operations: Sequence[bytes], session: bytes, *, is_resend: bool = False
) -> bytes:
    """What follows a frame's length."""
    return protocol.write_request(number, operations, session, is_resend=is_resend)[4:]


def session_of(name: str) -> bytes:
    return name.encode().ljust(16)


class Shard:
    """A namespace, its store, and the steps of a test."""

    def __init__(self, store: FakeStore, **options: Any) -> None:
        self.store = store
        self.now_s = 1_000_000.0
        self._options = BotOptions(**options)
        self.restart()

    def restart(self) -> None:
        """As after kill -9: a new namespace over what the store has kept."""
        self.store.commit_under_way = None
        contents = self.store.contents()
        self.stopped: list[FsmRayError] = []
        self.namespace = Namespace(
            "my_bot",
            self._options,
            self.store,
            contents,
            clock=lambda: self.now_s,
            on_stopped=self.stopped.append,
        )

    def client(self, name: str = "client") -> Client:
        return Client(self.namespace, name)

    async def committed(self) -> None:
        """Let the commit under way be done, and its answers be given."""
        self.store.done()
        await asyncio.sleep(0)

    async def settled(self) -> None:
        """Let commits be done until every write is answered."""
        while self.store.commit_under_way is not None:
            await self.committed()

    async def write(self, *operations: bytes) -> list[Any]:
        """Write as a new client, to the end, and return the results."""
        client = self.client(f"writer {len(self.store.batches)}")
        client.write(*operations)
        await self.settled()
        return client.results


@pytest.fixture
async def shard() -> Shard:
    return Shard(FakeStore(asyncio.get_running_loop()))


@pytest.fixture
async def client(shard: Shard) -> Client:
    return shard.client()


def set_record(
    key: bytes,
    flow: str | None = None,
    state: str | None = None,
    expected_version: int | None = None,
    **data: Any,
) -> bytes:
    return protocol.set_record(key, flow, state, encode_data(data, allow_pickle=False), expected_version)


def set_data(key: bytes, expected_version: int | None = None, **data: Any) -> bytes:
    return protocol.set_data(key, encode_data(data, allow_pickle=False), expected_version)


def update_data(key: bytes, expected_version: int | None = None, **changes: Any) -> bytes:
    return protocol.update_data(key, encode_data(changes, allow_pickle=False), expected_version)


def clear(key: bytes, expected_version: int | None = None) -> bytes:
    return protocol.clear(key, expected_version)


WRITES: dict[str, Callable[[bytes, int | None], bytes]] = {
    "set_record": lambda key, expected_version: set_record(key, expected_version=expected_version),
    "set_data": set_data,
    "update_data": update_data,
    "clear": clear,
}
every_write = pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)


class AheadStore(FakeStore):
    """Takes a second commit while the first is under way, and is done with them in their order."""

    max_commits: ClassVar[int] = 2

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self.commits: deque[tuple[Batch, asyncio.Future[None]]] = deque()

    def commit(self, batch: Batch) -> asyncio.Future[None]:
        assert len(self.commits) < self.max_commits
        self.batches.append(batch)
        self.commits.append((batch, self._loop.create_future()))
        return self.commits[-1][1]

    async def done_with_one(self, error: Exception | None = None) -> None:
        batch, commit = self.commits.popleft()
        if error is None:
            self.keep(batch)
            commit.set_result(None)
        else:
            commit.set_exception(error)
        await asyncio.sleep(0)


@pytest.fixture
async def ahead() -> Shard:
    return Shard(AheadStore(asyncio.get_running_loop()))


class TestCommitsAhead:
    """A store that takes the next commit before the last one is done."""

    @pytest.fixture
    async def store(self, ahead: Shard) -> AheadStore:
        assert isinstance(ahead.store, AheadStore)
        return ahead.store

    async def test_the_next_commit_is_handed_over_before_the_last_is_done(
        self, ahead: Shard, store: AheadStore
    ) -> None:
        clients = [ahead.client(name) for name in ("ann", "bob", "cid", "dan")]
        for client in clients:
            client.write(update_data(ANN, n=1))
        handed_over = len(store.commits)
        answered = []
        for _ in range(3):
            await store.done_with_one()
            answered.append([len(client.replies) for client in clients])

        assert handed_over == 2
        assert answered == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
        assert [batch.version for batch in store.batches] == [1, 2, 4]

    async def test_it_is_evaluated_over_what_the_last_changes(self, ahead: Shard, store: AheadStore) -> None:
        ann, bob = ahead.client("ann"), ahead.client("bob")
        ann.write(set_record(ANN, "flow", a=1), clear(BOB), set_record(CID))
        bob.write(update_data(ANN, expected_version=1, b=2), clear(BOB), clear(CID), set_record(BOB))
        await store.done_with_one()
        between = bob.read(ANN, BOB, CID)
        await store.done_with_one()

        assert bob.results == [ContentView({"a": 1, "b": 2}, 3), False, True, 5]
        assert between == [view("flow", None, {"a": 1}, 1), None, view(None, None, {}, 2)]
        assert bob.read(ANN, BOB, CID) == [
            view("flow", None, {"a": 1, "b": 2}, 3),
            view(None, None, {}, 5),
            None,
        ]
        assert ahead.namespace.statistics().records == 2

    async def test_a_record_cleared_by_the_last_and_made_again_by_the_next_is_there(
        self, ahead: Shard, store: AheadStore
    ) -> None:
        ann, bob = ahead.client("ann"), ahead.client("bob")
        ann.write(set_record(ANN))
        await store.done_with_one()
        ann.write(clear(ANN))
        bob.write(set_record(ANN, "again"))
        await store.done_with_one()
        between = bob.read(ANN)
        await store.done_with_one()

        assert between == [None]
        assert bob.read(ANN) == [view("again", None, {}, 3)]
        assert ahead.namespace.statistics().records == 1

    async def test_a_write_that_changes_nothing_is_answered_with_the_commit_that_it_found(
        self, ahead: Shard, store: AheadStore
    ) -> None:
        ann, bob = ahead.client("ann"), ahead.client("bob")
        bob.write(clear(CID))
        await store.done_with_one()
        ann.write(set_record(ANN))
        bob.write(set_record(ANN, expected_version=0))
        await asyncio.sleep(0)
        answered_early = len(bob.replies) > 1
        await store.done_with_one()

        assert not answered_early
        assert [type(result) for result in bob.results] == [VersionConflict]
        assert len(store.batches) == 2

    async def test_a_write_sent_again_while_it_is_committed_takes_effect_once(
        self, ahead: Shard, store: AheadStore
    ) -> None:
        ann = ahead.client("ann")
        ann.write(update_data(ANN, n=1))
        ann.resend(update_data(ANN, n=1))
        await asyncio.sleep(0)
        answered_early = bool(ann.replies)
        await store.done_with_one()

        assert not answered_early
        assert ann.replies == [(1, [ContentView({"n": 1}, 1)])] * 2
        assert len(store.batches) == 1

    async def test_when_one_fails_nothing_after_it_is_answered(self, ahead: Shard, store: AheadStore) -> None:
        ann, bob = ahead.client("ann"), ahead.client("bob")
        ann.write(set_record(ANN))
        bob.write(set_record(BOB))
        await store.done_with_one(StoreUnavailable("no"))
        await store.done_with_one()

        assert (ann.replies, bob.replies) == ([], [])
        assert [str(error) for error in ahead.stopped] == ["no"]
        with pytest.raises(NotServing):
            ann.read(ANN)

    async def test_writes_that_arrive_as_an_answer_is_given_wait_where_there_is_no_room(
        self, ahead: Shard, store: AheadStore
    ) -> None:
        late = [ahead.client(f"late {number}") for number in range(3)]

        def write_all(_: bytes) -> None:
            for client in late:
                client.write(update_data(ANN, **{f"n{late.index(client)}": 1}))

        handle(ahead.namespace, write_request(1, [update_data(ANN, a=1)], session_of("first")), write_all)
        ahead.client("second").write(update_data(ANN, b=1))
        while store.commits:
            await store.done_with_one()

        assert [client.results[0].version for client in late] == [3, 4, 5]
        assert late[-1].results[0].data.keys() == {"a", "b", "n0", "n1", "n2"}

    async def test_close_waits_for_all_commits(self, ahead: Shard, store: AheadStore) -> None:
        ahead.client("ann").write(set_record(ANN))
        ahead.client("bob").write(set_record(BOB))
        closing = asyncio.create_task(ahead.namespace.close())
        await store.done_with_one()
        closed_early = closing.done()
        await store.done_with_one()
        await closing

        assert not closed_early


class TestCommits:
    async def test_a_write_is_answered_when_the_store_has_it_and_not_before(
        self, shard: Shard, client: Client
    ) -> None:
        client.write(set_record(ANN))
        await asyncio.sleep(0)
        answered_early = bool(client.replies)
        await shard.committed()

        assert not answered_early
        assert client.replies == [(1, [1])]

    async def test_a_write_that_finds_no_commit_under_way_begins_one_at_once(
        self, shard: Shard, client: Client
    ) -> None:
        client.write(set_record(ANN))

        assert len(shard.store.batches) == 1

    async def test_writes_that_arrive_during_a_commit_form_the_next_one(self, shard: Shard) -> None:
        clients = [shard.client(f"client {number}") for number in range(10)]
        for number, client in enumerate(clients):
            client.write(set_record(encode_key(number)), update_data(ANN, **{f"n{number}": number}))
        batches_at_first = len(shard.store.batches)
        await shard.settled()

        assert batches_at_first == 1
        assert [len(batch.records) for batch in shard.store.batches] == [2, 10]
        assert [len(client.replies) for client in clients] == [1] * 10

    async def test_writes_of_the_next_commit_are_not_answered_by_the_one_before(self, shard: Shard) -> None:
        ann, bob = shard.client("ann"), shard.client("bob")
        ann.write(set_record(ANN))
        bob.write(set_record(BOB))
        await shard.committed()

        assert (len(ann.replies), len(bob.replies)) == (1, 0)

    async def test_reads_during_a_commit_are_answered_at_once_from_committed_records(
        self, shard: Shard, client: Client
    ) -> None:
        await shard.write(set_record(ANN, "old"), set_record(BOB, "old"))
        client.write(set_record(ANN, "new"), clear(BOB), set_record(CID, "new"))

        ann, bob, cid = client.read(ANN, BOB, CID)

        assert (ann.flow, bob.flow, cid) == ("old", "old", None)

    async def test_reads_after_the_answer_see_the_write(self, shard: Shard, client: Client) -> None:
        await shard.write(set_record(BOB, "old"))
        client.write(set_record(ANN, "new"), clear(BOB))
        await shard.committed()

        assert client.read(ANN, BOB) == [view("new", None, {}, 2), None]

    async def test_when_a_write_is_answered_it_can_be_read(self, shard: Shard) -> None:
        client = shard.client()
        seen: list[Any] = []
        request = write_request(1, [set_record(ANN, "new")], session_of("other"))
        shard.namespace.handle(request, lambda _: seen.extend(client.read(ANN)))
        await shard.committed()

        assert [record.flow for record in seen] == ["new"]

    async def test_answers_are_given_in_the_order_of_the_requests(self, shard: Shard) -> None:
        shard.client("first").write(set_record(ANN))
        answered: list[int] = []
        for number in range(5):
            request = write_request(1, [clear(BOB)], session_of(f"client {number}"))
            shard.namespace.handle(request, lambda _, number=number: answered.append(number))  # type: ignore[misc]
        await shard.settled()

        assert answered == [0, 1, 2, 3, 4]

    async def test_a_write_that_arrives_as_an_answer_is_given_is_answered_too(self, shard: Shard) -> None:
        first, second = shard.client("first"), shard.client("second")
        request = write_request(1, [set_record(ANN)], session_of("zero"))
        shard.namespace.handle(request, lambda _: first.write(set_record(BOB)))
        await shard.committed()
        second.write(set_record(CID))
        await shard.settled()

        assert [len(client.replies) for client in (first, second)] == [1, 1]

    async def test_a_batch_that_was_handed_over_does_not_change_any_more(
        self, shard: Shard, client: Client
    ) -> None:
        client.write(set_record(ANN))
        batch = shard.store.batches[0]
        before = (batch.version, dict(batch.records), dict(batch.sessions))
        shard.client("other").write(set_record(BOB))
        await shard.settled()

        assert (batch.version, dict(batch.records), dict(batch.sessions)) == before

    async def test_a_store_that_keeps_nothing_is_answered_at_once(self) -> None:
        store = MemoryStore(lambda: 0.0)
        client = Client(Namespace("my_bot", BotOptions(), store, await store.open()))
        client.write(set_record(ANN, "flow"))

        assert client.replies == [(1, [1])]
        assert client.read(ANN) == [view("flow", None, {}, 1)]

    async def test_writes_that_change_nothing_are_answered_without_a_commit(
        self, shard: Shard, client: Client
    ) -> None:
        client.write(set_record(ANN))
        await shard.settled()
        client.write(clear(BOB), set_record(ANN, expected_version=7))

        was_there, conflict = client.results
        assert was_there is False
        assert isinstance(conflict, VersionConflict)
        assert len(shard.store.batches) == 1

    async def test_a_new_session_is_kept_though_its_write_changes_nothing(
        self, shard: Shard, client: Client
    ) -> None:
        client.write(clear(BOB))
        await shard.settled()

        assert shard.store.contents().sessions.keys() == {session_of("client")}

    async def test_sessions_that_are_forgotten_leave_the_store_with_the_next_commit(
        self, shard: Shard
    ) -> None:
        shard.client("idle").write(set_record(ANN))
        shard.client("comes back").write(set_record(BOB))
        await shard.settled()
        shard.now_s += sessions.SESSION_IDLE_S
        busy = shard.client("busy")
        busy.write(set_record(CID))
        shard.client("comes back").write(set_record(BOB))
        await shard.settled()

        assert set(shard.store.batches[-2].forgotten) == {session_of("idle"), session_of("comes back")}
        assert shard.store.contents().sessions.keys() == {session_of("busy"), session_of("comes back")}


class TestStops:
    """After a failure nobody knows what the store holds, so nothing more is answered."""

    async def test_a_commit_that_failed_answers_nothing_and_changes_nothing(
        self, shard: Shard, client: Client
    ) -> None:
        client.write(set_record(ANN))
        shard.store.done(OSError("disk full"))
        await asyncio.sleep(0)

        assert client.replies == []
        assert shard.namespace.statistics().records == 0

    async def test_a_store_that_fails_as_it_gets_the_commit_is_a_commit_that_failed(
        self, shard: Shard, client: Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(_: Batch) -> asyncio.Future[None]:
            raise OSError("disk full")

        monkeypatch.setattr(shard.store, "commit", fail)
        client.write(set_record(ANN))
        await asyncio.sleep(0)

        assert [type(each) for each in shard.stopped] == [StoreUnavailable]
        with pytest.raises(NotServing):
            client.resend(set_record(ANN))
        assert client.replies == []

    @pytest.mark.parametrize(
        ("failure", "reason"),
        [
            (OSError("disk full"), StoreUnavailable),
            (StoreUnavailable("disk full"), StoreUnavailable),
            (NotOwner("disk full"), NotOwner),
        ],
    )
    async def test_whoever_made_it_is_told_once_and_why(
        self, shard: Shard, client: Client, failure: Exception, reason: type[FsmRayError]
    ) -> None:
        client.write(set_record(ANN))
        shard.store.done(failure)
        await asyncio.sleep(0)

        (told,) = shard.stopped
        assert type(told) is reason
        assert "disk full" in str(told)

    async def test_reads_and_writes_are_refused_from_then_on(self, shard: Shard, client: Client) -> None:
        client.write(set_record(ANN))
        shard.client("waits").write(set_record(BOB))
        shard.store.done(StoreUnavailable("disk full"))
        await asyncio.sleep(0)

        with pytest.raises(NotServing):
            client.read(ANN)
        with pytest.raises(NotServing):
            client.write(set_record(CID))
        assert len(shard.store.batches) == 1

    async def test_who_waits_for_changes_or_a_grant_is_answered_no_more(
        self, shard: Shard, client: Client
    ) -> None:
        # Those that came as Ray calls were told by then, and cannot be told twice.
        answers: list[bytes] = []
        for request in (
            protocol.watch_request(1, (None, None), 0, 0.001),
            protocol.grants_request(1, session_of("waits"), 0.001),
        ):
            assert shard.namespace.handle(request[4:], answers.append) is None
        client.write(set_record(ANN))
        shard.store.done(StoreUnavailable("disk full"))
        later = asyncio.Event()
        asyncio.get_running_loop().call_later(0.002, later.set)
        async with asyncio.timeout(60):
            await later.wait()

        assert len(shard.stopped) == 1
        assert answers == []

    async def test_a_namespace_that_is_closed_waits_for_its_commit_and_answers_nobody(
        self, shard: Shard, client: Client
    ) -> None:
        client.write(set_record(ANN))
        closing = asyncio.ensure_future(shard.namespace.close())
        await asyncio.sleep(0)
        was_closed_early = closing.done()
        shard.store.done()
        await closing

        assert not was_closed_early
        assert client.replies == []
        assert shard.stopped == []
        with pytest.raises(NotServing):
            client.read(ANN)


class SharedStore(FakeStore):
    """A store whose owner can change. Its confirmations are done when the test says so."""

    is_shared: ClassVar[bool] = True

    def __init__(self, loop: asyncio.AbstractEventLoop, version: int = 0) -> None:
        super().__init__(loop, version)
        self.confirmations: list[asyncio.Future[None]] = []

    async def confirm(self) -> None:
        confirmation: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.confirmations.append(confirmation)
        await confirmation


LEASE_S = 60.0


class Owner:
    """A namespace over a shared store, opened now, its lease clock moved by the test."""

    def __init__(self) -> None:
        self.now_s = 1_000.0
        self.stopped: list[FsmRayError] = []
        self.tally = ShardTally()
        self.store = SharedStore(asyncio.get_running_loop())
        contents = self.store.contents()
        contents.owned_since_s = self.now_s
        self.namespace = Namespace(
            "my_bot",
            BotOptions(ownership_lease_s=LEASE_S),
            self.store,
            contents,
            lease_clock=lambda: self.now_s,
            on_stopped=self.stopped.append,
            tally=self.tally,
        )
        self.client = Client(self.namespace)

    def serves(self) -> bool:
        try:
            self.client.read(ANN)
        except NotServing:
            return False
        return True


@pytest.fixture
async def owner() -> Owner:
    return Owner()


class TestLease:
    async def test_reads_are_answered_until_the_lease_is_over_and_not_after(self, owner: Owner) -> None:
        owner.now_s += LEASE_S - 0.001
        in_time = owner.serves()
        owner.now_s += 0.001

        assert in_time
        assert not owner.serves()
        assert [type(reason) for reason in owner.stopped] == [StoreUnavailable]

    async def test_a_lease_that_lapsed_is_not_taken_up_again(self, owner: Owner) -> None:
        owner.now_s += LEASE_S
        owner.serves()
        owner.now_s -= LEASE_S

        assert not owner.serves()

    async def test_a_commit_renews_the_lease_from_its_beginning(self, owner: Owner) -> None:
        owner.now_s += 10
        owner.client.write(set_record(ANN))
        owner.now_s += 30
        owner.store.done()
        await asyncio.sleep(0)
        owner.now_s += LEASE_S - 30 - 0.001
        in_time = owner.serves()
        owner.now_s += 0.001

        assert in_time
        assert not owner.serves()

    async def test_a_write_is_committed_even_when_the_lease_is_over(self, owner: Owner) -> None:
        owner.now_s += LEASE_S
        owner.client.write(set_record(ANN))
        owner.store.done()
        await asyncio.sleep(0)

        assert owner.client.replies == [(1, [1])]
        assert owner.serves()

    async def test_a_write_that_changes_nothing_needs_the_lease_as_a_read_does(self, owner: Owner) -> None:
        owner.client.write(set_record(ANN))
        owner.store.done()
        await asyncio.sleep(0)
        owner.now_s += LEASE_S
        owner.client.write(clear(BOB))

        assert len(owner.client.replies) == 1
        assert [type(reason) for reason in owner.stopped] == [StoreUnavailable]

    async def test_an_idle_owner_asks_its_store_and_goes_on(self, owner: Owner) -> None:
        owner.now_s += LEASE_S / 2
        keeper = asyncio.ensure_future(owner.namespace.keep_ownership())
        await until(lambda: owner.store.confirmations)
        owner.store.confirmations[0].set_result(None)
        await asyncio.sleep(0)
        owner.now_s += LEASE_S - 0.001

        assert owner.serves()
        await stop(keeper)

    async def test_a_confirmation_counts_from_when_it_was_asked_for(self, owner: Owner) -> None:
        owner.now_s += LEASE_S / 2
        keeper = asyncio.ensure_future(owner.namespace.keep_ownership())
        await until(lambda: owner.store.confirmations)
        owner.now_s += LEASE_S / 4
        owner.store.confirmations[0].set_result(None)
        await asyncio.sleep(0)
        owner.now_s += LEASE_S * 3 / 4

        assert not owner.serves()
        await stop(keeper)

    async def test_an_owner_that_learns_of_another_one_stops_at_once(self, owner: Owner) -> None:
        owner.now_s += LEASE_S / 2
        keeper = asyncio.ensure_future(owner.namespace.keep_ownership())
        await until(lambda: owner.store.confirmations)
        owner.store.confirmations[0].set_exception(NotOwner("somebody else"))
        await keeper

        assert [type(reason) for reason in owner.stopped] == [NotOwner]
        assert not owner.serves()

    async def test_who_sleeps_past_its_lease_stops_when_it_wakes(self, owner: Owner) -> None:
        owner.now_s += LEASE_S
        await owner.namespace.keep_ownership()

        assert [type(reason) for reason in owner.stopped] == [StoreUnavailable]

    async def test_the_keeper_ends_with_the_namespace(self, owner: Owner) -> None:
        await owner.namespace.close()
        await owner.namespace.keep_ownership()

        assert owner.stopped == []


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  # the condition is the namespace's, which sets no event
            await asyncio.sleep(0)


async def stop(task: asyncio.Future[None]) -> None:
    task.cancel()
    await asyncio.wait([task])


class TestOneBatch:
    async def test_all_of_a_batch_is_in_one_commit(self, shard: Shard, client: Client) -> None:
        await shard.write(set_record(BOB))
        client.write(set_record(ANN), clear(BOB), update_data(CID))

        batch = shard.store.batches[-1]
        assert batch.records.keys() == {ANN, BOB, CID}
        assert batch.records[BOB] is None
        assert batch.sessions.keys() == {session_of("client")}

    @pytest.mark.parametrize("position", range(3))
    async def test_an_operation_that_fails_leaves_the_others_alone(
        self, shard: Shard, client: Client, position: int
    ) -> None:
        operations = [set_record(ANN), set_record(BOB)]
        operations.insert(position, set_record(CID, expected_version=9))
        client.write(*operations)
        await shard.committed()

        error = client.results.pop(position)
        assert isinstance(error, VersionConflict)
        assert client.results == [1, 2]
        assert client.read(ANN, BOB, CID) == [view(None, None, {}, 1), view(None, None, {}, 2), None]

    @pytest.mark.parametrize("in_transaction", [False, True])
    async def test_an_operation_that_meets_what_nobody_expected_is_refused_alone(
        self,
        shard: Shard,
        in_transaction: bool,  # noqa: FBT001
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        def fail(_: object) -> bytes:
            raise KeyError("secret-key")

        monkeypatch.setitem(shard.namespace._evaluator.methods, protocol.EnterState, fail)
        broken = protocol.enter_state(BOB, (None, "state"), None)
        if in_transaction:
            broken = protocol.transact([set_record(BOB), broken])
        clients = [shard.client(name) for name in ("under way", "ahead", "broken", "behind")]
        clients[0].write(set_record(ANN))
        clients[1].write(update_data(ANN, n=1))
        clients[2].write(set_record(CID), broken)
        clients[3].write(update_data(ANN, n=2))
        await shard.settled()

        _, ahead, (version, error), behind = (client.results for client in clients)
        assert (ahead, version, behind) == ([ContentView({"n": 1}, 2)], 3, [ContentView({"n": 2}, 4)])
        assert type(error) is FsmRayError
        assert error.key == (None if in_transaction else "bob")
        assert "met KeyError in fail (" in str(error)
        assert "changed nothing" in str(error)
        assert shard.client().read(BOB) == [None]
        (line,) = caplog.messages
        assert "refused an operation that met KeyError in fail (" in line
        assert "secret-key" not in line

    async def test_an_operation_sees_those_before_it(self, shard: Shard, client: Client) -> None:
        client.write(
            set_record(ANN, "flow", "state", a=1),
            update_data(ANN, b=2),
            set_data(ANN, c=3),
            clear(ANN),
            clear(ANN),
            update_data(ANN, d=4),
        )
        await shard.committed()

        updated, made_again = ContentView({"a": 1, "b": 2}, 2), ContentView({"d": 4}, 5)
        assert client.results == [1, updated, 3, True, False, made_again]
        assert client.read(ANN) == [RecordView(None, None, made_again)]

    async def test_a_key_that_is_written_twice_keeps_the_last_and_takes_two_versions(
        self, shard: Shard, client: Client
    ) -> None:
        client.write(set_record(ANN, "first"), set_record(ANN, "second"))
        await shard.committed()

        assert client.results == [1, 2]
        assert client.read(ANN) == [view("second", None, {}, 2)]

    async def test_a_record_made_and_cleared_leaves_no_trace(self, shard: Shard, client: Client) -> None:
        client.write(set_record(ANN), clear(ANN))
        await shard.committed()

        assert client.results == [1, True]
        assert client.read(ANN) == [None]
        assert shard.store.contents().records == {}

    async def test_operations_of_a_later_request_of_the_commit_see_the_earlier_ones(
        self, shard: Shard
    ) -> None:
        shard.client("first").write(set_record(CID))
        ann, bob = shard.client("ann"), shard.client("bob")
        ann.write(update_data(ANN, a=1))
        bob.write(update_data(ANN, b=2))
        await shard.settled()

        assert ann.results == [ContentView({"a": 1}, 2)]
        assert bob.results == [ContentView({"a": 1, "b": 2}, 3)]

    async def test_a_batch_without_operations_is_answered(self, shard: Shard, client: Client) -> None:
        client.write()
        await shard.committed()

        assert client.replies == [(1, [])]


class TestOperations:
    async def test_set_record_overwrites_everything(self, shard: Shard, client: Client) -> None:
        await shard.write(set_record(ANN, "flow", "state", a=1))
        await shard.write(set_record(ANN, None, "other", b=2))

        assert client.read(ANN) == [view(None, "other", {"b": 2}, 2)]

    async def test_set_data_keeps_flow_and_state(self, shard: Shard, client: Client) -> None:
        await shard.write(set_record(ANN, "flow", "state", a=1, b=1))
        await shard.write(set_data(ANN, b=2))

        assert client.read(ANN) == [view("flow", "state", {"b": 2}, 2)]

    @pytest.mark.parametrize("operation", [set_data, update_data])
    async def test_setting_and_updating_data_make_a_record_without_flow_and_state(
        self, shard: Shard, client: Client, operation: Callable[..., bytes]
    ) -> None:
        await shard.write(operation(ANN, a=1))

        assert client.read(ANN) == [view(None, None, {"a": 1}, 1)]

    async def test_update_data_merges_field_by_field_and_answers_the_content(
        self, shard: Shard, client: Client
    ) -> None:
        await shard.write(set_record(ANN, "flow", "state", a=1, b={"x": 1}))
        (answered,) = await shard.write(update_data(ANN, b={"y": 2}, c=None))

        assert answered == ContentView({"a": 1, "b": {"y": 2}, "c": None}, 2)
        assert client.read(ANN) == [RecordView("flow", "state", answered)]

    async def test_an_update_without_changes_makes_a_record_too(self, shard: Shard, client: Client) -> None:
        (answered,) = await shard.write(update_data(ANN))

        assert answered == ContentView({}, 1)
        assert client.read(ANN) == [RecordView(None, None, answered)]

    async def test_clear_answers_whether_there_was_a_record(self, shard: Shard, client: Client) -> None:
        await shard.write(set_record(ANN))

        assert await shard.write(clear(ANN)) == [True]
        assert await shard.write(clear(ANN)) == [False]
        assert client.read(ANN) == [None]

    async def test_a_read_never_makes_a_record(self, shard: Shard, client: Client) -> None:
        assert client.read(ANN, ANN, BOB) == [None, None, None]
        assert shard.namespace.statistics().records == 0
        assert shard.store.batches == []

    async def test_a_read_answers_each_key_in_order(self, shard: Shard, client: Client) -> None:
        await shard.write(set_record(ANN, "ann"), set_record(BOB, "bob"))

        assert [record and record.flow for record in client.read(BOB, CID, ANN, BOB)] == [
            "bob",
            None,
            "ann",
            "bob",
        ]

    async def test_values_come_back_as_the_bytes_that_were_written(
        self, shard: Shard, client: Client
    ) -> None:
        broken = b"\xc7\x03\x63abc"  # an extension that nobody can decode
        data = msgspec.msgpack.encode({"a": msgspec.Raw(broken)})
        await shard.write(protocol.set_record(ANN, None, None, msgspec.Raw(data), None), set_record(BOB))
        await shard.write(update_data(ANN, b=2))

        assert broken in shard.store.contents().records[ANN]


class TestFlowsAndStates:
    """A shard keeps those that many records share once; nobody may notice."""

    @pytest.mark.parametrize("length", [0, 1, 31, 32, 200, 255, 256, 300, 70_000])
    async def test_names_of_any_length_come_back(self, shard: Shard, client: Client, length: int) -> None:
        flow, state = "f" * length, "s" * length
        await shard.write(set_record(ANN, flow, state, a=1), set_record(BOB, None, state))
        (updated,) = await shard.write(update_data(ANN, b=2))
        await shard.write(set_data(BOB, c=3))
        before = client.read(ANN, BOB)
        shard.restart()

        assert before == [view(flow, state, {"a": 1, "b": 2}, 3), view(None, state, {"c": 3}, 4)]
        assert updated == before[0].content
        assert shard.client().read(ANN, BOB) == before

    async def test_none_an_empty_name_and_swapped_names_are_told_apart(
        self, shard: Shard, client: Client
    ) -> None:
        names: list[tuple[str | None, str | None]] = [
            (flow, state) for flow in (None, "", "a", "b") for state in (None, "", "a", "b")
        ]
        await shard.write(*[set_record(encode_key(n), *pair) for n, pair in enumerate(names)])

        records = client.read(*[encode_key(n) for n in range(len(names))])
        assert [(record.flow, record.state) for record in records] == names

    def test_more_names_than_can_be_shared_come_back(self) -> None:
        client = Client(Namespace("my_bot", BotOptions(), MemoryStore(), Contents(version=0)))
        count = record._MAX_FRONTS + 10
        keys = [encode_key(number) for number in range(count)]
        client.write(*[set_record(key, f"flow {number}") for number, key in enumerate(keys)])
        client.write(*[update_data(key, a=1) for key in keys[-20:]])

        records = client.read(*keys)
        assert [each.flow for each in records] == [f"flow {number}" for number in range(count)]
        assert [each.content.data for each in records[-21:]] == [{}, *[{"a": 1}] * 20]


class TestVersions:
    @every_write
    async def test_each_effective_write_takes_the_next_version(
        self, shard: Shard, write: Callable[[bytes, int | None], bytes]
    ) -> None:
        await shard.write(set_record(ANN))
        await shard.write(write(ANN, None))

        assert [batch.version for batch in shard.store.batches] == [1, 2]

    @every_write
    async def test_a_write_that_fails_takes_no_version(
        self, shard: Shard, client: Client, write: Callable[[bytes, int | None], bytes]
    ) -> None:
        client.write(write(ANN, 9), set_record(BOB))
        await shard.committed()

        assert isinstance(client.results[0], VersionConflict)
        assert client.results[1] == 1

    async def test_a_record_too_large_takes_no_version(self, shard: Shard, client: Client) -> None:
        client.write(set_record(ANN, x="x" * (1 << 20)), set_record(BOB))
        await shard.committed()

        assert client.results[1] == 1

    async def test_clearing_nothing_takes_no_version(self, shard: Shard, client: Client) -> None:
        client.write(clear(ANN), set_record(BOB))
        await shard.committed()

        assert client.results == [False, 1]

    async def test_a_record_cleared_and_made_again_never_passes_for_the_old_one(self, shard: Shard) -> None:
        (old,) = await shard.write(set_record(ANN, "flow", a=1))
        await shard.write(clear(ANN))
        (new,) = await shard.write(set_record(ANN, "flow", a=1))
        (conflict,) = await shard.write(set_record(ANN, expected_version=old))

        assert new > old
        assert isinstance(conflict, VersionConflict)
        assert conflict.actual_version == new

    async def test_versions_go_on_where_the_store_left_off(self, shard: Shard) -> None:
        await shard.write(set_record(ANN), clear(ANN))
        shard.restart()

        assert await shard.write(set_record(ANN)) == [3]

    async def test_a_version_that_was_never_committed_may_be_given_out_again(self, shard: Shard) -> None:
        shard.client().write(set_record(ANN))
        shard.restart()

        assert await shard.write(set_record(BOB)) == [1]

    async def test_versions_of_a_memory_store_exceed_those_of_its_earlier_life(self) -> None:
        versions = []
        for now_s in (1_000.0, 1_000.1):
            store = MemoryStore(lambda now_s=now_s: now_s)  # type: ignore[misc]
            client = Client(Namespace("my_bot", BotOptions(), store, await store.open()))
            client.write(*[set_record(ANN)] * 1000)
            versions += client.results

        assert versions == sorted(set(versions))


class TestExpectedVersion:
    @every_write
    async def test_the_version_of_the_record_is_accepted(
        self, shard: Shard, write: Callable[[bytes, int | None], bytes]
    ) -> None:
        (version,) = await shard.write(set_record(ANN, "flow"))
        (result,) = await shard.write(write(ANN, version))

        assert not isinstance(result, FsmRayError)

    @every_write
    @pytest.mark.parametrize("expected_version", [0, 1, 3, (1 << 63) - 1])
    async def test_any_other_version_is_a_conflict_and_changes_nothing(
        self,
        shard: Shard,
        client: Client,
        write: Callable[[bytes, int | None], bytes],
        expected_version: int,
    ) -> None:
        await shard.write(set_record(ANN, "old"), set_record(ANN, "flow", a=1))
        (error,) = await shard.write(write(ANN, expected_version))

        assert isinstance(error, VersionConflict)
        assert (error.expected_version, error.actual_version) == (expected_version, 2)
        assert (error.bot, error.key) == ("my_bot", "ann")
        assert client.read(ANN) == [view("flow", None, {"a": 1}, 2)]

    @every_write
    async def test_0_means_no_record(self, shard: Shard, write: Callable[[bytes, int | None], bytes]) -> None:
        (result,) = await shard.write(write(ANN, 0))

        assert not isinstance(result, FsmRayError)

    @every_write
    @pytest.mark.parametrize("expected_version", [1, 2])
    async def test_a_version_of_a_record_that_is_gone_is_a_conflict(
        self, shard: Shard, write: Callable[[bytes, int | None], bytes], expected_version: int
    ) -> None:
        await shard.write(set_record(ANN), clear(ANN))
        (error,) = await shard.write(write(ANN, expected_version))

        assert isinstance(error, VersionConflict)
        assert error.actual_version is None

    async def test_of_two_conditional_writes_in_one_commit_the_first_wins(self, shard: Shard) -> None:
        (version,) = await shard.write(set_record(ANN))
        shard.client("first").write(set_record(CID))
        ann, bob = shard.client("ann"), shard.client("bob")
        ann.write(set_record(ANN, "of ann", expected_version=version))
        bob.write(set_record(ANN, "of bob", expected_version=version))
        await shard.settled()

        assert ann.results == [3]
        assert isinstance(bob.results[0], VersionConflict)
        assert bob.results[0].actual_version == 3
        assert ann.read(ANN) == [view("of ann", None, {}, 3)]


def padded(operation: Callable[[str], bytes], blob_of: Callable[[str], object], size: int) -> bytes:
    """The operation with as much in it as makes key and record this large."""
    overhead = len(ANN) + len(msgspec.msgpack.encode(blob_of("x" * 100))) - 100
    return operation("x" * (size - overhead))


class TestRecordTooLarge:
    LIMIT = 256

    @pytest.fixture
    async def shard(self) -> Shard:
        return Shard(FakeStore(asyncio.get_running_loop()), max_record_bytes=self.LIMIT)

    def operations(self, size: int) -> dict[str, bytes]:
        """Operations that would make a record of this size out of one with `flow` and `{"a": 1}`."""
        return {
            "set_record": padded(
                lambda text: set_record(ANN, "flow", x=text),
                lambda text: ("flow", None, ({"x": text}, 2)),
                size,
            ),
            "set_data": padded(
                lambda text: set_data(ANN, x=text), lambda text: ("flow", None, ({"x": text}, 2)), size
            ),
            "update_data": padded(
                lambda text: update_data(ANN, x=text),
                lambda text: ("flow", None, ({"a": 1, "x": text}, 2)),
                size,
            ),
        }

    @pytest.mark.parametrize("name", ["set_record", "set_data", "update_data"])
    async def test_a_record_of_exactly_the_limit_is_kept(
        self, shard: Shard, client: Client, name: str
    ) -> None:
        await shard.write(set_record(ANN, "flow", a=1))
        (result,) = await shard.write(self.operations(self.LIMIT)[name])

        assert not isinstance(result, FsmRayError)
        assert client.read(ANN)[0].content.version == 2
        assert len(ANN) + len(shard.store.contents().records[ANN]) == self.LIMIT

    @pytest.mark.parametrize("name", ["set_record", "set_data", "update_data"])
    async def test_a_record_of_a_byte_more_is_refused_and_the_old_one_stays(
        self, shard: Shard, client: Client, name: str
    ) -> None:
        await shard.write(set_record(ANN, "flow", a=1))
        (error,) = await shard.write(self.operations(self.LIMIT + 1)[name])

        assert isinstance(error, RecordTooLarge)
        assert (error.size_bytes, error.max_record_bytes) == (self.LIMIT + 1, self.LIMIT)
        assert (error.bot, error.key) == ("my_bot", "ann")
        assert client.read(ANN) == [view("flow", None, {"a": 1}, 1)]

    async def test_many_small_updates_cannot_pass_the_limit(self, shard: Shard, client: Client) -> None:
        client.write(*[update_data(ANN, None, **{f"field{number}": "x" * 20}) for number in range(20)])
        await shard.committed()

        refused = [isinstance(result, RecordTooLarge) for result in client.results]
        assert refused == sorted(refused)
        assert 0 < sum(refused) < 20
        assert len(ANN) + len(shard.store.contents().records[ANN]) <= self.LIMIT

    @pytest.mark.parametrize("length", [100, 200, 300])
    async def test_flow_and_state_count_whatever_their_length(self, shard: Shard, length: int) -> None:
        (error,) = await shard.write(set_record(ANN, "f" * length, "s" * (300 - length)))

        assert isinstance(error, RecordTooLarge)

    async def test_flow_and_state_count_though_other_records_share_them(self, shard: Shard) -> None:
        await shard.write(set_record(BOB, "f" * 120, "s" * 100))
        size = (len(BOB), len(shard.store.contents().records[BOB]))
        (error,) = await shard.write(set_record(ANN, "f" * 120, "s" * 100, x="x" * (self.LIMIT - sum(size))))

        assert isinstance(error, RecordTooLarge)


class TestResends:
    async def test_a_resend_after_the_commit_gets_the_same_reply_and_changes_nothing(
        self, shard: Shard, client: Client
    ) -> None:
        operations = [update_data(ANN, a=1), clear(BOB), set_record(CID, expected_version=0)]
        client.write(*operations)
        await shard.settled()
        await shard.write(set_record(ANN, "other"))
        client.resend(*operations)
        await shard.settled()

        assert client.replies[1] == client.replies[0]
        assert client.read(ANN) == [view("other", None, {}, 3)]

    async def test_a_resend_during_the_commit_gets_the_same_reply_and_changes_nothing(
        self, shard: Shard, client: Client
    ) -> None:
        operations = [set_record(ANN, expected_version=0), update_data(BOB, a=1)]
        client.write(*operations)
        client.resend(*operations)
        await shard.settled()

        assert client.replies == [(1, [1, ContentView({"a": 1}, 2)])] * 2
        assert len(shard.store.batches) == 1

    async def test_a_write_and_its_resend_in_the_same_commit_take_effect_once(
        self, shard: Shard, client: Client
    ) -> None:
        shard.client("other").write(set_record(CID))
        client.write(set_record(ANN))
        client.resend(set_record(ANN))
        await shard.settled()

        assert client.replies == [(1, [2])] * 2

    async def test_failures_are_remembered_like_successes(self, shard: Shard, client: Client) -> None:
        client.write(set_record(ANN, expected_version=1))
        await shard.settled()
        await shard.write(set_record(ANN))
        client.resend(set_record(ANN, expected_version=1))
        await shard.settled()

        (_, (first,)), (_, (second,)) = client.replies
        assert isinstance(first, VersionConflict)
        assert (type(second), vars(second)) == (type(first), vars(first))

    async def test_a_write_older_than_the_last_has_an_unknown_outcome_for_each_operation(
        self, shard: Shard, client: Client
    ) -> None:
        client.write(set_record(ANN, "first"))
        await shard.settled()
        client.write(set_record(ANN, "second"))
        await shard.settled()
        client.send(1, set_record(ANN, "first"), set_record(BOB), is_resend=True)
        await shard.settled()

        assert [type(result) for result in client.results] == [OutcomeUnknown, OutcomeUnknown]
        assert client.read(ANN, BOB) == [view("second", None, {}, 2), None]

    async def test_a_resend_of_a_forgotten_session_has_an_unknown_outcome(
        self, shard: Shard, client: Client
    ) -> None:
        for _ in range(2):
            client.write(update_data(ANN))
            await shard.settled()
        shard.now_s += sessions.SESSION_IDLE_S
        await shard.write(set_record(BOB))
        client.resend(update_data(ANN))
        await shard.settled()

        assert [type(result) for result in client.results] == [OutcomeUnknown]
        assert client.read(ANN)[0].content.version == 2

    async def test_a_session_too_many_is_refused_for_each_operation_and_others_go_on(
        self, shard: Shard, client: Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sessions, "MAX_SESSIONS", 1)
        client.write(set_record(ANN))
        await shard.settled()
        other = shard.client("other")
        other.write(set_record(BOB), set_record(CID))
        client.write(set_record(ANN))
        await shard.settled()

        assert [type(result) for result in other.results] == [Overloaded, Overloaded]
        assert other.read(BOB, CID) == [None, None]
        assert client.results == [2]

    async def test_two_clients_in_one_commit_get_each_their_own_answers(self, shard: Shard) -> None:
        shard.client("first").write(set_record(CID))
        ann, bob = shard.client("ann"), shard.client("bob")
        ann.write(set_record(ANN))
        bob.write(clear(BOB), set_record(BOB))
        await shard.settled()

        assert (ann.replies, bob.replies) == ([(1, [2])], [(1, [False, 3])])

    async def test_two_clients_of_the_same_number_are_two_writes(self, shard: Shard) -> None:
        ann, bob = shard.client("ann"), shard.client("bob")
        ann.write(update_data(ANN, a=1))
        await shard.settled()
        bob.write(update_data(ANN, b=1))
        await shard.settled()

        assert ann.read(ANN) == [view(None, None, {"a": 1, "b": 1}, 2)]

    async def test_the_answer_is_in_the_same_commit_as_the_effect(self, shard: Shard, client: Client) -> None:
        client.write(set_record(ANN))
        await shard.settled()

        (batch,) = shard.store.batches
        answered = batch.sessions[session_of("client")]
        assert batch.records.keys() == {ANN}
        assert (answered.number, answered.at_s) == (1, shard.now_s)
        assert DECODER.decode(answered.reply[4:]) == (WRITE, 1, [1])

    async def test_a_write_that_was_kept_and_not_answered_takes_effect_once_across_a_restart(
        self, shard: Shard
    ) -> None:
        shard.client().write(set_record(ANN, expected_version=0))
        shard.store.keep()
        shard.restart()
        client = shard.client()
        client.send(1, set_record(ANN, expected_version=0), is_resend=True)
        await shard.settled()

        assert client.replies == [(1, [1])]

    async def test_a_write_that_was_not_kept_takes_effect_when_it_is_sent_again_after_a_restart(
        self, shard: Shard
    ) -> None:
        shard.client().write(set_record(ANN, expected_version=0))
        shard.restart()
        client = shard.client()
        client.send(1, set_record(ANN, expected_version=0), is_resend=True)
        await shard.settled()

        assert client.replies == [(1, [1])]
        assert client.read(ANN) == [view(None, None, {}, 1)]


class TestMalformedRequests:
    GOOD = set_record(ANN)
    SESSION = session_of("client")

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"\xc0",
            b"\x93\x07\x01\x90",
            b"\x93\x01\x01\x91\x05",
            write_request(1, [GOOD, b"\xc0"], SESSION),
            write_request(1, [GOOD, b"\x92\x09\xc4\x00"], SESSION),
            write_request(1, [GOOD, GOOD[:-1]], SESSION),
            write_request(1, [GOOD], SESSION) + b"\x00",
            write_request(1, [GOOD], SESSION)[:-1],
            write_request(1, [msgspec.msgpack.encode([3, "text", None])], SESSION),
            write_request(1, [b"\x93\x01\xc4\x01k\x81\xa1\xff\x01"], SESSION),
            write_request(1, [b"\x93\x01\xc4\x01k\x81\xa1a" + b"\x91" * 10_000], SESSION),
            write_request(1, [protocol.set_record(ANN, None, None, b"\x80", None, ttl_ms=-1)], SESSION),
            write_request(1, [protocol.set_data(ANN, b"\x80", None, -1)], SESSION),
            write_request(1, [protocol.update_data(ANN, b"\x80", None, -1)], SESSION),
            write_request(1, [protocol.enter_state(ANN, (None, None), None, -1)], SESSION),
            write_request(
                1, [protocol.patch(ANN, (b"\x80", [], b"\x80", b"\x80"), None, ttl_ms=-1)], SESSION
            ),
            write_request(
                1, [protocol.commit_turn(ANN, (SESSION, 1), (None, None), b"\x80", 0, ttl_ms=-1)], SESSION
            ),
            msgspec.msgpack.encode([protocol.WRITE, -1, SESSION, False, [msgspec.Raw(GOOD)]]),
            msgspec.msgpack.encode([protocol.COUNT, -1]),
            protocol.watch_request(1, (None, None), None, math.nan)[4:],
            protocol.watch_request(1, (None, None), None, -1.0)[4:],
            protocol.grants_request(1, SESSION, math.inf)[4:],
        ],
    )
    async def test_a_malformed_request_is_refused_and_changes_nothing(
        self, shard: Shard, client: Client, body: bytes
    ) -> None:
        before = shard.namespace.statistics()
        answers: list[bytes] = []

        with pytest.raises(MalformedRequest):
            shard.namespace.handle(body, answers.append)

        assert answers == []
        assert shard.store.batches == []
        assert shard.namespace.statistics() == before
        assert client.read(ANN) == [None]

    async def test_a_malformed_request_leaves_those_that_wait_alone(
        self, shard: Shard, client: Client
    ) -> None:
        client.write(set_record(ANN))
        other = shard.client("other")
        other.write(set_record(BOB))
        with pytest.raises(MalformedRequest):
            shard.namespace.handle(b"\xc0", lambda _: None)
        await shard.settled()

        assert (client.replies, other.replies) == ([(1, [1])], [(1, [2])])


class TestStatistics:
    async def test_they_count_records_sessions_operations_and_versions(
        self, shard: Shard, client: Client
    ) -> None:
        client.write(set_record(ANN), set_record(BOB), clear(BOB), set_record(CID, expected_version=9))
        await shard.committed()
        client.read(ANN, BOB)
        statistics = shard.namespace.statistics()

        assert (statistics.records, statistics.sessions) == (1, 1)
        assert statistics.operations == 4 + 2 * 2  # the client asks for records, and for contents
        assert statistics.version == 3

    async def test_a_resend_is_not_counted_again(self, shard: Shard, client: Client) -> None:
        client.write(set_record(ANN))
        client.resend(set_record(ANN))
        await shard.settled()

        assert shard.namespace.statistics().operations == 1

    async def test_what_the_store_held_is_there(self, shard: Shard) -> None:
        await shard.write(set_record(ANN), set_record(BOB))
        shard.restart()
        statistics = shard.namespace.statistics()

        assert (statistics.records, statistics.sessions, statistics.version) == (2, 1, 2)


@dataclasses.dataclass(frozen=True)
class Operation:
    """A write, as the model sees it."""

    kind: str
    key: bytes
    flow: str | None
    state: str | None
    data: dict[str, Any]
    expected_version: int | None

    def encoded(self) -> bytes:
        if self.kind == "set_record":
            return set_record(self.key, self.flow, self.state, self.expected_version, **self.data)
        if self.kind == "clear":
            return clear(self.key, self.expected_version)
        return {"set_data": set_data, "update_data": update_data}[self.kind](
            self.key, self.expected_version, **self.data
        )


class Model:
    """What a shard is to its clients: a dict, and a version that counts."""

    LIMIT = 256

    def __init__(self) -> None:
        self.records: dict[bytes, RecordView] = {}
        self.version = 0

    def apply(self, operation: Operation) -> Any:
        """Change the dict as the operation says, and return its result; of an error only the class."""
        old = self.records.get(operation.key)
        if operation.expected_version not in (None, old.content.version if old else 0):
            return VersionConflict
        if operation.kind == "clear":
            self.version += old is not None
            return self.records.pop(operation.key, None) is not None
        old = old or view(None, None, {}, 0)
        new = view(old.flow, old.state, dict(operation.data), self.version + 1)
        if operation.kind == "set_record":
            new.flow, new.state = operation.flow, operation.state
        if operation.kind == "update_data":
            new.content.data = old.content.data | operation.data
        if len(operation.key) + len(msgspec.msgpack.encode(new)) > self.LIMIT:
            return RecordTooLarge
        self.version += 1
        self.records[operation.key] = new
        return new.content if operation.kind == "update_data" else self.version


operations_of_the_machine = st.builds(
    Operation,
    kind=st.sampled_from(["set_record", "set_data", "update_data", "clear"]),
    key=st.sampled_from([ANN, BOB, CID]),
    flow=st.sampled_from([None, "flow"]),
    state=st.sampled_from([None, "state"]),
    data=st.dictionaries(st.sampled_from(["a", "b", "c"]), st.integers(0, 9) | st.just("x" * 90), max_size=2),
    expected_version=st.none() | st.integers(0, 9),
)


class NamespaceMachine(RuleBasedStateMachine):
    """A namespace that is killed at any moment, its clients sending again, against the model.

    The model applies a write when it is answered or kept, once.
    """

    CLIENTS = 3

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.shard = Shard(FakeStore(self.loop), max_record_bytes=Model.LIMIT)
        self.model = Model()
        self.numbers = [0] * self.CLIENTS
        self.sent: dict[int, Sequence[Operation]] = {}
        """The write that each client waits for."""
        self.expected: dict[tuple[int, int], list[Any]] = {}
        """Client and number -> results, of every write that took effect."""
        self.answers: list[tuple[int, int, list[Any]]] = []

    def teardown(self) -> None:
        self.loop.close()

    @precondition(lambda self: len(self.sent) < self.CLIENTS)
    @rule(operations=st.lists(operations_of_the_machine, max_size=4), data=st.data())
    def write(self, operations: list[Operation], data: st.DataObject) -> None:
        client = data.draw(st.sampled_from(sorted(set(range(self.CLIENTS)) - self.sent.keys())))
        operations = [self.aimed(operation) for operation in operations]
        self.numbers[client] += 1
        self.sent[client] = operations
        self.send(client, is_resend=False)

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def send_again(self, data: st.DataObject) -> None:
        self.send(data.draw(st.sampled_from(sorted(self.sent))), is_resend=True)

    @precondition(lambda self: self.shard.store.commit_under_way)
    @rule()
    def commit(self) -> None:
        self.shard.store.done()
        self.loop.run_until_complete(asyncio.sleep(0))

    @rule(is_kept=st.booleans())
    def kill_and_restart(self, is_kept: bool) -> None:  # noqa: FBT001
        if is_kept and self.shard.store.commit_under_way:
            self.shard.store.keep()
            for session in self.shard.store.batches[-1].sessions:
                self.took_effect(int(session))
        self.shard.restart()
        for client in self.sent:
            self.send(client, is_resend=True)

    @invariant()
    def every_answer_is_the_models(self) -> None:
        for client, number, results in self.answers:
            if client in self.sent and number == self.numbers[client]:
                self.took_effect(client)
                del self.sent[client]
            assert results == self.expected[client, number]
        self.answers.clear()

    @invariant()
    def every_read_is_the_models(self) -> None:
        self.every_answer_is_the_models()
        records = Client(self.shard.namespace).read(ANN, BOB, CID)

        assert records == [self.model.records.get(key) for key in (ANN, BOB, CID)]
        assert self.shard.namespace.statistics().records == len(self.model.records)

    @invariant()
    def what_was_answered_is_kept(self) -> None:
        self.every_answer_is_the_models()

        assert self.shard.store.contents().records.keys() == self.model.records.keys()
        assert self.shard.store.contents().version == self.model.version

    def aimed(self, operation: Operation) -> Operation:
        """Half of the expected versions are those of the moment: they would hardly ever be met by chance."""
        record = self.model.records.get(operation.key)
        if record is None or operation.expected_version is None or operation.expected_version % 2:
            return operation
        return dataclasses.replace(operation, expected_version=record.content.version)

    def send(self, client: int, *, is_resend: bool) -> None:
        encoded = [operation.encoded() for operation in self.sent[client]]
        request = write_request(self.numbers[client], encoded, session_of(f"{client}"), is_resend=is_resend)
        handle(self.shard.namespace, request, lambda reply: self.answered(client, reply))

    def answered(self, client: int, reply: bytes) -> None:
        _, number, results = DECODER.decode(reply[4:])
        decoded = [type(protocol.decode_error(r)) if type(r) is dict else r for r in results]
        self.answers.append((client, number, decoded))

    def took_effect(self, client: int) -> None:
        write = client, self.numbers[client]
        if write not in self.expected:
            self.expected[write] = [self.model.apply(operation) for operation in self.sent[client]]


TestAgainstTheModel = NamespaceMachine.TestCase
TestAgainstTheModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


class TestInMemoryAlone:
    """Where there is nothing to commit, the same holds at once."""

    BATCHES = st.lists(
        st.tuples(st.integers(0, 2), st.booleans(), st.lists(operations_of_the_machine, max_size=4)),
        max_size=15,
    )

    @given(BATCHES)
    def test_every_answer_and_every_read_is_the_models(
        self, batches: list[tuple[int, bool, list[Operation]]]
    ) -> None:
        options = BotOptions(max_record_bytes=Model.LIMIT)
        namespace = Namespace("my_bot", options, MemoryStore(), Contents(version=0))
        clients = [Client(namespace, f"{number}") for number in range(3)]
        model = Model()
        for number, is_resent, operations in batches:
            client = clients[number]
            encoded = [operation.encoded() for operation in operations]
            client.write(*encoded)
            if is_resent:
                client.resend(*encoded)
                assert repr(client.replies.pop()) == repr(client.replies[-1])
            expected = [model.apply(operation) for operation in operations]

            results = [type(each) if isinstance(each, FsmRayError) else each for each in client.results]
            assert results == expected
            assert client.read(ANN, BOB, CID) == [model.records.get(key) for key in (ANN, BOB, CID)]
            assert namespace.statistics().records == len(model.records)
            assert namespace.statistics().version == model.version

    @pytest.mark.parametrize("number", [0, 1, 2])
    def test_an_older_write_has_an_unknown_outcome(self, number: int) -> None:
        client = Client(Namespace("my_bot", BotOptions(), MemoryStore(), Contents(version=0)))
        for _ in range(3):
            client.write(update_data(ANN, a=1))
        client.send(number, set_record(ANN), is_resend=True)

        assert [type(result) for result in client.results] == [OutcomeUnknown]
        assert client.read(ANN) == [view(None, None, {"a": 1}, 3)]

    def test_sessions_beyond_the_bound_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sessions, "MAX_SESSIONS", 2)
        namespace = Namespace("my_bot", BotOptions(), MemoryStore(), Contents(version=0))
        clients = [Client(namespace, f"{number}") for number in range(3)]
        for client in clients:
            client.write(clear(ANN))

        assert [type(client.results[0]) for client in clients] == [bool, bool, Overloaded]
