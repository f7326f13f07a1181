"""ExGram FSM v0.1.0's tests of middleware, helpers, integration and dispatch, asked of turns and of storage.

A test of theirs is a test here, but for what a draft alone proves in test_flows, and for what has no
counterpart: a turn hands on no options, and has no list of states or default state besides its flow's.
"""
# ruff: noqa: RUF012  # a flow's declaration is a plain dict; what the class keeps of it is immutable

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import pytest

from fsm_ray import AsyncStorage, Chat, ChatTopic, ChatTopicUser, ChatUser, KeyStrategy, State, Storage, User
from fsm_ray.errors import InvalidTransition, UnknownFlow, UnknownState
from fsm_ray.flows import Draft, Flow, Policy
from fsm_ray.testing import AnyStorage, Blocking
from fsm_ray.turn import Turn

pytestmark = pytest.mark.ray

BOT = "exgram"
GROUP = -100
CHANNEL = -200

Update = dict[str, Any]


class Registration(Flow):
    name = "registration"
    default_state = "get_name"
    transitions = {
        "get_name": ["get_email"],
        "get_email": ["confirm", "get_name"],
        "confirm": ["done", "get_name"],
        "done": [],
    }


class Settings(Flow):
    name = "settings"
    default_state = "choose_language"
    transitions = {"choose_language": ["confirm_language"], "confirm_language": ["choose_language"]}


class Free(Flow):
    states = ["a", "b", "c"]


class NoDefault(Flow):
    name = "no_default"
    transitions = {"step_one": ["step_two"], "step_two": []}


FLOWS = (Registration, Settings, Free, NoDefault)


@pytest.fixture(scope="module", autouse=True)
def _bot(cluster: object) -> Iterator[None]:
    with Storage() as storage:
        storage.init(BOT)
        yield
        storage.drop(BOT)


@pytest.fixture(params=[Storage, AsyncStorage], ids=["blocking", "async"])
def storage(request: pytest.FixtureRequest) -> Iterator[AnyStorage]:
    made = request.param()
    made.register_flows(BOT, *FLOWS)
    if isinstance(made, Storage):
        yield made
        made.close()
    else:
        blocking = Blocking(made)
        yield blocking
        blocking.stop()


_ids = itertools.count(1)


@pytest.fixture
def user() -> int:
    """Somebody new."""
    return next(_ids)


@pytest.fixture
def key(user: int) -> tuple[int, int]:
    """Of the user's private chat."""
    return (user, user)


# Updates as Telegram sends them


def update(kind: str, event: Update) -> Update:
    return {"update_id": next(_ids), kind: event}


def message(text: str, user: int, chat: int | None = None, topic: int | None = None) -> Update:
    """In the user's private chat, or in a group, or a topic of it."""
    where = user if chat is None else chat
    kind = "private" if where > 0 else "supergroup"
    said = {
        "message_id": 1,
        "date": 1,
        "chat": {"id": where, "type": kind},
        "from": {"id": user},
        "text": text,
    }
    if topic is not None:
        said |= {"message_thread_id": topic, "is_topic_message": True}
    return update("message", said)


def inline_query(user: int) -> Update:
    return update("inline_query", {"id": "1", "from": {"id": user}, "query": "cats", "offset": ""})


def channel_post(text: str) -> Update:
    chat = {"id": CHANNEL, "type": "channel"}
    return update("channel_post", {"message_id": 1, "date": 1, "chat": chat, "text": text})


# A bot: what its middleware and its dispatcher do with an update


def handle(storage: AnyStorage, update: Update, strategy: KeyStrategy | None = None) -> str:
    """Find the update's conversation, handle it in a turn, and return what the bot says."""
    key = (strategy or ChatUser()).extract(update)
    if key is None:
        return "nobody's"
    with storage.turn(BOT, key, update_id=update["update_id"]) as turn:
        text: str = update.get("message", {}).get("text", "")
        return COMMANDS.get(text, answer)(turn, text)


def register(turn: Turn, _text: str) -> str:
    turn.start_flow(Registration)
    return "Your name?"


def cancel(turn: Turn, _text: str) -> str:
    if turn.get_flow() is None:
        return "Nothing to cancel."
    turn.clear_flow()
    return "Cancelled."


def status(turn: Turn, _text: str) -> str:
    return f"{turn.get_flow()}: {turn.get_state()}, {turn.get_data()}"


def settings(turn: Turn, _text: str) -> str:
    turn.start_flow("settings")
    return "Which language?"


