"""A checker of histories: does some order of the operations, one at a time, explain every answer?

The order must keep to real time: what returned before another was invoked comes first. Keys are checked one
by one, since a history is linearizable exactly when that of each key is (Herlihy and Wing, 1990). The search
is Wing and Gong's (1993), with Lowe's memory of the configurations that led nowhere ("Testing for
linearizability", 2017): a configuration is the set of operations already in order, and the record after them.

An operation without an answer may take effect at any time after its invocation, or never. One that failed,
which means "nothing was changed", never does.
"""

from __future__ import annotations

import bisect
import enum
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import msgspec

Method = Literal["get_state", "get_data", "set_state", "set_data", "update_data", "clear"]

READS = ("get_state", "get_data")

SHOWN = 8
"""Operations of a prefix that a violation shows."""


class Outcome(enum.StrEnum):
    """How an operation ended for the client that called it."""

    OK = "ok"
    CONFLICT = "conflict"
    """The result is the version that was found, None for no record."""
    FAILED = "failed"
    """The answer, or its lack, means that nothing was changed."""
    UNKNOWN = "unknown"
    """It may have taken effect, may do so later, or never; also of a client that died."""


ANSWERED = (Outcome.OK, Outcome.CONFLICT)


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    """One call of a client, and what came of it. Values of data must be hashable."""

    client: str
    key: str
    method: Method
    argument: Any = None
    """The State of `set_state` as a dict, or the data, or the changes."""
    expected_version: int | None = None
    outcome: Outcome = Outcome.OK
    result: Any = None
    """A State is a dict."""
    invoked_ns: int
    returned_ns: int = 0
    """Without meaning when the outcome is unknown."""


class Content(NamedTuple):
    """What a record says."""

    flow: str | None
    state: str | None
    data: frozenset[tuple[str, Any]]


NO_CONTENT = Content(None, None, frozenset())


class Record(NamedTuple):
    """The model of one conversation. Versions only grow; not every answer tells the new one."""

    content: Content | None
    """None: there is no record."""
    version: int
    """The last version that an answer told."""
    is_exact: bool
    """Whether it is this record's; else this record's is larger."""

    def at(self, version: int | None) -> Record | None:
        """This record, known to have the version (None: known not to be there); None if it cannot."""
        if version is None or self.content is None:
            return self if version is None and self.content is None else None
        is_possible = version == self.version if self.is_exact else version > self.version
        return Record(self.content, version, is_exact=True) if is_possible else None

    def written(self, content: Content | None, version: int | None = None) -> Record | None:
        """The record after a write, whose version may be known; None if versions would not grow."""
        if version is None:
            return Record(content, self.version, is_exact=False)
        return Record(content, version, is_exact=True) if version > self.version else None


NOTHING = Record(None, 0, is_exact=False)


def apply(operation: Operation, record: Record) -> Record | None:
    """The record after the operation; None if it could not have ended as it did on this record."""
    if operation.outcome is Outcome.CONFLICT:
        is_conflict = operation.result != (operation.expected_version or None)
        return record.at(operation.result) if is_conflict else None
    if operation.expected_version is not None:
        expected = record.at(operation.expected_version or None)
        if expected is None:
            return None
        record = expected
    return _APPLY[operation.method](operation, record)


def _get_state(operation: Operation, record: Record) -> Record | None:
    result = operation.result
    if result is None:
        return record.at(None)
    return record.at(result["version"]) if record.content == _content(result) else None


def _get_data(operation: Operation, record: Record) -> Record | None:
    data = None if record.content is None else record.content.data
    return record if data == _frozen(operation.result) else None


def _set_state(operation: Operation, record: Record) -> Record | None:
    return record.written(_content(operation.argument), operation.result)


def _set_data(operation: Operation, record: Record) -> Record | None:
    kept = record.content or NO_CONTENT
    return record.written(kept._replace(data=frozenset(operation.argument.items())), operation.result)


def _update_data(operation: Operation, record: Record) -> Record | None:
    kept = record.content or NO_CONTENT
    merged = frozenset((dict(kept.data) | operation.argument).items())
    if operation.outcome is Outcome.OK and merged != _frozen(operation.result):
        return None
    return record.written(kept._replace(data=merged))


def _clear(operation: Operation, record: Record) -> Record | None:
    was_there = record.content is not None
    if operation.outcome is Outcome.OK and operation.result != was_there:
        return None
    return record.written(None) if was_there else record


