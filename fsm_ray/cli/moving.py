"""The commands that move conversations: `export`, `import` and `import-from`."""

from __future__ import annotations

import os
import stat
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, NoReturn

import typer

from fsm_ray.cli.exits import EPILOG, EXIT_FAILED, EXIT_UNAVAILABLE, EXIT_USAGE
from fsm_ray.cli.shared import Address, AsJson, BotName, Overwrite, Yes, confirm, read_url, run_attached, tell

if TYPE_CHECKING:
    from fsm_ray.storage import AsyncStorage
    from fsm_ray.transfer import Progress, Report

_SHOWN_REFUSALS = 10

import_from = typer.Typer(
    help="Bring the conversations of another storage into a bot, which its `init` must have made."
    " What is there already is left alone, so it may be run again.",
    no_args_is_help=True,
)

Url = Annotated[
    str,
    typer.Argument(
        metavar="URL",
        callback=read_url,
        help="Of the Redis; with a password, better `env:NAME` of a variable that has it.",
        show_default=False,
    ),
]
File = Annotated[
    Path, typer.Argument(metavar="FILE", help="The pickle file; it runs no code.", show_default=False)
]
Prefix = Annotated[str, typer.Option(help="The one that the storage was given.")]
Separator = Annotated[str, typer.Option(help="The one that the storage was given.")]


def export(
    bot_name: BotName,
    file: Annotated[str, typer.Argument(metavar="FILE", help='Where to; "-": stdout.')] = "-",
    *,
    yes: Yes = False,
    address: Address = None,
    as_json: Annotated[bool, typer.Option("--json", help="Tell on stderr in JSON what was done.")] = False,
) -> None:
    """Write a bot's conversations to a file as JSON lines, with their types; bots may work meanwhile.

    A file that is there is replaced only when the export is whole; a new one is for its owner alone to read.
    None of the bot's classes is needed. Fails if a conversation had to be left out: it holds a pickle that
    the bot's options do not allow, or what a newer fsm_ray wrote in a way that is unknown here.
    """
    from fsm_ray.cli.texts import counted
    from fsm_ray.transfer import export as write_lines

    def work(stream: BinaryIO) -> Report:
        return _move(
            "Exporting", address, lambda storage, tell: write_lines(storage, bot_name, stream, progress=tell)
        )

    report = _write(file, work, yes=yes)
    told = f"Exported {counted(report.written, 'conversation')} of {bot_name}"
    _finish(report, told, as_json=as_json, err=True)


