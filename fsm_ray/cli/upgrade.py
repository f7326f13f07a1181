"""The command `upgrade`."""

from __future__ import annotations

from typing import Annotated

import typer

from fsm_ray.cli.shared import Address, AsJson, BotName, attached, status


def upgrade(
    bot_name: BotName,
    *,
    force: Annotated[bool, typer.Option("--force", help="Replace actors of this version, too.")] = False,
    allow_loss: Annotated[
        bool, typer.Option("--allow-loss", help="Lose the records of a memory:// bot.")
    ] = False,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that one shard may be away.")] = 60.0,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Replace a bot's actors by ones of this version of fsm_ray, one shard at a time, while it runs.

    Operations on a shard wait while it is replaced. No acknowledged write is lost, and none takes effect
    twice. Install the new version on all nodes before. What failed or was interrupted can be repeated, and
    goes on.
    """
    from dataclasses import asdict

    import fsm_ray
    from fsm_ray.cli.texts import to_line

    with attached(address) as storage, status(f"Upgrading {bot_name}"):
        replaced = storage.upgrade(bot_name, force=force, allow_loss=allow_loss, timeout_s=timeout)
    for shard in replaced:
        if as_json:
            typer.echo(to_line(asdict(shard)))
        else:
            versions = f"{shard.old_version or 'unknown'} -> {shard.new_version}"
            typer.echo(f"shard {shard.shard}: {versions}, {shard.away_s:.1f} s")
    if not replaced and not as_json:
        typer.echo(f"All shards of {bot_name} run fsm_ray {fsm_ray.__version__} already.")
