"""Leases: who has a conversation, and who waits for it, by a clock that the test moves."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fsm_ray.errors import Overloaded
from fsm_ray.namespace import leases
from fsm_ray.namespace.leases import LEASE_S, Leases, TurnId

KEY = b"key"


class Table:
    """Leases, and what they told."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.granted: list[tuple[TurnId, bytes]] = []
        self.leases = Leases(lambda: self.now_s, self._on_granted)

    def begin(
        self, session: bytes, number: int = 1, key: bytes = KEY, connection: str = "connection"
    ) -> bool:
        self.leases.heard_of(session)
        return self.leases.begin((session, number), key, connection)

    def end(self, session: bytes, number: int = 1) -> bool:
        return self.leases.end((session, number))

    def holder(self, key: bytes = KEY) -> TurnId | None:
        """Who has the conversation, as far as can be seen from outside."""
        sessions = self.leases._sessions.items()
        turns = ((session, number) for session, known in sessions for number in known.turns)
        return next((turn for turn in turns if self.leases.has(turn, key)), None)

    def sizes(self) -> list[int]:
        """Of everything inside that grows."""
        table = self.leases
        sessions = table._sessions.values()
        inner = [len(known.turns) + len(known.granted) for known in sessions]
        return [len(table._queues), len(table._connections), len(table._sessions), sum(inner)]

    def _on_granted(self, session: bytes) -> None:
        granted = self.leases.take_granted(session)
        self.granted += [((session, number), key) for number, key in granted.items()]


@pytest.fixture
def table() -> Table:
    return Table()


class TestQueues:
    def test_the_first_has_the_conversation_and_others_are_granted_it_in_the_order_they_came(
        self, table: Table
    ) -> None:
        begun = [table.begin(session) for session in (b"a", b"b", b"c")]
        table.end(b"a")
        table.end(b"b")

        assert begun == [True, False, False]
        assert table.granted == [((b"b", 1), KEY), ((b"c", 1), KEY)]
        assert table.holder() == (b"c", 1)

    def test_turns_of_one_session_wait_for_each_other(self, table: Table) -> None:
        begun = [table.begin(b"a", number) for number in (1, 2)]
        table.end(b"a", 1)

        assert begun == [True, False]
        assert table.granted == [((b"a", 2), KEY)]

    def test_other_conversations_are_free(self, table: Table) -> None:
        assert table.begin(b"a", key=b"one")
        assert table.begin(b"b", key=b"two")
        assert (len(table.leases), table.leases.waiting) == (2, 0)

    def test_to_begin_again_changes_nothing(self, table: Table) -> None:
        begun = [table.begin(session) for session in (b"a", b"b", b"c", b"b", b"a", b"a")]
        table.end(b"a")

        assert begun == [True, False, False, False, True, True]
        assert table.granted == [((b"b", 1), KEY)]
        assert (len(table.leases), table.leases.waiting) == (1, 1)

    def test_who_waits_no_more_is_passed_over(self, table: Table) -> None:
        for session in (b"a", b"b", b"c"):
            table.begin(session)
        ended = [table.end(b"b"), table.end(b"a"), table.end(b"b")]

        assert ended == [True, True, False]
        assert table.granted == [((b"c", 1), KEY)]

    def test_one_turn_more_than_may_wait_is_refused_and_takes_nothing(
        self, table: Table, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(leases, "MAX_WAITERS", 2)
        for session in (b"a", b"b", b"c"):
            table.begin(session)
        before = table.sizes()

        with pytest.raises(Overloaded):
            table.begin(b"a", 2)
        assert table.sizes() == before
        assert not table.begin(b"c")  # it waits already

    @pytest.mark.slow
    def test_a_million_turns_leave_nothing_behind(self, table: Table) -> None:
        lease = table.leases
        lease.heard_of(b"a")
        for number in range(1_000_000):
            turn = b"a", number
            lease.begin(turn, number.to_bytes(4, "big"), "connection")
            lease.end(turn)
        table.now_s = LEASE_S
        lease.expire()

        assert table.sizes() == [0, 0, 0, 0]


class TestCommits:
    """A turn that is being committed ends when that is done, whatever becomes of its client."""

    @pytest.mark.parametrize("by", ["end", "disconnected", "expire"])
    def test_a_turn_that_is_kept_is_ended_by_release_alone(self, table: Table, by: str) -> None:
        table.begin(b"a", connection="of a")
        table.begin(b"b", connection="of b")
        table.leases.keep((b"a", 1))
        table.now_s = LEASE_S
        table.leases.heard_of(b"b")
        if by == "end":
            table.end(b"a")
        elif by == "disconnected":
            table.leases.disconnected("of a")
        else:
            table.leases.expire()
        granted_early = list(table.granted)
        table.leases.release((b"a", 1), KEY)

        assert granted_early == []
        assert table.granted == [((b"b", 1), KEY)]

    def test_release_is_safe_to_repeat(self, table: Table) -> None:
        for session in (b"a", b"b", b"c"):
            table.begin(session)
        for _ in range(2):
            table.leases.release((b"a", 1), KEY)

        assert table.granted == [((b"b", 1), KEY)]

    def test_a_turn_that_is_begun_again_as_it_is_kept_ends_with_its_release(self, table: Table) -> None:
        table.begin(b"a")
        table.leases.keep((b"a", 1))
        table.begin(b"a")
        table.leases.release((b"a", 1), KEY)

        assert not table.end(b"a")
        assert not table.leases.is_held(KEY)


class TestSessions:
    def test_a_turn_ends_with_the_connection_that_it_came_by(self, table: Table) -> None:
        table.begin(b"a", connection="of a")
        table.begin(b"b", connection="of b")
        table.leases.disconnected("of a")

        assert table.granted == [((b"b", 1), KEY)]
        assert not table.leases.has((b"a", 1), KEY)
        assert table.leases.lost == 1

    def test_a_turn_that_came_again_by_another_connection_outlives_the_first(self, table: Table) -> None:
        table.begin(b"a", connection="old")
        table.begin(b"a", connection="new")
        table.leases.disconnected("old")
        outlived = table.leases.has((b"a", 1), KEY)
        table.leases.disconnected("new")

        assert outlived
        assert table.sizes()[:2] == [0, 0]

    def test_a_session_that_is_silent_for_a_lease_loses_its_turns_then_and_not_before(
        self, table: Table
    ) -> None:
        table.begin(b"a")
        table.begin(b"b")
        table.now_s = LEASE_S - 0.001
        table.leases.expire()
        kept = table.leases.has((b"a", 1), KEY)
        table.leases.heard_of(b"b")
        table.now_s = LEASE_S
        table.leases.expire()

        assert kept
        assert table.granted == [((b"b", 1), KEY)]
        assert table.leases.lost == 1

    @pytest.mark.parametrize("by", ["connection", "silence"])
    def test_nobody_is_granted_what_it_loses_in_the_next_moment(self, table: Table, by: str) -> None:
        for session in (b"a", b"b", b"c"):
            table.begin(session, connection="of c" if session == b"c" else "of others")
        if by == "connection":
            table.leases.disconnected("of others")
        else:
            table.now_s = LEASE_S
            table.leases.heard_of(b"c")
            table.leases.expire()

        assert table.granted == [((b"c", 1), KEY)]
        assert table.leases.lost == 1

    def test_a_grant_that_was_not_told_goes_with_its_turn(self) -> None:
        untold = Leases(lambda: 0.0, lambda _: None)
        for session in (b"a", b"b"):
            untold.heard_of(session)
            untold.begin((session, 1), KEY, session)
        untold.end((b"a", 1))
        untold.disconnected(b"b")

        assert untold.take_granted(b"b") == {}

    def test_a_session_that_is_forgotten_has_no_grants(self, table: Table) -> None:
        assert table.leases.take_granted(b"stranger") == {}


SESSIONS = [b"a", b"b", b"c"]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["begin", "begin", "begin", "end", "commit", "disconnected", "pass"]),
        st.sampled_from(SESSIONS),
        st.integers(1, 2),
        st.sampled_from([b"one", b"two"]),
    ),
    max_size=40,
)


