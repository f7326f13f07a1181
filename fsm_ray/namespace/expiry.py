"""Expiry: when records end, and which of them are due to be swept."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from fsm_ray.options import BotOptions
from fsm_ray.record import NEVER_MS, to_ms

_BUCKET_MS = 1_000
"""Records whose deadlines are so close are due at the same time, at the end of it."""

_FEW = 1_024
"""Buckets that are gone and do not matter."""


class TimesToLive:
    """How long records live that no write gave a time to live: by their state, or else all the same."""

    def __init__(self, options: BotOptions) -> None:
        self.is_absolute = options.ttl_mode == "absolute"
        self.by_state = {name: to_ms(ttl_s) for name, ttl_s in options.state_ttl_s.items()}
        self._ttl_ms = to_ms(options.ttl_s)

    @property
    def are_given(self) -> bool:
        """Whether any record expires by itself."""
        return bool(self.by_state) or self._ttl_ms != NEVER_MS

    def ttl_ms(self, flow: str | None, state: str | None) -> int:
        """The time to live in this flow and state."""
        if state is None or not self.by_state:
            return self._ttl_ms
        anywhere_ms = self.by_state.get(state, self._ttl_ms)
        return anywhere_ms if flow is None else self.by_state.get(f"{flow}:{state}", anywhere_ms)


class Deadlines:
    """The keys of records that expire, by the time to look at them; a record may live longer by then.

    A key is kept once, at the earliest of its times. A deadline that is put off, as most are with each write,
    costs nothing: who looks at the record then adds it again. The keys that are in bound what is kept.
    """

    def __init__(self) -> None:
        self._places: dict[bytes, int] = {}
        """Key -> the bucket that it is to be taken from; in others it was left behind."""
        # Lists, though keys can only be left behind in them: sets take 60 to 120 bytes more for each key.
        self._buckets: dict[int, list[bytes]] = {}
        self._left_behind: dict[int, int] = {}
        """Bucket -> how many keys were left behind in it, if any: at most half of them."""
        self._order: list[int] = []
        """A heap of the buckets, and about as many that are gone."""

    def __len__(self) -> int:
        return len(self._places)

    def add(self, key: bytes, deadline_ms: int) -> None:
        """Have the record looked at when the deadline is over, or before."""
        if deadline_ms == NEVER_MS:
            return
        bucket = deadline_ms // _BUCKET_MS + 1
        place = self._places.get(key)
        if place is not None:
            if place <= bucket:
                return
            self.remove(key)
        self._places[key] = bucket
        if bucket not in self._buckets:
            self._buckets[bucket] = []
            heapq.heappush(self._order, bucket)
        self._buckets[bucket].append(key)

    def remove(self, key: bytes) -> None:
        """Have nothing looked at: there is no such record any more. It may not be in."""
        bucket = self._places.pop(key, None)
        if bucket is None:
            return
        left_behind = self._left_behind.get(bucket, 0) + 1
        if 2 * left_behind > len(self._buckets[bucket]):
            self._clean(bucket)
        else:
            self._left_behind[bucket] = left_behind

    def take_due(self, now_ms: int) -> Iterator[bytes]:
        """The keys of records to be looked at, each taken out as it is given."""
        while self._order and self._order[0] * _BUCKET_MS <= now_ms:
            bucket = self._order[0]
            keys = self._buckets.get(bucket)
            if not keys:
                self._buckets.pop(bucket, None)
                self._left_behind.pop(bucket, None)
                heapq.heappop(self._order)
                continue
            key = keys.pop()
            if self._places.get(key) == bucket:
                del self._places[key]
                yield key

    def _clean(self, bucket: int) -> None:
        """Drop what was left behind in the bucket, and the bucket if that is all."""
        self._left_behind.pop(bucket, None)
        keys = {key for key in self._buckets.pop(bucket) if self._places.get(key) == bucket}
        if keys:
            self._buckets[bucket] = list(keys)
        elif len(self._order) > 2 * len(self._buckets) + _FEW:
            self._order = sorted(self._buckets)
