"""Every exception of fsm_ray, in one tree.

Named for what the caller can do about it: retry, fix the call, fix the setup, or call a human. The facts
of a case are attributes (`None` where they do not apply), and every error survives pickling.

```
FsmRayError
├── InvalidInput            fix the call; nothing was written
│   ├── InvalidBotName
│   ├── InvalidKey
│   ├── InvalidState
│   ├── InvalidData
│   ├── InvalidUpdate
│   ├── InvalidPatch
│   ├── AcrossShards
│   ├── UnknownFlow
│   ├── UnknownState
│   ├── PickleNotAllowed
│   ├── RecordTooLarge
│   └── FrameTooLarge
├── ConfigurationError      fix the setup
│   ├── InvalidOptions
│   ├── InvalidFlow
│   ├── OptionsConflict
│   ├── StoreMismatch
│   ├── EncryptionKeysUnusable
│   ├── MissingExtra
│   ├── RayUnreachable
│   └── ProtocolMismatch
├── StoreCorrupted          call a human; nothing was changed
├── UnknownBot              call init first; if it was initialised anew with other options, call again
├── InvalidTransition       answer the user, or mend the flow; nothing was changed
├── TurnLost                handle the update again; nothing was changed
├── VersionConflict         read again, then decide
├── ScanInterrupted         begin again, or go on behind the last key
├── ChangesMissed           scan, then watch on from its position
├── StorageClosed           make a new storage
├── ValueNotDecodable       make the class importable here
└── NamespaceUnavailable    retry; nothing was changed
    ├── StoreUnavailable    see to the store; retry
    ├── NotOwner            retry; if it stays, another cluster has the store
    ├── Overloaded          retry later
    ├── TurnTimeout         retry later: another worker has the conversation
    └── OutcomeUnknown      the write may or may not have taken effect: read, then decide
```
"""

from __future__ import annotations

from typing import Any, Self


class FsmRayError(Exception):
    """Base of every error of fsm_ray."""

    bot: str | None = None
    """The bot's name."""
    key: Any = None
    """The conversation's key, as the caller gave it."""

    def __init__(self, message: str, /, **facts: Any) -> None:
        super().__init__(message)
        # Exception pickles as cls(*args) plus __dict__, so facts set this way travel along.
        self.__dict__.update(facts)

    def copied(self, addition: str = "") -> Self:
        """The same error, the addition behind its message, to be raised once more.

        An exception that is itself raised again and again grows its traceback each time.
        """
        return type(self)(f"{self}{addition}", **vars(self))


class InvalidInput(FsmRayError):
    """Raised when an argument cannot be used; nothing was sent or written."""


class InvalidBotName(InvalidInput):
    """Raised when a bot's name has odd characters, or is empty or longer than 64."""


class InvalidKey(InvalidInput):
    """Raised when a key holds something other than the types a key is made of."""


class InvalidState(InvalidInput):
    """Raised when something other than a `State`, or what none can hold, is to be stored."""


class InvalidData(InvalidInput):
    """Raised when data is no mapping with `str` keys, or holds a value that cannot be encoded."""


class InvalidUpdate(InvalidInput):
    """Raised when a key strategy is given something that is no Telegram update."""


class InvalidPatch(InvalidInput):
    """Raised when a patch adds to what is no number, or appends to what is no list; nothing was changed."""

    field: str | None = None
    """Which one."""


class AcrossShards(InvalidInput):
    """Raised when keys of several shards are to be changed together; nothing was changed."""

    shards: tuple[int, ...] | None = None
    """On which the keys are."""


class UnknownFlow(InvalidInput):
    """Raised when a flow is named that is not registered for the bot."""

    flow: str | None = None
    """The name that was given."""
    registered: tuple[str, ...] | None = None
    """The names of the flows that are."""


class UnknownState(InvalidInput):
    """Raised when a state is to be set that its flow does not declare."""

    flow: str | None = None
    """The flow's name."""
    state: str | None = None
    """What it does not declare."""


class PickleNotAllowed(InvalidInput):
    """Raised when a value would need pickle and the bot was made with `allow_pickle=False`."""

    position: Any = None
    """Of a stored value: where a watch can go on, as with `ValueNotDecodable`."""
    version: int | None = None
    """The part of `position` that is of the shard which said so."""


