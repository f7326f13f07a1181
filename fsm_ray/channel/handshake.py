"""Handshake: both sides prove that they know the shard's secret, which only a Ray call can fetch.

    server   magic, protocol version (2 bytes), 32 random bytes
    client   32 random bytes, HMAC(secret, "client", transport, all that the server sent, the client's random)
    server   HMAC(secret, "server", the same)

Each is one frame. A proof is worth nothing on another connection, for both randoms are in it; nor where
somebody changed the version under way, or took the client to another kind of transport than the server has.
"""

from __future__ import annotations

import hmac
import secrets
from dataclasses import dataclass, field

from fsm_ray.errors import ProtocolMismatch
from fsm_ray.options import BotOptions
from fsm_ray.protocol import PROTOCOL_VERSION
from fsm_ray.version import load_fields

MAX_HANDSHAKE_BYTES = 128
"""The longest frame that is read from a peer who has not proved anything yet."""

HANDSHAKE_TIMEOUT_S = 5.0

UNIX = b"unix"
TCP = b"tcp"
"""Transports, as they are in a proof; the one of `tls` holds the server's certificate."""

_MAGIC = b"fsm_ray"
_RANDOM_BYTES = 32
_HEAD_BYTES = len(_MAGIC) + 2


class HandshakeFailed(Exception):
    """Raised when the peer did not prove that it knows the secret."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a shard listens, and what proves that a client may talk to it. Fetched by a Ray call."""

    options: BotOptions
    node_id: str
    unix_path: str
    tcp_address: tuple[str, int] | None
    """None until a client of another node asks."""
    secret: bytes = field(repr=False)
    protocol_version: int = PROTOCOL_VERSION

    __setstate__ = load_fields


def challenge() -> bytes:
    return _MAGIC + PROTOCOL_VERSION.to_bytes(2, "big") + secrets.token_bytes(_RANDOM_BYTES)


def respond(secret: bytes, challenge: bytes, transport: bytes) -> tuple[bytes, bytes]:
    """The client's answer to a challenge, and the proof that it must get back.

    Raises:
        HandshakeFailed: whoever listens there is no shard.
        ProtocolMismatch: it is one of another protocol version.
    """
    if len(challenge) < _HEAD_BYTES or not challenge.startswith(_MAGIC):
        raise HandshakeFailed("what listens there is no fsm_ray shard")
    check_protocol_version(int.from_bytes(challenge[len(_MAGIC) : _HEAD_BYTES], "big"))
    if len(challenge) != _HEAD_BYTES + _RANDOM_BYTES:
        raise HandshakeFailed("what listens there is no fsm_ray shard")
    said = challenge + (nonce := secrets.token_bytes(_RANDOM_BYTES))
    return nonce + _proof(secret, b"client", transport, said), _proof(secret, b"server", transport, said)


def verify(secret: bytes, challenge: bytes, response: bytes, transport: bytes) -> bytes:
    """The server's own proof, for a client whose answer is right.

    Raises:
        HandshakeFailed: it is not.
    """
    said = challenge + response[:_RANDOM_BYTES]
    if not is_proof(response[_RANDOM_BYTES:], _proof(secret, b"client", transport, said)):
        raise HandshakeFailed("the peer does not know this shard's secret")
    return _proof(secret, b"server", transport, said)


def is_proof(given: bytes, expected: bytes) -> bool:
    """Whether both are the same; how long that takes does not tell where they differ."""
    return hmac.compare_digest(given, expected)


def check_protocol_version(theirs: int) -> None:
    """Raises ProtocolMismatch unless it is ours."""
    if theirs < PROTOCOL_VERSION:
        raise ProtocolMismatch(
            f"the actor speaks protocol version {theirs}, older than this client's {PROTOCOL_VERSION}: "
            "replace the bot's actors by ones of this version of fsm_ray, by `fsm-ray upgrade BOT` or "
            "Storage.upgrade"
        )
    if theirs > PROTOCOL_VERSION:
        raise ProtocolMismatch(
            f"the actor speaks protocol version {theirs}, newer than this client's {PROTOCOL_VERSION}: "
            "start this worker again with the version of fsm_ray that the bot's actors run"
        )


def _proof(secret: bytes, side: bytes, transport: bytes, said: bytes) -> bytes:
    # Of the parts, the transport alone has no fixed length.
    return hmac.digest(secret, side + bytes([len(transport)]) + transport + said, "sha256")
