"""Scans: all records of a shard as they are at one moment, in pages, while writes go on.

A scan goes through the slots in their order. What a write changes behind the place that the scan has reached
is kept aside for it as it was; so a page costs what is looked at for it, and nobody waits for a whole scan.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice

from fsm_ray import protocol
from fsm_ray.codec import slot_of
from fsm_ray.errors import FsmRayError, Overloaded, ScanInterrupted
from fsm_ray.options import SLOTS
from fsm_ray.protocol import SCAN, ScanRequest, reply
from fsm_ray.record import Front, Packer, head_of
from fsm_ray.tally import ShardTally

MAX_SCANS = 64
"""Scans of one shard at a time."""

MAX_KEPT_ASIDE = 1_000_000
"""Records that may be kept aside for one scan; then it is interrupted."""

MAX_ASIDE_BYTES = 256 << 20
"""Of records kept aside for all scans, one kept for several counted as often; past it, the scan with most is
interrupted."""

IDLE_S = 120.0
"""How long a scan may pause, and how long slots are known after the last one."""

MAX_PAUSE_S = 10.0
"""How long a scan may pause though another one wants its place: most that pause were given up."""

_LOOKED_AT_ALONE = 256
_LOOKED_AT_BESIDE_OTHERS = 16
"""Records that are looked at for one page: after a page, nobody else asked for anything, or others did.

