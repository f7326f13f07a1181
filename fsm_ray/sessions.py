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
        if number == last.number:
            return last.reply
        raise OutcomeUnknown(f"write {number} was sent again after write {last.number} of its session")

    def remember(self, answered: Mapping[bytes, Answered]) -> None:
        """Take over the answers of a commit."""
        self.answered.update(answered)

    def take_forgotten(self, answered: Mapping[bytes, Answered]) -> set[bytes]:
        """The sessions that were forgotten since the last commit, without those that wrote again."""
        forgotten, self._forgotten = self._forgotten, set()
        return forgotten.difference(answered) if forgotten else forgotten

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
        self._has_forgotten |= bool(old)
        if self._is_durable:
            self._forgotten.update(old)
