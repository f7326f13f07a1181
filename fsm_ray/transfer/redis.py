"""What importers do with a Redis: they go through its keys, and read."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fsm_ray.errors import InvalidInput, MissingExtra
from fsm_ray.options import redacted

try:
    from redis.asyncio import Redis
except ModuleNotFoundError as error:
    raise MissingExtra(
        f"the importer needs {error.name!r}, which is not installed: pip install 'fsm-ray[redis]'"
    ) from error

__all__ = ["Redis", "opened", "scan", "text_of"]

_PAGE = 1_000
"""Keys that Redis looks at in one step."""


@asynccontextmanager
async def opened(url: str) -> AsyncGenerator[Redis, None]:
    """A client, closed again behind the block.

    Raises:
        InvalidInput: the URL is none of a Redis.
    """
    try:
        redis = Redis.from_url(url)
        redis.connection_pool.make_connection()  # type: ignore[no-untyped-call]  # refuses unknown options
    except (TypeError, ValueError):
        # Without the cause: it may cite a part of the password.
        raise InvalidInput(f"{redacted(url)} is no URL of a Redis, as redis://host:6379/0 is") from None
    try:
        yield redis
    finally:
        await redis.aclose()


async def scan(redis: Redis, prefix: str, kind: str) -> AsyncGenerator[str, None]:
    """The keys of a kind that begin with the prefix; one that is written meanwhile may come twice."""
    escaped = "".join(f"\\{character}" if character in "*?[]\\" else character for character in prefix)
    async for key in redis.scan_iter(match=f"{escaped}*", count=_PAGE, _type=kind):
        yield key.decode(errors="surrogateescape")


def text_of(value: bytes | str) -> str:
    """The text, for a Redis client may be set either way.

    Raises:
        UnicodeDecodeError: it is not UTF-8.
    """
    return value.decode() if isinstance(value, bytes) else value
