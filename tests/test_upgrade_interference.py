"""An upgrade while others init, drop or upgrade the same bot, or when an actor does not end by itself."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray

from fsm_ray import BotOptions, State, Storage, actor, upgrade
from fsm_ray.actor import (
    NamespaceActor,
    call,
    create_shard,
    find_actor,
    find_shard,
    first_noted_options,
    remove_unopened,
    version_of,
)
from fsm_ray.errors import (
    ConfigurationError,
    NamespaceUnavailable,
    OptionsConflict,
    StoreCorrupted,
    StoreMismatch,
)
from fsm_ray.notes import (
    Mark,
    Version,
    find_mark,
    note_options,
    noted_options,
    remove_mark,
    remove_notes,
    set_mark,
)
from tests.conftest import DEADLINE_S, Bots, RayCluster, eventually

pytestmark = [pytest.mark.ray, pytest.mark.slow]

KEYS = range(8)
KEY = (1, 42)

AtCreation = Callable[[Callable[[], object]], None]


@pytest.fixture
def storage(cluster: RayCluster) -> Iterator[Storage]:
    with Storage(timeout_s=DEADLINE_S) as storage:
        yield storage


@pytest.fixture
def at_creation(monkeypatch: pytest.MonkeyPatch) -> AtCreation:
    """Has something done, once, as an upgrade is about to make an actor and nobody has that one's name."""

    def have_done(act: Callable[[], object]) -> None:
        left = [act]

        def create_late(*arguments: Any, **options: Any) -> Any:
            if left:
                left.pop()()
            return create_shard(*arguments, **options)

        monkeypatch.setattr(upgrade, "create_shard", create_late)

    return have_done


def options_of(bot_name: str, shard: int) -> BotOptions:
    options: BotOptions = call(find_shard(bot_name, shard).options.remote(), bot_name, DEADLINE_S)
    return options


def actors_of(bot_name: str) -> list[str]:
    return [name for name in actor._actor_names() if name.startswith(f"{bot_name}/")]


