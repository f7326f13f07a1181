"""A registration dialogue with aiogram 3. One line makes it fsm_ray's; see `main`.

    BOT_TOKEN=... FSM_RAY_STORE=rocksdb:///var/lib/my_bot python examples/aiogram_bot.py

Kill it (kill -9) in the middle of a dialogue, and start it again: it goes on where it was.
"""

from __future__ import annotations

import asyncio
import os

from aiogram import Bot, Dispatcher, F, Router
from aiogram.client.session.aiohttp import AiohttpSession
from aiogram.client.telegram import TelegramAPIServer
from aiogram.filters import Command, CommandStart
from aiogram.fsm.context import FSMContext
from aiogram.fsm.state import State, StatesGroup
from aiogram.types import CallbackQuery, InlineKeyboardButton, InlineKeyboardMarkup, Message

from fsm_ray.adapters.aiogram import RayStorage

STORE = os.environ.get("FSM_RAY_STORE", "memory://")
KEYBOARD = InlineKeyboardMarkup(
    inline_keyboard=[
        [
            InlineKeyboardButton(text="Yes", callback_data="yes"),
            InlineKeyboardButton(text="Start again", callback_data="again"),
        ]
    ]
)
router = Router()


class Registration(StatesGroup):
    name = State()
    email = State()
    confirm = State()
    done = State()


@router.message(Command("cancel"))
async def cancel(message: Message, state: FSMContext) -> None:
    await state.clear()
    await message.answer("Forgotten. /start begins again.")


@router.message(Command("status"))
async def status(message: Message, state: FSMContext) -> None:
    data = await state.get_data()
    known = ", ".join(f"{name}: {value}" for name, value in data.items())
    await message.answer(known or "I know nothing about you. /start begins.")


@router.message(CommandStart())
async def start(message: Message, state: FSMContext) -> None:
    await state.set_data({})
    await state.set_state(Registration.name)
    await message.answer("What is your name?")


@router.message(Registration.name, F.text.as_("name"))
async def take_name(message: Message, state: FSMContext, name: str) -> None:
    await state.update_data(name=name)
    await state.set_state(Registration.email)
    await message.answer("What is your email?")


@router.message(Registration.email, F.text.as_("email"))
async def take_email(message: Message, state: FSMContext, email: str) -> None:
    if "@" not in email:
        await message.answer("That is no email address.")
        return
    data = await state.update_data(email=email)
    await state.set_state(Registration.confirm)
    await message.answer(f"{data['name']}, {data['email']}: is that right?", reply_markup=KEYBOARD)


@router.callback_query(Registration.confirm, F.data == "yes")
async def confirm(query: CallbackQuery, state: FSMContext) -> None:
    await state.set_state(Registration.done)
    await query.answer()
    if isinstance(query.message, Message):
        await query.message.edit_text(f"Welcome, {await state.get_value('name')}!")


@router.callback_query(Registration.confirm, F.data == "again")
async def again(query: CallbackQuery, state: FSMContext) -> None:
    await query.answer()
    if isinstance(query.message, Message):
        await start(query.message, state)


@router.callback_query()
async def settled(query: CallbackQuery) -> None:
    await query.answer("That is settled.")


async def main() -> None:
    api = TelegramAPIServer.from_base(os.environ.get("API_BASE", "https://api.telegram.org"))
    bot = Bot(os.environ["BOT_TOKEN"], session=AiohttpSession(api=api))
    dispatcher = Dispatcher(storage=RayStorage("aiogram_bot", store=STORE))  # was: MemoryStorage()
    dispatcher.include_router(router)
    await dispatcher.start_polling(bot)


if __name__ == "__main__":
    asyncio.run(main())
