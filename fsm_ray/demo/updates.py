"""Updates as Telegram sends them: a crowd that registers with a bot, in many chats at once, from a seed.

The same number and seed give the same updates, on any machine. Their fields are those of the Bot API, so
aiogram, python-telegram-bot and pyTelegramBotAPI all take them.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Iterator
from pathlib import Path
from typing import Any

from fsm_ray.demo import people
from fsm_ray.demo.crowd import JSON, START_DATE, Crowd, Talk
from fsm_ray.demo.people import Action, Chance, Edit, Press, Say
from fsm_ray.errors import InvalidUpdate
from fsm_ray.keys import KeyStrategy, origin_of

BOT: JSON = {
    "id": 7350124816,
    "is_bot": True,
    "first_name": "Registration",
    "username": "fsm_ray_demo_bot",
}

_KEYBOARD: JSON = {
    "inline_keyboard": [[{"text": text, "callback_data": data}] for text, data in people.BUTTONS]
}


class Conversation(KeyStrategy):
    """The key under which aiogram, with `FSMStrategy.USER_IN_TOPIC`, has RayStorage keep the conversation.

    >>> message = {"message_id": 1, "date": 1, "chat": {"id": -100}, "from": {"id": 7}}
    >>> Conversation().extract({"update_id": 1, "message": message})
    (7350124816, -100, 7, None, None, 'default')
    """

    def extract(self, update: Any) -> tuple[Hashable, ...] | None:
        origin = origin_of(update)
        if origin.user_id is None:
            return None
        chat_id = origin.user_id if origin.chat_id is None else origin.chat_id
        return (
            BOT["id"],
            chat_id,
            origin.user_id,
            origin.thread_id,
            origin.business_connection_id,
            "default",
        )


def generate_updates(count: int, seed: int = 0) -> Iterator[JSON]:
    """That many updates, in the order in which Telegram would send them."""
    chance = Chance(seed)
    telegram, crowd = _Telegram(chance), Crowd(chance)
    talks = [crowd.next_talk() for _ in range(max(5, count // 40))]
    for _ in range(count):
        if chance.happens(0.02):
            yield telegram.post(chance.choice(crowd.channels))
            continue
        place = chance.randrange(len(talks))
        while (action := next(talks[place].actions, None)) is None:
            talks[place] = crowd.next_talk()
        yield telegram.act(talks[place], action)


def write_updates(path: Path, updates: Iterable[JSON]) -> None:
    """Write one update a line."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(update, ensure_ascii=False) + "\n" for update in updates)


def read_updates(path: Path) -> list[JSON]:
    """The updates of a file, one a line; blank lines do not count.

    Raises:
        InvalidUpdate: a line is no JSON, or no Telegram update; the message has its number.
    """
    updates = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if line.strip():
            try:
                update = json.loads(line)
                origin_of(update)
            except (ValueError, InvalidUpdate) as error:
                raise InvalidUpdate(f"{path}, line {number}: {error}") from error
            updates.append(update)
    return updates


class _Telegram:
    """Gives dates and ids, and turns what people do into updates."""

    def __init__(self, chance: Chance) -> None:
        self._chance = chance
        self._date = START_DATE
        self._update_id = chance.randrange(10**8, 9 * 10**8)
        self._message_ids: dict[int, int] = {}

    def act(self, talk: Talk, action: Action) -> JSON:
        match action:
            case Say():
                return self._say(talk, action)
            case Edit():
                return self._edit(talk, action)
            case Press():
                return self._press(talk, action)

    def post(self, channel: JSON) -> JSON:
        post: JSON = self._envelope(channel, {}) | {"sender_chat": channel, "text": "Registration is open"}
        if self._chance.happens(0.3):
            post["author_signature"] = "The organisers"
        return self._update("channel_post", post)

    def _say(self, talk: Talk, said: Say) -> JSON:
        chat, text = talk.chat, said.text
        if text.startswith("/") and chat["type"] != "private":
            text += f"@{BOT['username']}"
        message = self._envelope(chat, {"from": talk.user}) | _thread(talk)
        if said.answers and chat["type"] != "private":
            message |= _reply(talk)
        message |= {"text": text} | _entities(text)
        if said.answers:
            talk.answers[said.answers] = message
        update = self._update("message", message)
        talk.question = self._envelope(chat, {"from": BOT}) | _thread(talk)
        return update

    def _edit(self, talk: Talk, edit: Edit) -> JSON:
        message = {name: part for name, part in talk.answers[edit.field].items() if name != "entities"}
        message |= {"edit_date": self._date, "text": edit.text} | _entities(edit.text)
        return self._update("edited_message", message)

    def _press(self, talk: Talk, press: Press) -> JSON:
        message = talk.question | {"text": "Is this right?", "reply_markup": _KEYBOARD}
        if talk.topic is None and self._chance.happens(0.05):
            # What Telegram sends of a message that the bot can no longer see.
            message = {"chat": message["chat"], "message_id": message["message_id"], "date": 0}
        query = {
            "id": str(self._chance.randrange(10**18, 9 * 10**18)),
            "from": talk.user,
            "message": message,
            "chat_instance": str(-talk.chat["id"] * 7919),
            "data": press.data,
        }
        return self._update("callback_query", query)

    def _envelope(self, chat: JSON, sender: JSON) -> JSON:
        return {"message_id": self._next_message_id(chat), **sender, "chat": chat, "date": self._date}

    def _next_message_id(self, chat: JSON) -> int:
        last = self._message_ids.get(chat["id"]) or self._chance.randrange(40, 90_000)
        self._message_ids[chat["id"]] = last + 1
        return last + 1

    def _update(self, kind: str, content: JSON) -> JSON:
        self._update_id += 1
        self._date += self._chance.randrange(3)
        return {"update_id": self._update_id, kind: content}


def _thread(talk: Talk) -> JSON:
    """What makes a message one of a topic."""
    topic = talk.topic
    if topic is None:
        return {}
    # In a topic, a message that answers no other "answers" the one that made the topic.
    return {"message_thread_id": topic["message_id"], "reply_to_message": topic, "is_topic_message": True}


def _reply(talk: Talk) -> JSON:
    """What makes a message a reply to the bot's question."""
    question = {name: part for name, part in talk.question.items() if name != "reply_to_message"}
    reply = {"reply_to_message": question | {"text": "Please tell me"}}
    if talk.topic is None and talk.chat["type"] == "supergroup":
        # Replies make a thread there, which is no topic.
        reply["message_thread_id"] = question["message_id"]
    return reply


def _entities(text: str) -> JSON:
    kinds = {"/": "bot_command", "@": "mention"}
    kind = kinds.get(text[0]) or ("email" if "@example." in text else None)
    return {"entities": [{"offset": 0, "length": len(text), "type": kind}]} if kind else {}
