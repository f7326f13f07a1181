"""Keys and values to bytes and back, without loss of type.

Keys are canonical: equal keys of equal types give equal bytes, all others differ. Values are exact: `1`,
`True` and `1.0`, a list and a tuple come back as themselves. Both run in clients alone; what travels and is
stored between them is never looked into, so no class of a user's is ever needed there.
"""

from __future__ import annotations

from fsm_ray.codec.decoder import extension_hook
from fsm_ray.codec.encoder import encode_data
from fsm_ray.codec.keys import (
    EncodedKey,
    check_key,
    decode_key,
    decode_plain_key,
    encode_key,
    slot_of,
)

__all__ = [
    "EncodedKey",
    "check_key",
    "decode_key",
    "decode_plain_key",
    "encode_data",
    "encode_key",
    "extension_hook",
    "slot_of",
]
