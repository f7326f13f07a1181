"""The checker of histories: it accepts what a correct store can do, and rejects what only a broken one does.

It is tested with hand-made histories and those of a simulated shard, not with its own model.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fsm_ray.errors import FsmRayError, NamespaceUnavailable, OutcomeUnknown, VersionConflict

from .histories import Client, Journal, count, history_of, read_journal
from .linearizability import (
    ANSWERED,
    NOTHING,
    READS,
    Operation,
    Outcome,
    apply,
    is_linearizable,
    violations,
)

FOREVER = 1_000
At = tuple[int, int]


def operation(method: Any, at: At, argument: Any = None, result: Any = None, **others: Any) -> Operation:
    invoked_ns, returned_ns = at
    return Operation(
        client="ann",
        key="chat",
        method=method,
        argument=argument,
        result=result,
        invoked_ns=invoked_ns,
        returned_ns=returned_ns,
        **others,
    )


def state(name: str, version: int | None = None, **data: Any) -> dict[str, Any]:
    told = {"flow": None, "state": name, "data": data}
    return told if version is None else told | {"version": version}


def wrote(name: str, version: int, at: At, **others: Any) -> Operation:
    return operation("set_state", at, state(name), version, **others)


def wrote_perhaps(name: str, at: int, **others: Any) -> Operation:
    return operation("set_state", (at, FOREVER), state(name), outcome=Outcome.UNKNOWN, **others)


def did_not_write(name: str, at: At) -> Operation:
    return operation("set_state", at, state(name), outcome=Outcome.FAILED)


def had_conflict(expected_version: int, found: int | None, at: At) -> Operation:
    return operation(
        "set_state",
        at,
        state("conflicting"),
        found,
        expected_version=expected_version,
        outcome=Outcome.CONFLICT,
    )


def read(name: str, version: int, at: At, **data: Any) -> Operation:
    return operation("get_state", at, None, state(name, version, **data))


def read_nothing(at: At) -> Operation:
    return operation("get_state", at)


def read_data(data: dict[str, Any] | None, at: At) -> Operation:
    return operation("get_data", at, None, data)


def replaced(data: dict[str, Any], version: int, at: At) -> Operation:
    return operation("set_data", at, data, version)


def updated(changes: dict[str, Any], merged: dict[str, Any], at: At) -> Operation:
    return operation("update_data", at, changes, merged)


def updated_perhaps(changes: dict[str, Any], at: int) -> Operation:
    return operation("update_data", (at, FOREVER), changes, outcome=Outcome.UNKNOWN)


def cleared(at: At) -> Operation:
    return operation("clear", at, None, True)  # noqa: FBT003


def cleared_nothing(at: At) -> Operation:
    return operation("clear", at, None, False)  # noqa: FBT003


LINEARIZABLE = {
    "nothing at all": [],
    "a read of what nobody wrote": [read_nothing((0, 1)), read_data(None, (2, 3))],
    "writes and reads one after another": [
        wrote("a", 5, (0, 1)),
        read("a", 5, (2, 3)),
        updated({"n": 1}, {"n": 1}, (4, 5)),
        read("a", 6, (6, 7), n=1),
        replaced({"m": 2}, 9, (8, 9)),
        read_data({"m": 2}, (10, 11)),
        cleared((12, 13)),
        cleared_nothing((14, 15)),
        read_nothing((16, 17)),
    ],
    "an update makes a record without a state": [
        updated({"n": 1}, {"n": 1}, (0, 1)),
        operation("get_state", (2, 3), None, {"flow": None, "state": None, "data": {"n": 1}, "version": 3}),
    ],
    "a read during a write sees it": [wrote("a", 1, (0, 9)), read("a", 1, (1, 2)), read("a", 1, (3, 4))],
    "a read during a write does not see it": [wrote("a", 1, (0, 9)), read_nothing((1, 8))],
    "writes at once are ordered by what readers see": [
        wrote("a", 2, (0, 9)),
        wrote("b", 1, (0, 9)),
        read("b", 1, (1, 3)),
        read("a", 2, (4, 5)),
    ],
    "what ends as the other begins may be later": [wrote("a", 1, (0, 5)), read_nothing((5, 6))],
    "expected versions that match": [
        wrote("a", 4, (0, 1), expected_version=0),
        wrote("b", 5, (2, 3), expected_version=4),
        updated({"n": 1}, {"n": 1}, (4, 5)),
        wrote("c", 8, (6, 7), expected_version=7),
    ],
    "conflicts that are some": [
        had_conflict(3, None, (0, 1)),
        wrote("a", 4, (2, 3)),
        had_conflict(3, 4, (4, 5)),
        had_conflict(0, 4, (6, 7)),
        updated({"n": 1}, {"n": 1}, (8, 9)),
        had_conflict(4, 5, (10, 11)),
    ],
    "an unknown write that shows at last": [
        wrote("a", 1, (0, 1)),
        wrote_perhaps("b", 2),
        read("a", 1, (3, 4)),
        read("b", 2, (50, 60)),
    ],
    "an unknown write that never shows": [
        wrote_perhaps("b", 0),
        wrote("a", 1, (1, 2)),
        read("a", 1, (3, 4)),
    ],
    "an unknown write that makes the record that is cleared": [wrote_perhaps("b", 0), cleared((1, 2))],
    "an unknown write that would meet a conflict": [
        wrote("a", 5, (0, 1)),
        wrote_perhaps("b", 2, expected_version=5),
        wrote("c", 6, (3, 4)),
        read("c", 6, (5, 6)),
    ],
    "unknown updates of which some took effect": [
        updated_perhaps({"x": 1}, 0),
        updated_perhaps({"y": 1}, 0),
        updated_perhaps({"z": 1}, 0),
        updated({"n": 1}, {"n": 1, "y": 1}, (5, 6)),
        read_data({"n": 1, "y": 1, "x": 1}, (7, 8)),
    ],
    "a failed write": [did_not_write("b", (0, 1)), read_nothing((2, 3))],
    "reads without an answer": [
        operation("get_state", (0, FOREVER), outcome=Outcome.UNKNOWN),
        operation("get_data", (0, 1), outcome=Outcome.FAILED),
    ],
}


@pytest.mark.parametrize("history", LINEARIZABLE.values(), ids=LINEARIZABLE.keys())
def test_accepts(history: list[Operation]) -> None:
    assert violations(history) == []


BROKEN = {
    "a stale read": [wrote("a", 1, (0, 1)), wrote("b", 2, (2, 3)), read("a", 1, (4, 5))],
    "a lost write": [wrote("a", 1, (0, 1)), read_nothing((2, 3))],
    "a lost update": [
        updated({"x": 1}, {"x": 1}, (0, 1)),
        updated({"y": 1}, {"y": 1}, (2, 3)),
    ],
    "an update lost to one at the same time": [
        updated({"x": 1}, {"x": 1}, (0, 5)),
        updated({"y": 1}, {"y": 1}, (0, 5)),
    ],
    "a write applied twice": [wrote("a", 1, (0, 1)), wrote("b", 2, (2, 3)), read("a", 3, (4, 5))],
    "an update applied twice, over what was written since": [
        updated({"x": 1}, {"x": 1}, (0, 1)),
        replaced({}, 2, (2, 3)),
        updated({"y": 1}, {"x": 1, "y": 1}, (4, 5)),
    ],
    "a write applied twice, told by the version alone": [wrote("a", 1, (0, 1)), read("a", 2, (2, 3))],
    "an unknown update applied twice": [
        updated_perhaps({"x": 1}, 0),
        read_data({"x": 1}, (1, 2)),
        replaced({}, 2, (3, 4)),
        read_data({}, (5, 6)),
        read_data({"x": 1}, (7, 8)),
    ],
    "a failed write that shows": [did_not_write("b", (0, 1)), read("b", 1, (2, 3))],
    "a write that met a conflict and shows": [
        wrote("a", 1, (0, 1)),
        had_conflict(7, 1, (2, 3)),
        read("conflicting", 2, (4, 5)),
    ],
    "a value that was never written": [wrote("a", 1, (0, 1)), read("b", 1, (2, 3))],
    "a value read before it was written": [read("a", 1, (0, 1)), wrote("a", 1, (2, 3))],
    "reads that go backwards during a write": [
        wrote("a", 1, (0, 1)),
        wrote("b", 2, (2, 9)),
        read("b", 2, (3, 4)),
        read("a", 1, (5, 6)),
    ],
    "an unknown write that shows, vanishes and shows again": [
        wrote("a", 1, (0, 1)),
        wrote_perhaps("b", 2),
        read("b", 2, (3, 4)),
        read("a", 1, (5, 6)),
        read("b", 2, (7, 8)),
    ],
    "an unknown write that shows before it was invoked": [read("b", 1, (0, 1)), wrote_perhaps("b", 2)],
    "a cleared record that comes back": [
        wrote("a", 1, (0, 1)),
        cleared((2, 3)),
        read("a", 1, (4, 5)),
    ],
    "a record cleared twice": [wrote("a", 1, (0, 1)), cleared((2, 9)), cleared((2, 9))],
    "a clear that did not see the record": [wrote("a", 1, (0, 1)), cleared_nothing((2, 3))],
    "data that outlives the record": [
        wrote("a", 1, (0, 1)),
        cleared((2, 3)),
        read_data({}, (4, 5)),
    ],
    "a version given twice": [wrote("a", 1, (0, 1)), wrote("b", 1, (2, 3))],
    "versions that shrink": [wrote("a", 2, (0, 1)), wrote("b", 1, (2, 3))],
    "another version for the same record": [
        updated({}, {}, (0, 1)),
        operation("get_state", (2, 3), None, state("", 3) | {"state": None}),
        operation("get_state", (4, 5), None, state("", 4) | {"state": None}),
    ],
    "two writes over the same version": [
        wrote("a", 1, (0, 1)),
        wrote("b", 2, (2, 9), expected_version=1),
        wrote("c", 3, (2, 9), expected_version=1),
    ],
    "a conflict with the expected version": [wrote("a", 1, (0, 1)), had_conflict(1, 1, (2, 3))],
    "a conflict with a version that is long gone": [
        wrote("a", 1, (0, 1)),
        wrote("b", 2, (2, 3)),
        had_conflict(5, 1, (4, 5)),
    ],
}


@pytest.mark.parametrize("history", BROKEN.values(), ids=BROKEN.keys())
def test_rejects(history: list[Operation]) -> None:
    assert len(violations(history)) == 1


def test_keys_are_independent() -> None:
    wrong = [msgspec.structs.replace(each, key="other") for each in BROKEN["a stale read"]]

    (violation,) = violations([*wrong, *LINEARIZABLE["an unknown write that shows at last"]])

    assert violation.culprit.key == "other"


def test_a_violation_tells_what_cannot_be_explained_and_what_led_to_it() -> None:
    history = [
        wrote("a", 1, (0, 1_000_000)),
        did_not_write("b", (2_000_000, 3_000_000)),
        updated({"n": 1}, {"n": 1}, (4_000_000, 5_000_000)),
        read("b", 2, (6_000_000, 7_000_000)),
        wrote("c", 9, (8_000_000, 9_000_000)),
    ]

    (violation,) = violations(history)

    assert str(violation).splitlines() == [
        "key 'chat': no order explains",
        "  ann: get_state() -> state='b' data={} version=2  [6.000, 7.000 ms]",
        "whose values were written by",
        "  ann: set_state(state='b' data={}) -> failed  [2.000, 3.000 ms]",
        "The most that can be explained by then, in order:",
        "  ann: set_state(state='a' data={}) -> 1  [0.000, 1.000 ms]",
        "  ann: update_data({'n': 1}) -> {'n': 1}  [4.000, 5.000 ms]",
        "and then the record is flow=None state='a' data={'n': 1} of a version after 1",
    ]


def test_a_violation_tells_a_value_that_nobody_wrote() -> None:
    (violation,) = violations(BROKEN["a value that was never written"])

    assert "written by\n  nobody\n" in str(violation)


def test_a_long_prefix_is_told_by_its_end() -> None:
    history = [wrote(f"s{i}", i, (10 * i, 10 * i + 1)) for i in range(1, 100)]

    (violation,) = violations([*history, read_nothing((2_000, 2_001))])

    assert "... 91 operations\n  ann: set_state(state='s92'" in str(violation)


class Shard:
    """A correct shard, written without regard to the checker's own model."""

    def __init__(self) -> None:
        self.version = 100
        self.records: dict[str, dict[str, Any]] = {}

    def do(self, call: dict[str, Any]) -> tuple[Outcome, Any]:
        key, record = call["key"], self.records.get(call["key"])
        expected = call["expected_version"]
        version = record["version"] if record else None
        if expected is not None and version != (expected or None):
            return Outcome.CONFLICT, version
        if call["method"] == "get_state":
            return Outcome.OK, record
        if call["method"] == "get_data":
            return Outcome.OK, record["data"] if record else None
        self.version += call["method"] != "clear" or record is not None
        if call["method"] == "clear":
            return Outcome.OK, self.records.pop(key, None) is not None
        old = record or state("", 0) | {"state": None}
        argument = call["argument"]
        if call["method"] == "set_state":
            self.records[key] = argument | {"version": self.version}
            return Outcome.OK, self.version
        data = argument if call["method"] == "set_data" else old["data"] | argument
        self.records[key] = old | {"data": data, "version": self.version}
        return Outcome.OK, self.version if call["method"] == "set_data" else data


