"""Delivery to webhooks: one update after the other, each again until the bot's server answers 2xx."""

from __future__ import annotations

import asyncio
import time

import aiohttp

from tests.bot_api.bots import Bot, Webhook

FIRST_DELAY_S = 0.02
MAX_DELAY_S = 1.0
"""Telegram takes longer, and has max_connections of them under way; then the order of chats may differ."""


async def deliver(bot: Bot) -> None:
    """Deliver the bot's updates while it has a webhook, until this is cancelled."""
    delay_s = FIRST_DELAY_S
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
        while True:
            webhook = await bot.wait_until(lambda: bot.webhook if bot.updates else None)
            update = bot.updates[0]
            failure = await _post(session, webhook, update)
            if failure is None:
                bot.confirm(update["update_id"] + 1)
                delay_s = FIRST_DELAY_S
            else:
                webhook.last_error_date, webhook.last_error_message = int(time.time()), failure
                bot.tell()
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, MAX_DELAY_S)


async def _post(session: aiohttp.ClientSession, webhook: Webhook, update: object) -> str | None:
    """Why the update was not taken; None if it was."""
    headers = {"X-Telegram-Bot-Api-Secret-Token": webhook.secret_token} if webhook.secret_token else {}
    try:
        async with session.post(webhook.url, json=update, headers=headers) as response:
            if response.ok:
                return None
            return f"Wrong response from the webhook: {response.status} {response.reason}"
    except (aiohttp.ClientError, TimeoutError) as error:
        return f"Connection failed: {error}"
