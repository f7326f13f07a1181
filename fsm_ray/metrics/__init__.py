"""Metrics: tallies, published through Ray, from whose metrics port Prometheus reads them.

`catalog` says what is published; `publisher` hands numbers to Ray; `shard` and `client` say which ones. The
hot path knows nothing of this: it counts in a tally, and the rest is done every few seconds.

    python -m fsm_ray.metrics > fsm_ray.json     # the Grafana dashboard, to be imported
"""
