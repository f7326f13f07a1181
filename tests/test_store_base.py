"""What stores share: who owns one, how it is opened and closed, and how a URL names it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from fsm_ray.errors import (
    FsmRayError,
    MissingExtra,
    NotOwner,
    StoreCorrupted,
    StoreMismatch,
    StoreUnavailable,
)
from fsm_ray.options import BotOptions, redacted
from fsm_ray.stores.base import LEASE_MARGIN, Batch, Contents, OwnedStore, Place, RotatingStore, Store
from fsm_ray.stores.by_url import make_store
from fsm_ray.stores.memory import MemoryStore
from fsm_ray.stores.owner import NOBODY, Owner, decode_owner, encode_owner, has_ended, this_process

PLACE = Place(url="fake://there", bot_name="bot", shard=1, shards=4, lease_s=5.0)

# Processes

CHILD = """
import sys
from pathlib import Path
from fsm_ray.stores.owner import this_process
Path("/proc/self/comm").write_text(sys.argv[1])
print(this_process(), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def child(request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    """A process that prints what `this_process` is there, and lives on. Its command's name is awkward."""
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, ") Z 1 (("], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.kill()


def name_of(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


def test_this_process_is_always_the_same_and_has_not_ended() -> None:
    assert this_process() == this_process()
    assert not has_ended(this_process())


def test_a_process_has_ended_when_it_is_killed_before_anybody_waits_for_it(
    child: subprocess.Popen[str],
) -> None:
    name = name_of(child)
    assert name != this_process()
    assert not has_ended(name)

    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert Path(f"/proc/{child.pid}").exists()
    assert has_ended(name)

    child.wait()
    assert not Path(f"/proc/{child.pid}").exists()
    assert has_ended(name)


def test_a_later_process_of_the_same_number_is_another_one() -> None:
    here, pid, started_at = this_process().rsplit(" ", 2)

    assert has_ended(f"{here} {pid} {int(started_at) - 1}")


def test_nothing_is_known_of_another_boots_or_another_containers_processes() -> None:
    boot_id, namespace, pid, started_at = this_process().split(" ")

    assert not has_ended(f"{boot_id[::-1]} {namespace} {pid} {int(started_at) - 1}")
    assert not has_ended(f"{boot_id} pid:[1] {pid} {int(started_at) - 1}")


# The owner's record


def make_owner(**changes: Any) -> Owner:
    facts: dict[str, Any] = {
        "epoch": 3,
        "opening": "0123",
        "process": "elsewhere pid:[1] 7 1000",
        "lease_s": 5.0,
        "bot_name": "bot",
        "shard": 1,
        "shards": 4,
    }
    return Owner(**facts | changes)


def test_an_owner_comes_back_from_its_record_which_people_can_read() -> None:
    owner = make_owner()

    assert decode_owner(encode_owner(owner)) == owner
    assert b'"bot_name":"bot"' in encode_owner(owner)


def test_an_owner_is_over_when_it_closed_the_store_or_its_process_has_ended() -> None:
    here, pid, started_at = this_process().rsplit(" ", 2)

    assert make_owner(process=NOBODY).is_over
    assert make_owner(process=f"{here} {pid} {int(started_at) - 1}").is_over
    assert not make_owner(process=this_process()).is_over
    assert not make_owner().is_over


# URLs


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("memory://", "memory://"),
        ("rocksdb:///var/lib/a:b", "rocksdb:///var/lib/a:b"),
        ("redis://host:6379/0", "redis://host:6379/0"),
        ("redis://user@host", "redis://user@host"),
        ("redis://user:secret@host:6379/0", "redis://user:***@host:6379/0"),
        ("redis://:secret@host", "redis://:***@host"),
        ("redis://u:sec@ret@host", "redis://u:***@host"),
        ("redis://u:sec:ret@host", "redis://u:***@host"),
        ("redis://u:sec%40ret@host", "redis://u:***@host"),
        ("s3://bucket/path?secret_access_key=secret", "s3://bucket/path"),
        ("postgresql://u:secret@host/db?password=secret", "postgresql://u:***@host/db"),
    ],
)
def test_a_url_is_shown_without_its_password(url: str, shown: str) -> None:
    assert redacted(url) == shown


@pytest.mark.parametrize(
    "separator", ["/", "?", "#", "@", ":", "%", " ", "'", "&", "=", "://", "@/", "?@", "/?#@:"]
)
@pytest.mark.parametrize(
    "url",
    ["redis://user:sec{}ret@host/0", "postgresql://host/db?password=sec{}ret", "redis://:sec{}ret@host"],
)
def test_no_part_of_a_password_is_shown_even_where_it_should_have_been_escaped(
    url: str, separator: str
) -> None:
    shown = redacted(url.format(separator))

    assert "sec" not in shown
    assert "ret" not in shown