def random_call(chance: random.Random, shard: Shard, value: str, key: str) -> dict[str, Any]:
    method = chance.choice([*READS, "set_state", "set_data", "update_data", "update_data", "clear"])
    arguments = {
        "set_state": state(value, n=value),
        "set_data": {"n": value},
        "update_data": {chance.choice("mn"): value},
    }
    current = shard.records.get(key, {"version": 0})["version"]
    expected = chance.choice([None, None, None, 0, current, 99]) if method not in READS else None
    return {
        "method": method,
        "key": key,
        "argument": arguments.get(method),
        "expected_version": expected,
    }


def simulated(
    seed: int, operations: int, *, keys: int = 1, clients: int = 16, unknown: float = 0.0, failed: float = 0.0
) -> list[Operation]:
    """A history of operations that overlap, in the order in which they took effect."""
    chance, shard, history = random.Random(seed), Shard(), []
    free_at_ns = [0] * clients
    now_ns = 0
    for number in range(operations):
        client = chance.randrange(clients)
        now_ns = max(now_ns + 10, free_at_ns[client] + 1)
        call = random_call(chance, shard, f"{client}.{number}", f"chat {chance.randrange(keys)}")
        is_failed = chance.random() < failed
        outcome, result = (Outcome.FAILED, None) if is_failed else shard.do(call)
        if not is_failed and chance.random() < unknown:
            outcome, result = Outcome.UNKNOWN, None
        invoked_ns = max(free_at_ns[client], now_ns - chance.randrange(80))
        free_at_ns[client] = now_ns + chance.randrange(80)
        history.append(
            Operation(
                client=f"{client}",
                outcome=outcome,
                result=result,
                invoked_ns=invoked_ns,
                returned_ns=free_at_ns[client],
                **call,
            )
        )
    return history


