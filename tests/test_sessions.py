"""Sessions: what lets a write take effect once, though it may be sent twice."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from fsm_ray import sessions
from fsm_ray.errors import OutcomeUnknown, Overloaded
from fsm_ray.protocol import WriteRequest
from fsm_ray.sessions import SESSION_IDLE_S, Sessions
from fsm_ray.stores.base import Answered

NOTHING: Mapping[bytes, Answered] = {}
START_S = 1_000_000.0


class FakeClock:
    """A wall clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now_s = START_S

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def recall(
    known: Sessions,
    session: bytes,
    number: int,
    *,
    is_resend: bool = False,
    uncommitted: Mapping[bytes, Answered] = NOTHING,
) -> bytes | None:
    return known.recall(WriteRequest(number, session, is_resend, []), uncommitted)


def remember(known: Sessions, clock: FakeClock, session: bytes, number: int) -> None:
    known.remember({session: Answered(number, b"reply %d" % number, clock())})


class TestRecall:
    @pytest.mark.parametrize("is_resend", [False, True])
    def test_the_last_write_gets_the_reply_it_got_before(self, clock: FakeClock, is_resend: bool) -> None:  # noqa: FBT001
        known = Sessions({}, clock)
        remember(known, clock, b"ann", 3)

        assert recall(known, b"ann", 3, is_resend=is_resend) == b"reply 3"

    def test_the_last_write_gets_its_reply_as_often_as_it_is_sent(self, clock: FakeClock) -> None:
        known = Sessions({}, clock)
        remember(known, clock, b"ann", 3)

        assert [recall(known, b"ann", 3, is_resend=True) for _ in range(3)] == [b"reply 3"] * 3

    @pytest.mark.parametrize("is_resend", [False, True])
    @pytest.mark.parametrize("number", [4, 5, 1 << 63])
    def test_a_later_write_is_to_be_evaluated(self, clock: FakeClock, number: int, is_resend: bool) -> None:  # noqa: FBT001
        known = Sessions({}, clock)
        remember(known, clock, b"ann", 3)

        assert recall(known, b"ann", number, is_resend=is_resend) is None

    @pytest.mark.parametrize("is_resend", [False, True])
    @pytest.mark.parametrize("number", [0, 1, 2])
    def test_the_outcome_of_an_older_write_is_unknown(
        self,
        clock: FakeClock,
        number: int,
        is_resend: bool,  # noqa: FBT001
    ) -> None:
        known = Sessions({}, clock)
        remember(known, clock, b"ann", 3)

        with pytest.raises(OutcomeUnknown):
            recall(known, b"ann", number, is_resend=is_resend)

    @pytest.mark.parametrize("is_resend", [False, True])
    def test_the_first_write_of_an_unknown_session_is_to_be_evaluated(
        self,
        clock: FakeClock,
        is_resend: bool,  # noqa: FBT001
    ) -> None:
        known = Sessions({}, clock)
        remember(known, clock, b"ann", 3)

        assert recall(known, b"bob", 1, is_resend=is_resend) is None

    def test_sessions_are_told_apart(self, clock: FakeClock) -> None:
        known = Sessions({}, clock)
        known.remember({b"ann": Answered(1, b"to ann", clock()), b"bob": Answered(1, b"to bob", clock())})

        assert (recall(known, b"ann", 1), recall(known, b"bob", 1)) == (b"to ann", b"to bob")

    def test_asking_remembers_nothing(self, clock: FakeClock) -> None:
        known = Sessions({}, clock)

        assert [recall(known, b"ann", 1), recall(known, b"ann", 1)] == [None, None]
        assert len(known) == 0


