"""A Bot API server on 127.0.0.1, with scripted users: what tests and examples run real bots on.

As far as it goes, it behaves as Telegram's does: an update is delivered until the bot confirms it, by polls
or to a webhook; of two polls at once the older one ends with 409; errors have Telegram's form and words.

>>> with BotApi() as api:
...     api.url.startswith("http://127.0.0.1:")
True
"""

from __future__ import annotations

from tests.bot_api.server import BotApi, Held
from tests.bot_api.users import User

__all__ = ["BotApi", "Held", "User"]
