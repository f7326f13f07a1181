"""Key strategies: which chats and users share one conversation."""

from __future__ import annotations

import copy
import logging
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import aiogram.types
import pytest
import telebot.types
import telegram
from hypothesis import given
from hypothesis import strategies as st

from fsm_ray import keys
from fsm_ray.errors import InvalidUpdate
from fsm_ray.keys import Chat, ChatTopic, ChatTopicUser, ChatUser, KeyStrategy, Origin, User, origin_of

if TYPE_CHECKING:
    from collections.abc import Callable

JSON = dict[str, Any]

STRATEGIES: tuple[KeyStrategy, ...] = (ChatUser(), User(), Chat(), ChatTopic(), ChatTopicUser())

ANN, GROUP, TOPIC = 7, -100, 5

USER_JSON: JSON = {"id": ANN, "is_bot": False, "first_name": "Ann", "language_code": "de"}
GROUP_JSON: JSON = {"id": GROUP, "type": "supergroup", "title": "Group"}
CHANNEL_JSON: JSON = {"id": GROUP, "type": "channel", "title": "Channel"}
PRIVATE_JSON: JSON = {"id": ANN, "type": "private", "first_name": "Ann"}

IN_TOPIC: JSON = {"is_topic_message": True, "message_thread_id": TOPIC}
IN_REPLY_THREAD: JSON = {"message_thread_id": TOPIC}

MESSAGE: JSON = {"message_id": 1, "date": 1, "chat": GROUP_JSON, "from": USER_JSON, "text": "hi"}
POST: JSON = {"message_id": 1, "date": 1, "chat": CHANNEL_JSON, "text": "hi"}
INACCESSIBLE: JSON = {"message_id": 1, "date": 0, "chat": GROUP_JSON}
CALLBACK: JSON = {"id": "1", "from": USER_JSON, "chat_instance": "1", "data": "x"}
INLINE_QUERY: JSON = {"id": "1", "from": USER_JSON, "query": "x", "offset": ""}
MEMBER: JSON = {"status": "member", "user": USER_JSON}
MEMBER_UPDATED: JSON = {
    "chat": GROUP_JSON,
    "from": USER_JSON,
    "date": 1,
    "old_chat_member": MEMBER,
    "new_chat_member": MEMBER,
}
REACTION: JSON = {"chat": GROUP_JSON, "message_id": 1, "date": 1, "old_reaction": [], "new_reaction": []}
POLL_ANSWER: JSON = {"poll_id": "1", "option_ids": [0], "option_persistent_ids": ["a"]}
POLL: JSON = {
    "id": "1",
    "question": "?",
    "options": [],
    "total_voter_count": 0,
    "is_closed": False,
    "is_anonymous": True,
    "type": "regular",
    "allows_multiple_answers": False,
    "allows_revoting": False,
    "members_only": False,
}
PAYMENT: JSON = {"id": "1", "from": USER_JSON, "invoice_payload": "x", "currency": "XTR", "total_amount": 1}
ADDRESS: JSON = {
    "country_code": "DE",
    "state": "",
    "city": "Bonn",
    "street_line1": "1",
    "street_line2": "",
    "post_code": "1",
}
BOOST_SOURCE: JSON = {"source": "premium", "user": USER_JSON}
BOOST: JSON = {"boost_id": "1", "add_date": 1, "expiration_date": 2, "source": BOOST_SOURCE}

# What the five strategies answer, in the order of STRATEGIES.
Keys = tuple[tuple[int, ...] | None, ...]
TOPIC_KEYS: Keys = ((GROUP, ANN), (ANN,), (GROUP,), (GROUP, TOPIC), (GROUP, TOPIC, ANN))
GROUP_KEYS: Keys = ((GROUP, ANN), (ANN,), (GROUP,), (GROUP, 0), (GROUP, 0, ANN))
PRIVATE_KEYS: Keys = ((ANN, ANN), (ANN,), (ANN,), (ANN, 0), (ANN, 0, ANN))
PRIVATE_TOPIC_KEYS: Keys = ((ANN, ANN), (ANN,), (ANN,), (ANN, TOPIC), (ANN, TOPIC, ANN))
ONLY_USER_KEYS: Keys = ((0, ANN), (ANN,), None, None, None)
ONLY_CHAT_KEYS: Keys = (None, None, (GROUP,), (GROUP, 0), None)
ONLY_TOPIC_KEYS: Keys = (None, None, (GROUP,), (GROUP, TOPIC), None)
NO_KEYS: Keys = (None,) * 5

