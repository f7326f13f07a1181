"""What other storages and exports hold arrives whole, once, and runs no code on its way."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import datetime
import enum
import io
import json
import math
import os
import pickle
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from zoneinfo import ZoneInfo

import pydantic
import pytest
import redis.asyncio
import telebot.states
import telebot.storage
import telegram
import telegram.constants
from aiogram.fsm.storage.base import DefaultKeyBuilder, StorageKey
from aiogram.fsm.storage.redis import RedisStorage
from rich.console import Console
from telegram.ext import ExtBot, PicklePersistence

from fsm_ray import AsyncStorage, State, Storage
from fsm_ray.adapters.aiogram import record_key
from fsm_ray.adapters.telebot import AsyncRayStateStorage
from fsm_ray.adapters.telegram import RayPersistence
from fsm_ray.bench.servers import ValkeyServer, temporary_directory
from fsm_ray.codec import EncodedKey, encode_key, wire
from fsm_ray.errors import InvalidData, InvalidInput, ValueNotDecodable
from fsm_ray.record import NEVER_MS
from fsm_ray.transfer import Report, export, import_, progress_bar, typed_json
from fsm_ray.transfer.aiogram import import_aiogram_redis
from fsm_ray.transfer.telebot import import_telebot_pickle, import_telebot_redis
from fsm_ray.transfer.telegram import import_telegram_pickle
from fsm_ray.transfer.typed_json import data_from_json, data_to_json, key_from_json, key_to_json


class Colour(enum.Enum):
    RED = "red"


class Point(NamedTuple):
    x: int
    y: float


@dataclasses.dataclass(frozen=True)
class Place:
    name: str
    at: Point


class Model(pydantic.BaseModel):
    n: int
    tags: set[str] = set()


class Odd:
    """What only pickle carries."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __reduce__(self) -> Any:
        return Odd, (self.value,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Odd) and other.value == self.value

    __hash__ = None  # type: ignore[assignment]


KEYS: list[Any] = [
    None,
    True,
    1,
    -(10**30),
    1.0,
    -math.inf,
    "a",
    "$int",
    b"\x00\xff",
    (),
    (-100, 7, None, ("x", 1.5)),
    uuid.UUID(int=7),
    Colour.RED,
    Point(1, 2.0),
    Place("here", Point(1, 2.0)),
]

DATA: dict[str, Any] = {
    "none": None,
    "bools": [True, 1, 1.0, "1", b"1"],
    "ints": [0, -1, 2**63, -(2**63), 2**64, -(10**40)],
    "floats": [0.1, -0.0, 1e300, math.inf, -math.inf],
    "text": 'line\n"quoted" \u2028 \U0001f600',
    "nested": {"a": {"b": [{}, [], {"c": ()}]}},
    "$int": {"$int": "no typed value", "more": 1},
    "like a typed value": {"$tuple": [1]},
    "map": {1: "int", (1, 2): "tuple", None: "none"},
    "containers": [(1, [2]), {1, 2}, frozenset({"x"}), bytearray(b"xyz")],
    "times": [
        datetime.datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=ZoneInfo("Europe/Rome"), fold=1),
        datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
        datetime.date(2026, 1, 2),
        datetime.time(3, 4),
        datetime.timedelta(days=-1, microseconds=5),
    ],
    "numbers": [Decimal("1.50"), uuid.UUID(int=9)],
    "classes": [Colour.RED, Point(1, 2.0), Place("there", Point(3, 4.0)), Model(n=1, tags={"a"})],
    "odd": Odd([1]),
}


