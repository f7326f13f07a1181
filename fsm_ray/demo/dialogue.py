"""The bot: an aiogram dispatcher that registers people, and a session that needs no network.

It asks for name, age and email, has them confirmed by a button, and takes corrections: by the buttons, by
editing an earlier answer, by beginning again. It knows nothing of fsm_ray: any storage of aiogram will do.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from aiogram import Bot, Dispatcher, F
from aiogram.client.session.base import BaseSession
from aiogram.dispatcher.event.bases import UNHANDLED
from aiogram.filters import Command, CommandStart, StateFilter
from aiogram.fsm.context import FSMContext
from aiogram.fsm.state import State, StatesGroup
from aiogram.fsm.storage.base import BaseStorage
from aiogram.fsm.strategy import FSMStrategy
from aiogram.methods import GetMe, SendMessage, TelegramMethod
from aiogram.methods.base import TelegramType
from aiogram.types import (
    CallbackQuery,
    Chat,
    ErrorEvent,
    InlineKeyboardButton,
    InlineKeyboardMarkup,
    Message,
    Update,
    User,
)
from pydantic import ValidationError

from fsm_ray.demo.crowd import JSON
from fsm_ray.demo.people import BUTTONS, CHANGE, CONFIRM
from fsm_ray.demo.updates import BOT
from fsm_ray.errors import FsmRayError, InvalidUpdate

logger = logging.getLogger(__name__)

MAX_AGE = 120

_FAILED = object()


class Registration(StatesGroup):
    """How far somebody has come."""

    name = State()
    age = State()
    email = State()
    confirm = State()
    done = State()


@dataclass(frozen=True)
class Question:
    """What the bot asks, and how it reads the answer: None if it is none."""

    state: State
    field: str
    text: str
    complaint: str
    read: Callable[[str], Any]


def _read_name(text: str) -> str | None:
    return None if text.startswith("/") else text


def _read_age(text: str) -> int | None:
    return int(text) if text.isdecimal() and 0 < int(text) <= MAX_AGE else None


def _read_email(text: str) -> str | None:
    user, _, domain = text.partition("@")
    return text if user and "." in domain and " " not in text else None


QUESTIONS = (
    Question(Registration.name, "name", "What is your name?", "That is no name.", _read_name),
    Question(Registration.age, "age", "How old are you?", "A number, please.", _read_age),
    Question(Registration.email, "email", "What is your email?", "That is no email address.", _read_email),
)
_BY_STATE = {question.state.state: question for question in QUESTIONS}
_BY_FIELD = {question.field: question for question in QUESTIONS}
_CHANGES = {f"{CHANGE}{question.field}" for question in QUESTIONS}
_KEYBOARD = InlineKeyboardMarkup(
    inline_keyboard=[[InlineKeyboardButton(text=text, callback_data=data)] for text, data in BUTTONS]
)


def make_dispatcher(storage: BaseStorage) -> Dispatcher:
    """The bot's dispatcher; a user has a conversation of their own in each chat and topic."""
    dispatcher = Dispatcher(storage=storage, fsm_strategy=FSMStrategy.USER_IN_TOPIC)
    dispatcher.message.register(start, CommandStart())
    dispatcher.message.register(cancel, Command("cancel"))
    dispatcher.message.register(answer, StateFilter(*_BY_STATE), F.text)
    dispatcher.edited_message.register(edit_answer, StateFilter(Registration), F.text)
    dispatcher.callback_query.register(confirm, Registration.confirm, F.data == CONFIRM)
    dispatcher.callback_query.register(change, Registration.confirm, F.data.in_(_CHANGES))
    dispatcher.callback_query.register(press_too_late)
    dispatcher.errors.register(go_on)
    return dispatcher


def check_update(update: JSON) -> None:
    """Nothing, if aiogram takes the update.

    Raises:
        InvalidUpdate: it does not.
    """
    try:
        Update.model_validate(update)
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(map(str, fault["loc"]))
        raise InvalidUpdate(f"update {update['update_id']}: {place}: {fault['msg']}") from error


async def handle_in_order(dispatcher: Dispatcher, bot: Bot, updates: Iterable[JSON]) -> int:
    """Have the bot handle one update after the other; returns how many of its handlers failed.

    Raises:
        FsmRayError: what the storage raised; the updates after are not handled.
    """
    failed = 0
    for update in updates:
        result = await dispatcher.feed_update(bot, Update.model_validate(update, context={"bot": bot}))
        failed += result is _FAILED
    return failed


