"""Turn: one worker's exclusive use of a conversation, for as long as it handles an update.

Two requests, whatever the handler does: one takes the conversation and loads it, the other commits what
became of it, in one write, and lets the next worker have it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable
from types import TracebackType
from typing import Any

from fsm_ray import protocol
from fsm_ray.codec import encode_data, encode_key
from fsm_ray.errors import FsmRayError, InvalidInput, TurnTimeout
from fsm_ray.flows import Draft, FlowRules
from fsm_ray.protocol import WRITE, RecordView
from fsm_ray.routing.blocking import BlockingBot
from fsm_ray.routing.loop import LoopBot
from fsm_ray.routing.pulse import Pulse
from fsm_ray.routing.route import Route


class Turn(Draft):
    """The conversation as it was loaded, to be changed: `flow`, `state`, `data`, and the helpers of `Draft`.

    Leaving the block commits all changes, if any, in one write; an exception commits none.
    """

    __slots__ = ("_is_new", "bot", "key", "ttl_s", "update_id", "was_handled")

    bot: str
    """The bot's name."""
    key: Hashable
    """The conversation's key."""
    flow: str | None
    """The name of the active flow; None: none is."""
    state: str | None
    """The state in that flow; None: in none."""
    data: dict[str, Any]
    """What is known of the conversation; what is changed in it, nested values too, is stored."""
    ttl_s: float | None
    """How long the conversation is to live from now on, in seconds; None: as the bot's options say."""
    update_id: int | None
    """Telegram's `update_id` of what this turn handles, if it was given."""
    was_handled: bool
    """Whether a turn with this `update_id` was committed before: then nothing that this one does is kept."""

    def __init__(
        self, bot: str, key: Hashable, record: RecordView | None, rules: FlowRules, update_id: int | None
    ) -> None:
        self.bot = bot
        self.key = key
        self.ttl_s = None
        self.update_id = update_id
        self.was_handled = False
        self._rules = rules
        if record is not None:
            content = record.content
            if update_id is not None:
                self.was_handled = update_id in content.updates
            if not content.deadline_ms:
                record = None  # all that is left of it are the updates that were handled
        self._is_new = self._is_gone = record is None
        if record is None:
            self.flow = self.state = self.version = None
            self.data = {}
        else:
            self.flow, self.state = record.flow, record.state
            self.data, self.version = content.data, content.version

    def to_commit(self, route: Route, key: bytes, session_id: bytes, number: int) -> bytes | None:
        """The operation that commits the changes, None if there are none for sure.

        Raises:
            InvalidInput: what the block left cannot be stored.
        """
        if self.was_handled:
            return None
        flow, state, data = self.flow, self.state, None
        if not (self._is_gone and flow is None and state is None and not self.data):
            if type(flow) not in _NAMES or type(state) not in _NAMES:
                whole = self.to_state()
                flow, state = (None, None) if whole is None else (whole.flow, whole.state)
            data = encode_data(self.data, allow_pickle=route.options.allow_pickle)
        elif self._is_new and self.update_id is None:
            return None
        ttl_ms = None if self.ttl_s is None else route.ttl_ms(self.ttl_s)
        return protocol.commit_turn(
            key,
            (session_id, number),
            (flow, state),
            data,
            self.version or 0,
            ttl_ms=ttl_ms,
            update_id=self.update_id,
        )


_NAMES = frozenset({str, type(None)})


def _check_update_id(update_id: int | None) -> None:
    if update_id is not None and (type(update_id) is not int or not 0 <= update_id < 1 << 63):
        raise InvalidInput(f"update_id is Telegram's, an int that is not negative, not {update_id!r}")


class _TurnOf:
    """What both kinds of turns are made of."""

    def __init__(
        self, bot_name: str, key: Hashable, timeout_s: float, rules: FlowRules, update_id: int | None
    ) -> None:
        self._bot_name = bot_name
        self._key = key
        self._timeout_s = timeout_s
        self._rules = rules
        self._update_id = update_id
        try:
            self._encoded = encode_key(key)
            _check_update_id(update_id)
        except InvalidInput as error:
            raise self._about(error)  # noqa: B904  # the same error, with more facts
        self._is_entered = False
        self._number = 0
        self._turn: Turn | None = None

    def _enter_once(self) -> None:
        if self._is_entered:
            raise self._about(InvalidInput("a turn is entered once: call storage.turn(...) for each one"))
        self._is_entered = True

    def _timed_out(self) -> TurnTimeout:
        return TurnTimeout(
            f"other workers kept this conversation of bot {self._bot_name!r} for {self._timeout_s} s: "
            "retry later, or give a longer timeout_s",
            bot=self._bot_name,
            key=self._key,
            timeout_s=self._timeout_s,
        )

    def _about(self, error: FsmRayError) -> FsmRayError:
        error.bot, error.key = self._bot_name, self._key
        return error


