"""One run of the demo, from start to end."""

from __future__ import annotations

import asyncio
import logging
import secrets
import shutil
import tempfile
import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from rich.console import Console

from fsm_ray.demo.config import DemoConfig
from fsm_ray.demo.crew import Crew
from fsm_ray.demo.crowd import JSON
from fsm_ray.demo.dialogue import check_update
from fsm_ray.demo.display import Display, counted
from fsm_ray.demo.feeder import Feeder
from fsm_ray.demo.reference import Records, reference_records
from fsm_ray.demo.report import Report, count_states, find_differences
from fsm_ray.demo.updates import Conversation, generate_updates, read_updates, write_updates
from fsm_ray.errors import (
    ConfigurationError,
    InvalidInput,
    NamespaceUnavailable,
    UnknownBot,
)
from fsm_ray.options import HEAD_NODE, redacted
from fsm_ray.routing.directory import BotDescription, attach, find_running
from fsm_ray.storage import Storage

_LARGEST_BATCH = 100
_SAMPLE = 100
_DROP_S = 15.0
_QUIET: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}


@dataclass(frozen=True)
class _Service:
    """What the workers did, and what is in the bot's namespace now."""

    crew: Crew
    seconds: float
    records: Records
    description: BotDescription


def run(config: DemoConfig, console: Console) -> Report:
    """Have workers serve the bot, and check what they arrive at; shows how it goes on the console.

    Starts a Ray and stops it unless one is there. Leaves no actors behind, also on an error or Ctrl-C.

    Raises:
        InvalidInput: the file holds something other than updates.
        ConfigurationError: among others, RayUnreachable: Ray is not there, and could not be started.
        NamespaceUnavailable: a shard of the bot gave no answer.
    """
    with Display(console) as display:
        updates = _load(config, display)
        with _ray(config, display):
            service = _serve(config, updates, display)
        start = time.monotonic()
        with display.stage("1 worker, MemoryStorage", len(updates)) as stage:
            expected = asyncio.run(reference_records(updates, stage.advance))
        return _report(config, updates, service, expected, time.monotonic() - start)


def _load(config: DemoConfig, display: Display) -> list[JSON]:
    if config.file is None:
        with (
            display.stage(f"Making {counted(config.updates, 'update')}"),
            tempfile.TemporaryDirectory() as directory,
        ):
            path = Path(directory, "updates.jsonl")
            write_updates(path, generate_updates(config.updates, config.seed))
            return read_updates(path)
    with display.stage(f"Reading {config.file}"):
        updates = read_updates(config.file)
        if not updates:
            raise InvalidInput(f"{config.file} holds no updates")
        for update in updates:
            check_update(update)
        return updates


def _serve(config: DemoConfig, updates: list[JSON], display: Display) -> _Service:
    batch_size = max(1, min(_LARGEST_BATCH, len(updates) // (8 * config.workers)))
    feeder = Feeder(updates, Conversation(), batch_size=batch_size)
    with Storage() as storage, _bot(storage, config, display) as bot_name:
        workers = counted(config.workers, "worker")
        crew = Crew(storage, bot_name, config.workers)
        with display.stage(f"Starting {workers}"):
            crew.assemble(updates[:_SAMPLE])
        start = time.monotonic()
        with display.stage(f"{workers}, fsm_ray", len(updates)) as stage:
            crew.serve(feeder, stage.advance)
        seconds = time.monotonic() - start
        states = {key: storage.get_state(bot_name, key) for key in _conversations(updates)}
        records = {key: record for key, record in states.items() if record is not None}
        return _Service(crew, seconds, records, storage.describe(bot_name))


def _conversations(updates: list[JSON]) -> set[Hashable]:
    keys = map(Conversation().extract, updates)
    return {key for key in keys if key is not None}


def _report(
    config: DemoConfig, updates: list[JSON], service: _Service, expected: Records, reference_seconds: float
) -> Report:
    keys = _conversations(updates)
    shards = service.description.shards
    return Report(
        bot_name=service.description.bot_name,
        updates=len(updates),
        conversations=len(keys),
        workers=config.workers,
        processes=len(service.crew.processes),
        shards=len(shards),
        nodes=len({process.node_id for process in service.crew.processes}),
        handovers=service.crew.handovers,
        lost_workers=service.crew.lost,
        failed_updates=service.crew.failed,
        seconds=service.seconds,
        reference_seconds=reference_seconds,
        states=count_states(keys, service.records),
        differences=find_differences(expected, service.records),
        stray_records=sum(shard.statistics.records for shard in shards) - len(service.records),
        restarted_empty=tuple(shard.shard for shard in shards if shard.restarted_empty),
    )


@contextmanager
def _bot(storage: Storage, config: DemoConfig, display: Display) -> Iterator[str]:
    """A new bot, dropped in the end unless it is to be kept."""
    # A name of its own: the records of an earlier run, or of one at the same time, must not be met.
    bot_name = f"demo-{secrets.token_hex(4)}"
    directory = Path(tempfile.gettempdir(), f"fsm-ray-{bot_name}")
    store = config.store or f"rocksdb://{directory}"
    try:
        with display.stage(f"Making bot {bot_name}, {counted(config.shards, 'shard')}") as stage:
            storage.init(bot_name, store=store, shards=config.shards)
            stage.note(f"records in {redacted(store)}")
        yield bot_name
    finally:
        if config.keep:
            display.tell(
                f"Bot {bot_name} is kept: Storage().drop({bot_name!r}) ends it, and leaves {redacted(store)}"
            )
        else:
            _drop(storage, bot_name, display)
            if config.store is None:
                _remove(directory)


def _remove(directory: Path) -> None:
    """Remove it from the disk of the head node, where the bot's actors were."""
    remove: Any = ray.remote(shutil.rmtree).options(num_cpus=0, resources={HEAD_NODE: 0.0001})
    ray.get(remove.remote(directory, ignore_errors=True), timeout=_DROP_S)


def _drop(storage: Storage, bot_name: str, display: Display) -> None:
    """Drop the bot, though actors of it may be just restarting."""
    deadline = time.monotonic() + _DROP_S
    while True:
        try:
            storage.drop(bot_name)
        except UnknownBot:
            return
        except NamespaceUnavailable as error:
            if time.monotonic() > deadline:
                display.tell(f"Bot {bot_name} could not be dropped: {error}")
                return
            time.sleep(0.2)
        else:
            return


@contextmanager
def _ray(config: DemoConfig, display: Display) -> Iterator[None]:
    """Ray, found or started; what was started is stopped in the end."""
    if ray.is_initialized():
        yield
        return
    try:
        with display.stage("Ray") as stage:
            was_started = _attach(config)
            address = ray.get_runtime_context().gcs_address
            stage.note("started for this run" if was_started else f"found at {address}")
        yield
    finally:
        ray.shutdown()


def _attach(config: DemoConfig) -> bool:
    """Attach to the Ray at the address, to one on this machine, or to a new one; True if it is new."""
    if config.address != "local" and _is_there(config.address):
        attach(config.address, may_start=False, **_QUIET)
        return False
    if config.keep:
        raise ConfigurationError(
            "there is no Ray to keep the bot on: start one with `ray start --head`, or leave --keep out"
        )
    attach("local", num_cpus=config.workers, include_dashboard=False, **_QUIET)
    return True


def _is_there(address: str | None) -> bool:
    """Whether a Ray is named, or runs on this machine."""
    try:
        return find_running(address, may_start=True) is not None
    except OSError:
        return True  # it does not answer: `attach` says so