UPDATES: dict[str, tuple[str, JSON, Keys]] = {
    "message": ("message", MESSAGE, GROUP_KEYS),
    "message in private": ("message", MESSAGE | {"chat": PRIVATE_JSON}, PRIVATE_KEYS),
    "message in a topic": ("message", MESSAGE | IN_TOPIC, TOPIC_KEYS),
    "message in a private topic": (
        "message",
        MESSAGE | IN_TOPIC | {"chat": PRIVATE_JSON},
        PRIVATE_TOPIC_KEYS,
    ),
    "message in a thread of replies": ("message", MESSAGE | IN_REPLY_THREAD, GROUP_KEYS),
    "edited message": ("edited_message", MESSAGE | {"edit_date": 2}, GROUP_KEYS),
    "edited message in a topic": ("edited_message", MESSAGE | IN_TOPIC | {"edit_date": 2}, TOPIC_KEYS),
    "channel post": ("channel_post", POST, ONLY_CHAT_KEYS),
    "edited channel post": ("edited_channel_post", POST | {"edit_date": 2}, ONLY_CHAT_KEYS),
    "channel post in a topic": ("channel_post", POST | IN_TOPIC, ONLY_TOPIC_KEYS),
    "business message": ("business_message", MESSAGE | {"business_connection_id": "b"}, GROUP_KEYS),
    "business message in a topic": ("business_message", MESSAGE | IN_TOPIC, TOPIC_KEYS),
    "edited business message": ("edited_business_message", MESSAGE | {"edit_date": 2}, GROUP_KEYS),
    "edited business message in a topic": ("edited_business_message", MESSAGE | IN_TOPIC, TOPIC_KEYS),
    "deleted business messages": (
        "deleted_business_messages",
        {"business_connection_id": "b", "chat": GROUP_JSON, "message_ids": [1]},
        ONLY_CHAT_KEYS,
    ),
    "business connection": (
        "business_connection",
        {"id": "b", "user": USER_JSON, "user_chat_id": ANN, "date": 1, "is_enabled": True},
        ONLY_USER_KEYS,
    ),
    "guest message": ("guest_message", MESSAGE | {"guest_query_id": "1"}, GROUP_KEYS),
    "guest message in a topic": ("guest_message", MESSAGE | IN_TOPIC | {"guest_query_id": "1"}, TOPIC_KEYS),
    "callback": ("callback_query", CALLBACK | {"message": MESSAGE}, GROUP_KEYS),
    "callback in a topic": ("callback_query", CALLBACK | {"message": MESSAGE | IN_TOPIC}, TOPIC_KEYS),
    "callback in a thread of replies": (
        "callback_query",
        CALLBACK | {"message": MESSAGE | IN_REPLY_THREAD},
        GROUP_KEYS,
    ),
    "callback of an inaccessible message": (
        "callback_query",
        CALLBACK | {"message": INACCESSIBLE},
        GROUP_KEYS,
    ),
    "callback of an inline message": (
        "callback_query",
        CALLBACK | {"inline_message_id": "1"},
        ONLY_USER_KEYS,
    ),
    "inline query": ("inline_query", INLINE_QUERY, ONLY_USER_KEYS),
    "chosen inline result": (
        "chosen_inline_result",
        {"result_id": "1", "from": USER_JSON, "query": "x"},
        ONLY_USER_KEYS,
    ),
    "pre-checkout query": ("pre_checkout_query", PAYMENT, ONLY_USER_KEYS),
    "shipping query": (
        "shipping_query",
        {"id": "1", "from": USER_JSON, "invoice_payload": "x", "shipping_address": ADDRESS},
        ONLY_USER_KEYS,
    ),
    "purchased paid media": (
        "purchased_paid_media",
        {"from": USER_JSON, "paid_media_payload": "x"},
        ONLY_USER_KEYS,
    ),
    "subscription": (
        "subscription",
        {"user": USER_JSON, "invoice_payload": "x", "state": "active"},
        ONLY_USER_KEYS,
    ),
    "managed bot": (
        "managed_bot",
        {"user": USER_JSON, "bot": {"id": 99, "is_bot": True, "first_name": "Bot"}},
        ONLY_USER_KEYS,
    ),
    "chat member": ("chat_member", MEMBER_UPDATED, GROUP_KEYS),
    "bot's own membership": ("my_chat_member", MEMBER_UPDATED, GROUP_KEYS),
    "join request": (
        "chat_join_request",
        {"chat": GROUP_JSON, "from": USER_JSON, "user_chat_id": ANN, "date": 1},
        GROUP_KEYS,
    ),
    "reaction": ("message_reaction", REACTION | {"user": USER_JSON}, GROUP_KEYS),
    "anonymous reaction": ("message_reaction", REACTION | {"actor_chat": CHANNEL_JSON}, ONLY_CHAT_KEYS),
    "reaction count": (
        "message_reaction_count",
        {"chat": GROUP_JSON, "message_id": 1, "date": 1, "reactions": []},
        ONLY_CHAT_KEYS,
    ),
    "poll": ("poll", POLL, NO_KEYS),
    "poll answer of a user": ("poll_answer", POLL_ANSWER | {"user": USER_JSON}, ONLY_USER_KEYS),
    "poll answer of a chat": ("poll_answer", POLL_ANSWER | {"voter_chat": CHANNEL_JSON}, ONLY_CHAT_KEYS),
    "boost": ("chat_boost", {"chat": CHANNEL_JSON, "boost": BOOST}, ONLY_CHAT_KEYS),
    "removed boost": (
        "removed_chat_boost",
        {"chat": CHANNEL_JSON, "boost_id": "1", "remove_date": 2, "source": BOOST_SOURCE},
        ONLY_CHAT_KEYS,
    ),
    "stopped generation": (
        "stopped_message_generation",
        {"chat": PRIVATE_JSON, "draft_id": 1},
        PRIVATE_KEYS,
    ),
    "stopped generation in a topic": (
        "stopped_message_generation",
        {"chat": PRIVATE_JSON, "draft_id": 1, "message_thread_id": TOPIC},
        PRIVATE_TOPIC_KEYS,
    ),
}


