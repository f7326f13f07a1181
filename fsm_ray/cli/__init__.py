"""The command `fsm-ray`: each group of commands has a file of its own.

What takes long to import is imported inside of the commands that need it, so that help, completion and wrong
usage are answered at once.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Annotated

import typer

import fsm_ray
from fsm_ray.cli import across, bots, checking, conversations, keys, moving, running, upgrade
from fsm_ray.cli.exits import (
    EPILOG,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_UNAVAILABLE,
    EXIT_UNREAD,
    EXIT_USAGE,
    exit_code,
)
from fsm_ray.cli.output import checked_stdout
from fsm_ray.cli.shared import tell
from fsm_ray.errors import FsmRayError, InvalidInput

__all__ = ["EXIT_FAILED", "EXIT_INTERRUPTED", "EXIT_UNAVAILABLE", "EXIT_UNREAD", "EXIT_USAGE", "app", "main"]

app = typer.Typer(
    name="fsm-ray",
    help="Conversation state of chat bots, kept in Ray named actors.",
    epilog=EPILOG,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command; errors of fsm_ray, and of writing to stdout, become one line and an exit code."""
    with checked_stdout():
        try:
            _check_text(sys.argv[1:])
            app()
        except FsmRayError as error:
            tell(f"fsm-ray: {' '.join(str(error).split())}")
            raise SystemExit(exit_code(error)) from None


def _check_text(arguments: Iterable[str]) -> None:
    """Return if they are text: Ray notes the command line, and does not start with any other.

    Raises:
        InvalidInput: one is not.
    """
    for each in arguments:
        try:
            each.encode()
        except UnicodeEncodeError as error:
            raise InvalidInput(f"{each!r} on the command line is no UTF-8: give text") from error


def _print_version(is_wanted: bool) -> None:  # noqa: FBT001 - typer's signature
    if is_wanted:
        typer.echo(f"fsm-ray {fsm_ray.__version__}")
        raise typer.Exit


@app.callback()
def _command(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass  # what is common to all commands


_TRY, _LOOK, _CHANGE, _MOVE, _RUN, _CHECK = "Try it", "Look", "Change", "Move", "Keep it running", "Check"
_TAKES_KEYS = {"ignore_unknown_options": True}
"""For commands that take a key: `-100` is one."""

app.command(rich_help_panel=_TRY, epilog=EPILOG)(running.demo)
app.command(rich_help_panel=_TRY, epilog=EPILOG)(running.bench)
app.command(rich_help_panel=_LOOK, epilog=EPILOG)(bots.bots)
app.command(rich_help_panel=_LOOK, epilog=EPILOG)(bots.describe)
app.command(rich_help_panel=_LOOK, epilog=EPILOG)(across.count)
app.command(rich_help_panel=_LOOK, epilog=EPILOG)(across.scan)
app.command(rich_help_panel=_LOOK, epilog=EPILOG)(across.watch)
app.command(rich_help_panel=_LOOK, epilog=EPILOG, context_settings=_TAKES_KEYS)(conversations.get)
app.command("set", rich_help_panel=_CHANGE, epilog=EPILOG, context_settings=_TAKES_KEYS)(conversations.set_)
app.command(rich_help_panel=_CHANGE, epilog=EPILOG, context_settings=_TAKES_KEYS)(conversations.clear)
app.command(rich_help_panel=_CHANGE, epilog=EPILOG)(bots.drop)
app.command(rich_help_panel=_MOVE, epilog=EPILOG)(moving.export)
app.command("import", rich_help_panel=_MOVE, epilog=EPILOG)(moving.import_)
app.add_typer(moving.import_from, name="import-from", rich_help_panel=_MOVE, epilog=EPILOG)
app.command(rich_help_panel=_RUN, epilog=EPILOG)(upgrade.upgrade)
app.add_typer(keys.keys, name="keys", rich_help_panel=_RUN, epilog=EPILOG)
app.command(rich_help_panel=_RUN, epilog=EPILOG)(keys.rotate_keys)
app.command(rich_help_panel=_CHECK, epilog=EPILOG)(checking.verify)
app.command(rich_help_panel=_CHECK, epilog=EPILOG)(checking.doctor)
