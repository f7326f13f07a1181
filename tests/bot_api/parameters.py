"""Parameters: what a bot sent with a call, in any of the ways that the Bot API takes it."""

from __future__ import annotations

import json
from typing import Any

from aiohttp import web

JSON = dict[str, Any]


class ApiError(Exception):
    """Raised when a call is refused; the client gets it in Telegram's form."""

    def __init__(self, code: int, description: str, **parameters: Any) -> None:
        super().__init__(f"{code} {description}")
        self.code = code
        self.description = description
        self.parameters = parameters
        """Such as `retry_after`, in seconds."""


def bad_request(reason: str) -> ApiError:
    return ApiError(400, f"Bad Request: {reason}")


async def parameters_of(request: web.Request) -> Parameters:
    """What came in the query, and in a body that is JSON, a form, or multipart."""
    given: JSON = dict(request.query)
    if request.content_type == "application/json":
        body = await request.json()
        if not isinstance(body, dict):
            raise bad_request("can't parse the request: expected an object")
        given |= body
    else:
        given |= await request.post()
    return Parameters(given)


class Parameters(dict[str, Any]):
    """By name. Forms carry everything as text, so each is read as the type that its method wants."""

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.get(name, default)
        try:
            return int(value)  # type: ignore[arg-type]  # None is refused as text is
        except (TypeError, ValueError):
            raise bad_request(f"{name} is no integer: {value!r}") from None

    def text(self, name: str) -> str:
        return str(self.get(name) or "")

    def is_set(self, name: str) -> bool:
        return str(self.get(name, "")).lower() in {"true", "yes", "1"}

    def parsed(self, name: str) -> Any:
        """An object or a list, which forms carry as JSON; None when it is not there."""
        value = self.get(name)
        if not isinstance(value, str) or not value:
            return value
        try:
            return json.loads(value)
        except ValueError:
            raise bad_request(f"can't parse {name}: it is no JSON") from None
