"""What the documentation shows is run, or read at least: no example, command or test it names is gone."""

from __future__ import annotations

import ast
import doctest
import functools
import importlib
import re
import shlex
import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

import fsm_ray
from fsm_ray.cli import app

ROOT = Path(__file__).parent.parent
PACKAGE = Path(fsm_ray.__file__).parent
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text() for path in sorted((ROOT / "docs").rglob("*.md"))
}
PAGES["README.md"] = (ROOT / "README.md").read_text()

DIRECTORIES = (Path("/tmp/my_bot"), Path("/tmp/fsm_ray_tutorial"))
"""Where the bots of the pages keep their records."""


def blocks_of(page: str, *languages: str) -> list[str]:
    """The code of the page's blocks in these languages."""
    pattern = rf"^( *)```(?:{'|'.join(languages)})\n(.*?)^\1```"
    return [textwrap.dedent(found[1]) for found in re.findall(pattern, PAGES[page], re.DOTALL | re.MULTILINE)]


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


class RayLeftOut(doctest.OutputChecker):
    """Overlooks what Ray prints into this process when an actor was killed, at whatever moment that comes."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        ours = "".join(line for line in got.splitlines(keepends=True) if "(raylet)" not in line)
        return super().check_output(want, ours, optionflags)


@pytest.fixture
def directories() -> Iterator[None]:
    for directory in DIRECTORIES:
        shutil.rmtree(directory, ignore_errors=True)
    yield
    for directory in DIRECTORIES:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if "\n>>> " in text])
def test_the_examples_of_a_page_are_true(page: str, cluster: object, directories: None) -> None:
    runner = doctest.DocTestRunner(checker=RayLeftOut(), optionflags=FLAGS)
    names = {"__name__": "__main__"}
    runner.run(doctest.DocTestParser().get_doctest(PAGES[page], names, page, str(ROOT / page), 0))

    result = runner.summarize()
    assert result.attempted > 10
    assert result.failed == 0


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/")])
def test_what_a_page_shows_of_python_can_be_compiled_and_imported(page: str) -> None:
    for block in blocks_of(page, "python"):
        tree = compile(block, page, "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                exec(
                    compile(ast.Module([node], []), page, "exec"), {}
                )  # a submodule is imported by that alone


@pytest.mark.parametrize("page", list(PAGES))
def test_what_is_typed_at_a_prompt_is_shown_as_such(page: str) -> None:
    typed = "".join(blocks_of(page, "pycon"))

    assert typed.count(">>> ") == PAGES[page].count(">>> ") - PAGES[page].count("`>>> ")


def modules_in_the_reference() -> list[str]:
    named = {name for text in PAGES.values() for name in re.findall(r"^::: ([\w.]+)", text, re.MULTILINE)}
    return sorted({module for name in named if (module := module_of(name)) is not None})


def module_of(name: str) -> str | None:
    """The module that this is the name of, or of something in it."""
    while name:
        if (ROOT / name.replace(".", "/")).with_suffix(".py").is_file():
            return name
        name = name.rpartition(".")[0]
    return None


@pytest.mark.parametrize("module", modules_in_the_reference())
def test_examples_of_the_reference_are_in_a_section_of_their_own(module: str) -> None:
    tree = ast.parse((ROOT / module.replace(".", "/")).with_suffix(".py").read_text())
    docstrings = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, _DOCUMENTED)]

    # Elsewhere, Markdown takes them for quotes in quotes.
    assert [each for each in docstrings if each and re.search(r"^>>> ", each, re.MULTILINE)] == []


def commands_of(page: str) -> Iterator[list[str]]:
    """The arguments of every `fsm-ray` in the page's console blocks."""
    for block in blocks_of(page, "console", "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words[:1] == ["fsm-ray"]:
                yield words[1:]


@pytest.mark.parametrize("page", list(PAGES))
def test_the_commands_that_a_page_shows_are_there(page: str) -> None:
    for words in commands_of(page):
        command: Any = typer.main.get_command(app)
        arguments = list(words)
        while hasattr(command, "commands"):
            command = command.commands[arguments.pop(0)]
        command.make_parser(command.context_class(command)).parse_args(arguments)  # raises for an option


def test_the_page_about_the_command_line_has_all_commands() -> None:
    shown = set(re.findall(r"^\| `([a-z-]+)", PAGES["docs/reference/command-line.md"], re.MULTILINE))

    assert shown == set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


@functools.cache
def names_in(path: Path) -> set[str]:
    """The classes and functions of the file, methods as `Class::method`, and by their name alone."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}::{each.name}" for each in node.body if isinstance(each, _FUNCTIONS)}
        if isinstance(node, (ast.ClassDef, *_FUNCTIONS)):
            names.add(node.name)
    return names


_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_DOCUMENTED = (ast.Module, ast.ClassDef, *_FUNCTIONS)
NAMED_TEST = re.compile(r"`((?:fsm_ray/testing/|tests/)?\w+\.py)(?:::((?:\w+::)?\w+))?`")


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/explanation/")])
def test_the_tests_that_a_page_names_are_there(page: str) -> None:
    for file, name in NAMED_TEST.findall(PAGES[page]):
        path = ROOT / file if "/" in file else ROOT / "tests" / file

        assert path.is_file(), f"there is no {file}"
        assert not name or name in names_in(path), f"{file} has no {name}"
    everywhere = set().union(*map(names_in, (ROOT / "tests").glob("*.py")))
    for name in re.findall(r"`(Test\w+)`", PAGES[page]):
        assert name in everywhere, f"no file has a {name}"


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
