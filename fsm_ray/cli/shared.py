"""What commands share: their options, attaching to Ray, and asking before something is gone."""

from __future__ import annotations

import os
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from fsm_ray.cli.completion import bot_names
from fsm_ray.errors import InvalidInput

if TYPE_CHECKING:
    from fsm_ray.options import BotOptions
    from fsm_ray.storage import AsyncStorage, Storage

T = TypeVar("T")

_VARIABLE = "env:"

BotName = Annotated[
    str,
    typer.Argument(metavar="BOT", help="The bot's name.", show_default=False, autocompletion=bot_names),
]
Address = Annotated[
    str | None,
    typer.Option(metavar="HOST:PORT", help="Of the Ray to use. Default: RAY_ADDRESS, or the one here."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON: an object for each line.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
Flow = Annotated[str | None, typer.Option(help="Only of this flow.")]
State = Annotated[str | None, typer.Option(help="Only of this state.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the conversations that are there.")]


def read_url(given: str | None) -> str | None:
    """The URL; of `env:NAME`, the one in that variable. It is a `callback` for URLs that may hold a password.

    A command line is there for all to see, and Ray keeps it as long as its cluster runs.

    Raises:
        InvalidInput: the variable is not set.
    """
    if given is None or not given.startswith(_VARIABLE):
        return given
    name = given.removeprefix(_VARIABLE)
    url = os.environ.get(name)
    if not url:
        raise InvalidInput(f"{given}: the environment variable {name!r} is not set: put the URL there")
    return url


def checked_options(arguments: Mapping[str, str], given: Mapping[str, Any]) -> BotOptions:
    """A bot's options from arguments of a command, which errors name: option -> argument.

    Raises:
        InvalidInput: an option has a value it cannot have.
    """
    from pydantic import ValidationError

    from fsm_ray.options import BotOptions

    try:
        return BotOptions(**given)
    except ValidationError as error:
        faults = [
            f"{' '.join(arguments[str(each)] for each in fault['loc'])}: "
            f"{fault['msg'].removeprefix('Value error, ')}"
            for fault in error.errors()
        ]
        raise InvalidInput("; ".join(fault.removeprefix(": ") for fault in faults)) from error


def attach(address: str | None) -> None:
    """Attach to a Ray that runs.

    Raises:
        RayUnreachable: there is none; none is started.
    """
    with status("Attaching to Ray"):
        import logging

        from fsm_ray.routing import directory

        directory.attach(address, may_start=False, logging_level=logging.ERROR, log_to_driver=False)


@contextmanager
def attached(address: str | None) -> Iterator[Storage]:
    """A storage on a Ray that runs; raises as `attach`."""
    attach(address)
    from fsm_ray.storage import Storage

    with Storage(address) as storage:
        yield storage


def run_attached(address: str | None, work: Callable[[AsyncStorage], Awaitable[T]]) -> T:
    """What `work` returns, given a storage on a Ray that runs; raises as `attach`."""
    attach(address)
    import asyncio

    from fsm_ray.storage import AsyncStorage

    async def use() -> T:
        async with AsyncStorage(address) as storage:
            return await work(storage)

    return asyncio.run(use())


@contextmanager
def status(what: str) -> Iterator[None]:
    """Say on stderr what is waited for, if somebody may be looking."""
    from rich.console import Console
    from rich.text import Text

    # Not as it is: a name in brackets would be markup.
    with Console(stderr=True).status(Text(what)):
        yield


def confirm(what: str, *, yes: bool) -> None:
    """Return if that may be done.

    Raises:
        InvalidInput: nobody can be asked.
        typer.Abort: it may not.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise InvalidInput(f"{what} Nobody can be asked here: say --yes")
    try:
        typer.confirm(what, abort=True, err=True)
    except typer.Abort as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error  # ends as Ctrl-C does anywhere else
        raise


def tell(what: str) -> None:
    """Say it on stderr, so that stdout has what was asked for and nothing else."""
    from fsm_ray.cli.texts import printable

    typer.echo(printable(what), err=True)


def counted(number: int, what: str) -> str:
    """The number and what it counts.

    >>> counted(1, "shard"), counted(2_000, "record")
    ('1 shard', '2,000 records')
    """
    return f"{number:,} {what}{'' if number == 1 else 's'}"
