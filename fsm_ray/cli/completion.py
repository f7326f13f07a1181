"""Completion of bots' names in a shell."""

from __future__ import annotations

import contextlib
import os
import threading

import typer

PATIENCE_S = 2.0
"""How long a completion may take, beside the import of Ray."""


def bot_names(ctx: typer.Context, incomplete: str) -> list[str]:
    """The bots of the Ray that --address or RAY_ADDRESS names, or that runs here; none where that fails.

    For the process of one completion: it hides stderr, and ends the process when Ray does not answer. No Ray
    is started, and none is attached to, which would take twice as long and note a job in it: its control
    store is asked. That is about a second for each Tab, of which importing Ray takes most.
    """
    # A shell prints what is written there into the middle of the line.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        return [name for name in _running(ctx.params.get("address")) if name.startswith(incomplete)]
    except Exception:  # noqa: BLE001  # whatever it is: there is nothing to offer
        return []


def _running(address: str | None) -> list[str]:
    from ray._private.state import GlobalState
    from ray._raylet import GcsClientOptions  # type: ignore[attr-defined]  # compiled

    from fsm_ray.actor import NamespaceActor
    from fsm_ray.routing import directory

    overdue = threading.Timer(PATIENCE_S, os._exit, (0,))
    overdue.daemon = True
    overdue.start()
    found = directory.find_running(address)
    if found is None:
        return []
    if not directory.named_address(address):
        _take_token()
    store = GlobalState()
    store._initialize_global_state(  # noqa: SLF001  # what Ray's own commands use, and its public ones attach
        GcsClientOptions.create(found, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=True)
    )
    actors = [
        actor
        for state in ("ALIVE", "RESTARTING")
        for actor in store.actor_table(None, actor_state_name=state).values()
    ]
    overdue.cancel()
    names = [
        each["Name"].rpartition("/") for each in actors if each["ActorClassName"] == NamespaceActor.__name__
    ]
    return sorted(bot_name for bot_name, _, shard in names if shard == "0")


def _take_token() -> None:
    """Use the token that Ray keeps here, as `ray.init` does for a cluster that it finds by itself."""
    with contextlib.suppress(ImportError):  # an older Ray, which has no tokens
        from ray._private.authentication import authentication_token_setup

        authentication_token_setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
