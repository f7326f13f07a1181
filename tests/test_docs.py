"""What the documentation shows is run: the README's quickstart and every `>>>` in a docstring."""

from __future__ import annotations

import doctest
import importlib
import shutil
from pathlib import Path

import pytest

import fsm_ray

ROOT = Path(__file__).parent.parent
PACKAGE = Path(fsm_ray.__file__).parent
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def modules_with_examples() -> list[str]:
    paths = [path for path in sorted(PACKAGE.rglob("*.py")) if ">>>" in path.read_text()]
    return [
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        for path in paths
    ]


@pytest.mark.ray
@pytest.mark.parametrize("name", modules_with_examples())
def test_the_examples_of_a_module_are_true(name: str, cluster: object) -> None:
    result = doctest.testmod(importlib.import_module(name), optionflags=FLAGS)

    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.ray
def test_the_quickstart_of_the_readme_is_true(cluster: object) -> None:
    directory = Path("/tmp/my_bot")
    shutil.rmtree(directory, ignore_errors=True)
    try:
        result = doctest.testfile(str(ROOT / "README.md"), module_relative=False, optionflags=FLAGS)
    finally:
        shutil.rmtree(directory)

    assert result.attempted > 10
    assert result.failed == 0


def test_the_readme_shows_the_layer_map_of_the_package() -> None:
    readme = (ROOT / "README.md").read_text()
    shown = [
        line.removeprefix("#   ").rstrip()
        for line in (PACKAGE / "__init__.py").read_text().splitlines()
        if line.startswith("#   ")
    ]

    assert len(shown) > 10
    assert "\n".join(shown) in readme


def test_the_changelog_has_the_version_of_the_package() -> None:
    assert f"## {fsm_ray.__version__}" in (ROOT / "CHANGELOG.md").read_text()
