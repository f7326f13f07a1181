"""RayStorage keeps aiogram's contract, and what aiogram's own storages do not promise: nothing is lost."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable
from typing import Any

import pytest
from aiogram.exceptions import DataNotDictLikeError
from aiogram.fsm.context import FSMContext
from aiogram.fsm.state import State as StateOfGroup
from aiogram.fsm.state import StatesGroup
from aiogram.fsm.storage.base import BaseStorage, StorageKey

from fsm_ray import AsyncStorage, State
from fsm_ray.adapters.aiogram import RayStorage, record_key
from fsm_ray.errors import StorageClosed

KEY = StorageKey(bot_id=1, chat_id=-42, user_id=42)
RECORD_KEY = record_key(KEY)


class Order(StatesGroup):
    size = StateOfGroup()


class RacedStorage(AsyncStorage):
    """Lets a rival write after the next read, before whoever read can write."""

    rival: Callable[[], Awaitable[Any]] | None = None

    async def get_state(self, bot_name: str, key: Hashable) -> State | None:
        record = await super().get_state(bot_name, key)
        rival, self.rival = self.rival, None
        if rival is not None:
            await rival()
        return record


@pytest.fixture
async def storage(bot_name: str) -> AsyncIterator[RacedStorage]:
    async with RacedStorage() as storage:
        await storage.init(bot_name)
        yield storage


@pytest.fixture
def ray_storage(storage: RacedStorage, bot_name: str) -> RayStorage:
    return RayStorage(bot_name, storage)


@pytest.mark.ray
class TestContract:
    async def test_a_missing_conversation_has_no_state_and_empty_data(self, ray_storage: RayStorage) -> None:
        assert await ray_storage.get_state(key=KEY) is None
        assert await ray_storage.get_data(key=KEY) == {}
        assert await ray_storage.get_value(storage_key=KEY, dict_key="foo") is None
        assert await ray_storage.get_value(storage_key=KEY, dict_key="foo", default="baz") == "baz"

    async def test_a_state_that_was_set_is_read_until_it_is_set_to_none(
        self, ray_storage: RayStorage
    ) -> None:
        await ray_storage.set_state(key=KEY, state="state")
        was = await ray_storage.get_state(key=KEY)
        await ray_storage.set_state(key=KEY, state=None)

        assert was == "state"
        assert await ray_storage.get_state(key=KEY) is None

    async def test_a_state_of_a_group_is_stored_by_its_full_name(self, ray_storage: RayStorage) -> None:
        await ray_storage.set_state(key=KEY, state=Order.size)

        assert await ray_storage.get_state(key=KEY) == "Order:size"

    async def test_data_that_was_set_is_read_until_it_is_replaced(self, ray_storage: RayStorage) -> None:
        await ray_storage.set_data(key=KEY, data={"foo": "bar"})
        was = await ray_storage.get_data(key=KEY)
        await ray_storage.set_data(key=KEY, data={"spam": "egg"})

        assert was == {"foo": "bar"}
        assert await ray_storage.get_data(key=KEY) == {"spam": "egg"}
        assert await ray_storage.get_value(storage_key=KEY, dict_key="spam", default="baz") == "egg"

    async def test_update_data_merges_and_returns_what_is_stored(self, ray_storage: RayStorage) -> None:
        answers = [
            await ray_storage.update_data(key=KEY, data=changes)
            for changes in ({}, {"foo": "bar"}, {}, {"baz": "spam"}, {"baz": "test"})
        ]

        assert answers == [
            {},
            {"foo": "bar"},
            {"foo": "bar"},
            {"foo": "bar", "baz": "spam"},
            {"foo": "bar", "baz": "test"},
        ]
        assert await ray_storage.get_data(key=KEY) == answers[-1]

    @pytest.mark.parametrize("data", [(), [("foo", "bar")], "foo", None, 1])
    async def test_data_that_is_no_mapping_is_refused(self, ray_storage: RayStorage, data: Any) -> None:
        for write in (ray_storage.set_data, ray_storage.update_data):
            with pytest.raises(DataNotDictLikeError, match=type(data).__name__):
                await write(key=KEY, data=data)

    async def test_state_and_data_do_not_affect_each_other(self, ray_storage: RayStorage) -> None:
        await ray_storage.set_data(key=KEY, data={"foo": "bar"})
        await ray_storage.set_state(key=KEY, state="state")
        both = await ray_storage.get_state(key=KEY), await ray_storage.get_data(key=KEY)
        await ray_storage.set_data(key=KEY, data={})
        without_data = await ray_storage.get_state(key=KEY), await ray_storage.get_data(key=KEY)
        await ray_storage.update_data(key=KEY, data={"spam": "egg"})
        await ray_storage.set_state(key=KEY, state=None)
        without_state = await ray_storage.get_state(key=KEY), await ray_storage.get_data(key=KEY)

        assert both == ("state", {"foo": "bar"})
        assert without_data == ("state", {})
        assert without_state == (None, {"spam": "egg"})

    async def test_conversations_that_differ_in_any_part_of_the_key_are_apart(
        self, ray_storage: RayStorage
    ) -> None:
        others: dict[str, Any] = {
            "bot_id": 2,
            "chat_id": -43,
            "user_id": 43,
            "thread_id": 5,
            "business_connection_id": "b",
            "destiny": "other",
        }
        keys = [KEY, *(dataclasses.replace(KEY, **{name: value}) for name, value in others.items())]
        for number, key in enumerate(keys):
            await ray_storage.set_state(key=key, state=f"state {number}")

        assert [await ray_storage.get_state(key=key) for key in keys] == [
            f"state {number}" for number in range(len(keys))
        ]
        assert others.keys() == {field.name for field in dataclasses.fields(StorageKey)}

    async def test_close_leaves_the_conversations(self, storage: AsyncStorage, bot_name: str) -> None:
        first = RayStorage(bot_name)
        await first.set_state(key=KEY, state="state")
        await first.close()

        with pytest.raises(StorageClosed):
            await first.get_state(key=KEY)
        assert await RayStorage(bot_name, storage).get_state(key=KEY) == "state"

    async def test_close_leaves_open_a_storage_that_was_given(
        self, ray_storage: RayStorage, storage: AsyncStorage, bot_name: str
    ) -> None:
        await ray_storage.close()

        assert await storage.get_state(bot_name, RECORD_KEY) is None


@pytest.mark.ray
class TestRecords:
    async def test_state_and_data_are_one_record_that_other_clients_read(
        self, ray_storage: RayStorage, storage: AsyncStorage, bot_name: str
    ) -> None:
        await ray_storage.set_state(key=KEY, state="state")
        await ray_storage.update_data(key=KEY, data={"foo": "bar"})

        assert await storage.get_state(bot_name, (1, -42, 42, None, None, "default")) == State(
            state="state", data={"foo": "bar"}
        )

    async def test_reads_and_empty_writes_leave_no_record(
        self, ray_storage: RayStorage, storage: AsyncStorage, bot_name: str
    ) -> None:
        await ray_storage.get_state(key=KEY)
        await ray_storage.get_data(key=KEY)
        await ray_storage.update_data(key=KEY, data={})
        await ray_storage.set_data(key=KEY, data={})
        await ray_storage.set_state(key=KEY, state=None)

        assert await storage.get_state(bot_name, RECORD_KEY) is None

    async def test_a_cleared_context_leaves_no_record(
        self, ray_storage: RayStorage, storage: AsyncStorage, bot_name: str
    ) -> None:
        context = FSMContext(ray_storage, KEY)
        await context.set_state(Order.size)
        await context.update_data(foo="bar")
        await context.clear()

        assert await storage.get_state(bot_name, RECORD_KEY) is None

    async def test_taking_away_the_data_first_leaves_no_record_either(
        self, ray_storage: RayStorage, storage: AsyncStorage, bot_name: str
    ) -> None:
        await ray_storage.set_state(key=KEY, state="state")
        await ray_storage.update_data(key=KEY, data={"foo": "bar"})
        await ray_storage.set_data(key=KEY, data={})
        await ray_storage.set_state(key=KEY, state=None)

        assert await storage.get_state(bot_name, RECORD_KEY) is None


@pytest.mark.ray
class TestConcurrency:
    async def test_concurrent_updates_lose_nothing(self, ray_storage: RayStorage, bot_name: str) -> None:
        other = RayStorage(bot_name)
        await asyncio.gather(
            *(
                each.update_data(key=KEY, data={f"{name} {number}": number})
                for number in range(100)
                for name, each in (("this", ray_storage), ("other", other))
            )
        )
        data = await ray_storage.get_data(key=KEY)
        await other.close()

        assert len(data) == 200

    async def test_concurrent_states_and_updates_lose_no_update(
        self, ray_storage: RayStorage, bot_name: str
    ) -> None:
        other = RayStorage(bot_name)
        await asyncio.gather(
            *(ray_storage.set_state(key=KEY, state=f"state {number}") for number in range(30)),
            *(other.update_data(key=KEY, data={str(number): number}) for number in range(30)),
        )
        data = await ray_storage.get_data(key=KEY)
        await other.close()

        assert data == {str(number): number for number in range(30)}

    async def test_data_written_while_the_state_is_taken_away_survives(
        self, ray_storage: RayStorage, storage: RacedStorage, bot_name: str
    ) -> None:
        await ray_storage.set_state(key=KEY, state="state")
        storage.rival = lambda: storage.update_data(bot_name, RECORD_KEY, {"foo": "bar"})
        await ray_storage.set_state(key=KEY, state=None)

        assert await storage.get_state(bot_name, RECORD_KEY) == State(data={"foo": "bar"})

    async def test_a_state_set_while_the_data_is_emptied_survives(
        self, ray_storage: RayStorage, storage: RacedStorage, bot_name: str
    ) -> None:
        await ray_storage.set_data(key=KEY, data={"foo": "bar"})
        storage.rival = lambda: storage.set_state(bot_name, RECORD_KEY, State(state="state"))
        await ray_storage.set_data(key=KEY, data={})

        assert await storage.get_state(bot_name, RECORD_KEY) == State(state="state")

    async def test_data_written_while_the_first_state_is_set_survives(
        self, ray_storage: RayStorage, storage: RacedStorage, bot_name: str
    ) -> None:
        storage.rival = lambda: storage.update_data(bot_name, RECORD_KEY, {"foo": "bar"})
        await ray_storage.set_state(key=KEY, state="state")

        assert await storage.get_state(bot_name, RECORD_KEY) == State(state="state", data={"foo": "bar"})

    async def test_a_record_cleared_while_the_state_is_set_does_not_come_back(
        self, ray_storage: RayStorage, storage: RacedStorage, bot_name: str
    ) -> None:
        await ray_storage.set_data(key=KEY, data={"foo": "bar"})
        storage.rival = lambda: storage.clear(bot_name, RECORD_KEY)
        await ray_storage.set_state(key=KEY, state="state")

        assert await storage.get_state(bot_name, RECORD_KEY) == State(state="state")


class TestWithoutRay:
    @pytest.mark.parametrize(
        "method", ["set_state", "get_state", "set_data", "get_data", "get_value", "update_data", "close"]
    )
    def test_parameters_have_the_names_that_aiogram_calls_them_by(self, method: str) -> None:
        ours, theirs = (
            inspect.signature(getattr(storage, method)).parameters for storage in (RayStorage, BaseStorage)
        )

        assert list(ours) == list(theirs)
        assert [each.default for each in ours.values()] == [each.default for each in theirs.values()]

    def test_importing_fsm_ray_imports_no_framework(self) -> None:
        code = "import fsm_ray, fsm_ray.cli, sys; print({'aiogram', 'telegram', 'telebot'} & {*sys.modules})"

        assert run_python(code) == "set()"

    def test_without_aiogram_the_error_names_the_extra(self) -> None:
        code = """
import sys
sys.modules["aiogram"] = None
from fsm_ray.errors import MissingExtra
try:
    import fsm_ray.adapters.aiogram
except MissingExtra as error:
    print(error)
"""

        assert run_python(code).endswith("pip install 'fsm-ray[aiogram]'")


def run_python(code: str) -> str:
    """What the code prints in a process of its own."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return result.stdout.strip()
