"""Doctor: what keeps bots from working, and how to mend it.

Looked at are this process's packages, Ray, each node, the way to a store from where its actors run, and the
bots. Nothing is changed; on each node a task looks around.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import ray
from packaging.requirements import Requirement
from ray._common.utils import get_ray_address_file
from ray._private.utils import read_ray_address
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import fsm_ray
from fsm_ray.channel.client import Address, addresses, open_blocking
from fsm_ray.channel.frames import FrameTooLong
from fsm_ray.channel.handshake import HandshakeFailed
from fsm_ray.cli.bots import other_versions, upgrade_cure
from fsm_ray.cli.shared import counted
from fsm_ray.errors import (
    EncryptionKeysUnusable,
    FsmRayError,
    ProtocolMismatch,
    RayUnreachable,
    StoreUnavailable,
)
from fsm_ray.options import HEAD_NODE, make_options, redacted
from fsm_ray.protocol import PROTOCOL_VERSION
from fsm_ray.routing import directory
from fsm_ray.routing.directory import BotDescription, Directory
from fsm_ray.storage import Storage

EXTRAS = (
    "client",
    "aiogram",
    "telegram",
    "telebot",
    "rocksdb",
    "redis",
    "postgres",
    "objectstore",
    "encryption",
)
"""Those that bots are run with."""

MAX_CLOCK_OFFSET_S = 1.0
"""What the clocks of two machines may differ; times to live are told by the clock of a shard's node."""

_NODE_PATIENCE_S = 30.0
_BOT_PATIENCE_S = 5.0
_CONNECT_S = 2.0
_CLOCK_ROUNDS = 5

Sample = tuple[float, float, float]
"""When a question was sent, what the other clock said, and when its answer came."""


class Check(NamedTuple):
    """What was found."""

    name: str
    outcome: Literal["ok", "hint", "problem"]
    told: str
    cure: str = ""


def examine(
    address: str | None,
    store: str | None,
    node_resource: str | None,
    attach: Callable[[str | None], None],
    *,
    patience_s: float = _BOT_PATIENCE_S,
) -> Iterator[Check]:
    """Everything that is checked, in its order; without Ray, what can be."""
    yield _python()
    yield from check_packages(importlib.metadata.requires, importlib.metadata.version)
    yield from check_address_file(address)
    try:
        attach(address)
    except RayUnreachable as error:
        yield Check("Ray", "problem", str(error), "start Ray, or give --address or RAY_ADDRESS")
        return
    nodes = [node for node in ray.nodes() if node["Alive"]]
    yield Check("Ray", "ok", f"{ray.__version__}, {counted(len(nodes), 'node')}, as this process expects it")
    looks = {node["NodeID"]: _ask(node["NodeID"], _look_around()) for node in nodes}
    for node in nodes:
        yield from _check_node(node, looks[node["NodeID"]])
    if store is not None:
        yield from _check_store(store, node_resource, nodes)
    yield from _check_bots(address, patience_s)


def _python() -> Check:
    version = platform.python_version()
    return Check("Python", "ok", f"{version}, fsm-ray {fsm_ray.__version__}, protocol {PROTOCOL_VERSION}")


def check_packages(
    requires: Callable[[str], list[str] | None], version_of: Callable[[str], str]
) -> Iterator[Check]:
    """Whether what is installed has the versions that fsm-ray, and its extras that are in use, ask for."""
    try:
        requirements = [Requirement(each) for each in requires("fsm-ray") or []]
    except importlib.metadata.PackageNotFoundError:
        yield Check("packages", "hint", "fsm-ray is not installed as a package", "pip install fsm-ray")
        return
    for extra in ("", *EXTRAS):
        name = f"extra {extra}" if extra else "packages"
        wanted = [each for each in requirements if _is_of(each, extra)]
        found = {each.name: _version(each.name, version_of) for each in wanted}
        missing = [name for name, version in found.items() if version is None]
        wrong = [
            each
            for each in wanted
            if (version := found[each.name]) and not each.specifier.contains(version, prereleases=True)
        ]
        install = f"pip install -U 'fsm-ray{f'[{extra}]' if extra else ''}'"
        if wrong or (missing and not extra):
            told = [f"{each.name} is {found[each.name]}, not {each.specifier}" for each in wrong]
            told += [f"{each} is not installed" for each in missing]
            yield Check(name, "problem", "; ".join(told), install)
        elif found and not missing:
            yield Check(name, "ok", ", ".join(f"{package} {version}" for package, version in found.items()))


