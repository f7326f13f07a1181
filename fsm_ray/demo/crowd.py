"""Who talks to the bot, and where: users and chats as the Bot API describes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from fsm_ray.demo import people
from fsm_ray.demo.people import Action, Chance

JSON = dict[str, Any]

START_DATE = 1_767_254_400  # 2026-01-01 08:00 UTC


@dataclass
class Talk:
    """One person in one place, and what they have said there."""

    user: JSON
    chat: JSON
    topic: JSON | None
    """The message that made the topic, when the place is one."""
    actions: Iterator[Action]
    answers: dict[str, JSON] = field(default_factory=dict)
    """Field -> the message that answered it last."""
    question: JSON = field(default_factory=dict)
    """The bot's latest message to the person."""


class Crowd:
    """Who talks where. A person may talk in several places, but in each only once."""

    def __init__(self, chance: Chance) -> None:
        self._chance = chance
        self._users: list[JSON] = []
        self._taken: set[tuple[int, int, int]] = set()
        self._groups = [_group(chance, f"Meetup {city}") for city in ("Berlin", "Lagos", "Osaka")]
        self._supergroups = [_supergroup(chance, name) for name in ("Python", "Ray", "Chess", "Jazz", "Bots")]
        forums = [_forum(chance, name) for name in ("Conference", "School")]
        self._topics = [_topic(forum, name) for forum in forums for name in ("Tickets", "Talks", "Travel")]
        self.channels = [_channel(chance, name) for name in ("News", "Releases")]

    def next_talk(self) -> Talk:
        while True:
            user = self._next_user()
            chat, topic = self._place(user)
            taken = (user["id"], chat["id"], topic["message_id"] if topic else 0)
            if taken not in self._taken:
                self._taken.add(taken)
                wants_nothing = chat["type"] != "private" and self._chance.happens(0.2)
                script = people.small_talk if wants_nothing else people.registration
                return Talk(user, chat, topic, script(self._chance))

    def _next_user(self) -> JSON:
        if self._users and self._chance.happens(0.25):
            return self._chance.choice(self._users)
        self._users.append(_user(self._chance))
        return self._users[-1]

    def _place(self, user: JSON) -> tuple[JSON, JSON | None]:
        kind = self._chance.choices(
            ("private", "group", "supergroup", "topic", "forum"), (50, 10, 15, 22, 3)
        )[0]
        if kind == "private":
            return _private(user), None
        if kind == "group":
            return self._chance.choice(self._groups), None
        if kind == "supergroup":
            return self._chance.choice(self._supergroups), None
        topic = self._chance.choice(self._topics)
        # A forum's topic "General" is none to the Bot API: its messages say nothing of a topic.
        return topic["chat"], topic if kind == "topic" else None


def _user(chance: Chance) -> JSON:
    first_name, last_name = chance.choice(people.FIRST_NAMES), chance.choice(people.LAST_NAMES)
    user: JSON = {"id": chance.randrange(10**8, 8 * 10**9), "is_bot": False, "first_name": first_name}
    if chance.happens(0.7):
        user["last_name"] = last_name
    if chance.happens(0.6):
        user["username"] = f"user_{user['id'] % 100_000}"
    if chance.happens(0.8):
        user["language_code"] = chance.choice(("en", "de", "pl", "uk", "pt-br", "zh-hans", "ar"))
    if chance.happens(0.1):
        user["is_premium"] = True
    return user


def _private(user: JSON) -> JSON:
    names: JSON = {name: user[name] for name in ("first_name", "last_name", "username") if name in user}
    return {"id": user["id"], **names, "type": "private"}


def _group(chance: Chance, title: str) -> JSON:
    return {"id": -chance.randrange(10**8, 5 * 10**9), "title": title, "type": "group"}


def _supergroup(chance: Chance, title: str) -> JSON:
    return {"id": -(10**12) - chance.randrange(10**9, 4 * 10**9), "title": title, "type": "supergroup"}


def _channel(chance: Chance, title: str) -> JSON:
    return _supergroup(chance, title) | {"type": "channel", "username": f"demo_{title.lower()}"}


def _forum(chance: Chance, title: str) -> JSON:
    return _supergroup(chance, title) | {"is_forum": True}


def _topic(forum: JSON, name: str) -> JSON:
    """The message that made the topic; its id is the topic's."""
    message_id = 3 + len(name)
    return {
        "message_id": message_id,
        "from": {"id": 1_087_968_824, "is_bot": True, "first_name": "Group", "username": "GroupAnonymousBot"},
        "chat": forum,
        "date": START_DATE - 86_400,
        "message_thread_id": message_id,
        "forum_topic_created": {"name": name, "icon_color": 7_322_096},
        "is_topic_message": True,
    }