def as_json(update: JSON) -> Any:
    return update


def as_aiogram(update: JSON) -> Any:
    return aiogram.types.Update.model_validate(update)


def as_aiogram_dump(update: JSON) -> Any:
    return as_aiogram(update).model_dump()


def as_telegram(update: JSON) -> Any:
    return telegram.Update.de_json(update, None)


def as_telebot(update: JSON) -> Any:
    if media := update.get("purchased_paid_media"):
        # Its PaidMediaPurchased.de_json asks for "from_user", which Telegram never sends: KeyError in 4.37.1.
        media["from_user"] = media.pop("from")
    return telebot.types.Update.de_json(update)  # type: ignore[no-untyped-call]


KNOWN_TO: dict[Callable[[JSON], Any], Callable[[str], bool]] = {
    as_json: lambda _: True,
    as_aiogram: lambda update_type: update_type in aiogram.types.Update.model_fields,
    as_aiogram_dump: lambda update_type: update_type in aiogram.types.Update.model_fields,
    as_telegram: lambda update_type: hasattr(telegram.Update, update_type),
    as_telebot: lambda update_type: hasattr(as_telebot({"update_id": 1}), update_type),
}


def make_update(update_type: str, event: object) -> JSON:
    return {"update_id": 1, update_type: copy.deepcopy(event)}


def keys_of(update: Any) -> Keys:
    return tuple(strategy.extract(update) for strategy in STRATEGIES)  # type: ignore[misc]