def check_address_file(address: str | None) -> Iterator[Check]:
    """Whether the file in which Ray remembers the last cluster of this machine names one that is gone."""
    remembered = read_ray_address()
    if not remembered or address or os.environ.get("RAY_ADDRESS"):
        return
    path = get_ray_address_file(None)
    try:
        directory.check_answers(remembered)
    except OSError as error:
        yield Check(
            "Ray's address file",
            "problem",
            f"{path} names {remembered}, where nobody answers ({error})",
            f"rm {path}; or start Ray again with `ray start --head`",
        )
    else:
        yield Check("Ray's address file", "ok", f"{path} names {remembered}, which answers")


def offset_of(samples: Iterable[Sample]) -> tuple[float, float]:
    """How many seconds another clock is ahead, and how far off that may be.

    The answer was made between question and answer, so the quickest exchange tells most.

    >>> offset_of([(10.0, 12.0, 14.0), (20.0, 20.6, 21.0)])
    (0.10000000000000142, 0.5)
    """
    sent, said, received = min(samples, key=lambda sample: sample[2] - sample[0])
    return said - (sent + received) / 2, (received - sent) / 2


def _check_node(node: dict[str, Any], look: Any) -> Iterator[Check]:
    name = f"node {node['NodeManagerAddress']} ({node['NodeID'][:8]})"
    if isinstance(look, Exception):
        yield Check(
            name, "problem", f"no task runs there: {_line(look)}", "see to the node, or remove it from Ray"
        )
        return
    if look["fsm_ray"] is None:
        yield Check(
            name,
            "problem",
            f"fsm_ray cannot be imported there: {look['error']}",
            f"pip install fsm-ray=={fsm_ray.__version__} on it, in the environment that Ray runs in",
        )
        return
    if (look["fsm_ray"], look["protocol"]) != (fsm_ray.__version__, PROTOCOL_VERSION):
        yield Check(
            name,
            "problem",
            f"it has fsm-ray {look['fsm_ray']} of protocol {look['protocol']}, and this machine "
            f"{fsm_ray.__version__} of {PROTOCOL_VERSION}",
            f"pip install fsm-ray=={fsm_ray.__version__} on all nodes",
        )
    if look["socket_error"]:
        yield Check(f"{name}: sockets", "problem", look["socket_error"], look["socket_cure"])
    if look["niceness"] > 0 and not look["is_root"]:
        yield Check(
            f"{name}: priority",
            "hint",
            f"Ray's workers run there at niceness {look['niceness']}, and so do shards",
            "start Ray with RAY_worker_niceness=0 in its environment",
        )
    yield from _check_clock(name, node["NodeID"])
    yield Check(
        name, "ok", f"fsm-ray {look['fsm_ray']}, Python {look['python']}, sockets in {look['sockets']}"
    )


def _check_clock(name: str, node_id: str) -> Iterator[Check]:
    samples: list[Sample] = []
    for _ in range(_CLOCK_ROUNDS):
        sent = time.time()
        said = _ask(node_id, _tell_time())
        if isinstance(said, Exception):
            yield Check(f"{name}: clock", "problem", f"it cannot be asked: {_line(said)}", "see to the node")
            return
        samples.append((sent, said, time.time()))
    offset_s, error_s = offset_of(samples)
    told = f"{offset_s:+.3f} s from this machine's, give or take {error_s:.3f}"
    if abs(offset_s) - error_s > MAX_CLOCK_OFFSET_S:
        yield Check(
            f"{name}: clock",
            "problem",
            f"{told}: conversations there end too early, or too late",
            "run chrony or another NTP client on all machines",
        )
    else:
        yield Check(f"{name}: clock", "ok", told)


def _check_store(store: str, node_resource: str | None, nodes: list[dict[str, Any]]) -> Iterator[Check]:
    options = make_options(None, {"store": store, "node_resource": node_resource})
    shown = redacted(store)
    if options.store_scheme == "memory":
        yield Check("store", "ok", "memory:// needs nothing")
        return
    where = [node for node in nodes if options.store_node in {None, *node["Resources"]}]
    if not where:
        resource = "Ray's head node" if options.store_node == HEAD_NODE else f"a node with {node_resource!r}"
        yield Check("store", "problem", f"{shown} lies on {resource}, and there is none", "start that node")
    for node in where:
        name = f"store from {node['NodeManagerAddress']} ({node['NodeID'][:8]})"
        found = _ask(node["NodeID"], _reach_store(), store)
        error = _line(found) if isinstance(found, Exception) else found
        if error:
            cure = "see the message; the store must be reachable from every node on which the bot may run"
            yield Check(name, "problem", str(error), cure)
        else:
            yield Check(name, "ok", f"{shown} can be reached")


