"""Copying: what becomes of both conversations when others write, or a shard is lost, in between."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Hashable
from functools import partial
from typing import Any

import pytest

from fsm_ray import protocol
from fsm_ray.errors import NamespaceUnavailable, OutcomeUnknown, VersionConflict
from fsm_ray.namespace import Namespace
from fsm_ray.options import BotOptions
from fsm_ray.protocol import READ_RECORD, RecordView
from fsm_ray.record import NEVER_MS
from fsm_ray.routing.copying import copy, rename
from fsm_ray.routing.route import Addressed, Route
from fsm_ray.state import State
from fsm_ray.stores.base import Contents
from fsm_ray.stores.memory import MemoryStore

OLD = "old"
NEAR = "close"
"""A key on the shard of OLD."""
FAR = "distant"
"""One on the other."""

NEW_KEYS = pytest.mark.parametrize("new_key", [NEAR, FAR])


class LocalBot:
    """A bot whose two shards are in this process; what is to happen before each write can be planned."""

    def __init__(self, **options: Any) -> None:
        self.route = Route("my_bot", BotOptions(shards=2, **options))
        self.before_write: defaultdict[int, Callable[[], None]] = defaultdict(lambda: lambda: None)
        self.writes = 0
        self._number = 0
        self._shards = [
            Namespace("my_bot", self.route.options, MemoryStore(), Contents(version=version))
            for version in (100, 200)
        ]

    async def read_record(self, key: Hashable) -> RecordView | None:
        return self.read(key)

    async def write(self, addressed: Addressed) -> Any:
        self.writes += 1
        self.before_write[self.writes]()
        return self.do(addressed)

    def read(self, key: Hashable) -> RecordView | None:
        shard, operation = self.route.read(key)
        record: RecordView | None = self._ask(shard, protocol.read_request(READ_RECORD, 1, (operation,)))
        return record

    def do(self, addressed: Addressed) -> Any:
        """What others write."""
        shard, operation = addressed
        self._number += 1
        return self._ask(
            shard, protocol.write_request(self._number, (operation,), b"s" * 16, is_resend=False)
        )

    def put(self, key: Hashable, state: str, ttl_s: float | None = None) -> Any:
        return self.do(self.route.set_record(key, State(state=state), None, ttl_s))

    def clear(self, key: Hashable) -> None:
        self.do(self.route.clear(key, None))

    def state_of(self, key: Hashable) -> str | None:
        record = self.read(key)
        return None if record is None else record.state

    def _ask(self, shard: int, request: bytes) -> Any:
        answers: list[bytes] = []
        reply = self._shards[shard].handle(request[4:], answers.append) or answers[0]
        _, _, (result,) = self.route.decoder.decode(reply[4:])
        if isinstance(result, dict):
            raise protocol.error_of(result)
        return result


def lose_the_shard() -> None:
    raise NamespaceUnavailable("the shard is lost", timeout_s=1.0)


@pytest.fixture
def bot() -> LocalBot:
    """A bot with a record under OLD."""
    bot = LocalBot()
    bot.put(OLD, "first")
    return bot


async def test_one_key_is_on_the_shard_of_the_old_one_and_one_is_not(bot: LocalBot) -> None:
    shard, near, far = (bot.route.read(key)[0] for key in (OLD, NEAR, FAR))

    assert near == shard != far


@NEW_KEYS
@pytest.mark.parametrize("overwrite", [False, True])
async def test_what_is_renamed_is_what_was_written_last(
    bot: LocalBot,
    new_key: str,
    overwrite: bool,  # noqa: FBT001
) -> None:
    last_write = 1 if new_key == NEAR else 2
    bot.before_write[last_write] = lambda: bot.put(OLD, "second")

    assert await rename(bot, OLD, new_key, overwrite=overwrite, timeout_s=10) is True

    assert (bot.state_of(OLD), bot.state_of(new_key)) == (None, "second")


@NEW_KEYS
async def test_a_record_that_is_cleared_while_it_is_renamed_is_nowhere(bot: LocalBot, new_key: str) -> None:
    bot.before_write[1 if new_key == NEAR else 2] = lambda: bot.clear(OLD)

    assert await rename(bot, OLD, new_key, overwrite=False, timeout_s=10) is False

    assert (bot.state_of(OLD), bot.state_of(new_key)) == (None, None)


@NEW_KEYS
async def test_a_record_that_was_to_be_replaced_is_back_when_there_is_nothing_to_rename(
    bot: LocalBot, new_key: str
) -> None:
    bot.put(new_key, "before", ttl_s=3600)
    bot.before_write[1 if new_key == NEAR else 2] = lambda: bot.clear(OLD)

    assert await rename(bot, OLD, new_key, overwrite=True, timeout_s=10) is False

    record = bot.read(new_key)
    assert record is not None
    assert (record.state, record.content.ttl_ms) == ("before", 3_600_000)


async def test_what_others_made_of_a_record_that_was_moved_too_early_is_theirs(bot: LocalBot) -> None:
    bot.before_write[2] = lambda: bot.put(OLD, "second")
    bot.before_write[3] = lambda: bot.put(FAR, "theirs")

    with pytest.raises(VersionConflict, match="overwrite=True"):
        await rename(bot, OLD, FAR, overwrite=False, timeout_s=10)

    assert (bot.state_of(OLD), bot.state_of(FAR)) == ("second", "theirs")


async def test_what_others_made_of_a_record_that_was_to_be_replaced_is_theirs(bot: LocalBot) -> None:
    bot.put(FAR, "before")
    bot.before_write[2] = lambda: bot.clear(OLD)
    bot.before_write[3] = lambda: bot.put(FAR, "theirs")

    assert await rename(bot, OLD, FAR, overwrite=True, timeout_s=10) is False

    assert bot.state_of(FAR) == "theirs"


@NEW_KEYS
@pytest.mark.parametrize("change", [copy, partial(rename, timeout_s=10)], ids=["copy", "rename"])
async def test_a_record_that_comes_meanwhile_is_not_replaced_unasked(
    bot: LocalBot, new_key: str, change: Callable[..., Awaitable[bool]]
) -> None:
    bot.before_write[1] = lambda: bot.put(new_key, "theirs")

    with pytest.raises(VersionConflict, match="overwrite=True") as caught:
        await change(bot, OLD, new_key, overwrite=False)

    assert (caught.value.bot, caught.value.key, caught.value.expected_version) == ("my_bot", new_key, 0)
    assert (bot.state_of(OLD), bot.state_of(new_key)) == ("first", "theirs")


@NEW_KEYS
async def test_a_record_that_changes_again_and_again_is_given_up_in_time(bot: LocalBot, new_key: str) -> None:
    bot.before_write.default_factory = lambda: lambda: bot.put(OLD, "busy")

    with pytest.raises(VersionConflict) as caught:
        await rename(bot, OLD, new_key, overwrite=False, timeout_s=0.02)

    assert caught.value.key == OLD
    assert (bot.state_of(OLD), bot.state_of(new_key)) == ("busy", None)


async def test_a_rename_whose_first_shard_is_lost_changed_nothing(bot: LocalBot) -> None:
    bot.before_write[1] = lose_the_shard

    with pytest.raises(NamespaceUnavailable) as caught:
        await rename(bot, OLD, FAR, overwrite=False, timeout_s=10)

    assert type(caught.value) is NamespaceUnavailable
    assert (bot.state_of(OLD), bot.state_of(FAR)) == ("first", None)


@pytest.mark.parametrize("lost_write", [2, 3])
async def test_a_rename_that_loses_a_shard_in_the_middle_says_that_both_keys_may_have_the_record(
    bot: LocalBot, lost_write: int
) -> None:
    bot.before_write[2] = lambda: bot.put(OLD, "second")
    bot.before_write[lost_write] = lose_the_shard

    with pytest.raises(OutcomeUnknown, match="'distant' has the record, and 'old' may still") as caught:
        await rename(bot, OLD, FAR, overwrite=False, timeout_s=10)

    assert (caught.value.bot, caught.value.key, caught.value.timeout_s) == ("my_bot", OLD, 1.0)
    assert None not in (bot.state_of(OLD), bot.state_of(FAR))


@NEW_KEYS
@pytest.mark.parametrize(
    ("options", "ttl_s", "kept_ms", "left_ms"),
    [
        ({}, None, 0, NEVER_MS),
        ({}, 50, 50_000, 50_000),
        ({"ttl_s": 60.0}, None, 0, 60_000),
        ({"ttl_s": 60.0}, 50, 50_000, 50_000),
        ({"ttl_s": 60.0}, float("inf"), NEVER_MS, NEVER_MS),
        ({"ttl_s": 60.0, "ttl_mode": "absolute"}, None, 60_000, 60_000),
        ({"ttl_s": 60.0, "ttl_mode": "absolute"}, float("inf"), NEVER_MS, NEVER_MS),
        ({"ttl_mode": "absolute"}, None, 0, NEVER_MS),
    ],
)
async def test_the_time_to_live_goes_along(
    new_key: str, options: dict[str, Any], ttl_s: float | None, kept_ms: int, left_ms: int
) -> None:
    bot = LocalBot(**options)
    bot.put(OLD, "first", ttl_s)

    await rename(bot, OLD, new_key, overwrite=False, timeout_s=10)

    record = bot.read(new_key)
    assert record is not None
    content = record.content
    assert content.ttl_ms == pytest.approx(kept_ms, abs=5_000)
    expected_ms = NEVER_MS if left_ms == NEVER_MS else time.time() * 1_000 + left_ms
    assert content.deadline_ms == pytest.approx(expected_ms, abs=5_000)


async def test_an_absolute_time_to_live_is_not_begun_anew() -> None:
    bot = LocalBot(ttl_mode="absolute")
    bot.put(OLD, "first", 3600)
    before = bot.read(OLD)
    assert before is not None
    deadline = time.monotonic() + 10
    while time.time() * 1_000 < before.content.deadline_ms - 3_600_000 + 20:
        assert time.monotonic() < deadline

    await copy(bot, OLD, NEAR, overwrite=False)

    after = bot.read(NEAR)
    assert after is not None
    assert after.content.ttl_ms <= 3_600_000 - 20
    assert abs(after.content.deadline_ms - before.content.deadline_ms) < 20
