"""State: what a conversation is in, as users read and write it.

A value, not a handle: changing a State changes nothing that is stored.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field


class State(BaseModel):
    """One conversation's flow, state within that flow, and data.

    Two States are equal when flow, state and data are; version and expiry are not compared, for they tell
    which write made the record and how long it is kept, not what it says.

    Examples:
        >>> State(flow="registration", state="get_name")
        State(flow='registration', state='get_name', data={}, version=None)
        >>> State(flow="registration").model_copy(update={"flow": None, "data": {"name": "Ada"}})
        State(flow=None, state=None, data={'name': 'Ada'}, version=None)
    """

    model_config = ConfigDict(strict=True, extra="forbid", validate_assignment=True)

    flow: str | None = None
    """The name of the flow that the conversation is in; `None`: in none."""
    state: str | None = None
    """The state in that flow; `None`: in none."""
    data: dict[str, Any] = Field(default_factory=dict)
    """What is known of the conversation: names and values."""
    version: int | None = None
    """The write that made this record, a number that only grows within a shard; `None` until stored."""
    expires_at: AwareDatetime | None = None
    """When the record ends, unless a write or turn puts that off, in UTC; `None`: never."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, State):
            return NotImplemented
        return (self.flow, self.state, self.data) == (other.flow, other.state, other.data)

    __hash__ = None  # type: ignore[assignment]  # mutable, like the dict inside

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        return (each for each in super().__repr_args__() if each != ("expires_at", None))