def answer(turn: Turn, text: str) -> str:
    if turn.is_in(Registration, "get_name"):
        turn.update_data(name=text)
        turn.transition("get_email")
        return "Your email?"
    if turn.is_in(Registration, "get_email"):
        turn.update_data(email=text)
        turn.transition("confirm")
        return f"{turn.data['name']}, {text}?"
    if turn.is_in(Registration, "confirm"):
        turn.transition("done" if text == "yes" else "get_name")
        return "Welcome!" if text == "yes" else "Your name?"
    if turn.is_in(Settings, "choose_language"):
        turn.update_data(language=text)
        turn.transition("confirm_language")
        return f"{text}?"
    return "Say /register."


COMMANDS: dict[str, Callable[[Turn, str], str]] = {
    "/register": register,
    "/cancel": cancel,
    "/status": status,
    "/settings": settings,
}


def stored(storage: AnyStorage, key: Hashable) -> tuple[str | None, str | None, dict[str, Any]] | None:
    """Flow, state and data; None: there is no record."""
    found = storage.get_state(BOT, key)
    return None if found is None else (found.flow, found.state, found.data)


def version_of(storage: AnyStorage, key: Hashable) -> int | None:
    found = storage.get_state(BOT, key)
    return None if found is None else found.version


def put(storage: AnyStorage, key: Hashable, flow: str | None, state: str | None, **data: Any) -> None:
    storage.set_state(BOT, key, State(flow=flow, state=state, data=data))


def in_turn(storage: AnyStorage, key: Hashable, *steps: Callable[[Turn], object]) -> None:
    with storage.turn(BOT, key) as turn:
        for step in steps:
            step(turn)


class TestMiddleware:
    def test_a_new_user_s_turn_is_empty(self, storage: AnyStorage, key: tuple[int, int]) -> None:
        with storage.turn(BOT, key) as turn:
            assert (turn.get_flow(), turn.get_state(), turn.get_data(), turn.version) == (
                None,
                None,
                {},
                None,
            )

        assert stored(storage, key) is None

    def test_a_turn_knows_its_bot_key_and_update(self, storage: AnyStorage, user: int) -> None:
        said = message("hello", user)

        with storage.turn(BOT, ChatUser().extract(said), update_id=said["update_id"]) as turn:
            assert (turn.bot, turn.key, turn.update_id) == (BOT, (user, user), said["update_id"])
            assert turn.was_handled is False

    def test_no_flow_is_registered_until_one_is(self, key: tuple[int, int]) -> None:
        with Storage() as storage, storage.turn(BOT, key) as turn:
            with pytest.raises(UnknownFlow, match="registered: none"):
                turn.start_flow("registration")
            assert turn.transition("any_state") is True

    def test_flows_are_registered_for_one_bot(self, storage: AnyStorage, key: tuple[int, int]) -> None:
        storage.register_flows("another", Registration)
        storage.register_flows(BOT)

        with storage.turn(BOT, key) as turn, pytest.raises(UnknownFlow):
            turn.start_flow(Registration)

    def test_a_turn_loads_what_is_stored(self, storage: AnyStorage, key: tuple[int, int]) -> None:
        put(storage, key, "registration", "get_email", name="Ada")

        with storage.turn(BOT, key) as turn:
            assert (turn.get_flow(), turn.get_state()) == ("registration", "get_email")
            assert turn.get_data() == {"name": "Ada"}
            assert turn.version == version_of(storage, key)

    @pytest.mark.parametrize(
        ("strategy", "chat", "topic", "expected"),
        [
            (ChatUser(), None, None, lambda user: (user, user)),
            (ChatUser(), GROUP, None, lambda user: (GROUP, user)),
            (User(), GROUP, None, lambda user: (user,)),
            (Chat(), GROUP, None, lambda _: (GROUP,)),
            (ChatTopic(), GROUP, 5, lambda _: (GROUP, 5)),
            (ChatTopicUser(), GROUP, 5, lambda user: (GROUP, 5, user)),
        ],
        ids=["private", "group", "user", "chat", "topic", "topic-user"],
    )
    def test_a_message_is_of_the_conversation_that_the_strategy_says(
        self,
        *,
        storage: AnyStorage,
        user: int,
        strategy: KeyStrategy,
        chat: int | None,
        topic: int | None,
        expected: Callable[[int], Hashable],
    ) -> None:
        key = expected(user)
        storage.clear(BOT, key)

        handle(storage, message("/register", user, chat, topic), strategy)

        assert stored(storage, key) == ("registration", "get_name", {})

    def test_an_inline_query_is_of_the_user_s_conversation_in_no_chat(
        self, storage: AnyStorage, user: int
    ) -> None:
        put(storage, (0, user), "registration", "get_name")

        handle(storage, inline_query(user))

        assert stored(storage, (0, user)) == ("registration", "get_email", {"name": ""})

    def test_a_channel_post_is_of_no_conversation_and_harms_nobody(self, storage: AnyStorage) -> None:
        before = storage.count(BOT)

        assert handle(storage, channel_post("/register")) == "nobody's"
        assert storage.count(BOT) == before

    def test_a_forbidden_step_raises_unless_said_otherwise_and_nothing_is_stored(
        self, storage: AnyStorage, key: tuple[int, int]
    ) -> None:
        put(storage, key, "registration", "get_name")

        with pytest.raises(InvalidTransition):
            in_turn(
                storage, key, lambda turn: turn.update_data(name="Ada"), lambda turn: turn.transition("done")
            )

        assert stored(storage, key) == ("registration", "get_name", {})


