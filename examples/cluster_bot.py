"""A bot on a whole Ray cluster: one poller, and workers that are fed by conversation.

    ray start --head
    BOT_TOKEN=... FSM_RAY_STORE=rocksdb:///var/lib/my_bot python examples/cluster_bot.py

Updates of one conversation are handled in their order, one at a time; those of different ones side by side,
on whichever nodes the workers are. To break it: kill -9 a worker (their process ids are printed), or this
poller, and start that again. You see nothing of it in the chat: what a dead worker had in its hands goes to
another one, and what is handled twice takes effect once.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from collections.abc import Hashable
from typing import Any

import aiohttp
import ray
from ray.exceptions import RayActorError, RayTaskError

from fsm_ray import AsyncStorage, ChatUser, Flow, Turn
from fsm_ray.errors import NamespaceUnavailable, TurnLost

JSON = dict[str, Any]
Call = tuple[str, JSON]
"""A method of the Bot API, and its parameters."""

logger = logging.getLogger(__name__)

BOT = "cluster_bot"
HANDLED_AGAIN = (RayActorError, NamespaceUnavailable, TurnLost)
"""What says that a worker died, or that it could not store what it did."""
KEYBOARD = {
    "inline_keyboard": [
        [{"text": "Yes", "callback_data": "yes"}, {"text": "Start again", "callback_data": "again"}]
    ]
}


class Registration(Flow):
    name = "registration"
    default_state = "name"
    transitions = {  # noqa: RUF012 - a Flow's declaration
        "name": ["email"],
        "email": ["confirm"],
        "confirm": ["done"],
        "done": [],
    }


def respond(turn: Turn, update: JSON) -> list[Call]:
    """The bot itself: what becomes of the conversation, and what is to be said then."""
    if "callback_query" in update:
        return respond_to_button(turn, update["callback_query"])
    message = update.get("message", {})
    answer = respond_to_text(turn, message.get("text", ""))
    return [("sendMessage", {"chat_id": message["chat"]["id"], **answer})] if answer else []


def respond_to_text(turn: Turn, text: str) -> JSON:
    answer: JSON = {}
    match text, turn.state:
        case "/start", _:
            turn.clear_flow()
            turn.start_flow(Registration)
            answer["text"] = "What is your name?"
        case "/cancel", _:
            turn.clear_flow()
            answer["text"] = "Forgotten. /start begins again."
        case "/status", _:
            known = ", ".join(f"{name}: {turn.data[name]}" for name in ("name", "email") if name in turn.data)
            answer["text"] = known or "I know nothing about you. /start begins."
        case name, "name" if name:
            turn.update_data(name=name)
            turn.transition("email")
            answer["text"] = "What is your email?"
        case email, "email" if "@" in email:
            turn.update_data(email=email)
            turn.transition("confirm")
            answer["text"] = f"{turn.data['name']}, {email}: is that right?"
            answer["reply_markup"] = KEYBOARD
        case _, "email":
            answer["text"] = "That is no email address."
    return answer


def respond_to_button(turn: Turn, query: JSON) -> list[Call]:
    message = query["message"]
    answer: Call = ("answerCallbackQuery", {"callback_query_id": query["id"]})
    here = {"chat_id": message["chat"]["id"]}
    match query["data"], turn.state:
        case "yes", "confirm":
            turn.transition("done")
            welcome = {"message_id": message["message_id"], "text": f"Welcome, {turn.data['name']}!"}
            return [answer, ("editMessageText", here | welcome)]
        case "again", "confirm":
            turn.start_flow(Registration)
            return [answer, ("sendMessage", here | {"text": "What is your name?"})]
    return [answer]


class Telegram:
    """The Bot API, as a function of a method's name and parameters."""

    def __init__(self, token: str, api_base: str) -> None:
        self._base = f"{api_base}/bot{token}"
        self._session: aiohttp.ClientSession | None = None

    async def __call__(self, method: str, **parameters: Any) -> Any:
        """The result; where Telegram asks for patience, or cannot be reached, after a while.

        Raises:
            ValueError: Telegram refuses the call.
        """
        if self._session is None:
            self._session = aiohttp.ClientSession()
        while True:
            try:
                async with self._session.post(f"{self._base}/{method}", json=parameters) as response:
                    answer = await response.json()
            except (aiohttp.ClientError, TimeoutError) as error:
                logger.warning("%s: %s", method, type(error).__name__)  # its text may show the token
                await asyncio.sleep(1)
                continue
            if answer["ok"]:
                return answer["result"]
            retry_after_s = answer.get("parameters", {}).get("retry_after")
            if retry_after_s is None:
                raise ValueError(f"{method}: {answer['description']}")
            await asyncio.sleep(retry_after_s)


