"""The commands that move conversations: `export`, `import` and `import-from`."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from fsm_ray.cli.exits import EPILOG, EXIT_FAILED, EXIT_UNAVAILABLE, EXIT_USAGE
from fsm_ray.cli.shared import Address, AsJson, BotName, Overwrite, Yes, confirm, run_attached, tell

if TYPE_CHECKING:
    from fsm_ray.storage import AsyncStorage
    from fsm_ray.transfer import Progress, Report

_SHOWN_REFUSALS = 10

import_from = typer.Typer(
    help="Bring the conversations of another storage into a bot, which its `init` must have made."
    " What is there already is left alone, so it may be run again.",
    no_args_is_help=True,
)

Url = Annotated[str, typer.Argument(metavar="URL", help="Of the Redis.", show_default=False)]
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

    A file that is there is replaced only when the export is whole. Fails if a conversation had to be left
    out because it cannot be decoded here.
    """
    from fsm_ray.transfer import export as write_lines

    if file != "-" and Path(file).exists():
        confirm(f"Replace {file}?", yes=yes)
    with _written(file) as stream:
        report = _move(
            "Exporting", address, lambda storage, tell: write_lines(storage, bot_name, stream, progress=tell)
        )
    _finish(report, f"Exported {report.written:,} conversations of {bot_name}", as_json=as_json, err=True)


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

    Conversations that are there already are left alone, so an import that was interrupted is begun again.
    """
    from fsm_ray.transfer import import_ as read_lines

    with _opened(file) as stream:
        report = _move(
            "Importing",
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
    with _source_errors(source):
        from fsm_ray.transfer.aiogram import DefaultKeyBuilder, import_aiogram_redis

        builder = DefaultKeyBuilder(
            prefix=prefix,
            separator=separator,
            with_bot_id=with_bot_id,
            with_business_connection_id=with_business_connection_id,
            with_destiny=with_destiny,
        )
        report = _move(
            "Importing",
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
        report = _move(
            "Importing",
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
        report = _move(
            "Importing",
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

        report = _move(
            "Importing",
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


def _finish_import(report: Report, bot_name: str, *, as_json: bool) -> None:
    skipped = f"; {report.skipped:,} were there already, or have ended" if report.skipped else ""
    _finish(report, f"Imported {report.written:,} conversations into {bot_name}{skipped}", as_json=as_json)


def _finish(report: Report, told: str, *, as_json: bool, err: bool = False) -> None:
    """Tell what became of the conversations; fail if some were left out."""
    if as_json:
        from fsm_ray.cli.texts import to_line

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


@contextmanager
def _written(file: str) -> Iterator[BinaryIO]:
    """The file to write; what it held before stays until the block has ended well."""
    if file == "-":
        yield sys.stdout.buffer
        return
    import os

    path = Path(file)
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(path)
    except OSError as error:
        _fail(f"{file}: {error.strerror}", EXIT_USAGE)
    finally:
        part.unlink(missing_ok=True)


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


def _fail(what: str, code: int) -> Any:
    tell(f"fsm-ray: {' '.join(what.split())}")
    raise typer.Exit(code)
