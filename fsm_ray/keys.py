"""Key strategies: which chats and users share one conversation.

The same event gives the same key however the update is held: as a dict (Telegram's JSON), or as the `Update`
of aiogram, python-telegram-bot or pyTelegramBotAPI. An update of a type not known here has no key.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from fsm_ray.errors import InvalidUpdate


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an update comes from; what the update does not say is `None`."""

    chat_id: int | None = None
    user_id: int | None = None
    """Who caused the update. Anonymous admins are all one user to Telegram; most channel posts have none."""
    thread_id: int | None = None
    """The topic, of a forum or of a private chat with topics. Threads of replies are no topics."""
    business_connection_id: str | None = None
    """Set when the chat is one of a business account; the bot itself may have a chat of the same id."""
    chat: Any = None
    """The chat as the update holds it: a dict, or an object of the framework."""
    user: Any = None
    """The user as the update holds it."""


class KeyStrategy(Protocol):
    """Turns an update into its conversation's key; subclass it, or write any object with such an `extract`.

    Examples:
        >>> class UserAndLanguage(KeyStrategy):
        ...     def extract(self, update):
        ...         user = origin_of(update).user
        ...         return None if user is None else (user["id"], user["language_code"])
        >>> sender = {"id": 7, "language_code": "de"}
        >>> UserAndLanguage().extract({"update_id": 1, "inline_query": {"id": "1", "from": sender}})
        (7, 'de')
    """

    @abstractmethod
    def extract(self, update: Any) -> tuple[Hashable, ...] | None:
        """The key of the update's conversation, `None` when it belongs to none under this strategy.

        Raises:
            InvalidUpdate: this is no Telegram update, or a malformed one.
        """


class ChatUser(KeyStrategy):
    """`(chat_id, user_id)`, the default: each user has a conversation of their own in each chat.

    The chat is 0 where the update names none, as an inline query does; no key without a user.

    Examples:
        >>> message = {"message_id": 1, "date": 1, "chat": {"id": -100}, "from": {"id": 7}}
        >>> ChatUser().extract({"update_id": 1, "message": message})
        (-100, 7)
    """

    def extract(self, update: Any) -> tuple[int, int] | None:
        origin = origin_of(update)
        return None if origin.user_id is None else (origin.chat_id or 0, origin.user_id)


class User(KeyStrategy):
    """`(user_id,)`: each user has one conversation, the same in every chat; no key without a user."""

    def extract(self, update: Any) -> tuple[int] | None:
        origin = origin_of(update)
        return None if origin.user_id is None else (origin.user_id,)


class Chat(KeyStrategy):
    """`(chat_id,)`: all of a chat share one conversation; no key without a chat."""

    def extract(self, update: Any) -> tuple[int] | None:
        origin = origin_of(update)
        return None if origin.chat_id is None else (origin.chat_id,)


class ChatTopic(KeyStrategy):
    """`(chat_id, thread_id)`: all in a topic share one conversation; no key without a chat.

    The thread is 0 outside topics.
    """

    def extract(self, update: Any) -> tuple[int, int] | None:
        origin = origin_of(update)
        return None if origin.chat_id is None else (origin.chat_id, origin.thread_id or 0)


class ChatTopicUser(KeyStrategy):
    """`(chat_id, thread_id, user_id)`: each user has a conversation of their own in each topic.

    The thread is 0 outside topics; no key without both a chat and a user.
    """

    def extract(self, update: Any) -> tuple[int, int, int] | None:
        origin = origin_of(update)
        if origin.chat_id is None or origin.user_id is None:
            return None
        return (origin.chat_id, origin.thread_id or 0, origin.user_id)


def origin_of(update: Any) -> Origin:
    """Where the update comes from; all `None` for a poll and for a type of update not known here.

    Raises:
        InvalidUpdate: this is no Telegram update, or a malformed one.
    """
    get: _Get = dict.get if isinstance(update, dict) else getattr
    update_id = get(update, "update_id", None)
    if type(update_id) is not int:
        raise InvalidUpdate(
            "expected a Telegram update, whole: a dict with update_id, or the Update of aiogram, "
            f"python-telegram-bot or pyTelegramBotAPI; not {type(update).__name__}"
        )
    for update_type, where in _WHERE.items():
        event = get(update, update_type, None)
        if event is not None:
            try:
                return _origin(event, where, get)
            except TypeError as error:
                raise InvalidUpdate(f"update {update_id}: malformed {update_type}: {error}") from error
    return Origin()


# dict.get or getattr: what a part of an update holds under a name. dict.get refuses a part that is no dict.
_Get = Callable[[Any, str, None], Any]


