"""Values that cannot be rebuilt where they are read: what fails, and what takes effect all the same."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any

import pytest

from fsm_ray import AsyncStorage, Storage
from fsm_ray.errors import ValueNotDecodable
from fsm_ray.testing import AnyStorage, Blocking
from tests.conftest import DEADLINE_S, Bots

pytestmark = pytest.mark.ray

KEY, OTHER = (1, 42), (1, 43)


class Size(Enum):
    SMALL = "small"


@pytest.fixture(params=[Storage, AsyncStorage])
def storage(request: pytest.FixtureRequest, cluster: object) -> Iterator[AnyStorage]:
    made = request.param(timeout_s=DEADLINE_S)
    if isinstance(made, Storage):
        with made:
            yield made
    else:
        blocking = Blocking(made)
        yield blocking
        blocking.stop()


@pytest.fixture
def bot(storage: AnyStorage, bots: Bots, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bot with one record, of whose values one has lost its class."""
    name = bots.emptied()
    storage.set_data(name, KEY, {"size": Size.SMALL, "n": 1})
    monkeypatch.delattr(sys.modules[__name__], "Size")
    return name


CHANGES: dict[str, Callable[[AnyStorage, str], Any]] = {
    "update_data": lambda storage, bot: storage.update_data(bot, KEY, {"n": 2}),
    "patch": lambda storage, bot: storage.patch(bot, KEY, increment={"n": 1}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_takes_effect_though_its_answer_cannot_be_shown(
    storage: AnyStorage, bot: str, change: str
) -> None:
    with pytest.raises(ValueNotDecodable, match="Size"):
        CHANGES[change](storage, bot)

    assert storage.patch(bot, KEY, unset=["size"]) == {"n": 2}


def test_a_read_says_so_and_leaves_the_record_as_it_is(storage: AnyStorage, bot: str) -> None:
    for read in (storage.get_state, storage.get_data):
        with pytest.raises(ValueNotDecodable, match="Size"):
            read(bot, KEY)

    assert storage.patch(bot, KEY, unset=["size"]) == {"n": 1}


def test_a_copy_changes_nothing(storage: AnyStorage, bot: str) -> None:
    with pytest.raises(ValueNotDecodable, match="Size"):
        storage.copy(bot, KEY, OTHER)

    assert storage.get_state(bot, OTHER) is None


@pytest.mark.parametrize("way", ["turn", "lock"])
def test_neither_turn_nor_lock_is_entered_and_the_conversation_is_free(
    storage: AnyStorage, bot: str, way: str
) -> None:
    with pytest.raises(ValueNotDecodable, match="Size"), getattr(storage, way)(bot, KEY):
        raise AssertionError("it was entered")
    storage.patch(bot, KEY, unset=["size"])

    with storage.turn(bot, KEY, timeout_s=DEADLINE_S) as turn:
        assert turn.data == {"n": 1}
