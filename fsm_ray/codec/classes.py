"""Users' classes: which of them are stored by name and fields, found again by import, and rebuilt.

Rebuilding runs no `__init__`, `__post_init__` or validator.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from enum import Enum, Flag
from types import MappingProxyType
from typing import Any

from fsm_ray.errors import ValueNotDecodable

_DEFAULT_PICKLERS = (None, "dataclasses", "pydantic.main", "pydantic.root_model")  # None: object's own


def reference(cls: type) -> tuple[str, str]:
    """The class's module and qualified name, by which `find_class` finds it."""
    return cls.__module__, cls.__qualname__


def find_class(module: str, qualname: str, is_kind: Callable[[Any], bool]) -> Any:
    """Return the class of that name, imported if need be; nothing found is called before is_kind approves it.

    Raises:
        ValueNotDecodable: there is no such class here, or it is of another kind.
    """
    try:
        found = _imported(module)
        for name in qualname.split("."):
            found = getattr(found, name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # importing runs users' code: a script's, if it is named, and that exits
        raise ValueNotDecodable(
            f"class {module}.{qualname} cannot be imported here ({error!r}): set PYTHONPATH to where it is"
        ) from error
    if not (isinstance(found, type) and is_kind(found)):
        raise ValueNotDecodable(f"{module}.{qualname} is not the kind of class that was stored")
    return found


def _imported(module: str) -> Any:
    # Bytes name it, and importing such a module is running a program, with this process's own arguments.
    if "__main__" in module.split(".") and module not in sys.modules:
        raise ImportError("a program is not imported")
    return importlib.import_module(module)


def is_importable(cls: type) -> bool:
    found: Any = sys.modules.get(cls.__module__)
    for name in cls.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is cls and cls.__module__ not in ("__main__", "__mp_main__")


def has_default_pickling(cls: type) -> bool:
    """Whether its state is its attributes; a class with its own idea of that is left to pickle."""
    return all(
        getattr(getattr(cls, name, None), "__module__", None) in _DEFAULT_PICKLERS
        for name in ("__reduce__", "__reduce_ex__", "__getstate__", "__setstate__")
    )


def is_enum(cls: type) -> bool:
    return issubclass(cls, Enum)


def is_named_tuple(cls: type) -> bool:
    return issubclass(cls, tuple) and hasattr(cls, "_fields") and hasattr(cls, "_field_defaults")


def is_dataclass(cls: type) -> bool:
    # Not by inheritance: that would miss the attributes of the subclass.
    return "__dataclass_fields__" in vars(cls)


def is_built_by_object(cls: Any) -> bool:
    """Whether its instances are attributes and nothing else, as those of a subclass of dict are not."""
    return cls.__new__ is object.__new__


def named_tuple_items(value: Any) -> Iterator[tuple[str, Any]]:
    return zip(value._fields, tuple.__iter__(value), strict=True)


def member_id(member: Enum) -> Any:
    # Not the value, which changes when `auto()` counts another order; but combined flags have no name.
    return member._value_ if isinstance(member, Flag) else member._name_


def find_member(module: str, qualname: str, member: Any) -> Any:
    cls = find_class(module, qualname, is_enum)
    if type(member) is int and issubclass(cls, Flag):
        return cls(member)
    if member not in cls.__members__:
        raise ValueNotDecodable(f"{module}.{qualname} has no member {member!r}")
    return cls.__members__[member]


def new_named_tuple(cls: Any, fields: Mapping[str, Any]) -> Any:
    for name in cls._fields:
        if name not in fields:
            raise missing_field(cls, name)
    return tuple.__new__(cls, [fields[name] for name in cls._fields])


def new_dataclass(
    cls: Any, fields: Mapping[str, Any], attributes: Mapping[str, Any] = MappingProxyType({})
) -> Any:
    new = object.__new__(cls)
    for field in dataclasses.fields(cls):
        object.__setattr__(new, field.name, fields[field.name])  # a frozen one refuses setattr
    for name, value in attributes.items():
        object.__setattr__(new, name, value)
    return new


def missing_field(cls: type, name: str) -> ValueNotDecodable:
    return ValueNotDecodable(
        f"{cls.__module__}.{cls.__qualname__} has a field {name!r} without default that the stored one lacks"
    )
