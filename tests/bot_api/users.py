"""User: somebody who talks to a bot, as a test has it."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable
from typing import TypeVar

from tests.bot_api.bots import Bot, Chat
from tests.bot_api.parameters import JSON
from tests.bot_api.server import DEADLINE_S, BotApi

T = TypeVar("T")

_query_ids = itertools.count(10**17)


class User:
    """A person in one chat with a bot, private or a group. What it waits for must come within a deadline."""

    def __init__(
        self, api: BotApi, user_id: int, *, group: int | None = None, token: str | None = None
    ) -> None:
        """Nothing is sent yet.

        Args:
            api: where the bot is.
            user_id: who this is.
            group: the id of a group, negative, that others may be in too; None: a private chat.
            token: which bot; None: the only one.
        """
        self.identity: JSON = {"id": user_id, "is_bot": False, "first_name": f"User {user_id}"}
        self.chat_id = user_id if group is None else group
        self._api = api
        self._bot = api.bot(token)
        self._heard = 0

    def send(self, text: str) -> JSON:
        """Say something; the update, as the bot will get it."""
        return self._do(self._send(text), f"sending {text!r}")

    def press(self, button: str) -> JSON:
        """Press the button with this text, on the bot's newest message that has one; the update."""
        message, data = self._wait(lambda: self._find_button(button), f"a button {button!r}")
        return self._do(self._press(message, data), f"pressing {button!r}")

    def hear(self, text: str, deadline_s: float = DEADLINE_S) -> JSON:
        """Wait until the bot shows something with this text, behind what was heard before; its message."""
        message, self._heard = self._wait(lambda: self._find(text), f"the bot says {text!r}", deadline_s)
        return message

    def wait_for_answer(self, query: JSON) -> str:
        """Wait until the bot has answered this press of a button; the text that came with it."""
        query_id = query["callback_query"]["id"]
        return self._wait(lambda: self._answer_to(query_id), "an answer to the button")

    @property
    def shown(self) -> list[str]:
        """The texts of all that the bot has shown in this chat: what it sent, and what it edited."""
        return self._do(self._shown(), "what the bot has shown")

    def _find(self, text: str) -> tuple[JSON, int] | None:
        for number, message in enumerate(self._chat().shown[self._heard :], start=self._heard + 1):
            if text in message["text"]:
                return message, number
        return None

    def _find_button(self, text: str) -> tuple[JSON, str] | None:
        for message in reversed(self._chat().messages.values()):
            for button in itertools.chain(*message.get("reply_markup", {}).get("inline_keyboard", [])):
                if button["text"] == text:
                    return message, button["callback_data"]
        return None

    def _answer_to(self, query_id: str) -> str | None:
        texts = [answer["text"] for answer in self._bot.answers if answer["callback_query_id"] == query_id]
        return texts[0] if texts else None

    def _chat(self) -> Chat:
        return chat_of(self._bot, self.chat_id, self.identity)

    async def _send(self, text: str) -> JSON:
        message = self._bot.post(self._chat(), self.identity, text, **_entities(text))
        return self._put("message", message)

    async def _press(self, message: JSON, data: str) -> JSON:
        query: JSON = {
            "id": str(next(_query_ids)),
            "from": self.identity,
            "message": dict(message),
            "chat_instance": str(-self.chat_id),
            "data": data,
        }
        self._bot.queries.add(query["id"])
        return self._put("callback_query", query)

    async def _shown(self) -> list[str]:
        return [message["text"] for message in self._chat().shown]

    def _put(self, kind: str, content: JSON) -> JSON:
        update = self._bot.put(kind, content)
        assert update is not None, f"the bot wants no {kind}: allowed_updates={self._bot.allowed_updates}"
        return update

    def _do(self, work: Awaitable[T], what: str) -> T:
        return self._api.run(work, what)

    def _wait(self, find: Callable[[], T | None], what: str, deadline_s: float = DEADLINE_S) -> T:
        return self._api.run(self._bot.wait_until(find), what, deadline_s)


def chat_of(bot: Bot, chat_id: int, person: JSON) -> Chat:
    """The bot's chat with the person, or the group."""
    if chat_id < 0:
        identity = {"id": chat_id, "type": "supergroup", "title": f"Group {chat_id}"}
    else:
        identity = {"id": chat_id, "type": "private", "first_name": person["first_name"]}
    return bot.chats.setdefault(chat_id, Chat(identity))


def _entities(text: str) -> JSON:
    """Frameworks find commands by these."""
    if not text.startswith("/"):
        return {}
    return {"entities": [{"type": "bot_command", "offset": 0, "length": len(text.split(maxsplit=1)[0])}]}
