"""Turns of one event loop at a real shard, over connections of the test, by a clock of the test."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from fsm_ray import protocol
from fsm_ray.codec import encode_key, extension_hook
from fsm_ray.errors import Overloaded, UnknownBot
from fsm_ray.namespace import Namespace
from fsm_ray.options import BotOptions
from fsm_ray.protocol import TURN, ReplyDecoder
from fsm_ray.routing import lanes, turns
from fsm_ray.routing.asking import Asking
from fsm_ray.routing.lanes import Lane
from fsm_ray.routing.turns import SIGN_OF_LIFE_S, LoopTurns
from fsm_ray.stores.base import Contents
from fsm_ray.stores.memory import MemoryStore

from .test_lanes import TIMEOUT_S, FakeClock, settle, stood_still, too_late

DECODER = ReplyDecoder(extension_hook(allow_pickle=False))
HOT, OTHER = encode_key("hot"), encode_key("other")
PATIENCE_S = 1_000.0


class TurnRig:
    """The turns of a loop, and the shard that they are at; requests get there when the test says so."""

    def __init__(self, clock: FakeClock) -> None:
        self.namespace = Namespace(
            "my_bot", BotOptions(), MemoryStore(), Contents(version=0), lease_clock=clock
        )
        self.lane = Lane(TURN, TIMEOUT_S, lambda: None, too_late)
        self._asking = Asking(lambda: None, too_late, lambda: None)
        self.turns = LoopTurns(self.lane, self._asking, TIMEOUT_S)
        self._sent: list[bytes] = []

    def connect(self) -> None:
        self._sent.clear()
        connection: Any = self
        self.lane.connected(connection)
        self._asking.connected(connection)
        self.turns.connected()

    def lose(self) -> None:
        """Lose the way to the shard, which takes no notice, as one that is reached by Ray calls."""
        self.lane.disconnected()
        self._asking.disconnected()

    def send(self, request: bytes) -> None:
        self._sent.append(request)

    async def deliver(self) -> None:
        """Have all requests answered, and those that come of it."""
        await settle()
        while self._sent:
            reply = self.namespace.handle(self._sent.pop(0)[4:], self._answered)
            if reply is not None:
                self._answered(reply)
            await settle()

    async def begin(self, key: bytes) -> int:
        begun = asyncio.create_task(self.turns.begin(key, PATIENCE_S))
        await self.deliver()
        number, _ = await begun
        return number

    def is_held(self, key: bytes) -> bool:
        return self.namespace._turns.leases.is_held(key)

    def _answered(self, reply: bytes) -> None:
        kind, number, results = DECODER.decode(reply[4:])
        (self.lane if kind == TURN else self._asking).answered(number, results)


@pytest.fixture
async def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    return stood_still(monkeypatch)


@pytest.fixture
async def rig(clock: FakeClock) -> TurnRig:
    rig = TurnRig(clock)
    rig.connect()
    return rig


class TestTooManyTurns:
    """More turns begin at once than may wait to be sent."""

    @pytest.fixture(autouse=True)
    def _bound(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(lanes, "MAX_WAITING", 300)

    async def test_one_that_ends_meanwhile_lets_its_conversation_go(self, rig: TurnRig) -> None:
        number = await rig.begin(HOT)
        others = [asyncio.create_task(rig.turns.begin(encode_key(each), PATIENCE_S)) for each in range(1_500)]
        await settle()
        rig.turns.end(number)
        await rig.deliver()

        results = await asyncio.gather(*others, return_exceptions=True)
        assert {type(each) for each in results} == {tuple, Overloaded}
        assert not rig.is_held(HOT)

    async def test_those_that_are_refused_leave_nothing_to_send(self, rig: TurnRig) -> None:
        others = [asyncio.create_task(rig.turns.begin(encode_key(each), PATIENCE_S)) for each in range(1_500)]
        await settle()
        refused = sum(each.done() for each in others)

        assert refused > 500
        assert len(rig.lane._operations) + refused <= 1_500
        await rig.deliver()
        assert len(rig.namespace._turns.leases) == 1_500 - refused
        await asyncio.gather(*others, return_exceptions=True)


class TestOutages:
    """The shard lives and cannot be reached, so that it does not end the turns of who is away."""

    @pytest.mark.parametrize("has_another", [False, True])
    async def test_an_end_that_the_shard_was_not_told_of_is_sent_again(
        self,
        rig: TurnRig,
        clock: FakeClock,
        has_another: bool,  # noqa: FBT001
    ) -> None:
        number = await rig.begin(HOT)
        if has_another:
            await rig.begin(OTHER)
        rig.lose()
        rig.turns.end(number)
        await clock.advance(TIMEOUT_S + 1)
        rig.connect()
        await rig.deliver()
        still_held = rig.is_held(HOT)
        await clock.advance(SIGN_OF_LIFE_S)
        await rig.deliver()

        assert still_held
        assert not rig.is_held(HOT)
        assert rig.is_held(OTHER) is has_another
        assert not rig.turns._ending

    async def test_an_end_that_the_shard_refused_is_sent_again(self, rig: TurnRig, clock: FakeClock) -> None:
        number = await rig.begin(HOT)
        rig.turns.end(number)
        request = protocol.turn_request(2, [protocol.end_turn(number)], rig.turns.session_id)
        refusal = rig.namespace.refuse(request[4:], Overloaded("too many Ray calls"))
        assert refusal is not None
        rig._sent.clear()
        rig._answered(refusal)
        await settle()
        still_held = rig.is_held(HOT)
        await clock.advance(SIGN_OF_LIFE_S)
        await rig.deliver()

        assert still_held
        assert not rig.is_held(HOT)

    async def test_ends_that_cannot_be_told_of_are_bounded(
        self, rig: TurnRig, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(turns, "MAX_TURNS", 3)
        numbers = [await rig.begin(encode_key(each)) for each in range(5)]
        rig.lose()
        for number in numbers:
            rig.turns.end(number)
        for _ in range(3):
            await clock.advance(TIMEOUT_S + 1)

        assert list(rig.turns._ending) == numbers[2:]

    async def test_where_the_bot_is_gone_no_end_is_sent_again(self, rig: TurnRig, clock: FakeClock) -> None:
        number = await rig.begin(HOT)
        rig.lose()
        rig.turns.end(number)
        rig.lane.fail(lambda: UnknownBot("it was dropped"))
        await settle()
        await clock.advance(3 * SIGN_OF_LIFE_S)

        assert not rig.lane.has_work
        assert not rig.turns._ending
        assert rig.turns._timer is None

    async def test_once_it_is_closed_nothing_is_sent_again(self, rig: TurnRig, clock: FakeClock) -> None:
        number = await rig.begin(HOT)
        rig.lose()
        rig.turns.end(number)
        rig.turns.close()
        await clock.advance(TIMEOUT_S + 1)
        await clock.advance(SIGN_OF_LIFE_S)

        assert not rig.lane.has_work
        assert rig.turns._timer is None