class AsyncTurn(_TurnOf):
    """What `AsyncStorage.turn` returns: enter it with `async with`, once."""

    def __init__(
        self,
        bots: Callable[[], dict[str, LoopBot]],
        resolve: Callable[[str], Awaitable[LoopBot]],
        bot_name: str,
        key: Hashable,
        *,
        timeout_s: float,
        rules: FlowRules,
        update_id: int | None,
    ) -> None:
        super().__init__(bot_name, key, timeout_s, rules, update_id)
        self._bots = bots
        self._resolve = resolve

    async def __aenter__(self) -> Turn:
        self._enter_once()
        bot = self._bots().get(self._bot_name) or await self._resolve(self._bot_name)
        self._route = bot.route
        self._shard = bot.shard_of(self._encoded)
        try:
            self._number, record = await self._shard.turns.begin(self._encoded, self._timeout_s)
        except TimeoutError as error:
            raise self._timed_out() from error
        except FsmRayError as error:
            raise self._about(error)  # noqa: B904  # the same error, with more facts
        self._turn = turn = Turn(self._bot_name, self._key, record, self._rules, self._update_id)
        return turn

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        turns = self._shard.turns
        is_committed = False
        try:
            if error is None and self._turn is not None:
                operation = self._turn.to_commit(self._route, self._encoded, turns.session_id, self._number)
                if operation is not None:
                    self._bots()  # raises, if the storage was closed meanwhile
                    version = await self._shard.lanes[WRITE].submit(operation)
                    self._turn.version = version or None
                    is_committed = True
        except FsmRayError as failure:
            raise self._about(failure)  # noqa: B904  # the same error, with more facts
        finally:
            if is_committed:
                turns.committed(self._number)
            else:
                self.end()

    def end(self) -> None:
        """Let the next one have the conversation; nothing is committed, and nobody waits for that."""
        self._shard.turns.end(self._number)


class BlockingTurn(_TurnOf):
    """What `Storage.turn` returns: enter it with `with`, once, in the thread that called."""

    def __init__(
        self,
        bot: BlockingBot,
        pulse: Pulse,
        key: Hashable,
        *,
        timeout_s: float,
        rules: FlowRules,
        update_id: int | None,
    ) -> None:
        super().__init__(bot.route.bot_name, key, timeout_s, rules, update_id)
        self._route = bot.route
        self._shard = bot.shard_of(self._encoded)
        self._pulse = pulse

    def __enter__(self) -> Turn:
        self._enter_once()
        try:
            self._number, record = self._shard.begin_turn(self._encoded, self._timeout_s)
        except TimeoutError as error:
            raise self._timed_out() from error
        except FsmRayError as error:
            raise self._about(error)  # noqa: B904  # the same error, with more facts
        self._pulse.begun(self._shard)
        self._turn = Turn(self._bot_name, self._key, record, self._rules, self._update_id)
        return self._turn

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        is_committed = False
        try:
            if error is None and self._turn is not None:
                operation = self._turn.to_commit(
                    self._route, self._encoded, self._shard.session_id, self._number
                )
                if operation is not None:
                    self._turn.version = self._shard.write_one(operation) or None
                    is_committed = True
        except FsmRayError as failure:
            raise self._about(failure)  # noqa: B904  # the same error, with more facts
        finally:
            if is_committed:
                self._pulse.ended(self._shard)
            else:
                self.end()

    def end(self) -> None:
        """Let the next one have the conversation; nothing is committed."""
        self._pulse.ended(self._shard)
        self._shard.end_turn(self._number)


class AsyncLock:
    """What `AsyncStorage.lock` returns: enter it with `async with`, once."""

    def __init__(self, turn: AsyncTurn) -> None:
        self._turn = turn

    async def __aenter__(self) -> None:
        await self._turn.__aenter__()

    async def __aexit__(self, *_: object) -> None:
        self._turn.end()


class BlockingLock:
    """What `Storage.lock` returns: enter it with `with`, once, in the thread that called."""

    def __init__(self, turn: BlockingTurn) -> None:
        self._turn = turn

    def __enter__(self) -> None:
        self._turn.__enter__()

    def __exit__(self, *_: object) -> None:
        self._turn.end()
