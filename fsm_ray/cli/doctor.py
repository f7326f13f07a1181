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
from typing import Any

import ray
from packaging.requirements import Requirement
from ray._common.utils import get_ray_address_file
from ray._private.utils import read_ray_address

import fsm_ray
from fsm_ray.cli.bot_checks import check_bots
from fsm_ray.cli.looks import Check, ask, line, look_around, reach_store, tell_time
from fsm_ray.cli.shared import counted
from fsm_ray.errors import RayUnreachable
from fsm_ray.options import HEAD_NODE, make_options, redacted
from fsm_ray.protocol import PROTOCOL_VERSION
from fsm_ray.routing import directory

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

_BOT_PATIENCE_S = 5.0
_CLOCK_ROUNDS = 5

Sample = tuple[float, float, float]
"""When a question was sent, what the other clock said, and when its answer came."""


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
    looks = {node["NodeID"]: ask(node["NodeID"], look_around()) for node in nodes}
    for node in nodes:
        yield from _check_node(node, looks[node["NodeID"]])
    if store is not None:
        yield from _check_store(store, node_resource, nodes)
    yield from check_bots(address, patience_s)


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
            name, "problem", f"no task runs there: {line(look)}", "see to the node, or remove it from Ray"
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
        said = ask(node_id, tell_time())
        if isinstance(said, Exception):
            yield Check(f"{name}: clock", "problem", f"it cannot be asked: {line(said)}", "see to the node")
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
        found = ask(node["NodeID"], reach_store(), store)
        error = line(found) if isinstance(found, Exception) else found
        if error:
            cure = "see the message; the store must be reachable from every node on which the bot may run"
            yield Check(name, "problem", str(error), cure)
        else:
            yield Check(name, "ok", f"{shown} can be reached")


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