def _check_bots(address: str | None, patience_s: float) -> Iterator[Check]:
    with Storage(address, timeout_s=patience_s) as storage:
        names = storage.bots()
        if not names:
            yield Check("bots", "ok", "none runs")
        bots = Directory(address, patience_s)
        with ThreadPoolExecutor(8) as pool:
            for checks in pool.map(lambda name: list(_check_bot(storage, bots, name)), names):
                yield from checks


def _check_bot(storage: Storage, bots: Directory, bot_name: str) -> Iterator[Check]:
    name = f"bot {bot_name}"
    try:
        description = storage.describe(bot_name)
        records = storage.count(bot_name)
    except FsmRayError as error:
        yield Check(name, "problem", f"it does not answer: {_line(error)}", _cure_of(error, bot_name))
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


_SEE_TO_STORE = "see to the store; the bot comes back by itself when its nodes can reach it"


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
        told = f"no connection to shard {shard} at {address}: {_line(error)}; slower Ray calls are made"
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
        found = _ask(node_id, _reach_store(), options.store, description.bot_name, shard)
        if error := _line(found) if isinstance(found, Exception) else found:
            faults += 1
            yield Check(f"{name} from node {node_id[:8]}", "problem", str(error), _SEE_TO_STORE)
    if not faults:
        where = counted(len(shard_of), "node")
        yield Check(name, "ok", f"{redacted(options.store)} can be reached from its {where}")


def _ask(node_id: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns on that node, or the error that it did not."""
    strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
    options = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": strategy}
    task: Any = ray.remote(function).options(**options)
    try:
        return ray.get(task.remote(*arguments), timeout=_NODE_PATIENCE_S)
    except RayError as error:
        return error


def _look_around() -> Callable[[], dict[str, Any]]:
    # A function in a function travels by value: a node may have another fsm_ray, or none.
    def look() -> dict[str, Any]:
        import os
        import platform

        found: dict[str, Any] = {
            "python": platform.python_version(),
            "niceness": os.nice(0),
            "is_root": os.geteuid() == 0,
            "fsm_ray": None,
            "socket_error": "",
        }
        try:
            import fsm_ray
            from fsm_ray.channel.server import MAX_UNIX_PATH_BYTES, socket_directory
            from fsm_ray.protocol import PROTOCOL_VERSION
        except ImportError as error:
            return found | {"error": str(error)}
        found |= {"fsm_ray": fsm_ray.__version__, "protocol": PROTOCOL_VERSION, "sockets": ""}
        try:
            sockets = socket_directory()
        except Exception as error:  # noqa: BLE001  # told, whatever it is
            cure = "mend it; or give TMPDIR a directory that Ray's user can write, and start Ray again"
            return found | {"socket_error": str(error), "socket_cure": cure}
        if len(os.fsencode(sockets)) + 1 + 24 > MAX_UNIX_PATH_BYTES:
            return found | {
                "socket_error": f"{sockets} is too long a path for sockets",
                "socket_cure": "set TMPDIR to a shorter directory, and start Ray again",
            }
        return found | {"sockets": str(sockets)}

    return look


def _tell_time() -> Callable[[], float]:
    def tell() -> float:
        import time

        return time.time()

    return tell


def _reach_store() -> Callable[..., str]:
    def reach(url: str, bot_name: str = "-", shard: int = 0) -> str:
        """What keeps a shard there from its store at the URL; nothing if nothing does. It is read alone."""
        import asyncio
        import os
        from pathlib import Path

        from fsm_ray.errors import FsmRayError, StoreMismatch
        from fsm_ray.stores.base import Place
        from fsm_ray.stores.by_url import inspectable

        async def read() -> None:
            place = Place(url=url, bot_name=bot_name, shard=shard, shards=shard + 1, lease_s=5.0)
            async for _ in inspectable(url)(place).rows():
                return

        try:
            if not url.startswith("rocksdb://"):
                asyncio.run(read())
                return ""
            inspectable(url)
        except StoreMismatch:
            return ""  # a database that no bot has used yet
        except FsmRayError as error:
            return str(error)
        directory = Path(url.partition("://")[2])
        there = next(path for path in (directory, *directory.parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            return f"{there} is no directory that Ray's user can write"
        return ""

    return reach


def _is_of(requirement: Requirement, extra: str) -> bool:
    marker = requirement.marker
    if requirement.name == "fsm-ray":
        return False
    if not extra:
        return marker is None or marker.evaluate({"extra": ""})
    return marker is not None and not marker.evaluate({"extra": ""}) and marker.evaluate({"extra": extra})


def _version(name: str, version_of: Callable[[str], str]) -> str | None:
    try:
        return version_of(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _line(error: Exception) -> str:
    """The error in one line; of a task's, the last, which has what went wrong."""
    lines = str(error).strip().splitlines() or [repr(error)]
    return f"{type(error).__name__}: {lines[-1].strip()}"