_APPLY: Mapping[str, Callable[[Operation, Record], Record | None]] = {
    "get_state": _get_state,
    "get_data": _get_data,
    "set_state": _set_state,
    "set_data": _set_data,
    "update_data": _update_data,
    "clear": _clear,
}


def _content(state: Mapping[str, Any]) -> Content:
    return Content(state["flow"], state["state"], frozenset(state["data"].items()))


def _frozen(data: Mapping[str, Any] | None) -> frozenset[tuple[str, Any]] | None:
    return None if data is None else frozenset(data.items())


@dataclass(frozen=True, slots=True)
class Configuration:
    """Some operations in order, and the record after them."""

    record: Record = NOTHING
    first: int = 0
    """Operations before this one, of those that must be in the order, are in it."""
    others: int = 0
    """Bit i: operation `first` + i is in it as well."""
    optional: int = 0
    """Bit i: operation i, of those that may be in the order or not, is in it."""
    size: int = 0
    """How many of those that must be in it are."""
    last: Operation | None = None
    before: Configuration | None = None
    """The configuration that `last` was added to."""

    def order(self) -> list[Operation]:
        """The operations in their order."""
        reverse = []
        here: Configuration | None = self
        while here is not None and here.last is not None:
            reverse.append(here.last)
            here = here.before
        return reverse[::-1]


class Search:
    """The search for an order of the operations of one key."""

    def __init__(self, history: Iterable[Operation]) -> None:
        by_time = sorted(history, key=lambda operation: operation.invoked_ns)
        self._required = [operation for operation in by_time if operation.outcome in ANSWERED]
        self._optional = [
            operation
            for operation in by_time
            if operation.outcome is Outcome.UNKNOWN and operation.method not in READS
        ]
        self.deepest = Configuration()
        """The configuration with the most operations in order."""

    def run(self) -> bool:
        """Whether all fit into an order."""
        led_nowhere = defaultdict[tuple[Record, int, int], list[int]](list)
        to_visit = [Configuration()]
        while to_visit:
            here = to_visit.pop()
            # With fewer of the optional ones in the order, more are left to choose from.
            others = led_nowhere[here.record, here.first, here.others]
            if any(optional & here.optional == optional for optional in others):
                continue
            others.append(here.optional)
            if here.size > self.deepest.size:
                self.deepest = here
            if here.size == len(self._required):
                return True
            to_visit.extend(reversed(list(self._successors(here))))
        return False

    def _candidates(self, here: Configuration) -> tuple[list[int], list[int]]:
        """Which of the required, and of the optional operations, real time allows to come next."""
        required, first_return_ns = [], math.inf
        for i in range(here.first, len(self._required)):
            operation = self._required[i]
            if here.others >> (i - here.first) & 1:
                continue
            if operation.invoked_ns > first_return_ns:
                break
            required.append(i)
            first_return_ns = min(operation.returned_ns, first_return_ns)
        optional = []
        for i, operation in enumerate(self._optional):
            if operation.invoked_ns > first_return_ns:
                break
            if not here.optional >> i & 1:
                optional.append(i)
        return required, optional

    def _successors(self, here: Configuration) -> Iterator[Configuration]:
        required, optional = self._candidates(here)
        added = []
        for i in required:
            operation = self._required[i]
            record = apply(operation, here.record)
            if record == here.record:
                # It changes nothing, so if an order is left at all, then also one in which it comes next.
                yield self._with_required(here, i, record)
                return
            if record is not None:
                added.append((record, i))
        # Versions only grow: what was told a larger one cannot come before what was told the least.
        least = min((record.version for record, _ in added if record.is_exact), default=math.inf)
        for record, i in added:
            if record.version <= least:
                yield self._with_required(here, i, record)
        for i in optional:
            record = apply(self._optional[i], here.record)
            if record is not None and record != here.record:
                yield self._with_optional(here, i, record)

    def _with_required(self, here: Configuration, i: int, record: Record) -> Configuration:
        first, others = here.first, here.others | 1 << (i - here.first)
        while others & 1:
            first, others = first + 1, others >> 1
        return Configuration(
            record, first, others, here.optional, here.size + 1, self._required[i], before=here
        )

    def _with_optional(self, here: Configuration, i: int, record: Record) -> Configuration:
        optional = here.optional | 1 << i
        return Configuration(
            record, here.first, here.others, optional, here.size, self._optional[i], before=here
        )