@pytest.mark.parametrize("seed", range(3))
def test_two_thousand_operations_of_sixteen_clients_are_accepted(seed: int) -> None:
    assert violations(simulated(seed, 2_000, keys=20, unknown=0.03, failed=0.03)) == []


SEEDS = st.integers(0, 2**32)


@given(SEEDS, st.integers(1, 60), st.integers(1, 8), st.integers(1, 3))
def test_what_a_correct_shard_did_is_accepted(seed: int, operations: int, clients: int, keys: int) -> None:
    history = simulated(seed, operations, keys=keys, clients=clients, unknown=0.1, failed=0.1)

    assert violations(history) == []


@given(SEEDS, st.integers(0, 40), st.sampled_from(["set_state", "set_data", "update_data"]))
def test_an_acknowledged_write_without_effect_is_rejected(seed: int, operations: int, method: str) -> None:
    history = simulated(seed, operations)
    end_ns = max((each.returned_ns for each in history), default=0)
    before = shard_after(history)
    _, seen = before.do({"method": "get_state", "key": "chat 0", "expected_version": None})
    argument = state("lost") if method == "set_state" else {"lost": 1}
    result = before.version + 1 if method != "update_data" else (seen["data"] if seen else {}) | argument
    lost = operation(method, (end_ns + 1, end_ns + 2), argument, result)
    read_later = operation("get_state", (end_ns + 3, end_ns + 4), None, seen)

    (violation,) = violations(in_chat_0([*history, lost, read_later]))

    assert [violation.culprit] == in_chat_0([read_later])