class RecordTooLarge(InvalidInput):
    """Raised when a record would exceed the bot's `max_record_bytes`; the stored one is unchanged."""

    size_bytes: int | None = None
    """What the record would take."""
    max_record_bytes: int | None = None
    """What it may take, as the options of the bot say."""


class FrameTooLarge(InvalidInput):
    """Raised when one operation or answer exceeds what a frame of the channel may hold."""

    size_bytes: int | None = None
    """What it takes."""


class ConfigurationError(FsmRayError):
    """Raised when the setup, not the call, has to be mended."""


class InvalidOptions(ConfigurationError):
    """Raised when the options given to `init` are not valid."""


class InvalidFlow(ConfigurationError):
    """Raised when a `Flow` is declared wrongly, or flows are registered for a bot that cannot be."""

    flow: str | None = None
    """The flow's name."""
    state: str | None = None
    """The state that is wrong, if it is one."""


class OptionsConflict(ConfigurationError):
    """Raised when `init` is given other options than the running bot has; nothing was changed."""

    differences: dict[str, tuple[Any, Any]] | None = None
    """Option name -> (the running bot's value, the value given)."""


class StoreMismatch(ConfigurationError):
    """Raised when a store holds something else than this shard of this bot; nothing was changed."""


class EncryptionKeysUnusable(ConfigurationError):
    """Raised when encryption keys cannot be read, or are not those of the store; nothing was changed."""

    key_id: str | None = None
    """Of the key that is missing or wrong."""


class MissingExtra(ConfigurationError):
    """Raised when an optional dependency is not installed; the message names the `pip install`."""


class RayUnreachable(ConfigurationError):
    """Raised when no Ray cluster answers and none could be started."""


class ProtocolMismatch(ConfigurationError):
    """Raised when a namespace actor speaks another protocol version than this client."""


class StoreCorrupted(FsmRayError):
    """Raised when a store holds what cannot be read; nothing was changed, and nothing is served from it."""


class UnknownBot(FsmRayError):
    """Raised when a bot was never initialised, or was dropped; its store may have a write under way then."""


class InvalidTransition(FsmRayError):
    """Raised when the rules of a flow forbid a step; nothing was changed."""

    flow: str | None = None
    """The active flow."""
    from_state: str | None = None
    """Where the conversation is: its state, or the active flow when another one was to start."""
    to_state: str | None = None
    """Where it was to go: a state, or a flow."""
    allowed: tuple[str, ...] | None = None
    """The states that it may go to from there."""


class TurnLost(FsmRayError):
    """Raised when a turn's conversation is not its own any more as it is committed; nothing was changed."""


class VersionConflict(FsmRayError):
    """Raised when the record's version is not the expected one; nothing was changed."""

    expected_version: int | None = None
    """The version that was given; 0: no record."""
    actual_version: int | None = None
    """The stored record's version, `None` when there is no record."""


class ScanInterrupted(FsmRayError):
    """Raised when the rest of a scan would not show the same moment as what it found before."""


class ChangesMissed(FsmRayError):
    """Raised when changes were made that a watch cannot tell of any more."""

    position: Any = None
    """Where it can go on: the `since` of a new watch."""
    version: int | None = None
    """The part of `position` that is of the shard which said so."""


class StorageClosed(FsmRayError):
    """Raised when a closed storage is used."""


class ValueNotDecodable(FsmRayError):
    """Raised when a stored value cannot be rebuilt here; it is intact; update_data and patch took effect."""

    position: Any = None
    """Where a watch can go on: the `since` of a new one. A scan goes on `after` the error's key."""
    version: int | None = None
    """The part of `position` that is of the shard which said so."""


class NamespaceUnavailable(FsmRayError):
    """Raised when a shard gave no answer within `timeout_s`; nothing was changed, a retry is safe."""

    timeout_s: float | None = None
    """How long it was waited for."""


class StoreUnavailable(NamespaceUnavailable):
    """Raised when a bot's store cannot be reached, is full, or is held by another process."""


class NotOwner(NamespaceUnavailable):
    """Raised when another process opened a bot's store, so that this one stopped answering."""


class Overloaded(NamespaceUnavailable):
    """Raised when a shard or this process has reached a bound of what it queues; nothing was changed."""


class TurnTimeout(NamespaceUnavailable):
    """Raised when other turns kept a conversation for as long as a turn was to wait for it."""


class OutcomeUnknown(NamespaceUnavailable):
    """Raised when a write was under way as `timeout_s` passed: it may or may not have taken effect."""