@dataclass(frozen=True, slots=True)
class Violation:
    """The first answer for which the history of one key is not linearizable, and what leads up to it."""

    culprit: Operation
    """Before it returned, there was an order for all answers."""
    prefix: Sequence[Operation]
    """The most operations that an order explains by then, in that order."""
    record: Record
    """The record after them."""
    sources: Sequence[Operation]
    """The writes of what the answer holds."""
    start_ns: int

    def __str__(self) -> str:
        left_out = len(self.prefix) - SHOWN
        lines = [f"key {self.culprit.key!r}: no order explains", self._told(self.culprit)]
        if _values(self.culprit.result):
            lines += ["whose values were written by", *map(self._told, self.sources)]
            lines += [] if self.sources else ["  nobody"]
        lines += ["The most that can be explained by then, in order:"]
        lines += [f"  ... {left_out} operations"] if left_out > 0 else []
        lines += map(self._told, self.prefix[-SHOWN:])
        return "\n".join([*lines, f"and then the record is {_told_record(self.record)}"])

    def _told(self, operation: Operation) -> str:
        invoked_ms = (operation.invoked_ns - self.start_ns) / 1e6
        returned_ms = f"{(operation.returned_ns - self.start_ns) / 1e6:.3f}"
        until = "..." if operation.outcome is Outcome.UNKNOWN else returned_ms
        return f"  {_told_operation(operation)}  [{invoked_ms:.3f}, {until} ms]"


def violations(history: Iterable[Operation]) -> list[Violation]:
    """A violation for each key whose history is not linearizable."""
    by_key = defaultdict[str, list[Operation]](list)
    for operation in history:
        by_key[operation.key].append(operation)
    return [_explain(part) for part in by_key.values() if not is_linearizable(part)]


def is_linearizable(history: Iterable[Operation]) -> bool:
    """Whether the history of one key, which has no record before it, is linearizable."""
    return Search(history).run()


def _explain(history: Sequence[Operation]) -> Violation:
    answered = [operation for operation in history if operation.outcome in ANSWERED]
    answered.sort(key=lambda operation: operation.returned_ns)
    # What was linearizable once it was longer, was so before: the first that is not is found by bisection.
    first_wrong = bisect.bisect_left(
        answered, 1, key=lambda last: 0 if is_linearizable(_until(history, last.returned_ns)) else 1
    )
    culprit = answered[first_wrong]
    search = Search(_until(history, culprit.returned_ns))
    search.run()
    return Violation(
        culprit=culprit,
        prefix=search.deepest.order(),
        record=search.deepest.record,
        sources=[each for each in history if _values(each.argument) & _values(culprit.result)],
        start_ns=min(operation.invoked_ns for operation in history),
    )


def _until(history: Iterable[Operation], end_ns: int) -> list[Operation]:
    """What was known of the history at that time."""
    return [
        operation
        if operation.returned_ns <= end_ns or operation.outcome not in ANSWERED
        else msgspec.structs.replace(operation, outcome=Outcome.UNKNOWN, result=None)
        for operation in history
        if operation.invoked_ns <= end_ns
    ]


def _values(state_or_data: Any) -> set[Any]:
    """The values that tell writes apart."""
    if not isinstance(state_or_data, dict):
        return set()
    if "flow" not in state_or_data:
        return set(state_or_data.values())
    return {*state_or_data["data"].values(), state_or_data["state"]} - {None}


def _told_operation(operation: Operation) -> str:
    arguments = [] if operation.argument is None else [_told_value(operation.argument)]
    if operation.expected_version is not None:
        arguments.append(f"expected_version={operation.expected_version}")
    answer = {
        Outcome.OK: _told_value(operation.result),
        Outcome.CONFLICT: f"conflict with version {operation.result}",
        Outcome.FAILED: "failed",
        Outcome.UNKNOWN: "unknown",
    }[operation.outcome]
    return f"{operation.client}: {operation.method}({', '.join(arguments)}) -> {answer}"


def _told_value(value: Any) -> str:
    if isinstance(value, dict) and "flow" in value:
        return " ".join(f"{name}={told!r}" for name, told in value.items() if told is not None)
    return repr(value)


def _told_record(record: Record) -> str:
    if record.content is None:
        return "not there"
    flow, state, data = record.content
    version = f"version {record.version}" if record.is_exact else f"a version after {record.version}"
    return f"flow={flow!r} state={state!r} data={dict(sorted(data))!r} of {version}"
