"""Conversation state of chat bots, kept in Ray named actors: as small as a dict, durable, and fast."""

# The layers, lowest first. A file imports only from those above it in this list.
#
#   errors            every exception, one tree
#   version           which fsm_ray this is, and how what another one pickled is loaded
#   logs              log lines that could come too often, or say too much
#   state             State: flow, state, data, version
#   keys              key strategies: which chats and users share one conversation
#   options           BotOptions, and what a bot may be called
#   flows             Flow: named states and transitions, and the draft that a handler changes
#   codec             keys and values <-> bytes
#   record            the stored form of a State, and the pure changes to it
#   protocol          the operations and the frames that carry them
#   tally             plain numbers of what a shard did, and of what its clients saw
#   stores.owner      who opened a store last
#   stores.base       what a store must do
#   stores.keyring    the keys that a store is encrypted with
#   stores.sealed     the form of what is encrypted, which can be told without keys
#   stores.cipher     AES-GCM over records and the replies to writes
#   stores.encrypted  a store whose records are encrypted on their way to another
#   stores.memory     records that live in the actor alone
#   stores.rocksdb    records on the disk of one node
#   stores.redis      records in Redis or Valkey
#   stores.postgres   records in PostgreSQL, to be queried with SQL
#   stores.objectstore  records in S3, Google or Azure storage, or a shared directory
#   stores.by_url     the store that a bot's options name
#   sessions          what lets a write take effect once, though it may be sent twice
#   namespace         one shard's records: evaluate, commit, answer; turns, expiry, scans, watches
#   channel           frames over a socket: the actor's half and both client halves
#   metrics           tallies, published through Ray to Prometheus; the Grafana dashboard
#   notes             what Ray's control store holds about a bot: versions, options, an upgrade under way
#   hosting           one shard in its process: opened from its store, served, watched over, stopped
#   actor             a shard as a Ray named actor: name, lifetime, restart; found, made and ended
#   upgrade           a bot's actors replaced by ones of another version, one at a time
#   routing           (bot_name, key) -> shard -> connection; reconnects and sends again
#   transaction       writes to conversations of one shard, made together or not at all
#   turn              one worker's exclusive use of a conversation, for as long as it handles an update
#   across            all conversations of a bot at once: to be gone through, counted, and watched
#   storage           Storage and AsyncStorage
#   adapters.access   a bot that an adapter initialises when it is first used
#   adapters.aiogram  RayStorage, RayEventIsolation and RayFSMMiddleware for aiogram
#   adapters.telebot  RayStateStorage and AsyncRayStateStorage for pyTelegramBotAPI
#   adapters.telegram  RayPersistence and RayApplication for python-telegram-bot
#   transfer          export and import, and importers from other storages
#   verification      whether a store holds what shards have written there, without an actor
#   testing           conformance kits, as pytest classes
#   bench             fsm_ray and what one would use instead, side by side
#   demo              real bot workers on a file of Telegram updates
#   cli               the fsm-ray command

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from fsm_ray.version import __version__ as __version__

if TYPE_CHECKING:
    from fsm_ray.across import Change, Conversation
    from fsm_ray.flows import Flow
    from fsm_ray.keys import Chat, ChatTopic, ChatTopicUser, ChatUser, KeyStrategy, User
    from fsm_ray.options import BotOptions
    from fsm_ray.state import State
    from fsm_ray.storage import AsyncStorage, Storage
    from fsm_ray.turn import Turn

__all__ = [
    "AsyncStorage",
    "BotOptions",
    "Change",
    "Chat",
    "ChatTopic",
    "ChatTopicUser",
    "ChatUser",
    "Conversation",
    "Flow",
    "KeyStrategy",
    "State",
    "Storage",
    "Turn",
    "User",
]

_HOMES = {
    "AsyncStorage": "storage",
    "BotOptions": "options",
    "Change": "across",
    "Chat": "keys",
    "ChatTopic": "keys",
    "ChatTopicUser": "keys",
    "ChatUser": "keys",
    "Conversation": "across",
    "Flow": "flows",
    "KeyStrategy": "keys",
    "State": "state",
    "Storage": "storage",
    "Turn": "turn",
    "User": "keys",
}
"""Public name -> its module, imported when the name is first used.

Ray takes more than a second to import, and `fsm-ray --help` shall answer at once.
"""

if not TYPE_CHECKING:  # a type checker would believe that every name is here

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
