"""Logs: lines for an operator, one for each event. They name bots, shards and stores, never users.

Each is in the table of docs/how-to/metrics.md, which tells what to do.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable


class Seldom:
    """Lets a line through that may come again and again: at once, then once in `every_s`."""

    def __init__(self, every_s: float = 60.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._every_s = every_s
        self._clock = clock
        self._due_s = -1.0
        self._held_back = 0

    def passes(self) -> bool:
        """Whether to write the line now."""
        now_s = self._clock()
        if self._due_s <= now_s:
            self._due_s = now_s + self._every_s
            return True
        self._held_back += 1
        return False

    def more(self) -> str:
        """What to add to a line: how many were held back since the one before."""
        held_back, self._held_back = self._held_back, 0
        return f" ({held_back} more since the last such line)" if held_back else ""


def one_line(error: BaseException) -> str:
    """What the error says, in one line: Ray's errors have several."""
    return " ".join(str(error).split())


def where(error: BaseException) -> str:
    """An error that nobody expected, in one line: its kind and where it was raised.

    Not what it says: a KeyError, say, says a user's key.
    """
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    path = " < ".join(f"{frame.name} ({frame.filename}:{frame.lineno})" for frame in reversed(frames))
    return f"{type(error).__name__} in {path or 'no frame'}"
