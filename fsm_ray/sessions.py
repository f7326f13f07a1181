"""Sessions: what lets a write take effect once, though it may be sent twice.

Each client numbers its writes within sessions of its own and has one of each under way at a time, so the last
number of a session and its reply are all that a shard must remember.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fsm_ray.errors import OutcomeUnknown, Overloaded
from fsm_ray.protocol import WriteRequest
from fsm_ray.stores.base import Answered

SESSION_IDLE_S = 600.0
"""How long a session is remembered after its last write; no client resends a write that is so old."""

MAX_SESSIONS = 65_536
"""Sessions that one shard remembers; past it, new sessions are refused until old ones have aged."""

LARGE_REPLY_BYTES = 1 << 12
"""A reply so small is remembered as long as its session: their number bounds them."""

MAX_LARGE_BYTES = 128 << 20
"""Of larger replies; past it, the oldest are forgotten, and who resends such a write is told so."""

_FORGOTTEN = b""
"""What stands for a reply that was forgotten."""


class Sessions:
    """The sessions of one shard.

    `answered` holds the last answer of each. Where there is nothing to commit, it is written to directly.
    """

    def __init__(
        self, answered: Mapping[bytes, Answered], clock: Callable[[], float], *, is_durable: bool = False
    ) -> None:
        self.answered = dict(answered)
        self._clock = clock
        self._is_durable = is_durable
        self._has_forgotten = bool(answered)
        self._look_again_s = 0.0
        self._forgotten: set[bytes] = set()
        self._large: dict[bytes, int] = {}
        """Sessions that may have a large reply, and its size; the one that got it first comes first."""
        self._large_bytes = 0
        self._bound_large(answered)

    def __len__(self) -> int:
        return len(self.answered)

    def recall(self, request: WriteRequest, uncommitted: Mapping[bytes, Answered]) -> bytes | None:
        """The reply that this request already got, or None when it is to be evaluated.

        `uncommitted` holds the answers of the commit that is being put together; they come first.

        Raises:
            OutcomeUnknown: the request is older than what is remembered of its session.
            Overloaded: there is no room for a further session.
        """
        session, number = request.session, request.number
        last = uncommitted.get(session) or self.answered.get(session)
        if last is None:
            # Number 1 of an unknown session was never evaluated: forgetting takes longer than any client
            # goes on resending.
            if request.is_resend and number > 1 and self._has_forgotten:
                raise OutcomeUnknown(
                    "the write was sent again after its session was forgotten: read, then decide"
                )
            self._make_room(uncommitted)
            return None
        if number > last.number:
            return None
        if number == last.number and last.reply != _FORGOTTEN:
            return last.reply
        if number == last.number:
            raise OutcomeUnknown(
                "the write was sent again after its large answer was forgotten: read, then decide"
            )
        raise OutcomeUnknown(f"write {number} was sent again after write {last.number} of its session")

    def remember(self, answered: Mapping[bytes, Answered]) -> None:
        """Take over the answers of a commit."""
        self.answered.update(answered)
        self._bound_large(answered)

    def keep_large(self, session: bytes, size: int) -> None:
        """Take note that the session has a large reply; forget older ones if need be."""
        self._large_bytes += size - self._large.pop(session, 0)
        self._large[session] = size
        while self._large_bytes > MAX_LARGE_BYTES and len(self._large) > 1:
            oldest = next(iter(self._large))
            self._large_bytes -= self._large.pop(oldest)
            last = self.answered.get(oldest)
            # It may have got a small one since.
            if last is not None and len(last.reply) > LARGE_REPLY_BYTES:
                self.answered[oldest] = Answered(last.number, _FORGOTTEN, last.at_s)

    def take_forgotten(self, answered: Mapping[bytes, Answered]) -> set[bytes]:
        """The sessions that were forgotten since the last commit, without those that wrote again."""
        forgotten, self._forgotten = self._forgotten, set()
        return forgotten.difference(answered) if forgotten else forgotten

    def _bound_large(self, answered: Mapping[bytes, Answered]) -> None:
        """Keep the large ones among these answers, which were taken over."""
        for session, last in answered.items():
            if len(last.reply) > LARGE_REPLY_BYTES:
                self.keep_large(session, len(last.reply))

    def _make_room(self, uncommitted: Mapping[bytes, Answered]) -> None:
        """Forget what is old, now and then; refuse when there are too many all the same."""
        now_s = self._clock()
        new = 0 if uncommitted is self.answered else len(uncommitted)
        if now_s >= self._look_again_s:
            self._forget_old(now_s)
            self._look_again_s = now_s + SESSION_IDLE_S / 10
        if len(self.answered) + new >= MAX_SESSIONS:
            # Looking through all of them for each newcomer would take more time than serving it.
            self._look_again_s = min(self._look_again_s, now_s + 1)
            raise Overloaded(
                f"{MAX_SESSIONS} clients wrote to this shard within {SESSION_IDLE_S:.0f} s, more than it can "
                "remember: retry later, and keep a storage open instead of making one for each write"
            )

    def _forget_old(self, now_s: float) -> None:
        old = [each for each, last in self.answered.items() if last.at_s <= now_s - SESSION_IDLE_S]
        for session in old:
            del self.answered[session]
            self._large_bytes -= self._large.pop(session, 0)
        self._has_forgotten |= bool(old)
        if self._is_durable:
            self._forgotten.update(old)