def interrupt(storage: Storage, bot_name: str, at_creation: AtCreation) -> None:
    """Interrupt an upgrade of a bot with one shard, so that none is left."""

    def press_ctrl_c() -> None:
        raise KeyboardInterrupt

    at_creation(press_ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        storage.upgrade(bot_name, force=True)
    eventually(lambda: find_actor(bot_name, 0) is None, "the old actor is gone")


# Others call init


def test_after_an_interrupted_upgrade_an_init_with_other_options_is_refused_and_makes_nothing(
    storage: Storage, bots: Bots, at_creation: AtCreation, tmp_path: Path
) -> None:
    bot_name = bots.emptied(store="rocksdb")
    storage.set_state(bot_name, KEY, State(state="a"))
    options = storage.describe(bot_name).options

    interrupt(storage, bot_name, at_creation)
    with pytest.raises(OptionsConflict, match="store is"):
        storage.init(bot_name, options, store=f"rocksdb://{tmp_path}")
    assert find_actor(bot_name, 0) is None

    storage.init(bot_name, options)
    assert storage.get_state(bot_name, KEY) == State(state="a")
    assert storage.upgrade(bot_name) == []
    assert find_mark(bot_name) is None


def test_an_init_with_other_options_during_an_upgrade_is_refused(
    storage: Storage, bots: Bots, at_creation: AtCreation, tmp_path: Path
) -> None:
    bot_name = bots.emptied(store="rocksdb")
    storage.set_state(bot_name, KEY, State(state="a"))

    def init() -> None:
        with Storage(timeout_s=DEADLINE_S) as other, pytest.raises(OptionsConflict):
            other.init(bot_name, store=f"rocksdb://{tmp_path}")

    at_creation(init)
    storage.upgrade(bot_name, force=True)

    assert storage.get_state(bot_name, KEY) == State(state="a")


def test_an_init_that_an_upgrade_with_other_options_overtakes_is_refused(
    storage: Storage, bot_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def create_late(*arguments: Any, **options: Any) -> Any:
        set_mark(bot_name, Mark(BotOptions(shards=2), Version()))
        return create_shard(*arguments, **options)

    monkeypatch.setattr(actor, "create_shard", create_late)

    with pytest.raises(OptionsConflict, match="shards is 2, not 1"):
        storage.init(bot_name)


@pytest.mark.parametrize("is_interrupted", [False, True])
def test_an_actor_that_others_make_meanwhile_with_other_options_is_replaced_too(
    storage: Storage, bots: Bots, at_creation: AtCreation, tmp_path: Path, *, is_interrupted: bool
) -> None:
    """As by a worker of a version whose `init` does not know that there is an upgrade."""
    bot_name = bots.emptied(store="rocksdb")
    storage.set_state(bot_name, KEY, State(state="a"))
    options = storage.describe(bot_name).options
    others = options.model_copy(update={"store": f"rocksdb://{tmp_path}"})

    if is_interrupted:
        interrupt(storage, bot_name, at_creation)
        create_shard(bot_name, 0, others)
    else:
        at_creation(lambda: ray.get(create_shard(bot_name, 0, others).options.remote()))
    storage.upgrade(bot_name, force=not is_interrupted)

    assert options_of(bot_name, 0) == options
    assert storage.get_state(bot_name, KEY) == State(state="a")


def test_a_shard_with_other_options_than_the_first_one_is_told_of_and_replaced_by_an_upgrade(
    storage: Storage, bot_name: str, tmp_path: Path
) -> None:
    create_shard(bot_name, 1, BotOptions(shards=2, store=f"rocksdb://{tmp_path}"))

    with pytest.raises(OptionsConflict, match=r"shard 1 of .* Upgrade the bot, which replaces that shard"):
        storage.init(bot_name, shards=2)
    (replaced,) = storage.upgrade(bot_name, allow_loss=True)
    storage.init(bot_name, shards=2)

    assert replaced.shard == 1
    assert options_of(bot_name, 1) == BotOptions(shards=2)


def test_an_init_whose_shard_cannot_be_opened_ends_no_actor_while_there_is_an_upgrade(
    storage: Storage, bots: Bots
) -> None:
    bot_name = bots.emptied()
    options = storage.describe(bot_name).options
    # The second shard was replaced just now, and did not open its store.
    never_opened = options.model_copy(update={"shards": 2})
    unopened = create_shard(bot_name, 1, never_opened)
    set_mark(bot_name, Mark(options, Version()))
    try:
        remove_unopened(bot_name, never_opened, ConfigurationError("an extra is missing"), DEADLINE_S)
        assert find_actor(bot_name, 0) is not None
    finally:
        remove_mark(bot_name)
        ray.kill(unopened, no_restart=True)


# Others drop the bot


def test_an_upgrade_ends_what_it_made_after_a_drop_had_looked_for_actors(
    storage: Storage, bot_name: str, at_creation: AtCreation, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.init(bot_name, shards=2)
    has_looked, may_end = threading.Event(), threading.Event()

    def remove_late(bot_name: str) -> None:
        has_looked.set()
        may_end.wait(DEADLINE_S)
        remove_notes(bot_name)

    monkeypatch.setattr(actor, "remove_notes", remove_late)
    with ThreadPoolExecutor(1) as pool:
        dropping: list[Future[None]] = []

        def drop() -> None:
            dropping.append(pool.submit(storage.drop, bot_name))
            has_looked.wait(DEADLINE_S)

        at_creation(drop)
        with pytest.raises(NamespaceUnavailable, match="was dropped"):
            storage.upgrade(bot_name, force=True, allow_loss=True)
        may_end.set()
        dropping[0].result(DEADLINE_S)

    eventually(lambda: not actors_of(bot_name), "there is no actor of the bot")
    storage.init(bot_name, shards=3)
    assert [options_of(bot_name, shard).shards for shard in range(3)] == [3, 3, 3]


def test_a_drop_while_an_upgrade_runs_ends_the_bot_and_the_upgrade(storage: Storage, bot_name: str) -> None:
    storage.init(bot_name, shards=2)
    with ThreadPoolExecutor(1) as pool:
        upgrading = pool.submit(storage.upgrade, bot_name, force=True, allow_loss=True)
        eventually(lambda: find_mark(bot_name) is not None, "the upgrade has begun")
        storage.drop(bot_name)
        with pytest.raises(NamespaceUnavailable, match="was dropped"):
            upgrading.result(DEADLINE_S)

    eventually(lambda: not actors_of(bot_name), "there is no actor of the bot")
    assert find_mark(bot_name) is None


def test_a_drop_passes_over_an_actor_that_an_upgrade_has_just_ended(
    storage: Storage, bot_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.init(bot_name)
    listed = [[f"{bot_name}/0", f"{bot_name}/1"], []]
    monkeypatch.setattr(actor, "_actor_names", lambda: listed.pop(0))

    storage.drop(bot_name)

    eventually(lambda: find_actor(bot_name, 0) is None, "the actor is gone")


# Others upgrade it


def test_of_two_upgrades_at_once_one_is_told_of_the_other_and_nothing_is_lost(
    storage: Storage, bots: Bots
) -> None:
    bot_name = bots.emptied(store="rocksdb", shards=2)
    for key in KEYS:
        storage.set_data(bot_name, key, {"n": key})

    def try_to_upgrade(_: int) -> str:
        try:
            storage.upgrade(bot_name, force=True)
        except NamespaceUnavailable as error:
            return str(error)
        return "done"

    with ThreadPoolExecutor(2) as pool:
        told = sorted(pool.map(try_to_upgrade, range(2)))

    assert "somebody else began to upgrade it" in told[0]
    assert told[1] == "done"
    assert find_mark(bot_name) is None
    assert [storage.get_data(bot_name, key) for key in KEYS] == [{"n": key} for key in KEYS]


def test_a_new_actor_that_somebody_else_is_replacing_is_waited_for(
    storage: Storage, bots: Bots, monkeypatch: pytest.MonkeyPatch
) -> None:
    bot_name = bots.emptied()
    of_new_actor = [None]

    def version_while_it_stops(actor: Any, *more: Any) -> Version | None:
        is_new = actor != old_actor
        return of_new_actor.pop() if is_new and of_new_actor else version_of(actor, *more)

    old_actor = find_actor(bot_name, 0)
    monkeypatch.setattr(upgrade, "version_of", version_while_it_stops)
    (replaced,) = storage.upgrade(bot_name, force=True, allow_loss=True)

    assert replaced.new_version == Version().fsm_ray
    assert not of_new_actor


# Actors that do not end


ERRORS = [StoreCorrupted("of ann"), StoreMismatch("of ann"), OSError("of ann")]


@pytest.fixture
def unstoppable(storage: Storage, bot_name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bot whose actors fail when they are told to stop, each in its own way."""

    class Unstoppable(NamespaceActor):
        async def stop(self) -> None:
            raise ERRORS[self._host._shard]

    with monkeypatch.context() as patched:
        patched.setattr(actor, "NamespaceActor", Unstoppable)
        storage.init(bot_name, shards=len(ERRORS))
    return bot_name


def test_actors_that_fail_as_they_stop_are_replaced(
    storage: Storage, unstoppable: str, caplog: pytest.LogCaptureFixture
) -> None:
    replaced = storage.upgrade(unstoppable, force=True, allow_loss=True)

    assert [each.shard for each in replaced] == [2, 1, 0]
    storage.set_state(unstoppable, KEY, State(state="a"))
    lines = [line for line in caplog.messages if "did not stop by itself" in line]
    assert [line.rpartition(": ")[2] for line in lines] == [
        "RayTaskError(OSError)",
        "StoreMismatch",
        "StoreCorrupted",
    ]
    assert "ann" not in caplog.text


def test_actors_that_fail_as_they_stop_are_dropped(storage: Storage, unstoppable: str) -> None:
    storage.drop(unstoppable)

    assert not actors_of(unstoppable)


def test_a_first_shard_that_hangs_is_replaced(
    storage: Storage, bot_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.init(bot_name, ttl_s=60)
    pid = storage.describe(bot_name).shards[0].pid
    monkeypatch.setattr(upgrade, "_ANSWER_TIMEOUT_S", 1.0)
    monkeypatch.setattr(upgrade, "_STOP_TIMEOUT_S", 1.0)
    os.kill(pid, signal.SIGSTOP)
    try:
        (replaced,) = storage.upgrade(bot_name, allow_loss=True)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)

    assert replaced.old_version is None
    assert options_of(bot_name, 0) == BotOptions(ttl_s=60)
    assert storage.describe(bot_name).shards[0].pid != pid


def test_options_are_noted_until_the_bot_is_dropped_and_are_those_of_the_actor_that_noted_them(
    storage: Storage, bot_name: str
) -> None:
    storage.init(bot_name, ttl_s=60)
    assert first_noted_options(bot_name) == BotOptions(ttl_s=60)

    note_options(bot_name, "of an actor that was before", BotOptions())
    assert first_noted_options(bot_name) is None

    storage.drop(bot_name)
    assert noted_options(bot_name, "of an actor that was before") is None