class TestHelpers:
    """What each helper leaves in the storage."""

    @pytest.mark.parametrize(
        ("helper", "expected"),
        [
            (lambda turn: turn.start_flow("registration"), ("registration", "get_name", {})),
            (lambda turn: turn.set_state("done"), ("registration", "done", {"name": "Ada"})),
            (
                lambda turn: turn.set_state("choose_language", flow=Settings),
                ("settings", "choose_language", {"name": "Ada"}),
            ),
            (lambda turn: turn.transition("confirm"), ("registration", "confirm", {"name": "Ada"})),
            (lambda turn: turn.update_data(name="Bob"), ("registration", "get_email", {"name": "Bob"})),
            (
                lambda turn: turn.update_data({"email": "a@b"}),
                ("registration", "get_email", {"name": "Ada", "email": "a@b"}),
            ),
            (Turn.clear_flow, None),
        ],
        ids=["start_flow", "set_state", "set_state-flow", "transition", "overwrite", "merge", "clear_flow"],
    )
    def test_a_helper_s_effect_is_stored_and_is_there_in_the_next_turn(
        self, storage: AnyStorage, key: tuple[int, int], helper: Callable[[Turn], object], expected: Any
    ) -> None:
        put(storage, key, "registration", "get_email", name="Ada")

        in_turn(storage, key, helper)

        assert stored(storage, key) == expected
        with storage.turn(BOT, key) as turn:
            assert (turn.get_flow(), turn.get_state(), turn.get_data()) == (expected or (None, None, {}))

    @pytest.mark.parametrize(
        ("helper", "expected"),
        [
            (lambda turn: turn.start_flow("registration"), ("registration", "get_name", {})),
            (lambda turn: turn.start_flow("no_default"), ("no_default", None, {})),
            (lambda turn: turn.set_state("confirm", flow="registration"), ("registration", "confirm", {})),
            (lambda turn: turn.transition("anywhere"), (None, "anywhere", {})),
            (lambda turn: turn.update_data(name="Ada"), (None, None, {"name": "Ada"})),
            (Turn.clear_flow, None),
        ],
        ids=["start_flow", "no-default", "set_state-flow", "transition", "update_data", "clear_flow"],
    )
    def test_a_helper_s_effect_on_a_new_conversation_is_stored(
        self, storage: AnyStorage, key: tuple[int, int], helper: Callable[[Turn], object], expected: Any
    ) -> None:
        in_turn(storage, key, helper)

        assert stored(storage, key) == expected

    @pytest.mark.parametrize(
        ("helper", "error"),
        [
            (lambda turn: turn.start_flow("unknown"), UnknownFlow),
            (lambda turn: turn.start_flow("settings"), InvalidTransition),
            (lambda turn: turn.set_state("unknown"), UnknownState),
            (lambda turn: turn.set_state("a", flow="unknown"), UnknownFlow),
            (lambda turn: turn.transition("done"), InvalidTransition),
        ],
        ids=["unknown-flow", "other-flow", "unknown-state", "state-of-unknown-flow", "transition"],
    )
    def test_a_helper_that_raises_undoes_the_whole_turn(
        self,
        storage: AnyStorage,
        key: tuple[int, int],
        helper: Callable[[Turn], object],
        error: type[Exception],
    ) -> None:
        put(storage, key, "registration", "get_email", name="Ada")
        before = version_of(storage, key)

        with pytest.raises(error):
            in_turn(storage, key, lambda turn: turn.update_data(name="Eve"), helper)

        assert stored(storage, key) == ("registration", "get_email", {"name": "Ada"})
        assert version_of(storage, key) == before

    @pytest.mark.parametrize(
        ("helper", "flow", "state", "step"),
        [
            (
                lambda turn: turn.start_flow("settings"),
                "registration",
                "get_name",
                ("registration", "settings"),
            ),
            (lambda turn: turn.set_state("get_name"), None, None, (None, "get_name")),
            (lambda turn: turn.transition("done"), "registration", "get_name", ("get_name", "done")),
        ],
        ids=["start_flow", "set_state", "transition"],
    )
    @pytest.mark.parametrize("policy", ["raise", "log", "ignore", "callable"])
    def test_a_forbidden_step_does_what_the_registered_policy_says(
        self,
        *,
        storage: AnyStorage,
        key: tuple[int, int],
        caplog: pytest.LogCaptureFixture,
        policy: str,
        helper: Callable[[Turn], object],
        flow: str | None,
        state: str | None,
        step: tuple[str | None, str],
    ) -> None:
        def note(draft: Draft, from_: str | None, to: str) -> None:
            draft.update_data(refused=[from_, to])

        put(storage, key, flow, state, name="Ada")
        policies: dict[str, Policy] = {"raise": "raise", "log": "log", "ignore": "ignore", "callable": note}
        storage.register_flows(BOT, *FLOWS, on_invalid_transition=policies[policy])
        said = None

        with caplog.at_level(logging.WARNING, "fsm_ray.flows"):
            try:
                with storage.turn(BOT, key) as turn:
                    turn.update_data(seen=True)
                    assert helper(turn) is False
            except InvalidTransition as error:
                said = (error.from_state, error.to_state)

        data = {
            "raise": {"name": "Ada"},
            "log": {"name": "Ada", "seen": True},
            "ignore": {"name": "Ada", "seen": True},
            "callable": {"name": "Ada", "seen": True, "refused": list(step)},
        }
        assert stored(storage, key) == (flow, state, data[policy])
        assert said == (step if policy == "raise" else None)
        assert len(caplog.records) == (policy == "log")

    def test_clearing_an_idle_conversation_stores_nothing(
        self, storage: AnyStorage, key: tuple[int, int]
    ) -> None:
        before = storage.count(BOT)

        for _ in range(2):
            in_turn(storage, key, Turn.clear_flow)

        assert stored(storage, key) is None
        assert storage.count(BOT) == before

    def test_the_steps_of_one_turn_add_up_to_one_version(
        self, storage: AnyStorage, key: tuple[int, int]
    ) -> None:
        with storage.turn(BOT, key) as turn:
            turn.start_flow("registration")
            turn.update_data(name="Ada")
            turn.transition("get_email")
            turn.update_data(email="ada@example.org")
            turn.transition("confirm")
        first = turn.version or 0
        with storage.turn(BOT, key) as turn:
            turn.transition("done")
            turn.update_data(sure=True)

        data = {"name": "Ada", "email": "ada@example.org", "sure": True}
        assert stored(storage, key) == ("registration", "done", data)
        assert turn.version == version_of(storage, key) == first + 1

    def test_a_flow_can_be_cleared_after_its_steps_and_another_begun(
        self, storage: AnyStorage, key: tuple[int, int]
    ) -> None:
        with storage.turn(BOT, key) as turn:
            turn.start_flow("registration")
            turn.update_data(name="Ada")
            turn.clear_flow()
            turn.start_flow("settings")

        assert stored(storage, key) == ("settings", "choose_language", {})


