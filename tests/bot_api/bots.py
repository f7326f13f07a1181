"""Bot: what Telegram keeps of one bot. It lives on the server's event loop, and is used there alone."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

from tests.bot_api.parameters import JSON, ApiError, bad_request

T = TypeVar("T")

ON_REQUEST = frozenset({"chat_member", "message_reaction", "message_reaction_count"})
"""The types of updates that a bot gets only when it names them."""


@dataclass
class Webhook:
    """Where updates are to be delivered, and how that goes."""

    url: str
    secret_token: str = ""
    max_connections: int = 40
    last_error_date: int | None = None
    last_error_message: str | None = None


@dataclass
class Chat:
    """A chat as one bot sees it."""

    identity: JSON
    messages: dict[int, JSON] = field(default_factory=dict)
    """As they are now, by message_id."""
    shown: list[JSON] = field(default_factory=list)
    """Each message of the bot as it was sent, and once more each time that it was edited."""

    def message(self, message_id: int, purpose: str) -> JSON:
        try:
            return self.messages[message_id]
        except KeyError:
            raise bad_request(f"message to {purpose} not found") from None


class Bot:
    """A bot: its chats, the updates that it has not confirmed, and how it wants them."""

    def __init__(self, token: str) -> None:
        self.token = token
        self.identity: JSON = {
            "id": int(token.partition(":")[0]),
            "is_bot": True,
            "first_name": "Bot",
            "username": f"test_{token.partition(':')[0]}_bot",
        }
        self.chats: dict[int, Chat] = {}
        self.updates: deque[JSON] = deque()
        """Those that are not confirmed, oldest first."""
        self.webhook: Webhook | None = None
        self.allowed_updates: list[str] = []
        self.commands: list[JSON] = []
        self.queries: set[str] = set()
        """The ids of callback queries that wait for their answer."""
        self.answers: list[JSON] = []
        """What callback queries were answered."""
        self.actions: list[JSON] = []
        self._update_ids = itertools.count(500_000_001)
        self._message_ids = itertools.count(1)
        self._poll: asyncio.Future[None] | None = None
        self._changed = asyncio.Event()

    def chat(self, chat_id: int) -> Chat:
        """Raises: ApiError: nobody in it has ever talked to the bot."""
        try:
            return self.chats[chat_id]
        except KeyError:
            raise bad_request("chat not found") from None

    def post(self, chat: Chat, sender: JSON, text: str, **fields: object) -> JSON:
        """A new message in the chat."""
        message: JSON = {
            "message_id": next(self._message_ids),
            "from": sender,
            "chat": chat.identity,
            "date": int(time.time()),
            "text": text,
            **fields,
        }
        chat.messages[message["message_id"]] = message
        return message

    def show(self, chat: Chat, message: JSON) -> None:
        """Note what people see of the bot now."""
        chat.shown.append(dict(message))
        self.tell()

    def put(self, kind: str, content: JSON) -> JSON | None:
        """Deliver an update of this kind; None if the bot does not want such."""
        if kind not in self.allowed_updates and (self.allowed_updates or kind in ON_REQUEST):
            return None
        update = {"update_id": next(self._update_ids), kind: content}
        self.updates.append(update)
        if self._poll is not None and not self._poll.done():
            self._poll.set_result(None)
        self.tell()
        return update

    def confirm(self, offset: int) -> None:
        """Forget the updates before this one; a negative offset counts from the end."""
        if offset < 0:
            offset = self.updates[max(offset, -len(self.updates))]["update_id"] if self.updates else 0
        while self.updates and self.updates[0]["update_id"] < offset:
            self.updates.popleft()
        self.tell()

    async def poll(self, timeout_s: float) -> None:
        """Return as soon as there are updates, at the latest after this time. It ends the poll before it."""
        self.end_poll("other getUpdates request; make sure that only one bot instance is running")
        if self.updates or timeout_s <= 0:
            return
        self._poll = poll = asyncio.get_running_loop().create_future()
        self.tell()
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await poll
        finally:
            if self._poll is poll:
                self._poll = None
            self.tell()

    def end_poll(self, by: str) -> None:
        if self._poll is not None and not self._poll.done():
            self._poll.set_exception(ApiError(409, f"Conflict: terminated by {by}"))
        self._poll = None

    @property
    def is_polled(self) -> bool:
        """Whether a poll waits for updates."""
        return self._poll is not None

    def tell(self) -> None:
        """Wake those who wait for a change."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait_until(self, find: Callable[[], T | None]) -> T:
        """What `find` returns, as soon as that is something."""
        while (found := find()) is None:
            await self._changed.wait()
        return found