class TestEveryUpdate:
    @pytest.mark.parametrize("name", UPDATES)
    @pytest.mark.parametrize("represent", KNOWN_TO)
    def test_keys_are_the_same_in_every_representation(
        self, name: str, represent: Callable[[JSON], Any]
    ) -> None:
        update_type, event, expected = UPDATES[name]
        if not KNOWN_TO[represent](update_type):
            expected = NO_KEYS

        assert keys_of(represent(make_update(update_type, event))) == expected

    def test_every_update_type_of_aiogram_is_covered(self) -> None:
        update_types = aiogram.types.Update.model_fields.keys() - {"update_id"}

        assert update_types <= keys._WHERE.keys()

    def test_every_update_type_covered_is_tested(self) -> None:
        assert keys._WHERE.keys() == {update_type for update_type, _, _ in UPDATES.values()}

    def test_fields_that_are_null_count_as_absent(self) -> None:
        update = dict.fromkeys(keys._WHERE, None) | make_update(
            "poll_answer", UPDATES["poll answer of a user"][1]
        )

        assert keys_of(update) == ONLY_USER_KEYS

    def test_asking_pytelegrambotapi_for_an_inaccessible_message_logs_nothing(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        update = as_telebot(make_update("callback_query", CALLBACK | {"message": INACCESSIBLE}))

        with caplog.at_level(logging.DEBUG, logger="TeleBot"):
            keys_of(update)

        assert caplog.records == []


class TestChatUser:
    def test_private_message_gives_chat_and_user(self) -> None:
        assert ChatUser().extract(make_update("message", MESSAGE | {"chat": PRIVATE_JSON})) == (ANN, ANN)

    def test_group_message_gives_chat_and_user(self) -> None:
        assert ChatUser().extract(make_update("message", MESSAGE)) == (GROUP, ANN)

    def test_callback_in_a_group_gives_chat_and_user(self) -> None:
        update = make_update("callback_query", CALLBACK | {"message": MESSAGE})

        assert ChatUser().extract(update) == (GROUP, ANN)

    def test_inline_query_gives_chat_0_and_user(self) -> None:
        assert ChatUser().extract(make_update("inline_query", INLINE_QUERY)) == (0, ANN)

    def test_channel_post_has_no_key(self) -> None:
        assert ChatUser().extract(make_update("channel_post", POST)) is None

    def test_signed_channel_post_with_a_user_gives_chat_and_user(self) -> None:
        assert ChatUser().extract(make_update("channel_post", POST | {"from": USER_JSON})) == (GROUP, ANN)


class TestUser:
    def test_message_gives_user(self) -> None:
        assert User().extract(make_update("message", MESSAGE)) == (ANN,)

    def test_inline_query_gives_user(self) -> None:
        assert User().extract(make_update("inline_query", INLINE_QUERY)) == (ANN,)

    def test_channel_post_has_no_key(self) -> None:
        assert User().extract(make_update("channel_post", POST)) is None


class TestChat:
    def test_message_gives_chat(self) -> None:
        assert Chat().extract(make_update("message", MESSAGE)) == (GROUP,)

    def test_channel_post_gives_chat(self) -> None:
        assert Chat().extract(make_update("channel_post", POST)) == (GROUP,)

    def test_inline_query_has_no_key(self) -> None:
        assert Chat().extract(make_update("inline_query", INLINE_QUERY)) is None


class TestChatTopic:
    def test_message_in_a_topic_gives_chat_and_topic(self) -> None:
        assert ChatTopic().extract(make_update("message", MESSAGE | IN_TOPIC)) == (GROUP, TOPIC)

    def test_message_outside_topics_gives_chat_and_0(self) -> None:
        assert ChatTopic().extract(make_update("message", MESSAGE)) == (GROUP, 0)

    def test_callback_in_a_topic_gives_chat_and_topic(self) -> None:
        update = make_update("callback_query", CALLBACK | {"message": MESSAGE | IN_TOPIC})

        assert ChatTopic().extract(update) == (GROUP, TOPIC)

    def test_callback_outside_topics_gives_chat_and_0(self) -> None:
        update = make_update("callback_query", CALLBACK | {"message": MESSAGE})

        assert ChatTopic().extract(update) == (GROUP, 0)

    def test_inline_query_has_no_key(self) -> None:
        assert ChatTopic().extract(make_update("inline_query", INLINE_QUERY)) is None


class TestChatTopicUser:
    def test_message_in_a_topic_gives_chat_topic_and_user(self) -> None:
        assert ChatTopicUser().extract(make_update("message", MESSAGE | IN_TOPIC)) == (GROUP, TOPIC, ANN)

    def test_message_outside_topics_gives_chat_0_and_user(self) -> None:
        assert ChatTopicUser().extract(make_update("message", MESSAGE)) == (GROUP, 0, ANN)

    def test_callback_in_a_topic_gives_chat_topic_and_user(self) -> None:
        update = make_update("callback_query", CALLBACK | {"message": MESSAGE | IN_TOPIC})

        assert ChatTopicUser().extract(update) == (GROUP, TOPIC, ANN)

    def test_callback_outside_topics_gives_chat_0_and_user(self) -> None:
        update = make_update("callback_query", CALLBACK | {"message": MESSAGE})

        assert ChatTopicUser().extract(update) == (GROUP, 0, ANN)

    def test_channel_post_has_no_key(self) -> None:
        assert ChatTopicUser().extract(make_update("channel_post", POST)) is None

    def test_inline_query_has_no_key(self) -> None:
        assert ChatTopicUser().extract(make_update("inline_query", INLINE_QUERY)) is None


class TestTopics:
    @pytest.mark.parametrize("guard", [{}, {"is_topic_message": False}, {"is_topic_message": None}])
    @pytest.mark.parametrize(
        "update_type", ["message", "edited_message", "business_message", "guest_message"]
    )
    def test_a_thread_of_replies_is_the_same_conversation_as_its_chat(
        self, update_type: str, guard: JSON
    ) -> None:
        update = make_update(update_type, MESSAGE | IN_REPLY_THREAD | guard)

        assert keys_of(update) == GROUP_KEYS

    def test_an_edited_message_is_of_the_conversation_of_the_message(self) -> None:
        assert keys_of(make_update("edited_message", MESSAGE | IN_TOPIC)) == keys_of(
            make_update("message", MESSAGE | IN_TOPIC)
        )

    def test_stopping_a_generation_is_of_the_conversation_of_the_message_that_asked_for_it(self) -> None:
        stopped = {"chat": PRIVATE_JSON, "draft_id": 1, "message_thread_id": TOPIC}

        assert keys_of(make_update("stopped_message_generation", stopped)) == keys_of(
            make_update("message", MESSAGE | IN_TOPIC | {"chat": PRIVATE_JSON})
        )

    def test_stopping_a_generation_outside_private_chats_names_no_user(self) -> None:
        update = make_update("stopped_message_generation", {"chat": GROUP_JSON, "draft_id": 1})

        assert keys_of(update) == ONLY_CHAT_KEYS


class TestCustomStrategies:
    def test_a_subclass_can_use_whatever_the_user_object_holds(self) -> None:
        class UserAndLanguage(KeyStrategy):
            def extract(self, update: aiogram.types.Update) -> tuple[int, str | None] | None:
                user = origin_of(update).user
                return None if user is None else (user.id, user.language_code)

        assert UserAndLanguage().extract(as_aiogram(make_update("message", MESSAGE))) == (ANN, "de")
        assert UserAndLanguage().extract(as_aiogram(make_update("channel_post", POST))) is None

    def test_any_object_with_extract_is_a_strategy(self) -> None:
        class Everyone:
            def extract(self, update: object) -> tuple[str]:
                return ("everyone",)

        strategy: KeyStrategy = Everyone()

        assert strategy.extract(make_update("poll", POLL)) == ("everyone",)

    def test_a_subclass_without_extract_cannot_be_made(self) -> None:
        class Unfinished(KeyStrategy):
            pass

        with pytest.raises(TypeError, match="extract"):
            Unfinished()  # type: ignore[abstract]

    @pytest.mark.parametrize("represent", KNOWN_TO)
    @pytest.mark.parametrize("name", ["business message", "deleted business messages"])
    def test_chats_of_a_business_account_can_be_told_apart_from_the_bots_own(
        self, name: str, represent: Callable[[JSON], Any]
    ) -> None:
        update_type, event, _ = UPDATES[name]

        origin = origin_of(represent(make_update(update_type, event)))

        assert (origin.business_connection_id, origin.chat_id) == ("b", GROUP)

    def test_the_origin_of_a_callback_of_a_business_message_names_the_connection(self) -> None:
        message = MESSAGE | IN_TOPIC | {"business_connection_id": "b"}
        update = make_update("callback_query", CALLBACK | {"message": message})

        assert origin_of(update) == Origin(
            chat_id=GROUP,
            user_id=ANN,
            thread_id=TOPIC,
            business_connection_id="b",
            chat=GROUP_JSON,
            user=USER_JSON,
        )


class TestUnknownUpdates:
    @pytest.mark.parametrize("update", [{"update_id": 1}, make_update("future", MESSAGE)])
    @pytest.mark.parametrize("represent", KNOWN_TO)
    def test_an_update_of_an_unknown_type_has_no_key(
        self, update: JSON, represent: Callable[[JSON], Any]
    ) -> None:
        assert keys_of(represent(copy.deepcopy(update))) == NO_KEYS
        assert origin_of(represent(copy.deepcopy(update))) == Origin()


class TestInvalidUpdates:
    @pytest.mark.parametrize(
        "update",
        [
            None,
            1,
            "message",
            b"{}",
            [],
            (),
            {},
            {"message": MESSAGE},
            {"update_id": "1", "message": MESSAGE},
            {"update_id": True, "message": MESSAGE},
            [make_update("message", MESSAGE)],
            object(),
            telegram.Update,
            aiogram.types.Update,
            as_aiogram(make_update("message", MESSAGE)).message,
            as_telegram(make_update("message", MESSAGE)).message,
            as_telebot(make_update("message", MESSAGE)).message,
        ],
        ids=lambda update: repr(update)[:20],
    )
    @pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: type(strategy).__name__)
    def test_what_is_no_update_is_refused_with_a_word_on_what_is_expected(
        self, strategy: KeyStrategy, update: object
    ) -> None:
        with pytest.raises(InvalidUpdate, match=r"expected a Telegram update.*not \w+"):
            strategy.extract(update)

    @pytest.mark.parametrize(
        ("update_type", "event"),
        [
            ("message", "hi"),
            ("message", 1),
            ("message", False),
            ("message", []),
            ("message", {}),
            ("message", {"from": USER_JSON}),
            ("message", MESSAGE | {"chat": GROUP}),
            ("message", MESSAGE | {"chat": {}}),
            ("message", MESSAGE | {"chat": {"id": str(GROUP)}}),
            ("message", MESSAGE | {"chat": {"id": float(GROUP)}}),
            ("message", MESSAGE | {"chat": {"id": True}}),
            ("message", MESSAGE | {"from": "Ann"}),
            ("message", MESSAGE | {"from": {"id": None}}),
            ("message", MESSAGE | {"is_topic_message": True, "message_thread_id": "5"}),
            ("message", MESSAGE | {"business_connection_id": 5}),
            ("callback_query", CALLBACK | {"message": "hi"}),
            ("callback_query", CALLBACK | {"message": {}}),
            ("callback_query", {"id": "1"}),
            ("inline_query", "x"),
            ("inline_query", {"query": "x"}),
            ("poll_answer", POLL_ANSWER),
            ("stopped_message_generation", {"chat": "Ann"}),
        ],
    )
    @pytest.mark.parametrize("as_objects", [False, True])
    def test_a_malformed_update_is_refused_with_its_id_and_type(
        self, update_type: str, event: object, *, as_objects: bool
    ) -> None:
        update = make_update(update_type, event)

        for strategy in STRATEGIES:
            with pytest.raises(InvalidUpdate, match=f"update 1: malformed {update_type}: .+"):
                strategy.extract(to_object(update) if as_objects else update)

    def test_an_object_in_a_dict_is_refused(self) -> None:
        message = as_aiogram(make_update("message", MESSAGE)).message

        with pytest.raises(InvalidUpdate, match="malformed message"):
            ChatUser().extract({"update_id": 1, "message": message})


