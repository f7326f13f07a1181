"""Talk to a bot at the terminal: `python -m tests.bot_api --port 8081`, and the bot with the API_BASE shown.

What you type is sent; [a button's text], in brackets, presses it.
"""

from __future__ import annotations

import argparse
import sys
import threading
from concurrent.futures import CancelledError
from contextlib import suppress

from tests.bot_api import BotApi, User
from tests.bot_api.server import TOKEN


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bot_api", description=__doc__)
    parser.add_argument("--port", type=int, default=8081)
    parser.add_argument("--token", default=TOKEN)
    arguments = parser.parse_args()
    with BotApi(arguments.token, port=arguments.port) as api:
        _tell(f"API_BASE={api.url} BOT_TOKEN={arguments.token}")
        user = User(api, 42)
        threading.Thread(target=_listen, args=(user,), daemon=True).start()
        for line in map(str.strip, sys.stdin):
            if line.startswith("["):
                user.press(line.strip("[]"))
            elif line:
                user.send(line)


def _listen(user: User) -> None:
    with suppress(CancelledError):  # the server has ended
        while True:
            message = user.hear("", deadline_s=threading.TIMEOUT_MAX)
            rows = message.get("reply_markup", {}).get("inline_keyboard", [])
            buttons = "".join(f" [{button['text']}]" for row in rows for button in row)
            _tell(f"bot: {message['text']}{buttons}")


def _tell(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