class TestTheCommitThatIsBeingPutTogether:
    def test_its_answers_come_before_the_remembered_ones(self, clock: FakeClock) -> None:
        known = Sessions({}, clock)
        remember(known, clock, b"ann", 3)
        uncommitted = {b"ann": Answered(4, b"reply 4", clock())}

        assert recall(known, b"ann", 4, uncommitted=uncommitted) == b"reply 4"
        with pytest.raises(OutcomeUnknown):
            recall(known, b"ann", 3, uncommitted=uncommitted)

    def test_its_answers_are_not_remembered_before_it_is_done(self, clock: FakeClock) -> None:
        known = Sessions({}, clock)
        recall(known, b"ann", 1, uncommitted={b"ann": Answered(1, b"reply 1", clock())})

        assert recall(known, b"ann", 1) is None
        assert len(known) == 0


class TestForgetting:
    def test_a_session_is_remembered_for_ten_minutes(self, clock: FakeClock) -> None:
        known = Sessions({}, clock)
        remember(known, clock, b"ann", 1)

        clock.now_s += 599.9
        recall(known, b"bob", 1)

        assert recall(known, b"ann", 1) == b"reply 1"

    def test_an_idle_session_is_forgotten_when_a_new_one_comes(self, clock: FakeClock) -> None:
        known = Sessions({}, clock)
        remember(known, clock, b"ann", 1)

        clock.now_s += SESSION_IDLE_S
        recall(known, b"bob", 1)

        assert len(known) == 0
        assert recall(known, b"ann", 1) is None

    def test_idle_sessions_do_not_pile_up(self, clock: FakeClock) -> None:
        known = Sessions({}, clock)
        for hour in range(24):
            clock.now_s = START_S + 3600 * hour
            recall(known, b"%d" % hour, 1)
            remember(known, clock, b"%d" % hour, 1)

        assert len(known) == 1

    def test_each_write_makes_a_session_young_again(self, clock: FakeClock) -> None:
        known = Sessions({}, clock)
        remember(known, clock, b"ann", 1)
        clock.now_s += SESSION_IDLE_S - 1
        remember(known, clock, b"ann", 2)

        clock.now_s += SESSION_IDLE_S - 1
        recall(known, b"bob", 1)

        assert recall(known, b"ann", 2) == b"reply 2"

    def test_sessions_are_forgotten_in_the_order_of_their_last_writes(self, clock: FakeClock) -> None:
        known = Sessions({}, clock)
        for session in (b"ann", b"bob", b"cid", b"dan"):
            remember(known, clock, session, 1)
            clock.now_s += 1
        remember(known, clock, b"ann", 2)

        clock.now_s = START_S + SESSION_IDLE_S + 2  # dan's write is the first within the time
        recall(known, b"eve", 1)

        assert len(known) == 2
        assert (recall(known, b"dan", 1), recall(known, b"ann", 2)) == (b"reply 1", b"reply 2")

    def test_a_resend_after_its_session_was_forgotten_has_an_unknown_outcome(self, clock: FakeClock) -> None:
        known = Sessions({}, clock)
        remember(known, clock, b"ann", 2)
        clock.now_s += SESSION_IDLE_S
        recall(known, b"bob", 1)

        with pytest.raises(OutcomeUnknown):
            recall(known, b"ann", 2, is_resend=True)

    def test_a_new_write_after_its_session_was_forgotten_is_to_be_evaluated(self, clock: FakeClock) -> None:
        known = Sessions({}, clock)
        remember(known, clock, b"ann", 2)
        clock.now_s += SESSION_IDLE_S
        recall(known, b"bob", 1)

        assert recall(known, b"ann", 3) is None

    def test_while_nothing_was_forgotten_a_resend_of_an_unknown_session_is_to_be_evaluated(
        self, clock: FakeClock
    ) -> None:
        known = Sessions({}, clock)
        remember(known, clock, b"ann", 1)

        assert recall(known, b"bob", 7, is_resend=True) is None

    def test_a_clock_that_goes_back_forgets_nobody(self, clock: FakeClock) -> None:
        known = Sessions({}, clock)
        remember(known, clock, b"ann", 1)

        clock.now_s -= 10 * SESSION_IDLE_S
        recall(known, b"bob", 1)

        assert recall(known, b"ann", 1) == b"reply 1"