def shard_after(history: Sequence[Operation]) -> Shard:
    shard = Shard()
    for each in history:
        shard.do({name: getattr(each, name) for name in ("method", "key", "argument", "expected_version")})
    return shard


def in_chat_0(history: Sequence[Operation]) -> list[Operation]:
    return [msgspec.structs.replace(each, key="chat 0") for each in history]


@given(SEEDS, st.integers(1, 6), st.integers(1, 4), st.sampled_from(["swap", "repeat", "drop"]))
def test_it_agrees_with_a_trial_of_all_orders(
    seed: int, operations: int, clients: int, mutation: str
) -> None:
    history = simulated(seed, operations, clients=clients, unknown=0.2, failed=0.1)
    mutated = mutate(history, mutation, random.Random(seed))

    assert is_linearizable(mutated) == has_an_order(mutated)


def mutate(history: list[Operation], mutation: str, chance: random.Random) -> list[Operation]:
    """The history as one of a broken store, perhaps."""
    if mutation == "drop":
        dropped = chance.choice(history)
        return [each for each in history if each is not dropped]
    alike = [
        (one, other)
        for one, other in itertools.permutations([each for each in history if each.outcome in ANSWERED], 2)
        if one.method == other.method and (one.outcome, one.result) != (other.outcome, other.result)
    ]
    if not alike:
        return history
    one, other = chance.choice(alike)
    answers = {id(one): other, id(other): one if mutation == "swap" else other}
    return [
        msgspec.structs.replace(each, outcome=answer.outcome, result=answer.result)
        for each in history
        for answer in [answers.get(id(each), each)]
    ]