KINDS = {
    "rocksdb:///directory": ("RocksDBStore", "rocksdict", "rocksdb"),
    "redis://host": ("RedisStore", "redis", "redis"),
    "rediss://host": ("RedisStore", "redis", "redis"),
    "unix:///socket": ("RedisStore", "redis", "redis"),
    "postgresql://host/db": ("PostgresStore", "psycopg", "postgres"),
    "s3://bucket": ("ObjectStore", "slatedb", "objectstore"),
    "gs://bucket": ("ObjectStore", "slatedb", "objectstore"),
    "az://container": ("ObjectStore", "slatedb", "objectstore"),
    "file:///directory": ("ObjectStore", "slatedb", "objectstore"),
}
"""URL -> class, its driver, and the extra that brings that."""


def test_a_memory_url_makes_a_memory_store() -> None:
    assert isinstance(make_store("bot", 0, BotOptions()), MemoryStore)


@pytest.mark.parametrize("url", list(KINDS))
def test_a_url_makes_the_store_that_it_names_at_its_place(url: str) -> None:
    store = make_store("bot", 1, BotOptions(store=url, shards=4, ownership_lease_s=7.0))

    assert type(store).__name__ == KINDS[url][0]
    assert isinstance(store, OwnedStore)
    assert store.place == Place(url=url, bot_name="bot", shard=1, shards=4, lease_s=7.0)


@pytest.mark.parametrize("url", list(KINDS))
def test_a_missing_driver_names_the_install_that_brings_it(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, driver, extra = KINDS[url]
    for module in {driver, *(name for name in sys.modules if name.startswith(f"{driver}."))}:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"fsm_ray.stores.{extra}", raising=False)

    with pytest.raises(MissingExtra, match=rf"pip install 'fsm-ray\[{extra}\]'") as caught:
        make_store("bot", 0, BotOptions(store=url))

    assert driver in str(caught.value)
    assert caught.value.bot == "bot"


def test_encryption_keys_wrap_the_store_in_one_that_encrypts() -> None:
    options = BotOptions(store="rocksdb:///directory", encryption_keys="env:KEYS")

    store = make_store("bot", 0, options)

    assert isinstance(store, RotatingStore)
    assert not store.is_shared


def test_missing_cryptography_names_the_install_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in {"cryptography", *(name for name in sys.modules if name.startswith("cryptography."))}:
        monkeypatch.setitem(sys.modules, module, None)
    for module in ("cipher", "encrypted"):
        monkeypatch.delitem(sys.modules, f"fsm_ray.stores.{module}", raising=False)

    with pytest.raises(MissingExtra, match=r"pip install 'fsm-ray\[encryption\]'") as caught:
        make_store("bot", 0, BotOptions(store="rocksdb:///directory", encryption_keys="env:KEYS"))

    assert caught.value.bot == "bot"


# Opening and closing


@dataclass
class Server:
    """What keeps a fake store's owner, and what else happens to it."""

    epoch: int = 0
    owner: bytes | None = None
    connections: int = 0
    calls: list[str] = field(default_factory=list)
    fails: dict[str, BaseException] = field(default_factory=dict)
    """Method -> what it raises."""
    answers_lost: int = 0
    """How many more owners are kept without an answer."""


