"""The commands about encryption keys: `keys new`, `keys add` and `rotate-keys`."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fsm_ray.cli.shared import Address, AsJson, BotName, attached
from fsm_ray.errors import EncryptionKeysUnusable
from fsm_ray.stores.keyring import add_key, make_key_file

if TYPE_CHECKING:
    from fsm_ray.routing.directory import KeyRotation

_POLL_S = 0.5

KeyFile = Annotated[Path, typer.Argument(metavar="FILE", help="The key file.", show_default=False)]
KeyId = Annotated[
    str | None, typer.Option("--id", help="What the key is called; records name it. Default: today's date.")
]

keys = typer.Typer(help="Make encryption keys, for the option `encryption_keys`.", no_args_is_help=True)


@keys.command()
def new(path: KeyFile, *, key_id: KeyId = None, as_json: AsJson = False) -> None:
    """Make a key file with one key, readable by its owner alone.

    Whoever loses the file loses what is encrypted with it: keep a copy where the store's backups are not.
    """
    key_id = key_id or _today()
    try:
        make_key_file(path, key_id)
    except FileExistsError as error:
        raise EncryptionKeysUnusable(
            f"{path} is there already, and is not replaced: what is encrypted with its keys would be lost. "
            f"To add a key: fsm-ray keys add {path}"
        ) from error
    except OSError as error:
        raise _not_written(path, error) from error
    option = f"file://{path.absolute()}"
    if as_json:
        _tell_json(key_id=key_id, encryption_keys=option)
    else:
        typer.echo(f"{path} has the key {key_id}. Copy it to every node, and init with:")
        typer.echo(f'    encryption_keys="{option}"')


@keys.command()
def add(path: KeyFile, *, key_id: KeyId = None, as_json: AsJson = False) -> None:
    """Add a key to a key file, to be used from the next `fsm-ray rotate-keys` on."""
    key_id = key_id or _today()
    try:
        add_key(path, key_id)
    except OSError as error:
        raise _not_written(path, error) from error
    if as_json:
        _tell_json(key_id=key_id, encryption_keys=f"file://{path.absolute()}")
    else:
        typer.echo(
            f"{path} has the key {key_id} now. Copy it to every node, and run: fsm-ray rotate-keys BOT"
        )


def rotate_keys(
    bot_name: BotName,
    *,
    wait: Annotated[bool, typer.Option(help="Wait until it is done.")] = True,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Let a bot's shards read their key file again, and encrypt everything with its current key.

    The bot works on meanwhile. What is interrupted, also by kill -9, goes on by itself; to see how far it is,
    run this again. When it says that it is done, keys other than the current one may be removed.
    """
    from rich.console import Console
    from rich.text import Text

    with attached(address) as storage, Console(stderr=True).status("Asking the shards") as status:
        rotation = storage.rotate_keys(bot_name)
        while wait and not rotation.is_done:
            status.update(Text(f"{rotation.pending:,} to be encrypted with {rotation.key_id}"))
            time.sleep(_POLL_S)
            rotation = storage.rotate_keys(bot_name)
    if as_json:
        facts = {"key_id": rotation.key_id, "pending": rotation.pending, "is_done": rotation.is_done}
        _tell_json(bot=bot_name, **facts)
    else:
        typer.echo(_to_text(bot_name, rotation))


def _tell_json(**facts: object) -> None:
    from fsm_ray.cli.texts import to_line

    typer.echo(to_line(facts))


def _to_text(bot_name: str, rotation: KeyRotation) -> str:
    if rotation.is_done:
        return f"All of {bot_name} is encrypted with the key {rotation.key_id}; other keys may be removed."
    return f"{bot_name} has {rotation.pending:,} records and answers left to encrypt with {rotation.key_id}."


def _today() -> str:
    return datetime.now(UTC).date().isoformat()


def _not_written(path: Path, error: OSError) -> EncryptionKeysUnusable:
    return EncryptionKeysUnusable(f"{path} cannot be written: {error.strerror}")
