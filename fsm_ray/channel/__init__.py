"""Channel: frames over a socket between clients and the actor of one shard.

`frames` cuts a stream into frames, `handshake` says who may talk, `server` is the actor's half and `client`
both client halves. What a frame says is `protocol`'s affair, and what is sent again is `routing`'s.
"""
