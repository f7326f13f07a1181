"""Checks of a bot: whether it answers, also over its sockets, and whether its nodes reach its store."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from fsm_ray.channel.client import Address, addresses, open_blocking
from fsm_ray.channel.frames import FrameTooLong
from fsm_ray.channel.handshake import HandshakeFailed
from fsm_ray.cli.bots import other_versions, upgrade_cure
from fsm_ray.cli.looks import Check, ask, line, reach_store
from fsm_ray.cli.shared import counted
from fsm_ray.errors import EncryptionKeysUnusable, FsmRayError, ProtocolMismatch, StoreUnavailable
from fsm_ray.options import redacted
from fsm_ray.routing.directory import BotDescription, Directory
from fsm_ray.storage import Storage

_CONNECT_S = 2.0

_SEE_TO_STORE = "see to the store; the bot comes back by itself when its nodes can reach it"


def check_bots(address: str | None, patience_s: float) -> Iterator[Check]:
    """What is found of the bots of that Ray, each asked for so long."""
    with Storage(address, timeout_s=patience_s) as storage:
        names = storage.bots()
        if not names:
            yield Check("bots", "ok", "none runs")
        bots = Directory(address, patience_s)
        with ThreadPoolExecutor(8) as pool:
            for checks in pool.map(lambda name: list(check_bot(storage, bots, name)), names):
                yield from checks


def check_bot(storage: Storage, bots: Directory, bot_name: str) -> Iterator[Check]:
    """What is found of one bot; where it does not answer, that alone."""
    name = f"bot {bot_name}"
    try:
        description = storage.describe(bot_name)
        records = storage.count(bot_name)
    except FsmRayError as error:
        yield Check(name, "problem", f"it does not answer: {line(error)}", _cure_of(error, bot_name))
        return
    yield _check_answers(description, records)
    yield from _check_channels(bots, description)
    yield from _check_its_store(description)


def _cure_of(error: FsmRayError, bot_name: str) -> str:
    """How to mend a bot that answers with this error."""
    match error:
        case ProtocolMismatch():
            return f"use its version of fsm-ray here; or {upgrade_cure(bot_name)}"
        case EncryptionKeysUnusable():
            return "see to the keys on the nodes of its actors; they are not needed here"
        case StoreUnavailable():
            return _SEE_TO_STORE
    return "see its actors' logs (`ray list actors`, `ray logs actor --id ...`); `fsm-ray drop` ends it"


def _check_answers(description: BotDescription, records: int) -> Check:
    """What a bot that answers says of itself."""
    name = f"bot {description.bot_name}"
    empty = [shard.shard for shard in description.shards if shard.restarted_empty]
    if empty:
        told = f"shards {', '.join(map(str, empty))} were restarted and came back empty"
        return Check(name, "hint", told, "give it a store that outlives its actors")
    if versions := other_versions(description.shards):
        told = f"its actors are of another version. {versions}"
        return Check(name, "hint", told, upgrade_cure(description.bot_name))
    keys = description.options.encryption_keys
    encrypted = f", encrypted with the keys in {keys} on its nodes" if keys else ""
    told = f"{counted(len(description.shards), 'shard')}, {counted(records, 'record')}{encrypted}"
    return Check(name, "ok", told)


def _check_channels(bots: Directory, description: BotDescription) -> Iterator[Check]:
    """Whether a client here gets its connections: where it gets none, it makes slower Ray calls silently."""
    if bots.is_remote:
        return  # all that goes through Ray Client is Ray calls
    name = f"bot {description.bot_name}: connections"
    faults = [
        check
        for shard in range(description.options.shards)
        if (check := _check_channel(bots, description.bot_name, shard, name))
    ]
    yield from faults
    if not faults:
        yield Check(
            name, "ok", f"{counted(description.options.shards, 'shard')} can be connected to from here"
        )


def _check_channel(bots: Directory, bot_name: str, shard: int, name: str) -> Check | None:
    """What keeps a client here from the quickest way to the shard; None if nothing does."""
    address: Address | None = None
    try:
        endpoint = bots.locate(bot_name, shard)
        address = next(addresses(endpoint, bots.node_id), None)
        if address is None:
            raise ConnectionRefusedError("it listens nowhere")  # told as all that is wrong
        open_blocking(address, endpoint.secret, _CONNECT_S).close()
    except (OSError, FrameTooLong, HandshakeFailed, FsmRayError) as error:
        told = f"no connection to shard {shard} at {address}: {line(error)}; slower Ray calls are made"
        if isinstance(address, str):
            return Check(name, "problem", told, _cure_of_socket(error, bot_name))
        cure = "let workers connect to that address; the bot's option listen_host chooses it"
        return Check(name, "hint", told, cure)
    return None


def _cure_of_socket(error: Exception, bot_name: str) -> str:
    if isinstance(error, FileNotFoundError | ConnectionRefusedError):
        return f"see what removes files there; new actors make new ones: fsm-ray upgrade {bot_name} --force"
    return "run workers, and this, as the user that Ray runs as"


def _check_its_store(description: BotDescription) -> Iterator[Check]:
    """Whether the bot's nodes reach its store: it answers reads for a while when they do not."""
    options = description.options
    if options.store_scheme == "memory":
        return
    name = f"bot {description.bot_name}: store"
    shard_of = {shard.node_id: shard.shard for shard in description.shards}
    faults = 0
    for node_id, shard in shard_of.items():
        found = ask(node_id, reach_store(), options.store, description.bot_name, shard)
        if error := line(found) if isinstance(found, Exception) else found:
            faults += 1
            yield Check(f"{name} from node {node_id[:8]}", "problem", str(error), _SEE_TO_STORE)
    if not faults:
        where = counted(len(shard_of), "node")
        yield Check(name, "ok", f"{redacted(options.store)} can be reached from its {where}")
