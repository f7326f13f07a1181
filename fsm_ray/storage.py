"""Storage and AsyncStorage: conversation state of bots, scoped by bot name and key.

The same operations twice, blocking and as coroutines. Each is atomic, and linearizable per key. When a write
returns, it is in the bot's store. A read never creates a record, and nothing returned is shared with what is
stored.
"""

from __future__ import annotations

import asyncio
import functools
import os
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Generator, Hashable, Iterable, Mapping
from threading import get_ident
from typing import Any, Literal, Self, TypeVar, overload

from fsm_ray import across
from fsm_ray.across import By, Change, Conversation, Position
from fsm_ray.errors import FsmRayError, InvalidInput, StorageClosed
from fsm_ray.flows import Flow, FlowRules, Policy
from fsm_ray.options import BotOptions, check_bot_name, make_options
from fsm_ray.protocol import ContentView, RecordView, state_of
from fsm_ray.routing.blocking import BlockingBot
from fsm_ray.routing.copying import Immediate, copy, rename, run
from fsm_ray.routing.directory import BotDescription, Directory, KeyRotation
from fsm_ray.routing.loop import LoopBot
from fsm_ray.routing.pulse import Pulse
from fsm_ray.routing.route import Addressed, Route
from fsm_ray.state import State
from fsm_ray.transaction import AsyncTransaction, Transaction
from fsm_ray.turn import AsyncLock, AsyncTurn, BlockingLock, BlockingTurn
from fsm_ray.upgrade import ReplacedShard

_NO_FLOWS = FlowRules()

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)

Here = tuple[int, Callable[[], bool], dict[str, "LoopBot"]]
"""A thread, whether its loop is running, and the bots of that loop."""

_NOWHERE: Here = (0, bool, {})

_forked_along: weakref.WeakSet[AsyncStorage] = weakref.WeakSet()
"""The storages that have loops: a forked child inherits them, and must not use them."""


def _leave_parent() -> None:
    for storage in _forked_along:
        storage.leave_parent()


os.register_at_fork(after_in_child=_leave_parent)

Transport = Literal["auto", "ray"]
"""How operations travel: over a socket where one leads to the shard, or always as arguments of Ray calls."""

MAX_TIMEOUT_S = 300.0
"""Shards remember a write's answer for twice as long, so a resend is always recognised."""


class _Facade:
    """What both storages are made of."""

    _imports_classes = True
    """Whether what is read comes as values of users' classes; see `transfer.encoded`."""

    def __init__(
        self, address: str | None = None, *, timeout_s: float = 10.0, transport: Transport = "auto"
    ) -> None:
        if not 0 < timeout_s <= MAX_TIMEOUT_S:
            raise InvalidInput(f"timeout_s is more than 0 and at most {MAX_TIMEOUT_S:.0f}, not {timeout_s!r}")
        if transport not in ("auto", "ray"):
            raise InvalidInput(f'transport is "auto" or "ray", not {transport!r}')
        self._address = address
        self._timeout_s = timeout_s
        self._transport: Transport = transport
        self._directory = Directory(address, timeout_s)
        self._rules: dict[str, FlowRules] = {}
        self._is_closed = False

    def register_flows(
        self, bot_name: str, *flows: type[Flow], on_invalid_transition: Policy = "raise"
    ) -> None:
        """Let turns of this bot, begun by this storage or a copy of it, use these flows.

        Replaces what was registered before. `on_invalid_transition` is what happens on a forbidden step:
        "raise", "log", "ignore", or a callable.

        Raises:
            InvalidFlow, InvalidBotName: nothing was registered.
        """
        self._rules[check_bot_name(bot_name)] = FlowRules(*flows, on_invalid_transition=on_invalid_transition)

    def __reduce__(self) -> tuple[Any, ...]:
        # A storage is its settings: the copy in another process makes its own connections.
        settings = (self._address, self._timeout_s, self._transport, self._rules)
        return _rebuild, (type(self), *settings)

    def _rules_of(self, bot_name: str) -> FlowRules:
        return self._rules.get(bot_name) or _NO_FLOWS

    def _patience_s(self, timeout_s: float | None) -> float:
        """How long a turn or lock waits for its conversation."""
        if timeout_s is None:
            return self._timeout_s
        if not timeout_s > 0:
            raise InvalidInput(f"timeout_s of a turn or lock is more than 0, not {timeout_s!r}")
        return timeout_s

    def _check_open(self) -> None:
        if self._is_closed:
            raise _closed()


