"""Version: which fsm_ray this is, and how what another one pickled is loaded.

Clients and actors of different versions meet while a bot is upgraded. What travels between them by Ray calls
(options, endpoints, descriptions) loads in all: fields are only ever added, last, and with a default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

__version__ = "0.1.0"


def load_fields(instance: Any, state: Sequence[Any]) -> None:
    """`__setstate__` of a frozen dataclass with slots, whose pickled state is its values, in order.

    Fields that the other version did not know have their defaults; those that this one does not are left out.
    """
    fields = dataclasses.fields(instance)
    for field, value in zip(fields, state, strict=False):
        object.__setattr__(instance, field.name, value)
    for field in fields[len(state) :]:
        factory = field.default_factory
        value = field.default if factory is dataclasses.MISSING else factory()
        object.__setattr__(instance, field.name, value)