async def start(message: Message, state: FSMContext) -> None:
    """Begin, or begin again; only the number of starts is kept."""
    before = await state.get_data()
    await state.set_data(
        {
            "started_at": message.date,
            "starts": before.get("starts", 0) + 1,
            "mistakes": 0,
            "corrections": 0,
            "answered_by": {},
            "log": [],
        }
    )
    await _ask(QUESTIONS[0], message, state)


async def cancel(message: Message, state: FSMContext) -> None:
    """Forget everything."""
    await state.clear()
    await message.answer("Forgotten. /start begins again.")


async def answer(message: Message, state: FSMContext, raw_state: str) -> None:
    """Take an answer, and ask what is still missing."""
    question = _BY_STATE[raw_state]
    value = question.read(message.text or "")
    data = await state.get_data()
    if value is None:
        await state.update_data(mistakes=data["mistakes"] + 1)
        await message.answer(question.complaint)
        return
    data = await state.update_data(
        {
            question.field: value,
            "answered_by": {**data["answered_by"], question.field: message.message_id},
            "log": [*data["log"], f"{question.field} is {value}"],
        }
    )
    missing = [each for each in QUESTIONS if each.field not in data]
    if missing:
        await _ask(missing[0], message, state)
    else:
        await state.set_state(Registration.confirm)
        await message.answer("Is this right?", reply_markup=_KEYBOARD)


async def edit_answer(message: Message, state: FSMContext) -> None:
    """Take the new text of an earlier answer."""
    data = await state.get_data()
    fields = [name for name, message_id in data["answered_by"].items() if message_id == message.message_id]
    value = _BY_FIELD[fields[0]].read(message.text or "") if fields else None
    if value is not None:
        log = [*data["log"], f"{fields[0]} becomes {value}"]
        await state.update_data({fields[0]: value, "corrections": data["corrections"] + 1, "log": log})


async def change(callback: CallbackQuery, state: FSMContext) -> None:
    """Ask once more for the field that the button names."""
    question = _BY_FIELD[(callback.data or "").removeprefix(CHANGE)]
    data = await state.get_data()
    del data[question.field]
    await state.set_data(data | {"corrections": data["corrections"] + 1})
    await state.set_state(question.state)
    await callback.answer(question.text)


async def confirm(callback: CallbackQuery, state: FSMContext) -> None:
    """Finish the registration."""
    data = await state.get_data()
    await state.update_data(log=[*data["log"], "confirmed"])
    await state.set_state(Registration.done)
    await callback.answer("Welcome!")


async def press_too_late(callback: CallbackQuery) -> None:
    """Answer a button that no longer means anything, so that it stops flashing."""
    await callback.answer("That is settled.")


async def go_on(event: ErrorEvent) -> object:
    """As aiogram's own polling does, let no error of a handler end the bot; one of the storage does."""
    if isinstance(event.exception, FsmRayError):
        return UNHANDLED
    logger.warning("update %d failed", event.update.update_id, exc_info=event.exception)
    return _FAILED


async def _ask(question: Question, message: Message, state: FSMContext) -> None:
    await state.set_state(question.state)
    await message.answer(question.text)


def make_bot() -> Bot:
    """The bot, with a session that answers for Telegram."""
    return Bot(f"{BOT['id']}:demo", session=LocalSession())


class LocalSession(BaseSession):
    """Answers each request of the bot as Telegram would; nothing leaves the process."""

    async def make_request(
        self,
        bot: Bot,
        method: TelegramMethod[TelegramType],
        timeout: int | None = None,  # noqa: ARG002, ASYNC109 - aiogram's signature
    ) -> TelegramType:
        result: Any = True
        if isinstance(method, GetMe):
            result = User.model_validate(BOT)
        elif isinstance(method, SendMessage):
            chat = Chat(id=int(method.chat_id), type="private")
            result = Message(message_id=1, date=datetime.now(UTC), chat=chat, text=method.text).as_(bot)
        answered: TelegramType = result
        return answered

    async def stream_content(self, *_: Any, **__: Any) -> AsyncGenerator[bytes, None]:
        """Nothing: the demo sends no files."""
        return
        yield b""

    async def close(self) -> None:
        """Nothing was opened."""