def types_in(value: Any) -> Any:
    """A value with the type of everything in it."""
    if isinstance(value, dict):
        return {repr(types_in(name)): types_in(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value), [types_in(item) for item in value]
    return type(value), repr(value) if isinstance(value, float) else value


class TestTypedJson:
    @pytest.mark.parametrize("key", KEYS, ids=repr)
    def test_a_key_comes_back_from_json_with_its_types(self, key: Any) -> None:
        back = key_from_json(json.loads(json.dumps(key_to_json(key), allow_nan=False)))

        assert types_in(back) == types_in(key)

    @pytest.mark.parametrize("name", list(DATA))
    def test_data_comes_back_from_json_with_its_types(self, name: str) -> None:
        data = {name: DATA[name]}
        text = json.dumps(data_to_json(data), allow_nan=False)
        back = data_from_json(json.loads(text), allow_pickle=True)

        assert types_in(back) == types_in(data)

    def test_plain_values_are_what_people_would_write(self) -> None:
        data = {"name": "Ada", "age": 7, "size": 1.5, "tags": ["a", None, True], "more": {"x": {}}}

        assert data_to_json(data) == data
        assert key_to_json((-100, 7)) == [-100, 7]

    @pytest.mark.parametrize(
        "value",
        [10**30, -(10**30), 10**5_000, 2**64, 2**63, -(2**63) - 1, 7],
        ids=lambda value: f"{value.bit_length()} bits",
    )
    def test_an_int_of_any_size_is_told_and_read_as_a_plain_number_too(self, value: int) -> None:
        told = data_to_json({"n": value})

        assert data_from_json(told, allow_pickle=False) == {"n": value}
        assert data_from_json({"n": value}, allow_pickle=False) == {"n": value}
        assert key_from_json(key_to_json(value)) == key_from_json(value) == value

    def test_the_decimal_ints_of_earlier_exports_are_read(self) -> None:
        assert data_from_json({"n": {"$int": "-1" + "0" * 30}}, allow_pickle=False) == {"n": -(10**30)}

    def test_a_value_that_is_none_is_cited_in_short(self) -> None:
        with pytest.raises(InvalidData) as raised:
            data_from_json({"n": {"$int": "1" * 5_000}}, allow_pickle=False)

        assert len(str(raised.value)) < 500

    @pytest.mark.parametrize(
        "value",
        [
            {"$tuple": 1},
            {"$uuid": "x"},
            {"$int": "x"},
            {"$int": None},
            {"$bytes": "?"},
            {"$unknown": 1},
            {"$map": [[1]]},
            {"$date": "x"},
            {"$decimal": "x"},
            {"$float": []},
            {"$map": [[{"$tuple": []}, 1], [[], 2]]},
        ],
        ids=repr,
    )
    def test_what_no_type_reads_is_refused(self, value: Any) -> None:
        with pytest.raises(Exception) as raised:  # noqa: PT011 - one of two, as an import catches them
            data_from_json({"x": value}, allow_pickle=True)

        assert type(raised.value).__module__ == "fsm_ray.errors", raised.value


@pytest.fixture(scope="module")
def source_and_target(cluster: object) -> Iterator[tuple[str, str]]:
    """Two bots for all tests, which clear them."""
    names = "transfer-source", "transfer-target"
    with Storage() as storage:
        for name, shards in zip(names, (1, 3), strict=True):
            storage.init(name, shards=shards)
        yield names
        for name in names:
            storage.drop(name)


@pytest.fixture
def source(source_and_target: tuple[str, str]) -> str:
    return source_and_target[0]


@pytest.fixture
def target(source_and_target: tuple[str, str]) -> str:
    return source_and_target[1]


@pytest.fixture
async def storage(source_and_target: tuple[str, str]) -> AsyncIterator[AsyncStorage]:
    async with AsyncStorage() as storage:
        yield storage
        for name in source_and_target:
            for conversation in [each async for each in storage.scan(name)]:
                await storage.clear(name, conversation.key)


async def contents(storage: AsyncStorage, bot_name: str) -> dict[Any, State]:
    return {each.key: each.state async for each in storage.scan(bot_name)}


class Killed(Exception):
    """Stands for the end of the process, between one batch and the next."""


def kill_after(count: int) -> Any:
    def progress(done: int, total: int | None) -> None:
        if done >= count:
            raise Killed

    return progress


@pytest.mark.ray
class TestLines:
    async def test_all_types_of_keys_and_values_arrive(
        self, storage: AsyncStorage, source: str, target: str
    ) -> None:
        for key in KEYS:
            await storage.set_state(source, key, State(flow="f", state=repr(key), data=DATA))
        file = io.BytesIO()
        exported = await export(storage, source, file)
        file.seek(0)
        imported = await import_(storage, target, file, allow_pickle=True)
        found = [(each.key, each.state) async for each in storage.scan(target)]

        assert (exported, imported) == (Report(len(KEYS)), Report(len(KEYS)))
        assert {repr(key) for key, _ in found} == {repr(key) for key in KEYS}
        assert all(types_in(state.data) == types_in(DATA) for _, state in found)
        assert all((state.flow, state.state) == ("f", repr(key)) for key, state in found)

    async def test_a_file_reads_as_what_is_in_it(self, storage: AsyncStorage, source: str) -> None:
        version = await storage.set_state(source, (-100, 7), State(state="pay", data={"dish": "soup"}))
        file = io.BytesIO()
        await export(storage, source, file)
        header, line, footer = map(json.loads, file.getvalue().splitlines())

        assert header == {"fsm_ray_export": 1, "bot": source}
        assert line == {"key": [-100, 7], "state": "pay", "data": {"dish": "soup"}, "version": version}
        assert footer == {"conversations": 1}

    async def test_expiry_is_kept_and_what_has_expired_stays_away(
        self, storage: AsyncStorage, source: str, target: str
    ) -> None:
        await storage.set_state(source, "short", State(state="a"), ttl_s=100.0)
        await storage.set_state(source, "for ever", State(state="b"))
        file = io.BytesIO()
        await export(storage, source, file)
        past = b'{"key":"past","ttl_s":5.0,"expires_at":"2020-01-01T00:00:00Z"}\n'
        lines = file.getvalue().splitlines(keepends=True)
        report = await import_(storage, target, io.BytesIO(b"".join([lines[0], past, *lines[1:]])))
        states = await contents(storage, target)
        left = states["short"].expires_at

        assert (report.written, report.skipped) == (2, 1)
        assert left is not None
        assert 90 < (left - datetime.datetime.now(datetime.UTC)).total_seconds() <= 100
        assert states["for ever"].expires_at is None

    async def test_a_record_that_lives_for_ever_in_a_bot_of_others_comes_back_as_one(
        self, storage: AsyncStorage, source: str, target: str
    ) -> None:
        await storage.set_state(source, "new", State(), ttl_s=math.inf)
        file = io.BytesIO()
        await export(storage, source, file)
        earlier = b'{"key":"earlier","ttl_s":18446744073709552.0}\n'
        header, line, footer = file.getvalue().splitlines(keepends=True)
        report = await import_(storage, target, io.BytesIO(header + line + earlier + footer))
        ttls_ms = {each.key: each.record.content.ttl_ms async for each in storage.scan(target)}

        assert json.loads(line)["ttl_s"] == "inf"
        assert report == Report(2)
        assert ttls_ms == {"new": NEVER_MS, "earlier": NEVER_MS}

    async def test_what_is_there_is_left_alone_unless_overwritten(
        self, storage: AsyncStorage, source: str, target: str
    ) -> None:
        await storage.set_many(source, {1: State(state="old"), 2: State(state="old")})
        await storage.set_state(target, 1, State(state="newer"))
        file = io.BytesIO()
        await export(storage, source, file)
        reports: list[Any] = []
        for overwrite in (False, True):
            file.seek(0)
            reports.append(await import_(storage, target, file, overwrite=overwrite))
            reports.append((await contents(storage, target))[1].state)

        assert reports == [Report(1, 1), "newer", Report(2), "old"]

    async def test_an_import_that_was_killed_goes_on(
        self, storage: AsyncStorage, source: str, target: str
    ) -> None:
        states = {(number, "x"): State(data={"n": number}) for number in range(1_000)}
        await storage.set_many(source, states)
        file = io.BytesIO()
        await export(storage, source, file)
        file.seek(0)
        with pytest.raises(Killed):
            await import_(storage, target, file, progress=kill_after(300))
        half = await storage.count(target)
        file.seek(0)
        report = await import_(storage, target, file)

        assert half == 512
        assert report == Report(written=1_000 - half, skipped=half)
        assert await contents(storage, target) == states

    async def test_lines_that_are_none_are_refused_and_the_others_imported(
        self, storage: AsyncStorage, target: str
    ) -> None:
        pickled = data_to_json({"odd": Odd(1)})
        lines: list[Any] = [
            {"fsm_ray_export": 1, "bot": "other"},
            {"key": 1, "data": {"x": 1}},
            {"key": {"$list": [1]}},
            {"key": [1, {"x": 1}]},
            {"key": 2, "data": pickled},
            {"key": 3, "colour": "red"},
            {"key": 4, "data": {"x": {"$enum": ["no.such.module", "Class", "A"]}}},
            {"key": 5, "data": {"x": "y" * (2 << 20)}},
            {"key": 6},
            {"key": 7, "expires_at": "0001-01-01T00:00:00"},
            {"key": 8, "data": {"n": 10**30, "x" * 500: {"$uuid": "x"}}},
            {"key": 10**30, "data": {"n": [10**30]}},
        ]
        file = io.BytesIO(b"\n".join(json.dumps(line).encode() for line in lines) + b"\nno json\n")
        report = await import_(storage, target, file)

        assert sorted((await contents(storage, target)).keys()) == [1, 6, 10**30]
        assert report.written == 3
        assert max(len(each.reason) for each in report.refused) < 400
        assert sorted(each.source for each in report.refused) == [
            "line 10",
            "line 11",
            "line 13",
            "line 3",
            "line 4",
            "line 5",
            "line 6",
            "line 7",
            "line 8",
            "the end",
        ]
        assert "allow_pickle" in next(each.reason for each in report.refused if each.source == "line 5")

    @pytest.mark.parametrize("header", [b"", b"{}\n", b"\xff\n", b'{"fsm_ray_export":2,"bot":"b"}\n'])
    async def test_a_file_that_is_no_export_is_refused(
        self, storage: AsyncStorage, target: str, header: bytes
    ) -> None:
        with pytest.raises(InvalidData, match="export"):
            await import_(storage, target, io.BytesIO(header))

    async def test_an_export_needs_no_class_and_loads_no_pickle(
        self, storage: AsyncStorage, source: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for key in KEYS:
            await storage.set_state(source, key, State(data=DATA))
        files = io.BytesIO(), io.BytesIO()
        await export(storage, source, files[0])
        for name in ("Colour", "Point", "Place", "Model", "Odd"):
            monkeypatch.delattr(sys.modules[__name__], name)
        report = await export(storage, source, files[1])

        assert report == Report(len(KEYS))
        assert files[1].getvalue() == files[0].getvalue()

    async def test_what_a_newer_version_wrote_does_not_keep_the_others_from_the_export(
        self, storage: AsyncStorage, source: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for number in range(3):
            await storage.set_state(source, number, State(data={"x": Point(1, 2.0) if number == 1 else 0}))
        await storage.set_state(source, Point(1, 2.0), State())
        monkeypatch.delitem(typed_json._NESTED, wire.NAMED_TUPLE)
        file = io.BytesIO()
        report = await export(storage, source, file)

        assert report.written == 2
        assert min(each.source for each in report.refused) == "1"
        assert all("a newer fsm_ray wrote it" in each.reason for each in report.refused)

    async def test_a_key_whose_class_is_gone_ends_a_scan_and_a_watch_that_go_on_behind_it(
        self, storage: AsyncStorage, source: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        since, gone = await storage.position(source), Point(1, 2.0)
        for key in (1, gone, 2):
            await storage.set_state(source, key, State())
        order = [each.key async for each in storage.scan(source)]
        monkeypatch.delattr(sys.modules[__name__], "Point")
        with pytest.raises(ValueNotDecodable, match="PYTHONPATH") as scanned:
            _ = [each async for each in storage.scan(source)]
        found = [each.key async for each in storage.scan(source, after=scanned.value.key)]
        with pytest.raises(ValueNotDecodable) as watched:
            _ = [each async for each in storage.watch(source, since=since)]
        change = await anext(storage.watch(source, since=watched.value.position))

        assert scanned.value.key == watched.value.key == EncodedKey(encode_key(gone))
        assert found == order[order.index(gone) + 1 :]
        assert change.key == 2
        assert await storage.clear(source, scanned.value.key)

    async def test_progress_is_told(self, storage: AsyncStorage, source: str, target: str) -> None:
        await storage.set_many(source, {number: State() for number in range(600)})
        told: list[tuple[int, int | None]] = []
        file = io.BytesIO()
        await export(storage, source, file, progress=lambda *each: told.append(each))
        file.seek(0)
        await import_(storage, target, file, progress=lambda *each: told.append(each))

        assert told == [(600, 600), (256, None), (512, None), (600, 600)]

    @pytest.mark.parametrize("is_terminal", [True, False])
    def test_the_bar_shows_on_a_terminal_alone(self, *, is_terminal: bool) -> None:
        console = Console(file=io.StringIO(), force_terminal=is_terminal)
        with progress_bar("importing", console) as progress:
            progress(5, None)
            progress(7, 7)
        output = console.file.getvalue()  # type: ignore[attr-defined]

        assert ("importing" in output and "7/7" in output) is is_terminal
        assert bool(output) is is_terminal


@pytest.fixture(scope="module")
def server() -> Iterator[ValkeyServer]:
    with temporary_directory() as directory, ValkeyServer(directory) as server:
        yield server


@pytest.fixture
async def client(server: ValkeyServer) -> AsyncIterator[redis.asyncio.Redis]:
    client = redis.asyncio.Redis.from_url(server.url)
    yield client
    await client.flushall()
    await client.aclose()


class TestAiogram:
    pytestmark: ClassVar = [pytest.mark.ray]

    @pytest.mark.parametrize(
        ("settings", "keys"),
        [
            (
                {},
                [
                    (-100, 7, None, None, "default"),
                    (-100, 7, 9, None, "default"),
                    (7, 7, None, None, "default"),
                ],
            ),
            ({"with_bot_id": True, "prefix": "my*", "separator": "."}, [(-100, 7, 9, None, "default")]),
            (
                {"with_bot_id": True, "with_business_connection_id": True, "with_destiny": True},
                [
                    (-100, 7, None, None, "default"),
                    (-100, 7, 9, None, "aiogd:stack:"),
                    (-100, 7, None, "AQAD_b", "aiogd:context:5"),
                    (-100, 7, 9, "AQAD_b", "default"),
                ],
            ),
            ({"with_destiny": True}, [(-100, 7, None, None, "5"), (-100, 7, 8, None, "5")]),
        ],
    )
    async def test_each_layout_of_keys_arrives_where_the_adapter_looks(  # noqa: PLR0917 - fixtures
        self,
        storage: AsyncStorage,
        target: str,
        server: ValkeyServer,
        client: redis.asyncio.Redis,
        settings: dict[str, Any],
        keys: list[Any],
    ) -> None:
        builder = DefaultKeyBuilder(**settings)
        theirs = RedisStorage(client, key_builder=builder)
        full = [StorageKey(5, *key) for key in keys]
        for number, key in enumerate(full):
            await theirs.set_state(key, f"state {number}")
            await theirs.set_data(key, {"n": number})
        report = await import_aiogram_redis(server.url, storage, target, key_builder=builder, bot_id=5)

        assert report == Report(len(keys))
        assert await contents(storage, target) == {
            record_key(key): State(state=f"state {number}", data={"n": number})
            for number, key in enumerate(full)
        }

    async def test_state_or_data_alone_times_to_live_and_locks(
        self, storage: AsyncStorage, target: str, server: ValkeyServer, client: redis.asyncio.Redis
    ) -> None:
        theirs = RedisStorage(client, state_ttl=50, data_ttl=100)
        state, data, both = (StorageKey(5, 1, user) for user in (1, 2, 3))
        await theirs.set_state(state, "size")
        await theirs.set_data(data, {"name": "Ada"})
        await theirs.set_state(both, "size")
        await theirs.set_data(both, {"name": "Bob"})
        await client.set("fsm:1:1:lock", "x")
        report = await import_aiogram_redis(server.url, storage, target, bot_id=5)
        found = await contents(storage, target)
        now = datetime.datetime.now(datetime.UTC)
        left_s = {
            key[2]: round((each.expires_at - now).total_seconds(), -1)
            for key, each in found.items()
            if each.expires_at
        }

        assert report == Report(3)
        assert [found[record_key(key)] for key in (state, data, both)] == [
            State(state="size"),
            State(data={"name": "Ada"}),
            State(state="size", data={"name": "Bob"}),
        ]
        assert left_s == {1: 50, 2: 100, 3: 100}

    async def test_what_cannot_be_read_is_refused_and_other_bots_are_left_out(
        self, storage: AsyncStorage, target: str, server: ValkeyServer, client: redis.asyncio.Redis
    ) -> None:
        await client.mset(
            {
                "fsm:5:1:1:data": "{",
                "fsm:5:1:2:data": "[1]",
                "fsm:5:1:3:state": b"\xff",
                "fsm:other": "x",
                "fsm:6:1:1:state": "a",
                "fsm:5:1:4:state": "a",
            }
        )
        builder = DefaultKeyBuilder(with_bot_id=True)
        report = await import_aiogram_redis(server.url, storage, target, key_builder=builder, bot_id=5)

        assert (report.written, report.skipped) == (1, 0)
        assert sorted(each.source for each in report.refused) == [
            "fsm:5:1:1:",
            "fsm:5:1:2:",
            "fsm:5:1:3:",
            "fsm:other",
        ]

    @pytest.mark.parametrize("url", ["http://me:s3cret@h", "redis://me:s3cret@h:x", "redis://h?colour=red"])
    async def test_what_is_no_url_of_a_redis_is_refused_without_its_password(
        self, storage: AsyncStorage, target: str, url: str
    ) -> None:
        with pytest.raises(InvalidInput, match="is no URL of a Redis") as refused:
            await import_aiogram_redis(url, storage, target, bot_id=5)

        assert "s3cret" not in str(refused.value)

    async def test_the_id_of_the_bot_must_be_somewhere(self, storage: AsyncStorage, target: str) -> None:
        with pytest.raises(InvalidInput, match="bot_id"):
            await import_aiogram_redis("redis://nowhere", storage, target)

    async def test_one_that_was_killed_goes_on_and_overwrites_nothing(
        self, storage: AsyncStorage, target: str, server: ValkeyServer, client: redis.asyncio.Redis
    ) -> None:
        await client.mset({f"fsm:1:{user}:state": "old" for user in range(1_000)})
        with pytest.raises(Killed):
            await import_aiogram_redis(server.url, storage, target, bot_id=5, progress=kill_after(500))
        half = await contents(storage, target)
        await storage.set_state(target, next(iter(half)), State(state="newer"))
        report = await import_aiogram_redis(server.url, storage, target, bot_id=5)
        states = [str(state.state) for state in (await contents(storage, target)).values()]

        assert (len(half), report) == (512, Report(488, 512))
        assert sorted(states) == ["newer", *["old"] * 999]


@pytest.mark.ray
class TestTelebot:
    async def test_conversations_of_its_redis_arrive_where_the_adapter_looks(
        self, storage: AsyncStorage, target: str, server: ValkeyServer, client: redis.asyncio.Redis
    ) -> None:
        theirs = telebot.storage.StateRedisStorage(redis_url=server.url)
        places: list[dict[str, Any]] = [
            {"chat_id": -100, "user_id": 7, "bot_id": 5},
            {"chat_id": -100, "user_id": 7, "bot_id": 5, "message_thread_id": 9},
            {"chat_id": -100, "user_id": 7, "bot_id": 5, "business_connection_id": "AQAD_b"},
            {"chat_id": 7, "user_id": 7, "bot_id": 5, "message_thread_id": 9, "business_connection_id": "AQ"},
        ]
        for number, place in enumerate(places):
            theirs.set_state(**place, state=f"state {number}")
            theirs.save(**place, data={"n": number})
        theirs.set_state(1, 2, "another bot's", bot_id=6)
        theirs.redis.close()
        report = await import_telebot_redis(server.url, storage, target, bot_id=5)
        ours = AsyncRayStateStorage(target, storage)

        assert (report.written, [each.source for each in report.refused]) == (4, ["telebot:6:1:2"])
        assert [await ours.get_state(**place) for place in places] == [f"state {n}" for n in range(4)]
        assert [await ours.get_data(**place) for place in places] == [{"n": n} for n in range(4)]

    async def test_conversations_of_its_pickle_arrive_and_run_no_code(
        self, storage: AsyncStorage, target: str, tmp_path: Path
    ) -> None:
        path = tmp_path / "states.pkl"
        theirs = telebot.storage.StatePickleStorage(str(path))
        values = {
            "at": datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
            "tags": {"a"},
            "counts": collections.Counter("aab"),
        }
        for user, state in enumerate((Order.size, "text", 3, "with a class of the bot's")):
            theirs.set_state(1, user, state, bot_id=5)
        theirs.save(1, 0, {"at": values["at"], "tags": values["tags"]}, bot_id=5)
        theirs.save(1, 3, values, bot_id=5)
        report = await import_telebot_pickle(path, storage, target, bot_id=5)
        ours = AsyncRayStateStorage(target, storage)

        assert [await ours.get_state(1, user, bot_id=5) for user in range(4)] == [
            "Order:size",
            "text",
            3,
            None,
        ]
        assert await ours.get_data(1, 0, bot_id=5) == {"at": values["at"], "tags": {"a"}}
        assert report.written == 3
        assert [("collections.Counter" in each.reason) for each in report.refused] == [True]


class Order(telebot.states.StatesGroup):
    size = telebot.states.State()


class Hostile:
    """Makes a pickle that touches a file as it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


async def pickled_by_ptb(path: Path, *, single_file: bool = True, hostile: object = None) -> None:
    """What a bot of python-telegram-bot leaves behind."""
    bot = ExtBot("5:token")
    persistence = PicklePersistence(path, single_file=single_file, on_flush=True)
    persistence.set_bot(bot)
    user = telegram.User(7, "Ada", is_bot=False)
    message = telegram.Message(
        1, datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC), telegram.Chat(-100, "group"), from_user=user
    )
    message.set_bot(bot)
    await persistence.update_user_data(7, {"name": "Ada", 1: (2, 3), "last": message})
    await persistence.update_user_data(8, {})
    await persistence.update_chat_data(-100, {"kind": telegram.constants.ChatType.GROUP})
    if hostile is not None:
        await persistence.update_chat_data(-200, {"x": [{"y": hostile}]})
    await persistence.update_bot_data({"started": datetime.date(2026, 1, 2)})
    await persistence.update_callback_data(([("kb", 1.5, {"button": "x"})], {"query": "kb"}))
    await persistence.update_conversation("order", (-100, 7), "SIZE")
    await persistence.update_conversation("order", (-100, 8), 3)
    for state in ("SIZE", None):
        await persistence.update_conversation("order", (-100, 9), state)
    await persistence.flush()


@pytest.mark.ray
class TestTelegram:
    @pytest.mark.parametrize("single_file", [True, False])
    async def test_all_that_it_stores_arrives_where_the_adapter_looks(
        self, storage: AsyncStorage, target: str, tmp_path: Path, *, single_file: bool
    ) -> None:
        await pickled_by_ptb(tmp_path / "bot", single_file=single_file)
        report = await import_telegram_pickle(tmp_path / "bot", storage, target)
        bot = ExtBot("5:token")
        ours = RayPersistence(target, storage)
        ours.set_bot(bot)
        users = await ours.get_user_data()

        assert (report.written, report.skipped, report.refused) == (6, 1, [])
        assert users.keys() == {7}
        assert (users[7]["name"], users[7][1], users[7]["last"].from_user.first_name) == (
            "Ada",
            (2, 3),
            "Ada",
        )
        assert users[7]["last"].get_bot() is bot
        assert await ours.get_chat_data() == {-100: {"kind": telegram.constants.ChatType.GROUP}}
        assert await ours.get_bot_data() == {"started": datetime.date(2026, 1, 2)}
        assert await ours.get_callback_data() == ([("kb", 1.5, {"button": "x"})], {"query": "kb"})
        assert await ours.get_conversations("order") == {(-100, 7): "SIZE", (-100, 8): 3}

    async def test_hostile_data_is_refused_runs_nothing_and_leaves_the_rest(
        self, storage: AsyncStorage, target: str, tmp_path: Path
    ) -> None:
        await pickled_by_ptb(tmp_path / "bot", hostile=Hostile(tmp_path / "touched"))
        report = await import_telegram_pickle(tmp_path / "bot", storage, target)

        assert report.written == 6
        assert [each.source for each in report.refused] == ["('chat', -200)"]
        assert "system" in report.refused[0].reason
        assert not (tmp_path / "touched").exists()
        assert await storage.get_state(target, ("chat", -200)) is None


def hostile_pickles(touched: Path) -> dict[str, bytes]:
    """Pickles that reach for code in several ways; hand-written where a pickler would not write them."""
    command = f"touch {touched}".encode()
    return {
        "whole": b"cos\nsystem\n(S'" + command + b"'\ntR.",
        "eval": b"cbuiltins\neval\n(S'open(\"" + str(touched).encode() + b'", "w")\'\ntR.',
        "getattr": b"cbuiltins\ngetattr\n(cos\nS'system'\ntR(S'" + command + b"'\ntR.",
        "dotted": b"\x80\x04\x8c\x08datetime\x8c\x0csys.modules\x93.",
        "instance": b"(S'" + command + b"'\nios\nsystem\n.",
        "persistent": b"Pos.system\n.",
        "extension": b"\x82\x01.",
        "reconstruct": b"ctelegram.ext._picklepersistence\n_reconstruct_to\n(cos\nsystem\n(dtR.",
        "telegram's own": b"ctelegram.ext\nApplication\n(tR.",
        "a Bot": b"ctelegram\nBot\n(S'1:token'\ntR.",
        "of a module": b"ctelegram\nos.system\n(S'" + command + b"'\ntR.",
        "cut off": pickle.dumps({"user_data": {1: {}}})[:-5],
        "empty": b"",
    }


class TestHostile:
    @pytest.mark.parametrize("name", list(hostile_pickles(Path())))
    def test_no_pickle_runs_code(self, name: str, tmp_path: Path) -> None:
        touched, path = tmp_path / "touched", tmp_path / "bot"
        path.write_bytes(hostile_pickles(touched)[name])
        storage = AsyncStorage()  # never used: all of these are refused before
        with pytest.raises(InvalidData):
            asyncio.run(import_telegram_pickle(path, storage, "no-such-bot"))

        assert not touched.exists()

    def test_what_is_hostile_in_a_good_file_is_refused_by_itself(self, tmp_path: Path) -> None:
        touched, path = tmp_path / "touched", tmp_path / "bot"
        hostile: list[Any] = [
            Hostile(touched),
            os.system,
            {"nested": [({"deep": Hostile(touched)},)]},
            collections.defaultdict(os.getpid),
            collections.deque([Hostile(touched)]),
            {Hostile: 1},
        ]
        data = {number: {"x": value} for number, value in enumerate(hostile)}
        path.write_bytes(pickle.dumps({"user_data": data | {9: Hostile(touched)}}))
        report = asyncio.run(import_telegram_pickle(path, AsyncStorage(), "no-such-bot"))

        assert len(report.refused) == report.total == len(hostile) + 1
        assert not touched.exists()

    def test_the_test_can_fail(self, tmp_path: Path) -> None:
        touched = tmp_path / "touched"
        pickle.loads(hostile_pickles(touched)["whole"])

        assert touched.exists()
