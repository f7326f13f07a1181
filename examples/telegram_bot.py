"""A registration dialogue with python-telegram-bot 22. Two lines make it fsm_ray's; see `main`.

    BOT_TOKEN=... FSM_RAY_STORE=rocksdb:///var/lib/my_bot python examples/telegram_bot.py

Kill it (kill -9) in the middle of a dialogue, and start it again: it goes on where it was.
"""

from __future__ import annotations

import os
from typing import Any

from telegram import InlineKeyboardButton, InlineKeyboardMarkup, Update
from telegram.ext import (
    Application,
    CallbackQueryHandler,
    CommandHandler,
    ContextTypes,
    ConversationHandler,
    MessageHandler,
)
from telegram.ext.filters import COMMAND, TEXT

from fsm_ray.adapters.telegram import RayApplication, RayPersistence

STORE = os.environ.get("FSM_RAY_STORE", "memory://")
KEYBOARD = InlineKeyboardMarkup(
    [
        [
            InlineKeyboardButton("Yes", callback_data="yes"),
            InlineKeyboardButton("Start again", callback_data="again"),
        ]
    ]
)
NAME, EMAIL, CONFIRM = "name", "email", "confirm"
Context = ContextTypes.DEFAULT_TYPE


async def say(update: Update, text: str, **options: Any) -> None:
    assert update.effective_chat is not None
    await update.effective_chat.send_message(text, **options)


async def cancel(update: Update, context: Context) -> int:
    known(context).clear()
    await say(update, "Forgotten. /start begins again.")
    return ConversationHandler.END


async def status(update: Update, context: Context) -> None:
    text = ", ".join(f"{name}: {value}" for name, value in known(context).items())
    await say(update, text or "I know nothing about you. /start begins.")


async def start(update: Update, context: Context) -> str:
    known(context).clear()
    await say(update, "What is your name?")
    return NAME


async def take_name(update: Update, context: Context) -> str:
    known(context)["name"] = text_of(update)
    await say(update, "What is your email?")
    return EMAIL


async def take_email(update: Update, context: Context) -> str:
    if "@" not in text_of(update):
        await say(update, "That is no email address.")
        return EMAIL
    known(context)["email"] = text_of(update)
    person = ", ".join(known(context).values())
    await say(update, f"{person}: is that right?", reply_markup=KEYBOARD)
    return CONFIRM


async def confirm(update: Update, context: Context) -> int:
    assert update.callback_query is not None
    await update.callback_query.answer()
    await update.callback_query.edit_message_text(f"Welcome, {known(context)['name']}!")
    return ConversationHandler.END


async def again(update: Update, context: Context) -> str:
    assert update.callback_query is not None
    await update.callback_query.answer()
    return await start(update, context)


async def settled(update: Update, _: Context) -> None:
    assert update.callback_query is not None
    await update.callback_query.answer("That is settled.")


def known(context: Context) -> dict[str, str]:
    assert context.user_data is not None
    return context.user_data  # type: ignore[return-value]  # it may hold anything; here it holds texts


def text_of(update: Update) -> str:
    assert update.effective_message is not None
    return update.effective_message.text or ""


def main() -> None:
    application = (
        Application.builder()
        .application_class(
            RayApplication
        )  # stores after each update, and shares the bot with other processes
        .token(os.environ["BOT_TOKEN"])
        .base_url(os.environ.get("API_BASE", "https://api.telegram.org") + "/bot")
        .persistence(RayPersistence("telegram_bot", store=STORE))  # was: PicklePersistence
        .build()
    )
    texts = TEXT & ~COMMAND
    registration: ConversationHandler[Context] = ConversationHandler(
        entry_points=[CommandHandler("start", start)],
        states={
            NAME: [MessageHandler(texts, take_name)],
            EMAIL: [MessageHandler(texts, take_email)],
            CONFIRM: [
                CallbackQueryHandler(confirm, pattern="^yes$"),
                CallbackQueryHandler(again, pattern="^again$"),
            ],
        },
        fallbacks=[CommandHandler("start", start), CommandHandler("cancel", cancel)],
        name="registration",
        persistent=True,
    )
    application.add_handler(CommandHandler("status", status))
    application.add_handler(registration)
    application.add_handler(CommandHandler("cancel", cancel))
    application.add_handler(CallbackQueryHandler(settled))
    application.run_polling()


if __name__ == "__main__":
    main()