class Storage(_Facade):
    """Conversation state, by blocking calls. May be shared by threads; pickles into Ray tasks and actors.

    Each thread has connections of its own. A forked process makes new ones.

    Making one opens nothing: Ray is attached to, or started on this machine, at the first operation.

    Args:
        address: of the Ray cluster, as `ray.init` takes it. None: the one this process is attached to, or the
            one on this machine, or a new one.
        timeout_s: how long an operation may take, reconnecting included; at most 300.
        transport: "ray" carries every operation in a Ray call, where no socket can be used; "auto" only those
            for which there is no socket.

    Examples:
        >>> storage = Storage()
        >>> storage.init("doctest_bot")
        >>> storage.set_state("doctest_bot", (42, 7), State(flow="registration", state="get_name")) > 0
        True
        >>> storage.update_data("doctest_bot", (42, 7), {"name": "Ada"})
        {'name': 'Ada'}
        >>> storage.get_state("doctest_bot", (42, 7)).state
        'get_name'
        >>> storage.clear("doctest_bot", (42, 7)), storage.get_data("doctest_bot", (42, 7))
        (True, None)
        >>> storage.drop("doctest_bot")
    """

    def __init__(
        self, address: str | None = None, *, timeout_s: float = 10.0, transport: Transport = "auto"
    ) -> None:
        super().__init__(address, timeout_s=timeout_s, transport=transport)
        self._local = threading.local()
        self._bots: weakref.WeakSet[BlockingBot] = weakref.WeakSet()
        self._pulse = Pulse()

    def init(self, bot_name: str, options: BotOptions | None = None, **changes: Any) -> None:
        """Make the bot's namespace actors, unless they are there. To be called by every worker, in any order.

        Args:
            bot_name: 1 to 64 letters, digits or `_ . @ -`.
            options: a BotOptions; the defaults when there is none.
            changes: fields of BotOptions, over those of `options`.

        Raises:
            OptionsConflict: the bot runs with other options, or is being upgraded with others; nothing was
                changed.
            InvalidOptions, InvalidBotName: nothing was done.
            RayUnreachable: there is no Ray, and none could be started.
            NamespaceUnavailable: an actor did not come up in time; a retry is safe.
        """
        self._check_open()
        self._directory.init(bot_name, make_options(options, changes))

    def get_state(self, bot_name: str, key: Hashable) -> State | None:
        """The conversation's flow, state, data and version, or None when it has no record.

        Raises:
            UnknownBot: the bot was never initialised, or was dropped; or it was initialised anew with other
                options: call again.
            InvalidKey: the key cannot be encoded.
            ValueNotDecodable: a stored value needs a class that is not here.
            NamespaceUnavailable: no answer within `timeout_s`.
        """
        bot = self._bot(bot_name)
        return _to_state(bot.read_record(key))

    def set_state(
        self,
        bot_name: str,
        key: Hashable,
        state: State,
        *,
        expected_version: int | None = None,
        ttl_s: float | None = None,
    ) -> int:
        """Create or overwrite the record with this flow, state and data; return its version.

        Args:
            bot_name: the bot.
            key: the conversation.
            state: what to store; its own version and expiry are ignored.
            expected_version: write only over the record of this version; 0: only when there is none.
            ttl_s: how long the record is to live, in seconds; `math.inf`: for ever. None: as the options of
                the bot say, or, for the writes that keep the state, as an earlier write did.

        Raises:
            VersionConflict: the record has another version; nothing was changed.
            InvalidState, InvalidKey, InvalidData, PickleNotAllowed, RecordTooLarge: nothing was changed.
            UnknownBot: as get_state; the write may be in the store that a bot left behind if it was dropped
                while the write was under way.
            NamespaceUnavailable: the shard could not be reached in time; nothing was changed.
            OutcomeUnknown: it was reached and did not answer in time; the write may have taken effect.
        """
        bot = self._bot(bot_name)
        version: int = bot.write(bot.route.set_record(key, state, expected_version, ttl_s))
        return version

    def get_data(self, bot_name: str, key: Hashable) -> dict[str, Any] | None:
        """The conversation's data: None when it has no record, {} when its record has no data.

        Raises:
            UnknownBot, InvalidKey, ValueNotDecodable, NamespaceUnavailable: as get_state.
        """
        bot = self._bot(bot_name)
        content = bot.read_content(key)
        return None if content is None else content.data

    def set_data(
        self,
        bot_name: str,
        key: Hashable,
        data: Mapping[str, Any],
        *,
        expected_version: int | None = None,
        ttl_s: float | None = None,
    ) -> int:
        """Replace the data and keep flow and state; return the record's version.

        Where there is no record, one is made with flow and state None.

        Raises:
            VersionConflict, InvalidKey, InvalidData, PickleNotAllowed, RecordTooLarge: as set_state.
            UnknownBot, NamespaceUnavailable, OutcomeUnknown: as set_state.
        """
        bot = self._bot(bot_name)
        version: int = bot.write(bot.route.set_data(key, data, expected_version, ttl_s))
        return version

    def enter_state(
        self,
        bot_name: str,
        key: Hashable,
        state: str | None,
        *,
        flow: str | None = None,
        expected_version: int | None = None,
        ttl_s: float | None = None,
    ) -> int:
        """Set flow and state and keep the data; return the record's version.

        Where there is no record, one is made with empty data.

        Raises:
            VersionConflict, InvalidKey, InvalidState, RecordTooLarge: as set_state.
            UnknownBot, NamespaceUnavailable, OutcomeUnknown: as set_state.
        """
        bot = self._bot(bot_name)
        version: int = bot.write(bot.route.enter_state(key, (flow, state), expected_version, ttl_s))
        return version

    def update_data(
        self,
        bot_name: str,
        key: Hashable,
        changes: Mapping[str, Any],
        *,
        expected_version: int | None = None,
        ttl_s: float | None = None,
    ) -> dict[str, Any]:
        """Merge changes into the data, new values winning, and return the data as it is then.

        The merge is shallow and one atomic step: concurrent updates never lose each other's fields. Where
        there is no record, one is made with flow and state None.

        Raises:
            VersionConflict, InvalidKey, InvalidData, PickleNotAllowed, RecordTooLarge: as set_state.
            ValueNotDecodable, PickleNotAllowed: of a stored value: the changes were made; the data cannot be
                shown here.
            UnknownBot, NamespaceUnavailable, OutcomeUnknown: as set_state.
        """
        bot = self._bot(bot_name)
        content: ContentView = bot.write(bot.route.update_data(key, changes, expected_version, ttl_s))
        return content.data

    def patch(
        self,
        bot_name: str,
        key: Hashable,
        *,
        set: Mapping[str, Any] | None = None,  # noqa: A002  # the word for it
        unset: Iterable[str] = (),
        increment: Mapping[str, float] | None = None,
        append: Mapping[str, Any] | None = None,
        expected_version: int | None = None,
        ttl_s: float | None = None,
    ) -> dict[str, Any]:
        """Change several fields of the data at once, and return the data as it is then.

        One atomic step: concurrent increments and appends all count. Where there is no record, one is made
        with flow and state None.

        Args:
            bot_name: the bot.
            key: the conversation.
            set: fields and their new values.
            unset: names of fields to remove; they may be missing.
            increment: fields and what to add to the numbers in them, ints of any size or floats; a missing
                one counts as 0.
            append: fields and an item for the end of the list in each; a missing one counts as [].
            expected_version: as set_state.
            ttl_s: as set_state.

        Raises:
            InvalidPatch: a field to increment holds no number, or one to append to no list; nothing was
                changed.
            InvalidData: a field is named twice, or what set_state means by it; nothing was changed.
            VersionConflict, InvalidKey, PickleNotAllowed, RecordTooLarge: as set_state.
            ValueNotDecodable, PickleNotAllowed: of a stored value: the changes were made; the data cannot be
                shown here.
            UnknownBot, NamespaceUnavailable, OutcomeUnknown: as set_state.
        """
        bot = self._bot(bot_name)
        content: ContentView = bot.write(
            bot.route.patch(
                key,
                set_=set,
                unset=unset,
                increment=increment,
                append=append,
                expected_version=expected_version,
                ttl_s=ttl_s,
            )
        )
        return content.data

    def clear(self, bot_name: str, key: Hashable, *, expected_version: int | None = None) -> bool:
        """Remove flow, state and data. True if there was a record; without one, nothing happens.

        Raises:
            VersionConflict, InvalidKey, UnknownBot, NamespaceUnavailable, OutcomeUnknown: as set_state.
        """
        bot = self._bot(bot_name)
        was_there: bool = bot.write(bot.route.clear(key, expected_version))
        return was_there

    def get_many(self, bot_name: str, keys: Iterable[Hashable]) -> list[State | None]:
        """As get_state, of each of the keys, in their order. They travel together.

        Each is read by itself: a write that is made meanwhile may be seen in some and not yet in others.

        Raises:
            UnknownBot, InvalidKey, ValueNotDecodable, NamespaceUnavailable: as get_state.
        """
        return [_to_state(record) for record in self._bot(bot_name).read_records(keys)]

    def set_many(self, bot_name: str, states: Mapping[K, State]) -> list[int]:
        """As set_state, of each of the keys; return their versions, in the same order. They travel together.

        Each is stored by itself, and all are tried, though one fails. Calling it again is safe.

        Raises:
            InvalidState, InvalidKey, InvalidData, PickleNotAllowed: nothing was changed.
            RecordTooLarge, UnknownBot, NamespaceUnavailable, OutcomeUnknown: as set_state, of the first that
                failed; others may have been stored.
        """
        bot = self._bot(bot_name)
        return bot.write_many(_set_each(bot.route, states))

    def turn(
        self,
        bot_name: str,
        key: Hashable,
        *,
        timeout_s: float | None = None,
        update_id: int | None = None,
    ) -> BlockingTurn:
        """Use a conversation exclusively, for as long as a `with` block takes; leaving it commits changes.

        Entering waits, first come first served, until no other turn has the conversation anywhere in the
        cluster, and gives a `Turn`: its `flow`, `state` and `data` may be changed in any way. Leaving stores
        them in one write, if anything changed; an exception stores nothing. The conversation is free again at
        once when the process that holds it dies; where its operations travel by Ray calls, 30 s later. Writes
        outside of turns do not wait for one. A turn that was overtaken by such a write, also by one that was
        on its way to the store as the turn began, is refused. The block is left in the thread that called.

        Args:
            bot_name: the bot.
            key: the conversation.
            timeout_s: how long to wait for other turns; None: as long as an operation may take; `math.inf`:
                for ever.
            update_id: of the Telegram update that is handled. One that a committed turn of this conversation
                handled before has `turn.was_handled` set: nothing that the block does is stored then. For
                numbers that count up: the last 100 are remembered, without those that are 1,024 or more away
                from the last one, until one day after the record has ended.

        Raises:
            TurnTimeout: on entering: other turns kept the conversation for so long.
            Overloaded: on entering: too many turns wait for it already.
            ValueNotDecodable: on entering: a stored value needs a class that is not here.
            TurnLost: on leaving: the conversation was not this turn's any more; nothing was changed.
            VersionConflict: on leaving: it was written outside of turns meanwhile; nothing was changed.
            InvalidState, InvalidData, PickleNotAllowed, RecordTooLarge: on leaving: nothing was changed.
            InvalidKey, UnknownBot, NamespaceUnavailable, OutcomeUnknown: as set_state.
        """
        bot, rules, patience_s = self._bot(bot_name), self._rules_of(bot_name), self._patience_s(timeout_s)
        return BlockingTurn(bot, self._pulse, key, timeout_s=patience_s, rules=rules, update_id=update_id)

    def lock(self, bot_name: str, key: Hashable, *, timeout_s: float | None = None) -> BlockingLock:
        """Keep others from a conversation for as long as a `with` block takes, and leave its record alone.

        A turn that neither gives nor commits anything: it waits for turns and locks of the conversation as a
        turn does, and they for it; inside, a turn of it would wait for itself. Writes inside are made by the
        storage's methods, each by itself. They are not refused if the conversation was lost, say because the
        actor was restarted, and leaving the block does not tell of it.

        Raises:
            TurnTimeout, Overloaded, InvalidKey, UnknownBot, NamespaceUnavailable: on entering, as turn.
            ValueNotDecodable: on entering: a stored value needs a class that is not here.
        """
        return BlockingLock(self.turn(bot_name, key, timeout_s=timeout_s))

    def scan(
        self,
        bot_name: str,
        *,
        flow: str | None = None,
        state: str | None = None,
        after: Hashable | None = None,
        limit: int | None = None,
    ) -> Generator[Conversation, None, None]:
        """Go through the bot's conversations, in an order that depends on their keys alone.

        What is found of each shard is of one moment, whatever is written meanwhile; writers do not wait.

        Args:
            bot_name: the bot.
            flow: only those that are in this flow.
            state: only those that are in this state.
            after: begin behind this key, whether it has a record or not.
            limit: find so many at most.

        Raises:
            ScanInterrupted: a shard was restarted during the scan; it may go on with `after`.
            Overloaded: too many scans are under way.
            ValueNotDecodable: a value needs a class that is not here; `after` the error's key it goes on.
            UnknownBot, InvalidKey, NamespaceUnavailable: as get_state.
        """
        return across.scan(lambda: self._bot(bot_name), (flow, state), after, limit)

    @overload
    def count(self, bot_name: str, by: None = None) -> int: ...
    @overload
    def count(self, bot_name: str, by: Literal["flow"]) -> dict[str | None, int]: ...
    @overload
    def count(self, bot_name: str, by: Literal["state"]) -> dict[tuple[str | None, str | None], int]: ...

    def count(self, bot_name: str, by: By = None) -> int | dict[Any, int]:
        """How many conversations the bot has: in all, in each flow, or in each flow and state.

        The numbers are kept up to date, so this takes no longer for a million conversations. One that has
        expired is counted until it is swept, for some seconds.

        Raises:
            UnknownBot, NamespaceUnavailable: as get_state.
        """
        return across.count(self._bot(bot_name), by)

    def position(self, bot_name: str) -> Position:
        """Where the bot is now: the `since` of a watch that is to see every change from here on.

        Raises:
            UnknownBot, NamespaceUnavailable: as get_state.
        """
        return across.position(self._bot(bot_name))

    def transaction(self, bot_name: str) -> Transaction:
        """Write to several conversations of one shard: all that the block does takes effect, or nothing.

        The transaction has the storage's methods `set_state`, `enter_state`, `set_data`, `update_data`,
        `patch` and `clear`, which here return nothing: all is sent as one atomic operation when the block is
        left, and nothing when it is left by an exception. Afterwards `version` is that of the last write.

        Examples:
            >>> storage = Storage()
            >>> storage.init("doctest_bot")
            >>> with storage.transaction("doctest_bot") as transaction:
            ...     transaction.patch("ann", increment={"coins": -5})
            ...     transaction.patch("bob", increment={"coins": 5})
            >>> storage.get_data("doctest_bot", "bob")
            {'coins': 5}
            >>> storage.drop("doctest_bot")

        Raises:
            AcrossShards: as a method is called: the key is on another shard than those before.
            InvalidInput: as a method is called: as the storage's method does.
            VersionConflict, InvalidPatch, RecordTooLarge: as the block is left: nothing was changed; `key`
                tells which conversation it is about.
            FrameTooLarge: as the block is left: together the writes are too large; nothing was changed.
            UnknownBot, NamespaceUnavailable, OutcomeUnknown: as the block is left: as set_state.
        """
        return Transaction(lambda: self._bot(bot_name))

    def copy(self, bot_name: str, key: Hashable, new_key: Hashable, *, overwrite: bool = False) -> bool:
        """Store the record under another key too, under a new version. True; or False if there is none.

        The copy is what the record was at one moment of the call. It lives as long as the record was given to
        live by a write, from now on; or, with `ttl_mode="absolute"`, as long as is left by this machine's
        clock; or else as the options of the bot say.

        Args:
            bot_name: the bot.
            key: the conversation.
            new_key: where it is to be found too.
            overwrite: replace a record under `new_key`, if there is one.

        Raises:
            VersionConflict: there is a record under `new_key`, and not `overwrite`; nothing was changed.
            InvalidInput: both keys are the same.
            ValueNotDecodable: a stored value needs a class that is not here; nothing was changed.
            InvalidKey, RecordTooLarge, UnknownBot, NamespaceUnavailable, OutcomeUnknown: as set_state.
        """
        return run(copy(Immediate(self._bot(bot_name)), key, new_key, overwrite=overwrite))

    def rename(self, bot_name: str, key: Hashable, new_key: Hashable, *, overwrite: bool = False) -> bool:
        """As copy, and take the record away from under `key`: for a group that became a supergroup.

        No write to the record under `key` is lost: what is moved is what it was at last. Where both keys are
        on one shard, that is one atomic step. Where not, the record is stored under `new_key` first: for a
        moment both keys have it, and for good if this process dies then.

        Raises:
            VersionConflict: there is a record under `new_key`, and not `overwrite`; or the record under `key`
                changed again and again, for `timeout_s`. Nothing was changed.
            OutcomeUnknown: as set_state; or the shard of `key` could not be reached as `new_key` had the
                record already.
            InvalidInput, ValueNotDecodable, InvalidKey, RecordTooLarge, UnknownBot, NamespaceUnavailable: as
                copy.
        """
        bot = Immediate(self._bot(bot_name))
        return run(rename(bot, key, new_key, overwrite=overwrite, timeout_s=self._timeout_s))

    def bots(self) -> list[str]:
        """The names of the bots on this cluster, sorted.

        Raises:
            RayUnreachable: there is no Ray, and none could be started.
        """
        self._check_open()
        return self._directory.bots()

    def describe(self, bot_name: str) -> BotDescription:
        """The bot's options, and where its shards are and what they hold.

        Raises:
            UnknownBot, NamespaceUnavailable: as get_state.
        """
        self._check_open()
        return self._directory.describe(bot_name)

    def rotate_keys(self, bot_name: str) -> KeyRotation:
        """Let all shards read the encryption keys again, and encrypt everything with the current one.

        This returns at once, and operations go on. Records are encrypted anew in small steps; to know how far
        that is, call it again. It goes on by itself when a shard is killed, and when its node is. Once the
        result says `is_done`, keys other than the current one can be removed.

        Raises:
            EncryptionKeysUnusable: the keys cannot be read, one that is in use is missing or was changed, or
                nodes have different ones. Shards that say so go on with the keys that they had.
            InvalidInput: the bot has no `encryption_keys`.
            UnknownBot, NamespaceUnavailable: a retry is safe.
        """
        self._check_open()
        return self._directory.rotate_keys(bot_name)

    def drop(self, bot_name: str) -> None:
        """End the bot's actors. Records in memory go with them.

        Raises:
            UnknownBot, NamespaceUnavailable: as get_state.
        """
        self._check_open()
        self._directory.drop(bot_name)

    def upgrade(
        self, bot_name: str, *, force: bool = False, allow_loss: bool = False, timeout_s: float = 60.0
    ) -> list[ReplacedShard]:
        """Replace the bot's actors by ones of this version of fsm_ray, one shard at a time, while it runs.

        Each actor commits what it has and ends; a new one with the same options is made, with the code that
        this process gives to any actor, and opens the store. Operations on the shard wait meanwhile: no
        acknowledged write is lost, and none takes effect twice. Turns, scans and watches meet what they meet
        when an actor restarts. An upgrade that failed or was interrupted can be repeated, and goes on: actors
        of this version stay. Of two at once the later one goes on, and a `drop` ends both the bot and its
        upgrade.

        Args:
            bot_name: the bot.
            force: replace actors of this version, too: as after an upgrade of a store's driver.
            allow_loss: replace actors that have the only copy of their records (`memory://`).
            timeout_s: how long one shard may be away. An actor that does not stop is killed, after 15 s or
                half of this.

        Raises:
            InvalidInput: the records would be lost, and `allow_loss` does not say that they may be.
            UnknownBot: the bot was never initialised.
            NamespaceUnavailable: a shard did not serve again in time; those before it were not touched. Or
                the bot was dropped meanwhile, or somebody else began to upgrade it.
            ConfigurationError: a node has another version installed than this process.
            FsmRayError: a new actor cannot open its store; those before it were not touched.
        """
        self._check_open()
        return self._directory.upgrade(bot_name, timeout_s, force=force, allow_loss=allow_loss)

    def close(self) -> None:
        """Close the connections of all threads. The bots live on."""
        self._is_closed = True
        self._pulse.stop()
        bots = tuple(self._bots)
        for bot in bots:
            bot.retire()  # all, before the end of one thread's turns lets those of another begin
        for bot in bots:
            bot.close()
        self._directory.metrics.publish()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _bot(self, bot_name: str) -> BlockingBot:
        self._check_open()
        bots: dict[str, BlockingBot] = self._local.__dict__
        bot = bots.get(bot_name)
        if bot is None:
            check_bot_name(bot_name)
            by_socket = self._transport == "auto"
            options = self._directory.options(bot_name)
            route = Route(bot_name, options, imports_classes=self._imports_classes)
            bot = BlockingBot(
                self._directory, route, self._timeout_s, lambda: self._forget(bot_name), by_socket=by_socket
            )
            bots[bot_name] = bot
            self._bots.add(bot)
        return bot

    def _forget(self, bot_name: str) -> None:
        self._directory.forget(bot_name)
        self._local.__dict__.pop(bot_name, None)