def import_(
    bot_name: BotName,
    file: Annotated[str, typer.Argument(metavar="FILE", help='The export; "-": stdin.', show_default=False)],
    *,
    overwrite: Overwrite = False,
    allow_pickle: Annotated[
        bool,
        typer.Option(
            "--allow-pickle", help="Accept pickled values. A file from others can run any code then."
        ),
    ] = False,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Bring an export into a bot, which its `init` must have made.

    Conversations that are there already are left alone, so an import that was interrupted is begun again. The
    classes of what is imported must be importable here (PYTHONPATH).
    """
    from fsm_ray.transfer import import_ as read_lines

    with _opened(file) as stream:
        report = _import(
            address,
            lambda storage, tell: read_lines(
                storage, bot_name, stream, overwrite=overwrite, allow_pickle=allow_pickle, progress=tell
            ),
        )
    _finish_import(report, bot_name, as_json=as_json)


@import_from.command("aiogram-redis", epilog=EPILOG)
def aiogram_redis(
    source: Url,
    bot_name: BotName,
    *,
    bot_id: Annotated[
        int | None,
        typer.Option(help="The number in front of the bot's token; needed unless the keys have it."),
    ] = None,
    prefix: Prefix = "fsm",
    separator: Separator = ":",
    with_bot_id: Annotated[bool, typer.Option("--with-bot-id", help="The keys have the bot's id.")] = False,
    with_business_connection_id: Annotated[
        bool, typer.Option("--with-business-connection-id", help="The keys have business connections' ids.")
    ] = False,
    with_destiny: Annotated[bool, typer.Option("--with-destiny", help="The keys have destinies.")] = False,
    overwrite: Overwrite = False,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """What aiogram's RedisStorage keeps; the options are those of its DefaultKeyBuilder."""
    if bot_id is None and not with_bot_id:
        raise typer.BadParameter("the keys do not tell it: give the bot's id", param_hint="--bot-id")
    with _source_errors(source):
        from fsm_ray.transfer.aiogram import DefaultKeyBuilder, import_aiogram_redis

        builder = DefaultKeyBuilder(
            prefix=prefix,
            separator=separator,
            with_bot_id=with_bot_id,
            with_business_connection_id=with_business_connection_id,
            with_destiny=with_destiny,
        )
        report = _import(
            address,
            lambda storage, tell: import_aiogram_redis(
                source,
                storage,
                bot_name,
                key_builder=builder,
                bot_id=bot_id,
                overwrite=overwrite,
                progress=tell,
            ),
        )
    _finish_import(report, bot_name, as_json=as_json)


TelebotId = Annotated[
    int | None, typer.Option(help="The number in front of the bot's token, if the storage was given it.")
]


@import_from.command("telebot-redis", epilog=EPILOG)
def telebot_redis(
    source: Url,
    bot_name: BotName,
    *,
    bot_id: TelebotId = None,
    prefix: Prefix = "telebot",
    separator: Separator = ":",
    overwrite: Overwrite = False,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """What pyTelegramBotAPI's StateRedisStorage keeps."""
    with _source_errors(source):
        from fsm_ray.transfer.telebot import import_telebot_redis

        options: dict[str, Any] = {"bot_id": bot_id, "prefix": prefix, "separator": separator}
        report = _import(
            address,
            lambda storage, tell: import_telebot_redis(
                source, storage, bot_name, overwrite=overwrite, progress=tell, **options
            ),
        )
    _finish_import(report, bot_name, as_json=as_json)


@import_from.command("telebot-pickle", epilog=EPILOG)
def telebot_pickle(
    source: File,
    bot_name: BotName,
    *,
    bot_id: TelebotId = None,
    prefix: Prefix = "telebot",
    separator: Separator = ":",
    overwrite: Overwrite = False,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """What pyTelegramBotAPI's StatePickleStorage keeps."""
    with _source_errors(str(source)):
        from fsm_ray.transfer.telebot import import_telebot_pickle

        options: dict[str, Any] = {"bot_id": bot_id, "prefix": prefix, "separator": separator}
        report = _import(
            address,
            lambda storage, tell: import_telebot_pickle(
                source, storage, bot_name, overwrite=overwrite, progress=tell, **options
            ),
        )
    _finish_import(report, bot_name, as_json=as_json)


@import_from.command("telegram-pickle", epilog=EPILOG)
def telegram_pickle(
    source: File,
    bot_name: BotName,
    *,
    overwrite: Overwrite = False,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """What python-telegram-bot's PicklePersistence keeps, in a single file or in several."""
    with _source_errors(str(source)):
        from fsm_ray.transfer.telegram import import_telegram_pickle

        report = _import(
            address,
            lambda storage, tell: import_telegram_pickle(
                source, storage, bot_name, overwrite=overwrite, progress=tell
            ),
        )
    _finish_import(report, bot_name, as_json=as_json)


def _move(
    what: str, address: str | None, work: Callable[[AsyncStorage, Progress], Awaitable[Report]]
) -> Report:
    """What came of the work, with a progress bar if somebody may be looking."""
    from fsm_ray.transfer import progress_bar

    async def move(storage: AsyncStorage) -> Report:
        with progress_bar(what) as progress:
            return await work(storage, progress)

    return run_attached(address, move)


def _import(address: str | None, work: Callable[[AsyncStorage, Progress], Awaitable[Report]]) -> Report:
    """As `_move`; one that does not come to its end says how far it was."""
    from fsm_ray.cli.texts import counted

    reached = 0

    async def counting(storage: AsyncStorage, progress: Progress) -> Report:
        def note(done: int, total: int | None) -> None:
            nonlocal reached
            reached = done
            progress(done, total)

        return await work(storage, note)

    try:
        return _move("Importing", address, counting)
    except BaseException as error:
        if reached or isinstance(error, KeyboardInterrupt):
            tell(f"Gone through {counted(reached, 'conversation')}: run it again to go on")
        raise


def _finish_import(report: Report, bot_name: str, *, as_json: bool) -> None:
    from fsm_ray.cli.texts import counted

    told = f"Imported {counted(report.written, 'conversation')} into {bot_name}"
    if report.skipped:
        told += f"; {report.skipped:,} {'was' if report.skipped == 1 else 'were'} there already, or ended"
    _finish(report, told, as_json=as_json)


def _finish(report: Report, told: str, *, as_json: bool, err: bool = False) -> None:
    """Tell what became of the conversations; fail if some were left out."""
    from fsm_ray.cli.texts import to_line

    if as_json:
        refused = [{"source": each.source, "reason": each.reason} for each in report.refused]
        typer.echo(
            to_line({"written": report.written, "skipped": report.skipped, "refused": refused}), err=err
        )
    else:
        typer.echo(told, err=err)
        for each in report.refused[:_SHOWN_REFUSALS]:
            tell(f"left out {each.source}: {each.reason}")
        if len(report.refused) > _SHOWN_REFUSALS:
            tell(f"and {len(report.refused) - _SHOWN_REFUSALS:,} more; --json tells all")
    if report.refused:
        raise typer.Exit(EXIT_FAILED)


def _write(file: str, work: Callable[[BinaryIO], Report], *, yes: bool) -> Report:
    """Let the work write to the file; what a regular one held before stays until the work has ended well."""
    try:
        if file == "-":
            return _write_to(sys.stdout.buffer, work)
        found = _status(file)
        if found is not None and not stat.S_ISREG(found.st_mode):
            with Path(file).open("wb") as stream:  # a device or a pipe, say
                return _write_to(stream, work)
        if found is not None:
            confirm(f"Replace {file}?", yes=yes)
        # The file that a symbolic link leads to is replaced, and not the link.
        return _replace(Path(file).resolve(), found, work)
    except BrokenPipeError:
        _fail("nobody reads the export any more: it is cut off", EXIT_FAILED)
    except OSError as error:
        _fail(f"{file}: {error.strerror or error}", EXIT_USAGE)


def _write_to(stream: BinaryIO, work: Callable[[BinaryIO], Report]) -> Report:
    report = work(stream)
    stream.flush()
    return report


def _status(file: str) -> os.stat_result | None:
    try:
        return Path(file).stat()
    except FileNotFoundError:
        return None


def _replace(path: Path, found: os.stat_result | None, work: Callable[[BinaryIO], Report]) -> Report:
    """Put what the work writes in the file's place, with its mode and owner; if not whole, only a new one."""
    number, name = tempfile.mkstemp(prefix="fsm-ray-export-", suffix=".part", dir=path.parent)
    part = Path(name)
    try:
        with os.fdopen(number, "wb") as stream:
            if found is not None:
                with suppress(PermissionError):
                    os.chown(part, found.st_uid, found.st_gid)
                part.chmod(stat.S_IMODE(found.st_mode))
            report = _write_to(stream, work)
            os.fsync(stream.fileno())
        if found is not None and report.refused:
            tell(f"{path} was left as it was; what could be exported is in {part}")
        else:
            part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return report


@contextmanager
def _opened(file: str) -> Iterator[BinaryIO]:
    if file == "-":
        yield sys.stdin.buffer
        return
    try:
        stream = Path(file).open("rb")  # noqa: SIM115 - closed below; errors of the block are not the file's
    except OSError as error:
        _fail(f"{file}: {error.strerror}", EXIT_USAGE)
    with stream:
        yield stream


@contextmanager
def _source_errors(source: str) -> Iterator[None]:
    """End with a line and an exit code where the source, not the bot, is the trouble."""
    from fsm_ray.options import redacted

    try:
        yield
    except OSError as error:
        _fail(f"{source}: {error.strerror or error}", EXIT_USAGE)
    except Exception as error:
        if type(error).__module__ != "redis.exceptions":
            raise
        _fail(f"the Redis at {redacted(source)}: {error}", EXIT_UNAVAILABLE)


def _fail(what: str, code: int) -> NoReturn:
    tell(f"fsm-ray: {' '.join(what.split())}")
    raise typer.Exit(code)