class TestIntegration:
    def test_flow_and_state_and_data_persist_across_updates(self, storage: AnyStorage, user: int) -> None:
        handle(storage, message("/register", user))
        handle(storage, message("Ada", user))

        with Storage() as another, another.turn(BOT, (user, user)) as turn:
            assert (turn.get_flow(), turn.get_state()) == ("registration", "get_email")
            assert turn.get_data() == {"name": "Ada"}

    def test_users_of_one_chat_do_not_interfere(self, storage: AnyStorage, user: int) -> None:
        other = next(_ids)

        handle(storage, message("/register", user, GROUP))
        handle(storage, message("/settings", other, GROUP))
        handle(storage, message("Ada", user, GROUP))

        assert stored(storage, (GROUP, user)) == ("registration", "get_email", {"name": "Ada"})
        assert stored(storage, (GROUP, other)) == ("settings", "choose_language", {})

    def test_a_user_has_a_conversation_in_each_chat(self, storage: AnyStorage, user: int) -> None:
        handle(storage, message("/register", user))
        handle(storage, message("/settings", user, GROUP))
        handle(storage, message("Ada", user))

        assert stored(storage, (user, user)) == ("registration", "get_email", {"name": "Ada"})
        assert stored(storage, (GROUP, user)) == ("settings", "choose_language", {})

    def test_a_registration_is_gone_through_from_beginning_to_end(
        self, storage: AnyStorage, user: int
    ) -> None:
        said = [
            handle(storage, message(text, user)) for text in ("/register", "Ada", "ada@example.org", "yes")
        ]

        assert said == ["Your name?", "Your email?", "Ada, ada@example.org?", "Welcome!"]
        data = {"name": "Ada", "email": "ada@example.org"}
        assert stored(storage, (user, user)) == ("registration", "done", data)

    def test_a_flow_begun_during_another_is_refused_by_the_policy(
        self, storage: AnyStorage, user: int
    ) -> None:
        handle(storage, message("/register", user))

        with pytest.raises(InvalidTransition, match="'settings' cannot start while 'registration' is active"):
            handle(storage, message("/settings", user))
        assert stored(storage, (user, user)) == ("registration", "get_name", {})

    def test_each_flow_has_transitions_of_its_own(self, storage: AnyStorage, key: tuple[int, int]) -> None:
        put(storage, key, "settings", "choose_language")

        in_turn(storage, key, lambda turn: turn.transition("confirm_language"))
        with pytest.raises(InvalidTransition):
            in_turn(storage, key, lambda turn: turn.transition("get_email"))

        assert stored(storage, key) == ("settings", "confirm_language", {})

    def test_a_redelivered_update_changes_nothing(self, storage: AnyStorage, user: int) -> None:
        handle(storage, message("/register", user))
        name = message("Ada", user)
        handle(storage, name)

        handle(storage, name)

        assert stored(storage, (user, user)) == ("registration", "get_email", {"name": "Ada"})