class TestRestart:
    def test_sessions_of_the_store_are_known(self, clock: FakeClock) -> None:
        known = Sessions({b"ann": Answered(3, b"reply 3", clock())}, clock)

        assert len(known) == 1
        assert recall(known, b"ann", 3, is_resend=True) == b"reply 3"

    def test_a_resend_that_the_store_knows_nothing_of_has_an_unknown_outcome(self, clock: FakeClock) -> None:
        known = Sessions({b"ann": Answered(3, b"reply 3", clock())}, clock)

        with pytest.raises(OutcomeUnknown):
            recall(known, b"bob", 2, is_resend=True)

    def test_the_first_write_of_a_session_that_the_store_knows_nothing_of_is_to_be_evaluated(
        self, clock: FakeClock
    ) -> None:
        known = Sessions({b"ann": Answered(3, b"reply 3", clock())}, clock)

        assert recall(known, b"bob", 1, is_resend=True) is None

    def test_sessions_of_the_store_are_forgotten_by_age_in_whatever_order_they_come(
        self, clock: FakeClock
    ) -> None:
        ages_s = {b"young": 1.0, b"old": SESSION_IDLE_S, b"middle": 300.0, b"older": 2 * SESSION_IDLE_S}
        known = Sessions(
            {session: Answered(1, session, clock() - age_s) for session, age_s in ages_s.items()}, clock
        )

        recall(known, b"new", 1)

        assert len(known) == 2
        assert (recall(known, b"young", 1), recall(known, b"middle", 1)) == (b"young", b"middle")

    def test_the_stores_mapping_is_left_alone(self, clock: FakeClock) -> None:
        stored = {b"ann": Answered(3, b"reply 3", clock())}
        known = Sessions(stored, clock)

        remember(known, clock, b"ann", 4)

        assert stored == {b"ann": Answered(3, b"reply 3", START_S)}


class TestTooManySessions:
    @pytest.fixture(autouse=True)
    def _room_for_two(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sessions, "MAX_SESSIONS", 2)

    def test_a_session_more_than_there_is_room_for_is_refused(self, clock: FakeClock) -> None:
        known = Sessions({}, clock)
        remember(known, clock, b"ann", 1)
        remember(known, clock, b"bob", 1)

        with pytest.raises(Overloaded):
            recall(known, b"cid", 1)

    def test_known_sessions_go_on_when_there_is_no_room(self, clock: FakeClock) -> None:
        known = Sessions({}, clock)
        remember(known, clock, b"ann", 1)
        remember(known, clock, b"bob", 1)

        assert (recall(known, b"ann", 1), recall(known, b"bob", 2)) == (b"reply 1", None)

    def test_no_session_is_forgotten_early_to_make_room(self, clock: FakeClock) -> None:
        known = Sessions({}, clock)
        remember(known, clock, b"ann", 1)
        remember(known, clock, b"bob", 1)
        clock.now_s += SESSION_IDLE_S - 1

        with pytest.raises(Overloaded):
            recall(known, b"cid", 1)

        assert (recall(known, b"ann", 1), recall(known, b"bob", 1)) == (b"reply 1", b"reply 1")

    def test_there_is_room_again_when_the_oldest_has_aged(self, clock: FakeClock) -> None:
        known = Sessions({}, clock)
        remember(known, clock, b"ann", 1)
        clock.now_s += 10
        remember(known, clock, b"bob", 1)

        clock.now_s = START_S + SESSION_IDLE_S - 1
        with pytest.raises(Overloaded):
            recall(known, b"cid", 1)
        clock.now_s = START_S + SESSION_IDLE_S

        assert recall(known, b"cid", 1) is None
        assert recall(known, b"bob", 1) == b"reply 1"

    def test_sessions_of_the_commit_that_is_being_put_together_take_room_too(self, clock: FakeClock) -> None:
        known = Sessions({}, clock)
        remember(known, clock, b"ann", 1)
        uncommitted = {b"bob": Answered(1, b"reply 1", clock())}

        with pytest.raises(Overloaded):
            recall(known, b"cid", 1, uncommitted=uncommitted)
