"""Routing: from a bot's name and a key to the shard that has it, and its answer back.

`directory` asks Ray where shards are, `route` encodes operations and picks the shard; `lanes` (for event
loops) and `blocking` (for threads) carry them there, reconnect, and send again. Nothing else retries.
"""
