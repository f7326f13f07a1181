"""State: what a conversation is in, as users read and write it.

A value, not a handle: changing a State changes nothing that is stored.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class State(BaseModel):
    """One conversation's flow, state within that flow, and data.

    Two States are equal when flow, state and data are; the version is not compared, for it tells which
    write made the record, not what the record says.

    >>> State(flow="registration", state="get_name")
    State(flow='registration', state='get_name', data={}, version=None)
    >>> State(flow="registration").model_copy(update={"flow": None, "data": {"name": "Ada"}})
    State(flow=None, state=None, data={'name': 'Ada'}, version=None)
    """

    model_config = ConfigDict(strict=True, extra="forbid", validate_assignment=True)

    flow: str | None = None
    state: str | None = None
    data: dict[str, Any] = Field(default_factory=dict)
    version: int | None = None
    """The write that made this record, a number that only grows within a shard; `None` until stored."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, State):
            return NotImplemented
        return (self.flow, self.state, self.data) == (other.flow, other.state, other.data)

    __hash__ = None  # type: ignore[assignment]  # mutable, like the dict inside
