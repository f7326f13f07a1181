"""A registration dialogue with pyTelegramBotAPI. One line makes it fsm_ray's; see `bot`.

    BOT_TOKEN=... FSM_RAY_STORE=rocksdb:///var/lib/my_bot python examples/telebot_bot.py

Kill it (kill -9) in the middle of a dialogue, and start it again: it goes on where it was.
"""

from __future__ import annotations

import os

from telebot import TeleBot, apihelper
from telebot.custom_filters import StateFilter
from telebot.states import State, StatesGroup
from telebot.states.sync.context import StateContext
from telebot.states.sync.middleware import StateMiddleware
from telebot.types import CallbackQuery, InlineKeyboardButton, InlineKeyboardMarkup, Message

from fsm_ray.adapters.telebot import RayStateStorage

STORE = os.environ.get("FSM_RAY_STORE", "memory://")
KEYBOARD = InlineKeyboardMarkup(
    [
        [
            InlineKeyboardButton("Yes", callback_data="yes"),
            InlineKeyboardButton("Start again", callback_data="again"),
        ]
    ]
)
apihelper.API_URL = os.environ.get("API_BASE", "https://api.telegram.org") + "/bot{0}/{1}"
bot = TeleBot(
    os.environ["BOT_TOKEN"],
    state_storage=RayStateStorage("telebot_bot", store=STORE),  # was: StateMemoryStorage()
    use_class_middlewares=True,
)
bot.add_custom_filter(StateFilter(bot))
bot.setup_middleware(StateMiddleware(bot))


class Registration(StatesGroup):
    name = State()
    email = State()
    confirm = State()
    done = State()


@bot.message_handler(commands=["cancel"])
def cancel(message: Message, state: StateContext) -> None:
    state.delete()
    bot.send_message(message.chat.id, "Forgotten. /start begins again.")


@bot.message_handler(commands=["status"])
def status(message: Message, state: StateContext) -> None:
    with state.data() as data:
        known = ", ".join(f"{name}: {value}" for name, value in data.items())
    bot.send_message(message.chat.id, known or "I know nothing about you. /start begins.")


@bot.message_handler(commands=["start"])
def start(message: Message, state: StateContext) -> None:
    state.delete()
    state.set(Registration.name)
    bot.send_message(message.chat.id, "What is your name?")


@bot.message_handler(state=Registration.name)
def take_name(message: Message, state: StateContext) -> None:
    state.add_data(name=message.text)
    state.set(Registration.email)
    bot.send_message(message.chat.id, "What is your email?")


@bot.message_handler(state=Registration.email)
def take_email(message: Message, state: StateContext) -> None:
    if "@" not in message.text:
        bot.send_message(message.chat.id, "That is no email address.")
        return
    with state.data() as data:
        data["email"] = message.text
        question = f"{data['name']}, {data['email']}: is that right?"
    state.set(Registration.confirm)
    bot.send_message(message.chat.id, question, reply_markup=KEYBOARD)


@bot.callback_query_handler(lambda query: query.data == "yes", state=Registration.confirm)
def confirm(query: CallbackQuery, state: StateContext) -> None:
    state.set(Registration.done)
    with state.data() as data:
        welcome = f"Welcome, {data['name']}!"
    bot.answer_callback_query(query.id)
    bot.edit_message_text(welcome, query.message.chat.id, query.message.message_id)


@bot.callback_query_handler(lambda query: query.data == "again", state=Registration.confirm)
def again(query: CallbackQuery, state: StateContext) -> None:
    bot.answer_callback_query(query.id)
    start(query.message, state)


@bot.callback_query_handler(lambda _: True)
def settled(query: CallbackQuery, state: StateContext) -> None:  # noqa: ARG001 - the middleware's
    bot.answer_callback_query(query.id, "That is settled.")


if __name__ == "__main__":
    bot.infinity_polling()