class AsyncStorage(_Facade):
    """Conversation state, by coroutines: the methods of `Storage`, awaited.

    Operations of concurrent tasks travel together. Connections belong to the event loop that is running, so
    one AsyncStorage serves any number of loops, one after another or in several threads. An operation that
    is cancelled may still take effect.

    Making one opens nothing: Ray is attached to, or started on this machine, at the first operation.

    Args:
        address: of the Ray cluster, as `ray.init` takes it. None: the one this process is attached to, or the
            one on this machine, or a new one.
        timeout_s: how long an operation may take, reconnecting included; at most 300.
        transport: "ray" carries every operation in a Ray call, where no socket can be used; "auto" only those
            for which there is no socket.
    """

    def __init__(
        self, address: str | None = None, *, timeout_s: float = 10.0, transport: Transport = "auto"
    ) -> None:
        super().__init__(address, timeout_s=timeout_s, transport=transport)
        # One attribute, so that threads never see half of a change.
        self._here = _NOWHERE
        self._loops: dict[asyncio.AbstractEventLoop, dict[str, LoopBot]] = {}
        self._keepers: dict[asyncio.AbstractEventLoop, asyncio.Task[None]] = {}
        self._searches: dict[tuple[asyncio.AbstractEventLoop, str], asyncio.Task[LoopBot]] = {}

    async def init(self, bot_name: str, options: BotOptions | None = None, **changes: Any) -> None:
        """See `Storage.init`."""
        self._check_open()
        await self._in_thread(self._directory.init, bot_name, make_options(options, changes))

    async def get_state(self, bot_name: str, key: Hashable) -> State | None:
        """See `Storage.get_state`."""
        bot = self._bots().get(bot_name) or await self._resolve(bot_name)
        return _to_state(await bot.read_record(key))

    async def set_state(
        self,
        bot_name: str,
        key: Hashable,
        state: State,
        *,
        expected_version: int | None = None,
        ttl_s: float | None = None,
    ) -> int:
        """See `Storage.set_state`."""
        bot = self._bots().get(bot_name) or await self._resolve(bot_name)
        version: int = await bot.write(bot.route.set_record(key, state, expected_version, ttl_s))
        return version

    async def get_data(self, bot_name: str, key: Hashable) -> dict[str, Any] | None:
        """See `Storage.get_data`."""
        bot = self._bots().get(bot_name) or await self._resolve(bot_name)
        content = await bot.read_content(key)
        return None if content is None else content.data

    async def set_data(
        self,
        bot_name: str,
        key: Hashable,
        data: Mapping[str, Any],
        *,
        expected_version: int | None = None,
        ttl_s: float | None = None,
    ) -> int:
        """See `Storage.set_data`."""
        bot = self._bots().get(bot_name) or await self._resolve(bot_name)
        version: int = await bot.write(bot.route.set_data(key, data, expected_version, ttl_s))
        return version

    async def enter_state(
        self,
        bot_name: str,
        key: Hashable,
        state: str | None,
        *,
        flow: str | None = None,
        expected_version: int | None = None,
        ttl_s: float | None = None,
    ) -> int:
        """See `Storage.enter_state`."""
        bot = self._bots().get(bot_name) or await self._resolve(bot_name)
        version: int = await bot.write(bot.route.enter_state(key, (flow, state), expected_version, ttl_s))
        return version

    async def update_data(
        self,
        bot_name: str,
        key: Hashable,
        changes: Mapping[str, Any],
        *,
        expected_version: int | None = None,
        ttl_s: float | None = None,
    ) -> dict[str, Any]:
        """See `Storage.update_data`."""
        bot = self._bots().get(bot_name) or await self._resolve(bot_name)
        if ttl_s is None:
            return (await bot.update_data(key, changes, expected_version)).data
        content: ContentView = await bot.write(bot.route.update_data(key, changes, expected_version, ttl_s))
        return content.data

    async def patch(
        self,
        bot_name: str,
        key: Hashable,
        *,
        set: Mapping[str, Any] | None = None,  # noqa: A002  # the word for it
        unset: Iterable[str] = (),
        increment: Mapping[str, float] | None = None,
        append: Mapping[str, Any] | None = None,
        expected_version: int | None = None,
        ttl_s: float | None = None,
    ) -> dict[str, Any]:
        """See `Storage.patch`."""
        bot = self._bots().get(bot_name) or await self._resolve(bot_name)
        content: ContentView = await bot.write(
            bot.route.patch(
                key,
                set_=set,
                unset=unset,
                increment=increment,
                append=append,
                expected_version=expected_version,
                ttl_s=ttl_s,
            )
        )
        return content.data

    async def clear(self, bot_name: str, key: Hashable, *, expected_version: int | None = None) -> bool:
        """See `Storage.clear`."""
        bot = self._bots().get(bot_name) or await self._resolve(bot_name)
        was_there: bool = await bot.write(bot.route.clear(key, expected_version))
        return was_there

    async def get_many(self, bot_name: str, keys: Iterable[Hashable]) -> list[State | None]:
        """See `Storage.get_many`."""
        bot = await self._bot(bot_name)
        return [_to_state(record) for record in await bot.read_records(keys)]

    async def set_many(self, bot_name: str, states: Mapping[K, State]) -> list[int]:
        """See `Storage.set_many`."""
        bot = await self._bot(bot_name)
        return await bot.write_many(_set_each(bot.route, states))

    def turn(
        self,
        bot_name: str,
        key: Hashable,
        *,
        timeout_s: float | None = None,
        update_id: int | None = None,
    ) -> AsyncTurn:
        """See `Storage.turn`; entered with `async with`."""
        rules, patience_s = self._rules_of(bot_name), self._patience_s(timeout_s)
        return AsyncTurn(
            self._bots, self._resolve, bot_name, key, timeout_s=patience_s, rules=rules, update_id=update_id
        )

    def lock(self, bot_name: str, key: Hashable, *, timeout_s: float | None = None) -> AsyncLock:
        """See `Storage.lock`; entered with `async with`."""
        return AsyncLock(self.turn(bot_name, key, timeout_s=timeout_s))

    def scan(
        self,
        bot_name: str,
        *,
        flow: str | None = None,
        state: str | None = None,
        after: Hashable | None = None,
        limit: int | None = None,
    ) -> AsyncGenerator[Conversation, None]:
        """See `Storage.scan`; gone through with `async for`."""
        return across.scan_async(lambda: self._bot(bot_name), (flow, state), after, limit, self._timeout_s)

    @overload
    async def count(self, bot_name: str, by: None = None) -> int: ...
    @overload
    async def count(self, bot_name: str, by: Literal["flow"]) -> dict[str | None, int]: ...
    @overload
    async def count(
        self, bot_name: str, by: Literal["state"]
    ) -> dict[tuple[str | None, str | None], int]: ...

    async def count(self, bot_name: str, by: By = None) -> int | dict[Any, int]:
        """See `Storage.count`."""
        return await across.count_async(await self._bot(bot_name), by, self._timeout_s)

    async def position(self, bot_name: str) -> Position:
        """See `Storage.position`."""
        return await across.position_async(await self._bot(bot_name), self._timeout_s)

    def watch(
        self,
        bot_name: str,
        *,
        flow: str | None = None,
        state: str | None = None,
        since: Position | None = None,
    ) -> AsyncGenerator[Change, None]:
        """Tell of every write to the bot's conversations, those of one conversation in their order.

        It has no end, and goes on after an outage. Whoever is slow costs the shards nothing: they keep their
        last changes anyway, and say so when these do not reach back far enough.

        Args:
            bot_name: the bot.
            flow: only changes of conversations that were or are in this flow.
            state: only changes of conversations that were or are in this state.
            since: go on behind this position, of a change or of `position`; None: from now on.

        Raises:
            ChangesMissed: some changes are not known any more; a scan tells what there is, and a new watch
                goes on since the position in the error.
            ValueNotDecodable: a value needs a class that is not here; the error has a position, too.
            Overloaded: too many watch this bot.
            InvalidInput: `since` is no position of this bot.
            UnknownBot: as get_state.
        """
        return across.watch(lambda: self._bot(bot_name), (flow, state), since, self._timeout_s)

    def transaction(self, bot_name: str) -> AsyncTransaction:
        """See `Storage.transaction`; enter it with `async with`."""
        return AsyncTransaction(lambda: self._bot(bot_name))

    async def copy(self, bot_name: str, key: Hashable, new_key: Hashable, *, overwrite: bool = False) -> bool:
        """See `Storage.copy`."""
        return await copy(await self._bot(bot_name), key, new_key, overwrite=overwrite)

    async def rename(
        self, bot_name: str, key: Hashable, new_key: Hashable, *, overwrite: bool = False
    ) -> bool:
        """See `Storage.rename`; one that is cancelled may leave the record under both keys."""
        bot = await self._bot(bot_name)
        return await rename(bot, key, new_key, overwrite=overwrite, timeout_s=self._timeout_s)

    async def bots(self) -> list[str]:
        """See `Storage.bots`."""
        self._check_open()
        return await self._in_thread(self._directory.bots)

    async def describe(self, bot_name: str) -> BotDescription:
        """See `Storage.describe`."""
        self._check_open()
        return await self._in_thread(self._directory.describe, bot_name)

    async def rotate_keys(self, bot_name: str) -> KeyRotation:
        """See `Storage.rotate_keys`."""
        self._check_open()
        return await self._in_thread(self._directory.rotate_keys, bot_name)

    async def drop(self, bot_name: str) -> None:
        """See `Storage.drop`."""
        self._check_open()
        await self._in_thread(self._directory.drop, bot_name)

    async def upgrade(
        self, bot_name: str, *, force: bool = False, allow_loss: bool = False, timeout_s: float = 60.0
    ) -> list[ReplacedShard]:
        """See `Storage.upgrade`; one that is cancelled goes on all the same."""
        self._check_open()
        upgrade = functools.partial(self._directory.upgrade, force=force, allow_loss=allow_loss)
        return await self._in_thread(upgrade, bot_name, timeout_s)

    async def close(self) -> None:
        """Close the connections of all loops; operations that wait raise StorageClosed. The bots live on."""
        self._is_closed = True
        self._here = _NOWHERE
        self._abandon_closed_loops()
        for loop, keeper in tuple(self._keepers.items()):
            if loop is asyncio.get_running_loop():
                keeper.cancel()
                await asyncio.wait([keeper])
            else:
                loop.call_soon_threadsafe(keeper.cancel)
        self._directory.metrics.publish()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _bots(self) -> dict[str, LoopBot]:
        """The bots of the running loop.

        Whether that is still the loop that was met last, is told by its thread and by its running: two loops
        do not run in one thread at once. Asking asyncio costs a getpid(2) each time.
        """
        thread_id, is_running, bots = self._here
        return bots if thread_id == get_ident() and is_running() else self._enter()

    def _enter(self) -> dict[str, LoopBot]:
        self._check_open()
        loop = asyncio.get_running_loop()
        bots = self._loops.get(loop)
        if bots is None:
            self._abandon_closed_loops()
            bots = self._loops[loop] = {}
            self._keepers[loop] = keeper = loop.create_task(self._keep(loop))
            # Where a loop is closed without cancelling its tasks, asyncio would complain about this one.
            keeper._log_destroy_pending = False  # type: ignore[attr-defined]  # noqa: SLF001
        self._here = (get_ident(), loop.is_running, bots)
        _forked_along.add(self)
        return bots

    def leave_parent(self) -> None:
        """Forget the loops and connections of the process that this one was forked from."""
        self._here = _NOWHERE
        self._loops, self._keepers, self._searches = {}, {}, {}

    async def _keep(self, loop: asyncio.AbstractEventLoop) -> None:
        """Close the loop's connections when the loop ends, which cancels its tasks, or the storage closes."""
        try:
            await asyncio.Event().wait()
        finally:
            for bot in self._leave(loop).values():
                if loop.is_closed():
                    bot.abandon()  # this is the garbage collection
                else:
                    bot.close(_closed)

    def _leave(self, loop: asyncio.AbstractEventLoop) -> dict[str, LoopBot]:
        """Forget the loop, and return its bots."""
        bots = self._loops.pop(loop, {})
        self._keepers.pop(loop, None)
        if self._here[2] is bots:
            self._here = _NOWHERE
        return bots

    def _abandon_closed_loops(self) -> None:
        """End the connections of loops that were closed without cancelling their tasks: no keeper did."""
        for loop in tuple(self._loops):
            if loop.is_closed():
                for bot in self._leave(loop).values():
                    bot.abandon()

    async def _bot(self, bot_name: str) -> LoopBot:
        return self._bots().get(bot_name) or await self._resolve(bot_name)

    async def _resolve(self, bot_name: str) -> LoopBot:
        """Find the bot; those who want it at the same time wait for one search, and so keep their order."""
        check_bot_name(bot_name)
        self._check_open()
        search = asyncio.get_running_loop(), bot_name
        if search not in self._searches:
            self._searches[search] = search[0].create_task(self._search(bot_name))
        # Who is cancelled stops waiting; the others do not.
        try:
            return await asyncio.shield(self._searches[search])
        except FsmRayError as error:
            raise error.copied() from error

    async def _search(self, bot_name: str) -> LoopBot:
        try:
            options = await self._in_thread(self._directory.options, bot_name)
            bots = self._bots()
            if bot_name not in bots:
                bots[bot_name] = LoopBot(
                    self._directory,
                    Route(bot_name, options, imports_classes=self._imports_classes),
                    self._timeout_s,
                    lambda: self._forget(bots, bot_name),
                    by_socket=self._transport == "auto",
                )
            return bots[bot_name]
        finally:
            self._searches.pop((asyncio.get_running_loop(), bot_name), None)

    def _forget(self, bots: dict[str, LoopBot], bot_name: str) -> None:
        self._directory.forget(bot_name)
        bots.pop(bot_name, None)

    async def _in_thread(self, function: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(None, function, *args)


def _to_state(record: RecordView | None) -> State | None:
    return None if record is None else state_of(record)


def _set_each(route: Route, states: Mapping[K, State]) -> list[Addressed]:
    return [route.set_record(key, state, None) for key, state in states.items()]


def _closed() -> StorageClosed:
    return StorageClosed("this storage was closed: make a new one")


def _rebuild(
    kind: type[Any], address: str | None, timeout_s: float, transport: Transport, rules: dict[str, FlowRules]
) -> Any:
    storage = kind(address, timeout_s=timeout_s, transport=transport)
    storage._rules = rules  # noqa: SLF001  # a copy's own
    return storage