@ray.remote(num_cpus=0, max_restarts=-1, scheduling_strategy="SPREAD")
class Worker:
    """Handles updates of any conversation. All that it knows is in the storage, so another one can go on."""

    def __init__(self, token: str, api_base: str) -> None:
        self._storage = AsyncStorage()
        self._storage.register_flows(BOT, Registration)
        self._telegram = Telegram(token, api_base)

    async def handle(self, key: Hashable, update: JSON) -> None:
        """What is to be said is stored with the new state, and said then, by the next worker if need be.

        So an update takes effect once. Only when a worker dies between saying something and noting that it
        did, it is said again: Telegram does not let a message be sent under a number.
        """
        async with self._storage.turn(BOT, key, update_id=update["update_id"]) as turn:
            if not turn.was_handled and (calls := respond(turn, update)):
                turn.data["outbox"] = [*turn.data.get("outbox", []), *calls]
        if "outbox" in turn.data:
            await self._send(turn.data["outbox"])
            await self._storage.patch(BOT, key, unset=["outbox"])

    async def pid(self) -> int:
        """This process, once the bot's actor has answered it."""
        await self._storage.position(BOT)
        return os.getpid()

    async def _send(self, calls: list[Call]) -> None:
        for method, parameters in calls:
            try:
                await self._telegram(method, **parameters)
            except ValueError as error:  # such as a button that was pressed long ago
                logger.warning("%s", error)


class Crew:
    """The workers."""

    def __init__(self, size: int, token: str, api_base: str) -> None:
        self.workers = deque(Worker.remote(token, api_base) for _ in range(size))

    async def handle_in_order(self, key: Hashable, updates: list[JSON]) -> None:
        for update in updates:
            while not await self._handle(key, update):
                pass

    async def _handle(self, key: Hashable, update: JSON) -> bool:
        """Give it to the next worker; False if that one is lost, or what it did."""
        self.workers.rotate()
        try:
            await self.workers[0].handle.remote(key, update)
        except HANDLED_AGAIN as error:
            logger.warning("update %d goes to another worker: %s", update["update_id"], type(error).__name__)
            return False
        except RayTaskError:
            logger.exception("update %d failed", update["update_id"])
        return True


async def poll(telegram: Telegram, crew: Crew) -> None:
    """Have all updates handled, for ever.

    An update is confirmed when it has been handled, so that Telegram sends it again if this process dies.
    For that, the next updates are fetched when all of the last ones are done; a worker that must wait for
    something slow had better start a task of its own.
    """
    offset = 0
    while True:
        updates = await telegram("getUpdates", offset=offset, timeout=30)
        conversations: dict[Hashable, list[JSON]] = {}
        for update in updates:
            key = ChatUser().extract(update)
            if key is not None:  # a channel's posts are nobody's conversation
                conversations.setdefault(key, []).append(update)
            offset = update["update_id"] + 1
        await asyncio.gather(*(crew.handle_in_order(*each) for each in conversations.items()))


async def main() -> None:
    logging.basicConfig(level=logging.INFO)
    token, api_base = os.environ["BOT_TOKEN"], os.environ.get("API_BASE", "https://api.telegram.org")
    async with AsyncStorage() as storage:
        await storage.init(BOT, store=os.environ.get("FSM_RAY_STORE", "memory://"))
        crew = Crew(int(os.environ.get("WORKERS", "3")), token, api_base)
        for worker in crew.workers:
            logger.info("a worker is process %d", await worker.pid.remote())
        await poll(Telegram(token, api_base), crew)


if __name__ == "__main__":
    asyncio.run(main())