def to_object(json: Any) -> Any:
    """The object that a framework would make of the JSON."""
    if not isinstance(json, dict):
        return json
    parts = {"from_user" if name == "from" else name: to_object(part) for name, part in json.items()}
    return SimpleNamespace(**parts)


NAMES = [
    *keys._WHERE,
    *(
        "chat",
        "from",
        "user",
        "voter_chat",
        "actor_chat",
        "id",
        "type",
        "date",
        "update_id",
        "boost",
        "source",
    ),
    *("is_topic_message", "message_thread_id", "business_connection_id"),
]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just("private")
ANY_JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=6),
    max_leaves=12,
)
CHATS = st.fixed_dictionaries({"id": st.integers() | SCALARS}, optional={"type": SCALARS})
MESSAGES = st.fixed_dictionaries(
    {},
    optional={
        "chat": CHATS | ANY_JSON,
        "from": CHATS | ANY_JSON,
        "date": SCALARS,
        "is_topic_message": SCALARS,
        "message_thread_id": SCALARS,
        "business_connection_id": SCALARS,
    },
)
PARTS = CHATS | MESSAGES | ANY_JSON
EVENTS = MESSAGES | st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("chat", "from", "user", "voter_chat", "message"), PARTS)
)


def outcome(strategy: KeyStrategy, update: object) -> Any:
    try:
        return strategy.extract(update)
    except InvalidUpdate:
        return InvalidUpdate


class TestAnyJson:
    @given(ANY_JSON)
    def test_any_json_gives_a_key_or_none_or_invalid_update(self, update: object) -> None:
        for strategy in STRATEGIES:
            key = outcome(strategy, update)

            assert key in (None, InvalidUpdate) or all(type(part) is int for part in key)

    @given(st.sampled_from(sorted(keys._WHERE)), EVENTS | ANY_JSON)
    def test_any_event_has_the_same_outcome_as_json_and_as_objects(
        self, update_type: str, event: object
    ) -> None:
        update = {"update_id": 1, update_type: event}

        for strategy in STRATEGIES:
            key = outcome(strategy, update)

            assert key in (None, InvalidUpdate) or all(type(part) is int for part in key)
            assert outcome(strategy, to_object(update)) == key
