"""Pickles of others, read without running any of their code.

A pickle names the classes and functions that it wants called. Here it gets those on a list of plain values
and of a framework's data classes, and for everything else a stand-in that does nothing: whatever holds one is
refused, and the rest of the file is read.
"""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from fsm_ray.errors import InvalidData

_PLAIN = {
    "builtins": "bool bytearray bytes complex dict float frozenset int list set str tuple",
    "collections": "OrderedDict defaultdict deque",
    "datetime": "date datetime time timedelta timezone",
    "decimal": "Decimal",
    "uuid": "UUID",
    "zoneinfo": "ZoneInfo ZoneInfo._unpickle",
}
"""What may be called: module -> names in it. All of it only makes values."""

_ALLOWED = frozenset((module, name) for module, names in _PLAIN.items() for name in names.split())


class NotAllowed:
    """Stands for what is not on the list: it takes anything, and does nothing with it."""

    name: str

    def __new__(cls, *_: object, **__: object) -> Self:
        return object.__new__(cls)

    def __setstate__(self, state: object) -> None: ...
    def __setitem__(self, name: object, value: object) -> None: ...
    def append(self, item: object) -> None: ...
    def extend(self, items: object) -> None: ...
    def add(self, item: object) -> None: ...

    def __reduce_ex__(self, protocol: object) -> Any:
        # Inside of an object that is pickled again, where `check` does not look.
        raise pickle.PicklingError(f"{self.name} is not allowed in a pickle that is imported")


Find = Callable[[str, str], Any]
"""Gives what a framework allows by this module and name, or None."""


def load(path: Path, find: Find) -> Any:
    """What the file holds, with stand-ins for what is not allowed.

    Raises:
        InvalidData: the file is damaged, or no pickle.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        unpickler = _Unpickler(file)
        unpickler.find = find
        try:
            return unpickler.load()
        except OSError:
            raise
        except Exception as error:  # a broken pickle fails in any way
            raise InvalidData(f"{path} is damaged, or no pickle of these: {error!r}") from error


def check(value: object) -> None:
    """Refuse a value that holds, in whatever containers, something that is not allowed.

    Raises:
        InvalidData: it does; the message names it.
    """
    waiting, seen = [value], set()
    while waiting:
        each = waiting.pop()
        kind = each if isinstance(each, type) else type(each)
        if issubclass(kind, NotAllowed):
            raise InvalidData(f"it holds {kind.name}, which is not allowed in a pickle that is imported")
        if id(each) not in seen:
            seen.add(id(each))
            waiting += _parts(each)


def _parts(value: object) -> Iterable[object]:
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values(), getattr(value, "default_factory", None)]
    return list(value) if isinstance(value, list | tuple | set | frozenset | deque) else ()


class _Unpickler(pickle.Unpickler):
    find: Find

    def find_class(self, module: str, name: str) -> Any:
        allowed = self.find(module, name)
        if allowed is not None:
            return allowed
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        return type("NotAllowed", (NotAllowed,), {"name": f"{module}.{name}"})

    def persistent_load(self, pid: object) -> None:
        """What is stored elsewhere, as python-telegram-bot's bot is, is left out."""
