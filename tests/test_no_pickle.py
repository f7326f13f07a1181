"""`allow_pickle=False` at every door: nothing pickled goes in, and nothing pickled that is there is decoded.

Someone else, who has a channel to the bot but does not keep to its options, writes what runs code when it is
unpickled.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiogram.fsm.storage.base import StorageKey

from fsm_ray import AsyncStorage, Flow, State, Storage
from fsm_ray.adapters.aiogram import RayStorage
from fsm_ray.errors import PickleNotAllowed, UnknownBot
from fsm_ray.storage import Transport
from fsm_ray.transfer import export, import_
from fsm_ray.transfer.typed_json import data_to_json
from tests.conftest import DEADLINE_S, RayCluster

pytestmark = pytest.mark.ray

BOT = "no-pickle"
KEY, OTHER = (1, 2), (3, 4)


class Registration(Flow):
    name = "registration"
    default_state = "get_name"
    transitions = {"get_name": ["done"], "done": []}  # noqa: RUF012  # as the README declares one


class Trap:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.fixture
def trap(tmp_path: Path) -> Iterator[Trap]:
    trap = Trap(tmp_path / "sprung")
    yield trap
    assert not trap.path.exists(), "it was unpickled"


@pytest.fixture(scope="module", params=["auto", "ray"])
def storage(cluster: RayCluster, request: pytest.FixtureRequest) -> Iterator[Storage]:
    with Storage(timeout_s=DEADLINE_S, transport=request.param) as storage:
        storage.init(BOT, allow_pickle=False)
        yield storage
        storage.drop(BOT)


@pytest.fixture
def plain(storage: Storage) -> Storage:
    """The storage; the bot has one record, with plain values."""
    for key in (KEY, OTHER):
        storage.clear(BOT, key)
    storage.set_state(BOT, KEY, State(state="plain", data={"list": [1]}))
    return storage


@pytest.fixture
def trapped(plain: Storage, trap: Trap) -> Storage:
    """The storage; someone else put a pickled value into the record."""
    with Storage(timeout_s=DEADLINE_S) as other:
        other._bot(BOT).route._allow_pickle = True
        other.set_state(BOT, KEY, State(flow="f", state="trapped", data={"trap": trap, "n": 1}))
    return plain


def in_transaction(storage: Storage, write: Callable[[Any], Any]) -> None:
    with storage.transaction(BOT) as transaction:
        write(transaction)


def in_turn(storage: Storage, use: Callable[[Any], Any]) -> None:
    storage.register_flows(BOT, Registration)
    with storage.turn(BOT, KEY) as turn:
        use(turn)


def start_flow(turn: Any, trap: Trap) -> None:
    turn.start_flow(Registration)
    turn.data["x"] = trap


WAYS_IN: dict[str, Callable[[Storage, Trap], Any]] = {
    "set_state": lambda s, trap: s.set_state(BOT, KEY, State(data={"x": trap})),
    "set_state, nested": lambda s, trap: s.set_state(BOT, KEY, State(data={"x": [{"y": (trap,)}]})),
    "set_data": lambda s, trap: s.set_data(BOT, KEY, {"x": trap}),
    "update_data": lambda s, trap: s.update_data(BOT, KEY, {"x": trap}),
    "patch, set": lambda s, trap: s.patch(BOT, KEY, set={"x": trap}),
    "patch, append": lambda s, trap: s.patch(BOT, KEY, append={"list": trap}),
    "set_many": lambda s, trap: s.set_many(BOT, {OTHER: State(), KEY: State(data={"x": trap})}),
    "turn": lambda s, trap: in_turn(s, lambda turn: turn.data.update(x=trap)),
    "turn, in a flow": lambda s, trap: in_turn(s, lambda turn: start_flow(turn, trap)),
    "transaction, set_state": lambda s, trap: in_transaction(
        s, lambda t: t.set_state(KEY, State(data={"x": trap}))
    ),
    "transaction, set_data": lambda s, trap: in_transaction(s, lambda t: t.set_data(KEY, {"x": trap})),
    "transaction, update_data": lambda s, trap: in_transaction(s, lambda t: t.update_data(KEY, {"x": trap})),
    "transaction, patch": lambda s, trap: in_transaction(s, lambda t: t.patch(KEY, append={"list": trap})),
}


@pytest.mark.parametrize("door", WAYS_IN)
def test_nothing_pickled_goes_in_by(door: str, plain: Storage, trap: Trap) -> None:
    before = plain.get_state(BOT, KEY)

    with pytest.raises(PickleNotAllowed):
        WAYS_IN[door](plain, trap)

    after = plain.get_state(BOT, KEY)
    assert after == before
    assert after is not None
    assert before is not None
    assert after.version == before.version
    assert plain.get_state(BOT, OTHER) is None


@pytest.mark.parametrize("transport", ["auto", "ray"])
def test_nothing_pickled_goes_in_by_a_storage_that_knows_the_bot_from_when_it_was_allowed(
    cluster: RayCluster, bot_name: str, trap: Trap, transport: Transport
) -> None:
    with Storage(timeout_s=DEADLINE_S) as admin, Storage(timeout_s=DEADLINE_S, transport=transport) as old:
        admin.init(bot_name)
        old.set_data(bot_name, KEY, {"n": 1})
        admin.drop(bot_name)
        admin.init(bot_name, allow_pickle=False)

        with pytest.raises(UnknownBot, match="call again"):
            old.set_data(bot_name, KEY, {"x": trap})
        with pytest.raises(PickleNotAllowed):
            old.set_data(bot_name, KEY, {"x": trap})

        assert admin.get_data(bot_name, KEY) is None


WAYS_OUT: dict[str, Callable[[Storage], Any]] = {
    "get_state": lambda s: s.get_state(BOT, KEY),
    "get_data": lambda s: s.get_data(BOT, KEY),
    "get_many": lambda s: s.get_many(BOT, [OTHER, KEY]),
    "scan": lambda s: list(s.scan(BOT)),
    "turn": lambda s: in_turn(s, lambda _: None),
    "update_data": lambda s: s.update_data(BOT, KEY, {"n": 2}),
    "patch": lambda s: s.patch(BOT, KEY, increment={"n": 1}),
    "copy": lambda s: s.copy(BOT, KEY, OTHER),
    "rename": lambda s: s.rename(BOT, KEY, OTHER),
}


@pytest.mark.parametrize("door", WAYS_OUT)
def test_nothing_pickled_is_decoded_by(door: str, trapped: Storage) -> None:
    with pytest.raises(PickleNotAllowed):
        WAYS_OUT[door](trapped)

    assert trapped.get_state(BOT, OTHER) is None


def test_a_change_beside_a_pickled_value_takes_effect_though_it_cannot_be_shown(trapped: Storage) -> None:
    with pytest.raises(PickleNotAllowed):
        trapped.update_data(BOT, KEY, {"n": 2})
    with pytest.raises(PickleNotAllowed):
        trapped.patch(BOT, KEY, increment={"n": 1})

    assert trapped.patch(BOT, KEY, unset=["trap"]) == {"n": 3}


def test_a_pickled_value_can_be_replaced_and_cleared(trapped: Storage) -> None:
    trapped.set_data(BOT, KEY, {"n": 3})
    assert trapped.get_state(BOT, KEY) == State(flow="f", state="trapped", data={"n": 3})

    assert trapped.clear(BOT, KEY)


def test_a_scan_goes_on_behind_a_pickled_value(trapped: Storage) -> None:
    for key in range(20):
        trapped.set_state(BOT, key, State(state="fine"))
    try:
        found, after = set(), None
        for _ in range(2):
            try:
                for each in trapped.scan(BOT, after=after):
                    found.add(each.key)
            except PickleNotAllowed as error:
                after = error.key

        assert found == set(range(20))
    finally:
        for key in range(20):
            trapped.clear(BOT, key)


async def test_a_watch_decodes_nothing_pickled_and_goes_on_behind_it(plain: Storage, trap: Trap) -> None:
    async with AsyncStorage(timeout_s=DEADLINE_S) as watcher, AsyncStorage(timeout_s=DEADLINE_S) as other:
        (await other._bot(BOT)).route._allow_pickle = True
        since = await watcher.position(BOT)
        await other.set_data(BOT, KEY, {"x": trap})
        await other.set_data(BOT, KEY, {"x": "plain again"})

        with pytest.raises(PickleNotAllowed) as caught:
            await anext(watcher.watch(BOT, since=since))

        assert caught.value.key == KEY
        change = await asyncio.wait_for(anext(watcher.watch(BOT, since=caught.value.position)), DEADLINE_S)
        assert change.state is not None
        assert change.state.data == {"x": "plain again"}


async def exported(bot_name: str) -> tuple[io.BytesIO, list[str]]:
    file = io.BytesIO()
    async with AsyncStorage(timeout_s=DEADLINE_S) as storage:
        report = await export(storage, bot_name, file)
    file.seek(0)
    return file, [each.source for each in report.refused]


async def test_an_export_leaves_out_what_is_pickled_and_names_it(trapped: Storage) -> None:
    trapped.set_state(BOT, OTHER, State(data={"n": 1}))

    file, refused = await exported(BOT)

    assert refused == [repr(KEY)]
    assert b"trapped" not in file.getvalue()
    assert b'"n":1' in file.getvalue()


@pytest.mark.parametrize("allow_pickle", [False, True])
async def test_an_import_decodes_nothing_pickled_whatever_its_caller_allows(
    plain: Storage, trap: Trap, *, allow_pickle: bool
) -> None:
    plain.set_state(BOT, OTHER, State(data={"x": "HERE"}))
    file, _ = await exported(BOT)
    pickled = msgspec.json.encode(data_to_json({"x": trap})["x"])
    whole = file.getvalue().replace(b'"HERE"', pickled)
    plain.clear(BOT, OTHER)

    async with AsyncStorage(timeout_s=DEADLINE_S) as storage:
        report = await import_(storage, BOT, io.BytesIO(whole), allow_pickle=allow_pickle)

    assert [each.reason.partition(":")[0] for each in report.refused] == ["it holds a pickled value"]
    assert plain.get_state(BOT, OTHER) is None


async def test_aiograms_doors_let_nothing_pickled_in(plain: Storage, trap: Trap) -> None:
    async with AsyncStorage(timeout_s=DEADLINE_S) as storage:
        fsm = RayStorage(BOT, storage)
        key = StorageKey(bot_id=1, chat_id=2, user_id=3)
        for write in (fsm.set_data, fsm.update_data):
            with pytest.raises(PickleNotAllowed):
                await write(key, {"x": trap})
        assert await fsm.get_data(key) == {}
