"""A bot that registers people again and again, made with aiogram, and the updates that lead it through.

It asks for a name, an age and an email, and has them confirmed. Each handler loads the data, writes to it,
goes on to the next state, and answers; the answers go nowhere. Each also counts up the updates that it has
loaded, so a lost one is found in the end.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, Iterator
from datetime import UTC, datetime
from typing import Any

from aiogram import Bot, Router
from aiogram.client.session.base import BaseSession
from aiogram.filters import CommandStart, StateFilter
from aiogram.fsm.context import FSMContext
from aiogram.fsm.state import State, StatesGroup
from aiogram.methods import TelegramMethod
from aiogram.methods.base import TelegramType
from aiogram.types import Chat, Message, Update

_TOKEN = "42:benchmark"  # noqa: S105 - there is no such bot


class Registration(StatesGroup):
    """How far somebody has come."""

    name = State()
    age = State()
    email = State()
    confirmed = State()
    done = State()


_STATES = (
    Registration.name,
    Registration.age,
    Registration.email,
    Registration.confirmed,
    Registration.done,
)
_ANSWERS = {"name": "Alice Smith", "age": "30", "email": "alice@example.com", "confirmed": "yes"}
_TEXTS = ("/start", *_ANSWERS.values())
_STEPS = {
    state.state: (field, following)
    for state, field, following in zip(_STATES[:-1], _ANSWERS, _STATES[1:], strict=True)
}
"""State -> the field that is asked for in it, and the state after it."""

_COUNT = "updates"


def make_router() -> Router:
    """The bot's handlers."""
    router = Router()
    router.message.register(start, CommandStart())
    for state in _STATES[:-1]:
        router.message.register(answer, StateFilter(state))
    return router


async def start(message: Message, state: FSMContext) -> None:
    """Begin, or begin again; only the count of updates is kept."""
    data = await state.get_data()
    await state.set_data({_COUNT: data.get(_COUNT, 0) + 1})
    await state.set_state(_STATES[0])
    await message.answer("What is your name?")


async def answer(message: Message, state: FSMContext, raw_state: str) -> None:
    """Take an answer, and ask what comes next."""
    field, following = _STEPS[raw_state]
    data = await state.get_data()
    await state.update_data({field: message.text, _COUNT: data[_COUNT] + 1})
    await state.set_state(following)
    await message.answer("Thank you. And now?")


def expected_after(updates: int) -> tuple[str | None, dict[str, Any]]:
    """The state and the data of somebody who has sent so many updates, at least one."""
    answered = (updates - 1) % len(_TEXTS)
    return _STATES[answered].state, dict(list(_ANSWERS.items())[:answered]) | {_COUNT: updates}


def make_bot() -> Bot:
    """The bot, with a session that needs no network."""
    return Bot(_TOKEN, session=_SilentSession())


def updates_of(user: int, bot: Bot) -> Iterator[Update]:
    """What the user sends in a private chat, without end; all of it is made by now."""
    return itertools.cycle([_make_update(user, bot, place) for place in range(len(_TEXTS))])


def _make_update(user: int, bot: Bot, place: int) -> Update:
    message = {
        "message_id": place + 1,
        "date": 1_700_000_000 + place,
        "chat": {"id": user, "type": "private", "first_name": "Alice"},
        "from": {"id": user, "is_bot": False, "first_name": "Alice", "language_code": "en"},
        "text": _TEXTS[place],
    }
    # aiogram keeps what it found out of updates in a dict by their ids: each needs one of its own.
    update_id = user * len(_TEXTS) + place + 1
    return Update.model_validate({"update_id": update_id, "message": message}, context={"bot": bot})


class _SilentSession(BaseSession):
    """Answers each request with the same message."""

    def __init__(self) -> None:
        super().__init__()
        self._sent: Any = Message(message_id=1, date=datetime.now(UTC), chat=Chat(id=1, type="private"))

    async def make_request(
        self,
        bot: Bot,  # noqa: ARG002 - aiogram's signature
        method: TelegramMethod[TelegramType],  # noqa: ARG002
        timeout: int | None = None,  # noqa: ARG002, ASYNC109
    ) -> TelegramType:
        sent: TelegramType = self._sent
        return sent

    async def stream_content(self, *_: Any, **__: Any) -> AsyncGenerator[bytes, None]:
        """Nothing: no files are sent."""
        return
        yield b""

    async def close(self) -> None:
        """Nothing was opened."""