def has_an_order(history: list[Operation]) -> bool:
    """Whether an order of all that were answered and some of the unknown keeps to real time and the model."""
    required = [each for each in history if each.outcome in ANSWERED]
    unknown = [each for each in history if each.outcome is Outcome.UNKNOWN]
    return any(
        keeps_to_real_time(order) and explains(order)
        for size in range(len(unknown) + 1)
        for some in itertools.combinations(unknown, size)
        for order in itertools.permutations([*required, *some])
    )


def keeps_to_real_time(order: Sequence[Operation]) -> bool:
    return not any(
        later.outcome is not Outcome.UNKNOWN and later.returned_ns < earlier.invoked_ns
        for earlier, later in itertools.combinations(order, 2)
    )


def explains(order: Sequence[Operation]) -> bool:
    record = NOTHING
    for each in order:
        after = apply(each, record)
        if after is None:
            return False
        record = after
    return True


# What clients record.


@pytest.mark.parametrize(
    ("error", "outcome", "result"),
    [
        (VersionConflict("", expected_version=3, actual_version=4), Outcome.CONFLICT, 4),
        (OutcomeUnknown(""), Outcome.UNKNOWN, None),
        (NamespaceUnavailable(""), Outcome.FAILED, None),
    ],
)
def test_an_error_is_recorded_as_what_it_says_of_the_write(
    error: FsmRayError, outcome: Outcome, result: int | None
) -> None:
    records: list[Operation] = []

    with Client("ann", 1, records.append).recorded():
        raise error

    (recorded,) = history_of(records)
    assert (recorded.outcome, recorded.result) == (outcome, result)


def test_a_client_that_dies_leaves_its_operation_on_record(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    client = Client("ann", 1, journal.record)

    with client.recorded() as ended:
        ended.result = None
    with contextlib.suppress(KeyboardInterrupt), client.recorded():
        raise KeyboardInterrupt

    recorded = history_of(read_journal(tmp_path / "journal"))
    assert [each.outcome for each in recorded] == [Outcome.OK, Outcome.UNKNOWN]
    assert recorded[0].invoked_ns <= recorded[0].returned_ns <= recorded[1].invoked_ns
    journal.close()


def test_writes_are_counted_against_versions() -> None:
    history = [
        wrote("a", 1, (0, 1)),
        cleared((2, 3)),
        cleared_nothing((4, 5)),
        had_conflict(7, None, (6, 7)),
        did_not_write("b", (8, 9)),
        wrote_perhaps("c", 10),
        read_nothing((11, 12)),
    ]

    assert [count(history, versions).lost for versions in (1, 2, 3, 4)] == [1, 0, 0, 0]
    assert [count(history, versions).made_twice for versions in (1, 2, 3, 4)] == [0, 0, 0, 1]
