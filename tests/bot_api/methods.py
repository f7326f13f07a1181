"""The Bot API's methods, each a function of the bot and its parameters; what it returns is the result."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

from tests.bot_api.bots import Bot, Chat, Webhook
from tests.bot_api.parameters import JSON, Parameters, bad_request

MAX_TEXT = 4096


def get_me(bot: Bot, _: Parameters) -> JSON:
    abilities = {
        "can_join_groups": True,
        "can_read_all_group_messages": True,
        "supports_inline_queries": False,
        "can_connect_to_business": False,
        "has_main_web_app": False,
    }
    return bot.identity | abilities


def send_message(bot: Bot, parameters: Parameters) -> JSON:
    chat = bot.chat(parameters.integer("chat_id"))
    message = bot.post(chat, bot.identity, _text(parameters), **_keyboard(parameters))
    bot.show(chat, message)
    return message


def edit_message_text(bot: Bot, parameters: Parameters) -> JSON:
    """An edit that gives no keyboard takes away the one that was there, as at Telegram."""
    chat, message = _message(bot, parameters, "edit")
    changed = {"text": _text(parameters), **_keyboard(parameters)}
    if changed == {name: message[name] for name in ("text", "reply_markup") if name in message}:
        raise bad_request(
            "message is not modified: specified new message content and reply markup are exactly the same as "
            "a current content and reply markup of the message"
        )
    message.pop("reply_markup", None)
    message |= changed | {"edit_date": int(time.time())}
    bot.show(chat, message)
    return message


def delete_message(bot: Bot, parameters: Parameters) -> bool:
    chat, message = _message(bot, parameters, "delete")
    del chat.messages[message["message_id"]]
    bot.tell()
    return True


def answer_callback_query(bot: Bot, parameters: Parameters) -> bool:
    query_id = parameters.text("callback_query_id")
    if query_id not in bot.queries:
        raise bad_request("query is too old and response timeout expired or query ID is invalid")
    bot.queries.remove(query_id)
    bot.answers.append({"callback_query_id": query_id, "text": parameters.text("text")})
    bot.tell()
    return True


def send_chat_action(bot: Bot, parameters: Parameters) -> bool:
    bot.chat(parameters.integer("chat_id"))
    bot.actions.append(dict(parameters))
    bot.tell()
    return True


def set_my_commands(bot: Bot, parameters: Parameters) -> bool:
    bot.commands = parameters.parsed("commands") or []
    return True


def get_my_commands(bot: Bot, _: Parameters) -> list[JSON]:
    return bot.commands


def set_webhook(bot: Bot, parameters: Parameters) -> bool:
    """Updates go to this URL from now on; an empty one is as deleteWebhook."""
    secret_token = parameters.text("secret_token")
    if re.fullmatch(r"[A-Za-z0-9_-]{0,256}", secret_token) is None:
        raise bad_request("secret token contains unallowed characters")
    _drop_pending(bot, parameters)
    allow(bot, parameters)
    url = parameters.text("url")
    if url:
        bot.end_poll("setWebhook request")
        bot.webhook = Webhook(url, secret_token, parameters.integer("max_connections", 40))
    else:
        bot.webhook = None
    bot.tell()
    return True


def delete_webhook(bot: Bot, parameters: Parameters) -> bool:
    _drop_pending(bot, parameters)
    bot.webhook = None
    bot.tell()
    return True


def get_webhook_info(bot: Bot, _: Parameters) -> JSON:
    webhook = bot.webhook or Webhook("")
    info: JSON = {
        "url": webhook.url,
        "has_custom_certificate": False,
        "pending_update_count": len(bot.updates),
        "max_connections": webhook.max_connections if webhook.url else None,
        "allowed_updates": bot.allowed_updates or None,
        "last_error_date": webhook.last_error_date,
        "last_error_message": webhook.last_error_message,
    }
    return {name: value for name, value in info.items() if value is not None}


def allow(bot: Bot, parameters: Parameters) -> None:
    """Take over which updates the bot wants from now on; not given: as before; empty: the usual ones."""
    allowed = parameters.parsed("allowed_updates")
    if allowed is not None:
        bot.allowed_updates = allowed


METHODS: dict[str, Callable[[Bot, Parameters], Any]] = {
    function.__name__.replace("_", ""): function
    for function in (
        get_me,
        send_message,
        edit_message_text,
        delete_message,
        answer_callback_query,
        send_chat_action,
        set_my_commands,
        get_my_commands,
        set_webhook,
        delete_webhook,
        get_webhook_info,
    )
}
"""By name in lower case: the Bot API does not care about case. getUpdates, which waits, is the server's."""


def _message(bot: Bot, parameters: Parameters, purpose: str) -> tuple[Chat, JSON]:
    chat = bot.chat(parameters.integer("chat_id"))
    return chat, chat.message(parameters.integer("message_id"), purpose)


def _text(parameters: Parameters) -> str:
    text = parameters.text("text").strip()
    if not text:
        raise bad_request("message text is empty")
    if len(text) > MAX_TEXT:
        raise bad_request("message is too long")
    return text


def _keyboard(parameters: Parameters) -> JSON:
    """Only an inline keyboard is part of a message."""
    markup = parameters.parsed("reply_markup")
    if markup is not None and not isinstance(markup, dict):
        raise bad_request("object expected as reply markup")
    return {"reply_markup": markup} if markup and "inline_keyboard" in markup else {}


def _drop_pending(bot: Bot, parameters: Parameters) -> None:
    if parameters.is_set("drop_pending_updates"):
        bot.updates.clear()