class _Where(NamedTuple):
    """Where one type of update says who and where, in the names of Telegram's JSON; `None`: nowhere."""

    chat: str | None
    user: str | None
    message: str | None = None
    """What holds the chat, and maybe a topic and a business connection: `itself`, or its part `message`."""


# fmt: off
_WHERE = {  # searched in this order, so the frequent come first; an update holds at most one of these
    # type of update                     chat          user    message
    "message":                    _Where("chat",       "from", "itself"),
    "callback_query":             _Where("chat",       "from", "message"),
    "edited_message":             _Where("chat",       "from", "itself"),
    "inline_query":               _Where(None,         "from"),
    "channel_post":               _Where("chat",       "from", "itself"),
    "business_message":           _Where("chat",       "from", "itself"),
    "chat_member":                _Where("chat",       "from"),
    "my_chat_member":             _Where("chat",       "from"),
    "message_reaction":           _Where("chat",       "user"),  # without a user when anonymous
    "poll_answer":                _Where("voter_chat", "user"),  # the one or the other
    "edited_channel_post":        _Where("chat",       "from", "itself"),
    "edited_business_message":    _Where("chat",       "from", "itself"),
    "deleted_business_messages":  _Where("chat",       None,   "itself"),
    "chat_join_request":          _Where("chat",       "from"),
    "chosen_inline_result":       _Where(None,         "from"),
    "pre_checkout_query":         _Where(None,         "from"),
    "shipping_query":             _Where(None,         "from"),
    "purchased_paid_media":       _Where(None,         "from"),
    "message_reaction_count":     _Where("chat",       None),
    "poll":                       _Where(None,         None),
    "business_connection":        _Where(None,         "user"),
    "chat_boost":                 _Where("chat",       None),    # boost.source.user may only be the receiver
    "removed_chat_boost":         _Where("chat",       None),
    "guest_message":              _Where("chat",       "from", "itself"),
    "managed_bot":                _Where(None,         "user"),  # the owner, not the bot
    "subscription":               _Where(None,         "user"),
    "stopped_message_generation": _Where("chat",       "chat", "itself"),  # private: its id is the user's
}
# fmt: on


def _origin(event: Any, where: _Where, get: _Get) -> Origin:
    place = get(event, "message", None) if where.message == "message" else event
    chat = _chat(place, where, get)
    user = _user(event, where, get)
    if chat is None and user is None and where.user is not None:
        raise TypeError("it names no user")
    # Date 0 marks an inaccessible message. It has nothing but its chat, and pyTelegramBotAPI logs a warning
    # whenever one asks it for more.
    accessible = where.message is not None and place is not None and get(place, "date", None) != 0
    return Origin(
        chat_id=_id(chat, get),
        user_id=_id(user, get),
        thread_id=_thread_id(place, where, get) if accessible else None,
        business_connection_id=_business_connection_id(place, get) if accessible else None,
        chat=chat,
        user=user,
    )


def _chat(place: Any, where: _Where, get: _Get) -> Any:
    if place is None or where.chat is None:
        return None
    chat = get(place, where.chat, None)
    if chat is None and where.chat == "chat":
        raise TypeError("it names no chat")
    return chat


def _user(event: Any, where: _Where, get: _Get) -> Any:
    if where.user is None:
        return None
    if where.user == "from":  # a keyword, so the frameworks say from_user, and so does aiogram's model_dump
        user = get(event, "from_user", None)
        return get(event, "from", None) if user is None and get is not getattr else user
    user = get(event, where.user, None)
    return user if where.user == "user" or get(user, "type", None) == "private" else None


def _thread_id(message: Any, where: _Where, get: _Get) -> int | None:
    # Replies in ordinary groups have a message_thread_id too (tdlib/telegram-bot-api#447), hence the guard.
    # A stopped generation lacks is_topic_message and needs none: all threads of private chats are topics.
    if not (get(message, "is_topic_message", None) or where.user == "chat"):
        return None
    thread_id: int | None = get(message, "message_thread_id", None)
    if thread_id is not None and type(thread_id) is not int:
        raise TypeError(f"message_thread_id is no int but {type(thread_id).__name__}")
    return thread_id


def _business_connection_id(message: Any, get: _Get) -> str | None:
    connection_id: str | None = get(message, "business_connection_id", None)
    if connection_id is not None and type(connection_id) is not str:
        raise TypeError(f"business_connection_id is no str but {type(connection_id).__name__}")
    return connection_id


def _id(part: Any, get: _Get) -> int | None:
    if part is None:
        return None
    value = get(part, "id", None)
    if type(value) is not int:
        raise TypeError(f"an id is no int but {type(value).__name__}")
    return value