class Clock:
    """A clock that goes while somebody sleeps by it, or by hand."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.slept_s: list[float] = []

    def __call__(self) -> float:
        return self.now_s

    async def sleep(self, duration_s: float) -> None:
        self.slept_s.append(duration_s)
        self.now_s += duration_s


class FakeStore(OwnedStore):
    """Keeps nothing but its owner, on a `Server`."""

    is_shared: ClassVar[bool] = True

    def __init__(self, server: Server, clock: Clock | None = None, place: Place = PLACE) -> None:
        self.clock = clock or Clock()
        super().__init__(place, self.clock, self.clock.sleep)
        self.server = server
        self.is_connected = False
        self.load_s = 0.0

    def commit(self, batch: Batch) -> asyncio.Future[None]:
        raise NotImplementedError

    async def confirm(self) -> None:
        self._called("confirm")
        if self.owner is None or self.server.epoch != self.owner.epoch:
            raise self._not_owner()

    async def _connect(self) -> None:
        self.is_connected = True
        self.server.connections += 1
        self._called("connect")

    async def _disconnect(self) -> None:
        self.server.connections -= self.is_connected
        self.is_connected = False

    async def _read_owner(self) -> bytes | None:
        self._called("read_owner")
        return self.server.owner

    async def _replace_owner(self, last_epoch: int, epoch: int, owner: bytes) -> bool:
        self._called("replace_owner")
        if self.server.epoch != last_epoch:
            return False
        self.server.epoch, self.server.owner = epoch, owner
        if self.server.answers_lost:
            self.server.answers_lost -= 1
            raise StoreUnavailable("the answer got lost")
        return True

    async def _load(self) -> Contents:
        self._called("load")
        self.clock.now_s += self.load_s
        return Contents(version=7)

    def _called(self, method: str) -> None:
        self.server.calls.append(method)
        if method in self.server.fails:
            raise self.server.fails.pop(method)


class ExclusiveFakeStore(FakeStore):
    is_shared: ClassVar[bool] = False


@pytest.fixture
def server() -> Server:
    return Server()


async def test_the_first_owner_takes_the_first_epoch(server: Server) -> None:
    store = FakeStore(server)

    assert (await store.open()).version == 7
    assert server.owner is not None
    owner = decode_owner(server.owner)
    assert (owner.epoch, owner.process) == (1, this_process())
    assert (owner.bot_name, owner.shard, owner.shards, owner.lease_s) == ("bot", 1, 4, 5.0)
    assert store.owner == owner


async def test_each_opening_takes_the_next_epoch(server: Server) -> None:
    first, second = FakeStore(server), FakeStore(server)

    await first.open()
    await first.open()
    await second.open()

    assert server.epoch == 3


async def test_who_is_overtaken_while_it_opens_tries_again_behind_the_faster_one(server: Server) -> None:
    slow, fast = FakeStore(server), FakeStore(server)

    async def overtaken(last_epoch: int, epoch: int, owner: bytes) -> bool:
        del slow._replace_owner  # the class's from here on
        await fast.open()
        return await slow._replace_owner(last_epoch, epoch, owner)

    slow._replace_owner = overtaken  # type: ignore[method-assign]

    await slow.open()

    assert slow.owner is not None
    assert slow.owner.epoch == server.epoch == 2
    assert slow.clock.slept_s == [5.0 * LEASE_MARGIN]
    with pytest.raises(NotOwner):
        await fast.open()


async def test_who_owned_the_store_and_is_overtaken_while_it_opens_it_again_is_refused(
    server: Server,
) -> None:
    slow, fast = FakeStore(server), FakeStore(server)
    await slow.open()

    async def overtaken(last_epoch: int, epoch: int, owner: bytes) -> bool:
        del slow._replace_owner  # the class's from here on
        await fast.open()
        return await slow._replace_owner(last_epoch, epoch, owner)

    slow._replace_owner = overtaken  # type: ignore[method-assign]

    with pytest.raises(NotOwner, match="another process"):
        await slow.open()
    assert server.connections == 1
    await fast.confirm()


async def test_a_claim_whose_answer_got_lost_is_recognised_as_ones_own(server: Server) -> None:
    store = FakeStore(server)
    await store.open()
    server.answers_lost = 1
    with pytest.raises(StoreUnavailable):
        await store.open()

    await store.open()

    assert server.epoch == 3
    await store.confirm()


@pytest.mark.parametrize("step", ["connect", "read_owner", "replace_owner", "load", "confirm"])
@pytest.mark.parametrize("kind", [StoreUnavailable, asyncio.CancelledError])
async def test_an_opening_that_fails_leaves_no_connection(
    server: Server, step: str, kind: type[BaseException]
) -> None:
    store = FakeStore(server)
    server.fails[step] = kind("failed")

    with pytest.raises(kind):
        await store.open()

    assert server.connections == 0
    await store.open()
    assert server.connections == 1


async def test_opening_again_replaces_the_connection(server: Server) -> None:
    store = FakeStore(server)
    await store.open()
    await store.open()

    assert server.connections == 1


@pytest.mark.parametrize(
    "changes", [{"bot_name": "other"}, {"shard": 2}, {"shards": 5}, {"slots": 16}, {"format": 3}]
)
async def test_what_another_kind_of_owner_wrote_is_refused_and_left_alone(
    server: Server, changes: dict[str, Any]
) -> None:
    server.epoch, server.owner = 3, encode_owner(make_owner(**changes))

    with pytest.raises(StoreMismatch, match="Nothing was changed") as caught:
        await FakeStore(server).open()

    assert str(next(iter(changes.values()))) in str(caught.value)
    assert server.epoch == 3


@pytest.mark.parametrize("record", [b"", b"garbage", b"{}", b"\xff\xfe", b'{"epoch": 1}'])
async def test_an_owner_that_cannot_be_read_is_corruption(server: Server, record: bytes) -> None:
    server.epoch, server.owner = 3, record

    with pytest.raises(StoreCorrupted, match="fake://there"):
        await FakeStore(server).open()

    assert (server.epoch, server.owner) == (3, record)


async def test_the_wait_for_a_lease_begins_with_taking_over_and_loading_is_a_part_of_it(
    server: Server,
) -> None:
    await FakeStore(server).open()
    store = FakeStore(server)
    store.load_s = 2.0

    contents = await store.open()

    assert store.clock.slept_s == [pytest.approx(5.0 * LEASE_MARGIN - 2.0)]
    assert contents.owned_since_s == store.clock.now_s


async def test_no_lease_is_waited_for_when_loading_takes_longer(server: Server) -> None:
    await FakeStore(server).open()
    store = FakeStore(server)
    store.load_s = 60.0

    await store.open()

    assert sum(store.clock.slept_s) == 0


async def test_an_opening_that_failed_after_taking_over_still_waits_for_the_last_owners_lease(
    server: Server,
) -> None:
    await FakeStore(server).open()
    store = FakeStore(server)
    server.fails["load"] = StoreUnavailable("failed")
    with pytest.raises(StoreUnavailable):
        await store.open()

    await store.open()

    assert sum(store.clock.slept_s) >= 5.0


async def test_a_claim_whose_answer_got_lost_still_waits_for_the_last_owners_lease(server: Server) -> None:
    await FakeStore(server).open()
    store = FakeStore(server)
    server.answers_lost = 1
    with pytest.raises(StoreUnavailable):
        await store.open()

    await store.open()

    assert sum(store.clock.slept_s) >= 5.0


async def test_a_lease_is_waited_for_though_the_owner_between_ended_before_it_had_waited(
    server: Server,
) -> None:
    await FakeStore(server).open()
    between = FakeStore(server, place=replace(PLACE, lease_s=0.2))
    server.fails["load"] = StoreUnavailable("failed")
    with pytest.raises(StoreUnavailable):
        await between.open()
    await between.close()

    store = FakeStore(server)
    await store.open()

    assert sum(store.clock.slept_s) >= 5.0


async def test_who_is_overtaken_while_it_waits_for_a_lease_is_refused(server: Server) -> None:
    await FakeStore(server).open()
    store, faster = FakeStore(server), FakeStore(server)

    async def sleep(_: float) -> None:
        await faster.open()

    store._sleep = sleep

    with pytest.raises(NotOwner):
        await store.open()


async def test_a_store_that_is_not_shared_has_no_lease_and_is_not_confirmed(server: Server) -> None:
    await ExclusiveFakeStore(server).open()
    store = ExclusiveFakeStore(server)

    await store.open()

    assert store.clock.slept_s == []
    assert "confirm" not in server.calls


async def test_closing_tells_the_next_owner_that_there_is_no_lease(server: Server) -> None:
    first, second = FakeStore(server), FakeStore(server)
    await first.open()

    await first.close()

    assert server.connections == 0
    await second.open()
    assert second.clock.slept_s == []


@pytest.mark.parametrize("error", [NotOwner, StoreUnavailable, StoreMismatch, StoreCorrupted])
async def test_closing_never_fails_whatever_is_wrong_with_the_store(
    server: Server, error: type[FsmRayError]
) -> None:
    store = FakeStore(server)
    await store.open()
    server.fails["replace_owner"] = error("failed")

    await store.close()

    assert server.connections == 0


async def test_what_is_damaged_as_a_store_is_closed_is_not_in_the_log(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    store = FakeStore(server)
    await store.open()
    server.fails["replace_owner"] = StoreCorrupted("the record of ann")
    with caplog.at_level("INFO"):
        await store.close()

    (line,) = caplog.messages
    assert line.endswith("closed without a word: it is damaged")


async def test_a_store_that_was_never_opened_can_be_closed(server: Server) -> None:
    await FakeStore(server).close()

    assert server.calls == []


async def test_a_store_is_named_without_its_password(server: Server) -> None:
    store = FakeStore(server, place=replace(PLACE, url="redis://user:secret@host/0"))

    assert store.name == "redis://user:***@host/0 (shard 1 of bot 'bot')"
    assert isinstance(store, Store)
