"""Publisher: totals in, increments out, to Ray's metrics.

A call of Ray's costs about four microseconds, so what has not changed is not published again.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

from ray.util import metrics as ray_metrics

from fsm_ray.metrics.catalog import Metric
from fsm_ray.tally import TOTAL, Spread

PUBLISH_EVERY_S = 5.0
"""Ray sends what it was told every ten seconds, unless it is set up otherwise."""

_NEARLY_NOTHING = 1e-9
"""A counter begins with this: Ray lets none begin with 0. A bucket of a histogram has to be there though
nothing is in it, or `histogram_quantile` takes the one above it to begin at 0."""

_Tags = dict[str, str]


class Publisher:
    """Publishes totals that only grow, and gauges, all with the tags of one shard."""

    def __init__(self, bot_name: str, shard: int) -> None:
        self._tags = {"bot": bot_name, "shard": str(shard)}
        self._metrics: dict[str, Any] = {}
        self._published: dict[tuple[str, ...], float] = {}

    def counter(self, metric: Metric, total: float, **tags: str) -> None:
        """Bring the counter to this total."""
        self._count(metric.name, metric, total, tags)

    def gauge(self, metric: Metric, value: float) -> None:
        """Set the gauge. To be repeated: Ray forgets a gauge that it does not hear of."""
        gauge = self._metrics.get(metric.name)
        if gauge is None:
            gauge = self._metrics[metric.name] = ray_metrics.Gauge(metric.name, metric.meaning, metric.tags)
        gauge.set(value, self._tags)

    def histogram(self, metric: Metric, spread: Spread, unit: float = 1.0, **tags: str) -> None:
        """Bring the histogram to what was counted, in this unit: 1e-9 for nanoseconds as seconds.

        Nothing is published before anything was counted.
        """
        counts = list(accumulate(spread.counts[:TOTAL]))
        if not counts[-1]:
            return
        for exponent in metric.exponents:
            # The largest number of so many bits.
            bound = f"{(2**exponent - 1) * unit:.6g}"
            self._count(f"{metric.name}_bucket", metric, counts[exponent], tags | {"le": bound})
        self._count(f"{metric.name}_bucket", metric, counts[-1], tags | {"le": "+Inf"})
        self._count(f"{metric.name}_count", metric, counts[-1], tags)
        self._count(f"{metric.name}_sum", metric, spread.total * unit, tags)

    def _count(self, name: str, metric: Metric, total: float, tags: _Tags) -> None:
        key = (name, *tags.values())
        published = self._published.get(key)
        increment = total or _NEARLY_NOTHING if published is None else total - published
        if increment > 0:
            counter = self._metrics.get(name)
            if counter is None:
                keys = (*metric.tags, "le") if "le" in tags else metric.tags
                counter = self._metrics[name] = ray_metrics.Counter(name, metric.meaning, keys)
            counter.inc(increment, self._tags | tags)
            self._published[key] = total