Beside 16 writers that keep two cores busy, the p99 of a write grows by less than a half to twice with pages
of 16, and to over three times with 64.
"""

_MOST_BYTES = 1 << 18
"""Of one page, but for its last record."""

_DONE = protocol.encode_result(value=True)
_MORE = protocol.encode_result(value=False)


@dataclass(slots=True)
class _Scan:
    flow: str | None
    state: str | None
    slot: int
    """The one that is looked through."""
    after: bytes
    """The last key there that was looked at."""
    now_ms: int
    """The moment that it shows."""
    heard_at_s: float
    page: int = -1
    results: list[bytes] = field(default_factory=list)
    """Of this page."""
    aside: dict[bytes, bytes | None] = field(default_factory=dict)
    """Records as they were, by key; None where there was none."""
    aside_bytes: int = 0
    removed: dict[int, list[bytes]] = field(default_factory=dict)
    """Slot -> keys of these, which may not be there any more as the scan comes to them."""

    def keep_aside(self, key: bytes, before: bytes | None) -> None:
        """Keep the record as it was."""
        self.aside[key] = before
        self.aside_bytes += len(key) + len(before or b"")

    def take_aside(self, key: bytes) -> bytes | None:
        """The record as it was; it is looked at now."""
        before = self.aside.pop(key)
        self.aside_bytes -= len(key) + len(before or b"")
        return before

    def enter(self, slot: int) -> None:
        """Go on with the next slot."""
        self.removed.pop(self.slot, None)
        self.slot = slot
        self.after = b""


class Scans:
    """The scans of one shard."""

    def __init__(
        self,
        bot_name: str,
        records: Mapping[bytes, bytes | None],
        packer: Packer,
        is_over: Callable[[bytes, int], bool],
        clock: Callable[[], float],
        *,
        tally: ShardTally,
    ) -> None:
        """`is_over` tells whether a record has expired at a time in milliseconds; `clock` counts seconds."""
        self._bot_name = bot_name
        self._records = records
        self._packer = packer
        self._is_over = is_over
        self._clock = clock
        self._tally = tally
        self._scans: dict[bytes, _Scan] = {}
        self._finished: dict[bytes, _Scan] = {}
        """The last ones that are over: their last page may be asked for again."""
        self._slots: list[list[bytes]] = []
        """The keys of each slot, in order, once somebody scans."""
        self._unsorted: Iterator[bytes] = iter(())
        """The keys that are not in their slots yet."""
        self._is_sorted = False
        self._last_s = 0.0

    def __len__(self) -> int:
        return len(self._scans)

    @property
    def want_births(self) -> bool:
        """Whether `note` is to be called with changes that make or end records; during scans, with all."""
        return bool(self._slots)

    def handle(self, request: ScanRequest, now_ms: int, *, is_alone: bool) -> bytes:
        """The reply with a page of what there is at this time; later pages show the same moment.

        `is_alone`: whether nobody else wants anything.
        """
        count = _LOOKED_AT_ALONE if is_alone else _LOOKED_AT_BESIDE_OTHERS
        try:
            results = self._results(request, now_ms, count)
        except FsmRayError as error:
            self._tally.count_failed(ScanRequest, error)
            results = [protocol.encode_error(error)]
        return reply(SCAN, request.number, results)

    def note(self, changes: Iterable[tuple[int, bytes, bytes | None, bytes | None]]) -> None:
        """Take each `Change` into account, in their order; they are made, or about to be."""
        for _, key, before, after in changes:
            if self._scans:
                self._keep_aside(key, before)
            if before is None or after is None:
                self._put_in_slot(key, is_there=after is not None)

    def forget_idle(self) -> None:
        """Drop scans that paused for too long, and what is known of slots if nobody scans."""
        horizon_s = self._clock() - IDLE_S
        for scans in (self._scans, self._finished):
            for scan_id in [each for each, scan in scans.items() if scan.heard_at_s < horizon_s]:
                del scans[scan_id]
        if self._slots and self._last_s < horizon_s:
            self._slots, self._unsorted, self._is_sorted = [], iter(()), False

    def _results(self, request: ScanRequest, now_ms: int, count: int) -> list[bytes]:
        self._last_s = self._clock()
        if not request.limit:
            # Whoever asked for it has enough.
            self._scans.pop(request.scan, None)
            return [_DONE]
        scan = self._scans.get(request.scan) or self._finished.get(request.scan)
        if scan is None:
            self._check_new(request)
            if not self._is_sorted and not self._sort(2 * count):
                return [_MORE]
            scan = self._begin(request, now_ms)
        scan.heard_at_s = self._last_s
        # One that was sent again may come late: a page before this one was answered, and nobody waits for it.
        if request.page > scan.page and scan.slot < SLOTS:
            scan.page = request.page
            scan.results = self._page(scan, request.limit, count)
            if scan.slot == SLOTS:
                self._finish(request.scan)
        return scan.results

    def _check_new(self, request: ScanRequest) -> None:
        """Raise unless this scan can begin."""
        if request.has_begun:
            raise ScanInterrupted(
                "the shard was restarted during the scan, or the scan paused for too long, or too much was "
                "written meanwhile: what follows is of another moment. Scan again, or go on with after= the "
                "last key found",
                bot=self._bot_name,
            )
        if len(self._scans) < MAX_SCANS:
            return
        paused_id = min(self._scans, key=lambda scan_id: self._scans[scan_id].heard_at_s)
        if self._scans[paused_id].heard_at_s > self._last_s - MAX_PAUSE_S:
            raise Overloaded(
                f"{MAX_SCANS} scans of this shard are under way: retry later", bot=self._bot_name
            )
        del self._scans[paused_id]

    def _begin(self, request: ScanRequest, now_ms: int) -> _Scan:
        """Begin a scan that shows this moment."""
        after = request.after
        slot = 0 if after is None else slot_of(after)
        scan = _Scan(request.flow, request.state, slot, after or b"", now_ms, self._last_s)
        self._scans[request.scan] = scan
        return scan

    def _finish(self, scan_id: bytes) -> None:
        self._finished[scan_id] = self._scans.pop(scan_id)
        if len(self._finished) > MAX_SCANS:
            del self._finished[next(iter(self._finished))]

    def _page(self, scan: _Scan, limit: int, left: int) -> list[bytes]:
        """What there is to be found of the next keys, so many if there are as many left."""
        found: list[bytes] = []
        size, aside = 0, scan.aside
        get, blob, is_wanted = self._records.get, self._packer.blob, self._is_wanted
        while scan.slot < SLOTS:
            keys = self._next_keys(scan, left)
            for key in keys:
                if len(found) == limit or size > _MOST_BYTES:
                    return [*found, _MORE]
                scan.after = key
                packed = scan.take_aside(key) if key in aside else get(key)
                if packed is not None and is_wanted(scan, packed):
                    found.append(protocol.encode_found(key, blob(packed)))
                    size += len(found[-1])
            left -= len(keys)
            if not left:
                return [*found, _MORE]
            scan.enter(scan.slot + 1)
        return [*found, _DONE]

    def _next_keys(self, scan: _Scan, count: int) -> list[bytes]:
        """So many keys of the slot that the scan is in, if there are as many behind where it is."""
        keys = self._slots[scan.slot]
        start = bisect.bisect_right(keys, scan.after)
        some = keys[start : start + count]
        removed = scan.removed.get(scan.slot)
        if removed:
            some = sorted({*some, *(key for key in removed if key > scan.after)})[:count]
        return some

    def _is_wanted(self, scan: _Scan, packed: bytes) -> bool:
        if self._is_over(packed, scan.now_ms):
            return False
        if scan.flow is None and scan.state is None:
            return True
        return matches(self._packer.front(head_of(packed)), scan.flow, scan.state)

    def _keep_aside(self, key: bytes, before: bytes | None) -> None:
        """Keep the record as it was for the scans that have not come to it yet."""
        slot = slot_of(key)
        for scan_id, scan in tuple(self._scans.items()):
            if key in scan.aside or (slot, key) <= (scan.slot, scan.after):
                continue
            scan.keep_aside(key, before)
            if before is not None:
                scan.removed.setdefault(slot, []).append(key)
            if len(scan.aside) > MAX_KEPT_ASIDE:
                del self._scans[scan_id]
        if sum(scan.aside_bytes for scan in self._scans.values()) > MAX_ASIDE_BYTES:
            del self._scans[max(self._scans, key=lambda scan_id: self._scans[scan_id].aside_bytes)]

    def _put_in_slot(self, key: bytes, *, is_there: bool) -> None:
        keys = self._slots[slot_of(key)]
        place = bisect.bisect_left(keys, key)
        was_there = place < len(keys) and keys[place] == key
        if is_there and not was_there:
            keys.insert(place, key)
        elif was_there and not is_there:
            del keys[place]

    def _sort(self, count: int) -> bool:
        """Put so many more keys into their slots; tell whether all are there."""
        if not self._slots:
            self._slots = [[] for _ in range(SLOTS)]
            self._unsorted = iter(list(self._records))
        keys = list(islice(self._unsorted, count))
        for key in keys:
            if key in self._records:
                self._put_in_slot(key, is_there=True)
        self._is_sorted = not keys
        return self._is_sorted


def matches(front: Front, flow: str | None, state: str | None) -> bool:
    """Whether flow and state are the ones that are asked for; None asks for any."""
    return (flow is None or front[0] == flow) and (state is None or front[1] == state)