class TestDispatch:
    def test_register_begins_the_flow(self, storage: AnyStorage, user: int) -> None:
        assert handle(storage, message("/register", user)) == "Your name?"
        assert stored(storage, (user, user)) == ("registration", "get_name", {})

    def test_an_answer_that_is_not_confirmed_leads_back(self, storage: AnyStorage, user: int) -> None:
        texts = ("/register", "Ade", "ada@example.org", "no", "Ada", "ada@example.org", "yes")

        said = [handle(storage, message(text, user)) for text in texts]

        assert said[3:5] == ["Your name?", "Your email?"]
        assert stored(storage, (user, user)) == (
            "registration",
            "done",
            {"name": "Ada", "email": "ada@example.org"},
        )

    def test_cancel_ends_the_flow_in_its_middle_and_removes_the_record(
        self, storage: AnyStorage, user: int
    ) -> None:
        for text in ("/register", "Ada"):
            handle(storage, message(text, user))

        assert handle(storage, message("/cancel", user)) == "Cancelled."
        assert stored(storage, (user, user)) is None
        assert handle(storage, message("/cancel", user)) == "Nothing to cancel."
        assert handle(storage, message("/settings", user)) == "Which language?"

    def test_status_tells_where_the_conversation_is_and_changes_nothing(
        self, storage: AnyStorage, user: int
    ) -> None:
        said = [handle(storage, message("/status", user))]
        for text in ("/register", "Ada"):
            handle(storage, message(text, user))
        said.append(handle(storage, message("/status", user)))

        assert said == ["None: None, {}", "registration: get_email, {'name': 'Ada'}"]
        assert stored(storage, (user, user)) == ("registration", "get_email", {"name": "Ada"})

    def test_settings_is_a_flow_of_its_own(self, storage: AnyStorage, user: int) -> None:
        said = [handle(storage, message(text, user)) for text in ("/settings", "English")]

        assert said == ["Which language?", "English?"]
        assert stored(storage, (user, user)) == ("settings", "confirm_language", {"language": "English"})

    def test_whoever_is_in_no_flow_is_told_how_to_begin(self, storage: AnyStorage, user: int) -> None:
        assert handle(storage, message("hello", user)) == "Say /register."
        assert stored(storage, (user, user)) is None