@given(STEPS)
def test_each_conversation_goes_to_those_who_ask_in_their_order_and_never_lies_idle(
    steps: list[tuple[str, bytes, int, bytes]],
) -> None:
    table = Table()
    queues: defaultdict[bytes, list[TurnId]] = defaultdict(list)
    heard_at_s: dict[bytes, float] = {}
    for step, session, number, key in steps:
        turn = session, number * 2 + (key == b"two")  # a turn asks for one conversation alone
        lost = []
        if step == "begin":
            heard_at_s[session] = table.now_s
            if turn not in queues[key]:
                queues[key].append(turn)
            assert table.begin(*turn, key=key, connection=session.decode()) == (queues[key][0] == turn)
        elif step == "end":
            assert table.end(*turn) == (turn in queues[key])
            lost = [turn]
        elif step == "commit" and table.leases.has(turn, key):
            table.leases.keep(turn)
            table.leases.release(turn, key)
            lost = [turn]
        elif step == "disconnected":
            table.leases.disconnected(session.decode())
            lost = [each for queue in queues.values() for each in queue if each[0] == session]
        elif step == "pass":
            table.now_s += LEASE_S / 2
            table.leases.expire()
            silent = {each for each, at_s in heard_at_s.items() if at_s <= table.now_s - LEASE_S}
            lost = [each for queue in queues.values() for each in queue if each[0] in silent]
        waited = {each: queue[1:] for each, queue in queues.items()}
        for queue in queues.values():
            queue[:] = [each for each in queue if each not in lost]

        assert sorted(table.granted) == sorted(
            (queue[0], each) for each, queue in queues.items() if queue and queue[0] in waited[each]
        )
        assert {each: table.holder(each) for each in queues} == {
            each: queue[0] if queue else None for each, queue in queues.items()
        }
        assert len(table.leases) == sum(map(bool, queues.values()))
        assert table.leases.waiting == sum(len(queue[1:]) for queue in queues.values())
        table.granted.clear()
