"""Output: what is written to stdout, and how a command ends that cannot write there.

All of the command writes through here, so a pipe that nobody reads, or a full disk, is met in one place.
"""

from __future__ import annotations

import codecs
import errno
import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

import typer

from fsm_ray.cli.exits import EXIT_FAILED, EXIT_UNREAD, EXIT_USAGE

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

_ESCAPED = "fsm_ray.escaped"


class OutputLost(Exception):
    """Raised when stdout takes no more. Its cause says why.

    No OSError: click takes a broken pipe for its own affair, and other files and sockets have errors, too.
    """


@contextmanager
def checked_stdout() -> Iterator[None]:
    """Let the block write to stdout; where that fails, end with at most one line, and an exit code.

    What stdout's encoding lacks is written as JSON escapes it.
    """
    if sys.stdout is None:
        # The next file to be opened would take its number, and what is printed.
        typer.echo("fsm-ray: stdout is closed: send it to /dev/null, if nobody is to read it", err=True)
        raise SystemExit(EXIT_USAGE)
    before, sys.stdout = sys.stdout, _checked(sys.stdout)
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except OutputLost as lost:
        raise SystemExit(_give_up(lost.__cause__)) from None
    finally:
        sys.stdout = before


class _Raw(io.FileIO):
    """A file whose errors are told from those of all others."""

    def write(self, content: Buffer) -> int:
        try:
            return super().write(content)
        except OSError as error:
            raise OutputLost from error


def _checked(stdout: TextIO) -> TextIO:
    try:
        number = stdout.fileno()
    except io.UnsupportedOperation:
        return stdout  # a stand-in for a file, as tests have it
    stdout.flush()
    codecs.register_error(_ESCAPED, _escape)
    return io.TextIOWrapper(
        io.BufferedWriter(_Raw(number, "w", closefd=False)),
        encoding=stdout.encoding,
        errors=_ESCAPED,
        line_buffering=stdout.isatty(),
    )


def _escape(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


def _give_up(cause: BaseException | None) -> int:
    """The exit code of a command whose output is lost, which it says unless nobody wants more of it."""
    # What is left in the buffers is flushed at the interpreter's end, and would fail again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(cause, OSError) and cause.errno == errno.EPIPE:
        return EXIT_UNREAD
    typer.echo(f"fsm-ray: stdout cannot be written: {getattr(cause, 'strerror', cause)}", err=True)
    return EXIT_FAILED
